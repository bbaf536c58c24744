"""Writes what a script measured: one JSON file, whole or not at all. `results/README.md` says what is in it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["output", "write"]


def write(
    path: Path,
    rows: list[dict[str, Any]],
    *,
    machine: str,
    packages: tuple[str, ...],
    versions: dict[str, str] | None = None,
    on_gpu: bool = False,
) -> None:
    """Write rows with what they were measured on.

    Args:
        path: Of the JSON file; its folder is made.
        rows: Each with name, value, unit, limit, peers and note, all of a row in one unit.
        machine: What else of it the figures hang on: processor, threads, bandwidth.
        packages: Python packages whose versions are to be noted, where they are installed.
        versions: Of anything else.
        on_gpu: Note the GPU and its driver too.
    """
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    content = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine,
        "gpu": _nvidia("name") if on_gpu else None,
        "driver": _nvidia("driver_version") if on_gpu else None,
        "versions": {**found, **(versions or {})},
        "commit": _commit(),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _nvidia(what: str) -> str:
    """Of the first GPU that this process sees."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    return output(["nvidia-smi", f"--id={first}", f"--query-gpu={what}", "--format=csv,noheader"])


def _commit() -> str:
    """Of this clone, or what GIT_COMMIT says where there is but a copy of its files."""
    return os.environ.get("GIT_COMMIT") or output(["git", "rev-parse", "--short", "HEAD"])


def output(command: list[str]) -> str:
    """What a program prints, stripped; nothing where it is missing."""
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
