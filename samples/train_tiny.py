"""Train one of the bundled checkpoints: a byte-level model of a million parameters, from Python's own source text.

    python samples/train_tiny.py --generation mamba2 --out samples/tiny-mamba2
    python samples/train_tiny.py --evaluate samples/tiny-mamba2

The text is the standard library of the Python that runs this, so nothing is downloaded; a few modules that have not
changed from Python 3.10 to 3.13 are held out and scored in bits per byte. The checkpoint has the format of
state-spaces/mamba: what is trained are the tensors that format stores, and ``model_weights`` makes the model of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import re
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import click
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from mamba_deploy import ops
from mamba_deploy.checkpoint import expected_tensors, load_checkpoint, model_weights, padded_rows
from mamba_deploy.config import MambaConfig
from mamba_deploy.model import MambaModel

EOS_ID, EOS_TEXT = 256, "<|endoftext|>"  # the end of a module; ids below it are bytes
HELD_OUT = (
    "_markupbase.py json/scanner.py multiprocessing/reduction.py py_compile.py pyclbr.py unittest/util.py "
    "urllib/robotparser.py"
).split()
# Not part of the library proper: tests, other people's packages, build settings, and files that are one large table.
SKIPPED = re.compile("tests?|test_.*|testmock|idle_test|.*-packages|config-.*|_sysconfigdata.*|encodings|pydoc_data")
SSM_CFG: dict[str, dict[str, Any]] = {"mamba": {}, "mamba2": {"layer": "Mamba2", "d_state": 64, "headdim": 32}}
D_MODEL = 128
SCAN_CHUNK, EVALUATION_CHUNK = 32, 2048  # tokens


def read_modules(source: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The modules to train on and those held out, by their path below ``source``."""
    training: dict[str, bytes] = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).parts
        if not any(SKIPPED.fullmatch(part) for part in parts):
            training["/".join(parts)] = path.read_bytes()
    held_out = {name: training.pop(name) for name in HELD_OUT if name in training}
    return {name: text for name, text in training.items() if text not in held_out.values()}, held_out


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def joined_ids(modules: Mapping[str, bytes]) -> Tensor:
    """[tokens] int16: each module after an end-of-text id, and one more at the end."""
    following = [token for content in modules.values() for token in (*content, EOS_ID)]
    return torch.tensor([EOS_ID, *following], dtype=torch.int16)


def new_config(generation: str, n_layer: int) -> dict[str, Any]:
    """config.json as mamba_ssm writes it (mamba_ssm/models/config_mamba.py)."""
    sizes = {"d_model": D_MODEL, "d_intermediate": 0, "n_layer": n_layer, "vocab_size": EOS_ID + 1}
    mixers = {"ssm_cfg": SSM_CFG[generation], "attn_layer_idx": [], "attn_cfg": {}}
    norms = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    return {**sizes, **mixers, **norms, "pad_vocab_size_multiple": 8, "tie_embeddings": True}


