"""TensorRT runs the plugins: a network of each operator alone against the float64 recurrence, the state in one buffer
and in two, eager and from a CUDA graph.

Needs tensorrt, pycuda and cuda-bindings, not torch: 8.6's Python is 3.10. The plugin library is what the runtime takes:
MAMBA_DEPLOY_PLUGIN's, else one that is built, for which headers must be found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import recurrence
from numpy.typing import NDArray

trt = pytest.importorskip("tensorrt", reason="needs TensorRT")
cuda = pytest.importorskip("pycuda.driver", reason="needs pycuda")
bindings = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
pytestmark = pytest.mark.gpu

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
Array = NDArray[Any]
Inputs = dict[str, Array]


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps what is wrong."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)


LOG = Log()


@pytest.fixture(scope="session")
def device() -> Iterator[Any]:
    try:
        cuda.init()
        context = cuda.Device(0).retain_primary_context()
    except cuda.Error as error:
        pytest.skip(f"needs a CUDA device: {error}")
    context.push()
    yield context
    context.pop()


@pytest.fixture(scope="session")
def registry(device: Any) -> Any:
    """TensorRT's registry with our plugins in it."""
    from mamba_deploy.runtime.trt import load

    load("tensorrt").load_plugins("library")  # once a process, whatever other tests did before
    return trt.get_plugin_registry()


# --- a network of one operator -----------------------------------------------------------------------------------


def build_engine(registry: Any, op: str, inputs: Inputs, outputs: list[str], attributes: dict[str, Any]) -> Any:
    """All sizes but batch and sequence are fixed; the profile goes from one token of one row to these inputs."""
    from mamba_deploy.plugins.rules import GIVEN_INPUTS, OPS

    given = sum(1 << i for i, tensor in enumerate(OPS[op].inputs) if tensor.name in inputs)
    values = {
        name: _value(v) for name, v in {**attributes, GIVEN_INPUTS: given}.items()
    }  # a field does not keep its own
    fields = trt.PluginFieldCollection([trt.PluginField(name, *value) for name, value in values.items()])
    builder = trt.Builder(LOG)
    explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", explicit)
    network = builder.create_network(1 << int(typed))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    if typed == explicit and any(array.dtype == F16 for array in inputs.values()):
        config.set_flag(trt.BuilderFlag.FP16)
    config.set_tactic_sources(0)
    tensors = []
    for name, array in inputs.items():
        dynamic = {"B": -1, "L": -1}
        axes = next(tensor for tensor in OPS[op].inputs if tensor.name == name).axes_of(array.ndim)
        shape = [dynamic.get(axis, size) for axis, size in zip(axes, array.shape, strict=True)]
        tensor = network.add_input(name, _type(array.dtype), shape)
        tensor.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)
        least = [1 if size < 0 else size for size in shape]
        profile.set_shape(name, least, array.shape, array.shape)
        tensors.append(tensor)
    config.add_optimization_profile(profile)
    if hasattr(network, "add_plugin_v3"):
        creator = registry.get_creator(op, "1", "")
        plugin = creator.create_plugin(op, fields, trt.TensorRTPhase.BUILD)
        layer = network.add_plugin_v3(tensors, [], plugin)
    else:
        creator = registry.get_plugin_creator(op, "1", "")
        layer = network.add_plugin_v2(tensors, creator.create_plugin(op, fields))
    for i, name in enumerate(outputs):
        out = layer.get_output(i)
        out.name = name
        network.mark_output(out)
        if typed == explicit:
            out.dtype = _type(inputs[name.removesuffix("_out") if i else "x"].dtype)
        out.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, LOG.errors
    engine = trt.Runtime(LOG).deserialize_cuda_engine(plan)
    assert engine is not None, LOG.errors
    return engine


def _type(dtype: np.dtype[Any]) -> Any:
    return {"float32": trt.float32, "float16": trt.float16, "int32": trt.int32}[dtype.name]


def _value(value: Any) -> tuple[Array, Any]:
    """Data and type of a field."""
    if isinstance(value, str):
        return np.frombuffer(value.encode() + b"\0", np.int8), trt.PluginFieldType.CHAR
    if isinstance(value, float):
        return np.array([value], np.float32), trt.PluginFieldType.FLOAT32
    return np.array([value], np.int32), trt.PluginFieldType.INT32


