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
from mamba_deploy.errors import InputError
from mamba_deploy.limits import Limits
from mamba_deploy.runtime.bench_report import Figure, Report, Row
from mamba_deploy.runtime.device import Device
from mamba_deploy.runtime.session import Session

__all__ = ["Machine", "Plan", "bench", "time_generate"]

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
        name, memory = session.backend.name, getattr(session.backend, "memory", {})
    return Report(name, machine, plan, decode, prompt, _versions(), taken, engine, memory)


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
        "generate": time_generate(session, prompt, plan),
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


def time_generate(session: Session, prompt: NDArray[np.int32], plan: Plan) -> list[float]:
    """Seconds of a step of greedy decoding, each sample of as many steps as the backend enqueues at once.

    Args:
        session: Whose end-of-text ids are empty, so that no row ends.
        prompt: [B, L] int32, which is read first.
        plan: How many samples.
    """
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