def new_tensors(config: MambaConfig, rows: int, seed: int) -> dict[str, Tensor]:
    """The checkpoint's tensors as mamba_ssm initialises them: ``Mamba``, ``Mamba2`` and ``_init_weights`` there."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    def initial(name: str, shape: tuple[int, ...]) -> Tensor:
        leaf = name.split("mixer.")[-1]
        if leaf == "embedding.weight":
            return torch.empty(shape).normal_(0.0, 0.02, generator=generator)
        if leaf.endswith("norm.weight") or leaf in ("norm_f.weight", "D"):
            return torch.ones(shape)
        if leaf == "A_log":
            rising = torch.arange(1.0, shape[-1] + 1).expand(shape)
            return torch.log(rising if config.generation == "mamba" else uniform(shape, 1.0, 16.0))
        if leaf in ("dt_bias", "dt_proj.bias"):  # softplus of it is log-uniform in 0.001 to 0.1
            dt = torch.exp(uniform(shape, math.log(0.001), math.log(0.1))).clamp(min=1e-4)
            return dt + torch.log(-torch.expm1(-dt))
        if leaf.startswith("conv1d"):
            return uniform(shape, -(config.d_conv**-0.5), config.d_conv**-0.5)
        bound = (shape[1] * (config.n_layer if leaf == "out_proj.weight" else 1)) ** -0.5
        return uniform(shape, -bound, bound)

    names = expected_tensors(config, rows).items()
    return {name: initial(name, shape) for name, shape in names if name != "lm_head.weight"}


@torch.compile(dynamic=False)
def parallel_selective_scan(*values: Any) -> tuple[Tensor, Tensor]:
    """``ops.selective_scan`` for rows used to their end; the op itself is a loop over tokens, slow on a GPU."""
    x, dt, A, B, C, D, z, dt_bias, state = values[:9]
    delta, u, B, C = (v.unflatten(1, (-1, SCAN_CHUNK)) for v in (F.softplus(dt + dt_bias), x, B, C))
    decay = torch.exp(delta[..., None] * A)  # [B, n, t, D, N]
    drive = (delta * u)[..., None] * B[:, :, :, None]
    h = torch.zeros_like(drive[:, :, 0])
    within = []  # the states of chunks that start from zero
    for a, b in zip(decay.unbind(2), drive.unbind(2), strict=True):
        h = torch.addcmul(b, a, h)
        within.append(h)
    since_start = torch.exp(delta.cumsum(2)[..., None] * A)
    starts, state = carry_across(state, since_start[:, :, -1], h)
    states = torch.stack(within, 2) + since_start * starts[:, :, None]
    y = (states * C[:, :, :, None]).sum(-1).flatten(1, 2) + D * x
    return y * F.silu(z), state


@torch.compile(dynamic=False)
def parallel_ssd_scan(*values: Any) -> tuple[Tensor, Tensor]:
    """``ops.ssd_scan`` for rows used to their end, one group, and dt without limits."""
    x, dt, A, B, C, D, dt_bias, state = values[:8]
    delta, u, B, C = (v.unflatten(1, (-1, SCAN_CHUNK)) for v in (F.softplus(dt + dt_bias), x, B, C))
    delta = delta.mT  # [B, n, H, t]
    u = u.unflatten(3, state.shape[1:3]).transpose(2, 3)  # [B, n, H, t, P]
    B, C = B[:, :, None], C[:, :, None]  # [B, n, 1, t, N]
    log_decay = (delta * A[:, None]).cumsum(-1)
    future = torch.ones(SCAN_CHUNK, SCAN_CHUNK, dtype=torch.bool, device=x.device).triu(1)
    kept = torch.exp((log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(future, -math.inf))
    drive = delta[..., None] * u
    since_start = torch.exp(log_decay)[..., None]
    starts, state = carry_across(state, since_start[..., -1:, :], (drive * kept[..., -1, :, None]).mT @ B)
    y = (C @ B.mT * kept) @ drive + since_start * (C @ starts.mT) + D[:, None, None] * u
    return y.transpose(2, 3).reshape(x.shape), state


def carry_across(state: Tensor, decays: Tensor, additions: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk [B, n, ...] and after the last, from what chunks keep of it and add to it."""
    starts = []
    for decay, addition in zip(decays.unbind(1), additions.unbind(1), strict=True):
        starts.append(state)
        state = torch.addcmul(addition, decay, state)
    return torch.stack(starts, 1), state


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train; the rate rises over the first 5 % and falls as a cosine to the end of steps or minutes."""

    device: str
    steps: int
    minutes: float
    batch: int
    window: int  # tokens
    learning_rate: float
    seed: int


def train(config: MambaConfig, tensors: dict[str, Tensor], text: Tensor, plan: Plan) -> Iterator[tuple[int, float]]:
    """Train ``tensors`` in place; yield number and loss (bits a byte) of every 50th step and of the last."""
    with torch.device("meta"):
        model = MambaModel(config)
    text = text.to(plan.device)
    windows = torch.zeros(plan.batch, plan.window + 1, dtype=torch.long, device=plan.device)
    loss, rate = torch.zeros(2, device=plan.device)
    matrices = [tensor for name, tensor in tensors.items() if tensor.ndim > 1 and not name.endswith("A_log")]
    others = [tensor for name, tensor in tensors.items() if tensor.ndim == 1 or name.endswith("A_log")]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    on_gpu = plan.device == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True, capturable=on_gpu)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        weights = model_weights(config, tensors)
        logits, _ = functional_call(model, weights, (windows[:, :-1],), {"all_logits": True}, strict=True)
        value = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        value.backward()
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        optimizer.step()
        loss.copy_(value.detach() / math.log(2))

    run = recorded(step) if on_gpu else step
    generator = torch.Generator().manual_seed(plan.seed)
    offsets = torch.arange(plan.window + 1, device=plan.device)
    number, done, started = 0, 0.0, time.monotonic()
    while done < 1:
        number += 1
        starts = torch.randint(len(text) - plan.window, (plan.batch, 1), generator=generator)
        windows.copy_(text[starts.to(plan.device) + offsets])
        done = max(number / plan.steps, (time.monotonic() - started) / 60 / plan.minutes)
        rate.fill_(plan.learning_rate * min(done / 0.05, 0.5 + 0.5 * math.cos(math.pi * min(done, 1.0))))
        run()
        if number % 50 == 0 or done >= 1:
            yield number, loss.item()


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` as a CUDA graph, after three runs that compile and allocate; at a rate of 0 they change no weight."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def score(directory: Path, modules: Mapping[str, bytes]) -> float:
    """Bits a byte in float32, each predicted from all before it; printed, and noted in a training.json without any."""
    config, weights = load_checkpoint(directory)
    model = MambaModel.from_weights(config, weights, torch.float32)
    lengths = torch.tensor([len(content) for content in modules.values()])
    ids = torch.full((len(modules), int(lengths.max()) + 1), EOS_ID)
    for row, content in zip(ids, modules.values(), strict=True):
        row[1 : len(content) + 1] = torch.tensor(list(content))
    bits = torch.zeros(len(modules), dtype=torch.float64)
    state = model.new_state(len(modules))
    for start in range(0, int(lengths.max()), EVALUATION_CHUNK):
        piece = ids[:, start : start + EVALUATION_CHUNK + 1]
        seq_lens = (lengths - start).clamp(0, piece.shape[1] - 1)
        logits, state = model(piece[:, :-1], state, seq_lens, all_logits=True)
        nats = F.cross_entropy(logits.transpose(1, 2), piece[:, 1:], reduction="none")
        used = torch.arange(nats.shape[1]) < seq_lens[:, None]
        bits += torch.where(used, nats, 0).sum(1, dtype=torch.float64) / math.log(2)
    rows = {
        name: {"sha256": sha256(content), "bytes": len(content), "bits_per_byte": round(total / len(content), 6)}
        for (name, content), total in zip(modules.items(), bits.tolist(), strict=True)
    }
    size, mean = int(lengths.sum()), round(float(bits.sum() / lengths.sum()), 6)
    for name, row in rows.items():
        click.echo(f"{name}: {row['bits_per_byte']:.4f} bits per byte")
    click.echo(f"held out: {mean:.4f} bits per byte of {size:,} bytes")
    record = json.loads(path.read_text()) if (path := directory / "training.json").is_file() else {"held_out": None}
    if "held_out" not in record:
        write_json(path, {**record, "held_out": {"modules": rows, "bytes": size, "bits_per_byte": mean}})
    return mean


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Token b is byte b. A byte-level tokenizer writes bytes as GPT-2's stand-in letters."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in shown]
    letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letters[b]: b for b in range(256)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS_TEXT])
    return tokenizer


def write_checkpoint(directory: Path, raw_config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """config.json, pytorch_model.bin and the tokenizer; weights rounded to float16, the tied head stored once."""
    stored = {f"backbone.{name}": tensor.detach().cpu().half() for name, tensor in tensors.items()}
    stored["lm_head.weight"] = stored["backbone.embedding.weight"]
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / "pytorch_model.bin", lambda path: torch.save(stored, path))
    write(directory / "tokenizer.json", lambda path: byte_tokenizer().save(str(path)))
    write_json(directory / "tokenizer_config.json", {"eos_token": EOS_TEXT})
    write_json(directory / "config.json", raw_config)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write(path, lambda partial: partial.write_text(json.dumps(value, indent=2) + "\n"))


def write(path: Path, save: Callable[[Path], object]) -> None:
    """``save`` under another name, then rename: a file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@click.command()
