"""`mamba-deploy build` with TensorRT-RTX from PyPI, which builds without a GPU: what lands in the bundle, and what does
not when a build fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

from mamba_deploy.bundle import ENGINES, LOWERED, MANIFEST, PORTABLE, WEIGHTS, Bundle, sha256
from mamba_deploy.cli import main
from mamba_deploy.errors import BundleError, EngineError, InputError, MambaDeployError, MissingDependencyError
from mamba_deploy.exporters import engine_build
from mamba_deploy.exporters.engine_build import build_engine
from mamba_deploy.exporters.export import export
from mamba_deploy.plugins.build import PRODUCTS, sources_hash
from mamba_deploy.runtime.trt import rtx_folder

Bundles = Callable[..., Any]  # the factory of conftest.py
RTX = "tensorrt-rtx"
ENGINE = ENGINES[RTX]
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}

HAS_RTX = find_spec("tensorrt_rtx_bindings") is not None and rtx_folder() is not None
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="no TensorRT-RTX here: pip install 'mamba-deploy[rtx]'")
without_tensorrt = pytest.mark.skipif(find_spec("tensorrt") is not None, reason="tensorrt is installed here")


@pytest.fixture
def out(bundle: Bundles, tmp_path: Path) -> Path:
    """A bundle that may be changed."""
    return Path(shutil.copytree(bundle("mamba").path, tmp_path / "out"))


def contents(path: Path) -> dict[str, str]:
    """Hashes of all files of a directory, hidden ones and those in folders too."""
    return {str(p.relative_to(path)): "" if p.is_dir() else sha256(p) for p in path.rglob("*")}


def command(*arguments: Any) -> Result:
    done = CliRunner().invoke(main, ["build", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def assert_refused(path: Path, kind: type[MambaDeployError], text: str, hint: str, **options: Any) -> MambaDeployError:
    """The build fails in these words, and the bundle stays bit for bit as it was."""
    before = contents(path)
    with pytest.raises(kind, match=text) as caught:
        build_engine(path, **{"backend": RTX, **options})
    assert hint in caught.value.hint
    assert contents(path) == before
    return caught.value


# --- what is built ------------------------------------------------------------------------------------------------


@needs_rtx
def test_an_engine_lands_in_the_bundle_and_nothing_else_changes(out: Path) -> None:
    before, said = contents(out), list[str]()
    bundle = build_engine(
        out, backend=RTX, max_batch=3, max_prefill=100, prefill_batch=2, plugins="python", say=said.append
    )
    after = contents(out)
    assert set(after) - set(before) == {ENGINE}
    assert {name for name in before if after[name] != before[name]} == {MANIFEST}
    assert bundle.manifest == json.loads((out / MANIFEST).read_text())
    assert bundle.file(ENGINE) == out / ENGINE
    assert bundle.manifest["files"][ENGINE] == {"bytes": (out / ENGINE).stat().st_size, "sha256": after[ENGINE]}
    facts = dict(bundle.engine(RTX))
    assert facts.pop("build_seconds") > 0
    assert facts.pop("layers") > 20
    v3 = next(p for p in PRODUCTS if p.name == "plugin" and p.interface == "v3")
    assert facts.pop("version").startswith("1.")
    assert facts.pop("platform").startswith("linux-")
    assert facts == {
        "product": "TensorRT-RTX",
        "plugins": "python",
        "plugin_sources": sources_hash(v3)[:16],
        "architecture": None,
        "compute_capabilities": [],
        "onnx_sha256": before[PORTABLE],
        "weights_sha256": before[WEIGHTS],
        "max_batch": 3,
        "max_prefill": 100,
        "prefill_batch": 2,
        "weights": {},
        "fused": False,  # its sizes are not those that the operator covers
        "pending": 0,
    }
    assert said == []


@needs_rtx
def test_a_second_build_replaces_the_first(out: Path) -> None:
    build_engine(out, backend=RTX, max_batch=2)
    os.chmod(out / ENGINE, 0o600)
    again = build_engine(out, backend=RTX, max_batch=5)
    assert again.engine(RTX)["max_batch"] == 5
    assert again.file(ENGINE)
    assert list(again.manifest["engines"]) == [RTX]
    assert {p.name for p in out.iterdir()} == {MANIFEST, *again.manifest["files"]}


@needs_rtx
def test_exporting_again_removes_the_engine(bundle: Bundles, out: Path) -> None:
    build_engine(out, backend=RTX)
    again = export(bundle("mamba").checkpoint, out, force=True)
    assert not (out / ENGINE).exists()
    assert "engines" not in again.manifest
    assert ENGINE not in again.manifest["files"]
    with pytest.raises(BundleError, match=f"has no engine for {RTX}") as caught:
        again.engine(RTX)
    assert caught.value.hint == f"mamba-deploy build {out} --backend {RTX}"


@needs_rtx
def test_a_prompt_call_has_no_more_rows_than_a_step(out: Path) -> None:
    assert build_engine(out, backend=RTX, max_batch=2, prefill_batch=4).engine(RTX)["prefill_batch"] == 2


@needs_rtx
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mamba-one-layer", {"opset": 23}),
        ("mamba2-one-layer", {"opset": 23}),
        ("mamba", {"all_logits": True}),
        ("mamba2", {"all_logits": True}),
        ("mamba", {"dtype": "bfloat16"}),
        ("mamba2", {"dtype": "bfloat16", "state_dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_other_exports(bundle: Bundles, tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    path = Path(shutil.copytree(bundle(kind, **options).path, tmp_path / "out"))
    assert build_engine(path, backend=RTX).file(ENGINE)


@needs_rtx
def test_a_relative_path_and_modules_that_lie_in_the_way(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out.parent)
    if sys.version_info >= (3, 11):
        Path("onnx.py").write_text("raise RuntimeError('the wrong module')")
    assert build_engine(out.name, backend=RTX).engine(RTX)
    assert Bundle.open(out).file(ENGINE)


@needs_rtx
def test_output_of_the_command(out: Path) -> None:
    script = Path(sys.executable).with_name("mamba-deploy")
    run = {"capture_output": True, "text": True, "check": True, "timeout": 100}
    flags = ["--backend", RTX, "--max-batch", "4", "--max-prefill", "64", "--prefill-batch", "2"]
    done = subprocess.run([script, "build", out, *flags, "--json"], **run)
    assert done.stdout.count("\n") == 1
    facts = json.loads(done.stdout)
    manifest = json.loads((out / MANIFEST).read_text())
    assert facts == {
        "path": str(out / ENGINE),
        "bytes": (out / ENGINE).stat().st_size,
        "engine": manifest["engines"][RTX],
    }
    limits = {name: facts["engine"][name] for name in ("max_batch", "max_prefill", "prefill_batch")}
    assert limits == {"max_batch": 4, "max_prefill": 64, "prefill_batch": 2}
    text = command(out, "--backend", RTX, "--plugins", "python")
    assert text.stderr == ""
    engine = Bundle.open(out).engine(RTX)
    size = (out / ENGINE).stat().st_size / 1e6
    label = f"TensorRT-RTX {engine['version']}"
    assert text.stdout == f"{out / ENGINE}: {label}, {size:.1f} MB, built in {engine['build_seconds']} s\n"


@needs_rtx
@without_tensorrt
def test_the_installed_backend_is_the_default(out: Path) -> None:
    assert json.loads(command(out, "--json").stdout)["path"] == str(out / ENGINE)


@needs_rtx
def test_compute_capabilities(out: Path) -> None:
    names = ["8.6", "89", "sm_120", "86"]
    done = command(
        out, "--backend", RTX, "--json", *(word for name in names for word in ("--compute-capability", name))
    )
    assert json.loads(done.stdout)["engine"]["compute_capabilities"] == ["86", "89", "120"]


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["tiny-mamba", "tiny-mamba2"])
def test_bundled_samples(bundle: Bundles, model: str, dtype: str, tmp_path: Path) -> None:
    out = Path(shutil.copytree(bundle(model, dtype=dtype).path, tmp_path / "out"))
    done = command(out, "--backend", RTX, "--json")
    assert done.exit_code == 0, done.stderr
    built = Bundle.open(out)
    facts = built.engine(RTX)
    assert json.loads(done.stdout)["engine"] == facts
    assert facts["fused"]
    assert facts["onnx_sha256"] == sha256(out / PORTABLE)
    assert sum(length for _, length in facts["weights"].values()) > 0.95 * built.manifest["files"][WEIGHTS]["bytes"]


@needs_rtx
@pytest.mark.slow
def test_an_engine_of_the_graphs_own_operators_on_demand(bundle: Bundles, tmp_path: Path) -> None:
    out = Path(shutil.copytree(bundle("tiny-mamba2").path, tmp_path / "out"))
    facts = json.loads(command(out, "--backend", RTX, "--no-fuse", "--json").stdout)["engine"]
    assert (facts["fused"], facts["weights"]) == (False, {})
    assert (out / ENGINE).stat().st_size > (out / WEIGHTS).stat().st_size


@needs_rtx
@pytest.mark.slow
def test_an_engine_is_little_larger_than_its_weights(tmp_path: Path) -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=50280, hidden_size=512, num_hidden_layers=2, tie_word_embeddings=True)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    bundle = build_engine(export(tmp_path / "checkpoint", tmp_path / "out", dtype="float16").path, backend=RTX)
    weights = bundle.manifest["files"][WEIGHTS]["bytes"]
    assert weights > 50e6
    bound = sum(length for _, length in bundle.engine(RTX)["weights"].values())
    assert weights < bundle.manifest["files"][ENGINE]["bytes"] + bound <= 1.2 * weights


# --- what fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "text", "hint"),
    [
        ({"max_batch": 0}, InputError, "max_batch is 0: expected 1 to 65536", ""),
        ({"max_batch": 10**11}, InputError, "max_batch is 100000000000: expected 1 to 65536", ""),
        ({"max_prefill": 2**20 + 1}, InputError, "max_prefill is 1048577: expected 1 to 1048576", ""),
        ({"prefill_batch": -1}, InputError, "prefill_batch is -1: expected 1 to ", ""),
        (
            {"max_batch": 64, "prefill_batch": 64, "max_prefill": 2**18},
            InputError, "64 rows of 262144 tokens is too large", "--max-prefill"
        ),
        ({"backend": "onnx"}, EngineError, "there is no backend 'onnx'", "tensorrt-rtx"),
        ({"compute_capabilities": ["8x"]}, InputError, "compute capability is '8x'", ""),
        (
            {"backend": "tensorrt", "compute_capabilities": ["86"]},
            InputError, "for tensorrt-rtx alone", "for the GPU it runs on"
        ),
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range(
    out: Path, options: dict[str, Any], kind: type[MambaDeployError], text: str, hint: str
) -> None:
    assert_refused(out, kind, text, hint, **options)


@needs_rtx
def test_a_compute_capability_that_is_not_known(out: Path) -> None:
    text = "TensorRT-RTX .* does not build for compute capability 71"
    error = assert_refused(out, EngineError, text, "choose from: ", compute_capabilities=["86", "7.1"])
    assert {"86", "89", "120"} <= set(error.hint.removeprefix("choose from: ").split(", "))


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no directory"):
        build_engine(tmp_path / "out", backend=RTX)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [PORTABLE, WEIGHTS])
def test_a_damaged_file(out: Path, name: str) -> None:
    content = bytearray((out / name).read_bytes())
    content[len(content) // 2] ^= 1
    (out / name).write_bytes(content)
    assert_refused(out, BundleError, f"{name} is not the file that was exported", "export the model again")


@without_tensorrt
def test_without_tensorrt(out: Path) -> None:
    text = "the Python package 'tensorrt' is needed to build or run engines"
    assert_refused(out, MissingDependencyError, text, "pip install 'mamba-deploy[tensorrt]'", backend="tensorrt")
    done = command(out, "--backend", "tensorrt")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {text}")
    assert done.stderr.endswith("hint: pip install 'mamba-deploy[tensorrt]'\n")


@pytest.mark.parametrize(
    ("source", "kind", "text", "hint"),
    [
        (
            "raise ModuleNotFoundError('x', name='tensorrt_rtx_bindings')",
            MissingDependencyError, "'tensorrt_rtx_bindings' is needed to", "pip install 'mamba-deploy[rtx]'",
        ),
        (
            "raise ImportError('libtensorrt_rtx.so.1: cannot open shared object file')",
            EngineError, "TensorRT-RTX is installed but does not load: libtensorrt_rtx.so.1", "LD_LIBRARY_PATH",
        ),
    ],
    ids=["missing", "broken"],
)  # fmt: skip
def test_tensorrt_rtx_that_does_not_import(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    source: str, kind: type[MambaDeployError], text: str, hint: str,
) -> None:  # fmt: skip
    """Shadowed on the path, which the building process is given."""
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "tensorrt_rtx_bindings.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "shadow"))
    assert_refused(out, kind, text, hint)


def rewrite(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a bundle's graph, and the manifest with it."""
    model = onnx.load(path / PORTABLE, load_external_data=False)
    change(model)
    (path / PORTABLE).write_bytes(model.SerializeToString())
    manifest = json.loads((path / MANIFEST).read_text())
    content = (path / PORTABLE).read_bytes()
    manifest["files"][PORTABLE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest))


