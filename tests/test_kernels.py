"""The ctypes callers: their structs against the header, what reaches the library, and every check, without a GPU.

The library is a stub that gcc compiles here: it keeps the struct it was given. Arrays are addresses and shapes alone.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_deploy import ops
from mamba_deploy.errors import PluginError
from mamba_deploy.plugins import build, kernels, structs, toolchain
from mamba_deploy.plugins.kernels import Kernels

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
HEADER = (PLUGINS / "mamba_kernels.h").read_text(encoding="utf-8")
OPS = {
    "causal_conv1d": structs.MambaCausalConv1d,
    "selective_scan": structs.MambaSelectiveScan,
    "ssd_scan": structs.MambaSsdScan,
    "last_token": structs.MambaLastToken,
}
BY_OP = pytest.mark.parametrize("op", OPS)
STEP = {
    "in_proj": structs.MambaInProj,
    "x_proj": structs.MambaXProj,
    "selective_update": structs.MambaSelectiveUpdate,
    "ssd_update": structs.MambaSsdUpdate,
    "out_proj": structs.MambaOutProj,
    "head": structs.MambaHead,
}
STRUCTS = {**OPS, **STEP, "model": structs.MambaModel, "sample_token": structs.MambaSampleToken}
EVERY = [*STRUCTS.values(), structs.MambaLayer]
STUB = """
#include <string.h>
#include "mamba_kernels.h"
unsigned char last_call[512];
void* last_workspace;
void* last_stream;
int calls, answer;
size_t workspace;
#define OP(name, Struct)                                                     \\
    size_t name##_workspace(const Struct* call) {                            \\
        memcpy(last_call, call, sizeof *call);                               \\
        return workspace;                                                    \\
    }                                                                        \\
    int name(const Struct* call, void* scratch, void* stream) {              \\
        memcpy(last_call, call, sizeof *call);                               \\
        last_workspace = scratch;                                            \\
        last_stream = stream;                                                \\
        ++calls;                                                             \\
        return answer;                                                       \\
    }
OP(mamba_causal_conv1d, MambaCausalConv1d)
OP(mamba_selective_scan, MambaSelectiveScan)
OP(mamba_ssd_scan, MambaSsdScan)
#ifndef WITHOUT_LAST_TOKEN
OP(mamba_last_token, MambaLastToken)
#endif
OP(mamba_sample_token, MambaSampleToken)
OP(mamba_model, MambaModel)
int32_t mamba_pending_row(const MambaModel* call) { return 1000 + call->layers; }
""" + "".join(f"OP(mamba_{op}, {struct.__name__})\n" for op, struct in STEP.items())
ITEM = {"float32": 4, "float16": 2, "bfloat16": 2, "uint16": 2, "int32": 4, "int64": 8, "float64": 8}
TYPESTR = {"float32": "<f4", "float16": "<f2", "uint16": "<u2", "int32": "<i4", "int64": "<i8", "float64": "<f8"}


def gcc(*arguments: str | Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (gcc or cc) on PATH")
    subprocess.run([compiler, "-Wall", "-Wextra", "-Werror", f"-I{PLUGINS}", *arguments], check=True)


class Stub:
    """The library, and what it was given last."""

    def __init__(self, path: Path) -> None:
        self.kernels = Kernels(path)
        self.library = self.kernels._library

    def value(self, name: str, kind: Any = ctypes.c_int) -> Any:
        return kind.in_dll(self.library, name)

    def last(self, op: str) -> dict[str, Any]:
        call = STRUCTS[op].in_dll(self.library, "last_call")
        return {name: getattr(call, name) for name, _ in STRUCTS[op]._fields_}


@pytest.fixture(scope="module")
def stub_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.c").write_text(STUB, encoding="utf-8")
    gcc("-shared", "-fPIC", "-o", folder / "stub.so", folder / "stub.c")
    return folder / "stub.so"


@pytest.fixture
def stub(stub_path: Path) -> Stub:
    found = Stub(stub_path)
    found.value("calls").value = found.value("answer").value = 0
    found.value("workspace", ctypes.c_size_t).value = 0
    return found


# --- structs ------------------------------------------------------------------------------------------------------


def header_fields(struct: str) -> list[tuple[str, Any]]:
    """Names and ctypes types of a struct, read from the text of the header."""
    body = re.search(rf"typedef struct {struct} \{{(.*?)\}} {struct};", HEADER, re.S)
    assert body is not None
    text = re.sub(r"/\*.*?\*/", "", body[1], flags=re.S)
    found: list[tuple[str, Any]] = []
    for declaration in filter(None, (part.strip() for part in text.split(";"))):
        kind, names = re.fullmatch(r"((?:const )?\w+\*?)\s+(.*)", declaration, re.S).groups()
        scalar = {"int32_t": ctypes.c_int32, "float": ctypes.c_float}
        found += [(name.strip(), ctypes.c_void_p if "*" in kind else scalar[kind]) for name in names.split(",")]
    return found


@pytest.mark.parametrize("struct", EVERY)
def test_struct_has_the_fields_of_the_header(struct):
    assert list(struct._fields_) == header_fields(struct.__name__)


def test_every_struct_and_function_of_the_header_has_a_caller():
    assert set(re.findall(r"typedef struct (\w+)", HEADER)) == {struct.__name__ for struct in EVERY}
    functions = {name for op in STRUCTS for name in (f"mamba_{op}", f"mamba_{op}_workspace")}
    assert set(re.findall(r"^\w+ (mamba_\w+)\(", HEADER, re.M)) == functions | {"mamba_pending_row"}


def test_structs_lie_in_memory_as_the_compiler_lays_them(tmp_path):
    fields = [(struct, name) for struct in EVERY for name, _ in struct._fields_]
    lines = [f'printf("%zu\\n", offsetof({struct.__name__}, {name}));' for struct, name in fields]
    lines += [f'printf("%zu\\n", sizeof({struct.__name__}));' for struct in EVERY]
    source = tmp_path / "offsets.c"
    main = "int main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    source.write_text('#include <stdio.h>\n#include "mamba_kernels.h"\n' + main, encoding="utf-8")
    gcc("-o", tmp_path / "offsets", source)
    printed = subprocess.run([tmp_path / "offsets"], check=True, capture_output=True, text=True).stdout
    ours = [getattr(struct, name).offset for struct, name in fields] + [ctypes.sizeof(s) for s in EVERY]
    assert [int(line) for line in printed.split()] == ours


def test_codes_are_those_of_the_header():
    codes = {name: int(value) for name, value in re.findall(r"(MAMBA_\w+) = (\d+)", HEADER)}
    expected = {f"MAMBA_{name.upper()}": code for name, code in structs.DTYPES.items()}
    expected |= {f"MAMBA_ACTIVATION_{name.upper()}": code for name, code in structs.ACTIVATIONS.items()}
    assert codes == expected


def test_names_of_cuda_errors_are_those_of_cuda():
    try:
        header = toolchain.find_compiler().include / "driver_types.h"
    except PluginError as error:
        pytest.skip(str(error))
    found = re.findall(r"^\s+(cudaError\w+)\s*=\s*(\d+)", header.read_text(encoding="utf-8", errors="replace"), re.M)
    theirs = {int(code): name for name, code in found}
    assert {code: theirs[code] for code in kernels.CUDA_ERRORS} == kernels.CUDA_ERRORS


# --- arrays that are no more than an address ---------------------------------------------------------------------

_addresses = itertools.count(1)


@dataclass
class Fake:
    """As pycuda and cupy show an array."""

    dtype: str
    shape: tuple[int, ...]
    pointer: int = field(default_factory=lambda: next(_addresses) << 32)
    strides: tuple[int, ...] | None = None
    read_only: bool = False
    device: Any = None

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        typestr = TYPESTR.get(self.dtype, self.dtype)
        data = (self.pointer, self.read_only)
        return {"shape": self.shape, "typestr": typestr, "data": data, "strides": self.strides, "version": 3}


@dataclass
class Device:
    """As torch has it, and with the ``id`` of cupy."""

    index: int
    type: str = "cuda"

    @property
    def id(self) -> int:
        return self.index

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


@dataclass
class FakeTensor:
    """As torch shows an array: also bfloat16, which __cuda_array_interface__ has not."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pointer: int = field(default_factory=lambda: next(_addresses) << 32)
    device: Device = field(default_factory=lambda: Device(0))
    contiguous: bool = True

    def data_ptr(self) -> int:
        return self.pointer

    def element_size(self) -> int:
        return self.dtype.itemsize

    def is_contiguous(self) -> bool:
        return self.contiguous

    def stride(self) -> tuple[int, ...]:
        return (1, *self.shape[:-1])


