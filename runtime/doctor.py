"""What this machine has to export, build and run, what it lacks, and the command that brings it.

Works without any of the optional packages and with broken ones. Those of the exporting side are looked up, never
imported; of the others the import is tried, and what it raises is shown.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from mamba_deploy.errors import MambaDeployError, MissingDependencyError
from mamba_deploy.plugins import build, cublas, toolchain
from mamba_deploy.runtime import trt
from mamba_deploy.versions import release

__all__ = ["diagnose", "render"]

Line = dict[str, Any]  # name, status ("ok", "missing", "wrong"), version (None if unknown), detail, hint

# As in pyproject.toml; a test compares.
MINIMUM = dict(item.split(">=") for item in "torch>=2.8 onnx>=1.19 onnxscript>=0.7 onnx-ir>=1.0 onnxruntime>=1.23 "
               "tokenizers>=0.20 pycuda>=2025.1 cuda-bindings>=12.6".split())  # fmt: skip
_JETPACKS = {"35.1": "5.0.2", "35": "5.1", "36.3": "6.0", "36.4": "6.1 or 6.2", "36": "6", "38.2": "7.0", "38.4": "7.1",
             "38": "7", "39": "7.2"}  # fmt: skip
_RTX_GPUS = ("8.0", "8.6", "8.9")  # and 12.0 and newer; TensorRT-RTX 1.7 refuses others
_TITLES = {"machine": "this machine", "export": "export", "cpu": "run on a CPU"} | {
    "engines": "build and run engines: one of the two TensorRTs", "plugin": "the plugin: the library, or Python plugins"
}  # fmt: skip
_AIMS = {"export": "export", "cpu": "run on a CPU", "build": "build an engine", "gpu": "run on a GPU"}
_ROOT = Path("/")


def diagnose() -> dict[str, Any]:
    """Look at this machine: ``machine``, ``checks`` (lines by what they are for) and ``summary``."""
    machine = _machine()
    engines, labels = _engine_lines(machine)
    checks = {"machine": _machine_lines(machine), "export": _export_lines(), "cpu": _cpu_lines(), "engines": engines}
    checks["plugin"] = _plugin_lines(machine, labels)
    return {"machine": machine, "checks": checks, "summary": _summary(machine, checks, labels)}


def render(facts: dict[str, Any]) -> str:
    """The facts as text; a hint that several lines share comes once, after the last of them."""
    width = max(len(line["name"]) for lines in facts["checks"].values() for line in lines)
    text = []
    for key, lines in facts["checks"].items():
        text.append(_TITLES[key])
        for line, after in zip(lines, [*lines[1:], {"hint": ""}], strict=True):
            text.append(f"  {line['status']:<8} {line['name']:<{width}}  {line['detail']}")
            if line["hint"] and after["hint"] != line["hint"]:
                text.append(f"  {'':<8} {'':<{width}}  hint: {line['hint']}")
    text.append("what this machine is ready for, and the next command")
    for key, verdict in facts["summary"].items():
        text.append(f"  {'ready' if verdict['ready'] else 'not yet':<8} {_AIMS[key]:<{width}}  {verdict['next']}")
    return "\n".join(text)


def _line(name: str, status: str, detail: str, hint: str = "", version: str | None = None) -> Line:
    hint = "" if status == "ok" else hint
    return {"name": name, "status": status, "version": version or None, "detail": detail, "hint": hint}


# --- this machine -------------------------------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    facts = {"system": platform.system(), "kernel": platform.release(), "architecture": platform.machine()}
    return {**facts, "python": platform.python_version(), "jetson": _jetson(), **_driver()}


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return (_ROOT / path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    return ""


def _jetson() -> dict[str, str | None] | None:
    """None on other machines. In a container one of the two files may be missing."""
    found = re.search(r"R(\d+) .*?REVISION: (\d+)(\.\d+)?", _read("etc/nv_tegra_release"))
    model = _read("proc/device-tree/model")
    if found is None:
        is_one = "Jetson" in model or model.startswith("NVIDIA")
        return {"model": model, "l4t": None, "jetpack": None} if is_one else None
    jetpack = _JETPACKS.get(f"{found[1]}.{found[2]}") or _JETPACKS.get(found[1])
    return {"model": model or "Jetson", "l4t": f"{found[1]}.{found[2]}{found[3] or ''}", "jetpack": jetpack}


def _driver() -> dict[str, Any]:
    """What the CUDA driver says, asked without a package; ``cuda`` is the newest CUDA that it runs."""
    facts: dict[str, Any] = {"driver": _read("sys/module/nvidia/version") or None, "cuda": None, "problem": ""}
    facts["gpus"] = []
    number, size, text = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0:
            facts["cuda"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
        if code := cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number)):
            name = ctypes.c_char_p()
            cuda.cuGetErrorName(code, ctypes.byref(name))
            return facts | {"problem": f"the driver says {(name.value or b'error').decode()} ({code})"}
        for device in range(number.value):
            cuda.cuDeviceGetName(text, len(text), device)
            cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
            capability = []
            for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
                cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
                capability.append(str(number.value))
            gpu = {"name": text.value.decode(errors="replace"), "compute_capability": ".".join(capability)}
            facts["gpus"].append({**gpu, "memory_bytes": size.value})
    except (OSError, AttributeError) as error:
        facts["problem"] = f"no driver: {error}"
    return facts


def _machine_lines(machine: dict[str, Any]) -> list[Line]:
    lines = [_line("system", "ok", "{system} {kernel}, {architecture}, Python {python}".format(**machine))]
    if (jetson := machine["jetson"]) is not None:
        old = release(jetson["l4t"] or "36") < (36,)
        detail = f"{jetson['model']}, L4T {jetson['l4t'] or 'unknown'}, JetPack {jetson['jetpack'] or 'unknown'}"
        detail += "; its TensorRT is too old for the Python runtime" if old else ""
        hint = "take JetPack 6 or newer; this one runs engines through trtexec and C++: mamba-deploy plugin build"
        lines.append(_line("Jetson", "wrong" if old else "ok", detail, hint))
    if machine["cuda"]:
        detail = ", ".join(filter(None, (machine["driver"], f"runs CUDA up to {machine['cuda']}")))
        lines.append(_line("driver", "ok", detail, version=machine["driver"]))
    for gpu in machine["gpus"]:
        detail = "{name}, compute capability {compute_capability}, ".format(**gpu)
        lines.append(_line("GPU", "ok", f"{detail}{gpu['memory_bytes'] / 2**30:.1f} GiB"))
    if not machine["gpus"]:
        hint = "sudo ubuntu-drivers install; in a container: docker run --gpus all"
        hint = "flash the board with JetPack; in a container: docker run --runtime nvidia" if jetson else hint
        hint = "unset CUDA_VISIBLE_DEVICES" if machine["cuda"] and "CUDA_VISIBLE_DEVICES" in os.environ else hint
        status = "wrong" if machine["cuda"] else "missing"
        lines.append(_line("GPU", status, machine["problem"] or "the driver shows none", hint))
    return lines


# --- packages -----------------------------------------------------------------------------------------------------


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": ")


def _installed(distribution: str) -> str:
    """Its version; "" where it is not installed or its metadata cannot be read."""
    with contextlib.suppress(Exception):
        return metadata.version(distribution) or ""
    return ""


@contextlib.contextmanager
def _quiet() -> Any:
    """Stdout is for our report."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _judged(name: str, version: str, hint: str) -> Line:
    """A line about what is there: ok if it is new enough."""
    if version and release(version) < release(MINIMUM.get(name, "")):
        return _line(name, "wrong", f"{version}: {MINIMUM[name]} or newer is needed", hint, version)
    return _line(name, "ok", version or "version unknown", version=version)


