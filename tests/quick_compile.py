"""How tests have nvcc and NVRTC compile what nobody runs; tests on a GPU run what users build."""

from __future__ import annotations


def flag(version: str, older: str) -> str:
    """The one that costs the least time, of a CUDA compiler of a version, or ``older`` where that is not yet known."""
    major, minor = version.split(".")[:2]
    return "-Ofc=max" if (int(major), int(minor)) >= (12, 9) else older
