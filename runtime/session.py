"""A model with its state: read prompts, step, go back, generate.

session = Session.open("out/")
logits = session.prefill([[1, 2, 3], [4, 5]])   # float32 [2, V]
logits = session.step(logits.argmax(-1))        # float32 [2, V]
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mamba_deploy.bundle import ENGINES, LOWERED, PORTABLE, TOKENIZER, WEIGHTS, Bundle
from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract
from mamba_deploy.errors import EngineError, InputError, MissingDependencyError
from mamba_deploy.runtime.backend import Backend, BatchState
from mamba_deploy.runtime.generate import Ahead, Statistics, Token, generate
from mamba_deploy.runtime.ort import PROVIDERS, OrtBackend, cannot_run
from mamba_deploy.runtime.sampling import Sampling
from mamba_deploy.runtime.state import Snapshot, check_fits
from mamba_deploy.runtime.tokenizer import Tokenizer

__all__ = ["BACKENDS", "Session"]

BACKENDS = ("onnxruntime", "torch", *ENGINES)
DEFAULT_MAX_CHUNK = 512  # of backends that can be given any number of tokens


class Session:
    """A batch of rows that a model reads, and what it remembers of each.

    Every call reads onto the current state. Start over with :meth:`reset`, go back with :meth:`restore`. The number of
    rows is that of the first call, and can change only after ``reset()``. A session belongs to one thread.
    """

    def __init__(
        self,
        backend: Backend,
        config: MambaConfig,
        *,
        tokenizer_directory: Path | None = None,
        max_chunk: int | None = None,
    ) -> None:
        """Use :meth:`open`; this is for backends of your own.

        Raises:
            InputError: ``max_chunk`` is below 1.
        """
        if max_chunk is not None and max_chunk < 1:
            raise InputError(f"max_chunk is {max_chunk}: expected 1 or more tokens")
        most = getattr(backend, "max_chunk", None)  # of an engine, what it was built for
        self.config = config
        self.max_chunk: int = min(max_chunk or most or DEFAULT_MAX_CHUNK, most or sys.maxsize)
        self._backend: Backend | None = backend
        self._state: BatchState | None = None
        self._tokenizer_directory = tokenizer_directory
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        backend: str = "onnxruntime",
        *,
        provider: Literal["cpu", "cuda"] = "cpu",
        graph: Literal["auto", "lowered", "portable"] = "auto",
        threads: int | None = None,
        max_chunk: int | None = None,
    ) -> Session:
        """Open a directory that ``mamba-deploy export`` wrote.

        Args:
            path: The directory.
            backend: ``onnxruntime``; ``torch`` for the PyTorch reference over the same weights; ``tensorrt`` or
                ``tensorrt-rtx`` for an engine that ``mamba-deploy build`` put there.
            provider: For ONNX Runtime: ``cuda`` runs the same graph on the first GPU, and keeps the state there.
            graph: For ONNX Runtime: ``lowered`` is the graph made for CPUs, ``portable`` is ``model.onnx`` itself;
                ``auto`` is the former, or with a warning the latter where ONNX Runtime lacks an operator of it.
            threads: Threads of one operator; None leaves it to the backend.
            max_chunk: Tokens of one call; longer prompts are read in several. It bounds memory, not what can be read.
                None: 512, or as many as the engine was built for.

        Raises:
            BundleError: The directory is no bundle, or damaged, or has no engine.
            MissingDependencyError: The backend's package is not installed.
            EngineError: The backend is unknown or cannot load the model.
            InputError: ``graph``, ``provider`` or ``max_chunk`` is out of range.
        """
        if provider not in PROVIDERS:
            raise InputError(f"provider is {provider!r}: expected 'cpu' or 'cuda'")
        if provider != "cpu" and backend in BACKENDS and backend != "onnxruntime":
            raise InputError(f"provider {provider!r} is ONNX Runtime's: the backend is {backend!r}")
        bundle = Bundle.open(path)
        opened: Backend
        if backend == "onnxruntime":
            opened = _open_onnxruntime(bundle, provider, graph, threads)
        elif backend == "torch":
            try:
                from mamba_deploy.exporters.reference import TorchBackend
            except ModuleNotFoundError as error:
                if error.name is None or error.name.startswith("mamba_deploy"):
                    raise
                raise MissingDependencyError(
                    f"the Python package '{error.name}' is needed to run the PyTorch reference, and is not installed",
                    hint="pip install 'mamba-deploy[export]'",
                ) from error
            opened = TorchBackend.from_bundle(bundle, threads=threads)
        elif backend in ENGINES:
            from mamba_deploy.runtime.engine import TensorRTBackend

            opened = TensorRTBackend(bundle, backend, say=lambda message: warnings.warn(message, stacklevel=2))
        else:
            raise EngineError(f"there is no backend '{backend}'", hint=f"choose one of: {', '.join(BACKENDS)}")
        directory = bundle.path if bundle.has(TOKENIZER) and bundle.file(TOKENIZER) else None
        return cls(opened, bundle.config, tokenizer_directory=directory, max_chunk=max_chunk)

    # --- what it is -----------------------------------------------------------------------------------------------

    @property
    def backend(self) -> Backend:
        """What runs the model.

        Raises:
            EngineError: The session is closed.
        """
        if self._backend is None:
            raise EngineError("the session is closed", hint="open a new one")
        return self._backend

    @property
    def contract(self) -> Contract:
        """Names, dtypes and axes of what the model takes and gives."""
        return self.backend.contract

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Loaded when first asked for; None where the bundle has none."""
        if self._tokenizer is None and self._tokenizer_directory is not None:
            self._tokenizer = Tokenizer.load(self._tokenizer_directory)
        return self._tokenizer

    @property
    def batch(self) -> int | None:
        """Rows; None before the first call."""
        return None if self._state is None else self._state.batch

    # --- reading --------------------------------------------------------------------------------------------------

    def prefill(self, ids: ArrayLike | Sequence[Sequence[int]], *, all_positions: bool = False) -> NDArray[np.float32]:
        """Read token ids onto the current state, each row its own number of them.

        If it fails or is interrupted, in whichever chunk, the state is as it was.

        Args:
            ids: Integers [B, L], or B rows of unequal length. A row without tokens keeps its state, and its logits
                mean nothing; at least one row must have some.
            all_positions: Logits after every token; needs a bundle exported with ``--logits all``.

        Returns:
            Logits float32 [B, V] after each row's last token; with ``all_positions`` [B, L, V], L the longest row,
            zero past a row's end.

        Raises:
            InputError: An id is not in the vocabulary, all rows are empty, or the number of rows changed.
        """
        rows = _token_rows(ids, self.config.vocab_size)
        if all_positions and not self.contract.all_logits:
            raise InputError(
                "this bundle gives logits of the last token only", hint="export it again with --logits all"
            )
        before = self._state
        state = self._state_for(len(rows))
        lengths = np.array([len(row) for row in rows], dtype=np.int32)
        saved = state.snapshot() if before is not None and int(lengths.max()) > self.max_chunk else None
        try:
            return self._read(rows, lengths, state, all_positions)
        except BaseException:
            if saved is not None:
                state.restore(saved)
            self._state = before
            raise

    def _read(
        self, rows: Sequence[NDArray[np.int64]], lengths: NDArray[np.int32], state: BatchState, all_positions: bool
    ) -> NDArray[np.float32]:
        """Run the chunks of checked rows; their logits."""
        longest, V = int(lengths.max()), self.config.vocab_size
        if (lengths == longest).all() and longest <= self.max_chunk and all_positions == self.contract.all_logits:
            return self.backend.run(np.array(rows, np.int32), lengths, state)
        result = np.zeros((len(rows), longest, V) if all_positions else (len(rows), V), np.float32)
        for start in range(0, longest, self.max_chunk):
            width = min(self.max_chunk, longest - start)
            seq_lens = np.clip(lengths - start, 0, width)
            chunk = np.zeros((len(rows), width), np.int32)
            for b, row in enumerate(rows):
                chunk[b, : seq_lens[b]] = row[start : start + width]
            logits = self.backend.run(chunk, seq_lens, state)
            used = np.flatnonzero(seq_lens)
            if all_positions:
                for b in used.tolist():
                    result[b, start : start + seq_lens[b]] = logits[b, : seq_lens[b]]
            elif self.contract.all_logits:
                result[used] = logits[used, seq_lens[used] - 1]
            else:
                result[used] = logits[used]
        return result

    def step(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Read one token a row.

        Args:
            tokens: Integers [B].

        Returns:
            Logits float32 [B, V], the caller's to keep and to write to.

        Raises:
            InputError: An id is not in the vocabulary, or the number of rows changed.
        """
        try:
            checked = np.asarray(tokens)
        except ValueError as error:  # rows of unequal length
            raise InputError(f"step takes one token a row, [B] integers: {error}") from error
        if checked.ndim != 1:
            raise InputError(f"step takes one token a row, [B] integers; got an array of shape {list(checked.shape)}")
        return self.prefill(checked[:, None])

    def _state_for(self, batch: int) -> BatchState:
        if self._state is None:
            self._state = self.backend.new_state(batch)
        elif self._state.batch != batch:
            raise InputError(
                f"the batch has {self._state.batch} rows, and {batch} were given",
                hint="call reset() to start over with another number; a row that reads nothing is an empty list",
            )
        return self._state

    # --- state ----------------------------------------------------------------------------------------------------

    def reset(self, rows: int | Iterable[int] | None = None) -> None:
        """Forget.

        Args:
            rows: Only these rows start over, the others go on; None: all do, and the next call sets their number.

        Raises:
            InputError: There is no such row.
        """
        if rows is None:
            self._state = None
            return
        chosen = list(rows) if isinstance(rows, Iterable) else [rows]
        if any(isinstance(row, bool | np.bool_) or not isinstance(row, int | np.integer) for row in chosen):
            raise InputError(f"rows are {chosen}: expected row numbers")
        batch = self.batch or 0
        for row in chosen:
            if not 0 <= row < batch:
                raise InputError(f"there is no row {row}: the batch has {batch} rows")
        if self._state is not None:
            self._state.reset(chosen)

    def snapshot(self) -> Snapshot:
        """A copy of what is remembered now, in host memory.

        Raises:
            InputError: Nothing was read yet.
        """
        if self._state is None:
            raise InputError("there is no state yet: nothing was read", hint="call prefill first")
        return self._state.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot: of this session, of another, or loaded from a file. Its rows become the batch.

        Raises:
            InputError: It is the state of another model.
        """
        check_fits(snapshot, self.contract)
        if self._state is None or self._state.batch != snapshot.batch:
            self._state = self.backend.new_state(snapshot.batch)
        self._state.restore(snapshot)

    # --- text -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        statistics: Statistics | None = None,
        **sampling: Any,
    ) -> Iterator[Token]:
        """Continue a prompt, or several at once; tokens come as they are made.

        The prompt is read onto the current state; call :meth:`reset` first to start over. Afterwards the state covers
        the prompt and all tokens but the last.

        Args:
            prompt: Text, or token ids; or a list of either, one a row.
            max_tokens: Of each row.
            stop: Texts that end a row.
            statistics: Filled in as the tokens come.
            **sampling: ``temperature`` (0, greedy, by default), ``top_k``, ``top_p``, ``min_p``,
                ``repetition_penalty``, ``seed``: see :class:`mamba_deploy.runtime.sampling.Sampling`.

        Returns:
            An iterator of :class:`Token`; ``str(token)`` is its text. A row ends at the model's end-of-sequence
            token, a stop text, or ``max_tokens``.

        Raises:
            InputError: An argument is out of range, or a text is given and the bundle has no tokenizer.
        """
        try:
            settings = Sampling(**sampling)
        except TypeError as error:
            raise InputError(f"generate: {error}") from error
        return generate(
            self,
            self._encode(prompt),
            max_tokens=max_tokens,
            sampling=settings,
            eos_ids=self.config.eos_token_ids,
            stop=stop,
            tokenizer=self.tokenizer,
            statistics=statistics,
            ahead=self._ahead,
        )

    def _ahead(self, *arguments: Any) -> Ahead | None:
        """Decoding on the device, where the backend has it: :meth:`runtime.engine.TensorRTBackend.decode_ahead`."""
        start = getattr(self.backend, "decode_ahead", None)
        return None if start is None else start(self._state, *arguments)

    def _encode(self, prompt: Any) -> list[list[int]]:
        if hasattr(prompt, "tolist"):  # an array or a tensor
            prompt = prompt.tolist()
        if not isinstance(prompt, str | Sequence):
            raise InputError(f"prompt is {prompt!r}: expected text, token ids, or a list of either")
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int | np.integer))
        rows: list[Any] = []
        for row in [prompt] if single else prompt:
            if isinstance(row, str):
                if self.tokenizer is None:
                    raise InputError(
                        "the bundle has no tokenizer.json, so a prompt must be token ids",
                        hint="export again with --tokenizer FILE, or give ids",
                    )
                row = self.tokenizer.encode(row)
            rows.append(row)
        return rows

    # --- end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give memory back. Closing twice does nothing."""
        if self._backend is not None:
            self._backend.close()
        self._backend = self._state = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_onnxruntime(bundle: Bundle, provider: str, graph: str, threads: int | None) -> OrtBackend:
    if graph not in ("auto", "lowered", "portable"):
        raise InputError(f"graph is {graph!r}: expected 'auto', 'lowered' or 'portable'")
    reason = cannot_run("lowered" if graph == "auto" else graph, bundle.config, bundle.contract, provider)
    if graph == "auto":
        graph = "portable" if reason else "lowered"
        if reason:
            warnings.warn(f"{reason}: running the slower {PORTABLE} instead", stacklevel=3)
            reason = cannot_run(graph, bundle.config, bundle.contract, provider)
    if reason:
        raise EngineError(f"{reason}: it cannot run the {graph} graph of {bundle.path}", hint="try the other graph")
    bundle.file(WEIGHTS)
    path = bundle.file(LOWERED if graph == "lowered" else PORTABLE)
    return OrtBackend(path, bundle.contract, threads=threads, provider=provider)


