"""The output directory: what it holds, that damage is found and named, and that it appears whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import tokenizers
import torch

import mamba_deploy
from mamba_deploy import bundle as bundle_module
from mamba_deploy.bundle import (
    CONFIG,
    LOWERED,
    MANIFEST,
    PORTABLE,
    REFERENCE,
    TOKENIZER,
    WEIGHTS,
    Bundle,
    refuse_to_overwrite,
    write_bundle,
)
from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract
from mamba_deploy.errors import BundleError, CheckpointError, ExportError, MambaDeployError
from mamba_deploy.exporters.export import export
from mamba_deploy.exporters.lowering import lower_for_cpu
from mamba_deploy.exporters.onnx_export import export_onnx
from mamba_deploy.exporters.reference import write_answers
from mamba_deploy.runtime.verify import Answers, verification_prompts

MODEL = MambaConfig("mamba", vocab_size=11, d_model=4, n_layer=2, d_inner=8, d_state=3, dt_rank=1)
CONTRACT = Contract.of(MODEL)
TOOLS = {"torch": "2.13.0"}


def write(path: str | Path, mark: str = "new", files: tuple[str, ...] = (PORTABLE, WEIGHTS), **options: Any) -> Path:
    """A bundle whose files say ``mark``; its model files are no models."""
    with write_bundle(path, MODEL, CONTRACT, TOOLS, **options) as work:
        for name in files:
            (work / name).write_text(mark)
    return Path(path)


def content(path: Path) -> dict[str, bytes | str | None]:
    """Everything below a directory, by relative path: bytes of files, targets of links, None for directories."""
    found: dict[str, bytes | str | None] = {}
    for entry in sorted(path.rglob("*")):
        name = str(entry.relative_to(path))
        found[name] = os.readlink(entry) if entry.is_symlink() else None if entry.is_dir() else entry.read_bytes()
    return found


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    edit(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def refused(action: Callable[[], Any], *says: str) -> BundleError:
    with pytest.raises(BundleError) as caught:
        action()
    for text in says:
        assert text in str(caught.value)
    assert caught.value.hint
    return caught.value


# What it holds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtypes", "logits"),
    [
        ({}, {"activation": "float32", "state": "float32"}, "last"),
        ({"dtype": "float16", "state_dtype": "float16"}, {"activation": "float16", "state": "float16"}, "last"),
        ({"all_logits": True}, {"activation": "float32", "state": "float32"}, "all"),
    ],
    ids=["fp32", "fp16-with-its-state", "all-logits"],
)
def test_manifest_says_what_was_made(bundle, options, dtypes, logits):
    path = bundle("mamba", **options).path
    manifest = json.loads((path / MANIFEST).read_text())
    assert set(manifest) == {"format_version", "tools", "dtypes", "logits", "files", "contract"}
    assert manifest["format_version"] == 1
    assert manifest["dtypes"] == dtypes
    assert manifest["logits"] == logits
    tools = manifest["tools"]
    assert tools.pop("mamba-deploy") == mamba_deploy.__version__
    assert tools.pop("python").startswith("3.")
    assert tools == {name: metadata.version(name) for name in ("torch", "onnx", "onnxscript", "onnx-ir", "numpy")}
    assert set(manifest["files"]) == {CONFIG, PORTABLE, LOWERED, WEIGHTS, REFERENCE}
    assert set(manifest["files"]) | {MANIFEST} == {p.name for p in path.iterdir()}
    for name, listed in manifest["files"].items():
        data = (path / name).read_bytes()
        assert listed == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    names = [entry["name"] for entry in manifest["contract"]]
    assert names[:4] == ["input_ids", "seq_lens", "conv_state.0", "ssm_state.0"]
    assert manifest["contract"][3] == {
        "name": "ssm_state.0", "direction": "in", "dtype": dtypes["state"], "axes": ["batch", 32, 8], "role": "state",
    }  # fmt: skip
    opened = Bundle.open(path)
    assert opened.contract.to_list() == manifest["contract"]
    assert (opened.contract.dtype, opened.contract.all_logits) == (dtypes["activation"], logits == "all")


def test_config_comes_back(tmp_path):
    """With its infinities and tuples."""
    config = dataclasses.replace(MODEL, eos_token_ids=(3, 4), dt_max=float("inf"), conv_bias=False)
    with write_bundle(tmp_path / "out", config, Contract.of(config, dtype="bfloat16"), TOOLS):
        pass
    opened = Bundle.open(tmp_path / "out")
    assert opened.config == config
    assert opened.contract == Contract.of(config, dtype="bfloat16")
    assert opened.manifest["tools"] == TOOLS


def test_has_and_file(tmp_path):
    opened = Bundle.open(write(tmp_path / "out"))
    assert opened.has(PORTABLE)
    assert opened.file(PORTABLE).read_text() == "new"
    assert not opened.has(TOKENIZER)
    refused(lambda: opened.file(TOKENIZER), f"has no {TOKENIZER}")


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon", "codestral-groups-8"])
def test_reference_answers_are_those_of_transformers(bundle, kind):
    """Logits of every prompt at every position, and the greedy tokens that follow."""
    made = bundle(kind)
    answers = Answers.load(made.bundle.file(REFERENCE))
    prompts = verification_prompts(made.bundle.config.vocab_size)
    assert [answers.prompt(i) for i in range(answers.count)] == prompts
    for i, prompt in enumerate(prompts):
        greedy = answers.arrays[f"greedy.{i}"].tolist()
        with torch.no_grad():
            theirs = made.theirs(torch.tensor([prompt + greedy])).logits[0].numpy()
        want = theirs[: len(prompt)]
        assert np.abs(answers.arrays[f"logits.{i}"] - want).max() <= made.tolerance * np.abs(want).max()
        following = theirs[len(prompt) - 1 : -1]
        scale = np.abs(following).max(axis=1)
        lead = following[range(len(greedy)), greedy] - following.max(axis=1)  # 0 where it is their choice too
        assert (lead >= -2 * made.tolerance * scale).all()
        best = np.sort(following, axis=1)
        gaps = (best[:, -1] - best[:, -2]) / scale
        assert np.abs(answers.arrays[f"greedy_gap.{i}"] - gaps).max() <= 4 * made.tolerance
        assert len(set(greedy)) > 2, "the model says the same all the time"


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_reference_states_are_those_of_transformers(bundle, kind):
    made = bundle(kind)
    answers = Answers.load(made.bundle.file(REFERENCE))
    with torch.no_grad():
        cache = made.theirs(torch.tensor([answers.prompt(0)]), use_cache=True).cache_params
    for layer in range(made.bundle.config.n_layer):
        conv, ssm = (s[0][0].numpy() for s in (cache.layers[layer].conv_states, cache.layers[layer].recurrent_states))
        for name, want in (("conv_state", conv[:, -3:]), ("ssm_state", ssm)):
            got = answers.arrays[f"{name}.{layer}"]
            assert got.shape == want.shape
            assert np.abs(got - want).max() <= made.tolerance * np.abs(want).max(), f"{name}.{layer}"


def test_tokenizer_travels(tmp_path):
    """From the checkpoint, byte by byte; the reference prompts are then text."""
    directory, _ = checkpoints.hugging_face(tmp_path / "checkpoint", "mamba", num_hidden_layers=1, vocab_size=256)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.save(str(directory / TOKENIZER))
    said: list[str] = []
    made = export(directory, tmp_path / "out", progress=said.append)
    assert made.file(TOKENIZER).read_bytes() == (directory / TOKENIZER).read_bytes()
    first = Answers.load(made.file(REFERENCE)).prompt(0)
    assert library.decode(first).startswith("def read_config(path):")
    assert any("ONNX" in line for line in said)
    assert not any("no tokenizer" in line for line in said)


# Damage ---------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped-bit": (flip, "sha256"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes"),
    "grown": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes"),
    "missing": (Path.unlink, "missing"),
    "directory": (replace_by_directory, "missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [CONFIG, PORTABLE, LOWERED, WEIGHTS, REFERENCE])
def test_damaged_file_is_named(bundle, tmp_path, name, damage):
    """And no other file is."""
    path = shutil.copytree(bundle("mamba").path, tmp_path / "out")
    apply, says = DAMAGES[damage]
    apply(path / name)
    if name == CONFIG:
        refused(lambda: Bundle.open(path), str(path / name), says)
        return
    opened = Bundle.open(path)
    refused(lambda: opened.file(name), str(path / name), says)
    for other in {PORTABLE, LOWERED, WEIGHTS, REFERENCE} - {name}:
        assert opened.file(other) == path / other


BROKEN_MANIFESTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "cut": (b'{"format_version": 1, "files": {', "cannot be read"),
    "not-json": (b"format_version: 1\n", "cannot be read"),
    "not-text": (b"\xff\xfe\x00\x01", "cannot be read"),
    "list": (b"[]", "JSON object"),
    "null": (b"null", "JSON object"),
    "no-version": (b"{}", "format version None"),
}


@pytest.mark.parametrize("name", BROKEN_MANIFESTS)
def test_broken_manifest(tmp_path, name):
    path = write(tmp_path / "out")
    data, says = BROKEN_MANIFESTS[name]
    (path / MANIFEST).write_bytes(data)
    refused(lambda: Bundle.open(path), str(path / MANIFEST), says)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_other_format_version(tmp_path, version):
    path = write(tmp_path / "out")
    edit_manifest(path, lambda m: m.update(format_version=version))
    error = refused(lambda: Bundle.open(path), MANIFEST, f"format version {version!r}", "reads 1")
    assert "export" in error.hint


@pytest.mark.parametrize("key", ["dtypes", "logits", "contract", "files"])
def test_manifest_without_a_key(tmp_path, key):
    path = write(tmp_path / "out")
    edit_manifest(path, lambda m: m.pop(key))
    refused(lambda: Bundle.open(path), MANIFEST, f"lacks {key}")


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "contract-axis": lambda m: m["contract"][3].update(axes=["batch", 8, 4]),
    "contract-name": lambda m: m["contract"][0].update(name="ids"),
    "contract-dtype": lambda m: m["contract"][2].update(dtype="float16"),
    "contract-shorter": lambda m: m["contract"].pop(),
    "contract-empty": lambda m: m.update(contract=[]),
    "contract-null": lambda m: m.update(contract=None),
    "activation-dtype": lambda m: m["dtypes"].update(activation="float16"),
    "state-dtype": lambda m: m["dtypes"].update(state="bfloat16"),
    "unknown-dtype": lambda m: m["dtypes"].update(state="float8"),
    "no-state-dtype": lambda m: m["dtypes"].pop("state"),
    "dtypes-text": lambda m: m.update(dtypes="float32"),
    "dtypes-null": lambda m: m.update(dtypes=None),
    "logits": lambda m: m.update(logits="all"),
    "files-list": lambda m: m.update(files=[CONFIG]),
    "files-null": lambda m: m.update(files=None),
    "file-null": lambda m: m["files"].update({CONFIG: None}),
    "file-text": lambda m: m["files"].update({CONFIG: "sha256"}),
    "file-without-hash": lambda m: m["files"][CONFIG].pop("sha256"),
    "file-without-size": lambda m: m["files"][CONFIG].pop("bytes"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_manifest(tmp_path, name):
    path = write(tmp_path / "out")
    edit_manifest(path, EDITS[name])
    refused(lambda: Bundle.open(path), str(path))


def rewrite_config(path: Path, **changes: Any) -> None:
    """The config changed, and its hash with it."""
    values = json.loads((path / CONFIG).read_text()) | changes
    data = json.dumps(values).encode()
    (path / CONFIG).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(path, lambda m: m["files"].update({CONFIG: entry}))


def test_config_of_another_model(tmp_path):
    path = write(tmp_path / "out")
    rewrite_config(path, n_layer=3)
    refused(lambda: Bundle.open(path), MANIFEST, "contract", CONFIG)


@pytest.mark.parametrize(
    "changes", [{"d_modle": 4}, {"d_state": 0}, {"generation": "mamba3"}], ids=lambda c: next(iter(c))
)
def test_config_that_makes_no_sense(tmp_path, changes):
    path = write(tmp_path / "out")
    rewrite_config(path, **changes)
    with pytest.raises(MambaDeployError, match=next(iter(changes)).replace("generation", "mamba3")):
        Bundle.open(path)


def test_no_bundle_there(tmp_path):
    refused(lambda: Bundle.open(tmp_path / "nothing"), "there is no directory", "nothing")
    (tmp_path / "empty").mkdir()
    refused(lambda: Bundle.open(tmp_path / "empty"), f"there is no {MANIFEST}", "empty")
    (tmp_path / "file").write_text("a file")
    refused(lambda: Bundle.open(tmp_path / "file"), "file")
    (tmp_path / "strange" / MANIFEST).mkdir(parents=True)
    refused(lambda: Bundle.open(tmp_path / "strange"), "strange")


# Writing over something -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["a-file", ".hidden", "a-directory/"])
def test_directory_that_is_not_empty_needs_force(tmp_path, inside):
    out = tmp_path / "out"
    out.mkdir()
    (out / inside).mkdir() if inside.endswith("/") else (out / inside).write_text("mine")
    before = content(tmp_path)
    error = refused(lambda: write(out), str(out), "not empty")
    assert "--force" in error.hint
    refused(lambda: refuse_to_overwrite(out, force=False), "not empty")
    assert content(tmp_path) == before
    write(out, force=True)
    assert content(tmp_path).items() >= before.items()
    assert Bundle.open(out).file(PORTABLE).read_text() == "new"


def test_empty_directory_needs_no_force(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    Bundle.open(tmp_path / "out").file(PORTABLE)


def test_force_replaces_what_a_bundle_owns_and_keeps_the_rest(tmp_path):
    out = write(tmp_path / "out", "old", files=(PORTABLE, WEIGHTS, TOKENIZER, "model.tensorrt.engine"))
    (out / "notes.txt").write_text("mine")
    (out / "runs" / "1").mkdir(parents=True)
    (out / "runs" / "1" / "log").write_text("mine too")
    (out / "link").symlink_to("runs/1/log")
    (out / "dangling").symlink_to("nowhere")
    write(out, "new", force=True)
    found = content(tmp_path)
    config, manifest = found.pop(f"out/{CONFIG}"), found.pop(f"out/{MANIFEST}")
    assert json.loads(config)["d_model"] == 4
    assert set(json.loads(manifest)["files"]) == {CONFIG, PORTABLE, WEIGHTS}
    assert found == {
        "out": None,
        f"out/{PORTABLE}": b"new",
        f"out/{WEIGHTS}": b"new",
        "out/notes.txt": b"mine",
        "out/runs": None,
        "out/runs/1": None,
        "out/runs/1/log": b"mine too",
        "out/link": "runs/1/log",
        "out/dangling": "nowhere",
    }


@pytest.mark.parametrize("manifest", ["{", '{"files": null}', '{"files": 3}', '{"files": [["a"]]}', "[]"])
def test_force_over_a_damaged_bundle(tmp_path, manifest):
    out = write(tmp_path / "out", "old")
    (out / MANIFEST).write_text(manifest)
    (out / "notes.txt").write_text("mine")
    write(out, force=True)
    assert Bundle.open(out).file(WEIGHTS).read_text() == "new"
    assert (out / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_file_in_the_way(tmp_path, force):
    (tmp_path / "out").write_text("mine")
    refused(lambda: write(tmp_path / "out", force=force), str(tmp_path / "out"), "not a directory")
    refused(lambda: write(tmp_path / "out" / "below", force=force), "below")
    assert content(tmp_path) == {"out": b"mine"}


def test_export_refuses_before_it_works(tmp_path):
    """Before the checkpoint is even looked for."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    said: list[str] = []
    refused(lambda: export(tmp_path / "no-checkpoint", tmp_path / "out", progress=said.append), "not empty")
    with pytest.raises(CheckpointError, match="no-checkpoint"):
        export(tmp_path / "no-checkpoint", tmp_path / "out", force=True)
    for options, says in (({"dtype": "fp8"}, "fp8"), ({"state_dtype": "int32"}, "int32")):
        with pytest.raises(ExportError, match=says):
            export(tmp_path / "no-checkpoint", tmp_path / "new", **options)
    directory, _ = checkpoints.hugging_face(tmp_path / "checkpoint", "mamba", num_hidden_layers=1)
    with pytest.raises(ExportError, match="no tokenizer file"):
        export(directory, tmp_path / "new", tokenizer=tmp_path / "nothing.json")
    assert said == []
    assert {p.name for p in tmp_path.iterdir()} == {"out", "checkpoint"}
    assert content(tmp_path / "out") == {"file": b"mine"}


