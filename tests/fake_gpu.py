"""A GPU and a TensorRT that are neither, for the runtime's logic: every address, shape, order and lifetime is checked.

Work is queued as on a stream and done when somebody waits, so that a host array written too early shows. The engine is
ONNX Runtime over the bundle's portable graph, told the file and what is marked in it by the engine's content.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from mamba_deploy.bundle import ENGINES, PORTABLE, WEIGHTS, Bundle, add_engine
from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import TensorSpec, numpy_dtype, pending_specs
from mamba_deploy.errors import EngineError
from mamba_deploy.runtime.device import Device
from mamba_deploy.runtime.sampling import Sampling, _filtered

POISON = 0xCB  # what fresh memory holds
_ORT_DTYPES = {"float32": np.float32, "float16": np.float16, "int32": np.int32}


class FakeMemory:
    def __init__(self, device: FakeDevice, address: int, nbytes: int) -> None:
        self.device, self.address, self.nbytes = device, address, nbytes
        self.bytes = np.full(max(nbytes, 1), POISON, np.uint8)

    def free(self) -> None:
        self.device.regions.pop(self.address, None)


class FakeGraph:
    def __init__(self, device: FakeDevice, work: list[Callable[[], None]]) -> None:
        self.device, self.work, self.launches = device, work, 0
        self.kernels = len(work)

    def launch(self) -> None:
        assert self.work is not None, "a graph was launched after it was given back"
        self.launches += 1
        self.device.queue.extend(self.work)

    def free(self) -> None:
        self.work = None  # type: ignore[assignment]


class FakeDevice:
    """In place of :class:`mamba_deploy.runtime.device.Device`."""

    name, architecture, stream = "Fake GPU", "00", 77
    l2_bytes = 1 << 10
    token_seconds, bandwidth = 1e-3, 1e12  # of the engine, a token of all rows; of copies, read and written

    def __init__(self, *, total: int = 1 << 30, can_capture: bool = True, can_lock: bool = True) -> None:
        self.total, self.can_capture, self.can_lock = total, can_capture, can_lock
        self.regions: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.next_address = 1 << 20
        self.depth = self.graphs = 0
        self.now = 0.0  # seconds of work that was done
        self.is_closed = False
        self.thread = threading.get_ident()
        self.on_wait: Callable[[], None] = lambda: None

    def __enter__(self) -> FakeDevice:
        if threading.get_ident() != self.thread:
            raise EngineError("the session was opened in another thread, and belongs to it")
        self.depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self.depth -= 1

    def close(self) -> None:
        assert not self.regions, "memory was not given back before the device"
        self.is_closed = True

    # --- memory

    def allocate(self, nbytes: int, what: str) -> FakeMemory:
        if sum(region.nbytes for region in self.regions.values()) + nbytes > self.total:
            raise EngineError(f"the GPU has not enough memory: {what}")
        memory = FakeMemory(self, self.next_address, nbytes)
        self.regions[memory.address] = memory
        self.next_address += -(-max(nbytes, 1) // 256) * 256 + 4096
        return memory

    def host_array(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, int]:
        return np.zeros(shape, dtype), 0

    def page_locked(self, shape: tuple[int, ...], dtype: Any) -> tuple[Any, bool]:
        return np.full(shape, POISON, dtype), self.can_lock

    def at(self, address: int, nbytes: int) -> Any:
        """The bytes there, which must lie in one allocation."""
        assert self.depth > 0, "the context is not current"
        for start, region in self.regions.items():
            if start <= address and address + nbytes <= start + region.nbytes:
                return region.bytes[address - start : address - start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are in no allocation")

    def enqueue(self, work: Callable[[], None]) -> None:
        assert self.depth > 0, "the context is not current"
        (self.queue if self.captured is None else self.captured).append(work)

    def upload(self, address: int, array: Any) -> None:
        assert array.flags.c_contiguous
        assert self.captured is None
        there = self.at(address, array.nbytes)
        self.enqueue(lambda: there.__setitem__(slice(None), array.reshape(-1).view(np.uint8)))

    def download(self, array: Any, address: int) -> None:
        assert array.flags.c_contiguous
        assert self.captured is None
        there = self.at(address, array.nbytes)
        self.enqueue(lambda: array.reshape(-1).view(np.uint8).__setitem__(slice(None), there))

    def copy(self, to: int, source: int, nbytes: int) -> None:
        there, here = self.at(to, nbytes), self.at(source, nbytes)

        def work() -> None:
            there[...] = here.copy()
            self.now += 2 * nbytes / self.bandwidth

        self.enqueue(work)

    def clear(self, address: int, nbytes: int) -> None:
        there = self.at(address, nbytes)
        self.enqueue(lambda: there.__setitem__(slice(None), 0))

    def free_bytes(self) -> int:
        assert self.depth > 0, "the context is not current"
        return self.total - sum(region.nbytes for region in self.regions.values())

    # --- order

    def synchronize(self) -> None:
        assert self.captured is None, "a capture was synchronised"
        self._run(len(self.queue))

    def _run(self, count: int) -> None:
        self.on_wait()
        for work in self.queue[:count]:
            work()
        del self.queue[:count]

    def mark(self) -> Any:
        mark = [False]
        self.enqueue(lambda: mark.__setitem__(0, True))
        return mark

    def wait(self, event: Any) -> None:
        while not event[0]:
            assert self.queue, "waits for what was never enqueued"
            self._run(1)

    def elapsed(self, enqueue: Callable[[], None]) -> float:
        times: list[float] = []
        self.enqueue(lambda: times.append(self.now))
        enqueue()
        self.enqueue(lambda: times.append(self.now))
        self.wait(self.mark())
        return times[1] - times[0]

    copy_bandwidth = Device.copy_bandwidth

    def capture(self, enqueue: Callable[[], None]) -> FakeGraph:
        if not self.can_capture:
            raise EngineError("CUDA could not capture a CUDA graph: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        self.captured = []
        try:
            enqueue()
        finally:
            work, self.captured = self.captured, None
        self.graphs += 1
        return FakeGraph(self, work)


class _Name(NamedTuple):
    name: str


class FakeEngine:
    """ONNX Runtime over the portable graph."""

    num_layers = 1

    def __init__(self, device: FakeDevice, content: bytes) -> None:
        said = json.loads(content)
        self.device, self.bundle = device, Bundle.open(said["bundle"])
        marked = said.get("mark", [])
        self.facts = said.get("facts") or self.bundle.engine("tensorrt")
        self.tensors = {spec.name: spec for spec in self.bundle.contract.tensors}
        self.weights: dict[str, Any] = {}  # that are inputs
        if said.get("fused"):
            del self.tensors["next_token"]
            self.weights = weights_of(self.bundle)
            names = {np.dtype(np.float16): "float16", np.dtype(np.float32): "float32"}
            self.tensors |= {n: TensorSpec(n, "in", names[w.dtype], w.shape, "weight") for n, w in self.weights.items()}
            self.tensors |= {spec.name: spec for spec in pending_specs(self.facts["pending"])}
        axes = ("batch", "seq", self.bundle.config.d_model)
        self.tensors |= {name: TensorSpec(name, "out", "float32", axes, "logits") for name in marked}
        if marked:
            from mamba_deploy.exporters.layers import onnxruntime_session  # which needs onnx

            self.session = onnxruntime_session(self.bundle, marked, threads=1)
        else:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            self.session = onnxruntime.InferenceSession(str(self.bundle.path / PORTABLE), options)
        self.num_io_tensors = len(self.tensors)
        self.device_memory_size = 1000

    def get_tensor_name(self, i: int) -> str:
        return list(self.tensors)[i]

    def get_tensor_dtype(self, name: str) -> _Name:
        names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}
        return _Name(names[self.tensors[name].dtype])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(axis, str) else axis for axis in self.tensors[name].axes)


def weights_of(bundle: Bundle) -> dict[str, Any]:
    """What a fused engine is given, by name."""
    import onnx

    bound = bound_weights(bundle)
    graph = onnx.load(bundle.path / PORTABLE).graph
    return {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name in bound}


def bound_weights(bundle: Bundle) -> dict[str, list[int]]:
    """Offset and length of it."""
    from mamba_deploy.exporters.engine_graph import model_parser_graph

    graph = model_parser_graph(bundle.path / PORTABLE, bundle.config, bundle.contract)
    return {name: list(place) for name, place in graph.weights.items()}


def pending_words(config: MambaConfig) -> int:
    """As the engine builder finds them, which needs onnx."""
    from mamba_deploy.exporters.model_graph import pending_words

    return pending_words(config)


def _as_inputs(states: Sequence[TensorSpec], found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {spec.name: found[str(spec.partner)] for spec in states}


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.profile = engine, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == self.engine.device.stream
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name == "input_ids":
            facts = self.engine.facts
            limits = [(facts["max_batch"], 1), (facts["prefill_batch"], facts["max_prefill"])][self.profile]
            if not all(1 <= size <= limit for size, limit in zip(shape, limits, strict=True)):
                return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{name} is not aligned"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        device, addresses, shapes = self.engine.device, dict(self.addresses), dict(self.shapes)
        assert stream == device.stream
        batch, seq = shapes["input_ids"]
        places = {}
        for spec in self.engine.tensors.values():
            shape = spec.shape(batch, seq)
            if spec.direction == "in":
                assert shapes[spec.name] == shape, spec.name
            nbytes = math.prod(shape) * numpy_dtype(spec.dtype).itemsize
            places[spec.name] = (device.at(addresses[spec.name], nbytes), shape, spec.dtype)

        def work() -> None:
            feeds, outputs = {}, []
            for spec in self.engine.tensors.values():
                there, shape, dtype = places[spec.name]
                if spec.role == "weight":
                    assert there.tobytes() == self.engine.weights[spec.name].tobytes(), spec.name
                elif spec.name in ("pending", "pending_out"):
                    assert addresses["pending"] == addresses["pending_out"]
                elif spec.direction == "in":
                    feeds[spec.name] = there.view(_ORT_DTYPES[dtype]).reshape(shape).copy()
                else:
                    outputs.append(spec.name)
            ids = feeds["input_ids"]
            feeds["input_ids"] = np.where((ids < 0) | (ids >= self.engine.bundle.config.vocab_size), 0, ids)
            found = dict(zip(outputs, self.engine.session.run(outputs, feeds), strict=True))
            if "pending" in places:
                found = self.with_pending(places["pending"][0].view(np.float32).reshape(batch, -1), feeds, found)
            for name, value in found.items():
                places[name][0][...] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            device.now += seq * device.token_seconds

        device.enqueue(work)
        return True

    def with_pending(
        self, pending: np.ndarray, feeds: dict[str, np.ndarray], found: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """What the engine gives where states lag behind: ``pending`` [B, words] has whether by a token, and its id."""
        session, states = self.engine.session, self.engine.bundle.contract.states
        late = {
            **feeds,
            "input_ids": pending[:, 1:2].astype(np.int32),
            "seq_lens": (pending[:, 0] > 0).astype(np.int32),
        }
        partners = [str(spec.partner) for spec in states]
        settled = dict(zip(partners, session.run(partners, late), strict=True))
        found = dict(zip(found, session.run(list(found), {**feeds, **_as_inputs(states, settled)}), strict=True))
        pending[:] = 0
        if feeds["input_ids"].shape[1] == 1:
            pending[:, 0], pending[:, 1] = feeds["seq_lens"], feeds["input_ids"][:, 0]
            found |= settled
        return found


class FakeKernels:
    """``sample_token`` by the CPU's sampling."""

    def __init__(self, device: FakeDevice, buffers: Any) -> None:
        self.device, self.buffers = device, buffers

    def sample_token(self, logits: Any, uniform: Any, *, stream: int, **given: Any) -> None:
        device, batch = self.device, logits.shape[0]
        arrays = {name: self._view(given.pop(name)) for name in ("steps", "tokens", "seq_lens", "eos_ids")}
        arrays["logits"] = self._view(logits)
        log, random = given.pop("log"), self.buffers.host_uniform
        sampling = Sampling(**given)

        def work() -> None:
            for b in range(batch):
                if arrays["seq_lens"][b] == 0:
                    continue
                slot = int(arrays["steps"][b]) % log.shape[0]
                chosen = self._choose(arrays["logits"][b], sampling, random[slot * batch + b])
                self.buffers.host_log[slot * batch + b] = chosen
                arrays["tokens"][b] = max(chosen, 0)
                arrays["steps"][b] += 1
                if chosen in arrays["eos_ids"]:
                    arrays["seq_lens"][b] = 0

        device.enqueue(work)

    def _view(self, view: Any) -> Any:
        dtype = np.dtype(view.dtype)
        there = self.device.at(view.address, math.prod(view.shape) * dtype.itemsize)
        return there.view(dtype).reshape(view.shape)

    @staticmethod
    def _choose(logits: Any, sampling: Sampling, random: float) -> int:
        if not np.isfinite(logits).all():
            return -1
        if sampling.temperature == 0:
            return int(np.argmax(logits))
        ids, weights = _filtered(logits, sampling)
        cumulative = np.cumsum(weights)
        return int(ids[np.searchsorted(cumulative, random * cumulative[-1], side="right")])


