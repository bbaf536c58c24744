"""Peers of bench_peers.py: what else runs a Mamba model on a GPU, on the weights of our reference or of transformers.

The step of mamba_ssm is its own Triton kernels from its unpacked sources, fused add and norm among them, PyTorch's
products, and a convolution of ours without its ``torch.roll``; as in our graph, A is not computed again from its
logarithm. Triton is imported only once it is needed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl

    from mamba_deploy.model import MambaModel

STEP, PROMPT = "mamba_ssm step, CUDA graph", "mamba_ssm kernels, torch conv, CUDA graph"
TRANSFORMERS, COMPILED = "transformers", "torch.compile of our reference"
PROJECTIONS = "projections alone"
EAGER = 30  # steps of transformers in a turn


class Contender(NamedTuple):
    """A peer on one number of rows."""

    feed: Callable[[Tensor], Tensor] | None  # [B] or [B, L] tokens -> logits [B, V], from a state of zeros on
    run: Callable[[], Any]  # what is timed
    steps: int  # of a turn
    owns: Any = None  # whose memory a CUDA graph uses


class Kernels(NamedTuple):
    """Of mamba_ssm, by its names, and a convolution."""

    rms_norm_fn: Any
    rmsnorm_fn: Any
    selective_state_update: Any
    mamba_chunk_scan_combined: Any
    conv_update: Any


def missing(mamba_ssm: Path | None) -> dict[str, str]:
    """Peers that cannot be had here, and why."""
    lacking = [name for name in ("einops", "triton") if importlib.util.find_spec(name) is None]
    found = {}
    if mamba_ssm is None or lacking:
        found[STEP] = found[PROMPT] = f"needs {' and '.join(lacking) or '--mamba-ssm'}"
    if "triton" in lacking:
        found[COMPILED] = "needs triton"
    if importlib.util.find_spec("transformers") is None:
        found[TRANSFORMERS] = "needs transformers"
    return found


# --- the sources of mamba_ssm, also for bench_kernels.py ------------------------------------------------------------


def source_version(folder: Path) -> str:
    """Of an unpacked source distribution."""
    lines = (folder / "PKG-INFO").read_text(encoding="utf-8").splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("Version:"))


def bare_package(name: str, folder: Path) -> None:
    """Without its ``__init__``, which would ask for everything the package can do."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


class _OneWarp:
    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **options: self.kernel[grid](*args, **{**options, "num_warps": 1})


def with_one_warp(module: Any) -> Callable[..., Tensor]:
    """``selective_state_update`` of its module, with one warp a program instead of four."""
    stock = module._selective_scan_update_kernel

    def update(*args: Any, **options: Any) -> Tensor:
        module._selective_scan_update_kernel = _OneWarp(stock)
        try:
            return module.selective_state_update(*args, **options)
        finally:
            module._selective_scan_update_kernel = stock

    return update


def load_kernels(folder: Path) -> dict[str, Kernels]:
    """From the sources, not installed: as they are, and with one warp a program of the state update."""
    bare_package("mamba_ssm", folder / "mamba_ssm")
    names = ("layer_norm", "layernorm_gated", "selective_state_update", "ssd_combined")
    norm, gated, update, scan = (importlib.import_module(f"mamba_ssm.ops.triton.{name}") for name in names)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]  # lest transformers take it for all of mamba_ssm
    kernels = Kernels(
        norm.rms_norm_fn,
        gated.rmsnorm_fn,
        update.selective_state_update,
        scan.mamba_chunk_scan_combined,
        conv_update,
    )
    return {"": kernels, ", 1 warp": kernels._replace(selective_state_update=with_one_warp(update))}


# --- a convolution in Triton ---------------------------------------------------------------------------------------


def _conv_update(x, x_row, weight, bias, state, y, channels, BLOCK: tl.constexpr):
    row, c = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = c < channels
    state += row * 3 * channels + c
    weight += c
    a = tl.load(state, mask=here)
    b = tl.load(state + channels, mask=here)
    d = tl.load(state + 2 * channels, mask=here)
    e = tl.load(x + row * x_row + c, mask=here)
    total = tl.load(bias + c, mask=here).to(tl.float32)
    total += a.to(tl.float32) * tl.load(weight, mask=here).to(tl.float32)
    total += b.to(tl.float32) * tl.load(weight + channels, mask=here).to(tl.float32)
    total += d.to(tl.float32) * tl.load(weight + 2 * channels, mask=here).to(tl.float32)
    total += e.to(tl.float32) * tl.load(weight + 3 * channels, mask=here).to(tl.float32)
    tl.store(state, b, mask=here)
    tl.store(state + channels, d, mask=here)
    tl.store(state + 2 * channels, e, mask=here)
    tl.store(y + row * channels + c, total * tl.sigmoid(total), mask=here)


