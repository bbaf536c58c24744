"""Launches of ``ssd_scan.cu``."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint32, c_void_p
from typing import Any, NamedTuple

from mamba_deploy.plugins.launches_common import BYTES, MAX_GRID_Y, TYPES, are_aligned, ceil_div, kernel_name
from mamba_deploy.plugins.launches_pad import PAD_TOKENS, Copy, pad_launch, padded_size
from mamba_deploy.plugins.nvrtc import Device, Launch
from mamba_deploy.plugins.pending import HEAD_WORDS, MOST, Pending

__all__ = ["ssd_scan", "ssd_update", "update_defers", "workspace_floats"]

_LATE_HEAD_DIM = 1024


def ssd_scan(call: Any, workspace: int, device: Device, rows: tuple[int, int, int] | None = None) -> list[Launch]:
    """As the launcher in ``ssd_scan.cu``: call is its struct, workspace an address.

    ``rows``: values from one token to the next of x, of B and C, and of dt, where they are not dense.
    """
    if call.length > 1:
        return _ssd_prompt(call, rows, workspace, device)
    channels, group_row = call.heads * call.head_dim, call.groups * call.state_size
    at = _Places(call.x, call.B, call.C, call.dt, None, channels, group_row, call.heads, 0)
    return [_ssd_step(call, at)]


def ssd_update(call: Any, workspace: int, device: Device, before: Pending | None = None) -> list[Launch]:
    """As the launcher in ``ssd_scan.cu``: call is its struct; workspace is not used."""
    from mamba_deploy.plugins.structs import MambaSsdScan

    item, channels, states = BYTES[call.dtype], call.heads * call.head_dim, call.groups * call.state_size
    x = call.projected + channels * item
    B, C = x + channels * item, x + (channels + states) * item
    at = _Places(x, B, C, C + states * item, call.projected, *4 * [2 * channels + 2 * states + call.heads])
    scan = MambaSsdScan(batch=call.batch, length=1, x=x, dt=at.dt, B=B, C=C)
    for name in "heads head_dim state_size groups dtype state_dtype dt_softplus skip_per_channel dt_min dt_max".split():
        setattr(scan, name, getattr(call, name))
    for name in "A D dt_bias ssm_state seq_lens y ssm_state_out".split():
        setattr(scan, name, getattr(call, name))
    return [_ssd_step(scan, at) if before is None or not before.marks else _late_step(scan, at, before, device)]


class _Places(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "B", "C", "dt", "z")),
        *((name, c_int64) for name in ("x_row", "group_row", "dt_row", "z_row")),
    ]


def _lanes(states: int, item: int) -> tuple[int, int]:
    """As ``with_lanes`` in C++."""
    return next((n for n in (4, 8, 16, 32) if n * 16 // item >= states), 32), 2 if item == 4 and states > 128 else 1


def _ssd_step(call: Any, at: _Places) -> Launch:
    N, item = call.state_size, BYTES[call.state_dtype]
    vec = 16 // item
    if N % vec == 0 and are_aligned(call, "ssm_state ssm_state_out B C", 16):
        lanes, iterations = _lanes(N, item)
    else:
        vec = 1
        most = ((32, 8, 4), (64, 16, 4), (128, 32, 4), (256, 32, 8))
        _, lanes, iterations = next(shape for shape in most if shape[0] >= N)
    rows = call.batch * call.heads * call.head_dim
    sets, warps = (4, 2) if rows * N * item >= 64 << 20 else (2, 8)
    warp_rows = sets * 32 // lanes
    small = rows <= 2**31 - 1
    by = _StepDivisors(
        _divisor(max(call.head_dim // warp_rows, 1)), _divisor(call.head_dim), _divisor(call.heads),
        _divisor(call.heads // call.groups), small,
    )  # fmt: skip
    uniform = small and call.head_dim % warp_rows == 0
    types = (TYPES[call.dtype], TYPES[call.state_dtype])
    name = kernel_name("ssd", "step_kernel", *types, vec, lanes, iterations, sets, uniform)
    grid = (ceil_div(ceil_div(rows, warp_rows), warps),)
    return Launch("ssd_step.cuh", name, grid, (32 * warps,), 0, (call, at, by))


def update_defers(call: Any, device: Device) -> bool:
    """Whether a step can leave its tokens pending, and that is faster; call has its sizes."""
    fills = device.major >= 9 and call.batch <= MAX_GRID_Y and 2 * call.batch * call.heads > 3 * device.multiprocessors
    fits = call.head_dim % 4 == 0 and call.head_dim <= _LATE_HEAD_DIM
    return bool(fills and fits and call.state_size * BYTES[call.state_dtype] % 16 == 0)


def _late_step(call: Any, at: _Places, before: Pending, device: Device) -> Launch:
    N, P, item = call.state_size, call.head_dim, BYTES[call.state_dtype]
    (lanes, iterations), warps = _lanes(N, item), 2 * item
    at_a_time = warps * 4 * 32 // lanes
    turns = 2 if 2 * at_a_time * N * item <= warps << 12 else 1
    rows = min(turns * at_a_time, P)
    records = (MOST + 1) * (HEAD_WORDS + P + lanes * iterations * 16 // item)
    shared = rows * N * item + 4 * (records + max(at_a_time - rows, 0))
    name = kernel_name("ssd", "late_step_kernel", TYPES[call.dtype], TYPES[call.state_dtype], lanes, iterations)
    grid = (ceil_div(P, rows) * call.heads, call.batch)
    return Launch("ssd_late.cuh", name, grid, (32 * warps,), shared, (call, at, before, c_int32(rows)))


class _Segments(ctypes.Structure):
    _fields_ = [("count", c_int32), ("length", c_int32), ("states", c_void_p), ("decays", c_void_p)]


class _Rows(ctypes.Structure):
    _fields_ = [("x", c_int32), ("group", c_int32), ("dt", c_int32)]


class _Layout(ctypes.Structure):
    _fields_ = [("tiles", c_uint32), ("channels", c_int32), ("stages", c_int32)]


class _Help(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("heads", "blocks", "length", "chunks")),
        ("left", c_void_p), ("done", c_void_p),
    ]  # fmt: skip


_CHUNK = 64
_HELPED_CHANNELS, _MOST_HELPED, _MOST_HELP_FLOATS, _LEAST_HELPED_CHUNKS = 64, 120, 1 << 24, 8
_PASS_US, _FINISH = 5.0, 0.2


def _ssd_room(call: Any) -> int:
    return max(1, min(ceil_div(call.length, _CHUNK), 512 // (call.batch * call.heads)))


def _segment_floats(call: Any) -> int:
    return ceil_div(call.batch * call.heads * call.head_dim * call.state_size, 64) * 64


def _segments_floats(call: Any) -> int:
    room = _ssd_room(call)
    return 0 if room == 1 else ceil_div(room * (_segment_floats(call) + call.batch * call.heads), 64) * 64


def _helped_blocks(call: Any) -> int:
    """Blocks of heads where helpers may be of use, else 0."""
    tiles = ceil_div(call.head_dim, _HELPED_CHANNELS)
    blocks = call.batch * call.heads * tiles
    fits = call.head_dim > tiles * (_HELPED_CHANNELS - 16) and call.state_size <= 128 and call.dtype != 0
    return blocks if fits and blocks <= _MOST_HELPED and ceil_div(call.length, _CHUNK) >= _LEAST_HELPED_CHUNKS else 0


def _own_chunks(chunks: int, heads: int) -> int:
    return ceil_div(heads * chunks + heads - 1, heads + 1)


def _help_floats(call: Any, heads: int) -> int:
    chunks = ceil_div(call.length, _CHUNK)
    return ceil_div(_helped_blocks(call) * (_left_floats(call, chunks - _own_chunks(chunks, heads)) + 1), 64) * 64


def _left_floats(call: Any, chunks: int) -> int:
    nt = 64 if call.state_size <= 64 else 128
    return _HELPED_CHANNELS * nt + chunks * _CHUNK * (_HELPED_CHANNELS + 1)


def _floats_between(call: Any) -> int:
    return max(_segments_floats(call), min(_help_floats(call, 1), _MOST_HELP_FLOATS))


def workspace_floats(call: Any) -> int:
    """Of padded arrays, and of what kernels leave to others."""
    return (_padding(call, 0).end if _is_padded(call) else 4 * _floats_between(call)) // 4


class _Padding(NamedTuple):
    """The call that the tensor cores run in place of one of other sizes, and the copies around it."""

    call: Any
    before: list[Copy]
    after: list[Copy]
    end: int  # of the workspace


def _is_padded(call: Any) -> bool:
    if call.dtype == 0 or call.length < PAD_TOKENS or (call.head_dim % 8 == 0 and call.state_size % 8 == 0):
        return False
    P, N = padded_size(call.head_dim), padded_size(call.state_size)
    return bool(max(call.heads * P, call.groups * N) <= 2**31 - 1)


def _padding(call: Any, workspace: int) -> _Padding:
    to = type(call).from_buffer_copy(call)
    P, N = call.head_dim, call.state_size
    to.head_dim, to.state_size = to_P, to_N = padded_size(P), padded_size(N)
    end = workspace + 4 * _floats_between(to)
    before, after = [], []

    def take(count: int, rows: int, cols: int, item: int) -> int:
        nonlocal end
        taken = end
        end += ceil_div(count * rows * cols * item, 256) * 256
        return taken

    if to_P != P:
        rows = call.batch * call.length * call.heads
        x, y, D = take(rows, 1, to_P, 2), take(rows, 1, to_P, 2), take(call.heads, 1, to_P, 4)
        before.append(Copy(call.x, x, rows, (1, P), (1, to_P), 2))
        after.append(Copy(y, call.y, rows, (1, to_P), (1, P), 2))
        to.x, to.y = x, y
        if call.skip_per_channel and call.D:
            before.append(Copy(call.D, D, call.heads, (1, P), (1, to_P), 4))
            to.D = D
    if to_N != N:
        rows = call.batch * call.length * call.groups
        B, C = take(rows, 1, to_N, 2), take(rows, 1, to_N, 2)
        before += [Copy(source, copy, rows, (1, N), (1, to_N), 2) for source, copy in ((call.B, B), (call.C, C))]
        to.B, to.C = B, C
    heads, item = call.batch * call.heads, BYTES[call.state_dtype]
    state = take(heads, to_P, to_N, item)
    before.append(Copy(call.ssm_state, state, heads, (P, N), (to_P, to_N), item))
    after.append(Copy(state, call.ssm_state_out, heads, (to_P, to_N), (P, N), item))
    to.ssm_state = to.ssm_state_out = state
    return _Padding(to, before, after, end)


def _ssd_prompt(call: Any, given: tuple[int, int, int] | None, workspace: int, device: Device) -> list[Launch]:
    padded = workspace and _is_padded(call)
    inner, before, after, _ = _padding(call, workspace) if padded else _Padding(call, [], [], 0)
    rows = _Rows(*(given or (call.heads * call.head_dim, call.groups * call.state_size, call.heads)))
    of_inner = _Rows(inner.heads * inner.head_dim, inner.groups * inner.state_size, rows.dt) if padded else rows
    aligned = inner.head_dim % 8 == inner.state_size % 8 == of_inner.x % 8 == of_inner.group % 8 == 0
    aligned = aligned and are_aligned(inner, "x y B C", 16)
    if BYTES[call.dtype] == 2 and call.length > 4 and aligned and device.major >= 8:
        chunked = _ssd_chunked(inner, of_inner, workspace, device)
        if chunked:
            return [*map(pad_launch, before), *chunked, *map(pad_launch, after)]
    T = TYPES[call.dtype]
    lanes = next(lanes for lanes in (4, 8, 16, 32) if call.state_size <= 8 * lanes)
    warps = 2 if lanes == 4 else 4
    block_rows = warps * 4 * 32 // lanes
    tiles = ceil_div(call.head_dim, block_rows)
    segments, _ = _segments(call, tiles, device, (4.0, 0.6, 0.7), workspace)
    shared = 4 * 16 * (2 * 8 * lanes + 2 * block_rows + 2)

    def kernel(output: bool) -> tuple[str, str, int, int]:
        return "ssd_recurrent.cuh", kernel_name("ssd", "recurrent_kernel", T, lanes, output), 32 * warps, shared

    return _ssd_launches(call, rows, segments, tiles, kernel(False), kernel(True), c_uint32(tiles))


def _ssd_chunked(call: Any, rows: _Rows, workspace: int, device: Device) -> list[Launch]:
    """On the tensor cores; none where a block's shared memory does not suffice."""
    nt = next(nt for nt in (64, 128, 256) if call.state_size <= nt)
    load, most = (1, 32) if nt > 128 else (2, 80)

    def shared(channels: int, stages: int, output: bool) -> int:
        stage = (2 if output else 1) * _CHUNK * nt + _CHUNK * (channels + 8)
        return stages * (1040 + 2 * stage) + (2 * 5376 if output else 0)

    tiles = ceil_div(call.head_dim, most) - 1
    while True:
        tiles += 1
        channels = ceil_div(ceil_div(call.head_dim, tiles), 16) * 16
        if channels <= 16 or shared(channels, 2, True) <= device.shared_bytes:
            break
    stages = 4
    while stages > 2 and shared(channels, stages, True) > device.shared_bytes:
        stages -= 1
    if shared(channels, stages, True) > device.shared_bytes:
        return []
    chunk_us = 1.9
    layout = _Layout(tiles, channels, stages)
    segments, least = _segments(call, tiles, device, (chunk_us, 0.4, 1.0), workspace)
    heads = _heads_of_helper(call, layout, device, workspace)
    chunks = ceil_div(call.length, _CHUNK)
    own = _own_chunks(chunks, heads)
    if heads and (own + _FINISH * (chunks - own)) * chunk_us + _PASS_US < least:
        blocks, helpers = _helped_blocks(call), ceil_div(_helped_blocks(call), heads)
        done = workspace + 4 * blocks * _left_floats(call, chunks - own)
        help = _Help(heads, blocks, own * _CHUNK, chunks - own, workspace, done)
        name, threads = kernel_name("ssd", "helped_kernel", TYPES[call.dtype], nt), 32 * 7 + 2 * _HELPED_CHANNELS
        grid, arguments = (helpers + blocks,), (call, rows, help, layout)
        return [
            Launch("ssd_helped.cuh", "mamba::ssd::clear_done_kernel", (1,), (128,), 0, (help,)),
            Launch("ssd_helped.cuh", name, grid, (threads,), shared(channels, stages, True), arguments),
        ]

    def kernel(output: bool) -> tuple[str, str, int, int]:
        name = kernel_name("ssd", "chunk_kernel", TYPES[call.dtype], nt, output)
        threads = 32 * ((4 if output else 0) + 1 + load) + 2 * channels
        return "ssd_prompt.cuh", name, threads, shared(channels, stages, output)

    return _ssd_launches(call, rows, segments, tiles, kernel(False), kernel(True), layout)


