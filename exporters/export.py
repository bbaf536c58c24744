"""A checkpoint -> a bundle: the whole of `mamba-deploy export`."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

import mamba_deploy
from mamba_deploy.bundle import LOWERED, PORTABLE, REFERENCE, TOKENIZER, Bundle, refuse_to_overwrite, write_bundle
from mamba_deploy.checkpoint import checkpoint_directory, load_checkpoint
from mamba_deploy.contract import Contract, DType
from mamba_deploy.errors import ExportError
from mamba_deploy.exporters.lowering import lower_for_cpu
from mamba_deploy.exporters.onnx_export import OPSETS, export_onnx
from mamba_deploy.exporters.reference import reference_answers, write_answers
from mamba_deploy.model import MambaModel, cast_weight
from mamba_deploy.runtime.tokenizer import Tokenizer
from mamba_deploy.runtime.verify import verification_prompts

__all__ = ["export"]

_FLOATS = ("float32", "float16", "bfloat16")


def export(
    source: str | Path,
    out: str | Path,
    *,
    dtype: DType = "float32",
    state_dtype: DType = "float32",
    opset: int = 18,
    all_logits: bool = False,
    tokenizer: str | Path | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> Bundle:
    """Export a checkpoint.

    Args:
        source: Checkpoint directory or hub id, see :func:`mamba_deploy.checkpoint.load_checkpoint`.
        out: The bundle's directory.
        dtype: Of weights and activations: ``float32``, ``float16`` or ``bfloat16``.
        state_dtype: Of the scan's state.
        opset: ONNX opset, 18 to 23.
        all_logits: Logits after every token instead of each row's last.
        tokenizer: A ``tokenizer.json`` to use instead of the checkpoint's.
        force: Replace a directory that is not empty.
        progress: Told what is being done.

    Returns:
        The bundle, opened.

    Raises:
        CheckpointError: The checkpoint cannot be read or is not covered.
        ExportError: An option is not covered, or the graph could not be made.
        BundleError: The directory cannot be written.
    """
    if dtype not in _FLOATS or state_dtype not in _FLOATS:
        raise ExportError(f"dtypes are {dtype} and {state_dtype}", hint=f"each is one of {', '.join(_FLOATS)}")
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not covered", hint=f"choose one from {OPSETS[0]} to {OPSETS[-1]}")
    out = Path(out).expanduser()
    refuse_to_overwrite(out, force=force)
    directory = checkpoint_directory(source)
    tokenizer_file = _tokenizer_file(directory, tokenizer)
    progress(f"reading {directory}")
    config, weights = load_checkpoint(directory)
    stored = getattr(torch, dtype)
    for name in list(weights):  # one by one, so that at most one tensor is held in two dtypes
        weights[name] = cast_weight(name, weights[name], stored)
    contract = Contract.of(config, dtype=dtype, state_dtype=state_dtype, all_logits=all_logits)
    with write_bundle(out, config, contract, _tools(), force=force) as work:
        progress("writing the ONNX graph")
        export_onnx(MambaModel.from_weights(config, weights, stored), contract, work / PORTABLE, opset=opset)
        progress("lowering it for CPUs")
        lower_for_cpu(work / PORTABLE, work / LOWERED, config, contract)
        encode = None
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, work / TOKENIZER)
            loaded = Tokenizer.load(work)
            encode = loaded.encode if loaded is not None else None
        else:
            progress("no tokenizer.json: prompts will be token ids")
        progress("asking PyTorch for the reference answers")
        prompts = verification_prompts(config.vocab_size, encode)
        write_answers(reference_answers(config, weights, prompts, contract), work / REFERENCE)
        progress("hashing")
    return Bundle.open(out)


def _tokenizer_file(directory: Path, given: str | Path | None) -> Path | None:
    if given is None:
        own = directory / TOKENIZER
        return own if own.is_file() else None
    path = Path(given).expanduser()
    path = path / TOKENIZER if path.is_dir() else path
    if not path.is_file():
        raise ExportError(f"there is no tokenizer file {path}", hint="give a tokenizer.json, or a directory with one")
    return path


def _tools() -> dict[str, str]:
    names = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy")
    versions = {name: metadata.version(name) for name in names}
    return {"mamba-deploy": mamba_deploy.__version__, "python": platform.python_version(), **versions}
