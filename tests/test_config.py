"""MambaConfig and the table of graph tensors that follows from it."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    "dt_min-above-dt_max": ({**MAMBA2, "dt_min": 0.2, "dt_max": 0.1}, "0.2, 0.1"),
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
    [("dt_max", "large"), ("dt_max", None), ("dt_min", "0"), ("d_conv", "4"), ("eos_token_ids", 3), ("d_mlp", None)],
)
def test_wrong_types_in_a_saved_config_are_named(key, value):
    with pytest.raises(CheckpointError):
        MambaConfig.from_dict({**MambaConfig(**MAMBA2).to_dict(), key: value})


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
