"""MambaConfig, how it reads the configs of others, and the table of graph tensors that follows from it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mamba_deploy.checkpoint import padded_rows
from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract, from_float32, numpy_dtype, to_float32
from mamba_deploy.errors import CheckpointError

MAMBA: dict[str, Any] = {
    "generation": "mamba",
    "vocab_size": 50277,
    "d_model": 768,
    "n_layer": 2,
    "d_inner": 1536,
    "d_state": 16,
    "dt_rank": 48,
}
MAMBA2: dict[str, Any] = {
    "generation": "mamba2",
    "vocab_size": 32768,
    "d_model": 64,
    "n_layer": 1,
    "d_inner": 128,
    "d_state": 32,
    "head_dim": 16,
    "n_groups": 2,
}


def test_sizes_that_follow_for_mamba():
    config = MambaConfig(**MAMBA)
    assert config.n_heads == 0
    assert config.conv_channels == 1536
    assert config.conv_state_shape == (1536, 3)
    assert config.ssm_state_shape == (1536, 16)


def test_sizes_that_follow_for_mamba2():
    config = MambaConfig(**MAMBA2, d_conv=3)
    assert config.n_heads == 8
    assert config.conv_channels == 128 + 2 * 2 * 32
    assert config.conv_state_shape == (256, 2)
    assert config.ssm_state_shape == (8, 16, 32)


CONFIGS = {
    "mamba": MambaConfig(**MAMBA),
    "mamba2": MambaConfig(**MAMBA2),
    "falcon": MambaConfig(**MAMBA, scan_norm_eps=1e-6, tie_embeddings=False, eos_token_ids=(11,)),
    "everything": MambaConfig(
        **MAMBA2,
        d_conv=7,
        d_mlp=5,
        chunk_size=3,
        norm_eps=1e-3,
        gated_norm=False,
        norm_before_gate=True,
        d_has_hdim=True,
        dt_min=0.1,
        dt_max=0.3,
        conv_bias=False,
        proj_bias=True,
        tie_embeddings=False,
        eos_token_ids=(3, 1),
    ),
}


@pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in CONFIGS.items()])
def test_round_trip_through_strict_json(config):
    text = json.dumps(config.to_dict(), allow_nan=False)  # Infinity is no JSON
    assert MambaConfig.from_dict(json.loads(text)) == config


def test_the_round_trip_covers_every_field():
    """Of "everything", each field differs from its default in some config above."""
    for field in dataclasses.fields(MambaConfig):
        if field.default is not dataclasses.MISSING:
            assert any(getattr(c, field.name) != field.default for c in CONFIGS.values()), field.name


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MambaConfig(**MAMBA).d_model = 1  # type: ignore[misc]


@given(key=st.text())
def test_unknown_key_is_refused_by_name(key):
    if key in {field.name for field in dataclasses.fields(MambaConfig)}:
        return
    with pytest.raises(CheckpointError) as caught:
        MambaConfig.from_dict({**MambaConfig(**MAMBA).to_dict(), key: 1})
    assert key in str(caught.value)


@pytest.mark.parametrize("key", ["generation", "vocab_size", "d_inner"])
def test_missing_key_is_named(key):
    values = MambaConfig(**MAMBA).to_dict()
    del values[key]
    with pytest.raises(CheckpointError, match=key):
        MambaConfig.from_dict(values)


INCONSISTENT: dict[str, tuple[dict[str, Any], str]] = {
    "generation": ({**MAMBA, "generation": "mamba3"}, "'mamba3'"),
    **{
        f"{name}={value!r}": ({**MAMBA, name: value}, f"{name} is {value!r}")
        for name in ("vocab_size", "d_model", "n_layer", "d_inner", "d_state", "dt_rank", "n_groups", "chunk_size")
        for value in (0, -1, 2.0, True, None, "8")
    },
    "head_dim=0": ({**MAMBA2, "head_dim": 0}, "head_dim is 0"),
    "d_conv=1": ({**MAMBA, "d_conv": 1}, "width 1"),
    "d_conv=9": ({**MAMBA, "d_conv": 9}, "width 9"),
    "d_mlp=-1": ({**MAMBA2, "d_mlp": -1}, "d_mlp is -1"),
    "head_dim-does-not-divide": ({**MAMBA2, "head_dim": 17}, "128 is not a multiple of head_dim 17"),
    "groups-do-not-divide-heads": ({**MAMBA2, "n_groups": 3}, "8 heads do not divide into 3 groups"),
    "groups-above-heads": ({**MAMBA2, "n_groups": 16}, "8 heads do not divide into 16 groups"),
    "dt_min-negative": ({**MAMBA2, "dt_min": -0.1}, "-0.1"),
    "dt_min-above-dt_max": ({**MAMBA2, "dt_min": 0.2, "dt_max": 0.1}, "dt_min, dt_max are 0.2, 0.1"),
    "dt_min-nan": ({**MAMBA2, "dt_min": math.nan}, "nan"),
    "dt_max-nan": ({**MAMBA2, "dt_max": math.nan}, "nan"),
    "norm_eps-nan": ({**MAMBA, "norm_eps": math.nan}, "norm_eps is nan"),
    "norm_eps-negative": ({**MAMBA, "norm_eps": -1e-5}, "norm_eps is -1e-05"),
    "norm_eps-text": ({**MAMBA, "norm_eps": "small"}, "norm_eps is 'small'"),
    "scan_norm_eps-infinite": ({**MAMBA, "scan_norm_eps": math.inf}, "scan_norm_eps is inf"),
}


@pytest.mark.parametrize(("values", "says"), [pytest.param(*case, id=name) for name, case in INCONSISTENT.items()])
@pytest.mark.parametrize("build", [lambda v: MambaConfig(**v), MambaConfig.from_dict], ids=["init", "from_dict"])
def test_inconsistent_sizes_are_refused(values, says, build):
    with pytest.raises(CheckpointError) as caught:
        build(values)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dt_max", "large"),
        ("dt_max", None),
        ("dt_min", "0"),
        ("d_conv", "4"),
        ("eos_token_ids", "3"),
        ("eos_token_ids", [1, "3"]),
        ("d_mlp", None),
        ("conv_bias", "false"),
        ("tie_embeddings", 1),
    ],
)
def test_wrong_types_in_a_saved_config_are_named(key, value):
    with pytest.raises(CheckpointError, match=rf"{key}\b.* {re.escape(repr(value))}"):
        MambaConfig.from_dict({**MambaConfig(**MAMBA2).to_dict(), key: value})


# Configs of others ----------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "state-spaces/mamba-130m": (
        {
            "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True,
            "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
        },
        {
            "generation": "mamba", "vocab_size": 50277, "d_model": 768, "n_layer": 24, "d_inner": 1536, "d_state": 16,
            "dt_rank": 48, "tie_embeddings": True, "rows": 50280,
        },
    ),
    "state-spaces/mamba2-130m": (
        {
            "d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"},
            "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
            "pad_vocab_size_multiple": 16, "tie_embeddings": True,
        },
        {
            "generation": "mamba2", "vocab_size": 50277, "d_inner": 1536, "d_state": 128, "head_dim": 64,
            "n_groups": 1, "tie_embeddings": True, "rows": 50288,
        },
    ),
    "state-spaces/mamba-130m-hf": (  # which keeps the keys of the original beside those of transformers
        {
            "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536,
            "d_model": 768, "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu",
            "hidden_size": 768, "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05,
            "model_type": "mamba", "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0,
            "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": False, "residual_in_fp32": True,
            "rms_norm": True, "ssm_cfg": {}, "state_size": 16, "time_step_floor": 0.0001,
            "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 48,
            "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0",
            "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 50280,
        },
        {
            "generation": "mamba", "vocab_size": 50280, "d_model": 768, "n_layer": 24, "d_inner": 1536, "d_state": 16,
            "dt_rank": 48, "tie_embeddings": True, "eos_token_ids": (0,), "rows": 50280,
        },
    ),
    "mistralai/Mamba-Codestral-7B-v0.1": (
        {
            "dim": 4096, "n_layers": 64, "vocab_size": 32768, "n_groups": 8, "rms_norm": True,
            "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 1, "tie_embeddings": False,
            "model_type": "mamba",
        },
        {
            "generation": "mamba2", "vocab_size": 32768, "d_model": 4096, "n_layer": 64, "d_inner": 8192,
            "d_state": 128, "head_dim": 64, "n_groups": 8, "tie_embeddings": False, "rows": 32768,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    raw, want = PUBLISHED[name]
    config = MambaConfig.from_foreign(raw)
    got = {key: getattr(config, key) for key in want if key != "rows"}
    assert got | {"rows": padded_rows(raw, config)} == want


def raw_config(name: str) -> dict[str, Any]:
    """A sound config of each format."""
    configs = {
        "state-spaces-mamba": {"d_model": 16, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {"d_state": 8}},
        "state-spaces-mamba2": {
            "d_model": 16, "n_layer": 2, "vocab_size": 61, "rms_norm": True, "pad_vocab_size_multiple": 16,
            "tie_embeddings": False, "attn_layer_idx": [], "attn_cfg": {}, "d_intermediate": 0,
            "ssm_cfg": {
                "layer": "Mamba2", "d_state": 8, "d_conv": 4, "expand": 2, "headdim": 8, "ngroups": 2, "d_ssm": 16,
                "D_has_hdim": True, "rmsnorm": True, "norm_before_gate": False, "dt_limit": [0.0, 1.0], "bias": False,
                "conv_bias": True, "chunk_size": 64,
            },
        },
        "codestral": PUBLISHED["mistralai/Mamba-Codestral-7B-v0.1"][0],
        "mamba": checkpoints.random_model("mamba").config.to_diff_dict() | {"intermediate_size": 32},
        "mamba2": checkpoints.random_model("mamba2").config.to_diff_dict(),
        "falcon_mamba": checkpoints.random_model("falcon_mamba").config.to_diff_dict() | {"mixer_rms_eps": 1e-6},
    }  # fmt: skip
    return json.loads(json.dumps(configs[name]))


FOREIGN = ["state-spaces-mamba", "state-spaces-mamba2", "codestral", "mamba", "mamba2", "falcon_mamba"]
RAW = {name: raw_config(name) for name in FOREIGN}


@pytest.mark.parametrize("name", FOREIGN)
def test_the_configs_below_are_sound(name):
    MambaConfig.from_foreign(RAW[name])


# Read by some version of the format's own code, and left out of the configs above: what initialises, trains or keeps
# books, and what is optional. All other keys are unknown.
STATE_SPACES_KEYS = set(
    "rms_norm residual_in_fp32 fused_add_norm pad_vocab_size_multiple tie_embeddings d_intermediate attn_layer_idx "
    "attn_cfg model_type architectures torch_dtype dtype".split()
)
HUGGING_FACE_KEYS = set(
    "d_inner d_model n_layer rms_norm ssm_cfg pad_vocab_size_multiple norm_before_gate intermediate_size expand "
    "hidden_act layer_norm_epsilon use_bias use_conv_bias tie_word_embeddings time_step_rank time_step_limit "
    "time_step_scale time_step_min time_step_max time_step_floor time_step_init_scheme chunk_size mixer_rms_eps "
    "initializer_range rescale_prenorm_residual residual_in_fp32 use_cache use_mambapy use_falcon_mambapy "
    "use_associative_scan fused_add_norm architectures auto_map torch_dtype dtype transformers_version "
    "_name_or_path name_or_path bos_token_id eos_token_id pad_token_id sep_token_id return_dict "
    "output_hidden_states output_attentions torchscript problem_type id2label label2id is_decoder "
    "chunk_size_feed_forward num_logits_to_keep".split()
)
CONSTRUCTOR_KEYS = set(  # of mamba_ssm's Mamba and Mamba2
    "layer d_state d_conv expand bias conv_bias dt_init dt_scale dt_init_floor dt_min dt_max use_fast_path "
    "use_mem_eff_path conv_init A_init_range layer_idx sequence_parallel process_group".split()
)
ONLY_MAMBA, ONLY_MAMBA2 = {"dt_rank"}, set("headdim d_ssm ngroups D_has_hdim rmsnorm norm_before_gate dt_limit".split())


def known_keys(name: str) -> set[str]:
    hugging_face = name in ("mamba", "mamba2", "falcon_mamba")
    return set(RAW[name]) | (HUGGING_FACE_KEYS if hugging_face else STATE_SPACES_KEYS)


@pytest.mark.parametrize("name", FOREIGN)
@given(key=st.text(min_size=1))
@example(key="rope_theta")
@example(key="hidden_dropout")
@example(key="mamba_d_ssm")
@example(key="ssm_multipliers")
@example(key="quantization_config")
@example(key="D_HAS_HDIM")
@example(key="sliding_window")
@example(key="n_group")
def test_unknown_foreign_key_is_refused_by_name(name, key):
    config = RAW[name]
    if key in known_keys(name):
        return
    with pytest.raises(CheckpointError) as caught:
        MambaConfig.from_foreign({**config, key: 0})
    assert f"'{key}'" in str(caught.value)


@pytest.mark.parametrize("name", ["state-spaces-mamba", "state-spaces-mamba2"])
@given(key=st.text(min_size=1))
@example(key="hidden_dropout")
@example(key="D_HAS_HDIM")
@example(key="n_groups")
def test_unknown_key_of_ssm_cfg_is_refused_by_name(name, key):
    config = RAW[name]
    known = CONSTRUCTOR_KEYS | (ONLY_MAMBA2 | {"chunk_size"} if name.endswith("2") else ONLY_MAMBA)
    if key in known:
        return
    with pytest.raises(CheckpointError) as caught:
        MambaConfig.from_foreign({**config, "ssm_cfg": {**config["ssm_cfg"], key: 0}})
    assert f"'{key}'" in str(caught.value)
    assert "ssm_cfg" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key"),
    [*(("state-spaces-mamba", k) for k in sorted(ONLY_MAMBA2)), *(("state-spaces-mamba2", k) for k in ONLY_MAMBA)],
)
def test_key_of_the_other_mixer_is_refused(name, key):
    """headdim means nothing to Mamba-1, dt_rank nothing to Mamba-2: the config is not what it seems."""
    config = RAW[name]
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        MambaConfig.from_foreign({**config, "ssm_cfg": {**config["ssm_cfg"], key: 4}})


UNSUPPORTED: list[tuple[str, str, dict[str, Any], str]] = [
    ("attention", "state-spaces-mamba2", {"attn_layer_idx": [9, 18]}, "[9, 18]"),
    ("gated MLP", "state-spaces-mamba2", {"d_intermediate": 512}, "512"),
    ("LayerNorm", "state-spaces-mamba2", {"rms_norm": False}, "False"),
    ("Mamba-3", "state-spaces-mamba2", {"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3'"),
    ("process group", "state-spaces-mamba2", {"ssm_cfg": {"layer": "Mamba2", "process_group": 1}}, "'process_group'"),
    ("d_ssm too wide", "state-spaces-mamba2", {"ssm_cfg": {"layer": "Mamba2", "d_ssm": 64}}, "'d_ssm' is 64"),
    ("gelu", "mamba", {"hidden_act": "gelu"}, "'gelu'"),
    ("gelu", "mamba2", {"hidden_act": "gelu"}, "'gelu'"),
    ("LayerNorm", "mamba2", {"rms_norm": False}, "'rms_norm'"),
    ("heads", "mamba2", {"num_heads": 5}, "num_heads * head_dim = 40"),
    ("Jamba", "mamba", {"model_type": "jamba"}, "'jamba'"),
    ("Bamba", "mamba2", {"model_type": "bamba"}, "'bamba'"),
    ("no type", "mamba2", {"model_type": None}, "None"),
    ("LayerNorm", "codestral", {"rms_norm": False}, "'rms_norm'"),
    ("another model", "codestral", {"model_type": "transformer"}, "'transformer'"),
    ("wide convolution", "mamba", {"conv_kernel": 9}, "9"),
    ("no convolution", "mamba", {"conv_kernel": 1}, "1"),
]


@pytest.mark.parametrize(
    ("name", "changes", "says"), [pytest.param(*case[1:], id=f"{case[1]}-{case[0]}") for case in UNSUPPORTED]
)
def test_what_is_not_covered_is_refused_by_name(name, changes, says):
    with pytest.raises(CheckpointError) as caught:
        MambaConfig.from_foreign({**RAW[name], **changes})
    assert says in str(caught.value)
    key = next(iter(changes))
    assert key in str(caught.value) or key == "conv_kernel"  # which the message calls a convolution width


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *((n, k) for n in ("mamba", "mamba2") for k in ("hidden_size", "num_hidden_layers", "conv_kernel")),
        *(("mamba2", k) for k in ("state_size", "num_heads", "head_dim", "n_groups")),
        *((n, "vocab_size") for n in FOREIGN),
        *(("codestral", k) for k in ("n_groups", "tie_embeddings", "dim")),
    ],
)
def test_missing_foreign_key_is_named(name, key):
    """The defaults of Hugging Face's classes are those of one big model, so nothing rests on them."""
    config = dict(RAW[name])
    del config[key]
    with pytest.raises(CheckpointError, match=key if key not in ("hidden_size", "dim") else "no known format"):
        MambaConfig.from_foreign(config)


