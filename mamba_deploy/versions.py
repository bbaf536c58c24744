"""Version strings as numbers."""

from __future__ import annotations

import re

__all__ = ["release"]


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (1, 26, 0) of ``1.26.0rc1``; none of ``nightly``."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
