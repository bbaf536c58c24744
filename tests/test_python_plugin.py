"""The plugins in Python against a stand-in for TensorRT's module, and their rules against the operators themselves.

What a real TensorRT makes of them is in ``test_rtx.py``.
"""

from __future__ import annotations

import enum
import math
import random
import types
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from mamba_deploy import step_ops  # which registers torch.ops.mamba_deploy
from mamba_deploy.errors import PluginError
from mamba_deploy.exporters.functions import DOMAIN, OP_ATTRIBUTES, input_names, register_schemas
from mamba_deploy.plugins import kernels as kernels_module
from mamba_deploy.plugins import python_plugin
from mamba_deploy.plugins.arguments import SIGNATURES
from mamba_deploy.plugins.rules import (
    FLOATS,
    GIVEN_INPUTS,
    OF_GRAPH,
    ONLY_DTYPE,
    ONLY_STATE_DTYPE,
    OPS,
    Node,
    prepare_for_parser,
)
from mamba_deploy.plugins.rules_step import PARTS
from mamba_deploy.plugins.structs import MambaLayer

# --- the rules ------------------------------------------------------------------------------------------------------


def test_rules_name_what_the_schemas_name():
    register_schemas()
    letters = {"float32": "F", "int32": "I"}
    for op_type, op in OPS.items():
        if op.layer_inputs:  # no exported graph has it
            assert not onnx.defs.has(op_type, DOMAIN)
            continue
        schema = onnx.defs.get_schema(op_type, 1, DOMAIN)
        optional = onnx.defs.OpSchema.FormalParameterOption.Optional
        assert [tensor.name for tensor in op.inputs] == input_names(op_type)
        for tensors, parameters in ((op.inputs, schema.inputs), (op.outputs, schema.outputs)):
            found = [(p.name, p.type_str, p.option == optional) for p in parameters]
            assert found == [(t.name, letters.get(t.dtype, t.dtype), t.optional) for t in tensors]
        assert [*op.attributes, "plugin_version", "plugin_namespace"] == list(OP_ATTRIBUTES[op_type])


def test_rules_follow_the_structs_of_the_kernels():
    for name, op in {**OPS, **PARTS}.items():
        struct = SIGNATURES[op.kernel].struct
        names = [field[0] for field in struct._fields_]
        tensors = [tensor.name for tensor in (*op.inputs, *op.outputs)]
        assert hasattr(kernels_module.Kernels, op.kernel)
        if not op.layer_inputs:
            assert struct.__name__ == name
            assert names[-len(tensors) :] == tensors
            assert list(op.sizes.values()) == names[: len(op.sizes)]
            continue
        assert [name for name in names if name in tensors] == tensors
        assert names[-1] == "each"
        assert set(op.sizes.values()) <= set(names)
        of_layer = [tensor.name for tensor in (*op.layer_inputs, *op.layer_outputs)]
        fields = [field[0] for field in MambaLayer._fields_]
        assert [field for field in fields if field in of_layer] == of_layer


