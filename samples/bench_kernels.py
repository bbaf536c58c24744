"""Speed of the kernels on a GPU, beside the kernels of mamba_ssm and causal_conv1d and beside a copy of as many bytes.

    pip download --no-deps --no-binary :all: mamba_ssm==2.3.2.post1 causal-conv1d==1.7.0    # and unpack both
    python samples/bench_kernels.py --mamba-ssm DIR --causal-conv1d DIR --write samples/results/kernels.json

Needs torch with CUDA; the peers need Triton, einops, nvcc and ninja besides, and are left out without their folders.
Microseconds of a call, median: every contender's calls go, each on buffers of its own, into one CUDA graph; the
contenders take turns, and before a replay something else fills the L2 cache. The limit of a row is the larger of the
bytes that must move over the bandwidth of a 4 GB copy measured here, and of the arithmetic: exponentials at 16 a clock
and multiprocessor, or tensor core operations at the rate of a large product measured here. Rows of one token with
few bytes have the time of an empty graph node as their limit.
"""

from __future__ import annotations

import importlib
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import measured
import torch
from peers import bare_package, source_version, with_one_warp
from torch import Tensor

from mamba_deploy.plugins.kernels import Kernels, load

BF16, F32 = torch.bfloat16, torch.float32
COPY = "copy of as many bytes"
Launch = Callable[[], Tensor]  # enqueues a call, gives y


class Case(NamedTuple):
    """A row of the results."""

    name: str
    bytes: float  # that must be read and written
    exponentials: float
    operations: float  # of matrix products
    contenders: Callable[[], dict[str, Launch]]  # on new buffers; ours first


class Machine(NamedTuple):
    """What was measured of it."""

    bandwidth: float  # bytes a second, of a copy
    product: float  # operations a second
    clock: float  # Hz
    node: float  # microseconds of an empty one of a graph
    l2_bytes: int
    text: str


@click.command()
@click.option("--mamba-ssm", type=click.Path(exists=True, path_type=Path), help="Its unpacked source distribution.")
@click.option("--causal-conv1d", type=click.Path(exists=True, path_type=Path), help="Likewise.")
@click.option(
    "--library", type=click.Path(exists=True, path_type=Path), help="Of the kernels; else the one built here."
)
@click.option("--turns", default=15, show_default=True, help="Replays of each contender.")
@click.option("--only", default="", help="Rows whose name contains this.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the results as JSON.")
def main(
    mamba_ssm: Path | None, causal_conv1d: Path | None, library: Path | None, turns: int, only: str, write: Path | None
) -> None:
    """Measure, print, and write the results."""
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_properties(0)
    peers = Peers(mamba_ssm, causal_conv1d)
    machine = calibrate()
    exponential_rate = 16.0 * gpu.multi_processor_count * machine.clock
    click.echo(f"{gpu.name}: {machine.text}, empty node {machine.node:.2f} us")
    rows = []
    for case in _cases(load(library), peers):
        if only not in case.name:
            continue
        times = _measure(case, turns)
        by_bytes, by_products = case.bytes / machine.bandwidth, case.operations / machine.product
        seconds = max(by_bytes, case.exponentials / exponential_rate, by_products)
        ours, limit = times.pop("mamba-deploy"), max(1e6 * seconds, machine.node)
        row = {
            "name": case.name, "value": ours, "unit": "us", "limit": limit, "peers": times,
            "note": f"{case.bytes / ours / 1e6:.2f} TB/s" if by_bytes == seconds else "",
        }  # fmt: skip
        rows.append(row)
        others = ", ".join(f"{name} {time:.2f} ({time / ours:.2f}x)" for name, time in times.items())
        click.echo(f"{case.name}: {ours:.2f} us, {ours / limit:.2f}x the limit {limit:.2f}; {others}")
        if write is not None:  # after every row: what was measured stays if the run is broken off
            versions = {"cuda": str(torch.version.cuda), **peers.versions}
            measured.write(
                write, rows, machine=machine.text, packages=("mamba-deploy", "torch", "triton"), versions=versions,
                on_gpu=True,
            )  # fmt: skip


# --- measuring ---------------------------------------------------------------------------------------------------


