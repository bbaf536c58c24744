"""Reading checkpoints: every format gives the logits of transformers, and every damage an error that names it."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import huggingface_hub
import pytest
import safetensors.torch
import torch
from torch import Tensor

from mamba_deploy.checkpoint import load_checkpoint, model_weights
from mamba_deploy.config import MambaConfig
from mamba_deploy.errors import CheckpointError, MissingDependencyError
from mamba_deploy.model import MambaModel

FLOAT32 = 1e-5  # derived in test_model.py


def assert_gives_logits_of(directory: Path | str, theirs: Any, dtype: torch.dtype = torch.float32) -> MambaConfig:
    config, weights = load_checkpoint(directory)
    model = MambaModel.from_weights(config, weights, dtype)
    ids = torch.randint(0, theirs.config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want, (got, _) = theirs(ids).logits, model(ids, all_logits=True)
    assert got.shape == want.shape, "the vocabulary is not the true one"
    assert (got - want).abs().max() < FLOAT32 * want.abs().max()
    return config


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    values = {k: v for k, v in (read_json(path) | changes).items() if k not in remove}
    path.write_text(json.dumps(values))


def refused(directory: Path | str, *says: str) -> CheckpointError:
    """The error of loading, after seeing that its message and hint say each of these."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(directory)
    for text in says:
        assert text in f"{caught.value} {caught.value.hint}"
    return caught.value


# Every format ---------------------------------------------------------------------------------------------------------

