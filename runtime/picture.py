"""A picture of two panels side by side, as `--plot` draws them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mamba_deploy.errors import require

__all__ = ["picture"]


@contextlib.contextmanager
def picture(path: Path, kind: str, *, why: str) -> Iterator[tuple[Any, Any]]:
    """Gives matplotlib's figure and its two axes to draw on, and then writes the file.

    Args:
        path: Of the file.
        kind: ``png`` or ``svg``.
        why: What matplotlib is needed to do, for the error.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", extra="plot", why=why).use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot", why=why)
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    try:
        yield figure, panels
        figure.savefig(path, dpi=120, format=kind)
    finally:
        pyplot.close(figure)