def _gelu(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "activation":
                attribute.s = b"gelu"


def _unknown(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Sqrt").op_type = "NoSuchOperator"


@needs_rtx
@pytest.mark.parametrize(
    ("change", "text"),
    [(_gelu, "expected 'silu' or 'none'"), (_unknown, "NoSuchOperator")],
    ids=["attribute", "operator"],
)
def test_a_graph_that_the_parser_refuses(out: Path, change: Callable[[onnx.ModelProto], None], text: str) -> None:
    rewrite(out, change)
    said: list[str] = []
    error = assert_refused(
        out, EngineError, f"TensorRT-RTX .* does not take {out / PORTABLE}", "export", say=said.append
    )
    assert text in str(error) + "\n".join(said)  # errors of plugins in Python go past TensorRT's log


def stand_in(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a shell script run in place of Python; ``$4`` is the request, ``$PYTHON`` the real one."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nPYTHON='{sys.executable}'\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


@pytest.mark.parametrize(
    ("script", "text", "hint"),
    [
        (
            "echo 'last words' >&2; kill -SEGV $$",
            "died, of signal SIGSEGV; it last said: last words",
            "--plugins python",
        ),
        ("kill -KILL $$", "died, of signal SIGKILL$", "want of memory"),
        ("echo out; exit 7", "died, with exit code 7$", "TensorRT or in a plugin"),
    ],
    ids=["fault", "killed", "exit code"],
)
def test_the_process_dies(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, text: str, hint: str
) -> None:
    stand_in(tmp_path, script, monkeypatch)
    error = assert_refused(out, EngineError, text, hint)
    assert str(out) in str(error)


@needs_rtx
def test_the_engine_cannot_be_written(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, 'mkdir "$(dirname "$3")/engine"; exec "$PYTHON" "$@"', monkeypatch)
    assert_refused(out, BundleError, "the engine cannot be written: .*Is a directory", "free space")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupted_while_it_runs(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """SIGTERM comes as SystemExit."""
    stand_in(tmp_path, f"echo $$ > {tmp_path}/pid; echo started >&2; exec sleep 60", monkeypatch)
    before = contents(out)

    def interrupt(message: str) -> None:
        assert message == "started"
        assert any(p.name.endswith(".partial") for p in out.iterdir())
        raise error

    with pytest.raises(error):
        build_engine(out, backend=RTX, say=interrupt)
    assert contents(out) == before
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_is_ended_by_a_signal(out: Path, number: int, code: int, tmp_path: Path) -> None:
    stand_in_path = tmp_path / "python"
    stand_in_path.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid; echo started >&2; exec sleep 60\n")
    stand_in_path.chmod(0o755)
    program = "import sys\nsys.executable = sys.argv.pop(1)\nfrom mamba_deploy.cli import main\nmain()"
    before = contents(out)
    words = [sys.executable, "-c", program, stand_in_path, "build", out, "--backend", RTX]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "started\n"
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (code, "")
    assert contents(out) == before
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_directory_that_cannot_be_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:  # root may write anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(engine_build.tempfile, "TemporaryDirectory", refuse)
    assert_refused(out, BundleError, f"{out} cannot be written: .*Permission denied", "permissions")


@needs_rtx
def test_a_bundle_that_is_changed_meanwhile(out: Path) -> None:
    changed = json.loads((out / MANIFEST).read_text())
    changed["tools"]["torch"] = "another"
    before = contents(out)

    def change(message: str) -> None:
        (out / MANIFEST).write_text(json.dumps(changed))

    with pytest.raises(BundleError, match=f"{out} was changed during the build") as caught:
        build_engine(out, backend=RTX, say=change)  # it says that the plugins are in Python, or the like
    assert caught.value.hint == "build again"
    after = contents(out)
    assert set(after) == set(before)
    assert {name for name in before if after[name] != before[name]} == {MANIFEST}
    assert json.loads((out / MANIFEST).read_text()) == changed


@needs_rtx
def test_a_build_that_fails_keeps_the_engine_before(out: Path) -> None:
    build_engine(out, backend=RTX)
    assert_refused(out, EngineError, "compute capability 71", "choose from", compute_capabilities=["71"])
    assert Bundle.open(out).file(ENGINE)
    assert Bundle.open(out).has(LOWERED)
