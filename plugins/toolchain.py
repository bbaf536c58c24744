"""Finds what a build needs: nvcc, TensorRT's headers, and the architectures of the GPUs in this machine."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from mamba_deploy.errors import PluginError
from mamba_deploy.versions import release

__all__ = [
    "ARCHITECTURES",
    "Compiler",
    "Headers",
    "Interface",
    "choose_architectures",
    "compiled_architectures",
    "find_compiler",
    "find_cuda_headers",
    "find_headers",
    "gpu_architectures",
    "machine_architecture",
    "ptx_architecture",
    "runs_on",
]

Interface = Literal["v2", "v3"]
ARCHITECTURES = ("72", "75", "80", "86", "87", "89", "90", "100", "110", "120")  # where no GPU says otherwise
# Older CUDA knows 9.0 but not all that kernels for it are written with (PTX 8.3); it has PTX of 8.9, which runs there.
_HOPPER_CUDA = (12, 3)
_ROOT = Path("/")
_OF_90A = ("rows.cu", "rows_product.cuh")  # a kernel with wgmma, by its launcher and by itself


class Compiler(NamedTuple):
    """An nvcc, and what it says of itself."""

    path: Path
    version: str
    architectures: tuple[str, ...]  # "90", ascending; without those whose kernels it does not compile
    include: Path  # CUDA's headers


class Headers(NamedTuple):
    """A folder with TensorRT's headers."""

    folder: Path
    product: Literal["TensorRT", "TensorRT-RTX"]
    version: str

    @property
    def label(self) -> str:
        return f"{self.product} {self.version}"

    @property
    def interface(self) -> Interface:
        numbers = release(self.version)
        if self.product == "TensorRT-RTX" or numbers >= (10, 0):
            return "v3"
        if (8, 5) <= numbers < (9, 0):
            return "v2"
        raise PluginError(
            f"{self.folder} holds the headers of TensorRT {self.version}: "
            "expected 8.5, 8.6, 10.0 or newer, or TensorRT-RTX"
        )


def find_compiler(cuda: Path | None = None) -> Compiler:
    """Find nvcc: in ``cuda``, or by CUDA_HOME, CUDA_PATH, PATH, in /usr/local/cuda*, or among Python's packages.

    Args:
        cuda: The folder of a CUDA toolkit, or an nvcc; then no other place counts.

    Raises:
        PluginError: There is none, or it does not run.
    """
    found = _search(
        "the CUDA compiler nvcc was not found",
        _nvcc_places(None if cuda is None else cuda.absolute()),
        lambda place: place.is_file() and os.access(place, os.X_OK),
        hint="install the CUDA toolkit (Jetson: sudo apt install nvidia-cuda-dev, or cuda-toolkit-12-6 and the like; "
        "elsewhere: https://developer.nvidia.com/cuda-downloads, or pip install nvidia-cuda-nvcc nvidia-cuda-crt "
        "nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl), then set CUDA_HOME or give --cuda DIR",
    )
    return _describe_compiler(found)


def _search(
    problem: str, places: Iterable[tuple[str, list[Path]]], fits: Callable[[Path], bool], *, hint: str, file: str = ""
) -> Path:
    """The first place that fits, absolute; ``file`` is what is looked for in it.

    Raises:
        PluginError: There is none; it names every place.
    """
    looked = []
    for label, candidates in places:
        for place in candidates:
            if fits(place):
                return place.absolute()
        looked.append(f"  {label}: " + (", ".join(f"no {place / file}" for place in candidates) or "nothing"))
    raise PluginError(f"{problem}; looked at\n" + "\n".join(looked), hint=hint)


def _nvcc_places(cuda: Path | None) -> Iterator[tuple[str, list[Path]]]:
    if cuda is not None:
        yield "--cuda", [cuda / "bin" / "nvcc", cuda / "nvcc", cuda]
        return
    yield from _below(_named_toolkits(), "bin/nvcc")
    on_path = shutil.which("nvcc")
    yield "PATH", [Path(on_path)] if on_path else []
    yield from _below([_local_toolkits(), _wheels()], "bin/nvcc")


def _below(toolkits: Iterable[tuple[str, list[Path]]], path: str) -> Iterator[tuple[str, list[Path]]]:
    for label, folders in toolkits:
        yield label, [folder / path for folder in folders]


