"""What the kernels take: the arrays of each call with dtypes, shapes and limits, from ``rules``, and their checks."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mamba_deploy.errors import PluginError
from mamba_deploy.plugins.arrays import Array, as_array, check_pointer
from mamba_deploy.plugins.rules import OPS, Op, Tensor
from mamba_deploy.plugins.rules_step import PARTS
from mamba_deploy.plugins.structs import (
    DTYPES,
    MambaCausalConv1d,
    MambaHead,
    MambaInProj,
    MambaLastToken,
    MambaModel,
    MambaOutProj,
    MambaSampleToken,
    MambaSelectiveScan,
    MambaSelectiveUpdate,
    MambaSsdScan,
    MambaSsdUpdate,
    MambaXProj,
)

__all__ = [
    "INT32_MAX",
    "SIGNATURES",
    "Argument",
    "Signature",
    "as_workspace",
    "check_dtype_name",
    "check_sizes",
    "checked",
    "model_arguments",
]

WORKSPACE_ALIGNMENT = 256
MAX_LENGTH = 2**20
MAX_VOCAB = 2**20
INT32_MAX = 2**31 - 1
_FLOATS = "float32, float16 or bfloat16"


class Argument(NamedTuple):
    """An array of an op."""

    name: str  # what the caller calls it
    field: str  # in the struct
    tensor: Tensor
    output: bool = False
    may_be: str = ""  # of state_out: the state, whose very array it may be


class Signature(NamedTuple):
    """What a call takes."""

    struct: type[ctypes.Structure]
    sizes: Mapping[str, str]  # symbol: field
    arguments: tuple[Argument, ...]  # in an order in which H*P comes after H and P
    optional_sizes: frozenset[str] = frozenset()  # fields that not every call has


def _signature(struct: type[ctypes.Structure], rule: Op) -> Signature:
    arguments = [Argument(tensor.name, tensor.name, tensor) for tensor in rule.inputs]
    for tensor in rule.outputs:
        state = tensor.name.removesuffix("_out") if tensor.name != "y" else ""
        arguments.append(Argument("state_out" if state else "y", tensor.name, tensor, output=True, may_be=state))
    products = any("*" in axis for tensor in rule.inputs for axis in tensor.axes)
    arguments.sort(key=lambda argument: not (products and argument.tensor.dtype == "S"))  # the state has every factor
    return Signature(struct, rule.sizes, tuple(arguments))


def model_arguments(kind: str, layers: int) -> list[Argument]:
    """Of an operator of a whole model. The state of a layer comes first, as it has every factor of H*P."""
    rule = OPS[kind]
    arguments = [Argument(tensor.name, tensor.name, tensor) for tensor in rule.inputs]
    for tensor in rule.outputs:
        state = tensor.name.removesuffix("_out") if tensor.name.endswith("_out") else ""
        arguments.append(Argument(tensor.name, tensor.name, tensor, output=True, may_be=state))
    for i in range(layers):
        own = f"layers[{i}]."
        inputs = [Argument(own + tensor.name, tensor.name, tensor) for tensor in rule.layer_inputs]
        arguments += sorted(inputs, key=lambda argument: argument.tensor.dtype != "S")
        for tensor in rule.layer_outputs:
            state = own + tensor.name.removesuffix("_out")
            arguments.append(Argument(own + tensor.name, tensor.name, tensor, output=True, may_be=state))
    return arguments


_PARTS = (MambaInProj, MambaXProj, MambaSelectiveUpdate, MambaSsdUpdate, MambaOutProj, MambaHead)
SIGNATURES = {
    OPS[struct.__name__].kernel: _signature(struct, OPS[struct.__name__])
    for struct in (MambaCausalConv1d, MambaSelectiveScan, MambaSsdScan, MambaLastToken)
}
SIGNATURES |= {PARTS[struct.__name__].kernel: _signature(struct, PARTS[struct.__name__]) for struct in _PARTS}
SIGNATURES["model"] = Signature(
    MambaModel,
    {**OPS["MambaModel"].sizes, **OPS["Mamba2Model"].sizes, "layers": "layers"},
    (),
    frozenset(("inner", "rank", "heads", "head_dim", "groups", "pending_row")),
)
# No operator of a graph, so ``rules`` has not heard of it.
SIGNATURES["sample_token"] = Signature(
    MambaSampleToken,
    {"B": "batch", "V": "vocab", "capacity": "capacity", "endings": "endings"},
    (
        Argument("logits", "logits", Tensor("logits", "float32", ("B", "V"))),
        Argument("uniform", "uniform", Tensor("uniform", "float64", ("capacity", "B"), optional=True)),
        Argument("eos_ids", "eos_ids", Tensor("eos_ids", "int32", ("endings",), optional=True)),
        Argument("steps", "steps", Tensor("steps", "int32", ("B",)), output=True),
        Argument("tokens", "tokens", Tensor("tokens", "int32", ("B",)), output=True),
        Argument("log", "log", Tensor("log", "int32", ("capacity", "B"), optional=True), output=True),
        Argument("seq_lens", "seq_lens", Tensor("seq_lens", "int32", ("B",), optional=True), output=True),
    ),
)
_LIMITS = {"K": (2, 8), "N": (1, 256), "L": (1, MAX_LENGTH), "V": (1, MAX_VOCAB)}


# --- checks ------------------------------------------------------------------------------------------------------


_BFLOAT16_HINT = "where 16-bit integers hold bfloat16, say so: dtype='bfloat16', or of ssm_state state_dtype='bfloat16'"


def _float_dtype(array: Array, name: str, said: str | None) -> str:
    if said is not None:
        return check_dtype_name(name, said)
    if array.dtype not in DTYPES:
        hint = _BFLOAT16_HINT if array.dtype == "uint16" else ""
        raise PluginError(f"{array.name} is {array.dtype}: expected {_FLOATS}", hint=hint)
    return array.dtype


def check_dtype_name(name: str, dtype: str) -> str:
    """The dtype, if it is one of those of activations and states."""
    if dtype not in DTYPES:
        raise PluginError(f"{name} is {dtype!r}: expected {_FLOATS}")
    return dtype


def _check_dtype(array: Array, expected: str, said: bool) -> None:
    if array.dtype == expected or (array.dtype == "uint16" and expected == "bfloat16" and said):
        return
    hint = _BFLOAT16_HINT if array.dtype == "uint16" and expected == "bfloat16" else ""
    raise PluginError(f"{array.name} is {array.dtype}: expected {expected}", hint=hint)


def _size(axis: str, sizes: Mapping[str, int]) -> int | None:
    """What ``H*P`` or ``K-1`` is, as far as it is known."""
    if axis.endswith("-1"):
        known = sizes.get(axis[:-2])
        return None if known is None else known - 1
    found = [sizes.get(symbol) for symbol in axis.split("*")]
    return math.prod(size for size in found if size is not None) if None not in found else None


def _check_shape(array: Array, tensor: Tensor, sizes: dict[str, int]) -> None:
    """Compare with what the arrays before it fixed; a symbol that is new gets its size here."""
    for axes in (tensor.axes, tensor.other_axes):
        if len(axes) != len(array.shape):
            continue
        wanted = [_size(axis, sizes) for axis in axes]
        if all(w in (None, size) for w, size in zip(wanted, array.shape, strict=True)):
            sizes.update((axis, size) for axis, size in zip(axes, array.shape, strict=True) if axis.isalpha())
            return
    shown = " or ".join(_show(axes, sizes) for axes in (tensor.axes, tensor.other_axes) if axes)
    raise PluginError(f"{array.name} has shape {list(array.shape)}: expected {shown}")


def _show(axes: tuple[str, ...], sizes: Mapping[str, int]) -> str:
    """``[B = 2, L, H*P = 12]``: what is known of a shape."""
    known = [(axis, _size(axis, sizes)) for axis in axes]
    return f"[{', '.join(axis if size is None else f'{axis} = {size}' for axis, size in known)}]"


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raise unless the sizes, by symbol, are within the kernels' limits."""
    for symbol, size in sizes.items():
        low, high = _LIMITS.get(symbol, (1, INT32_MAX))
        if not low <= size <= high:
            raise PluginError(f"{symbol} is {size}: expected {low} to {high}")
    groups = sizes.get("G", 1)
    for symbol, what in (("H", "heads"), ("D", "channels")):
        if sizes.get(symbol, groups) % groups:
            raise PluginError(f"n_groups is {groups}: expected a divisor of the number of {what}, {sizes[symbol]}")


