"""The rules of the plugins in Python: what each operator takes and gives, its attributes, shapes and dtypes.

``plugin_common.h`` has the same for C++; a test compares the two. Shapes here are lists of sizes, -1 where one is not
known yet, and dtypes are names: ``float32``, ``float16``, ``bfloat16``, ``int32``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeVar

from mamba_deploy.errors import PluginError

__all__ = [
    "DOMAIN",
    "FLOATS",
    "GIVEN_INPUTS",
    "MAX_LAYERS",
    "OF_GRAPH",
    "ONLY_DTYPE",
    "ONLY_STATE_DTYPE",
    "OPS",
    "VERSION",
    "Node",
    "Op",
    "Tensor",
    "parse_tensors",
    "prepare_for_parser",
]

DOMAIN = "mamba_deploy"
VERSION = "1"
FLOATS = ("float32", "float16", "bfloat16")
# An attribute: bit i is set where input i of the operator is there. Bits of a layer's inputs come after the others' and
# stand for every layer.
GIVEN_INPUTS = "given_inputs"
MAX_LAYERS = 127  # TensorRT ends the process at more than 256 outputs
ONLY_DTYPE, ONLY_STATE_DTYPE = "only_dtype", "only_state_dtype"  # attributes: places in FLOATS; -1: any
_ONLY = {ONLY_DTYPE: -1, ONLY_STATE_DTYPE: -1}
OF_GRAPH = ("layers", "all_logits", *_ONLY)  # attributes that the shapes and dtypes of a call say too
_INT32_MAX = 2**31 - 1
_Element = TypeVar("_Element")


class Tensor(NamedTuple):
    """An input or output. Axes are symbols, ``H*P`` or ``K-1``; dtype T is that of activations, S that of the state."""

    name: str
    dtype: str
    axes: tuple[str, ...]
    optional: bool = False
    other_axes: tuple[str, ...] = ()  # also allowed; of an output, its axes where all_logits is set

    def axes_of(self, rank: int) -> tuple[str, ...]:
        """Its axes where it has so many.

        Raises:
            PluginError: It may not have so many.
        """
        for axes in (self.axes, self.other_axes):
            if axes and len(axes) == rank:
                return axes
        raise PluginError(f"{self.name} has {rank} axes: expected {len(self.axes)}")


class Op(NamedTuple):
    """An operator of the domain ``mamba_deploy``."""

    kernel: str  # its name in kernels.Kernels
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: Mapping[str, Any]  # and their defaults
    sizes: Mapping[str, str]  # what the kernel calls a symbol
    layer_inputs: tuple[Tensor, ...] = ()  # which come again for every layer, after the others
    layer_outputs: tuple[Tensor, ...] = ()

    @property
    def pattern(self) -> tuple[Tensor, ...]:
        """The inputs, those of a layer once."""
        return self.inputs + self.layer_inputs


def parse_tensors(text: str) -> tuple[Tensor, ...]:
    """From ``name:dtype:axes`` and ``name?:dtype:axes|other,axes``."""
    found = []
    for field in text.split():
        name, dtype, shapes = field.split(":")
        axes, _, other = shapes.partition("|")
        other_axes = tuple(other.split(",")) if other else ()
        found.append(Tensor(name.removesuffix("?"), dtype, tuple(axes.split(",")), name.endswith("?"), other_axes))
    return tuple(found)


_MODEL_INPUTS = "input_ids:int32:B,L seq_lens:int32:B embedding:T:V,d norm_weight:float32:d head?:T:V,d"
_MODEL_SIZES = {
    "B": "batch",
    "L": "length",
    "d": "width",
    "M": "outputs",
    "C": "channels",
    "K": "conv_width",
    "N": "state_size",
    "V": "vocab",
}
_BEFORE_SCAN = (
    "norm_weight:float32:d in_proj:T:d,M in_proj_bias?:T:M conv_weight:T:C,K conv_bias?:T:C conv_state:T:B,C,K-1"
)

OPS: Mapping[str, Op] = {
    "MambaCausalConv1d": Op(
        "causal_conv1d",
        parse_tensors("x:T:B,L,C weight:T:C,K bias?:T:C conv_state:T:B,C,K-1 seq_lens:int32:B"),
        parse_tensors("y:T:B,L,C conv_state_out:T:B,C,K-1"),
        {"activation": "silu"},
        {"B": "batch", "L": "length", "C": "channels", "K": "width"},
    ),
    "MambaSelectiveScan": Op(
        "selective_scan",
        parse_tensors(
            "x:T:B,L,D dt:T:B,L,D A:float32:D,N B:T:B,L,N C:T:B,L,N D?:float32:D z?:T:B,L,D dt_bias?:float32:D "
            "ssm_state:S:B,D,N seq_lens:int32:B"
        ),
        parse_tensors("y:T:B,L,D ssm_state_out:S:B,D,N"),
        {"dt_softplus": 1},
        {"B": "batch", "L": "length", "D": "channels", "N": "state_size"},
    ),
    "MambaSsdScan": Op(
        "ssd_scan",
        parse_tensors(
            "x:T:B,L,H*P dt:T:B,L,H A:float32:H B:T:B,L,G*N C:T:B,L,G*N D?:float32:H|H,P dt_bias?:float32:H "
            "ssm_state:S:B,H,P,N seq_lens:int32:B"
        ),
        parse_tensors("y:T:B,L,H*P ssm_state_out:S:B,H,P,N"),
        {"dt_softplus": 1, "dt_min": 0.0, "dt_max": math.inf, "n_groups": 1, "chunk_size": 256},
        {"B": "batch", "L": "length", "H": "heads", "P": "head_dim", "N": "state_size", "G": "groups"},
    ),
    "MambaLastToken": Op(
        "last_token",
        parse_tensors("x:T:B,L,d seq_lens:int32:B"),
        parse_tensors("y:T:B,d"),
        {},
        {"B": "batch", "L": "length", "d": "width"},
    ),
    # Of whole models; no ONNX file has them, the engine builder makes them.
    "MambaModel": Op(
        "model",
        parse_tensors(_MODEL_INPUTS),
        parse_tensors("logits:float32:B,V|B,L,V"),
        {"layers": 1, "eps": 1e-5, "norm_eps": -1.0, "all_logits": 0, **_ONLY},
        {**_MODEL_SIZES, "D": "inner", "R": "rank"},
        parse_tensors(
            f"{_BEFORE_SCAN} x_proj:T:D,E dt_proj:T:R,D A:float32:D,N D?:float32:D dt_bias?:float32:D "
            "ssm_state:S:B,D,N out_proj:T:D,d out_proj_bias?:T:d"
        ),
        parse_tensors("conv_state_out:T:B,C,K-1 ssm_state_out:S:B,D,N"),
    ),
    "Mamba2Model": Op(
        "model",
        parse_tensors(f"{_MODEL_INPUTS} pending:float32:B,Q"),
        parse_tensors("logits:float32:B,V|B,L,V pending_out:float32:B,Q"),
        {"layers": 1, "eps": 1e-5, "dt_min": 0.0, "dt_max": math.inf, "n_groups": 1, "all_logits": 0, **_ONLY},
        {**_MODEL_SIZES, "H": "heads", "P": "head_dim", "G": "groups", "Q": "pending_row"},
        parse_tensors(
            f"{_BEFORE_SCAN} A:float32:H D?:float32:H|H,P dt_bias?:float32:H ssm_state:S:B,H,P,N "
            "gate_norm?:float32:H*P out_proj:T:H*P,d out_proj_bias?:T:d"
        ),
        parse_tensors("conv_state_out:T:B,C,K-1 ssm_state_out:S:B,H,P,N"),
    ),
}
_RANGES = {
    "dt_softplus": (0, 1),
    "n_groups": (1, _INT32_MAX),
    "chunk_size": (1, _INT32_MAX),
    "layers": (1, MAX_LAYERS),
    "all_logits": (0, 1),
    **dict.fromkeys(_ONLY, (-1, len(FLOATS) - 1)),
}


class Node:
    """An operator with its attributes, and so with the inputs that are there.

    Args:
        op_type: A key of :data:`OPS`.
        attributes: Those left out have their defaults; all inputs are there unless ``given_inputs`` says else.

    Raises:
        PluginError: An attribute is unknown or out of range.
    """

    def __init__(self, op_type: str, attributes: Mapping[str, Any] | None = None) -> None:
        self.op_type, self.op = op_type, OPS[op_type]
        every = (1 << len(self.op.pattern)) - 1
        self.attributes: dict[str, Any] = {**self.op.attributes, GIVEN_INPUTS: every, **(attributes or {})}
        self._check_attributes(every)
        given, layers = self.attributes[GIVEN_INPUTS], self.attributes.get("layers", 0)
        first = len(self.op.inputs)
        before = tuple(tensor for i, tensor in enumerate(self.op.inputs) if given >> i & 1)
        again = tuple(tensor for i, tensor in enumerate(self.op.layer_inputs, first) if given >> i & 1)
        self.inputs = before + layers * again
        self.outputs = self.op.outputs + layers * self.op.layer_outputs
        self._slots = [i for i in range(first) if given >> i & 1]
        of_layer = [i for i in range(first, len(self.op.pattern)) if given >> i & 1]
        self._slots += [k * len(self.op.layer_inputs) + i for k in range(layers) for i in of_layer]
        self._n_slots = first + layers * len(self.op.layer_inputs)
        dtypes = [tensor.dtype for tensor in self.inputs]
        self._first = {dtype: dtypes.index(dtype) for dtype in set(dtypes)}  # where a dtype comes from

    def _check_attributes(self, every: int) -> None:
        for name, value in self.attributes.items():
            if name not in self.op.attributes and name != GIVEN_INPUTS:
                raise PluginError(f"{self.op_type}: no attribute {name} is known")
            low, high = (1, every) if name == GIVEN_INPUTS else _RANGES.get(name, (None, None))
            if low is not None and high is not None and not (isinstance(value, int) and low <= value <= high):
                raise PluginError(f"{self.op_type}: {name} is {value}: expected {low} to {high}")
        activation = self.attributes.get("activation", "silu")
        if activation not in ("silu", "none"):
            raise PluginError(f"{self.op_type}: activation is {activation!r}: expected 'silu' or 'none'")
        low, high = self.attributes.get("dt_min", 0.0), self.attributes.get("dt_max", math.inf)
        if not low <= high:
            raise PluginError(f"{self.op_type}: dt_min is {low} and dt_max is {high}: expected dt_min <= dt_max")
        for i, tensor in enumerate(self.op.pattern):
            if not tensor.optional and not self.attributes[GIVEN_INPUTS] >> i & 1:
                raise PluginError(f"{self.op_type}: given_inputs lacks bit {i}, for {tensor.name}: it is not optional")

    def check_count(self, n_inputs: int) -> None:
        """Refuse another number of inputs than there should be."""
        if n_inputs != len(self.inputs):
            raise PluginError(
                f"{self.op_type} has {n_inputs} inputs: expected {len(self.inputs)}",
                hint="an optional input that is not there is left out, and the attribute given_inputs, a bit for each "
                "input, says so; mamba_deploy.plugins.rules.prepare_for_parser does that",
            )

    def by_slot(self, values: Sequence[_Element]) -> list[_Element | None]:
        """Values of the inputs that are there, spread over all inputs of the operator, layer after layer."""
        slots: list[_Element | None] = [None] * self._n_slots
        for slot, value in zip(self._slots, values, strict=True):
            slots[slot] = value
        return slots

    def supports(self, position: int, dtype_of: Callable[[int], str]) -> bool:
        """Whether input ``position``, or an output after them, may have its dtype, given those before it.

        TensorRT asks for each position again and again, so nothing here looks at all of them.
        """
        after = position - len(self.inputs)
        wanted = (self.inputs[position] if after < 0 else self.outputs[after]).dtype
        if wanted not in ("T", "S"):
            return dtype_of(position) == wanted
        first = self._first[wanted]
        if position != first:
            return dtype_of(position) == dtype_of(first)
        only = self.attributes.get(ONLY_STATE_DTYPE if wanted == "S" else ONLY_DTYPE, -1)
        return dtype_of(position) in (FLOATS if only < 0 else FLOATS[only : only + 1])

    def output_dtypes(self, dtypes: Sequence[_Element]) -> list[_Element]:
        """Of the inputs' dtypes, in whatever form they come."""
        self.check_count(len(dtypes))
        return [dtypes[self._first[output.dtype]] for output in self.outputs]

    def output_shapes(
        self, shapes: Sequence[Sequence[_Element]], multiply: Callable[[Any, Any], Any] = operator.mul
    ) -> list[list[_Element]]:
        """Of the inputs' shapes, whose elements may be sizes or expressions, which ``multiply`` multiplies."""
        self.check_count(len(shapes))
        found: dict[str, _Element] = {}
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            for axis, element in zip(tensor.axes_of(len(shape)), shape, strict=True):
                found.setdefault(axis, element)

        def size(axis: str) -> Any:
            return found[axis] if axis in found else reduce(multiply, (found[symbol] for symbol in axis.split("*")))

        every = self.attributes.get("all_logits", 0)
        axes = (output.other_axes if every and output.other_axes else output.axes for output in self.outputs)
        return [[size(axis) for axis in of_output] for of_output in axes]

    def sizes(self, shapes: Sequence[Sequence[int]], *, agree: bool = True) -> dict[str, int]:
        """Sizes of a call by the kernel's names for them, from the inputs' shapes; those not known are left out.

        Args:
            shapes: Of the inputs that are there.
            agree: Two shapes that name a size must agree; else the larger counts.

        Raises:
            PluginError: A shape is not what the operator takes.
        """
        self.check_count(len(shapes))
        found = {"G": int(self.attributes["n_groups"])} if "n_groups" in self.attributes else {}
        compound: list[tuple[str, str, int]] = []
        ranks: dict[str, int] = {}
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            if tensor.other_axes and ranks.setdefault(tensor.name, len(shape)) != len(shape):
                raise PluginError(
                    f"{self.op_type}: {tensor.name} has {len(shape)} axes: expected {ranks[tensor.name]}, as before"
                )
            for axis, size in zip(tensor.axes_of(len(shape)), shape, strict=True):
                if size < 0:
                    continue
                if not axis.isalpha():
                    compound.append((tensor.name, axis, size))
                elif agree and found.get(axis, size) != size:
                    raise PluginError(f"{self.op_type}: {axis} of {tensor.name} is {size}: expected {found[axis]}")
                else:
                    found[axis] = max(size, found.get(axis, 0))
        if agree:
            self._check_related(found, compound)
        layers = {"layers": self.attributes["layers"]} if self.op.layer_inputs else {}
        return layers | {self.op.sizes[symbol]: size for symbol, size in found.items() if symbol in self.op.sizes}

    def _check_related(self, found: Mapping[str, int], compound: Sequence[tuple[str, str, int]]) -> None:
        for name, axis, size in compound:
            symbols = axis.removesuffix("-1").split("*")
            if all(symbol in found for symbol in symbols):
                expected = math.prod(found[symbol] for symbol in symbols) - axis.endswith("-1")
                if size != expected:
                    raise PluginError(f"{self.op_type}: {axis} of {name} is {size}: expected {expected}")
        if found.get("H", 0) % found.get("G", 1):
            raise PluginError(f"{self.op_type}: n_groups is {found['G']}: expected a divisor of the {found['H']} heads")


def prepare_for_parser(model: Any) -> None:
    """Make an ONNX model what the parser of every TensorRT turns into our plugins.

    Function bodies of our operators go, as versions disagree on whether a body or a plugin wins. So do the empty names
    of optional inputs, which 8.x follows through a null pointer and newer versions refuse; ``given_inputs`` says what
    is left.

    Args:
        model: An ``onnx.ModelProto``, changed in place.
    """
    others = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(others)
    for node in model.graph.node:
        ours = node.domain == DOMAIN and node.op_type in OPS
        if not ours or any(attribute.name == GIVEN_INPUTS for attribute in node.attribute):
            continue
        n_slots = len(OPS[node.op_type].pattern)  # what is given of a layer is given of all
        given = sum(1 << i for i, name in enumerate(node.input[:n_slots]) if name)
        node.attribute.add(name=GIVEN_INPUTS, i=given, type=2)  # AttributeProto.INT
        names = [name for name in node.input if name]
        del node.input[:]
        node.input.extend(names)
