"""Sampling: the filtered distribution against Hugging Face's own processors, and what is drawn from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from mamba_deploy.errors import EngineError, InputError
from mamba_deploy.runtime.sampling import Sampler, Sampling, distribution

# one base row; each further row varies one argument, the last ones combine all
CASES = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=2.5),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=40),
    Sampling(temperature=1.0, top_k=10**9),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=1.0, top_p=0.9999999),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1.0, repetition_penalty=1.3),
    Sampling(temperature=1.0, repetition_penalty=0.5),
    Sampling(temperature=0.7, top_k=50, top_p=0.8, min_p=0.02, repetition_penalty=1.2),
    Sampling(temperature=1.6, top_k=300, top_p=0.95, min_p=0.01, repetition_penalty=1.1),
]


def hugging_face(logits: np.ndarray, history: list[int], sampling: Sampling) -> np.ndarray:
    """In the order of GenerationMixin._get_logits_processor, in float64 so that no threshold is met by rounding."""
    processors = hf.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(hf.TopPLogitsWarper(sampling.top_p))
    processors.append(hf.MinPLogitsWarper(sampling.min_p))
    scores = processors(torch.tensor([history]), torch.from_numpy(logits[None].astype(np.float64)))
    return torch.softmax(scores, dim=-1)[0].numpy()


@pytest.mark.parametrize("sampling", CASES, ids=str)
@pytest.mark.parametrize(("vocab", "scale"), [(7, 1.0), (1000, 4.0), (20000, 0.01), (50280, 3.0)])
def test_distribution_equals_hugging_face(sampling: Sampling, vocab: int, scale: float) -> None:
    rng = np.random.default_rng(vocab)
    for _ in range(3):
        logits = (scale * rng.standard_normal(vocab)).astype(np.float32)
        history = rng.integers(0, vocab, size=30).tolist()
        expected = hugging_face(logits, history, sampling)
        answer = distribution(logits, history, sampling)
        assert answer.dtype == np.float64
        np.testing.assert_array_equal(answer > 0, expected > 0)
        np.testing.assert_allclose(answer, expected, rtol=1e-9, atol=0)


def test_filters_act_on_what_the_one_before_has_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    top_k_first = distribution(logits, [], Sampling(temperature=1.0, top_k=2, top_p=0.5))
    np.testing.assert_allclose(top_k_first, [1, 0, 0, 0])  # 0.4 of 0.7 is more than half
    hot = distribution(logits, [], Sampling(temperature=10.0, min_p=0.5))
    assert np.all(hot > 0)  # temperature first: all are about equally likely


def test_top_k_keeps_all_tokens_equal_to_the_last_as_hugging_face_does() -> None:
    logits = np.array([1, 3, 1, 2, 1], dtype=np.float32)
    sampling = Sampling(temperature=1.0, top_k=3)
    np.testing.assert_allclose(distribution(logits, [], sampling), hugging_face(logits, [0], sampling))
    assert np.all(distribution(logits, [], sampling) > 0)


def test_top_p_keeps_the_lowest_ids_among_equals() -> None:
    logits = np.zeros(10, dtype=np.float32)
    answer = distribution(logits, [], Sampling(temperature=1.0, top_p=0.45))
    np.testing.assert_allclose(answer, [0.2] * 5 + [0] * 5)


def test_repetition_penalty_counts_a_token_once_and_ignores_ids_outside_the_vocabulary() -> None:
    logits = np.array([1.0, -1.0, 0.5], dtype=np.float32)
    sampling = Sampling(temperature=1.0, repetition_penalty=2.0)
    answer = distribution(logits, [0, 1, 0, 0, 3, -1], sampling)
    expected = np.exp([0.5, -2.0, 0.5])
    np.testing.assert_allclose(answer, expected / expected.sum())
    np.testing.assert_array_equal(distribution(logits, [], sampling), distribution(logits, [], Sampling(1.0)))


def test_greedy_takes_the_highest_and_the_lowest_id_among_equals() -> None:
    logits = np.array([0, 5, 5, 1], dtype=np.float32)
    assert Sampler(Sampling())(logits, []) == 1
    np.testing.assert_array_equal(distribution(logits, [], Sampling()), [0, 1, 0, 0])
    assert Sampler(Sampling(repetition_penalty=2.0))(logits, [1]) == 2
    # filters after the penalty cannot change it
    assert Sampler(Sampling(top_k=2, top_p=0.1, min_p=0.5, seed=1))(logits, []) == 1


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1e-300),
        Sampling(temperature=1e308),
        Sampling(temperature=1.0, repetition_penalty=1e-300),
        Sampling(temperature=1.0, repetition_penalty=1e300),
    ],
    ids=str,
)
def test_extreme_values_give_probabilities(sampling: Sampling) -> None:
    logits = np.array([3.4e38, -3.4e38, 1.0, 0.0], dtype=np.float32)
    answer = distribution(logits, [0, 1], sampling)
    assert np.all(answer >= 0)
    assert answer.sum() == pytest.approx(1.0)
    assert Sampler(sampling)(logits, [0, 1]) in range(4)


def test_draws_follow_the_distribution() -> None:
    rng = np.random.default_rng(0)
    logits = (2 * rng.standard_normal(12)).astype(np.float32)
    sampling = Sampling(temperature=0.9, top_k=8, top_p=0.95, seed=3)
    expected = distribution(logits, [], sampling)
    sample = Sampler(sampling)
    draws = 20_000
    counts = np.bincount([sample(logits, []) for _ in range(draws)], minlength=12)
    assert np.all(counts[expected == 0] == 0)
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(counts / draws - expected) <= 4.5 * deviation)


def draws(sampling: Sampling, row: int = 0, count: int = 40) -> list[int]:
    sample = Sampler(sampling, row)
    return [sample(np.zeros(1000, dtype=np.float32), []) for _ in range(count)]


def test_a_seed_repeats_and_rows_differ() -> None:
    seeded = Sampling(temperature=1.0, seed=7)
    assert draws(seeded, row=2) == draws(seeded, row=2)
    samples = [draws(dataclasses.replace(seeded, seed=seed), row) for seed in (0, 7, 2**32) for row in (0, 1, 7)]
    assert len({tuple(s) for s in samples}) == len(samples)


def test_without_a_seed_runs_differ() -> None:
    assert draws(Sampling(temperature=1.0)) != draws(Sampling(temperature=1.0))


def test_rows_of_a_batch_draw_as_alone() -> None:
    sampling = Sampling(temperature=1.0, seed=1)
    samplers = [Sampler(sampling, row) for row in range(3)]
    logits = np.zeros(1000, dtype=np.float32)
    together = [[sample(logits, []) for sample in samplers] for _ in range(40)]
    for row in range(3):
        assert [step[row] for step in together] == draws(sampling, row)


def test_logits_are_left_as_they_were() -> None:
    logits = np.arange(5, dtype=np.float32)
    Sampler(Sampling(temperature=0.5, top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=1.5))(logits, [1, 4])
    np.testing.assert_array_equal(logits, np.arange(5))


REFUSED = [
    ("temperature", -0.1, "temperature is -0.1: expected a finite number, 0 (greedy) or above"),
    ("temperature", math.nan, "temperature is nan: expected a finite number, 0 (greedy) or above"),
    ("temperature", math.inf, "temperature is inf: expected a finite number, 0 (greedy) or above"),
    ("temperature", "0.8", "temperature is '0.8': expected a finite number, 0 (greedy) or above"),
    ("top_k", -1, "top_k is -1: expected an integer, 0 (off) or above"),
    ("top_k", 2.0, "top_k is 2.0: expected an integer, 0 (off) or above"),
    ("top_k", True, "top_k is True: expected an integer, 0 (off) or above"),
    ("top_p", 0.0, "top_p is 0.0: expected a number above 0 and at most 1 (off)"),
    ("top_p", 1.1, "top_p is 1.1: expected a number above 0 and at most 1 (off)"),
    ("top_p", math.nan, "top_p is nan: expected a number above 0 and at most 1 (off)"),
    ("min_p", -0.5, "min_p is -0.5: expected a number from 0 (off) to 1"),
    ("min_p", 1.5, "min_p is 1.5: expected a number from 0 (off) to 1"),
    ("min_p", math.nan, "min_p is nan: expected a number from 0 (off) to 1"),
    ("repetition_penalty", 0.0, "repetition_penalty is 0.0: expected a finite number above 0 (1 is off)"),
    ("repetition_penalty", math.nan, "repetition_penalty is nan: expected a finite number above 0 (1 is off)"),
    ("seed", -1, "seed is -1: expected None or an integer, 0 or above"),
    ("seed", 1.5, "seed is 1.5: expected None or an integer, 0 or above"),
]


@pytest.mark.parametrize(("name", "value", "text"), REFUSED)
def test_values_out_of_range_are_refused(name: str, value: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        Sampling(**{name: value})
    assert str(caught.value) == text


def test_numpy_numbers_are_accepted() -> None:
    sampling = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int32(1))
    assert Sampler(sampling)(np.zeros(5, dtype=np.float32), []) in range(5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=2)])
def test_logits_that_are_not_finite_are_refused(bad: float, sampling: Sampling) -> None:
    logits = np.array([0.0, bad, 1.0, bad], dtype=np.float32)
    with pytest.raises(EngineError) as caught:
        Sampler(sampling, row=3)(logits, [])
    assert str(caught.value) == "logits of row 3 are not finite: 2 of 4 are NaN or infinite"
    assert "mamba-deploy verify" in caught.value.hint
    with pytest.raises(EngineError, match="row 0"):
        distribution(logits, [], sampling)


@pytest.mark.parametrize("shape", [(2, 5), (0,), ()])
def test_logits_that_are_not_one_row_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"logits of row 0 have the shape .*: expected \[V\], V at least 1"):
        Sampler(Sampling())(np.zeros(shape, dtype=np.float32), [])
