"""Engines of whole models on the GPU: against PyTorch's stored answers, against the CPU session, and over long runs.

Needs tensorrt, pycuda and cuda-bindings. The bundles come from tests/gpu/bundles.py, here where PyTorch is installed,
else from MAMBA_DEPLOY_TEST_BUNDLES. What is measured goes into the report as properties named ``figure [unit]``.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu import bundles as made
from locks import locked

pytest.importorskip("tensorrt", reason="needs TensorRT")
cuda = pytest.importorskip("pycuda.driver", reason="needs pycuda")
pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
pytestmark = pytest.mark.gpu

TINY = [name for name in made.MODELS if name.startswith("tiny")]
LIKE = [name for name in made.MODELS if "like" in name]
LARGE = [name for name in made.MODELS if name.endswith("0m-fp16")]
EOS_ID = 256
Record = Callable[[str, object], None]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        cuda.init()
        cuda.Device(0)
    except cuda.Error as error:
        pytest.skip(f"needs a CUDA device: {error}")
    given = os.environ.get("MAMBA_DEPLOY_TEST_BUNDLES")
    return Path(given) if given else tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="session")
def built(folder: Path) -> Callable[[str], Any]:
    """``built(name)``: the bundle with its engine, built if it has none."""
    from mamba_deploy.bundle import Bundle
    from mamba_deploy.exporters.engine_build import build_engine

    def of(name: str) -> Any:
        if not (folder / name).exists():
            if find_spec("torch") is None:
                pytest.skip(f"no {name} in MAMBA_DEPLOY_TEST_BUNDLES, and no PyTorch to make it")
            made.make(folder, name)
        with locked(folder / name):
            bundle = Bundle.open(folder / name)
            if "tensorrt" not in bundle.manifest.get("engines", {}):
                bundle = build_engine(folder / name, max_prefill=512 if name in TINY + LIKE else 2048, say=print)
        return bundle

    return of


@pytest.fixture
def opened(built: Callable[[str], Any]) -> Iterator[Callable[..., Any]]:
    """``opened(name, backend)``: a session, closed after the test."""
    from mamba_deploy import Session

    sessions: list[Any] = []

    def of(name: str, backend: str = "tensorrt", **options: Any) -> Any:
        bundle = built(name)
        if backend == "onnxruntime":
            pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
            options = {"graph": "portable", "threads": 2, **options}
        sessions.append(Session.open(bundle.path, backend, **options))
        return sessions[-1]

    yield of
    for session in sessions:
        session.close()


def free_bytes() -> int:
    context = cuda.Device(0).retain_primary_context()
    context.push()
    try:
        return int(cuda.mem_get_info()[0])
    finally:
        context.pop()
        context.detach()


# --- against PyTorch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", made.MODELS)
def test_agrees_with_pytorch(opened: Callable[..., Any], built: Any, record_property: Record, name: str) -> None:
    from mamba_deploy.bundle import ENGINES, REFERENCE, WEIGHTS
    from mamba_deploy.runtime.verify import Answers, verify

    bundle = built(name)
    report = verify(opened(name), Answers.load(bundle.file(REFERENCE)))
    print(report.table())
    facts, files = bundle.engine("tensorrt"), bundle.manifest["files"]
    engine, weights = files[ENGINES["tensorrt"]]["bytes"], files[WEIGHTS]["bytes"]
    bound = sum(length for _, length in facts["weights"].values())
    worst = max(report.checks, key=lambda check: check.error / check.tolerance)
    record_property(f"engine/{name}/worst_error [relative]", float(worst.error))
    record_property(f"engine/{name}/allowed_error [relative]", float(worst.tolerance))
    record_property(f"engine/{name}/build [s]", facts["build_seconds"])
    record_property(f"engine/{name}/size [share of the weights]", (engine + bound) / weights)
    assert report.passed, report.table()
    if name in LARGE:
        assert engine + bound <= 1.2 * weights


@pytest.mark.parametrize("name", [name for name in TINY if name.endswith("fp32")])
def test_500_greedy_tokens_are_those_of_pytorch(
    opened: Callable[..., Any], built: Any, folder: Path, name: str
) -> None:
    session = opened(name)
    tokens = [token.id for token in session.generate(made.GREEDY_PROMPT, max_tokens=made.GREEDY_TOKENS)]
    assert tokens == np.load(folder / f"{name}.greedy.npy").tolist()


@pytest.mark.parametrize("name", TINY)
def test_bits_per_byte_of_held_out_text(opened: Callable[..., Any], record_property: Record, name: str) -> None:
    """Byte by byte, against what PyTorch got in training.json."""
    recorded = json.loads((ROOT / "samples" / name.rpartition("-")[0] / "training.json").read_text())["held_out"]
    path = Path(sysconfig.get_path("stdlib")) / "json" / "scanner.py"
    session, content = opened(name), path.read_bytes()
    bits = 0.0
    logits = session.step([EOS_ID])[0].astype(np.float64)
    for byte in content:
        bits += (logits.max() + np.log(np.exp(logits - logits.max()).sum()) - logits[byte]) / np.log(2)
        logits = session.step([byte])[0].astype(np.float64)
    difference = bits / len(content) - recorded["modules"]["json/scanner.py"]["bits_per_byte"]
    record_property(f"engine/{name}/bits_per_byte_less_pytorch [bits]", float(difference))
    assert abs(difference) <= (0.001 if name.endswith("fp32") else 0.005)


@pytest.mark.parametrize("name", ["tiny-mamba-fp32", "tiny-mamba2-fp16"])
def test_every_layer_agrees_with_pytorch(built: Any, name: str) -> None:
    from mamba_deploy.bundle import REFERENCE
    from mamba_deploy.exporters.layers import tensorrt_layers
    from mamba_deploy.runtime.verify import Answers, verify_layers

    bundle = built(name)
    answers = Answers.load(bundle.file(REFERENCE))
    found = tensorrt_layers(bundle, answers.prompt(0))
    report = verify_layers("tensorrt", found, answers, bundle.config, bundle.contract)
    assert len(report.checks) == bundle.config.n_layer
    assert report.passed, report.table()


# --- against the CPU session --------------------------------------------------------------------------------------


def close(got: Any, want: Any, what: object, bound: float = 1e-4) -> None:
    error = np.abs(got.astype(np.float64) - want).max() / np.abs(want).max()
    assert error <= bound, f"{what}: {error}"


@pytest.mark.parametrize("name", [name for name in TINY if name.endswith("fp32")])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_prompts_of_many_lengths(opened: Callable[..., Any], name: str, batch: int) -> None:
    gpu, cpu = opened(name), opened(name, "onnxruntime")
    random = np.random.default_rng(batch)
    for length in (1, 2, 63, 64, 65, 511, 512, 513) if batch > 1 else (1, 2, 3, 65, 1000, 4096):
        rows = [random.integers(0, 256, length if b == 0 else random.integers(0, length + 1)) for b in range(batch)]
        used = [b for b, row in enumerate(rows) if len(row)]
        gpu.reset()
        cpu.reset()
        close(gpu.prefill(rows)[used], cpu.prefill(rows)[used], f"{length} tokens")
        step = random.integers(0, 256, batch)
        close(gpu.step(step), cpu.step(step), f"a step after {length} tokens")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TINY if name.endswith("fp32")])
def test_10000_random_operations(opened: Callable[..., Any], tmp_path: Path, name: str) -> None:
    from mamba_deploy.runtime.state import Snapshot

    gpu, cpu = opened(name), opened(name, "onnxruntime")
    random = np.random.default_rng(7)
    snapshots: list[Any] = []
    gpu.prefill([[1], [2], [3]])
    cpu.prefill([[1], [2], [3]])
    for number in range(10_000):
        batch, kind = gpu.batch, random.choice(7, p=[0.7, 0.1, 0.05, 0.05, 0.05, 0.04, 0.01])
        if kind == 0:
            tokens = random.integers(0, 256, batch)
            close(gpu.step(tokens), cpu.step(tokens), number)
        elif kind == 1:
            rows = [random.integers(0, 256, random.integers(0, 40)) for _ in range(batch)]
            used = [b for b, row in enumerate(rows) if len(row)]
            if used:
                close(gpu.prefill(rows)[used], cpu.prefill(rows)[used], number)
        elif kind == 2:
            rows = [b for b in range(batch) if random.random() < 0.5]
            gpu.reset(rows)
            cpu.reset(rows)
        elif kind == 3:
            snapshots = [*snapshots[-3:], (gpu.snapshot(), cpu.snapshot())]
        elif kind == 4 and snapshots:
            ours, theirs = snapshots[random.integers(len(snapshots))]
            if random.random() < 0.5:  # the state of the other backend does as well
                ours, theirs = theirs, theirs
            gpu.restore(ours)
            cpu.restore(theirs)
        elif kind == 5:
            gpu.snapshot().save(tmp_path / "state")
            gpu.restore(Snapshot.load(tmp_path / "state"))
        elif kind == 6:
            gpu.reset()
            cpu.reset()
            rows = [[int(t)] for t in random.integers(0, 256, random.integers(1, 9))]
            close(gpu.prefill(rows), cpu.prefill(rows), number)


# --- graphs, and running ahead ------------------------------------------------------------------------------------


def bits(snapshot: Any) -> list[bytes]:
    return [array.tobytes() for array in snapshot.arrays.values()]


@pytest.mark.parametrize("name", [*TINY, "mamba-130m-fp16"])
def test_graphs_give_what_eager_gives(built: Any, name: str) -> None:
    from mamba_deploy.runtime.engine import TensorRTBackend
    from mamba_deploy.runtime.session import Session

    bundle, found = built(name), []
    for use_graphs in (True, False):
        with Session(TensorRTBackend(bundle, use_graphs=use_graphs), bundle.config) as session:
            logits = [session.prefill([[1, 2, 3] * length, [4]]) for length in (1, 2, 11, 11, 3, 10, 9)]
            logits += [session.step([t, t + 1]) for t in range(50)]
            found.append([*(array.tobytes() for array in logits), *bits(session.snapshot())])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["tiny-mamba-fp16", "tiny-mamba2-fp32"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 4},
        {"stop": ["self", "return"]},
    ],
    ids=str,
)
def test_tokens_chosen_on_the_gpu_are_those_chosen_on_the_host(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    session = opened(name)
    prompts = ["class Node:\n", "def read(path):\n    with open(", "import "]
    found = []
    for ahead in (True, False):
        session.reset()
        if not ahead:
            monkeypatch.setattr(session.backend, "decode_ahead", lambda *a: None)
        tokens = [(t.row, t.id, t.finish_reason) for t in session.generate(prompts, max_tokens=150, **options)]
        found.append((tokens, bits(session.snapshot())))
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]


def test_the_state_is_where_the_tokens_are_at_any_moment(opened: Callable[..., Any]) -> None:
    session = opened("tiny-mamba-fp32")
    tokens = session.generate(["def f(", "class A"], max_tokens=100)
    seen: list[list[int]] = [[], []]
    for _ in range(2 * 45 + 2):
        token = next(tokens)
        seen[token.row].append(token.id)
    midway = bits(session.snapshot())
    tokens.close()
    assert bits(session.snapshot()) == midway
    other = opened("tiny-mamba-fp32")
    other.prefill([other.tokenizer.encode("def f("), other.tokenizer.encode("class A")])
    for pair in zip(*(row[:-1] for row in seen), strict=True):
        other.step(list(pair))
    assert bits(other.snapshot()) == midway


@pytest.mark.slow
@pytest.mark.alone
def test_100000_tokens_in_flat_memory_and_time(opened: Callable[..., Any], record_property: Record) -> None:
    name, count, before = "tiny-mamba2-fp16", 0, 0
    session, prompt, times = opened(name), [[1, 2, 3]], []
    start = time.perf_counter()
    while count < 100_000:  # over the ends of texts
        for token in session.generate(prompt, max_tokens=100_000 - count, temperature=1.0, seed=count):
            count += 1
            assert 0 <= token.id < 257
            if count == 1000:
                before = free_bytes()
            if count % 10_000 == 0:
                times.append(time.perf_counter() - start)
                start = time.perf_counter()
        prompt = [[token.id]]
    assert before == free_bytes()
    record_property(f"engine/{name}/last_10000_tokens_to_first [ratio]", times[-1] / times[1])
    record_property(f"engine/{name}/generate [us a token]", 1e2 * statistics.median(times))


def test_states_of_many_rows_hold_all_tokens(built: Any, tmp_path: Path) -> None:
    """Of so many rows steps write a state once in some tokens; an engine for eight writes each: the same states."""
    from mamba_deploy.exporters.engine_build import build_engine
    from mamba_deploy.runtime.engine import TensorRTBackend
    from mamba_deploy.runtime.session import Session

    few = built("tiny-mamba2-fp16")
    path = shutil.copytree(few.path, tmp_path / "bundle")
    many = build_engine(path, max_batch=64, max_prefill=64, say=print)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 256, length).tolist() for length in draw.integers(1, 40, 64)]
    tokens = draw.integers(0, 256, (14, 64))
    with Session(TensorRTBackend(many), many.config) as session, Session(TensorRTBackend(few), few.config) as other:
        logits = [session.prefill(prompts), *(session.step(t) for t in tokens[:9])]
        marks = np.empty((64, session._state.row_bytes["pending"] // 4), np.int32)  # type: ignore[union-attr]
        with session.backend.device as device:  # type: ignore[attr-defined]
            device.download(marks, session._state.addresses["pending"])  # type: ignore[union-attr]
            device.synchronize()
        if int(device.architecture) >= 90:
            assert (marks[:, 0] >> 16).any(), "nothing was pending"
        saved = session.snapshot()
        found = [session.step(t).tobytes() for t in tokens[9:]]
        session.restore(saved)
        assert [session.step(t).tobytes() for t in tokens[9:]] == found
        for first in range(0, 64, 8):
            rows = slice(first, first + 8)
            other.reset()
            wanted = [other.prefill(prompts[rows]), *(other.step(t[rows]) for t in tokens[:9])]
            for got, want in zip(logits, wanted, strict=True):
                close(got[rows], want, f"logits of rows from {first}", 2e-2)
            for name, want in other.snapshot().arrays.items():
                close(saved.arrays[name][rows], want, name, 2e-2)


# --- life ---------------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_opening_and_closing_100_times_leaks_no_memory(built: Any) -> None:
    from mamba_deploy import Session

    path, free = built("tiny-mamba-fp16").path, []
    for _ in range(100):
        with Session.open(path, "tensorrt") as session:
            session.prefill([[1, 2, 3]])
            session.step([4])
        free.append(free_bytes())
    assert min(free[50:]) >= min(free[1:50])


def test_two_sessions_side_by_side(opened: Callable[..., Any]) -> None:
    a, b, alone = (opened("tiny-mamba-fp16") for _ in range(3))
    want = [alone.prefill([[1, 2, 3]]), *(alone.step([t]) for t in range(5))]
    got = [a.prefill([[1, 2, 3]])]
    b.prefill([[9, 8], [7]])
    for t in range(5):
        got.append(a.step([t]))
        b.step([t, t])
    assert [x.tobytes() for x in got] == [x.tobytes() for x in want]


def test_logits_are_the_callers_own(built: Any) -> None:
    """However many are kept, and after the session too, whose memory they came to."""
    from mamba_deploy import Session

    with Session.open(built("tiny-mamba-fp16").path, "tensorrt") as session:
        kept = [session.prefill([[1, 2, 3], [4]]), *(session.step([t, t]) for t in range(6))]
        first = [logits.tobytes() for logits in kept]
        alone = session.step([7, 7])[1]
        want = alone.tobytes()
    assert [logits.tobytes() for logits in kept] == first
    assert alone.tobytes() == want
    assert len(set(first)) == 7


def test_another_thread_is_told_so(opened: Callable[..., Any]) -> None:
    session, said = opened("tiny-mamba-fp16"), []

    def use() -> None:
        try:
            session.prefill([[1]])
        except Exception as error:
            said.append(str(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert said == ["the session was opened in another thread, and belongs to it"]
    assert session.prefill([[1]]).shape == (1, 257)


@pytest.mark.alone
def test_too_little_memory_is_an_error_and_is_given_back(built: Any) -> None:
    from mamba_deploy import Session
    from mamba_deploy.errors import EngineError

    path = built("mamba-130m-fp16").path
    with Session.open(path, "tensorrt") as session:  # what is loaded once a process is loaded
        want = session.prefill([[1, 2]])
    context = cuda.Device(0).retain_primary_context()
    context.push()
    try:
        hog = cuda.mem_alloc(cuda.mem_get_info()[0] - (128 << 20))
        before = cuda.mem_get_info()[0]
        with pytest.raises(EngineError, match=r"memory|does not load|no execution context"):
            Session.open(path, "tensorrt")
        after = cuda.mem_get_info()[0]
        hog.free()
    finally:
        context.pop()
        context.detach()
    assert after >= before - (16 << 20)
    with Session.open(path, "tensorrt") as session:
        assert session.prefill([[1, 2]]).tobytes() == want.tobytes()


PROGRAM = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "transformers", "onnx_ir", "onnxscript"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
import tensorrt, pycuda.driver as cuda
cuda.init()
context = cuda.Device(0).retain_primary_context()
context.push(); cuda.mem_alloc(1 << 20).free(); context.pop()
tensorrt.Runtime(tensorrt.Logger())
before = peak()
from mamba_deploy import Session
with Session.open(sys.argv[1], "tensorrt") as session:
    opened = peak()
    tokens = [token.id for token in session.generate([[1, 2, 3]], max_tokens=5)]
print(len(tokens), opened - before)
"""


