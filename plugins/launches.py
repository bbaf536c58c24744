"""How the kernels are launched where no compiled launcher is there: what the ``.cu`` files decide, once more in Python.

A test records what the compiled launchers do for random calls and compares every kernel, grid, and argument.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint32, c_void_p
from typing import Any, NamedTuple

from mamba_deploy.plugins.nvrtc import Device, Launch

__all__ = [
    "causal_conv1d",
    "head",
    "in_proj",
    "last_token",
    "out_proj",
    "sample_token",
    "selective_scan",
    "selective_update",
    "ssd_scan",
    "ssd_update",
    "workspace_bytes",
    "x_proj",
]

_TYPES = ("float", "__half", "__nv_bfloat16")  # by their numbers in mamba_kernels.h
_BYTES = (4, 2, 2)
_MAX_GRID_Y = 65535
_PAD_TOKENS = 128  # from here on B and C, or P and N, are padded


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _padded(size: int) -> int:
    return _ceil(size, 8) * 8


def _aligned(call: ctypes.Structure, names: str, multiple: int) -> bool:
    return all((getattr(call, name) or 0) % multiple == 0 for name in names.split())


def _kernel(space: str, name: str, *parameters: Any) -> str:
    """``mamba::SPACE::NAME<PARAMETERS>`` as C++ writes it."""
    shown = (str(p).lower() if isinstance(p, bool) else str(p) for p in parameters)
    return f"mamba::{space}::{name}<{', '.join(shown)}>"


# --- causal_conv1d.cu --------------------------------------------------------------------------------------------


def causal_conv1d(call: Any, workspace: int, device: Device) -> list[Launch]:
    """As the launcher in ``causal_conv1d.cu``: call is its struct, workspace an address."""
    T, item = _TYPES[call.dtype], _BYTES[call.dtype]
    vector = 16 // item
    tuned = call.width == 4 and call.channels % vector == 0
    tuned = tuned and _aligned(call, "x weight bias conv_state y conv_state_out", 16)
    if call.length == 1:
        width, vec, threads = (4, vector, 64) if tuned else (0, 1, 64)
        grid = (call.batch, _ceil(call.channels, threads * vec))
        return [Launch("causal_conv1d.cu", _kernel("conv", "step_kernel", T, width, vec), grid, (threads,), 0, (call,))]
    width, vec = (4, 4) if tuned else (0, 1)
    lanes, runs_of_block, resident = 32, 4, 6 if item == 2 else 5
    channel_blocks, rows = _ceil(call.channels, lanes * vec), min(call.batch, _MAX_GRID_Y)
    runs = max(1, device.multiprocessors * resident // (channel_blocks * rows)) * runs_of_block
    run_length = min(max(_ceil(call.length, 4 * runs) * 4, 8), 64)
    grid = (channel_blocks * _ceil(call.length, run_length * runs_of_block), rows)
    arguments = (call, c_uint32(channel_blocks), c_int32(run_length))
    name = _kernel("conv", "prompt_kernel", T, width, vec)
    return [Launch("causal_conv1d.cu", name, grid, (lanes, runs_of_block), 0, arguments)]


# --- last_token.cu -----------------------------------------------------------------------------------------------


def last_token(call: Any, workspace: int, device: Device) -> list[Launch]:
    """As the launcher in ``last_token.cu``: call is its struct, workspace an address."""
    size = call.width * _BYTES[call.dtype]
    if size % 16 == 0 and _aligned(call, "x y", 16):
        word, words = "uint4", size // 16
    else:
        word, words = ("uint32_t" if call.dtype == 0 else "uint16_t"), call.width
    grid = (_ceil(words, 128), min(call.batch, _MAX_GRID_Y))
    pointers = tuple(c_void_p(p) for p in (call.x, call.seq_lens, call.y))
    arguments = (*pointers, c_int32(call.batch), c_int32(call.length), c_int32(words))
    return [Launch("last_token.cu", _kernel("last", "last_token_kernel", word), grid, (128,), 0, arguments)]


# --- sample_token.cu ---------------------------------------------------------------------------------------------


def sample_token(call: Any, workspace: int, device: Device) -> list[Launch]:
    """As the launcher in ``sample_token.cu``: call is its struct; workspace is not used."""
    name = _kernel("sample", "sample_token_kernel", call.temperature == 0)
    return [Launch("sample_token.cu", name, (min(call.batch, _MAX_GRID_Y),), (1024,), 0, (call,))]


# --- selective_scan.cu -------------------------------------------------------------------------------------------


def selective_scan(call: Any, workspace: int, device: Device) -> list[Launch]:
    """As the launcher in ``selective_scan.cu``: call is its struct, workspace an address."""
    return [_scan_step(call)] if call.length == 1 else _scan_prompt(call, workspace, device)


_PROMPT = "selective_scan_prompt.cuh"


class _Shape(NamedTuple):
    """The template arguments of Shape in selective_scan_prompt.cuh, in their order."""

    states: int
    lanes: int
    step: int
    tile: int
    items: int
    packs: int
    wide: int
    finished: int
    quads: int
    threads: int
    blocks: int

    def shared_floats(self, quads: int, summary: bool) -> int:
        n, rows = self.states * self.lanes, 4 * quads
        token_pitch = 2 * n + (4 if self.states == 2 else 16 if n < 32 else 0)
        outputs = 0 if summary else 3 * self.tile * (4 * self.quads + 8)
        return 2 * rows * (2 * self.tile + 4) + 2 * self.tile * token_pitch + 2 * rows + outputs


_FEW = _Shape(2, 8, 64, 64, 1, 1, 8, 1, 4, 640, 1)
_MEDIUM = _Shape(2, 8, 32, 64, 2, 1, 8, 2, 10, 640, 1)
_MANY = _Shape(4, 4, 32, 32, 4, 1, 8, 4, 8, 256, 3)
_FEW_32 = _Shape(2, 16, 64, 64, 1, 2, 8, 1, 3, 576, 1)
_STATES_32 = _Shape(4, 8, 16, 32, 2, 1, 8, 2, 8, 384, 2)
_FEW_BLOCKS_32 = _Shape(4, 8, 32, 32, 2, 2, 8, 2, 5, 384, 2)
_STATES = (  # the most states, the shape, quads of channels
    (64, _Shape(4, 16, 16, 16, 1, 2, 8, 1, 4, 384, 2), 4),
    (128, _Shape(4, 32, 16, 16, 1, 4, 8, 1, 2, 352, 2), 2),
    (256, _Shape(8, 32, 8, 8, 1, 4, 8, 1, 2, 352, 1), 2),
)


class _PromptPlan(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("quads", "groups", "scanners", "stagers", "chunks", "chunk_length")),
        ("vectors", ctypes.c_bool),
        ("states", c_int32),
        ("B", c_void_p),
        ("C", c_void_p),
        ("chunk_states", c_void_p),
        ("chunk_steps", c_void_p),
    ]


def _scan_room(call: Any) -> int:
    groups = call.batch * _ceil(call.channels, 16)
    if call.length == 1 or call.state_size > 32 or groups > 36:
        return 1
    count = min(396 // groups, call.length // 128)
    return 1 if count < 4 else count


def _chunk_floats(call: Any) -> int:
    room = _scan_room(call)
    return 0 if room == 1 else _ceil(call.batch * room * call.channels * (call.state_size + 1), 64) * 64


def _padded_floats(call: Any) -> int:
    if call.state_size % 8 == 0 or call.channels % 4 != 0 or call.length < _PAD_TOKENS:
        return 0
    return _ceil(call.batch * call.length * _padded(call.state_size) * _BYTES[call.dtype], 256) * 64


def _scan_workspace(call: Any) -> int:
    return _chunk_floats(call) + 2 * _padded_floats(call)


def _scan_prompt(call: Any, workspace: int, device: Device) -> list[Launch]:
    room, floats = _scan_room(call), _padded_floats(call)
    before, states = [], (call.state_size, call.B, call.C)
    if workspace and floats:
        N, to_N, rows = call.state_size, _padded(call.state_size), call.batch * call.length
        start = workspace + 4 * _chunk_floats(call)
        states = (to_N, start, start + 4 * floats)
        item = _BYTES[call.dtype]
        for source, copy in zip((call.B, call.C), states[1:], strict=True):
            before.append(_pad_launch(_Copy(source, copy, rows, (1, N), (1, to_N), item)))
    if room > 1:
        length = _ceil(_ceil(call.length, room), 32) * 32
        shape = _FEW_BLOCKS_32 if call.state_size > 16 else _MANY
        plan = _scan_plan(call, shape, 4, _ceil(call.length, length), length, workspace, states)
        elements = call.batch * call.channels * call.state_size
        passing = Launch(_PROMPT, "mamba::scan::pass_kernel", (_ceil(elements, 128),), (128,), 0, (call, plan))
        chunked = [_scan_launch(call, shape, plan, summary=summary) for summary in (True, False)]
        return [*before, chunked[0], passing, chunked[1]]
    shape, quads = _scan_shape(call, device)
    plan = _scan_plan(call, shape, quads, 1, call.length, 0, states)
    return [*before, _scan_launch(call, shape, plan, summary=False)]


def _scan_shape(call: Any, device: Device) -> tuple[_Shape, int]:
    if call.state_size > 32:
        return next((shape, quads) for most, shape, quads in _STATES if call.state_size <= most)

    def best(*allowed: int) -> int:
        """Whose busiest multiprocessor has the fewest channels; the last of equals."""
        load = {q: _ceil(call.batch * _ceil(call.channels, 4 * q), device.multiprocessors) * q for q in allowed}
        return min(reversed(allowed), key=load.__getitem__)

    def fits(shape: _Shape) -> bool:
        return device.shared_bytes >= 4 * shape.shared_floats(shape.quads, False)

    if call.state_size > 16:
        if call.batch * _ceil(call.channels, 12) <= device.multiprocessors and fits(_FEW_32):
            return _FEW_32, best(2, 3)
        if call.batch * _ceil(call.channels, 20) <= 2 * device.multiprocessors:
            return _FEW_BLOCKS_32, best(4, 5)
        return _STATES_32, best(4, 6, 8)
    if call.batch * call.channels >= 64 * device.multiprocessors:
        return _MANY, best(4, 6, 8)
    few = call.batch * _ceil(call.channels, 16) <= device.multiprocessors
    if few or not fits(_MEDIUM):
        return _FEW, best(2, 3, 4)
    return _MEDIUM, best(5, 6, 7, 8, 9, 10)


def _scan_plan(
    call: Any, shape: _Shape, quads: int, chunks: int, chunk_length: int, workspace: int, states: tuple[int, int, int]
) -> _PromptPlan:
    """``states``: values of a row of B and of C, and where the two are."""
    stagers = max(
        _ceil(shape.step * quads, 32 * shape.items),
        _ceil(shape.step * shape.states * shape.lanes // shape.wide, 32 * shape.packs),
    )
    count, B, C = states
    vectors = call.channels % 4 == 0 and count % shape.wide == 0 and B % 16 == C % 16 == 0
    vectors = vectors and _aligned(call, "x dt z y", 4 * _BYTES[call.dtype])
    steps = workspace + 4 * call.batch * chunks * call.channels * call.state_size if chunks > 1 else None
    return _PromptPlan(
        quads, _ceil(call.channels, 4 * quads), 4 * quads * shape.lanes // 32, stagers, chunks, chunk_length, vectors,
        count, B, C, workspace or None, steps,
    )  # fmt: skip


def _scan_launch(call: Any, shape: _Shape, plan: _PromptPlan, *, summary: bool) -> Launch:
    written = f"mamba::scan::Shape<{', '.join(map(str, shape))}>"
    name = _kernel("scan", "prompt_kernel", _TYPES[call.dtype], written, bool(plan.vectors), summary)
    finishers = 0 if summary else _ceil(shape.step * plan.quads, 32 * shape.finished)
    threads = 32 * (plan.scanners + plan.stagers + finishers)
    grid = (call.batch * plan.groups, plan.chunks - 1 if summary else plan.chunks)
    return Launch(_PROMPT, name, grid, (threads,), 4 * shape.shared_floats(plan.quads, summary), (call, plan))


def _scan_step(call: Any) -> Launch:
    N, vec = call.state_size, 16 // _BYTES[call.state_dtype]
    rows = 1
    warps = 4
    if N % vec == 0 and _aligned(call, "ssm_state ssm_state_out B C A", 16):
        lanes = next(n for n in (16, 32, 64, 128, 32 * vec) if n >= N or n == 32 * vec) // vec
        iterations = _ceil(256, 32 * vec) if N > 128 else 1
        passes = lanes
        if N <= 16:
            channels = call.batch * call.channels
            rows = 4 if channels >= 800_000 else 2 if channels >= 100_000 else 1
            warps = 2 if rows == 4 else 4
            passes = lanes if channels >= 10_000 else 1
    else:
        vec = 1
        most = ((8, 8, 1), (16, 8, 2), (24, 8, 3), (32, 16, 2), (64, 32, 2), (128, 32, 4), (256, 32, 8))
        _, lanes, iterations = next(shape for shape in most if shape[0] >= N)
        passes = lanes
    channel_blocks = _ceil(call.channels, warps * passes * 32 // lanes)
    types = (_TYPES[call.dtype], _TYPES[call.state_dtype])
    name = _kernel("scan", "step_kernel", *types, vec, lanes, iterations, passes, rows)
    grid = (channel_blocks * _ceil(call.batch, rows),)
    return Launch("selective_scan_step.cuh", name, grid, (32 * warps,), 0, (call, c_uint32(channel_blocks)))


# --- ssd_scan.cu -------------------------------------------------------------------------------------------------


def ssd_scan(call: Any, workspace: int, device: Device) -> list[Launch]:
    """As the launcher in ``ssd_scan.cu``: call is its struct, workspace an address."""
    if call.length > 1:
        return _ssd_prompt(call, workspace, device)
    channels, group_row = call.heads * call.head_dim, call.groups * call.state_size
    return [_ssd_step(call, _Places(call.x, call.B, call.C, call.dt, None, channels, group_row, call.heads, 0))]


def ssd_update(call: Any, workspace: int, device: Device) -> list[Launch]:
    """As the launcher in ``ssd_scan.cu``: call is its struct; workspace is not used."""
    from mamba_deploy.plugins.kernels import MambaSsdScan

    item, channels, states = _BYTES[call.dtype], call.heads * call.head_dim, call.groups * call.state_size
    x = call.projected + channels * item
    B, C = x + channels * item, x + (channels + states) * item
    at = _Places(x, B, C, C + states * item, call.projected, *4 * [2 * channels + 2 * states + call.heads])
    scan = MambaSsdScan(batch=call.batch, length=1, x=x, dt=at.dt, B=B, C=C)
    for name in "heads head_dim state_size groups dtype state_dtype dt_softplus skip_per_channel dt_min dt_max".split():
        setattr(scan, name, getattr(call, name))
    for name in "A D dt_bias ssm_state seq_lens y ssm_state_out".split():
        setattr(scan, name, getattr(call, name))
    return [_ssd_step(scan, at)]


class _Places(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "B", "C", "dt", "z")),
        *((name, c_int64) for name in ("x_row", "group_row", "dt_row", "z_row")),
    ]


def _ssd_step(call: Any, at: _Places) -> Launch:
    N, item = call.state_size, _BYTES[call.state_dtype]
    vec, iterations = 16 // item, 1
    if N % vec == 0 and _aligned(call, "ssm_state ssm_state_out B C", 16):
        lanes = next((n for n in (4, 8, 16, 32) if n * vec >= N), 32)
        iterations = 2 if item == 4 and N > 128 else 1
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
    types = (_TYPES[call.dtype], _TYPES[call.state_dtype])
    name = _kernel("ssd", "step_kernel", *types, vec, lanes, iterations, sets, uniform)
    return Launch("ssd_step.cuh", name, (_ceil(_ceil(rows, warp_rows), warps),), (32 * warps,), 0, (call, at, by))


class _Segments(ctypes.Structure):
    _fields_ = [("count", c_int32), ("length", c_int32), ("states", c_void_p), ("decays", c_void_p)]


class _Layout(ctypes.Structure):
    _fields_ = [("tiles", c_uint32), ("channels", c_int32), ("stages", c_int32)]


_CHUNK = 64


def _ssd_room(call: Any) -> int:
    return max(1, min(_ceil(call.length, _CHUNK), 512 // (call.batch * call.heads)))


def _segment_floats(call: Any) -> int:
    return _ceil(call.batch * call.heads * call.head_dim * call.state_size, 64) * 64


def _segments_floats(call: Any) -> int:
    room = _ssd_room(call)
    return 0 if room == 1 else _ceil(room * (_segment_floats(call) + call.batch * call.heads), 64) * 64


def _ssd_workspace(call: Any) -> int:
    return (_padding(call, 0).end if _is_padded(call) else 4 * _segments_floats(call)) // 4


class _Copy(NamedTuple):
    """To [matrices, *to_shape] from [matrices, *from_shape] of elements of so many bytes."""

    source: int
    target: int
    matrices: int
    from_shape: tuple[int, int]
    to_shape: tuple[int, int]
    item: int


class _Resize(ctypes.Structure):
    _fields_ = [
        ("from_", c_void_p), ("to", c_void_p), ("rows", c_int64),
        *((name, c_int32) for name in ("from_rows", "from_cols", "to_rows", "to_cols")),
    ]  # fmt: skip


class _Padding(NamedTuple):
    """The call that the tensor cores run in place of one of other sizes, and the copies around it."""

    call: Any
    before: list[_Copy]
    after: list[_Copy]
    end: int  # of the workspace


def _is_padded(call: Any) -> bool:
    if call.dtype == 0 or call.length < _PAD_TOKENS or (call.head_dim % 8 == 0 and call.state_size % 8 == 0):
        return False
    P, N = _padded(call.head_dim), _padded(call.state_size)
    return bool(max(call.heads * P, call.groups * N) <= 2**31 - 1)


def _padding(call: Any, workspace: int) -> _Padding:
    to = type(call).from_buffer_copy(call)
    P, N = call.head_dim, call.state_size
    to.head_dim, to.state_size = to_P, to_N = _padded(P), _padded(N)
    end = workspace + 4 * _segments_floats(to)
    before, after = [], []

    def take(count: int, rows: int, cols: int, item: int) -> int:
        nonlocal end
        taken = end
        end += _ceil(count * rows * cols * item, 256) * 256
        return taken

    if to_P != P:
        rows = call.batch * call.length * call.heads
        x, y, D = take(rows, 1, to_P, 2), take(rows, 1, to_P, 2), take(call.heads, 1, to_P, 4)
        before.append(_Copy(call.x, x, rows, (1, P), (1, to_P), 2))
        after.append(_Copy(y, call.y, rows, (1, to_P), (1, P), 2))
        to.x, to.y = x, y
        if call.skip_per_channel and call.D:
            before.append(_Copy(call.D, D, call.heads, (1, P), (1, to_P), 4))
            to.D = D
    if to_N != N:
        rows = call.batch * call.length * call.groups
        B, C = take(rows, 1, to_N, 2), take(rows, 1, to_N, 2)
        before += [_Copy(source, copy, rows, (1, N), (1, to_N), 2) for source, copy in ((call.B, B), (call.C, C))]
        to.B, to.C = B, C
    heads, item = call.batch * call.heads, _BYTES[call.state_dtype]
    state = take(heads, to_P, to_N, item)
    before.append(_Copy(call.ssm_state, state, heads, (P, N), (to_P, to_N), item))
    after.append(_Copy(state, call.ssm_state_out, heads, (to_P, to_N), (P, N), item))
    to.ssm_state = to.ssm_state_out = state
    return _Padding(to, before, after, end)


_WORDS = {16: "uint4", 8: "uint2", 4: "uint32_t", 2: "uint16_t"}


def _pad_launch(copy: _Copy) -> Launch:
    """In the widest words that rows on both sides are made of."""
    (from_rows, from_cols), (to_rows, to_cols) = copy.from_shape, copy.to_shape
    multiples = (from_cols * copy.item, to_cols * copy.item, copy.source, copy.target)
    word = next(word for word in _WORDS if word == copy.item or not any(number % word for number in multiples))
    elements = word // copy.item
    from_cols, to_cols = from_cols // elements, to_cols // elements
    rows = copy.matrices * to_rows
    resize = _Resize(copy.source, copy.target, rows, from_rows, from_cols, to_rows, to_cols)
    grid = (min(_ceil(rows, max(1024 // to_cols, 1)), 2**31 - 1),)
    return Launch("pad.cuh", _kernel("pad", "pad_kernel", _WORDS[word]), grid, (256,), 0, (resize,))


def _ssd_prompt(call: Any, workspace: int, device: Device) -> list[Launch]:
    padded = workspace and _is_padded(call)
    inner, before, after, _ = _padding(call, workspace) if padded else _Padding(call, [], [], 0)
    aligned = inner.head_dim % 8 == 0 and inner.state_size % 8 == 0 and _aligned(inner, "x y B C", 16)
    if _BYTES[call.dtype] == 2 and call.length > 4 and aligned and device.major >= 8:
        chunked = _ssd_chunked(inner, workspace, device)
        if chunked:
            return [*map(_pad_launch, before), *chunked, *map(_pad_launch, after)]
    T = _TYPES[call.dtype]
    lanes = next(lanes for lanes in (4, 8, 16, 32) if call.state_size <= 8 * lanes)
    warps = 2 if lanes == 4 else 4
    rows = warps * 4 * 32 // lanes
    tiles = _ceil(call.head_dim, rows)
    segments = _segments(call, tiles, device, (4.0, 0.6, 0.7), workspace)
    shared = 4 * 16 * (2 * 8 * lanes + 2 * rows + 2)

    def kernel(output: bool) -> tuple[str, str, int, int]:
        return "ssd_recurrent.cuh", _kernel("ssd", "recurrent_kernel", T, lanes, output), 32 * warps, shared

    return _ssd_launches(call, segments, tiles, kernel(False), kernel(True), c_uint32(tiles))


def _ssd_chunked(call: Any, workspace: int, device: Device) -> list[Launch]:
    """On the tensor cores; none where a block's shared memory does not suffice."""
    nt = next(nt for nt in (64, 128, 256) if call.state_size <= nt)
    load, most = (1, 32) if nt > 128 else (2, 80)

    def shared(channels: int, stages: int, output: bool) -> int:
        stage = (2 if output else 1) * _CHUNK * nt + _CHUNK * (channels + 8)
        return stages * (1040 + 2 * stage) + (2 * 5376 if output else 0)

    tiles = _ceil(call.head_dim, most) - 1
    while True:
        tiles += 1
        channels = _ceil(_ceil(call.head_dim, tiles), 16) * 16
        if channels <= 16 or shared(channels, 2, True) <= device.shared_bytes:
            break
    stages = 4
    while stages > 2 and shared(channels, stages, True) > device.shared_bytes:
        stages -= 1
    if shared(channels, stages, True) > device.shared_bytes:
        return []
    segments = _segments(call, tiles, device, (1.9, 0.4, 1.0), workspace)

    def kernel(output: bool) -> tuple[str, str, int, int]:
        name = _kernel("ssd", "chunk_kernel", _TYPES[call.dtype], nt, output)
        threads = 32 * ((4 if output else 0) + 1 + load) + 2 * channels
        return "ssd_prompt.cuh", name, threads, shared(channels, stages, output)

    return _ssd_launches(call, segments, tiles, kernel(False), kernel(True), _Layout(tiles, channels, stages))