def _heads_of_helper(call: Any, layout: _Layout, device: Device, workspace: int) -> int:
    """How many heads share a helper, so that all blocks are on the GPU at once; 0: none does."""
    blocks = _helped_blocks(call)
    fits = layout.channels == _HELPED_CHANNELS and blocks == call.batch * call.heads * layout.tiles
    if device.major < 9 or not workspace or not fits:
        return 0
    heads = 1 if 2 * blocks <= device.multiprocessors else 2
    at_once = blocks + ceil_div(blocks, heads) <= device.multiprocessors
    return heads if at_once and _help_floats(call, heads) <= _MOST_HELP_FLOATS else 0


def _segments(
    call: Any, tiles: int, device: Device, costs: tuple[float, float, float], workspace: int
) -> tuple[_Segments, float]:
    """And what they take, in microseconds."""
    chunks, blocks = ceil_div(call.length, _CHUNK), call.batch * call.heads * tiles
    chunk_us, state, turn = costs

    def load(n: int) -> float:
        turns = ceil_div(n, device.multiprocessors)
        return 1.0 if turns < 2 else turn * turns

    state_bytes = 16.0 * _segment_floats(call)
    best, least = chunks, chunks * chunk_us * load(blocks)
    for count in range(2, (_ssd_room(call) if workspace else 1) + 1):
        length = ceil_div(chunks, count)
        if ceil_div(chunks, length) != count:
            continue
        in_turns = load(blocks * count) + state * load(blocks * (count - 1))
        time = length * chunk_us * in_turns + _PASS_US + count * state_bytes / 3e6
        if time < least:
            least, best = time, length
    count = ceil_div(chunks, best)
    decays = workspace + (4 * count * _segment_floats(call) if count > 1 else 0)
    return _Segments(count, best * _CHUNK, workspace or None, decays or None), least


