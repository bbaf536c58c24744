"""A decode step as the bare operator for a whole model, beside the step of mamba_ssm on the same random weights.

    mamba-deploy plugin build --kernels-only
    python samples/bench_chains.py --mamba-ssm DIR --models mamba-2.8b,mamba2-2.7b --batch 1,64

It is the operator that an engine is made of, called as its plugin calls it, and the kernel that chooses the tokens,
where PyTorch chooses the peer's. No checkpoint, export or engine is needed, so models of billions of parameters are
measured in seconds. Needs PyTorch for CUDA and, for the peer, what bench_peers.py needs, which says how the
contenders take turns, what a peer is and what the limit is. Their logits are compared first.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import click
import torch
from bench_kernels import calibrate
from bench_peers import admit, config_of, counts, gpu_us, make_row, names, table, take_turns, write
from bench_worker import COMPARED, OURS, random_ids
from peers import STEP, Contender, captured, load_kernels, missing, peer_steps, source_version
from torch import Tensor

from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract
from mamba_deploy.limits import Limits
from mamba_deploy.model import MambaModel
from mamba_deploy.plugins.kernels import load

FED, STEPS = 3, 50  # tokens before logits are compared; replays of a turn


@click.command()
@click.option("--library", type=click.Path(exists=True, path_type=Path), help="Of the kernels, if not your cache's.")
@click.option("--mamba-ssm", type=click.Path(exists=True, path_type=Path), help="Its unpacked source distribution.")
@click.option("--models", default="mamba-1.4b,mamba-2.8b,mamba2-1.3b,mamba2-2.7b", show_default=True, callback=names)
@click.option("--batch", "batches", default="1,8,64", show_default=True, callback=counts, help="Rows.")
@click.option(
    "--state-dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="Ours."
)
@click.option("--turns", default=5, show_default=True, help="Of each contender.")
@click.option("--write", "target", type=click.Path(path_type=Path), help="Write the results as JSON, or into these.")
def main(
    library: Path | None,
    mamba_ssm: Path | None,
    models: list[str],
    batches: list[int],
    state_dtype: Literal["float32", "float16"],
    turns: int,
    target: Path | None,
) -> None:
    """Print a table of times for each model and number of rows."""
    torch.set_grad_enabled(False)
    machine, ours, theirs, versions = calibrate(), load(library), {}, {}
    click.echo(machine.text)
    if reason := missing(mamba_ssm).get(STEP):
        click.echo(f"left out: {STEP}: {reason}")
    else:
        theirs, versions["mamba_ssm"] = load_kernels(mamba_ssm), source_version(mamba_ssm)
    rows = []
    for name in models:
        model = random_model(config_of(name))
        for batch in batches:
            times, notes = measure(model, ours, theirs, batch, turns, getattr(torch, state_dtype))
            contract = Contract.of(model.config, dtype="float16", state_dtype=state_dtype)
            limits = Limits.of(model.config, contract, batch=batch)
            row = f"chain/{name}/b{batch}" + ("" if state_dtype == "float32" else f"/{state_dtype} state")
            rows.append(make_row(row, times, notes, limits, machine))
            click.echo(table(rows[-1]))
            if target is not None:
                write(target, rows, machine.text, versions)
            torch.cuda.empty_cache()


def measure(
    model: MambaModel, ours: Any, theirs: dict[str, Any], batch: int, turns: int, state_dtype: torch.dtype
) -> tuple[dict[str, float], list[str]]:
    """Microseconds of each contender, and who is left out."""
    fed = list(torch.tensor(random_ids(model.config.vocab_size, batch, FED)).long().cuda().t().contiguous())
    contender = chain(model, ours, batch, state_dtype)
    logits = [contender.feed(tokens) for tokens in fed][-1][:, :COMPARED].cpu().numpy()
    peers, notes = admit(peer_steps(model, theirs, fed[0], STEPS), fed, logits)
    times, failed = take_turns(
        {name: functools.partial(gpu_us, given) for name, given in ({OURS: contender} | peers).items()}, turns
    )
    return times, [*notes, *failed]


def random_model(config: MambaConfig, dtype: torch.dtype = torch.float16, device: str = "cuda") -> MambaModel:
    """Weights as small as trained ones, for activations of dtype."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in MambaModel(config).state_dict().items()}
    with torch.device(device):
        return MambaModel.from_weights(config, {name: _random(name, shape) for name, shape in shapes.items()}, dtype)


def _random(name: str, shape: torch.Size) -> Tensor:
    leaf = name.split(".")[-1]
    if leaf == "A":
        return -torch.rand(shape) - 0.5
    if leaf == "dt_bias":
        return torch.zeros(shape)
    return torch.ones(shape) if leaf == "D" or "norm" in name else 0.02 * torch.randn(shape)