# Of each op: arguments in order, of B 2, L 5, C 6, K 4, D 6, N 8, H 4, P 3, G 2, d 6. All sizes of an op differ.
def arguments(op: str, dtype: str = "float32", state_dtype: str = "float32") -> dict[str, Any]:
    t, s, f = (lambda *shape, dtype=d: Fake(dtype, shape) for d in (dtype, state_dtype, "float32"))
    lens = Fake("int32", (2,))
    if op == "causal_conv1d":
        given = {"x": t(2, 5, 6), "weight": t(6, 4), "bias": t(6), "conv_state": t(2, 6, 3), "seq_lens": lens}
        return given | {"activation": "silu", "y": t(2, 5, 6), "state_out": t(2, 6, 3)}
    if op == "selective_scan":
        given = {"x": t(2, 5, 6), "dt": t(2, 5, 6), "A": f(6, 8), "B": t(2, 5, 8), "C": t(2, 5, 8), "D": f(6)}
        given |= {"z": t(2, 5, 6), "dt_bias": f(6), "ssm_state": s(2, 6, 8), "seq_lens": lens}
        return given | {"dt_softplus": True, "y": t(2, 5, 6), "state_out": s(2, 6, 8)}
    if op == "ssd_scan":
        given = {"x": t(2, 5, 12), "dt": t(2, 5, 4), "A": f(4), "B": t(2, 5, 16), "C": t(2, 5, 16), "D": f(4)}
        given |= {"dt_bias": f(4), "ssm_state": s(2, 4, 3, 8), "seq_lens": lens}
        given |= {"dt_softplus": True, "dt_min": 0.0, "dt_max": math.inf, "n_groups": 2, "chunk_size": 64}
        return given | {"y": t(2, 5, 12), "state_out": s(2, 4, 3, 8)}
    return {"x": t(2, 5, 6), "seq_lens": lens, "y": t(2, 6)}


SIZES = {
    "causal_conv1d": {"batch": 2, "length": 5, "channels": 6, "width": 4},
    "selective_scan": {"batch": 2, "length": 5, "channels": 6, "state_size": 8},
    "ssd_scan": {"batch": 2, "length": 5, "heads": 4, "head_dim": 3, "state_size": 8, "groups": 2},
    "last_token": {"batch": 2, "length": 5, "width": 6},
}
CONSTANTS = {
    "causal_conv1d": {"activation": 1},
    "selective_scan": {"dt_softplus": 1},
    "ssd_scan": {"dt_softplus": 1, "dt_min": 0.0, "dt_max": math.inf, "skip_per_channel": 0},
    "last_token": {},
}