class FakeRuntime:
    def __init__(self, log: Any) -> None:
        self.log = log

    def deserialize_cuda_engine(self, content: Any) -> Any:
        return FakeEngine(self.log.device, bytes(content))


class FakeTensorRT:
    """In place of :class:`mamba_deploy.runtime.trt.TensorRT`."""

    label, product, version, plugin_sources = "TensorRT 99.0", "TensorRT", "99.0", "sources"

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.module: Any = type("module", (), {"Runtime": FakeRuntime})

    def logger(self, say: Any) -> Any:
        log = type("Log", (), {})()
        log.errors, log.device = [], self.device
        return log

    def load_plugins(self, kind: str, say: Any) -> str:
        return "python"

    def find_products(self) -> None:
        pass

    def memory_bytes(self, engine: Any) -> int:
        return int(engine.device_memory_size)

    def new_context(self, engine: Any, memory: int, size: int) -> Any:
        with self.device:
            self.device.at(memory, size)
        return FakeContext(engine)


def give_engine(
    path: Path,
    *,
    max_batch: int = 8,
    max_prefill: int = 2048,
    prefill_batch: int = 1,
    fused: bool = False,
    **other: Any,
) -> Bundle:
    """Put an engine of the fake TensorRT into a bundle; ``fused``, one that is given its weights."""
    bundle = Bundle.open(path)
    made = bundle.path / ".engine"
    made.write_text(json.dumps({"bundle": str(bundle.path), "fused": fused}))
    facts = {
        "product": FakeTensorRT.product,
        "version": FakeTensorRT.version,
        "plugins": "python",
        "plugin_sources": FakeTensorRT.plugin_sources,
        "architecture": FakeDevice.architecture,
        "onnx_sha256": bundle.manifest["files"][PORTABLE]["sha256"],
        "weights_sha256": bundle.manifest["files"][WEIGHTS]["sha256"],
        "max_batch": max_batch,
        "max_prefill": max_prefill,
        "prefill_batch": prefill_batch,
        "weights": bound_weights(bundle) if fused else {},
        "pending": pending_words(bundle.config) if fused else 0,
        "fused": fused,
        "layers": 1,
        "build_seconds": 1.5,
        **other,
    }
    assert "tensorrt" in ENGINES
    return add_engine(bundle, "tensorrt", made, facts)