def _call(op_type: str, seed: int) -> tuple[Node, list[torch.Tensor | None], tuple[torch.Tensor, ...]]:
    """A node, its inputs, and what the operator's reference makes of them."""
    draw = random.Random(seed)
    op = OPS[op_type]
    size = {symbol: draw.randint(1, 4) for symbol in "BLCDNPGdRV"} | {"K": draw.randint(2, 4)}
    size["H"] = size["G"] * draw.randint(1, 3)
    size |= {"H*P": size["H"] * size["P"], "G*N": size["G"] * size["N"], "K-1": size["K"] - 1}
    if op_type == "MambaModel":
        size |= {"L": 1, "C": size["D"], "M": 2 * size["D"], "E": size["R"] + 2 * size["N"]}
    if op_type == "Mamba2Model":
        size |= {"L": 1, "C": size["H*P"] + 2 * size["G*N"], "Q": draw.randint(1, 4)}
        size["M"] = size["H*P"] + size["C"] + size["H"]
    kinds = {"T": draw.choice(FLOATS), "S": draw.choice(FLOATS)}
    attributes = dict(op.attributes)
    if "n_groups" in attributes:
        attributes["n_groups"] = size["G"]
    if op.layer_inputs:
        attributes |= {"layers": draw.randint(1, 3), "all_logits": draw.randint(0, 1)}
    axes = [t.other_axes if t.other_axes and draw.random() < 0.5 else t.axes for t in op.pattern]
    there = [not tensor.optional or draw.random() < 0.5 for tensor in op.pattern]

    def value(i: int) -> torch.Tensor | None:
        dtype = getattr(torch, kinds.get(op.pattern[i].dtype, op.pattern[i].dtype))
        return torch.zeros([size[axis] for axis in axes[i]], dtype=dtype) if there[i] else None

    first = len(op.inputs)
    values = [value(i) for i in range(first)]
    values += [value(i) for _ in range(attributes.get("layers", 0)) for i in range(first, len(op.pattern))]
    node = Node(op_type, {**attributes, GIVEN_INPUTS: sum(1 << i for i, given in enumerate(there) if given)})
    if op.layer_inputs:
        return node, values, model_outputs(node, values)
    outputs = getattr(torch.ops.mamba_deploy, op.kernel)(*values, *attributes.values())
    return node, values, outputs if isinstance(outputs, tuple) else (outputs,)


def model_outputs(node: Node, values: list[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    """What the reference makes of a node of a whole model, in the order of its outputs."""
    slots, attributes = iter(values), node.attributes
    own = [next(slots) for _ in node.op.inputs]
    layers = [{tensor.name: next(slots) for tensor in node.op.layer_inputs} for _ in range(attributes["layers"])]
    given = {name: attributes[name] for name in node.op.attributes if name not in OF_GRAPH}
    before, pending = own[:5], own[5:]  # nothing, before and after
    logits, states = step_ops.model(*before, layers, **given)
    logits = logits[:, None] if attributes["all_logits"] else logits
    return (logits, *pending, *(state for pair in states for state in pair))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("op_type", OPS)
def test_rules_say_what_the_operators_do(op_type, seed):
    node, values, outputs = _call(op_type, seed)
    given = [value for value in values if value is not None]
    shapes = [list(value.shape) for value in given]
    dtypes = [str(value.dtype).removeprefix("torch.") for value in given]
    assert node.output_shapes(shapes) == [list(output.shape) for output in outputs]
    results = [str(output.dtype).removeprefix("torch.") for output in outputs]
    assert node.output_dtypes(dtypes) == results
    assert all(node.supports(i, (dtypes + results).__getitem__) for i in range(len(dtypes + results)))
    layers = {"layers"} if node.op.layer_inputs else set()
    assert set(node.sizes(shapes)) == set(node.op.sizes.values()) | layers
    slots = node.by_slot(given)
    assert all(slot is value for slot, value in zip(slots, values, strict=True))


def test_a_float32_state_beside_half_activations_may_stay():
    types = ["float16", "float16", "float32", "float16", "float16", "float32", "float32", "float32", "int32"]
    node = Node("MambaSsdScan")
    assert all(node.supports(i, [*types, "float16", "float32"].__getitem__) for i in range(11))
    assert not node.supports(10, [*types, "float16", "float16"].__getitem__)  # the state leaves as it came
    assert not node.supports(9, [*types, "float32"].__getitem__)


@pytest.mark.parametrize("op_type", ["MambaModel", "Mamba2Model"])
def test_a_model_may_say_its_dtypes(op_type):
    """For who chooses among what an operator takes, and chooses badly."""
    letters = {"T": "float16", "S": "float32"}
    node = Node(op_type, {"layers": 2, ONLY_DTYPE: 1, ONLY_STATE_DTYPE: 0})
    types = [letters.get(tensor.dtype, tensor.dtype) for tensor in node.inputs + node.outputs]
    assert all(node.supports(i, types.__getitem__) for i in range(len(types)))
    for letter, other in (("T", "float32"), ("T", "bfloat16"), ("S", "float16")):
        changed = [{**letters, letter: other}.get(tensor.dtype, tensor.dtype) for tensor in node.inputs + node.outputs]
        first = next(i for i, tensor in enumerate(node.inputs) if tensor.dtype == letter)
        assert not node.supports(first, changed.__getitem__)


def test_sizes_that_contradict_are_refused():
    node = Node("MambaLastToken")
    with pytest.raises(PluginError, match="MambaLastToken: B of seq_lens is 3: expected 2"):
        node.sizes([[2, 5, 8], [3]])
    assert node.sizes([[2, 5, 8], [3]], agree=False) == {"batch": 3, "length": 5, "width": 8}
    with pytest.raises(PluginError, match="x has 2 axes: expected 3"):
        node.sizes([[2, 5], [2]])
    with pytest.raises(PluginError, match="has 1 inputs: expected 2"):
        node.sizes([[2, 5, 8]])


def test_sizes_not_known_yet_pass():
    assert Node("MambaLastToken").sizes([[-1, -1, 8], [-1]]) == {"width": 8}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"x": [2, 3, 7]}, r"H\*P of x is 7: expected 8"),
        ({"B": [2, 3, 5]}, r"G\*N of B is 5: expected 10"),
        ({"ssm_state": [2, 2, 4, 6]}, r"G\*N of B is 10: expected 12"),
        ({"D": [2, 3]}, r"P of ssm_state is 4: expected 3"),
    ],
)
def test_products_of_sizes_are_checked(shapes, words):
    right = {
        "x": [2, 3, 8], "dt": [2, 3, 2], "A": [2], "B": [2, 3, 10], "C": [2, 3, 10], "D": [2], "dt_bias": [2],
        "ssm_state": [2, 2, 4, 5], "seq_lens": [2],
    }  # fmt: skip
    node = Node("MambaSsdScan", {"n_groups": 2})
    assert node.sizes(list(right.values()))["heads"] == 2
    with pytest.raises(PluginError, match=words):
        node.sizes(list({**right, **shapes}.values()))


