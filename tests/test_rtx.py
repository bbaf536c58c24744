"""TensorRT-RTX from PyPI takes the plugins, in C++ and in Python: both bundled checkpoints parse, and engines build,
without a GPU. None can run here.

Its wheels (the extra ``rtx``) are looked for in this Python, or in the one that MAMBA_DEPLOY_TEST_RTX_PYTHON names,
which needs onnx and numpy too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_model_graph import PUBLISHED
from test_plugin_cpp import NO_HEADERS, VERSIONS, build_plugin, compile_library

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("MAMBA_DEPLOY_TEST_RTX_PYTHON", sys.executable)
V3 = [path for path in VERSIONS if not path.name.lstrip("v").startswith("8")]
MODELS = ("tiny-mamba", "tiny-mamba2")
DTYPES = ("float32", "float16", "bfloat16")

# Reads what to do as JSON, writes what came of it: a process of its own, as the parser aborts where the library path of
# the process lacks TensorRT-RTX, and a registry is global.
PROGRAM = """
import ctypes, json, sys
import onnx
import tensorrt_rtx_bindings as trt
from mamba_deploy.plugins import kernels, python_plugin, rules

class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors = []
    def log(self, severity, message):
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)

asked, log, answer = json.loads(sys.argv[1]), Log(), {}
builder = trt.Builder(log)
registry = trt.get_plugin_registry()
if "load" in asked:
    assert registry.load_library(asked["load"])
if "open" in asked:
    ctypes.CDLL(asked["open"])
if "kernels" in asked:
    python_plugin.register(trt, kernels.Kernels(asked["kernels"]) if asked["kernels"] else None)
answer["plugins"] = sorted(c.name for c in registry.all_creators if c.name in rules.OPS)
if "model" in asked:
    model = onnx.load(asked["model"], load_external_data=False)
    rules.prepare_for_parser(model)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "activation":
                attribute.s = asked.get("activation", attribute.s.decode()).encode()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    answer["parsed"] = parser.parse(model.SerializeToString(), asked["model"])
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    answer["layers"] = sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
    describe = lambda tensor: [tensor.name, tensor.dtype.name, list(tensor.shape)]
    answer["inputs"] = [describe(network.get_input(i)) for i in range(network.num_inputs)]
    answer["outputs"] = [describe(network.get_output(i)) for i in range(network.num_outputs)]
    if answer["parsed"]:
        config = builder.create_builder_config()
        for batch, seq in asked["profiles"]:
            profile = builder.create_optimization_profile()
            for name, _, shape in answer["inputs"]:
                at = lambda b, s: [{0: b, 1: s}[i] if size < 0 else size for i, size in enumerate(shape)]
                profile.set_shape(name, at(1, 1), at(1, seq), at(batch, seq))
            assert config.add_optimization_profile(profile) >= 0
        engine = builder.build_serialized_network(network, config)
        answer["engine"] = engine.nbytes if engine else 0