JUNK: list[Any] = [
    None, True, False, "", "abc", "8", "auto", 0, -1, 1.5, 1e300, math.inf, math.nan, [], [1], ["a", "b"], [1, 2, 3],
    [None, 1], {}, {"a": 1}, {"__float__": "x"}, [0.0, {"__float__": "x"}], [0.0, {"a": 1}],
]  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_junk_in_any_value_is_refused_or_harmless(name):
    """No value of any key ends in anything but a config or a CheckpointError."""
    config = RAW[name]
    places = [(None, key) for key in config] + [("ssm_cfg", key) for key in config.get("ssm_cfg", ())]
    for outer, key in places:
        for junk in JUNK:
            changed = {**config, outer: {**config[outer], key: junk}} if outer else {**config, key: junk}
            try:
                got = MambaConfig.from_foreign(changed)
                padded_rows(changed, got)
            except CheckpointError:
                continue
            except Exception as error:
                pytest.fail(f"{key} = {junk!r} raises {type(error).__name__}: {error}")
            assert math.isfinite(got.norm_eps), f"{key} = {junk!r}"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("state-spaces-mamba2", "tie_embeddings"),
        *(
            ("state-spaces-mamba2", f"ssm_cfg.{k}")
            for k in ("bias", "conv_bias", "rmsnorm", "norm_before_gate", "D_has_hdim")
        ),
        ("codestral", "tie_embeddings"),
        *(
            (family, key)
            for family in ("mamba", "mamba2", "falcon_mamba")
            for key in ("use_bias", "use_conv_bias", "tie_word_embeddings")
        ),
    ],
)
@pytest.mark.parametrize("value", ["false", "true", 2, None, []], ids=repr)
def test_switch_that_is_neither_true_nor_false_is_refused_by_name(name, key, value):
    """bool("false") is True."""
    outer, _, leaf = key.rpartition(".")
    config = RAW[name]
    changed = {**config, outer: {**config[outer], leaf: value}} if outer else {**config, key: value}
    with pytest.raises(CheckpointError) as caught:
        MambaConfig.from_foreign(changed)
    assert f"'{leaf}'" in str(caught.value)


