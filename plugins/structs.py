"""The structs of ``mamba_kernels.h`` in ctypes, and its codes."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_void_p
from typing import Any

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "MambaCausalConv1d",
    "MambaHead",
    "MambaInProj",
    "MambaLastToken",
    "MambaLayer",
    "MambaModel",
    "MambaOutProj",
    "MambaSampleToken",
    "MambaSelectiveScan",
    "MambaSelectiveUpdate",
    "MambaSsdScan",
    "MambaSsdUpdate",
    "MambaXProj",
    "layers_of",
    "pointers",
]

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
ACTIVATIONS = {"none": 0, "silu": 1}


def _fields(integers: str, pointers: str, floats: str = "") -> list[tuple[str, type[Any]]]:
    return [
        *((name, c_int32) for name in integers.split()),
        *((name, c_float) for name in floats.split()),
        *((name, c_void_p) for name in pointers.split()),
    ]


def pointers(struct: type[ctypes.Structure]) -> list[str]:
    """Its arrays, which stand in the order of the op's arguments, outputs last."""
    return [field[0] for field in struct._fields_ if field[1] is c_void_p]


class MambaCausalConv1d(ctypes.Structure):
    """As in ``mamba_kernels.h``."""

    _fields_ = _fields(
        "batch length channels width dtype activation", "x weight bias conv_state seq_lens y conv_state_out"
    )


class MambaSelectiveScan(ctypes.Structure):
    """As in ``mamba_kernels.h``."""

    _fields_ = _fields(
        "batch length channels state_size dtype state_dtype dt_softplus",
        "x dt A B C D z dt_bias ssm_state seq_lens y ssm_state_out",
    )


class MambaSsdScan(ctypes.Structure):
    """As in ``mamba_kernels.h``."""

    _fields_ = _fields(
        "batch length heads head_dim state_size groups dtype state_dtype dt_softplus skip_per_channel",
        "x dt A B C D dt_bias ssm_state seq_lens y ssm_state_out",
        floats="dt_min dt_max",
    )


class MambaLastToken(ctypes.Structure):
    """As in ``mamba_kernels.h``."""

    _fields_ = _fields("batch length width dtype", "x seq_lens y")


class MambaInProj(ctypes.Structure):
    """As in ``mamba_kernels.h``."""

    _fields_ = _fields(
        "batch length width outputs channels conv_width dtype conv_first",
        "hidden norm_weight weight bias conv_weight conv_bias conv_state seq_lens y conv_state_out",
        floats="eps",
    )


class MambaXProj(ctypes.Structure):
    """As in ``mamba_kernels.h``."""

    _fields_ = _fields("batch length row channels outputs dtype", "x weight y")


class MambaSelectiveUpdate(ctypes.Structure):
    """As in ``mamba_kernels.h``."""

    _fields_ = _fields(
        "batch length row low_row rank channels state_size dtype state_dtype",
        "xz low dt_weight A D dt_bias ssm_state seq_lens y ssm_state_out",
        floats="norm_eps",
    )


class MambaSsdUpdate(ctypes.Structure):
    """As in ``mamba_kernels.h``."""

    _fields_ = _fields(
        "batch length row heads head_dim state_size groups dtype state_dtype dt_softplus skip_per_channel",
        "projected A D dt_bias ssm_state seq_lens y ssm_state_out",
        floats="dt_min dt_max",
    )


class MambaOutProj(ctypes.Structure):
    """As in ``mamba_kernels.h``."""

    _fields_ = _fields("batch length channels width groups dtype", "x norm_weight weight bias residual y", floats="eps")


class MambaHead(ctypes.Structure):
    """As in ``mamba_kernels.h``."""

    _fields_ = _fields("batch length width vocab dtype", "hidden norm_weight weight y", floats="eps")


class MambaLayer(ctypes.Structure):
    """As in ``mamba_kernels.h``."""

    _fields_ = _fields(
        "",
        "norm_weight in_proj in_proj_bias conv_weight conv_bias conv_state x_proj dt_proj A D dt_bias ssm_state "
        "gate_norm out_proj out_proj_bias conv_state_out ssm_state_out",
    )


class MambaModel(ctypes.Structure):
    """As in ``mamba_kernels.h``; ``each`` is the address of an array of :class:`MambaLayer`, which must be kept."""

    _fields_ = _fields(
        "batch length layers width outputs channels conv_width inner state_size rank heads head_dim groups vocab dtype "
        "state_dtype skip_per_channel all_logits pending_row",
        "input_ids seq_lens embedding norm_weight head pending logits pending_out each",
        floats="eps norm_eps dt_min dt_max",
    )


def layers_of(call: Any) -> Any:
    """The layers of a :class:`MambaModel`, as they lie in memory."""
    return (MambaLayer * call.layers).from_address(call.each)


class MambaSampleToken(ctypes.Structure):
    """As in ``mamba_kernels.h``."""

    _fields_ = _fields(
        "batch vocab capacity top_k endings",
        "logits uniform eos_ids steps tokens log seq_lens",
        floats="temperature top_p min_p",
    )