def _token_rows(ids: Any, vocab_size: int) -> list[NDArray[np.int64]]:
    """Each row as an array, every id checked."""
    if isinstance(ids, str) or not hasattr(ids, "__len__") or getattr(ids, "ndim", 1) == 0:
        raise InputError(f"token ids are {type(ids).__name__}: expected integers [B, L], or a list of rows")
    if len(ids) == 0:
        raise InputError("no rows were given: expected integers [B, L], or a list of rows")
    usual = isinstance(ids, np.ndarray) and ids.ndim == 2 and ids.dtype.kind in "iu" and ids.size > 0
    if usual and ids.min() >= 0 and ids.max() < vocab_size:
        return list(ids.astype(np.int64))
    rows = []
    for b, row in enumerate(ids):
        try:
            array = np.asarray(row)
        except ValueError as error:  # lists of unequal length
            raise InputError(f"row {b} is not a row of integers: {error}") from error
        if array.ndim != 1:
            raise InputError(
                f"row {b} has {array.ndim} axes: expected integers [B, L], or a list of rows of integers",
                hint="for a single prompt give a list with one row" if array.ndim == 0 else "",
            )
        if array.size and array.dtype.kind not in "iu":
            raise InputError(f"row {b} holds {array.dtype} values: expected integers")
        outside = array[(array < 0) | (array >= vocab_size)] if array.size else array
        if outside.size:
            raise InputError(f"row {b} holds token id {outside[0]}: the vocabulary is 0 to {vocab_size - 1}")
        rows.append(array.astype(np.int64))
    if not any(len(row) for row in rows):
        raise InputError("the prompt is empty: expected at least one token in some row")
    return rows
