"""What an engine's calls read and write beside its weights and the state: on the GPU, and what the host has for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_deploy.runtime.device import Device, Memory, View, aligned
from mamba_deploy.runtime.lent import Lent

__all__ = ["LOG_STEPS", "MAX_EOS", "Buffers"]

LOG_STEPS = 64  # whose chosen tokens and random numbers there is room for
MAX_EOS = 64  # ids that end a row and that the GPU looks for
_LOGITS_KEPT = 3  # arrays that logits come to: what a caller has, what it gets next, and one that is never given


class Buffers:
    """For B rows, the first B of each are used; a method that writes waits until the GPU reads nothing of before."""

    device: Device
    vocab_size: int
    ids: int  # addresses; int32
    lens: int
    logits: int  # float32
    next_token: int  # int32, of graphs that give it
    host_log: NDArray[np.int32]  # [LOG_STEPS * max_batch], what was chosen, which the kernel writes
    host_uniform: NDArray[np.float64]  # [LOG_STEPS * max_batch], random numbers in [0, 1), which it reads

    def __init__(
        self,
        device: Device,
        allocate: Callable[[int, str], Memory],
        *,
        vocab_size: int,
        max_batch: int,
        tokens: int,
        positions: int,
        say: Callable[[str], None],
    ) -> None:
        """Allocate them.

        Args:
            device: Whose memory it is.
            allocate: Takes bytes and what they are for.
            vocab_size: V.
            max_batch: Rows of a step.
            tokens: The most that a call reads, of all its rows.
            positions: The most that a call gives logits for.
            say: Told what is slower than it should be.
        """
        self.device, self.vocab_size = device, vocab_size
        self.logits = allocate(4 * vocab_size * positions, "logits").address
        self.next_token = allocate(4 * max_batch, "next tokens").address
        self._first_id = aligned(4 * max_batch) // 4  # behind the lengths, so that one copy brings both
        inputs = self._first_id + tokens
        self.lens = allocate(4 * inputs, "lengths and token ids").address
        self.ids = self.lens + 4 * self._first_id
        self._steps = allocate(4 * max_batch, "step counts").address
        self._eos = allocate(4 * MAX_EOS, "ids that end a row").address
        self._host_inputs, _ = device.host_array((inputs,), np.int32)
        self._host_steps, _ = device.host_array((max_batch,), np.int32)
        self._host_eos, _ = device.host_array((MAX_EOS,), np.int32)
        self.host_log, self._log = device.host_array((LOG_STEPS * max_batch,), np.int32)
        self.host_uniform, self._uniform = device.host_array((LOG_STEPS * max_batch,), np.float64)
        arrays, is_locked = device.page_locked((_LOGITS_KEPT, max_batch, vocab_size), np.float32)
        self._host_logits = Lent(arrays)
        if not is_locked:
            say("slower than it should be: CUDA cannot page-lock memory here, so logits take longer to the host")

    def load_tokens(self, tokens: NDArray[np.int32], lengths: NDArray[np.int32]) -> None:
        """Put in place what a call reads: the tokens of all rows, one row after the other, and each row's length."""
        self.device.synchronize()
        end = self._first_id + len(tokens)
        self._host_inputs[: len(lengths)] = lengths
        self._host_inputs[self._first_id : end] = tokens
        self.device.upload(self.lens, self._host_inputs[:end])

    def load_step(self, tokens: NDArray[np.int32], lengths: NDArray[np.int32], step: int) -> None:
        """Put in place what a step with the choice of the next tokens reads: :meth:`load_tokens`, and its number."""
        self.load_tokens(tokens, lengths)
        steps = self._host_steps[: len(tokens)]
        steps[...] = step
        self.device.upload(self._steps, steps)

    def load_endings(self, eos_ids: Sequence[int]) -> None:
        """Put in place the tokens that end a row, up to :data:`MAX_EOS`."""
        self.device.synchronize()
        self._host_eos[:] = -1
        self._host_eos[: len(eos_ids)] = eos_ids
        self.device.upload(self._eos, self._host_eos)

    def of_choice(self, batch: int, *, is_drawn: bool) -> dict[str, Any]:
        """Arguments of :meth:`mamba_deploy.plugins.kernels.Kernels.sample_token`, which feeds the next step."""
        log_shape = (LOG_STEPS, batch)
        return {
            "logits": View(self.logits, (batch, self.vocab_size), "float32"),
            "uniform": View(self._uniform, log_shape, "float64") if is_drawn else None,
            "steps": View(self._steps, (batch,), "int32"),
            "tokens": View(self.ids, (batch,), "int32"),
            "log": View(self._log, log_shape, "int32"),
            "seq_lens": View(self.lens, (batch,), "int32"),
            "eos_ids": View(self._eos, (MAX_EOS,), "int32"),
        }

    def read_logits(self, batch: int) -> NDArray[np.float32]:
        """[B, V], the caller's own: lent, for a copy may take longer than the step; a copy where that was the last."""
        logits: NDArray[np.float32] = self._host_logits.lend()[:batch]
        self.device.download(logits, self.logits)
        self.device.synchronize()
        return logits.copy() if self._host_logits.left == 0 else logits

    def read_all_logits(self, batch: int, width: int) -> NDArray[np.float32]:
        """[B, L, V], of an engine that gives those of every position."""
        logits = np.empty((batch, width, self.vocab_size), np.float32)
        self.device.download(logits, self.logits)
        self.device.synchronize()
        return logits
