"""Compiles the kernels and the TensorRT plugins, once, into a cache of the user; never touches the network.

A product is a folder of libraries; ``PRODUCTS`` lists them. Its folder in the cache is named by a hash of the sources,
the flags, the compiler, the headers and the architectures, and appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mamba_deploy.errors import PluginError
from mamba_deploy.plugins.toolchain import (
    Compiler,
    Headers,
    Interface,
    choose_architectures,
    find_compiler,
    find_headers,
    gpu_architectures,
    machine_architecture,
    ptx_architecture,
    runs_on,
)

__all__ = [
    "KERNEL_SOURCES",
    "PRODUCTS",
    "SOURCES",
    "Built",
    "build",
    "built",
    "cache_folder",
    "current",
    "describe",
    "is_current",
    "kernels_library",
    "library_path",
    "plugin_library",
    "sources_hash",
]

Say = Callable[[str], None]


class Library(NamedTuple):
    """A shared library. One without kernels is linked with the first of its product, from its own folder."""

    file: str
    sources: tuple[str, ...]
    kernels: bool = True


class Product(NamedTuple):
    """Libraries that are built together; the first gives the product's path."""

    name: str
    interface: Interface | None  # of TensorRT's plugins, where its headers are needed
    libraries: tuple[Library, ...]