FORMATS: dict[str, Callable[[Path], tuple[Path, Any]]] = {
    "state-spaces-mamba": lambda p: checkpoints.state_spaces(p, "mamba"),
    "state-spaces-mamba-untied": lambda p: checkpoints.state_spaces(p, "mamba", tie_word_embeddings=False),
    "state-spaces-mamba-pad-16": lambda p: checkpoints.state_spaces(p, "mamba", pad_vocab_size_multiple=16),
    "state-spaces-mamba-no-padding": lambda p: checkpoints.state_spaces(p, "mamba", pad_vocab_size_multiple=1),
    "state-spaces-mamba-biases": lambda p: checkpoints.state_spaces(p, use_bias=True, use_conv_bias=False),
    "state-spaces-mamba-sizes": lambda p: checkpoints.state_spaces(
        p, "mamba", expand=3, state_size=5, conv_kernel=3, time_step_rank=7
    ),
    "state-spaces-mamba2": lambda p: checkpoints.state_spaces(p, "mamba2"),
    "state-spaces-mamba2-untied": lambda p: checkpoints.state_spaces(p, "mamba2", tie_word_embeddings=False),
    "state-spaces-mamba2-pad-16": lambda p: checkpoints.state_spaces(p, "mamba2", pad_vocab_size_multiple=16),
    "state-spaces-mamba2-groups": lambda p: checkpoints.state_spaces(p, "mamba2", n_groups=2),
    "state-spaces-mamba2-dt-limit": lambda p: checkpoints.state_spaces(p, "mamba2", time_step_limit=(0.1, 0.3)),
    "codestral": lambda p: checkpoints.codestral(p),
    "codestral-groups-8": lambda p: checkpoints.codestral(p, n_groups=8, hidden_size=256, num_hidden_layers=1),
    **{
        f"{family}-{weights}{'-sharded' if shards > 1 else ''}": lambda p, f=family, w=weights, n=shards: (
            checkpoints.hugging_face(p, f, weights=w, shards=n)
        )
        for family in ("mamba", "mamba2", "falcon_mamba")
        for weights in ("safetensors", "bin")
        for shards in (1, 3)
    },
    "mamba-untied": lambda p: checkpoints.hugging_face(p, "mamba", tie_word_embeddings=False),
    "falcon_mamba-untied": lambda p: checkpoints.hugging_face(p, "falcon_mamba", tie_word_embeddings=False),
    "mamba2-untied-bfloat16": lambda p: checkpoints.hugging_face(
        p, "mamba2", tie_word_embeddings=False, dtype=torch.bfloat16
    ),
    "state-spaces-mamba-float16": lambda p: checkpoints.state_spaces(p, "mamba", dtype=torch.float16),
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_gives_the_logits_of_transformers(tmp_path, name):
    directory, theirs = FORMATS[name](tmp_path)
    files = {p.name for p in directory.iterdir()}
    assert ("sharded" in name) == any(f.endswith(".index.json") for f in files)
    assert_gives_logits_of(directory, theirs)


def test_the_junk_in_padding_rows_would_show(tmp_path):
    directory, theirs = checkpoints.state_spaces(tmp_path)
    rows = torch.load(directory / "pytorch_model.bin")["lm_head.weight"]
    assert rows.shape[0] == 64 > theirs.config.vocab_size
    assert rows[theirs.config.vocab_size :].min() == checkpoints.PADDING_JUNK


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_tied_head_may_be_left_out(tmp_path, family):
    directory, theirs = checkpoints.state_spaces(tmp_path, family)
    rewrite(directory / "pytorch_model.bin", lambda t: t.pop("lm_head.weight"))
    assert_gives_logits_of(directory, theirs)


def test_state_spaces_defaults_are_those_of_mamba_ssm(tmp_path):
    """An empty ssm_cfg, and only the keys mamba-130m has: d_state 16, d_conv 4, expand 2, dt_rank d_model / 16."""
    directory, theirs = checkpoints.state_spaces(tmp_path, hidden_size=40, state_size=16, time_step_rank=3)
    keys = ("tie_embeddings", "d_intermediate", "attn_layer_idx", "attn_cfg")
    edit_json(directory / "config.json", remove=keys, ssm_cfg={})
    assert_gives_logits_of(directory, theirs)


def test_state_spaces_mamba2_defaults_are_those_of_mamba_ssm(tmp_path):
    """{"layer": "Mamba2"} alone, as in mamba2-130m: d_state 128, headdim 64, ngroups 1."""
    directory, theirs = checkpoints.state_spaces(tmp_path, "mamba2", hidden_size=64, state_size=128, head_dim=64)
    edit_json(directory / "config.json", ssm_cfg={"layer": "Mamba2"})
    assert_gives_logits_of(directory, theirs)


@pytest.mark.parametrize(
    ("old", "new"),
    [("model.safetensors", "weights"), ("model.safetensors", "pytorch_model.bin"), ("model.safetensors", "a.ckpt")],
)
def test_safetensors_are_known_by_content(tmp_path, old, new):
    directory, theirs = checkpoints.hugging_face(tmp_path)
    (directory / old).rename(directory / new)
    assert_gives_logits_of(directory, theirs)


@pytest.mark.parametrize("new", ["weights", "model.safetensors", "checkpoint.pth"])
def test_pytorch_files_are_known_by_content(tmp_path, new):
    directory, theirs = checkpoints.state_spaces(tmp_path)
    (directory / "pytorch_model.bin").rename(directory / new)
    assert_gives_logits_of(directory, theirs)


def test_pytorch_files_from_before_the_zip_format_load(tmp_path):
    directory, theirs = checkpoints.state_spaces(tmp_path)
    path = directory / "pytorch_model.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:1] == b"\x80"
    assert_gives_logits_of(directory, theirs)


def test_other_files_in_the_directory_do_not_disturb(tmp_path):
    directory, theirs = checkpoints.hugging_face(tmp_path)
    (directory / "README.md").write_text("# a model")
    (directory / "empty").touch()
    (directory / "merges.txt").write_text("a b")
    (directory / "other.index.json").write_text('{"not": "of weights"}')
    (directory / "subfolder").mkdir()
    torch.save({"optimizer": 1}, directory / "training_args.bin")
    assert_gives_logits_of(directory, theirs)


def test_path_may_be_text_and_use_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    directory, theirs = checkpoints.hugging_face(tmp_path / "model")
    assert_gives_logits_of(str(directory), theirs)
    assert_gives_logits_of("~/model", theirs)


def test_falcon_takes_its_width_from_intermediate_size(tmp_path):
    """One published revision says expand 16 and intermediate_size 8192, twice its hidden size."""
    directory, theirs = checkpoints.hugging_face(tmp_path, "falcon_mamba")
    edit_json(directory / "config.json", expand=16, intermediate_size=32)
    assert assert_gives_logits_of(directory, theirs).d_inner == 32


def test_fractional_expand(tmp_path):
    directory, theirs = checkpoints.hugging_face(tmp_path, expand=3)
    edit_json(directory / "config.json", remove=("intermediate_size",), expand=3.0)
    assert_gives_logits_of(directory, theirs)


@pytest.mark.parametrize(
    ("written", "low", "high"),
    [
        ('[0.0, {"__float__": "Infinity"}]', 0.0, math.inf),
        ("[0.0, Infinity]", 0.0, math.inf),
        ("[0.05, 0.25]", 0.05, 0.25),
        ('[0.05, {"__float__": "Infinity"}]', 0.05, math.inf),
    ],
)
def test_time_step_limit_as_each_version_writes_it(tmp_path, written, low, high):
    directory, theirs = checkpoints.hugging_face(tmp_path, "mamba2", time_step_limit=(low, high))
    text = json.dumps(read_json(directory / "config.json") | {"time_step_limit": "HERE"})
    (directory / "config.json").write_text(text.replace('"HERE"', written))
    config = assert_gives_logits_of(directory, theirs)
    assert (config.dt_min, config.dt_max) == (low, high)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        *((f, k) for f in ("mamba", "mamba2", "falcon_mamba") for k in (
            "expand", "layer_norm_epsilon", "use_conv_bias", "use_bias", "hidden_act", "tie_word_embeddings")),
        *((f, "time_step_rank") for f in ("mamba", "falcon_mamba")),
        *(("mamba2", k) for k in ("chunk_size", "time_step_limit")),
        ("falcon_mamba", "mixer_rms_eps"),
    ],
)  # fmt: skip
def test_key_left_out_has_the_default_of_transformers(tmp_path, family, key):
    """tie_word_embeddings above all, which transformers 4 leaves out, and which is false for Mamba-2 alone."""
    default = getattr(checkpoints.config_class(family)(), key)
    directory, theirs = checkpoints.hugging_face(
        tmp_path, family, **({} if key == "time_step_rank" else {key: default})
    )
    edit_json(directory / "config.json", remove=(key,))
    assert_gives_logits_of(directory, theirs)


