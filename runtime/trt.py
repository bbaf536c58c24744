"""Which TensorRT is installed, and all that differs between the versions the package works with.

``tensorrt`` 8.6 to 11 and TensorRT-RTX (``tensorrt_rtx_bindings``) are one :class:`TensorRT` to the engine builder and
to the runtime.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from mamba_deploy.bundle import ENGINES
from mamba_deploy.errors import EngineError, MissingDependencyError, PluginError, require
from mamba_deploy.plugins import cublas
from mamba_deploy.plugins.build import PRODUCTS, current, plugin_library, sources_hash
from mamba_deploy.plugins.python_plugin import register
from mamba_deploy.versions import release

__all__ = ["BACKENDS", "OLDEST", "PluginKind", "TensorRT", "library_in_use", "load", "rtx_folder"]

BACKENDS = tuple(ENGINES)
OLDEST = (8, 6)  # 8.5 has no load_library, and its Python no name for half of what is used here
PluginKind = Literal["auto", "library", "python"]
Say = Callable[[str], None]

# What TensorRT warns of in every build or run, and nobody needs to act on.
_NOISE = (
    "onnx2trt_utils.cpp",  # INT64 constants, which are all small
    "CUDA lazy loading is not enabled",
    "Using PreviewFeature",
    "Tensor DataType is determined at build time",
    "TensorRT encountered issues when converting weights between types",
    "weights are affected by this issue",  # tiny weights below fp16's normals
    "Subnormal FP16 values detected",
    "Check verbose logs for the list of affected weights",
    "If this is not the desired behavior, please modify the weights",
    "Unable to determine GPU memory usage",
    "CUDA initialization failure with error",  # a build without a GPU, which TensorRT-RTX can do
    "CUDA driver version is insufficient",
)


class TensorRT:
    """An installed TensorRT.

    Attributes:
        module: ``tensorrt`` or ``tensorrt_rtx_bindings``.
        product: ``TensorRT`` or ``TensorRT-RTX``.
        version: As the module says it.
    """

    def __init__(self, module: ModuleType, product: str) -> None:
        self.module: Any = module
        self.product = product
        self.version: str = module.__version__
        self._creators: Any = None

    @property
    def label(self) -> str:
        """``TensorRT 10.3.0``."""
        return f"{self.product} {self.version}"

    # --- what a version is like -----------------------------------------------------------------------------------

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which builds without a GPU."""
        return self.product == "TensorRT-RTX"

    @property
    def is_strongly_typed(self) -> bool:
        """Whether a network takes its dtypes from the ONNX file; 8.x chooses them, unless told for each layer."""
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    @property
    def newest_opset(self) -> int | None:
        """The newest ONNX opset its parser documents, where that is below what the exporter writes."""
        return None if self.is_strongly_typed else 17

    @property
    def binds_weights(self) -> bool:
        """Whether weights are inputs of the engine, read from the bundle's weights file, and not part of it.

        8.x lays a weight out once for every profile and layout it finds fastest: with two profiles the engine of a
        130M model in float16 has 608 MB where its weights have 260.
        """
        return not self.is_strongly_typed

    @property
    def takes_bfloat16(self) -> bool:
        """8.6 has no such dtype."""
        return hasattr(self.module.DataType, "BF16")

    # --- logging and plugins --------------------------------------------------------------------------------------

    def logger(self, say: Say) -> Any:
        """An ``ILogger`` that hands on what is wrong, each message once, and keeps the errors in ``errors``."""
        trt = self.module

        class Logger(trt.ILogger):  # type: ignore[name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: list[str] = []
                self.said: set[str] = set()

            def log(self, severity: Any, message: str) -> None:
                if severity > trt.ILogger.Severity.WARNING or any(noise in message for noise in _NOISE):
                    return
                if severity <= trt.ILogger.Severity.ERROR:
                    self.errors.append(message)
                elif message not in self.said:
                    say(f"TensorRT: {message}")
                self.said.add(message)

        return Logger()

    def load_plugins(self, kind: PluginKind, say: Say = lambda message: None) -> str:
        """Make our operators known to this TensorRT, once a process.

        Args:
            kind: ``library``, the C++ one, compiled now if need be; ``python``, over NVRTC, from TensorRT 10 on;
                ``auto``, the library, or the Python plugins where none can be built.
            say: Told why ``auto`` took the Python plugins.

        Returns:
            ``library`` or ``python``.

        Raises:
            PluginError: They cannot be built or loaded.
        """
        if self.module in _loaded:
            return _loaded[self.module]
        chosen = "python"
        if kind != "python":
            try:
                self._load_library()
                chosen = "library"
            except PluginError as error:
                if kind == "library" or not hasattr(self.module, "IPluginV3"):
                    raise
                say(f"plugins in Python, as there is no library: {error}")
        if chosen == "python":
            register(self.module)
        _loaded[self.module] = chosen
        return chosen

    def _load_library(self) -> None:
        named = "MAMBA_DEPLOY_PLUGIN" in os.environ
        if self.is_rtx and not named and current("plugin", self.label) is None:
            raise PluginError(
                f"no plugin library for {self.label} is built",
                hint="mamba-deploy plugin build --tensorrt-include DIR, with the headers of TensorRT-RTX",
            )
        path = library_in_use(self.label)
        registry = self.module.get_plugin_registry()
        if not registry.load_library(path):
            raise PluginError(
                f"{self.label} does not load {path}", hint="build it again: mamba-deploy plugin build --force"
            )

    def find_products(self) -> None:
        """Have cuBLAS open, which an engine that is one operator takes its products from.

        Raises:
            PluginError: There is none.
        """
        cublas.find()

    @property
    def plugin_sources(self) -> str:
        """What an engine's plugins were made of: it runs only with the same, as it holds their workspace sizes."""
        interface = "v3" if self.is_strongly_typed else "v2"
        return next(sources_hash(p) for p in PRODUCTS if p.name == "plugin" and p.interface == interface)[:16]

    # --- calls that have other names in other versions ------------------------------------------------------------

    def network_flags(self) -> int:
        """For ``Builder.create_network``: a batch axis, and dtypes as they stand, where that is to be asked."""
        flags = self.module.NetworkDefinitionCreationFlag
        names = ("STRONGLY_TYPED",) if self.is_strongly_typed else ("EXPLICIT_BATCH",)
        return sum(1 << int(getattr(flags, name)) for name in names)

    def memory_bytes(self, engine: Any) -> int:
        """Scratch memory of an execution context, whatever its profile."""
        return int(getattr(engine, "device_memory_size_v2", None) or engine.device_memory_size)

    def new_context(self, engine: Any, memory: int, size: int) -> Any:
        """An execution context whose scratch memory is ours; None if TensorRT makes none."""
        strategies = getattr(self.module, "ExecutionContextAllocationStrategy", None)
        if strategies is None:
            context = engine.create_execution_context_without_device_memory()
        else:
            context = engine.create_execution_context(strategies.USER_MANAGED)
        if context is not None and hasattr(context, "set_device_memory"):
            context.set_device_memory(memory, size)
        elif context is not None:
            context.device_memory = memory
        return context