def _looked_up(name: str, hint: str) -> Line:
    """About a package that is not imported."""
    version, found = _installed(name), False
    with contextlib.suppress(Exception):  # what is in sys.modules may lack a spec
        spec = importlib.util.find_spec(name.replace("-", "_"))
        found = spec is not None and spec.origin is not None  # a folder of that name has none
    if found:
        return _judged(name, version, hint)
    again = f"pip install --force-reinstall --no-deps {name}"
    broken = _line(name, "wrong", f"broken: {version} is installed without its files", again, version)
    return broken if version else _line(name, "missing", "not installed", hint)


def _imported(name: str, module: str, hint: str, again: str = "") -> tuple[Line, Any]:
    """About a package whose import is tried, and the module; ``again`` is the hint where that fails."""
    try:
        with _quiet():
            found = importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, and the panics of extensions in Rust
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            return _line(name, "missing", "not installed", hint), None
        again = again or f"pip install --force-reinstall {name}"
        return _line(name, "wrong", f"broken: {_first_line(error)}", again, _installed(name)), None
    return _judged(name, str(getattr(found, "__version__", "")) or _installed(name), hint), found


def _export_lines() -> list[Line]:
    return [_looked_up(n, "pip install 'mamba-deploy[export]'") for n in ("torch", "onnx", "onnxscript", "onnx-ir")]


