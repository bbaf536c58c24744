"""An engine's file: loading it, and the weights it is given; whether it is one for this bundle on this machine."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mamba_deploy.bundle import PORTABLE, WEIGHTS, Bundle
from mamba_deploy.contract import TensorSpec
from mamba_deploy.errors import EngineError
from mamba_deploy.runtime.device import Device, Memory, aligned
from mamba_deploy.runtime.trt import TensorRT

__all__ = ["TRT_DTYPES", "MarkedEngine", "check_fits", "check_tensors", "load_engine", "upload_weights"]

TRT_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32"}


class MarkedEngine(NamedTuple):
    """An engine of a bundle's graph with tensors within it, each [batch, seq, ...], made outputs too."""

    path: Path
    facts: Mapping[str, Any]  # as the manifest has them of the bundle's own engine
    marked: Sequence[str]


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


def check_fits(bundle: Bundle, facts: Mapping[str, Any], trt: TensorRT, device: Device) -> None:
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


def check_tensors(engine: Any, specs: Sequence[TensorSpec], others: Iterable[str]) -> None:
    """Raise unless the engine takes and gives what the contract says, and these others."""
    names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    wanted = {spec.name for spec in specs} | set(others)
    if odd := sorted(names ^ wanted):
        raise EngineError(f"the engine and the contract do not have the same tensors: {', '.join(odd[:4])}")
    for spec in specs:
        dtype = TRT_DTYPES.get(engine.get_tensor_dtype(spec.name).name)
        if dtype != spec.dtype:
            raise EngineError(f"the engine has {spec.name} in {dtype} where the contract says {spec.dtype}")


def upload_weights(
    device: Device, bundle: Bundle, places: Mapping[str, Any], allocate: Callable[[int, str], Memory]
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
            device.upload(base + starts[name], view)
            found[name] = base + starts[name]
        device.synchronize()
        del view  # or the map cannot be closed
    return found
