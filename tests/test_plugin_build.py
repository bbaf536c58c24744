"""What compiles the kernels and plugins: finding, keying, caching, locking and failing, with an nvcc that is a script.

At the end the real sources through NVRTC, where there is one; test_launches.py has them through nvcc.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quick_compile
from click.testing import CliRunner

from mamba_deploy import cli
from mamba_deploy.errors import PluginError
from mamba_deploy.plugins import build, nvrtc, toolchain

ROOT = Path(__file__).resolve().parents[1]
KERNELS = (
    "causal_conv1d.cu",
    "last_token.cu",
    "model.cu",
    "prompt.cu",
    "rows.cu",
    "sample_token.cu",
    "selective_scan.cu",
    "ssd_scan.cu",
    "step.cu",
    "token.cu",
)

# An nvcc that writes into its log what it was asked, and into each output what went in: in sh, which starts at once.
NVCC = """#!/bin/sh
folder='{top}'
case " $* " in
*" --version "*)
    echo 'nvcc: NVIDIA (R) Cuda compiler driver'
    echo 'Cuda compilation tools, release {short}, V{version}' ;;
*" --list-gpu-arch "*)
    for a in {architectures}; do echo "compute_$a"; done ;;
*" --dryrun "*)
    echo '#$ _HERE_=x'
    echo "#$ TOP=$folder" ;;
*)
    echo "$*" >> "$folder/log"
    words="$*"
    while [ "$1" != -o ]; do shift; done
    if [ -e "$folder/${{2##*/}}" ]; then
        '{python}' -IS -c "import os, pathlib, sys, time
exec(pathlib.Path(sys.argv[1]).read_text())" "$folder/${{2##*/}}" || exit
    fi
    printf %s "made by nvcc {version}: $words" > "$2" ;;
esac
"""


class Toolkit:
    """A folder with the nvcc above."""

    def __init__(self, folder: Path, version: str = "12.6.85", architectures: str = "80 86 87 90") -> None:
        self.folder = folder
        self.nvcc = folder / "bin" / "nvcc"
        self.nvcc.parent.mkdir(parents=True)
        (folder / "include").mkdir()
        self.install(version, architectures)

    def install(self, version: str = "12.6.85", architectures: str = "80 86 87 90") -> None:
        short = version.rpartition(".")[0]
        values = {"python": sys.executable, "short": short, "version": version, "top": self.folder}
        self.nvcc.write_text(NVCC.format(architectures=architectures, **values), encoding="utf-8")
        self.nvcc.chmod(0o755)

    def when_writing(self, output: str, program: str) -> None:
        """Run a piece of Python before an output is written."""
        (self.folder / output).write_text(program, encoding="utf-8")

    @property
    def calls(self) -> list[list[str]]:
        log = self.folder / "log"
        return [shlex.split(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []

    @property
    def compiled(self) -> list[str]:
        return sorted(Path(call[-1]).name for call in self.calls if "-c" in call)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A machine with nothing on it: no GPU, no nvcc, no headers, an empty cache. Slow tests run on the real one."""
    if "slow" in request.keywords:
        return
    monkeypatch.setenv("MAMBA_DEPLOY_CACHE", str(tmp_path / "cache"))
    for variable in ("CUDA_HOME", "CUDA_PATH", "TENSORRT_ROOT", *build._ENVIRONMENT):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "root").mkdir()
    (tmp_path / "path").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(toolchain, "_ROOT", tmp_path / "root")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.endswith("-packages")])
    set_gpus(monkeypatch)


def set_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: str) -> None:
    for module in (build, toolchain):
        monkeypatch.setattr(module, "gpu_architectures", lambda: gpus)