def library_in_use(label: str = "") -> str:
    """The plugin library for a TensorRT: what MAMBA_DEPLOY_PLUGIN names, else from the cache, compiled if need be.

    Raises:
        PluginError: It cannot be built.
    """
    return os.environ.get("MAMBA_DEPLOY_PLUGIN") or str(plugin_library(label))


_loaded: dict[ModuleType, str] = {}  # registries are global, and refuse a second plugin of a name


def load(backend: str) -> TensorRT:
    """Import it.

    Args:
        backend: ``tensorrt`` or ``tensorrt-rtx``.

    Raises:
        MissingDependencyError: It is not installed.
        EngineError: It is older than 8.6, or its libraries are missing.
    """
    if backend == "tensorrt-rtx":
        _preload_rtx()
        name, product, extra = "tensorrt_rtx_bindings", "TensorRT-RTX", "rtx"
    elif backend == "tensorrt":
        name, product, extra = "tensorrt", "TensorRT", "tensorrt"
    else:
        raise EngineError(f"there is no backend '{backend}'", hint=f"choose one of: {', '.join(BACKENDS)}")
    try:
        module = require(name, extra=extra, why="build or run engines")
    except (ImportError, OSError) as error:
        if isinstance(error, MissingDependencyError):
            raise
        raise EngineError(
            f"{product} is installed but does not load: {error}",
            hint="its libraries must be found: install the wheel with its libraries, or set LD_LIBRARY_PATH",
        ) from error
    found = TensorRT(module, product)
    if not found.is_rtx and release(found.version) < OLDEST:
        raise EngineError(
            f"{found.label} is too old for the Python runtime, which needs 8.6",
            hint="use the plugin library with trtexec or C++ there: mamba-deploy plugin build",
        )
    return found


def rtx_folder() -> Path | None:
    """Where pip put libtensorrt_rtx.so: the ONNX Runtime plugin carries it, and links its names when imported once."""
    spec = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    if not (folder / "libtensorrt_rtx.so").exists():
        with contextlib.suppress(Exception):  # it links on import, whatever else it then misses
            importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")
    return folder


def _preload_rtx() -> None:
    folder = rtx_folder()
    if folder is None:
        return
    for pattern in ("libcudart.so.*", "libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"):
        for path in sorted(folder.glob(pattern)):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path))  # found again by its name; its symbols are not for everybody