# Paths ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "out", "with spaces and 'quotes'", "Grüße-世界", ".hidden", "-dash", "a.b.c", "deep/down/here", "slash/",
        "./dot",
        "../work/across", "~/home", "%s {0} $HOME",
    ],
)  # fmt: skip
def test_odd_path(tmp_path, monkeypatch, path):
    """Relative to the working directory, or below the home directory."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    for mark, force in (("first", False), ("second", True)):
        write(path, mark, force=force)
        assert Bundle.open(path).file(PORTABLE).read_text() == mark
    expected = (tmp_path / "home" / "home") if path.startswith("~") else (tmp_path / "work" / path).resolve()
    assert (expected / MANIFEST).is_file()
    assert len(list(expected.parent.iterdir())) == 1, "something was left beside it"


def test_name_too_long(tmp_path):
    refused(lambda: write(tmp_path / ("x" * 300)), "name too long")
    refused(lambda: write(tmp_path / ("x" * 250)), "name too long")  # that of the temporary sibling
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("force", [False, True])
def test_directory_behind_a_link(tmp_path, force):
    """The link stays, and what it points to becomes the bundle; temporary files lie on the disk of the target."""
    (tmp_path / "here").mkdir()
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "here" / "out").symlink_to(tmp_path / "disk" / "real")
    if force:
        write(tmp_path / "here" / "out", "old")
        (tmp_path / "disk" / "real" / "notes").write_text("mine")
    with write_bundle(tmp_path / "here" / "out", MODEL, CONTRACT, TOOLS, force=force) as work:
        assert work.parent == tmp_path / "disk"
        (work / PORTABLE).write_text("new")
    assert (tmp_path / "here" / "out").is_symlink()
    assert Bundle.open(tmp_path / "here" / "out").file(PORTABLE).read_text() == "new"
    assert (tmp_path / "disk" / "real" / "notes").exists() == force
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["real"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_are_ordinary(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "out")
        assert os.umask(umask) == umask, "the umask was changed"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    for entry in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(entry.stat().st_mode) == 0o666 & ~umask, entry.name


def test_every_exported_file_has_ordinary_permissions(bundle):
    mask = os.umask(0)
    os.umask(mask)
    found = {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in bundle("mamba").path.iterdir()}
    assert found == dict.fromkeys(found, oct(0o666 & ~mask))


# Interruptions --------------------------------------------------------------------------------------------------------


class BugError(Exception):
    """Not one of ours."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, BugError, MemoryError], ids=lambda e: e.__name__)