answer["errors"] = log.errors
print(json.dumps(answer))
"""

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """``ask(load=..., model=..., profiles=...)``: what TensorRT-RTX answers, see PROGRAM."""
    find = "import os, onnxruntime_ep_nv_tensorrt_rtx as e, tensorrt_rtx_bindings; print(os.path.dirname(e.__file__))"
    found = subprocess.run([PYTHON, "-c", find], capture_output=True, text=True)
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1]
        pytest.skip(f"no TensorRT-RTX in {PYTHON} ({reason}): pip install 'mamba-deploy[rtx]'")
    packages = tmp_path_factory.mktemp("packages") / "mamba_deploy"
    packages.mkdir()
    for path in [*(ROOT / "mamba_deploy").glob("*.py"), ROOT / "exporters", ROOT / "plugins", ROOT / "runtime"]:
        (packages / path.name).symlink_to(path)
    environment = {**os.environ, "LD_LIBRARY_PATH": found.stdout.strip(), "PYTHONPATH": str(packages.parent)}

    def run(**asked: Any) -> dict[str, Any]:
        words = {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()}
        command = [PYTHON, "-c", PROGRAM, json.dumps(words)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=packages.parent, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}

    return run


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """The folder with the libraries compiled against these headers, over a stand-in for the kernels."""
    folders: dict[Path, Path] = {}

    def of(include: Path) -> Path:
        if include not in folders:
            folders[include] = tmp_path_factory.mktemp("plugin")
            compile_library(include, folders[include], "-DTRT_MAJOR_RTX=1")
        return folders[include]

    return of


@pytest.fixture(scope="session")
def newest(library: Callable[[Path], Path]) -> Path:
    if not V3:
        pytest.skip(NO_HEADERS)
    return library(max(V3, key=lambda path: [int(part) for part in path.name.lstrip("v").split(".")]))


@pytest.fixture(scope="session")
def sample(bundle: Callable[..., Any]) -> Callable[[str, str], Any]:
    """``sample(name, dtype)``: the bundle of a bundled checkpoint."""
    return lambda name, dtype: bundle(name, dtype=dtype).bundle


PROFILES = [[4, 1], [8, 2048]]  # largest batch and seq of decode and prompt


def check(answer: dict[str, Any], bundle: Any) -> None:
    """It parsed, every operator of ours became a plugin, and an engine was built for what the contract says."""
    assert answer["parsed"], answer["errors"]
    assert answer["engine"] > 100_000, answer["errors"]
    assert answer["layers"] == 2 * bundle.config.n_layer + 1
    names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}
    for found, specs in ((answer["inputs"], bundle.contract.inputs), (answer["outputs"], bundle.contract.outputs)):
        expected = [[s.name, names[s.dtype], [-1 if isinstance(a, str) else a for a in s.axes]] for s in specs]
        assert found == expected
    unrelated = "CUDA driver version is insufficient"  # there is no GPU
    assert [error for error in answer["errors"] if unrelated not in error] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_engines_build_with_the_cpp_plugins(ask, newest, sample, model, dtype):
    bundle = sample(model, dtype)
    answer = ask(load=newest / "libmamba_plugin.so", model=bundle.path / "model.onnx", profiles=PROFILES)
    check(answer, bundle)


@pytest.mark.parametrize("include", V3, ids=lambda path: path.name)
def test_a_library_of_any_headers_loads(ask, library, sample, include):
    """The interfaces of plugins are the same from 10.0 on."""
    bundle = sample("tiny-mamba2", "float32")
    load = library(include) / "libmamba_plugin.so"
    check(ask(load=load, model=bundle.path / "model.onnx", profiles=PROFILES), bundle)


@pytest.mark.parametrize(("model", "dtype"), [("tiny-mamba", "float16"), ("tiny-mamba2", "bfloat16")])
def test_engines_build_with_the_python_plugins(ask, sample, model, dtype):
    """With no library and no header: only what pip brings."""
    bundle = sample(model, dtype)
    check(ask(kernels="", model=bundle.path / "model.onnx", profiles=PROFILES), bundle)


@pytest.fixture(params=["load", "kernels"])
def plugins(request: pytest.FixtureRequest) -> dict[str, Any]:
    """For ``ask``: the plugins in C++, or in Python."""
    if request.param == "kernels":
        return {"kernels": ""}
    return {"load": request.getfixturevalue("newest") / "libmamba_plugin.so"}


@pytest.mark.parametrize("kind", ["mamba-untied-no-conv-bias", "mamba2-no-conv-bias"])
def test_optional_inputs_may_be_missing(ask, plugins, bundle, kind):
    exported = bundle(kind).bundle
    check(ask(model=exported.path / "model.onnx", profiles=PROFILES, **plugins), exported)


# --- the model as one operator --------------------------------------------------------------------------------------


def check_model(answer: dict[str, Any], config: Any, contract: Any, weights: int) -> None:
    """It parsed as one plugin of the contract's tensors, what may be pending and so many weights, and was built."""
    from mamba_deploy.contract import pending_specs
    from mamba_deploy.exporters.model_graph import pending_words

    assert answer["parsed"], answer["errors"]
    assert answer["layers"] == 1
    names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}
    pending = pending_specs(pending_words(config))
    inputs = [*contract.inputs, *pending[:1]]
    outputs = [*(spec for spec in contract.outputs if spec.role != "next_token"), *pending[1:]]
    assert len(answer["inputs"]) == len(inputs) + weights
    for found, specs in ((answer["inputs"], inputs), (answer["outputs"], outputs)):
        expected = [[s.name, names[s.dtype], [-1 if isinstance(a, str) else a for a in s.axes]] for s in specs]
        assert found[: len(expected)] == expected
    assert len(answer["outputs"]) == len(outputs)
    unrelated = "CUDA driver version is insufficient"  # there is no GPU
    assert [error for error in answer["errors"] if unrelated not in error] == []
    assert answer["engine"] > 1000


