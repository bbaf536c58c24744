"""The GPU: memory, a stream, CUDA graphs. The only module of the runtime that touches CUDA.

pycuda for everything but graphs, which it does not have, and memory of the host that is page-locked afterwards, for its
register_host_memory() crashes (2026.1 with NumPy 1.26); those come from cuda-bindings, graphs on pycuda's stream. The
primary context is used, which TensorRT and other libraries share.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

from numpy.typing import NDArray

from mamba_deploy.errors import EngineError, MissingDependencyError, require

__all__ = ["ALIGNMENT", "Device", "Graph", "Memory", "View", "aligned"]

ALIGNMENT = 256  # bytes; what TensorRT asks of every address
_COPY_BYTES = 2 << 30  # of a copy that is timed, at most: far more than any cache holds
_COPIES_WARM, _COPIES = 20, 9  # clocks of a GPU that was idle rise slowly
_TYPESTRS = {"float32": "<f4", "float64": "<f8", "int32": "<i4"}


def aligned(nbytes: int) -> int:
    """Room for so many bytes, after which another tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class View(NamedTuple):
    """A dense array on the device, for kernels that take ``__cuda_array_interface__``."""

    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": _TYPESTRS[self.dtype], "data": (self.address, False), "version": 3}


class Memory:
    """An allocation on the device."""

    def __init__(self, allocation: Any, nbytes: int) -> None:
        self._allocation = allocation
        self.nbytes = nbytes

    @property
    def address(self) -> int:
        return int(self._allocation)

    def free(self) -> None:
        """Give it back. Twice does nothing."""
        if self._allocation is not None:
            self._allocation.free()
        self._allocation = None


class Graph:
    """Work that was captured once and is launched as a whole."""

    def __init__(self, bindings: Any, executable: Any, stream: int, kernels: int) -> None:
        self._bindings, self._executable, self._stream = bindings, executable, stream
        self.kernels = kernels  # that a launch runs

    def launch(self) -> None:
        """Enqueue it on the stream it was captured from.

        Raises:
            EngineError: CUDA refuses it.
        """
        _answer(self._bindings, self._bindings.cuGraphLaunch(self._executable, self._stream), "launch a CUDA graph")

    def free(self) -> None:
        """Give it back. Twice does nothing."""
        if self._executable is not None:
            self._bindings.cuGraphExecDestroy(self._executable)
        self._executable = None

    def __del__(self) -> None:
        """One that nobody holds any more."""
        self.free()


