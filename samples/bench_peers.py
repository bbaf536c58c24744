"""Decode and prompt speed of whole models on one GPU, beside mamba_ssm, transformers and torch.compile.

    pip download --no-deps --no-binary :all: mamba_ssm==2.3.2.post1    # and unpack it
    python samples/bench_peers.py --engines PYTHON --bundles DIR --mamba-ssm DIR --write samples/results/decode.json

Needs PyTorch for CUDA, and for the peers transformers, Triton, einops and the sources of mamba_ssm: a peer that lacks
some is named and left out. PYTHON is another one, that has TensorRT and need not have PyTorch: ours runs there, in a
process of bench_worker.py. Random models of the published sizes are made in ``--bundles``, by transformers, where they
are missing; ours and the peers load the same checkpoint, in float16.

Microseconds of a step of all rows, median: the contenders take turns on the same GPU, the others idle meanwhile, and a
turn begins with steps that do not count. A decode step is the replay of a CUDA graph up to the likeliest token, by the
GPU's clock; of transformers, what it enqueues. A prompt ends at its first token, by the wall clock. Weights larger than
the L2 cache are read from memory in every step; rows of a model that, with its states, is smaller than twice say so.

Before it is timed, a peer reads what we read, and is left out where its logits differ: the row's note says so. Our
state is float32. That of a step of mamba_ssm is float16, as by default there, unless its name says "float32 state": so
it moves fewer bytes than ours, and the two are not like for like. "1 warp" is vLLM's setting of its state update;
peers.py says what else a peer is. The limit is the bytes of a step with a float32 state over the bandwidth of a 4 GB
copy measured here; of a prompt also its operations over the rate of a large product. Rows of the file by other names
are kept.
"""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import measured
import numpy as np
import torch
from bench_kernels import Machine, calibrate
from bench_worker import COMPARED, OURS, READ_FIRST, Ours, random_ids, said, wall_us
from peers import (
    COMPILED,
    PROJECTIONS,
    PROMPT,
    STEP,
    TRANSFORMERS,
    Contender,
    compiled_step,
    eager,
    load_kernels,
    missing,
    peer_prompt,
    peer_steps,
    projections,
    source_version,
)

from mamba_deploy.bundle import Bundle
from mamba_deploy.checkpoint import load_checkpoint
from mamba_deploy.config import MambaConfig
from mamba_deploy.limits import Limits
from mamba_deploy.model import MambaModel

FIRST = f"{OURS} after 1 token"
MODELS = {  # width, layers
    "mamba-130m": (768, 24), "mamba-370m": (1024, 48), "mamba-790m": (1536, 48), "mamba-1.4b": (2048, 48),
    "mamba-2.8b": (2560, 64), "mamba2-130m": (768, 24), "mamba2-370m": (1024, 48), "mamba2-780m": (1536, 48),
    "mamba2-1.3b": (2048, 48), "mamba2-2.7b": (2560, 64),
}  # fmt: skip
COMPILED_SIZES, TRANSFORMERS_PROMPT = ("130m", "370m"), ("130m", 2048)  # larger ones take minutes
FED = 8  # tokens before logits are compared
PROMPTS = 2  # of a turn
MOST_ERROR = 5e-2  # of the logits, relative to the largest
SECONDS, FEWEST = 10.0, 3  # of a contender, after which so many turns have to do


def counts(context: Any, option: Any, value: str) -> list[int]:
    return [int(part) for part in value.split(",") if part]


def names(context: Any, option: Any, value: str) -> list[str]:
    if odd := [name for name in value.split(",") if name not in MODELS]:
        raise click.BadParameter(f"there is no model {odd[0]}: choose from {', '.join(MODELS)}")
    return value.split(",")


