"""Compiles single kernels by NVRTC when they are first launched, for machines without nvcc; keeps them in the cache.

Needs cuda-bindings, and NVRTC and CUDA's headers from NVIDIA's wheels or a CUDA toolkit. Launches go through the
driver, in the current context, which is that of pycuda, torch or TensorRT.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mamba_deploy.errors import PluginError, require
from mamba_deploy.plugins import cublas
from mamba_deploy.plugins.build import PRODUCTS, SOURCES, cache_folder, sources_hash
from mamba_deploy.plugins.toolchain import compiled_architectures, find_cuda_headers, machine_architecture

__all__ = ["Device", "Gemm", "Launch", "Program", "compile_kernel", "current_device", "launch"]

# What the sources ask of a host's C library; NVRTC brings memcpy itself.
_HEADERS = {
    "stddef.h": "",
    "string.h": "",
    "stdint.h": """
        typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long int64_t;
        typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
        typedef unsigned long uint64_t; typedef unsigned long uintptr_t;""",
}
_OPTIONS = ("-std=c++17", "-default-device", "-DMAMBA_KERNELS_ONLY")
_FREE_SHARED = 40 << 10  # dynamic bytes that a launch need not ask for, whatever a kernel has besides
_TABLE_ARGUMENTS = 12010  # CUDA, from which on a kernel's arguments may be as large as the table of token.cuh
_EncodeMap = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, *5 * (ctypes.c_void_p,), *4 * (ctypes.c_int,)
)
_allowed: dict[int, int] = {}  # bytes of dynamic shared memory by function: setting a smaller number would lower it


class Launch(NamedTuple):
    """A kernel and how it is launched."""

    source: str  # the file it is in
    kernel: str  # as C++ names it: mamba::last::last_token_kernel<uint4>
    grid: tuple[int, ...]  # x and, where not 1, y
    threads: tuple[int, ...]
    shared: int  # bytes of dynamic shared memory
    arguments: tuple[Any, ...]  # of ctypes
    cluster: int = 1  # blocks of a cluster, along x
    cooperative: bool = False  # whether all blocks have to run at once


class Gemm(NamedTuple):
    """A product by cuBLAS, y = x W or y + x W: as Product in ``cublas.h``, with the dtype and cuBLAS's workspace."""

    rows: int
    inputs: int
    outputs: int
    x: int
    x_row: int
    w: int
    by_outputs: bool
    y: int
    wide: bool
    add: bool
    dtype: int
    workspace: int
    workspace_bytes: int
    parts: int = 1


class Device(NamedTuple):
    """What launches depend on."""

    architecture: int  # 90 for compute capability 9.0
    major: int  # compute capability of the code: less than the GPU's where NVRTC is older
    multiprocessors: int
    shared_bytes: int  # a block may have at most
    encode_map: Callable[..., int] | None = None  # cuTensorMapEncodeTiled, where kernels that use it can be launched


class Program(NamedTuple):
    """Machine code or PTX of one kernel, and the kernel's name in it."""

    name: bytes
    code: bytes


@cache
def _bindings() -> tuple[ModuleType, ModuleType]:
    why = "compile the kernels without nvcc"
    return tuple(require(f"cuda.bindings.{name}", extra="nvrtc", why=why) for name in ("driver", "nvrtc"))  # type: ignore[return-value]


def current_device() -> Device:
    """Of the current context.

    Raises:
        PluginError: There is none, or no driver.
    """
    driver, _ = _bindings()
    device = _driver_call(driver.cuCtxGetDevice())
    return _describe(int(device))