# The contract --------------------------------------------------------------------------------------------------------


def test_table_of_a_mamba():
    contract = Contract.of(CONFIGS["mamba"], dtype="float16", state_dtype="float32")
    table = [(t.direction, t.name, t.dtype, t.axes, t.role, t.layer, t.partner) for t in contract.tensors]
    conv, ssm = ("batch", 1536, 3), ("batch", 1536, 16)
    assert table == [
        ("in", "input_ids", "int32", ("batch", "seq"), "tokens", None, None),
        ("in", "seq_lens", "int32", ("batch",), "lengths", None, None),
        ("in", "conv_state.0", "float16", conv, "state", 0, "conv_state_out.0"),
        ("in", "ssm_state.0", "float32", ssm, "state", 0, "ssm_state_out.0"),
        ("in", "conv_state.1", "float16", conv, "state", 1, "conv_state_out.1"),
        ("in", "ssm_state.1", "float32", ssm, "state", 1, "ssm_state_out.1"),
        ("out", "logits", "float32", ("batch", 50277), "logits", None, None),
        ("out", "next_token", "int32", ("batch",), "next_token", None, None),
        ("out", "conv_state_out.0", "float16", conv, "state", 0, "conv_state.0"),
        ("out", "ssm_state_out.0", "float32", ssm, "state", 0, "ssm_state.0"),
        ("out", "conv_state_out.1", "float16", conv, "state", 1, "conv_state.1"),
        ("out", "ssm_state_out.1", "float32", ssm, "state", 1, "ssm_state.1"),
    ]
    assert (contract.dtype, contract.state_dtype, contract.all_logits) == ("float16", "float32", False)