def as_workspace(given: Any, needed: int) -> Array:
    """Of a device array of any dtype, or of (pointer, bytes)."""
    if given is None:
        raise PluginError(
            f"workspace is None: expected {needed} bytes", hint="Kernels.workspace_bytes tells beforehand"
        )
    if isinstance(given, tuple):
        pointer, size = given
        array = Array("workspace", int(pointer), "uint8", 1, (int(size),))
    else:
        array = as_array("workspace", given)
    if array.bytes < needed:
        raise PluginError(f"workspace has {array.bytes} bytes: expected {needed}")
    check_pointer(array, WORKSPACE_ALIGNMENT)
    return array


def checked(
    arguments: Sequence[Argument],
    values: Sequence[Any],
    sizes: dict[str, int],
    dtype: str | None,
    state_dtype: str | None,
) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays that are there, by name, and what T and S are; ``sizes`` gets what the shapes say.

    Raises:
        PluginError: An array is not what its argument asks for.
    """
    arrays: dict[str, Array] = {}
    types: dict[str, str] = {}
    said = {"T": dtype, "S": state_dtype}
    for argument, value in zip(arguments, values, strict=True):
        if value is not None:
            arrays[argument.name] = as_array(argument.name, value)
        elif not argument.tensor.optional:
            raise PluginError(f"{argument.name} is None: expected an array")
    for letter, name in (("T", "dtype"), ("S", "state_dtype")):
        first = next((a.name for a in arguments if a.tensor.dtype == letter and not a.output), None)
        if first is not None:
            types[letter] = _float_dtype(arrays[first], name, said[letter])
    for argument in arguments:
        if argument.name not in arrays:
            continue
        array, letter = arrays[argument.name], argument.tensor.dtype
        _check_dtype(array, types.get(letter, letter), said.get(letter) is not None)
        _check_shape(array, argument.tensor, sizes)
        check_pointer(array, array.item_bytes)  # the kernels look themselves for what they may load at once
        if argument.output and not array.writable:
            raise PluginError(f"{argument.name} is read-only: expected an array to write to")
    check_sizes(sizes)
    return arrays, types
