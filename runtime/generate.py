"""The decode loop: prompts in, tokens out, one step for all rows of a batch at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mamba_deploy.errors import InputError
from mamba_deploy.runtime.sampling import Sampler, Sampling
from mamba_deploy.runtime.tokenizer import Detokenizer, Tokenizer

__all__ = ["Decoder", "FinishReason", "Statistics", "Token", "generate"]

FinishReason = Literal["eos", "stop", "length"]


class Decoder(Protocol):
    """What :func:`generate` needs of a session."""

    def prefill(self, rows: Sequence[Sequence[int]], /) -> NDArray[np.float32]:
        """Feed each row's token ids onto its current state.

        Returns:
            Logits float32 [B, V] at each row's last token. A row without tokens keeps its state, and its logits
            mean nothing.
        """
        ...


class Ahead(Protocol):
    """Decoding that goes on without the host, which reads the tokens behind: :mod:`mamba_deploy.runtime.ahead`."""

    def next(self) -> NDArray[np.int32]:
        """The tokens [B] after the next step."""
        ...

    def row_has_ended(self, row: int) -> None:
        """With one of the tokens that end a row."""
        ...

    def end_row(self, row: int) -> None:
        """For a reason that the device does not know."""
        ...

    def close(self) -> None:
        """Leave the state after the steps that were asked for."""
        ...


# tokens (-1: a row that has ended), sampling, ids that end a row, steps at most, random number for a row; or it cannot
StartAhead = Callable[[Sequence[int], Sampling, Sequence[int], int, Callable[[int], float]], "Ahead | None"]


@dataclass(frozen=True)
class Token:
    """One generated token. ``str(token)`` is its text, so that tokens can be printed as they come."""

    id: int
    text: str  # what it completes: may be "", or hold more than the token's own text
    row: int
    index: int  # among the generated tokens of its row, from 0
    finish_reason: FinishReason | None = None  # None: the row goes on

    def __str__(self) -> str:
        return self.text


@dataclass
class Statistics:
    """Counts and times, summed over rows. :func:`generate` adds to them, before it yields the tokens counted.

    The times leave out what the caller does between two tokens.
    """

    rows: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prompt_seconds: float = 0.0  # until the first logits
    decode_seconds: float = 0.0  # of all steps after these: feeding, sampling, making text

    @property
    def prompt_tokens_per_second(self) -> float:
        """0 before there is a time."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Without the first token of each row, which comes from the prompt's logits. 0 before there is a time."""
        return (self.generated_tokens - self.rows) / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, float]:
        """The fields and both rates, as JSON writes them."""
        return dataclasses.asdict(self) | {
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    eos_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    statistics: Statistics | None = None,
    ahead: StartAhead | None = None,
) -> Iterator[Token]:
    """Continue each prompt until its row ends.

    A row ends at

    * an end-of-sequence token, finish reason ``eos``: it is yielded too, but is no part of the text;
    * a stop string, ``stop``: the text ends before it. It may span tokens. Where several could match, the one that
      is complete first counts, and of those the longest. Special tokens are no part of the text: stop at them
      through ``eos_ids``;
    * ``max_tokens``, ``length``.

    The texts of a row's tokens, joined, are the decoded whole. Text that may turn out to be the beginning of a stop
    string, and bytes that are not yet a character, are held back until that is decided; the row's last token
    brings what is left of them.

    Nothing is fed after the last token of a row: its state then covers the prompt and all yielded tokens but the last.
    The first ``next()`` feeds the prompts, each later step the tokens just yielded.

    Args:
        decoder: Its current states are continued, not reset.
        prompts: Token ids, one non-empty sequence a row.
        max_tokens: Per row, at least 1.
        sampling: How each token is chosen. The repetition penalty counts the prompt's tokens too.
        eos_ids: Ids that end a row.
        stop: Strings that end a row; they need a tokenizer.
        tokenizer: Without it the tokens have no text.
        statistics: To be filled in.
        ahead: Starts decoding on the device, where the decoder can; see :class:`Ahead`.

    Returns:
        An iterator over the tokens of all rows: in the order of the rows within a step, ended rows left out.

    Raises:
        InputError: at once, for an argument that is out of range.
        EngineError: from the iterator, for logits that are not finite, or whatever the decoder raises.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, Integral) or max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens!r}: expected an integer, 1 or above")
    if isinstance(stop, str) or any(not isinstance(text, str) or not text for text in stop):
        raise InputError(f"stop is {stop!r}: expected a list of strings that are not empty")
    if stop and tokenizer is None:
        raise InputError(
            "stop strings need a tokenizer, and there is none",
            hint="put tokenizer.json into the bundle, or end rows by token through eos_ids",
        )
    if len(prompts) == 0:
        raise InputError("prompts is empty: expected at least one row of token ids")
    checked = [_checked_ids(prompt, f"prompts[{row}]") for row, prompt in enumerate(prompts)]
    for row, prompt in enumerate(checked):
        if not prompt:
            raise InputError(
                f"prompts[{row}] is empty: expected at least one token id",
                hint="to start from nothing, give the model's beginning- or end-of-sequence token",
            )
    rows = [
        _Row(
            index=row,
            history=prompt,
            end=len(prompt) + max_tokens,
            eos_ids=frozenset(_checked_ids(eos_ids, "eos_ids")),
            sample=Sampler(sampling, row),
            text=None if tokenizer is None else _Text(Detokenizer(tokenizer), tuple(stop)),
        )
        for row, prompt in enumerate(checked)
    ]
    return _steps(decoder, rows, Statistics() if statistics is None else statistics, ahead, sampling)


def _checked_ids(ids: Any, name: str) -> list[int]:
    if not isinstance(ids, Iterable) or isinstance(ids, str):
        raise InputError(f"{name} is {ids!r}: expected a sequence of token ids")
    checked = list(ids)
    for position, token_id in enumerate(checked):
        if not isinstance(token_id, Integral) or token_id < 0:
            raise InputError(f"{name}[{position}] is {token_id!r}: expected a token id, an integer 0 or above")
    return [int(token_id) for token_id in checked]


def _steps(
    decoder: Decoder, rows: Sequence[_Row], statistics: Statistics, ahead: StartAhead | None, sampling: Sampling
) -> Iterator[Token]:
    start = time.perf_counter()
    logits = decoder.prefill([list(row.history) for row in rows])
    statistics.prompt_seconds += time.perf_counter() - start
    statistics.rows += len(rows)
    statistics.prompt_tokens += sum(len(row.history) for row in rows)
    tokens = [row.next_token(logits[row.index]) for row in rows]
    statistics.generated_tokens += len(tokens)
    yield from tokens
    if not any(row.is_running for row in rows):
        return
    step: _HostStep | _AheadStep = _HostStep(decoder)
    if ahead is not None:
        start = time.perf_counter()
        step = _start_ahead(ahead, rows, sampling) or step
        statistics.decode_seconds += time.perf_counter() - start
    try:
        while any(row.is_running for row in rows):
            start = time.perf_counter()
            tokens = step(rows)
            statistics.decode_seconds += time.perf_counter() - start
            statistics.generated_tokens += len(tokens)
            yield from tokens
    finally:
        step.close()


class _HostStep:
    """A step whose logits come to the host, which chooses."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def __call__(self, rows: Sequence[_Row]) -> list[Token]:
        logits = self._decoder.prefill([row.history[-1:] if row.is_running else [] for row in rows])
        return [row.next_token(logits[row.index]) for row in rows if row.is_running]

    def close(self) -> None:
        """Nothing is left to do."""