def _cpu_lines() -> list[Line]:
    hint = "pip install 'mamba-deploy[cpu]'"
    line, module = _imported("onnxruntime", "onnxruntime", hint)
    if line["status"] == "ok":
        try:
            names = [name.removesuffix("ExecutionProvider") for name in module.get_available_providers()]
            line["detail"] += f", providers {', '.join(names)}"
        except Exception as error:  # a folder of that name, or what pip left of it
            again = "pip install --force-reinstall onnxruntime"
            line = _line("onnxruntime", "wrong", f"broken: {_first_line(error)}", again, line["version"])
        if line["version"] and release(line["version"]) < (1, 26):
            line["detail"] += "; Mamba-2 is faster from 1.26 on, which needs Python 3.11"
    return [line, _imported("tokenizers", "tokenizers", hint)[0]]


# --- engines ------------------------------------------------------------------------------------------------------


def _engine_lines(machine: dict[str, Any]) -> tuple[list[Line], dict[str, str]]:
    """The lines, and of each TensorRT that loads its product and version by the name of its backend."""
    arm = machine["architecture"] == "aarch64"
    lines, labels = [], {}
    for backend, extra in zip(trt.BACKENDS, ("tensorrt", "rtx"), strict=True):
        line, label = _tensorrt(backend, f"pip install 'mamba-deploy[{extra}]'", arm)
        if label:
            labels[backend] = label
        if not (arm and extra == "rtx" and line["status"] == "missing"):  # there are no wheels of it for ARM
            lines.append(line)
    path = "PATH=/usr/local/cuda/bin:$PATH CUDA_ROOT=/usr/local/cuda " if arm else ""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_ROOT") if os.environ.get(name)]
    headers = any((root / "include/cuda.h").is_file() for root in (*named, _ROOT / "usr/local/cuda", _ROOT / "usr"))
    lacks = [what for what, there in (("g++", shutil.which("g++")), ("CUDA's headers", headers)) if not there]
    first = f"; first install {' and '.join(lacks)}" if lacks else ""
    hint = f"{path}pip install 'pycuda>={MINIMUM['pycuda']}'{first}"
    again = f"{path}pip install --force-reinstall --no-cache-dir --no-deps pycuda{first}"
    again = again if machine["cuda"] else "pycuda needs the driver of a GPU"
    lines.append(_imported("pycuda", "pycuda.driver", hint, again)[0])
    hint = f"pip install 'cuda-bindings=={release(machine['cuda'])[0]}.*'" if machine["cuda"] else ""
    line = _imported("cuda-bindings", "cuda.bindings.driver", hint or "pip install cuda-bindings")[0]
    return [*lines, _fitting(line, machine, hint)], labels


