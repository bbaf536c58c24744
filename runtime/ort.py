"""ONNX Runtime on a CPU."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract, numpy_dtype
from mamba_deploy.errors import EngineError, require
from mamba_deploy.runtime.state import State

__all__ = ["OrtBackend", "cannot_run"]

_ELEMENT_TYPES = {"float32": 1, "int32": 6, "float16": 10, "bfloat16": 16}  # onnx.TensorProto.DataType


def cannot_run(graph: str, config: MambaConfig, contract: Contract) -> str:
    """Why the installed ONNX Runtime cannot run a bundle's ``lowered`` or ``portable`` graph on a CPU; "" if it can.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """
    version = require("onnxruntime", extra="cpu", why="run an ONNX file").__version__
    if graph == "portable" and contract.dtype == "bfloat16":
        return "ONNX Runtime has no bfloat16 kernels for a CPU"
    if graph == "lowered" and config.generation == "mamba2" and _release(version) < (1, 26):
        return f"ONNX Runtime {version} lacks LinearAttention, which comes with 1.26"
    return ""


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


class OrtBackend:
    """An ONNX file in an inference session; states are bound by address, and nothing is copied in a step."""

    def __init__(self, path: Path, contract: Contract, *, threads: int | None = None) -> None:
        """Load the graph.

        Args:
            path: The ONNX file.
            contract: What it takes and gives.
            threads: Threads of one operator; None for one a core.

        Raises:
            MissingDependencyError: ONNX Runtime is not installed.
            EngineError: ONNX Runtime refuses the file.
        """
        self._ort: Any = require("onnxruntime", extra="cpu", why="run an ONNX file")
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        try:
            self._session = self._ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise EngineError(
                f"ONNX Runtime {self._ort.__version__} cannot load {path}: {error}",
                hint="try a newer one: pip install -U 'mamba-deploy[cpu]'",
            ) from error
        self._contract = contract
        self._steps: weakref.WeakKeyDictionary[State, dict[int, _Binding]] = weakref.WeakKeyDictionary()
        self.name = f"onnxruntime {self._ort.__version__} (cpu, {path.name})"

    @property
    def contract(self) -> Contract:
        """As given."""
        return self._contract

    def new_state(self, batch: int) -> State:
        """See :class:`mamba_deploy.runtime.backend.Backend`."""
        return State(self._contract, batch)

    def run(self, input_ids: NDArray[np.int32], seq_lens: NDArray[np.int32], state: State) -> NDArray[np.float32]:
        """See :class:`mamba_deploy.runtime.backend.Backend`."""
        seq = input_ids.shape[1]
        if seq == 1:  # the two bindings of a step, one for each way the state lies, are made once
            bindings = self._steps.setdefault(state, {})
            key = id(state.current)
            binding = bindings[key] if key in bindings else bindings.setdefault(key, self._bind(state, seq))
        else:
            binding = self._bind(state, seq)
        np.copyto(binding.arrays["input_ids"], input_ids)
        np.copyto(binding.arrays["seq_lens"], seq_lens)
        try:
            self._session.run_with_iobinding(binding.bound)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed on {input_ids.shape[0]} rows of {seq} tokens: {error}") from error
        state.swap()
        return binding.arrays["logits"].copy() if seq == 1 else binding.arrays["logits"]

    def _bind(self, state: State, seq: int) -> _Binding:
        arrays = {}
        bound = self._session.io_binding()
        for spec in self._contract.tensors:
            if spec.role != "state":
                array = np.zeros(spec.shape(state.batch, seq), numpy_dtype(spec.dtype))
            elif spec.direction == "in":
                array = state.current[spec.name]
            else:
                array = state.spare[str(spec.partner)]
            arrays[spec.name] = array
            bind = bound.bind_input if spec.direction == "in" else bound.bind_output
            bind(spec.name, "cpu", 0, _ELEMENT_TYPES[spec.dtype], list(array.shape), array.ctypes.data)
        return _Binding(bound, arrays)

    def close(self) -> None:
        """Give the model's memory back."""
        self._steps.clear()
        self._session = None


class _Binding:
    """Addresses given to ONNX Runtime, and the arrays that keep them alive."""

    def __init__(self, bound: Any, arrays: dict[str, NDArray]) -> None:
        self.bound = bound
        self.arrays = arrays
