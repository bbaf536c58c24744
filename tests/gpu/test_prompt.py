"""MambaModel for prompts against its reference in float64: logits and states.

Errors are relative to the largest value of a result. What is rounded to T between the parts of a layer puts a result
off by some roundings, and by more behind a norm of few values: so the error of the reference in T counts too.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from gpu.device import BF16, F16, F32, NAN, bits, needs_gpu
from gpu.models import Call, Model, Sizes
from torch import Tensor

from mamba_deploy.plugins.build import kernels_library

pytestmark = needs_gpu

ALLOWED = {F32: 2e-5, F16: 4e-3, BF16: 3e-2}
SHAPES = ((1, 2), (2, 3), (3, 5), (1, 17), (2, 64), (3, 129), (2, 300))  # B, L
PATTERN = 0xFF  # of which every float of 16 and 32 bits is NaN
MAMBA2 = {"heads": 8, "states": 32}
CASES: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba-130m": {"width": 768, "inner": 1536, "rank": 48, "vocab": 1000},
    "mamba-norms": {"norm_eps": 1e-6, "rank": 16},
    "mamba-odd": {"inner": 72, "states": 5, "rank": 6, "taps": 3, "bias": True},
    "mamba-bare": {"inner": 40, "states": 32, "rank": 8, "skip": 0, "given": False},
    "mamba2": MAMBA2,
    "mamba2-130m": {"width": 768, "inner": 1536, "states": 128, "heads": 24, "vocab": 1000},
    "mamba2-groups": {**MAMBA2, "inner": 256, "groups": 8},
    "mamba2-no-norm": {**MAMBA2, "gate_norm": False, "skip": 2, "bias": True},
    "mamba2-odd": {"heads": 8, "inner": 160, "states": 36, "groups": 2, "skip": 2},
    "mamba2-wide": {"heads": 8, "inner": 1024, "states": 256, "skip": 0, "given": False},
}


@cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ.get("MAMBA_DEPLOY_TEST_KERNELS") or str(kernels_library()))


def launch(call: Call, workspace: Tensor) -> None:
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    code = library().mamba_model(ctypes.byref(call.struct), ctypes.c_void_p(workspace.data_ptr()), stream)
    assert code == 0, f"cudaError {code}"


def scratch(call: Call) -> Tensor:
    """The workspace it asks for, full of NaN, and 256 bytes more."""
    needed = library().mamba_model_workspace
    needed.restype = ctypes.c_size_t
    return torch.full((needed(ctypes.byref(call.struct)) + 256,), PATTERN, dtype=torch.uint8, device="cuda")


def run(model: Model, *, same: bool = False) -> Call:
    call = Call(model, same=same)
    workspace = scratch(call)
    launch(call, workspace)
    torch.cuda.synchronize()
    assert workspace[-256:].eq(PATTERN).all(), "written past the workspace"
    given = [(model.fixed, call.fixed), *zip(model.layers, call.layers, strict=True)]
    for before, after in given:
        for name, value in before.items():
            if value is not None and not (same and name.endswith("_state")):
                assert torch.equal(bits(value), bits(after[name].cpu())), f"{name} was written to"
    return call


def check(call: Call, model: Model) -> None:
    wide, rounded = model.results(), model.results(None)
    lengths = model.fixed["seq_lens"]
    used = torch.arange(model.L) < lengths[:, None] if model.all_logits else lengths > 0
    states = zip(call.states, wide[1:], rounded[1:], ("conv", "ssm"), strict=True)
    results = [("logits", call.logits, wide[0], rounded[0], used)]
    for found, wanted, near, name in states:
        for i, (a, b, c) in enumerate(zip(found, wanted, near, strict=True)):
            results.append((f"{name}_state.{i}", a, b, c, lengths > 0))
    for name, found, want, near, rows in results:
        size = want[rows].abs().max()
        error = (found.cpu().double() - want)[rows].abs().max() / size
        expected = (near.double() - want)[rows].abs().max() / size
        allowed = max(ALLOWED[model.T], ALLOWED[model.S] if name.startswith("ssm") else 0, 3 * expected)
        assert error <= allowed, f"{name}: {error:.1e} of {allowed:.1e}, B {model.B}, L {model.L}"
    for name, outs in zip(("conv_state", "ssm_state"), call.states, strict=True):
        for layer, out in zip(model.layers, outs, strict=True):
            idle = lengths == 0
            assert torch.equal(bits(out.cpu()[idle]), bits(layer[name][idle])), f"a row of length 0 changed its {name}"


@pytest.mark.parametrize("same", [False, True], ids=["two-buffers", "one-buffer"])
@pytest.mark.parametrize("T", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, T: torch.dtype, same: bool) -> None:
    for B, L in SHAPES:
        model = Model(Sizes(**CASES[case]), B, L, T, seed=L, all_logits=same)
        call = run(model, same=same)
        check(call, model)
        if not model.all_logits:
            assert not bits(call.logits.cpu()[model.fixed["seq_lens"] == 0]).any(), "of a row that read nothing"


@pytest.mark.parametrize("S", [F16, BF16], ids=str)
@pytest.mark.parametrize("case", ["mamba", "mamba2"])
def test_narrow_states(case: str, S: torch.dtype) -> None:
    model = Model(Sizes(**CASES[case]), 2, 70, F16, S)
    check(run(model), model)


def test_limits_of_the_step() -> None:
    model = Model(Sizes(**MAMBA2), 2, 70, F16, dt_limits=(0.01, 0.5))
    check(run(model), model)


def test_ids_out_of_range_are_the_nearest() -> None:
    model = Model(Sizes(), 1, 8, F16)
    model.fixed["input_ids"][0, 2:5] = torch.tensor([-1, 104, 1 << 30])
    found = run(model).logits
    model.fixed["input_ids"].clamp_(0, 103)
    assert torch.equal(found, run(model).logits)


@pytest.mark.parametrize("same", [False, True], ids=["two-buffers", "one-buffer"])
@pytest.mark.parametrize("T", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize(
    "case", ["mamba", "mamba-norms", "mamba-odd", "mamba2", "mamba2-groups", "mamba2-no-norm", "mamba2-odd"]
)
def test_a_token_of_many_rows(case: str, T: torch.dtype, same: bool) -> None:
    """Of as many as products are cuBLAS's from, which depends on the width; out_proj in parts up to 128."""
    for B, width in ((3 if "mamba2" in case else 12, 2048), (128, 2056), (131, 640)):
        model = Model(Sizes(**{**CASES[case], "width": width}), B, 1, T, seed=B)
        call = run(model, same=same)
        check(call, model)
        assert not bits(call.logits.cpu()[model.fixed["seq_lens"] == 0]).any(), "of a row that read nothing"