def _named_toolkits() -> Iterator[tuple[str, list[Path]]]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        folder = os.environ.get(variable)
        yield f"${variable}", [Path(folder)] if folder else []


def _local_toolkits() -> tuple[str, list[Path]]:
    local = _ROOT / "usr/local"
    return str(local / "cuda*"), [local / "cuda", *sorted(local.glob("cuda-*"), key=_numbers, reverse=True)]


def _wheels() -> tuple[str, list[Path]]:
    """CUDA 13's have one folder, nvidia/cu13; CUDA 12's one each, nvidia/cuda_runtime and so on."""
    packages = [Path(entry) / "nvidia" for entry in sys.path if entry.endswith("-packages")]
    toolkits = [toolkit for folder in packages for toolkit in sorted(folder.glob("cu*"), key=_numbers, reverse=True)]
    return "Python's packages", toolkits


def _numbers(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder.name)]


def _describe_compiler(path: Path) -> Compiler:
    found = re.search(r"\bV(\d+\.\d+\.\d+)", _output(path, "--version"))
    if found is None:
        raise PluginError(f"{path} --version names no version: it is no nvcc")
    known = {int(a) for a in re.findall(r"\bcompute_(\d+)\b", _output(path, "--list-gpu-arch"))}
    architectures = tuple(map(str, compiled_architectures(known, release(found[1]))))
    top = re.search(r"^#\$ TOP=(.*)$", _output(path, "--dryrun", "-c", "none.cu", check=False), re.M)
    toolkit = Path(top[1]) if top else path.resolve().parent.parent  # on PATH there may be a script that calls nvcc
    return Compiler(path, found[1], architectures, (toolkit / "include").resolve())


