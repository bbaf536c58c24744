"""The architecture of a model, and how each checkpoint format states it.

Symbols: D d_inner, N d_state, R dt_rank, K d_conv, H heads, P head_dim, G groups, V vocabulary,
C conv channels (D for Mamba-1, D + 2 G N for Mamba-2).

Every key of a foreign config is used, checked against the one value we cover, or on a list of keys
that cannot change an answer (initialisation, training, book-keeping). Any other key is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mamba_deploy.errors import CheckpointError

__all__ = ["MambaConfig"]

Generation = Literal["mamba", "mamba2"]


@dataclass(frozen=True)
class MambaConfig:
    """A Mamba (Gu and Dao 2023) or Mamba-2 (Dao and Gu 2024) language model.

    Raises:
        CheckpointError: on construction, when the sizes contradict each other.
    """

    generation: Generation
    vocab_size: int  # V, without padding rows
    d_model: int
    n_layer: int
    d_inner: int  # D, width of the state-space part (H * P for Mamba-2)
    d_state: int  # N
    d_conv: int = 4  # K
    dt_rank: int = 0  # R, Mamba-1 only
    head_dim: int = 0  # P, Mamba-2 only
    n_groups: int = 1  # G, Mamba-2 only
    d_mlp: int = 0  # gated channels beside the state-space part (Mamba-2 with d_ssm < expand * d_model)
    chunk_size: int = 256  # of the chunked SSD form; does not change the answer
    norm_eps: float = 1e-5
    scan_norm_eps: float | None = None  # Falcon-Mamba: weightless RMS norm of dt, B and C
    gated_norm: bool = True  # Mamba-2: RMS norm joined with the gate; False: the gate alone
    norm_before_gate: bool = False
    d_has_hdim: bool = False  # Mamba-2: the skip D is [H, P], not [H]
    dt_min: float = 0.0  # bounds of dt after softplus, Mamba-2 only
    dt_max: float = math.inf
    conv_bias: bool = True
    proj_bias: bool = False  # on in_proj and out_proj
    tie_embeddings: bool = True
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.generation not in ("mamba", "mamba2"):
            raise CheckpointError(f"unknown generation {self.generation!r}: expected 'mamba' or 'mamba2'")
        sizes = ["vocab_size", "d_model", "n_layer", "d_inner", "d_state", "d_conv", "n_groups", "chunk_size"]
        sizes.append("dt_rank" if self.generation == "mamba" else "head_dim")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"{name} is {value!r}: expected a positive integer")
        for name in ("gated_norm", "norm_before_gate", "d_has_hdim", "conv_bias", "proj_bias", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise CheckpointError(f"{name} is {getattr(self, name)!r}: expected true or false")
        for name in ("norm_eps", "scan_norm_eps"):
            value = getattr(self, name)
            if (name, value) != ("scan_norm_eps", None) and not (_is_number(value) and 0.0 <= value < math.inf):
                raise CheckpointError(f"{name} is {value!r}: expected a finite number, not below 0")
        if not isinstance(self.d_mlp, int) or self.d_mlp < 0:
            raise CheckpointError(f"d_mlp is {self.d_mlp!r}: expected an integer, not below 0")
        if not 2 <= self.d_conv <= 8:
            raise CheckpointError(f"convolution width {self.d_conv} is not covered: expected 2 to 8")
        if self.generation == "mamba2":
            if self.d_inner % self.head_dim:
                raise CheckpointError(f"d_inner {self.d_inner} is not a multiple of head_dim {self.head_dim}")
            if self.n_heads % self.n_groups:
                raise CheckpointError(f"{self.n_heads} heads do not divide into {self.n_groups} groups")
            if self.d_inner % self.n_groups:
                raise CheckpointError(f"d_inner {self.d_inner} does not divide into {self.n_groups} groups")
        low, high = self.dt_min, self.dt_max
        if not (_is_number(low) and _is_number(high) and 0.0 <= low <= high):
            raise CheckpointError(f"dt_min, dt_max are {low!r}, {high!r}: not an interval of positive numbers")
        if not isinstance(self.eos_token_ids, tuple):
            raise CheckpointError(f"eos_token_ids is {self.eos_token_ids!r}: expected a sequence of token ids")

    @property
    def n_heads(self) -> int:
        """H; 0 for Mamba-1."""
        return self.d_inner // self.head_dim if self.generation == "mamba2" else 0

    @property
    def conv_channels(self) -> int:
        """C."""
        extra = 2 * self.n_groups * self.d_state if self.generation == "mamba2" else 0
        return self.d_inner + extra

    @property
    def conv_state_shape(self) -> tuple[int, ...]:
        """Without the batch axis: [C, K-1]."""
        return (self.conv_channels, self.d_conv - 1)

    @property
    def ssm_state_shape(self) -> tuple[int, ...]:
        """Without the batch axis: [D, N], or [H, P, N] for Mamba-2."""
        if self.generation == "mamba2":
            return (self.n_heads, self.head_dim, self.d_state)
        return (self.d_inner, self.d_state)

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it: infinity becomes the string "inf"."""
        values = dataclasses.asdict(self)
        values["eos_token_ids"] = list(self.eos_token_ids)
        values["dt_max"] = "inf" if math.isinf(self.dt_max) else self.dt_max
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MambaConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: A key is unknown or missing, or the sizes contradict each other.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CheckpointError(f"config has keys this version does not know: {', '.join(unknown)}")
        given = dict(values)
        if "dt_max" in given:
            given["dt_max"] = math.inf if given["dt_max"] == "inf" else given["dt_max"]
        if "eos_token_ids" in given:
            given["eos_token_ids"] = token_ids(given["eos_token_ids"], "config key 'eos_token_ids'")
        try:
            return cls(**given)
        except TypeError as error:
            raise CheckpointError(f"config is incomplete: {error}") from error

    @classmethod
    def from_foreign(cls, values: Mapping[str, Any]) -> MambaConfig:
        """Read a checkpoint's own config, recognised by its keys.

        ``model_type`` of Hugging Face: ``mamba``, ``mamba2`` or ``falcon_mamba`` with ``hidden_size``;
        ``d_model`` and ``n_layer``: state-spaces; ``dim`` and ``n_layers``: Codestral's ``params.json``.

        Raises:
            CheckpointError: The format is not one of these, or a key asks for what is not covered.
        """
        keys = _Keys(values)
        if "hidden_size" in values:
            config = _from_hugging_face(keys)
        elif "d_model" in values and "n_layer" in values:
            config = _from_state_spaces(keys)
        elif "dim" in values and "n_layers" in values:
            config = _from_codestral(keys)
        else:
            raise CheckpointError(
                f"config is of no known format; its keys are: {', '.join(sorted(values)) or 'none'}",
                hint="expected a config of state-spaces/mamba, of Hugging Face mamba, mamba2 or "
                "falcon_mamba, or Codestral's params.json",
            )
        keys.finish()
        return config


