"""From logits to the next token: greedy, or drawn at random from a filtered distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray

from mamba_deploy.errors import EngineError, InputError

__all__ = ["NOT_FINITE", "Sampler", "Sampling", "distribution"]

NOT_FINITE = (  # what to do about such logits
    "run 'mamba-deploy verify' on this bundle; float16 overflows above 65504, "
    "so an export with --dtype bf16 or fp32 may help"
)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy search.

    Filters act in the order in which Hugging Face ``generate()`` applies them, each on what the one before
    has left: repetition penalty, temperature, top-k, top-p, min-p. With temperature 0 the filters after it
    cannot change the answer and are not run.

    Raises:
        InputError: on construction, when a value is out of its range.
    """

    temperature: float = 0.0  # 0: always the most likely token
    top_k: int = 0  # keep the k most likely tokens, and those equal to the k-th; 0: off
    top_p: float = 1.0  # keep the fewest most likely tokens whose probabilities add up to p; 1: off
    min_p: float = 0.0  # keep tokens at least min_p times as likely as the most likely one; 0: off
    repetition_penalty: float = 1.0  # above 1 makes tokens of prompt and answer less likely (CTRL paper); 1: off
    seed: int | None = None  # None: different at each run

    def __post_init__(self) -> None:
        _check(self.temperature, "temperature", "a finite number, 0 (greedy) or above", lambda v: v >= 0)
        if not isinstance(self.top_k, Integral) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise InputError(f"top_k is {self.top_k!r}: expected an integer, 0 (off) or above")
        _check(self.top_p, "top_p", "a number above 0 and at most 1 (off)", lambda v: 0 < v <= 1)
        _check(self.min_p, "min_p", "a number from 0 (off) to 1", lambda v: 0 <= v <= 1)
        _check(self.repetition_penalty, "repetition_penalty", "a finite number above 0 (1 is off)", lambda v: v > 0)
        if self.seed is not None and (
            not isinstance(self.seed, Integral) or isinstance(self.seed, bool) or self.seed < 0
        ):
            raise InputError(f"seed is {self.seed!r}: expected None or an integer, 0 or above")


class Sampler:
    """Chooses the next token of one row.

    It holds a random generator seeded from ``(sampling.seed, row)`` and draws from it once a token, so what a row
    draws does not depend on the other rows of its batch.
    """

    def __init__(self, sampling: Sampling, row: int = 0) -> None:
        """For a row of a batch."""
        self._sampling, self._row = sampling, row
        self._generator = np.random.default_rng(np.random.SeedSequence(sampling.seed, spawn_key=(row,)))

    def __call__(self, logits: NDArray[np.float32], history: Sequence[int]) -> int:
        """The next id.

        Args:
            logits: float32 [V].
            history: The ids so far, prompt first, which only the repetition penalty looks at.

        Returns:
            Among equally likely tokens greedy search takes the lowest id.

        Raises:
            InputError: the logits are not one row.
            EngineError: a logit is NaN or infinite.
        """
        scores = _penalized(logits, history, self._sampling.repetition_penalty, self._row)
        if self._sampling.temperature == 0:
            return int(np.argmax(scores))
        ids, weights = _filtered(scores, self._sampling)
        cumulative = np.cumsum(weights)
        return int(ids[np.searchsorted(cumulative, self.draw() * cumulative[-1], side="right")])

    def draw(self) -> float:
        """The random number of a choice, in [0, 1); for one that is made elsewhere."""
        return float(self._generator.random())


def distribution(
    logits: NDArray[np.float32], history: Sequence[int], sampling: Sampling, *, row: int = 0
) -> NDArray[np.float64]:
    """The probabilities from which a sampler draws.

    Args:
        logits: float32 [V].
        history: The ids so far, prompt first. Those that are no token of the vocabulary are ignored.
        sampling: The filters.
        row: Named in errors.

    Returns:
        float64 [V], adding up to 1; with temperature 0 all on one token.

    Raises:
        InputError: the logits are not one row.
        EngineError: a logit is NaN or infinite.
    """
    scores = _penalized(logits, history, sampling.repetition_penalty, row)
    probabilities = np.zeros(len(scores), dtype=np.float64)
    if sampling.temperature == 0:
        probabilities[np.argmax(scores)] = 1.0
    else:
        ids, weights = _filtered(scores, sampling)
        probabilities[ids] = weights / weights.sum()
    return probabilities


def _check(value: float, name: str, allowed: str, inside: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not inside(value):
        raise InputError(f"{name} is {value!r}: expected {allowed}")


def _penalized(logits: NDArray[np.float32], history: Sequence[int], penalty: float, row: int) -> NDArray[np.floating]:
    """Checked logits [V] after the repetition penalty, as in Hugging Face RepetitionPenaltyLogitsProcessor."""
    if logits.ndim != 1 or logits.size == 0:
        raise InputError(f"logits of row {row} have the shape {list(logits.shape)}: expected [V], V at least 1")
    finite = np.isfinite(logits)
    if not finite.all():
        raise EngineError(
            f"logits of row {row} are not finite: {np.count_nonzero(~finite)} of {logits.size} are NaN or infinite",
            hint=NOT_FINITE,
        )
    if penalty == 1:
        return logits
    ids = np.asarray(history, dtype=np.int64)
    ids = ids[(ids >= 0) & (ids < logits.size)]
    scores = logits.astype(np.float64)
    seen = scores[ids]
    limit = np.finfo(np.float64).max
    with np.errstate(over="ignore"):
        scores[ids] = np.clip(np.where(seen < 0, seen * penalty, seen / penalty), -limit, limit)
    return scores


def _filtered(scores: NDArray[np.floating], sampling: Sampling) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Temperature, top-k, top-p, min-p.

    Returns:
        Ids in ascending order and their weights; the highest weight is 1.
    """
    with np.errstate(over="ignore"):  # far below the highest becomes -inf, whose weight is 0
        scores = (scores.astype(np.float64) - scores.max()) / sampling.temperature
    if 0 < sampling.top_k < scores.size:
        position = scores.size - sampling.top_k
        ids = np.flatnonzero(scores >= np.partition(scores, position)[position])
    else:
        ids = np.arange(scores.size)
    weights = np.exp(scores[ids])
    if sampling.top_p < 1:
        kept = _nucleus(weights, sampling.top_p)
        ids, weights = ids[kept], weights[kept]
    if sampling.min_p > 0:
        likely = weights >= sampling.min_p
        ids, weights = ids[likely], weights[likely]
    return ids, weights


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Ascending positions of the fewest highest weights that reach the share top_p; among equals the lowest first.

    The nucleus is small as a rule: sorting the highest 1024 first, and more only if they do not reach it,
    is several times faster than sorting a vocabulary.
    """
    total = weights.sum()
    size = min(1024, weights.size)
    while True:
        position = weights.size - size
        head = np.flatnonzero(weights >= np.partition(weights, position)[position])
        head = head[np.argsort(-weights[head], kind="stable")]
        share = np.cumsum(weights[head]) / total
        if share[-1] >= top_p or size == weights.size:
            return np.sort(head[: np.searchsorted(share, top_p, side="left") + 1])
        size = min(8 * size, weights.size)
