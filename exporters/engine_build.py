"""model.onnx -> an engine of TensorRT in the bundle: the whole of `mamba-deploy build`.

One engine with two optimisation profiles: decode, one token of up to ``max_batch`` rows, and prompt, up to
``max_prefill`` tokens of up to ``prefill_batch`` rows. It is of the graph that is one operator, and of model.onnx where
that operator does not cover the model. Scratch memory grows with the tokens of a prompt call, so by default prompts are
read row by row, which also spares them their padding.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mamba_deploy import errors
from mamba_deploy.bundle import ENGINES, PORTABLE, WEIGHTS, Bundle, add_engine
from mamba_deploy.errors import BundleError, EngineError, InputError
from mamba_deploy.plugins.build import cache_folder
from mamba_deploy.plugins.toolchain import gpu_architectures
from mamba_deploy.runtime.trt import PluginKind, rtx_folder

__all__ = ["build_engine", "engine_file", "engine_request"]

Say = Callable[[str], None]
_MOST = {"max_batch": 1 << 16, "max_prefill": 1 << 20, "prefill_batch": 1 << 16}  # beyond, TensorRT-RTX hangs
_MOST_TOKENS = 1 << 23  # of a prompt call; with 2^32 it aborts
_NO_MEMORY = (
    "the system may have ended it for want of memory: try smaller --max-batch and --max-prefill, or --workspace"
)
_FAULT = "that is a fault in TensorRT or in a plugin; try --plugins python, or another --optimization-level"


def build_engine(
    path: str | Path,
    *,
    backend: str = "tensorrt",
    max_batch: int = 8,
    max_prefill: int = 2048,
    prefill_batch: int = 1,
    plugins: PluginKind = "auto",
    workspace_mib: int | None = None,
    optimization_level: int | None = None,
    compute_capabilities: Sequence[str] = (),
    use_timing_cache: bool = True,
    fuse: bool = True,
    say: Say = lambda message: None,
) -> Bundle:
    """Build the engine of a bundle for this machine's GPU, and put it there.

    Args:
        path: The bundle's directory. Left as it was if the build fails.
        backend: ``tensorrt``, or ``tensorrt-rtx``, which needs no GPU here.
        max_batch: Rows of a decode step.
        max_prefill: Tokens of a prompt call; longer prompts are read in several.
        prefill_batch: Rows of a prompt call; more rows are read in several.
        plugins: ``library``, C++; ``python``, over NVRTC; ``auto``, the library where one can be had.
        workspace_mib: Most that the builder may use beside weights and activations.
        optimization_level: The builder's, 0 to 5; None leaves it to TensorRT.
        compute_capabilities: For TensorRT-RTX: GPUs to build for, ``"86"``, ``"120"``; none: what it takes itself.
        use_timing_cache: Keep what was timed for the next build on the same kind of GPU.
        fuse: Make the model one operator, where that covers it.
        say: Told what is being done.

    Returns:
        The bundle, opened again; its manifest says what the engine hangs on.

    Raises:
        BundleError: The directory is no bundle, or cannot be written.
        MissingDependencyError: TensorRT is not installed.
        ExportError: The graph cannot be written for this TensorRT.
        EngineError: TensorRT refuses the model, or fails.
        PluginError: The plugins cannot be built or loaded.
        InputError: An option is out of range.
    """
    bundle = Bundle.open(path)
    if backend not in ENGINES:
        raise EngineError(f"there is no backend '{backend}'", hint=f"choose one of: {', '.join(ENGINES)}")
    for name, value in (("max_batch", max_batch), ("max_prefill", max_prefill), ("prefill_batch", prefill_batch)):
        if not 1 <= value <= _MOST[name]:
            raise InputError(f"{name} is {value}: expected 1 to {_MOST[name]}")
    if compute_capabilities and backend != "tensorrt-rtx":
        raise InputError(
            "compute capabilities can be chosen for tensorrt-rtx alone", hint="TensorRT builds for the GPU it runs on"
        )
    prefill_batch = min(prefill_batch, max_batch)
    if prefill_batch * max_prefill > _MOST_TOKENS:
        raise InputError(
            f"a prompt call of {prefill_batch} rows of {max_prefill} tokens is too large: expected at most "
            f"{_MOST_TOKENS} tokens",
            hint="longer prompts are read in several calls: smaller --max-prefill, or --prefill-batch",
        )
    request = engine_request(
        backend,
        max_batch=max_batch,
        max_prefill=max_prefill,
        prefill_batch=prefill_batch,
        plugins=plugins,
        workspace_bytes=(workspace_mib or 0) << 20,
        optimization_level=optimization_level,
        compute_capabilities=list(dict.fromkeys(_capability(name) for name in compute_capabilities)),
        timing_cache=str(_timing_cache(backend)) if use_timing_cache and backend == "tensorrt" else "",
        fuse=fuse,
    )
    try:
        work = tempfile.TemporaryDirectory(prefix=".engine.", suffix=".partial", dir=bundle.path)
    except OSError as error:
        raise BundleError(f"{bundle.path} cannot be written: {error}", hint="check the permissions there") from error
    with work as folder:
        answer = engine_file(bundle, request, Path(folder), say)
        facts = {
            **{key: answer[key] for key in ("product", "version", "plugins", "plugin_sources", "architecture")},
            "platform": f"{platform.system().lower()}-{platform.machine()}",
            "compute_capabilities": request["compute_capabilities"],
            "onnx_sha256": bundle.manifest["files"][PORTABLE]["sha256"],
            "weights_sha256": bundle.manifest["files"][WEIGHTS]["sha256"],
            "max_batch": max_batch,
            "max_prefill": max_prefill,
            "prefill_batch": prefill_batch,
            "build_seconds": answer["build_seconds"],
            "weights": answer["weights"],
            "fused": answer["fused"],
            "pending": answer["pending"],
            "layers": answer["layers"],
        }
        return add_engine(bundle, backend, Path(folder) / "engine", facts)


def engine_request(
    backend: str,
    *,
    max_batch: int,
    max_prefill: int,
    prefill_batch: int,
    plugins: str,
    workspace_bytes: int = 0,
    optimization_level: int | None = None,
    compute_capabilities: Sequence[str] = (),
    timing_cache: str = "",
    fuse: bool = False,
    mark: Sequence[str] = (),
) -> dict[str, Any]:
    """What :func:`engine_file` is asked for; ``mark`` are tensors of the graph to make outputs too."""
    return {
        "backend": backend,
        "profiles": {
            "decode": [[1, 1, max_batch], [1, 1, 1]],
            "prompt": [[1, prefill_batch, prefill_batch], [1, max_prefill, max_prefill]],
        },
        "plugins": plugins,
        "workspace_bytes": workspace_bytes,
        "optimization_level": optimization_level,
        "compute_capabilities": list(compute_capabilities),
        "timing_cache": timing_cache,
        "fuse": fuse,
        "mark": list(mark),
    }


def engine_file(bundle: Bundle, request: dict[str, Any], folder: Path, say: Say) -> dict[str, Any]:
    """Have a process build what the request says, as the file ``engine`` in a folder.

    Returns:
        The process's answer, see :mod:`mamba_deploy.exporters.engine_process`.

    Raises:
        MambaDeployError: What the process raised, or that it died.
    """
    bundle.file(WEIGHTS)
    dtypes = {"dtype": bundle.contract.dtype, "state_dtype": bundle.contract.state_dtype}
    where = {"onnx": str(bundle.file(PORTABLE).resolve()), "show_progress": sys.stderr.isatty()}
    folder = folder.resolve()  # the process changes its directory
    (folder / "request.json").write_text(json.dumps({**request, **dtypes, **where}), encoding="utf-8")
    environment = dict(os.environ)
    if request["backend"] == "tensorrt-rtx" and (libraries := rtx_folder()) is not None:
        paths = [str(libraries), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # the same packages as here,
    environment["PYTHONSAFEPATH"] = "1"  # and not what lies in the current directory
    command = [sys.executable, "-m", "mamba_deploy.exporters.engine_process", str(folder / "request.json")]
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=2,  # where progress is shown; our own stdout is for results
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stderr is not None
        last = ""
        try:
            for line in process.stderr:
                last = line.strip() or last
                say(line.rstrip("\n"))
        except BaseException:
            process.kill()
            raise
    if not (folder / "answer.json").exists():
        said = f"; it last said: {last}" if last else ""
        raise EngineError(
            f"the process that builds the engine of {bundle.path} died, {_died(process.returncode)}{said}",
            hint=_NO_MEMORY if process.returncode == -signal.SIGKILL else _FAULT,
        )
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    if "error" in answer:
        raise getattr(errors, answer["kind"])(answer["error"], hint=answer["hint"])
    return answer


def _died(code: int) -> str:
    return f"of signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _capability(name: str) -> str:
    """``"8.6"``, ``"86"`` and ``"sm_86"`` are the same."""
    number = re.sub(r"^sm_|\.", "", name)
    if not number.isdigit():
        raise InputError(f"compute capability is {name!r}: expected a number like 86 or 8.6")
    return number


def _timing_cache(backend: str) -> Path:
    """One for each kind of GPU; TensorRT itself refuses entries of another of its versions."""
    return cache_folder() / "timing" / f"{backend}-{platform.machine()}-{'-'.join(gpu_architectures()) or 'none'}.cache"
