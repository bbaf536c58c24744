"""TensorRT: an engine of the bundle, its state on the GPU, each decode step a CUDA graph.

One stream; everything is allocated at opening. Two execution contexts share their scratch memory: decode, whose step is
captured once for each number of rows, and prompt, a few rows at a time, which is captured when a length comes again.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_deploy.bundle import ENGINES, Bundle
from mamba_deploy.contract import Contract, numpy_dtype, pending_specs, to_float32
from mamba_deploy.errors import EngineError, InputError, MissingDependencyError, PluginError
from mamba_deploy.plugins.kernels import Kernels, RuntimeKernels
from mamba_deploy.runtime.ahead import BLOCK, Ahead
from mamba_deploy.runtime.buffers import MAX_EOS, Buffers
from mamba_deploy.runtime.device import ALIGNMENT, Device, Graph, Memory, aligned
from mamba_deploy.runtime.engine_file import (
    TRT_DTYPES,
    MarkedEngine,
    check_fits,
    check_tensors,
    load_engine,
    upload_weights,
)
from mamba_deploy.runtime.gpu_state import GpuState, row_bytes, state_bytes
from mamba_deploy.runtime.sampling import Sampling
from mamba_deploy.runtime.trt import PluginKind, TensorRT, library_in_use, load

__all__ = ["TensorRTBackend"]

DECODE, PROMPT = 0, 1  # profiles of the engine
_STEPS_KEPT = 16  # single tokens that are read before the state is copied again
_GRAPHS_KEPT = 16  # one for each number of rows, and for each way of choosing tokens
_PROMPTS_KEPT = 64  # graphs of prompts, and lengths that came once
_PROMPT_STEP = 32  # tokens; prompts are filled up to a multiple, so that most lengths come again


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
            check_fits(bundle, facts, trt, self.device)
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
        self._log = trt.logger(self._say)
        plugins: PluginKind = facts["plugins"]
        self._plugins = trt.load_plugins(plugins, self._say)
        fused = bool(facts.get("fused"))
        if fused:
            trt.find_products()
        self._engine: Any = load_engine(trt, self._log, engine.path if engine else bundle.file(ENGINES[backend]))
        layers = self._engine.num_layers
        if fused and layers > 2 * facts["layers"]:  # for each profile; more would convert what it takes
            self._say(f"slower than it should be: {trt.label} made {layers} layers of one operator")
        marked = engine.marked if engine else ()
        left_out = ("next_token",) if fused else ()
        pending = pending_specs(facts.get("pending", 0))
        self._bound_specs = [spec for spec in (*self._contract.tensors, *pending) if spec.name not in left_out]
        check_tensors(self._engine, self._bound_specs, [*facts["weights"], *marked])

        self._has_pending = bool(pending)
        self._row_bytes = row_bytes([*self._contract.states, *pending[:1]])
        self._allocate(bundle, facts["weights"], marked)
        scratch = trt.memory_bytes(self._engine)
        memory = self._take(scratch, "the engine's scratch memory")
        self._contexts = [self._new_context(trt, profile, memory, scratch) for profile in (DECODE, PROMPT)]
        self.device.synchronize()
        self._state: GpuState | None = None
        self._kernels: Kernels | None = None
        self._no_kernels = False
        self._graphs: dict[Any, Graph] = {}
        # Those of an engine of one operator, in which nothing but its own arguments depends on the length.
        self._capture_prompts = self._use_graphs and fused
        self._fill_prompts = fused and not self._contract.all_logits and not marked
        self._prompts: OrderedDict[tuple[int, ...], Graph | None] = OrderedDict()  # None: came once; the latest last
        self._bound: dict[int, tuple[int, ...]] = {}  # what each context was last given

    def _take(self, nbytes: int, what: str) -> Memory:
        """Memory of the GPU until this is closed."""
        self._memories.append(self.device.allocate(nbytes, what))
        self.memory[what] = nbytes
        return self._memories[-1]

    def _allocate(self, bundle: Bundle, weights: Mapping[str, Any], marked: Sequence[str]) -> None:
        """All but the engine's own scratch memory."""
        self._weights = upload_weights(self.device, bundle, weights, self._take)
        state = state_bytes(self._row_bytes, self.max_batch)
        self._state_memory = self._take(state, f"the state of {self.max_batch} rows")
        self._spare_memory = self._take(state, "the copy of the state")
        staged = state_bytes(self._row_bytes, self._prefill_batch)
        self._staged = self._take(staged, "the state of a prompt call")
        tokens = max(self._prefill_batch * self.max_chunk, self.max_batch)
        vocab_size = next(spec for spec in self._contract.outputs if spec.role == "logits").axes[-1]
        assert isinstance(vocab_size, int)
        self.buffers = Buffers(
            self.device,
            self._take,
            vocab_size=vocab_size,
            max_batch=self.max_batch,
            tokens=tokens,
            positions=tokens if self._contract.all_logits else self.max_batch,
            say=self._say,
        )
        self._marked: dict[str, tuple[int, str, tuple[int, ...]]] = {}  # address, dtype, axes after [batch, seq]
        for name in marked:
            dtype = TRT_DTYPES[self._engine.get_tensor_dtype(name).name]
            axes = tuple(self._engine.get_tensor_shape(name))[2:]
            nbytes = tokens * math.prod(axes) * numpy_dtype(dtype).itemsize
            self._marked[name] = (self._take(nbytes, name).address, dtype, axes)

    def _new_context(self, trt: TensorRT, profile: int, memory: Memory, nbytes: int) -> Any:
        """For one profile, over scratch memory that is shared; what never changes is bound."""
        context = trt.new_context(self._engine, memory.address, nbytes)
        if context is None or not context.set_optimization_profile_async(profile, self.device.stream):
            raise EngineError(f"{trt.label} makes no execution context: {'; '.join(self._log.errors[-3:])}")
        for name, address in self._weights.items():
            context.set_input_shape(name, tuple(self._engine.get_tensor_shape(name)))
            context.set_tensor_address(name, address)
        for name, (address, _, _) in self._marked.items():
            context.set_tensor_address(name, address)
        return context

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
                    logits = self.buffers.read_logits(state.batch)
                    return logits[:, None] if self._contract.all_logits else logits
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
        self.buffers.load_tokens(input_ids[:, 0], seq_lens)
        if graph is None:
            self._enqueue(DECODE)
        else:
            graph.launch()

    def _graph(self, key: Any, state: GpuState, enqueue: Callable[[], None]) -> Graph | None:
        """A graph of what is bound now; None, which is said once, where it cannot be captured."""
        if key in self._graphs:
            return self._graphs[key]
        nobody = np.zeros(state.batch, np.int32)
        self.buffers.load_tokens(nobody, nobody)
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
            self.buffers.load_step(tokens, np.ones(state.batch, np.int32), 0)
            graph.launch()
            seconds = device.elapsed(replay)
            state.since, state.is_lost = None, False
            return seconds

    def _replayed(self, state: GpuState) -> Graph | None:
        """A step with the choice of the likeliest tokens; without it where the host chooses them."""
        self.buffers.load_endings([])
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
        if sampling.repetition_penalty != 1 or len(eos_ids) > MAX_EOS:
            return None
        filters: dict[str, Any] = {}
        if sampling.temperature > 0:
            filters = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
            filters["top_k"] = min(sampling.top_k, self.buffers.vocab_size)
        with self.device:
            state.check()
            self.buffers.load_endings(eos_ids)
            graph = self._choosing_graph(state, filters)
        if graph is None:
            return None
        return Ahead(self.buffers, state, graph, tokens, limit, draw if filters else None)

    def _choosing_graph(self, state: GpuState, filters: Mapping[str, Any]) -> Graph | None:
        """Of one token a row and the choice of the next, greedy without filters; None without graphs or the kernel."""
        kernels = self._load_kernels() if self._use_graphs else None
        if kernels is None:
            return None
        arguments = self.buffers.of_choice(state.batch, is_drawn=bool(filters))

        def enqueue() -> None:
            self._enqueue(DECODE)
            kernels.sample_token(**arguments, stream=self.device.stream, **filters)

        self._bind(DECODE, state.batch, 1, state.addresses)
        return self._graph(("ahead", state.batch, *filters.values()), state, enqueue)

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
        V, group = self.buffers.vocab_size, self._prefill_batch
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
            self.buffers.load_tokens(ids.ravel(), seq_lens[rows])
            addresses, copies = self._row_addresses(state, start, count)
            for own, staged, nbytes in copies:
                self.device.copy(staged, own, nbytes)
            self._enqueue_prompt(count, width, addresses)
            for own, staged, nbytes in copies:
                self.device.copy(own, staged, nbytes)
            if self._contract.all_logits:
                logits[rows, :width] = self.buffers.read_all_logits(count, width)
            else:
                logits[rows] = self.buffers.read_logits(count)
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
            "tokens": self.buffers.ids,
            "lengths": self.buffers.lens,
            "logits": self.buffers.logits,
            "next_token": self.buffers.next_token,
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