class Device:
    """A GPU with one stream of its own. Use it inside ``with device:``, from the thread that made it."""

    def __init__(self, ordinal: int = 0) -> None:
        """Take hold of the GPU's primary context.

        Raises:
            MissingDependencyError: pycuda or cuda-bindings is not installed.
            EngineError: There is no GPU, or no driver for it.
        """
        try:
            self._cuda: Any = require("pycuda.driver", extra="cuda", why="drive the GPU")
        except ImportError as error:
            if isinstance(error, MissingDependencyError):
                raise
            raise EngineError(
                f"pycuda is installed but does not load: {error}",
                hint="libcuda.so.1 comes with NVIDIA's driver; mamba-deploy doctor says what is here",
            ) from error
        self._bindings: Any = require("cuda.bindings.driver", extra="cuda", why="capture CUDA graphs")
        self._thread = threading.get_ident()
        # Kernels are then loaded when they are first run, not all of a library's: 8.6 holds hundreds of MB of them.
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
        try:
            self._cuda.init()
            device = self._cuda.Device(ordinal)
            self._context = device.retain_primary_context()
        except (self._cuda.Error, RuntimeError) as error:
            raise EngineError(
                f"CUDA finds no usable GPU: {error}", hint="mamba-deploy doctor says what this machine has"
            ) from error
        self.name: str = device.name()
        self.architecture = "".join(str(part) for part in device.compute_capability())
        self.l2_bytes = int(device.get_attribute(self._cuda.device_attribute.L2_CACHE_SIZE))
        self._locked: list[NDArray[Any]] = []
        with self:
            self._stream = self._cuda.Stream()

    @property
    def stream(self) -> int:
        """Handle of the stream, a cudaStream_t."""
        return int(self._stream.handle)

    def __enter__(self) -> Device:
        if threading.get_ident() != self._thread:
            raise EngineError(
                "the session was opened in another thread, and belongs to it",
                hint="open a session in each thread, or make all its calls from one",
            )
        self._context.push()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.pop()

    def close(self) -> None:
        """Let the context go; memory is to be given back before."""
        with self:
            for array in self._locked:
                self._bindings.cuMemHostUnregister(array.ctypes.data)
            self._locked.clear()
            self._stream = None
        self._context.detach()

    # --- memory ---------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, what: str) -> Memory:
        """Memory on the device, its contents undefined.

        Args:
            nbytes: At least 1 is taken.
            what: It is for, to be named in an error.

        Raises:
            EngineError: There is not so much.
        """
        try:
            return Memory(self._cuda.mem_alloc(max(nbytes, 1)), nbytes)
        except self._cuda.MemoryError as error:
            free, total = self._cuda.mem_get_info()
            raise EngineError(
                f"the GPU has not enough memory: {what} takes {nbytes >> 20} MiB, and {free >> 20} MiB of "
                f"{total >> 20} are free",
                hint="build with smaller --max-batch, --max-prefill or --prefill-batch, or end other programs",
            ) from error

    def host_array(self, shape: tuple[int, ...], dtype: Any) -> tuple[NDArray[Any], int]:
        """Page-locked zeros on the host that the device reaches too; and their address on the device.

        The memory lives as long as the array.
        """
        flags = self._cuda.host_alloc_flags.DEVICEMAP
        array = self._cuda.pagelocked_empty(shape, dtype, mem_flags=flags)
        array[...] = 0
        base = array
        while not hasattr(base, "get_device_pointer"):
            base = base.base
        return array, int(base.get_device_pointer())

    def page_locked(self, shape: tuple[int, ...], dtype: Any) -> tuple[NDArray[Any], bool]:
        """An array on the host that the device copies to and from at full speed, if the second is true.

        Its contents are undefined. The memory is the host's, so it may outlive the device. Some systems, as WSL, cannot
        page-lock it.
        """
        array = self._cuda.aligned_empty(shape, dtype)
        address: int = array.ctypes.data
        is_locked = int(self._bindings.cuMemHostRegister(address, array.nbytes, 0)[0]) == 0
        if is_locked:
            self._locked.append(array)
        return array, is_locked

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a dense host array to the device, in the order of the stream; the array is to be kept till then."""
        self._cuda.memcpy_htod_async(address, array, self._stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Copy to a dense host array, in the order of the stream."""
        self._cuda.memcpy_dtoh_async(array, address, self._stream)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy within the device, in the order of the stream."""
        self._cuda.memcpy_dtod_async(to, source, nbytes, self._stream)

    def clear(self, address: int, nbytes: int) -> None:
        """Set bytes to 0, in the order of the stream."""
        self._cuda.memset_d8_async(address, 0, nbytes, self._stream)

    def free_bytes(self) -> int:
        """Of the device's memory, what nobody has."""
        return int(self._cuda.mem_get_info()[0])

    # --- order ----------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Wait for all that was enqueued.

        Raises:
            EngineError: Something of it failed.
        """
        try:
            self._stream.synchronize()
        except self._cuda.Error as error:
            raise EngineError(
                f"work on the GPU failed: {error}", hint="the process must be started again to use the GPU"
            ) from error

    def mark(self) -> Any:
        """A point in the stream, for :meth:`wait`."""
        event = self._cuda.Event(self._cuda.event_flags.DISABLE_TIMING)
        event.record(self._stream)
        return event

    def wait(self, event: Any) -> None:
        """Wait until the stream has come past a point.

        Raises:
            EngineError: Something before it failed.
        """
        try:
            event.synchronize()
        except self._cuda.Error as error:
            raise EngineError(f"work on the GPU failed: {error}") from error

    def elapsed(self, enqueue: Callable[[], None]) -> float:
        """Seconds that the device takes for what a function enqueues, from the end of what was enqueued before.

        Raises:
            EngineError: Something of it failed.
        """
        start, end = self._cuda.Event(), self._cuda.Event()
        start.record(self._stream)
        enqueue()
        end.record(self._stream)
        self.wait(end)
        return float(start.time_till(end)) / 1000

    def copy_bandwidth(self) -> float:
        """Bytes a second of a copy within the device, counted as read and as written; the median of several copies.

        Raises:
            EngineError: There is no memory for it.
        """
        places = []
        with self, contextlib.ExitStack() as stack:
            nbytes = aligned(min(_COPY_BYTES, self.free_bytes() // 4))
            for _ in range(2):
                memory = self.allocate(nbytes, "a copy that is timed")
                stack.callback(memory.free)
                places.append(memory.address)
            to, source = places
            times = [self.elapsed(lambda: self.copy(to, source, nbytes)) for _ in range(_COPIES_WARM + _COPIES)]
        return 2 * nbytes / statistics.median(times[_COPIES_WARM:])

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """What a function enqueues on the stream, as a graph; it is not run.

        Raises:
            EngineError: CUDA cannot capture it.
        """
        driver = self._bindings
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _answer(driver, driver.cuStreamBeginCapture(self.stream, mode), "begin to capture a CUDA graph")
        try:
            enqueue()
        finally:
            ended = driver.cuStreamEndCapture(self.stream)
        graph = _answer(driver, ended, "capture a CUDA graph")
        try:
            kernels = _kernels(driver, graph)
            executable = _answer(driver, driver.cuGraphInstantiate(graph, 0), "instantiate a CUDA graph")
        finally:
            driver.cuGraphDestroy(graph)
        return Graph(driver, executable, self.stream, kernels)


def _kernels(driver: Any, graph: Any) -> int:
    """Kernels of a graph, and of the graphs within it."""
    what, kinds = "list the nodes of a CUDA graph", driver.CUgraphNodeType
    counted = driver.cuGraphGetNodes(graph)  # the result, no nodes, their number
    _answer(driver, counted, what)
    nodes = _answer(driver, driver.cuGraphGetNodes(graph, counted[2]), what) if counted[2] else []
    count = 0
    for node in nodes:
        kind = _answer(driver, driver.cuGraphNodeGetType(node), what)
        if kind == kinds.CU_GRAPH_NODE_TYPE_KERNEL:
            count += 1
        elif kind == kinds.CU_GRAPH_NODE_TYPE_GRAPH:
            count += _kernels(driver, _answer(driver, driver.cuGraphChildGraphNodeGetGraph(node), what))
    return count


def _answer(driver: Any, answer: tuple[Any, ...], what: str) -> Any:
    if int(answer[0]) != 0:
        raise EngineError(f"CUDA could not {what}: {driver.CUresult(int(answer[0])).name}")
    return answer[1] if len(answer) > 1 else None
