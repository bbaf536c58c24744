"""The process that builds an engine: ``python -m mamba_deploy.exporters.engine_process REQUEST.json``.

A process of its own, so that the builder's memory is given back, an abort inside TensorRT is an error like another, and
TensorRT-RTX finds its libraries, which must be on the path when a process starts. It writes the engine and a JSON
answer beside the request; messages go to stderr, a line each, and progress to stdout, which is then a terminal.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mamba_deploy.bundle import Bundle
from mamba_deploy.errors import EngineError, MambaDeployError
from mamba_deploy.exporters.engine_graph import ParserGraph, model_parser_graph, parser_graph
from mamba_deploy.exporters.model_graph import covers, pending_words
from mamba_deploy.plugins.toolchain import gpu_architectures
from mamba_deploy.runtime.trt import TensorRT, load

__all__ = ["main"]


def main(request: Path) -> None:
    """Do what the request says; the answer is ``answer.json`` beside it."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    answer: dict[str, Any]
    try:
        answer = _build(asked, request.parent)
    except MambaDeployError as error:
        answer = {"error": str(error), "hint": error.hint, "kind": type(error).__name__}
    except OSError as error:
        hint = "check the free space and the permissions there"
        answer = {"error": f"the engine cannot be written: {error}", "hint": hint, "kind": "BundleError"}
    (request.parent / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _build(asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    onnx_path = Path(asked["onnx"])
    found = load(asked["backend"])
    trt = found.module
    if "bfloat16" in (asked["dtype"], asked["state_dtype"]) and not found.takes_bfloat16:
        raise EngineError(f"{found.label} has no bfloat16", hint="export with --dtype fp16, or use TensorRT 10")
    log = found.logger(_say)
    builder = trt.Builder(log)
    if builder is None:
        raise EngineError(f"{found.label} makes no builder: {_errors(log)}", hint="mamba-deploy doctor")
    plugins = found.load_plugins(asked["plugins"], _say)
    bundle, newest = Bundle.open(onnx_path.parent), found.newest_opset
    fused = asked["fuse"] and covers(bundle.config, bundle.contract)
    if fused:
        graph = model_parser_graph(onnx_path, bundle.config, bundle.contract, newest_opset=newest)
    else:
        graph = parser_graph(onnx_path, newest_opset=newest, bind_weights=found.binds_weights, mark=asked["mark"])
    os.chdir(onnx_path.parent)  # where 8.x looks for the weights, whatever path it is given
    start = time.perf_counter()
    plan, layers = _plan(found, builder, log, graph, {**asked, "fused": fused})
    (folder / "engine").write_bytes(plan)
    seconds = time.perf_counter() - start
    return {
        "product": found.product,
        "version": found.version,
        "plugins": plugins,
        "plugin_sources": found.plugin_sources,
        "weights": graph.weights,
        "fused": fused,
        "pending": pending_words(bundle.config) if fused else 0,
        "layers": layers,
        "build_seconds": round(seconds, 1),
        "architecture": None if found.is_rtx else next(iter(gpu_architectures()), None),
    }


def _plan(found: TensorRT, builder: Any, log: Any, graph: ParserGraph, asked: Mapping[str, Any]) -> tuple[Any, int]:
    """The serialized engine of a graph, and how many layers the parser made of it."""
    trt = found.module
    network = builder.create_network(found.network_flags())
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.content, asked["onnx"]):
        said = "; ".join(_refusal(parser.get_error(i)) for i in range(parser.num_errors))
        raise EngineError(
            f"{found.label} does not take {asked['onnx']}: {said or _errors(log)}",
            hint="export the model again with this version of mamba-deploy",
        )
    config = builder.create_builder_config()
    _configure(found, config, asked)
    _set_formats(found, network)
    if not found.is_strongly_typed:
        _set_precisions(trt, network, config, graph)
    for profile in _profiles(builder, network, [asked["profiles"]["decode"], asked["profiles"]["prompt"]]):
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(
                f"{found.label} refuses the profile: {_errors(log)}", hint="try smaller --max-batch and --max-prefill"
            )
    cache = Path(asked["timing_cache"]) if asked["timing_cache"] else None
    if cache is not None:
        config.set_timing_cache(config.create_timing_cache(cache.read_bytes() if cache.exists() else b""), False)
    monitor = _monitor(trt, asked["show_progress"])
    if monitor is not None:
        config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"{found.label} did not build the engine: {_errors(log)}",
            hint="with too little GPU memory: smaller --max-batch and --max-prefill, or --workspace; else --no-fuse",
        )
    if cache is not None:
        _keep(cache, bytes(config.get_timing_cache().serialize()))
    return plan, network.num_layers


