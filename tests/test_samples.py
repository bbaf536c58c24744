"""The numbered samples, each run as the documents say, as a process of its own."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mamba_deploy import Session

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "samples"
EXPORT, BATCH, STATE = (path.name for path in sorted(SAMPLES.glob("0[123]_*.py")))
PROMPT = "import os\n\n\ndef main("  # of the first sample
REPLY = re.compile(r"row (\d+): ('.*'|\".*\") -> ('.*'|\".*\")")
PIECE = re.compile(r"(\d+) ('(?:\\.|[^'\\])*'|\"[^\"]*\")")


def run(sample: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a sample from the repository's root."""
    done = subprocess.run(
        [sys.executable, f"samples/{sample}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, f"{sample} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def skip_without_tensorrt() -> None:
    """The first sample exports and builds, and the state goes to and from the CPU: one Python needs all of these."""
    for module in ("tensorrt", "cuda.bindings.driver", "torch", "onnx", "onnxruntime"):
        pytest.importorskip(module, reason=f"needs {module}")
    cuda = pytest.importorskip("pycuda.driver", reason="needs pycuda")
    try:
        cuda.init()
        cuda.Device(0)
    except cuda.Error as error:
        pytest.skip(f"needs a CUDA device: {error}")


def on_gpu(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.gpu)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, str]]:
    """``exported(name, backend)``: the bundle that the first sample wrote, and what it printed."""
    made: dict[tuple[str, str], tuple[Path, str]] = {}

    def of(name: str, backend: str) -> tuple[Path, str]:
        if backend == "tensorrt":
            skip_without_tensorrt()
        if (name, backend) not in made:
            out = tmp_path_factory.mktemp(backend) / name
            done = run(EXPORT, "--checkpoint", f"samples/{name}", "--out", out, "--backend", backend)
            assert "DIFFERS" not in done.stderr
            made[name, backend] = out, done.stdout
        return made[name, backend]

    return of


@pytest.fixture(scope="module")
def bundle_of(exported: Any, bundle: Callable[..., Any]) -> Callable[[str, str], Path]:
    """``bundle_of(name, backend)``: what the other samples are given, of the first sample where that runs it."""

    def of(name: str, backend: str) -> Path:
        sample_runs_it = name == "tiny-mamba" or backend == "tensorrt"
        return exported(name, backend)[0] if sample_runs_it else bundle(name).path

    return of


@pytest.fixture
def opened() -> Iterator[Callable[..., Session]]:
    """``opened(path, backend)``: a session, closed after the test."""
    sessions: list[Session] = []

    def of(path: Path, backend: str) -> Session:
        sessions.append(Session.open(path, backend))
        return sessions[-1]

    yield of
    for session in sessions:
        session.close()


def text_of(session: Session, prompt: str, **options: Any) -> str:
    session.reset()
    return "".join(map(str, session.generate(prompt, **options)))


# The first sample does with one checkpoint what it does with the other: on a CPU, where the second's export takes ten
# seconds and is run by test_bundled_checkpoints.py, only with its default.
@pytest.mark.parametrize(
    ("name", "backend"),
    [("tiny-mamba", "onnxruntime"), on_gpu("tiny-mamba", "tensorrt"), on_gpu("tiny-mamba2", "tensorrt")],
)
def test_export_build_generate_prints_what_a_session_generates(
    exported: Any, opened: Callable[..., Session], name: str, backend: str
) -> None:
    path, printed = exported(name, backend)
    text = text_of(opened(path, backend), PROMPT, max_tokens=200, temperature=0.7, top_p=0.95, seed=3)
    assert printed == f"{PROMPT}{text}\n"


@pytest.mark.parametrize(
    ("name", "backend", "rows"),
    [
        ("tiny-mamba", "onnxruntime", 1),
        ("tiny-mamba", "onnxruntime", 8),
        ("tiny-mamba2", "onnxruntime", 3),
        *(on_gpu(name, "tensorrt", rows) for name in ("tiny-mamba", "tiny-mamba2") for rows in (1, 3, 8)),
    ],
)
def test_stream_batch_gives_each_prompt_what_it_gets_alone(
    bundle_of: Any, opened: Callable[..., Session], name: str, backend: str, rows: int
) -> None:
    path = bundle_of(name, backend)
    lines = run(BATCH, "--bundle", path, "--backend", backend, "--rows", rows, "-n", 30).stdout.splitlines()
    session = opened(path, backend)
    streamed: dict[int, str] = {}  # by row, what came since its last reply
    replies: dict[str, str] = {}
    together, ended_first, restarted = False, False, set()
    for line in lines:
        if (reply := REPLY.fullmatch(line)) is not None:
            row, prompt, text = int(reply[1]), ast.literal_eval(reply[2]), ast.literal_eval(reply[3])
            assert streamed.pop(row).partition("\n")[0] == text
            assert prompt not in replies
            replies[prompt] = text
            ended_first |= any(streamed.values())
        else:
            pieces = [(int(row), ast.literal_eval(piece)) for row, piece in PIECE.findall(line)]
            assert pieces, line
            together |= len(pieces) > 1
            restarted |= {row for row, _ in pieces if replies and row not in streamed}
            for row, piece in pieces:
                streamed[row] = streamed.get(row, "") + piece
    assert not streamed
    assert len(replies) == 5
    assert together == ended_first == (rows > 1)
    assert bool(restarted) == (rows < 5)
    for prompt, text in replies.items():
        assert text == text_of(session, prompt, max_tokens=30, stop=["\n"]), prompt


@pytest.mark.parametrize(
    ("name", "saver", "resumer"),
    [
        ("tiny-mamba", "onnxruntime", "torch"),
        ("tiny-mamba2", "torch", "onnxruntime"),
        on_gpu("tiny-mamba", "tensorrt", "onnxruntime"),
        on_gpu("tiny-mamba", "torch", "tensorrt"),
        on_gpu("tiny-mamba2", "tensorrt", "onnxruntime"),
        on_gpu("tiny-mamba2", "torch", "tensorrt"),
    ],
)
def test_resumed_text_is_that_without_a_break(
    bundle_of: Any, opened: Callable[..., Session], tmp_path: Path, name: str, saver: str, resumer: str
) -> None:
    path = bundle_of(name, "tensorrt" if "tensorrt" in (saver, resumer) else "onnxruntime")
    source = SAMPLES / STATE
    state = tmp_path / "state.safetensors"
    run(STATE, "save", state, "--bundle", path, "--backend", saver)
    whole = text_of(opened(path, "onnxruntime"), source.read_text(encoding="utf-8") + "def load(", max_tokens=100)
    assert whole
    assert run(STATE, "resume", state, "--bundle", path, "--backend", resumer).stdout == f"def load({whole}\n"


def test_state_remembers_the_text_that_was_read(bundle_of: Any, tmp_path: Path) -> None:
    path = bundle_of("tiny-mamba", "onnxruntime")
    state, source, prompt = tmp_path / "state", tmp_path / "source.py", "    x = "
    found = []
    for text in ("import zlib\n\n\ndef decompress(data):\n", "class Mailbox:\n    def lock(self):\n"):
        source.write_text(text, encoding="utf-8")
        run(STATE, "save", state, "--bundle", path, "--text", source)
        found.append(run(STATE, "resume", state, "--bundle", path, "-p", prompt, "-n", 40).stdout)
    assert found[0] != found[1]
    assert all(text.startswith(prompt) for text in found)
