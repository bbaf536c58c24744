"""The trained checkpoints below samples/: their quality comes all the way, from checkpoint to ONNX to session."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamba_deploy import Session

SAMPLES = Path(__file__).parent.parent / "samples"
EOS_ID = 256


def held_out_modules(checkpoint: Path) -> dict[str, tuple[bytes, float]]:
    """Content and recorded bits per byte of the held-out modules that are the same in this Python as at training."""
    recorded = json.loads((checkpoint / "training.json").read_text())["held_out"]["modules"]
    library = Path(sysconfig.get_path("stdlib"))
    found = {}
    for name, row in recorded.items():
        content = (library / name).read_bytes() if (library / name).is_file() else b""
        if hashlib.sha256(content).hexdigest() == row["sha256"]:
            found[name] = (content, row["bits_per_byte"])
    return found


def bits_per_byte(session: Session, content: bytes) -> float:
    """-log2 of the probability of each byte after those before it, on average."""
    session.reset()
    ids = [EOS_ID, *content]
    logits = session.prefill([ids[:-1]], all_positions=True)[0].astype(np.float64)
    highest = logits.max(-1)
    log_total = highest + np.log(np.exp(logits - highest[:, None]).sum(-1))
    return float((log_total - logits[np.arange(len(content)), ids[1:]]).mean() / np.log(2))


@pytest.fixture(scope="module", params=["tiny-mamba", "tiny-mamba2"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return SAMPLES / request.param


def test_recorded_bits_per_byte_comes_out_of_onnx(bundle: Callable[..., Any], checkpoint: Path) -> None:
    modules = held_out_modules(checkpoint)
    if not modules:
        pytest.skip("no held-out module of this Python is the one that was held out")
    shortest = sorted(modules, key=lambda name: len(modules[name][0]))[:3]  # of many calls each; all take half a minute
    with Session.open(bundle(checkpoint.name, all_logits=True).path, threads=1) as session:
        for name in shortest:
            content, recorded = modules[name]
            assert bits_per_byte(session, content) == pytest.approx(recorded, abs=1e-3), name


def test_generated_text_looks_like_python(bundle: Callable[..., Any], checkpoint: Path) -> None:
    """Most words it samples after a function's head are names of the standard library or the language's own."""
    library = Path(sysconfig.get_path("stdlib"))
    known = {word for path in library.glob("*.py") for word in path.read_text(errors="replace").split()}
    with Session.open(bundle(checkpoint.name).path, threads=1) as session:
        tokens = session.generate("import os\n\n\ndef main(", max_tokens=400, temperature=0.7, top_p=0.95, seed=0)
        words = "".join(token.text for token in tokens).split()[:-1]
    assert len(words) > 20
    assert sum(word in known for word in words) / len(words) > 0.6