def test_index_of_safetensors_comes_before_one_of_pytorch_files(tmp_path):
    """Both may lie there, and then a name that sorts first must not decide."""
    directory, _ = checkpoints.hugging_face(tmp_path, weights="bin", shards=3, seed=1)
    (directory / "pytorch_model.bin.index.json").rename(directory / "a.bin.index.json")
    _, theirs = checkpoints.hugging_face(directory, shards=3)
    assert len(list(directory.glob("*.index.json"))) == 2
    assert_gives_logits_of(directory, theirs)


def test_swish_is_silu(tmp_path):
    directory, theirs = checkpoints.hugging_face(tmp_path)
    edit_json(directory / "config.json", hidden_act="swish")
    assert_gives_logits_of(directory, theirs)


def test_published_config_beside_its_weights(tmp_path):
    """The keys mamba-130m-hf keeps of the original change nothing, and may not contradict."""
    directory, theirs = checkpoints.hugging_face(tmp_path)
    same = {"d_inner": 32, "d_model": 16, "n_layer": 2, "rms_norm": True, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}
    edit_json(directory / "config.json", **same)
    assert_gives_logits_of(directory, theirs)
    wrong = {"d_inner": 33, "d_model": 17, "n_layer": 3, "rms_norm": False, "ssm_cfg": {"d_state": 9}}
    for key, value in wrong.items():
        edit_json(directory / "config.json", **same | {key: value})
        refused(directory, f"'{key}'", repr(value))