class Run:
    """An engine with buffers; outputs begin as NaN. With ``one_buffer`` the state goes out where it came in."""

    def __init__(self, engine: Any, inputs: Inputs, outputs: list[str], one_buffer: bool) -> None:
        self.context, self.stream, self.inputs = engine.create_execution_context(), cuda.Stream(), inputs
        self.memory = {name: cuda.mem_alloc(array.nbytes) for name, array in inputs.items()}
        self.outputs: Inputs = {}
        for name, array in inputs.items():
            self.context.set_input_shape(name, array.shape)
            self.context.set_tensor_address(name, int(self.memory[name]))
        for name in outputs:
            like = inputs[name.removesuffix("_out") if name != "y" else "x"]
            shape = tuple(self.context.get_tensor_shape(name))
            self.outputs[name] = np.full(shape, np.nan, like.dtype)
            shared = one_buffer and name.endswith("_out")
            self.memory[name] = self.memory[name[:-4]] if shared else cuda.mem_alloc(self.outputs[name].nbytes)
            self.context.set_tensor_address(name, int(self.memory[name]))

    def reset(self) -> None:
        for name, array in {**self.outputs, **self.inputs}.items():  # a shared buffer ends as the input
            cuda.memcpy_htod(self.memory[name], np.ascontiguousarray(array))

    def enqueue(self) -> None:
        assert self.context.execute_async_v3(self.stream.handle), LOG.errors

    def read(self) -> Inputs:
        self.stream.synchronize()
        found = {name: np.empty_like(array) for name, array in self.outputs.items()}
        for name, array in found.items():
            cuda.memcpy_dtoh(array, self.memory[name])
        return found

    def eager(self) -> Inputs:
        self.reset()
        self.enqueue()
        return self.read()

    def captured(self) -> Inputs:
        """From a CUDA graph; TensorRT wants an eager run before."""
        self.eager()
        mode = bindings.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _check(bindings.cudaStreamBeginCapture(self.stream.handle, mode))
        self.enqueue()
        (graph,) = _check(bindings.cudaStreamEndCapture(self.stream.handle))
        (executable,) = _check(bindings.cudaGraphInstantiate(graph, 0))
        self.reset()
        _check(bindings.cudaGraphLaunch(executable, self.stream.handle))
        return self.read()