@pytest.mark.parametrize(("model", "dtype"), [("tiny-mamba", "bfloat16"), ("tiny-mamba2", "float32")])
def test_engines_of_the_model_as_one_operator(ask, plugins, sample, model, dtype, tmp_path):
    from mamba_deploy.exporters.engine_graph import model_parser_graph

    bundle = sample(model, dtype)
    graph = model_parser_graph(bundle.path / "model.onnx", bundle.config, bundle.contract)
    (tmp_path / "model.onnx").write_bytes(graph.content)
    answer = ask(model=tmp_path / "model.onnx", profiles=PROFILES, **plugins)
    check_model(answer, bundle.config, bundle.contract, len(graph.weights))


def file_of_weights(path: Path, config: Any, dtype: str) -> None:
    """An ONNX file that names the weights of a model, which lie nowhere: enough for the graph of one operator."""
    import math

    import onnx

    from mamba_deploy.exporters.functions import element_type
    from mamba_deploy.exporters.model_graph import _WEIGHTS
    from mamba_deploy.plugins.rules import OPS

    op = OPS["MambaModel" if config.generation == "mamba" else "Mamba2Model"]
    c, D = config, config.d_inner
    size = {"d": c.d_model, "C": c.conv_channels, "K": c.d_conv, "D": D, "N": c.d_state, "R": c.dt_rank, "H": c.n_heads}
    size |= {"E": c.dt_rank + 2 * c.d_state, "H*P": D, "V": c.vocab_size}
    size["M"] = 2 * D if c.generation == "mamba" else D + c.conv_channels + c.n_heads
    tensors = {"embedding.weight": op.inputs[2], "norm_f.weight": op.inputs[3]}
    for i in range(c.n_layer):
        for tensor in op.layer_inputs:
            if tensor.name in _WEIGHTS and not tensor.name.endswith("proj_bias"):
                tensors[f"layers.{i}.{_WEIGHTS[tensor.name]}"] = tensor
    model = onnx.helper.make_model(onnx.helper.make_graph([], "weights", [], []))
    for name, tensor in tensors.items():
        dims = [size[axis] for axis in tensor.axes]
        kind = dtype if tensor.dtype == "T" else tensor.dtype
        made = model.graph.initializer.add(name=name, dims=dims, data_type=element_type(kind), data_location=1)
        nbytes = math.prod(dims) * (4 if kind == "float32" else 2)
        for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", str(nbytes))):
            made.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("plugins", "name"),
    [("load", "mamba-2.8b"), ("load", "mamba2-2.7b"), ("kernels", "mamba-2.8b")],  # which has more inputs
    indirect=["plugins"],
)
def test_engines_of_64_layers(ask, plugins, tmp_path, name):
    """Hundreds of inputs and 129 or 130 outputs, of all of which TensorRT asks the plugin again and again."""
    from mamba_deploy.contract import Contract
    from mamba_deploy.exporters.engine_graph import model_parser_graph

    config = PUBLISHED[name]
    contract = Contract.of(config, dtype="float16")
    file_of_weights(tmp_path / "weights.onnx", config, "float16")
    graph = model_parser_graph(tmp_path / "weights.onnx", config, contract)
    (tmp_path / "model.onnx").write_bytes(graph.content)
    start = time.perf_counter()
    answer = ask(model=tmp_path / "model.onnx", profiles=PROFILES, **plugins)
    check_model(answer, config, contract, len(graph.weights))
    assert len(graph.weights) > 500
    assert time.perf_counter() - start < 120


def test_an_attribute_that_is_wrong_fails_the_parser_with_our_words(ask, plugins, sample):
    path = sample("tiny-mamba", "float32").path / "model.onnx"
    answer = ask(model=path, activation="gelu", **plugins)
    assert not answer["parsed"]
    said = " ".join(answer["errors"]) if "load" in plugins else answer["stderr"]  # Python's go past the log
    assert "MambaCausalConv1d: activation is 'gelu': expected 'silu' or 'none'" in said


def test_the_registering_library_registers_on_opening(ask, newest):
    """With the headers of a TensorRT whose registry is that of this TensorRT-RTX; 10's is another and would crash."""
    from mamba_deploy.plugins.rules import OPS

    plugins = sorted(OPS)
    assert ask(open=newest / "libmamba_plugin_register.so")["plugins"] == plugins
    assert ask()["plugins"] == []


def test_engines_build_over_the_real_kernels(ask, sample, request, monkeypatch):
    library = build_plugin(request, monkeypatch)  # which exports the kernels as well
    for model in MODELS:
        bundle = sample(model, "float16")
        for interface in ("load", "kernels"):
            check(ask(model=bundle.path / "model.onnx", profiles=PROFILES, **{interface: library}), bundle)