def token_ids(value: Any, what: str) -> tuple[int, ...]:
    """The ids of a config's value: one, a list, or none.

    Raises:
        CheckpointError: It is something else; the message begins with ``what``.
    """
    ids = value if isinstance(value, list | tuple) else () if value is None else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{what} is {value!r}: expected a token id or a list of them")
    return tuple(ids)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Keys:
    """Hands out the values of a config and remembers which keys were asked for."""

    _required = object()

    def __init__(self, values: Mapping[str, Any], where: str = "config") -> None:
        self._values = dict(values)
        self._where = where

    def take(self, key: str, default: Any = _required) -> Any:
        if key not in self._values:
            if default is self._required:
                raise CheckpointError(f"{self._where} lacks the key '{key}'")
            return default
        return self._values.pop(key)

    def take_int(self, key: str, default: Any = _required) -> int:
        value = self.take(key, default)
        if not _is_number(value) or not abs(value) < 1 << 31 or value != int(value):
            raise self._unexpected(key, value, "an integer")
        return int(value)

    def take_rank(self, key: str, d_model: int) -> int:
        """Of dt: a number, or "auto" for d_model / 16."""
        if self._values.get(key, "auto") == "auto":
            self.ignore(key)
            return math.ceil(d_model / 16)
        return self.take_int(key)

    def take_float(self, key: str, default: float) -> float:
        value = self.take(key, default)
        if not _is_number(value) or not abs(value) < 1 << 31:
            raise self._unexpected(key, value, "a finite number")
        return float(value)

    def take_bool(self, key: str, default: Any = _required) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self._unexpected(key, value, "true or false")
        return value

    def take_limits(self, key: str) -> tuple[float, float]:
        """[low, high]; transformers 5 writes infinity as {"__float__": "Infinity"}, JSON as Infinity."""
        value = self.take(key, (0.0, math.inf))
        try:
            low, high = (float(v["__float__"]) if isinstance(v, dict) else float(v) for v in value)
        except (KeyError, TypeError, ValueError):
            raise self._unexpected(key, value, "[low, high]") from None
        return low, high

    def _unexpected(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self._where} key '{key}' is {value!r}: expected {expected}")

    def expect(self, key: str, *allowed: Any) -> None:
        """A key that changes the mathematics and of which we cover these values only."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            covered = " or ".join(repr(v) for v in allowed)
            raise CheckpointError(
                f"{self._where} key '{key}' is {value!r}, which is not covered (only {covered} is)",
                hint="this model's mathematics is not implemented here; exporting it would give wrong answers",
            )

    def ignore(self, *names: str) -> None:
        """Keys that cannot change an answer."""
        for name in names:
            self._values.pop(name, None)

    def finish(self) -> None:
        if self._values:
            listed = ", ".join(f"'{k}'" for k in sorted(self._values))
            raise CheckpointError(
                f"{self._where} has keys that are not understood: {listed}",
                hint="a key that may change the answer is never skipped; if it is harmless, remove it from the config",
            )


def _from_state_spaces(keys: _Keys) -> MambaConfig:
    """state-spaces/mamba: mamba_ssm/models/config_mamba.py; ssm_cfg holds constructor arguments of the mixer."""
    keys.ignore("fused_add_norm", "residual_in_fp32", "model_type", "architectures", "torch_dtype", "dtype")
    keys.expect("rms_norm", True)
    keys.expect("d_intermediate", 0)
    keys.expect("attn_layer_idx", [], None)
    keys.take("attn_cfg", {})  # only read by attention layers, of which there are none
    d_model = keys.take_int("d_model")
    common: dict[str, Any] = {
        "vocab_size": keys.take_int("vocab_size"),
        "d_model": d_model,
        "n_layer": keys.take_int("n_layer"),
        "tie_embeddings": keys.take_bool("tie_embeddings", True),
    }
    _check_padding(keys, 8)
    ssm_cfg = keys.take("ssm_cfg", None)
    if not isinstance(ssm_cfg, dict | None):
        raise CheckpointError(f"config key 'ssm_cfg' is {ssm_cfg!r}: expected an object")
    ssm = _Keys(ssm_cfg or {}, where="config key 'ssm_cfg':")
    layer = ssm.take("layer", "Mamba1")
    ssm.ignore("dt_init", "dt_scale", "dt_init_floor", "use_fast_path", "use_mem_eff_path", "conv_init")
    ssm.ignore("A_init_range", "layer_idx", "dt_min", "dt_max", "sequence_parallel")
    common["d_conv"] = ssm.take_int("d_conv", 4)
    common["proj_bias"] = ssm.take_bool("bias", False)
    common["conv_bias"] = ssm.take_bool("conv_bias", True)
    expanded = int(ssm.take_float("expand", 2) * d_model)
    if layer == "Mamba1":
        config = MambaConfig(
            generation="mamba",
            d_inner=expanded,
            d_state=ssm.take_int("d_state", 16),
            dt_rank=ssm.take_rank("dt_rank", d_model),
            **common,
        )
    elif layer == "Mamba2":
        ssm.expect("process_group", None)
        d_ssm = ssm.take("d_ssm", None)
        d_inner = expanded if d_ssm is None else _Keys({"d_ssm": d_ssm}, "config key 'ssm_cfg':").take_int("d_ssm")
        if d_inner > expanded:
            raise CheckpointError(f"ssm_cfg key 'd_ssm' is {d_inner}, above expand * d_model = {expanded}")
        dt_min, dt_max = ssm.take_limits("dt_limit")
        config = MambaConfig(
            generation="mamba2",
            d_inner=d_inner,
            d_mlp=expanded - d_inner,
            d_state=ssm.take_int("d_state", 128),
            head_dim=ssm.take_int("headdim", 64),
            n_groups=ssm.take_int("ngroups", 1),
            chunk_size=ssm.take_int("chunk_size", 256),
            gated_norm=ssm.take_bool("rmsnorm", True),
            norm_before_gate=ssm.take_bool("norm_before_gate", False),
            d_has_hdim=ssm.take_bool("D_has_hdim", False),
            dt_min=dt_min,
            dt_max=dt_max,
            **common,
        )
    else:
        raise CheckpointError(
            f"ssm_cfg key 'layer' is {layer!r}, which is not covered (only 'Mamba1' and 'Mamba2' are)"
        )
    ssm.finish()
    return config


# Keys of a Hugging Face config that cannot change an answer of ours: initialisation, training, how their own
# code runs, book-keeping. residual_in_fp32 is here because our residual stream is float32 in any case.
_HUGGING_FACE_HARMLESS = (
    "architectures auto_map torch_dtype dtype transformers_version _name_or_path name_or_path "
    "initializer_range rescale_prenorm_residual residual_in_fp32 time_step_scale time_step_min time_step_max "
    "time_step_init_scheme time_step_floor use_cache use_mambapy use_falcon_mambapy use_associative_scan "
    "bos_token_id pad_token_id sep_token_id fused_add_norm return_dict output_hidden_states output_attentions "
    "torchscript problem_type id2label label2id is_decoder chunk_size_feed_forward num_logits_to_keep"
).split()


def _from_hugging_face(keys: _Keys) -> MambaConfig:
    model_type = keys.take("model_type", None)
    if model_type not in ("mamba", "mamba2", "falcon_mamba"):
        raise CheckpointError(
            f"config key 'model_type' is {model_type!r}, which is not covered",
            hint="covered are mamba, mamba2 and falcon_mamba",
        )
    keys.ignore(*_HUGGING_FACE_HARMLESS)
    keys.expect("hidden_act", "silu", "swish")
    d_model = keys.take_int("hidden_size")
    expand = keys.take_float("expand", 2)
    eos = token_ids(keys.take("eos_token_id", None), "config key 'eos_token_id'")
    common: dict[str, Any] = {
        "vocab_size": keys.take_int("vocab_size"),
        "d_model": d_model,
        "n_layer": keys.take_int("num_hidden_layers"),
        "d_state": keys.take_int("state_size"),
        "d_conv": keys.take_int("conv_kernel"),
        "norm_eps": keys.take_float("layer_norm_epsilon", 1e-5),
        "conv_bias": keys.take_bool("use_conv_bias", True),
        "proj_bias": keys.take_bool("use_bias", False),
        "tie_embeddings": keys.take_bool("tie_word_embeddings", model_type != "mamba2"),
        "eos_token_ids": eos,
    }
    # state-spaces/mamba-130m-hf and its kin keep the original's keys beside these
    keys.expect("d_model", d_model)
    keys.expect("n_layer", common["n_layer"])
    keys.expect("rms_norm", True)
    keys.expect("ssm_cfg", {}, None)
    keys.ignore("pad_vocab_size_multiple")  # vocab_size counts the padding already
    if model_type == "mamba2":
        # norm_before_gate was published true, and is never read: the gate comes first
        keys.ignore("intermediate_size", "norm_before_gate", "time_step_rank")
        n_heads = keys.take_int("num_heads")
        head_dim = keys.take_int("head_dim")
        if n_heads * head_dim != int(expand * d_model):
            raise CheckpointError(
                f"num_heads * head_dim = {n_heads * head_dim}, expand * hidden_size = {expand * d_model}"
            )
        keys.expect("d_inner", n_heads * head_dim)
        dt_min, dt_max = keys.take_limits("time_step_limit")
        return MambaConfig(
            generation="mamba2",
            d_inner=n_heads * head_dim,
            head_dim=head_dim,
            n_groups=keys.take_int("n_groups"),
            chunk_size=keys.take_int("chunk_size", 256),
            dt_min=dt_min,
            dt_max=dt_max,
            **common,
        )
    # one published Falcon-Mamba revision has expand 16 and intermediate_size 8192: the latter is the truth
    d_inner = keys.take_int("intermediate_size", int(expand * d_model))
    keys.expect("d_inner", d_inner)
    return MambaConfig(
        generation="mamba",
        d_inner=d_inner,
        dt_rank=keys.take_rank("time_step_rank", d_model),
        scan_norm_eps=keys.take_float("mixer_rms_eps", 1e-6) if model_type == "falcon_mamba" else None,
        **common,
    )


def _from_codestral(keys: _Keys) -> MambaConfig:
    """Mistral's params.json (MambaArgs of mistral-inference); the rest are Mamba-2's defaults of mamba_ssm."""
    keys.ignore("fused_add_norm", "residual_in_fp32")
    keys.expect("model_type", "mamba")
    keys.expect("rms_norm", True)
    _check_padding(keys, 1)
    d_model = keys.take_int("dim")
    return MambaConfig(
        generation="mamba2",
        vocab_size=keys.take_int("vocab_size"),
        d_model=d_model,
        n_layer=keys.take_int("n_layers"),
        d_inner=2 * d_model,
        d_state=128,
        head_dim=64,
        n_groups=keys.take_int("n_groups"),
        tie_embeddings=keys.take_bool("tie_embeddings"),
    )


def _check_padding(keys: _Keys, default: int) -> None:
    """The loader cuts the padding rows off, once it knows how many there are."""
    if keys.take_int("pad_vocab_size_multiple", default) < 1:
        raise CheckpointError("config key 'pad_vocab_size_multiple' is below 1")