def _errors(log: Any) -> str:
    return "; ".join(log.errors[-3:]) or "it gives no reason"


def _refusal(error: Any) -> str:
    """What the parser says of a node, whose name 8.x does not give."""
    named = [getattr(error, field)() for field in ("node_operator", "node_name") if hasattr(error, field)]
    return " ".join(filter(None, [error.desc(), f"({' '.join(named)})" if any(named) else ""]))


def _keep(cache: Path, content: bytes) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(cache)


def _configure(found: TensorRT, config: Any, asked: Mapping[str, Any]) -> None:
    trt = found.module
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 is to be float32, as it is in PyTorch by default
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for inspect; it costs some kilobytes
    if asked["workspace_bytes"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, asked["workspace_bytes"])
    if asked["optimization_level"] is not None:
        config.builder_optimization_level = asked["optimization_level"]
    if not found.is_strongly_typed:
        # Not cuDNN, which nothing here needs; a handle of each takes memory in every context.
        sources = () if asked["fused"] else (trt.TacticSource.CUBLAS, trt.TacticSource.CUBLAS_LT)
        config.set_tactic_sources(sum(1 << int(source) for source in sources))
    if asked["compute_capabilities"]:
        config.num_compute_capabilities = len(asked["compute_capabilities"])
        for i, name in enumerate(asked["compute_capabilities"]):
            capability = getattr(trt.ComputeCapability, f"SM{name}", None)
            if capability is None:
                known = [n.removeprefix("SM") for n in trt.ComputeCapability.__members__ if n.startswith("SM")]
                raise EngineError(
                    f"{found.label} does not build for compute capability {name}",
                    hint=f"choose from: {', '.join(known)}",
                )
            config.set_compute_capability(capability, i)


def _set_formats(found: TensorRT, network: Any) -> None:
    """Dense tensors at the edges, so that a state is where the runtime puts it."""
    linear = 1 << int(found.module.TensorFormat.LINEAR)
    for i in range(network.num_inputs):
        network.get_input(i).allowed_formats = linear
    for i in range(network.num_outputs):
        network.get_output(i).allowed_formats = linear


def _set_precisions(trt: Any, network: Any, config: Any, graph: ParserGraph) -> None:
    """Hold 8.x to the dtypes of the ONNX file.

    Left alone it computes in whatever is fastest. Its network does not say what the file says: each layer's dtype is
    that of the tensor of this name in the file, or, of the layers that the parser adds, that of what they read.
    """
    by_name = {"float32": trt.float32, "float16": trt.float16}
    skipped = {trt.LayerType.CONSTANT, trt.LayerType.SHAPE, trt.LayerType.CAST, trt.LayerType.PLUGIN_V2}
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    if "float16" in graph.dtypes.values():
        config.set_flag(trt.BuilderFlag.FP16)
    known: dict[str, Any] = {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        known[tensor.name] = tensor.dtype
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        inputs = [layer.get_input(j) for j in range(layer.num_inputs)]
        read = [known[t.name] for t in inputs if t is not None and t.name in known]
        for j in range(layer.num_outputs):
            tensor = layer.get_output(j)
            named = by_name.get(graph.dtypes.get(tensor.name, ""))
            floats = [dtype for dtype in read if dtype in by_name.values()]
            dtype = named or (tensor.dtype if layer.type == trt.LayerType.CONSTANT or not floats else floats[0])
            if tensor.dtype not in by_name.values():
                dtype = tensor.dtype
            known[tensor.name] = dtype
            if layer.type not in skipped and dtype in by_name.values():
                layer.precision = dtype
                layer.set_output_type(j, dtype)


def _profiles(builder: Any, network: Any, asked: list[Any]) -> list[Any]:
    """Of the smallest, best and largest batch and seq of each."""
    made = []
    for batches, seqs in asked:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            shapes = [
                [{0: batch, 1: seq}[axis] if size < 0 else size for axis, size in enumerate(tensor.shape)]
                for batch, seq in zip(batches, seqs, strict=True)
            ]
            profile.set_shape(tensor.name, *shapes)
        made.append(profile)
    return made


def _monitor(trt: Any, show: bool) -> Any:
    """A line on the terminal that says how far the build is, from TensorRT's own account of it."""
    if not show or not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, tuple[int, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = (0, num_steps)
            self.show()

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.steps[phase_name] = (step + 1, self.steps.get(phase_name, (0, 0))[1])
            self.show()
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)
            self.show()

        def show(self) -> None:
            shown = ", ".join(f"{name} {done}/{of}" for name, (done, of) in self.steps.items())
            sys.stdout.write(f"\r\033[K{shown[:100]}")
            sys.stdout.flush()

    return Monitor()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
