"""The layers of an engine, as the TensorRT that built it tells them; for the `inspect` verb."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mamba_deploy.bundle import ENGINES, Bundle
from mamba_deploy.errors import EngineError, MambaDeployError
from mamba_deploy.runtime.device import Device
from mamba_deploy.runtime.engine_file import load_engine
from mamba_deploy.runtime.trt import load

__all__ = ["layers", "parse"]


def layers(path: Path, backend: str) -> dict[str, Any]:
    """``{"profiles": ...}`` as :func:`parse` gives it, or ``{"no_layers": why}`` where the engine cannot be loaded.

    Args:
        path: The bundle's directory, whose engine was checked against its hash.
        backend: A key of ``ENGINES``.
    """
    try:
        facts, trt = Bundle.open(path).engine(backend), load(backend)
        if (built := f"{facts['product']} {facts['version']}") != trt.label:
            raise EngineError(f"it was built with {built}, and here is {trt.label}")
        device = Device()
        try:
            with device:
                log = trt.logger(lambda message: None)
                trt.load_plugins(facts["plugins"])
                engine = load_engine(trt, log, path / ENGINES[backend])
                inspector = engine.create_engine_inspector()
                text = inspector.get_engine_information(trt.module.LayerInformationFormat.JSON)
                del inspector, engine  # before the device goes
        finally:
            device.close()
    except MambaDeployError as error:
        return {"no_layers": str(error)}
    return {"profiles": parse(text)}


def parse(text: str) -> dict[str, list[dict[str, str]]]:
    """Name, type and tactic of each layer, by profile, from the inspector's JSON, whose strings hold raw characters."""
    profiles: dict[str, list[dict[str, str]]] = {}
    for layer in json.loads(text, strict=False).get("Layers", []):
        told = layer if isinstance(layer, dict) else {"Name": layer}  # a name alone, where the engine holds no more
        name = str(told.get("Name", ""))
        found = re.search(r" \[profile (\d+)\]", name)
        tactic = told.get("TacticName") or told.get("TacticValue") or ""
        row = {"name": name.replace(found[0], "") if found else name, "type": str(told.get("LayerType", ""))}
        profiles.setdefault(found[1] if found else "0", []).append({**row, "tactic": str(tactic)})
    return profiles