def sampling() -> dict[str, Any]:
    """Arguments of sample_token: B 2, V 5, capacity 3."""
    arrays = {"logits": Fake("float32", (2, 5)), "uniform": Fake("float64", (3, 2)), "steps": Fake("int32", (2,))}
    arrays |= {"tokens": Fake("int32", (2,)), "log": Fake("int32", (3, 2))}
    arrays |= {"seq_lens": Fake("int32", (2,)), "eos_ids": Fake("int32", (4,))}
    return arrays | {"temperature": 0.5, "top_k": 4, "top_p": 0.75, "min_p": 0.25}


def call(stub: Stub, op: str, **changed: Any) -> None:
    given = sampling() if op == "sample_token" else arguments(op)
    getattr(stub.kernels, op)(**{**given, **changed})


def refusal(stub: Stub, op: str, **changed: Any) -> PluginError:
    with pytest.raises(PluginError) as caught:
        call(stub, op, **changed)
    assert stub.value("calls").value == 0
    return caught.value


# --- what reaches the library ------------------------------------------------------------------------------------


@BY_OP
def test_arguments_come_in_the_order_of_the_ops(op):
    import inspect

    ours = list(inspect.signature(getattr(Kernels, op)).parameters.values())[1:]
    theirs = inspect.signature(getattr(ops, op)._init_fn).parameters
    assert [p.name for p in ours if p.kind is not p.KEYWORD_ONLY] == list(theirs)


@BY_OP
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("state_dtype", ["float32", "float16"])
def test_the_struct_holds_what_was_given(stub, op, dtype, state_dtype):
    given = arguments(op, dtype, state_dtype)
    getattr(stub.kernels, op)(**given, stream=77)
    expected = SIZES[op] | CONSTANTS[op] | {"dtype": structs.DTYPES[dtype]}
    if "ssm_state" in given:
        expected["state_dtype"] = structs.DTYPES[state_dtype]
    for name, value in given.items():
        if isinstance(value, Fake):
            state = "conv_state" if op == "causal_conv1d" else "ssm_state"
            expected[f"{state}_out" if name == "state_out" else name] = value.pointer
    assert stub.last(op) == expected
    assert stub.value("calls").value == 1
    assert stub.value("last_stream", ctypes.c_void_p).value == 77
    assert stub.value("last_workspace", ctypes.c_void_p).value is None


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("causal_conv1d", "bias"),
        ("selective_scan", "D"),
        ("selective_scan", "z"),
        ("selective_scan", "dt_bias"),
        ("ssd_scan", "D"),
        ("ssd_scan", "dt_bias"),
    ],
)
def test_what_is_optional_may_be_none(stub, op, name):
    call(stub, op, **{name: None})
    assert stub.last(op)[name] is None


def test_constants_reach_the_struct(stub):
    call(stub, "causal_conv1d", activation="none")
    assert stub.last("causal_conv1d")["activation"] == 0
    call(stub, "selective_scan", dt_softplus=False)
    assert stub.last("selective_scan")["dt_softplus"] == 0
    call(stub, "ssd_scan", dt_softplus=False, dt_min=0.25, dt_max=0.5, D=Fake("float32", (4, 3)))
    last = stub.last("ssd_scan")
    assert (last["dt_softplus"], last["dt_min"], last["dt_max"], last["skip_per_channel"]) == (0, 0.25, 0.5, 1)


@pytest.mark.parametrize("op", ["causal_conv1d", "selective_scan", "ssd_scan"])
def test_state_may_go_out_into_its_own_array(stub, op):
    given = arguments(op)
    state = given["conv_state" if op == "causal_conv1d" else "ssm_state"]
    getattr(stub.kernels, op)(**{**given, "state_out": state})
    assert state.pointer in stub.last(op).values()


def test_torch_tensors_bring_their_bfloat16(stub):
    given = {
        name: FakeTensor(getattr(torch, value.dtype), value.shape) if isinstance(value, Fake) else value
        for name, value in arguments("selective_scan").items()
    }
    for name in ("x", "dt", "B", "C", "z", "y"):
        given[name].dtype = torch.bfloat16
    given["ssm_state"].dtype = given["state_out"].dtype = torch.float16
    stub.kernels.selective_scan(**given)
    last = stub.last("selective_scan")
    assert (last["dtype"], last["state_dtype"]) == (2, 1)
    assert last["x"] == given["x"].pointer


@pytest.mark.parametrize("typestr", ["uint16", "<V2"])
def test_sixteen_bits_are_bfloat16_where_the_caller_says_so(stub, typestr):
    given = arguments("ssd_scan", typestr, typestr)
    stub.kernels.ssd_scan(**given, dtype="bfloat16", state_dtype="bfloat16")
    last = stub.last("ssd_scan")
    assert (last["dtype"], last["state_dtype"]) == (2, 2)


@pytest.mark.parametrize("attribute", ["handle", "cuda_stream", "ptr"])
def test_streams_of_pycuda_torch_and_cupy(stub, attribute):
    stream = type("Stream", (), {attribute: 4096})()
    call(stub, "last_token", stream=stream)
    assert stub.value("last_stream", ctypes.c_void_p).value == 4096


def test_the_stride_of_an_axis_of_size_one_says_nothing(stub):
    call(stub, "last_token", x=Fake("float32", (2, 5, 6), strides=(120, 24, 4)))
    single = {"seq_lens": Fake("int32", (1,)), "y": Fake("float32", (1, 6), strides=(999, 4))}
    call(stub, "last_token", x=Fake("float32", (1, 5, 6), strides=(7, 24, 4)), **single)
    assert stub.value("calls").value == 2


def test_the_struct_of_sample_token_holds_what_was_given(stub):
    given = sampling()
    stub.kernels.sample_token(**given, stream=77)
    expected = {name: value.pointer if isinstance(value, Fake) else value for name, value in given.items()}
    assert stub.last("sample_token") == expected | {"batch": 2, "vocab": 5, "capacity": 3, "endings": 4}
    assert stub.value("last_stream", ctypes.c_void_p).value == 77