def _tensorrt(backend: str, hint: str, arm: bool) -> tuple[Line, str]:
    """A line, and "TensorRT 10.3.0" or "". ARM boards have it from apt, for the system's Python alone."""
    detail = "not installed"
    if arm:
        hint = "sudo apt install python3-libnvinfer; then: /usr/bin/python3 -m venv --system-site-packages DIR"
        if folders := sorted(_ROOT.glob("usr/lib/python3*/dist-packages/tensorrt")):
            detail = f"this Python does not see the one in {folders[0]}"
            hint = "/usr/bin/python3 -m venv --system-site-packages DIR, and install mamba-deploy there"
    try:
        with _quiet():
            found = trt.load(backend)
            return _line(backend, "ok", found.version, version=found.version), found.label
    except MissingDependencyError:
        return _line(backend, "missing", detail, hint), ""
    except MambaDeployError as error:
        return _line(backend, "wrong", f"broken: {str(error).partition(chr(10))[0]}", error.hint or hint), ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return _line(backend, "wrong", f"broken: {_first_line(error)}", hint), ""


def _fitting(line: Line, machine: dict[str, Any], hint: str) -> Line:
    """The line, or one that says that it is of a newer major version of CUDA than the driver runs."""
    if line["status"] != "ok" or not machine["cuda"] or release(line["version"])[:1] <= release(machine["cuda"])[:1]:
        return line
    detail = f"{line['detail']}: too new for this driver, which runs CUDA up to {machine['cuda']}"
    return _line(line["name"], "wrong", detail, hint, line["version"])


# --- the plugin ---------------------------------------------------------------------------------------------------


def _plugin_lines(machine: dict[str, Any], labels: dict[str, str]) -> list[Line]:
    lines = []
    try:
        facts = build.describe()
        for name, key in (("nvcc", "compiler"), ("headers", "headers")):
            found = facts[key]
            if "missing" in found:
                absent = "not found" in found["missing"]
                detail = "not found" if absent else found["missing"].partition("\n")[0]
                lines.append(_line(name, "missing" if absent else "wrong", detail, found["hint"]))
            else:
                where = f"{found.get('product', '')} {found['version']}, {found.get('path') or found['folder']}"
                line = _line(name, "ok", where.strip(), version=found["version"])
                hint = "mamba-deploy plugin build --cuda DIR of an older toolkit, or a newer driver"
                lines.append(_fitting(line, machine, hint) if name == "nvcc" else line)
        others = sum(entry["name"] == "plugin" for entry in facts["built"])
        for backend, label in (labels or {"": ""}).items():
            name, entry = f"library {backend}".strip(), build.current("plugin", label)
            detail = f"not built{f'; of {others} in the cache none fits' if others else ''}"
            line = _line(name, "missing", detail, "mamba-deploy plugin build")
            if entry is not None:
                line = _line(name, "ok", f"for {entry.tensorrt}, sm {', '.join(entry.architectures)}, {entry.path}")
            lines.append(line)
    except (OSError, RuntimeError) as error:  # a cache that cannot be read, no home
        lines.append(_line("library", "wrong", _first_line(error), "set MAMBA_DEPLOY_CACHE to a folder of yours"))
    return [*lines, _nvrtc_line(machine), _cublas_line()]


def _cublas_line() -> Line:
    """Of the products of engines, when they run."""
    try:
        return _line("cuBLAS", "ok", str(cublas.find()._name))
    except MambaDeployError as error:
        return _line("cuBLAS", "missing", "not found", error.hint)