def test_table_of_a_mamba2_with_all_logits():
    contract = Contract.of(CONFIGS["mamba2"], dtype="bfloat16", state_dtype="bfloat16", all_logits=True)
    axes = {t.name: (t.dtype, t.axes) for t in contract.tensors}
    assert axes["logits"] == ("float32", ("batch", "seq", 32768))
    assert axes["next_token"] == ("int32", ("batch",))
    assert axes["conv_state.0"] == axes["conv_state_out.0"] == ("bfloat16", ("batch", 256, 3))
    assert axes["ssm_state.0"] == axes["ssm_state_out.0"] == ("bfloat16", ("batch", 8, 16, 32))


def test_parts_of_the_table():
    contract = Contract.of(CONFIGS["mamba"])
    assert (*contract.inputs, *contract.outputs) == contract.tensors
    assert [t.name for t in contract.states] == ["conv_state.0", "ssm_state.0", "conv_state.1", "ssm_state.1"]
    by_name = {t.name: t for t in contract.tensors}
    for state in contract.states:
        partner = by_name[state.partner]
        assert partner.partner == state.name
        assert (partner.dtype, partner.axes, partner.direction) == (state.dtype, state.axes, "out")


def test_shape_fills_in_the_varying_axes():
    by_name = {t.name: t for t in Contract.of(CONFIGS["mamba2"], all_logits=True).tensors}
    assert by_name["input_ids"].shape(3, 7) == (3, 7)
    assert by_name["input_ids"].shape(3) == (3, 1)
    assert by_name["logits"].shape(3, 7) == (3, 7, 32768)
    assert by_name["ssm_state.0"].shape(3, 7) == (3, 8, 16, 32)