@pytest.mark.parametrize("without", [(), ("uniform",), ("log",), ("uniform", "log")])
def test_greedy_search_needs_no_uniform_and_no_log(stub, without):
    call(stub, "sample_token", temperature=0.0, **dict.fromkeys(without))
    last = stub.last("sample_token")
    assert {name for name in ("uniform", "log") if last[name] is None} == set(without)
    assert last["capacity"] == (1 if len(without) == 2 else 3)


def test_uniform_may_be_a_tensor(stub):
    call(stub, "sample_token", uniform=FakeTensor(torch.float64, (3, 2)))
    assert stub.value("calls").value == 1


# --- workspace ---------------------------------------------------------------------------------------------------


@BY_OP
def test_workspace_bytes_asks_the_library_with_sizes_and_dtypes(stub, op):
    stub.value("workspace", ctypes.c_size_t).value = 3 << 33
    assert stub.kernels.workspace_bytes(op, **SIZES[op], dtype="float16", state_dtype="bfloat16") == 3 << 33
    last = stub.last(op)
    assert {name: last[name] for name in SIZES[op]} == SIZES[op]
    assert (last["dtype"], last.get("state_dtype", 2)) == (1, 2)
    assert not any(value for name, value in last.items() if name not in (*SIZES[op], "dtype", "state_dtype"))


@pytest.mark.parametrize("as_pair", [True, False], ids=["pointer and bytes", "array"])
def test_workspace_reaches_the_library(stub, as_pair):
    stub.value("workspace", ctypes.c_size_t).value = 512
    call(stub, "ssd_scan", workspace=(1 << 20, 512) if as_pair else Fake("float32", (128,), 1 << 20))
    assert stub.value("last_workspace", ctypes.c_void_p).value == 1 << 20


@pytest.mark.parametrize(
    ("workspace", "expected"),
    [
        (None, "workspace is None: expected 512 bytes"),
        ((1 << 20, 511), "workspace has 511 bytes: expected 512"),
        ((0, 512), "workspace is a null pointer: expected device memory"),
        (((1 << 20) + 16, 512), "workspace is at address 0x100010: expected a multiple of 256 bytes"),
        (Fake("float32", (127,)), "workspace has 508 bytes: expected 512"),
    ],
)
def test_wrong_workspace(stub, workspace, expected):
    stub.value("workspace", ctypes.c_size_t).value = 512
    assert str(refusal(stub, "ssd_scan", workspace=workspace)) == expected


def test_workspace_of_another_array(stub):
    stub.value("workspace", ctypes.c_size_t).value = 512
    x = Fake("float32", (2, 5, 12), 1 << 20)
    message = "workspace overlaps x in memory: expected memory of its own"
    assert str(refusal(stub, "ssd_scan", x=x, workspace=(1 << 20, 512))) == message


@pytest.mark.parametrize(
    ("op", "changed", "expected"),
    [
        ("scan", {}, "op is 'scan': expected one of causal_conv1d, selective_scan, ssd_scan, last_token"),
        ("last_token", {"heads": 4}, "last_token was given the sizes batch, length, width, heads: expected batch, "),
        ("last_token", {"dtype": "int8"}, "dtype is 'int8': expected float32, float16 or bfloat16"),
        ("ssd_scan", {"state_dtype": "half"}, "state_dtype is 'half': expected float32, float16 or bfloat16"),
        ("ssd_scan", {"state_size": 257}, "N is 257: expected 1 to 256"),
        ("ssd_scan", {"groups": 3}, "n_groups is 3: expected a divisor of the number of heads, 4"),
    ],
)
def test_workspace_of_impossible_sizes(stub, op, changed, expected):
    with pytest.raises(PluginError, match=f"^{re.escape(expected)}"):
        stub.kernels.workspace_bytes(op, **{**SIZES.get(op, {}), **changed})


# --- a whole model -----------------------------------------------------------------------------------------------


def layer(kind: str, dtype: str = "float32", state_dtype: str = "float32") -> dict[str, Any]:
    """Of B 2, d 6, K 4 and, in Mamba, D 5, N 8, R 3; in Mamba-2 H 4, P 3, N 8, G 2."""
    D, N, C, M = (5, 8, 5, 10) if kind == "mamba" else (12, 8, 44, 60)
    t, f = (lambda *shape, dtype=d: Fake(dtype, shape) for d in (dtype, "float32"))
    found = {"norm_weight": f(6), "in_proj": t(6, M), "in_proj_bias": t(M), "conv_weight": t(C, 4), "conv_bias": t(C)}
    found |= {"conv_state": t(2, C, 3), "out_proj": t(D, 6), "out_proj_bias": t(6), "conv_state_out": t(2, C, 3)}
    if kind == "mamba":
        found |= {"x_proj": t(D, 3 + 2 * N), "dt_proj": t(3, D), "A": f(D, N), "D": f(D), "dt_bias": f(D)}
        return found | {name: Fake(state_dtype, (2, D, N)) for name in ("ssm_state", "ssm_state_out")}
    found |= {"A": f(4), "D": f(4), "dt_bias": f(4), "gate_norm": f(D)}
    return found | {name: Fake(state_dtype, (2, 4, 3, N)) for name in ("ssm_state", "ssm_state_out")}


def model(kind: str, dtype: str = "float32", state_dtype: str = "float32", layers: int = 2) -> dict[str, Any]:
    """With L 5 and V 7."""
    arrays = {"input_ids": Fake("int32", (2, 5)), "seq_lens": Fake("int32", (2,)), "embedding": Fake(dtype, (7, 6))}
    arrays |= {"norm_weight": Fake("float32", (6,)), "head": Fake(dtype, (7, 6)), "logits": Fake("float32", (2, 7))}
    return {**arrays, "layers": [layer(kind, dtype, state_dtype) for _ in range(layers)]}