# Tokens that end a text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "ids"), [(11, (11,)), ([3, 0], (3, 0)), (0, (0,)), (None, ()), ([], ())], ids=repr)
@pytest.mark.parametrize("where", ["config", "generation_config"])
def test_eos_from_the_configs(tmp_path, where, value, ids):
    directory, _ = checkpoints.hugging_face(tmp_path)
    (directory / "generation_config.json").unlink()
    edit_json(directory / "config.json", eos_token_id=value if where == "config" else None)
    if where == "generation_config":
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert load_checkpoint(directory)[0].eos_token_ids == ids


def test_eos_of_the_config_comes_first(tmp_path):
    directory, _ = checkpoints.hugging_face(tmp_path, eos_token_id=7)
    (directory / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert load_checkpoint(directory)[0].eos_token_ids == (7,)


@pytest.mark.parametrize("token", ["<|endoftext|>", {"content": "<|endoftext|>"}], ids=["text", "object"])
def test_eos_from_the_tokenizer(tmp_path, token):
    directory, _ = checkpoints.state_spaces(tmp_path)
    assert load_checkpoint(directory)[0].eos_token_ids == ()
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    added = [{"id": 1, "content": "<pad>"}, {"id": 50, "content": "<|endoftext|>"}]
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert load_checkpoint(directory)[0].eos_token_ids == (50,)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert load_checkpoint(directory)[0].eos_token_ids == ()


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["end", [1, "2"], {"id": 1}, 1.5, True], ids=repr)
def test_eos_that_is_no_token_is_refused(tmp_path, file, value):
    directory, _ = checkpoints.hugging_face(tmp_path)
    edit_json(directory / "config.json", eos_token_id=None)
    edit_json(directory / file, eos_token_id=value)
    refused(directory, "eos_token_id", repr(value[1] if isinstance(value, list) else value))


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state-spaces-mamba", "state-spaces-mamba2-untied"])
def test_weights_are_the_tensors_that_were_read(tmp_path, name):
    """Not copies: of all of them only A is computed."""
    directory, _ = FORMATS[name](tmp_path)
    config = load_checkpoint(directory)[0]
    raw = torch.load(directory / "pytorch_model.bin")
    tensors = {n.removeprefix("backbone."): t for n, t in raw.items()}
    weights = model_weights(config, tensors)
    given_memory = {t.untyped_storage().data_ptr() for t in tensors.values()}
    for weight, tensor in weights.items():
        assert (tensor.untyped_storage().data_ptr() in given_memory) == (not weight.endswith(".A")), weight


@pytest.mark.parametrize("name", ["state-spaces-mamba", "mamba2-safetensors"])
def test_large_tensors_stay_on_disk(tmp_path, name):
    """The memory of every weight is that of the mapped file."""
    directory, _ = FORMATS[name](tmp_path)
    _, weights = load_checkpoint(directory)
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(directory) in line:
            start, end = (int(n, 16) for n in line.split()[0].split("-"))
            ranges.append(range(start, end))
    mapped = [w for w, t in weights.items() if any(t.data_ptr() in r for r in ranges)]
    assert set(mapped) == {w for w in weights if not w.endswith(".A")}


# Security -------------------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("inside", ["value", "instead"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, zipped, inside):
    directory, _ = checkpoints.state_spaces(tmp_path / "model")
    marker = tmp_path / "ran"
    path = directory / "pytorch_model.bin"
    content = torch.load(path) | {"backbone.evil": Malicious(marker)} if inside == "value" else Malicious(marker)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(directory, "pytorch_model.bin")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the pickle was harmless, so this test proves nothing"


# Damage ---------------------------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Load a weight file, change the mapping in place, save it in the same format."""
    if path.suffix == ".safetensors":
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
    else:
        tensors = torch.load(path)
        change(tensors)
        torch.save(tensors, path)


