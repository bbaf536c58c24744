"""What bench says against durations that are known: a model and a GPU that keep their own time. No clock is read."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_gpu
import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from mamba_deploy.bundle import ENGINES, WEIGHTS, Bundle
from mamba_deploy.cli import main
from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract
from mamba_deploy.errors import BundleError, EngineError, InputError, MissingDependencyError
from mamba_deploy.limits import Limits
from mamba_deploy.runtime import bench as module
from mamba_deploy.runtime import device as device_module
from mamba_deploy.runtime.ahead import BLOCK
from mamba_deploy.runtime.bench import Machine, Plan, bench
from mamba_deploy.runtime.bench_report import Figure, Report, Row, check_plot, engine_facts, plot
from mamba_deploy.runtime.device import Device
from mamba_deploy.runtime.gpu_state import row_bytes, state_bytes
from mamba_deploy.runtime.session import Session
from mamba_deploy.runtime.state import State

CONFIG = MambaConfig(
    generation="mamba2", d_model=64, n_layer=3, d_inner=128, vocab_size=97, d_state=32, head_dim=16, eos_token_ids=(5,)
)
CONTRACT = Contract.of(CONFIG, dtype="float16", state_dtype="float32")
EOS = 5
MACHINE = Machine("toy", 1e9, "L2", 0)


class Toy:
    """A model that takes as long as it is told to, and chooses the token that ends a row whenever it is asked."""

    name, contract = "toy 1.0", CONTRACT

    def __init__(self, seconds: Callable[[int, int], float]) -> None:
        self.seconds = seconds  # of a call of B rows and L tokens
        self.now = 0.0
        self.calls: list[tuple[int, int, float]] = []  # B, L, seconds
        self.ids: list[NDArray[np.int32]] = []
        self.first = 0  # calls that found a state of zeros
        self.most = 1 << 30
        self.is_closed = False

    def new_state(self, batch: int) -> State:
        if batch > self.most:
            raise InputError(f"{batch} rows are too many")
        return State(CONTRACT, batch)

    def run(self, input_ids: NDArray[np.int32], seq_lens: NDArray[np.int32], state: Any) -> NDArray[np.float32]:
        assert (seq_lens == input_ids.shape[1]).all(), "every row reads in every call"
        batch, seq = input_ids.shape
        array = next(iter(state.current.values()))
        self.first += not array.any()
        array += 1
        took = self.seconds(batch, seq)
        self.calls.append((batch, seq, took))
        self.ids.append(input_ids.copy())
        self.now += took
        logits = np.zeros((batch, CONFIG.vocab_size), np.float32)
        logits[:, EOS] = 1
        return logits

    def close(self) -> None:
        self.is_closed = True


def measure(toy: Toy, monkeypatch: pytest.MonkeyPatch, plan: Plan, **options: Any) -> Report:
    """By the clock of the model, where a copy takes no measuring."""
    monkeypatch.setattr(module, "perf_counter", lambda: toy.now)
    monkeypatch.setattr(module, "_host_bandwidth", lambda threads: MACHINE.bandwidth)
    return bench(lambda: Session(toy, CONFIG), plan, **options)


def percentile(samples: Sequence[float], share: float) -> float:
    """Between the two samples beside the place, by a straight line."""
    place, ordered = share * (len(samples) - 1), sorted(samples)
    low = math.floor(place)
    high = min(low + 1, len(samples) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


# --- what is measured, and how often ------------------------------------------------------------------------------


def test_figures_are_of_the_samples_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    toy = Toy(lambda batch, seq: float(random.uniform(1e-3, 9e-3)) * seq)
    report = measure(toy, monkeypatch, Plan(batches=(2,), prompts=(7,)))
    took = [seconds for _, _, seconds in toy.calls]
    # generate: a prompt of 16, then 20 + 200 steps; step: the same; prompts: 3 + 20
    assert [seq for _, seq, _ in toy.calls] == [16, *[1] * 220, 16, *[1] * 220, *[7] * 23]
    [row], [prompt] = report.decode, report.prompt
    assert list(row.figures) == ["generate", "step"]
    for figure, samples in (
        (row.figures["generate"], took[21:221]),
        (row.figures["step"], took[242:442]),
        (prompt.figures["prompt"], took[445:]),
    ):
        assert figure.samples == pytest.approx(samples)
        assert figure.median == pytest.approx(statistics.median(samples))
        assert figure.p95 == pytest.approx(percentile(samples, 0.95))
    assert toy.is_closed


def test_tokens_are_random_and_states_have_read(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(lambda batch, seq: 1e-3)
    measure(toy, monkeypatch, Plan(batches=(3, 1), prompts=(40,)))
    assert all(((ids >= 0) & (ids < CONFIG.vocab_size)).all() for ids in toy.ids)
    prompts = [ids for ids in toy.ids if ids.shape[1] > 1]
    assert all(len(np.unique(ids)) > 8 for ids in prompts)
    stepped = [ids for ids, (batch, seq, _) in zip(toy.ids, toy.calls, strict=True) if (batch, seq) == (3, 1)][220:]
    assert len(np.unique(np.concatenate(stepped))) > 50
    assert toy.first == 2 * 2 + 23  # a prompt for each figure of decode, and every prompt that is timed


def test_a_token_that_ends_a_row_ends_none_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model always chooses it; see also the number of calls above."""
    toy = Toy(lambda batch, seq: 1e-3)
    report = measure(toy, monkeypatch, Plan(batches=(2,), prompts=(1,), steps=300))
    assert len(report.decode[0].figures["generate"].samples) == 300