def test_groups_must_divide_the_heads():
    shapes = [[1, 1, 3], [1, 1, 3], [3], [1, 1, 2], [1, 1, 2], [3], [3], [1, 3, 1, 1], [1]]
    with pytest.raises(PluginError, match="n_groups is 2: expected a divisor of the 3 heads"):
        Node("MambaSsdScan", {"n_groups": 2}).sizes(shapes)


# --- the model for the parser -----------------------------------------------------------------------------------------


def _model() -> onnx.ModelProto:
    return onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18, "mamba_deploy" : 1, "theirs" : 1]>
        g (float[b, s, 4] x, float[b, 4, 3] state, int32[b] lens) => (float[b, s, 4] y) <float[4, 4] w> {
            c, next = mamba_deploy.MambaCausalConv1d <activation: string = "silu"> (x, w, , state, lens)
            y = theirs.Keep (c, , lens)
        }
        <domain: "mamba_deploy", opset_import: ["" : 18]>
        MambaCausalConv1d <activation> (x, weight, bias, conv_state, seq_lens) => (y, conv_state_out) {
            y = Identity (x)
            conv_state_out = Identity (conv_state)
        }
        <domain: "theirs", opset_import: ["" : 18]>
        Keep (a, b, c) => (d) { d = Identity (a) }"""
    )


def test_prepared_models_have_neither_bodies_nor_empty_inputs_of_ours():
    model = _model()
    prepare_for_parser(model)
    conv, keep = model.graph.node
    assert list(conv.input) == ["x", "w", "state", "lens"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in conv.attribute}
    assert attributes == {"activation": b"silu", GIVEN_INPUTS: 0b11011}
    assert Node("MambaCausalConv1d", {GIVEN_INPUTS: attributes[GIVEN_INPUTS]}).by_slot("xwsl")[2] is None
    assert list(keep.input) == ["c", "", "lens"]
    assert [function.domain for function in model.functions] == ["theirs"]


def test_preparing_twice_changes_nothing():
    model = _model()
    prepare_for_parser(model)
    once = model.SerializeToString()
    prepare_for_parser(model)
    assert model.SerializeToString() == once


# --- the plugins ------------------------------------------------------------------------------------------------------


class FakeTensorRT(types.ModuleType):
    """What python_plugin asks of a TensorRT module; its enums and classes have the real names."""

    DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT8 INT32")
    TensorFormat = enum.Enum("TensorFormat", "LINEAR CHW2")
    PluginFieldType = enum.Enum("PluginFieldType", "FLOAT32 INT32 CHAR UNKNOWN")
    PluginFieldCollection = list
    __version__ = "10.0"

    class IPluginV3: ...

    class IPluginV3OneCore: ...

    class IPluginV3OneBuild: ...

    class IPluginV3OneRuntime: ...

    class IPluginCreatorV3One: ...

    class PluginField:
        def __init__(self, name: str, data: Any, type: Any) -> None:
            self.name, self.data, self.type = name, data, type

    class DimsExprs(list):
        def __init__(self, size: int) -> None:
            super().__init__([None] * size)

    def __init__(self, taken: tuple[str, ...] = ()) -> None:
        super().__init__(f"fake_tensorrt_{id(self)}")
        self.creators: dict[str, Any] = {}
        self.taken = taken

    def get_plugin_registry(self) -> Any:
        return self

    def register_creator(self, creator: Any, namespace: str) -> bool:
        assert namespace == creator.plugin_namespace == ""
        self.creators[creator.name] = creator
        return creator.name not in self.taken

    def desc(self, dtype: str, shape: Any = (), largest: Any = (), linear: bool = True) -> Any:
        names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32", "int8": "INT8"}
        layout = self.TensorFormat.LINEAR if linear else self.TensorFormat.CHW2
        plain = types.SimpleNamespace(type=self.DataType[names[dtype]], dims=shape, format=layout)
        return types.SimpleNamespace(desc=plain, max=largest, type=plain.type, dims=shape)


class Recorder:
    """In place of ``Kernels``: keeps what was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append((name, args, options))

    def workspace_bytes(self, op: str, **sizes: Any) -> int:
        self.calls.append(("workspace_bytes", (op,), sizes))
        return 256 * min(sizes["length"], 12 // sizes["batch"])  # most at batch 1


@pytest.fixture
def trt() -> FakeTensorRT:
    return FakeTensorRT()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def make(trt: FakeTensorRT, recorder: Recorder) -> Any:
    """``make(op_type, **attributes)``: a plugin, through a creator's fields."""
    python_plugin.register(trt, recorder)

    def plugin(op_type: str, **attributes: Any) -> Any:
        fields = [trt.PluginField(name, *python_plugin._field(trt, value)) for name, value in attributes.items()]
        return trt.creators[op_type].create_plugin("node", fields, None)

    return plugin


def test_every_operator_is_registered_and_names_its_attributes(trt, recorder):
    python_plugin.register(trt, recorder)
    assert list(trt.creators) == list(OPS)
    for op_type, creator in trt.creators.items():
        assert [field.name for field in creator.field_names] == [*OPS[op_type].attributes, GIVEN_INPUTS]
        assert (creator.plugin_version, creator.plugin_namespace) == ("1", "")


def test_registering_again_does_nothing(trt, recorder):
    python_plugin.register(trt, recorder)
    before = dict(trt.creators)
    python_plugin.register(trt, recorder)
    assert trt.creators == before


def test_a_registry_with_the_plugins_already_is_reported(recorder):
    with pytest.raises(PluginError, match="did not register the plugin MambaSsdScan") as caught:
        python_plugin.register(FakeTensorRT(taken=("MambaSsdScan",)), recorder)
    assert "either the C++ library or the Python plugins" in caught.value.hint


def test_a_tensorrt_without_python_plugins_is_reported(recorder):
    old = types.ModuleType("tensorrt")
    old.__version__ = "8.6.1"  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match=r"tensorrt 8.6.1 takes no plugins written in Python: 10.0 is the first"):
        python_plugin.register(old, recorder)


