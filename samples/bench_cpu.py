"""Speed on this CPU beside Hugging Face transformers: decode at batch 1 and prompt of 512 tokens.

    python samples/bench_cpu.py --write samples/results/cpu.json

One random model of each generation in the published 130M size, the same weights and threads for all, in one run: after
a warm-up the contenders take turns, and each row holds medians. Ours decodes from half-precision bundles too. The limit
of decode is the bytes a step must read over the read bandwidth; that of a prompt its operations over the rate of a
matrix product. Both are measured here, and take turns with the contenders, for a shared machine is not equally fast
from one minute to the next.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import measured
import numpy as np
import onnx
import onnxruntime
import torch

from mamba_deploy import Session, export
from mamba_deploy.contract import DType
from mamba_deploy.limits import Limits

MODELS = ("mamba-130m", "mamba2-130m")
DTYPES: tuple[DType, ...] = ("float32", "float16", "bfloat16")
PROMPT_TOKENS = 512
LIMIT = "limit"  # what takes turns with the contenders
Timed = Callable[[], float]  # seconds a token


@click.command()
@click.option("--threads", default=2, show_default=True, help="For every contender.")
@click.option("--steps", default=40, show_default=True, help="Decode steps of one turn.")
@click.option("--turns", default=5, show_default=True, help="Turns of each contender.")
@click.option(
    "--compile/--no-compile", "with_compile", default=True, help="Also a torch.compile'd step of transformers."
)
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--write", type=click.Path(path_type=Path), help="Write the results as JSON.")
def main(threads: int, steps: int, turns: int, with_compile: bool, models: str, write: Path | None) -> None:
    """Measure, print, and write the results."""
    torch.set_num_threads(threads)
    read, multiply = _reader(), _multiplier(threads)
    seen: dict[str, list[float]] = {"read": [], "product": []}  # the medians of the rows
    rows = []
    for name in models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            model = _random_model(name, Path(scratch) / "checkpoint")
            with contextlib.ExitStack() as stack:
                session, *halves = (
                    stack.enter_context(Session.open(_exported(Path(scratch), dtype), threads=threads))
                    for dtype in DTYPES
                )
                decode = Limits.of(session.config, session.contract)
                prompt = Limits.of(session.config, session.contract, seq=PROMPT_TOKENS)
                ids = np.random.default_rng(0).integers(0, session.config.vocab_size, (1, PROMPT_TOKENS))
                contenders: dict[str, Timed] = {
                    "mamba-deploy": lambda s=session, i=ids: _our_decode(s, i, steps),
                    "transformers eager": lambda m=model, i=ids: _their_decode(m, m, i, steps),
                }
                for dtype, half in zip(DTYPES[1:], halves, strict=True):
                    contenders[f"mamba-deploy, {dtype}"] = lambda s=half, i=ids: _our_decode(s, i, steps)
                note = ""
                if with_compile:
                    try:
                        compiled = torch.compile(model, dynamic=False)
                        _their_decode(model, compiled, ids, 3)
                        contenders["transformers compiled step"] = lambda m=model, c=compiled, i=ids: _their_decode(
                            m, c, i, steps
                        )
                    except Exception as error:  # whatever the compiler cannot do
                        note = f"the compiled step does not work: {type(error).__name__}"
                times = _take_turns({**contenders, LIMIT: read}, turns)
                seen["read"].append(1 / times[LIMIT])
                times[LIMIT] *= decode.bytes
                rows.append(_row(f"decode/{name}/b1/fp32", times, note))
                contenders = {
                    "mamba-deploy": lambda s=session, i=ids: _our_prompt(s, i),
                    "transformers eager": lambda m=model, i=ids: _their_prompt(m, i),
                }
                times = _take_turns({**contenders, LIMIT: multiply}, turns)
                seen["product"].append(1 / times[LIMIT])
                times[LIMIT] *= prompt.flops / PROMPT_TOKENS
                rows.append(_row(f"prompt/{name}/b1/fp32/l{PROMPT_TOKENS}", times, ""))
        for row in rows[-2:]:
            peers = ", ".join(f"{peer} {value:.1f}" for peer, value in row["peers"].items())
            click.echo(
                f"{row['name']}: {row['value']:.1f} tokens/s, {row['value'] / row['limit']:.0%} of the limit "
                f"{row['limit']:.1f}; {peers} {row['note']}"
            )
    bandwidth, flops = (statistics.median(values) for values in seen.values())
    click.echo(
        f"read bandwidth {bandwidth / 1e9:.1f} GB/s, matrix product {flops / 1e9:.0f} GFLOP/s, {threads} threads"
    )
    if write is not None:
        _write(write, rows, threads, bandwidth, flops)


def _exported(scratch: Path, dtype: DType) -> Path:
    return export(scratch / "checkpoint", scratch / dtype, dtype=dtype).path


def _reader() -> Timed:
    """Seconds a byte of summing 1 GiB, the best of some readings."""
    data = torch.ones(1 << 28)
    return lambda: _best(lambda: data.sum(), data.nbytes)


def _multiplier(threads: int) -> Timed:
    """Seconds an operation of a 2048 x 2048 x 2048 float32 product, by the faster of PyTorch and ONNX Runtime."""
    size = 2048
    a, b = torch.rand(size, size), torch.rand(size, size)
    graph = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 18]> g (float[{size},{size}] a) => (float[{size},{size}] y) '
        "{ y = MatMul (a, b) }"
    )
    graph.graph.initializer.append(onnx.numpy_helper.from_array(b.numpy(), "b"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    work = 2 * size**3
    return lambda: min(_best(lambda: a @ b, work), _best(lambda: session.run(None, {"a": a.numpy()}), work))


def _best(run: Callable[[], Any], amount: float) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) / amount


def _random_model(name: str, directory: Path) -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_hidden_layers": 24, "tie_word_embeddings": True}
    if name == "mamba-130m":
        model: Any = MambaForCausalLM(MambaConfig(vocab_size=50280, **sizes))
    elif name == "mamba2-130m":
        config = Mamba2Config(vocab_size=50288, num_heads=24, head_dim=64, n_groups=1, state_size=128, **sizes)
        model = Mamba2ForCausalLM(config)
    else:
        raise click.UsageError(f"there is no model {name}: choose from {', '.join(MODELS)}")
    model.eval().save_pretrained(directory)
    return model


def _our_decode(session: Session, ids: np.ndarray, steps: int) -> float:
    session.reset()
    token = session.prefill(ids[:, :8]).argmax(-1)
    start = time.perf_counter()
    for _ in range(steps):
        token = session.step(token).argmax(-1)
    return (time.perf_counter() - start) / steps


def _our_prompt(session: Session, ids: np.ndarray) -> float:
    session.reset()
    start = time.perf_counter()
    session.prefill(ids)
    return (time.perf_counter() - start) / ids.shape[1]


@torch.inference_mode()
def _their_decode(model: Any, step: Any, ids: np.ndarray, steps: int) -> float:
    output = model(torch.from_numpy(ids[:, :8]), use_cache=True)
    cache = output.cache_params
    token = output.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(steps):
        output = step(token, cache_params=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return (time.perf_counter() - start) / steps


@torch.inference_mode()
def _their_prompt(model: Any, ids: np.ndarray) -> float:
    start = time.perf_counter()
    model(torch.from_numpy(ids), use_cache=True, logits_to_keep=1)
    return (time.perf_counter() - start) / ids.shape[1]


def _take_turns(contenders: dict[str, Timed], turns: int) -> dict[str, float]:
    """Median seconds a token of each, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, run in contenders.items():
            seconds = run()
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _row(name: str, seconds: dict[str, float], note: str) -> dict[str, Any]:
    """From seconds a token."""
    rates = {contender: 1 / value for contender, value in seconds.items()}
    ours, limit = rates.pop("mamba-deploy"), rates.pop(LIMIT)
    return {"name": name, "value": ours, "unit": "tokens/s", "limit": limit, "peers": rates, "note": note}


def _write(path: Path, rows: list[dict[str, Any]], threads: int, bandwidth: float, flops: float) -> None:
    machine = f"{_cpu_name()}, {threads} threads; read {bandwidth / 1e9:.1f} GB/s, product {flops / 1e9:.0f} GFLOP/s"
    packages = ("mamba-deploy", "onnxruntime", "torch", "transformers")
    measured.write(path, rows, machine=machine, packages=packages)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