@click.command()
@click.option("--engines", metavar="PYTHON", required=True, help="The Python that has TensorRT.")
@click.option(
    "--bundles", required=True, type=click.Path(path_type=Path), help="Folder of models, made where they are missing."
)
@click.option("--mamba-ssm", type=click.Path(exists=True, path_type=Path), help="Its unpacked source distribution.")
@click.option("--models", default="mamba-130m,mamba2-130m", show_default=True, callback=names)
@click.option("--batch", "batches", default="1,8,64", show_default=True, callback=counts, help="Rows of decode steps.")
@click.option("--prompt", "prompts", default="2048", show_default=True, callback=counts, help="Tokens.")
@click.option("--context", "contexts", default="", callback=counts, help="Tokens read before a step; say 32768.")
@click.option("--turns", default=7, show_default=True, help="Of each contender.")
@click.option("--steps", default=100, show_default=True, help="Replays of one turn.")
@click.option("--compile/--no-compile", "with_compile", default=True, help=f"Also {COMPILED}: it takes minutes.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the results as JSON, or into what is there.")
def main(engines: str, bundles: Path, models: list[str], **options: Any) -> None:
    """Measure, print, and write the results; exit with 1 where a model could not be measured."""
    sys.exit(measure_all(engines, bundles, models, SimpleNamespace(**options)))


# --- models --------------------------------------------------------------------------------------------------------