def test_plugins_have_every_attribute_tensorrt_asks_for(make):
    """Without one of them a real TensorRT aborts the process."""
    plugin = make("MambaLastToken")
    assert (plugin.plugin_name, plugin.plugin_version, plugin.plugin_namespace) == ("MambaLastToken", "1", "")
    assert plugin.num_outputs == 1
    assert plugin.get_capability_interface(None) is plugin
    assert make("MambaSsdScan", dt_max=0.5).timing_cache_id != make("MambaSsdScan").timing_cache_id


def test_attributes_survive_serialization_and_cloning(trt, make):
    given = {"dt_softplus": 0, "dt_min": 0.25, "dt_max": math.inf, "n_groups": 4, "chunk_size": 64, GIVEN_INPUTS: 0x1DF}
    plugin = make("MambaSsdScan", **given)
    assert plugin.node.attributes == given
    again = trt.creators["MambaSsdScan"].create_plugin("node", plugin.get_fields_to_serialize(), None)
    assert again.clone().attach_to_context(None).node.attributes == given
    types_of = {field.name: field.type.name for field in plugin.get_fields_to_serialize()}
    assert types_of == {name: "FLOAT32" if name in ("dt_min", "dt_max") else "INT32" for name in given}
    (text, _) = make("MambaCausalConv1d", activation="none").get_fields_to_serialize()
    assert (text.type.name, text.data.tobytes()) == ("CHAR", b"none\0")


