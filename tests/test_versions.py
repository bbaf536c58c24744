"""Version strings as numbers."""

from __future__ import annotations

import pytest

from mamba_deploy.versions import release


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("8.6.0", (8, 6, 0)),
        ("10.3.0.26", (10, 3, 0, 26)),
        ("1.26.0rc1", (1, 26, 0)),
        ("36", (36,)),
        ("", ()),
        ("v2", ()),
    ],
)
def test_a_version_begins_with_its_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers
