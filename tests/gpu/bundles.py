"""Makes the bundles that tests/gpu/test_engine.py runs: `python tests/gpu/bundles.py OUT [NAME ...]`, with PyTorch.

The Python that has TensorRT may have no PyTorch: MAMBA_DEPLOY_TEST_BUNDLES tells it where these are.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
GREEDY_TOKENS = 500
GREEDY_PROMPT = "import os\n\n\ndef main("


def _random(family: str, **options: Any) -> Callable[[Path], Path]:
    """A random model of transformers of published sizes.

    Weights as small as those of trained models: by default they are five times larger, and every layer then makes the
    rounding errors of float16 larger; PyTorch's own float16 logits of 24 such layers are off by half their size.
    """

    def make(path: Path) -> Path:
        import torch
        import transformers

        config, model = {
            "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
            "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
            "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
        }[family]
        torch.manual_seed(0)
        model(config(initializer_range=0.02, **options)).eval().save_pretrained(path)
        return path

    return make


def _mamba2(hidden: int, layers: int, **options: Any) -> Callable[[Path], Path]:
    sizes = {"num_heads": 2 * hidden // 64, "head_dim": 64, "n_groups": 1, "state_size": 128, "vocab_size": 50288}
    return _random(
        "mamba2",
        **{**sizes, "hidden_size": hidden, "num_hidden_layers": layers, "tie_word_embeddings": True, **options},
    )


def _mamba(hidden: int, layers: int) -> Callable[[Path], Path]:
    return _random("mamba", vocab_size=50280, hidden_size=hidden, num_hidden_layers=layers, tie_word_embeddings=True)


def _sample(name: str) -> Callable[[Path], Path]:
    return lambda path: ROOT / "samples" / name


MODELS: dict[str, tuple[Callable[[Path], Path], str]] = {  # what makes the checkpoint, and the dtype of the export
    "all-logits-fp16": (_sample("tiny-mamba2"), "float16"),
    "tiny-mamba-fp32": (_sample("tiny-mamba"), "float32"),
    "tiny-mamba-fp16": (_sample("tiny-mamba"), "float16"),
    "tiny-mamba2-fp32": (_sample("tiny-mamba2"), "float32"),
    "tiny-mamba2-fp16": (_sample("tiny-mamba2"), "float16"),
    "falcon-like-fp16": (
        _random("falcon_mamba", vocab_size=1000, hidden_size=512, num_hidden_layers=4, mixer_rms_eps=1e-6), "float16"
    ),
    "codestral-like-fp16": (
        _mamba2(512, 4, n_groups=8, vocab_size=1000, tie_word_embeddings=False), "float16"
    ),
    "mamba-130m-fp16": (_mamba(768, 24), "float16"),
    "mamba2-130m-fp16": (_mamba2(768, 24), "float16"),
    "mamba-790m-fp16": (_mamba(1536, 48), "float16"),
    "mamba2-780m-fp16": (_mamba2(1536, 48), "float16"),
}  # fmt: skip


def make(out: Path, name: str) -> None:
    """One bundle; of a trained model also the tokens that PyTorch takes greedily, as ``greedy.npy``."""
    from mamba_deploy import Session, export

    checkpoint, dtype = MODELS[name]
    with tempfile.TemporaryDirectory() as scratch:
        all_logits = name.startswith("all-logits")
        export(checkpoint(Path(scratch)), out / name, dtype=dtype, all_logits=all_logits)  # type: ignore[arg-type]
    if name.startswith("tiny") and dtype == "float32" and not (out / f"{name}.greedy.npy").exists():
        with Session.open(out / name, "torch") as session:
            tokens = [token.id for token in session.generate(GREEDY_PROMPT, max_tokens=GREEDY_TOKENS)]
        np.save(out / f"{name}.greedy.npy", np.array(tokens, np.int32))


if __name__ == "__main__":
    for chosen in sys.argv[2:] or MODELS:
        make(Path(sys.argv[1]), chosen)
        print(chosen, flush=True)