@pytest.mark.parametrize("data", ["none", b"none", b"none\0", np.frombuffer(b"none\0", np.int8)])
def test_text_is_read_in_the_forms_bindings_give_it(trt, make, data):
    make("MambaCausalConv1d")
    field = trt.PluginField("activation", data, trt.PluginFieldType.CHAR)
    plugin = trt.creators["MambaCausalConv1d"].create_plugin("node", [field], None)
    assert plugin.node.attributes["activation"] == "none"


def test_an_attribute_of_several_values_is_refused(trt, make):
    make("MambaSsdScan")
    field = trt.PluginField("n_groups", np.array([1, 2], np.int32), trt.PluginFieldType.INT32)
    with pytest.raises(PluginError, match="the attribute n_groups has 2 values: expected one"):
        trt.creators["MambaSsdScan"].create_plugin("node", [field], None)


def test_shapes_and_dtypes_come_from_the_rules(trt, make):
    plugin = make("MambaLastToken")
    dims = [["b", "l", "d"], ["b"]]
    assert plugin.get_output_shapes(dims, [], None) == [["b", "d"]]
    half, integer = trt.DataType.HALF, trt.DataType.INT32
    assert plugin.get_output_data_types([half, integer]) == [half]
    tensors = [trt.desc("bfloat16"), trt.desc("int32"), trt.desc("bfloat16")]
    assert [plugin.supports_format_combination(i, tensors, 2) for i in range(3)] == [True, True, True]
    wrong = [trt.desc("int8"), trt.desc("float32"), trt.desc("float16")]
    assert [plugin.supports_format_combination(i, wrong, 2) for i in range(3)] == [False, False, False]
    packed = [trt.desc("float16", linear=False), trt.desc("int32")]
    assert not plugin.supports_format_combination(0, packed, 2)


def test_configuring_refuses_shapes_that_contradict(trt, make):
    plugin = make("MambaLastToken")
    plugin.configure_plugin([trt.desc("float32", (-1, -1, 8)), trt.desc("int32", (-1,))], [])
    with pytest.raises(PluginError, match="B of seq_lens is 3: expected 2"):
        plugin.configure_plugin([trt.desc("float32", (2, -1, 8)), trt.desc("int32", (3,))], [])


def test_workspace_suits_every_batch_up_to_the_largest(trt, make, recorder):
    plugin = make("MambaLastToken")
    inputs = [trt.desc("float16", (-1, -1, 8), (6, 9, 8)), trt.desc("int32", (-1,), (6,))]
    assert plugin.get_workspace_size(inputs, []) == 256 * 9
    assert {call[2]["batch"] for call in recorder.calls} == set(range(1, 7))
    assert recorder.calls[0][2]["dtype"] == "float16"


