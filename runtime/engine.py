"""TensorRT: an engine of the bundle, its state on the GPU, each decode step a CUDA graph.

One stream; everything is allocated at opening. Two execution contexts share their scratch memory: decode, whose step is
captured once for each number of rows, and prompt, a few rows at a time, which is captured when a length comes again.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mamba_deploy.bundle import ENGINES, PORTABLE, WEIGHTS, Bundle
from mamba_deploy.contract import Contract, TensorSpec, numpy_dtype, pending_specs, to_float32
from mamba_deploy.errors import EngineError, InputError, MissingDependencyError, PluginError
from mamba_deploy.plugins.kernels import Kernels, RuntimeKernels
from mamba_deploy.runtime.ahead import BLOCK, LOG_STEPS, Ahead
from mamba_deploy.runtime.device import ALIGNMENT, Device, Graph, Memory, View, aligned
from mamba_deploy.runtime.gpu_state import GpuState, row_bytes, state_bytes
from mamba_deploy.runtime.lent import Lent
from mamba_deploy.runtime.sampling import Sampling
from mamba_deploy.runtime.trt import PluginKind, TensorRT, library_in_use, load

__all__ = ["MarkedEngine", "TensorRTBackend", "load_engine"]

DECODE, PROMPT = 0, 1  # profiles of the engine
_STEPS_KEPT = 16  # single tokens that are read before the state is copied again
_TRT_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32"}
_GRAPHS_KEPT = 16  # one for each number of rows, and for each way of choosing tokens
_PROMPTS_KEPT = 64  # graphs of prompts, and lengths that came once
_PROMPT_STEP = 32  # tokens; prompts are filled up to a multiple, so that most lengths come again
_LOGITS_KEPT = 3  # arrays that logits come to: what a caller has, what it gets next, and one that is never given
_MAX_EOS = 64  # ids that end a row and that the GPU looks for


class MarkedEngine(NamedTuple):
    """An engine of a bundle's graph with tensors within it, each [batch, seq, ...], made outputs too."""

    path: Path
    facts: Mapping[str, Any]  # as the manifest has them of the bundle's own engine
    marked: Sequence[str]


