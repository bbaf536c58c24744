"""Shared by the GPU tests: when they are skipped, the kernels, random arguments, and what is promised of any call."""

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any

import numpy as np
import pytest
import recurrence
import torch
from torch import Tensor

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]

MAJOR = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0  # of the compute capability

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
NAN = math.nan
BITS = {2: torch.int16, 4: torch.int32}


@cache
def kernels() -> Any:
    """The library built for this machine, or what MAMBA_DEPLOY_TEST_KERNELS says: a library, or ``nvrtc``."""
    from mamba_deploy.plugins.kernels import RuntimeKernels, load

    given = os.environ.get("MAMBA_DEPLOY_TEST_KERNELS")
    return RuntimeKernels() if given == "nvrtc" else load(given)


class Draw:
    """Random tensors of one case on the CPU, NaN past each row's end where they run over tokens."""

    def __init__(self, B: int, L: int, T: torch.dtype, seq_lens: list[int] | None, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        given = [max(L - 3 * b, 0) for b in range(B)] if seq_lens is None else seq_lens
        self.seq_lens = torch.tensor(given, dtype=torch.int32)
        self.past = (torch.arange(L) >= self.seq_lens[:, None])[..., None]
        self.B, self.L, self.T = B, L, T

    def tokens(self, channels: int) -> Tensor:
        return self.normal(self.B, self.L, channels).float().masked_fill(self.past, NAN).to(self.T)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype or self.T)

    def state(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """With a -0.0, which 1 * state + 0 would lose."""
        state = self.normal(*shape, dtype=dtype)
        state[..., 0] = -0.0
        return state

    def negative(self, *shape: int) -> Tensor:
        """A: between -1/16 and -16, evenly in the logarithm."""
        return -(torch.rand(*shape, generator=self.generator) * math.log(256) - math.log(16)).exp()


def bits(tensor: Tensor) -> Tensor:
    """The representation, so that -0.0 differs from 0.0 and NaN equals itself."""
    return tensor.contiguous().view(BITS[tensor.element_size()])


class Call:
    """A call of one op with its arguments on the device and its outputs and workspace full of NaN."""

    def __init__(self, op: str, args: list[Any], sizes: dict[str, int], *, same: bool = False) -> None:
        self.op, self.args, self.same = op, args, same
        self.seq_lens = next(a for a in args if isinstance(a, Tensor) and a.dtype == torch.int32)
        self.state_at = next(i for i, a in enumerate(args) if a is self.seq_lens) - 1  # the state is before seq_lens
        self.device_args = [a.cuda() if isinstance(a, Tensor) else a for a in args]
        x = self.device_args[0]
        if op == "last_token":
            self.outputs = {"y": torch.full_like(x[:, 0], NAN)}
            dtypes = {"dtype": _name(x)}
        else:
            state = self.device_args[self.state_at]
            self.outputs = {"y": torch.full_like(x, NAN), "state_out": state if same else torch.full_like(state, NAN)}
            dtypes = {"dtype": _name(x), "state_dtype": _name(state)}
        self.workspace_bytes = kernels().workspace_bytes(op, **dtypes, **sizes)
        # 256 bytes more, to see a write past its end
        self.workspace = torch.full((self.workspace_bytes // 4 + 64,), NAN, device=x.device)

    def launch(self) -> None:
        getattr(kernels(), self.op)(
            *self.device_args, **self.outputs, workspace=self.workspace, stream=torch.cuda.current_stream().cuda_stream
        )

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Launch, and hold the result against what is promised of any call."""
        self.launch()
        torch.cuda.synchronize()
        for i, (before, after) in enumerate(zip(self.args, self.device_args, strict=True)):
            if isinstance(before, Tensor) and not (self.same and i == self.state_at):
                assert torch.equal(bits(before), bits(after.cpu())), f"argument {i} was written to"
        assert self.workspace[self.workspace_bytes // 4 :].isnan().all(), "written past the workspace"
        y = self.outputs["y"].cpu()
        idle = self.seq_lens == 0
        if self.op == "last_token":
            assert not bits(y[idle]).any(), "y is not zero in a row of length 0"
            return y, None
        state_out = self.outputs["state_out"].cpu()
        past = torch.arange(y.shape[1]) >= self.seq_lens[:, None]
        assert not bits(y[past]).any(), "y is not zero past a row's end"
        assert torch.equal(bits(state_out[idle]), bits(self.args[self.state_at][idle])), (
            "a row of length 0 changed its state"
        )
        return y, state_out

    def check_graph(self, replays: int = 1000) -> None:
        """Eager, then captured and replayed: the same bits each time. The state must not be bound to both."""
        self.launch()
        torch.cuda.synchronize()
        eager = {name: out.clone() for name, out in self.outputs.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.launch()
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(replays):
            for out in self.outputs.values():
                out.fill_(NAN)
            graph.replay()
            for name, out in self.outputs.items():
                different += (bits(out) != bits(eager[name])).any()
        assert different.item() == 0, f"{different.item()} outputs of {replays} replays differ from eager"


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def compare(got: Tensor, want: np.ndarray, size: np.ndarray, roundings: int) -> None:
    """To the error bound of ``recurrence.error_bound``, with float32 arithmetic.

    Below 2^-126 the hardware's exponential is 0, so a result may be that much less for every rounding.
    """
    stored = torch.finfo(got.dtype)
    tiny = stored.tiny * stored.eps + roundings * 2.0**-126
    bound = recurrence.error_bound(want, size, roundings, torch.finfo(F32).eps / 2, stored.eps / 2, tiny)
    error = np.abs(got.double().numpy() - want)
    worst = np.unravel_index(np.argmax(error / bound), error.shape)
    assert (error <= bound).all(), f"at {worst}: got {got[worst]}, want {want[worst]} +- {bound[worst]}"