@pytest.mark.parametrize(
    ("seconds", "steps", "warm", "samples"),
    [
        (1e-3, 200, 20, 200),
        (1e-3, 7, 20, 20),
        (0.1, 200, 20, 50),  # five seconds are up
        (0.5, 200, 10, 10),
        (2.0, 200, 3, 5),  # 5 samples at least
        (60.0, 200, 1, 5),
    ],
)
def test_time_that_is_up(monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int, warm: int, samples: int) -> None:
    seconds *= 1.0000001  # so that sums of them are clear of the five seconds
    toy = Toy(lambda batch, seq: seconds if seq == 1 else 0.0)
    report = measure(toy, monkeypatch, Plan(batches=(1,), prompts=(2,), steps=steps))
    row = report.decode[0]
    assert {name: len(figure.samples) for name, figure in row.figures.items()} == dict.fromkeys(row.figures, samples)
    assert [seq for _, seq, _ in toy.calls[1:]].index(16) == warm + samples


def test_seconds_are_those_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(lambda batch, seq: 0.100001)
    report = measure(toy, monkeypatch, Plan(batches=(1,), prompts=(2,), seconds=1.5))
    assert len(report.decode[0].figures["step"].samples) == 15
    assert len(report.prompt[0].figures["prompt"].samples) == 15


def test_prompts_longer_than_a_call_are_read_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(lambda batch, seq: 1e-3 * seq)
    report = measure(toy, monkeypatch, Plan(batches=(1,), prompts=(1100,)))
    assert [seq for _, seq, _ in toy.calls[-3:]] == [512, 512, 76]
    assert report.prompt[0].figures["prompt"].median == pytest.approx(1.1)


def test_too_many_rows_are_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(lambda batch, seq: 1e-3)
    toy.most = 8
    said: list[str] = []
    with pytest.raises(InputError, match="9 rows are too many"):
        measure(toy, monkeypatch, Plan(batches=(1, 9, 2)), say=said.append)
    assert (toy.calls, said, toy.is_closed) == ([], [], True)