@pytest.mark.parametrize("case", ["mamba-130m", "mamba2-130m", "mamba2-groups"])
def test_a_prompt_in_two_parts(case: str) -> None:
    """The state carries over."""
    whole = Model(Sizes(**CASES[case]), 1, 200, F32)
    want = run(whole)
    first, second = (Model(Sizes(**CASES[case]), 1, 100, F32) for _ in range(2))
    for part, tokens in ((first, slice(0, 100)), (second, slice(100, 200))):
        part.layers = [dict(layer) for layer in whole.layers]
        part.fixed = {**whole.fixed, "seq_lens": torch.tensor([100], dtype=torch.int32)}
        part.fixed["input_ids"] = whole.fixed["input_ids"][:, tokens].contiguous()
    for layer, conv, ssm in zip(second.layers, *run(first).states, strict=True):
        layer["conv_state"], layer["ssm_state"] = conv.cpu(), ssm.cpu()
    found = run(second)
    torch.testing.assert_close(found.logits, want.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["mamba", "mamba2-130m"])
def test_a_graph_replays_bit_identical(case: str) -> None:
    model = Model(Sizes(**CASES[case]), 2, 150, BF16)
    eager = run(model)
    call = Call(model)
    workspace, graph = scratch(call), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(call, workspace)
    outputs = [call.logits, *call.states[0], *call.states[1]]
    wanted = [eager.logits, *eager.states[0], *eager.states[1]]
    for _ in range(300):
        for out in outputs:
            out.fill_(NAN)
        graph.replay()
        for out, want in zip(outputs, wanted, strict=True):
            assert torch.equal(bits(out), bits(want))


def test_the_first_call_of_a_process_may_be_captured() -> None:
    """cuBLAS then allocates while a graph is captured."""
    script = (
        "import torch; from gpu.test_prompt import *; model = Model(Sizes(), 1, 20, F16); call = Call(model)\n"
        "workspace, graph = scratch(call), torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph): launch(call, workspace)\n"
        "graph.replay(); torch.cuda.synchronize(); check(call, model)"
    )
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=own)
