"""The real sources through the nvcc of this machine, and the launches in Python against those of the launchers it
compiled, which are recorded: nvcc's host code runs over a stand-in for the CUDA runtime, so no GPU is needed.
"""

from __future__ import annotations

import ctypes
import math
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import quick_compile
import recurrence
import torch

from mamba_deploy.errors import PluginError
from mamba_deploy.plugins import (
    arguments,
    build,
    kernels,
    launches,
    launches_prompt,
    launches_rows,
    launches_token,
    nvrtc,
    pending,
    structs,
    toolchain,
)
from mamba_deploy.plugins.nvrtc import Device, Gemm, Launch

pytestmark = pytest.mark.slow

STEP = ("in_proj", "x_proj", "selective_update", "ssd_update", "out_proj", "head")
ALIGNED = (*STEP, "model")  # whose weights lie at multiples of 16 bytes
DEVICES = [
    Device(90, 9, 132, 232448),
    Device(90, 8, 132, 232448),  # where the library holds but PTX of 8.0, or NVRTC is that old
    Device(87, 8, 16, 166912),
    Device(75, 7, 40, 65536),
    Device(120, 12, 170, 101376),
]

# What the objects of nvcc want of libcudart. A launch is told to `record`, which may look at its arguments.
RUNTIME = r"""
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
namespace {
std::map<const void*, std::string>& names() { static std::map<const void*, std::string> of; return of; }
int driver_version = 13000;
int attributes[4];  // compute capability of the code, multiprocessors, shared memory, compute capability
void (*record)(const char*, const unsigned*, size_t, void**);
struct { dim3 grid, block; size_t shared; cudaStream_t stream; } pushed;
cudaError_t launch(const void* function, dim3 grid, dim3 block, void** args, size_t shared, unsigned cluster = 1,
                   unsigned cooperative = 0) {
    const unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z, cluster, cooperative};
    record(names()[function].c_str(), sizes, shared, args);
    return cudaSuccess;
}
}
extern "C" {
void set_driver_version(int version) { driver_version = version; }
// Of the driver: a map is what it was made of.
CUresult encode_map(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* from, const cuuint64_t* sizes,
                    const cuuint64_t* row_bytes, const cuuint32_t* box, const cuuint32_t* steps,
                    CUtensorMapInterleave order, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                    CUtensorMapFloatOOBfill fill) {
    if ((uintptr_t)to % 64 != 0 || rank != 2) return CUDA_ERROR_INVALID_VALUE;
    const cuuint64_t given[16] = {
        (cuuint64_t)from, type, sizes[0], sizes[1], row_bytes[0], box[0], box[1], steps[0], steps[1], order, swizzle,
        promotion, fill};
    std::memcpy(to, given, sizeof(given));
    return CUDA_SUCCESS;
}
cudaError_t cudaDriverGetVersion(int* to) {
    *to = driver_version;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** to, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0 && version == 12000;
    *to = known ? (void*)encode_map : nullptr;
    *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char* name, void** to, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* result) {
    return cudaGetDriverEntryPointByVersion(name, to, 12000, flags, result);
}
void set_recorder(decltype(record) given, const int* of_device) {
    record = given;
    for (int i = 0; i < 4; i++) attributes[i] = of_device[i];
}
void** __cudaRegisterFatBinary(void*) { static void* handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(
    void**, const char* host, char* device, const char*, int, void*, void*, void*, void*, int*) {
    char* const text = abi::__cxa_demangle(device, nullptr, nullptr, nullptr);
    names()[host] = text ? text : device;
    std::free(text);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    *kernel = (cudaKernel_t)host;
    return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    pushed = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(cudaStream_t*)stream = pushed.stream;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
    return launch((const void*)kernel, grid, block, args, shared);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
    return launch(function, grid, block, args, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void** args) {
    unsigned cluster = 1, cooperative = 0;
    for (unsigned i = 0; i < c->numAttrs; i++) {
        if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = c->attrs[i].val.clusterDim.x;
        if (c->attrs[i].id == cudaLaunchAttributeCooperative) cooperative = c->attrs[i].val.cooperative;
    }
    return launch(function, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, cluster, cooperative);
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {  // one with other attributes is another
    *device = ((attributes[3] * 16 + attributes[0]) * 512 + attributes[1]) * 4096 + attributes[2] / 64;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* to, const void*) {
    *to = {};
    to->ptxVersion = 10 * attributes[0];
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* to, cudaDeviceAttr which, int) {
    switch (which) {
        case cudaDevAttrMultiProcessorCount: *to = attributes[1]; return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *to = attributes[2]; return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor: *to = attributes[3]; return cudaSuccess;
        default: return cudaErrorInvalidValue;
    }
}
}
"""

# What prompt.cu wants of cuBLAS. A product is told to `record`, with what the handle was told before.
CUBLAS = r"""
#include <cstddef>
#include <cstdint>
namespace {
void (*record)(const int64_t*);
struct { void* workspace; size_t bytes; int math; } handle;
}
extern "C" {
void set_recorder(decltype(record) given) { record = given; }
int cublasCreate_v2(void** to) { *to = &handle; return 0; }
int cublasSetStream_v2(void*, void*) { handle.workspace = nullptr; return 0; }
int cublasSetWorkspace_v2(void*, void* workspace, size_t bytes) {
    handle.workspace = workspace, handle.bytes = bytes;
    return 0;
}
int cublasSetMathMode(void*, int math) { handle.math = math; return 0; }
int cublasGemmStridedBatchedEx(void*, int first, int second, int m, int n, int k, const float* alpha, const void* a,
                               int a_type, int a_row, long long a_part, const void* b, int b_type, int b_row,
                               long long b_part, const float* beta, void* c, int c_type, int c_row, long long c_part,
                               int parts, int compute, int algorithm) {
    const int64_t numbers[] = {
        first, second, m, n, k, (int64_t)*alpha, (int64_t)a, a_type, a_row, a_part, (int64_t)b, b_type, b_row, b_part,
        (int64_t)*beta, (int64_t)c, c_type, c_row, c_part, parts, compute, algorithm, (int64_t)handle.workspace,
        (int64_t)handle.bytes, handle.math};
    record(numbers);
    return 0;
}
}
"""
ProductRecorder = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int64))
NUMBERS = 25

Recorder = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is compiled of the kernels' sources."""
    return tmp_path_factory.mktemp("objects")


