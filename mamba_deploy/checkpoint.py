"""Read a checkpoint, whoever wrote it: a directory or a hub id -> (MambaConfig, weights).

The format is recognised by content: the keys of the config and the first bytes of each weight file. Every tensor is
used once or refused by name; nothing is unpickled but tensors.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_deploy.config import MambaConfig, token_ids
from mamba_deploy.errors import CheckpointError, MissingDependencyError, require

__all__ = [
    "checkpoint_directory",
    "expected_tensors",
    "load_checkpoint",
    "model_weights",
    "read_config",
    "read_tensors",
]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_HUB_FILES = ["*.json", "*.safetensors", "*.bin"]


def load_checkpoint(source: str | Path) -> tuple[MambaConfig, dict[str, Tensor]]:
    """Load a checkpoint of state-spaces/mamba, Hugging Face (mamba, mamba2, falcon_mamba) or Codestral Mamba.

    Args:
        source: A directory, or a hub id such as ``state-spaces/mamba-130m``.

    Returns:
        The architecture, and the weights by the names of ``MambaModel.state_dict()``, in the dtype they were stored
        in (A, which is -exp(A_log), in float32). Large tensors stay on disk until they are touched.

    Raises:
        CheckpointError: The source cannot be read, holds a config key or a tensor that is not covered, lacks one,
            or holds values that are not finite.
    """
    directory = checkpoint_directory(source)
    raw = read_config(directory)
    config = MambaConfig.from_foreign(raw)
    config = _with_eos(config, directory)
    tensors = _by_canonical_name(read_tensors(directory))
    _check(config, tensors, padded_rows(raw, config), directory)
    return config, model_weights(config, tensors)


def checkpoint_directory(source: str | Path) -> Path:
    """The directory of a checkpoint; a hub id is downloaded first.

    Raises:
        CheckpointError: There is no such directory, or the hub has no such model or cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{path} is a file", hint="give the directory that holds the checkpoint's config and weights"
        )
    if not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(
            f"there is no directory {path}",
            hint="give a checkpoint directory, or a hub id like state-spaces/mamba-130m",
        )
    hub = require("huggingface_hub", extra="export", why=f"download {source}")
    try:
        return Path(hub.snapshot_download(str(source), allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's own errors, and those of three network libraries
        raise CheckpointError(
            f"there is no directory {path}, and the hub could not give '{source}': {type(error).__name__}: {error}",
            hint="check the spelling and the network, or download the model and give its directory",
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's config as it stands: config.json, else Codestral's params.json.

    Raises:
        CheckpointError: Neither exists, or it is not a JSON object.
    """
    for name in ("config.json", "params.json"):
        if (directory / name).is_file():
            return _read_json(directory / name)
    found = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
    raise CheckpointError(f"{directory} has neither config.json nor params.json; it holds: {found}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}: expected an object")
    return value


def _with_eos(config: MambaConfig, directory: Path) -> MambaConfig:
    """End-of-sequence ids from where each format keeps them: the config, generation_config.json, the tokenizer."""
    if config.eos_token_ids:
        return config
    ids: tuple[int, ...] = ()
    generation = directory / "generation_config.json"
    if generation.is_file():
        ids = token_ids(_read_json(generation).get("eos_token_id"), f"{generation} key 'eos_token_id'")
    settings, tokenizer = directory / "tokenizer_config.json", directory / "tokenizer.json"
    if not ids and settings.is_file() and tokenizer.is_file():
        token = _read_json(settings).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        added = _read_json(tokenizer).get("added_tokens") or []
        found = [e.get("id") for e in added if token and isinstance(e, dict) and e.get("content") == token]
        ids = token_ids(found, f"{tokenizer}: the id of '{token}'")
    return dataclasses.replace(config, eos_token_ids=ids)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by the names it gives them.

    An index names the shards; else all safetensors files count, else all PyTorch files.

    Raises:
        CheckpointError: No weights, a damaged file, or one name in two files.
    """
    tensors: dict[str, Tensor] = {}
    where: dict[str, Path] = {}
    for path in _weight_files(directory):
        for name, tensor in _read_file(path):
            if name in where:
                raise CheckpointError(
                    f"tensor '{name}' is in both {where[name].name} and {path.name}",
                    hint="leave one copy of the weights in the directory",
                )
            tensors[name], where[name] = tensor, path
    return tensors


def _weight_files(directory: Path) -> list[Path]:
    indices = [p for p in sorted(directory.glob("*.index.json")) if "weight_map" in _read_json(p)]
    indices.sort(key=lambda p: not p.name.endswith(".safetensors.index.json"))
    if indices:
        return [directory / name for name in _shards(indices[0])]
    files = [p for p in sorted(directory.iterdir()) if p.is_file()]
    for kind in (_is_safetensors, _is_pytorch):
        found = [p for p in files if kind(p)]
        if found:
            return found
    suspects = [p.name for p in files if p.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    if suspects:
        raise _not_weights(f"{directory}: {', '.join(suspects)}")
    raise CheckpointError(f"{directory} holds no weights", hint="expected *.safetensors or pytorch_model.bin")


def _shards(index: Path) -> list[str]:
    """The files an index names, each of them beside it."""
    names = _read_json(index)["weight_map"]
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise CheckpointError(f"{index} is damaged: its weight_map does not map tensors to files")
    files = sorted(set(names.values()))
    outside = [n for n in files if Path(n).is_absolute() or ".." in Path(n).parts]
    if outside:
        raise CheckpointError(f"{index} names {', '.join(outside)}, outside its directory")
    missing = [n for n in files if not (index.parent / n).is_file()]
    if missing:
        raise CheckpointError(f"{index.name} names {', '.join(missing)}, which {index.parent} does not hold")
    return files


def _not_weights(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} is neither a safetensors nor a PyTorch file",
        hint="the file may be truncated, or a Git LFS pointer that was never downloaded",
    )


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 32


def _is_pytorch(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"PK":  # a zip file; a Keras or NumPy archive is one too
        return path.suffix not in (".zip", ".npz", ".keras", ".whl")
    return head[:1] == b"\x80" and path.suffix in (".bin", ".pt", ".pth")  # a bare pickle, from before torch 1.6


def _read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    if not _is_safetensors(path) and not _is_pytorch(path):
        raise _not_weights(str(path))
    try:
        if _is_safetensors(path):
            with require("safetensors", extra="export", why=f"read {path}").safe_open(path, "pt") as file:
                yield from [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
            return
        with path.open("rb") as file:
            # torch goes by the name .safetensors, if it is told one; and maps a file only by its name
            mapped = file.read(2) == b"PK" and path.suffix != ".safetensors"
            file.seek(0)
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except MissingDependencyError:
        raise
    except Exception as error:  # each library raises its own kinds on a damaged file
        raise CheckpointError(
            f"{path} cannot be read: {error}", hint="the file may be truncated or damaged; fetch it again"
        ) from error
    named = isinstance(content, Mapping) and all(isinstance(k, str) for k in content)
    if not named or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} does not hold a state dict, a mapping of names to tensors")
    yield from content.items()


def _canonical(name: str) -> str:
    """state-spaces' name of a tensor without its prefix: Codestral puts ``model.`` before it, and Hugging Face says
    ``embeddings``.
    """
    name = name.removeprefix("model.").removeprefix("backbone.")
    return "embedding.weight" if name == "embeddings.weight" else name


def _by_canonical_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    original: dict[str, str] = {}
    for name, tensor in tensors.items():
        short = _canonical(name)
        if short in named:
            raise CheckpointError(f"tensors '{original[short]}' and '{name}' are the same one, '{short}'")
        named[short], original[short] = tensor, name
    return named


def padded_rows(raw: Mapping[str, Any], config: MambaConfig) -> int:
    """Rows of embedding and head: the vocabulary, rounded up as the checkpoint's own config says."""
    if "hidden_size" in raw:
        return config.vocab_size  # Hugging Face counts the padding in
    default = 8 if "d_model" in raw else 1
    multiple = int(raw.get("pad_vocab_size_multiple", default))
    return -(-config.vocab_size // multiple) * multiple


def expected_tensors(config: MambaConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """Names (state-spaces', without the prefix) and shapes of the tensors a checkpoint of this architecture holds.

    ``lm_head.weight`` is among them also where it is tied; a checkpoint may then leave it out.
    """
    c = config
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (rows, c.d_model), "norm_f.weight": (c.d_model,)}
    mixer: dict[str, tuple[int, ...]] = {"conv1d.weight": (c.conv_channels, 1, c.d_conv)}
    if c.conv_bias:
        mixer["conv1d.bias"] = (c.conv_channels,)
    if c.generation == "mamba":
        in_width = 2 * c.d_inner
        mixer |= {
            "x_proj.weight": (c.dt_rank + 2 * c.d_state, c.d_inner),
            "dt_proj.weight": (c.d_inner, c.dt_rank),
            "dt_proj.bias": (c.d_inner,),
            "A_log": (c.d_inner, c.d_state),
            "D": (c.d_inner,),
        }
    else:
        in_width = 2 * c.d_mlp + c.d_inner + c.conv_channels + c.n_heads
        mixer |= {"dt_bias": (c.n_heads,), "A_log": (c.n_heads,)}
        mixer["D"] = (c.d_inner,) if c.d_has_hdim else (c.n_heads,)
        if c.gated_norm:
            mixer["norm.weight"] = (c.d_inner,)
    mixer["in_proj.weight"] = (in_width, c.d_model)
    mixer["out_proj.weight"] = (c.d_model, c.d_inner + c.d_mlp)
    if c.proj_bias:
        mixer |= {"in_proj.bias": (in_width,), "out_proj.bias": (c.d_model,)}
    for i in range(c.n_layer):
        shapes[f"layers.{i}.norm.weight"] = (c.d_model,)
        shapes |= {f"layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    shapes["lm_head.weight"] = (rows, c.d_model)
    return shapes


def _check(config: MambaConfig, tensors: Mapping[str, Tensor], rows: int, directory: Path) -> None:
    expected = expected_tensors(config, rows)
    optional = {"lm_head.weight"} if config.tie_embeddings else set()
    problems = [f"'{n}' {list(s)} is missing" for n, s in expected.items() if n not in tensors and n not in optional]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"'{name}' {list(tensor.shape)} is not part of this architecture")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"'{name}' has shape {list(tensor.shape)}, expected {list(expected[name])}")
        elif tensor.dtype not in _DTYPES:
            problems.append(f"'{name}' has dtype {tensor.dtype}, expected a float of 16, 32 or 64 bits")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"'{name}' holds values that are not finite")
    tied = config.tie_embeddings and "lm_head.weight" in tensors and "embedding.weight" in tensors
    if tied and not problems and not torch.equal(tensors["lm_head.weight"], tensors["embedding.weight"]):
        problems.append("'lm_head.weight' differs from the embedding although the config ties them")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{directory}: tensor {'; tensor '.join(problems[:8])}{more}")


def model_weights(config: MambaConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint tensors, named as :func:`expected_tensors` does, as the weights of ``MambaModel``.

    A is folded from A_log, the convolution loses its unit axis, padding rows are cut off. Differentiable, so a model
    can be trained on the checkpoint's own tensors.
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        if name in ("embedding.weight", "lm_head.weight"):
            weights[name] = tensor[: config.vocab_size]
        elif leaf == "A_log":
            weights[f"{stem}.A"] = -torch.exp(tensor.float())
        elif name.endswith("conv1d.weight"):
            weights[f"{stem.removesuffix('conv1d')}conv_weight"] = tensor.squeeze(1)
        elif name.endswith("conv1d.bias"):
            weights[f"{stem.removesuffix('conv1d')}conv_bias"] = tensor
        elif name.endswith("dt_proj.bias"):
            weights[f"{stem.removesuffix('dt_proj')}dt_bias"] = tensor
        elif leaf == "D" and config.d_has_hdim:
            weights[name] = tensor.unflatten(0, (config.n_heads, config.head_dim))
        else:
            weights[name] = tensor
    return weights
