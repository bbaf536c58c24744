"""Decoding that runs ahead of the host: each token feeds the next step on the GPU, and the host reads them behind.

A step is one CUDA graph, the engine and the kernel that chooses the tokens. Steps are enqueued in blocks; the state is
copied at the start of a block, so that what was enqueued too far is taken back by reading the block's tokens again up
to the one that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_deploy.errors import EngineError
from mamba_deploy.runtime.buffers import LOG_STEPS, Buffers
from mamba_deploy.runtime.device import Graph
from mamba_deploy.runtime.gpu_state import GpuState
from mamba_deploy.runtime.sampling import NOT_FINITE

__all__ = ["BLOCK", "Ahead"]

BLOCK = 48  # steps enqueued at once, less than LOG_STEPS: between blocks the GPU waits for the host, some 0.2 ms


class Ahead:
    """One run of :func:`mamba_deploy.runtime.generate.generate` on the GPU."""

    def __init__(
        self,
        buffers: Buffers,
        state: GpuState,
        graph: Graph,
        tokens: Sequence[int],
        limit: int,
        draw: Callable[[int], float] | None,
    ) -> None:
        """Nothing is enqueued yet.

        Args:
            buffers: The backend's.
            state: Has read all before these tokens.
            graph: A step with the choice of the next tokens.
            tokens: What each row reads first; -1 for one that has ended.
            limit: Steps that may be asked for.
            draw: A random number for a row, each time it chooses; None if none is needed.
        """
        self._buffers, self._state, self._graph, self._draw = buffers, state, graph, draw
        first = np.asarray(tokens, np.int32)
        self._active = first >= 0
        self._active_at_start = self._active
        self._tokens: list[NDArray[np.int32]] = [np.maximum(first, 0)]  # of every step that was asked for
        self._limit, self._drawn = limit, 0
        self._start = self._executed = 0  # steps at the state's copy, and enqueued
        self._events: list[Any] = []  # of the steps since the copy

    @property
    def _asked(self) -> int:
        return len(self._tokens) - 1

    def next(self) -> NDArray[np.int32]:
        """The tokens after the next step, [B] int32; those of ended rows mean nothing.

        Raises:
            EngineError: Logits were not finite, or the GPU failed.
        """
        device, batch = self._buffers.device, self._state.batch
        with device:
            if self._asked == self._executed:
                self._enqueue(min(BLOCK, self._limit - self._asked))
            device.wait(self._events[self._asked - self._start])
            slot = self._asked % LOG_STEPS
            chosen = self._buffers.host_log[slot * batch : (slot + 1) * batch].copy()
        if bad := np.flatnonzero(self._active & (chosen < 0)).tolist():
            raise EngineError(f"logits of row {bad[0]} are not finite", hint=NOT_FINITE)
        self._tokens.append(np.maximum(chosen, 0))
        return chosen

    def end_row(self, row: int) -> None:
        """The row has ended: it reads nothing any more, its last token neither."""
        self.settle()
        self._active[row] = False

    def row_has_ended(self, row: int) -> None:
        """The kernel knows already: it chose a token that ends the row."""
        self._active[row] = False

    def settle(self) -> None:
        """Take the state to where the host is: after the steps that were asked for."""
        if self._executed == self._asked or self._state.is_lost:
            return
        self._state.is_lost = True
        with self._buffers.device as device:
            device.synchronize()
            self._state.go_back()
            self._load(self._start)
            for _ in range(self._asked - self._start):
                self._graph.launch()
            device.synchronize()
        self._executed = self._asked
        self._state.is_lost = False

    def close(self) -> None:
        """Settle, and let the state go."""
        try:
            self.settle()
        finally:
            if self._state.behind == self.settle:
                self._state.behind = None

    def _enqueue(self, steps: int) -> None:
        self._state.check()
        self._state.behind = self.settle
        self._state.checkpoint()
        self._start, self._events, self._active_at_start = self._executed, [], self._active.copy()
        batch = self._state.batch
        if self._draw is not None:
            for step in range(max(self._drawn, self._start), self._start + steps):
                slot = step % LOG_STEPS
                values = [self._draw(row) if self._active[row] else 0.0 for row in range(batch)]
                self._buffers.host_uniform[slot * batch : (slot + 1) * batch] = values
            self._drawn = max(self._drawn, self._start + steps)
        self._load(self._start)
        for _ in range(steps):
            self._graph.launch()
            self._events.append(self._buffers.device.mark())
            self._executed += 1
        self._state.since = None  # the copy is ours

    def _load(self, step: int) -> None:
        self._buffers.load_step(self._tokens[step], self._active_at_start.astype(np.int32), step)
