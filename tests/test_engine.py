"""TensorRT's backend over a GPU that is none (fake_gpu): binding, order, lifetimes, running ahead; and what it refuses.

What a session is to do, tests/test_session.py holds this backend to as it does the others.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest

from mamba_deploy.bundle import PORTABLE, Bundle
from mamba_deploy.errors import BundleError, EngineError, InputError
from mamba_deploy.runtime import engine
from mamba_deploy.runtime.session import Session

Open = Callable[..., Session]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 2.0, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "seed": 2},
]


@pytest.fixture
def path(bundle: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A bundle of its own, to be given engines and spoilt."""
    of_test = getattr(request.node, "callspec", None)
    pending = of_test is not None and of_test.params.get("opened") == "pending"
    return shutil.copytree(bundle("mamba2" if pending else "mamba").path, tmp_path / "bundle")


# An engine of operators, one that is given its weights, and one whose states lag behind.
@pytest.fixture(params=["operators", "fused", "pending"])
def opened(path: Path, request: pytest.FixtureRequest) -> Iterator[Open]:
    """``opened(can_capture=..., max_batch=...)``: a session over the fakes; at the end nothing may be left there."""
    devices = []
    sessions = []

    def of(*, can_capture: bool = True, can_lock: bool = True, said: list[str] | None = None, **engine: Any) -> Session:
        given = fake_gpu.give_engine(path, fused=request.param != "operators", **engine)
        devices.append(fake_gpu.FakeDevice(can_capture=can_capture, can_lock=can_lock))
        backend = fake_gpu.open_backend(given, devices[-1], say=(said if said is not None else []).append)
        sessions.append(Session(backend, given.config))
        return sessions[-1]

    yield of
    for session in sessions:
        session.close()
    assert all(device.is_closed and not device.regions and device.depth == 0 for device in devices)


@pytest.fixture
def cpu(path: Path) -> Iterator[Session]:
    with Session.open(path, graph="portable", threads=1) as session:
        yield session


def bits(session: Session) -> list[bytes]:
    return [array.tobytes() for array in session.snapshot().arrays.values()]


def tokens(session: Session, prompts: Any, **options: Any) -> list[tuple[int, int, str | None]]:
    return [(token.row, token.id, token.finish_reason) for token in session.generate(prompts, **options)]


# --- what a caller is given ---------------------------------------------------------------------------------------


def test_logits_are_the_callers_own(opened: Open, cpu: Session) -> None:
    """However many are kept, and whatever is written to them; a row alone, and after the session too."""
    session = opened()
    kept = [session.prefill([[1, 2], [3]])]
    given, wanted = [kept[0].copy()], [cpu.prefill([[1, 2], [3]])]
    for token in range(6):
        logits = session.step([token, 9])
        wanted.append(cpu.step([token, 9]))
        kept.append(logits if token % 2 else logits[1])
        given.append(kept[-1].copy())
        kept[0][...] = token
    kept[0][...] = given[0]
    session.close()
    for own, copy, other in zip(kept, given, wanted, strict=True):
        np.testing.assert_array_equal(own, copy)
        np.testing.assert_allclose(own, other if own.ndim == 2 else other[1], rtol=1e-4, atol=1e-5)
    assert not any(np.shares_memory(a, b) for i, a in enumerate(kept) for b in kept[:i])


def test_memory_that_cannot_be_page_locked_is_said(opened: Open, cpu: Session) -> None:
    said: list[str] = []
    session = opened(can_lock=False, said=said)
    np.testing.assert_allclose(session.step([5]), cpu.step([5]), rtol=1e-4, atol=1e-5)
    assert said == ["slower than it should be: CUDA cannot page-lock memory here, so logits take longer to the host"]


