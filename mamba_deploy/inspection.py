"""What a path holds, as facts and as text: the `inspect` verb."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mamba_deploy.bundle import ENGINES, LOWERED, MANIFEST, WEIGHTS, Bundle, bound_weight_bytes
from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract
from mamba_deploy.errors import BundleError, InputError, require
from mamba_deploy.limits import Limits, parameter_count

__all__ = ["describe", "render"]


def describe(path: Path) -> dict[str, Any]:
    """Facts about a checkpoint directory, a bundle directory, an ONNX file or an engine in its bundle, ready for JSON.

    Raises:
        MambaDeployError: The path is none of these, or damaged.
    """
    if not path.exists():
        raise InputError(f"there is no {path}", hint="give a checkpoint's or a bundle's directory, or an .onnx file")
    if path.is_file():
        if path.suffix == ".engine":
            return _engine_file_facts(path)
        if path.suffix != ".onnx":
            raise InputError(f"{path} is neither a directory nor an .onnx file nor an .engine file")
        return _onnx_facts(path)
    is_bundle = any((path / name).is_file() for name in (MANIFEST, LOWERED))  # one without its manifest is damaged
    return _bundle_facts(path) if is_bundle else _checkpoint_facts(path)


def _model_facts(config: MambaConfig, contract: Contract) -> dict[str, Any]:
    step = Limits.of(config, contract)
    return {
        "config": config.to_dict(),
        "parameters": parameter_count(config),
        "step": {  # one token, one row
            "weight_bytes": step.weight_bytes,
            "state_bytes": step.state_bytes,
            "bytes": step.bytes,
            "flops": step.flops,
        },
        "state_bytes_per_row": step.state_bytes // 2,
    }


def _bundle_facts(path: Path) -> dict[str, Any]:
    bundle = Bundle.open(path)
    for name in bundle.manifest["files"]:
        bundle.file(name)
    return {
        "kind": "bundle",
        "path": str(path),
        **_model_facts(bundle.config, bundle.contract),
        "dtypes": bundle.manifest["dtypes"],
        "logits": bundle.manifest["logits"],
        "tools": bundle.manifest.get("tools", {}),
        "files": bundle.manifest["files"],
        "engines": {backend: _engine_facts(bundle, backend) for backend in bundle.manifest.get("engines", {})},
        "contract": bundle.manifest["contract"],
    }


def _engine_file_facts(path: Path) -> dict[str, Any]:
    if not (path.parent / MANIFEST).is_file():
        raise InputError(
            f"{path} tells nothing alone: there is no {MANIFEST} beside it", hint="give the engine where it was built"
        )
    bundle = Bundle.open(path.parent)
    backend = next((backend for backend in bundle.manifest.get("engines", {}) if ENGINES.get(backend) == path.name), "")
    if not backend:
        raise InputError(
            f"{path} is no engine of the bundle it lies in: {MANIFEST} does not tell of it",
            hint=f"mamba-deploy build {path.parent}",
        )
    bundle.file(path.name)
    return {"kind": "engine", "path": str(path), "backend": backend, **_engine_facts(bundle, backend)}


def _engine_facts(bundle: Bundle, backend: str) -> dict[str, Any]:
    try:
        facts = bundle.engine(backend)
        built_for = [facts["architecture"]] if facts["architecture"] else facts["compute_capabilities"]
        kept = ("product", "version", "max_batch", "max_prefill", "prefill_batch", "plugins", "build_seconds")
        return {
            "file": ENGINES[backend],
            "bytes": bundle.manifest["files"][ENGINES[backend]]["bytes"],
            "gpus": [f"sm_{name}" for name in built_for],  # none: those that TensorRT-RTX takes unless told
            "bound_weight_bytes": bound_weight_bytes(facts),
            **{key: facts[key] for key in kept},
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{bundle.path / MANIFEST}: what it says of the engine for {backend} is damaged",
            hint=f"mamba-deploy build {bundle.path} --backend {backend}",
        ) from error


def _checkpoint_facts(path: Path) -> dict[str, Any]:
    from mamba_deploy import load_checkpoint  # which says so if torch is missing

    config, weights = load_checkpoint(path)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in weights.values())
    contract = Contract.of(config)
    return {
        "kind": "checkpoint",
        "path": str(path),
        **_model_facts(config, contract),
        "stored_dtypes": dict(dtypes),
        "tensors": {name: list(tensor.shape) for name, tensor in weights.items()},
    }


def _onnx_facts(path: Path) -> dict[str, Any]:
    onnx_ir = require("onnx_ir", extra="export", why="read an ONNX file")
    try:
        model = onnx_ir.load(path)
    except Exception as error:  # protobuf's errors have no public base
        raise InputError(f"{path} cannot be read as ONNX: {error}") from error
    if not model.ir_version:  # a file without a byte is a sound protocol buffer
        raise InputError(f"{path} cannot be read as ONNX: it holds no model")
    nodes = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph)

    def row(value: Any, direction: str) -> dict[str, Any]:
        axes = [d if isinstance(d, int) else str(d) for d in value.shape] if value.shape is not None else None
        dtype = str(value.dtype).lower()
        dtype = {"float": "float32", "double": "float64"}.get(dtype, dtype)  # as a bundle's contract has it
        return {"name": value.name, "direction": direction, "dtype": dtype, "axes": axes}

    return {
        "kind": "onnx",
        "path": str(path),
        "ir_version": model.ir_version,
        "opsets": dict(model.opset_imports),
        "nodes": dict(nodes.most_common()),
        "functions": [function.name for function in model.functions.values()],
        "weight_bytes": sum(
            v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
        ),
        "contract": [row(v, "in") for v in model.graph.inputs] + [row(v, "out") for v in model.graph.outputs],
    }


def render(facts: dict[str, Any]) -> str:
    """The facts as text."""
    lines = [f"{facts['kind']} {facts['path']}"]
    if "config" in facts:
        config, step = facts["config"], facts["step"]
        off = {"conv_bias", "tie_embeddings"}  # of these, False is worth a line
        shown = {k: v for k, v in config.items() if v not in (None, 0, [], "inf") or k in off}
        lines += _section("architecture", shown)
        lines.append(f"parameters      {facts['parameters']:,}")
        lines.append(f"state per row   {facts['state_bytes_per_row']:,} bytes")
        lines.append(f"one token reads and writes at least {step['bytes']:,} bytes (weights {step['weight_bytes']:,})")
    for key in ("dtypes", "stored_dtypes", "opsets", "nodes", "tools"):
        if key in facts:
            lines += _section(key.replace("_", " "), facts[key])
    if "files" in facts:
        lines += _section("files", {name: f"{entry['bytes']:,} bytes" for name, entry in facts["files"].items()})
    for backend, engine in facts.get("engines", {}).items():
        lines += _section(f"engine for {backend}", _shown(engine))
    if facts["kind"] == "engine":
        lines += _section(f"engine for {facts['backend']}", _shown(facts))
        for profile, layers in facts.get("profiles", {}).items():
            lines.append(f"layers of profile {profile}")
            lines += [f"  {layer['name']}  {layer['type']}  {layer['tactic']}".rstrip() for layer in layers]
        if "no_layers" in facts:
            lines.append(f"no layers are shown: {facts['no_layers']}")
    if "contract" in facts:
        lines.append("inputs and outputs")
        lines += [f"  {t['direction']:<3} {t['name']:<20} {t['dtype']:<9} {t['axes']}" for t in facts["contract"]]
    return "\n".join(lines)


def _shown(engine: dict[str, Any]) -> dict[str, Any]:
    bound = engine["bound_weight_bytes"]
    return {
        "file": f"{engine['file']}, {engine['bytes']:,} bytes",
        "weights": f"{bound:,} bytes in {WEIGHTS}" if bound else "inside",
        "built with": f"{engine['product']} {engine['version']}, plugins: {engine['plugins']}",
        "built for": ", ".join(engine["gpus"]) or f"the GPUs of {engine['product']}",
        "built in": f"{engine['build_seconds']} s",
        "step": f"up to {engine['max_batch']} rows",
        "prompt call": f"up to {engine['prefill_batch']} rows of {engine['max_prefill']} tokens",
    }


def _section(title: str, values: dict[str, Any]) -> list[str]:
    width = max((len(name or "ai.onnx") for name in values), default=0)
    return [title, *(f"  {name or 'ai.onnx':<{width}}  {value}" for name, value in values.items())]
