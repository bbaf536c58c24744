"""What `inspect` says of checkpoints, bundles and ONNX files, against the files themselves; and of damaged ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from mamba_deploy.bundle import ENGINES, LOWERED, MANIFEST, PORTABLE, REFERENCE, WEIGHTS, Bundle, add_engine
from mamba_deploy.cli import main
from mamba_deploy.errors import BundleError
from mamba_deploy.inspection import describe, render
from mamba_deploy.runtime import engine_report

Bundles = Callable[..., Any]  # the factory of conftest.py


def inspected(path: Path, *flags: str) -> Result:
    return CliRunner().invoke(main, ["inspect", str(path), *flags])


def facts_of(path: Path) -> dict[str, Any]:
    """From the command, which prints one JSON object and nothing else."""
    done = inspected(path, "--json")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    facts = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert facts == json.loads(json.dumps(describe(path)))
    assert facts["path"] == str(path)
    return facts


def text_of(path: Path) -> str:
    done = inspected(path)
    assert done.exit_code == 0, done.output
    assert done.stdout == render(describe(path)) + "\n"
    assert done.stderr == ""
    return done.stdout


def lines_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# --- a checkpoint -------------------------------------------------------------------------------------------------

CHECKPOINTS: dict[str, Callable[[Path], tuple[Path, Any]]] = {
    "mamba": lambda path: checkpoints.hugging_face(path, "mamba"),
    "mamba2-grouped": lambda path: checkpoints.hugging_face(path, "mamba2", n_groups=2, num_hidden_layers=3),
    "falcon": lambda path: checkpoints.hugging_face(path, "falcon_mamba", tie_word_embeddings=False),
    "state-spaces": lambda path: checkpoints.state_spaces(path, "mamba2"),
    "codestral": lambda path: checkpoints.codestral(path),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint(case: str, tmp_path: Path) -> None:
    path, theirs = CHECKPOINTS[case](tmp_path)
    facts = facts_of(path)
    c = theirs.config
    assert facts["kind"] == "checkpoint"
    assert facts["config"]["generation"] == ("mamba2" if c.model_type == "mamba2" else "mamba")
    assert facts["config"]["d_model"] == c.hidden_size
    assert facts["config"]["n_layer"] == c.num_hidden_layers
    assert facts["config"]["vocab_size"] == c.vocab_size
    assert facts["config"]["d_state"] == c.state_size
    parameters = sum(parameter.numel() for parameter in theirs.parameters())
    assert facts["parameters"] == parameters
    assert facts["stored_dtypes"] == {"float32": len(facts["tensors"])}
    assert sum(int(np.prod(shape)) for shape in facts["tensors"].values()) == parameters
    # each parameter once but for the last norm, and of the embedding one row (a tied one is read as the head)
    untied = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    assert facts["step"]["weight_bytes"] == 4 * (parameters - untied)
    channels = c.intermediate_size if c.model_type != "mamba2" else c.num_heads * c.head_dim
    conv = channels + (2 * c.n_groups * c.state_size if c.model_type == "mamba2" else 0)
    state = 4 * c.num_hidden_layers * (channels * c.state_size + conv * (c.conv_kernel - 1))
    assert facts["state_bytes_per_row"] == state
    assert facts["step"]["state_bytes"] == 2 * state
    assert facts["step"]["bytes"] == facts["step"]["weight_bytes"] + 2 * state + 4 * c.vocab_size
    text = text_of(path)
    assert text.startswith(f"checkpoint {path}\n")
    for words in (["generation", facts["config"]["generation"]], ["parameters", f"{parameters:,}"]):
        assert words in lines_of(text)
    assert ["tie_embeddings", str(c.tie_word_embeddings)] in lines_of(text)
    assert ["state", "per", "row", f"{state:,}", "bytes"] in lines_of(text)


def test_dtypes_of_a_half_precision_checkpoint(tmp_path: Path) -> None:
    path, _ = checkpoints.hugging_face(tmp_path, "mamba", dtype=torch.bfloat16)
    assert facts_of(path)["stored_dtypes"] == {"bfloat16": 20, "float32": 2}  # A of both layers is folded in float32


DAMAGED_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    **checkpoints.DAMAGED,
    "config is no JSON": (lambda path: (path / "config.json").write_text("{"), "config.json cannot be read as JSON"),
}


def assert_refused(path: Path, text: str) -> None:
    for flags in ([], ["--json"]):
        done = inspected(path, *flags)
        assert done.exit_code == 1, done.output
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert text in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("damage", DAMAGED_CHECKPOINTS)
def test_a_damaged_checkpoint(damage: str, tmp_path: Path) -> None:
    path, _ = checkpoints.hugging_face(tmp_path, "mamba")
    change, text = DAMAGED_CHECKPOINTS[damage]
    change(path)
    assert_refused(path, text)


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert_refused(tmp_path, f"{tmp_path} has neither config.json nor params.json; it holds: notes.txt")


def test_nothing_there(tmp_path: Path) -> None:
    assert_refused(tmp_path / "out", f"there is no {tmp_path / 'out'}")
    done = CliRunner().invoke(main, ["inspect", "state-spaces/mamba-130m"])  # nor is the hub asked
    assert (done.exit_code, done.stdout) == (1, "")
    assert "there is no state-spaces/mamba-130m" in done.stderr


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert_refused(tmp_path / "notes.txt", "is neither a directory nor an .onnx file")


# --- a bundle -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"kind": "mamba"}, {"kind": "mamba2", "all_logits": True}, {"kind": "mamba", "dtype": "bfloat16"}]
)
def test_a_bundle(bundle: Bundles, options: dict[str, Any]) -> None:
    exported = bundle(**options)
    path = exported.path
    facts = facts_of(path)
    assert facts["kind"] == "bundle"
    assert facts["config"] == json.loads((path / "config.json").read_text())
    assert facts["parameters"] == sum(parameter.numel() for parameter in exported.theirs.parameters())
    assert facts["dtypes"] == {"activation": options.get("dtype", "float32"), "state": "float32"}
    assert facts["logits"] == ("all" if options.get("all_logits") else "last")
    assert facts["tools"]["torch"] == torch.__version__
    assert set(facts["files"]) == {p.name for p in path.iterdir()} - {MANIFEST}
    assert facts["files"][WEIGHTS]["bytes"] == (path / WEIGHTS).stat().st_size
    # the contract against the graph
    graph = onnx.load(path / PORTABLE, load_external_data=False).graph
    declared = [(t["name"], t["dtype"], t["axes"]) for t in facts["contract"]]
    assert declared == [row(value) for value in [*graph.input, *graph.output]]
    assert [t["direction"] for t in facts["contract"]] == ["in"] * len(graph.input) + ["out"] * len(graph.output)
    width = 2 if "dtype" in options else 4
    weights = facts["step"]["weight_bytes"] / width
    assert weights == facts["parameters"]  # tied: the last norm is left out, a row of the embedding is read
    text = text_of(path)
    assert text.startswith(f"bundle {path}\n")
    for tensor in facts["contract"]:
        assert [tensor["direction"], tensor["name"], tensor["dtype"]] in [line[:3] for line in lines_of(text)]
    for name, entry in facts["files"].items():
        assert [name, f"{entry['bytes']:,}", "bytes"] in lines_of(text)


def row(value: onnx.ValueInfoProto) -> tuple[str, str, list[Any]]:
    tensor = value.type.tensor_type
    dtype = TensorProto.DataType.Name(tensor.elem_type).lower().replace("float", "float32", 1)
    dtype = {"float3216": "float16", "bfloat3216": "bfloat16"}.get(dtype, dtype)
    return value.name, dtype, [d.dim_param or d.dim_value for d in tensor.shape.dim]


def edited(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def edit(path: Path) -> None:
        values = json.loads((path / MANIFEST).read_text())
        change(values)
        (path / MANIFEST).write_text(json.dumps(values))

    return edit


def flipped(content: bytes) -> bytes:
    """One bit, in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGED_BUNDLES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped weight": (edited(WEIGHTS, flipped), f"{WEIGHTS} is not the file that was exported"),
    "truncated weights": (edited(WEIGHTS, lambda b: b[:-4]), f"{WEIGHTS} has "),
    "flipped graph": (edited(LOWERED, flipped), f"{LOWERED} is not the file that was exported"),
    "missing reference": (lambda path: (path / REFERENCE).unlink(), f"{REFERENCE} is missing"),
    "other config": (edited("config.json", lambda b: b.replace(b"61", b"62")), "config.json is not the file"),
    "manifest is no JSON": (edited(MANIFEST, lambda b: b[:-9]), f"{MANIFEST} cannot be read"),
    "later format": (manifest(lambda m: m.update(format_version=2)), "is of format version 2"),
    "manifest without files": (manifest(lambda m: m.pop("files")), "lacks files"),
    "other contract": (manifest(lambda m: m["contract"].pop()), "the contract does not fit config.json"),
}