class TensorRTBackend:
    """See :class:`mamba_deploy.runtime.backend.Backend`."""

    steps_ahead = BLOCK  # of :meth:`decode_ahead`, that are enqueued at once

    def __init__(
        self,
        bundle: Bundle,
        backend: str = "tensorrt",
        *,
        use_graphs: bool = True,
        say: Callable[[str], None] = lambda message: None,
        tensorrt: TensorRT | None = None,
        device: Device | None = None,
        engine: MarkedEngine | None = None,
    ) -> None:
        """Load the engine and allocate all it needs.

        Args:
            bundle: Has an engine for this backend.
            backend: ``tensorrt`` or ``tensorrt-rtx``.
            use_graphs: Decode, and read prompts of lengths that come again, from CUDA graphs.
            say: Told what is slower than it should be.
            tensorrt: To use instead of what is installed.
            device: To use instead of the first GPU.
            engine: To use instead of the bundle's; ``marked`` then holds its marked outputs after a prompt call.

        Raises:
            BundleError: No engine was built, or the file is not what was built.
            MissingDependencyError: TensorRT, pycuda or cuda-bindings is not installed.
            EngineError: The engine is of another TensorRT, GPU or model; or there is no GPU, or too little memory.
            PluginError: The plugins cannot be built or loaded.
        """
        facts = engine.facts if engine else bundle.engine(backend)
        trt = tensorrt or load(backend)
        self._contract = bundle.contract
        self.marked: dict[str, NDArray[np.float32]] = {}  # of the last rows of the last prompt call
        self._say, self._use_graphs = say, use_graphs
        self.max_batch, self.max_chunk = int(facts["max_batch"]), int(facts["max_prefill"])
        self._prefill_batch = int(facts["prefill_batch"])
        with contextlib.ExitStack() as stack:  # gives back what was taken if a later step fails
            self.device = device or Device()
            stack.callback(self.device.close)
            _check_fits(bundle, facts, trt, self.device)
            self._memories: list[Memory] = []
            self.memory: dict[str, int] = {}  # bytes taken on the GPU, by what they hold
            stack.callback(self._release)
            with self.device:
                self._open(bundle, backend, facts, trt, engine)
            self._cleanup = stack.pop_all()
        self.name = f"{trt.label} ({self.device.name}, {ENGINES[backend]})"

    def _open(
        self,
        bundle: Bundle,
        backend: str,
        facts: Mapping[str, Any],
        trt: TensorRT,
        engine: MarkedEngine | None,
    ) -> None:
        log = trt.logger(self._say)
        plugins: PluginKind = facts["plugins"]
        self._plugins = trt.load_plugins(plugins, self._say)
        fused = bool(facts.get("fused"))
        if fused:
            trt.find_products()
        path = engine.path if engine else bundle.file(ENGINES[backend])
        self._engine: Any = load_engine(trt, log, path)
        layers = self._engine.num_layers
        if fused and layers > 2 * facts["layers"]:  # for each profile; more would convert what it takes
            self._say(f"slower than it should be: {trt.label} made {layers} layers of one operator")
        marked = engine.marked if engine else ()
        left_out = ("next_token",) if fused else ()
        pending = pending_specs(facts.get("pending", 0))
        self._bound_specs = [spec for spec in (*self._contract.tensors, *pending) if spec.name not in left_out]
        _check_tensors(self._engine, self._bound_specs, [*facts["weights"], *marked])
        self._log = log

        def allocate(nbytes: int, what: str) -> Memory:
            self._memories.append(self.device.allocate(nbytes, what))
            self.memory[what] = nbytes
            return self._memories[-1]

        contract, V = self._contract, next(s for s in self._contract.outputs if s.role == "logits").axes[-1]
        assert isinstance(V, int)
        self._vocab_size = V
        self._weights = self._upload_weights(bundle, facts["weights"], allocate)
        scratch = trt.memory_bytes(self._engine)
        memory = allocate(scratch, "the engine's scratch memory")
        self._row_bytes = row_bytes([*contract.states, *pending[:1]])
        state = state_bytes(self._row_bytes, self.max_batch)
        self._state_memory = allocate(state, f"the state of {self.max_batch} rows")
        self._spare_memory = allocate(state, "the copy of the state")
        staged = state_bytes(self._row_bytes, self._prefill_batch)
        self._staged = allocate(staged, "the state of a prompt call")
        positions = self._prefill_batch * self.max_chunk if contract.all_logits else 1
        self._logits = allocate(4 * V * max(positions, self.max_batch), "logits")
        self._next = allocate(4 * self.max_batch, "next tokens")
        tokens = max(self._prefill_batch * self.max_chunk, self.max_batch)
        self._marked: dict[str, tuple[int, str, tuple[int, ...]]] = {}  # address, dtype, axes after [batch, seq]
        for name in marked:
            dtype = _TRT_DTYPES[self._engine.get_tensor_dtype(name).name]
            axes = tuple(self._engine.get_tensor_shape(name))[2:]
            nbytes = tokens * math.prod(axes) * numpy_dtype(dtype).itemsize
            self._marked[name] = (allocate(nbytes, name).address, dtype, axes)
        self._first_id = aligned(4 * self.max_batch) // 4  # behind the lengths, so that one copy brings both
        inputs = self._first_id + tokens
        self._lens = allocate(4 * inputs, "lengths and token ids").address
        self._ids = self._lens + 4 * self._first_id
        self._steps = allocate(4 * self.max_batch, "step counts")
        self._eos = allocate(4 * _MAX_EOS, "ids that end a row")
        self._host_eos, _ = self.device.host_array((_MAX_EOS,), np.int32)
        self._host_steps, _ = self.device.host_array((self.max_batch,), np.int32)
        self.host_log, self._log_address = self.device.host_array((LOG_STEPS * self.max_batch,), np.int32)
        self.host_uniform, self._uniform_address = self.device.host_array((LOG_STEPS * self.max_batch,), np.float64)
        self._kernels: Kernels | None = None
        self._no_kernels = False
        self._host_inputs, _ = self.device.host_array((inputs,), np.int32)
        arrays, is_locked = self.device.page_locked((_LOGITS_KEPT, self.max_batch, V), np.float32)
        self._host_logits = Lent(arrays)
        if not is_locked:
            self._say("slower than it should be: CUDA cannot page-lock memory here, so logits take longer to the host")
        self._contexts = []
        for profile in (DECODE, PROMPT):
            context = trt.new_context(self._engine, memory.address, scratch)
            if context is None or not context.set_optimization_profile_async(profile, self.device.stream):
                raise EngineError(f"{trt.label} makes no execution context: {'; '.join(log.errors[-3:])}")
            for name, address in self._weights.items():
                context.set_input_shape(name, tuple(self._engine.get_tensor_shape(name)))
                context.set_tensor_address(name, address)
            for name, (address, _, _) in self._marked.items():
                context.set_tensor_address(name, address)
            self._contexts.append(context)
        self.device.synchronize()
        self._state: GpuState | None = None
        self._has_pending = bool(pending)
        self._graphs: dict[Any, Graph] = {}
        # Those of an engine of one operator, in which nothing but its own arguments depends on the length.
        self._capture_prompts = self._use_graphs and fused
        self._fill_prompts = fused and not contract.all_logits and not marked
        self._prompts: OrderedDict[tuple[int, ...], Graph | None] = OrderedDict()  # None: came once; the latest last
        self._bound: dict[int, tuple[int, ...]] = {}  # what each context was last given

    def _upload_weights(
        self, bundle: Bundle, places: Mapping[str, Any], allocate: Callable[[int, str], Memory]
    ) -> dict[str, int]:
        """Of an engine that is given its weights: the address of each, all in one allocation."""
        if not places:
            return {}
        starts, size = {}, 0
        for name, (_, length) in places.items():
            starts[name] = size
            size += aligned(length)
        base = allocate(size, "the weights").address
        found = {}
        with bundle.file(WEIGHTS).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for name, (offset, length) in places.items():
                view = np.frombuffer(content, np.uint8, length, offset)
                self.device.upload(base + starts[name], view)
                found[name] = base + starts[name]
            self.device.synchronize()
            del view  # or the map cannot be closed
        return found

    @property
    def contract(self) -> Contract:
        """As in the bundle."""
        return self._contract

    def new_state(self, batch: int) -> GpuState:
        """Zeros, in the memory where the last state was: that one cannot be used afterwards.

        Raises:
            InputError: There are more rows than the engine was built for.
        """
        if batch > self.max_batch:
            raise InputError(
                f"{batch} rows were given, and the engine was built for {self.max_batch}",
                hint=f"mamba-deploy build OUT --max-batch {batch}",
            )
        if self._state is not None:
            self._state.is_lost = True
        self._state = GpuState(
            self.device, self._contract, self._row_bytes, batch, self._state_memory.address, self._spare_memory.address
        )
        if self._has_pending:
            self._state.complete = functools.partial(self._read_nothing, self._state)
        return self._state

    def _read_nothing(self, state: GpuState) -> None:
        """After this no token is pending: the state's tensors of the contract hold all."""
        self.run(np.zeros((state.batch, 1), np.int32), np.zeros(state.batch, np.int32), state)

    def run(self, input_ids: NDArray[np.int32], seq_lens: NDArray[np.int32], state: GpuState) -> NDArray[np.float32]:
        """See the protocol.

        Raises:
            EngineError: The GPU failed, the state is lost, or this is another thread than the one that opened.
        """
        with self.device:
            state.check()
            single = input_ids.shape[1] == 1
            graph = self._step_graph(state) if single else None
            if not single or state.since is None or len(state.since) >= _STEPS_KEPT:
                state.checkpoint()
            assert state.since is not None
            before = len(state.since)
            try:
                if single:
                    state.since.append((input_ids.copy(), seq_lens.copy()))
                    self._step(input_ids, seq_lens, graph)
                    return self._read_logits(state.batch)
                logits = self._prompt(input_ids, seq_lens, state)
                state.since = None
                return logits
            except BaseException:
                self._undo(state, before, graph)
                raise

    def _undo(self, state: GpuState, before: int, graph: Graph | None) -> None:
        """Take the state back to before a call that was not finished: to the copy, and the tokens read since."""
        state.is_lost = True
        state.since = (state.since or [])[:before]
        self.device.synchronize()
        state.go_back()
        for input_ids, seq_lens in state.since:
            self._step(input_ids, seq_lens, graph)
        self.device.synchronize()
        state.is_lost = False

    # --- decode ---------------------------------------------------------------------------------------------------

    def _step_graph(self, state: GpuState) -> Graph | None:
        """Of one token a row, made when it is first wanted; None without graphs. The state is left as it is."""
        self._bind(DECODE, state.batch, 1, state.addresses)
        return self._graph(("step", state.batch), state, lambda: self._enqueue(DECODE)) if self._use_graphs else None

    def _step(self, input_ids: NDArray[np.int32], seq_lens: NDArray[np.int32], graph: Graph | None) -> None:
        """Enqueue one token a row."""
        self._load(input_ids[:, 0], seq_lens)
        if graph is None:
            self._enqueue(DECODE)
        else:
            graph.launch()

    def _load(self, tokens: NDArray[np.int32], lengths: NDArray[np.int32]) -> None:
        """Put in place what a step reads."""
        self.device.synchronize()  # nothing reads the host array any more
        end = self._first_id + len(tokens)
        self._host_inputs[: len(lengths)] = lengths
        self._host_inputs[self._first_id : end] = tokens
        self.device.upload(self._lens, self._host_inputs[:end])

    def _graph(self, key: Any, state: GpuState, enqueue: Callable[[], None]) -> Graph | None:
        """A graph of what is bound now; None, which is said once, where it cannot be captured."""
        if key in self._graphs:
            return self._graphs[key]
        nobody = np.zeros(state.batch, np.int32)
        self._load(nobody, nobody)
        state.checkpoint()
        try:
            enqueue()  # with no row that reads anything
        finally:
            state.go_back()
            self.device.synchronize()
        graph = self._captured("decoding", enqueue)
        if graph is None:
            self._use_graphs = False
            return None
        if len(self._graphs) >= _GRAPHS_KEPT:
            del self._graphs[next(iter(self._graphs))]
        self._graphs[key] = graph
        return graph

    def _captured(self, what: str, enqueue: Callable[[], None]) -> Graph | None:
        """A graph of what was enqueued just so before, as TensorRT wants; None, which is said, where that fails."""
        try:
            return self.device.capture(enqueue)
        except EngineError as error:
            self._say(f"{what} without CUDA graphs, which is slower: {error}")
            return None

    def _read_logits(self, batch: int) -> NDArray[np.float32]:
        """The caller's own: lent, for a copy may take longer than the step; a copy where that was the last."""
        logits: NDArray[np.float32] = self._host_logits.lend()[:batch]
        self.device.download(logits, self._logits.address)
        self.device.synchronize()
        if self._host_logits.left == 0:
            logits = logits.copy()
        return logits[:, None] if self._contract.all_logits else logits

    # --- for bench ------------------------------------------------------------------------------------------------

    def kernels_a_step(self, state: GpuState) -> int | None:
        """Kernels in the CUDA graph that decoding replays; None without graphs. The state is left as it is."""
        with self.device:
            state.check()
            graph = self._replayed(state)
        return None if graph is None else graph.kernels

    def time_replays(self, tokens: NDArray[np.int32], count: int, state: GpuState) -> float | None:
        """Seconds of the GPU's time for ``count`` greedy steps: the bare graph, with the choice of the next tokens.

        One more step is enqueued before them, so that the GPU has work while the host enqueues the first. Where tokens
        are chosen on the host, steps read the same ones.

        Args:
            tokens: [B] int32, read first.
            count: Steps that are timed.
            state: Of B rows; it is advanced.

        Returns:
            None without graphs.

        Raises:
            EngineError: The GPU failed, or the state is lost.
        """
        with self.device as device:
            state.check()
            graph = self._replayed(state)
            if graph is None:
                return None

            def replay() -> None:
                for _ in range(count):
                    graph.launch()

            state.is_lost = True  # until all of it is done
            self.load(tokens, np.ones(state.batch, np.int32), 0)
            graph.launch()
            seconds = device.elapsed(replay)
            state.since, state.is_lost = None, False
            return seconds

    def _replayed(self, state: GpuState) -> Graph | None:
        """A step with the choice of the likeliest tokens; without it where the host chooses them."""
        self._set_endings([])
        return self._choosing_graph(state, {}) or self._step_graph(state)

    # --- running ahead --------------------------------------------------------------------------------------------

    def decode_ahead(
        self,
        state: GpuState,
        tokens: Sequence[int],
        sampling: Sampling,
        eos_ids: Sequence[int],
        limit: int,
        draw: Callable[[int], float],
    ) -> Ahead | None:
        """Decode with the tokens chosen on the GPU.

        Args:
            state: Of the rows.
            tokens: What each row reads first; -1 for one that has ended.
            sampling: How tokens are chosen.
            eos_ids: Tokens that end a row.
            limit: Steps that may be asked for.
            draw: A random number in [0, 1) for a row, each time it chooses.

        Returns:
            None where this cannot be done here: no CUDA graphs, no kernels, or a repetition penalty, for which the host
            must know each token.
        """
        if sampling.repetition_penalty != 1 or len(eos_ids) > _MAX_EOS:
            return None
        filters: dict[str, Any] = {}
        if sampling.temperature > 0:
            filters = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
            filters["top_k"] = min(sampling.top_k, self._vocab_size)
        with self.device:
            state.check()
            self._set_endings(eos_ids)
            graph = self._choosing_graph(state, filters)
        if graph is None:
            return None
        return Ahead(self, state, graph, tokens, limit, draw if filters else None)

    def _set_endings(self, eos_ids: Sequence[int]) -> None:
        self.device.synchronize()  # nothing reads the host array any more
        self._host_eos[:] = -1
        self._host_eos[: len(eos_ids)] = eos_ids
        self.device.upload(self._eos.address, self._host_eos)

    def _choosing_graph(self, state: GpuState, filters: Mapping[str, Any]) -> Graph | None:
        """Of one token a row and the choice of the next, greedy without filters; None without graphs or the kernel."""
        kernels = self._load_kernels() if self._use_graphs else None
        if kernels is None:
            return None
        batch, V = state.batch, self._vocab_size
        uniform = View(self._uniform_address, (LOG_STEPS, batch), "float64") if filters else None

        def enqueue() -> None:
            self._enqueue(DECODE)
            kernels.sample_token(
                View(self._logits.address, (batch, V), "float32"),
                uniform,
                steps=View(self._steps.address, (batch,), "int32"),
                tokens=View(self._ids, (batch,), "int32"),
                log=View(self._log_address, (LOG_STEPS, batch), "int32"),
                seq_lens=View(self._lens, (batch,), "int32"),
                eos_ids=View(self._eos.address, (_MAX_EOS,), "int32"),
                stream=self.device.stream,
                **filters,
            )

        self._bind(DECODE, batch, 1, state.addresses)
        return self._graph(("ahead", batch, *filters.values()), state, enqueue)

    def load(self, tokens: NDArray[np.int32], lengths: NDArray[np.int32], step: int) -> None:
        """See :class:`mamba_deploy.runtime.ahead.Buffers`."""
        self._load(tokens, lengths)
        steps = self._host_steps[: len(tokens)]
        steps[...] = step
        self.device.upload(self._steps.address, steps)

    def _load_kernels(self) -> Kernels | None:
        """The kernels of the plugins, for the choice of tokens; None, which is said once, where they cannot be had."""
        if self._kernels is None and not self._no_kernels:
            try:
                self._kernels = RuntimeKernels() if self._plugins == "python" else Kernels(library_in_use())
            except (PluginError, MissingDependencyError) as error:
                self._say(f"choosing tokens on the host, which is slower: {error}")
                self._no_kernels = True
        return self._kernels

    # --- prompt ---------------------------------------------------------------------------------------------------

    def _prompt(
        self, input_ids: NDArray[np.int32], seq_lens: NDArray[np.int32], state: GpuState
    ) -> NDArray[np.float32]:
        """Read several tokens a row, a few rows at a time; rows that are read together are as long as the longest."""
        B, L = input_ids.shape
        V, group = self._vocab_size, self._prefill_batch
        shape = (B, L, V) if self._contract.all_logits else (B, V)
        logits = np.zeros(shape, np.float32)
        for start in range(0, B, group):
            rows = slice(start, min(start + group, B))
            count, used = rows.stop - start, int(seq_lens[rows].max())
            if used == 0:
                continue
            width = self._filled(used)
            ids = np.zeros((count, width), np.int32)
            ids[:, :used] = input_ids[rows, :used]
            self._load(ids.ravel(), seq_lens[rows])
            addresses, copies = self._row_addresses(state, start, count)
            for own, staged, nbytes in copies:
                self.device.copy(staged, own, nbytes)
            self._enqueue_prompt(count, width, addresses)
            for own, staged, nbytes in copies:
                self.device.copy(own, staged, nbytes)
            if self._contract.all_logits:
                found = np.empty((count, width, V), np.float32)
                self.device.download(found, self._logits.address)
                self.device.synchronize()
                logits[rows, :width] = found
            else:
                logits[rows] = self._read_logits(count)
            self._read_marked(count, width)
        return logits

    def _filled(self, width: int) -> int:
        """Tokens a row of a prompt call that reads so many; what is behind a row's own, nobody reads."""
        if width == 1 or not self._fill_prompts:
            return width
        return min(-(-width // _PROMPT_STEP) * _PROMPT_STEP, self.max_chunk)

    def _enqueue_prompt(self, rows: int, width: int, states: Mapping[str, int]) -> None:
        """Read what is in place, from a CUDA graph if such rows came twice before."""
        key = _binding(rows, width, states)
        if (graph := self._prompts.get(key)) is not None:
            self._prompts.move_to_end(key)
            graph.launch()
            return
        self._bind(PROMPT, rows, width, states)
        self._enqueue(PROMPT)
        if not self._capture_prompts:
            return
        if key in self._prompts:  # the host has time for it: what was enqueued runs
            graph = self._captured("prompts", lambda: self._enqueue(PROMPT))
            if graph is None:
                self._capture_prompts = False
                return
        self._prompts[key] = graph
        self._prompts.move_to_end(key)
        if len(self._prompts) > _PROMPTS_KEPT:
            self._prompts.popitem(last=False)

    def _read_marked(self, rows: int, width: int) -> None:
        for name, (address, dtype, axes) in self._marked.items():
            found = np.empty((rows, width, *axes), numpy_dtype(dtype))
            self.device.download(found, address)
            self.device.synchronize()
            self.marked[name] = to_float32(found, dtype)

    def _row_addresses(
        self, state: GpuState, start: int, count: int
    ) -> tuple[dict[str, int], list[tuple[int, int, int]]]:
        """Where some rows' state lies; where that is at no address TensorRT takes, a place to copy it to and from.

        Returns:
            Addresses by name; and copies as own address, other address, bytes.
        """
        own = {name: address + start * self._row_bytes[name] for name, address in state.addresses.items()}
        if all(address % ALIGNMENT == 0 for address in own.values()):
            return own, []
        staged, address = {}, self._staged.address
        for name in own:
            staged[name] = address
            address += aligned(self._row_bytes[name] * count)
        return staged, [(own[name], staged[name], count * self._row_bytes[name]) for name in own]

    # --- TensorRT -------------------------------------------------------------------------------------------------

    def _bind(self, profile: int, batch: int, seq: int, states: Mapping[str, int]) -> None:
        """Give a context its shapes and addresses; a state goes out where it came in."""
        key = _binding(batch, seq, states)
        before = self._bound.get(profile, ())
        if before == key:
            return
        context = self._contexts[profile]
        specs = self._bound_specs
        if before[1:] == key[1:]:  # but for the number of tokens
            specs = [spec for spec in specs if spec.role == "tokens"]
        by_role = {
            "tokens": self._ids,
            "lengths": self._lens,
            "logits": self._logits.address,
            "next_token": self._next.address,
        }
        accepted = True
        for spec in specs:
            if spec.direction == "in":
                accepted &= context.set_input_shape(spec.name, spec.shape(batch, seq))
                address = states[spec.name] if spec.role == "state" else by_role[spec.role]
            else:
                address = states[str(spec.partner)] if spec.role == "state" else by_role[spec.role]
            accepted &= context.set_tensor_address(spec.name, address)
        if not accepted:
            self._bound.pop(profile, None)
            raise EngineError(f"TensorRT refuses {batch} rows of {seq} tokens: {'; '.join(self._log.errors[-3:])}")
        self._bound[profile] = key

    def _enqueue(self, profile: int) -> None:
        if not self._contexts[profile].execute_async_v3(self.device.stream):
            raise EngineError(f"TensorRT failed: {'; '.join(self._log.errors[-3:]) or 'it gives no reason'}")

    def _release(self) -> None:
        """Give back all that lies in the device's memory."""
        with self.device as device:
            with contextlib.suppress(EngineError):  # what failed there has been said
                device.synchronize()
            for graph in (*getattr(self, "_graphs", {}).values(), *getattr(self, "_prompts", {}).values()):
                if graph is not None:
                    graph.free()
            self._contexts, self._engine = [], None
            for memory in self._memories:
                memory.free()

    def close(self) -> None:
        """Give the GPU's memory back. Twice does nothing."""
        if self._state is not None:
            self._state.is_lost = True
        self._state = None
        self._cleanup.close()


def _binding(batch: int, seq: int, states: Mapping[str, int]) -> tuple[int, ...]:
    """What a call depends on besides its values; the number of tokens first."""
    return (seq, batch, *states.values())


def load_engine(trt: TensorRT, log: Any, path: Path) -> Any:
    """The engine, deserialised from a map of the file, so that its bytes are in memory but once.

    Raises:
        EngineError: TensorRT does not load it.
    """
    runtime = trt.module.Runtime(log)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        made = runtime.deserialize_cuda_engine(content)
    if made is None:
        raise EngineError(
            f"{trt.label} does not load {path}: {'; '.join(log.errors[-3:])}",
            hint=f"build it again: mamba-deploy build {path.parent}",
        )
    return made


def _check_fits(bundle: Bundle, facts: Mapping[str, Any], trt: TensorRT, device: Device) -> None:
    """Raise unless the engine was built for this model, TensorRT, GPU and plugins."""
    files = bundle.manifest["files"]
    differences = [
        ("another model.onnx", facts["onnx_sha256"], files[PORTABLE]["sha256"]),
        ("other weights", facts["weights_sha256"], files[WEIGHTS]["sha256"]),
        ("another TensorRT", f"{facts['product']} {facts['version']}", trt.label),
        ("other plugin sources", facts["plugin_sources"], trt.plugin_sources),
    ]
    if facts["architecture"]:
        differences.append(("another GPU", f"sm_{facts['architecture']}", f"sm_{device.architecture}"))
    for what, built, here in differences:
        if built != here:
            raise EngineError(
                f"the engine in {bundle.path} was built for {what}: {built}, and here is {here}",
                hint=f"build it on this machine: mamba-deploy build {bundle.path}",
            )


def _check_tensors(engine: Any, specs: Sequence[TensorSpec], others: Iterable[str]) -> None:
    """Raise unless the engine takes and gives what the contract says, and these others."""
    names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    wanted = {spec.name for spec in specs} | set(others)
    if odd := sorted(names ^ wanted):
        raise EngineError(f"the engine and the contract do not have the same tensors: {', '.join(odd[:4])}")
    for spec in specs:
        dtype = _TRT_DTYPES.get(engine.get_tensor_dtype(spec.name).name)
        if dtype != spec.dtype:
            raise EngineError(f"the engine has {spec.name} in {dtype} where the contract says {spec.dtype}")