KERNEL_SOURCES = (
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
_PLUGIN, _REGISTER = "libmamba_plugin.so", "libmamba_plugin_register.so"
PRODUCTS = (
    Product("kernels", None, (Library("libmamba_kernels.so", ()),)),
    Product(
        "plugin", "v2", (Library(_PLUGIN, ("plugin_v2.cpp",)), Library(_REGISTER, ("plugin_register.cpp",), False))
    ),
    Product(
        "plugin", "v3", (Library(_PLUGIN, ("plugin_v3.cpp",)), Library(_REGISTER, ("plugin_register.cpp",), False))
    ),
)

SOURCES = Path(__file__).resolve().parent
_FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC,-Wall,-Wextra")
_EXPORTS = "{ global: mamba_*; getCreators; getPluginCreators; setLoggerFinder; local: *; };\n"
# Bound to its own kernels, whatever else is in the process: CUDA knows them by the address of their host function.
_LINK_FLAGS = ("-shared", "-Xlinker=--version-script=exports.map", "-Xlinker=-Bsymbolic")
_ENVIRONMENT = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")  # what nvcc itself listens to
_DEFAULT_INCLUDES = ("/usr/include", "/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu")


# --- the cache ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """A product in the cache; all but ``folder`` is kept in its ``build.json``."""

    folder: Path
    name: str
    libraries: tuple[str, ...]
    architectures: tuple[str, ...]
    cuda: str
    tensorrt: str  # "TensorRT 10.3.0"; empty for kernels
    machine: str  # x86_64 or aarch64: a home directory may be shared
    sources: str  # hash
    date: str
    seconds: float

    @property
    def path(self) -> Path:
        return self.folder / self.libraries[0]

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["folder"]
        return values


def cache_folder() -> Path:
    """``$MAMBA_DEPLOY_CACHE``, or ``mamba-deploy`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("MAMBA_DEPLOY_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "mamba-deploy"


def _plugins_folder() -> Path:
    return cache_folder() / "plugins"


def built() -> list[Built]:
    """Everything in the cache, the newest first."""
    found = [entry for entry in map(_read, _plugins_folder().glob("*/build.json")) if entry is not None]
    return sorted(found, key=lambda entry: entry.date, reverse=True)


def _read(record: Path) -> Built | None:
    """None where a library is missing, or another version of this package wrote something else."""
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        values |= {name: tuple(values[name]) for name in ("libraries", "architectures")}
        entry = Built(folder=record.parent, **values)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return entry if all((entry.folder / file).is_file() for file in entry.libraries) else None


def current(name: str, tensorrt: str = "") -> Built | None:
    """The newest that was built from these very sources and runs on every GPU of this machine.

    Args:
        name: ``kernels`` or ``plugin``.
        tensorrt: Of a plugin: the TensorRT that is to load it, "TensorRT 10.3" or "TensorRT-RTX 1.7"; any if empty.
    """
    fitting = (entry for entry in built() if entry.name == name and _loads(entry.tensorrt, tensorrt))
    return next((entry for entry in fitting if is_current(entry)), None)


def is_current(entry: Built) -> bool:
    """Whether it is of this machine's kind and GPUs and of the sources as they are."""
    if entry.machine != platform.machine() or not all(runs_on(entry.architectures, gpu) for gpu in gpu_architectures()):
        return False
    return any(entry.sources == sources_hash(product) for product in PRODUCTS if product.name == entry.name)


def _loads(built_for: str, wanted: str) -> bool:
    """Whether what was built with one TensorRT's headers fits another: of one major; RTX takes those of 10 and up."""
    interface_v3 = built_for.startswith("TensorRT ") and not built_for.startswith(("TensorRT 8", "TensorRT 9"))
    return (
        not wanted
        or built_for.split(".")[0] == wanted.split(".")[0]
        or (wanted.startswith("TensorRT-RTX") and interface_v3)
    )


def sources_hash(product: Product) -> str:
    """Of everything the compiler reads of ours, and of how it is called; of no file that is missing."""
    names = {name for library in product.libraries for name in library.sources} | set(KERNEL_SOURCES)
    headers = {path.name for pattern in ("*.h", "*.cuh") for path in SOURCES.glob(pattern)}
    if product.interface is None:
        headers = {name for name in headers if not name.startswith("plugin")}
    digest = hashlib.sha256(repr((_FLAGS, _LINK_FLAGS, _EXPORTS, product)).encode())
    for name in sorted(names | headers):
        path = SOURCES / name
        digest.update(name.encode() + hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(folder: Path, say: Say) -> Iterator[None]:
    """One build at a time. The kernel lets go of the lock when its process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise PluginError(f"the cache {folder} cannot be written: {error}", hint="set MAMBA_DEPLOY_CACHE") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another build in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- building ----------------------------------------------------------------------------------------------------


def library_path(library: str) -> Path | None:
    """Where a library that is current lies: ``kernels``, ``plugin``, or ``register``, the one that registers itself."""
    plugin = current("plugin")
    if library == "kernels":
        entry = current("kernels") or plugin  # whose library exports the kernels as well
        return entry.path if entry else None
    return plugin.folder / (_REGISTER if library == "register" else _PLUGIN) if plugin else None


def kernels_library() -> Path:
    """The library of the kernels for this machine, compiled now if the cache has none."""
    return library_path("kernels") or build("kernels").path


def plugin_library(tensorrt: str = "") -> Path:
    """The TensorRT plugin library for this machine, compiled now if the cache has none.

    Args:
        tensorrt: What is to load it, "TensorRT 10.3" say, "TensorRT-RTX 1.7"; any that has headers here if empty.
    """
    if (found := current("plugin", tensorrt)) is not None:
        return found.path
    headers = find_headers()
    if not _loads(headers.label, tensorrt):
        raise PluginError(
            f"no plugin library for {tensorrt} is built, and the headers in {headers.folder} are of {headers.label}",
            hint=f"mamba-deploy plugin build --tensorrt-include DIR, with the headers of {tensorrt}",
        )
    return build("plugin").path


def build(
    name: str,
    *,
    architectures: Sequence[str] = (),
    cuda: Path | None = None,
    include: Path | None = None,
    force: bool = False,
    say: Say = lambda message: None,
) -> Built:
    """Compile a product, unless the cache has it.

    Args:
        name: ``kernels`` or ``plugin``.
        architectures: ``sm_90`` and so on; those of this machine's GPUs where empty, without a GPU all usual ones.
        cuda: See :func:`find_compiler`.
        include: See :func:`find_headers`.
        force: Compile even so.
        say: Told what is going on.

    Raises:
        PluginError: Something needed is missing, or does not compile.
    """
    compiler = find_compiler(cuda)
    chosen = choose_architectures(architectures, compiler)
    headers = None if name == "kernels" else find_headers(include)
    interface = headers.interface if headers else None
    product = next(product for product in PRODUCTS if (product.name, product.interface) == (name, interface))
    _check_sources(product)
    tensorrt = headers.label if headers else ""
    sources = sources_hash(product)
    environment = [os.environ.get(variable, "") for variable in _ENVIRONMENT]
    key = (sources, compiler.version, tensorrt, chosen, platform.machine(), environment)
    root = _plugins_folder()
    folder = root / f"{name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
    with _lock(root, say):
        for left in root.glob(".build-*"):  # by a process that was killed: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        found = _read(folder / "build.json")
        if found is not None and not force:
            return found
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=".build-", dir=root) as scratch:
            work = Path(scratch)
            _compile(product, compiler, headers, chosen, work, say)
            values = Built(
                folder=folder,
                name=name,
                libraries=tuple(library.file for library in product.libraries),
                architectures=chosen,
                cuda=compiler.version,
                tensorrt=tensorrt,
                machine=platform.machine(),
                sources=sources,
                date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                seconds=round(time.monotonic() - start, 1),
            )
            done = work / "done"
            done.mkdir()
            for file in values.libraries:
                (work / file).rename(done / file)
            (done / "build.json").write_text(json.dumps(values.to_dict(), indent=2) + "\n", encoding="utf-8")
            if folder.exists():
                folder.rename(work / "replaced")
            done.rename(folder)
    say(f"built in {values.seconds} s")
    return values


def _check_sources(product: Product) -> None:
    names = [*KERNEL_SOURCES, *itertools.chain.from_iterable(library.sources for library in product.libraries)]
    if missing := [name for name in names if not (SOURCES / name).is_file()]:
        raise PluginError(f"{SOURCES} lacks {', '.join(missing)}", hint="install mamba-deploy again")


def describe() -> dict[str, Any]:
    """What there is to build with, and what is built."""
    facts: dict[str, Any] = {"cache": str(_plugins_folder()), "gpus": [f"sm_{gpu}" for gpu in gpu_architectures()]}
    for name, find in (("compiler", find_compiler), ("headers", find_headers)):
        try:
            found = find()._asdict()
        except PluginError as error:
            facts[name] = {"missing": str(error), "hint": error.hint}
        else:
            facts[name] = {key: str(value) if isinstance(value, Path) else value for key, value in found.items()}
    facts["built"] = [{**entry.to_dict(), "path": str(entry.path), "current": is_current(entry)} for entry in built()]
    return facts


class _Job(NamedTuple):
    what: str
    command: list[str]


def _compile(
    product: Product, compiler: Compiler, headers: Headers | None, architectures: Sequence[str], work: Path, say: Say
) -> None:
    """Leave the product's libraries in ``work``."""
    (work / "exports.map").write_text(_EXPORTS, encoding="utf-8")
    (work / "rpath").write_text("-rpath=$ORIGIN\n", encoding="utf-8")  # in a file: nvcc hands arguments to a shell
    sources = dict.fromkeys([*KERNEL_SOURCES, *(name for library in product.libraries for name in library.sources)])
    threads = max(1, (os.cpu_count() or 1) // len(sources))
    common = [str(compiler.path), *_FLAGS, *_system_includes(compiler, headers), "-I", str(SOURCES)]
    shown = ", ".join(f"sm_{a}" for a in architectures)
    say(f"compiling {len(sources)} files for {shown} with nvcc {compiler.version}")
    jobs = []
    for source in sources:
        cuda = [*_targets(source, architectures), f"--threads={threads}"] if source.endswith(".cu") else []
        jobs.append(_Job(source, [*common, *cuda, "-c", "-o", f"{source}.o", str(SOURCES / source)]))
    _run(jobs, work, say)
    for library in product.libraries:
        objects = [f"{source}.o" for source in (*(KERNEL_SOURCES if library.kernels else ()), *library.sources)]
        link = [str(compiler.path), *_LINK_FLAGS, f"-Xlinker=-soname={library.file}", "-o", library.file, *objects]
        if not library.kernels:
            link += ["-cudart=none", product.libraries[0].file, "-Xlinker=@rpath"]
        _run([_Job(library.file, link)], work, say)


def _targets(source: str, architectures: Sequence[str]) -> list[str]:
    """Machine code for each architecture, each once, and PTX for newer ones."""
    code = dict.fromkeys(machine_architecture(source, a) for a in architectures)
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in code]
    if (newest := ptx_architecture(architectures)) is not None:
        targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return targets


def _system_includes(compiler: Compiler, headers: Headers | None) -> list[str]:
    """Headers of others, whose warnings are not ours. A compiler's own folders must not be named again."""
    folders = [compiler.include, *([headers.folder] if headers else [])]
    return [f"-isystem={folder}" for folder in folders if str(folder) not in _DEFAULT_INCLUDES]


def _run(jobs: list[_Job], work: Path, say: Say) -> None:
    """Run commands side by side in ``work``; the first that fails ends the others."""
    processes: list[subprocess.Popen[str]] = []
    environment = {**os.environ, "TMPDIR": str(work), "LC_ALL": "C"}

    def run(job: _Job) -> tuple[_Job, int, str]:
        process = subprocess.Popen(
            job.command,
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # nvcc has children
        )
        processes.append(process)
        output, _ = process.communicate()
        return job, process.returncode, output

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            for future in as_completed(futures):
                job, code, output = future.result()
                if code:
                    raise _failure(job, code, output)
                say(f"{job.what}: {output.strip() or 'done'}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
            raise


def _failure(job: _Job, code: int, output: str) -> PluginError:
    """With the first errors: what comes after them follows from them."""
    lines = output.strip().splitlines()
    errors = [i for i, line in enumerate(lines) if re.search(r"\b(error|fatal)\b", line)]
    start = errors[0] if errors else max(0, len(lines) - 20)
    text = "\n".join(lines[start : start + 20]) or "(it printed nothing)"
    killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL) or "Killed" in output
    return PluginError(
        f"{job.what} does not compile (exit status {code}):\n{text}\nwith {shlex.join(job.command)}",
        hint="the compiler was killed, as happens where memory runs out: give one --arch at a time" if killed else "",
    )