MODEL_SIZES = {
    "mamba": {"outputs": 10, "channels": 5, "inner": 5, "rank": 3, "heads": 0, "head_dim": 0, "groups": 1},
    "mamba2": {"outputs": 60, "channels": 44, "inner": 12, "rank": 0, "heads": 4, "head_dim": 3, "groups": 2},
}
BY_KIND = pytest.mark.parametrize("kind", MODEL_SIZES)


class Kept(Kernels):
    """Keeps what a launch was given; the layers are there as long as it runs."""

    def _launch(self, op: str, call: Any, workspace: int, stream: int) -> None:
        self.call = {name: getattr(call, name) for name, _ in call._fields_}
        each = (structs.MambaLayer * call.layers).from_address(self.call.pop("each"))
        self.layers = [{name: getattr(one, name) for name, _ in one._fields_} for one in each]


@BY_KIND
@pytest.mark.parametrize("state_dtype", ["float32", "float16"])
def test_a_model_reaches_the_library(stub_path, kind, state_dtype):
    kept, given = Kept(stub_path), model(kind, "float16", state_dtype)
    if kind == "mamba2":
        given |= {"pending": Fake("float32", (2, 64)), "pending_out": Fake("float32", (2, 64))}
    groups = MODEL_SIZES[kind]["groups"]
    kept.model(**given, eps=0.5, norm_eps=0.25, dt_min=0.125, dt_max=2.0, n_groups=groups)
    sizes = {"batch": 2, "length": 5, "layers": 2, "width": 6, "conv_width": 4, "state_size": 8, "vocab": 7}
    constants = {"eps": 0.5, "norm_eps": 0.25, "dt_min": 0.125, "dt_max": 2.0, "skip_per_channel": 0, "all_logits": 0}
    dtypes = {"dtype": 1, "state_dtype": structs.DTYPES[state_dtype]}
    layers = given.pop("layers")
    pointers = {"pending": None, "pending_out": None} | {name: array.pointer for name, array in given.items()}
    constants["pending_row"] = 64 if kind == "mamba2" else 0
    assert kept.call == sizes | MODEL_SIZES[kind] | constants | dtypes | pointers
    nothing = {name: None for name, _ in structs.MambaLayer._fields_}
    assert kept.layers == [{**nothing, **{n: array.pointer for n, array in one.items()}} for one in layers]


def test_a_model_may_lack_what_is_optional(stub_path):
    kept, given = Kept(stub_path), model("mamba2")
    missing = ("in_proj_bias", "conv_bias", "D", "dt_bias", "gate_norm", "out_proj_bias")
    for one in given["layers"]:
        for name in missing:
            one[name] = None
        one.update({f"{state}_out": one[state] for state in ("conv_state", "ssm_state")})
    kept.model(**{**given, "head": None, "logits": Fake("float32", (2, 5, 7))}, n_groups=2)
    assert kept.call["head"] == given["embedding"].pointer
    assert kept.call["all_logits"] == 1
    assert all(one[name] is None for one in kept.layers for name in missing)


def test_what_is_pending_goes_out_where_it_came_in(stub_path):
    kept, pending = Kept(stub_path), Fake("float32", (2, 64))
    kept.model(**model("mamba2"), pending=pending, n_groups=2)
    assert kept.call["pending"] == kept.call["pending_out"] == pending.pointer
    assert kept.call["pending_row"] == 64


@BY_KIND
def test_workspace_of_a_model(stub, kind):
    stub.value("workspace", ctypes.c_size_t).value = 1 << 40
    sizes = {"batch": 2, "length": 5, "layers": 2, "width": 6, "conv_width": 4, "state_size": 8, "vocab": 7}
    sizes |= {name: size for name, size in MODEL_SIZES[kind].items() if size}
    given = {name: size for name, size in sizes.items() if name != "inner" or kind == "mamba"}
    assert stub.kernels.workspace_bytes("model", **given, dtype="float16") == 1 << 40
    assert {name: size for name, size in stub.last("model").items() if size} == sizes | {"dtype": 1}
    assert stub.kernels.pending_row(**given) == 1002
    with pytest.raises(PluginError, match=r"^model was given the sizes batch"):
        stub.kernels.workspace_bytes("model", **{k: v for k, v in given.items() if k != "layers"})


@pytest.mark.parametrize(
    ("kind", "where", "changed", "expected"),
    [
        (
            "mamba",
            1,
            {"in_proj": Fake("float32", (6, 9))},
            "layers[1].in_proj has shape [6, 9]: expected [d = 6, M = 10]",
        ),
        (
            "mamba",
            0,
            {"gate_norm": Fake("float32", (5,))},
            "layers[0].gate_norm is no array of a layer of this kind of",
        ),
        ("mamba", 1, {"A": None}, "layers[1].A is None: expected an array"),
        (
            "mamba",
            0,
            {"ssm_state": Fake("int32", (2, 5, 8))},
            "layers[0].ssm_state is int32: expected float32, float16",
        ),
        ("mamba2", 1, {"ssm_state_out": Fake("float16", (2, 4, 3, 8))}, "layers[1].ssm_state_out is float16: expected"),
        ("mamba2", 1, {"D": Fake("float32", (4, 3))}, "D is [H] in one layer and [H, P] in another: expected one form"),
        ("mamba2", 1, {"gate_norm": Fake("float32", (11,))}, "layers[1].gate_norm has shape [11]: expected [H*P = 12]"),
        ("mamba2", None, {"dt_min": 2.0, "dt_max": 1.0}, "dt_min is 2.0 and dt_max is 1.0: expected dt_min <= dt_max"),
        ("mamba2", None, {"n_groups": 3}, "n_groups is 3: expected a divisor of the number of heads, 4"),
        ("mamba2", None, {"layers": []}, "layers is empty: expected at least one"),
        ("mamba2", None, {"pending": Fake("float32", (3, 64))}, "pending has shape [3, 64]: expected [B = 2, Q]"),
        ("mamba2", None, {"pending": Fake("int32", (2, 64))}, "pending is int32: expected float32"),
        ("mamba", None, {"pending": Fake("float32", (2, 64))}, "pending is no array of a layer of this kind of model"),
        ("mamba2", None, {"logits": Fake("float32", (2, 6))}, "logits has shape [2, 6]: expected [B = 2, V = 7] or "),
    ],
)
def test_a_model_that_is_wrong(stub, kind, where, changed, expected):
    given = {"n_groups": MODEL_SIZES[kind]["groups"], **model(kind)}
    (given if where is None else given["layers"][where]).update(changed)
    with pytest.raises(PluginError) as caught:
        stub.kernels.model(**given)
    assert str(caught.value).startswith(expected)
    assert stub.value("calls").value == 0