@cache
def _describe(number: int) -> Device:
    driver, _ = _bindings()
    of = driver.CUdevice_attribute
    wanted = (
        of.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        of.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        of.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        of.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
    )
    major, minor, multiprocessors, shared_bytes = (
        int(_driver_call(driver.cuDeviceGetAttribute(name, number))) for name in wanted
    )
    architecture = 10 * major + minor
    code = _code_architecture(architecture)
    return Device(architecture, code // 10, multiprocessors, shared_bytes, _find_encode_map())


def _find_encode_map() -> Callable[..., int] | None:
    """None where the driver or NVRTC is too old for it, or for arguments of a table's size."""
    driver, nvrtc = _bindings()
    major, minor = _nvrtc_call(None, nvrtc.nvrtcVersion())
    if min(1000 * major + 10 * minor, int(_driver_call(driver.cuDriverGetVersion()))) < _TABLE_ARGUMENTS:
        return None
    flags = driver.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_DEFAULT
    code, pointer, *_ = driver.cuGetProcAddress(b"cuTensorMapEncodeTiled", 12000, flags)
    return _EncodeMap(int(pointer)) if code == driver.CUresult.CUDA_SUCCESS and pointer else None


def launch(launches: Sequence[Launch | Gemm], device: Device, stream: int) -> None:
    """Enqueue kernels and products one after the other; the first time each is compiled, or read from the cache.

    Args:
        launches: What is launched.
        device: That of the current context.
        stream: The cudaStream_t.

    Raises:
        PluginError: A kernel does not compile, CUDA refuses it, or cuBLAS is missing.
    """
    driver, _ = _bindings()
    context = int(_driver_call(driver.cuCtxGetCurrent()))
    for one in launches:
        if isinstance(one, Gemm):
            cublas.run(one, context, stream)
            continue
        function = _function(context, one.source, one.kernel, one.shared, device.architecture)
        grid, threads = (*one.grid, 1, 1)[:3], (*one.threads, 1, 1)[:3]
        pointers = (ctypes.c_void_p * len(one.arguments))(*(ctypes.addressof(a) for a in one.arguments))
        if one.cluster == 1 and not one.cooperative:
            answer = driver.cuLaunchKernel(function, *grid, *threads, one.shared, stream, ctypes.addressof(pointers), 0)
        else:
            answer = driver.cuLaunchKernelEx(
                _configuration(one, grid, threads, stream), function, ctypes.addressof(pointers), 0
            )
        _driver_call(answer)


def _configuration(one: Launch, grid: tuple[int, ...], threads: tuple[int, ...], stream: int) -> Any:
    """How a kernel is launched that is cooperative or has clusters of blocks, or both."""
    driver, _ = _bindings()
    attributes, ids = [], driver.CUlaunchAttributeID
    if one.cooperative:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = ids.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attributes[-1].value.cooperative = 1
    if one.cluster > 1:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attributes[-1].value.clusterDim
        size.x, size.y, size.z = one.cluster, 1, 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads
    config.sharedMemBytes, config.hStream = one.shared, stream
    config.numAttrs, config.attrs = len(attributes), attributes
    return config


def _function(context: int, source: str, kernel: str, shared: int, architecture: int) -> Any:
    """Of a context, allowed so much dynamic shared memory, or more."""
    driver, _ = _bindings()
    function = _loaded(context, source, kernel, architecture)
    if shared > _allowed.get(int(function), _FREE_SHARED):
        of = driver.CUfunction_attribute
        _driver_call(driver.cuFuncSetAttribute(function, of.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared))
        _driver_call(driver.cuFuncSetAttribute(function, of.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100))
        _allowed[int(function)] = shared
    return function


@cache
def _loaded(context: int, source: str, kernel: str, architecture: int) -> Any:
    """The module lives as long as its context."""
    driver, _ = _bindings()
    program = compile_kernel(source, kernel, architecture)
    module = _driver_call(driver.cuModuleLoadData(program.code))
    return _driver_call(driver.cuModuleGetFunction(module, program.name))


def compile_kernel(source: str, kernel: str, architecture: int) -> Program:
    """Compile a kernel for an architecture (90 for sm_90), or read it from the cache.

    A GPU newer than NVRTC gets PTX of the newest architecture that this knows.

    Raises:
        PluginError: NVRTC or CUDA's headers are missing, or it does not compile.
    """
    _, nvrtc = _bindings()
    version = _nvrtc_call(None, nvrtc.nvrtcVersion())
    code = _code_architecture(architecture)
    machine = machine_architecture(source, str(code))
    target = f"sm_{machine}" if code == architecture else f"compute_{code}"
    headers = find_cuda_headers()
    key = (_kernel_sources(), source, kernel, target, version, _OPTIONS)
    path = cache_folder() / "nvrtc" / hashlib.sha256(repr(key).encode()).hexdigest()
    found = _read(path)
    if found is None:
        found = _compile(source, kernel, target, headers)
        _write(path, found)
    return found


@cache
def _code_architecture(architecture: int) -> int:
    """What NVRTC compiles for: an architecture, or the newest before it whose kernels it compiles."""
    _, nvrtc = _bindings()
    version = _nvrtc_call(None, nvrtc.nvrtcVersion())
    known = compiled_architectures(map(int, _nvrtc_call(None, nvrtc.nvrtcGetSupportedArchs())), version)
    if architecture < known[0]:
        numbers = ".".join(map(str, version))
        raise PluginError(f"NVRTC {numbers} knows sm_{known[0]} and newer: this GPU is sm_{architecture}")
    return max(a for a in known if a <= architecture)


def _compile(source: str, kernel: str, target: str, headers: Path) -> Program:
    _, nvrtc = _bindings()
    text = f'#include "{source}"\n'.encode()
    names, contents = ([part.encode() for part in parts] for parts in zip(*_HEADERS.items(), strict=True))
    program = _nvrtc_call(None, nvrtc.nvrtcCreateProgram(text, b"one_kernel.cu", len(names), contents, names))
    try:
        expression = kernel.encode()
        _nvrtc_call(program, nvrtc.nvrtcAddNameExpression(program, expression))
        options = [f"-arch={target}", *_OPTIONS, f"-I{SOURCES}", f"-I{headers}"]
        _nvrtc_call(program, nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options]))
        name = _nvrtc_call(program, nvrtc.nvrtcGetLoweredName(program, expression))
        size, get = (
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
            if target.startswith("sm_")
            else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        )
        code = b" " * _nvrtc_call(program, size(program))
        _nvrtc_call(program, get(program, code))
        return Program(bytes(name), code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@cache
def _kernel_sources() -> str:
    return sources_hash(next(product for product in PRODUCTS if product.name == "kernels"))


def _read(path: Path) -> Program | None:
    try:
        name, _, code = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return Program(name, code)


def _write(path: Path, program: Program) -> None:
    """Whole or not at all; a cache that cannot be written costs time, not the launch."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(program.name + b"\n" + program.code)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()


def _driver_call(answer: tuple[Any, ...]) -> Any:
    driver, _ = _bindings()
    code, *values = answer
    if code != driver.CUresult.CUDA_SUCCESS:
        name = str(getattr(code, "name", code))
        absent = name.endswith(("NO_DEVICE", "NOT_INITIALIZED"))
        hint = "the kernels need an NVIDIA GPU, its driver and a current context" if absent else ""
        raise PluginError(f"CUDA refused a kernel: {name}", hint=hint)
    return values[0] if values else None


def _nvrtc_call(program: Any, answer: tuple[Any, ...]) -> Any:
    _, nvrtc = _bindings()
    code, *values = answer
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b""
        if program is not None:
            log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
            nvrtc.nvrtcGetProgramLog(program, log)
        raise PluginError(f"NVRTC: {code.name}\n{log.decode(errors='replace').strip(chr(0))}".strip())
    return (values[0] if len(values) == 1 else tuple(values)) if values else None