def _output(program: Path, *arguments: str, check: bool = True) -> str:
    try:
        done = subprocess.run([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise PluginError(f"{program} does not run: {error}") from error
    if check and done.returncode:
        raise PluginError(f"{program} {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


def find_cuda_headers() -> Path:
    """Find CUDA's headers for NVRTC: among Python's packages, by CUDA_HOME or CUDA_PATH, in /usr/local/cuda*.

    Raises:
        PluginError: There are none.
    """
    return _search(
        "CUDA's headers were not found",
        _below([_wheels(), *_named_toolkits(), _local_toolkits()], "include"),
        lambda place: (place / "cuda_fp16.h").is_file(),
        file="cuda_fp16.h",
        hint="pip install nvidia-cuda-runtime, for CUDA 12 nvidia-cuda-runtime-cu12",
    )


def find_headers(include: Path | None = None) -> Headers:
    """Find TensorRT's C++ headers: in ``include``, by TENSORRT_ROOT, or where SDKs and Jetson's packages put them.

    Args:
        include: The folder of NvInfer.h, or one with an ``include`` folder; then no other place counts.

    Raises:
        PluginError: There are none.
    """
    found = _search(
        "the C++ headers of TensorRT were not found",
        _header_places(None if include is None else include.absolute()),
        lambda place: (place / "NvInfer.h").is_file() and (place / "NvInferVersion.h").is_file(),
        file="NvInfer.h",
        hint="unpack the TensorRT SDK (https://developer.nvidia.com/tensorrt) and set TENSORRT_ROOT or give "
        "--tensorrt-include DIR; Jetson, Debian: sudo apt install libnvinfer-dev; pip's wheels carry no headers. "
        "The kernels alone need none: --kernels-only",
    )
    return _describe_headers(found)


def _header_places(include: Path | None) -> Iterator[tuple[str, list[Path]]]:
    if include is not None:
        yield "--tensorrt-include", [include, include / "include"]
        return
    root = os.environ.get("TENSORRT_ROOT")
    yield "$TENSORRT_ROOT", [Path(root) / "include", Path(root)] if root else []
    machines = (platform.machine(), "x86_64", "aarch64")
    triplets = dict.fromkeys(f"{machine}-linux-gnu" for machine in machines)
    yield "packages", [_ROOT / "usr/include" / triplet for triplet in triplets] + [_ROOT / "usr/include"]
    patterns = ("usr/local/TensorRT*", "usr/local/tensorrt*", "opt/TensorRT*", "opt/tensorrt*", "usr/src/tensorrt")
    folders = [folder for pattern in patterns for folder in sorted(_ROOT.glob(pattern), reverse=True)]
    yield ", ".join(str(_ROOT / pattern) for pattern in patterns), [folder / "include" for folder in folders]


def _describe_headers(folder: Path) -> Headers:
    text = (folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    macros: dict[str, str] = dict(re.findall(r"^\s*#define\s+(\w+)\s+(\w+)", text, re.M))
    for product, names in (
        ("TensorRT-RTX", ("TRT_MAJOR_RTX", "TRT_MINOR_RTX", "TRT_PATCH_RTX")),
        ("TensorRT", ("NV_TENSORRT_MAJOR", "NV_TENSORRT_MINOR", "NV_TENSORRT_PATCH")),
    ):
        values = [macros.get(macros.get(name, ""), macros.get(name, "")) for name in names]  # may name another macro
        if all(value.isdigit() for value in values):
            return Headers(folder, product, ".".join(values))  # type: ignore[arg-type]
    raise PluginError(f"{folder / 'NvInferVersion.h'} names no version: expected #define NV_TENSORRT_MAJOR and so on")


# --- architectures -----------------------------------------------------------------------------------------------


def gpu_architectures() -> tuple[str, ...]:
    """Of the GPUs that the driver shows in this machine, ascending; empty without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, value, found = ctypes.c_int(), ctypes.c_int(), set()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    for device in range(count.value):
        numbers = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        found.add(f"{numbers[0]}{numbers[1]}")
    return tuple(sorted(found, key=int))


def compiled_architectures(known: Iterable[int], cuda: tuple[int, ...]) -> tuple[int, ...]:
    """Of those that a compiler of a version of CUDA knows the ones whose kernels it compiles, ascending."""
    return tuple(sorted(a for a in known if a != 90 or cuda >= _HOPPER_CUDA))


def _default_architectures(compiler: Compiler) -> tuple[str, ...]:
    """Those of this machine's GPUs, or without a GPU all of ours that the compiler knows.

    A GPU newer than the compiler gets the architecture before it, which it runs from PTX if need be.
    """
    gpus = gpu_architectures()
    if not gpus:
        return tuple(a for a in ARCHITECTURES if a in compiler.architectures) or compiler.architectures[-1:]
    chosen = set()
    for gpu in gpus:
        fitting = [a for a in compiler.architectures if int(a) <= int(gpu)]
        if not fitting:
            raise PluginError(
                f"this machine's GPU is sm_{gpu}: nvcc {compiler.version} ({compiler.path}) compiles for "
                f"sm_{compiler.architectures[0]} and newer",
                hint="install an older CUDA toolkit and give --cuda DIR",
            )
        chosen.add(fitting[-1])
    return tuple(sorted(chosen, key=int))


def choose_architectures(given: Sequence[str], compiler: Compiler) -> tuple[str, ...]:
    """``sm_90``, ``90``, ``9.0`` or ``90a`` as "90" or "90a"; the default where nothing was given."""
    if not given:
        return _default_architectures(compiler)
    found = set()
    for name in given:
        match = re.fullmatch(r"(?:sm_|compute_)?(\d+)\.?(\d)([af]?)", name)
        number = match[1] + match[2] if match else ""
        if match is None or number not in compiler.architectures:
            known = ", ".join(f"sm_{a}" for a in compiler.architectures)
            raise PluginError(
                f"nvcc {compiler.version} ({compiler.path}) knows no architecture {name!r}: expected {known}",
                hint="the kernels for sm_90 need CUDA {}.{} or newer".format(*_HOPPER_CUDA) if number == "90" else "",
            )
        found.add(number + match[3])
    return tuple(sorted(found, key=lambda a: (int(a.rstrip("af")), a)))


def machine_architecture(source: str, architecture: str) -> str:
    """What machine code of a file is made for: 90 lacks wgmma, which 90a has."""
    return "90a" if architecture == "90" and source in _OF_90A else architecture


def ptx_architecture(architectures: Sequence[str]) -> str | None:
    """The architecture whose PTX goes along for newer GPUs; PTX of 90a would run nowhere else."""
    return next((a for a in reversed(architectures) if a.isdigit()), None)


def runs_on(architectures: Sequence[str], gpu: str) -> bool:
    """Whether a GPU runs what was compiled for some architectures: as it is, or from PTX."""
    machine_code = any(a.rstrip("af")[:-1] == gpu[:-1] and int(a.rstrip("af")) <= int(gpu) for a in architectures)
    ptx = ptx_architecture(architectures)
    return machine_code or (ptx is not None and int(ptx) <= int(gpu))
