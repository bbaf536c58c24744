"""How tests have nvcc compile what nobody runs."""

from __future__ import annotations

from mamba_deploy.plugins.toolchain import Compiler


def flags(compiler: Compiler) -> list[str]:
    """Those that cost the least time; tests on a GPU run what users build."""
    version = tuple(map(int, compiler.version.split(".")))
    return ["-Ofc=max"] if version >= (12, 9) else ["-Xcicc=-O0"]