def truncate(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 516\n"
WEIGHTS = {
    "safetensors": (lambda p: checkpoints.hugging_face(p), "model.safetensors", "backbone.embeddings.weight"),
    "bin": (lambda p: checkpoints.state_spaces(p), "pytorch_model.bin", "backbone.embedding.weight"),
}
D = "backbone.layers.1.mixer.D"


@pytest.fixture(params=WEIGHTS)
def weights(request, tmp_path) -> tuple[Path, Path, str]:
    """A directory, its weight file, and what it calls the embedding."""
    make, file, embedding = WEIGHTS[request.param]
    directory, _ = make(tmp_path)
    load_checkpoint(directory)  # sound so far
    return directory, directory / file, embedding


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.1, 0.0], ids=["last-bytes", "half", "tenth", "empty"])
def test_truncated_weights_are_refused(weights, keep):
    directory, path, _ = weights
    truncate(path, keep)
    refused(directory, path.name)


def test_truncated_legacy_file_is_refused(tmp_path):
    directory, _ = checkpoints.state_spaces(tmp_path)
    path = directory / "pytorch_model.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    truncate(path, 0.9)
    refused(directory, path.name, "truncated")


def test_git_lfs_pointer_is_recognised(weights):
    directory, path, _ = weights
    path.write_text(POINTER)
    refused(directory, path.name, "Git LFS")


def test_git_lfs_pointer_in_place_of_a_shard_is_recognised(tmp_path):
    directory, _ = checkpoints.hugging_face(tmp_path, shards=3)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_text(POINTER)
    refused(directory, shard.name, "Git LFS")


def test_git_lfs_pointer_in_place_of_the_config_is_refused(tmp_path):
    directory, _ = checkpoints.hugging_face(tmp_path)
    (directory / "config.json").write_text(POINTER)
    refused(directory, "config.json", "JSON")


def test_missing_tensor_is_named_with_its_shape(weights):
    directory, path, _ = weights
    rewrite(path, lambda t: t.pop(D))
    refused(directory, "'layers.1.mixer.D' [32] is missing")


def test_missing_untied_head_is_named(tmp_path):
    directory, _ = checkpoints.state_spaces(tmp_path, tie_word_embeddings=False)
    rewrite(directory / "pytorch_model.bin", lambda t: t.pop("lm_head.weight"))
    refused(directory, "'lm_head.weight' [64, 16] is missing")


def test_extra_tensor_is_named_with_its_shape(weights):
    directory, path, _ = weights
    rewrite(path, lambda t: t.update({"backbone.layers.1.mixer.x_bias": torch.ones(3, 5)}))
    refused(directory, "'layers.1.mixer.x_bias' [3, 5] is not part of this architecture")


def test_layer_too_many_is_refused(weights):
    directory, path, _ = weights
    rewrite(path, lambda t: t.update({n.replace(".1.", ".2."): v for n, v in list(t.items()) if ".1." in n}))
    refused(directory, "'layers.2.mixer.D'")


def test_wrong_shape_is_named_with_both_shapes(weights):
    directory, path, _ = weights
    rewrite(path, lambda t: t.update({D: t[D][:-1]}))
    refused(directory, "'layers.1.mixer.D' has shape [31], expected [32]")


def test_transposed_weight_is_refused(weights):
    directory, path, _ = weights
    name = "backbone.layers.0.mixer.out_proj.weight"
    rewrite(path, lambda t: t.update({name: t[name].T}))
    refused(directory, "'layers.0.mixer.out_proj.weight' has shape [32, 16], expected [16, 32]")


@pytest.mark.parametrize("rows", [-1, 1], ids=["short", "long"])
def test_embedding_of_another_vocabulary_is_refused(weights, rows):
    directory, path, embedding = weights
    rewrite(path, lambda t: [t.update({n: v[:rows] if rows < 0 else torch.cat([v, v[:1]])}) for n, v in list(t.items())
                             if n in (embedding, "lm_head.weight")])  # fmt: skip
    refused(directory, "'embedding.weight' has shape")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weight_that_is_not_finite_is_named(weights, value):
    directory, path, _ = weights
    rewrite(path, lambda t: t[D].__setitem__(17, value))
    refused(directory, "'layers.1.mixer.D' holds values that are not finite")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weight_that_is_no_ordinary_number_is_named(weights, dtype):
    directory, path, _ = weights
    rewrite(path, lambda t: t.update({D: torch.ones(32).to(dtype)}))
    refused(directory, f"'layers.1.mixer.D' has dtype {dtype}")