@pytest.fixture
def toolkit(tmp_path: Path) -> Toolkit:
    return Toolkit(tmp_path / "cuda")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    plugins = {source for product in build.PRODUCTS for library in product.libraries for source in library.sources}
    for name in (*KERNELS, *plugins, "mamba_kernels.h", "common.cuh", "plugin_common.h", "kernels.py"):
        (folder / name).write_text(f"{name}\n", encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


def headers(folder: Path, *version: int, rtx: bool = False, through_macros: bool = False) -> Path:
    """A folder of TensorRT headers; ``through_macros`` as they are written from 10.13 on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "NvInfer.h").touch()
    lines = []
    for part, number in zip(("MAJOR", "MINOR", "PATCH"), version, strict=True):
        if rtx:
            lines += [f"#define TRT_{part}_RTX {number} //!< x", f"#define NV_TENSORRT_{part} TRT_{part}_RTX"]
        elif through_macros:
            lines += [f"#define TRT_{part}_ENTERPRISE {number}", f"#define NV_TENSORRT_{part} TRT_{part}_ENTERPRISE"]
        else:
            lines += [f"#define NV_TENSORRT_{part} {number} //!< TensorRT version."]
    (folder / "NvInferVersion.h").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def cache_content(tmp_path: Path) -> set[str]:
    folder = tmp_path / "cache" / "plugins"
    return {path.name for path in folder.iterdir()} - {"lock"} if folder.exists() else set()


# --- nvcc --------------------------------------------------------------------------------------------------------


def test_compiler_tells_version_architectures_and_headers(toolkit):
    found = toolchain.find_compiler(toolkit.folder)
    assert found == (toolkit.nvcc, "12.6.85", ("80", "86", "87", "90"), toolkit.folder / "include")


@pytest.mark.parametrize("place", ["CUDA_HOME", "CUDA_PATH", "PATH", "cuda", "cuda-12.6", "packages"])
def test_compiler_is_found_in_every_usual_place(tmp_path, monkeypatch, place):
    if place in ("CUDA_HOME", "CUDA_PATH"):
        found = Toolkit(tmp_path / "there")
        monkeypatch.setenv(place, str(found.folder))
    elif place == "PATH":
        found = Toolkit(tmp_path / "there")
        monkeypatch.setenv("PATH", str(found.nvcc.parent))
    elif place == "packages":
        found = Toolkit(tmp_path / "site-packages" / "nvidia" / "cu13")
        monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    else:
        found = Toolkit(tmp_path / "root" / "usr" / "local" / place)
    assert toolchain.find_compiler().path == found.nvcc


def test_compiler_of_the_highest_version_where_none_is_the_default(tmp_path):
    for name in ("cuda-9.2", "cuda-12.10", "cuda-12.6"):
        Toolkit(tmp_path / "root" / "usr" / "local" / name)
    assert "cuda-12.10" in str(toolchain.find_compiler().path)
    Toolkit(tmp_path / "root" / "usr" / "local" / "cuda")
    assert toolchain.find_compiler().path.parts[-3] == "cuda"


def test_compiler_that_was_asked_for_goes_before_all_others(tmp_path, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit.folder))
    other = Toolkit(tmp_path / "other")
    assert toolchain.find_compiler(other.folder).path == other.nvcc
    assert toolchain.find_compiler(other.nvcc).path == other.nvcc
    with pytest.raises(PluginError, match=r"--cuda: no .*/missing/bin/nvcc, no .*/missing/nvcc, no .*/missing$"):
        toolchain.find_compiler(tmp_path / "missing")


def test_script_on_the_path_that_calls_nvcc_still_gives_cudas_headers(tmp_path, toolkit, monkeypatch):
    script = tmp_path / "path" / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {toolkit.nvcc} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    found = toolchain.find_compiler()
    assert (found.path, found.include) == (script, toolkit.folder / "include")


def test_missing_compiler_names_every_place(tmp_path, toolkit, monkeypatch):
    toolkit.nvcc.chmod(0o644)  # there, but not to be run
    monkeypatch.setenv("CUDA_HOME", str(toolkit.folder))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    local = tmp_path / "root" / "usr" / "local"
    with pytest.raises(PluginError) as caught:
        toolchain.find_compiler()
    assert str(caught.value).splitlines() == [
        "the CUDA compiler nvcc was not found; looked at",
        f"  $CUDA_HOME: no {toolkit.nvcc}",
        "  $CUDA_PATH: nothing",
        "  PATH: nothing",
        f"  {local}/cuda*: no {local}/cuda/bin/nvcc",
        "  Python's packages: nothing",
    ]
    for way in ("--cuda DIR", "CUDA_HOME", "apt install", "pip install nvidia-cuda-nvcc"):
        assert way in caught.value.hint


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("#!/bin/sh\necho hello\n", r"/bin/nvcc --version names no version: it is no nvcc$"),
        ("#!/bin/sh\necho broken >&2; exit 3\n", r"/bin/nvcc --version ended with 3:\nbroken\n$"),
        ("#!/no/interpreter\n", r"/bin/nvcc does not run: "),
    ],
)
def test_compiler_that_does_not_work(toolkit, script, expected):
    toolkit.nvcc.write_text(script, encoding="utf-8")
    with pytest.raises(PluginError, match=expected):
        toolchain.find_compiler(toolkit.folder)


# --- headers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"version": (8, 5, 2)}, ("TensorRT", "8.5.2", "v2")),
        ({"version": (8, 6, 0)}, ("TensorRT", "8.6.0", "v2")),
        ({"version": (10, 0, 1)}, ("TensorRT", "10.0.1", "v3")),
        ({"version": (10, 14, 1), "through_macros": True}, ("TensorRT", "10.14.1", "v3")),
        ({"version": (11, 4, 1), "through_macros": True}, ("TensorRT", "11.4.1", "v3")),
        ({"version": (1, 7, 1), "rtx": True}, ("TensorRT-RTX", "1.7.1", "v3")),
    ],
)
def test_headers_tell_product_version_and_interface(tmp_path, options, expected):
    options = dict(options)
    headers(tmp_path / "sdk" / "include", *options.pop("version"), **options)
    for given in (tmp_path / "sdk", tmp_path / "sdk" / "include"):
        found = toolchain.find_headers(given)
        assert (found.product, found.version, found.interface) == expected
        assert found.folder == tmp_path / "sdk" / "include"


@pytest.mark.parametrize("version", [(7, 2, 3), (8, 4, 3), (9, 3, 0)])
def test_headers_of_a_tensorrt_we_have_no_plugin_for(tmp_path, version):
    found = toolchain.find_headers(headers(tmp_path / "sdk", *version))
    shown = ".".join(map(str, version))
    with pytest.raises(PluginError, match=rf"the headers of TensorRT {shown}: expected 8\.5, 8\.6, 10\.0 or newer"):
        _ = found.interface


def test_headers_without_a_version(tmp_path):
    headers(tmp_path / "sdk", 10, 3, 0)
    (tmp_path / "sdk" / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR\n", encoding="utf-8")
    with pytest.raises(PluginError, match=r"NvInferVersion\.h names no version"):
        toolchain.find_headers(tmp_path / "sdk")


@pytest.mark.parametrize(
    "place",
    [
        "usr/include/x86_64-linux-gnu",
        "usr/include/aarch64-linux-gnu",
        "usr/include",
        "usr/local/TensorRT-10.3.0.26/include",
        "usr/local/tensorrt/include",
        "opt/tensorrt/include",
        "usr/src/tensorrt/include",
    ],
)
def test_headers_are_found_in_every_usual_place(tmp_path, place):
    folder = headers(tmp_path / "root" / place, 10, 3, 0)
    assert toolchain.find_headers().folder == folder


def test_headers_of_the_variable_go_first_and_those_asked_for_before_them(tmp_path, monkeypatch):
    headers(tmp_path / "root/usr/include", 8, 6, 0)
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "sdk"))
    headers(tmp_path / "sdk/include", 10, 3, 0)
    assert toolchain.find_headers().version == "10.3.0"
    assert toolchain.find_headers(headers(tmp_path / "asked", 10, 7, 0)).version == "10.7.0"
    with pytest.raises(
        PluginError, match=r"--tensorrt-include: no .*/nowhere/NvInfer\.h, no .*/nowhere/include/NvInfer"
    ):
        toolchain.find_headers(tmp_path / "nowhere")


def test_missing_headers_name_every_place(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "sdk"))
    with pytest.raises(PluginError) as caught:
        toolchain.find_headers()
    for place in (
        "sdk/include/NvInfer.h",
        "sdk/NvInfer.h",
        "aarch64-linux-gnu/NvInfer.h",
        "usr/local/TensorRT*",
        "opt/",
    ):
        assert place in str(caught.value)
    for way in ("TENSORRT_ROOT", "--tensorrt-include DIR", "libnvinfer-dev", "--kernels-only"):
        assert way in caught.value.hint


# --- architectures -----------------------------------------------------------------------------------------------


def compiler(architectures: str) -> toolchain.Compiler:
    return toolchain.Compiler(Path("nvcc"), "12.6.85", tuple(architectures.split()), Path("include"))


@pytest.mark.parametrize(
    ("gpus", "known", "expected"),
    [
        ([], "50 72 75 80 86 87 89 90 91", ("72", "75", "80", "86", "87", "89", "90")),
        ([], "130 131", ("131",)),
        (["90"], "80 90 100", ("90",)),
        (["75", "90"], "75 80 90 100", ("75", "90")),
        (["121"], "90 100 120", ("120",)),  # its own machine code runs there
        (["110"], "80 90", ("90",)),  # from PTX
        (["87"], "80 86 90", ("86",)),
    ],
)
def test_architectures_are_those_of_the_gpus_or_all_usual_ones(monkeypatch, gpus, known, expected):
    set_gpus(monkeypatch, *gpus)
    assert toolchain.choose_architectures([], compiler(known)) == expected
    assert all(toolchain.runs_on(expected, gpu) for gpu in gpus)


def test_gpu_older_than_the_compiler(monkeypatch):
    set_gpus(monkeypatch, "70")
    with pytest.raises(PluginError, match=r"this machine's GPU is sm_70: nvcc 12\.6\.85 \(nvcc\) compiles for sm_75"):
        toolchain.choose_architectures([], compiler("75 80"))


@pytest.mark.parametrize("given", [["sm_90", "sm_87"], ["90", "87"], ["9.0", "8.7"], ["compute_87", "sm_90", "sm_90"]])
def test_architectures_in_every_spelling(given):
    assert toolchain.choose_architectures(given, compiler("80 87 90")) == ("87", "90")


def test_architecture_with_a_letter_keeps_it():
    assert toolchain.choose_architectures(["sm_120f", "sm_90a", "90"], compiler("80 90 120")) == ("90", "90a", "120f")
    assert toolchain.ptx_architecture(["90", "90a", "120f"]) == "90"
    assert toolchain.ptx_architecture(["90a"]) is None


@pytest.mark.parametrize("wrong", ["sm_91", "hopper", "", "sm_9", "sm_90b"])
def test_architecture_the_compiler_does_not_know(wrong):
    with pytest.raises(PluginError) as caught:
        toolchain.choose_architectures([wrong], compiler("80 90"))
    assert str(caught.value) == f"nvcc 12.6.85 (nvcc) knows no architecture {wrong!r}: expected sm_80, sm_90"


@pytest.mark.parametrize(
    ("architectures", "gpu", "expected"),
    [
        (("80",), "86", True),
        (("86",), "80", False),
        (("80",), "90", True),  # PTX
        (("80", "90"), "87", True),
        (("90a",), "90", True),
        (("90a",), "100", False),
        (("100", "120"), "110", False),
    ],
)
def test_what_runs_on_a_gpu(architectures, gpu, expected):
    assert toolchain.runs_on(architectures, gpu) is expected


def test_gpus_are_those_the_driver_shows(tmp_path, monkeypatch):
    gcc = shutil.which("gcc", path="/usr/bin:/bin:/usr/local/bin")
    if gcc is None:
        pytest.skip("no gcc to compile a stub of the driver")
    source = tmp_path / "driver.c"
    source.write_text(
        "int answer;\n"
        "int cuInit(unsigned flags) { return flags ? 1 : answer; }\n"
        "int cuDeviceGetCount(int* count) { *count = 3; return 0; }\n"
        "int cuDeviceGetAttribute(int* value, int which, int device) {\n"
        "    static int const of[3][2] = {{12, 0}, {8, 7}, {12, 0}};\n"
        "    *value = of[device][which - 75];\n    return 0;\n}\n",
        encoding="utf-8",
    )
    subprocess.run(
        [gcc, "-shared", "-fPIC", "-o", tmp_path / "driver.so", source], check=True, env={"PATH": "/usr/bin:/bin"}
    )
    monkeypatch.undo()
    stub = ctypes.CDLL(str(tmp_path / "driver.so"))
    monkeypatch.setattr(toolchain.ctypes, "CDLL", lambda name: stub)
    assert toolchain.gpu_architectures() == ("87", "120")
    ctypes.c_int.in_dll(stub, "answer").value = 100  # CUDA_ERROR_NO_DEVICE
    assert toolchain.gpu_architectures() == ()


def test_no_driver_no_gpus(monkeypatch):
    monkeypatch.undo()

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(toolchain.ctypes, "CDLL", missing)
    assert toolchain.gpu_architectures() == ()


# --- what is compiled --------------------------------------------------------------------------------------------


def test_kernels_are_compiled_for_each_architecture_and_linked(toolkit, sources):
    made = build.build("kernels", cuda=toolkit.folder, architectures=["sm_80", "sm_90"])
    assert toolkit.compiled == sorted(KERNELS)
    for call in toolkit.calls[:-1]:
        hopper = "90a" if call[-1].endswith("/rows.cu") else "90"
        assert [a for a in call if a.startswith("-gencode")] == [
            "-gencode=arch=compute_80,code=sm_80",
            f"-gencode=arch=compute_{hopper},code=sm_{hopper}",
            "-gencode=arch=compute_90,code=compute_90",
        ]
        assert {"-O3", "-std=c++17", "-Xcompiler=-fPIC,-Wall,-Wextra"} <= set(call)
        assert f"-isystem={toolkit.folder / 'include'}" in call
    link = toolkit.calls[-1]
    assert link[-len(KERNELS) :] == [f"{name}.o" for name in KERNELS]
    assert "-shared" in link
    assert made.path.read_text(encoding="utf-8").startswith("made by nvcc 12.6.85: -shared")
    assert made.path.name == "libmamba_kernels.so"
    assert made.path.is_relative_to(build.cache_folder())


@pytest.mark.parametrize(
    ("version", "given", "expected"),
    [
        ("12.3.107", ["sm_90"], ["90a,code=sm_90a", "90,code=compute_90"]),
        ("12.6.85", ["sm_90", "sm_90a"], ["90a,code=sm_90a", "90,code=compute_90"]),
        ("12.6.85", ["sm_90a"], ["90a,code=sm_90a"]),
        ("12.6.85", ["sm_87"], ["87,code=sm_87", "87,code=compute_87"]),
    ],
)
def test_what_wgmma_is_in_is_compiled_for_90a(toolkit, sources, version, given, expected):
    toolkit.install(version)
    made = build.build("kernels", cuda=toolkit.folder, architectures=given)
    assert made.architectures == tuple(name.removeprefix("sm_") for name in given)
    (call,) = (call for call in toolkit.calls if call[-1].endswith("/rows.cu"))
    assert [a for a in call if a.startswith("-gencode")] == [f"-gencode=arch=compute_{target}" for target in expected]


def test_files_with_wgmma_are_those_compiled_for_90a():
    files = [*build.SOURCES.glob("*.cu"), *build.SOURCES.glob("*.cuh")]
    of_wgmma = {file.name for file in files if "wgmma.mma_async" in file.read_text(encoding="utf-8")}
    launchers = {file.name for file in files for name in of_wgmma if f'#include "{name}"' in file.read_text("utf-8")}
    assert {file.name for file in files if toolchain.machine_architecture(file.name, "90") == "90a"} == (
        of_wgmma | launchers
    )


@pytest.mark.parametrize("version", ["11.8.89", "12.2.140"])
def test_older_cuda_compiles_for_hopper_from_what_came_before(toolkit, sources, monkeypatch, version):
    toolkit.install(version, "80 86 89 90")
    monkeypatch.setattr(toolchain, "gpu_architectures", lambda: ("90",))
    made = build.build("kernels", cuda=toolkit.folder)
    assert made.architectures == ("89",)
    assert all("-gencode=arch=compute_89,code=compute_89" in call for call in toolkit.calls[:-1])
    with pytest.raises(PluginError) as caught:
        build.build("kernels", cuda=toolkit.folder, architectures=["sm_90"])
    assert str(caught.value).endswith("knows no architecture 'sm_90': expected sm_80, sm_86, sm_89")
    assert caught.value.hint == "the kernels for sm_90 need CUDA 12.3 or newer"


def test_without_a_gpu_all_usual_architectures_are_compiled(toolkit, sources):
    assert build.build("kernels", cuda=toolkit.folder).architectures == ("80", "86", "87", "90")


@pytest.mark.parametrize(
    ("version", "source"), [((8, 6, 0), "plugin_v2.cpp"), ((10, 3, 0), "plugin_v3.cpp"), ((11, 1, 0), "plugin_v3.cpp")]
)
def test_plugin_is_that_of_the_headers(tmp_path, toolkit, sources, version, source):
    sdk = headers(tmp_path / "sdk", *version)
    made = build.build("plugin", cuda=toolkit.folder, include=sdk)
    assert toolkit.compiled == sorted([*KERNELS, source, "plugin_register.cpp"])
    assert made.tensorrt == f"TensorRT {'.'.join(map(str, version))}"
    assert made.libraries == ("libmamba_plugin.so", "libmamba_plugin_register.so")
    assert all((made.folder / library).is_file() for library in made.libraries)
    calls = {call[-1]: call for call in toolkit.calls}
    assert f"-isystem={sdk}" in calls[str(sources / source)]
    assert not any(a.startswith("-gencode") for a in calls[str(sources / source)])
    first, second = toolkit.calls[-2:]
    assert first[-len(KERNELS) - 1 :] == [*(f"{name}.o" for name in KERNELS), f"{source}.o"]
    assert second[-4:] == ["plugin_register.cpp.o", "-cudart=none", "libmamba_plugin.so", "-Xlinker=@rpath"]


def test_folders_of_the_compiler_are_not_named_again(tmp_path, toolkit, sources, monkeypatch):
    """GCC would look for its own headers in the wrong order."""
    sdk = headers(tmp_path / "sdk", 10, 3, 0)
    monkeypatch.setattr(build, "_DEFAULT_INCLUDES", (str(sdk),))
    build.build("plugin", cuda=toolkit.folder, include=sdk)
    assert not any(str(sdk) in argument for call in toolkit.calls for argument in call)


def test_folders_may_be_relative(tmp_path, toolkit, sources, monkeypatch):
    monkeypatch.chdir(tmp_path)
    headers(tmp_path / "sdk", 10, 3, 0)
    build.build("plugin", cuda=Path("cuda"), include=Path("sdk"))
    assert any(f"-isystem={tmp_path / 'sdk'}" in call for call in toolkit.calls)
    monkeypatch.setenv("CUDA_HOME", "cuda")
    monkeypatch.setenv("TENSORRT_ROOT", "sdk")
    assert toolchain.find_compiler().path == toolkit.nvcc
    assert toolchain.find_headers().folder == tmp_path / "sdk"


def test_missing_sources_are_named(toolkit, sources):
    (sources / "ssd_scan.cu").unlink()
    with pytest.raises(PluginError, match=r"/sources lacks ssd_scan\.cu$"):
        build.build("kernels", cuda=toolkit.folder)


# --- cache -------------------------------------------------------------------------------------------------------


def test_second_build_compiles_nothing(toolkit, sources):
    first = build.build("kernels", cuda=toolkit.folder)
    calls = len(toolkit.calls)
    assert build.build("kernels", cuda=toolkit.folder) == first
    assert len(toolkit.calls) == calls


def change_source(toolkit: Toolkit, sources: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (sources / "ssd_scan.cu").write_text("other\n", encoding="utf-8")
    return {}


def change_header(toolkit: Toolkit, sources: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (sources / "new.cuh").write_text("new\n", encoding="utf-8")
    return {}


def change_compiler(toolkit: Toolkit, sources: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    toolkit.install("12.8.61")
    return {}


def change_flags(toolkit: Toolkit, sources: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    return {}


def change_environment(toolkit: Toolkit, sources: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("NVCC_CCBIN", "/usr/bin/g++-11")
    return {}


def change_architectures(toolkit: Toolkit, sources: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"architectures": ["sm_90"]}


def change_machine(toolkit: Toolkit, sources: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    return {}


def change_tensorrt(toolkit: Toolkit, sources: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"include": headers(sources.parent / "newer", 10, 4, 0)}


def change_plugin_header(toolkit: Toolkit, sources: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (sources / "plugin_common.h").write_text("other\n", encoding="utf-8")
    return {}


CHANGES: list[Callable[..., dict[str, Any]]] = [
    change_source,
    change_header,
    change_compiler,
    change_flags,
    change_environment,
    change_architectures,
    change_machine,
]


@pytest.mark.parametrize("change", [*CHANGES, change_tensorrt, change_plugin_header], ids=lambda f: f.__name__[7:])
def test_plugin_is_built_again_after_a_change(toolkit, sources, monkeypatch, tmp_path, change):
    options: dict[str, Any] = {"cuda": toolkit.folder, "include": headers(tmp_path / "sdk", 10, 3, 0)}
    first = build.build("plugin", **options)
    second = build.build("plugin", **{**options, **change(toolkit, sources, monkeypatch)})
    assert second.folder != first.folder
    assert first.path.exists()


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[7:])
def test_kernels_are_built_again_after_a_change(toolkit, sources, monkeypatch, change):
    first = build.build("kernels", cuda=toolkit.folder)
    second = build.build("kernels", cuda=toolkit.folder, **change(toolkit, sources, monkeypatch))
    assert second.folder != first.folder


@pytest.mark.parametrize("name", ["kernels.py", "plugin_common.h", "plugin_v3.cpp"])
def test_kernels_stay_after_a_change_of_what_is_not_in_them(toolkit, sources, name):
    first = build.build("kernels", cuda=toolkit.folder)
    (sources / name).write_text("other\n", encoding="utf-8")
    assert build.build("kernels", cuda=toolkit.folder).folder == first.folder


def test_force_compiles_again_and_replaces(toolkit, sources, tmp_path):
    first = build.build("kernels", cuda=toolkit.folder)
    first.path.write_text("stale", encoding="utf-8")
    second = build.build("kernels", cuda=toolkit.folder, force=True)
    assert second.folder == first.folder
    assert second.path.read_text(encoding="utf-8") != "stale"
    assert len(toolkit.compiled) == 2 * len(KERNELS)
    assert cache_content(tmp_path) == {first.folder.name}


@pytest.mark.parametrize("damage", ["library", "record"])
def test_damaged_entry_is_built_again(toolkit, sources, damage):
    first = build.build("kernels", cuda=toolkit.folder)
    if damage == "library":
        first.path.unlink()
    else:
        (first.folder / "build.json").write_text("{", encoding="utf-8")
    assert build.built() == []
    assert build.build("kernels", cuda=toolkit.folder).folder == first.folder
    assert first.path.is_file()
    assert len(build.built()) == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MAMBA_DEPLOY_CACHE": "/own"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/mamba-deploy"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/mamba-deploy"),  # to be ignored, says the specification
        ({}, "/home/me/.cache/mamba-deploy"),
    ],
)
def test_where_the_cache_is(monkeypatch, variables, expected):
    for name in ("MAMBA_DEPLOY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert build.cache_folder() == Path(expected)


def test_cache_that_cannot_be_written(toolkit, sources, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAMBA_DEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(PluginError, match=r"the cache .*/file/plugins cannot be written") as caught:
        build.build("kernels", cuda=toolkit.folder)
    assert "MAMBA_DEPLOY_CACHE" in caught.value.hint


def test_current_is_what_fits_sources_and_machine(toolkit, sources, monkeypatch):
    assert build.current("kernels") is None
    made = build.build("kernels", cuda=toolkit.folder, architectures=["sm_87"])
    assert build.current("kernels") == made
    set_gpus(monkeypatch, "87")
    assert build.current("kernels") == made
    set_gpus(monkeypatch, "80")
    assert build.current("kernels") is None
    set_gpus(monkeypatch)
    with monkeypatch.context() as other:
        other.setattr(platform, "machine", lambda: "riscv64")
        assert build.current("kernels") is None
    (sources / "ssd_scan.cu").write_text("other\n", encoding="utf-8")
    assert build.current("kernels") is None
    assert build.built() == [made]


def test_kernels_library_needs_no_compiler_once_it_is_built(toolkit, sources):
    made = build.build("kernels", cuda=toolkit.folder)
    shutil.rmtree(toolkit.folder)
    assert build.kernels_library() == made.path
    (sources / "ssd_scan.cu").write_text("other\n", encoding="utf-8")
    with pytest.raises(PluginError, match="nvcc was not found"):
        build.kernels_library()


def test_kernels_library_builds_what_is_missing(toolkit, sources, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit.folder))
    assert build.kernels_library().is_file()
    assert toolkit.compiled == sorted(KERNELS)


def test_plugin_library_serves_as_kernels_library(toolkit, sources, tmp_path):
    made = build.build("plugin", cuda=toolkit.folder, include=headers(tmp_path / "sdk", 10, 3, 0))
    assert build.kernels_library() == build.library_path("plugin") == made.path
    assert build.library_path("register") == made.folder / "libmamba_plugin_register.so"


@pytest.mark.parametrize(
    ("built_for", "wanted", "fits"),
    [
        ((10, 3, 0), "TensorRT 10.7.0", True),
        ((10, 3, 0), "", True),
        ((10, 3, 0), "TensorRT-RTX 1.7", True),
        ((10, 3, 0), "TensorRT 11.0", False),
        ((10, 3, 0), "TensorRT 8.6.0", False),
        ((8, 6, 0), "TensorRT 8.5.2", True),
        ((8, 6, 0), "TensorRT-RTX 1.7", False),
        ((8, 6, 0), "TensorRT 10.3", False),
    ],
)
def test_plugin_library_for_a_tensorrt(toolkit, sources, tmp_path, monkeypatch, built_for, wanted, fits):
    monkeypatch.setenv("CUDA_HOME", str(toolkit.folder))
    monkeypatch.setenv("TENSORRT_ROOT", str(headers(tmp_path / "sdk", *built_for)))
    if fits:
        path = build.plugin_library(wanted)
        assert path.name == "libmamba_plugin.so"
        assert build.plugin_library(wanted) == path
        assert len(toolkit.compiled) == len(KERNELS) + 2
    else:
        with pytest.raises(PluginError, match=f"no plugin library for {wanted} is built, and the headers in") as caught:
            build.plugin_library(wanted)
        assert "--tensorrt-include" in caught.value.hint
        assert toolkit.compiled == []


# --- failures ----------------------------------------------------------------------------------------------------


def test_error_of_the_compiler_is_shown_and_nothing_stays(toolkit, sources, tmp_path):
    lines = ["note: seen before", *(f"ssd_scan.cu({i}): error: number {i}" for i in range(1, 40))]
    toolkit.when_writing("ssd_scan.cu.o", f"print({chr(10).join(lines)!r}); sys.exit(2)")
    with pytest.raises(PluginError) as caught:
        build.build("kernels", cuda=toolkit.folder)
    shown = str(caught.value).splitlines()
    assert shown[0] == "ssd_scan.cu does not compile (exit status 2):"
    assert shown[1:21] == lines[1:21]  # the first errors, not what was before, nor all that follow
    assert shown[21].startswith(f"with {toolkit.nvcc} -O3 -std=c++17")
    assert shown[21].endswith(str(sources / "ssd_scan.cu"))
    assert cache_content(tmp_path) == set()


def test_end_of_the_output_is_shown_where_nothing_is_called_an_error(toolkit, sources):
    program = "for i in range(50): print('line', i, flush=True)\nos.kill(os.getppid(), 9)"  # nvcc
    toolkit.when_writing("libmamba_kernels.so", program)
    with pytest.raises(PluginError) as caught:
        build.build("kernels", cuda=toolkit.folder)
    shown = str(caught.value).splitlines()
    assert shown[0] == "libmamba_kernels.so does not compile (exit status -9):"
    assert shown[1:21] == [f"line {i}" for i in range(30, 50)]
    assert "memory" in caught.value.hint


def test_failure_ends_what_still_compiles(toolkit, sources, tmp_path):
    started = tmp_path / "started"
    toolkit.when_writing("causal_conv1d.cu.o", f"pathlib.Path({str(started)!r}).touch(); time.sleep(600)")
    wait = f"while not os.path.exists({str(started)!r}): time.sleep(0.01)"
    toolkit.when_writing("last_token.cu.o", f"{wait}\nprint('fatal error: x'); sys.exit(1)")
    start = time.monotonic()
    with pytest.raises(PluginError, match=r"last_token\.cu does not compile"):
        build.build("kernels", cuda=toolkit.folder)
    assert time.monotonic() - start < 300
    assert cache_content(tmp_path) == set()


def test_progress_and_warnings_are_told(toolkit, sources):
    toolkit.when_writing("ssd_scan.cu.o", "print('ssd_scan.cu(3): warning: unused')")
    told: list[str] = []
    build.build("kernels", cuda=toolkit.folder, architectures=["sm_90"], say=told.append)
    assert told[0] == "compiling 10 files for sm_90 with nvcc 12.6.85"
    assert sorted(told[1:11]) == [
        "causal_conv1d.cu: done",
        "last_token.cu: done",
        "model.cu: done",
        "prompt.cu: done",
        "rows.cu: done",
        "sample_token.cu: done",
        "selective_scan.cu: done",
        "ssd_scan.cu: ssd_scan.cu(3): warning: unused",
        "step.cu: done",
        "token.cu: done",
    ]
    assert told[11] == "libmamba_kernels.so: done"
    assert re.fullmatch(r"built in [\d.]+ s", told[12])


# --- several processes -------------------------------------------------------------------------------------------


def start_build(toolkit: Toolkit, sources: Path) -> subprocess.Popen[str]:
    program = (
        "import sys\nfrom pathlib import Path\nfrom mamba_deploy.plugins import build\n"
        f"build.SOURCES = Path({str(sources)!r})\n"
        f"made = build.build('kernels', cuda=Path({str(toolkit.folder)!r}), architectures=['sm_90'], "
        "say=lambda m: print(m, flush=True))\nprint(made.path)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_second_process_waits_and_finds_the_result(toolkit, sources, tmp_path):
    go, started = tmp_path / "go", tmp_path / "started"
    program = f"pathlib.Path({str(started)!r}).touch()\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)"
    toolkit.when_writing("ssd_scan.cu.o", program)
    first = start_build(toolkit, sources)
    wait_for(started.exists)
    second = start_build(toolkit, sources)
    assert second.stdout is not None
    assert second.stdout.readline() == f"waiting for another build in {tmp_path}/cache/plugins\n"
    go.touch()
    outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outputs
    assert outputs[0].splitlines()[-1] == outputs[1].splitlines()[-1]
    assert toolkit.compiled == sorted(KERNELS)  # once


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_build_that_is_stopped_leaves_nothing_that_counts(toolkit, sources, tmp_path, how):
    pid = tmp_path / "pid"
    toolkit.when_writing("ssd_scan.cu.o", f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(600)")
    process = start_build(toolkit, sources)
    wait_for(lambda: pid.exists() and pid.read_text(encoding="utf-8") != "")
    process.send_signal(how)
    process.communicate(timeout=120)
    assert process.returncode != 0
    nvcc = int(pid.read_text(encoding="utf-8"))
    if how == signal.SIGINT:
        assert cache_content(tmp_path) == set()
        wait_for(lambda: not is_running(nvcc))
    else:  # nobody could clean up: the next build does
        assert all(name.startswith(".build-") for name in cache_content(tmp_path))
        with contextlib.suppress(ProcessLookupError):
            os.kill(nvcc, signal.SIGKILL)
    assert build.built() == []
    (toolkit.folder / "ssd_scan.cu.o").unlink()
    made = build.build("kernels", cuda=toolkit.folder, architectures=["sm_90"])
    assert cache_content(tmp_path) == {made.folder.name}


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- the command -------------------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.main, ["plugin", *(str(argument) for argument in arguments)])


def test_command_builds_and_finds(toolkit, sources, tmp_path):
    options = ("--cuda", toolkit.folder, "--tensorrt-include", headers(tmp_path / "sdk", 10, 3, 0))
    done = command("build", *options, "--arch", "sm_87", "--arch", "sm_90")
    assert done.exit_code == 0, done.output
    path = done.stdout.strip()
    assert path.endswith("/libmamba_plugin.so")
    assert "compiling 12 files for sm_87, sm_90" in done.stderr
    assert command("path").stdout == f"{path}\n"
    register = str(Path(path).with_name("libmamba_plugin_register.so"))
    assert json.loads(command("path", "--library", "register", "--json").stdout) == {
        "library": "register",
        "path": register,
    }
    again = command("build", *options, "--arch", "sm_87", "--arch", "sm_90", "--json")
    assert again.stderr == ""
    assert json.loads(again.stdout)["path"] == path
    forced = command("build", *options, "--arch", "sm_87", "--arch", "sm_90", "--force")
    assert "compiling" in forced.stderr


def test_command_builds_the_kernels_without_tensorrt(toolkit, sources):
    done = command("build", "--kernels-only", "--cuda", toolkit.folder, "--json")
    record = json.loads(done.stdout)
    assert record["name"] == "kernels"
    assert (record["tensorrt"], record["cuda"]) == ("", "12.6.85")
    assert command("path", "--library", "kernels").stdout.strip() == record["path"]
    missing = command("path")
    assert missing.exit_code == 1
    assert "error: no plugin library that fits this machine and these sources is in the cache" in missing.stderr
    assert "hint: mamba-deploy plugin build\n" in missing.stderr


def test_command_without_anything_says_what_is_missing():
    done = command("build")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: the CUDA compiler nvcc was not found; looked at\n  $CUDA_HOME: nothing\n")
    assert "\nhint: install the CUDA toolkit" in done.stderr
    done = command("path", "--library", "kernels")
    assert done.exit_code == 1
    assert "hint: mamba-deploy plugin build --kernels-only\n" in done.stderr


def test_command_tells_what_there_is(toolkit, sources, tmp_path, monkeypatch):
    facts = json.loads(command("info", "--json").stdout)
    assert facts["gpus"] == facts["built"] == []
    assert facts["compiler"]["missing"].startswith("the CUDA compiler nvcc was not found")
    assert facts["headers"]["missing"].startswith("the C++ headers of TensorRT were not found")
    empty = command("info").stdout
    assert "GPUs here:    none" in empty
    assert "hint: install the CUDA toolkit" in empty

    monkeypatch.setenv("CUDA_HOME", str(toolkit.folder))
    monkeypatch.setenv("TENSORRT_ROOT", str(headers(tmp_path / "sdk", 10, 3, 0)))
    set_gpus(monkeypatch, "90")
    made = build.build("plugin")
    facts = json.loads(command("info", "--json").stdout)
    assert facts["cache"] == str(tmp_path / "cache" / "plugins")
    assert facts["gpus"] == ["sm_90"]
    assert facts["compiler"]["version"] == "12.6.85"
    assert facts["headers"] == {"folder": str(tmp_path / "sdk"), "product": "TensorRT", "version": "10.3.0"}
    assert [(entry["path"], entry["current"]) for entry in facts["built"]] == [(str(made.path), True)]
    (sources / "ssd_scan.cu").write_text("other\n", encoding="utf-8")
    shown = command("info").stdout
    assert f"compiler:     nvcc 12.6.85, {toolkit.nvcc}" in shown
    assert f"headers:      TensorRT 10.3.0, {tmp_path / 'sdk'}" in shown
    assert "plugin:       not current, sm_90, CUDA 12.6.85, TensorRT 10.3.0, " in shown


# --- the real sources --------------------------------------------------------------------------------------------


# What NVRTC has not: the C and C++ headers of a host, and the calls of the CUDA runtime that launch.
NVRTC_HEADERS = {
    **nvrtc._HEADERS,
    "stdint.h": nvrtc._HEADERS["stdint.h"]
    + """
        #define INT32_MAX 2147483647
        #define INT64_MAX 9223372036854775807l
        #define UINT32_MAX 4294967295u""",
    "climits": """
        #define INT_MAX 2147483647
        #define UINT_MAX 4294967295u""",
    "algorithm": """#pragma once
        namespace std {
        template <typename T> constexpr const T& min(const T& a, const T& b) { return b < a ? b : a; }
        template <typename T> constexpr const T& max(const T& a, const T& b) { return a < b ? b : a; }
        }""",
    "type_traits": """#pragma once
        namespace std {
        template <typename T, T v> struct integral_constant {
            static constexpr T value = v;
            constexpr operator T() const { return v; }
        };
        }""",
    "host.h": """
        #include <cuda_runtime.h>
        #define thread_local  // which device code has not
        cudaError_t cudaGetDevice(int*);
        cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
        template <typename F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F*);
        template <typename F> cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int);
        cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t);
        cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t);
        #if CUDART_VERSION >= 11080
        template <typename... P, typename... A>
        cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*kernel)(P...), A...) {
            return cudaLaunchKernel((const void*)kernel, dim3(), dim3(), nullptr, 0, nullptr);
        }
        #endif""",
}