@pytest.fixture(scope="module")
def real_build(objects: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[build.Built, list[str]]:
    """The real libraries for one architecture, and what the compilers said; the plugins where there are headers."""
    try:
        compiler = toolchain.find_compiler()
    except PluginError as error:
        pytest.skip(f"needs nvcc: {str(error).splitlines()[0]}")
    try:
        toolchain.find_headers()
        name = "plugin"
    except PluginError:
        name = "kernels"
    told: list[str] = []
    compile_product = build._compile

    def compile_and_keep(product: Any, compiler: Any, headers: Any, chosen: Any, work: Path, say: Any) -> None:
        compile_product(product, compiler, headers, chosen, work, say)
        for source in build.KERNEL_SOURCES:
            shutil.copy(work / f"{source}.o", objects)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_compile", compile_and_keep)
        patch.setenv("MAMBA_DEPLOY_CACHE", str(tmp_path_factory.mktemp("real")))
        own = "-Xcompiler=-fno-gnu-unique"  # a copy of the library shares no variable with it
        patch.setenv("NVCC_APPEND_FLAGS", f"{quick_compile.flag(compiler.version, '-Xcicc=-O0')} {own}")
        newest = max((a for a in compiler.architectures if int(a) <= 90), key=int)
        return build.build(name, architectures=[newest], say=told.append), told


@pytest.fixture(scope="module")
def library(real_build: tuple[build.Built, list[str]], objects: Path) -> ctypes.CDLL:
    """The launchers of the build over the stand-in."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    nvcc = str(toolchain.find_compiler().path)
    (objects / "runtime.cpp").write_text(RUNTIME, encoding="utf-8")
    runtime, target = objects / "runtime.o", objects / "liblaunchers.so"
    command = [nvcc, "-std=c++17", "-Xcompiler=-fPIC", "-c", str(objects / "runtime.cpp"), "-o", str(runtime)]
    subprocess.run(command, check=True)
    compiled = [str(objects / f"{source}.o") for source in build.KERNEL_SOURCES]
    subprocess.run([nvcc, "-shared", "-cudart=none", "-o", str(target), *compiled, str(runtime)], check=True)
    (objects / "cublas.cpp").write_text(CUBLAS, encoding="utf-8")
    products = objects / "libcublas.so.13"
    flags = ["-shared", "-fPIC", "-Wl,-soname,libcublas.so.13", "-o", str(products)]
    subprocess.run(["g++", *flags, str(objects / "cublas.cpp")], check=True)
    found = ctypes.CDLL(str(target))
    found.cublas = ctypes.CDLL(str(products))  # which prompt.cu then finds in the process
    return found


def of_driver(library: ctypes.CDLL, device: Device) -> Device:
    """A device with the tensor maps of the stand-in."""
    return device._replace(encode_map=nvrtc._EncodeMap(("encode_map", library)))


# --- the build ---------------------------------------------------------------------------------------------------


def test_real_sources_compile_without_a_warning(real_build):
    notes = r"ptxas info .*(?:wgmma|warpgroup)\..*\n?"  # where code is not optimised
    said = [re.sub(notes, "", message) for message in real_build[1][1:-1]]
    assert [message for message in said if not message.endswith((": done", ": "))] == []


def test_real_libraries_export_the_launchers_and_ask_for_nothing_of_tensorrt(real_build):
    made, _ = real_build
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm (binutils) on PATH")
    header = (build.SOURCES / "mamba_kernels.h").read_text(encoding="utf-8")
    launchers = set(re.findall(r"^\w+ (mamba_\w+)\(", header, re.M))
    assert len(launchers) == 25
    entries = {"getCreators", "getPluginCreators", "setLoggerFinder"}
    for library in made.libraries:
        listed = subprocess.run([nm, "-D", made.folder / library], check=True, capture_output=True, text=True).stdout
        symbols = [line.split()[-2:] for line in listed.splitlines()]
        exported = {name for kind, name in symbols if kind not in "Uwv"}
        wanted = {name for kind, name in symbols if kind == "U"}
        assert not [name for name in wanted if re.search("nvinfer|[Pp]lugin[A-Z]|createInfer|getLogger", name)] or (
            library == "libmamba_plugin_register.so"
        )
        if library != "libmamba_plugin_register.so":
            assert exported - entries == launchers
            assert not [name for name in wanted if name.startswith("cuda")]  # libcudart is inside
            assert bool(exported & entries) == (made.name == "plugin")


def test_real_library_is_called_from_python(real_build):
    loaded = kernels.load(real_build[0].path)
    assert loaded.workspace_bytes("last_token", batch=2, length=5, width=8) == 0
    for op, sizes in (
        ("causal_conv1d", {"channels": 5376, "width": 4}),
        ("selective_scan", {"channels": 5120, "state_size": 16}),
        ("ssd_scan", {"heads": 80, "head_dim": 64, "state_size": 128, "groups": 1}),
    ):
        for length in (1, 2048):
            asked = loaded.workspace_bytes(op, batch=1, length=length, dtype="bfloat16", **sizes)
            assert 0 <= asked < 1 << 31, (op, length)
    if not toolchain.gpu_architectures():
        memory = (1 << 20, 1 << 30)
        x, lens, y = (
            Address(shape, kind, i)
            for i, (shape, kind) in enumerate((((2, 5, 8), "<f4"), ((2,), "<i4"), ((2, 8), "<f4")))
        )
        with pytest.raises(PluginError, match=r"^last_token: CUDA error \d+ \(cudaError\w+\)$"):
            loaded.last_token(x, lens, y=y, workspace=memory)


class Address:
    """An array on a device that is not there."""

    def __init__(self, shape: tuple[int, ...], typestr: str, number: int) -> None:
        data = ((number + 1) << 32, False)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": typestr, "data": data, "version": 3}


OPTIONAL = ("bias", "D", "z", "dt_bias", "conv_bias", "in_proj_bias", "out_proj_bias", "gate_norm")

# --- random calls ------------------------------------------------------------------------------------------------


def _struct(op: str, draw: random.Random, sizes: dict[str, int]) -> Any:
    """A call with addresses that nothing is at, now and then at odd ones."""
    struct = arguments.SIGNATURES[op].struct
    call = struct(**sizes)
    for name in ("dtype", "state_dtype"):
        if hasattr(call, name):
            setattr(call, name, draw.randrange(3))
    for name, kind in struct._fields_:
        if kind is ctypes.c_void_p and (name not in OPTIONAL or draw.random() < 0.7):
            odd = draw.choice((2, 4, 8)) if draw.random() < 0.05 and op not in ALIGNED else 0
            setattr(call, name, (draw.randrange(1, 1 << 30) << 8) + odd)
    for name in ("activation", "dt_softplus", "skip_per_channel"):
        if hasattr(call, name):
            setattr(call, name, draw.randrange(2))
    if hasattr(call, "dt_max"):
        call.dt_min, call.dt_max = draw.random(), 1.0 + draw.random()
    if hasattr(call, "temperature"):
        call.temperature = draw.choice((0.0, draw.random()))
        call.top_p, call.min_p = 1.0 - draw.random(), draw.random()
    return call


def _size(draw: random.Random, published: tuple[int, ...], high: int) -> int:
    """Half the time a size of a published model, or one beside it; else any, small ones as often as large."""
    if draw.random() < 0.5:
        return min(max(draw.choice(published) + draw.choice((0, 0, 0, 0, -1, 1, 4)), 1), high)
    return int(high ** draw.random())


def random_call(op: str, draw: random.Random) -> Any:
    sizes = {"batch": _size(draw, (1, 2, 8, 64, 256), 70_000)}
    if op == "sample_token":
        sizes |= {"vocab": _size(draw, (50280, 256000), 1 << 20), "capacity": _size(draw, (1, 256), 70_000)}
        return _struct(op, draw, sizes | {"top_k": draw.randrange(100)})
    if op == "model":
        return _model(draw, sizes["batch"])
    if op in STEP:
        return _struct(op, draw, sizes | {"length": 1} | _step_sizes(op, draw))
    sizes |= {"length": _size(draw, (1, 1, 1, 512, 2048, 16384), 1 << 20)}
    if op == "causal_conv1d":
        sizes |= {"channels": _size(draw, (1536, 1792, 5120, 5376), 20_000), "width": draw.choice((4, 4, 2, 3, 5, 8))}
    elif op == "selective_scan":
        sizes |= {
            "channels": _size(draw, (1536, 2048, 5120), 20_000),
            "state_size": _size(draw, (16, 32, 64, 128), 256),
        }
    elif op == "ssd_scan":
        sizes |= {"head_dim": _size(draw, (64, 80, 128), 256), "state_size": _size(draw, (64, 128), 256)}
        sizes |= {"groups": draw.choice((1, 1, 2, 8))}
        if draw.random() < 0.2:  # around where padding begins
            sizes["length"] = draw.randrange(120, 140)
        sizes["heads"] = sizes["groups"] * _size(draw, (24, 64, 80), 160)
    else:
        sizes |= {"width": _size(draw, (768, 2560), 20_000)}
    return _struct(op, draw, sizes)


def _step_sizes(op: str, draw: random.Random) -> dict[str, int]:
    """Rows of weights are multiples of 16 bytes; a norm's inputs fit into every GPU's shared memory."""
    width, eights = _size(draw, (768, 2048, 2560), 5000), 8 * _size(draw, (96, 256, 320, 640), 2500)
    if op == "in_proj":
        channels = draw.randrange(1, eights + 1)
        place = {"conv_first": draw.randrange(eights - channels + 1), "conv_width": draw.randrange(2, 9)}
        return {"width": width, "outputs": eights, "channels": channels, **place}
    if op == "x_proj":
        return {"channels": width, "row": 2 * width, "outputs": eights}
    if op == "selective_update":
        rank, states = _size(draw, (48, 160), 500), _size(draw, (16,), 256)
        return {"channels": eights, "row": 2 * eights, "rank": rank, "state_size": states, "low_row": rank + 2 * states}
    if op == "ssd_update":
        groups, P, N = draw.choice((1, 2, 8)), draw.choice((64, 128)), draw.choice((64, 128))
        heads = 8 * draw.randrange(1, 12)
        sizes = {"heads": heads, "head_dim": P, "state_size": N, "groups": groups}
        return {**sizes, "row": 2 * heads * P + 2 * groups * N + heads}
    if op == "out_proj":
        groups = draw.choice((1, 2, 8))
        return {"channels": groups * _size(draw, (96, 640), 5000 // groups), "groups": groups, "width": eights}
    return {"width": 8 * _size(draw, (96, 320), 600), "vocab": _size(draw, (50280, 256000), 1 << 20)}


def random_prompt(draw: random.Random) -> tuple[Any, Any]:
    """A call of MambaModel for more than one token, and what has to be kept with it."""
    sizes = {"batch": _size(draw, (1, 2, 8), 70), "length": max(_size(draw, (64, 512, 2048), 20_000), 2), "layers": 2}
    states, width = _size(draw, (16, 64, 128), 256), _size(draw, (768, 2560), 20_000)
    if draw.random() < 0.5:
        inner = _size(draw, (1536, 5120), 20_000)
        sizes |= {"rank": _size(draw, (48, 160), 500), "channels": inner, "outputs": 2 * inner}
    else:
        groups, P = draw.choice((1, 1, 2, 8)), _size(draw, (64, 128), 256)
        heads = groups * _size(draw, (24, 80), 100)
        inner = heads * P
        sizes |= {"heads": heads, "head_dim": P, "groups": groups, "channels": inner + 2 * groups * states}
        sizes |= {"outputs": 2 * inner + 2 * groups * states + heads}
    call = structs.MambaModel(**sizes, width=width, inner=inner, state_size=states, conv_width=draw.choice((4, 4, 3)))
    call.vocab, call.dtype, call.state_dtype = _size(draw, (50280,), 1 << 18), draw.randrange(3), draw.randrange(3)
    call.skip_per_channel, call.all_logits, call.eps = draw.randrange(2), draw.randrange(2), draw.random()
    call.norm_eps, call.dt_min, call.dt_max = draw.choice((-1.0, 1e-6)), draw.random(), 1.0 + draw.random()
    layers = (structs.MambaLayer * 2)()
    optional = ("in_proj_bias", "conv_bias", "D", "dt_bias", "gate_norm", "out_proj_bias")
    for struct in (call, *layers):
        for name, kind in struct._fields_:
            if kind is ctypes.c_void_p and (name not in optional or draw.random() < 0.6):
                setattr(struct, name, (draw.randrange(1, 1 << 30) << 8) + (4 if draw.random() < 0.03 else 0))
    call.each = ctypes.addressof(layers)
    return call, layers


def _model(draw: random.Random, batch: int) -> Any:
    """A token a row of a few layers, whose widths are what a fused engine covers."""
    d, K = 8 * _size(draw, (96, 256, 320), 600), draw.randrange(2, 9)
    sizes = {"batch": batch, "length": 1, "layers": draw.randrange(1, 4), "width": d, "conv_width": K}
    sizes["vocab"] = _size(draw, (50280, 256000), 1 << 20)
    if is_mamba2 := draw.random() < 0.5:
        G, P, N = draw.choice((1, 2, 8)), draw.choice((64, 128)), draw.choice((64, 128))
        H = 8 * draw.randrange(1, 8192 // (8 * P))  # so that a row and its norm fit
        sizes |= {"heads": H, "head_dim": P, "state_size": N, "groups": G, "inner": H * P}
        sizes |= {"channels": H * P + 2 * G * N, "outputs": 2 * H * P + 2 * G * N + H}
    else:
        D, N, R = 8 * _size(draw, (192, 640), 1200), 8 * draw.randrange(1, 17), 8 * _size(draw, (6, 20), 50)
        sizes |= {"inner": D, "channels": D, "outputs": 2 * D, "state_size": N, "rank": R, "groups": 1}
    call = _struct("model", draw, sizes)
    call.norm_eps, call.eps = draw.choice((-1.0, 1e-6)), 1e-5
    absent = {name for name in OPTIONAL if draw.random() < 0.3} | {"x_proj", "dt_proj"} if is_mamba2 else {"gate_norm"}
    return _with_pending(_with_layers(call, draw, absent), draw)


def _with_layers(call: Any, draw: random.Random, absent: set[str]) -> Any:
    call.kept = (structs.MambaLayer * call.layers)()  # by the call, as long as it is there
    for layer in call.kept:
        for name, _ in layer._fields_:
            if name not in absent:
                setattr(layer, name, draw.randrange(1, 1 << 30) << 8)
    call.each = ctypes.addressof(call.kept)
    call.pending = call.pending_out = None
    return call


def _with_pending(call: Any, draw: random.Random) -> Any:
    """Of Mamba-2, now and then: mostly all that may be pending goes out where it came in."""
    if not call.heads or draw.random() < 0.3:
        return call
    call.pending, call.pending_row = draw.randrange(1, 1 << 30) << 8, pending.pending_row(call)
    call.pending_out = call.pending if draw.random() < 0.8 else draw.randrange(1, 1 << 30) << 8
    for layer in call.kept:
        if draw.random() < 0.95:
            layer.ssm_state_out = layer.ssm_state
    return call


def fits(op: str, call: Any) -> bool:
    """Whether so many tokens could be in a GPU's memory: beyond, the launchers refuse and Python is never asked."""
    if op == "sample_token":
        return bool(call.batch * call.vocab < 1 << 33)
    return call.batch * call.length * max(getattr(call, name, 1) for name in ("channels", "width", "heads")) < 1 << 31


# --- comparing ---------------------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    """``mamba::conv::step_kernel<float, 4, 4>`` of a demangled signature, or of a name in Python."""
    text = re.sub(r"^void ", "", name)
    depth = 0
    for i, letter in enumerate(text):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0 and not text[i:].startswith("(anonymous"):
            text = text[:i]
            break
    words = {"unsigned int": "uint32_t", "unsigned short": "uint16_t"}
    for long, short in words.items():
        text = text.replace(long, short)
    return re.sub(r"\s+", "", text)


def wanted_of(planned: Launch | Gemm) -> Any:
    """What is recorded of it."""
    p = planned
    if isinstance(p, Gemm):
        kind, y_kind = (0, 2, 14)[p.dtype], 0 if p.wide else (0, 2, 14)[p.dtype]
        k = p.inputs // p.parts
        w = (p.w, kind, p.inputs, k) if p.by_outputs else (p.w, kind, p.outputs, k * p.outputs)
        y = (p.add, p.y, y_kind, p.outputs, p.rows * p.outputs)
        product = (p.by_outputs, 0, p.outputs, p.rows, k, 1, *w, p.x, kind, p.x_row, k, *y, p.parts)
        return (*product, 68, -1, p.workspace, p.workspace_bytes, 16)
    sizes = ((*p.grid, 1, 1)[:3], (*p.threads, 1, 1)[:3], p.cluster, p.cooperative)
    return (canonical(p.kernel), *sizes, p.shared, [bytes(a) for a in p.arguments])


# Those that C does not see, by their names in the library.
SYMBOLS = {"prompt": "_ZN5mamba5model6promptERK10MambaModelPvP11CUstream_st"}


def attributes_of(device: Device) -> Any:
    """As the stand-in keeps them."""
    numbers = (device.major, device.multiprocessors, device.shared_bytes, device.architecture // 10)
    return (ctypes.c_int * 4)(*numbers)


def recorded(library: ctypes.CDLL, op: str, call: Any, device: Device, planned: list[Any]) -> list[Any]:
    """What the compiled launcher does, with as many bytes of each argument as the plan in Python has."""
    found: list[Any] = []

    def note(name: bytes, sizes: Any, shared: int, arguments: Any) -> None:
        kernel, p = canonical(name.decode()), planned[len(found)] if len(found) < len(planned) else None
        like = p.arguments if isinstance(p, Launch) and canonical(p.kernel) == kernel else ()  # another has others
        values = [ctypes.string_at(arguments[i], ctypes.sizeof(a)) for i, a in enumerate(like)]
        found.append((kernel, tuple(sizes[:3]), tuple(sizes[3:6]), *sizes[6:8], shared, values))

    recorder = Recorder(note)
    library.set_recorder(recorder, attributes_of(device))
    products = ProductRecorder(lambda numbers: found.append(tuple(numbers[:NUMBERS])))
    library.cublas.set_recorder(products)
    function = getattr(library, SYMBOLS.get(op, f"mamba_{op}"))
    code = function(ctypes.byref(call), ctypes.c_void_p(WORKSPACE), None)
    assert code == 0, (device, planned, {n: getattr(call, n) for n, _ in call._fields_})
    return found


WORKSPACE = 1 << 44


@pytest.mark.parametrize("op", list(arguments.SIGNATURES))
def test_python_launches_what_the_compiled_launchers_do(library, op):
    draw = random.Random(op)
    plan: Callable[..., list[Launch]] = getattr(launches, op)
    workspace = getattr(library, f"mamba_{op}_workspace")
    workspace.restype = ctypes.c_size_t
    kinds = set()
    beside = [0, 0]  # calls of sizes that are padded from 128 tokens on, a few tokens below and above
    for _ in range(2000):
        call, device = random_call(op, draw), of_driver(library, draw.choice(DEVICES))
        if not fits(op, call):
            continue
        planned = plan(call, WORKSPACE, device)
        shown = {name: getattr(call, name) for name, _ in call._fields_}
        assert recorded(library, op, call, device, planned) == [wanted_of(p) for p in planned], (shown, device)
        assert launches.workspace_bytes(op, call) == workspace(ctypes.byref(call)), shown
        if op == "model":
            assert pending.pending_row(call) == library.mamba_pending_row(ctypes.byref(call)), shown
        kinds.update(p.kernel for p in planned if isinstance(p, Launch))
        if op == "ssd_scan" and 120 <= call.length < 140 and call.dtype and (call.head_dim % 8 or call.state_size % 8):
            beside[call.length >= 128] += 1
    assert len(kinds) > 2
    if op == "model":
        assert all(any(name in kind for kind in kinds) for name in ("late_step_kernel", "settle_kernel"))
    if op == "ssd_scan":
        assert min(beside) > 20
        assert sum("pad_kernel" in kind for kind in kinds) == 4  # a word has 2, 4, 8 or 16 bytes


def test_python_launches_helpers_as_the_compiled_launcher_does(library):
    draw, helped = random.Random("helpers"), set()
    workspace = library.mamba_ssd_scan_workspace
    workspace.restype = ctypes.c_size_t
    for _ in range(1000):
        batch, length = draw.choice((1, 1, 2)), draw.randrange(400, 10_000)
        P, N = draw.choice((49, 63, 64, 64, 64, 80, 128)), draw.choice((16, 64, 100, 128, 136))
        sizes = {"head_dim": P, "state_size": N, "heads": draw.randrange(24, 130) // batch, "groups": 1}
        call, device = _struct("ssd_scan", draw, sizes | {"batch": batch, "length": length}), draw.choice(DEVICES)
        planned = launches.ssd_scan(call, WORKSPACE, device)
        shown = {name: getattr(call, name) for name, _ in call._fields_}
        assert recorded(library, "ssd_scan", call, device, planned) == [wanted_of(p) for p in planned], (shown, device)
        assert launches.workspace_bytes("ssd_scan", call) == workspace(ctypes.byref(call)), shown
        for p in planned:
            if "helped_kernel" in p.kernel:
                help = p.arguments[2]
                helped.add((p.kernel, help.heads))
                floats = 64 * (64 if "64>" in p.kernel else 128) + help.chunks * 64 * 65
                assert help.done == help.left + 4 * help.blocks * floats
                assert help.done + 4 * help.blocks <= WORKSPACE + launches.workspace_bytes("ssd_scan", call)
                assert 64 * (-(-length // 64) - help.chunks) == help.length < length
                assert p.grid[0] <= device.multiprocessors
    assert len(helped) == 2 * 2 * 2  # dtypes, N up to 64 or 128, one or two heads a helper


def test_python_launches_what_the_compiled_prompt_does(library):
    draw = random.Random("prompt")
    workspace = library._ZN5mamba5model16prompt_workspaceERK10MambaModel
    workspace.restype = ctypes.c_size_t
    kinds, products = set(), 0
    for _ in range(1000):
        (call, layers), device = random_prompt(draw), of_driver(library, draw.choice(DEVICES))
        if call.inner > 1 << 15 or call.batch * call.length * max(call.outputs, call.width) >= 1 << 31:
            continue  # refused, or more than a GPU's memory
        if launches_rows.is_rows(call, device) and (call.rank + 2 * call.state_size) % 8:
            continue  # refused too; test_a_short_prompt_is_by_rows_kernel has sizes that are not
        planned = launches_prompt.prompt(call, WORKSPACE, device)
        shown = {name: getattr(call, name) for name, _ in call._fields_}, bytes(layers), device
        for i, (found, p) in enumerate(zip(recorded(library, "prompt", call, device, planned), planned, strict=True)):
            assert found == wanted_of(p), (i, shown)
        assert launches_prompt.workspace_bytes(call) == workspace(ctypes.byref(call)), shown
        kinds.update(re.sub("<.*", "", p.kernel) for p in planned if isinstance(p, Launch))
        products += sum(isinstance(p, Gemm) for p in planned)
    assert products > 3000
    assert {re.sub(".*::", "", kind) for kind in kinds} >= {
        "embed_rows_kernel", "norm_kernel", "part_norms_kernel", "bias_kernel", "pad_kernel", "chunk_kernel",
        "recurrent_kernel",
    }  # fmt: skip


# Width of published models and some others, and channels of a block, by 8, on 132 multiprocessors.
WIDTHS = {
    "mamba-256": (256, 4),
    "mamba-1792": (1792, 4),
    "mamba-130m": (768, 4),
    "mamba-370m": (1024, 4),
    "mamba-790m": (1536, 4),
    "mamba-1.4b": (2048, 4),
    "mamba-2.8b": (2560, 5),
    "falcon-mamba-7b": (4096, 8),
    "mamba2-256": (256, 4),
    "mamba2-1792": (1792, 4),
    "mamba2-130m": (768, 4),
    "mamba2-370m": (1024, 4),
    "mamba2-780m": (1536, 4),
    "mamba2-1.3b": (2048, 4),
    "mamba2-2.7b": (2560, 5),
}


def a_token(name: str, draw: random.Random, **changed: Any) -> Any:
    """A call of one row's token of a model of these sizes."""
    width, _ = WIDTHS[name]
    inner, mamba2 = 2 * width, name.startswith("mamba2")
    rank, heads = (0, inner // 64) if mamba2 else (width // 16, 0)
    sizes = {"batch": 1, "length": 1, "layers": 2, "width": width, "inner": inner, "conv_width": 4, "vocab": 50280}
    sizes |= {"heads": heads, "head_dim": 64, "state_size": 128} if heads else {"rank": rank, "state_size": 16}
    sizes |= {"groups": 1} | changed
    of_states = 2 * sizes["groups"] * sizes["state_size"] if heads else 0
    call = _struct("model", draw, sizes | {"channels": inner + of_states, "outputs": 2 * inner + of_states + heads})
    call.dtype = changed.get("dtype", draw.choice((1, 2)))
    call.norm_eps, call.eps = 1e-6 if name.startswith("falcon") else -1.0, 1e-5
    optional = {name for name in OPTIONAL if draw.random() < 0.3}
    return _with_layers(call, draw, optional | ({"x_proj", "dt_proj"} if heads else {"gate_norm"}))


def is_token(planned: list[Any]) -> bool:
    return any("token_kernel" in p.kernel for p in planned if isinstance(p, Launch))


def compare(library: ctypes.CDLL, call: Any, device: Device, op: str = "model") -> list[Any]:
    """What both launch, which has to be the same."""
    planned = getattr(launches, op)(call, WORKSPACE, device)
    found = recorded(library, op, call, device, planned)
    assert len(found) == len(planned), (device, found)
    for one, p in zip(found, planned, strict=True):
        assert one == wanted_of(p), p.kernel if isinstance(p, Launch) else p
    return planned


@pytest.mark.parametrize("name", WIDTHS)
def test_one_rows_token_is_one_kernel_and_the_head(library, name):
    draw, units = random.Random(name), WIDTHS[name][-1]
    for dtype, T in ((1, "__half"), (2, "__nv_bfloat16")):
        for layers in (2, 3, 64):  # 64: some are no argument
            call = a_token(name, draw, dtype=dtype, layers=layers)
            planned = compare(library, call, of_driver(library, DEVICES[0]))
            table, token, _ = planned
            assert table.arguments[1].value == (24 if layers == 64 else 0)
            assert token.arguments[1][1].at.in_proj == structs.layers_of(call)[1].in_proj
            mamba2, sums = (str(given).lower() for given in (call.heads > 0, call.width < 2048))
            assert token.kernel == f"mamba::token::token_kernel<{T}, {mamba2}, {units}, {sums}>"
            assert token.cooperative
            assert token.cluster == (2 if units == 5 else 1)
            assert token.arguments[0].hidden + 4 * call.width <= WORKSPACE + launches.workspace_bytes("model", call)
        for multiprocessors in (144, 114, 78, 64):
            device = DEVICES[0]._replace(multiprocessors=multiprocessors)
            compare(library, a_token(name, draw, dtype=dtype), of_driver(library, device))


@pytest.mark.parametrize("name", ["mamba-370m", "mamba-2.8b", "mamba2-370m", "mamba2-2.7b"])
def test_any_workspace_is_enough_for_one_rows_token(library, name):
    draw = random.Random(name)
    workspace = library.mamba_model_workspace
    workspace.restype = ctypes.c_size_t
    needed = launches_token.workspace_bytes(a_token(name, draw))
    assert needed > 0
    for batch, length in ((1, 1), (2, 1), (64, 1), (1, 2), (3, 512)):
        call = a_token(name, draw, batch=batch, length=length)
        assert launches.workspace_bytes("model", call) == workspace(ctypes.byref(call)) >= needed


MISALIGNED = "norm_weight in_proj_bias conv_weight conv_bias conv_state A D dt_bias ssm_state gate_norm ssm_state_out"


OTHER_TOKENS = [
    *({name: value} for name, value in (("batch", 2), ("dtype", 0), ("conv_width", 3), ("layers", 81))),
    *({name: 8} for name in ("groups", "state_size", "rank")),
    *({"multiprocessors": count} for count in (16, 30, 63)),
    {"major": 8},
    {"major": 12},
    {"architecture": 120, "multiprocessors": 170, "shared_bytes": 101376},  # code of 9.0 all the same
    *({"misaligned": name} for name in MISALIGNED.split()),
]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        *(("mamba-370m", changed) for changed in OTHER_TOKENS if "groups" not in changed),
        *(("mamba2-1.3b", changed) for changed in OTHER_TOKENS if "rank" not in changed),
        *(("mamba2-1.3b", {"multiprocessors": count}) for count in (127, 200)),
        ("mamba2-370m", {"width": 2000}),
    ],
    ids=str,
)
def test_other_tokens_are_not_one_kernel(library, name, changed):
    device = of_driver(library, DEVICES[0])
    of_device = {key: changed[key] for key in device._fields if key in changed}
    sizes = {key: value for key, value in changed.items() if key not in (*of_device, "misaligned")}
    draw = random.Random(name)
    assert is_token(launches.model(a_token(name, draw), WORKSPACE, device))
    call = a_token(name, draw, **sizes)
    if "misaligned" in changed:
        setattr(call.kept[1], changed["misaligned"], (1 << 30) + 8)
    assert not is_token(compare(library, call, device._replace(**of_device)))


# Columns of a cluster for in_proj and out_proj, on 132 multiprocessors.
ROWS = {
    "mamba-130m": (64, 64),
    "mamba-790m": (96, 96),
    "mamba-1.4b": (128, 128),
    "mamba-2.8b": (160, 160),
    "mamba2-130m": (64, 64),
    "mamba2-780m": (128, 96),
    "mamba2-1.3b": (144, 128),
    "mamba2-2.7b": (192, 160),
}


def products_of_rows(planned: list[Any]) -> list[Launch]:
    return [p for p in planned if isinstance(p, Launch) and p.source == "rows_product.cuh"]


def of_rows(planned: list[Any]) -> list[str]:
    return [p.kernel for p in products_of_rows(planned)]


@pytest.mark.parametrize("name", ROWS)
def test_a_token_of_some_rows_is_by_rows_kernel(library, name):
    draw, workspace = random.Random(name), library.mamba_model_workspace
    workspace.restype = ctypes.c_size_t
    for batch in (2, 3, 11, 12, 64, 65, 128, 129):
        for dtype, T in ((1, "__half"), (2, "__nv_bfloat16")):
            call = a_token(name, draw, batch=batch, dtype=dtype)
            planned = compare(library, call, of_driver(library, DEVICES[0]))
            if batch <= 128:
                tiles = 1 if batch <= 64 else 2
                kinds = [f"mamba::rows::rows_kernel<{T}, {columns}, {tiles}>" for columns in ROWS[name]]
                assert of_rows(planned) == kinds * call.layers
                assert sum(isinstance(p, Gemm) for p in planned) == 1  # the head
            else:
                assert of_rows(planned) == []
            for device in (DEVICES[0], draw.choice(DEVICES[1:])):
                device = device._replace(multiprocessors=draw.choice((16, 78, 144)))
                compare(library, call, of_driver(library, device))
            assert launches.workspace_bytes("model", call) == workspace(ctypes.byref(call))


@pytest.mark.parametrize(("width", "groups", "is_rows"), [(4096, 8, True), (4096, 1, True), (2048, 8, False)])
def test_one_row_of_wide_models_that_is_no_token_is_by_rows_kernel(library, monkeypatch, width, groups, is_rows):
    """As of Codestral Mamba, which has eight groups."""
    monkeypatch.setitem(WIDTHS, "mamba2-wide", (width, 8))
    call = a_token("mamba2-wide", random.Random(width), groups=groups, dtype=1)
    planned = compare(library, call, of_driver(library, DEVICES[0]._replace(multiprocessors=132)))
    assert (len(of_rows(planned)) == 2 * call.layers) == is_rows
    assert not is_token(planned)
    workspace = library.mamba_model_workspace
    workspace.restype = ctypes.c_size_t
    assert launches.workspace_bytes("model", call) == workspace(ctypes.byref(call))


@pytest.mark.parametrize("name", ROWS)
def test_a_short_prompt_is_by_rows_kernel(library, name):
    draw, workspace = random.Random(name), library.mamba_model_workspace
    workspace.restype = ctypes.c_size_t
    for batch, length in ((1, 2), (1, 3), (2, 2), (1, 64), (3, 40), (2, 64), (1, 129), (43, 3)):
        call, rows = a_token(name, draw, batch=batch, length=length, dtype=1), batch * length
        planned = compare(library, call, of_driver(library, DEVICES[0]))
        tiles = 1 if rows <= 64 else 2
        kinds = [f"mamba::rows::rows_kernel<__half, {columns}, {tiles}>" for columns in ROWS[name]]
        assert of_rows(planned) == (kinds * call.layers if rows <= 128 else [])
        # No convolution in them: it is along the prompt.
        assert not any(p.arguments[0].a.conv_channels or p.arguments[0].a.conv_state for p in products_of_rows(planned))
        assert sum(isinstance(p, Launch) and "conv::prompt_kernel" in p.kernel for p in planned) == call.layers
        assert launches.workspace_bytes("model", call) == workspace(ctypes.byref(call))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("batch", "length", "of_mamba", "of_mamba2"),
    [(3, 1, 4, 8), (32, 1, 4, 8), (33, 1, 8, 8), (64, 1, 8, 8), (65, 1, 0, 0), (1, 3, 8, 8), (2, 64, 8, 8)],
)
def test_what_products_ask_the_l2_cache_for(library, name, batch, length, of_mamba, of_mamba2):
    """The first of each part of the next product's weights: no byte of others, none twice, as many MiB as are said."""
    call = a_token(name, random.Random(name), batch=batch, length=length, dtype=1)
    planned = compare(library, call, of_driver(library, DEVICES[0]._replace(multiprocessors=132)))
    products = products_of_rows(planned)
    following = [*(w for layer in call.kept for w in (layer.in_proj, layer.out_proj)), 0][1:]
    for i, (launch, weights) in enumerate(zip(products, following, strict=True)):
        asked = launch.arguments[0].next
        inputs, outputs = (call.width, call.outputs) if i % 2 else (call.inner, call.width)
        wanted = (min(4, of_mamba) if i % 2 else of_mamba2 if call.heads else of_mamba) << 20
        assert (asked.weights or 0) == weights
        assert asked.parts == (2 if i % 2 else 8)
        assert asked.part * asked.parts == 2 * inputs * outputs
        assert asked.asked % 16 == 0
        warps = 4 if batch * length <= 64 else 8
        shares = math.prod(launch.grid) * warps // asked.parts  # of a part, one after the other
        assert shares * asked.asked <= asked.part
        whole = min(wanted, 2 * inputs * outputs) if weights else 0
        assert whole * 0.99 <= shares * asked.asked * asked.parts <= whole


@pytest.mark.parametrize("name", ["mamba-1.4b", "mamba2-1.3b"])
@pytest.mark.parametrize(
    "changed",
    [
        *({name: value} for name, value in (("dtype", 0), ("conv_width", 3), ("batch", 129))),
        {"width": 2048 + 64},
        {"inner": 4096 + 256},
        {"architecture": 100},  # code of 9.0 all the same
        {"major": 8},
        {"shared_bytes": 101376},
        *({"misaligned": name} for name in "in_proj_bias conv_weight conv_bias conv_state conv_state_out".split()),
    ],
    ids=str,
)
def test_other_tokens_are_not_by_rows_kernel(library, name, changed):
    device, draw = of_driver(library, DEVICES[0]), random.Random(name)
    of_device = {key: changed[key] for key in device._fields if key in changed}
    sizes = {key: changed[key] for key in ("dtype", "conv_width", "batch") if key in changed}
    assert of_rows(launches.model(a_token(name, draw, batch=64), WORKSPACE, device))
    call = a_token(name, draw, **{"batch": 64} | sizes)
    call.width = changed.get("width", call.width)
    if more := changed.get("inner", call.inner) - call.inner:
        call.inner, call.channels, call.outputs = call.inner + more, call.channels + more, call.outputs + 2 * more
        if call.heads:
            call.head_dim, call.outputs = 32, call.outputs - call.heads + call.inner // 32
            call.heads = call.inner // 32
    if "misaligned" in changed:
        setattr(call.kept[1], changed["misaligned"], (1 << 30) + 8)
    assert not of_rows(compare(library, call, device._replace(**of_device)))


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_the_scan_of_some_rows_and_what_it_reads(library, device):
    """x_proj and the scan of a token, from 2 or 3 rows on: by kernels that share rows out otherwise than of fewer."""
    device = of_driver(library, device)
    for batch in (1, 2, 3, 16, 17, 67):
        for dtype in (0, 1, 2):
            some = dtype > 0 and batch > (1 if device.major >= 9 else 2)
            x = structs.MambaXProj(batch, 1, 8192, 4096, 160, dtype, 1 << 20, 1 << 24, 1 << 28)
            [low] = compare(library, x, device, "x_proj")
            by_clusters = some and device.major >= 9
            assert ("x_proj_kernel" in low.kernel) == by_clusters
            assert not by_clusters or (low.cluster, low.grid) == (8, (40, 1 if batch <= 32 else 3))
            for states, offset in ((16, 0), (16, 8), (32, 0)):
                sizes = (8192, 128 + 2 * states, 128, 4096, states, dtype, 0, -1.0)
                places = (1 << 20, 1 << 24, 1 << 28, 1 << 29, None, None, (1 << 30) + offset, 1 << 31, 1 << 32, 1 << 33)
                call = structs.MambaSelectiveUpdate(batch, 1, *sizes, *places)
                [scan] = compare(library, call, device, "selective_update")
                tensor_cores = some and device.major >= 8 and states == 16 and offset == 0
                assert ("update_rows_kernel" in scan.kernel) == tensor_cores


@pytest.mark.parametrize(
    ("name", "rows", "blocks", "at_once"),
    [
        ("mamba-1.4b", 32, 256, 368),  # 40 multiprocessors have a block of x_proj, others room for four
        ("mamba-1.4b", 33, 320, 208),
        ("mamba-1.4b", 64, 512, 208),
        ("mamba-1.4b", 65, 576, 576),  # more than four a multiprocessor
        ("mamba-2.8b", 64, 640, 640),
        ("mamba-370m", 128, 512, 144),
    ],
)
def test_blocks_of_the_scan_that_start_late(library, name, rows, blocks, at_once):
    device = of_driver(library, DEVICES[0]._replace(multiprocessors=132))
    planned = compare(library, a_token(name, random.Random(name), batch=rows, dtype=1, state_dtype=0), device)
    scans = [p for p in planned if isinstance(p, Launch) and "update_rows_kernel" in p.kernel]
    assert {math.prod(p.grid) for p in scans} == {blocks}
    assert {p.arguments[-1].value for p in scans} == {at_once}


@pytest.mark.parametrize(("head_dim", "waits"), [(1024, True), (2048, False)])
def test_tokens_of_large_heads_do_not_wait(library, head_dim, waits):
    """What is kept of those that wait has to find room in shared memory."""
    draw, D, H, N = random.Random(0), 8 * head_dim, 8, 128
    sizes = {
        "batch": 128,
        "length": 1,
        "layers": 2,
        "width": 256,
        "inner": D,
        "conv_width": 4,
        "vocab": 50280,
        "groups": 1,
    }
    sizes |= {"heads": H, "head_dim": head_dim, "state_size": N, "channels": D + 2 * N, "outputs": 2 * D + 2 * N + H}
    call = _with_layers(_struct("model", draw, sizes), draw, {"x_proj", "dt_proj"})
    call.pending, call.pending_row, call.dtype = 1 << 40, pending.pending_row(call), 1
    call.pending_out = call.pending
    for layer in call.kept:
        layer.ssm_state_out = layer.ssm_state
    planned = compare(library, call, of_driver(library, DEVICES[0]))
    assert any("late_step_kernel" in p.kernel for p in planned if isinstance(p, Launch)) == waits


@pytest.mark.parametrize("name", ["mamba-370m", "mamba2-1.3b"])
def test_an_older_driver_gets_what_needs_no_tensor_maps(library, objects, name):
    shutil.copy(objects / "liblaunchers.so", objects / f"{name}.so")
    old = ctypes.CDLL(str(objects / f"{name}.so"))  # for the driver is asked once
    old.cublas = library.cublas
    old.set_driver_version(12000)
    draw = random.Random(name)
    assert not is_token(compare(old, a_token(name, draw), DEVICES[0]))
    for batch in (3, 64, 128):
        assert not of_rows(compare(old, a_token(name, draw, batch=batch), DEVICES[0]))


@pytest.mark.parametrize(
    "changed",
    [
        *({name: value} for name in ("batch", "vocab", "capacity") for value in (0, -1)),
        {"vocab": (1 << 20) + 1},
        {"top_k": -1},
        *({"temperature": value} for value in (-1.0, math.inf, math.nan)),
        *({"top_p": value} for value in (0.0, 1.5, math.nan)),
        *({"min_p": value} for value in (-0.5, 1.5, math.nan)),
        {"uniform": None},
    ],
    ids=str,
)
def test_the_launcher_of_sample_token_refuses(library, changed):
    given = {"batch": 2, "vocab": 5, "capacity": 3, "temperature": 1.0, "top_p": 1.0, "uniform": 1 << 20}
    for values, answer in ((given, 0), (given | changed, 1)):  # cudaErrorInvalidValue
        call = structs.MambaSampleToken(**values)
        recorder = Recorder(lambda *launched: None)
        library.set_recorder(recorder, attributes_of(DEVICES[0]))
        assert library.mamba_sample_token(ctypes.byref(call), None, None) == answer


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_inputs_that_have_no_room_in_shared_memory_are_refused(library, batch):
    """In C++ before the launch, by the same code with which CUDA refuses Python's launch."""
    device = DEVICES[0]
    call = structs.MambaXProj(batch=batch, channels=60000, outputs=96, row=60000, x=1 << 20, weight=1 << 21, y=1 << 22)
    recorder = Recorder(lambda *launched: None)
    library.set_recorder(recorder, attributes_of(device))
    assert library.mamba_x_proj(ctypes.byref(call), None, None) == 1  # cudaErrorInvalidValue
    [launch] = launches.x_proj(call, WORKSPACE, device)
    assert launch.shared > device.shared_bytes


def test_workspace_never_shrinks_with_length(library):
    """The plugins ask for the longest prompt alone: TensorRT then calls with shorter ones, in the same memory."""
    scan = {"channels": 256, "state_size": 16}
    ssd = {"heads": 8, "head_dim": 64, "state_size": 64, "groups": 1}
    odd = [ssd | {"head_dim": 60}, ssd | {"state_size": 1}, ssd | {"head_dim": 63, "state_size": 255, "groups": 2}]
    for op, sizes in (("selective_scan", scan), ("ssd_scan", ssd), *(("ssd_scan", sizes) for sizes in odd)):
        workspace = getattr(library, f"mamba_{op}_workspace")
        workspace.restype = ctypes.c_size_t
        for batch in (1, 2, 70):
            calls = (
                arguments.SIGNATURES[op].struct(**sizes, batch=batch, length=length, dtype=1)
                for length in range(1, 4097)
            )
            needed = [workspace(ctypes.byref(call)) for call in calls]
            assert needed == sorted(needed), op
            assert needed[-1] > 0 or batch == 70

    # Here a token needs less than the sums of out_proj, which only single tokens have.
    workspace = library.mamba_model_workspace
    workspace.restype = ctypes.c_size_t
    narrow = {"width": 2048, "inner": 512, "channels": 512, "outputs": 1024, "rank": 128, "state_size": 16}
    for batch in (1, 12, 128):
        calls = [
            structs.MambaModel(**narrow, batch=batch, length=length, layers=1, vocab=8, conv_width=4, dtype=1)
            for length in range(1, 65)
        ]
        needed = [workspace(ctypes.byref(call)) for call in calls]
        assert needed == sorted(needed)
        assert needed == [launches.workspace_bytes("model", call) for call in calls]


@pytest.mark.parametrize(("P", "N"), [(60, 100), (64, 100), (60, 64)])
@pytest.mark.parametrize(("T", "S"), [("float16", "float32"), ("float16", "bfloat16"), ("bfloat16", "float16")])
@pytest.mark.parametrize(("skip", "same"), [("H", False), ("HP", True), (None, True)])
def test_a_padded_prompt_is_the_recurrence(P, N, T, S, skip, same):
    """The launches over memory of the host: copies by their definition, the tensor cores' part by the recurrence.

    Whatever a kernel is told to read or write has to lie in a tensor or in the workspace, which is full of NaN.
    """
    batch, length, heads, groups = 3, 130, 4, 2
    generator = torch.Generator().manual_seed(P * N)
    state_type, item = getattr(torch, S), getattr(torch, T)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {
        "x": normal(batch, length, heads * P, dtype=item),
        "dt": normal(batch, length, heads, dtype=item),
        "A": -normal(heads).exp(),
        "B": normal(batch, length, groups * N, dtype=item),
        "C": normal(batch, length, groups * N, dtype=item),
        "D": {"H": normal(heads), "HP": normal(heads, P), None: None}[skip],
        "dt_bias": normal(heads),
        "ssm_state": normal(batch, heads, P, N, dtype=state_type),
        "seq_lens": torch.tensor([length, 0, 77], dtype=torch.int32),
    }
    for name in ("x", "dt", "B", "C"):
        tensors[name][1] = tensors[name][2, 77:] = math.nan
    given = [None if t is None else t.clone() for t in tensors.values()]
    want_y, want_state = recurrence.ssd_scan(*given, True, 0.01, 2.0, groups)
    y = torch.full_like(tensors["x"], math.nan)
    state_out = tensors["ssm_state"] if same else torch.full_like(tensors["ssm_state"], math.nan)
    call = structs.MambaSsdScan(
        batch=batch, length=length, heads=heads, head_dim=P, state_size=N, groups=groups,
        dtype=("float32", "float16", "bfloat16").index(T), state_dtype=("float32", "float16", "bfloat16").index(S),
        dt_softplus=1, skip_per_channel=skip == "HP", dt_min=0.01, dt_max=2.0,
        **{name: t.data_ptr() for name, t in tensors.items() if t is not None},
        y=y.data_ptr(), ssm_state_out=state_out.data_ptr(),
    )  # fmt: skip
    needed = launches.workspace_bytes("ssd_scan", call)
    memory = torch.full((needed + 255,), 255, dtype=torch.uint8)  # 16 or 32 bits of 1 are NaN
    workspace = -(-memory.data_ptr() // 256) * 256
    owned = [memory, y, state_out, *(t for t in tensors.values() if t is not None)]

    def at(pointer: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        ends = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in owned]
        ends[0] = (workspace, workspace + needed)
        assert any(start <= pointer and pointer + size <= end for start, end in ends)
        view = (ctypes.c_uint8 * size).from_address(pointer)
        return torch.frombuffer(view, dtype=dtype).view(shape)

    words = {"uint16_t": torch.int16, "uint32_t": torch.int32, "uint2": torch.int64, "uint4": torch.complex128}
    planned = launches.ssd_scan(call, workspace, DEVICES[0])
    assert any("chunk_kernel" in one.kernel for one in planned)
    for one in planned:
        argument = one.arguments[0]
        if "pad_kernel" in one.kernel:
            r, word = argument, words[re.sub(r".*<|>", "", one.kernel)]
            count = r.rows // r.to_rows
            source = at(r.from_, (count, r.from_rows, r.from_cols), word)
            target = at(r.to, (count, r.to_rows, r.to_cols), word)
            target.zero_()
            rows, cols = min(r.from_rows, r.to_rows), min(r.from_cols, r.to_cols)
            target[:, :rows, :cols] = source[:, :rows, :cols]
        elif one.kernel.endswith("true>"):
            c, p, n = argument, argument.head_dim, argument.state_size
            assert (p, n) == (-(-P // 8) * 8, -(-N // 8) * 8)
            group = (batch, length, groups * n)
            d = at(c.D, (heads, p) if skip == "HP" else (heads,), torch.float32) if c.D else None
            result = recurrence.ssd_scan(
                at(c.x, (batch, length, heads * p), item), at(c.dt, (batch, length, heads), item),
                at(c.A, (heads,), torch.float32), at(c.B, group, item), at(c.C, group, item), d,
                at(c.dt_bias, (heads,), torch.float32), at(c.ssm_state, (batch, heads, p, n), state_type),
                at(c.seq_lens, (batch,), torch.int32), True, c.dt_min, c.dt_max, groups,
            )  # fmt: skip
            at(c.y, (batch, length, heads * p), item).copy_(torch.from_numpy(result[0]))
            at(c.ssm_state_out, (batch, heads, p, n), state_type).copy_(torch.from_numpy(result[1]))
    torch.testing.assert_close(y, torch.from_numpy(want_y).to(item))
    torch.testing.assert_close(state_out, torch.from_numpy(want_state).to(state_type))
    for (name, after), before in zip(tensors.items(), given, strict=True):
        if after is not None and not (same and name == "ssm_state"):
            assert torch.equal(after.view(torch.uint8), before.view(torch.uint8)), name


def test_files_of_the_kernels_are_there():
    assert all((build.SOURCES / file).is_file() for file in build.KERNEL_SOURCES)


# --- compiling and launching without the library -----------------------------------------------------------------


def fake_driver(modules: list[bytes]) -> SimpleNamespace:
    """Of cuda.bindings.driver what nvrtc.launch calls; more shared memory than a function may have fails, as there."""
    allowed: dict[int, int] = {}

    def load(code: bytes) -> tuple[int, int]:
        modules.append(code)
        return 0, len(modules)

    def set_attribute(function: int, attribute: str, value: int) -> tuple[int]:
        if attribute == "shared":
            allowed[function] = value
        return (0,)

    def run(function: int, *arguments: Any) -> tuple[int]:
        return (0 if arguments[6] <= allowed.get(function, 48 << 10) else 1,)

    return SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
        CUfunction_attribute=SimpleNamespace(
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared",
            CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT="carveout",
        ),
        cuCtxGetCurrent=lambda: (0, 1),
        cuModuleLoadData=load,
        cuModuleGetFunction=lambda module, name: (0, 1000 + module),
        cuFuncSetAttribute=set_attribute,
        cuLaunchKernel=run,
    )


def test_a_launch_with_less_shared_memory_does_not_spoil_one_with_more(monkeypatch):
    modules: list[bytes] = []
    driver = fake_driver(modules)
    monkeypatch.setattr(nvrtc, "_bindings", lambda: (driver, None))
    monkeypatch.setattr(nvrtc, "compile_kernel", lambda *of: nvrtc.Program(b"name", repr(of).encode()))
    monkeypatch.setattr(nvrtc, "_allowed", {})
    nvrtc._loaded.cache_clear()
    for shared in (100_000, 60_000, 100_000, 0, 200_000, 100_000):
        nvrtc.launch([Launch("a.cu", "mamba::kernel", (1,), (32,), shared, (ctypes.c_int32(0),))], DEVICES[0], 0)
    nvrtc._loaded.cache_clear()
    assert len(modules) == 1


def test_a_launch_is_cooperative_or_of_clusters_or_both():
    driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    ids = driver.CUlaunchAttributeID
    for cluster, cooperative in ((1, True), (4, False), (4, True)):
        one = Launch("a.cu", "mamba::kernel", (8,), (64,), 100, (), cluster, cooperative)
        config = nvrtc._configuration(one, (8, 1, 1), (64, 1, 1), 0)
        found = {attribute.id: attribute.value for attribute in config.attrs}
        assert (config.gridDimX, config.blockDimX, config.sharedMemBytes) == (8, 64, 100)
        assert config.numAttrs == len(found) == (cluster > 1) + cooperative
        if cooperative:
            assert found[ids.CU_LAUNCH_ATTRIBUTE_COOPERATIVE].cooperative == 1
        if cluster > 1:
            size = found[ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION].clusterDim
            assert (size.x, size.y, size.z) == (cluster, 1, 1)


@pytest.mark.parametrize(
    ("version", "known", "gpu", "expected"),
    [
        ((12, 2), (80, 89, 90), 90, 89),  # knows 9.0, not what the kernels for it need
        ((12, 3), (80, 89, 90), 90, 90),
        ((12, 3), (80, 89, 90), 120, 90),
        ((11, 8), (80, 89, 90), 86, 80),
    ],
)
def test_nvrtc_compiles_for_the_newest_architecture_before_a_gpu(monkeypatch, version, known, gpu, expected):
    compiler = SimpleNamespace(
        nvrtcResult=SimpleNamespace(NVRTC_SUCCESS=0),
        nvrtcVersion=lambda: (0, *version),
        nvrtcGetSupportedArchs=lambda: (0, list(known)),
    )
    monkeypatch.setattr(nvrtc, "_bindings", lambda: (None, compiler))
    assert nvrtc._code_architecture.__wrapped__(gpu) == expected


@pytest.mark.parametrize(
    ("of_driver", "of_nvrtc", "found", "pointer"),
    [
        (12010, (12, 1), 0, 1 << 40),
        (13000, (13, 0), 0, 1 << 40),
        (12000, (12, 1), 0, 1 << 40),
        (12010, (12, 0), 0, 1 << 40),
        (12010, (12, 1), 1, 0),
        (12010, (12, 1), 0, 0),
    ],
)
def test_tensor_maps_need_a_driver_and_an_nvrtc_that_know_large_arguments(
    monkeypatch, of_driver, of_nvrtc, found, pointer
):
    driver = SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
        CUdriverProcAddress_flags=SimpleNamespace(CU_GET_PROC_ADDRESS_DEFAULT=0),
        cuDriverGetVersion=lambda: (0, of_driver),
        cuGetProcAddress=lambda *asked: (found, pointer, 0),
    )
    compiler = SimpleNamespace(nvrtcResult=SimpleNamespace(NVRTC_SUCCESS=0), nvrtcVersion=lambda: (0, *of_nvrtc))
    monkeypatch.setattr(nvrtc, "_bindings", lambda: (driver, compiler))
    wanted = of_driver > 12000 and of_nvrtc > (12, 0) and found == 0 and pointer > 0
    encode = nvrtc._find_encode_map()
    assert (encode is not None) == wanted
    if encode is not None:
        assert ctypes.cast(encode, ctypes.c_void_p).value == pointer


@pytest.mark.parametrize(
    ("source", "architecture", "target"),
    [
        ("rows_product.cuh", 90, "sm_90a"),
        ("rows_product.cuh", 100, "compute_90"),
        ("rows_product.cuh", 87, "sm_87"),
        ("token.cuh", 90, "sm_90"),
    ],
)
def test_what_wgmma_is_in_is_compiled_for_90a(monkeypatch, tmp_path, source, architecture, target):
    def compile_it(source: str, kernel: str, target: str, headers: Path) -> nvrtc.Program:
        return nvrtc.Program(kernel.encode(), target.encode())

    compiler = SimpleNamespace(nvrtcResult=SimpleNamespace(NVRTC_SUCCESS=0), nvrtcVersion=lambda: (0, 12, 6))
    monkeypatch.setenv("MAMBA_DEPLOY_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_bindings", lambda: (None, compiler))
    monkeypatch.setattr(nvrtc, "_code_architecture", lambda architecture: min(architecture, 90))
    monkeypatch.setattr(nvrtc, "find_cuda_headers", lambda: tmp_path)
    monkeypatch.setattr(nvrtc, "_compile", compile_it)
    assert nvrtc.compile_kernel(source, "mamba::kernel", architecture).code == target.encode()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC with an empty cache, and in no mind to optimise."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings: pip install 'mamba-deploy[nvrtc]'")
    monkeypatch.setenv("MAMBA_DEPLOY_CACHE", str(tmp_path))
    version = ".".join(map(str, nvrtc._nvrtc_call(None, nvrtc._bindings()[1].nvrtcVersion())))
    monkeypatch.setattr(nvrtc, "_OPTIONS", (*nvrtc._OPTIONS, quick_compile.flag(version, older="-lineinfo")))


def test_what_is_launched_compiles(compiler, tmp_path):
    """A kernel of each op and form, for Hopper."""
    architecture, draw = 90, random.Random(90)
    device = Device(architecture, architecture // 10, 64, 101376)
    for op in arguments.SIGNATURES:
        kinds: dict[str, Launch] = {}
        for _ in range(300):
            call = random_call(op, draw)
            if fits(op, call):
                planned = getattr(launches, op)(call, WORKSPACE, device)
                kinds.update({re.sub("<.*", "", p.kernel): p for p in planned if isinstance(p, Launch)})
        for one in kinds.values():
            program = nvrtc.compile_kernel(one.source, one.kernel, architecture)
            name = re.sub(".*::|<.*", "", one.kernel)
            assert name.encode() in program.name
            assert program.code.startswith(b"\x7fELF")
            assert nvrtc.compile_kernel(one.source, one.kernel, architecture) == program
    assert len(list((tmp_path / "nvrtc").iterdir())) >= 8


@pytest.mark.parametrize("name", ["mamba-370m", "mamba2-2.7b"])
def test_one_rows_token_compiles(compiler, name):
    device = DEVICES[0]._replace(encode_map=lambda *given: 0)
    *kernels_of_token, _ = launches.model(a_token(name, random.Random(name)), WORKSPACE, device)
    assert len(kernels_of_token) == 2
    for one in kernels_of_token:
        assert nvrtc.compile_kernel(one.source, one.kernel, 90).code.startswith(b"\x7fELF")


def test_a_token_of_some_rows_compiles(compiler):
    """With wgmma: without, the kernel is empty."""
    device = DEVICES[0]._replace(encode_map=lambda *given: 0)
    planned = launches.model(a_token("mamba-1.4b", random.Random(0), batch=64), WORKSPACE, device)
    kernel = of_rows(planned)[0]
    program = nvrtc.compile_kernel("rows_product.cuh", kernel, 90)
    assert program.code.startswith(b"\x7fELF")
    assert len(program.code) > 4 * len(nvrtc.compile_kernel("rows_product.cuh", kernel, 89).code)


def test_a_gpu_newer_than_nvrtc_gets_ptx(compiler):
    program = nvrtc.compile_kernel("last_token.cu", "mamba::last::last_token_kernel<uint4>", 999)
    assert b".target sm_" in program.code
    with pytest.raises(PluginError, match=r"NVRTC [\d.]+ knows sm_\d+ and newer: this GPU is sm_35"):
        nvrtc.compile_kernel("last_token.cu", "mamba::last::last_token_kernel<uint4>", 35)


def test_a_kernel_that_does_not_compile_says_why(compiler):
    with pytest.raises(PluginError, match=r"NVRTC_ERROR(.|\n)*no_such_kernel"):
        nvrtc.compile_kernel("last_token.cu", "mamba::last::no_such_kernel<uint4>", 90)