def test_states_of_two_layers_do_not_overlap(stub):
    given = model("mamba")
    first, second = given["layers"]
    second["conv_state_out"] = replace(second["conv_state_out"], pointer=first["conv_state"].pointer)
    with pytest.raises(PluginError, match=r"^layers\[1\].conv_state_out overlaps layers\[0\].conv_state in memory"):
        stub.kernels.model(**given)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "name", "shape", "expected"),
    [
        ("causal_conv1d", "x", (2, 5), "x has shape [2, 5]: expected [B, L, C]"),
        ("causal_conv1d", "weight", (5, 4), "weight has shape [5, 4]: expected [C = 6, K]"),
        ("causal_conv1d", "bias", (4,), "bias has shape [4]: expected [C = 6]"),
        ("causal_conv1d", "conv_state", (2, 6, 4), "conv_state has shape [2, 6, 4]: expected [B = 2, C = 6, K-1 = 3]"),
        ("causal_conv1d", "seq_lens", (3,), "seq_lens has shape [3]: expected [B = 2]"),
        ("causal_conv1d", "y", (2, 6, 5), "y has shape [2, 6, 5]: expected [B = 2, L = 5, C = 6]"),
        ("causal_conv1d", "state_out", (2, 3, 6), "state_out has shape [2, 3, 6]: expected [B = 2, C = 6, K-1 = 3]"),
        ("selective_scan", "dt", (2, 5, 1), "dt has shape [2, 5, 1]: expected [B = 2, L = 5, D = 6]"),
        ("selective_scan", "A", (8, 6), "A has shape [8, 6]: expected [D = 6, N]"),
        ("selective_scan", "B", (2, 5, 6), "B has shape [2, 5, 6]: expected [B = 2, L = 5, N = 8]"),
        ("selective_scan", "C", (2, 8, 5), "C has shape [2, 8, 5]: expected [B = 2, L = 5, N = 8]"),
        ("selective_scan", "D", (6, 1), "D has shape [6, 1]: expected [D = 6]"),
        ("selective_scan", "z", (1, 5, 6), "z has shape [1, 5, 6]: expected [B = 2, L = 5, D = 6]"),
        ("selective_scan", "dt_bias", (1,), "dt_bias has shape [1]: expected [D = 6]"),
        ("selective_scan", "ssm_state", (2, 8, 6), "ssm_state has shape [2, 8, 6]: expected [B = 2, D = 6, N = 8]"),
        ("ssd_scan", "ssm_state", (2, 4, 24), "ssm_state has shape [2, 4, 24]: expected [B, H, P, N]"),
        ("ssd_scan", "x", (2, 5, 11), "x has shape [2, 5, 11]: expected [B = 2, L, H*P = 12]"),
        ("ssd_scan", "dt", (2, 5, 12), "dt has shape [2, 5, 12]: expected [B = 2, L = 5, H = 4]"),
        ("ssd_scan", "A", (12,), "A has shape [12]: expected [H = 4]"),
        ("ssd_scan", "B", (2, 5, 8), "B has shape [2, 5, 8]: expected [B = 2, L = 5, G*N = 16]"),
        ("ssd_scan", "C", (2, 5, 8), "C has shape [2, 5, 8]: expected [B = 2, L = 5, G*N = 16]"),
        ("ssd_scan", "D", (12,), "D has shape [12]: expected [H = 4] or [H = 4, P = 3]"),
        ("ssd_scan", "D", (3, 4), "D has shape [3, 4]: expected [H = 4] or [H = 4, P = 3]"),
        ("ssd_scan", "dt_bias", (4, 1), "dt_bias has shape [4, 1]: expected [H = 4]"),
        ("ssd_scan", "y", (2, 5, 13), "y has shape [2, 5, 13]: expected [B = 2, L = 5, H*P = 12]"),
        ("last_token", "y", (2, 1, 6), "y has shape [2, 1, 6]: expected [B = 2, d = 6]"),
        ("sample_token", "logits", (2, 1, 5), "logits has shape [2, 1, 5]: expected [B, V]"),
        ("sample_token", "uniform", (3,), "uniform has shape [3]: expected [capacity, B = 2]"),
        ("sample_token", "steps", (3,), "steps has shape [3]: expected [B = 2]"),
        ("sample_token", "tokens", (2, 1), "tokens has shape [2, 1]: expected [B = 2]"),
        ("sample_token", "log", (4, 2), "log has shape [4, 2]: expected [capacity = 3, B = 2]"),
    ],
)
def test_wrong_shape(stub, op, name, shape, expected):
    wrong = replace((sampling() if op == "sample_token" else arguments(op))[name], shape=shape)
    assert str(refusal(stub, op, **{name: wrong})) == expected