def installed_nvrtcs() -> list[Path]:
    """libnvrtc of every wheel that is here: nvidia-cuda-nvrtc, and for older CUDA nvidia-cuda-nvrtc-cu11 or -cu12."""
    packages = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (packages.submodule_search_locations or [])] if packages else []
    found = (path for place in places for path in place.glob("*/lib/libnvrtc.so.*"))
    return sorted(path for path in found if re.fullmatch(r"libnvrtc\.so\.[\d.]+", path.name))


class Nvrtc:
    """An NVRTC, and CUDA's headers from the wheel beside it."""

    def __init__(self, path: Path) -> None:
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(path))
        folder = path.parent.parent
        self.include = (folder if folder.name.startswith("cu1") else folder.with_name("cuda_runtime")) / "include"
        if not (self.include / "cuda_fp16.h").exists():
            pytest.skip(f"no headers of CUDA in {self.include}: pip install nvidia-cuda-runtime")
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        self.quick = quick_compile.flag(self.version, older="-dlto" if major.value < 12 else "-G")
        self.call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self.call("nvrtcGetSupportedArchs", numbers)
        self.architectures = [number for number in numbers if number >= int(toolchain.ARCHITECTURES[0])]

    def call(self, function: str, *arguments: Any) -> None:
        code = getattr(self.library, function)(*arguments)
        assert code == 0, f"{function}: {code}"

    def text(self, what: str, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.value.decode()

    def compile(self, source: Path, architecture: int) -> str:
        """PTX of all kernels in a file, as its launchers ask for them.

        The launchers are compiled as device functions that launch from the device, which brings every kernel in with
        the template arguments it really has. Not optimised: that takes a tenth of the time. CUDA 11's NVRTC would take
        a minute even so, and ends before it writes PTX: what does not compile is found until then.
        """
        text = f'#include "host.h"\n#line 1\n{source.read_text(encoding="utf-8")}'
        program = ctypes.c_void_p()
        names, contents = (strings(*texts) for texts in zip(*NVRTC_HEADERS.items(), strict=True))
        file = source.name.encode()
        self.call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), file, len(names), contents, names)
        options = strings(
            f"-arch=compute_{architecture}",
            *("-std=c++17", "-default-device", "-rdc=true", self.quick),
            *(f"-I{self.include}", f"-I{source.parent}"),
        )
        code = self.library.nvrtcCompileProgram(program, len(options), options)
        assert code == 0, f"{source.name} for sm_{architecture}:\n{self.text('ProgramLog', program)}"
        ptx = self.text("PTX", program)
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return ptx


