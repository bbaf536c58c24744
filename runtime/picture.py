"""A picture of panels side by side, as `--plot` draws them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mamba_deploy.errors import require

__all__ = ["picture"]


@contextlib.contextmanager
def picture(
    path: Path, kind: str, *, why: str, panels: int = 2, size: tuple[float, float] = (12, 4.5)
) -> Iterator[tuple[Any, Any]]:
    """Gives matplotlib's figure and its axes to draw on, one or an array of them, and then writes the file.

    Args:
        path: Of the file.
        kind: ``png`` or ``svg``.
        why: What matplotlib is needed to do, for the error.
        panels: How many axes.
        size: Of the figure, in inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", extra="plot", why=why).use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot", why=why)
    figure, axes = pyplot.subplots(1, panels, figsize=size, layout="constrained")
    try:
        yield figure, axes
        figure.savefig(path, dpi=120, format=kind)
    finally:
        pyplot.close(figure)