@pytest.mark.parametrize("damage", DAMAGED_BUNDLES)
def test_a_damaged_bundle(bundle: Bundles, damage: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle("mamba").path, tmp_path / "out"))
    change, text = DAMAGED_BUNDLES[damage]
    change(path)
    assert_refused(path, text)


def test_a_bundle_whose_manifest_names_no_tools(bundle: Bundles, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle("mamba").path, tmp_path / "out"))
    manifest(lambda m: m.pop("tools"))(path)
    assert facts_of(path)["tools"] == {}


# --- an engine ----------------------------------------------------------------------------------------------------

ENGINE_FACTS: dict[str, dict[str, Any]] = {  # as engine_build writes them
    backend: {
        "product": product, "version": "9.9.1", "plugins": "library", "plugin_sources": "0", "platform": "linux-x86_64",
        "architecture": architecture, "compute_capabilities": capabilities, "onnx_sha256": "", "weights_sha256": "",
        "max_batch": 6, "max_prefill": 512, "prefill_batch": 2, "build_seconds": 1.5, "weights": weights,
    }
    for backend, product, architecture, capabilities, weights in (
        ("tensorrt", "TensorRT", "87", [], {"a": [0, 70000], "b": [70016, 65536]}),
        ("tensorrt-rtx", "TensorRT-RTX", None, ["86", "120"], {}),
    )
}  # fmt: skip