def _segments(call: Any, tiles: int, device: Device, costs: tuple[float, float, float], workspace: int) -> _Segments:
    chunks, blocks = _ceil(call.length, _CHUNK), call.batch * call.heads * tiles
    chunk_us, state, turn = costs

    def load(n: int) -> float:
        turns = _ceil(n, device.multiprocessors)
        return 1.0 if turns < 2 else turn * turns

    state_bytes = 16.0 * _segment_floats(call)
    best, least = chunks, chunks * chunk_us * load(blocks)
    for count in range(2, (_ssd_room(call) if workspace else 1) + 1):
        length = _ceil(chunks, count)
        if _ceil(chunks, length) != count:
            continue
        in_turns = load(blocks * count) + state * load(blocks * (count - 1))
        time = length * chunk_us * in_turns + 5.0 + count * state_bytes / 3e6
        if time < least:
            least, best = time, length
    count = _ceil(chunks, best)
    decays = workspace + (4 * count * _segment_floats(call) if count > 1 else 0)
    return _Segments(count, best * _CHUNK, workspace or None, decays or None)


def _ssd_launches(
    call: Any,
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
        found.append(Launch(source, name, (width, count - 1), (threads,), shared, (call, segments, layout)))
        grid = (_ceil(call.batch * call.heads * call.head_dim * call.state_size, 256),)
        passing = "mamba::ssd::pass_states_kernel"
        found.append(Launch("ssd_recurrent.cuh", passing, grid, (256,), 0, (call, segments)))
    source, name, threads, shared = output
    return [*found, Launch(source, name, (width, count), (threads,), shared, (call, segments, layout))]


class _Divisor(ctypes.Structure):
    _fields_ = [("divisor", c_uint32), ("factor", c_uint32), ("shift", c_uint32)]


class _StepDivisors(ctypes.Structure):
    _fields_ = [*((name, _Divisor) for name in ("warps", "rows", "heads", "group")), ("small", c_int32)]


def _divisor(divisor: int) -> _Divisor:
    shift = (divisor - 1).bit_length()
    return _Divisor(divisor, ((((1 << shift) - divisor) << 32) // divisor + 1) & 0xFFFFFFFF, shift)


# --- step.cu -----------------------------------------------------------------------------------------------------


class _Linear(ctypes.Structure):
    _fields_ = [
        *((n, c_int32) for n in "batch inputs outputs x_stride groups conv_first conv_channels conv_width".split()),
        *((n, c_int32) for n in ("rows", "group_size", "by_16")),
        ("eps", ctypes.c_float),
        *((n, c_void_p) for n in "x weight bias norm_weight residual conv_weight conv_bias conv_state".split()),
        *((n, c_void_p) for n in ("seq_lens", "y", "conv_state_out")),
    ]


_STEP = "step_linear.cuh"
_COLUMNS = 8  # rows of the batch that a tensor core takes at once
_NORM_ROWS, _HEAD_NORM_ROWS = 2, 1  # that a block of a product, of the head, norms by itself
_ROW_THREADS, _MOST_LANES = 1024, 32
_HEAD_THREADS, _HEAD_OUTPUTS = 256, 128  # of a block


def in_proj(call: Any, workspace: int, device: Device) -> list[Launch]:
    """As the launcher in ``step.cu``: call is its struct, workspace an address. So are the next four."""
    a = _Linear(
        call.batch, call.width, call.outputs, call.width, 1, call.conv_first, call.channels, call.conv_width,
        eps=call.eps, x=call.hidden, weight=call.weight, bias=call.bias, norm_weight=call.norm_weight,
        conv_weight=call.conv_weight, conv_bias=call.conv_bias, conv_state=call.conv_state, seq_lens=call.seq_lens,
        y=call.y, conv_state_out=call.conv_state_out,
    )  # fmt: skip
    return _linear(a, call.dtype, 0, workspace, device)


def x_proj(call: Any, workspace: int, device: Device) -> list[Launch]:
    """See :func:`in_proj`."""
    a = _Linear(call.batch, call.channels, call.outputs, call.row, 1, x=call.x, weight=call.weight, y=call.y)
    return _linear(a, call.dtype, call.dtype, workspace, device)


def out_proj(call: Any, workspace: int, device: Device) -> list[Launch]:
    """See :func:`in_proj`."""
    a = _Linear(
        call.batch, call.channels, call.width, call.channels, call.groups, eps=call.eps, x=call.x, weight=call.weight,
        bias=call.bias, norm_weight=call.norm_weight, residual=call.residual, y=call.y,
    )  # fmt: skip
    return _linear(a, call.dtype, call.dtype, workspace, device)


def _shared_stride(inputs: int) -> int:
    return _ceil(inputs, 64) * 64 + 16


def _layout_bytes(a: _Linear, item: int, x_item: int, ring: int, warp_outputs: int) -> int:
    """Of shared memory, up to 8 rows."""
    normed = a.norm_weight is not None
    scales = 4 * _ceil(a.inputs, 4) * 4 + 64 * a.rows * a.groups if normed else 0
    raw = _ceil(a.rows * a.inputs * x_item, 16) * 16 if x_item != item else 0
    x = _ceil(a.rows * _shared_stride(a.inputs) * item, 16) * 16
    return scales + raw + x + max(ring, 4 * a.rows * warp_outputs)


def _most_rows(a: _Linear, device: Device, *sizes: int) -> int:
    """Sets the most rows of a block whose x has room in shared memory; gives the bytes."""
    a.rows = min(a.batch, _COLUMNS)
    while _layout_bytes(a, *sizes) > device.shared_bytes:
        a.rows -= 1
    return _layout_bytes(a, *sizes)


def _complete(a: _Linear, x_item: int) -> None:
    """Sets what follows from the sizes and addresses."""
    a.group_size = a.inputs // a.groups
    a.by_16 = not (a.x_stride * x_item % 16 or a.inputs * x_item % 16 or a.x % 16)


def _norm_apart(a: _Linear, dtype: int, x_dtype: int, workspace: int) -> Launch:
    """The norm in a kernel of its own; changes ``a`` to read what that writes."""
    stride = _ceil(a.inputs, 32) * 32
    a.rows = 1
    shared = _layout_bytes(a, _BYTES[dtype], _BYTES[x_dtype], 0, 0)
    name = _kernel("step", "norm_kernel", _TYPES[dtype], _TYPES[x_dtype])
    arguments = (_Linear.from_buffer_copy(a), c_void_p(workspace), c_int32(stride))
    a.x, a.x_stride, a.norm_weight, a.groups = workspace, stride, None, 1
    _complete(a, _BYTES[dtype])
    return Launch(_STEP, name, (a.batch,), (256,), shared, arguments)


def _row_product(a: _Linear, dtype: int, x_dtype: int, device: Device) -> list[Launch]:
    """Of a row or two and many inputs; else none."""
    if a.batch > _NORM_ROWS or a.inputs < (1536 if a.outputs > a.inputs else 3072):
        return []
    item = _BYTES[dtype]
    pieces = _ceil(a.outputs, 16 // item)
    waves = _ceil(pieces, _MOST_LANES * device.multiprocessors)
    lanes = max(_ceil(pieces, waves * device.multiprocessors), 4 if 2 * pieces > device.multiprocessors else 1)
    of_row = 4 * (max(_ceil(a.inputs, 4) * 4, _ROW_THREADS) + _ROW_THREADS * 16 // item)
    shared = a.batch * (of_row + lanes * (16 // item) * (56 if item == 4 else 44))
    if shared + 128 * a.batch > device.shared_bytes:
        return []
    name = _kernel("step", "row_kernel", _TYPES[dtype], _TYPES[x_dtype], a.batch)
    return [Launch("step_row.cuh", name, (_ceil(pieces, lanes),), (_ROW_THREADS,), shared, (a, c_int32(lanes)))]


def _linear(a: _Linear, dtype: int, x_dtype: int, workspace: int, device: Device) -> list[Launch]:
    _complete(a, _BYTES[x_dtype])
    of_few = _row_product(a, dtype, x_dtype, device)
    if of_few:
        return of_few
    before = []
    if a.batch > _NORM_ROWS and a.norm_weight is not None:
        before, x_dtype = [_norm_apart(a, dtype, x_dtype, workspace)], dtype
    if _BYTES[x_dtype] == 2 and _is_tile(a, dtype, device):
        return [*before, _tile(a, dtype, False, device)]
    item = _BYTES[dtype]
    tiles = _ceil(a.outputs, 64 // item)
    some, roomy = 3 * tiles >= device.multiprocessors, device.major >= 8 and device.shared_bytes >= 160 << 10
    ring = some and roomy and a.inputs >= 2048
    nbytes, warps = (4, 16) if not some else (8, 16) if ring else (8, 8)
    if 2 * tiles >= 3 * device.multiprocessors:
        nbytes, warps, ring = 16, 8, False
    in_ring = 8 * 4 * nbytes * 32 * warps if ring else 0
    outputs = 8 * nbytes // item
    shared = _most_rows(a, device, item, _BYTES[x_dtype], in_ring, warps * outputs)
    name = _kernel("step", "linear_kernel", _TYPES[dtype], _TYPES[x_dtype], nbytes, warps, ring)
    grid = (_ceil(a.outputs, outputs), _ceil(a.batch, a.rows))
    return [*before, Launch(_STEP, name, grid, (32 * warps,), shared, (a,))]


_TILE_THREADS, _TILE_INPUTS, _MOST_TILES = 512, 64, 5


def _is_tile(a: _Linear, dtype: int, device: Device) -> bool:
    if _BYTES[dtype] != 2 or device.major < 8 or a.norm_weight is not None or not a.by_16 or a.batch <= _NORM_ROWS:
        return False
    return bool(a.batch > _COLUMNS or a.inputs >= 2048)


def _is_together(a: _Linear) -> bool:
    """Whether 4 neighbouring outputs are read and written together, as all published models allow."""
    if a.conv_channels > 0 and (a.conv_width != 4 or a.conv_first % 4 or a.conv_channels % 4):
        return False
    given = (a.bias, a.residual, a.y, a.conv_weight, a.conv_bias, a.conv_state, a.conv_state_out)
    return all((address or 0) % 16 == 0 for address in given)


def _tile(a: _Linear, dtype: int, of_head: bool, device: Device) -> Launch:
    """The cut that leaves the fullest multiprocessor the fewest bytes to move, as in ``step.cu``."""
    tiles = 1 if a.batch <= 16 else 2 if a.batch <= 32 else 4
    rows, turns, stages = 16 * tiles, 2 if tiles == 4 else 4, _ceil(a.inputs, _TILE_INPUTS)
    most = 1 if of_head or device.major < 9 else 8
    cuts = []
    for nt in range(1, _MOST_TILES + 1):
        outputs = 32 * nt
        pitch = 2 * _TILE_INPUTS + 16
        stage = (outputs * pitch if of_head else _TILE_INPUTS * (2 * outputs + 16)) + rows * pitch
        shared = max(stage * min(max((96 << 10) // stage, 4), 8), 4 * turns * rows * (outputs + 8))
        if shared > device.shared_bytes or (nt == _MOST_TILES and not _is_together(a)):
            break
        for split in (1, 2, 4, 8):
            if split > min(most, stages):
                break
            room = device.multiprocessors * (1000 if split <= 2 else 1000 - 35 * split) // 1000
            blocks = _ceil(a.outputs, outputs) * split * _ceil(a.batch, rows)
            sums = 0 if split == 1 else 2 * 4 * turns * rows * outputs
            moved = _ceil(stages, split) * (2 * _TILE_INPUTS * (outputs + rows) + (5 << 10)) + sums
            cuts.append((_ceil(blocks, room) * moved, nt, split, shared))
    _, nt, split, shared = min(cuts)
    name = _kernel("step", "tile_kernel", _TYPES[dtype], tiles, nt, of_head)
    grid = (_ceil(a.outputs, 32 * nt) * split, _ceil(a.batch, rows))
    return Launch("step_tile.cuh", name, grid, (_TILE_THREADS,), shared, (a, c_int32(split)), split)


def head(call: Any, workspace: int, device: Device) -> list[Launch]:
    """See :func:`in_proj`."""
    a = _Linear(
        call.batch, call.width, call.vocab, call.width, 1, eps=call.eps, x=call.hidden, weight=call.weight,
        norm_weight=call.norm_weight, y=call.y,
    )  # fmt: skip
    _complete(a, 4)
    if a.batch <= _HEAD_NORM_ROWS:
        threads = 32 * min(_ceil(a.inputs, 512 // _BYTES[call.dtype]), 16)
        name = _kernel("step", "row_head_kernel", _TYPES[call.dtype])
        return [Launch("step_row.cuh", name, (_ceil(a.outputs, 8),), (threads,), 0, (a,))]
    norm = _norm_apart(a, call.dtype, 0, workspace)
    if _is_tile(a, call.dtype, device):
        return [norm, _tile(a, call.dtype, True, device)]
    shared = _most_rows(a, device, _BYTES[call.dtype], _BYTES[call.dtype], 0, 0)
    name = _kernel("step", "head_kernel", _TYPES[call.dtype])
    grid = (_ceil(a.outputs, _HEAD_OUTPUTS), _ceil(a.batch, a.rows))
    return [norm, Launch(_STEP, name, grid, (_HEAD_THREADS,), shared, (a,))]


def selective_update(call: Any, workspace: int, device: Device) -> list[Launch]:
    """See :func:`in_proj`."""
    item = _BYTES[call.dtype]
    warps, channels = 16 // item, 128 // item
    groups, rows = _ceil(call.channels, channels), 1
    most = 3 * _COLUMNS if item == 2 and device.major >= 8 else _COLUMNS
    while rows < min(call.batch, most) and groups * _ceil(call.batch, rows) > 2 * device.multiprocessors:
        rows += 1

    def nbytes(rows: int) -> int:
        low = _ceil(rows * _shared_stride(call.rank) * item, 16) * 16
        return low + 4 * _ceil(2 * rows * call.state_size, 4) * 4 + 4 * rows * warps * channels

    while rows > 1 and nbytes(rows) > device.shared_bytes:
        rows -= 1
    name = _kernel("scan", "update_kernel", _TYPES[call.dtype], rows if rows <= 2 else _ceil(rows, _COLUMNS) * _COLUMNS)
    grid, arguments = (groups, _ceil(call.batch, rows)), (call, c_int32(rows))
    return [Launch("selective_update.cuh", name, grid, (32 * warps,), nbytes(rows), arguments)]


# --- workspace ---------------------------------------------------------------------------------------------------


def workspace_bytes(op: str, call: Any) -> int:
    """As ``mamba_OP_workspace`` in C."""
    floats = 0
    if op == "selective_scan":
        floats = _scan_workspace(call)
    elif op == "ssd_scan":
        floats = _ssd_workspace(call)
    elif op in ("in_proj", "out_proj", "head") and call.batch > (_HEAD_NORM_ROWS if op == "head" else _NORM_ROWS):
        inputs = call.channels if op == "out_proj" else call.width
        floats = _ceil(call.batch * _ceil(inputs, 32) * 32 * _BYTES[call.dtype], 4)
    return _ceil(4 * floats, 256) * 256
