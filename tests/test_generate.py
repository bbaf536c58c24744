"""The decode loop over a toy model whose logits depend on everything that a row was fed, in its order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from mamba_deploy.errors import EngineError, InputError
from mamba_deploy.runtime.generate import Statistics, Token, generate
from mamba_deploy.runtime.sampling import Sampler, Sampling
from mamba_deploy.runtime.tokenizer import Tokenizer


class Toy:
    """A language model with a state for each row: a hash of all that it was fed."""

    def __init__(self, vocab: int, batch: int = 1) -> None:
        self.vocab = vocab
        self.fed: list[list[int]] = [[] for _ in range(batch)]
        self.calls: list[list[Sequence[int]]] = []

    def prefill(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        assert len(rows) == len(self.fed)
        assert any(rows), "a step that feeds nothing"
        self.calls.append(list(rows))  # not copies: they must stay as they were given
        logits = np.full((len(rows), self.vocab), np.nan, dtype=np.float32)  # of a row not fed: not to be used
        for row, ids in enumerate(rows):
            self.fed[row] += ids
            if ids:
                logits[row] = self.logits(self.fed[row])
        return logits

    def logits(self, fed: Sequence[int]) -> NDArray[np.float32]:
        return np.random.default_rng(fed).standard_normal(self.vocab).astype(np.float32)


class Scripted(Toy):
    """Says what it is told to, by giving the next id of its row's script a high logit."""

    def __init__(self, vocab: int, *scripts: Sequence[int]) -> None:
        super().__init__(vocab, len(scripts))
        self.scripts = [list(script) for script in scripts]

    def prefill(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        logits = super().prefill(rows)
        for row, ids in enumerate(rows):
            if ids:
                logits[row, self.scripts[row].pop(0)] = 1000
        return logits


def byte_tokenizer() -> Tokenizer:
    """Ids below 128 are ASCII; then the bytes of a euro sign, and longer tokens; <|end|> is special."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ascii_bytes = [pre_tokenizer.pre_tokenize_str(chr(code))[0][0] for code in range(128)]
    euro = pre_tokenizer.pre_tokenize_str("€")[0][0]
    longer = ["ab", "bc", "abc", "cab", "aab", "c" + euro[0], euro[1:] + "a"]
    vocab = {token: i for i, token in enumerate([*ascii_bytes, *euro, *longer])}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer = pre_tokenizer
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("<|end|>", special=True)])
    return Tokenizer(library)


TOKENIZER = byte_tokenizer()
VOCAB = 256
END = TOKENIZER.token_id("<|end|>") or 0
GREEDY = Sampling()
RANDOM = Sampling(temperature=1.0, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=5)


def say(text: str) -> list[int]:
    return list(text.encode("ascii"))


def texts(tokens: Sequence[Token], row: int = 0) -> list[str]:
    return [token.text for token in tokens if token.row == row]


def run(decoder: Toy, prompts: Sequence[Sequence[int]], **options: Any) -> list[Token]:
    arguments: dict[str, Any] = {"max_tokens": 12, "sampling": GREEDY} | options
    return list(generate(decoder, prompts, **arguments))


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """By definition: the first end of a text at which a stop string ends, and the longest that ends there."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return min(starts)
    return None


def test_feeds_the_prompt_and_then_each_token_but_the_last() -> None:
    toy = Toy(VOCAB)
    tokens = run(toy, [[5, 6, 7]], max_tokens=4)
    ids = [token.id for token in tokens]
    assert toy.calls == [[[5, 6, 7]], [[ids[0]]], [[ids[1]]], [[ids[2]]]]
    assert ids == [int(np.argmax(toy.logits([5, 6, 7, *ids[:i]]))) for i in range(4)]
    assert [token.index for token in tokens] == [0, 1, 2, 3]
    assert [token.finish_reason for token in tokens] == [None, None, None, "length"]
    assert [token.text for token in tokens] == ["", "", "", ""]  # no tokenizer


def test_sampling_sees_prompt_and_answer() -> None:
    toy = Toy(VOCAB)
    tokens = run(toy, [[1, 2]], sampling=RANDOM, max_tokens=20)
    sample, history = Sampler(RANDOM), [1, 2]
    for token in tokens:
        assert token.id == sample(toy.logits(history), history)
        history.append(token.id)


def test_rows_of_a_batch_are_as_alone() -> None:
    prompts = [[1], [2, 3, 4], [9, 8], [2, 3, 4]]
    alone = [run(Toy(VOCAB), [prompt], eos_ids=range(0, 256, 16), tokenizer=TOKENIZER) for prompt in prompts]
    toy = Toy(VOCAB, batch=4)
    tokens = run(toy, prompts, eos_ids=range(0, 256, 16), tokenizer=TOKENIZER)
    for row, expected in enumerate(alone):
        answer = [token for token in tokens if token.row == row]
        assert [(t.id, t.text, t.index, t.finish_reason) for t in answer] == [
            (t.id, t.text, t.index, t.finish_reason) for t in expected
        ]
        assert toy.fed[row] == prompts[row] + [token.id for token in answer[:-1]]
    assert len({len(expected) for expected in alone}) > 1, "rows that end at different steps are the point"
    order = [(token.index, token.row) for token in tokens]
    assert order == sorted(order)


def test_a_sampled_row_does_not_depend_on_the_others() -> None:
    first = run(Toy(VOCAB, batch=3), [[1], [2, 3], [4]], sampling=RANDOM)
    second = run(Toy(VOCAB, batch=2), [[7, 7], [2, 3]], sampling=RANDOM, eos_ids=[0])
    row = [token for token in first if token.row == 1]
    assert row == [token for token in second if token.row == 1]
    assert [token.id for token in row] != [token.id for token in run(Toy(VOCAB), [[2, 3]], sampling=RANDOM)]


def test_an_ended_row_is_fed_nothing_more() -> None:
    toy = Scripted(VOCAB, say("abcd"), say("a.cd"))
    tokens = run(toy, [[1], [2, 3]], max_tokens=4, eos_ids=say("."))
    assert toy.calls == [[[1], [2, 3]], [say("a"), say("a")], [say("b"), []], [say("c"), []]]
    assert [(token.row, token.finish_reason) for token in tokens if token.finish_reason] == [(1, "eos"), (0, "length")]


def test_eos_is_yielded_without_text() -> None:
    tokens = run(Scripted(VOCAB, say("ab.")), [[1]], eos_ids=say("."), tokenizer=TOKENIZER)
    assert tokens[-1] == Token(id=ord("."), text="", row=0, index=2, finish_reason="eos")
    assert texts(tokens) == ["a", "b", ""]


def test_eos_at_the_last_token_counts_as_eos() -> None:
    tokens = run(Scripted(VOCAB, say("a.")), [[1]], max_tokens=2, eos_ids=say("."))
    assert tokens[-1].finish_reason == "eos"


def test_str_is_the_text() -> None:
    assert "".join(map(str, run(Scripted(VOCAB, say("abc")), [[1]], max_tokens=3, tokenizer=TOKENIZER))) == "abc"


def test_the_beginning_of_a_stop_string_is_held_back_until_decided() -> None:
    options: dict[str, Any] = {"stop": ["\n\nQ"], "tokenizer": TOKENIZER}
    assert texts(run(Scripted(VOCAB, say("a\n\nb")), [[1]], max_tokens=4, **options)) == ["a", "", "", "\n\nb"]
    tokens = run(Scripted(VOCAB, say("a\n\nQ")), [[1]], **options)
    assert texts(tokens) == ["a", "", "", ""]
    assert tokens[-1].finish_reason == "stop"


@pytest.mark.parametrize(("last", "reason"), [("b", "length"), (".", "eos")])
def test_the_last_token_brings_what_was_held_back(last: str, reason: str) -> None:
    tokens = run(
        Scripted(VOCAB, say("xa" + last)), [[1]], max_tokens=3, stop=["abc"], tokenizer=TOKENIZER, eos_ids=say(".")
    )
    assert texts(tokens) == ["x", "", "ab" if last == "b" else "a"]
    assert tokens[-1].finish_reason == reason


def test_an_incomplete_character_is_flushed_at_the_end() -> None:
    euro = TOKENIZER.encode("€")
    assert len(euro) == 3
    answers = {3: ["", "", "€"], 2: ["", "\ufffd"], 1: ["\ufffd"]}
    for max_tokens, expected in answers.items():
        assert texts(run(Scripted(VOCAB, euro), [[1]], max_tokens=max_tokens, tokenizer=TOKENIZER)) == expected
    tokens = run(Scripted(VOCAB, [*euro[:2], END]), [[1]], eos_ids=[END], tokenizer=TOKENIZER)
    assert texts(tokens) == ["", "", "\ufffd"]
    tokens = run(Scripted(VOCAB, euro[:2]), [[1]], max_tokens=2, stop=["\ufffd"], tokenizer=TOKENIZER)
    assert texts(tokens) == ["", ""]
    assert tokens[-1].finish_reason == "stop"


def test_a_stop_string_within_one_token_cuts_it() -> None:
    token = TOKENIZER.token_id("cab")
    assert token is not None
    tokens = run(Scripted(VOCAB, [token]), [[1]], stop=["ab"], tokenizer=TOKENIZER)
    assert [(t.text, t.finish_reason) for t in tokens] == [("c", "stop")]


def test_the_stop_string_complete_first_counts_however_the_text_is_cut() -> None:
    whole = TOKENIZER.token_id("abc")
    assert whole is not None
    for script in (say("abc"), [whole]):
        tokens = run(Scripted(VOCAB, script), [[1]], max_tokens=3, stop=["abc", "b"], tokenizer=TOKENIZER)
        assert "".join(texts(tokens)) == "a"


# a, b, c, the bytes of a euro sign and the longer tokens
PIECES = [*say("abc"), *range(128, TOKENIZER.vocab_size - 1)]


@given(
    scripts=st.lists(st.lists(st.sampled_from(PIECES), min_size=12, max_size=12), min_size=1, max_size=3),
    stop=st.lists(st.text("abc€\ufffd", min_size=1, max_size=4), max_size=3),
    eos=st.sampled_from([[], [ord("c")], [ord("a"), END]]),
    max_tokens=st.integers(1, 12),
)
def test_texts_are_the_whole_cut_at_the_first_stop_string(
    scripts: list[list[int]], stop: list[str], eos: list[int], max_tokens: int
) -> None:
    tokens = run(
        Scripted(VOCAB, *scripts),
        [[1]] * len(scripts),
        max_tokens=max_tokens,
        stop=stop,
        eos_ids=eos,
        tokenizer=TOKENIZER,
    )
    for row, script in enumerate(scripts):
        answer = [token for token in tokens if token.row == row]
        kept = script[: next((i for i, t in enumerate(script) if t in eos), len(script))][:max_tokens]
        whole = TOKENIZER.decode(kept)
        cut = first_stop(whole, stop)
        assert "".join(texts(answer, row)) == whole[:cut]
        expected = "stop" if cut is not None else "eos" if len(kept) < max_tokens else "length"
        assert [token.finish_reason for token in answer[:-1]] == [None] * (len(answer) - 1)
        assert answer[-1].finish_reason == expected
        assert [token.id for token in answer] == script[: len(answer)]
        if cut is None:
            assert len(answer) == min(len(kept) + 1, max_tokens)
        else:  # no token later than the one with which the stop string is complete
            assert first_stop(TOKENIZER.decode(kept[: len(answer)]), stop) == cut


def test_statistics() -> None:
    statistics = Statistics()
    steps = generate(Toy(VOCAB, 2), [[1, 2, 3], [4]], max_tokens=3, sampling=GREEDY, statistics=statistics)
    assert statistics == Statistics()
    next(steps)
    assert (statistics.rows, statistics.prompt_tokens, statistics.generated_tokens) == (2, 4, 2)
    assert statistics.prompt_seconds > 0
    assert statistics.decode_seconds == statistics.decode_tokens_per_second == 0
    assert len(list(steps)) == 5
    assert statistics.generated_tokens == 6
    assert statistics.prompt_tokens_per_second == 4 / statistics.prompt_seconds
    assert statistics.decode_tokens_per_second == 4 / statistics.decode_seconds
    values = json.loads(json.dumps(statistics.to_dict()))
    assert values["generated_tokens"] == 6
    assert values["decode_tokens_per_second"] == statistics.decode_tokens_per_second
    list(generate(Toy(VOCAB), [[1]], max_tokens=1, sampling=GREEDY, statistics=statistics))
    assert (statistics.rows, statistics.prompt_tokens, statistics.generated_tokens) == (3, 5, 7)


def test_statistics_leave_out_the_callers_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class Slow(Toy):
        def prefill(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
            clock[0] += 1
            return super().prefill(rows)

    statistics = Statistics()
    for _ in generate(Slow(VOCAB), [[1, 2]], max_tokens=4, sampling=GREEDY, statistics=statistics):
        clock[0] += 100
    assert (statistics.prompt_seconds, statistics.decode_seconds) == (1.0, 3.0)
    assert (statistics.prompt_tokens_per_second, statistics.decode_tokens_per_second) == (2.0, 1.0)


def test_a_caller_who_leaves_early_has_fed_no_more() -> None:
    toy = Toy(VOCAB)
    steps = generate(toy, [[1, 2]], max_tokens=9, sampling=GREEDY)
    assert toy.calls == []
    first, _ = next(steps), next(steps)
    assert toy.fed == [[1, 2, first.id]]


def test_logits_that_are_not_finite_name_their_row() -> None:
    class Broken(Toy):
        def logits(self, fed: Sequence[int]) -> NDArray[np.float32]:
            return np.full(self.vocab, np.nan if 7 in fed else 0.0, dtype=np.float32)

    with pytest.raises(EngineError, match="logits of row 1 are not finite"):
        run(Broken(VOCAB, 2), [[1], [7]])


def test_numpy_prompts_are_accepted() -> None:
    prompts = np.array([[1, 2], [3, 4]], dtype=np.int32)
    assert run(Toy(VOCAB, 2), prompts) == run(Toy(VOCAB, 2), prompts.tolist())  # type: ignore[arg-type]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens is 0: expected an integer, 1 or above"),
    ({"max_tokens": 2.5}, "max_tokens is 2.5: expected an integer, 1 or above"),
    ({"max_tokens": True}, "max_tokens is True: expected an integer, 1 or above"),
    ({"prompts": []}, "prompts is empty: expected at least one row of token ids"),
    ({"prompts": [[1], []]}, "prompts[1] is empty: expected at least one token id"),
    ({"prompts": [1, 2]}, "prompts[0] is 1: expected a sequence of token ids"),
    ({"prompts": ["ab"]}, "prompts[0] is 'ab': expected a sequence of token ids"),
    ({"prompts": [[1], [5, -1]]}, "prompts[1][1] is -1: expected a token id, an integer 0 or above"),
    ({"prompts": [[0.5]]}, "prompts[0][0] is 0.5: expected a token id, an integer 0 or above"),
    ({"eos_ids": 3}, "eos_ids is 3: expected a sequence of token ids"),
    ({"eos_ids": [None]}, "eos_ids[0] is None: expected a token id, an integer 0 or above"),
    ({"stop": ["a"], "tokenizer": None}, "stop strings need a tokenizer, and there is none"),
    ({"stop": ["a", ""]}, "stop is ['a', '']: expected a list of strings that are not empty"),
    ({"stop": "abc"}, "stop is 'abc': expected a list of strings that are not empty"),
]


@pytest.mark.parametrize(("change", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_arguments_out_of_range_are_refused_at_once(change: dict[str, Any], text: str) -> None:
    arguments: dict[str, Any] = {"prompts": [[1]], "max_tokens": 3, "sampling": GREEDY, "tokenizer": TOKENIZER} | change
    toy = Toy(VOCAB)
    with pytest.raises(InputError) as caught:
        generate(toy, **arguments)
    assert str(caught.value) == text
    assert toy.calls == []


def test_hints_say_what_to_do() -> None:
    with pytest.raises(InputError) as caught:
        generate(Toy(VOCAB), [[]], max_tokens=1, sampling=GREEDY)
    assert "beginning- or end-of-sequence token" in caught.value.hint
    with pytest.raises(InputError) as caught:
        generate(Toy(VOCAB), [[1]], max_tokens=1, sampling=GREEDY, stop=["a"])
    assert caught.value.hint == "put tokenizer.json into the bundle, or end rows by token through eos_ids"