def strings(*texts: str) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


HOST = ("model.cu", "prompt.cu", "rows.cu", "token.cu")  # have no kernels of their own


@pytest.mark.slow
@pytest.mark.parametrize("library", installed_nvrtcs() or [None], ids=lambda path: path.name if path else "none")
@pytest.mark.parametrize("name", [name for name in KERNELS if name not in HOST])
def test_every_kernel_compiles_through_nvrtc(name, library):
    """The newest NVRTC for GPUs without the tensor cores' instructions, the oldest for one with them, where CUDA 11's
    gives no PTX and so no names; nvcc, in test_launches.py, for Hopper.
    """
    if library is None:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime")
    nvrtc = Nvrtc(library)
    expected = kernels_in(build.SOURCES / name)
    assert expected
    ptx = nvrtc.compile(build.SOURCES / name, min(nvrtc.architectures) if 90 in nvrtc.architectures else 80)
    entries = re.findall(r"^\s*(?:\.visible |\.weak )?\.entry (\w+)", ptx, re.M)
    named = {kernel for kernel in expected if any(f"{len(kernel)}{kernel}" in entry for entry in entries)}
    assert named == (set() if nvrtc.quick == "-dlto" else expected)


def kernels_in(source: Path) -> set[str]:
    """Names of the kernels in a file and in what it includes of ours."""
    text = source.read_text(encoding="utf-8")
    bounds = r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?"
    found = set(re.findall(rf"__global__\s+void\s+{bounds}(\w+)\s*\(", text))
    for included in re.findall(r'^#include "(\w+\.cuh)"', text, re.M):
        found |= kernels_in(source.parent / included)
    return found
