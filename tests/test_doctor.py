"""``mamba-deploy doctor``, on machines made of files: packages, drivers, compilers and boards that are not here.

Each machine is a Python process that sees its own packages, root folder and libcuda.so.1, and nothing of ours but this
package and what it cannot do without.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mamba_deploy.plugins import build
from mamba_deploy.runtime import doctor
from mamba_deploy.versions import release

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import ctypes, json, pathlib, platform, sys
asked = json.loads(sys.argv[1])
sys.path[:0] = asked["path"]
from mamba_deploy.plugins import toolchain
from mamba_deploy.runtime import doctor
doctor._ROOT = toolchain._ROOT = pathlib.Path(asked["root"])
platform.machine = lambda: asked["architecture"]
real = ctypes.CDLL
def library(name, *arguments, **options):
    if str(name).startswith("libcuda.so"):
        if not asked["libcuda"]:
            raise OSError("libcuda.so.1: cannot open shared object file")
        name = asked["libcuda"]
    return real(name, *arguments, **options)
ctypes.CDLL = library
from mamba_deploy.cli import main
before = set(sys.modules)
try:
    main(["doctor", *asked["flags"]])
finally:
    print(json.dumps(sorted(set(sys.modules) & {"torch", "onnx"})), file=sys.stderr)
"""
LIBCUDA = """
#include <stddef.h>
#include <string.h>
int cuDriverGetVersion(int* v) { *v = VERSION; return 0; }
int cuInit(unsigned flags) { return INIT; }
int cuGetErrorName(int code, const char** name) { *name = "CUDA_ERROR_NO_DEVICE"; return code != 100; }
int cuDeviceGetCount(int* n) { *n = 2; return 0; }
int cuDeviceGetName(char* s, int n, int d) { strncpy(s, d ? "Second" : "First", n); return 0; }
int cuDeviceTotalMem_v2(size_t* n, int d) { *n = (size_t)(d ? 80 : 6) << 30; return 0; }
int cuDeviceGetAttribute(int* v, int a, int d) { *v = a == 75 ? MAJOR : a == 76 ? MINOR : -1; return 0; }
"""
TENSORRT = "__version__ = '{}'"
CUDA = {"pycuda": "2026.1", "cuda-bindings": "12.9"}


