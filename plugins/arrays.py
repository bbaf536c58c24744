"""Arrays of other libraries on the device, as addresses: pycuda, cupy, torch; and what a kernel asks of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mamba_deploy.errors import PluginError

__all__ = ["Array", "as_array", "check_devices", "check_overlap", "check_pointer", "stream_handle"]

_TYPESTRS = {
    "<f8": "float64",
    "<f4": "float32",
    "<f2": "float16",
    "<i4": "int32",
    "<u2": "uint16",
    "<V2": "uint16",
}


class Array(NamedTuple):
    """A dense array on the device, and the argument it was given as."""

    name: str
    pointer: int
    dtype: str  # uint16 may be bfloat16 bits
    item_bytes: int
    shape: tuple[int, ...]
    device: int | None = None  # unknown of pycuda's
    writable: bool = True

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


def as_array(name: str, value: Any) -> Array:
    """Read what pycuda, cupy or torch says of an array.

    Raises:
        PluginError: It is no array, not on a CUDA device, or not dense in C order.
    """
    if hasattr(value, "data_ptr"):
        return _as_torch(name, value)
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:
        raise PluginError(
            f"{name} is a {type(value).__module__}.{type(value).__qualname__}: "
            "expected an array on the device (pycuda, cupy or a CUDA tensor of torch)"
        )
    shape = tuple(int(size) for size in interface["shape"])
    typestr = interface["typestr"]
    item = int(typestr[2:])
    strides = interface.get("strides")
    if strides is not None and not _is_dense(shape, tuple(strides), item):
        raise _not_dense(name, shape, tuple(strides), "bytes")
    pointer, read_only = interface["data"]
    device = getattr(getattr(value, "device", None), "id", None)
    dtype = _TYPESTRS.get(typestr, typestr)
    return Array(name, int(pointer or 0), dtype, item, shape, device, not read_only)


def _as_torch(name: str, tensor: Any) -> Array:
    if tensor.device.type != "cuda":
        raise PluginError(f"{name} is on the device '{tensor.device}': expected a CUDA device")
    shape = tuple(int(size) for size in tensor.shape)
    if not tensor.is_contiguous():
        raise _not_dense(name, shape, tuple(tensor.stride()), "elements")
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Array(name, tensor.data_ptr(), dtype, tensor.element_size(), shape, tensor.device.index)


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...], item: int) -> bool:
    """In C order; the stride of an axis of size 1 says nothing."""
    expected = item
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _not_dense(name: str, shape: tuple[int, ...], strides: tuple[int, ...], unit: str) -> PluginError:
    return PluginError(
        f"{name} of shape {list(shape)} has strides {list(strides)} in {unit}: expected a dense array in C order",
        hint=f"copy it first: {name}.contiguous(), or cupy.ascontiguousarray({name})",
    )


def check_pointer(array: Array, alignment: int) -> None:
    """Refuse a null pointer, and one that is no multiple of ``alignment`` bytes."""
    if array.pointer == 0:
        raise PluginError(f"{array.name} is a null pointer: expected device memory")
    if array.pointer % alignment:
        raise PluginError(f"{array.name} is at address {array.pointer:#x}: expected a multiple of {alignment} bytes")


def check_overlap(arrays: list[Array], allowed: Mapping[str, str]) -> None:
    """No output may share memory with another array, but a state's with the state itself, whole.

    Args:
        arrays: All arrays of a call.
        allowed: Outputs by name, and what each may be.
    """
    reach: list[tuple[int, Array]] = []  # those that end after the next one starts
    for place, array in sorted(enumerate(arrays), key=lambda item: item[1].pointer):
        reach = [(i, other) for i, other in reach if other.pointer + other.bytes > array.pointer]
        for i, other in reach:
            first, second = (other, array) if i < place else (array, other)
            _check_pair(*((first, second) if first.name in allowed else (second, first)), allowed)
        reach.append((place, array))


def _check_pair(out: Array, other: Array, allowed: Mapping[str, str]) -> None:
    """Of two that overlap, the first an output if one is."""
    same = out.pointer == other.pointer
    if out.name not in allowed or (same and (allowed[out.name] == other.name or allowed.get(other.name) == out.name)):
        return
    also = f", or {other.name} itself" if allowed[out.name] == other.name else ""
    raise PluginError(f"{out.name} overlaps {other.name} in memory: expected memory of its own{also}")


def check_devices(arrays: list[Array]) -> None:
    """Refuse arrays of two devices, as far as they tell."""
    known = [array for array in arrays if array.device is not None]
    for array in known[1:]:
        if array.device != known[0].device:
            raise PluginError(
                f"{array.name} is on device {array.device}: expected device {known[0].device}, where {known[0].name} is"
            )


def stream_handle(stream: Any) -> int:
    """The cudaStream_t of a number, or of a stream of pycuda, torch or cupy."""
    for attribute in ("handle", "cuda_stream", "ptr"):
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    return int(stream)
