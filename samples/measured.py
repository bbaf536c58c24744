"""Writes what a script measured: one JSON file, whole or not at all. See the README for its fields."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["write"]


def write(
    path: Path,
    rows: list[dict[str, Any]],
    *,
    machine: str,
    packages: tuple[str, ...],
    versions: dict[str, str] | None = None,
    gpu: str | None = None,
    driver: str | None = None,
) -> None:
    """Write rows with what they were measured on.

    Args:
        path: Of the JSON file; its folder is made.
        rows: Each with name, value, unit, limit, peers and note, all of a row in one unit.
        machine: What else of it the figures hang on: processor, threads, bandwidth.
        packages: Python packages whose versions are to be noted, where they are installed.
        versions: Of anything else.
        gpu: Its name.
        driver: Its version.
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
        "gpu": gpu,
        "driver": driver,
        "versions": {**found, **(versions or {})},
        "commit": _commit(),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _commit() -> str:
    """Of this clone, or what GIT_COMMIT says where there is but a copy of its files."""
    root = Path(__file__).resolve().parent
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        found = ""
    return found or os.environ.get("GIT_COMMIT", "")