@functools.cache
def _conv_kernel() -> Any:
    global tl  # where the kernel looks for it
    import triton
    import triton.language as tl

    return triton.jit(_conv_update)


def conv_update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Of width 4, with silu: x [B, C], state [B, 3, C], weight [4, C], bias [C] -> y [B, C]; the state is moved on."""
    y, (batch, channels) = x.new_empty(x.shape), x.shape
    grid = (-(-channels // 256), batch)
    _conv_kernel()[grid](x, x.stride(0), weight, bias, state, y, channels, BLOCK=256, num_warps=2)
    return y


# --- contenders ------------------------------------------------------------------------------------------------------


class Peer:
    """The weights of our reference model under the kernels of mamba_ssm, beside a state."""

    def __init__(
        self, model: MambaModel, kernels: Kernels, batch: int = 0, state_dtype: torch.dtype | None = None
    ) -> None:
        c, new = model.config, model.embedding.weight.new_zeros
        self.model, self.config, self.kernels = model, c, kernels
        self.taps = [layer.mixer.conv_weight.t().contiguous() for layer in model.layers]
        self.conv = [new(batch, c.d_conv - 1, c.conv_channels) for _ in model.layers]
        self.ssm = [new(batch, *c.ssm_state_shape, dtype=state_dtype) for _ in model.layers]

    def read(self, tokens: Tensor) -> Tensor:
        """[B] tokens onto the state, or prompts [B, L] from nothing (of Mamba-2 alone) -> logits [B, V]."""
        model, mix = self.model, self._mamba if self.config.generation == "mamba" else self._mamba2
        norm = functools.partial(self.kernels.rms_norm_fn, bias=None, eps=self.config.norm_eps, residual_in_fp32=True)
        h, residual = model.embedding(tokens), None
        for i, layer in enumerate(model.layers):
            u, residual = norm(h, layer.norm.weight, residual=residual, prenorm=True)
            h = mix(i, layer.mixer, u)
        if tokens.dim() == 2:
            h, residual = h[:, -1].contiguous(), residual[:, -1].contiguous()
        return norm(h, model.norm_f.weight, residual=residual) @ model.embedding.weight.t()

    def _conv(self, i: int, mixer: Any, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return self.kernels.conv_update(x, self.conv[i], self.taps[i], mixer.conv_bias)
        weight, most = mixer.conv_weight[:, None], self.config.d_conv - 1
        x = F.conv1d(x.transpose(1, 2), weight, mixer.conv_bias, padding=most, groups=len(weight))
        return F.silu(x[..., :-most].transpose(1, 2))

    def _mamba(self, i: int, mixer: Any, u: Tensor) -> Tensor:
        """As ``step`` of mamba_ssm/modules/mamba_simple.py."""
        x, z = mixer.in_proj(u).chunk(2, dim=-1)
        x = self._conv(i, mixer, x)
        dt, B, C = mixer.x_proj(x).split(mixer.sizes, dim=-1)
        y = self.kernels.selective_state_update(
            self.ssm[i], x, mixer.dt_proj(dt), mixer.A, B, C, mixer.D, z=z, dt_bias=mixer.dt_bias, dt_softplus=True
        )
        return mixer.out_proj(y)

    def _mamba2(self, i: int, mixer: Any, u: Tensor) -> Tensor:
        """As ``step`` and, for prompts, ``forward`` of mamba_ssm/modules/mamba2.py."""
        c, kernels, norm = self.config, self.kernels, mixer.norm
        z, x, dt = mixer.in_proj(u).split(mixer.in_sizes[2:], dim=-1)
        x, B, C = self._conv(i, mixer, x).split(mixer.conv_sizes, dim=-1)
        x, B, C = x.unflatten(-1, (c.n_heads, -1)), B.unflatten(-1, (c.n_groups, -1)), C.unflatten(-1, (c.n_groups, -1))
        if u.dim() == 2:
            dt, bias, D = (v[..., None].expand(*v.shape, c.head_dim) for v in (dt, mixer.dt_bias, mixer.D))
            A = mixer.A[:, None, None].expand(-1, c.head_dim, c.d_state)
            y = kernels.selective_state_update(self.ssm[i], x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True)
        else:
            y = kernels.mamba_chunk_scan_combined(
                x, dt, mixer.A, B, C, c.chunk_size, D=mixer.D, dt_bias=mixer.dt_bias, dt_softplus=True
            )
        size = c.d_inner // c.n_groups
        y = kernels.rmsnorm_fn(
            y.flatten(-2), norm.weight, None, z=z, eps=norm.eps, group_size=size, norm_before_gate=c.norm_before_gate
        )
        return mixer.out_proj(y)


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def captured(
    read: Callable[[Tensor], Tensor],
    tokens: Tensor,
    steps: int = 1,
    state: Iterable[Tensor] = (),
    choose: Callable[[Tensor], Tensor] = _likeliest,
) -> Contender:
    """A CUDA graph of it and of the choice of a token; run three times before, which compiles and tunes."""
    stream, graph, tokens = torch.cuda.Stream(), torch.cuda.CUDAGraph(), tokens.clone()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            choose(read(tokens))
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        logits = read(tokens)
        chosen = choose(logits)
    for tensor in state:
        tensor.zero_()

    def feed(new: Tensor) -> Tensor:
        tokens.copy_(new)
        graph.replay()
        return logits

    return Contender(feed, lambda: (graph.replay(), chosen)[0], steps, owns=read)


def peer_step(model: MambaModel, kernels: Kernels, tokens: Tensor, state_dtype: torch.dtype, steps: int) -> Contender:
    peer = Peer(model, kernels, len(tokens), state_dtype)
    return captured(peer.read, tokens, steps, [*peer.conv, *peer.ssm])


def peer_steps(
    model: MambaModel, kernels: Mapping[str, Kernels], tokens: Tensor, steps: int
) -> dict[str, Callable[[], Contender]]:
    """What makes each step of mamba_ssm, by its name: its kernels with a float16 and with a float32 state."""
    return {
        f"{STEP}{state}{warps}": functools.partial(peer_step, model, of, tokens, dtype, steps)
        for warps, of in kernels.items()
        for state, dtype in (("", torch.float16), (", float32 state", torch.float32))
    }


def peer_prompt(model: MambaModel, kernels: Kernels, ids: Tensor) -> Contender:
    return captured(Peer(model, kernels).read, ids)


def compiled_step(model: MambaModel, tokens: Tensor, steps: int) -> Contender:
    """The step of our reference, its state in place, in CUDA graphs of torch.compile's own."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    state, tokens = model.new_state(len(tokens)), tokens.clone()
    tensors = [*state.conv, *state.ssm]
    for tensor in (tokens, *tensors):
        torch._dynamo.mark_static_address(tensor)

    def step() -> tuple[Tensor, Tensor]:
        logits, new = model.step(tokens, state)
        for old, value in zip(tensors, (*new.conv, *new.ssm), strict=True):
            old.copy_(value)
        return logits, logits.argmax(-1)

    run = torch.compile(step, mode="reduce-overhead", dynamic=False)
    for _ in range(4):
        run()
    if torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]:
        raise RuntimeError("torch.compile makes no CUDA graph of it")
    for tensor in tensors:
        tensor.zero_()
    return Contender(lambda new: (tokens.copy_(new), run()[0].clone())[1], run, steps)


def eager(model: Any, tokens: Tensor) -> Contender:
    """transformers as it is: prompts [B, L], or steps [B] that read the likeliest token before."""
    kept: dict[str, Any] = {}
    last, is_step = [tokens], tokens.dim() == 1

    def feed(new: Tensor) -> Tensor:
        output = model(new[:, None] if is_step else new, use_cache=True, logits_to_keep=1, **kept)
        likeliest = output.logits[:, -1].argmax(-1)
        if is_step:
            kept["cache_params"], last[0] = output.cache_params, likeliest
        return output.logits[:, -1]

    return Contender(feed, lambda: feed(last[0]), EAGER if is_step else 1)


def projections(model: MambaModel, length: int) -> Contender:
    """All products with weights that a prompt takes, the head's of one token."""
    weight = model.embedding.weight
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {n: torch.randn(length, n).to(weight) for n in {linear.in_features for linear in linears}}

    def read(last: Tensor) -> Tensor:
        for linear in linears:
            linear(inputs[linear.in_features])
        return last @ weight.t()

    return captured(read, inputs[weight.shape[1]][-1:])._replace(feed=None)