class _AheadStep:
    """A step that was done on the device, and more of them after it."""

    def __init__(self, ahead: Ahead) -> None:
        self._ahead = ahead

    def __call__(self, rows: Sequence[_Row]) -> list[Token]:
        chosen = self._ahead.next()
        tokens = []
        for row in rows:
            if row.is_running:
                tokens.append(row.take(int(chosen[row.index])))
                if tokens[-1].finish_reason == "eos":
                    self._ahead.row_has_ended(row.index)
                elif not row.is_running:
                    self._ahead.end_row(row.index)
        return tokens

    def close(self) -> None:
        """Take back what is too much."""
        self._ahead.close()


def _start_ahead(start: StartAhead, rows: Sequence[_Row], sampling: Sampling) -> _AheadStep | None:
    tokens = [row.history[-1] if row.is_running else -1 for row in rows]
    limit = max(row.end - len(row.history) for row in rows)
    started = start(tokens, sampling, sorted(rows[0].eos_ids), limit, lambda row: rows[row].sample.draw())
    return None if started is None else _AheadStep(started)


@dataclass
class _Row:
    """One row while it is generated."""

    index: int
    history: list[int]  # prompt and generated ids
    end: int  # length of the history at which the row ends
    eos_ids: frozenset[int]
    sample: Sampler
    text: _Text | None
    generated: int = 0
    is_running: bool = True

    def next_token(self, logits: NDArray[np.float32]) -> Token:
        """Choose a token from logits [V] and find out whether the row ends with it."""
        return self.take(self.sample(logits, self.history))

    def take(self, token_id: int) -> Token:
        """A token that was chosen; find out whether the row ends with it."""
        self.history.append(token_id)
        self.generated += 1
        reason: FinishReason | None = None
        if token_id in self.eos_ids:
            reason = "eos"
        elif len(self.history) == self.end:
            reason = "length"
        text = ""
        if self.text is not None:
            if reason != "eos":
                text = self.text.push(token_id)
            if reason is not None:
                text += self.text.flush()
            if self.text.is_stopped:
                reason = "stop"
        self.is_running = reason is None
        return Token(token_id, text, self.index, self.generated - 1, reason)


class _Text:
    """The text of one row up to the first stop string."""

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._held = ""  # the beginning of a stop string, perhaps
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """The text that is decided now."""
        return self._take(self._detokenizer.push(token_id))

    def flush(self) -> str:
        """What is left at the end of the row."""
        text = self._take(self._detokenizer.flush()) + self._held
        self._held = ""
        return text

    def _take(self, new: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + new
        cut = _first_stop(text, self._stop)
        self.is_stopped = cut is not None
        if cut is None:
            cut = len(text) - _stop_beginning(text, self._stop)
            self._held = text[cut:]
        else:
            self._held = ""
        return text[:cut]


def _first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the stop string begins that is complete first, and of those the longest; None without one.

    Asking for the one that begins first would make the answer depend on how the text is cut into tokens.
    """
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return min(found)[1] if found else None


def _stop_beginning(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of the text with which a stop string begins."""
    longest = min(len(text), max(map(len, stop), default=1) - 1)
    lengths = range(longest, 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stop)), 0)
