"""The command: results on stdout, everything else on stderr, exit codes, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import click
import onnx
import onnxruntime
import pytest
import safetensors.torch
import tokenizers
import torch
from click.testing import CliRunner, Result
from tokenizers import decoders, models, pre_tokenizers

import mamba_deploy.bundle
import mamba_deploy.inspection
import mamba_deploy.runtime.bench
import mamba_deploy.runtime.verify
from mamba_deploy.bundle import LOWERED, MANIFEST, PORTABLE, REFERENCE, TOKENIZER, WEIGHTS, Bundle
from mamba_deploy.cli import main
from mamba_deploy.errors import MambaDeployError
from mamba_deploy.exporters import export as export_module
from mamba_deploy.runtime.session import Session

Bundles = Callable[..., Any]  # the factory of conftest.py
VERBS = ["export", "verify", "generate", "bench", "inspect"]
SCRIPT = Path(sys.executable).with_name("mamba-deploy")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(*arguments: Any, text: str | bytes | None = None, **environment: str) -> Result:
    """In this process; a bug of ours raises."""
    done = CliRunner(env=environment).invoke(main, [str(argument) for argument in arguments], input=text)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def process(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    defaults: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120, "check": False}
    return subprocess.run([str(SCRIPT), *map(str, arguments)], **defaults | options)


def assert_error(done: Result | subprocess.CompletedProcess[str], text: str, hint: str = "", code: int = 1) -> None:
    """``error:`` with this text, ``hint:`` with that one, nothing on stdout, no traceback."""
    exit_code = done.exit_code if isinstance(done, Result) else done.returncode
    assert exit_code == code, done.stderr
    assert done.stdout == ""
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert text in error
    assert "Traceback" not in done.stderr
    if hint:
        assert any(line.startswith("hint: ") and hint in line for line in done.stderr.splitlines()), done.stderr


def json_lines(done: Result) -> list[dict[str, Any]]:
    return [
        json.loads(line, parse_constant=lambda n: pytest.fail(f"{n} is no JSON")) for line in done.stdout.splitlines()
    ]


# --- a model that reads text --------------------------------------------------------------------------------------

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 \n()[]:.,=_+-*/'<>#"
EURO = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("€")[0][0]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Characters of Python, and the three bytes of a euro sign; 61 tokens in all, with the special one."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = ["<|end|>", *(split.pre_tokenize_str(c)[0][0] for c in ALPHABET), *EURO]
    library = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    library.pre_tokenizer = split
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    library.save(str(path))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.hugging_face(tmp_path_factory.mktemp("checkpoint"), "mamba2", num_hidden_layers=1)[0]


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A bundle with a tokenizer, exported by the command, and what the command said."""
    out = tmp_path_factory.mktemp("exported") / "deep" / "out"
    return out, command("export", checkpoint, out, "--tokenizer", tokenizer_file)


@pytest.fixture
def text_bundle(exported: tuple[Path, Result]) -> Path:
    return exported[0]


@pytest.fixture
def ids_bundle(bundle: Bundles) -> Path:
    """Without a tokenizer."""
    return bundle("mamba").path


# --- the command as a whole ---------------------------------------------------------------------------------------


def test_every_verb_of_the_design_is_there() -> None:
    assert set(VERBS) <= set(main.commands)
    help_text = command("--help").stdout
    assert all(verb in help_text for verb in main.commands)


FLAGS = {
    "export": "--dtype --state-dtype --opset --logits --force --tokenizer --json",
    "verify": "--backend --provider --checkpoint --layers --plot --threads --json",
    "generate": "-p --prompt --prompts -n --max-tokens --temperature --top-k --top-p --min-p --repetition-penalty "
    "--seed --stop --backend --provider --threads --json",
    "bench": "--backend --provider --batch --prompt --steps --seconds --tflops --plot --threads --json",
    "inspect": "--json",
    "build": "--backend --max-batch --max-prefill --prefill-batch --plugins --workspace --optimization-level "
    "--compute-capability --timing-cache --no-timing-cache --json",
    "doctor": "--json",
}  # fmt: skip


@pytest.mark.parametrize("verb", FLAGS)
def test_help_names_every_flag(verb: str) -> None:
    for flag in ("-h", "--help"):
        done = command(verb, flag)
        assert done.exit_code == 0
        assert done.stderr == ""
        words = done.stdout.replace(",", " ").split()
        assert set(FLAGS[verb].split()) <= set(words)


