"""ONNX Runtime on a CPU, or by its CUDA provider."""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract, numpy_dtype
from mamba_deploy.errors import EngineError, MambaDeployError, require
from mamba_deploy.runtime.ort_state import OrtState
from mamba_deploy.runtime.state import State
from mamba_deploy.versions import release

__all__ = ["PROVIDERS", "OrtBackend", "cannot_run", "open_session"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# TensorFloat-32 keeps 10 bits of a float32's 23; the lowered graph computes in float32 whatever the export's dtype.
_CUDA_OPTIONS = {"device_id": "0", "use_tf32": "0"}

_ELEMENT_TYPES = {"float32": 1, "int32": 6, "float16": 10, "bfloat16": 16}  # onnx.TensorProto.DataType


def cannot_run(graph: str, config: MambaConfig, contract: Contract, provider: str = "cpu") -> str:
    """Why the installed ONNX Runtime cannot run a bundle's ``lowered`` or ``portable`` graph; "" if it can.

    The CUDA provider leaves some operators to the CPU, so its graphs are held to the same.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """
    version = _onnxruntime(provider).__version__
    if graph == "portable" and contract.dtype == "bfloat16":
        return "ONNX Runtime has no bfloat16 kernels for a CPU"
    if graph == "lowered" and config.generation == "mamba2" and release(version) < (1, 26):
        return f"ONNX Runtime {version} lacks LinearAttention, which comes with 1.26"
    return ""


def _onnxruntime(provider: str) -> Any:
    return require("onnxruntime", extra="gpu" if provider == "cuda" else "cpu", why="run an ONNX file")


def _prepare_cuda(ort: Any) -> None:
    """Load CUDA's libraries from where pip puts them, so that ONNX Runtime finds them.

    Raises:
        EngineError: This build of ONNX Runtime cannot use CUDA.
    """
    if PROVIDERS["cuda"] not in (available := ort.get_available_providers()):
        raise EngineError(
            f"ONNX Runtime {ort.__version__} has no {PROVIDERS['cuda']} here, only {', '.join(available)}",
            hint="pip uninstall onnxruntime, then pip install 'mamba-deploy[gpu]': the two are installed in one place",
        )
    if hasattr(ort, "preload_dlls"):  # it prints what it lacks on stdout; what matters of it is in _no_cuda's message
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            ort.preload_dlls(cuda=True, cudnn=True)


def _no_cuda(ort: Any) -> EngineError:
    """For a session that ONNX Runtime, without an error, made for the CPU: what its CUDA provider lacks."""
    folder = Path(ort.__file__).parent / "capi"
    reason = "it found no GPU that it can use, or no cuDNN"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        reason = str(error)
    version = getattr(ort, "cuda_version", "")
    return EngineError(
        f"ONNX Runtime {ort.__version__} did not start its {PROVIDERS['cuda']}: {reason}",
        hint=f"it needs NVIDIA's driver and the libraries of CUDA {version} and cuDNN: "
        "pip install 'mamba-deploy[gpu]' 'onnxruntime-gpu[cuda,cudnn]'",
    )


def open_session(
    model: str | bytes, *, threads: int | None = None, provider: str = "cpu", weights: Path | None = None
) -> Any:
    """An ``InferenceSession``, in which nothing falls back.

    Args:
        model: Path of an ONNX file, or its content.
        threads: Threads of one operator on the CPU; None for one a core.
        provider: ``cpu``, or ``cuda`` for the first GPU.
        weights: The folder of the weights file, which content alone does not tell.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        EngineError: It cannot use CUDA here. What it says of the model is an exception of its own.
    """
    ort = _onnxruntime(provider)
    chosen: list[Any] = [PROVIDERS["cpu"]]
    if provider == "cuda":
        _prepare_cuda(ort)
        chosen.insert(0, (PROVIDERS["cuda"], _CUDA_OPTIONS))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.resolve()))
    session = ort.InferenceSession(model, options, providers=chosen, enable_fallback=0)
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise _no_cuda(ort)
    return session