@pytest.mark.alone
def test_no_torch_in_the_process_and_little_host_memory(built: Any, record_property: Record) -> None:
    from mamba_deploy.bundle import WEIGHTS

    bundle = built("mamba-130m-fp16")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, str(bundle.path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    count, grown = (int(word) for word in done.stdout.split()[-2:])
    weights = bundle.manifest["files"][WEIGHTS]["bytes"]
    record_property("engine/mamba-130m-fp16/host_memory_at_opening [share of the weights]", grown / weights)
    assert count == 5
    assert grown < 1.3 * weights


@pytest.mark.alone
def test_a_build_from_the_timing_cache(
    built: Any, opened: Callable[..., Any], record_property: Record, tmp_path: Path
) -> None:
    from mamba_deploy import Session
    from mamba_deploy.exporters.engine_build import build_engine

    name = "mamba-130m-fp16"
    first = opened(name)  # so that its timings are there
    again = build_engine(shutil.copytree(built(name).path, tmp_path / name), say=print)
    record_property(f"engine/{name}/build_from_cache [s]", again.engine("tensorrt")["build_seconds"])
    with Session.open(again.path, "tensorrt") as session:
        close(session.prefill([[1, 2, 3]]), first.prefill([[1, 2, 3]]), "the same engine", 1e-2)


@pytest.mark.alone
@pytest.mark.parametrize("name", LARGE)
def test_memory_on_the_gpu(built: Any, record_property: Record, name: str) -> None:
    """What a session takes there, over what the weights do, one row."""
    from mamba_deploy import Session
    from mamba_deploy.bundle import WEIGHTS

    bundle = built(name)
    with Session.open(built("tiny-mamba-fp16").path, "tensorrt") as session:
        session.prefill([[1, 2]])
    before = free_bytes()
    with Session.open(bundle.path, "tensorrt") as session:
        session.prefill([[1, 2, 3]])
        session.step([1])
        taken = before - free_bytes()
        for what, nbytes in session.backend.memory.items():
            if nbytes > 1e6:
                record_property(f"engine/{name}/gpu_memory, {what} [MB]", nbytes / 1e6)
    record_property(
        f"engine/{name}/gpu_memory [share of the weights]", taken / bundle.manifest["files"][WEIGHTS]["bytes"]
    )