class Machine:
    """Files that a process takes for a machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.architecture = platform.machine()
        self.libcuda = ""
        self.environment = {"PATH": str(folder / "bin"), "HOME": str(folder), "CUDA_HOME": "", "TENSORRT_ROOT": ""}
        for name in ("bin", "root", "site-packages", "ours/mamba_deploy"):
            (folder / name).mkdir(parents=True)
        for path in [*(ROOT / "mamba_deploy").glob("*.py"), *(ROOT / n for n in ("exporters", "plugins", "runtime"))]:
            (folder / "ours" / "mamba_deploy" / path.name).symlink_to(path)
        for name in ("click", "numpy", "safetensors"):
            source = Path(str(find_spec(name).origin)).parent  # type: ignore[union-attr]
            for part in (source, source.with_name(f"{name}.libs")):
                if part.exists():
                    (folder / "ours" / part.name).symlink_to(part)

    def write(self, path: str, text: str) -> Path:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    def install(self, name: str, version: str, source: str | None = "", module: str = "") -> None:
        """A distribution; ``source`` is what its module runs when imported, None for one without files."""
        info = f"site-packages/{name.replace('-', '_')}-{version}.dist-info/METADATA"
        self.write(info, f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if source is not None:
            self.write(f"site-packages/{module or name.replace('-', '_') + '/__init__.py'}", source)

    def install_everything(self, nvrtc: str = "def nvrtcVersion(): return 0, 12, 9") -> None:
        for name, version in {"torch": "2.13", "onnx": "1.23", "onnxscript": "0.7", "onnx-ir": "1.1"}.items():
            self.install(name, version, "raise RuntimeError('imported')")
        providers = "def get_available_providers(): return ['CPUExecutionProvider']"
        self.install("onnxruntime", "1.31.1", f"__version__ = '1.31.1'\n{providers}")
        self.install("tokenizers", "0.23.3")
        self.install("pycuda", CUDA["pycuda"])
        self.write("site-packages/pycuda/driver.py", "")
        self.install("cuda-bindings", CUDA["cuda-bindings"], None)
        self.write("site-packages/cuda/bindings/driver.py", "")
        self.write("site-packages/cuda/bindings/nvrtc.py", nvrtc)
        functions = ("Create_v2", "SetStream_v2", "SetWorkspace_v2", "SetMathMode", "GemmStridedBatchedEx")
        source = self.write("cublas.c", "".join(f"int cublas{name}(void) {{ return 1; }}\n" for name in functions))
        self.compile(source, self.write("site-packages/nvidia/cublas/lib/libcublas.so.12", ""))

    def compile(self, source: Path, library: Path, *flags: str) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip(f"a false {library.name} wants a C compiler")
        subprocess.run([compiler, "-shared", "-fPIC", *flags, "-o", str(library), str(source)], check=True)

    def gpu(self, version: int = 12060, capability: tuple[int, int] = (9, 0), init: int = 0) -> None:
        source = self.write("libcuda.c", LIBCUDA)
        values = {"VERSION": version, "INIT": init, "MAJOR": capability[0], "MINOR": capability[1]}
        defines = [f"-D{name}={value}" for name, value in values.items()]
        self.libcuda = str(self.folder / "libcuda.so.1")
        self.compile(source, Path(self.libcuda), *defines)

    def toolkit(self, version: str = "12.6.85") -> None:
        """An nvcc, and CUDA's headers."""
        nvcc = self.write("root/usr/local/cuda/bin/nvcc", f"#!/bin/sh\necho V{version} compute_90\n")
        nvcc.chmod(0o755)
        for name in ("cuda.h", "cuda_fp16.h"):
            self.write(f"root/usr/local/cuda/include/{name}", "")

    def headers(self, major: int) -> None:
        self.write("root/usr/include/NvInfer.h", "")
        names = zip(("MAJOR", "MINOR", "PATCH"), (major, 3, 0), strict=True)
        self.write("root/usr/include/NvInferVersion.h", "".join(f"#define NV_TENSORRT_{n} {v}\n" for n, v in names))

    def library(self, tensorrt: str, architectures: list[str]) -> None:
        """In the cache, of these sources."""
        product = next(p for p in build.PRODUCTS if p.interface == "v3")
        values = {"name": "plugin", "architectures": architectures, "cuda": "12.6.85", "tensorrt": tensorrt}
        values |= {"machine": self.architecture, "sources": build.sources_hash(product), "date": "2026", "seconds": 1}
        folder = ".cache/mamba-deploy/plugins/plugin-1"
        values["libraries"] = [library.file for library in product.libraries]
        for file in values["libraries"]:
            self.write(f"{folder}/{file}", "")
        self.write(f"{folder}/build.json", json.dumps(values))

    def run(self, *flags: str) -> str:
        folders = [str(self.folder / name) for name in ("ours", "site-packages")]
        asked = {"path": folders, "root": str(self.folder / "root"), "architecture": self.architecture}
        asked |= {"libcuda": self.libcuda, "flags": flags}
        command = [sys.executable, "-S", "-E", "-c", PROGRAM, json.dumps(asked)]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == "[]"  # neither torch nor onnx was imported
        return done.stdout

    def diagnose(self) -> Facts:
        return Facts(json.loads(self.run("--json")))


