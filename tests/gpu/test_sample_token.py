"""sample_token picks what runtime.sampling picks with the same uniforms; on the edge between two tokens either."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gpu.device import kernels, needs_gpu

from mamba_deploy.runtime.sampling import Sampler, Sampling, distribution

pytestmark = needs_gpu

EDGE = 1e-6  # float32 weights move the edges between tokens, by less than this
UNUSED = -7
SIZES = [(B, V) for V in (1, 2, 31, 1000, 50277, 50280, 256000) for B in ((1, 3, 70) if V <= 50280 else (1, 3))]
FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.25},
    {"temperature": 2.5},
    {"temperature": 0.75, "top_k": 1},
    {"temperature": 0.75, "top_k": 40},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.125},
    {"temperature": 1.0, "top_p": 0.9375},
    {"temperature": 1.5, "top_p": 0.9990234375},
    {"temperature": 1.0, "min_p": 0.0625},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.75, "top_k": 100, "top_p": 0.875, "min_p": 0.03125},
]  # as float32 has them


class Call:
    """Arguments of a call on the device; what it writes is full of UNUSED."""

    def __init__(self, logits: np.ndarray, uniform: np.ndarray | None, steps: list[int], capacity: int) -> None:
        B = len(logits)
        self.logits = torch.from_numpy(logits).cuda()
        self.uniform = None if uniform is None else torch.from_numpy(uniform).cuda()
        self.steps = torch.tensor(steps, dtype=torch.int32).cuda()
        self.tokens = torch.full((B,), UNUSED, dtype=torch.int32).cuda()
        self.log = torch.full((capacity, B), UNUSED, dtype=torch.int32).cuda()

    def launch(self, **filters: Any) -> None:
        kernels().sample_token(
            self.logits, self.uniform, steps=self.steps, tokens=self.tokens, log=self.log, **filters,
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip

    def run(self, **filters: Any) -> np.ndarray:
        """The tokens that it picks, after a look at all else that it writes."""
        before, capacity = self.steps.tolist(), len(self.log)
        self.launch(**filters)
        torch.cuda.synchronize()
        tokens = self.tokens.cpu().numpy()
        log = self.log.cpu().numpy()
        assert self.steps.tolist() == [step + 1 for step in before]
        for b, step in enumerate(before):
            assert max(log[step % capacity, b], 0) == tokens[b]
            assert (np.delete(log[:, b], step % capacity) == UNUSED).all()
        return log[[step % capacity for step in before], range(len(before))]


def check(picked: int, logits: np.ndarray, uniform: float, filters: dict[str, Any]) -> None:
    probabilities = distribution(logits, [], Sampling(**filters))
    edges = np.cumsum(probabilities)
    wanted = int(np.searchsorted(edges, uniform * edges[-1], side="right"))
    if picked != wanted:
        assert probabilities[picked] > 0
        below = edges[picked] - probabilities[picked]
        assert below - EDGE <= uniform <= edges[picked] + EDGE, (picked, wanted)


def normal(B: int, V: int, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((B, V)) - 5).astype(np.float32)


@pytest.mark.parametrize(("B", "V"), SIZES)
def test_greedy_takes_the_lowest_id_of_the_highest(B: int, V: int) -> None:
    logits = normal(B, V)
    for given in (logits, np.round(logits), np.where(logits > -5, np.float32(-0.0), np.float32(0.0))):
        assert Call(given, None, [0] * B, 1).run().tolist() == np.argmax(given, axis=1).tolist()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("B", "V"), SIZES)
def test_draws_what_sampling_draws(B: int, V: int, filters: dict[str, Any]) -> None:
    logits = normal(B, V, seed=V)
    uniform = np.random.default_rng(B).random((1, B))
    picked = Call(logits, uniform, [0] * B, 1).run(**filters)
    for b in range(0, B, 1 if V <= 1000 else 10):
        check(int(picked[b]), logits[b], uniform[0, b], filters)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("step", [0.5, 1.0, 1000.0])  # 1000: all are equal
def test_equal_logits(step: float, filters: dict[str, Any]) -> None:
    logits = (np.round(normal(40, 3001) / step) * step).astype(np.float32)
    uniform = np.linspace(0, 1, 40, endpoint=False)[None] + 0.01
    picked = Call(logits, uniform, [0] * 40, 1).run(**filters)
    for b in range(40):
        check(int(picked[b]), logits[b], uniform[0, b], filters)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_least_and_the_greatest_uniform(uniform: float, filters: dict[str, Any]) -> None:
    logits = normal(2, 1000)
    picked = Call(logits, np.full((1, 2), uniform), [0, 0], 1).run(**filters)
    for b in range(2):
        check(int(picked[b]), logits[b], uniform, filters)


def test_far_apart_logits() -> None:
    logits = np.array([[-3e38, 3e38, 3e38, 0.0], [-1e-44, 0.0, -0.0, -100.0]], np.float32)
    for filters in ({"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}, {"temperature": 1.0, "top_p": 0.75}):
        for value in (0.1, 0.4, 0.6, 0.9):
            picked = Call(logits, np.full((1, 2), value), [0, 0], 1).run(**filters)
            for b in range(2):
                check(int(picked[b]), logits[b], value, filters)


@pytest.mark.parametrize("filters", [{}, FILTERS[0], FILTERS[-1]], ids=str)
def test_a_row_that_is_not_finite_has_no_token(filters: dict[str, Any]) -> None:
    bad = [np.nan, np.inf, -np.inf, -np.nan]
    logits = normal(2 * len(bad), 5000)
    for i, value in enumerate(bad):
        logits[2 * i, (0, 1, 2500, 4999)[i]] = value
    uniform = np.full((1, len(logits)), 0.6)
    picked = Call(logits, uniform, [0] * len(logits), 1).run(**filters)
    assert (picked[::2] == -1).all()
    for b in range(1, len(logits), 2):
        check(int(picked[b]), logits[b], 0.6, filters)


def test_steps_go_round() -> None:
    capacity, steps = 3, [2, 3, 7, 0, 2_000_000_000]
    logits = normal(5, 1000)
    uniform = np.random.default_rng(1).random((capacity, 5))
    picked = Call(logits, uniform, steps, capacity).run(temperature=1.0)
    for b, step in enumerate(steps):
        check(int(picked[b]), logits[b], uniform[step % capacity, b], {"temperature": 1.0})


@pytest.mark.parametrize("filters", [{}, FILTERS[0], FILTERS[-1]], ids=str)
@pytest.mark.parametrize("V", [5, 130, 50277])
def test_logits_at_any_address(V: int, filters: dict[str, Any]) -> None:
    logits = normal(3, V)
    uniform = np.random.default_rng(2).random((1, 3))
    aligned = Call(logits, uniform, [0] * 3, 1).run(**filters).tolist()
    for offset in (1, 2, 3):
        call = Call(logits, uniform, [0] * 3, 1)
        memory = torch.full((3 * V + 8,), torch.inf, device="cuda")  # which a row must not reach
        memory[offset : offset + 3 * V] = call.logits.flatten()
        call.logits = memory[offset : offset + 3 * V].view(3, V)
        assert call.run(**filters).tolist() == aligned


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_steps_in_a_graph(filters: dict[str, Any]) -> None:
    """As a Sampler that draws the same numbers."""
    B, V, capacity = 3, 2000, 8
    logits = normal(B, V)
    samplers, drawers = ([Sampler(Sampling(**filters, seed=7), b) for b in range(B)] for _ in range(2))
    uniform = np.array([[drawer.draw() for drawer in drawers] for _ in range(capacity)])
    wanted = [[samplers[b](logits[b], []) for b in range(B)] for _ in range(5)]
    call = Call(logits, uniform, [0] * B, capacity)
    call.launch(**filters)  # NVRTC compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.launch(**filters)
    for _ in range(2):
        call.steps.zero_()
        call.log.fill_(UNUSED)
        for _ in range(5):
            graph.replay()
        assert call.steps.tolist() == [5] * B
        assert call.log.tolist() == wanted + [[UNUSED] * B] * 3
        assert call.tokens.tolist() == wanted[-1]


class Host:
    """Memory of the host that the device sees at the same address."""

    def __init__(self, values: np.ndarray) -> None:
        self.tensor = torch.from_numpy(values).pin_memory()
        shape, data = tuple(values.shape), (self.tensor.data_ptr(), False)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": values.dtype.str, "data": data, "version": 3}


def test_uniform_and_log_in_the_memory_of_the_host() -> None:
    logits = normal(2, 1000)
    uniform = np.random.default_rng(3).random((4, 2))
    on_device, on_host = (Call(logits, uniform, [0, 0], 4) for _ in range(2))
    uniform_there, log_there = Host(uniform), Host(np.full((4, 2), UNUSED, np.int32))
    for _ in range(4):
        on_device.launch(temperature=1.0)
        kernels().sample_token(
            on_host.logits, uniform_there, steps=on_host.steps, tokens=on_host.tokens, log=log_there, temperature=1.0,
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    torch.cuda.synchronize()
    assert log_there.tensor.tolist() == on_device.log.tolist()


@pytest.mark.parametrize("filters", [FILTERS[0], FILTERS[-1]], ids=str)
def test_frequencies(filters: dict[str, Any]) -> None:
    draws = 20_000
    logits = np.random.default_rng(4).standard_normal(200).astype(np.float32)
    uniform = np.random.default_rng(5).random((1, draws))
    picked = Call(np.tile(logits, (draws, 1)), uniform, [0] * draws, 1).run(**filters)
    expected = draws * distribution(logits, [], Sampling(**filters))
    counts = np.bincount(picked, minlength=200)
    kept = expected > 0
    assert not counts[~kept].any()
    freedom = np.count_nonzero(kept) - 1
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("others", [0, 61, 1500])
def test_a_row_that_picks_an_ending_reads_nothing_more_and_one_that_has_ended_is_left_alone(others: int) -> None:
    logits = normal(4, 1000)
    picks = np.argmax(logits, axis=1)
    call = Call(logits, None, [5, 6, 7, 8], 3)
    lens = torch.tensor([1, 1, 0, 1], dtype=torch.int32).cuda()
    endings = torch.tensor([-1] * others + [-1, int(picks[1]), int(picks[2])], dtype=torch.int32).cuda()
    call.launch(seq_lens=lens, eos_ids=endings)
    torch.cuda.synchronize()
    assert lens.tolist() == [1, 0, 0, 1]
    assert call.tokens.tolist() == [picks[0], picks[1], UNUSED, picks[3]]
    assert call.steps.tolist() == [6, 7, 7, 9]
    assert (call.log[:, 2].cpu().numpy() == UNUSED).all()