@pytest.mark.parametrize(
    ("op", "name", "dtype", "expected"),
    [
        ("causal_conv1d", "weight", "float16", "weight is float16: expected float32"),
        ("causal_conv1d", "conv_state", "float16", "conv_state is float16: expected float32"),
        ("causal_conv1d", "seq_lens", "int64", "seq_lens is <i8: expected int32"),
        ("selective_scan", "A", "float16", "A is float16: expected float32"),
        ("selective_scan", "state_out", "float16", "state_out is float16: expected float32"),
        ("ssd_scan", "ssm_state", "float64", "ssm_state is float64: expected float32, float16 or bfloat16"),
        ("last_token", "x", "float64", "x is float64: expected float32, float16 or bfloat16"),
        ("sample_token", "logits", "float16", "logits is float16: expected float32"),
        ("sample_token", "uniform", "float32", "uniform is float32: expected float64"),
        ("sample_token", "steps", "int64", "steps is <i8: expected int32"),
        ("sample_token", "tokens", "int64", "tokens is <i8: expected int32"),
        ("sample_token", "log", "float32", "log is float32: expected int32"),
    ],
)
def test_wrong_dtype(stub, op, name, dtype, expected):
    given = sampling() if op == "sample_token" else arguments(op)
    assert str(refusal(stub, op, **{name: replace(given[name], dtype=dtype)})) == expected


def test_sixteen_bit_integers_that_nobody_called_bfloat16(stub):
    given = {
        name: replace(value, dtype="uint16") for name, value in arguments("last_token").items() if name != "seq_lens"
    }
    error = refusal(stub, "last_token", **given)
    assert str(error) == "x is uint16: expected float32, float16 or bfloat16"
    assert "dtype='bfloat16'" in error.hint
    tensors = {"x": FakeTensor(torch.bfloat16, (2, 5, 6)), "y": given["y"]}
    error = refusal(stub, "last_token", **tensors)
    assert str(error) == "y is uint16: expected bfloat16"
    assert "dtype='bfloat16'" in error.hint


def test_a_dtype_that_was_said_must_be_that_of_the_arrays(stub):
    assert str(refusal(stub, "last_token", dtype="float16")) == "x is float32: expected float16"
    assert str(refusal(stub, "ssd_scan", state_dtype="bf16")).startswith("state_dtype is 'bf16': expected float32, ")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1.0], "x is a builtins.list: expected an array on the device (pycuda, cupy or a CUDA tensor of torch)"),
        (torch.zeros(2, 5, 6), "x is on the device 'cpu': expected a CUDA device"),
        (None, "x is None: expected an array"),
        (Fake("float32", (2, 5, 6), 0), "x is a null pointer: expected device memory"),
        (Fake("float32", (2, 5, 6), 4098), "x is at address 0x1002: expected a multiple of 4 bytes"),
        (
            Fake("float32", (2, 5, 6), strides=(24, 48, 4)),
            "x of shape [2, 5, 6] has strides [24, 48, 4] in bytes: expected a dense array in C order",
        ),
        (
            FakeTensor(torch.float32, (2, 5, 6), contiguous=False),
            "x of shape [2, 5, 6] has strides [1, 2, 5] in elements: expected a dense array in C order",
        ),
    ],
)
def test_what_is_no_dense_device_array(stub, given, expected):
    assert str(refusal(stub, "last_token", x=given)) == expected


@pytest.mark.parametrize(("dtype", "address"), [("float32", 4100), ("float16", 4098)])
def test_arrays_need_no_more_than_the_alignment_of_their_items(stub, dtype, address):
    y = Fake(dtype, (2, 6))
    call(stub, "last_token", x=Fake(dtype, (2, 5, 6), address), seq_lens=Fake("int32", (2,), 8196), y=y)
    assert stub.last("last_token")["x"] == address


def test_read_only_output(stub):
    y = Fake("float32", (2, 6), read_only=True)
    assert str(refusal(stub, "last_token", y=y)) == "y is read-only: expected an array to write to"


@pytest.mark.parametrize("other", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "ssm_state", "seq_lens", "state_out"])
@pytest.mark.parametrize("output", ["y", "state_out"])
def test_an_output_in_the_memory_of_another_array(stub, output, other):
    if other == output or (output, other) == ("state_out", "ssm_state"):
        return
    given = arguments("selective_scan")
    error = refusal(
        stub, "selective_scan", **{output: replace(given[output], pointer=given[other].pointer)} | {other: given[other]}
    )
    named = ("y", "state_out") if {output, other} == {"y", "state_out"} else (output, other)
    assert str(error) == f"{named[0]} overlaps {named[1]} in memory: expected memory of its own"


@pytest.mark.parametrize(
    ("output", "other"), [("steps", "logits"), ("tokens", "steps"), ("log", "uniform"), ("log", "tokens")]
)
def test_what_sample_token_writes_is_nothing_else(stub, output, other):
    given = sampling()
    moved = replace(given[output], pointer=given[other].pointer)
    named = sorted((output, other), key=["steps", "tokens", "log", "logits", "uniform"].index)
    assert str(refusal(stub, "sample_token", **{output: moved, other: given[other]})) == (
        f"{named[0]} overlaps {named[1]} in memory: expected memory of its own"
    )
    error = refusal(stub, "sample_token", **{output: replace(given[output], read_only=True)})
    assert str(error) == f"{output} is read-only: expected an array to write to"


@pytest.mark.parametrize("shift", [-16, 16])
def test_a_state_that_half_overlaps_its_successor(stub, shift):
    given = arguments("selective_scan")
    moved = replace(given["state_out"], pointer=given["ssm_state"].pointer + shift)
    error = refusal(stub, "selective_scan", ssm_state=given["ssm_state"], state_out=moved)
    assert str(error) == "state_out overlaps ssm_state in memory: expected memory of its own, or ssm_state itself"


