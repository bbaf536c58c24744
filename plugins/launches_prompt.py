"""Launches of ``prompt.cu``."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

from mamba_deploy.plugins import launches_parts as parts
from mamba_deploy.plugins import launches_rows, launches_scan, launches_ssd
from mamba_deploy.plugins.cublas import LEAST_WORKSPACE_BYTES, WORKSPACE_BYTES
from mamba_deploy.plugins.launches_common import BYTES, TYPES, ceil_div, kernel_name
from mamba_deploy.plugins.launches_conv import causal_conv1d
from mamba_deploy.plugins.launches_pad import Copy, pad_launch
from mamba_deploy.plugins.launches_rows import MOST_ROWS, SUMS
from mamba_deploy.plugins.launches_step import x_proj
from mamba_deploy.plugins.nvrtc import Device, Gemm, Launch
from mamba_deploy.plugins.structs import MambaCausalConv1d, MambaSelectiveScan, MambaSsdScan, MambaXProj, layers_of

__all__ = ["prompt", "workspace_bytes"]

_PART_WARPS, _MOST_NORM_WARPS, _HELD_VALUES = 4, 32, 32
_FEW_VALUES, _MANY_VALUES = 8, 4 << 20


def prompt(call: Any, workspace: int, device: Device) -> list[Launch | Gemm]:
    """As the launcher in ``prompt.cu``: call is its struct, workspace an address."""
    return _Prompt(call, workspace, device).run()


def workspace_bytes(call: Any) -> int:
    """As ``prompt_workspace`` in C++."""
    return _Buffers(call, 0).end


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "z", "weight", "y", "sums", "total", "seq_lens")),
        *((name, c_int64) for name in ("rows", "sum_rows")),
        *((name, c_int32) for name in ("x_row", "z_row", "length", "groups", "width")),
        ("eps", c_float),
    ]


class _Buffers:
    """Addresses in the workspace, and its end."""

    def __init__(self, c: Any, start: int) -> None:
        self.end = start
        row = c.batch * c.length * BYTES[c.dtype]
        self.blas = self._take(WORKSPACE_BYTES)
        self.hidden = self._take(4 * c.batch * c.length * c.width)
        self.sums = self._take(4 * SUMS * min(c.batch * c.length, MOST_ROWS) * c.width)
        self.normal = self.y = self._take(row * max(c.width, c.inner))
        self.projected = self._take(row * c.outputs)
        self.convolved = self._take(row * c.channels)
        self.low = self.dt = 0
        if not c.heads:
            self.low, self.dt = self._take(row * _low_row(c)), self._take(row * c.inner)
        if _is_split(c):
            if c.heads:
                self.x = self._take(row * c.inner)
            states = c.state_size * (c.groups if c.heads else 1)
            self.B, self.C = self._take(row * states), self._take(row * states)
        floats = (launches_ssd if c.heads else launches_scan).workspace_floats(_scan(c))
        self.scan = self._take(ceil_div(4 * floats, 256) * 256)

    def _take(self, size: int) -> int:
        taken = self.end
        self.end += ceil_div(size, 256) * 256
        return taken


def _low_row(c: Any) -> int:
    return int(c.rank + 2 * c.state_size)


def _is_split(c: Any) -> bool:
    return bool(c.state_size % 8 or (c.heads and c.head_dim % 8))


def _scan(c: Any) -> Any:
    sizes = {name: getattr(c, name) for name in ("batch", "length", "state_size", "dtype", "state_dtype", "seq_lens")}
    if not c.heads:
        return MambaSelectiveScan(channels=c.inner, dt_softplus=1, **sizes)
    own = ("heads", "head_dim", "groups", "skip_per_channel", "dt_min", "dt_max")
    return MambaSsdScan(dt_softplus=1, **sizes, **{name: getattr(c, name) for name in own})


class _Split(NamedTuple):
    """Columns of rows, and where their dense copy goes."""

    source: int
    target: int
    row: int
    width: int


class _Prompt:
    def __init__(self, c: Any, workspace: int, device: Device) -> None:
        self.c, self.at, self.device = c, _Buffers(c, workspace), device
        self.tokens, self.item, self.T = c.batch * c.length, BYTES[c.dtype], TYPES[c.dtype]
        self.blas = (self.at.blas, WORKSPACE_BYTES if self.tokens <= MOST_ROWS else LEAST_WORKSPACE_BYTES)
        self.by_rows, self.may_defer = launches_rows.is_rows(c, device), parts.defers(c, device)
        of_cublas = c.length == 1 and c.batch <= MOST_ROWS and c.inner % (8 * SUMS) == 0
        self.sums = self.at.sums if self.by_rows or of_cublas else 0  # where out_proj comes in several
        self.found: list[Launch | Gemm] = []

    def run(self) -> list[Launch | Gemm]:
        c, at = self.c, self.at
        self.found.append(parts.embed(c, at.hidden, self.may_defer))
        for i, layer in enumerate(layers_of(c)):
            self._norm_hidden(layer.norm_weight, False, i > 0)
            self._in_proj(layer)
            if c.length == 1:
                self._step(i, layer)
            elif c.heads:
                self._second(layer)
            else:
                self._first(layer)
            self._out_proj(i, layer)
        last = not c.all_logits
        self._norm_hidden(c.norm_weight, last, True)
        rows = c.batch if last else self.tokens
        head = (rows, c.width, c.vocab, at.normal, c.width, c.head, True, c.logits, True, False)
        self.found.append(Gemm(*head, c.dtype, *self.blas))
        return self.found

    # --- the parts of a layer

    def _in_proj(self, layer: Any) -> None:
        c, at = self.c, self.at
        if self.by_rows:
            self.found.append(launches_rows.in_proj(c, layer, at.normal, at.projected, self.device))
            if c.length == 1:
                return
        else:
            self._bias(layer.in_proj_bias, at.projected, c.outputs, self.T, False)
            self._product(at.normal, c.width, c.width, layer.in_proj, c.outputs, at.projected, bool(layer.in_proj_bias))
        x = at.projected + (c.inner if c.heads else 0) * self.item
        conv = MambaCausalConv1d(
            c.batch, c.length, c.channels, c.conv_width, c.dtype, 1, x, layer.conv_weight, layer.conv_bias,
            layer.conv_state, c.seq_lens, x if c.length == 1 else at.convolved, layer.conv_state_out,
        )  # fmt: skip
        self.found += causal_conv1d(conv, 0, self.device, c.outputs)

    def _first(self, layer: Any) -> None:
        c, at, item, row, N = self.c, self.at, self.item, _low_row(self.c), self.c.state_size
        if self.by_rows:
            few = MambaXProj(self.tokens, 1, c.inner, c.inner, row, c.dtype, at.convolved, layer.x_proj, at.low)
            self.found += x_proj(few, 0, self.device)
        else:
            self._product(at.convolved, c.inner, c.inner, layer.x_proj, row, at.low, False)
        if c.norm_eps >= 0:
            arguments = (c_void_p(at.low), c_int64(self.tokens), c_int32(c.rank), c_int32(N), c_float(c.norm_eps))
            grid = (ceil_div(self.tokens, _PART_WARPS),)
            name = kernel_name("model", "part_norms_kernel", self.T)
            self.found.append(Launch(parts.ROWS, name, grid, (32 * _PART_WARPS,), 0, arguments))
        self._product(at.low, c.rank, row, layer.dt_proj, c.inner, at.dt, False)
        a, group_row = self._scan_of(layer), row
        a.x, a.dt, a.z = at.convolved, at.dt, at.projected + c.inner * item
        a.B, a.C = at.low + c.rank * item, at.low + (c.rank + N) * item
        if _is_split(c):
            self._split(_Split(a.B, at.B, row, N), _Split(a.C, at.C, row, N))
            a.B, a.C, group_row = at.B, at.C, N
        self.found += launches_scan.selective_scan(a, at.scan, self.device, (group_row, 2))

    def _second(self, layer: Any) -> None:
        c, at, item, states = self.c, self.at, self.item, self.c.groups * self.c.state_size
        a, rows = self._scan_of(layer), (c.channels, c.channels, c.outputs)
        a.x, a.dt = at.convolved, at.projected + (c.inner + c.channels) * item
        a.B, a.C = at.convolved + c.inner * item, at.convolved + (c.inner + states) * item
        if _is_split(c):
            row = c.channels
            self._split(_Split(a.x, at.x, row, c.inner), _Split(a.B, at.B, row, states), _Split(a.C, at.C, row, states))
            a.x, a.B, a.C, rows = at.x, at.B, at.C, (c.inner, states, c.outputs)
        self.found += launches_ssd.ssd_scan(a, at.scan, self.device, rows)
        groups, eps = (c.groups, c.eps) if layer.gate_norm else (1, -1.0)
        sizes = (self.tokens, 0, c.inner, c.outputs, c.length, groups, c.inner // groups, eps)
        self._norm(_Norm(at.y, at.projected, layer.gate_norm, at.y, None, None, None, *sizes), self.T, item)

    def _step(self, i: int, layer: Any) -> None:
        c, at = self.c, self.at
        self.found += parts.scan(c, i, at.projected, at.low, at.y, self.device, self.may_defer)
        if c.heads and layer.gate_norm:
            sizes = (self.tokens, 0, c.inner, 0, 1, c.groups, c.inner // c.groups, c.eps)
            self._norm(_Norm(at.y, None, layer.gate_norm, at.y, None, None, None, *sizes), self.T, self.item)

    def _out_proj(self, i: int, layer: Any) -> None:
        c, at = self.c, self.at
        if self.by_rows:
            self.found.append(launches_rows.out_proj(c, i, at.y, at.sums, self.device))
        else:
            out_proj = (self.tokens, c.inner, c.width, at.y, c.inner, layer.out_proj, False, self.sums or at.hidden)
            self.found.append(Gemm(*out_proj, True, not self.sums, c.dtype, *self.blas, SUMS if self.sums else 1))
        self._bias(layer.out_proj_bias, at.hidden, c.width, "float", True)

    def _scan_of(self, layer: Any) -> Any:
        a = _scan(self.c)
        a.A, a.D, a.dt_bias, a.y = layer.A, layer.D, layer.dt_bias, self.at.y
        a.ssm_state, a.ssm_state_out = layer.ssm_state, layer.ssm_state_out
        return a

    # --- their pieces

    def _product(self, x: int, inputs: int, x_row: int, w: int, outputs: int, y: int, add: bool) -> None:
        c = self.c
        self.found.append(Gemm(self.tokens, inputs, outputs, x, x_row, w, False, y, False, add, c.dtype, *self.blas))

    def _bias(self, bias: int | None, y: int, width: int, Y: str, add: bool) -> None:
        if bias:
            self._rows("bias_kernel", (self.T, Y, add), (c_void_p(bias), c_void_p(y), c_int32(width)))

    def _norm_hidden(self, weight: int, last: bool, after: bool) -> None:
        c, at = self.c, self.at
        rows, seq_lens = (c.batch, c.seq_lens) if last else (self.tokens, None)
        places = (at.hidden, None, weight, at.normal, self.sums if after else None, at.hidden, seq_lens)
        self._norm(_Norm(*places, rows, self.tokens, c.width, 0, c.length, 1, c.width, c.eps), "float", 4)

    def _norm(self, a: _Norm, X: str, x_item: int) -> None:
        wide = 16 // x_item
        vectors = (a.weight or 0) % 16 == 0 and a.width % wide == a.x_row % wide == a.z_row % wide == 0
        few = a.rows * a.groups * a.width <= _MANY_VALUES and a.width <= 32 * _MOST_NORM_WARPS * _FEW_VALUES
        values = _FEW_VALUES if few else _HELD_VALUES
        warps = ceil_div(a.width, 32 * values)
        rows = max(8 // warps, 1)
        name = kernel_name("model", "norm_kernel", self.T, X, wide if vectors else 1, values)
        grid = (ceil_div(a.rows * a.groups, rows),)
        self.found.append(Launch(parts.ROWS, name, grid, (32 * warps, rows), 0, (a,)))

    def _split(self, *columns: _Split) -> None:
        for s in columns:
            self.found.append(pad_launch(Copy(s.source, s.target, self.tokens, (1, s.row), (1, s.width), self.item)))

    def _rows(self, kernel: str, parameters: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        name = kernel_name("model", kernel, *parameters)
        self.found.append(Launch(parts.ROWS, name, (self.tokens,), (parts.ROW_THREADS,), 0, arguments))
