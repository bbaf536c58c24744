"""Times mamba-deploy in a Python that has TensorRT and no PyTorch, at the bidding of bench_peers.py in another one.

    PYTHON samples/bench_worker.py BUNDLE    # {"do": "prepare", "batch": 8, "length": 16} -> {"kernels": 123}

Requests are lines of JSON on stdin, replies lines on stdout; `Ours` is the end of bench_peers.py, which imports no
TensorRT. Both ends import this file: so nothing of it imports PyTorch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import click
import numpy as np

from mamba_deploy.bundle import Bundle
from mamba_deploy.runtime.bench import Plan, time_generate
from mamba_deploy.runtime.bench_report import Figure
from mamba_deploy.runtime.session import Session

OURS = "mamba-deploy"
READ_FIRST = 16  # tokens before decode
COMPARED = 4096  # logits of a row


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
def main(bundle: Path) -> None:
    """Answer requests about this bundle, until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    serve(Worker(bundle), sys.stdin, out)


class Worker:
    """Does what requests name, on one bundle; arguments and results are JSON."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.session: Any = None
        self.state: Any = None

    def build(self, max_batch: int) -> dict[str, Any]:
        """An engine for at least so many rows, unless the bundle has one."""
        engine = Bundle.open(self.bundle).manifest.get("engines", {}).get("tensorrt")
        if engine is None or engine["max_batch"] < max_batch:
            from mamba_deploy.exporters.engine_build import build_engine

            build_engine(self.bundle, max_batch=max_batch, say=functools.partial(print, file=sys.stderr))
        return {}

    def open(self) -> dict[str, Any]:
        self.session = Session.open(self.bundle, "tensorrt")
        self.session.config = dataclasses.replace(self.session.config, eos_token_ids=())  # no row ends before its time
        return {"tensorrt": str(getattr(sys.modules.get("tensorrt"), "__version__", ""))}

    def logits(self, ids: list[list[int]], greedy: int) -> dict[str, Any]:
        """The first few after these tokens [B, L] and so many likeliest ones, which are ``fed``."""
        self.session.reset()
        logits, fed = self.session.prefill(ids), []
        for _ in range(greedy):
            fed.append(logits.argmax(-1).tolist())
            logits = self.session.step(fed[-1])
        return {"fed": fed, "logits": logits[:, :COMPARED].tolist()}

    def prepare(self, batch: int, length: int) -> dict[str, Any]:
        """A state that has read so many tokens; gives the kernels of a step from it."""
        self.session.reset()
        backend, most = self.session.backend, self.session.max_chunk
        ids = random_ids(self.session.config.vocab_size, batch, length)
        self.tokens, self.state = np.ascontiguousarray(ids[:, 0]), backend.new_state(batch)
        for start in range(0, length, most):
            part = np.ascontiguousarray(ids[:, start : start + most])
            backend.run(part, np.full(batch, part.shape[1], np.int32), self.state)
        return {"kernels": backend.kernels_a_step(self.state)}

    def replays(self, steps: int) -> dict[str, Any]:
        """Of the decode graph, from the state that was prepared."""
        time_replays = self.session.backend.time_replays
        time_replays(self.tokens, steps // 5, self.state)
        seconds = time_replays(self.tokens, steps, self.state)
        if seconds is None:
            raise RuntimeError("there is no CUDA graph of a step")
        return {"us": 1e6 * seconds / steps}

    def generate(self, batch: int) -> dict[str, Any]:
        """Greedy tokens by the wall clock, as ``mamba-deploy bench`` times them."""
        ids = random_ids(self.session.config.vocab_size, batch, READ_FIRST)
        figure = Figure(time_generate(self.session, ids, Plan()))
        return {"us": 1e6 * figure.median, "p95": 1e6 * figure.p95}

    def prompt(self, ids: list[list[int]], count: int) -> dict[str, Any]:
        """To the first token."""
        rows = np.array(ids, np.int32)
        return {"us": wall_us(lambda: (self.session.reset(), self.session.prefill(rows).argmax(-1)), count)}


def serve(worker: Any, lines: Iterable[str], out: TextIO) -> None:
    """A line of JSON in, a line out; an exception becomes ``error``."""
    for line in lines:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": said(error)}
        print(json.dumps(reply), file=out, flush=True)


class Ours:
    """The other end: a worker's process."""

    def __init__(self, python: str, bundle: Path) -> None:
        command = [python, str(Path(__file__).resolve()), str(bundle)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")

    def ask(self, do: str, **arguments: Any) -> Any:
        """The reply.

        Raises:
            RuntimeError: It cannot do that, or has ended.
        """
        with contextlib.suppress(BrokenPipeError):  # the end is seen below
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        reply = json.loads(line) if line else {"error": f"the process has ended with {self.process.wait()}"}
        if "error" in reply:
            raise RuntimeError(f"{OURS}, asked to {do}: {reply['error']}")
        return reply

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *exception: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()  # closes its stdin, at which it ends


def random_ids(vocab_size: int, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length), np.int32)


def said(error: BaseException) -> str:
    """An error on a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def wall_us(run: Callable[[], Any], count: int) -> float:
    """Median of so many runs, after one that does not count."""
    times = []
    for _ in range(count + 1):
        start = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