class OrtBackend:
    """An ONNX file in an inference session; states are bound by address, and none is copied in a step."""

    def __init__(self, path: Path, contract: Contract, *, threads: int | None = None, provider: str = "cpu") -> None:
        """Load the graph.

        Args:
            path: The ONNX file.
            contract: What it takes and gives.
            threads: Threads of one operator on the CPU; None for one a core.
            provider: ``cpu``, or ``cuda`` for the first GPU.

        Raises:
            MissingDependencyError: ONNX Runtime is not installed.
            EngineError: ONNX Runtime refuses the file, or cannot use CUDA here.
        """
        self._ort: Any = _onnxruntime(provider)
        try:
            self._session = open_session(str(path), threads=threads, provider=provider)
        except MambaDeployError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise EngineError(
                f"ONNX Runtime {self._ort.__version__} cannot load {path}: {error}",
                hint=f"try a newer one: pip install -U 'mamba-deploy[{'gpu' if provider == 'cuda' else 'cpu'}]'",
            ) from error
        self._contract = contract
        self._steps: weakref.WeakKeyDictionary[State, dict[int, _Binding]] = weakref.WeakKeyDictionary()
        self._provider = provider
        self.name = f"onnxruntime {self._ort.__version__} ({provider}, {path.name})"

    @property
    def contract(self) -> Contract:
        """As given."""
        return self._contract

    def new_state(self, batch: int) -> State:
        """See :class:`mamba_deploy.runtime.backend.Backend`.

        Raises:
            EngineError: There is no room on the GPU.
        """
        if self._provider == "cpu":
            return State(self._contract, batch)
        try:
            return OrtState(self._ort, self._contract, batch, self._provider)
        except Exception as error:
            raise EngineError(f"ONNX Runtime has no room for the state of {batch} rows: {error}") from error

    def run(self, input_ids: NDArray[np.int32], seq_lens: NDArray[np.int32], state: State) -> NDArray[np.float32]:
        """See :class:`mamba_deploy.runtime.backend.Backend`."""
        seq = input_ids.shape[1]
        given = {"input_ids": input_ids, "seq_lens": seq_lens}
        # The two bindings of a step, one for each way the state lies, are made once. Not on a GPU: an input that lies
        # elsewhere than its reader is copied when it is bound there, not when the graph runs.
        kept = self._steps.setdefault(state, {}) if seq == 1 and not isinstance(state, OrtState) else None
        binding = kept.get(id(state.current)) if kept is not None else None
        try:
            if binding is None:
                binding = self._bind(state, given, seq)
                if kept is not None:
                    kept[id(state.current)] = binding
            else:
                for name, array in given.items():
                    np.copyto(binding.arrays[name], array)
            self._session.run_with_iobinding(binding.bound)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed on {input_ids.shape[0]} rows of {seq} tokens: {error}") from error
        state.swap()
        logits = binding.arrays["logits"]
        return logits if kept is None else logits.copy()

    def _bind(self, state: State, given: Mapping[str, NDArray], seq: int) -> _Binding:
        arrays: dict[str, Any] = {}
        bound = self._session.io_binding()
        device = state.device if isinstance(state, OrtState) else "cpu"
        for spec in self._contract.tensors:
            shape = spec.shape(state.batch, seq)
            memory: Any
            if spec.role == "state":
                memory = state.current[spec.name] if spec.direction == "in" else state.spare[str(spec.partner)]
            else:
                memory = np.zeros(shape, numpy_dtype(spec.dtype))
                if spec.name in given:
                    np.copyto(memory, given[spec.name])
            arrays[spec.name] = memory
            address = memory.ctypes.data if isinstance(memory, np.ndarray) else memory.data_ptr()
            bind = bound.bind_input if spec.direction == "in" else bound.bind_output
            bind(
                spec.name,
                device if spec.role == "state" else "cpu",
                0,
                _ELEMENT_TYPES[spec.dtype],
                list(shape),
                address,
            )
        return _Binding(bound, arrays)

    def close(self) -> None:
        """Give the model's memory back."""
        self._steps.clear()
        self._session = None


class _Binding:
    """Addresses given to ONNX Runtime, and the arrays, or values on a GPU, that keep them alive."""

    def __init__(self, bound: Any, arrays: dict[str, Any]) -> None:
        self.bound = bound
        self.arrays = arrays