def layer_arrays(layer: Any, config: MambaConfig, batch: int, state_dtype: torch.dtype) -> dict[str, Any]:
    """By their names in ``MambaLayer``, weights as our files store them; states of zeros go out where they came in."""
    m, new = layer.mixer, functools.partial(torch.zeros, device=layer.norm.weight.device)
    mamba = config.generation == "mamba"
    names = ("in_proj", "out_proj") + (("x_proj", "dt_proj") if mamba else ())
    conv = new(batch, *config.conv_state_shape, dtype=m.in_proj.weight.dtype)
    ssm = new(batch, *config.ssm_state_shape, dtype=state_dtype)
    products = {name: getattr(m, name).weight.t().contiguous() for name in names}
    biases = {"in_proj_bias": m.in_proj.bias, "conv_bias": m.conv_bias, "out_proj_bias": m.out_proj.bias}
    norms = {"norm_weight": layer.norm.weight, "gate_norm": None if mamba or m.norm is None else m.norm.weight}
    scan = {"conv_weight": m.conv_weight, "A": m.A, "D": m.D, "dt_bias": m.dt_bias}
    states = {"conv_state": conv, "conv_state_out": conv, "ssm_state": ssm, "ssm_state_out": ssm}
    return products | biases | norms | scan | states


def operator_sizes(config: MambaConfig, batch: int, length: int) -> dict[str, int]:
    """Of a call for the whole model, by their names in the struct."""
    c, mamba = config, config.generation == "mamba"
    inner = {"rank": c.dt_rank} if mamba else {"heads": c.n_heads, "head_dim": c.head_dim, "groups": c.n_groups}
    return {
        "batch": batch, "length": length, "layers": c.n_layer, "width": c.d_model, "inner": c.d_inner,
        "outputs": c.d_inner + c.conv_channels + (0 if mamba else c.n_heads), "channels": c.conv_channels,
        "conv_width": c.d_conv, "state_size": c.d_state, "vocab": c.vocab_size, **inner,
    }  # fmt: skip


class Chain:
    """The operator for a whole model over the weights of the reference, beside a state."""

    def __init__(self, model: MambaModel, kernels: Any, batch: int, state_dtype: torch.dtype = torch.float32) -> None:
        c, weight = model.config, model.embedding.weight
        self.config, self.model, self.kernels = c, model, kernels
        new = functools.partial(torch.zeros, device=weight.device)
        self.layers = [layer_arrays(layer, c, batch, state_dtype) for layer in model.layers]
        self.conv, self.ssm = ([layer[name] for layer in self.layers] for name in ("conv_state", "ssm_state"))
        self.ids, self.lengths = new(batch, 1, dtype=torch.int32), new(batch, dtype=torch.int32) + 1
        self.logits = new(batch, c.vocab_size)
        self.steps, self.tokens = (new(batch, dtype=torch.int32) for _ in range(2))
        sizes = operator_sizes(c, batch, 1)
        if c.generation == "mamba2":
            del sizes["inner"]  # which the kernels make of the heads
        dtype, of_state = (str(given).removeprefix("torch.") for given in (weight.dtype, state_dtype))
        words = kernels.pending_row(**sizes)
        self.pending = new(batch, words) if words else None
        needed = kernels.workspace_bytes("model", dtype=dtype, state_dtype=of_state, **sizes)
        self.workspace = new(needed, dtype=torch.uint8)

    def read(self, tokens: Tensor) -> Tensor:
        """[B] tokens onto the state -> logits [B, V]."""
        c, weight = self.config, self.model.embedding.weight
        self.ids.copy_(tokens[:, None])
        limits = () if c.generation == "mamba" else (c.dt_min, c.dt_max, c.n_groups)
        scan_eps = -1.0 if c.scan_norm_eps is None else c.scan_norm_eps
        self.kernels.model(
            self.ids, self.lengths, weight, self.model.norm_f.weight, None, self.layers, c.norm_eps, scan_eps, *limits,
            logits=self.logits, pending=self.pending, workspace=self.workspace, stream=_stream(),
        )  # fmt: skip
        return self.logits

    def choose(self, logits: Tensor) -> Tensor:
        """[B, V] -> the likeliest tokens [B], as sessions choose them."""
        self.kernels.sample_token(logits, None, steps=self.steps, tokens=self.tokens, log=None, stream=_stream())
        return self.tokens


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0


def chain(model: MambaModel, kernels: Any, batch: int, state_dtype: torch.dtype) -> Contender:
    """From a state of zeros on, in a CUDA graph."""
    own = Chain(model, kernels, batch, state_dtype)
    states = [*own.conv, *own.ssm, *([] if own.pending is None else [own.pending])]
    return captured(own.read, torch.zeros(batch, dtype=torch.long, device="cuda"), STEPS, states, own.choose)


if __name__ == "__main__":
    main()