@pytest.fixture
def with_engines(bundle: Bundles, tmp_path: Path) -> Path:
    """A bundle with an engine of either TensorRT, of which inspect reads no byte."""
    opened = Bundle.open(shutil.copytree(bundle("mamba").path, tmp_path / "out"))
    for backend, facts in ENGINE_FACTS.items():
        (opened.path / "made").write_bytes(backend.encode())
        opened = add_engine(opened, backend, opened.path / "made", facts)
    return opened.path


def add_in_vain(path: Path, work: Path, why: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add an engine, which fails when the manifest is to be put in place: the bundle is as it was afterwards."""
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    work.mkdir()
    (work / "made").write_bytes(b"new")
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if target.name == MANIFEST:
            raise why
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    try:
        add_engine(Bundle.open(path), "tensorrt", work / "made", ENGINE_FACTS["tensorrt"])
    finally:
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("had_one", [True, False])
def test_an_engine_that_cannot_be_put_in_place(
    with_engines: Path, bundle: Bundles, tmp_path: Path, had_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = with_engines if had_one else Path(shutil.copytree(bundle("mamba").path, tmp_path / "without"))
    with pytest.raises(BundleError, match=f"{path} could not be written: .*No space left") as caught:
        add_in_vain(path, tmp_path / "work", OSError(28, "No space left on device"), monkeypatch)
    assert "free space" in caught.value.hint


def test_an_interrupt_while_an_engine_is_put_in_place(
    with_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        add_in_vain(with_engines, tmp_path / "work", KeyboardInterrupt(), monkeypatch)


def expected_engine(backend: str) -> dict[str, Any]:
    written = ENGINE_FACTS[backend]
    same = ("product", "version", "max_batch", "max_prefill", "prefill_batch", "plugins", "build_seconds")
    return {
        "file": ENGINES[backend],
        "bytes": len(backend),
        "gpus": ["sm_87"] if backend == "tensorrt" else ["sm_86", "sm_120"],
        "bound_weight_bytes": 135536 if backend == "tensorrt" else 0,
        **{key: written[key] for key in same},
    }


def test_the_engines_of_a_bundle(with_engines: Path, bundle: Bundles) -> None:
    assert facts_of(with_engines)["engines"] == {backend: expected_engine(backend) for backend in ENGINES}
    text = text_of(with_engines)
    for line in (
        "engine for tensorrt\n  file         model.tensorrt.engine, 8 bytes\n",
        "  weights      135,536 bytes in model.onnx.data\n",
        "  weights      inside\n",
        "  built with   TensorRT-RTX 9.9.1, plugins: library\n",
        "  built for    sm_87\n",
        "  built for    sm_86, sm_120\n",
        "  built in     1.5 s\n",
        "  step         up to 6 rows\n",
        "  prompt call  up to 2 rows of 512 tokens\n",
    ):
        assert line in text
    assert facts_of(bundle("mamba").path)["engines"] == {}
    assert "engine" not in text_of(bundle("mamba").path)


@pytest.mark.parametrize("backend", ENGINES)
def test_an_engine_says_why_it_has_no_layers(with_engines: Path, backend: str) -> None:
    """There is no TensorRT 9.9.1; and no GPU, most likely."""
    path = with_engines / ENGINES[backend]
    done = inspected(path, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    why = facts.pop("no_layers")
    assert "is needed to" in why or "it was built with TensorRT" in why
    assert facts == {"kind": "engine", "path": str(path), "backend": backend, **expected_engine(backend)}
    text = inspected(path).stdout
    assert text.startswith(f"engine {path}\nengine for {backend}\n  file ")
    assert text.endswith(f"no layers are shown: {why}\n")


def test_layers_of_an_engine(with_engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "Layers": [
            {"Name": "gemm", "LayerType": "gemm", "TacticName": "sm80_xmma", "TacticValue": "0x1"},
            {"Name": "scan [profile 1]", "LayerType": "PluginV2", "TacticValue": "0x0"},
            "myelin [profile 1]",
        ],
        "Bindings": ["input_ids"],
    }
    text = json.dumps(told).replace("xmma", "xmma\t\x01")  # a raw character, as the inspector has them
    layers = engine_report.parse(text)
    assert layers == {
        "0": [{"name": "gemm", "type": "gemm", "tactic": "sm80_xmma\t\x01"}],
        "1": [
            {"name": "scan", "type": "PluginV2", "tactic": "0x0"},
            {"name": "myelin", "type": "", "tactic": ""},
        ],
    }
    monkeypatch.setattr(engine_report, "layers", lambda path, backend: {"profiles": layers})
    path = with_engines / ENGINES["tensorrt"]
    assert json.loads(inspected(path, "--json").stdout)["profiles"] == layers
    shown = "layers of profile 1\n  scan  PluginV2  0x0\n  myelin\n"
    assert inspected(path).stdout.endswith(shown)


def test_an_engine_without_its_bundle(with_engines: Path, tmp_path: Path) -> None:
    name = ENGINES["tensorrt"]
    alone = Path(shutil.copyfile(with_engines / name, tmp_path / name))
    assert_refused(alone, f"{alone} tells nothing alone: there is no manifest.json beside it")
    other = Path(shutil.copyfile(with_engines / name, with_engines / "other.engine"))
    assert_refused(other, f"{other} is no engine of the bundle it lies in")


def test_an_engine_that_its_manifest_does_not_tell_of(bundle: Bundles, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle("mamba").path, tmp_path / "out")) / ENGINES["tensorrt"]
    path.write_bytes(b"x")
    assert_refused(path, f"{path} is no engine of the bundle it lies in")


DAMAGED_ENGINES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped": (edited(ENGINES["tensorrt"], flipped), "model.tensorrt.engine is not the file that was built"),
    "truncated": (edited(ENGINES["tensorrt"], lambda b: b[:-1]), "model.tensorrt.engine has 7 bytes"),
    "a fact is missing": (manifest(lambda m: m["engines"]["tensorrt"].pop("weights")), "the engine for tensorrt is"),
    "facts of another kind": (manifest(lambda m: m["engines"].update(tensorrt=[])), "the engine for tensorrt is"),
    "weights of another kind": (manifest(lambda m: m["engines"]["tensorrt"].update(weights=[3])), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGED_ENGINES)
def test_a_damaged_engine(with_engines: Path, damage: str) -> None:
    change, text = DAMAGED_ENGINES[damage]
    change(with_engines)
    for path in (with_engines, with_engines / ENGINES["tensorrt"]):
        assert_refused(path, text)


# --- an ONNX file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [PORTABLE, LOWERED])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_graph_of_a_bundle(bundle: Bundles, kind: str, graph: str) -> None:
    path = bundle(kind).path / graph
    facts = facts_of(path)
    model = onnx.load(path)
    assert facts["kind"] == "onnx"
    assert facts["ir_version"] == model.ir_version
    assert facts["opsets"] == {opset.domain: opset.version for opset in model.opset_import}
    assert sum(facts["nodes"].values()) == len(model.graph.node)
    scans = {"mamba": "mamba_deploy::MambaSelectiveScan", "mamba2": "mamba_deploy::MambaSsdScan"}
    assert facts["nodes"].get(scans[kind], 0) == (2 if graph == PORTABLE else 0)
    assert set(facts["functions"]) == {function.name for function in model.functions}
    assert facts["weight_bytes"] == sum(numpy_helper.to_array(t).nbytes for t in model.graph.initializer)
    declared = [(t["name"], t["dtype"], t["axes"]) for t in facts["contract"]]
    assert declared == [row(value) for value in [*model.graph.input, *model.graph.output]]
    text = text_of(path)
    assert text.startswith(f"onnx {path}\n")
    assert ["ai.onnx", str(facts["opsets"][""])] in lines_of(text)
    for name, count in facts["nodes"].items():
        assert [name, str(count)] in lines_of(text)


def test_a_graph_is_described_without_its_weights_file(bundle: Bundles, tmp_path: Path) -> None:
    source = bundle("mamba").path / PORTABLE
    alone = Path(shutil.copyfile(source, tmp_path / "alone.onnx"))
    assert {**facts_of(alone), "path": ""} == {**facts_of(source), "path": ""}


def test_somebody_elses_graph(tmp_path: Path) -> None:
    axes: list[Any] = ["rows", 3]
    x, y = (helper.make_tensor_value_info(name, TensorProto.DOUBLE, axes) for name in "xy")
    node = helper.make_node("Relu", ["x"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y])), tmp_path / "relu.onnx")
    facts = facts_of(tmp_path / "relu.onnx")
    assert facts["nodes"] == {"Relu": 1}
    assert facts["functions"] == []
    assert facts["weight_bytes"] == 0
    assert facts["contract"] == [
        {"name": "x", "direction": "in", "dtype": "float64", "axes": ["rows", 3]},
        {"name": "y", "direction": "out", "dtype": "float64", "axes": ["rows", 3]},
    ]


DAMAGED_GRAPHS: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"not a protocol buffer at all",
}


@pytest.mark.parametrize("damage", DAMAGED_GRAPHS)
def test_a_damaged_graph(bundle: Bundles, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(DAMAGED_GRAPHS[damage]((bundle("mamba").path / PORTABLE).read_bytes()))
    assert_refused(path, f"{path} cannot be read as ONNX")


# --- without the extras -------------------------------------------------------------------------------------------


def without(modules: list[str], path: Path) -> subprocess.CompletedProcess[str]:
    """The command in a fresh interpreter that cannot import these modules."""
    program = (
        f"import sys\nfor name in {modules}: sys.modules[name] = None\n"
        "from mamba_deploy.cli import main\nmain(['inspect', sys.argv[1], '--json'])\n"
    )
    return subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("what", "module"), [("checkpoint", "torch"), ("onnx", "onnx_ir")])
def test_a_missing_package_is_named(bundle: Bundles, what: str, module: str) -> None:
    exported = bundle("mamba")
    done = without([module], exported.checkpoint if what == "checkpoint" else exported.path / PORTABLE)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: the Python package '{module}' is needed to ")
    assert done.stderr.endswith("hint: pip install 'mamba-deploy[export]'\n")


def test_a_bundle_needs_neither_pytorch_nor_onnx(bundle: Bundles) -> None:
    done = without(["torch", "onnx", "onnx_ir", "onnxruntime", "transformers"], bundle("mamba").path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["kind"] == "bundle"
