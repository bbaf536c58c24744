"""Sessions by ONNX Runtime's CUDA provider: against PyTorch's stored answers, and against the same session on the CPU.

Needs onnxruntime-gpu and the libraries of CUDA and cuDNN: PyTorch, where it is installed, brings them. The bundles come
from tests/gpu/bundles.py, else from MAMBA_DEPLOY_TEST_BUNDLES.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu import bundles as made
from numpy.typing import NDArray

if find_spec("torch") is not None:
    import torch  # noqa: F401  before ONNX Runtime, which then finds the libraries loaded
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime-gpu")
CUDA = "CUDAExecutionProvider"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        CUDA not in onnxruntime.get_available_providers(),
        reason=f"needs onnxruntime-gpu: this ONNX Runtime has {', '.join(onnxruntime.get_available_providers())}",
    ),
]

TINY = [name for name in made.MODELS if name.startswith("tiny")]
PROMPTS = [b"def read(path):\n    with open(", b"x", b"class Node:\n    def __init__(self"]
ROWS = [list(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("MAMBA_DEPLOY_TEST_BUNDLES")
    return Path(given) if given else tmp_path_factory.mktemp("bundles")


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[..., Any]]:
    """``opened(name, provider)``: a session, closed after the test. A GPU that cannot be used fails the test."""
    from mamba_deploy import Session

    sessions: list[Any] = []

    def of(name: str, provider: str = "cuda", **options: Any) -> Any:
        if not (folder / name).exists():
            if find_spec("torch") is None:
                pytest.skip(f"no {name} in MAMBA_DEPLOY_TEST_BUNDLES, and no PyTorch to make it")
            made.make(folder, name)
        sessions.append(Session.open(folder / name, provider=provider, **options))
        return sessions[-1]

    yield of
    for session in sessions:
        session.close()


def assert_close(found: NDArray, expected: NDArray, session: Any) -> None:
    """Row by row, relative to the largest logit: each side may be off by what rounding explains."""
    from mamba_deploy.runtime.verify import tolerance

    assert found.shape == expected.shape
    bound = 2 * tolerance(session.config, session.contract)
    for row, (got, want) in enumerate(zip(found, expected, strict=True)):
        error = float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())
        assert error <= bound, f"row {row} is off by {error:.1e}, allowed {bound:.1e}"


def bits(snapshot: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in snapshot.arrays.items()}


@pytest.mark.parametrize("graph", ["lowered", "portable"])
@pytest.mark.parametrize("name", TINY)
def test_verify_passes(
    opened: Callable[..., Any], folder: Path, name: str, graph: str, record_property: Callable[[str, object], None]
) -> None:
    from mamba_deploy.bundle import REFERENCE
    from mamba_deploy.runtime.verify import Answers, verify

    session = opened(name, graph=graph)
    assert "(cuda, " in session.backend.name
    report = verify(session, Answers.load(folder / name / REFERENCE))
    print(report.table())
    worst = max(check.error / check.tolerance for check in report.checks)
    record_property(f"{name}, ONNX Runtime by CUDA, {graph} graph: largest error [of what is allowed]", f"{worst:.3g}")
    assert report.passed, report.table()


@pytest.mark.parametrize("name", TINY)
def test_prompts_and_steps_are_those_of_the_cpu(opened: Callable[..., Any], name: str) -> None:
    """Also past the end of a chunk, with rows that wait, and with rows that start over."""
    gpu, cpu = opened(name, max_chunk=16), opened(name, "cpu")
    assert_close(gpu.prefill(ROWS), cpu.prefill(ROWS), gpu)
    for t in range(40):
        tokens = [(97 + 5 * t + b) % 256 for b in range(len(ROWS))]
        assert_close(gpu.step(tokens), cpu.step(tokens), gpu)
    rows = [[1, 2, 3], [], [4]]
    assert_close(gpu.prefill(rows)[[0, 2]], cpu.prefill(rows)[[0, 2]], gpu)
    for session in (gpu, cpu):
        session.reset(rows=[1])
    assert_close(gpu.step([5, 6, 7]), cpu.step([5, 6, 7]), gpu)


@pytest.mark.parametrize("name", TINY)
def test_a_saved_state_goes_on_there_and_back(opened: Callable[..., Any], name: str, tmp_path: Path) -> None:
    from mamba_deploy.runtime.state import Snapshot

    gpu, cpu = opened(name), opened(name, "cpu")
    for first, second in ((cpu, gpu), (gpu, cpu)):
        first.reset()
        second.reset()
        first.prefill(ROWS)
        first.snapshot().save(tmp_path / "state")
        second.restore(Snapshot.load(tmp_path / "state"))
        assert bits(second.snapshot()) == bits(first.snapshot())
        for tokens in ([9, 10, 11], [12, 13, 14]):
            assert_close(second.step(tokens), first.step(tokens), gpu)


@pytest.mark.parametrize("name", TINY)
def test_rows_and_failures_leave_the_state_alone(
    opened: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mamba_deploy.errors import EngineError

    session = opened(name)
    session.prefill(ROWS)
    before = session.snapshot()
    real = session.backend._session

    class Breaking:
        def run_with_iobinding(self, binding: Any) -> None:
            real.run_with_iobinding(binding)
            raise RuntimeError("after the worst moment")

        def __getattr__(self, attribute: str) -> Any:
            return getattr(real, attribute)

    with monkeypatch.context() as patch:
        patch.setattr(session.backend, "_session", Breaking())
        for rows in ([[1], [2], [3]], [[1, 2], [], [3]]):
            with pytest.raises(EngineError, match="after the worst moment"):
                session.prefill(rows)
            assert bits(session.snapshot()) == bits(before)
    session.prefill([[1], [], [2, 3]])
    session.reset(rows=[0])
    after = session.snapshot()
    for array, old in zip(after.arrays.values(), before.arrays.values(), strict=True):
        assert array[1].tobytes() == old[1].tobytes()
        assert not array[0].any()
    session.restore(before)
    assert bits(session.snapshot()) == bits(before)


@pytest.mark.parametrize("name", [name for name in TINY if name.endswith("fp32")])
def test_greedy_text_is_that_of_the_cpu(opened: Callable[..., Any], name: str) -> None:
    texts = []
    for provider in ("cuda", "cpu"):
        session = opened(name, provider)
        texts.append("".join(map(str, session.generate(made.GREEDY_PROMPT, max_tokens=100))))
    assert texts[0] == texts[1]