def _measure(case: Case, turns: int) -> dict[str, float]:
    """Median microseconds of a call of each contender, and of a copy."""
    calls = min(max(int(2**29 / case.bytes), 2), 256)
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    made = [case.contenders() for _ in range(calls)]
    _check(case.name, made[0])
    half = math.ceil(case.bytes / 2 / 4096) * 4096  # aligned, as our buffers are
    for turn in made:
        source, target = (torch.zeros(half, dtype=torch.uint8, device="cuda") for _ in range(2))
        turn[COPY] = lambda s=source, t=target: t.copy_(s)
    for name in made[0]:
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for turn in made:
                turn[name]()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    other = torch.zeros(2**26, device="cuda")
    for i in range(turns + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.sum()  # through the L2 cache; long enough for the graph to be enqueued meanwhile
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i > 1:
                times[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def _check(name: str, contenders: dict[str, Launch]) -> None:
    """All compute the same: a figure of a wrong result would be worthless. Also the warm-up and compilation."""
    outputs = {contender: launch().float().reshape(-1) for contender, launch in contenders.items()}
    ours = outputs.pop("mamba-deploy")
    for contender, theirs in outputs.items():
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error < 2e-2:
            raise click.ClickException(f"{name}: ours and {contender} differ by {error:.1%}")


def calibrate() -> Machine:
    """What rows are held to; also those of bench_peers.py."""
    bandwidth, product, node = _bandwidth(), _product_rate(), _empty_node()
    clock = torch.cuda.clock_rate() * 1e6  # right after the products: under load
    text = f"copy {bandwidth / 1e12:.2f} TB/s, product {product / 1e12:.0f} TFLOP/s, {clock / 1e9:.2f} GHz"
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return Machine(bandwidth, product, clock, node, l2_bytes, text)


def _bandwidth() -> float:
    source = torch.zeros(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _best_seconds(lambda: target.copy_(source))


def _product_rate() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    return 2 * 8192**3 / _best_seconds(lambda: a @ b)


def _empty_node() -> float:
    """Microseconds of a kernel that writes four bytes, among 500 in a graph."""
    word = torch.zeros(1, device="cuda")
    word.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(500):
            word.zero_()
    return _best_seconds(graph.replay) / 500 * 1e6


def _best_seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)


# --- what is measured --------------------------------------------------------------------------------------------


def _cases(kernels: Kernels, peers: Peers) -> Iterator[Case]:
    for batch, heads in ((8, 64), (64, 64), (128, 64)):
        yield _ssd(kernels, peers, batch, 1, heads, 64, 128)
    yield _ssd(kernels, peers, 64, 1, 80, 64, 128)
    yield _ssd(kernels, peers, 64, 1, 64, 80, 128)
    yield _ssd(kernels, peers, 64, 1, 64, 64, 100)
    for batch in (64, 256):
        yield _selective(kernels, peers, batch, 1, 5120, 16)
    yield _selective(kernels, peers, 64, 1, 5120, 17)
    for batch, channels in ((64, 5376), (1024, 5376)):
        yield _conv(kernels, peers, batch, 1, channels)
    # one row, as in mamba-130m and mamba2-130m
    yield _conv(kernels, peers, 1, 1, 1536)
    yield _selective(kernels, peers, 1, 1, 1536, 16)
    yield _conv(kernels, peers, 1, 1, 1792)
    yield _ssd(kernels, peers, 1, 1, 24, 64, 128)
    yield _last(kernels, 1, 512, 768)
    for batch in (1, 8, 64):
        for filters in ({}, {"temperature": 1.0}, {"top_k": 50}, {"top_p": 0.9375}, {"top_k": 50, "top_p": 0.9375}):
            yield _choice(kernels, batch, 50280, filters)
    # prompts
    for channels in (1536, 5120):
        for length in (2048, 16384):
            for batch in (1, 8):
                yield _selective(kernels, peers, batch, length, channels, 16)
    yield _selective(kernels, peers, 1, 2048, 1537, 16)
    yield _selective(kernels, peers, 8, 2048, 1537, 16)
    yield _selective(kernels, peers, 1, 2048, 512, 16)  # in chunks
    for batch, channels in ((1, 512), (1, 1536), (8, 1536), (1, 5120)):
        yield _selective(kernels, peers, batch, 2048, channels, 17)
    yield _selective(kernels, peers, 1, 2048, 1536, 32)
    for length in (2048, 16384):
        yield _ssd(kernels, peers, 1, length, 128, 64, 128)
    yield _ssd(kernels, peers, 1, 2048, 24, 64, 128)
    yield _ssd(kernels, peers, 8, 2048, 24, 64, 128)
    yield _ssd(kernels, peers, 1, 2048, 96, 80, 128)
    yield _ssd(kernels, peers, 1, 2048, 128, 64, 64)
    yield _ssd(kernels, peers, 1, 2048, 128, 64, 100)
    yield _ssd(kernels, peers, 1, 2048, 128, 60, 128)
    for batch in (1, 8):
        yield _conv(kernels, peers, batch, 2048, 5376)
    yield _conv(kernels, peers, 1, 2048, 5375)


def _normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def _lengths(batch: int, length: int) -> Tensor:
    return torch.full((batch,), length, dtype=torch.int32, device="cuda")


def _workspace(kernels: Kernels, op: str, **sizes: int) -> Tensor:
    count = kernels.workspace_bytes(op, dtype="bfloat16", **sizes)
    return torch.empty(max(count, 1), dtype=torch.uint8, device="cuda")


def _conv(kernels: Kernels, peers: Peers, batch: int, length: int, channels: int) -> Case:
    """Width 4, silu, with a bias; the state stays in its buffer."""

    def contenders() -> dict[str, Launch]:
        x, weight, bias = _normal(batch, length, channels), _normal(channels, 4), _normal(channels)
        state, y, lengths = _normal(batch, channels, 3), torch.empty_like(x), _lengths(batch, length)

        def ours() -> Tensor:
            stream = torch.cuda.current_stream()
            kernels.causal_conv1d(x, weight, bias, state, lengths, "silu", y=y, state_out=state, stream=stream)
            return y

        return {"mamba-deploy": ours, **peers.conv(x, weight, bias, state)}

    moved = 2 * (2 * batch * length * channels + 2 * batch * channels * 3 + 5 * channels)
    name = f"conv_update/b{batch}_c{channels}" if length == 1 else f"conv/b{batch}_l{length}_c{channels}"
    return Case(name, moved, 0, 0, contenders)


def _selective(kernels: Kernels, peers: Peers, batch: int, length: int, channels: int, states: int) -> Case:
    """bfloat16 activations, float32 state in its buffer, with skip, gate and bias."""
    sizes = {"batch": batch, "length": length, "channels": channels, "state_size": states}

    def contenders() -> dict[str, Launch]:
        x, dt, z = (_normal(batch, length, channels) for _ in range(3))
        B, C = (_normal(batch, length, states) for _ in range(2))
        A = -torch.arange(1, states + 1, device="cuda", dtype=F32).repeat(channels, 1)
        D, bias = _normal(channels, dtype=F32), _normal(channels, dtype=F32) - 4
        state = torch.zeros(batch, channels, states, device="cuda")
        y, lengths = torch.empty_like(x), _lengths(batch, length)
        workspace = _workspace(kernels, "selective_scan", **sizes)

        def ours() -> Tensor:
            stream = torch.cuda.current_stream()
            kernels.selective_scan(
                x, dt, A, B, C, D, z, bias, state, lengths, y=y, state_out=state, workspace=workspace, stream=stream
            )
            return y

        return {"mamba-deploy": ours, **peers.selective(x, dt, A, B, C, D, z, bias, torch.zeros_like(state))}

    tokens = batch * length
    moved = 2 * tokens * (4 * channels + 2 * states) + 8 * batch * channels * states + 4 * channels * (states + 2)
    shape = f"d{channels}_n{states}"
    name = f"selective_update/b{batch}_{shape}" if length == 1 else f"selective_scan/b{batch}_l{length}_{shape}"
    return Case(name, moved, tokens * channels * states, 0, contenders)


def _ssd(kernels: Kernels, peers: Peers, batch: int, length: int, heads: int, head_dim: int, states: int) -> Case:
    """bfloat16 activations, float32 state in its buffer, one group, with skip and bias."""
    sizes = {
        "batch": batch, "length": length, "heads": heads, "head_dim": head_dim, "state_size": states, "groups": 1,
    }  # fmt: skip

    def contenders() -> dict[str, Launch]:
        x, dt = _normal(batch, length, heads * head_dim), _normal(batch, length, heads)
        B, C = (_normal(batch, length, states) for _ in range(2))
        A, D, bias = (
            -torch.rand(heads, device="cuda") * 15 - 1,
            _normal(heads, dtype=F32),
            _normal(heads, dtype=F32) - 4,
        )
        state = torch.zeros(batch, heads, head_dim, states, device="cuda")
        y, lengths = torch.empty_like(x), _lengths(batch, length)
        workspace = _workspace(kernels, "ssd_scan", **sizes)

        def ours() -> Tensor:
            stream = torch.cuda.current_stream()
            kernels.ssd_scan(
                x, dt, A, B, C, D, bias, state, lengths, y=y, state_out=state, workspace=workspace, stream=stream
            )
            return y

        return {"mamba-deploy": ours, **peers.ssd(x, dt, A, B, C, D, bias, torch.zeros_like(state))}

    tokens = batch * length
    moved = 2 * tokens * (2 * heads * head_dim + heads + 2 * states) + 8 * batch * heads * head_dim * states
    shape = f"h{heads}_p{head_dim}_n{states}"
    if length == 1:
        return Case(f"ssd_update/b{batch}_{shape}", moved, 0, 0, contenders)
    # Per token and head: the state in and out, and half a square of 64 tokens once with N, once with P.
    operations = tokens * heads * (4 * head_dim * states + 64 * (head_dim + states))
    return Case(f"ssd_scan/b{batch}_l{length}_{shape}", moved, 0, operations, contenders)


def _last(kernels: Kernels, batch: int, length: int, width: int) -> Case:
    def contenders() -> dict[str, Launch]:
        x, lengths = _normal(batch, length, width), _lengths(batch, length)
        y = torch.empty(batch, width, dtype=BF16, device="cuda")

        def ours() -> Tensor:
            kernels.last_token(x, lengths, y=y, stream=torch.cuda.current_stream())
            return y

        return {"mamba-deploy": ours}

    return Case(f"last_token/b{batch}_l{length}_d{width}", 4 * batch * width, 0, 0, contenders)


def _choice(kernels: Kernels, batch: int, vocab: int, filters: dict[str, Any]) -> Case:
    """Of the next token, greedy without filters; the logits lie in the L2 cache, where a step leaves them."""
    logits = 3 * _normal(batch, vocab, dtype=F32)
    greedy = not filters
    given = filters if greedy else {"temperature": 1.0, **filters}

    def contenders() -> dict[str, Launch]:
        uniform = torch.rand(1, batch, device="cuda", dtype=torch.float64)
        steps, tokens = (torch.zeros(batch, dtype=torch.int32, device="cuda") for _ in range(2))

        def ours() -> Tensor:
            stream = torch.cuda.current_stream()
            kernels.sample_token(logits, uniform, steps=steps, tokens=tokens, log=None, stream=stream, **given)
            return tokens

        def by_torch() -> Tensor:
            return logits.argmax(-1) if greedy else _draw(logits, uniform[0], **filters)

        return {"mamba-deploy": ours, "torch": by_torch}

    name = "_".join(f"{key}{value:g}" for key, value in filters.items()) or "greedy"
    return Case(f"sample_token/b{batch}_v{vocab}_{name}", 4 * batch * vocab, 0, 0, contenders)


def _draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """As transformers' generate() filters, in its order, and then by the sums of what is left."""
    scores = logits / temperature
    if top_k > 0:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ascending, ids = scores.sort()
        below = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        scores = scores.masked_fill(below.scatter(1, ids, below), -torch.inf)
    upto = scores.softmax(-1).cumsum(-1)
    return torch.searchsorted(upto, (uniform * upto[:, -1]).float()[:, None], right=True)[:, 0]


# --- peers -------------------------------------------------------------------------------------------------------


class Peers:
    """The kernels of mamba_ssm and causal_conv1d, as far as their sources are here, on the layouts they like best."""

    def __init__(self, mamba_ssm: Path | None, causal_conv1d: Path | None) -> None:
        self.versions: dict[str, str] = {}
        self.scan = self.update = self.chunked = self.convolve = None
        if mamba_ssm is not None:
            self.versions["mamba_ssm"] = source_version(mamba_ssm)
            bare_package("mamba_ssm", mamba_ssm / "mamba_ssm")
            self.update = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
            self.chunked = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
            folder = mamba_ssm / "csrc" / "selective_scan"
            self.scan = _compile("selective_scan_cuda", folder, ("selective_scan.cpp", "selective_scan_fwd_bf16.cu"))
        if causal_conv1d is not None:
            self.versions["causal-conv1d"] = source_version(causal_conv1d)
            sources = ("causal_conv1d.cpp", "causal_conv1d_fwd.cu", "causal_conv1d_update.cu")
            self.convolve = _compile("causal_conv1d_cuda", causal_conv1d / "csrc", sources)

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> dict[str, Launch]:
        if self.convolve is None:
            return {}
        cuda = self.convolve
        channels_last = x.transpose(1, 2)  # [B, C, L], channels side by side in memory, as here
        out = torch.empty_like(x).transpose(1, 2)
        if x.shape[1] == 1:
            rolled, one = state.clone(), x[:, 0].unsqueeze(-1)
            out = torch.empty_like(one)

            def step() -> Tensor:
                cuda.causal_conv1d_update(one, rolled, weight, bias, out, True, None, None)
                return out

            return {"causal_conv1d_update": step}
        if x.shape[2] % 8:
            return {}  # it takes channels in eights
        before = state.transpose(1, 2).contiguous().transpose(1, 2)

        def prompt() -> Tensor:
            cuda.causal_conv1d_fwd(channels_last, weight, bias, None, before, out, None, True)
            return out.transpose(1, 2)

        return {"causal_conv1d_fwd": prompt}

    def selective(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, state: Tensor
    ) -> dict[str, Launch]:
        if self.scan is None or self.update is None:
            return {}
        if x.shape[1] == 1:
            args = (x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], bias, True)
            return self._updates(args, state)
        cuda = self.scan
        u, delta, gate = (v.transpose(1, 2).contiguous() for v in (x, dt, z))  # [B, D, L]
        into, out_of = (v.transpose(1, 2).contiguous().unsqueeze(1) for v in (B, C))  # [B, 1, N, L]
        return {
            "mamba_ssm selective_scan_cuda": lambda: cuda.fwd(u, delta, A, into, out_of, D, gate, bias, True)[
                2
            ].transpose(1, 2)
        }

    def ssd(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, state: Tensor
    ) -> dict[str, Launch]:
        if self.chunked is None or self.update is None:
            return {}
        batch, length, heads = dt.shape
        head_dim, states = state.shape[2:]
        x = x.view(batch, length, heads, head_dim)
        if length == 1:
            steps, biases = dt[:, 0, :, None].expand(-1, -1, head_dim), bias[:, None].expand(-1, head_dim)
            skip, rates = D[:, None].expand(-1, head_dim), A[:, None, None].expand(-1, head_dim, states)
            return self._updates((x[:, 0], steps, rates, B, C, skip, None, biases, True), state)
        chunked, into, out_of = self.chunked, B.unsqueeze(2), C.unsqueeze(2)
        return {
            "mamba_ssm mamba_chunk_scan_combined": lambda: chunked(
                x, dt, A, into, out_of, 256, D=D, dt_bias=bias, initial_states=state, dt_softplus=True,
                return_final_states=True,
            )[0]
        }  # fmt: skip

    def _updates(self, args: tuple[Any, ...], state: Tensor) -> dict[str, Launch]:
        """selective_state_update as it is, and with one warp a program instead of four, on a state each."""
        module, one_state = self.update, state.clone()
        assert module is not None
        update = with_one_warp(module)
        return {
            "mamba_ssm selective_state_update": lambda: module.selective_state_update(state, *args),
            "mamba_ssm selective_state_update, 1 warp": lambda: update(one_state, *args),
        }


# As their setup.py has them, for this machine's GPU alone.
_PEER_FLAGS = [
    "-O3", "-std=c++17", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda",
    *(f"-U__CUDA_NO_{name}__" for name in (
        "HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS", "BFLOAT162_OPERATORS",
        "BFLOAT162_CONVERSIONS",
    )),
]  # fmt: skip


def _compile(name: str, folder: Path, sources: tuple[str, ...]) -> Any:
    """Only what is called: symbols of the other sources, training's above all, are bound lazily and so never."""
    from torch.utils.cpp_extension import load as compile_extension

    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        return compile_extension(
            name,
            [str(folder / source) for source in sources],
            extra_cuda_cflags=_PEER_FLAGS,
            extra_include_paths=[str(folder)],
            extra_ldflags=["-Wl,-z,lazy"],
        )
    finally:
        sys.setdlopenflags(flags)


if __name__ == "__main__":
    sys.exit(main())