def test_neighbours_in_memory_do_not_overlap(stub):
    given = arguments("last_token")
    call(stub, "last_token", x=given["x"], y=replace(given["y"], pointer=given["x"].pointer + 2 * 5 * 6 * 4))
    assert stub.value("calls").value == 1


def test_arrays_of_two_devices(stub):
    first = {"x": FakeTensor(torch.float32, (2, 5, 6)), "seq_lens": Fake("int32", (2,))}
    error = refusal(stub, "last_token", **first, y=Fake("float32", (2, 6), device=Device(1)))
    assert str(error) == "y is on device 1: expected device 0, where x is"


@pytest.mark.parametrize(
    ("op", "changed", "expected"),
    [
        ("causal_conv1d", {"activation": "relu"}, "activation is 'relu': expected 'silu' or 'none'"),
        ("ssd_scan", {"dt_min": 1.0, "dt_max": 0.5}, "dt_min is 1.0 and dt_max is 0.5: expected dt_min <= dt_max"),
        ("ssd_scan", {"dt_min": math.nan}, "dt_min is nan and dt_max is inf: expected dt_min <= dt_max"),
        ("ssd_scan", {"chunk_size": 0}, "chunk_size is 0: expected at least 1"),
        ("ssd_scan", {"n_groups": 0}, "n_groups is 0: expected at least 1"),
        ("sample_token", {"temperature": -1}, "temperature is -1.0: expected a finite number, 0 (greedy) or above"),
        ("sample_token", {"temperature": 1e39}, "temperature is inf: expected a finite number, 0 (greedy) or above"),
        ("sample_token", {"top_k": -1}, "top_k is -1: expected 0 (off) to 2147483647"),
        ("sample_token", {"top_k": 2**31}, "top_k is 2147483648: expected 0 (off) to 2147483647"),
        ("sample_token", {"top_p": 0}, "top_p is 0.0: expected a number above 0 and at most 1 (off)"),
        ("sample_token", {"top_p": 1.5}, "top_p is 1.5: expected a number above 0 and at most 1 (off)"),
        ("sample_token", {"min_p": -0.5}, "min_p is -0.5: expected a number from 0 (off) to 1"),
        ("sample_token", {"min_p": math.nan}, "min_p is nan: expected a number from 0 (off) to 1"),
        ("sample_token", {"uniform": None}, "uniform is None: expected an array, as temperature is 0.5"),
        ("sample_token", {"steps": None}, "steps is None: expected an array"),
    ],
)
def test_wrong_constants(stub, op, changed, expected):
    assert str(refusal(stub, op, **changed)) == expected


def test_groups_that_do_not_divide_the_heads(stub):
    b, c = (Fake("float32", (2, 5, 24)) for _ in range(2))
    error = refusal(stub, "ssd_scan", n_groups=3, B=b, C=c)
    assert str(error) == "n_groups is 3: expected a divisor of the number of heads, 4"


@pytest.mark.parametrize(
    ("op", "shapes", "expected"),
    [
        (
            "causal_conv1d",
            {"weight": (6, 9), "conv_state": (2, 6, 8), "state_out": (2, 6, 8)},
            "K is 9: expected 2 to 8",
        ),
        (
            "causal_conv1d",
            {"weight": (6, 1), "conv_state": (2, 6, 0), "state_out": (2, 6, 0)},
            "K is 1: expected 2 to 8",
        ),
        ("last_token", {"x": (2, 0, 6)}, "L is 0: expected 1 to 1048576"),
        ("last_token", {"x": (2, 2**20 + 1, 6)}, "L is 1048577: expected 1 to 1048576"),
        ("last_token", {"x": (2, 5, 2**31), "y": (2, 2**31)}, "d is 2147483648: expected 1 to 2147483647"),
        ("last_token", {"x": (0, 5, 6), "seq_lens": (0,), "y": (0, 6)}, "B is 0: expected 1 to 2147483647"),
        ("sample_token", {"logits": (2, 2**20 + 1)}, "V is 1048577: expected 1 to 1048576"),
        ("sample_token", {"uniform": (0, 2), "log": (0, 2)}, "capacity is 0: expected 1 to 2147483647"),
    ],
)
def test_sizes_out_of_range(stub, op, shapes, expected):
    given = sampling() if op == "sample_token" else arguments(op)
    changed = {name: replace(given[name], shape=shape) for name, shape in shapes.items()}
    assert str(refusal(stub, op, **changed)) == expected


# --- the library -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "name", "hint"),
    [
        (1, "cudaErrorInvalidValue", ""),
        (209, "cudaErrorNoKernelImageForDevice", "mamba-deploy plugin build --force"),
        (700, "cudaErrorIllegalAddress", "compute-sanitizer"),
        (123456, "of no name known here", ""),
    ],
)
def test_an_error_of_cuda_is_named(stub, code, name, hint):
    stub.value("answer").value = code
    with pytest.raises(PluginError) as caught:
        call(stub, "ssd_scan")
    assert str(caught.value) == f"ssd_scan: CUDA error {code} ({name})"
    assert hint in caught.value.hint


def test_a_library_that_is_not_there(tmp_path):
    with pytest.raises(PluginError, match=r"the kernels library .*none\.so cannot be loaded") as caught:
        Kernels(tmp_path / "none.so")
    assert "mamba-deploy plugin build" in caught.value.hint


def test_a_library_of_something_else(tmp_path, stub_path):
    source = stub_path.with_name("stub.c")
    gcc("-shared", "-fPIC", "-DWITHOUT_LAST_TOKEN", "-o", tmp_path / "other.so", source)
    with pytest.raises(PluginError, match=r"is not a library of the kernels: it has no function mamba_last_token$"):
        kernels.load(tmp_path / "other.so")


def test_load_takes_the_library_that_was_built(stub_path, monkeypatch):
    monkeypatch.setattr(build, "kernels_library", lambda: stub_path)
    assert kernels.load().path == stub_path
