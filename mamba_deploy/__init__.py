"""Mamba and Mamba-2 checkpoints to ONNX and TensorRT, verified against PyTorch.

Importing this package is cheap: each name below brings its module on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mamba_deploy.errors import require

if TYPE_CHECKING:
    from mamba_deploy.checkpoint import load_checkpoint
    from mamba_deploy.config import MambaConfig
    from mamba_deploy.exporters.export import export
    from mamba_deploy.runtime.session import Session

    __version__: str

__all__ = ["MambaConfig", "Session", "__version__", "export", "load_checkpoint"]

_HOMES = {
    "MambaConfig": "mamba_deploy.config",
    "Session": "mamba_deploy.runtime.session",
    "export": "mamba_deploy.exporters.export",
    "load_checkpoint": "mamba_deploy.checkpoint",
}
_TORCH_NEEDED_TO = {"export": "export a model", "load_checkpoint": "load a checkpoint"}


if not TYPE_CHECKING:  # a checker that saw this would let any misspelt name pass

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib import metadata

            try:
                value = metadata.version("mamba-deploy")
            except metadata.PackageNotFoundError:  # run from a copied source tree, as on a device without pip
                value = "0+source"
        elif name in _HOMES:
            if name in _TORCH_NEEDED_TO:
                require("torch", extra="export", why=_TORCH_NEEDED_TO[name])
            value = getattr(importlib.import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