class Facts:
    """What was said."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.machine = facts["machine"]
        self.summary = facts["summary"]
        self.lines = {line["name"]: line for lines in facts["checks"].values() for line in lines}

    def __getitem__(self, name: str) -> tuple[str, str]:
        return self.lines[name]["status"], self.lines[name]["detail"]

    def hint(self, name: str) -> str:
        return self.lines[name]["hint"]

    @property
    def ready(self) -> list[str]:
        return [aim for aim, verdict in self.summary.items() if verdict["ready"]]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# --- nothing, and everything --------------------------------------------------------------------------------------


def test_machine_with_nothing(machine: Machine) -> None:
    machine.architecture = "x86_64"
    facts = machine.diagnose()
    assert {name for name, line in facts.lines.items() if line["status"] != "missing"} == {"system"}
    assert all(line["hint"] for name, line in facts.lines.items() if name != "system")
    assert facts.ready == []
    assert facts.machine["gpus"] == []
    assert facts.machine["jetson"] is None
    assert facts.summary["export"]["next"] == "pip install 'mamba-deploy[export]'"
    assert facts.summary["cpu"]["next"] == "pip install 'mamba-deploy[cpu]'"
    assert facts.summary["build"]["next"] == "pip install 'mamba-deploy[rtx]'"  # which builds without a GPU
    assert facts.summary["gpu"]["next"] == facts.hint("GPU")


def test_machine_with_everything(machine: Machine) -> None:
    machine.install_everything()
    machine.install("tensorrt", "10.3.0", TENSORRT.format("10.3.0"))
    machine.gpu()
    machine.toolkit()
    machine.headers(10)
    machine.library("TensorRT 10.3.0", ["90"])
    facts = machine.diagnose()
    unwanted = {name for name, line in facts.lines.items() if line["status"] != "ok"}
    assert unwanted <= {"tensorrt-rtx"}
    assert facts.ready == ["export", "cpu", "build", "gpu"]
    assert facts.summary["build"]["next"] == "mamba-deploy build OUT --backend tensorrt"
    assert facts["tensorrt"] == ("ok", "10.3.0")
    assert facts["onnxruntime"] == ("ok", "1.31.1, providers CPU")
    assert facts.lines["torch"]["version"] == "2.13"
    expected = {"name": "First", "compute_capability": "9.0", "memory_bytes": 6 << 30}
    assert facts.machine["gpus"] == [expected, {**expected, "name": "Second", "memory_bytes": 80 << 30}]
    assert facts.machine["cuda"] == "12.6"


def test_text_says_the_same_and_a_shared_hint_once(machine: Machine) -> None:
    text = machine.run()
    assert text.count("hint: pip install 'mamba-deploy[export]'") == 1
    assert "missing  torch" in text
    assert "not yet  export" in text
    machine.install_everything()
    text = machine.run()
    assert "ok       torch" in text
    assert "ready    export" in text


# --- packages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("raise ImportError('libfoo.so.1: no such file\\nand more')", "broken: ImportError: libfoo.so.1: no such file"),
        ("raise ValueError", "broken: ValueError"),
        ("import sys; sys.exit(3)", "broken: SystemExit: 3"),
        ("class Panic(BaseException): ...\nraise Panic('rust')", "broken: Panic: rust"),
        ("import another_package", "broken: ModuleNotFoundError: No module named 'another_package'"),
        ("1 +", "broken: SyntaxError: invalid syntax (__init__.py, line 1)"),
    ],
)
def test_broken_package_is_shown_not_raised(machine: Machine, source: str, shown: str) -> None:
    machine.install_everything()
    for name in ("onnxruntime", "tokenizers", "pycuda"):
        machine.install(name, "9999", source)
    machine.install("tensorrt", "10.3.0", source)
    facts = machine.diagnose()
    for name in ("onnxruntime", "tokenizers", "pycuda"):
        assert facts[name] == ("wrong", shown)
    status, detail = facts["tensorrt"]
    assert status == "wrong"
    assert shown.split(": ")[-1] in detail or source == "raise ValueError"
    assert facts.ready == ["export"]
    assert "--force-reinstall onnxruntime" in facts.summary["cpu"]["next"]


def test_package_that_prints_leaves_json_whole(machine: Machine) -> None:
    machine.install("tensorrt", "10.3.0", f"print('hello')\n{TENSORRT.format('10.3.0')}")
    machine.install("tokenizers", "0.23", "import warnings; print('hello'); warnings.warn('old')")
    assert machine.diagnose()["tokenizers"] == ("ok", "0.23")


def test_old_packages_and_those_without_files(machine: Machine) -> None:
    machine.install("torch", "2.7.1")
    machine.install("onnx", "1.23", None)
    machine.install("onnxscript", "0.10.0")  # newer than 0.7, though not as text
    machine.write("site-packages/onnx_ir/nothing", "")  # a folder is no package
    machine.install("tokenizers", "0.19", "__version__ = '0.19'")
    facts = machine.diagnose()
    assert facts["torch"] == ("wrong", "2.7.1: 2.8 or newer is needed")
    assert facts["onnx"] == ("wrong", "broken: 1.23 is installed without its files")
    assert facts["onnxscript"] == ("ok", "0.10.0")
    assert facts["onnx-ir"] == ("missing", "not installed")
    assert facts["tokenizers"][0] == "wrong"


def test_onnxruntime_that_is_a_folder_and_one_that_lacks_the_fast_operator(machine: Machine) -> None:
    machine.install_everything()
    machine.install("onnxruntime", "1.23.2", "__version__ = '1.23.2'\ndef get_available_providers(): return []")
    facts = machine.diagnose()
    assert facts["onnxruntime"][0] == "ok"
    assert "Mamba-2 is faster from 1.26" in facts["onnxruntime"][1]
    assert "cpu" in facts.ready
    shutil.rmtree(machine.folder / "site-packages" / "onnxruntime")
    machine.write("site-packages/onnxruntime/nothing", "")
    facts = machine.diagnose()
    assert facts["onnxruntime"][0] == "wrong"
    assert "get_available_providers" in facts["onnxruntime"][1]


def test_minimum_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest: dict[str, set[str]] = {}
    for extra in project["optional-dependencies"].values():
        for requirement in extra:
            name, _, version = requirement.partition(";")[0].partition(">=")
            lowest.setdefault(name.strip(), set()).add(version.strip())
    for name, version in doctor.MINIMUM.items():
        assert version in lowest[name]
        assert min(map(release, lowest[name])) == release(version)


# --- boards, GPUs, drivers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "l4t", "jetpack", "status"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", "36.4.3", "6.1 or 6.2", "ok"),
        ("# R36 (release), REVISION: 3.0, GCID: 1, BOARD: generic, EABI: aarch64", "36.3.0", "6.0", "ok"),
        ("# R35 (release), REVISION: 4.1, GCID: 1, BOARD: t186ref, EABI: aarch64", "35.4.1", "5.1", "wrong"),
        ("# R38 (release), REVISION: 2.1, GCID: 1, BOARD: generic, EABI: aarch64", "38.2.1", "7.0", "ok"),
        ("# R77 (release), REVISION: 1.0, GCID: 1", "77.1.0", None, "ok"),
        (None, None, None, "ok"),
    ],
)
def test_jetson(machine: Machine, release: str | None, l4t: str | None, jetpack: str | None, status: str) -> None:
    machine.architecture = "aarch64"
    machine.write("root/proc/device-tree/model", "NVIDIA Jetson AGX Orin Developer Kit\0")
    if release:
        machine.write("root/etc/nv_tegra_release", f"{release}\n")
    facts = machine.diagnose()
    model = "NVIDIA Jetson AGX Orin Developer Kit"
    assert facts.machine["jetson"] == {"model": model, "l4t": l4t, "jetpack": jetpack}
    assert facts["Jetson"][0] == status
    assert "sudo apt install python3-libnvinfer" in facts.hint("tensorrt")
    assert "--system-site-packages" in facts.hint("tensorrt")
    assert facts.hint("pycuda").startswith("PATH=/usr/local/cuda/bin:$PATH CUDA_ROOT=/usr/local/cuda pip install")
    assert facts.hint("pycuda").endswith("first install g++ and CUDA's headers")
    assert "--runtime nvidia" in facts.hint("GPU")
    assert "tensorrt-rtx" not in facts.lines


def test_jetpack_5_runs_nothing_in_python_whatever_else_is_there(machine: Machine) -> None:
    machine.architecture = "aarch64"
    machine.install_everything()
    machine.install("tensorrt", "8.5.2.2", TENSORRT.format("8.5.2.2"))
    machine.write("root/etc/nv_tegra_release", "# R35 (release), REVISION: 4.1, GCID: 1\n")
    machine.gpu(11040, (8, 7))
    facts = machine.diagnose()
    assert facts["tensorrt"] == ("wrong", "broken: TensorRT 8.5.2.2 is too old for the Python runtime, which needs 8.6")
    assert facts.ready == ["export", "cpu"]
    assert {"Jetson", "tensorrt"} <= set(facts.summary["gpu"]["lacks"])


def test_raspberry_is_no_jetson(machine: Machine) -> None:
    machine.architecture = "aarch64"
    machine.write("root/proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    facts = machine.diagnose()
    assert facts.machine["jetson"] is None
    assert "Jetson" not in facts.lines


def test_tensorrt_of_the_system_that_this_python_does_not_see(machine: Machine) -> None:
    machine.architecture = "aarch64"
    machine.write("root/usr/lib/python3.10/dist-packages/tensorrt/__init__.py", "")
    facts = machine.diagnose()
    assert facts["tensorrt"][0] == "missing"
    assert "usr/lib/python3.10/dist-packages/tensorrt" in facts["tensorrt"][1]
    assert "apt" not in facts.hint("tensorrt")


def test_driver_that_refuses(machine: Machine) -> None:
    machine.gpu(init=100)
    facts = machine.diagnose()
    assert facts["GPU"] == ("wrong", "the driver says CUDA_ERROR_NO_DEVICE (100)")
    assert facts.machine["cuda"] == "12.6"
    assert facts.hint("GPU") != "unset CUDA_VISIBLE_DEVICES"
    machine.environment["CUDA_VISIBLE_DEVICES"] = ""
    assert machine.diagnose().hint("GPU") == "unset CUDA_VISIBLE_DEVICES"


def test_library_that_is_no_driver(machine: Machine) -> None:
    machine.libcuda = str(machine.write("libcuda.so.1", "not a library"))
    assert machine.diagnose()["GPU"][0] == "missing"


def test_what_is_of_a_newer_cuda_than_the_driver(machine: Machine) -> None:
    machine.install_everything()
    machine.toolkit("13.0.88")
    machine.gpu(12060)
    machine.install("cuda-bindings", "13.5.0", None)
    shutil.rmtree(machine.folder / "site-packages/cuda_bindings-12.9.dist-info")
    facts = machine.diagnose()
    for name in ("nvcc", "cuda-bindings"):
        assert facts[name][0] == "wrong"
        assert "too new for this driver, which runs CUDA up to 12.6" in facts[name][1]
    assert facts.hint("cuda-bindings") == "pip install 'cuda-bindings==12.*'"
    machine.gpu(13000)
    facts = machine.diagnose()
    assert facts["nvcc"][0] == facts["cuda-bindings"][0] == "ok"


# --- TensorRT-RTX, and the plugin ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("capability", "runs"), [((8, 9), True), ((9, 0), False), ((12, 0), True), ((12, 3), True)])
def test_rtx_builds_without_a_gpu_and_runs_on_some(machine: Machine, capability: tuple[int, int], runs: bool) -> None:
    machine.install_everything()
    machine.install(
        "tensorrt-rtx-cu13-bindings", "1.7.1", TENSORRT.format("1.7.1"), "tensorrt_rtx_bindings/__init__.py"
    )
    machine.toolkit()  # whose headers NVRTC takes
    facts = machine.diagnose()
    assert facts.ready == ["export", "cpu", "build"]
    assert facts.summary["build"]["next"] == "mamba-deploy build OUT --backend tensorrt-rtx"
    machine.gpu(13000, capability)
    facts = machine.diagnose()
    assert ("gpu" in facts.ready) == runs
    if not runs:
        assert facts.summary["gpu"]["next"].startswith("pip install 'mamba-deploy[tensorrt]'")


def test_rtx_whose_library_is_missing(machine: Machine) -> None:
    source = "raise ImportError('libtensorrt_rtx.so.1: cannot open shared object file')"
    machine.install("tensorrt-rtx-cu13-bindings", "1.7.1", source, "tensorrt_rtx_bindings/__init__.py")
    facts = machine.diagnose()
    assert facts["tensorrt-rtx"][0] == "wrong"
    assert "libtensorrt_rtx.so.1" in facts["tensorrt-rtx"][1]
    assert "LD_LIBRARY_PATH" in facts.hint("tensorrt-rtx")


@pytest.mark.parametrize(
    ("tensorrt", "have", "ready"),
    [
        ("10.3.0", "library", True),
        ("10.3.0", "library of another TensorRT", False),
        ("10.3.0", "library for another GPU", False),
        ("10.3.0", "headers", True),
        ("10.3.0", "headers of another TensorRT", False),
        ("10.3.0", "headers without nvcc", False),
        ("10.3.0", "nvrtc", True),
        ("8.6.2", "nvrtc", False),  # which takes no plugins in Python
        ("10.3.0", "nvrtc that does not load", False),
        ("10.3.0", "nothing", False),
    ],
)
def test_one_way_to_the_plugin_is_enough(machine: Machine, tensorrt: str, have: str, ready: bool) -> None:
    nvrtc = "def nvrtcVersion(): return 0, 12, 9"
    machine.install_everything(nvrtc if have == "nvrtc" else "def nvrtcVersion(): raise RuntimeError('no libnvrtc')")
    machine.install("tensorrt", tensorrt, TENSORRT.format(tensorrt))
    machine.gpu()
    if have.startswith("library"):
        other = have == "library of another TensorRT"
        machine.library("TensorRT 11.1.0" if other else "TensorRT 10.3.0", ["120" if "GPU" in have else "80"])
    if have.startswith("headers"):
        machine.headers(11 if "another" in have else 10)
    if have.startswith(("headers", "nvrtc")) and have != "headers without nvcc":
        machine.toolkit()
    facts = machine.diagnose()
    assert ("build" in facts.ready, "gpu" in facts.ready) == (ready, ready)
    assert facts["library tensorrt"][0] == ("ok" if have == "library" else "missing")
    assert facts["Python plugins"][0] == ("ok" if have == "nvrtc" else "missing")
    if not ready:
        lacks = "headers" if tensorrt == "8.6.2" else "Python plugins"  # the shortest way that this TensorRT takes
        assert facts.summary["gpu"]["lacks"] == [lacks]
        assert facts.summary["gpu"]["next"] == facts.hint(lacks)


def test_products_need_cublas(machine: Machine) -> None:
    machine.install_everything()
    machine.install("tensorrt", "10.3.0", TENSORRT.format("10.3.0"))
    machine.gpu()
    machine.library("TensorRT 10.3.0", ["80"])
    facts = machine.diagnose()
    assert facts["cuBLAS"] == ("ok", str(machine.folder / "site-packages/nvidia/cublas/lib/libcublas.so.12"))
    assert "gpu" in facts.ready
    shutil.rmtree(machine.folder / "site-packages/nvidia")
    facts = machine.diagnose()
    if facts["cuBLAS"][0] == "ok":
        pytest.skip("this system has a cuBLAS that any process finds")
    assert "build" in facts.ready
    assert facts.summary["gpu"]["lacks"] == ["cuBLAS"]
    assert "nvidia-cublas-cu12" in facts.summary["gpu"]["next"]


def test_nvcc_that_is_none(machine: Machine) -> None:
    machine.toolkit()
    machine.write("root/usr/local/cuda/bin/nvcc", "#!/bin/sh\necho hello\n")
    status, detail = machine.diagnose()["nvcc"]
    assert status == "wrong"
    assert "it is no nvcc" in detail


# --- this machine -------------------------------------------------------------------------------------------------


def test_real_machine() -> None:
    command = [str(Path(sys.executable).with_name("mamba-deploy")), "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    facts = Facts(json.loads(done.stdout))
    assert {"export", "cpu"} <= set(facts.ready)  # the tests could not run without
    assert facts.machine["python"] == platform.python_version()
    assert facts["torch"][1] == metadata.version("torch")
    assert "CPU" in facts["onnxruntime"][1]