def test_a_call_reaches_the_kernels_with_every_argument_in_place(trt, make, recorder):
    given = 0b1101111111  # all but z
    plugin = make("MambaSelectiveScan", dt_softplus=0, given_inputs=given & ~(1 << 6))
    shapes = [(2, 5, 8), (2, 5, 8), (8, 4), (2, 5, 4), (2, 5, 4), (8,), (2, 8, 4), (2,)]
    dtypes = ["bfloat16", "bfloat16", "float32", "bfloat16", "bfloat16", "float32", "float16", "int32"]
    inputs = [trt.desc(dtype, shape) for dtype, shape in zip(dtypes, shapes, strict=True)]
    outputs = [trt.desc("bfloat16", (2, 5, 8)), trt.desc("float16", (2, 8, 4))]
    plugin.enqueue(inputs, outputs, range(256, 256 * 9, 256), [4096, 8192], 1 << 20, 77)
    name, args, options = recorder.calls[-1]
    assert name == "selective_scan"
    found = [None if a is None else a.__cuda_array_interface__ for a in args]
    assert [None if a is None else (a["data"], a["shape"]) for a in found] == [
        ((256, False), (2, 5, 8)),
        ((512, False), (2, 5, 8)),
        ((768, False), (8, 4)),
        ((1024, False), (2, 5, 4)),
        ((1280, False), (2, 5, 4)),
        ((1536, False), (8,)),
        None,
        None,
        ((1792, False), (2, 8, 4)),
        ((2048, False), (2,)),
    ]
    assert [a["typestr"] for a in found if a] == ["<u2", "<u2", "<f4", "<u2", "<u2", "<f4", "<f2", "<i4"]
    assert options["y"].__cuda_array_interface__["data"] == (4096, False)
    assert options["state_out"].__cuda_array_interface__["data"] == (8192, False)
    rest = {name: value for name, value in options.items() if name not in ("y", "state_out")}
    assert rest == {
        "dt_softplus": False,
        "dtype": "bfloat16",
        "state_dtype": "float16",
        "workspace": (1 << 20, 256 * 5),
        "stream": 77,
    }


class Library:
    """In place of the shared library under ``Kernels``: says yes to every call and keeps it."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, Any, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        def function(call: Any, *rest: Any) -> int:
            if not rest:
                return 512
            self.launched.append((name, call._obj, *rest))
            if name == "mamba_model":  # whose layers are there as long as it runs
                each = (MambaLayer * call._obj.layers).from_address(call._obj.each)
                self.layers = list(type(each).from_buffer_copy(each))
            return 0

        return function


@pytest.mark.parametrize("op_type", OPS)
def test_what_enqueue_gives_the_kernels_accept(trt, op_type):
    """Over the real ``Kernels``, whose checks of names, dtypes, shapes and overlaps all pass."""
    kernels = object.__new__(kernels_module.Kernels)
    kernels._library = library = Library()
    python_plugin.register(trt, kernels)
    for seed in range(10):
        node, values, outputs = _call(op_type, seed)
        fields = [trt.PluginField(n, *python_plugin._field(trt, v)) for n, v in node.attributes.items()]
        plugin = trt.creators[op_type].create_plugin("node", fields, None)
        given = [value for value in values if value is not None]
        descs = [trt.desc(str(v.dtype).removeprefix("torch."), tuple(v.shape)) for v in (*given, *outputs)]
        pointers = [(i + 1) << 20 for i in range(len(descs))]
        n = len(given)
        plugin.enqueue(descs[:n], descs[n:], pointers[:n], pointers[n:], 1 << 30, 5)
        name, struct, workspace, stream = library.launched[-1]
        assert (name, workspace, stream) == (f"mamba_{node.op.kernel}", 1 << 30, 5)
        inputs, results = iter(node.by_slot(pointers[:n])), iter(pointers[n:])
        expected = {tensor.name: next(inputs) for tensor in node.op.inputs}
        expected |= {tensor.name: next(results) for tensor in node.op.outputs}
        if node.op.layer_inputs:
            expected["head"] = expected["head"] or expected["embedding"]
        assert {name: getattr(struct, name) for name in expected} == expected
        for i in range(node.attributes.get("layers", 0)):
            expected = {tensor.name: next(inputs) for tensor in node.op.layer_inputs}
            expected |= {tensor.name: next(results) for tensor in node.op.layer_outputs}
            assert {name: getattr(library.layers[i], name) for name in expected} == expected
        assert not [*inputs, *results]
        sizes = node.sizes([v.shape for v in given])
        assert {size: getattr(struct, size) for size in sizes} == sizes