def test_table_as_the_manifest_writes_it():
    contract = Contract.of(CONFIGS["mamba2"])
    listed = json.loads(json.dumps(contract.to_list()))
    assert [entry["name"] for entry in listed] == [t.name for t in contract.tensors]
    assert listed[2] == {
        "name": "conv_state.0",
        "direction": "in",
        "dtype": "float32",
        "axes": ["batch", 256, 3],
        "role": "state",
    }


def test_numpy_dtypes():
    assert numpy_dtype("bfloat16") == np.uint16
    assert [numpy_dtype(d).name for d in ("float32", "float16", "int32")] == ["float32", "float16", "int32"]


# Conversions against torch -------------------------------------------------------------------------------------------

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SPECIAL = [
    *(0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan),
    *(1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-9),  # halfway to even, halfway up, past half, below half
    *(float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny), float(np.float32(1e-45)), 65504.0, 65520.0),
]


def as_torch(values: np.ndarray, dtype: str) -> np.ndarray:
    """What torch makes of float32 values, in the representation of ``numpy_dtype``."""
    rounded = torch.from_numpy(values.copy()).to(TORCH[dtype])
    return rounded.view(torch.uint16).numpy() if dtype == "bfloat16" else rounded.numpy()


def assert_same(got: np.ndarray, want: np.ndarray, nan: np.ndarray) -> None:
    """To the bit; where the value is NaN, any NaN."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    as_int = np.dtype(f"u{got.dtype.itemsize}")
    assert np.array_equal(got.view(as_int)[~nan], want.view(as_int)[~nan])


@pytest.mark.parametrize("dtype", TORCH)
def test_rounding_is_that_of_torch(dtype):
    random_bits = np.random.default_rng(0).integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([np.array(SPECIAL, dtype=np.float32), random_bits])
    with np.errstate(over="ignore", invalid="ignore"):
        got = from_float32(values, dtype)
    nan = np.isnan(values)
    assert nan.sum() > 1
    assert_same(got, as_torch(values, dtype), nan)
    assert np.isnan(to_float32(got, dtype)[nan]).all()


@given(bits=st.integers(0, 2**32 - 1))
def test_rounding_any_float_to_bfloat16_is_that_of_torch(bits):
    values = np.array([struct.unpack("<f", struct.pack("<I", bits))[0]], dtype=np.float32)
    got = from_float32(values, "bfloat16")
    assert_same(got, as_torch(values, "bfloat16"), np.isnan(values))
    assert np.isnan(to_float32(got, "bfloat16")[0]) == np.isnan(values[0])


def test_every_bfloat16_widens_and_returns_unchanged():
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    values = to_float32(bits, "bfloat16")
    want = torch.from_numpy(bits.copy()).view(torch.bfloat16).float().numpy()
    assert values.dtype == np.float32
    assert np.array_equal(values, want, equal_nan=True)
    nan = np.isnan(values)
    assert np.array_equal(from_float32(values, "bfloat16")[~nan], bits[~nan])


@pytest.mark.parametrize("dtype", TORCH)
def test_conversions_read_views_and_keep_shapes(dtype):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)[::2]
    got = from_float32(values, dtype)
    assert (got.shape, got.dtype) == (values.shape, numpy_dtype(dtype))
    assert np.array_equal(to_float32(got, dtype), values)
    assert np.array_equal(to_float32(got.T, dtype), values.T)
    assert from_float32(values[:0], dtype).shape == (0, 2, 3)
