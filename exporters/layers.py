"""The residual stream after each layer, as a backend computes it: what `mamba-deploy verify --layers` compares.

The graph names these tensors ``hidden.{layer}``. Here they are made outputs in memory; the bundle stays as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mamba_deploy.bundle import LOWERED, PORTABLE, WEIGHTS, Bundle
from mamba_deploy.contract import numpy_dtype
from mamba_deploy.errors import EngineError, ExportError, MambaDeployError
from mamba_deploy.exporters.engine_build import engine_file, engine_request
from mamba_deploy.exporters.functions import element_type
from mamba_deploy.runtime.engine import TensorRTBackend
from mamba_deploy.runtime.engine_file import MarkedEngine
from mamba_deploy.runtime.ort import open_session

__all__ = ["layer_names", "onnxruntime_layers", "onnxruntime_session", "tensorrt_layers"]

_FILES = {"portable": PORTABLE, "lowered": LOWERED}
Layers = dict[str, NDArray[np.float32]]


def layer_names(bundle: Bundle) -> list[str]:
    """Of the residual stream [batch, seq, d_model] after each layer."""
    return [f"hidden.{i}" for i in range(bundle.config.n_layer)]


def onnxruntime_layers(
    bundle: Bundle,
    tokens: Sequence[int],
    *,
    graph: str = "portable",
    provider: str = "cpu",
    threads: int | None = None,
) -> Layers:
    """Read a prompt in ONNX Runtime.

    Args:
        bundle: Exported with names of the layers.
        tokens: The prompt, read in one call, from a state of zeros.
        graph: ``portable`` or ``lowered``.
        provider: ``cpu``, or ``cuda`` for the first GPU.
        threads: Threads of one operator; None for one a core.

    Returns:
        float32 [L, d_model] by name.

    Raises:
        ExportError: The graph is of before its layers had names.
        MissingDependencyError: ONNX Runtime is not installed.
        EngineError: ONNX Runtime refuses the graph, or fails.
    """
    names = layer_names(bundle)
    given = {
        "input_ids": np.array([tokens], np.int32),
        "seq_lens": np.array([len(tokens)], np.int32),
        **{spec.name: np.zeros(spec.shape(1), numpy_dtype(spec.dtype)) for spec in bundle.contract.states},
    }
    try:
        session = onnxruntime_session(bundle, names, graph=graph, provider=provider, threads=threads)
        from onnxruntime import OrtValue

        feeds = {}
        for spec in bundle.contract.inputs:
            element = element_type(spec.dtype)
            feeds[spec.name] = OrtValue.ortvalue_from_numpy_with_onnx_type(given[spec.name], element)
        found = session.run_with_ort_values(names, feeds)
    except MambaDeployError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise EngineError(f"ONNX Runtime failed on the layers of the {graph} graph: {error}") from error
    return {name: values.numpy()[0] for name, values in zip(names, found, strict=True)}


def onnxruntime_session(
    bundle: Bundle, names: Sequence[str], *, graph: str = "portable", provider: str = "cpu", threads: int | None = None
) -> Any:
    """An ``InferenceSession`` over a graph with these tensors among its outputs; see :func:`onnxruntime_layers`."""
    path = bundle.file(_FILES[graph])
    bundle.file(WEIGHTS)
    model = onnx.load(path, load_external_data=False)
    known = {value.name: value for value in model.graph.value_info}
    for name in names:
        if name not in known:
            raise ExportError(f"{path} has no tensor {name}", hint="export the model again")
        model.graph.output.append(known[name])
    return open_session(model.SerializeToString(), threads=threads, provider=provider, weights=bundle.path)


def tensorrt_layers(
    bundle: Bundle,
    tokens: Sequence[int],
    *,
    backend: str = "tensorrt",
    say: Callable[[str], None] = lambda message: None,
    **options: Any,
) -> Layers:
    """Build a second engine that gives the layers too, and read a prompt in it.

    TensorRT may fuse less in it than in the engine of the bundle: an error of a fusion across layers does not show.

    Args:
        bundle: Exported with names of the layers; has an engine for this backend, whose plugins are used.
        tokens: The prompt, read in one call, from a state of zeros.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        say: Told what is being done.
        **options: Of :class:`mamba_deploy.runtime.engine.TensorRTBackend`.

    Returns:
        float32 [L, d_model] by name.

    Raises:
        ExportError: The graph is of before its layers had names.
        BundleError: No engine was built.
        EngineError: TensorRT is missing, refuses the graph, or fails.
        PluginError: The plugins cannot be built or loaded.
    """
    length, names = len(tokens), layer_names(bundle)
    own = bundle.engine(backend)
    capabilities = own.get("compute_capabilities", [])
    request = engine_request(
        backend,
        max_batch=1,
        max_prefill=length,
        prefill_batch=1,
        plugins=own["plugins"],
        compute_capabilities=capabilities,
        mark=names,
    )
    with tempfile.TemporaryDirectory(prefix="mamba-deploy.") as folder:
        answer = engine_file(bundle, request, Path(folder), say)
        facts = {**own, **answer, "max_batch": 1, "max_prefill": length, "prefill_batch": 1}
        engine = MarkedEngine(Path(folder) / "engine", facts, names)
        runner = TensorRTBackend(bundle, backend, use_graphs=False, say=say, engine=engine, **options)
    try:
        ids = np.zeros((1, length + 1), np.int32)  # one more than are read, so that a single token is a prompt too
        ids[0, :length] = tokens
        runner.run(ids, np.array([length], np.int32), runner.new_state(1))
        return {name: runner.marked[name][0] for name in names}
    finally:
        runner.close()
