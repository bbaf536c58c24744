"""Small random checkpoints in every format, each with the transformers model that holds the same weights.

Every function returns ``(directory, model)``: the directory it wrote, and a Hugging Face model in float32 and
evaluation mode to compare with. All parameters are random, so that every bias, norm, A and D matters. Options are
those of the Hugging Face config of the family; the defaults are a model of some 10,000 parameters that is made and
saved in about 20 ms.

    directory, model = checkpoints.hugging_face(tmp_path, "mamba2", n_groups=2)
    directory, model = checkpoints.state_spaces(tmp_path, "mamba", tie_word_embeddings=False)
    directory, model = checkpoints.codestral(tmp_path)
    directory, tensors = checkpoints.native_mamba2(tmp_path, D_has_hdim=True)  # what transformers has not
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "DAMAGED",
    "VARIANTS",
    "codestral",
    "config_class",
    "hugging_face",
    "native_mamba2",
    "random_model",
    "save_weights",
    "state_spaces",
]

transformers.logging.set_verbosity_error()  # it warns that it runs without CUDA kernels
transformers.logging.disable_progress_bar()

Family = Literal["mamba", "mamba2", "falcon_mamba"]

_CLASSES = {
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
    "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
}
_COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 8,
    "conv_kernel": 4,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_MAMBA2: dict[str, Any] = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 16}
PADDING_JUNK = 1e4  # in every padding row: if one leaks into the logits, it wins
_OFFICIAL = {"backbone.embeddings.weight": "backbone.embedding.weight"}  # the one name that differs


def config_class(family: Family) -> type[PretrainedConfig]:
    """The config class of transformers, with its defaults."""
    return _CLASSES[family][0]


def random_model(family: Family = "mamba", *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A transformers model with random weights, the same for the same seed and options.

    For ``mamba2``, ``num_heads`` follows from the other sizes unless given.
    """
    model_class = _CLASSES[family][1]
    values = _COMMON | (_MAMBA2 if family == "mamba2" else {}) | options
    if family == "mamba2" and "num_heads" not in options:
        values["num_heads"] = int(values.get("expand", 2) * values["hidden_size"]) // values["head_dim"]
    model = model_class(config_class(family)(**values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random(name, parameter, generator))
    return model.eval()


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Values of the size a trained model has: activations of order 1, decays from fast to slow."""
    noise = torch.randn(like.shape, generator=generator)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_log":
        return noise  # A between about -1/8 and -8
    if leaf == "D" or (leaf == "weight" and noise.dim() == 1):  # skip and norms
        return 1 + 0.3 * noise
    if leaf == "dt_bias" or name.endswith("dt_proj.bias"):
        return noise - 1  # time steps around 0.3
    if leaf == "bias":
        return 0.3 * noise
    if name.endswith(("embedding.weight", "embeddings.weight", "lm_head.weight")):
        return 0.5 * noise
    if name.endswith("out_proj.weight"):
        return 2 * noise / math.sqrt(noise.shape[-1])  # so that the layers outweigh the embedding
    return noise / math.sqrt(noise[0].numel())


def hugging_face(
    directory: Path,
    family: Family = "mamba",
    *,
    seed: int = 0,
    weights: Literal["safetensors", "bin"] = "safetensors",
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Path, PreTrainedModel]:
    """A directory as ``save_pretrained`` writes it; with ``weights="bin"``, as it did before safetensors.

    With ``shards`` above 1 there is an index, and at least that many shards. ``dtype`` is that of the stored weights;
    the model returned holds what they were rounded to, in float32.
    """
    model = random_model(family, seed=seed, **options).to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=size // shards if shards > 1 else "50GB")
    if weights == "bin":
        for path in [*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")]:
            path.unlink()
        save_weights(directory, model.state_dict(), "pytorch_model.bin", shards=shards)
    return directory, model.float()


def state_spaces(
    directory: Path,
    family: Literal["mamba", "mamba2"] = "mamba",
    *,
    seed: int = 0,
    pad_vocab_size_multiple: int = 8,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Path, PreTrainedModel]:
    """config.json and pytorch_model.bin as mamba_ssm writes them, lm_head included also where it is tied.

    Embedding and head are padded to ``pad_vocab_size_multiple`` rows with :data:`PADDING_JUNK`.
    """
    model = random_model(family, seed=seed, **options).to(dtype)
    c = model.config
    if c.layer_norm_epsilon != 1e-5:
        raise ValueError("mamba_ssm has no key for the epsilon of its norms")
    ssm_cfg = {
        "d_state": c.state_size,
        "d_conv": c.conv_kernel,
        "expand": c.expand,
        "bias": c.use_bias,
        "conv_bias": c.use_conv_bias,
    }
    if family == "mamba":
        ssm_cfg["dt_rank"] = c.time_step_rank
    else:
        ssm_cfg |= {"layer": "Mamba2", "headdim": c.head_dim, "ngroups": c.n_groups, "chunk_size": c.chunk_size}
        if tuple(c.time_step_limit) != (0.0, math.inf):
            ssm_cfg["dt_limit"] = list(c.time_step_limit)
    _write_json(
        directory / "config.json",
        {
            "d_model": c.hidden_size,
            "d_intermediate": 0,
            "n_layer": c.num_hidden_layers,
            "vocab_size": c.vocab_size,
            "ssm_cfg": ssm_cfg,
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": True,
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": pad_vocab_size_multiple,
            "tie_embeddings": c.tie_word_embeddings,
        },
    )
    tensors = _official(model, pad_vocab_size_multiple)
    save_weights(directory, tensors, "pytorch_model.bin")
    return directory, model.float()


def codestral(
    directory: Path, *, seed: int = 0, hidden_size: int = 64, n_groups: int = 2, **options: Any
) -> tuple[Path, PreTrainedModel]:
    """params.json and consolidated.safetensors as Mistral wrote them for Mamba-Codestral-7B.

    Its state size 128, head size 64 and expansion 2 are not in params.json, so they are fixed; n_groups 8 needs a
    hidden_size of 256.
    """
    model = random_model(
        "mamba2",
        seed=seed,
        hidden_size=hidden_size,
        n_groups=n_groups,
        state_size=128,
        head_dim=64,
        tie_word_embeddings=False,
        **options,
    )
    c = model.config
    _write_json(
        directory / "params.json",
        {
            "dim": c.hidden_size,
            "n_layers": c.num_hidden_layers,
            "vocab_size": c.vocab_size,
            "n_groups": c.n_groups,
            "rms_norm": True,
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": 1,
            "tie_embeddings": False,
            "model_type": "mamba",
        },
    )
    tensors = {f"model.{name}": tensor for name, tensor in _official(model, 1).items()}
    save_weights(directory, tensors, "consolidated.safetensors")
    return directory, model


def native_mamba2(
    directory: Path, *, seed: int = 0, d_model: int = 16, n_layer: int = 2, vocab_size: int = 61, **ssm_cfg: Any
) -> tuple[Path, dict[str, Tensor]]:
    """A state-spaces Mamba-2 with any constructor arguments of mamba_ssm's ``Mamba2``, and its tensors.

    For what transformers has not: ``D_has_hdim``, ``norm_before_gate``, ``rmsnorm=False``, ``d_ssm``, ``dt_limit``.
    The shapes are those of mamba_ssm/modules/mamba2.py, ``Mamba2.__init__``. The vocabulary is not padded.
    """
    cfg: dict[str, Any] = {"d_state": 8, "d_conv": 4, "expand": 2, "headdim": 8, "ngroups": 1} | ssm_cfg
    d_inner = cfg["expand"] * d_model
    d_ssm = cfg.get("d_ssm") or d_inner
    heads, states = d_ssm // cfg["headdim"], 2 * cfg["ngroups"] * cfg["d_state"]
    mixer: dict[str, tuple[int, ...]] = {
        "in_proj.weight": (2 * d_inner + states + heads, d_model),
        "conv1d.weight": (d_ssm + states, 1, cfg["d_conv"]),
        "conv1d.bias": (d_ssm + states,),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (d_ssm if cfg.get("D_has_hdim") else heads,),
        "out_proj.weight": (d_model, d_inner),
    }
    if cfg.get("rmsnorm", True):
        mixer["norm.weight"] = (d_ssm,)
    shapes: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (vocab_size, d_model)}
    for i in range(n_layer):
        shapes[f"backbone.layers.{i}.norm.weight"] = (d_model,)
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    shapes |= {"backbone.norm_f.weight": (d_model,), "lm_head.weight": (vocab_size, d_model)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _random(name, torch.empty(shape), generator) for name, shape in shapes.items()}
    _write_json(
        directory / "config.json",
        {
            "d_model": d_model,
            "n_layer": n_layer,
            "vocab_size": vocab_size,
            "ssm_cfg": {"layer": "Mamba2", **cfg},
            "rms_norm": True,
            "pad_vocab_size_multiple": 1,
            "tie_embeddings": False,
        },
    )
    save_weights(directory, tensors, "pytorch_model.bin")
    return directory, tensors


def save_weights(directory: Path, tensors: dict[str, Tensor], name: str, *, shards: int = 1) -> list[Path]:
    """Write tensors under a file name, as safetensors or for torch.load by its suffix; with an index if sharded."""
    directory.mkdir(parents=True, exist_ok=True)
    stem, suffix = name.split(".", 1)
    files = [name] if shards == 1 else [f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}" for i in range(shards)]
    placed = {tensor: files[i % shards] for i, tensor in enumerate(tensors)}
    for file in files:
        part = {k: v.detach() for k, v in tensors.items() if placed[k] == file}
        if suffix == "safetensors":
            safetensors.torch.save_file({k: v.clone() for k, v in part.items()}, directory / file)
        else:
            torch.save(part, directory / file)
    if shards > 1:
        _write_json(directory / f"{name}.index.json", {"metadata": {}, "weight_map": placed})
    return [directory / file for file in files]


def _official(model: PreTrainedModel, multiple: int) -> dict[str, Tensor]:
    """The weights by mamba_ssm's names, embedding and head padded; a tied head is one tensor under two names."""
    tensors = {_OFFICIAL.get(name, name): tensor.detach() for name, tensor in model.state_dict().items()}
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        rows = -len(tensors[name]) % multiple
        tensors[name] = torch.nn.functional.pad(tensors[name], (0, 0, 0, rows), value=PADDING_JUNK)
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    return tensors


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


# Options of the fixture ``bundle``: both generations, both kinds of logits, every dtype of weights and of the state.
VARIANTS: dict[str, dict[str, Any]] = {
    "mamba": {"kind": "mamba"},
    "mamba2": {"kind": "mamba2"},
    "mamba-all-logits": {"kind": "mamba", "all_logits": True},
    "mamba2-all-logits": {"kind": "mamba2", "all_logits": True},
    "mamba-fp16-with-its-state": {"kind": "mamba", "dtype": "float16", "state_dtype": "float16"},
    "mamba2-fp16": {"kind": "mamba2", "dtype": "float16"},
    "mamba-bf16": {"kind": "mamba", "dtype": "bfloat16"},
    "mamba2-bf16-with-its-state": {"kind": "mamba2", "dtype": "bfloat16", "state_dtype": "bfloat16"},
    "mamba-bf16-state": {"kind": "mamba", "state_dtype": "bfloat16"},
}


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _spoil_a_number(path: Path) -> None:
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    tensors["backbone.layers.0.mixer.D"][1] = float("nan")
    safetensors.torch.save_file(tensors, path / "model.safetensors")


def _add_a_key(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rotary_base": 1e4}))


# What damages a Hugging Face directory, and what is said of it by whatever reads it.
DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated weights": (_truncate, "model.safetensors cannot be read"),
    "weights missing": (lambda path: (path / "model.safetensors").unlink(), "holds no weights"),
    "config missing": (lambda path: (path / "config.json").unlink(), "has neither config.json nor params.json"),
    "not a number": (_spoil_a_number, "'layers.0.mixer.D' holds values that are not finite"),
    "unknown key": (_add_a_key, "'rotary_base'"),
}