def _nvrtc_line(machine: dict[str, Any]) -> Line:
    name, hint = "Python plugins", "pip install 'mamba-deploy[nvrtc]'"
    if machine["cuda"] and release(machine["cuda"]) < (13,):
        hint = "pip install 'cuda-bindings==12.*' nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12"
    line, module = _imported(name, "cuda.bindings.nvrtc", hint, hint)
    if module is None:
        return line | {"detail": line["detail"].replace("not installed", "no cuda-bindings")}
    try:
        version = ".".join(map(str, module.nvrtcVersion()[1:]))
        return _line(name, "ok", f"NVRTC {version}, headers in {toolchain.find_cuda_headers()}", version=version)
    except MambaDeployError as error:
        return _line(name, "missing", "CUDA's headers were not found", error.hint)
    except Exception as error:
        return _line(name, "missing", f"NVRTC was not found: {_first_line(error)}", hint)


# --- what it comes to ---------------------------------------------------------------------------------------------


def _summary(machine: dict[str, Any], checks: dict[str, list[Line]], labels: dict[str, str]) -> dict[str, Any]:
    """Of each aim whether it can be reached, what lacks, and the next command: of the TensorRT that lacks the least."""
    lines = {line["name"]: line for group in checks.values() for line in group}
    board = [lines["Jetson"]] if "Jetson" in lines else []
    builds, runs = [], []
    for backend in (name for name in trt.BACKENDS if name in lines):
        rtx, flag = backend == "tensorrt-rtx", f"--backend {backend}"
        common = [*board, lines[backend], _any_plugin(lines, backend, labels.get(backend, ""))]
        gpu = [] if rtx else [lines["GPU"]]  # TensorRT-RTX builds without
        builds.append(_verdict([*gpu, *common, lines["onnx"]], f"mamba-deploy build OUT {flag}"))
        gpus = [gpu["compute_capability"] for gpu in machine["gpus"]]
        refused = rtx and gpus and not any(c in _RTX_GPUS or release(c) >= (12,) for c in gpus)
        hint = "pip install 'mamba-deploy[tensorrt]': TensorRT-RTX does not run on this GPU"
        gpu = [_line("GPU", "wrong", "refused by TensorRT-RTX", hint) if refused else lines["GPU"]]
        needs = [*gpu, *common, *(lines[name] for name in ("pycuda", "cuda-bindings", "cuBLAS", "tokenizers"))]
        runs.append(_verdict(needs, f"mamba-deploy generate OUT -p TEXT {flag}"))
    verdicts = {"export": _verdict(checks["export"], "mamba-deploy export CHECKPOINT OUT")}
    verdicts["cpu"] = _verdict(checks["cpu"], "mamba-deploy generate OUT -p TEXT")
    for aim, choices in (("build", builds), ("gpu", runs)):
        verdicts[aim] = min(choices, key=lambda verdict: len(verdict["lacks"]))
    return verdicts


def _verdict(needed: list[Line], command: str) -> dict[str, Any]:
    lacks = [line for line in needed if line["status"] != "ok"]
    hint = next((line["hint"] for line in lacks if line["hint"]), "")
    return {"ready": not lacks, "lacks": [line["name"] for line in lacks], "next": hint if lacks else command}


def _any_plugin(lines: dict[str, Line], backend: str, label: str) -> Line:
    """The library, there or compiled when it is first wanted; where neither can be, the plugins in Python."""
    library = lines.get(f"library {backend}") or lines.get("library") or _line("library", "ok", "")
    tools = [lines[name] for name in ("nvcc", "headers") if name in lines and lines[name]["status"] != "ok"]
    fits = "headers" in lines and lines["headers"]["detail"].startswith(label.partition(".")[0])
    if library["status"] == "ok" or (backend == "tensorrt" and not tools and fits):
        return _line("library", "ok", "")
    takes_python = backend == "tensorrt-rtx" or not label or release(label.partition(" ")[2]) >= (10,)
    return lines["Python plugins"] if takes_python else (tools or [library])[0]
