"""Every error a user can cause or meet, with what to do about it.

The command prints ``error:`` with the message and ``hint:`` with the hint and exits with 1.
Anything else that is raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "BundleError",
    "CheckpointError",
    "EngineError",
    "ExportError",
    "InputError",
    "MambaDeployError",
    "MissingDependencyError",
    "PluginError",
    "VerifyError",
    "require",
]


class MambaDeployError(Exception):
    """An expected failure: ``str(error)`` says what and where, ``error.hint`` what to do next."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class CheckpointError(MambaDeployError):
    """A checkpoint cannot be read, or holds something whose mathematics we do not cover."""


class ExportError(MambaDeployError):
    """A model could not be written as ONNX."""


class BundleError(MambaDeployError):
    """An output directory is damaged, incomplete, or would be overwritten."""


class EngineError(MambaDeployError):
    """A backend cannot be opened or cannot run."""


class PluginError(MambaDeployError):
    """The CUDA plugins cannot be built or loaded."""


class VerifyError(MambaDeployError):
    """Outputs could not be compared, or differ where a caller asked for an exception."""


class InputError(MambaDeployError, ValueError):
    """An argument given to a session is out of range or of the wrong shape."""


class MissingDependencyError(MambaDeployError, ImportError):
    """An optional package is needed here and not installed; the hint names the pip command."""


def require(module: str, *, extra: str, why: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Name as imported, ``onnxruntime`` say.
        extra: The extra of this package that brings it, ``cpu`` say.
        why: What it is needed for, to end the sentence "X is needed to ...".

    Raises:
        MissingDependencyError: The module is not installed. An import error raised inside an
            installed module passes through, with its traceback.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if module != missing and not module.startswith(f"{missing}."):
            raise
        raise MissingDependencyError(
            f"the Python package '{missing}' is needed to {why}, and is not installed",
            hint=f"pip install 'mamba-deploy[{extra}]'",
        ) from error