def _check(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    assert answer[0] == bindings.cudaError_t.cudaSuccess, answer[0]
    return answer[1:]


# --- what is run -------------------------------------------------------------------------------------------------


class Case:
    """Random inputs of an operator, and what the recurrence makes of them."""

    def __init__(self, op: str, T: np.dtype[Any], S: np.dtype[Any], L: int, optional: bool) -> None:
        random = np.random.default_rng([len(op), L, optional])
        B, D, N, K, H, P, G = 3, 24, 16, 4, 4, 8, 2

        def normal(*shape: int, dtype: np.dtype[Any] = T) -> Array:
            return random.standard_normal(shape).astype(dtype)

        lengths = np.array([L, 0, max(L - 5, 1)], np.int32)
        self.op, self.attributes = op, {}
        self.outputs = ["y", "ssm_state_out"]
        if op == "MambaCausalConv1d":
            self.outputs[1] = "conv_state_out"
            values = [normal(B, L, D), normal(D, K), normal(D) if optional else None, normal(B, D, K - 1), lengths]
            self.attributes["activation"] = "silu" if optional else "none"
            y, state = recurrence.causal_conv1d(*values, self.attributes["activation"])
        elif op == "MambaSelectiveScan":
            A = -random.uniform(0.5, 4.0, (D, N)).astype(F32)
            values = [
                normal(B, L, D), normal(B, L, D), A, normal(B, L, N), normal(B, L, N),
                normal(D, dtype=F32) if optional else None, normal(B, L, D) if optional else None,
                normal(D, dtype=F32) if optional else None, normal(B, D, N, dtype=S), lengths,
            ]  # fmt: skip
            self.attributes["dt_softplus"] = 1
            y, state = recurrence.selective_scan(*values, True)
        elif op == "MambaSsdScan":
            A = -random.uniform(0.5, 4.0, H).astype(F32)
            skip = normal(H, P, dtype=F32) if L == 1 else normal(H, dtype=F32)
            values = [
                normal(B, L, H * P), normal(B, L, H), A, normal(B, L, G * N), normal(B, L, G * N),
                skip if optional else None, normal(H, dtype=F32) if optional else None,
                normal(B, H, P, N, dtype=S), lengths,
            ]  # fmt: skip
            self.attributes.update({"dt_softplus": 1, "dt_min": 0.05, "dt_max": 3.0, "n_groups": G, "chunk_size": 64})
            y, state = recurrence.ssd_scan(*values, True, 0.05, 3.0, G, 64)
        else:
            self.outputs = ["y"]
            values = [normal(B, L, D), lengths]
            y, state = recurrence.last_token(*values), None
        from mamba_deploy.plugins.rules import OPS

        names = (tensor.name for tensor in OPS[op].inputs)
        self.inputs: Inputs = {name: v for name, v in zip(names, values, strict=True) if v is not None}
        self.want = dict(zip(self.outputs, (y, state), strict=False))

    def check(self, got: Inputs) -> None:
        """float32 to 1e-5 of the largest value, float16 to some units of its last place: bounds of each value are
        held by the tests of the kernels; here a wrong binding would be off by as much as the values are.
        """
        for name, want in self.want.items():
            half = got[name].dtype == F16 or self.inputs["x"].dtype == F16
            tolerance = (8 * 2.0**-11 if half else 1e-5) * np.abs(want).max()
            np.testing.assert_allclose(got[name].astype(np.float64), want, rtol=0, atol=tolerance, err_msg=name)


DTYPES = [(F32, F32), (F16, F32), (F16, F16)]
CASES = [
    *((op, T, S, L, True) for op in ("MambaSelectiveScan", "MambaSsdScan") for T, S in DTYPES for L in (1, 70)),
    *((op, F32, F32, 70, False) for op in ("MambaSelectiveScan", "MambaSsdScan")),
    *(("MambaCausalConv1d", T, T, L, L == 1) for T in (F32, F16) for L in (1, 70)),
    *(("MambaLastToken", T, T, 70, True) for T in (F32, F16)),
]


@pytest.mark.parametrize(("op", "T", "S", "L", "optional"), CASES, ids=str)
def test_an_engine_of_one_operator_equals_the_recurrence(
    registry: Any, op: str, T: np.dtype[Any], S: np.dtype[Any], L: int, optional: bool
) -> None:
    case = Case(op, T, S, L, optional)
    engine = build_engine(registry, op, case.inputs, case.outputs, case.attributes)
    for one_buffer in (False, True):
        run = None  # a profile serves one context at a time
        run = Run(engine, case.inputs, case.outputs, one_buffer)
        eager = run.eager()
        case.check(eager)
        replayed = run.captured()
        for name, array in eager.items():
            assert array.tobytes() == replayed[name].tobytes(), f"{name} of a graph differs"
    assert not [error for error in LOG.errors if "mamba" in error]


def test_a_call_smaller_than_the_profile_allows(registry: Any) -> None:
    """One engine for both: a prompt is cut into parts of its own when rows are fewer."""
    large = Case("MambaSelectiveScan", F32, F32, 70, True)
    engine = build_engine(registry, large.op, large.inputs, large.outputs, large.attributes)
    rows, tokens = 1, 33
    inputs = {}
    for name, array in large.inputs.items():
        per_row = array.shape[0] == 3 and name not in ("A", "D", "dt_bias")
        cut = array[:rows] if per_row else array
        inputs[name] = np.ascontiguousarray(
            cut[:, :tokens] if per_row and cut.ndim == 3 and "state" not in name else cut
        )
    inputs["seq_lens"] = np.array([tokens], np.int32)
    y, state = recurrence.selective_scan(*(inputs[name] for name in large.inputs), True)
    got = Run(engine, inputs, large.outputs, one_buffer=True).eager()
    for name, want in (("y", y), ("ssm_state_out", state)):
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=name)
