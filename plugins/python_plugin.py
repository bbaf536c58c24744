"""The operators as TensorRT plugins written in Python, for TensorRT 10 and newer and TensorRT-RTX.

They need no header of TensorRT and no compiler: NVRTC compiles each kernel when it is first enqueued. The fields of an
engine are those of the C++ plugins. Python takes part in every enqueue: capture a CUDA graph where time counts.

    import tensorrt
    python_plugin.register(tensorrt)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from mamba_deploy.errors import PluginError
from mamba_deploy.plugins.kernels import Kernels, RuntimeKernels
from mamba_deploy.plugins.rules import GIVEN_INPUTS, OF_GRAPH, OPS, VERSION, Node

__all__ = ["creators", "register"]

_TYPESTRS = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int32": "<i4"}
_registered: dict[str, list[Any]] = {}  # the registry does not keep creators alive


def register(trt: ModuleType, kernels: Kernels | None = None) -> None:
    """Make the operators known to a TensorRT, once a process.

    Args:
        trt: The module: ``tensorrt``, 10.0 or newer, or ``tensorrt_rtx_bindings``.
        kernels: The kernels; :class:`kernels.RuntimeKernels` if None.

    Raises:
        PluginError: This TensorRT has no plugins in Python, or has such plugins already.
    """
    if trt.__name__ in _registered:
        return
    if not hasattr(trt, "IPluginV3"):
        raise PluginError(
            f"{trt.__name__} {trt.__version__} takes no plugins written in Python: 10.0 is the first that does",
            hint="load the C++ plugins instead: mamba-deploy plugin build",
        )
    made = creators(trt, kernels or RuntimeKernels())
    registry = trt.get_plugin_registry()
    for creator in made:
        if not registry.register_creator(creator, ""):
            raise PluginError(
                f"{trt.__name__} did not register the plugin {creator.name}",
                hint="a plugin of this name is there already: load either the C++ library or the Python plugins",
            )
    _registered[trt.__name__] = made


def creators(trt: ModuleType, kernels: Kernels) -> list[Any]:
    """A creator (``IPluginCreatorV3One``) for every operator."""
    dtypes = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.INT32: "int32",
    }

    def name_of(dtype: Any) -> str:
        return dtypes.get(dtype, "")

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[name-defined]
        def __init__(self, node: Node) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.node = node
            # Without any of these TensorRT aborts the process.
            self.plugin_name = node.op_type
            self.plugin_version = VERSION
            self.plugin_namespace = ""
            self.num_outputs = len(node.outputs)
            self.timing_cache_id = " ".join(str(value) for value in (node.op_type, *node.attributes.values()))

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.node)

        # --- build

        def get_output_data_types(self, inputs: Sequence[Any]) -> list[Any]:
            return self.node.output_dtypes(inputs)

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            known = [[dims[i] for i in range(len(dims))] for dims in inputs]
            shapes = self.node.output_shapes(known, lambda a, b: builder.operation(trt.DimensionOperation.PROD, a, b))
            return [_expressions(trt, shape) for shape in shapes]

        def supports_format_combination(self, position: int, tensors: Sequence[Any], n_inputs: int) -> bool:
            self.node.check_count(n_inputs)
            linear = tensors[position].desc.format == trt.TensorFormat.LINEAR
            return linear and self.node.supports(position, lambda i: name_of(tensors[i].desc.type))

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            self.node.sizes([tuple(tensor.desc.dims) for tensor in inputs])

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            largest = self.node.sizes([tuple(tensor.max) for tensor in inputs], agree=False)
            dtypes = _dtypes(self.node, [name_of(tensor.desc.type) for tensor in inputs])
            # Fewer rows may need more: then the kernels cut a prompt into more parts. Fewer tokens never do.
            batches = range(1, largest["batch"] + 1)
            return max(_workspace_bytes(kernels, self.node, {**largest, "batch": batch}, dtypes) for batch in batches)

        def get_valid_tactics(self) -> list[int]:
            return []

        # --- runtime

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            self.serialized = {
                name: _field(trt, value) for name, value in self.node.attributes.items()
            }  # fields only point
            fields = [trt.PluginField(name, *value) for name, value in self.serialized.items()]
            return trt.PluginFieldCollection(fields)

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            node = self.node
            names = [name_of(desc.type) for desc in input_desc]
            shapes = [tuple(desc.dims) for desc in input_desc]
            arrays = [_Array(*described) for described in zip(inputs, shapes, names, strict=True)]
            results = [
                _Array(pointer, tuple(desc.dims), name_of(desc.type))
                for pointer, desc in zip(outputs, output_desc, strict=True)
            ]
            attributes = {name: value for name, value in node.attributes.items() if name != GIVEN_INPUTS}
            if "dt_softplus" in attributes:
                attributes["dt_softplus"] = bool(attributes["dt_softplus"])
            of_call = _dtypes(node, names)
            needed = _workspace_bytes(kernels, node, node.sizes(shapes), of_call)
            values, options = node.by_slot(arrays), dict(zip(("y", "state_out"), results, strict=False))
            if node.op.layer_inputs:
                values, options = [], _with_layers(node, values, results)
                attributes = {name: value for name, value in attributes.items() if name not in OF_GRAPH}
            call = getattr(kernels, node.op.kernel)
            call(*values, **attributes, **options, **of_call, workspace=(workspace, needed), stream=stream)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[name-defined]
        def __init__(self, op_type: str) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = op_type
            self.plugin_version = VERSION
            self.plugin_namespace = ""
            names = (*OPS[op_type].attributes, GIVEN_INPUTS)
            self.empty = np.array([], dtype=np.int32)
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(name, self.empty, trt.PluginFieldType.UNKNOWN) for name in names]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            return Plugin(Node(self.name, {field.name: _value(field) for field in fields}))

    return [Creator(op_type) for op_type in OPS]


class _Array:
    """Memory on the device as ``kernels`` takes it; bfloat16 goes as 16-bit integers."""

    def __init__(self, pointer: int, shape: tuple[int, ...], dtype: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": _TYPESTRS[dtype],
            "data": (pointer, False),
            "version": 3,
        }


def _expressions(trt: ModuleType, elements: Sequence[Any]) -> Any:
    shape = trt.DimsExprs(len(elements))
    for i, element in enumerate(elements):
        shape[i] = element
    return shape


def _with_layers(node: Node, values: Sequence[Any], results: Sequence[Any]) -> dict[str, Any]:
    """Inputs and outputs of an operator with layers as ``Kernels`` takes them, by name."""
    op, inputs, outputs = node.op, iter(values), iter(results)
    own = {tensor.name: next(inputs) for tensor in op.inputs} | {tensor.name: next(outputs) for tensor in op.outputs}
    layers = [
        {tensor.name: next(inputs) for tensor in op.layer_inputs}
        | {tensor.name: next(outputs) for tensor in op.layer_outputs}
        for _ in range(node.attributes["layers"])
    ]
    return {**own, "layers": layers}


def _dtypes(node: Node, dtypes: Sequence[str]) -> dict[str, str]:
    """``dtype`` and, of an operator that has one, ``state_dtype``, as :class:`Kernels` takes them."""
    by_letter = dict(zip((tensor.dtype for tensor in node.inputs), dtypes, strict=True))
    names = {"T": "dtype", "S": "state_dtype"}
    return {names[letter]: dtype for letter, dtype in by_letter.items() if letter in names}


def _workspace_bytes(kernels: Kernels, node: Node, sizes: Mapping[str, Any], dtypes: Mapping[str, Any]) -> int:
    return kernels.workspace_bytes(node.op.kernel, **dtypes, **sizes)


def _field(trt: ModuleType, value: Any) -> tuple[Any, Any]:
    """Data and type of a field."""
    if isinstance(value, str):
        return np.frombuffer(value.encode() + b"\0", dtype=np.int8), trt.PluginFieldType.CHAR
    if isinstance(value, float):
        return np.array([value], dtype=np.float32), trt.PluginFieldType.FLOAT32
    return np.array([value], dtype=np.int32), trt.PluginFieldType.INT32


def _value(field: Any) -> Any:
    """The attribute in a field, as a number or a text."""
    data = field.data
    if isinstance(data, (str, bytes)) or field.type.name == "CHAR":
        text = data if isinstance(data, (str, bytes)) else np.asarray(data).tobytes()
        return (text.decode() if isinstance(text, bytes) else text).rstrip("\0")
    values = np.asarray(data).reshape(-1)
    if values.size != 1:
        raise PluginError(f"the attribute {field.name} has {values.size} values: expected one")
    return values[0].item()
