"""A prompt of a whole model over memory of the host: each launch by what its kernel is said to do."""

from __future__ import annotations

import ctypes
import math
import re
from typing import Any

import pytest
import torch
from gpu.models import DTYPES, Call, Model, Sizes

from mamba_deploy import ops
from mamba_deploy.plugins import launches_prompt
from mamba_deploy.plugins.nvrtc import Device, Gemm, Launch

F32 = torch.float32
HOPPER, TURING = Device(90, 9, 132, 232448), Device(75, 7, 40, 65536)
TYPES = {"float": torch.float32, "__half": torch.float16, "__nv_bfloat16": torch.bfloat16}
WORDS = {"uint16_t": torch.int16, "uint32_t": torch.int32, "uint2": torch.int64, "uint4": torch.complex128}
CASES = {
    "mamba": Sizes(),
    "mamba-norms": Sizes(norm_eps=1e-6, bias=True, taps=3),
    "mamba-odd": Sizes(inner=72, states=5, rank=6, given=False),
    "mamba-odd-rows": Sizes(inner=68, rank=3),
    "mamba2": Sizes(heads=8, states=32, skip=2),
    "mamba2-groups": Sizes(inner=256, heads=16, states=16, groups=8, skip=0),
    "mamba2-no-norm": Sizes(heads=8, states=32, gate_norm=False, bias=True),
    "mamba2-odd": Sizes(heads=5, inner=60, states=20, given=False),
    "mamba-rows": Sizes(width=128, inner=512, norm_eps=1e-6, bias=True),
    "mamba2-rows": Sizes(width=128, inner=512, heads=8, states=32, bias=True),
}


