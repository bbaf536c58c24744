"""The cost of a step against the published table (facts/performance.md, section 3) and against real checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import checkpoints
import pytest

from mamba_deploy.checkpoint import load_checkpoint
from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract
from mamba_deploy.limits import Limits, parameter_count
from mamba_deploy.model import MambaModel

# name: layers, d_model, parameters in millions, SSM state fp32 in MB a row, convolution's with K columns bf16 in MB
TABLE = {
    "mamba-130m": (24, 768, 129.14, 2.36, 0.29),
    "mamba-370m": (48, 1024, 371.52, 6.29, 0.79),
    "mamba-790m": (48, 1536, 793.20, 9.44, 1.18),
    "mamba-1.4b": (48, 2048, 1372.18, 12.58, 1.57),
    "mamba-2.8b": (64, 2560, 2768.35, 20.97, 2.62),
    "mamba2-130m": (24, 768, 128.99, 18.87, 0.34),
    "mamba2-370m": (48, 1024, 368.35, 50.33, 0.88),
    "mamba2-780m": (48, 1536, 780.16, 75.50, 1.28),
    "mamba2-1.3b": (48, 2048, 1343.76, 100.66, 1.67),
    "mamba2-2.7b": (64, 2560, 2702.60, 167.77, 2.75),
}
# Microseconds a decode step with bf16 weights and fp32 state at 4.3 TB/s, by batch.
STEP_MICROSECONDS = {
    "mamba-130m": {1: 61, 8: 70, 64: 142, 256: 388},
    "mamba-370m": {1: 176, 8: 200, 64: 387, 256: 1028},
    "mamba-790m": {1: 374, 8: 409, 64: 688, 256: 1645},
    "mamba-1.4b": {1: 645, 8: 691, 64: 1063, 256: 2336},
    "mamba-2.8b": {1: 1299, 8: 1376, 64: 1993, 256: 4109},
    "mamba2-130m": {1: 69, 8: 132, 64: 635, 256: 2360},
    "mamba2-370m": {1: 195, 8: 362, 64: 1699, 256: 6282},
    "mamba2-780m": {1: 399, 8: 649, 64: 2651, 256: 9517},
    "mamba2-1.3b": {1: 673, 8: 1006, 64: 3674, 256: 12822},
    "mamba2-2.7b": {1: 1336, 8: 1892, 64: 6336, 256: 21574},
}
HALF = 0.5000001  # of the last digit that the table shows


def published(name: str) -> MambaConfig:
    """The published model, from its size alone: the constructors' defaults of mamba_ssm are all else."""
    n_layer, d_model = TABLE[name][:2]
    common: dict[str, Any] = {"d_model": d_model, "n_layer": n_layer, "d_inner": 2 * d_model}
    if name.startswith("mamba2"):
        return MambaConfig(generation="mamba2", vocab_size=50288, d_state=128, head_dim=64, **common)
    return MambaConfig(generation="mamba", vocab_size=50280, d_state=16, dt_rank=d_model // 16, **common)


def bf16(config: MambaConfig) -> Contract:
    return Contract.of(config, dtype="bfloat16", state_dtype="float32")


@pytest.mark.parametrize("name", TABLE)
def test_sizes_are_those_of_the_table(name: str) -> None:
    config = published(name)
    _, _, millions, ssm_mb, conv_mb = TABLE[name]
    assert parameter_count(config) / 1e6 == pytest.approx(millions, abs=0.01 * HALF)
    limits = Limits.of(config, bf16(config))
    # The table's convolution keeps K columns, ours K - 1: 3 of 4. Both parts are rounded to 0.01 MB there.
    assert limits.state_bytes / 2e6 == pytest.approx(ssm_mb + conv_mb * 3 / 4, abs=0.01 * HALF * (1 + 3 / 4))
    # Every weight once, except that the embedding is read by row: for a tied model that is one row more.
    norm = 2 * config.d_model  # the final norm, which the limit leaves out
    row = 2 * config.d_model
    assert limits.weight_bytes == 2 * parameter_count(config) - norm + row
    assert limits.logits_bytes == 4 * config.vocab_size


@pytest.mark.parametrize("name", TABLE)
def test_bytes_of_a_step_are_those_of_the_table(name: str) -> None:
    config = published(name)
    column = 2 * config.n_layer * config.conv_channels * 2  # of the convolution's state, read and written
    for batch, expected in STEP_MICROSECONDS[name].items():
        moved = Limits.of(config, bf16(config), batch=batch).bytes + batch * column  # K columns, as the table has it
        # half of the microsecond shown; and what the formula leaves out, the rows of the embedding
        missing = batch * 2 * config.d_model
        assert moved / 4.3e6 == pytest.approx(expected, abs=HALF + missing / 4.3e6)


@pytest.mark.parametrize("name", ["mamba-130m", "mamba2-2.7b"])
def test_operations(name: str) -> None:
    """2 B (L m + V D) + B L E N (7 | 5), with m as the table's text has it."""
    config = published(name)
    D, E, N, V = config.d_model, config.d_inner, config.d_state, config.vocab_size
    if config.generation == "mamba":
        m = 2 * D * E + E * (config.dt_rank + 2 * N) + config.dt_rank * E + E * D
        scan = 7 * E * N
    else:
        m = D * (2 * E + 2 * N + E // 64) + E * D
        scan = 5 * E * N
    for batch, seq in ((1, 1), (3, 1), (2, 100)):
        flops = Limits.of(config, bf16(config), batch=batch, seq=seq).flops
        assert flops == batch * (config.n_layer * seq * (2 * m + scan) + 2 * V * D)


@pytest.mark.parametrize("name", ["mamba-130m", "mamba2-130m"])
@pytest.mark.parametrize("state_dtype", ["float32", "float16"])
def test_bytes_of_a_step_grow_linearly_with_the_batch(name: str, state_dtype: Any) -> None:
    config = published(name)
    contract = Contract.of(config, dtype="bfloat16", state_dtype=state_dtype)
    by_batch = [Limits.of(config, contract, batch=b) for b in range(1, 6)]
    growth = {later.bytes - before.bytes for before, later in itertools.pairwise(by_batch)}
    one = by_batch[0]
    assert growth == {one.state_bytes + one.logits_bytes + 2 * config.d_model}
    assert one.bytes == one.weight_bytes + one.state_bytes + one.logits_bytes
    assert [limits.state_bytes for limits in by_batch] == [b * one.state_bytes for b in range(1, 6)]


def test_dtypes_count() -> None:
    config = published("mamba2-130m")
    wide = Limits.of(config, Contract.of(config))
    narrow = Limits.of(config, Contract.of(config, dtype="float16"))
    narrow_state = Limits.of(config, Contract.of(config, dtype="float16", state_dtype="bfloat16"))
    assert wide.weight_bytes == 2 * narrow.weight_bytes == 2 * narrow_state.weight_bytes
    scan_state = config.n_layer * config.d_inner * config.d_state
    conv_state = config.n_layer * config.conv_channels * (config.d_conv - 1)
    assert wide.state_bytes == 2 * 4 * (scan_state + conv_state)
    assert narrow.state_bytes == 2 * (4 * scan_state + 2 * conv_state)
    assert narrow_state.state_bytes == 2 * 2 * (scan_state + conv_state)
    assert wide.flops == narrow.flops


@pytest.mark.parametrize("name", ["mamba-130m", "mamba2-130m"])
def test_state_bytes_are_those_of_the_contracts_tensors(name: str) -> None:
    config = published(name)
    contract = bf16(config)
    widths = {"bfloat16": 2, "float32": 4}
    total = 0
    for spec in contract.states:
        size = widths[spec.dtype]
        for axis in spec.shape(batch=3):
            size *= axis
        total += size
    assert Limits.of(config, contract, batch=3).state_bytes == 2 * total


HUGGING_FACE: dict[str, tuple[Any, dict[str, Any]]] = {
    "mamba": ("mamba", {}),
    "mamba-untied": ("mamba", {"tie_word_embeddings": False}),
    "mamba-odd-sizes": ("mamba", {"hidden_size": 13, "state_size": 5, "conv_kernel": 3, "time_step_rank": 3}),
    "mamba-biases": ("mamba", {"use_bias": True}),
    "mamba-no-conv-bias": ("mamba", {"use_conv_bias": False}),
    "mamba2": ("mamba2", {}),
    "mamba2-groups": ("mamba2", {"n_groups": 4, "num_hidden_layers": 3}),
    "mamba2-untied": ("mamba2", {"tie_word_embeddings": False}),
    "mamba2-biases": ("mamba2", {"use_bias": True}),
    "mamba2-no-conv-bias": ("mamba2", {"use_conv_bias": False}),
    "falcon-mamba": ("falcon_mamba", {"tie_word_embeddings": False}),
}
NATIVE: dict[str, dict[str, Any]] = {
    "skip-of-each-channel": {"D_has_hdim": True},
    "no-gated-norm": {"rmsnorm": False},
    "gated-channels-beside": {"d_ssm": 16},
    "groups": {"ngroups": 2},
}


def elements_of(directory: Path) -> tuple[MambaConfig, int]:
    """The elements that a model built from a checkpoint really has."""
    config, weights = load_checkpoint(directory)
    model = MambaModel.from_weights(config, weights)
    return config, sum(tensor.numel() for tensor in model.state_dict().values())


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_parameters_of_a_hugging_face_checkpoint(case: str, tmp_path: Path) -> None:
    family, options = HUGGING_FACE[case]
    directory, model = checkpoints.hugging_face(tmp_path, family, **options)
    config, elements = elements_of(directory)
    assert parameter_count(config) == elements == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", NATIVE)
def test_parameters_of_a_native_mamba2_checkpoint(case: str, tmp_path: Path) -> None:
    directory, tensors = checkpoints.native_mamba2(tmp_path, **NATIVE[case])
    config, elements = elements_of(directory)
    assert parameter_count(config) == elements == sum(tensor.numel() for tensor in tensors.values())


def test_padding_rows_are_not_counted(tmp_path: Path) -> None:
    directory, model = checkpoints.state_spaces(tmp_path, "mamba", pad_vocab_size_multiple=64)
    config, elements = elements_of(directory)
    assert parameter_count(config) == elements == sum(p.numel() for p in model.parameters())


def test_a_longer_prompt_costs_operations_but_no_weights() -> None:
    config = published("mamba-130m")
    short, long = (Limits.of(config, bf16(config), seq=seq) for seq in (1, 1000))
    assert long.weight_bytes - short.weight_bytes == 999 * 2 * config.d_model  # rows of the embedding
    assert dataclasses.replace(long, weight_bytes=0, flops=0) == dataclasses.replace(short, weight_bytes=0, flops=0)
    per_token = (long.flops - short.flops) / 999
    assert per_token == pytest.approx(short.flops - 2 * config.vocab_size * config.d_model)