@click.option("--generation", type=click.Choice(list(SSM_CFG)), help="Which model to train.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where to write the checkpoint.")
@click.option("--evaluate", "scored", type=click.Path(path_type=Path, exists=True), help="Only score this checkpoint.")
@click.option("--source", type=click.Path(path_type=Path, exists=True), default=sysconfig.get_path("stdlib"))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=600.0, help="End after this time at most.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Windows a step.")
@click.option("--window", type=click.IntRange(1), default=512, show_default=True, help="Bytes; for cuda 32, 64, 96 ...")
@click.option("--learning-rate", type=float, default=4e-3, show_default=True)
@click.option("--n-layer", type=click.IntRange(1), default=8, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    generation: str | None, out: Path | None, scored: Path | None, source: Path, n_layer: int, **rest: Any
) -> None:
    """Train a tiny Mamba or Mamba-2 on Python's standard library, or score one on the modules held out."""
    training, held_out = read_modules(source)
    if not held_out:
        raise click.ClickException(f"{source} has none of the held-out modules: {', '.join(HELD_OUT)}")
    if scored is not None:
        score(scored, held_out)
        return
    if generation is None or out is None:
        raise click.UsageError("give --generation and --out to train, or --evaluate")
    plan, text = Plan(**rest), joined_ids(training)
    if len(text) <= plan.window or (plan.device == "cuda" and plan.window % SCAN_CHUNK):
        raise click.UsageError(f"--window is {plan.window}: give a multiple of {SCAN_CHUNK} below {len(text)}")
    raw = new_config(generation, n_layer)
    config = MambaConfig.from_foreign(raw)
    tensors = new_tensors(config, padded_rows(raw, config), plan.seed)
    tensors = {name: tensor.to(plan.device).requires_grad_() for name, tensor in tensors.items()}
    parameters = sum(tensor.numel() for tensor in tensors.values())
    click.echo(f"{parameters:,} parameters, {len(text):,} bytes of {len(training)} modules", err=True)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    number, seconds, started = 0, 0.0, time.monotonic()
    scans: dict[str, Any] = {"selective_scan": parallel_selective_scan, "ssd_scan": parallel_ssd_scan}
    with mock.patch.multiple(ops, **scans) if plan.device == "cuda" else contextlib.nullcontext():
        for number, bits in train(config, tensors, text, plan):
            seconds = time.monotonic() - started
            click.echo(f"step {number} of {plan.steps}: {bits:.3f} bits per byte, {seconds:.0f} s", err=True)

    write_checkpoint(out, raw, tensors)
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": torch.cuda.get_device_name() if plan.device == "cuda" else f"{platform.machine()} CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **dataclasses.asdict(plan),
        "steps": number,
        "seconds": round(seconds, 1),
        "parameters": parameters,
        "training_bytes": len(text),
        "training_sha256": sha256(text.numpy().tobytes()),
    }
    write_json(out / "training.json", record)
    score(out, held_out)


if __name__ == "__main__":
    main()