def options_of(verb: click.Command, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every option of a verb and of the verbs below it."""
    for name, inner in getattr(verb, "commands", {}).items():
        yield from options_of(inner, f"{prefix} {name}".strip())
    for parameter in verb.params:
        if isinstance(parameter, click.Option):
            yield from ((prefix, flag) for flag in (*parameter.opts, *parameter.secondary_opts))


def test_flags_are_in_kebab_case_and_every_verb_takes_json() -> None:
    flags = list(options_of(main))
    assert [flag for _, flag in flags if flag != flag.lower() or "_" in flag] == []
    groups = {name for name, inner in main.commands.items() if isinstance(inner, click.Group)}
    with_json = {verb for verb, flag in flags if flag == "--json"}
    assert with_json >= set(main.commands) - groups


def test_help_is_quick() -> None:
    """No verb's help imports what only running it needs."""
    program = (
        "import json, sys\n"
        "from click.testing import CliRunner\n"
        "from mamba_deploy.cli import main\n"
        "codes = [CliRunner().invoke(main, [verb, '--help']).exit_code for verb in main.commands]\n"
        "print(json.dumps([codes, sorted(sys.modules)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    codes, modules = json.loads(done.stdout)
    assert set(codes) == {0}
    heavy = {
        "torch",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "onnxruntime",
        "numpy",
        "tokenizers",
        "matplotlib",
        "safetensors",
    }
    assert heavy & set(modules) == set()


def test_script_and_module_are_the_same_command() -> None:
    version = f"mamba-deploy, version {metadata.version('mamba-deploy')}\n"
    for start in ([str(SCRIPT)], [sys.executable, "-m", "mamba_deploy"]):
        done = subprocess.run([*start, "--version"], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == (version, "")
        done = subprocess.run([*start, "generate"], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("Usage: mamba-deploy generate ")


USAGE: list[tuple[Sequence[str], str]] = [
    ([], "Usage: "),
    (["exprot"], "No such command 'exprot'"),
    (["export", "a"], "Missing argument 'OUT'"),
    (["export", "a", "b", "--dtype", "fp8"], "'fp8' is not one of 'fp32', 'fp16', 'bf16'"),
    (["export", "a", "b", "--state-dtype", "float16"], "'float16' is not one of"),
    (["export", "a", "b", "--opset", "17"], "17 is not in the range 18<=x<=23"),
    (["export", "a", "b", "--logits", "some"], "'some' is not one of 'last', 'all'"),
    (["verify"], "Missing argument 'OUT'"),
    (["verify", "a", "--backend", "cuda"], "'cuda' is not one of 'onnxruntime', 'torch'"),
    (["verify", "a", "--provider", "gpu"], "'gpu' is not one of 'cpu', 'cuda'"),
    (["verify", "a", "--backend", "torch", "--provider", "cuda"], "--provider cuda is for --backend onnxruntime"),
    (["generate", "a", "-p", "x", "--backend", "tensorrt", "--provider", "cuda"], "onnxruntime, not tensorrt"),
    (["verify", "a", "--threads", "0"], "0 is not in the range x>=1"),
    (["generate", "a"], "give either --prompt or --prompts"),
    (["generate", "a", "-p", "x", "-n", "0"], "0 is not in the range x>=1"),
    (["generate", "a", "-p", "x", "--temperature", "hot"], "'hot' is not a valid float"),
    (["generate", "a", "-p", "x", "--seed", "1.5"], "'1.5' is not a valid integer"),
    (["generate", "a", "--prompts", "/nowhere/prompts.txt"], "/nowhere/prompts.txt"),
    (["generate", "a", "-p", "x", "--top_k", "3"], "No such option"),
    (["bench", "a", "--batch", "1,x,8"], "'x' in '1,x,8' is not a number, 1 or above"),
    (["bench", "a", "--batch", "1,,8"], "'' in '1,,8' is not"),
    (["bench", "a", "--prompt", "128,0"], "'0' in '128,0' is not a number, 1 or above"),
    (["bench", "a", "--prompt", "-1"], "'-1' in '-1' is not"),
    (["bench", "a", "--prompt", "1.5"], "'1.5' in '1.5' is not"),
    (["bench", "a", "--prompt", "\u00b2"], "is not a number, 1 or above"),
    (["bench", "a", "--steps", "0"], "0 is not in the range x>=1"),
    (["bench", "a", "--backend", "torch", "--provider", "cuda"], "--provider cuda is for --backend onnxruntime"),
    (["inspect"], "Missing argument 'PATH'"),
]


@pytest.mark.parametrize(("arguments", "text"), USAGE, ids=[" ".join(arguments) or "-" for arguments, _ in USAGE])
def test_wrong_usage_exits_with_2(arguments: Sequence[str], text: str) -> None:
    done = command(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert text in done.stderr


def test_both_kinds_of_prompt_are_one_too_many(ids_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("1\n")
    done = command("generate", ids_bundle, "-p", "1", "--prompts", tmp_path / "prompts")
    assert done.exit_code == 2
    assert "give either --prompt or --prompts" in done.stderr


# What each verb calls, replaced to fail.
CALLED: dict[str, tuple[Any, str]] = {
    "export": (export_module, "export"),
    "verify": (mamba_deploy.runtime.verify, "verify"),
    "generate": (Session, "prefill"),
    "bench": (mamba_deploy.runtime.bench, "bench"),
    "inspect": (mamba_deploy.inspection, "describe"),
}


def fails_with(monkeypatch: pytest.MonkeyPatch, verb: str, error: BaseException) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(*CALLED[verb], fail)


def arguments_of(verb: str, path: Path) -> list[Any]:
    return {"export": [path, path / "new"], "generate": [path, "-p", "1 2"]}.get(verb, [path])


@pytest.mark.parametrize("verb", VERBS)
def test_interrupted_exits_with_130(verb: str, ids_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(monkeypatch, verb, KeyboardInterrupt())
    done = command(verb, *arguments_of(verb, ids_bundle))
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr.endswith("interrupted\n")
    assert "Traceback" not in done.stderr


class Ends:
    """Of a class: to make it raises this."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __set_name__(self, owner: type, name: str) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "said"), [(KeyboardInterrupt(), 130, "interrupted\n"), (SystemExit(143), 143, "")]
)
def test_interrupted_while_a_class_is_made(
    error: BaseException, code: int, said: str, ids_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As imports are that take seconds: Python before 3.12 raises a RuntimeError from it."""
    monkeypatch.setattr(Session, "generate", lambda *_, **__: type("Made", (), {"attribute": Ends(error)}))
    done = command("generate", *arguments_of("generate", ids_bundle))
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", said)


@pytest.mark.parametrize("verb", VERBS)
def test_expected_failures_have_an_error_and_a_hint(
    verb: str, ids_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_with(monkeypatch, verb, MambaDeployError("the moon is full", hint="wait"))
    assert_error(command(verb, *arguments_of(verb, ids_bundle)), "the moon is full", hint="wait")
    fails_with(monkeypatch, verb, MambaDeployError("the moon is full"))
    done = command(verb, *arguments_of(verb, ids_bundle))
    assert_error(done, "the moon is full")
    assert "hint:" not in done.stderr
    fails_with(monkeypatch, verb, PermissionError(errno.EACCES, "Permission denied", "/root/x"))
    assert_error(command(verb, *arguments_of(verb, ids_bundle)), "Permission denied: '/root/x'")


@pytest.mark.parametrize("verb", VERBS)
def test_debug_shows_the_traceback(verb: str, ids_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(monkeypatch, verb, MambaDeployError("the moon is full"))
    with pytest.raises(MambaDeployError, match="the moon is full"):
        command(verb, *arguments_of(verb, ids_bundle), MAMBA_DEPLOY_DEBUG="1")


@pytest.mark.parametrize("verb", VERBS)
def test_a_bug_of_ours_keeps_its_traceback(verb: str, ids_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(monkeypatch, verb, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        command(verb, *arguments_of(verb, ids_bundle))


def test_traceback_in_a_process(tmp_path: Path) -> None:
    arguments = ("verify", tmp_path / "nowhere")
    plain = process(*arguments)
    assert_error(plain, f"there is no directory {tmp_path / 'nowhere'}", hint="mamba-deploy export")
    debug = process(*arguments, env={**os.environ, "MAMBA_DEPLOY_DEBUG": "1"})
    assert debug.returncode == 1
    assert "Traceback (most recent call last)" in debug.stderr
    assert "BundleError: there is no directory" in debug.stderr


EXTRAS: list[tuple[str, Sequence[str], str, str]] = [
    ("export", ["new"], "torch", "export"),
    ("export", ["new"], "onnx", "export"),
    ("export", ["new"], "onnx_ir", "export"),
    ("export", ["new"], "onnxscript", "export"),
    ("verify", [], "onnxruntime", "cpu"),
    ("verify", ["--backend", "torch"], "torch", "export"),
    ("verify", ["--backend", "torch"], "onnx_ir", "export"),
    ("verify", ["--checkpoint", "x"], "torch", "export"),
    ("generate", ["-p", "x"], "onnxruntime", "cpu"),
    ("bench", [], "onnxruntime", "cpu"),
    ("bench", ["--plot", "a.png"], "matplotlib", "plot"),
    ("verify", ["--provider", "cuda"], "onnxruntime", "gpu"),
    ("generate", ["-p", "x", "--provider", "cuda"], "onnxruntime", "gpu"),
    ("generate", ["-p", "x"], "tokenizers", "cpu"),
    ("generate", ["-p", "x", "--backend", "torch"], "torch", "export"),
]


@pytest.mark.parametrize(
    ("verb", "flags", "module", "extra"), EXTRAS, ids=[f"{v} {' '.join(f)} without {m}" for v, f, m, _ in EXTRAS]
)
def test_a_missing_extra_is_named_with_its_pip_command(
    verb: str, flags: Sequence[str], module: str, extra: str, text_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "mamba_deploy.exporters.reference", raising=False)
    done = command(verb, text_bundle, *flags)
    assert_error(done, f"the Python package '{module}' is needed to ", hint=f"pip install 'mamba-deploy[{extra}]'")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has a CUDA provider"
)
@pytest.mark.parametrize(("verb", "flags"), [("verify", []), ("generate", ["-p", "x"])])
def test_without_cuda_nothing_runs_on_the_cpu_instead(verb: str, flags: Sequence[str], text_bundle: Path) -> None:
    done = command(verb, text_bundle, *flags, "--provider", "cuda")
    assert_error(done, "has no CUDAExecutionProvider here, only ", hint="pip install 'mamba-deploy[gpu]'")
    assert command(verb, text_bundle, *flags, "--provider", "cpu").exit_code == 0


# --- export -------------------------------------------------------------------------------------------------------


def test_export_says_what_it_made(exported: tuple[Path, Result], checkpoint: Path) -> None:
    out, done = exported
    assert done.exit_code == 0, done.stderr
    size = sum(p.stat().st_size for p in out.iterdir() if p.name != MANIFEST)
    assert done.stdout == f"{out}: mamba2, fp32, {size / 1e6:.1f} MB\n"
    steps = done.stderr.splitlines()
    assert steps[0] == f"reading {checkpoint}"
    assert "writing the ONNX graph" in steps
    assert "asking PyTorch for the reference answers" in steps
    assert not any(line.startswith(("error", "hint")) or "Warning" in line for line in steps)
    names = {"config.json", PORTABLE, LOWERED, WEIGHTS, REFERENCE, TOKENIZER, MANIFEST}
    assert {p.name for p in out.iterdir()} == names
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_export_with_every_flag(checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--dtype", "bf16", "--state-dtype", "fp16", "--opset", 20, "--logits", "all", "--json")
    done = command("export", checkpoint, tmp_path / "out", *flags)
    assert done.exit_code == 0, done.stderr
    [facts] = json_lines(done)
    opened = Bundle.open(tmp_path / "out")
    assert facts["path"] == str(opened.path)
    assert facts["bytes"] == sum(opened.file(name).stat().st_size for name in facts["files"])
    assert facts["files"] == opened.manifest["files"]
    contract = opened.contract
    assert (contract.dtype, contract.state_dtype, contract.all_logits) == ("bfloat16", "float16", True)
    opsets = {o.domain: o.version for o in onnx.load(opened.file(PORTABLE), load_external_data=False).opset_import}
    assert opsets[""] == 20
    assert "no tokenizer.json: prompts will be token ids" in done.stderr
    assert command("verify", opened.path, "--backend", "torch").exit_code == 0


EXPORT_FLAGS: list[tuple[list[Any], dict[str, Any]]] = [
    ([], {"dtype": "float32", "state_dtype": "float32", "opset": 18, "all_logits": False, "force": False}),
    (["--dtype", "fp16"], {"dtype": "float16", "state_dtype": "float32"}),
    (["--state-dtype", "bf16"], {"dtype": "float32", "state_dtype": "bfloat16"}),
    (["--opset", "23"], {"opset": 23}),
    (["--logits", "all"], {"all_logits": True}),
    (["--force"], {"force": True}),
    (["--tokenizer", "t.json"], {"tokenizer": Path("t.json")}),
]


@pytest.mark.parametrize(("flags", "expected"), EXPORT_FLAGS, ids=[" ".join(flags) or "-" for flags, _ in EXPORT_FLAGS])
def test_flags_of_export(
    flags: list[Any], expected: dict[str, Any], text_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*arguments: Any, **options: Any) -> Bundle:
        calls.append((arguments, options))
        return Bundle.open(text_bundle)

    monkeypatch.setattr(export_module, "export", record)
    assert command("export", "some/model", "out", *flags).exit_code == 0
    [(arguments, options)] = calls
    assert arguments == ("some/model", Path("out"))
    assert {name: options[name] for name in expected} == expected


def test_force_replaces_a_bundle_and_keeps_what_is_not_its_own(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    done = command("export", checkpoint, out)
    assert_error(done, f"{out} is not empty", hint="--force")
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    assert command("export", checkpoint, out, "--force").exit_code == 0
    assert Bundle.open(out).file(WEIGHTS)
    assert (out / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_over_a_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    assert_error(command("export", checkpoint, tmp_path / "out", "--force"), "exists and is not a directory")
    assert (tmp_path / "out").read_text() == "x"


def tensor_too_few(path: Path) -> None:
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    del tensors["backbone.layers.0.mixer.D"]
    safetensors.torch.save_file(tensors, path / "model.safetensors")


DAMAGED_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    **checkpoints.DAMAGED,
    "tensor too few": (tensor_too_few, "'layers.0.mixer.D' [4] is missing"),
    "damaged tokenizer": (lambda path: (path / "tokenizer.json").write_text("{}"), "cannot be read as a tokenizer"),
    "everything missing": (shutil.rmtree, "there is no directory"),
}


@pytest.mark.parametrize("damage", DAMAGED_CHECKPOINTS)
def test_export_of_a_damaged_checkpoint_writes_nothing(
    damage: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    change, text = DAMAGED_CHECKPOINTS[damage]
    change(path)
    # what a damaged tokenizer meets is only read after the graph: a graph of no size will do
    monkeypatch.setattr(export_module, "export_onnx", lambda model, contract, path, opset: path.write_bytes(b"x"))
    monkeypatch.setattr(export_module, "lower_for_cpu", lambda portable, lowered, *_: lowered.write_bytes(b"x"))
    assert_error(command("export", path, tmp_path / "here" / "out"), text)
    assert {p.name for p in tmp_path.rglob("*")} <= {"checkpoint", "here", *(p.name for p in path.glob("*"))}


def test_export_with_a_tokenizer_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    done = command("export", checkpoint, tmp_path / "out", "--tokenizer", tmp_path / "t.json")
    assert_error(done, f"there is no tokenizer file {tmp_path / 't.json'}", hint="tokenizer.json")
    assert list(tmp_path.iterdir()) == []


STEPS = ["export_onnx", "lower_for_cpu", "write_answers"]
FAILURES: dict[str, tuple[BaseException, int, str]] = {
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("before", ["nothing", "bundle"])
def test_an_export_that_fails_leaves_everything_as_it_was(
    failure: str,
    step: str,
    before: str,
    checkpoint: Path,
    text_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In each step that writes, half of a file is written, and then it fails."""
    error, code, text = FAILURES[failure]
    out = tmp_path / "out"
    if before == "bundle":
        shutil.copytree(text_bundle, out)
    content = {p.name: p.read_bytes() for p in out.iterdir()} if before == "bundle" else None
    broken = STEPS.index(step)

    def writes(position: int) -> Callable[..., None]:
        def write(*arguments: Any, **options: Any) -> None:
            target = [a for a in arguments if isinstance(a, Path)][-1]
            target.write_bytes(b"half of it")
            if position == broken:
                raise error

        return write

    for position, name in enumerate(STEPS):
        monkeypatch.setattr(export_module, name, writes(position))
    done = command("export", checkpoint, out, "--force")
    assert (done.exit_code, done.stdout) == (code, "")
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert_error(done, f"{out} could not be written", hint="free space")
    assert [p.name for p in tmp_path.iterdir()] == ([] if content is None else ["out"])
    if content is not None:
        assert {p.name: p.read_bytes() for p in out.iterdir()} == content


def wait_for(lines: Iterator[str], beginning: str) -> list[str]:
    """Lines of a process up to the first that begins so."""
    seen = []
    for line in lines:
        seen.append(line)
        if line.startswith(beginning):
            return seen
    pytest.fail(f"it ended without saying {beginning!r}: {''.join(seen)}")


INT, TERM = (signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")


@pytest.mark.parametrize(
    ("step", "delay", "number", "code", "said"),
    [("writing the ONNX graph", 0.5, *INT), ("writing the ONNX graph", 0.5, *TERM), ("asking PyTorch", 0.0, *INT)],
    ids=["graph-INT", "graph-TERM", "answers-INT"],
)
def test_a_real_interrupt_leaves_nothing(
    step: str, delay: float, number: int, code: int, said: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    deep = tmp_path_factory.mktemp("deep")  # PyTorch's answers take seconds
    checkpoint, _ = checkpoints.hugging_face(deep, "mamba2", num_hidden_layers=16)
    for attempt in range(5):  # where this process is held up, the export may end before the signal
        folder = tmp_path / str(attempt)
        folder.mkdir()
        arguments = [str(SCRIPT), "export", str(checkpoint), str(folder / "out")]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
            assert running.stderr is not None
            wait_for(running.stderr, step)
            time.sleep(delay)
            running.send_signal(number)
            stdout, stderr = running.communicate(timeout=120)
        if running.returncode != 0:
            break
    assert running.returncode == code, stderr
    assert stdout == ""
    assert stderr.endswith(said)
    assert "Traceback" not in stderr
    assert list(folder.iterdir()) == []


def test_a_really_full_disk_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """No file may grow beyond 10 kB: the weights do not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        done = command("export", checkpoint, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_error(done, f"{tmp_path / 'out'} could not be written: [Errno 27] File too large", hint="free space")
    assert list(tmp_path.iterdir()) == []


# --- damaged bundles, for every verb that reads them ----------------------------------------------------------------


def flipped(content: bytes) -> bytes:
    """One bit, in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGED_BUNDLES: dict[str, tuple[str, Callable[[bytes], bytes] | None, str]] = {
    "flipped bit": (WEIGHTS, flipped, f"{WEIGHTS} is not the file that was exported: its sha256 differs"),
    "truncated weights": (WEIGHTS, lambda b: b[:-4], f"{WEIGHTS} has "),
    "missing weights": (WEIGHTS, None, f"{WEIGHTS} is missing"),
    "missing config": ("config.json", None, "config.json is missing"),
    "missing manifest": (MANIFEST, None, "there is no manifest.json in"),
    "empty manifest": (MANIFEST, lambda b: b"", f"{MANIFEST} cannot be read"),
    "other manifest": (MANIFEST, lambda b: b"[]", f"{MANIFEST} does not hold a JSON object"),
    "damaged graph": (LOWERED, flipped, f"{LOWERED} is not the file that was exported"),
    "damaged tokenizer": (TOKENIZER, flipped, f"{TOKENIZER} is not the file that was exported"),
}


@pytest.mark.parametrize("damage", DAMAGED_BUNDLES)
@pytest.mark.parametrize("verb", ["verify", "generate", "inspect"])
def test_a_damaged_bundle_is_refused(verb: str, damage: str, text_bundle: Path, tmp_path: Path) -> None:
    name, change, text = DAMAGED_BUNDLES[damage]
    path = Path(shutil.copytree(text_bundle, tmp_path / "out"))
    if change is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(change((path / name).read_bytes()))
    assert_error(command(verb, *arguments_of(verb, path)), text)


@pytest.mark.parametrize("verb", ["verify", "generate", "inspect"])
def test_a_path_that_is_not_there(verb: str, tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    done = command(verb, *arguments_of(verb, path))
    assert_error(done, f"there is no {'' if verb == 'inspect' else 'directory '}{path}", hint="give a")


def test_an_unreachable_hub_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*arguments: Any, **options: Any) -> str:
        raise ConnectionError("Network is unreachable")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    done = command("export", "state-spaces/mamba-130m", tmp_path / "out")
    assert_error(done, "the hub could not give 'state-spaces/mamba-130m': ConnectionError: Network", hint="network")
    assert list(tmp_path.iterdir()) == []


# --- generate -----------------------------------------------------------------------------------------------------


def expected(path: Path, prompt: Any, **options: Any) -> list[Any]:
    """What the session says."""
    with Session.open(path, threads=1) as session:
        return list(session.generate(prompt, **options))


def text_of(tokens: Sequence[Any], row: int = 0) -> str:
    return "".join(token.text for token in tokens if token.row == row)


def test_generated_text_alone_is_on_stdout(text_bundle: Path) -> None:
    tokens = expected(text_bundle, "def f(", max_tokens=20)
    done = command("generate", text_bundle, "-p", "def f(", "-n", 20)
    assert done.exit_code == 0
    assert done.stdout == text_of(tokens) + "\n"
    assert len(text_of(tokens)) > 3
    report = done.stderr.strip()
    assert report.startswith("prompt: 6 tokens in ")
    assert f"generated: {len(tokens)} tokens, " in report
    assert report.endswith(" tokens/s")


def test_token_ids_in_and_out_without_a_tokenizer(ids_bundle: Path) -> None:
    tokens = expected(ids_bundle, [5, 6, 7], max_tokens=9)
    for prompt in ("5 6 7", "5, 6, 7", " 5\n6\t7 "):
        done = command("generate", ids_bundle, "-p", prompt, "-n", 9)
        assert done.exit_code == 0, done.stderr
        assert [int(word) for word in done.stdout.split()] == [token.id for token in tokens]


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_generate_on_each_backend(ids_bundle: Path, backend: str) -> None:
    done = command("generate", ids_bundle, "-p", "5 6 7", "-n", 9, "--backend", backend, "--threads", 1)
    assert [int(word) for word in done.stdout.split()] == [t.id for t in expected(ids_bundle, [5, 6, 7], max_tokens=9)]


def test_prompt_from_stdin(text_bundle: Path, ids_bundle: Path) -> None:
    given = command("generate", text_bundle, "-p", "a = 1\nb = €", "-n", 8)
    piped = command("generate", text_bundle, "-p", "-", "-n", 8, text="a = 1\nb = €")
    assert piped.exit_code == 0
    assert piped.stdout == given.stdout
    ids = command("generate", ids_bundle, "-p", "-", "-n", 4, text="5 6 7\n")
    assert ids.stdout == command("generate", ids_bundle, "-p", "5 6 7", "-n", 4).stdout
    real = process("generate", text_bundle, "-p", "-", "-n", 8, input="a = 1\nb = €")
    assert (real.returncode, real.stdout) == (0, given.stdout)


def test_json_events(text_bundle: Path) -> None:
    """A line a token, the last one ``done``; the texts of the tokens are the text."""
    tokens = expected(text_bundle, "def f(", max_tokens=12)
    done = command("generate", text_bundle, "-p", "def f(", "-n", 12, "--json")
    assert done.exit_code == 0
    assert done.stderr == ""
    *events, last = json_lines(done)
    assert events == [
        {"event": "token", "row": 0, "index": t.index, "id": t.id, "text": t.text, "finish_reason": t.finish_reason}
        for t in tokens
    ]
    assert events[-1]["finish_reason"] in ("length", "eos")
    assert last["event"] == "done"
    counts = {"rows": 1, "prompt_tokens": 6, "generated_tokens": len(tokens)}
    assert {name: last[name] for name in counts} == counts
    assert last["prompt_seconds"] > 0
    assert last["decode_tokens_per_second"] > 0


def test_a_file_of_prompts_is_one_batch(text_bundle: Path, tmp_path: Path) -> None:
    """Lines end at a newline and nowhere else; each row is what it is alone."""
    prompts = ["def f(", "x", "a\x0cb\x85c = [1, 2", "return €"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    rows = [text_of(expected(text_bundle, prompt, max_tokens=10)) for prompt in prompts]
    done = command("generate", text_bundle, "--prompts", tmp_path / "prompts.txt", "-n", 10)
    assert done.exit_code == 0, done.stderr
    for row, (prompt, text) in enumerate(zip(prompts, rows, strict=True)):
        assert f"=== {row}: {prompt}\n{text}\n" in done.stdout
    assert sum(line.startswith("=== ") for line in done.stdout.split("\n")) == 4
    *events, last = json_lines(
        command("generate", text_bundle, "--prompts", tmp_path / "prompts.txt", "-n", 10, "--json")
    )
    for row, text in enumerate(rows):
        assert "".join(event["text"] for event in events if event["row"] == row) == text
    assert last["rows"] == 4


def test_a_file_of_prompts_in_token_ids(ids_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"5 6 7\r\n8\r\n")
    done = command("generate", ids_bundle, "--prompts", tmp_path / "prompts.txt", "-n", 3)
    assert done.exit_code == 0, done.stderr
    for prompt, ids in (("5 6 7", [5, 6, 7]), ("8", [8])):
        answer = " ".join(str(token.id) for token in expected(ids_bundle, ids, max_tokens=3))
        assert f": {prompt}\n{answer} \n" in done.stdout


def test_one_prompt_in_a_file_gives_text_alone(text_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("def f(\n")
    done = command("generate", text_bundle, "--prompts", tmp_path / "prompts.txt", "-n", 10)
    assert done.stdout == command("generate", text_bundle, "-p", "def f(", "-n", 10).stdout


def test_a_seed_makes_sampling_repeatable(text_bundle: Path) -> None:
    def sample(*flags: Any) -> str:
        done = command("generate", text_bundle, "-p", "def f(", "-n", 30, *flags)
        assert done.exit_code == 0
        return done.stdout

    hot = ("--temperature", 1.5, "--seed")
    assert sample(*hot, 3) == sample(*hot, 3)
    assert len({sample(*hot, seed) for seed in range(4)}) == 4
    assert sample("--temperature", 1.5) != sample("--temperature", 1.5), "without a seed each run is its own"
    assert sample("--seed", 3) == sample(), "greedy has nothing to seed"


@pytest.mark.parametrize("flags", [("--top-k", 1), ("--top-p", 1e-9), ("--min-p", 1)], ids=lambda flags: flags[0])
def test_the_narrowest_filter_is_greedy(text_bundle: Path, flags: tuple[str, float]) -> None:
    """Each filter is passed on: left open the same seed samples something else."""
    common = ("generate", text_bundle, "-p", "def f(", "-n", 30)
    greedy = command(*common).stdout
    assert command(*common, "--temperature", 2, "--seed", 1, *flags).stdout == greedy
    assert command(*common, "--temperature", 2, "--seed", 1).stdout != greedy


def test_repetition_penalty(ids_bundle: Path) -> None:
    free = command("generate", ids_bundle, "-p", "5 6 7", "-n", 20).stdout.split()
    done = command("generate", ids_bundle, "-p", "5 6 7", "-n", 20, "--repetition-penalty", 1e6).stdout.split()
    assert len(set(done[:10])) == 10
    assert len(set(free[:10])) < 10


def test_stop_strings_end_the_text(text_bundle: Path) -> None:
    whole = text_of(expected(text_bundle, "def f(", max_tokens=40))
    stop = whole[5:7]
    done = command("generate", text_bundle, "-p", "def f(", "-n", 40, "--stop", stop, "--stop", "never this")
    assert done.stdout == whole[: whole.index(stop)] + "\n"
    *events, _ = json_lines(command("generate", text_bundle, "-p", "def f(", "-n", 40, "--stop", stop, "--json"))
    assert events[-1]["finish_reason"] == "stop"


REFUSED: list[tuple[list[Any], str, str]] = [
    (["-p", ""], "prompt 0 is empty", "at least one"),
    (["-p", "  "], "prompt 0 is empty", "at least one"),
    (["-p", "def"], "the bundle has no tokenizer.json, and 'def' is not a list of token ids", "--tokenizer"),
    (["-p", "1 2.5"], "'1 2.5' is not a list of token ids", "-p '1 2 3'"),
    (["-p", "1 61"], "row 0 holds token id 61: the vocabulary is 0 to 60", ""),
    (["-p", "1 -1"], "token id", ""),
    (["-p", "1", "--stop", "x"], "stop strings need a tokenizer", "tokenizer.json"),
    (["-p", "1", "--temperature", "-1"], "temperature is -1.0", ""),
    (["-p", "1", "--temperature", "nan"], "temperature is nan", ""),
    (["-p", "1", "--top-k", "-1"], "top_k is -1", ""),
    (["-p", "1", "--top-p", "0"], "top_p is 0.0", ""),
    (["-p", "1", "--min-p", "1.5"], "min_p is 1.5", ""),
    (["-p", "1", "--repetition-penalty", "0"], "repetition_penalty is 0.0", ""),
    (["-p", "1", "--seed", "-3"], "seed is -3", ""),
]


@pytest.mark.parametrize(("flags", "text", "hint"), REFUSED, ids=[" ".join(flags) for flags, *_ in REFUSED])
def test_what_generate_refuses(ids_bundle: Path, flags: list[Any], text: str, hint: str) -> None:
    assert_error(command("generate", ids_bundle, *flags), text, hint)


def test_empty_prompts_are_refused(text_bundle: Path, tmp_path: Path) -> None:
    assert_error(command("generate", text_bundle, "-p", ""), "prompt 0 is empty")
    assert_error(command("generate", text_bundle, "-p", "-", text=""), "prompt 0 is empty")
    path = tmp_path / "prompts.txt"
    path.write_text("")
    assert_error(command("generate", text_bundle, "--prompts", path), "prompt 0 is empty")
    path.write_text("a\n\nb\n")
    assert_error(command("generate", text_bundle, "--prompts", path), "prompt 1 is empty")
    path.write_text("a\n\U0001f40d\n")  # characters of which no token is made
    assert_error(command("generate", text_bundle, "--prompts", path), "prompts[1] is empty")


def test_prompts_that_are_not_text(text_bundle: Path, tmp_path: Path) -> None:
    latin = "für".encode("latin-1")
    done = command("generate", text_bundle, "-p", "-", text=latin)
    assert_error(done, "standard input cannot be read as text: 'utf-8' codec can't decode byte 0xfc", hint="UTF-8")
    (tmp_path / "prompts.txt").write_bytes(latin)
    done = command("generate", text_bundle, "--prompts", tmp_path / "prompts.txt")
    assert_error(done, f"{tmp_path / 'prompts.txt'} cannot be read as text", hint="UTF-8")


def test_a_terminal_that_cannot_show_the_text(text_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a €\nb\n", encoding="utf-8")
    done = process(
        "generate", text_bundle, "--prompts", tmp_path / "prompts.txt", "-n", 2,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: 'latin-1' codec can't encode character" in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_text_comes_as_it_is_made(text_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted generation has shown what it had."""

    def tokens(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield SimpleNamespace(id=1, text="ab", row=0, index=0, finish_reason=None)
        yield SimpleNamespace(id=2, text="c", row=0, index=1, finish_reason=None)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "generate", tokens)
    done = command("generate", text_bundle, "-p", "x")
    assert (done.exit_code, done.stdout) == (130, "abc")
    assert done.stderr == "interrupted\n"


def test_a_reader_that_leaves_early(ids_bundle: Path) -> None:
    """`| head`: the text is cut, and the command ends soon and without a traceback."""
    script = (
        f"{SCRIPT} generate {ids_bundle} -p '5 6 7' -n 1000000 | head -c 20; code=${{PIPESTATUS[0]}}; echo; echo $code"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    text, code = done.stdout.splitlines()
    assert len(text) == 20
    assert code == "1"
    assert done.stderr == ""


def test_generate_says_which_options_change_nothing(ids_bundle: Path) -> None:
    done = command("generate", ids_bundle, "-p", "1 2", "-n", "2", "--top-k", "3", "--seed", "1")
    assert done.exit_code == 0
    assert "--top-k changes nothing without --temperature" in done.stderr
    assert "--seed changes nothing" in done.stderr
    quiet = command("generate", ids_bundle, "-p", "1 2", "-n", "2", "--seed", "1", "--temperature", "0.5")
    assert "changes nothing" not in quiet.stderr


def test_a_real_interrupt_of_generate(ids_bundle: Path) -> None:
    arguments = [str(SCRIPT), "generate", str(ids_bundle), "-p", "5 6 7", "-n", "1000000"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert len(running.stdout.read(30)) == 30
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert stderr == "interrupted\n"


# --- every result is one JSON object ------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_json_is_one_object_on_stdout(verb: str, text_bundle: Path) -> None:
    done = command(verb, text_bundle, "--json")
    assert done.exit_code == 0, done.stderr
    [facts] = json_lines(done)
    assert isinstance(facts, dict)
    assert ("passed" if verb == "verify" else "kind") in facts


def test_the_whole_way_in_processes(text_bundle: Path) -> None:
    """As a user starts it: verify, then generate."""
    verified = process("verify", text_bundle, "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["passed"] is True
    assert [line.split()[0] for line in verified.stderr.splitlines()] == ["verifying", "verifying"]
    generated = process("generate", text_bundle, "-p", "def f(", "-n", 12)
    assert (generated.returncode, generated.stdout) == (
        0,
        text_of(expected(text_bundle, "def f(", max_tokens=12)) + "\n",
    )