@pytest.mark.parametrize("force", [False, True], ids=["new", "over-an-old-one"])
def test_interrupted_export_leaves_nothing(tmp_path, error, force):
    out = tmp_path / "out"
    if force:
        write(out, "old")
        (out / "notes").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(error), write_bundle(out, MODEL, CONTRACT, TOOLS, force=force) as work:  # noqa: PT012
        (work / PORTABLE).write_text("half")
        assert {k: v for k, v in content(tmp_path).items() if not k.startswith(work.name)} == before
        if force:
            assert Bundle.open(out).file(PORTABLE).read_text() == "old", (
                "the old one is readable until the new is whole"
            )
        raise error
    assert content(tmp_path) == before


def test_old_bundle_is_readable_until_the_new_one_is_whole(tmp_path, monkeypatch):
    """Also while hashes are computed and the manifest is written."""
    out = write(tmp_path / "out", "old")
    looked = []

    def look(path: Path) -> str:
        looked.append(Bundle.open(out).file(WEIGHTS).read_text() if path.parent != out else "")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(bundle_module, "sha256", look)
    write(out, "new", force=True)
    assert [text for text in looked if text] == ["old"] * 3  # config, graph, weights
    assert Bundle.open(out).file(WEIGHTS).read_text() == "new"


@contextlib.contextmanager
def failing_renames(
    monkeypatch: pytest.MonkeyPatch, at: set[int], error: BaseException, after: bool
) -> Iterator[list[int]]:
    """The renames of these numbers fail; or the error comes when they are done."""
    calls: list[int] = []
    rename = Path.rename

    def counted(self: Path, target: Path) -> Path:
        calls.append(len(calls))
        if calls[-1] not in at:
            return rename(self, target)
        if after:
            rename(self, target)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        yield calls


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "I/O error")], ids=["interrupt", "failure"])
@pytest.mark.parametrize("at", [{0}, {1}, {1, 2}, {2}, {3}, set()], ids=str)
def test_interrupted_while_put_in_place(tmp_path, monkeypatch, at, error, after):
    """At each rename: what stands there is one bundle, whole, with the files that were not ours.

    Renames: the old bundle goes aside, the new one in its place, two foreign files follow. Where the second fails, the
    third puts the old one back, and may be interrupted too.
    """
    out = write(tmp_path / "out", "old", files=(PORTABLE, WEIGHTS, TOKENIZER))
    for name in ("notes-1", "notes-2"):
        (out / name).write_text("mine")
    old = content(out)
    with failing_renames(monkeypatch, at, error, after) as calls, contextlib.suppress(KeyboardInterrupt, BundleError):
        write(out, "new", force=True)
    assert len(calls) > max(at, default=3)
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "something was left beside it"
    opened = Bundle.open(out)
    mark = opened.file(PORTABLE).read_text()
    assert opened.file(WEIGHTS).read_text() == mark
    assert (out / "notes-1").read_text() == (out / "notes-2").read_text() == "mine"
    assert mark == ("old" if at == {0} or (1 in at and not after) else "new")
    if mark == "old":
        assert content(out) == old


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_interrupted_while_a_first_bundle_is_put_in_place(tmp_path, monkeypatch, after):
    with failing_renames(monkeypatch, {0}, KeyboardInterrupt(), after), contextlib.suppress(KeyboardInterrupt):
        write(tmp_path / "out")
    found = [p.name for p in tmp_path.iterdir()]
    assert found == (["out"] if after else [])
    if after:
        Bundle.open(tmp_path / "out").file(WEIGHTS)