def config_of(name: str) -> MambaConfig:
    """Of a model of the published sizes."""
    width, layers = MODELS[name]
    common = {"d_model": width, "n_layer": layers, "d_inner": 2 * width}
    if name.startswith("mamba2"):
        return MambaConfig("mamba2", vocab_size=50288, d_state=128, head_dim=64, **common)
    return MambaConfig("mamba", vocab_size=50280, d_state=16, dt_rank=width // 16, **common)


def model_options(name: str) -> dict[str, Any]:
    """Of the config of transformers: the published sizes, weights as small as trained ones."""
    c = config_of(name)
    common = {"hidden_size": c.d_model, "num_hidden_layers": c.n_layer, "vocab_size": c.vocab_size}
    common |= {"tie_word_embeddings": True, "initializer_range": 0.02}
    if c.generation == "mamba":
        return common
    heads = {"num_heads": c.n_heads, "head_dim": c.head_dim, "n_groups": c.n_groups, "state_size": c.d_state}
    return {**common, **heads}


def make(name: str, folder: Path) -> tuple[Path, Path]:
    """The checkpoint and the bundle of a model."""
    checkpoint, bundle = folder / name / "checkpoint", folder / f"{name}-fp16"
    if not checkpoint.exists():
        import transformers

        kind = "Mamba2" if name.startswith("mamba2") else "Mamba"
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")
        partial = checkpoint.with_name("checkpoint.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model(getattr(transformers, f"{kind}Config")(**model_options(name))).eval().save_pretrained(partial)
        partial.rename(checkpoint)
    if not bundle.exists():
        from mamba_deploy import export

        export(checkpoint, bundle, dtype="float16")
    return checkpoint, bundle


# --- measuring -----------------------------------------------------------------------------------------------------


def admit(
    builders: Mapping[str, Callable[[], Contender]], fed: list[Any], logits: Any
) -> tuple[dict[str, Any], list[str]]:
    """Contenders whose logits after these tokens are these; and what keeps the others out."""
    found, notes, error = {}, [], 0.0
    ours = np.array(logits)
    for name, build in builders.items():
        try:
            contender = build()
            if contender.feed is not None:
                theirs = [contender.feed(tokens) for tokens in fed][-1][:, :COMPARED].float().cpu().numpy()
                error = float(abs(theirs - ours).max() / abs(ours).max())
                if not error <= MOST_ERROR:
                    raise ValueError(f"its logits are off by {error:.1%}")
        except Exception as problem:
            notes.append(f"{name} left out: {said(problem)}")
        else:
            found[name] = contender
    return found, notes


def take_turns(contenders: Mapping[str, Callable[[], float]], turns: int) -> tuple[dict[str, float], list[str]]:
    """Median of each, after a turn that does not count, and who failed. Who takes long has fewer turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    spent, notes = dict.fromkeys(contenders, 0.0), []
    for turn in range(turns + 1):
        for name in list(times):
            if spent[name] > SECONDS and len(times[name]) >= FEWEST:
                continue
            start = time.perf_counter()
            try:
                us = contenders[name]()
            except Exception as error:
                if name == OURS:
                    raise
                del times[name]
                notes.append(f"{name} left out: {said(error)}")
                continue
            spent[name] += time.perf_counter() - start
            if turn:
                times[name].append(us)
    return {name: statistics.median(values) for name, values in times.items()}, notes


def gpu_us(contender: Contender) -> float:
    """Of a step, by the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(contender.steps // 5):
        contender.run()
    start.record()
    for _ in range(contender.steps):
        contender.run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / contender.steps


def prompt_us(contender: Contender) -> float:
    return wall_us(lambda: (contender.run(), torch.cuda.synchronize()), PROMPTS)


class Model:
    """Makes a model's rows."""

    def __init__(
        self, name: str, paths: tuple[Path, Path], ours: Ours, peers: Any, machine: Machine, options: Any
    ) -> None:
        self.name, self.checkpoint, self.ours, self.machine, self.options = name, paths[0], ours, machine, options
        self.kernels, self.left_out = peers
        bundle = Bundle.open(paths[1])
        self.config, self.limits = bundle.config, functools.partial(Limits.of, bundle.config, bundle.contract)
        self.reference: Any = MambaModel.from_weights(*load_checkpoint(paths[0]), torch.float16).cuda()

    @functools.cached_property
    def theirs(self) -> Any:
        """Of transformers."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float16).cuda().eval()

    def jobs(self) -> list[Callable[[], dict[str, Any]]]:
        """Each gives a row."""
        kinds = ((self.decode, "batches"), (self.prompt, "prompts"), (self.context, "contexts"))
        return [functools.partial(row, size) for row, sizes in kinds for size in getattr(self.options, sizes)]

    def decode(self, batch: int) -> dict[str, Any]:
        first, steps = random_ids(self.config.vocab_size, batch, 1).tolist(), self.options.steps
        asked = self.ours.ask("logits", ids=first, greedy=FED - 1)
        tokens = [torch.tensor(row).cuda() for row in ([row[0] for row in first], *asked["fed"])]
        builders = peer_steps(self.reference, self.kernels, tokens[0], steps)
        if TRANSFORMERS not in self.left_out:
            builders[TRANSFORMERS] = lambda: eager(self.theirs, tokens[0])
        if self.options.with_compile and COMPILED not in self.left_out and self.name.endswith(COMPILED_SIZES):
            builders[COMPILED] = lambda: compiled_step(self.reference, tokens[0], steps)
        peers, notes = admit(builders, tokens, asked["logits"])
        kernels = self.ours.ask("prepare", batch=batch, length=READ_FIRST)["kernels"]
        runs = {name: functools.partial(gpu_us, peer) for name, peer in peers.items()}
        ours = {OURS: lambda: self.ours.ask("replays", steps=steps)["us"]}
        times, failed = take_turns(ours | runs, self.options.turns)
        host = self.ours.ask("generate", batch=batch)
        said_of_host = f"generate, host included: {host['us']:.1f} us a step, p95 {host['p95']:.1f}"
        notes = [f"{kernels} kernels a step", said_of_host, *notes, *failed]
        return make_row(f"decode/{self.name}/b{batch}", times, notes, self.limits(batch=batch), self.machine)

    def prompt(self, length: int) -> dict[str, Any]:
        ids = random_ids(self.config.vocab_size, 1, length).tolist()
        logits, on_gpu = self.ours.ask("logits", ids=ids, greedy=0)["logits"], torch.tensor(ids).cuda()
        builders: dict[str, Callable[[], Contender]] = {PROJECTIONS: lambda: projections(self.reference, length)}
        if self.kernels and self.config.generation == "mamba2":
            builders[PROMPT] = lambda: peer_prompt(self.reference, self.kernels[""], on_gpu)
        size, most = TRANSFORMERS_PROMPT
        if TRANSFORMERS not in self.left_out and self.name.endswith(size) and length <= most:
            builders[TRANSFORMERS] = lambda: eager(self.theirs, on_gpu)
        peers, notes = admit(builders, [on_gpu], logits)
        runs = {name: functools.partial(prompt_us, peer) for name, peer in peers.items()}
        ours = {OURS: lambda: self.ours.ask("prompt", ids=ids, count=PROMPTS)["us"]}
        times, failed = take_turns(ours | runs, self.options.turns)
        if PROJECTIONS in times:
            notes = [f"{times[OURS] / times[PROJECTIONS]:.2f}x the projections alone", *notes]
        name, limits = f"prompt/{self.name}/b1/l{length}", self.limits(seq=length)
        return make_row(name, times, [*notes, *failed], limits, self.machine)

    def context(self, length: int) -> dict[str, Any]:
        """A step after so many tokens, beside one after the first."""

        def after(count: int) -> float:
            self.ours.ask("prepare", batch=1, length=count)
            return self.ours.ask("replays", steps=self.options.steps)["us"]

        times, notes = take_turns({OURS: lambda: after(length), FIRST: lambda: after(1)}, self.options.turns)
        notes = [f"{times[OURS] / times[FIRST]:.3f}x the step after one token"] if FIRST in times else notes
        return make_row(f"decode/{self.name}/b1/context_{length}", times, notes, self.limits(), self.machine)


def make_row(name: str, times: dict[str, float], notes: list[str], limits: Limits, machine: Machine) -> dict[str, Any]:
    """Of the results, from microseconds; the limit of decode is that of its bytes."""
    seconds = [limits.bytes / machine.bandwidth]
    if name.startswith("prompt"):
        seconds.append(limits.flops / machine.product)
    ours, limit = times[OURS], 1e6 * max(seconds)
    if limits.weight_bytes + limits.state_bytes // 2 < 2 * machine.l2_bytes:
        notes = ["may come from the L2 cache", *notes]
    note = "; ".join([f"{limit / ours:.0%} of the limit", *notes])
    peers = {peer: us for peer, us in times.items() if peer != OURS}
    return {"name": name, "value": ours, "unit": "us", "limit": limit, "peers": peers, "note": note}


def table(row: dict[str, Any]) -> str:
    """A row for people: each time, and how often ours goes into it."""
    lines = [(OURS, row["value"]), ("limit", row["limit"]), *row["peers"].items()]
    cells = [f"  {name:<56}{us:>12.1f} us{us / row['value']:>8.2f}x" for name, us in lines]
    return "\n".join([row["name"], *cells, f"  {row['note']}"])


def measure_all(python: str, folder: Path, models: list[str], options: Any) -> bool:
    """Every row of every model; whether a model failed."""
    torch.set_grad_enabled(False)
    machine, left_out, kernels = calibrate(), missing(options.mamba_ssm), {}
    versions = {"cuda": str(torch.version.cuda)}
    measured_on = f"{machine.text}, node {machine.node:.2f} us"
    click.echo(measured_on)
    if STEP not in left_out:
        try:
            kernels, versions["mamba_ssm"] = load_kernels(options.mamba_ssm), source_version(options.mamba_ssm)
        except Exception as error:
            left_out[STEP] = left_out[PROMPT] = said(error)
    for peer, reason in left_out.items():
        click.echo(f"left out: {peer}: {reason}")
    rows, failed = [], False
    for name in models:
        try:
            paths = make(name, folder)
            with Ours(python, paths[1]) as ours:
                ours.ask("build", max_batch=max(options.batches, default=1))
            with Ours(python, paths[1]) as ours:
                versions |= ours.ask("open")
                for job in Model(name, paths, ours, (kernels, left_out), machine, options).jobs():
                    torch.cuda.empty_cache()  # ours is another process
                    rows.append(job())
                    click.echo(table(rows[-1]))
                    if options.write is not None:  # after every row: what was measured stays if the run is broken off
                        write(options.write, rows, measured_on, versions)
        except Exception as error:
            traceback.print_exc()
            click.echo(f"{name} is not measured further: {said(error)}", err=True)
            failed = True
    return failed


def write(path: Path, rows: list[dict[str, Any]], machine: str, versions: dict[str, str]) -> None:
    """Put rows into the file, in place of those with their names."""
    if path.exists():
        names = {row["name"] for row in rows}
        before = json.loads(path.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in before if row["name"] not in names] + rows
    packages = ("mamba-deploy", "torch", "triton", "transformers")
    measured.write(path, rows, machine=machine, packages=packages, versions=versions, on_gpu=True)


if __name__ == "__main__":
    main()