def _ssd_launches(
    call: Any,
    rows: _Rows,
    segments: _Segments,
    tiles: int,
    states: tuple[str, str, int, int],
    output: tuple[str, str, int, int],
    layout: Any,
) -> list[Launch]:
    """Kernels as (file, name, threads, shared memory)."""
    width, count = call.batch * call.heads * tiles, segments.count
    found = []
    if count > 1:
        source, name, threads, shared = states
        found.append(Launch(source, name, (width, count - 1), (threads,), shared, (call, rows, segments, layout)))
        grid = (ceil_div(call.batch * call.heads * call.head_dim * call.state_size, 256),)
        passing = "mamba::ssd::pass_states_kernel"
        found.append(Launch("ssd_recurrent.cuh", passing, grid, (256,), 0, (call, segments)))
    source, name, threads, shared = output
    return [*found, Launch(source, name, (width, count), (threads,), shared, (call, rows, segments, layout))]


class _Divisor(ctypes.Structure):
    _fields_ = [("divisor", c_uint32), ("factor", c_uint32), ("shift", c_uint32)]


class _StepDivisors(ctypes.Structure):
    _fields_ = [*((name, _Divisor) for name in ("warps", "rows", "heads", "group")), ("small", c_int32)]


def _divisor(divisor: int) -> _Divisor:
    shift = (divisor - 1).bit_length()
    return _Divisor(divisor, ((((1 << shift) - divisor) << 32) // divisor + 1) & 0xFFFFFFFF, shift)