def build_marked(bundle: Bundle, request: dict[str, Any], folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """In place of :func:`mamba_deploy.exporters.engine_build.engine_file`, for requests that mark tensors."""
    (decode, _), (rows, lengths) = request["profiles"]["decode"], request["profiles"]["prompt"]
    facts = {"max_batch": decode[-1], "prefill_batch": rows[-1], "max_prefill": lengths[-1]}
    content = {"bundle": str(bundle.path), "mark": request["mark"], "facts": facts}
    (folder / "engine").write_text(json.dumps(content))
    return {
        "product": FakeTensorRT.product,
        "version": FakeTensorRT.version,
        "plugins": request["plugins"],
        "plugin_sources": FakeTensorRT.plugin_sources,
        "architecture": FakeDevice.architecture,
        "weights": {},
        "fused": False,
        "pending": 0,
        "layers": 1,
        "build_seconds": 0.0,
    }


def open_backend(bundle: Bundle, device: FakeDevice | None = None, **options: Any) -> Any:
    """The TensorRT backend over the fakes."""
    from mamba_deploy.runtime.engine import TensorRTBackend

    device = device or FakeDevice()
    backend = TensorRTBackend(bundle, tensorrt=FakeTensorRT(device), device=device, **options)  # type: ignore[arg-type]
    backend._kernels = FakeKernels(device, backend.buffers)
    return backend