def test_two_exports_to_one_place(tmp_path):
    """The last to finish stays, whole."""
    with write_bundle(tmp_path / "out", MODEL, CONTRACT, TOOLS) as first:
        write(tmp_path / "out", "second")
        for name in (PORTABLE, WEIGHTS):
            (first / name).write_text("first")
    opened = Bundle.open(tmp_path / "out")
    assert opened.file(PORTABLE).read_text() == opened.file(WEIGHTS).read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# A full disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True], ids=["new", "over-an-old-one"])
@pytest.mark.parametrize("name", [PORTABLE, CONFIG, MANIFEST])
def test_full_disk(tmp_path, monkeypatch, name, force):
    out = tmp_path / "out"
    if force:
        write(out, "old")
    before = content(tmp_path)
    write_text = Path.write_text

    def full(self: Path, data: str, **options: Any) -> int:
        if self.name != name:
            return write_text(self, data, **options)
        write_text(self, data[: len(data) // 2], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        error = refused(lambda: write(out, force=force), str(out), "No space left")
    assert "free space" in error.hint
    assert content(tmp_path) == before


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """What the kernel does at the end of a disk, for every writer, C and Rust included: writing more is an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_graph(made: Any, work: Path) -> None:
    export_onnx(made.reference, made.bundle.contract, work / PORTABLE)


def write_lowered(made: Any, work: Path) -> None:
    lower_for_cpu(made.path / PORTABLE, work / LOWERED, made.bundle.config, made.bundle.contract)


def write_reference(made: Any, work: Path) -> None:
    write_answers(Answers.load(made.path / REFERENCE), work / REFERENCE)


@pytest.mark.parametrize(
    ("step", "share"),
    [(write_graph, 0.5), (write_graph, 1.0), (write_lowered, 0.5), (write_reference, 0.5)],
    ids=["weights", "graph", "lowered-graph", "reference"],
)
def test_full_disk_at_each_step_of_an_export(bundle, tmp_path, step, share):
    """Files may have a share of the size of the weights, which are written before the graph, and are the smallest."""
    made = bundle("mamba2")
    sizes = {p.name: p.stat().st_size for p in made.path.iterdir()}
    assert sizes[WEIGHTS] < min(sizes[PORTABLE], sizes[LOWERED], sizes[REFERENCE])

    def attempt() -> None:
        with (
            write_bundle(tmp_path / "out", MODEL, CONTRACT, TOOLS) as work,
            files_no_larger_than(int(share * sizes[WEIGHTS])),
        ):
            step(made, work)

    error = refused(attempt, str(tmp_path / "out"), "File too large")
    assert "free space" in error.hint
    assert not list(tmp_path.iterdir())
