"""How fast a session is, beside the least time that moving its bytes takes: decode by rows, prompts by length.

Three figures of a decode step of B rows, where the backend has them:

- device: the bare CUDA graph by the GPU's clock, no logits copied; a sample is 10 replays between two events.
- generate: greedy tokens by :meth:`Session.generate` by the wall clock, whatever the host does among it, the making of
  text too. Where the steps are enqueued so many at once, a sample is as many.
- step: one :meth:`Session.step` by the wall clock; its logits come to the host.

A prompt is :meth:`Session.reset`, ``prefill`` and the choice of a token, by the wall clock.

Each figure is warmed up for 20 steps (a prompt 3 times), and then has 20 samples and 200 steps (a prompt 20 samples),
unless its time is up, and 5 samples even then. Tokens are random, and every state has read a prompt.

The limit is that of :mod:`mamba_deploy.limits` over the bandwidth of a copy, measured in the same run and counted as
read and as written. Weights larger than the cache are read from memory in every step. A model that, with its states, is
smaller than twice the cache may come from there, and beat the limit: its rows say so. On a CPU it may do so without a
cache, where reading is faster than a copy.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_deploy import __version__
from mamba_deploy.bundle import ENGINES, WEIGHTS, Bundle
from mamba_deploy.errors import InputError, require
from mamba_deploy.limits import Limits
from mamba_deploy.runtime.device import Device
from mamba_deploy.runtime.session import Session

__all__ = ["Figure", "Machine", "Plan", "Report", "Row", "bench", "check_plot", "engine_facts", "plot"]

_WARM_STEPS, _WARM_PROMPTS = 20, 3
_SAMPLES, _FEWEST = 20, 5  # of a figure; and where the time is up
_REPLAYS = 10  # of a CUDA graph between two events
_READ_FIRST = 16  # tokens that the rows of a decode step have read
_HOST_COPY_BYTES = 256 << 20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_PACKAGES = (  # of those that are installed, the versions
    "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt", "tensorrt-rtx-cu13-bindings", "pycuda",
    "cuda-bindings",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    batches: Sequence[int] = (1, 8)  # rows of decode steps
    prompts: Sequence[int] = (1, 128, 2048)  # tokens
    steps: int = 200  # of each figure of decode
    seconds: float = 5.0  # of each figure, after which fewer have to do
    tflops: float | None = None  # 1e12 operations a second, that matrix products reach on this machine

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: One is not positive, or there is nothing to measure.
        """
        for name in ("batches", "prompts"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise InputError(f"{name} is {list(values)}: expected numbers, 1 or above")
        for name in ("steps", "seconds", "tflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} is {value}: expected a number above 0")


@dataclass(frozen=True)
class Machine:
    """What a session is held to."""

    name: str
    bandwidth: float  # bytes a second of a copy, read and written
    cache: str  # "L2"; on a CPU the largest
    cache_bytes: int  # 0: not known

    @classmethod
    def of_gpu(cls, device: Device) -> Machine:
        """Measured now."""
        return cls(device.name, device.copy_bandwidth(), "L2", device.l2_bytes)

    @classmethod
    def of_host(cls, threads: int | None) -> Machine:
        """Measured now, by so many threads; None for one a core."""
        count = threads or os.cpu_count() or 1
        name = f"CPU, {count} {'thread' if count == 1 else 'threads'}"
        return cls(name, _host_bandwidth(count), *_host_cache())

    def holds(self, limits: Limits) -> bool:
        """Whether what a step reads may lie in the cache: it is smaller than twice the cache."""
        return limits.weight_bytes + limits.state_bytes // 2 < 2 * self.cache_bytes  # a state counts twice there


def _host_bandwidth(threads: int) -> float:
    source, to = np.ones(_HOST_COPY_BYTES, np.uint8), np.zeros(_HOST_COPY_BYTES, np.uint8)
    parts = list(zip(np.array_split(to, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> float:
            start = perf_counter()
            list(pool.map(lambda part: np.copyto(*part), parts))
            return perf_counter() - start

        times = [copy() for _ in range(10)]
    return 2 * _HOST_COPY_BYTES / statistics.median(times[1:])


def _host_cache() -> tuple[str, int]:
    """Name and bytes of the largest cache that Linux tells of."""
    found = [(0, "")]
    for path in _CACHES.glob("index*/size"):
        size, level = (p.read_text(encoding="ascii").strip() for p in (path, path.with_name("level")))  # "32768K", "3"
        found.append((int(size.removesuffix("K")) << 10, f"L{level}"))
    nbytes, name = max(found)
    return name, nbytes


@dataclass(frozen=True)
class Figure:
    """Seconds of a step of all rows, or of a prompt."""

    samples: Sequence[float]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.samples)

    @property
    def p95(self) -> float:
        """Seconds; between two samples by a straight line."""
        return float(np.percentile(self.samples, 95))


@dataclass(frozen=True)
class Row:
    """A decode step of ``batch`` rows, or a prompt of ``seq`` tokens."""

    batch: int
    seq: int
    limits: Limits
    limit: float  # seconds
    limited_by: str  # "bytes" or "products"
    cache: str  # that it may come from; "" if it does not fit in any
    figures: Mapping[str, Figure]
    kernels: int | None = None  # of a step's CUDA graph

    def rates(self, figure: Figure) -> dict[str, float]:
        """Of the median: tokens, bytes and operations a second, and the limit over it."""
        return {
            "tokens_per_second": self.batch * self.seq / figure.median,
            "bytes_per_second": self.limits.bytes / figure.median,
            "flops_per_second": self.limits.flops / figure.median,
            "share_of_limit": self.limit / figure.median,
        }

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        figures = {
            name: {
                "median_ms": 1e3 * figure.median,
                "p95_ms": 1e3 * figure.p95,
                "samples": len(figure.samples),
                **self.rates(figure),
            }
            for name, figure in self.figures.items()
        }
        return {
            "batch": self.batch,
            "tokens": self.seq,
            "bytes": self.limits.bytes,
            "flops": self.limits.flops,
            "limit_ms": 1e3 * self.limit,
            "limited_by": self.limited_by,
            "cache": self.cache or None,
            "kernels": self.kernels,
            "figures": figures,
        }


@dataclass(frozen=True)
class Report:
    """All that was measured."""

    backend: str
    machine: Machine
    plan: Plan
    decode: Sequence[Row]
    prompt: Sequence[Row]
    versions: Mapping[str, str]
    gpu_memory_bytes: int | None = None  # that the session took, CUDA's own context not counted
    engine: Mapping[str, Any] | None = None  # of engine_facts

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {
            "backend": self.backend,
            "machine": self.machine.name,
            "copy_bytes_per_second": self.machine.bandwidth,
            "cache_bytes": self.machine.cache_bytes,
            "tflops": self.plan.tflops,
            "versions": dict(self.versions),
            "gpu_memory_bytes": self.gpu_memory_bytes,
            "engine": self.engine,
            "decode": [row.to_dict() for row in self.decode],
            "prompt": [row.to_dict() for row in self.prompt],
        }

    def table(self) -> str:
        """For people."""
        bandwidth = f"{self.machine.bandwidth / 1e9:.1f} GB/s, read and written"
        facts = {self.machine.name: f"a copy reaches {bandwidth}"}
        if self.engine is not None:
            engine = self.engine
            bound = engine["bound_weight_bytes"]
            beside = f" and {bound / 1e6:.1f} MB of weights in {WEIGHTS}" if bound else ""
            share = f"{engine['share_of_weights']:.2f} of the weights"
            facts["engine"] = f"{engine['bytes'] / 1e6:.1f} MB{beside}, {share}, built in {engine['build_seconds']} s"
        if self.gpu_memory_bytes is not None:
            facts["GPU memory"] = f"{self.gpu_memory_bytes / 1e6:.1f} MB taken by the session"
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        width = max(len(name) for name in facts)
        lines = [self.backend, *(f"  {name:<{width}}  {value}" for name, value in facts.items())]
        lines += ["decode, a step of all rows", *_aligned(self._decode_cells())]
        lines += ["prompt, to its first token", *_aligned(self._prompt_cells())]
        if self.plan.tflops is None:
            lines.append("  the limit of a prompt is that of its bytes; --tflops adds that of its products")
        return "\n".join(lines)

    def _decode_cells(self) -> list[list[str]]:
        kernels = any(row.kernels is not None for row in self.decode)
        head = ["rows", "figure", "ms", "p95", "tokens/s", "MB", "GB/s", "limit ms", "of limit"]
        cells = [[*head, *(["kernels"] if kernels else []), ""]]
        for row in self.decode:
            for name, figure in row.figures.items():
                rates = row.rates(figure)
                middle = [f"{row.limits.bytes / 1e6:.2f}", f"{rates['bytes_per_second'] / 1e9:.1f}"]
                cells.append([str(row.batch), name, *_times(figure, rates), *middle, *_limit(row, rates)])
                if kernels:
                    cells[-1].append(str(row.kernels) if name == "device" else "")
                cells[-1].append(_cached(row))
        return cells

    def _prompt_cells(self) -> list[list[str]]:
        cells = [["tokens", "ms", "p95", "tokens/s", "TFLOP/s", "limit ms", "of limit", "limited by", ""]]
        for row in self.prompt:
            for figure in row.figures.values():
                rates = row.rates(figure)
                operations = f"{rates['flops_per_second'] / 1e12:.3f}"
                ends = [*_limit(row, rates), row.limited_by, _cached(row)]
                cells.append([str(row.seq), *_times(figure, rates), operations, *ends])
        return cells


def _times(figure: Figure, rates: Mapping[str, float]) -> list[str]:
    return [f"{1e3 * figure.median:.3f}", f"{1e3 * figure.p95:.3f}", f"{rates['tokens_per_second']:.1f}"]


def _limit(row: Row, rates: Mapping[str, float]) -> list[str]:
    return [f"{1e3 * row.limit:.3f}", f"{100 * rates['share_of_limit']:.0f} %"]


def _cached(row: Row) -> str:
    return f"(from the {row.cache} cache)" if row.cache else ""


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Columns flush right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = ("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells)
    return [f"  {row}".rstrip() for row in rows]


def engine_facts(bundle: Bundle, backend: str) -> dict[str, Any]:
    """Size of the engine, in bytes and beside the weights, those it is given at opening counted in; and build time.

    Raises:
        BundleError: None was built for this backend.
    """
    facts, files = bundle.engine(backend), bundle.manifest["files"]
    size, bound = files[ENGINES[backend]]["bytes"], sum(length for _, length in facts["weights"].values())
    return {
        "bytes": size,
        "bound_weight_bytes": bound,
        "share_of_weights": (size + bound) / files[WEIGHTS]["bytes"],
        "build_seconds": facts["build_seconds"],
    }


# --- measuring ----------------------------------------------------------------------------------------------------


def bench(
    open_session: Callable[[], Session],
    plan: Plan,
    *,
    device: Device | None = None,
    threads: int | None = None,
    engine: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Report:
    """Open a session and measure it.

    Args:
        open_session: Gives a session for this alone; it is closed.
        plan: What to measure.
        device: The GPU that the session runs on; None for the CPU.
        threads: Of the session, on the CPU; None for one a core.
        engine: Of :func:`engine_facts`, for the report.
        say: Told what is being measured.

    Raises:
        InputError: There are more rows than the engine was built for; nothing has been measured then.
        MambaDeployError: The session does not open, or fails.
    """
    free = _free_bytes(device)
    with open_session() as session:
        session.config = replace(session.config, eos_token_ids=())  # no row ends before its time
        _ = session.tokenizer  # raises where the package is missing
        session.backend.new_state(max(plan.batches))
        say("measuring the copy bandwidth")
        machine = Machine.of_host(threads) if device is None else Machine.of_gpu(device)
        random = np.random.default_rng(0)
        decode, prompt = [], []
        for batch in plan.batches:
            say(f"measuring decode of {batch} {'row' if batch == 1 else 'rows'}")
            decode.append(_decode(session, batch, plan, machine, random))
        for length in plan.prompts:
            say(f"measuring a prompt of {length} {'token' if length == 1 else 'tokens'}")
            prompt.append(_prompt(session, length, plan, machine, random))
        taken = None if free is None else free - (_free_bytes(device) or 0)
        name = session.backend.name
    return Report(name, machine, plan, decode, prompt, _versions(), taken, engine)


def _free_bytes(device: Device | None) -> int | None:
    if device is None:
        return None
    with device:
        return device.free_bytes()


def _versions() -> dict[str, str]:
    found = {"mamba-deploy": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _decode(session: Session, batch: int, plan: Plan, machine: Machine, random: np.random.Generator) -> Row:
    limits = Limits.of(session.config, session.contract, batch=batch)
    length = min(_READ_FIRST, session.max_chunk)
    prompt = random.integers(0, session.config.vocab_size, (batch, length), np.int32)
    replays, kernels = _replays(session, prompt, plan)
    figures = {
        "device": replays,
        "generate": _generated(session, prompt, plan),
        "step": _steps(session, prompt, plan, random),
    }
    return Row(
        batch=batch,
        seq=1,
        limits=limits,
        limit=limits.bytes / machine.bandwidth,
        limited_by="bytes",
        cache=machine.cache if machine.holds(limits) else "",
        figures={name: Figure(samples) for name, samples in figures.items() if samples},
        kernels=kernels,
    )


def _replays(session: Session, prompt: NDArray[np.int32], plan: Plan) -> tuple[list[float], int | None]:
    """Seconds a step of the bare CUDA graph, and its kernels; nothing of a backend that has no graphs."""
    backend: Any = session.backend
    if not hasattr(backend, "time_replays"):
        return [], None
    session.reset()
    batch, length = prompt.shape
    state = backend.new_state(batch)
    backend.run(prompt, np.full(batch, length, np.int32), state)
    kernels = backend.kernels_a_step(state)
    if kernels is None:
        return [], None
    tokens = np.ascontiguousarray(prompt[:, 0])
    return _sample(lambda: backend.time_replays(tokens, _REPLAYS, state), plan, size=_REPLAYS), kernels


def _generated(session: Session, prompt: NDArray[np.int32], plan: Plan) -> list[float]:
    """Seconds a step of greedy decoding."""
    size = getattr(session.backend, "steps_ahead", 1)
    most = math.ceil(_WARM_STEPS / size) + max(_SAMPLES, math.ceil(plan.steps / size))
    session.reset()
    running: Any = session.generate(prompt.tolist(), max_tokens=1 + most * size)
    for _ in prompt:
        next(running)  # of the prompt's logits

    def run() -> float:
        start = perf_counter()
        for _ in range(size * len(prompt)):
            next(running)
        return perf_counter() - start

    try:
        return _sample(run, plan, size=size)
    finally:
        running.close()


def _steps(session: Session, prompt: NDArray[np.int32], plan: Plan, random: np.random.Generator) -> list[float]:
    """Seconds a step whose logits come to the host."""
    session.reset()
    session.prefill(prompt)

    def run() -> float:
        tokens = random.integers(0, session.config.vocab_size, len(prompt), np.int32)
        start = perf_counter()
        session.step(tokens)
        return perf_counter() - start

    return _sample(run, plan)


def _prompt(session: Session, length: int, plan: Plan, machine: Machine, random: np.random.Generator) -> Row:
    limits = Limits.of(session.config, session.contract, seq=length)
    of_bytes = limits.bytes / machine.bandwidth
    of_products = limits.flops / (plan.tflops * 1e12) if plan.tflops else 0.0

    def run() -> float:
        ids = random.integers(0, session.config.vocab_size, (1, length), np.int32)
        start = perf_counter()
        session.reset()
        session.prefill(ids).argmax(-1)
        return perf_counter() - start

    return Row(
        batch=1,
        seq=length,
        limits=limits,
        limit=max(of_bytes, of_products),
        limited_by="products" if of_products > of_bytes else "bytes",
        cache=machine.cache if machine.holds(limits) else "",
        figures={"prompt": Figure(_sample(run, replace(plan, steps=1), warm=_WARM_PROMPTS))},
    )


def _sample(run: Callable[[], float], plan: Plan, *, size: int = 1, warm: int = _WARM_STEPS) -> list[float]:
    """Seconds a step, by one sample each: those of a call, which runs ``size`` steps, over ``size``."""
    start, done = perf_counter(), 0
    while done < warm and (done == 0 or perf_counter() - start < plan.seconds):
        run()
        done += size
    samples: list[float] = []
    enough, start = max(_SAMPLES, math.ceil(plan.steps / size)), perf_counter()
    while len(samples) < _FEWEST or (len(samples) < enough and perf_counter() - start < plan.seconds):
        samples.append(run() / size)
    return samples


# --- a picture ----------------------------------------------------------------------------------------------------


def check_plot(path: Path) -> None:
    """Raise before any work is done if :func:`plot` could not write there.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InputError: The name is neither an SVG's nor a PNG's, or there is no such folder.
    """
    require("matplotlib", extra="plot", why="draw what is measured")
    if path.suffix.lower() not in (".svg", ".png"):
        raise InputError(f"{path} is neither an .svg nor a .png file", hint="its ending says what is drawn")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for {path.name}", hint="make it, or choose another")


def plot(report: Report, path: Path) -> None:
    """Draw ms a step by rows, and ms to the first token by the prompt's length, beside their limits: an SVG or a PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="plot", why="draw what is measured")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot", why="draw what is measured")
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for panel, measured, across, up in (
        (panels[0], report.decode, "rows", "ms a token"),
        (panels[1], report.prompt, "tokens of the prompt", "ms to the first token"),
    ):
        rows = {row.batch * row.seq: row for row in measured}
        ticks = sorted(rows)
        for name in dict.fromkeys(name for row in measured for name in row.figures):
            having = [tick for tick in ticks if name in rows[tick].figures]
            panel.plot(having, [1e3 * rows[tick].figures[name].median for tick in having], marker="o", label=name)
        limits = [1e3 * rows[tick].limit for tick in ticks]
        panel.plot(ticks, limits, color="black", linestyle="--", marker=".", label="limit")
        panel.set(xscale="log", yscale="log", xlabel=across, ylabel=up)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_xticks([], minor=True)
        panel.legend()
    figure.suptitle(f"{report.backend}: a copy reaches {report.machine.bandwidth / 1e9:.1f} GB/s", fontsize="medium")
    try:
        figure.savefig(path, dpi=120, format=path.suffix.lower().removeprefix("."))
    finally:
        pyplot.close(figure)