def test_head_that_differs_from_the_tied_embedding_is_refused(weights):
    directory, path, embedding = weights
    rewrite(path, lambda t: t.update({"lm_head.weight": t[embedding] + torch.eye(*t[embedding].shape)}))
    refused(directory, "'lm_head.weight' differs from the embedding")


def test_one_tensor_under_two_names_is_refused(weights):
    """Hugging Face's name and state-spaces' in one file: which of them counts?"""
    directory, path, embedding = weights
    other = "backbone.embedding.weight" if embedding.endswith("embeddings.weight") else "backbone.embeddings.weight"
    rewrite(path, lambda t: t.update({other: t[embedding] * 2}))
    refused(directory, f"'{embedding}'", f"'{other}'")


def test_one_tensor_in_two_files_is_refused(weights):
    directory, path, _ = weights
    shutil.copy(path, directory / f"copy{path.suffix}")
    refused(directory, path.name, f"copy{path.suffix}", "'backbone.")


def test_all_problems_are_told_at_once(weights):
    directory, path, _ = weights
    rewrite(path, lambda t: (t.pop(D), t.update({"backbone.extra": torch.ones(2)})))
    refused(directory, "'layers.1.mixer.D'", "'extra'")


def test_missing_shard_is_named(tmp_path):
    directory, _ = checkpoints.hugging_face(tmp_path, weights="bin", shards=3)
    (directory / "pytorch_model-00002-of-00003.bin").unlink()
    refused(directory, "pytorch_model.bin.index.json", "pytorch_model-00002-of-00003.bin")


@pytest.mark.parametrize(
    "index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', '{"weight_map"'], ids=repr
)
def test_broken_index_is_named(tmp_path, index):
    directory, _ = checkpoints.hugging_face(tmp_path, shards=3)
    (directory / "model.safetensors.index.json").write_text(index)
    refused(directory, "model.safetensors.index.json")


def test_index_may_not_point_outside(tmp_path):
    directory, _ = checkpoints.hugging_face(tmp_path / "a", shards=3)
    checkpoints.hugging_face(tmp_path / "b")
    names = read_json(directory / "model.safetensors.index.json")["weight_map"]
    edit_json(directory / "model.safetensors.index.json", weight_map=dict.fromkeys(names, "../b/model.safetensors"))
    assert (directory / "../b/model.safetensors").is_file()
    refused(directory, "model.safetensors.index.json", "../b/model.safetensors")


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 1}, {"model": {"a": torch.ones(2)}}, {1: torch.ones(2)}],
                         ids=["list", "number", "nested", "unnamed"])  # fmt: skip
def test_pytorch_file_that_is_no_state_dict_is_refused(tmp_path, content):
    directory, _ = checkpoints.state_spaces(tmp_path)
    torch.save(content, directory / "pytorch_model.bin")
    refused(directory, "pytorch_model.bin", "state dict")


def test_no_weights(tmp_path):
    directory, _ = checkpoints.hugging_face(tmp_path)
    (directory / "model.safetensors").unlink()
    refused(directory, str(directory), "no weights")


def test_no_config(tmp_path):
    directory, _ = checkpoints.hugging_face(tmp_path)
    (directory / "config.json").unlink()
    refused(directory, "config.json", "params.json", "model.safetensors")


def test_empty_directory(tmp_path):
    refused(tmp_path, str(tmp_path), "config.json", "nothing")


@pytest.mark.parametrize("text", ["", "{", "not json", '{"a": 1,}', "\x00"], ids=repr)
def test_config_that_is_not_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "config.json", "JSON")


def test_config_that_is_not_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    refused(tmp_path, "config.json", "JSON")


@pytest.mark.parametrize("text", ["[]", "1", '"mamba"', "null"])
def test_config_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "config.json", "expected an object")