class Host:
    """Runs launches. What one reads or writes has to lie in a tensor of the call, or in the workspace, full of NaN."""

    def __init__(self, call: Call) -> None:
        needed = launches_prompt.workspace_bytes(call.struct)
        self.memory = torch.full((needed + 255,), 255, dtype=torch.uint8)  # 16 or 32 bits of 1 are NaN
        self.workspace = -(-self.memory.data_ptr() // 256) * 256
        owned = [call.logits, *call.fixed.values(), *(t for layer in call.layers for t in layer.values())]
        self.places = [(self.workspace, self.workspace + needed)]
        self.places += [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in owned if t is not None]

    def at(self, pointer: int | None, shape: tuple[int, ...], dtype: torch.dtype, row: int | None = None) -> Any:
        """What is there, None where nothing is; ``row`` values lie from one of the last rows to the next."""
        if not pointer:
            return None
        rows = math.prod(shape[:-1])
        count = ((rows - 1) * row if row else (rows - 1) * shape[-1]) + shape[-1]
        size = count * dtype.itemsize
        assert any(start <= pointer and pointer + size <= end for start, end in self.places)
        flat = torch.frombuffer((ctypes.c_uint8 * size).from_address(pointer), dtype=dtype)
        view = flat.as_strided((rows, shape[-1]), (row or shape[-1], 1))
        return view.unflatten(0, shape[:-1]) if len(shape) > 2 else view.view(shape) if len(shape) == 1 else view

    def run(self, launches: list[Launch | Gemm]) -> None:
        for one in launches:
            if isinstance(one, Gemm):
                self._gemm(one)
            else:
                name, _, parameters = re.sub(r"mamba::\w+::", "", one.kernel).partition("<")
                getattr(self, f"_{name}")(one, parameters.rstrip(">").split(", "))

    def _gemm(self, p: Gemm) -> None:
        T = DTYPES[p.dtype]
        assert p.workspace == self.workspace
        x = self.at(p.x, (p.rows, p.inputs), T, p.x_row).float()
        w = self.at(p.w, (p.outputs, p.inputs), T).t() if p.by_outputs else self.at(p.w, (p.inputs, p.outputs), T)
        y = self.at(p.y, (p.parts, p.rows, p.outputs), F32 if p.wide else T)
        pairs = zip(x.chunk(p.parts, dim=1), w.float().chunk(p.parts, dim=0), strict=True)
        result = torch.stack([inputs @ weights for inputs, weights in pairs])
        y.copy_(result + y.float() if p.add else result)

    def _embed_rows_kernel(self, one: Launch, parameters: list[str]) -> None:
        ids, embedding, hidden, vocab, width, *_ = (a.value for a in one.arguments)
        rows, (tokens,) = TYPES[parameters[0]], one.grid
        table = self.at(embedding, (vocab, width), rows)
        self.at(hidden, (tokens, width), F32).copy_(table[self.at(ids, (tokens,), torch.int32).long()])

    def _norm_kernel(self, one: Launch, parameters: list[str]) -> None:
        (a,), (T, X) = one.arguments, (TYPES[p] for p in parameters[:2])
        shape = (a.rows, a.groups * a.width)
        tokens = a.rows * a.length if a.seq_lens else a.rows
        x = self.at(a.x, (tokens, shape[1]), X, a.x_row).float()
        if a.sums:
            x = x + self.at(a.sums, (4, a.sum_rows, shape[1]), F32).sum(0)
        if a.seq_lens:
            lengths = self.at(a.seq_lens, (a.rows,), torch.int32)
            x = ops.last_token(x.unflatten(0, (a.rows, a.length)).contiguous(), lengths)
        elif a.sums:
            self.at(a.total, shape, F32).copy_(x)
        if a.z:
            x = x * torch.nn.functional.silu(self.at(a.z, shape, T, a.z_row).float())
        if a.eps >= 0:
            parts = x.unflatten(-1, (a.groups, a.width))
            scale = torch.rsqrt((parts * parts).mean(-1, keepdim=True) + a.eps)
            x = (parts * scale).flatten(-2) * self.at(a.weight, shape[1:], F32)
        self.at(a.y, shape, T).copy_(x)

    def _rows_kernel(self, one: Launch, parameters: list[str]) -> None:
        p, parts, T = one.arguments[0], one.grid[1], TYPES[parameters[0]]
        a = p.a
        assert not a.conv_channels  # of a single token alone
        x, w = self.at(a.x, (a.batch, a.inputs), T).float(), self.at(a.weight, (a.inputs, a.outputs), T).float()
        pairs = zip(x.chunk(parts, dim=1), w.chunk(parts, dim=0), strict=True)
        sums = torch.stack([inputs @ weights for inputs, weights in pairs])
        if p.sums:
            self.at(p.sums, (parts, a.batch, a.outputs), F32).copy_(sums)
            return
        bias = self.at(a.bias, (a.outputs,), T)
        self.at(a.y, (a.batch, a.outputs), T).copy_(sums[0] if bias is None else sums[0] + bias.float())

    def _x_proj_kernel(self, one: Launch, parameters: list[str]) -> None:
        (a,), T = one.arguments, TYPES[parameters[0]]
        x, w = self.at(a.x, (a.batch, a.inputs), T, a.x_stride), self.at(a.weight, (a.inputs, a.outputs), T)
        self.at(a.y, (a.batch, a.outputs), T).copy_(x.float() @ w.float())

    def _part_norms_kernel(self, one: Launch, parameters: list[str]) -> None:
        pointer, rows, rank, states, eps = (a.value for a in one.arguments)
        low = self.at(pointer, (rows, rank + 2 * states), TYPES[parameters[0]])
        for part in low.split([rank, states, states], dim=-1):
            v = part.float()
            part.copy_(v * torch.rsqrt((v * v).mean(-1, keepdim=True) + eps))

    def _bias_kernel(self, one: Launch, parameters: list[str]) -> None:
        bias, y, width = (a.value for a in one.arguments)
        added = self.at(bias, (width,), TYPES[parameters[0]]).float()
        rows = self.at(y, (*one.grid, width), TYPES[parameters[1]])
        rows.copy_(rows.float() + added if parameters[2] == "true" else added)

    def _pad_kernel(self, one: Launch, parameters: list[str]) -> None:
        (r,), word = one.arguments, WORDS[parameters[0]]
        count, rows, cols = r.rows // r.to_rows, min(r.from_rows, r.to_rows), min(r.from_cols, r.to_cols)
        target = self.at(r.to, (count, r.to_rows, r.to_cols), word)
        target.zero_()
        for i in range(count):
            first = r.from_ + i * r.from_rows * r.from_cols * word.itemsize
            target[i, :rows, :cols] = self.at(first, (rows, cols), word, r.from_cols)

    def _prompt_kernel(self, one: Launch, parameters: list[str]) -> None:
        a = one.arguments[0]
        if "conv" in one.kernel:
            self._convolution(a, one.arguments[1].value)
        elif parameters[-1] == "false":  # the last kernel where there are several
            self._selective_scan(a, one.arguments[1])

    def _pass_kernel(self, one: Launch, parameters: list[str]) -> None: ...

    def _pass_states_kernel(self, one: Launch, parameters: list[str]) -> None: ...

    def _convolution(self, a: Any, x_row: int) -> None:
        T, C = DTYPES[a.dtype], a.channels
        given = (self.at(a.weight, (C, a.width), T), self.at(a.bias, (C,), T))
        state = self.at(a.conv_state, (a.batch, C, a.width - 1), T).contiguous()
        x, lengths = self.at(a.x, (a.batch, a.length, C), T, x_row), self.at(a.seq_lens, (a.batch,), torch.int32)
        y, out = ops.causal_conv1d(x.contiguous(), *given, state, lengths, "silu")
        self.at(a.y, (a.batch, a.length, C), T).copy_(y)
        self.at(a.conv_state_out, (a.batch, C, a.width - 1), T).copy_(out)

    def _selective_scan(self, a: Any, plan: Any) -> None:
        T, S, rows, D, N = DTYPES[a.dtype], DTYPES[a.state_dtype], (a.batch, a.length), a.channels, a.state_size
        B, C = (self.at(p, (*rows, plan.states), T, plan.group_row)[..., :N].contiguous() for p in (plan.B, plan.C))
        y, state = ops.selective_scan(
            self.at(a.x, (*rows, D), T), self.at(a.dt, (*rows, D), T), self.at(a.A, (D, N), F32), B, C,
            self.at(a.D, (D,), F32), self.at(a.z, (*rows, D), T, plan.z_rows * D).contiguous(),
            self.at(a.dt_bias, (D,), F32), self.at(a.ssm_state, (a.batch, D, N), S).contiguous(),
            self.at(a.seq_lens, (a.batch,), torch.int32), True,
        )  # fmt: skip
        self.at(a.y, (*rows, D), T).copy_(y)
        self.at(a.ssm_state_out, (a.batch, D, N), S).copy_(state)

    def _chunk_kernel(self, one: Launch, parameters: list[str]) -> None:
        if parameters[-1] != "true":
            return
        a, at = one.arguments[:2]
        T, S, rows, heads = DTYPES[a.dtype], DTYPES[a.state_dtype], (a.batch, a.length), a.heads
        inner, group, state = heads * a.head_dim, (*rows, a.groups * a.state_size), (heads, a.head_dim, a.state_size)
        y, out = ops.ssd_scan(
            self.at(a.x, (*rows, inner), T, at.x).contiguous(), self.at(a.dt, (*rows, heads), T, at.dt).contiguous(),
            self.at(a.A, (heads,), F32), self.at(a.B, group, T, at.group).contiguous(),
            self.at(a.C, group, T, at.group).contiguous(),
            self.at(a.D, (heads, a.head_dim) if a.skip_per_channel else (heads,), F32),
            self.at(a.dt_bias, (heads,), F32), self.at(a.ssm_state, (a.batch, *state), S).contiguous(),
            self.at(a.seq_lens, (a.batch,), torch.int32), True, a.dt_min, a.dt_max, a.groups, 256,
        )  # fmt: skip
        self.at(a.y, (*rows, inner), T).copy_(y)
        self.at(a.ssm_state_out, (a.batch, *state), S).copy_(out)

    _recurrent_kernel = _chunk_kernel


@pytest.mark.parametrize("device", [HOPPER, TURING], ids=["hopper", "turing"])
@pytest.mark.parametrize("T", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_launches_compute_the_model(case: str, T: torch.dtype, device: Device) -> None:
    for B, L in ((1, 2), (3, 9), (2, 130)):
        model = Model(CASES[case], B, L, T, seed=L, all_logits=B == 3, dt_limits=(0.01, 1.0))
        call = Call(model, "cpu", same=B == 2)
        host = Host(call)
        host.run(launches_prompt.prompt(call.struct, host.workspace, device))
        check(call, model)


@pytest.mark.parametrize("T", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["mamba-rows", "mamba2-rows"])
def test_the_launches_compute_the_model_where_few_tokens_have_products_of_their_own(case: str, T: torch.dtype) -> None:
    device = HOPPER._replace(encode_map=lambda *given: 0)
    for B, L in ((1, 3), (3, 9), (2, 64), (2, 65)):
        model = Model(CASES[case], B, L, T, seed=L, all_logits=B == 3)
        call = Call(model, "cpu", same=B == 2)
        host = Host(call)
        planned = launches_prompt.prompt(call.struct, host.workspace, device)
        products = sum(isinstance(p, Launch) and p.source == "rows_product.cuh" for p in planned)
        assert products == (2 * CASES[case].layers if B * L <= 128 else 0)
        host.run(planned)
        check(call, model)


def check(call: Call, model: Model) -> None:
    wide, near = model.results(), model.results(None)
    lengths = model.fixed["seq_lens"]
    used = torch.arange(model.L) < lengths[:, None] if model.all_logits else lengths > 0
    results = [(call.logits[used], wide[0][used], near[0][used])]
    for found, want, other in zip(call.states, wide[1:], near[1:], strict=True):
        rows = (tuple(state[lengths > 0] for state in of_layer) for of_layer in zip(found, want, other, strict=True))
        results += rows
    for found, want, other in results:
        size = want.abs().max()
        error, expected = ((v.double() - want).abs().max() / size for v in (found, other))
        assert error <= max(3 * expected, 1e-5 if model.T == F32 else 2e-3), f"{error:.1e}, {expected:.1e} expected"
    if not model.all_logits:
        assert not call.logits[lengths == 0].any()


def test_a_layer_is_seven_launches() -> None:
    """Of Mamba; six of Mamba-2 where its scan is one kernel. And the embedding, the last norm and the head."""
    for case, launches in (("mamba", 7), ("mamba2", 6)):
        call = Call(Model(CASES[case], 1, 64, torch.float16), "cpu")
        planned = launches_prompt.prompt(call.struct, 1 << 40, HOPPER)
        assert len(planned) == launches * CASES[case].layers + 3