# --- what is bound ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill_batch", [1, 2, 8])
@pytest.mark.parametrize("max_prefill", [1, 3, 50])
def test_prompts_are_read_in_groups_and_parts(opened: Open, cpu: Session, prefill_batch: int, max_prefill: int) -> None:
    session = opened(prefill_batch=prefill_batch, max_prefill=max_prefill)
    rows = [[1, 2, 3, 4, 5, 6, 7], [8], [], [9, 10, 11]]
    cpu.max_chunk = max_prefill
    np.testing.assert_allclose(session.prefill(rows)[[0, 1, 3]], cpu.prefill(rows)[[0, 1, 3]], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(session.step([1, 2, 3, 4]), cpu.step([1, 2, 3, 4]), rtol=1e-4, atol=1e-5)
    assert session.max_chunk == max_prefill


def test_states_at_addresses_that_tensorrt_takes_not_are_copied(opened: Open) -> None:
    session = opened()
    session.prefill([[1, 2], [3, 4]])
    state: Any = session._state
    assert any(size % 256 for size in state.row_bytes.values())


def test_a_graph_is_captured_once_for_each_number_of_rows(opened: Open) -> None:
    session = opened()
    device: Any = session.backend.device
    for batch in (1, 2, 1, 2):
        session.reset()
        for _ in range(3):
            session.step([1] * batch)
    assert device.graphs == 2


def test_a_capture_that_fails_is_said_and_decoding_goes_on(opened: Open, cpu: Session) -> None:
    said: list[str] = []
    session = opened(can_capture=False, said=said)
    for token in (5, 6, 7):
        np.testing.assert_allclose(session.step([token]), cpu.step([token]), rtol=1e-4, atol=1e-5)
    assert said == [
        "decoding without CUDA graphs, which is slower: CUDA could not capture a CUDA graph: "
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    ]
    assert tokens(session, [[1]], max_tokens=4) == tokens(cpu, [[1]], max_tokens=4)


@pytest.fixture
def prompts(path: Path, cpu: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """``prompts(length, rows=1)``: reads such prompts, as the CPU does, and gives the launches of each graph of prompts
    that is kept, -1 for what came once, the last to be used last."""
    monkeypatch.setattr(engine, "_PROMPTS_KEPT", 3)
    given = fake_gpu.give_engine(path, fused=True, max_prefill=50, prefill_batch=1)
    with Session(fake_gpu.open_backend(given, fake_gpu.FakeDevice()), given.config) as session:
        cpu.max_chunk = 50

        def read(length: int, rows: int = 1) -> list[int]:
            ids = np.random.default_rng(length).integers(0, 61, (rows, length))
            for reader in (session, cpu):
                reader.reset()
            np.testing.assert_allclose(session.prefill(ids), cpu.prefill(ids), rtol=1e-4, atol=1e-5)
            kept: Any = session.backend._prompts  # type: ignore[attr-defined]
            return [-1 if graph is None else graph.launches for graph in kept.values()]

        yield read


def test_a_length_that_comes_again_is_read_from_a_graph(prompts: Callable[..., list[int]]) -> None:
    """Up to a multiple of 32 tokens lengths are one, but a single token is not; 50 are the most read at once."""
    assert prompts(2) == [-1]
    assert prompts(31) == [0]
    assert prompts(32) == [1]
    assert prompts(33) == [1, -1]
    assert prompts(50) == [1, 0]
    assert prompts(7) == [0, 2]
    assert prompts(51) == [2, 1]  # 50 tokens, then a step
    assert prompts(104) == [3, 3]  # 50, 50, and 4


def test_each_row_has_graphs_of_its_own_and_the_last_used_are_kept(prompts: Callable[..., list[int]]) -> None:
    assert prompts(7) == [-1]
    assert prompts(7, rows=2) == [-1, -1, -1]  # of two rows, the states lie elsewhere
    assert prompts(7, rows=2) == [-1, 0, 0]
    assert prompts(40) == [0, 0, -1]
    assert prompts(7) == [0, -1, -1]
    assert prompts(7) == [0, -1, 0]


def test_without_the_one_operator_prompts_have_no_graphs(path: Path) -> None:
    given = fake_gpu.give_engine(path)
    with Session(fake_gpu.open_backend(given, fake_gpu.FakeDevice()), given.config) as session:
        for _ in range(3):
            session.prefill([[1, 2, 3]])
        assert session.backend.device.graphs == 0  # type: ignore[attr-defined]


def test_a_prompt_that_cannot_be_captured_is_said_once_and_read(path: Path, cpu: Session) -> None:
    said: list[str] = []
    given = fake_gpu.give_engine(path, fused=True)
    device = fake_gpu.FakeDevice(can_capture=False)
    with Session(fake_gpu.open_backend(given, device, say=said.append), given.config) as session:
        for _ in range(4):
            ids = [[1, 2, 3]]
            np.testing.assert_allclose(session.prefill(ids), cpu.prefill(ids), rtol=1e-4, atol=1e-5)
    assert said == [
        "prompts without CUDA graphs, which is slower: CUDA could not capture a CUDA graph: "
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    ]


# --- running ahead ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [7], [9, 9]]], ids=["one", "three"])
def test_tokens_and_state_are_those_of_the_cpu(opened: Open, cpu: Session, prompts: Any, options: Any) -> None:
    session = opened()
    assert tokens(session, prompts, max_tokens=90, **options) == tokens(cpu, prompts, max_tokens=90, **options)
    for got, want in zip(session.snapshot().arrays.values(), cpu.snapshot().arrays.values(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
    graphs: dict[Any, Any] = session.backend._graphs  # type: ignore[attr-defined]
    assert sum(graph.launches for key, graph in graphs.items() if key[0] == "ahead") >= 89
    of_snapshot = bool(session.backend._has_pending)  # type: ignore[attr-defined]
    steps = sum(graph.launches for key, graph in graphs.items() if key[0] == "step")
    assert steps == of_snapshot  # no logits came to the host


def test_a_row_that_ends_waits_for_the_others(opened: Open, cpu: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state stays where it was, though the device ran ahead."""
    session = opened()
    ends = tokens(cpu, [[1], [2], [3]], max_tokens=12, temperature=3.0, seed=5)
    eos = next(id for row, id, _ in ends[3:] if row == 1)
    for each in (session, cpu):
        each.reset()
        monkeypatch.setattr(type(each.config), "eos_token_ids", (eos,), raising=False)
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 3.0, "seed": 5}
    assert tokens(session, [[1], [2], [3]], **options) == tokens(cpu, [[1], [2], [3]], **options)
    for got, want in zip(session.snapshot().arrays.values(), cpu.snapshot().arrays.values(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 20, 48, 49, 50, 66])
def test_the_state_is_where_the_tokens_are_at_any_moment(opened: Open, count: int) -> None:
    """Also in the middle of what runs ahead; and going on gives what would have come."""
    session, other = opened(), opened()
    whole = [token.id for token in other.generate([[1, 2]], max_tokens=80)]
    running = session.generate([[1, 2]], max_tokens=80)
    seen = [next(running).id for _ in range(count)]
    midway = bits(session)
    other.reset()
    other.prefill([[1, 2]])
    for token in seen[:-1]:
        other.step([token])
    assert bits(other) == midway
    assert seen + [token.id for token in running] == whole


def test_two_generators_that_take_turns_leave_the_state_at_the_last_token(opened: Open, cpu: Session) -> None:
    """Whichever ran ahead last is the one that is taken back."""
    found = []
    for session in (opened(), cpu):
        first = session.generate([[1, 2]], max_tokens=60)
        seen = [next(first).id, next(first).id]
        second = session.generate([[3]], max_tokens=60)
        for running in (second, first, second, second, first):
            seen.append(next(running).id)
        found.append((seen, session.snapshot()))
    assert found[0][0] == found[1][0]
    for got, want in zip(found[0][1].arrays.values(), found[1][1].arrays.values(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_a_generator_that_is_closed_leaves_the_state_at_its_last_token(opened: Open) -> None:
    session = opened()
    running = session.generate([[1, 2], [3]], max_tokens=60, temperature=1.0, seed=0)
    seen = [next(running) for _ in range(2 * 10)]
    running.close()  # type: ignore[attr-defined]
    other = opened()
    other.prefill([[1, 2], [3]])
    for i in range(9):
        other.step([token.id for token in seen[2 * i : 2 * i + 2]])
    assert bits(session) == bits(other)


def test_an_interrupt_while_running_ahead(opened: Open) -> None:
    session = opened()
    device: Any = session.backend.device
    running = session.generate([[1, 2]], max_tokens=60)
    seen = [next(running).id for _ in range(5)]
    calls = [0]

    def interrupt() -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt

    device.on_wait = interrupt
    with pytest.raises(KeyboardInterrupt):
        seen.extend(token.id for token in running)
    device.on_wait = lambda: None
    other = opened()
    other.prefill([[1, 2]])
    for token_id in seen[:-1]:
        other.step([token_id])
    assert bits(session) == bits(other)


def test_logits_that_are_not_finite_are_an_error(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened()
    running = session.generate([[1, 2]], max_tokens=60)
    next(running)
    monkeypatch.setattr(fake_gpu.FakeKernels, "_choose", staticmethod(lambda *a: -1))
    with pytest.raises(EngineError, match="logits of row 0 are not finite"):
        next(running)


def test_a_repetition_penalty_is_left_to_the_host(opened: Open, cpu: Session) -> None:
    session = opened()
    options: dict[str, Any] = {"max_tokens": 30, "repetition_penalty": 1.3}
    assert tokens(session, [[1, 2]], **options) == tokens(cpu, [[1, 2]], **options)


@pytest.mark.parametrize("rows", [[[5], [6]], [[5, 6, 7], [8]]], ids=["step", "prompt"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
def test_an_interrupt_at_any_moment_leaves_the_state_as_it_was(opened: Open, rows: Any, is_first: bool) -> None:
    """Whatever the call waits for, the capture of a graph among it."""
    session = opened()
    device: Any = session.backend.device
    session.prefill([[1, 2], [3, 4]])
    for token in range(0 if is_first else 20):
        session.step([token, token])
    before = bits(session)
    for moment in range(1, 100):
        calls = [0]

        def interrupt(calls: list[int] = calls, moment: int = moment) -> None:
            calls[0] += 1
            if calls[0] == moment:
                raise KeyboardInterrupt

        device.on_wait = interrupt
        try:
            session.prefill(rows)
        except KeyboardInterrupt:
            device.on_wait = lambda: None
            assert bits(session) == before, moment
        else:
            break
    device.on_wait = lambda: None
    assert moment > 2
    other = opened()
    other.restore(session.snapshot())
    assert session.step([1, 2]).tobytes() == other.step([1, 2]).tobytes()


# --- what is refused ----------------------------------------------------------------------------------------------


def test_layers_beside_the_one_operator_are_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT 8.6 once converted every weight of a model in each call."""
    monkeypatch.setattr(fake_gpu.FakeEngine, "num_layers", 290)
    for fused in (False, True):
        said: list[str] = []
        given = fake_gpu.give_engine(path, fused=fused)
        with Session(fake_gpu.open_backend(given, fake_gpu.FakeDevice(), say=said.append), given.config):
            pass
        assert [line for line in said if "290 layers of one operator" in line] == said[: int(fused)]
    said = []
    # An operator and 144 of its weights, in two profiles.
    of_constants = fake_gpu.give_engine(path, fused=True, layers=145)
    with Session(fake_gpu.open_backend(of_constants, fake_gpu.FakeDevice(), say=said.append), given.config):
        pass
    assert said == []


def test_more_rows_than_the_engine_takes(opened: Open) -> None:
    session = opened(max_batch=2)
    with pytest.raises(InputError, match="3 rows were given, and the engine was built for 2") as caught:
        session.prefill([[1], [2], [3]])
    assert caught.value.hint == "mamba-deploy build OUT --max-batch 3"
    assert session.prefill([[1], [2]]).shape[0] == 2


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        ({"version": "98.1"}, "was built for another TensorRT: TensorRT 98.1, and here is TensorRT 99.0"),
        ({"architecture": "87"}, "was built for another GPU: sm_87, and here is sm_00"),
        ({"plugin_sources": "old"}, "was built for other plugin sources: old, and here is sources"),
        ({"onnx_sha256": "0"}, "was built for another model.onnx"),
        ({"weights_sha256": "0"}, "was built for other weights"),
        ({"weights": {"a": [0, 4]}}, "the engine and the contract do not have the same tensors: a"),
    ],
    ids=str,
)
def test_an_engine_for_something_else(opened: Open, path: Path, spoilt: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        opened(**spoilt)
    device = fake_gpu.FakeDevice()
    with pytest.raises(EngineError, match=said) as caught:
        fake_gpu.open_backend(Bundle.open(path), device)
    assert not device.regions
    assert device.is_closed
    assert "build" in caught.value.hint or "weights" in spoilt


def test_no_engine(path: Path) -> None:
    for backend in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(BundleError, match=f"has no engine for {backend}") as caught:
            Session.open(path, backend)
        assert caught.value.hint.startswith(f"mamba-deploy build {path}")


def test_an_engine_that_was_changed(opened: Open, path: Path) -> None:
    opened()
    engine = path / "model.tensorrt.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="is not the file that was built"):
        fake_gpu.open_backend(Bundle.open(path))


def test_too_little_memory_is_given_back(path: Path) -> None:
    bundle = fake_gpu.give_engine(path)
    for total in range(0, 30_000, 1_000):
        device = fake_gpu.FakeDevice(total=total)
        with pytest.raises(EngineError, match="has not enough memory"):
            fake_gpu.open_backend(bundle, device)
        assert not device.regions
        assert device.is_closed


def test_another_thread(opened: Open) -> None:
    session, said = opened(), []

    def use() -> None:
        for call in (lambda: session.prefill([[1]]), lambda: session.step([1]), session.snapshot):
            try:
                call()
            except EngineError as error:
                said.append(str(error))

    session.prefill([[1, 2]])
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert len(said) == 3
    assert set(said) == {"the session was opened in another thread, and belongs to it"}


def test_a_state_that_another_has_taken_the_place_of(opened: Open) -> None:
    backend: Any = opened().backend
    first = backend.new_state(1)
    backend.new_state(1)
    with pytest.raises(EngineError, match="the state is lost"):
        backend.run(np.zeros((1, 1), np.int32), np.ones(1, np.int32), first)


def test_exporting_again_drops_the_engine(path: Path) -> None:
    given = fake_gpu.give_engine(path)
    assert given.has("model.tensorrt.engine")
    assert given.file("model.tensorrt.engine").is_file()
    assert given.manifest["files"][PORTABLE] == Bundle.open(path).manifest["files"][PORTABLE]


PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnx_ir", "onnxscript", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[2])
import fake_gpu
from mamba_deploy.bundle import Bundle
from mamba_deploy.runtime.session import Session
from mamba_deploy.runtime.state import Snapshot

bundle = Bundle.open(sys.argv[1])
with Session(fake_gpu.open_backend(bundle), bundle.config) as session:
    session.prefill([[1, 2, 3], [4]])
    session.restore(session.snapshot())
    print([token.id for token in session.generate([[5], [6]], max_tokens=5, temperature=1.0, seed=0)])
"""


def test_the_runtime_needs_nothing_of_the_exporting_side(path: Path) -> None:
    fake_gpu.give_engine(path)
    command = [sys.executable, "-c", PROGRAM, str(path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(",") == 9