def test_config_of_no_known_format_lists_its_keys(tmp_path):
    (tmp_path / "config.json").write_text('{"n_embd": 1, "n_head": 2}')
    refused(tmp_path, "n_embd, n_head")


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_broken_side_file_is_named(tmp_path, file):
    directory, _ = checkpoints.state_spaces(tmp_path)
    (directory / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / file).write_text("{")
    refused(directory, file)


# Sources that are no checkpoint ---------------------------------------------------------------------------------------


def test_file_instead_of_a_directory(tmp_path):
    directory, _ = checkpoints.hugging_face(tmp_path)
    refused(directory / "model.safetensors", "model.safetensors is a file", "directory")


@pytest.mark.parametrize("source", ["no/such/directory", "/no/such", "nosuch", "a b/c"])
def test_path_that_does_not_exist_and_is_no_hub_id(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # calling it would be a TypeError
    refused(source, source, "hub id")


def test_hub_id_is_downloaded(tmp_path, monkeypatch):
    directory, theirs = checkpoints.hugging_face(tmp_path)
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_gives_logits_of("state-spaces/mamba-130m", theirs)
    assert asked == [("state-spaces/mamba-130m", ["*.json", "*.safetensors", "*.bin"])]


def test_hub_id_without_network(monkeypatch):
    def download(*args: object, **kwargs: object) -> str:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refused("state-spaces/mamba-130m", "'state-spaces/mamba-130m'", "Name or service not known", "network")


def test_directory_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    _, theirs = checkpoints.hugging_face(tmp_path / "state-spaces" / "mamba-130m")
    assert_gives_logits_of("state-spaces/mamba-130m", theirs)


def test_hub_id_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="huggingface_hub") as caught:
        load_checkpoint("state-spaces/mamba-130m")
    assert caught.value.hint == "pip install 'mamba-deploy[export]'"


def test_safetensors_file_without_safetensors(tmp_path, monkeypatch):
    directory, _ = checkpoints.hugging_face(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingDependencyError, match="safetensors") as caught:
        load_checkpoint(directory)
    assert caught.value.hint.startswith("pip install")


# Keys of the config, seen through the files -------------------------------------------------------------------------


def test_unknown_key_in_the_file_stops_the_load(tmp_path):
    directory, _ = checkpoints.hugging_face(tmp_path)
    edit_json(directory / "config.json", use_flux_capacitor=True)
    refused(directory, "'use_flux_capacitor'")


# Not here: rescale_prenorm_residual, which says how to initialise, but by which transformers 5.23 divides also the
# out_proj that from_pretrained has just loaded.
HARMLESS: dict[str, Any] = {
    "initializer_range": 0.7,
    "residual_in_fp32": False,
    "time_step_scale": 3.0,
    "time_step_min": 0.1,
    "time_step_max": 0.7,
    "time_step_floor": 0.3,
    "time_step_init_scheme": "constant",
    "use_cache": False,
    "use_mambapy": True,
    "use_associative_scan": False,
    "bos_token_id": 5,
    "pad_token_id": 5,
    "output_hidden_states": True,
}
MAMBA_ONLY = ("time_step_scale", "time_step_init_scheme", "use_mambapy", "use_associative_scan")


@pytest.mark.parametrize(
    ("family", "key"),
    [
        *(("mamba", key) for key in HARMLESS),
        *(("mamba2", key) for key in HARMLESS if key not in MAMBA_ONLY),
        *(("falcon_mamba", key) for key in HARMLESS if key != "use_mambapy"),  # there use_falcon_mambapy
    ],
)
def test_key_we_ignore_changes_nothing_in_transformers(tmp_path, family, key):
    """The model transformers makes of the changed config and the same weights is still ours."""
    directory, before = checkpoints.hugging_face(tmp_path, family)
    assert getattr(before.config, key) != HARMLESS[key]
    edit_json(directory / "config.json", **{key: HARMLESS[key]})
    after = type(before).from_pretrained(directory).eval()
    assert getattr(after.config, key) == HARMLESS[key]
    assert_gives_logits_of(directory, after)