def test_progress_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    measure(Toy(lambda batch, seq: 1e-3), monkeypatch, Plan(batches=(1, 2), prompts=(1, 3)), say=said.append)
    assert said == [
        "measuring the copy bandwidth",
        "measuring decode of 1 row",
        "measuring decode of 2 rows",
        "measuring a prompt of 1 token",
        "measuring a prompt of 3 tokens",
    ]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"batches": ()}, r"batches is \[\]"),
        ({"prompts": (1, 0)}, r"prompts is \[1, 0\]"),
        ({"steps": 0}, "steps is 0"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"tflops": -1.0}, "tflops is -1.0"),
        ({"tflops": math.nan}, "tflops is nan"),
    ],
    ids=str,
)
def test_plans_that_are_none(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Plan(**wrong)


# --- limits and rates ---------------------------------------------------------------------------------------------


def test_rates_and_limits_of_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(lambda batch, seq: 2e-3 * batch)
    report = measure(toy, monkeypatch, Plan(batches=(1, 4), prompts=(1,)))
    for row, batch in zip(report.decode, (1, 4), strict=True):
        limits = Limits.of(CONFIG, CONTRACT, batch=batch)
        assert (row.batch, row.seq, row.limits, row.kernels, row.limited_by) == (batch, 1, limits, None, "bytes")
        assert row.limit == limits.bytes / 1e9
        facts = row.to_dict()
        assert (facts["bytes"], facts["flops"]) == (limits.bytes, limits.flops)
        assert facts["limit_ms"] == pytest.approx(limits.bytes / 1e6)
        for figure in facts["figures"].values():
            assert figure["median_ms"] == figure["p95_ms"] == pytest.approx(2 * batch)
            assert figure["tokens_per_second"] == pytest.approx(500)
            assert figure["bytes_per_second"] == pytest.approx(limits.bytes / (2e-3 * batch))
            assert figure["share_of_limit"] == pytest.approx(figure["bytes_per_second"] / 1e9)


@pytest.mark.parametrize(("tflops", "by"), [(None, "bytes"), (1e9, "bytes"), (1e-6, "products")])
def test_rates_and_limits_of_a_prompt(monkeypatch: pytest.MonkeyPatch, tflops: float | None, by: str) -> None:
    toy = Toy(lambda batch, seq: 1e-3 * seq)
    report = measure(toy, monkeypatch, Plan(batches=(1,), prompts=(100,), tflops=tflops))
    [row] = report.prompt
    limits = Limits.of(CONFIG, CONTRACT, seq=100)
    assert (row.batch, row.seq, row.limits, row.limited_by) == (1, 100, limits, by)
    assert row.limit == pytest.approx(limits.flops / 1e6 if by == "products" else limits.bytes / 1e9)
    rates = row.rates(row.figures["prompt"])
    assert rates["tokens_per_second"] == pytest.approx(1000)
    assert rates["flops_per_second"] == pytest.approx(limits.flops / 0.1)
    assert rates["share_of_limit"] == pytest.approx(row.limit / 0.1)
    assert ("--tflops" in report.table()) == (tflops is None)


def test_rows_that_fit_in_twice_the_cache_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights once, and the states once, though a step reads and writes them."""

    def small(batch: int) -> int:
        limits = Limits.of(CONFIG, CONTRACT, batch=batch)
        return limits.weight_bytes + limits.state_bytes // 2

    monkeypatch.setattr(module, "_host_cache", lambda: ("L4", (small(2) + small(3)) // 4))
    report = measure(Toy(lambda batch, seq: 1e-3), monkeypatch, Plan(batches=(1, 2, 3), prompts=(4,)))
    assert [row.cache for row in report.decode] == ["L4", "L4", ""]
    assert report.prompt[0].cache == "L4"
    marked = [line.split()[0] for line in report.table().splitlines() if line.endswith("  (from the L4 cache)")]
    assert marked == ["1", "1", "2", "2", "4"]
    assert [row["cache"] for row in report.to_dict()["decode"]] == ["L4", "L4", None]


def test_the_hosts_copy_is_counted_twice_and_the_first_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    now, took = [0.0], [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    times = iter([moment for seconds in took for moment in (now[0], now[0] + seconds)])
    copied: list[tuple[int, bytes]] = []

    def copyto(to: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
        to[...] = source
        copied.append((to.ctypes.data, to.tobytes()))

    monkeypatch.setattr(module, "perf_counter", lambda: next(times))
    monkeypatch.setattr(module, "_HOST_COPY_BYTES", 1000)
    monkeypatch.setattr(module.np, "copyto", copyto)
    assert module._host_bandwidth(3) == 2 * 1000 / 5.0
    assert len({address for address, _ in copied}) == 3
    assert [len(data) for _, data in sorted(copied)[::10]] == [334, 333, 333]
    assert all(set(data) == {1} for _, data in copied)


def test_the_largest_cache_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CACHES", tmp_path)
    assert module._host_cache() == ("", 0)
    for i, (level, size) in enumerate([("1", "48K"), ("1", "32K"), ("3", "32768K"), ("2", "1024K")]):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "level").write_text(f"{level}\n")
        (tmp_path / f"index{i}" / "size").write_text(f"{size}\n")
    (tmp_path / "index9").mkdir()  # of which nothing is known
    assert module._host_cache() == ("L3", 32 << 20)


# --- on a GPU that is none ----------------------------------------------------------------------------------------

OnGpu = Callable[..., Report]


@pytest.fixture
def path(bundle: Any, tmp_path: Path) -> Path:
    """A bundle of its own, to be given engines."""
    return shutil.copytree(bundle("mamba").path, tmp_path / "bundle")


@pytest.fixture
def on_gpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnGpu]:
    """``on_gpu(plan, **of_the_engine)``: measured over the fakes, by the clock of the fake GPU."""
    devices: list[fake_gpu.FakeDevice] = []

    def of(plan: Plan, *, can_capture: bool = True, l2_bytes: int = 1 << 10, **engine: Any) -> Report:
        given = fake_gpu.give_engine(path, **engine)
        device: Any = fake_gpu.FakeDevice(total=1 << 22, can_capture=can_capture)
        device.l2_bytes = l2_bytes
        devices.append(device)
        monkeypatch.setattr(module, "perf_counter", lambda: device.now)
        facts = engine_facts(given, "tensorrt")
        of.device = device  # type: ignore[attr-defined]

        def open_session() -> Session:
            of.session = Session(fake_gpu.open_backend(given, device), given.config)  # type: ignore[attr-defined]
            return of.session  # type: ignore[attr-defined]

        return bench(open_session, plan, device=device, engine=facts)

    yield of
    assert all(device.is_closed and not device.regions and device.depth == 0 for device in devices)


def test_three_figures_of_a_step(on_gpu: OnGpu, path: Path) -> None:
    report = on_gpu(Plan(batches=(1, 3), prompts=(5,)))
    contract = Bundle.open(path).contract
    for row, batch in zip(report.decode, (1, 3), strict=True):
        state = state_bytes(row_bytes(contract.states), batch)
        copied = 2 * state / fake_gpu.FakeDevice.bandwidth  # at times
        assert list(row.figures) == ["device", "generate", "step"]
        assert row.kernels == 2, "the engine and the choice of tokens"
        device, generate, step = row.figures.values()
        assert device.samples == pytest.approx([1e-3] * 20, rel=1e-12), "200 steps, 10 a sample; nothing is copied"
        assert generate.samples == pytest.approx([1e-3 + copied / BLOCK] * 20, rel=1e-9), "one copy a block"
        assert len(step.samples) == 200
        assert step.median == pytest.approx(1e-3, rel=1e-9)
        assert max(step.samples) == pytest.approx(1e-3 + copied, rel=1e-9)
    assert report.prompt[0].figures["prompt"].median == pytest.approx(5e-3, rel=1e-3)


def test_replays_are_launched_and_the_session_goes_on(path: Path) -> None:
    """The one that is enqueued first is not timed; the state is that after all of them."""
    given = fake_gpu.give_engine(path)
    device = fake_gpu.FakeDevice()

    def interrupt_once() -> None:
        device.on_wait = lambda: None
        raise KeyboardInterrupt

    with Session(fake_gpu.open_backend(given, device), given.config) as session:
        backend: Any = session.backend
        state = backend.new_state(2)
        backend.run(np.array([[1, 2], [3, 4]], np.int32), np.array([2, 2], np.int32), state)
        before = state.snapshot()
        assert backend.kernels_a_step(state) == 2  # the engine and the choice
        after = state.snapshot()
        assert all(np.array_equal(after.arrays[name], before.arrays[name]) for name in before.arrays)
        graph = backend._graphs["ahead", 2]
        launches = graph.launches
        assert backend.time_replays(np.array([7, 8], np.int32), 4, state) == pytest.approx(4e-3)
        assert graph.launches == launches + 5
        replayed = state.snapshot()
        device.on_wait = interrupt_once
        with pytest.raises(KeyboardInterrupt):  # what is taken back is the one step, not the replays
            backend.run(np.array([[1], [2]], np.int32), np.array([1, 1], np.int32), state)
        after = state.snapshot()
        assert all(np.array_equal(after.arrays[name], replayed.arrays[name]) for name in replayed.arrays)
        session.restore(before)
        tokens = np.array([7, 8])
        for _ in range(5):  # each reads what the one before chose
            tokens = session.step(tokens).argmax(-1)
        stepped = session.snapshot()
        for name, array in stepped.arrays.items():
            np.testing.assert_allclose(replayed.arrays[name], array, rtol=1e-5, atol=1e-6)


def test_replays_that_break_off_leave_no_state_to_go_on_with(path: Path) -> None:
    given = fake_gpu.give_engine(path)
    device = fake_gpu.FakeDevice()
    with Session(fake_gpu.open_backend(given, device), given.config) as session:
        backend: Any = session.backend
        state = backend.new_state(1)
        assert backend.kernels_a_step(state) == 2  # the engine and the choice

        def interrupt() -> None:
            if len(device.queue) > 4:
                raise KeyboardInterrupt

        device.on_wait = interrupt
        with pytest.raises(KeyboardInterrupt):
            backend.time_replays(np.array([1], np.int32), 4, state)
        device.on_wait = lambda: None
        with pytest.raises(EngineError, match="the state is lost"):
            state.snapshot()


def test_without_graphs_the_wall_alone_is_read(on_gpu: OnGpu) -> None:
    report = on_gpu(Plan(batches=(2,), prompts=(1,)), can_capture=False)
    [row] = report.decode
    assert (list(row.figures), row.kernels) == (["generate", "step"], None)
    assert "kernels" not in report.table()


def test_the_bandwidth_is_that_of_a_copy_of_a_quarter_of_what_is_free(on_gpu: OnGpu) -> None:
    report = on_gpu(Plan(batches=(1,), prompts=(1,)))
    assert report.machine == Machine("Fake GPU", pytest.approx(1e12), "L2", 1 << 10)  # type: ignore[arg-type]
    assert report.decode[0].limit == pytest.approx(report.decode[0].limits.bytes / 1e12)
    assert report.decode[0].cache == ""


def test_on_a_gpu_the_cache_is_its_l2(on_gpu: OnGpu) -> None:
    report = on_gpu(Plan(batches=(1,), prompts=(1,)), l2_bytes=1 << 20)
    assert report.decode[0].cache == "L2"
    assert "(from the L2 cache)" in report.table()


def test_memory_is_what_the_session_took(on_gpu: OnGpu, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    prompt = module._prompt

    def see(*arguments: Any) -> Row:
        row = prompt(*arguments)
        taken.append(sum(region.nbytes for region in on_gpu.device.regions.values()))  # type: ignore[attr-defined]
        return row

    monkeypatch.setattr(module, "_prompt", see)
    report = on_gpu(Plan(batches=(1,), prompts=(1, 2)))
    assert taken[0] == taken[1] == report.gpu_memory_bytes == sum(report.gpu_memory.values())
    assert report.gpu_memory["the state of 8 rows"] == report.gpu_memory["the copy of the state"] > 0


def test_more_rows_than_the_engine_takes(on_gpu: OnGpu) -> None:
    with pytest.raises(InputError, match="9 rows were given, and the engine was built for 4") as caught:
        on_gpu(Plan(batches=(1, 9)), max_batch=4)
    assert caught.value.hint == "mamba-deploy build OUT --max-batch 9"
    assert on_gpu.device.graphs == 0  # type: ignore[attr-defined]


def test_an_engine_of_one_token_a_prompt_call(on_gpu: OnGpu) -> None:
    report = on_gpu(Plan(batches=(2,), prompts=(3,)), max_prefill=1)
    assert report.prompt[0].figures["prompt"].median == pytest.approx(3e-3, rel=1e-3)


def test_the_engine_and_the_weights_it_is_given(on_gpu: OnGpu, path: Path) -> None:
    report = on_gpu(Plan(batches=(1,), prompts=(1,)))
    files = Bundle.open(path).manifest["files"]
    size, weights = files[ENGINES["tensorrt"]]["bytes"], files[WEIGHTS]["bytes"]
    expected = {"bytes": size, "bound_weight_bytes": 0, "share_of_weights": size / weights, "build_seconds": 1.5}
    assert report.engine == report.to_dict()["engine"] == expected
    assert "built in 1.5 s" in report.table()
    given = fake_gpu.give_engine(path, weights={"a": [0, 30], "b": [64, weights - 50]})
    facts = engine_facts(given, "tensorrt")
    assert facts["bound_weight_bytes"] == weights - 20
    assert facts["share_of_weights"] == pytest.approx((size + weights - 20) / weights)
    table = dataclasses.replace(report, engine=facts).table()
    assert f"MB and {(weights - 20) / 1e6:.1f} MB of weights in model.onnx.data, 1." in table
    with pytest.raises(BundleError, match="has no engine for tensorrt-rtx"):
        engine_facts(given, "tensorrt-rtx")


# --- the device ---------------------------------------------------------------------------------------------------


class Driver:
    """``cuda.bindings.driver`` as far as a capture needs it; a graph is a list of the kinds of its nodes."""

    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_KERNEL=0, CU_GRAPH_NODE_TYPE_GRAPH=4)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, nodes: list[Any]) -> None:
        self.nodes, self.destroyed = nodes, 0

    def CUresult(self, value: int) -> Any:  # noqa: N802
        return SimpleNamespace(name=f"CUDA_ERROR_{value}")

    def cuStreamBeginCapture(self, *arguments: Any) -> Any:  # noqa: N802
        return (0,)

    def cuStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        return 0, self.nodes

    def cuGraphGetNodes(self, graph: Any, numNodes: int = 0) -> Any:  # noqa: N802
        assert not self.destroyed
        return 0, graph[:numNodes], len(graph)

    def cuGraphNodeGetType(self, node: Any) -> Any:  # noqa: N802
        return 0, 4 if isinstance(node, list) else node

    def cuGraphChildGraphNodeGetGraph(self, node: Any) -> Any:  # noqa: N802
        return 0, node

    def cuGraphInstantiate(self, graph: Any, flags: int) -> Any:  # noqa: N802
        return 0, "executable"

    def cuGraphDestroy(self, graph: Any) -> None:  # noqa: N802
        self.destroyed += 1

    def cuGraphExecDestroy(self, executable: Any) -> None:  # noqa: N802
        return None


class Event:
    """Of pycuda: its time is that of the stream, in ms."""

    def record(self, stream: Any) -> None:
        self.at = stream.now

    def synchronize(self) -> None:
        pass

    def time_till(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


def bare_device(driver: Any = None, cuda: Any = None) -> Any:
    """A Device without what opening one needs."""
    device: Any = object.__new__(Device)
    device._bindings, device._cuda = driver, cuda
    device._stream = SimpleNamespace(handle=77, now=1.0)
    return device


@pytest.mark.parametrize(
    ("nodes", "kernels"), [([], 0), ([0, 0, 1], 2), ([1, 2], 0), ([0, [0, 1, [0]], 2, [], 0], 4)], ids=str
)
def test_kernels_are_counted_when_a_graph_is_captured(nodes: list[Any], kernels: int) -> None:
    driver = Driver(nodes)
    graph = bare_device(driver).capture(lambda: None)
    assert graph.kernels == kernels
    assert driver.destroyed == 1


def test_nodes_that_cuda_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver([0])
    monkeypatch.setattr(driver, "cuGraphGetNodes", lambda *a: (719, None, None))
    with pytest.raises(EngineError, match="could not list the nodes of a CUDA graph: CUDA_ERROR_719"):
        bare_device(driver).capture(lambda: None)
    assert driver.destroyed == 1


def test_the_installed_bindings_name_what_is_counted() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    kinds = driver.CUgraphNodeType
    assert (int(kinds.CU_GRAPH_NODE_TYPE_KERNEL), int(kinds.CU_GRAPH_NODE_TYPE_GRAPH)) == (0, 4)
    for name in ("cuGraphGetNodes", "cuGraphNodeGetType", "cuGraphChildGraphNodeGetGraph"):
        assert callable(getattr(driver, name))


def test_elapsed_is_in_seconds() -> None:
    device = bare_device(cuda=SimpleNamespace(Event=Event))
    assert device.elapsed(lambda: setattr(device._stream, "now", 1.25)) == pytest.approx(0.25)


@pytest.mark.parametrize(("free", "nbytes"), [(1 << 40, 2 << 30), (4_000_100, 1_000_192)])
def test_a_copy_is_of_two_gigabytes_or_a_quarter_of_what_is_free(
    free: int, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The median of nine after twenty; the memory is given back."""
    device: Any = fake_gpu.FakeDevice()
    copies: list[tuple[int, int, int]] = []
    sizes, given_back = [], []
    took = iter([*[99.0] * 20, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 5.0])

    def allocate(size: int, what: str) -> Any:
        sizes.append(size)
        return SimpleNamespace(address=len(sizes), free=lambda: given_back.append(size))

    def elapsed(enqueue: Callable[[], None]) -> float:
        assert len(given_back) == 0
        enqueue()
        return next(took)

    monkeypatch.setattr(device, "free_bytes", lambda: free)
    monkeypatch.setattr(device, "allocate", allocate)
    monkeypatch.setattr(device, "elapsed", elapsed)
    monkeypatch.setattr(device, "copy", lambda *arguments: copies.append(arguments))
    assert Device.copy_bandwidth(device) == 2 * nbytes / 5.0
    assert sizes == given_back == [nbytes] * 2
    assert copies == [(1, 2, nbytes)] * 29
    assert device.depth == 0


def test_no_memory_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    device: Any = fake_gpu.FakeDevice(total=1 << 20)
    monkeypatch.setattr(device, "free_bytes", lambda: 3 << 20)
    with pytest.raises(EngineError, match="not enough memory: a copy that is timed"):
        device.copy_bandwidth()
    assert not device.regions


# --- the report ---------------------------------------------------------------------------------------------------


def toy_report(**options: Any) -> Report:
    def row(batch: int, seq: int, figures: dict[str, float], **other: Any) -> Row:
        limits = Limits(weight_bytes=7_000_000, state_bytes=2_000_000, logits_bytes=1_000_000, flops=6_000_000_000)
        made = {name: Figure([seconds] * 5) for name, seconds in figures.items()}
        return Row(batch, seq, limits, 0.01, "bytes", "", made, **other)

    decode = [row(1, 1, {"device": 0.02, "generate": 0.025, "step": 0.04}, kernels=120), row(16, 1, {"step": 0.08})]
    prompt = [row(1, 128, {"prompt": 0.5}), row(1, 1, {"prompt": 0.05})]
    return Report("toy 1.0", MACHINE, Plan(), decode, prompt, {"mamba-deploy": "0.1"}, **options)


def test_the_table() -> None:
    memory = {"token ids": 64, "the state of 8 rows": 250_000, "the weights": 1_000_000}
    assert toy_report(gpu_memory_bytes=1_500_000, gpu_memory=memory).table().splitlines() == [
        "toy 1.0",
        "  toy         a copy reaches 1.0 GB/s, read and written",
        "  GPU memory  1.5 MB taken by the session",
        "    of it     the weights 1.0, the state of 8 rows 0.2, other (kernels, TensorRT) 0.2",
        "  versions    mamba-deploy 0.1",
        "decode, a step of all rows",
        "  rows    figure      ms     p95  tokens/s     MB  GB/s  limit ms  of limit  kernels",
        "     1    device  20.000  20.000      50.0  10.00   0.5    10.000      50 %      120",
        "     1  generate  25.000  25.000      40.0  10.00   0.4    10.000      40 %",
        "     1      step  40.000  40.000      25.0  10.00   0.2    10.000      25 %",
        "    16      step  80.000  80.000     200.0  10.00   0.1    10.000      12 %",
        "prompt, to its first token",
        "  tokens       ms      p95  tokens/s  TFLOP/s  limit ms  of limit  limited by",
        "     128  500.000  500.000     256.0    0.012    10.000       2 %       bytes",
        "       1   50.000   50.000      20.0    0.120    10.000      20 %       bytes",
        "  the limit of a prompt is that of its bytes; --tflops adds that of its products",
    ]


@pytest.mark.parametrize(("name", "begins"), [("speed.svg", b"<?xml"), ("speed.PNG", b"\x89PNG\r\n\x1a\n")])
def test_plot(tmp_path: Path, name: str, begins: bytes) -> None:
    """Rows in any order, and rows that lack a figure."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    check_plot(tmp_path / name)
    plot(toy_report(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(begins)
    assert len(content) > 5000
    if begins == b"<?xml":
        assert all(f"<!-- {text} -->".encode() in content for text in ("device", "generate", "step", "limit", "128"))


def test_plots_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    for name in ("speed", "speed.pdf"):
        with pytest.raises(InputError, match=r"is neither an \.svg nor a \.png file"):
            check_plot(tmp_path / name)
    with pytest.raises(InputError, match=r"there is no folder .*nowhere for speed\.svg"):
        check_plot(tmp_path / "nowhere" / "speed.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (check_plot, lambda path: plot(toy_report(), path)):
        with pytest.raises(MissingDependencyError, match="'matplotlib' is needed to draw") as caught:
            call(tmp_path / "speed.svg")
        assert caught.value.hint == "pip install 'mamba-deploy[plot]'"


# --- the command --------------------------------------------------------------------------------------------------

QUICK = ("--threads", "1", "--batch", "1,2", "--prompt", "3", "--steps", "5", "--seconds", "0.01")


def command(*arguments: Any) -> Result:
    done = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def facts_of(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture
def little_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HOST_COPY_BYTES", 1 << 16)


@pytest.mark.usefixtures("little_copying")
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_the_command(bundle: Any, tmp_path: Path, backend: str) -> None:
    opened = bundle("mamba2").bundle
    done = command(opened.path, "--backend", backend, *QUICK, "--tflops", "0.05", "--json")
    facts = facts_of(done)
    assert facts["backend"].startswith(backend)
    assert (facts["machine"], facts["tflops"], facts["engine"]) == ("CPU, 1 thread", 0.05, None)
    assert facts["gpu_memory_bytes"] is None
    assert facts["copy_bytes_per_second"] > 0
    assert {"mamba-deploy", "python", "numpy"} <= set(facts["versions"])
    assert [row["batch"] for row in facts["decode"]] == [1, 2]
    for row in facts["decode"]:
        limits = Limits.of(opened.config, opened.contract, batch=row["batch"])
        assert (row["bytes"], row["flops"], row["kernels"]) == (limits.bytes, limits.flops, None)
        assert set(row["figures"]) == {"generate", "step"}
        for figure in row["figures"].values():
            assert 5 <= figure["samples"] <= 20
            assert 0 < figure["median_ms"] <= figure["p95_ms"]
    [prompt] = facts["prompt"]
    assert (prompt["tokens"], prompt["bytes"]) == (3, Limits.of(opened.config, opened.contract, seq=3).bytes)
    assert done.stderr.splitlines()[0] == "measuring the copy bandwidth"


@pytest.mark.usefixtures("little_copying")
def test_the_command_for_people(bundle: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    done = command(bundle("mamba").path, *QUICK, "--plot", tmp_path / "speed.svg")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("onnxruntime ")
    assert lines[1].startswith("  CPU, 1 thread  a copy reaches ")
    assert sum(line.split()[1:2] == ["step"] for line in lines) == 2
    assert done.stderr.endswith(f"wrote {tmp_path / 'speed.svg'}\n")
    assert (tmp_path / "speed.svg").stat().st_size > 5000


def test_the_lists_of_the_command(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def record(open_session: Any, plan: Plan, **options: Any) -> Report:
        plans.append(plan)
        return toy_report()

    monkeypatch.setattr(module, "bench", record)
    path = bundle("mamba").path
    assert command(path).exit_code == 0
    assert command(path, "--batch", "8, 1,8", "--prompt", "64", "--seconds", "0.5", "--steps", 9).exit_code == 0
    assert plans == [Plan(), Plan(batches=(8, 1), prompts=(64,), seconds=0.5, steps=9)]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--seconds", "0"], "seconds is 0.0"),
        (["--tflops", "nan"], "tflops is nan"),
        (["--plot", "nowhere/speed.svg"], "there is no folder nowhere for speed.svg"),
        (["--plot", "speed.pdf"], "speed.pdf is neither an .svg nor a .png file"),
        (["--backend", "tensorrt"], "has no engine for tensorrt"),
    ],
    ids=str,
)
def test_what_the_command_refuses_before_it_measures(bundle: Any, flags: list[str], text: str) -> None:
    done = command(bundle("mamba").path, *flags)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert text in done.stderr
    assert "measuring" not in done.stderr


@pytest.mark.parametrize(
    ("package", "extra", "flags"),
    [("matplotlib", "plot", ["--plot", "speed.svg"]), ("pycuda", "cuda", ["--provider", "cuda"])],
)
def test_the_command_without_a_package_it_needs(
    bundle: Any, monkeypatch: pytest.MonkeyPatch, package: str, extra: str, flags: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    done = command(bundle("mamba").path, *flags)
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"error: the Python package '{package}" in done.stderr
    assert f"hint: pip install 'mamba-deploy[{extra}]'" in done.stderr
    assert "measuring" not in done.stderr


def test_the_command_on_a_gpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One device measures, and the session has its own; here they are one."""
    given = fake_gpu.give_engine(path)
    device: Any = fake_gpu.FakeDevice(total=1 << 22)
    closed: list[bool] = []
    monkeypatch.setattr(device_module, "Device", lambda: device)
    monkeypatch.setattr(device, "close", lambda: closed.append(True))
    monkeypatch.setattr(Session, "open", lambda *a, **k: Session(fake_gpu.open_backend(given, device), given.config))
    facts = facts_of(command(path, "--backend", "tensorrt", *QUICK, "--json"))
    assert facts["machine"] == "Fake GPU"
    assert facts["engine"]["build_seconds"] == 1.5
    assert facts["gpu_memory_bytes"] == sum(facts["gpu_memory"].values()) > 0
    assert [row["kernels"] for row in facts["decode"]] == [2, 2]
    assert len(closed) == 2
