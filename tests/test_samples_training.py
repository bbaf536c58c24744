"""samples/train_tiny.py, and the two checkpoints it wrote."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from torch.func import functional_call

from mamba_deploy import ops
from mamba_deploy.checkpoint import load_checkpoint, model_weights, padded_rows
from mamba_deploy.config import MambaConfig
from mamba_deploy.model import MambaModel

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
CHECKPOINTS = {"mamba": SAMPLES / "tiny-mamba", "mamba2": SAMPLES / "tiny-mamba2"}
GENERATIONS = pytest.mark.parametrize("generation", list(CHECKPOINTS))


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tiny", SAMPLES / "train_tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_tiny"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


train_tiny = load_script()


def new_model(generation: str, n_layer: int = 1) -> tuple[MambaConfig, dict[str, torch.Tensor]]:
    raw = train_tiny.new_config(generation, n_layer)
    config = MambaConfig.from_foreign(raw)
    tensors = train_tiny.new_tensors(config, padded_rows(raw, config), seed=0)
    return config, {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def record_of(generation: str) -> dict[str, Any]:
    return json.loads((CHECKPOINTS[generation] / "training.json").read_text())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A library of three modules, one of them held out, with what must not be trained on."""
    files = {
        "a.py": "def double(x):\n    return 2 * x\n" * 30,
        "b.py": "import a\n",
        "json/scanner.py": "held out\n",
        "other/copied.py": "held out\n",
        "test/test_a.py": "assert True\n",
        "site-packages/third.py": "import sys\n",
        "_sysconfigdata_x.py": "build = {}\n",
    }
    for name, text in files.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "source"


def test_read_modules_keeps_held_out_text_out_of_training(source: Path) -> None:
    training, held_out = train_tiny.read_modules(source)
    assert sorted(training) == ["a.py", "b.py"]
    assert held_out == {"json/scanner.py": b"held out\n"}


@GENERATIONS
def test_command_writes_a_checkpoint_that_loads(generation: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = f"--generation {generation} --n-layer 1 --steps 3 --batch 2 --window 32".split()
    result = CliRunner().invoke(train_tiny.main, [*arguments, "--source", str(source), "--out", str(out)])
    assert result.exit_code == 0, result.output
    config, weights = load_checkpoint(out)
    assert (config.generation, config.vocab_size, config.eos_token_ids) == (generation, 257, (256,))
    MambaModel.from_weights(config, weights)
    names = "config.json pytorch_model.bin tokenizer.json tokenizer_config.json training.json"
    assert sorted(path.name for path in out.iterdir()) == names.split()
    record = json.loads((out / "training.json").read_text())
    assert record["steps"] == 3
    assert f"held out: {record['held_out']['bits_per_byte']:.4f} bits per byte" in result.output

    before = (out / "training.json").read_bytes()
    result = CliRunner().invoke(train_tiny.main, ["--evaluate", str(out), "--source", str(source)])
    assert result.exit_code == 0, result.output
    assert f"{record['held_out']['bits_per_byte']:.4f} bits per byte of 9 bytes" in result.output
    assert (out / "training.json").read_bytes() == before


def test_command_says_what_is_missing(source: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(train_tiny.main, ["--source", str(source)])
    assert result.exit_code == 2
    assert "--generation and --out" in result.output
    result = CliRunner().invoke(train_tiny.main, ["--source", str(tmp_path / "source" / "other")])
    assert result.exit_code == 1
    assert "none of the held-out modules" in result.output


@GENERATIONS
def test_loss_goes_down(generation: str) -> None:
    config, tensors = new_model(generation)
    text = train_tiny.joined_ids({"a.py": b"for i in range(10):\n    print(i)\n" * 20})
    plan = {"device": "cpu", "minutes": 1.0, "batch": 4, "window": 64, "learning_rate": 4e-3, "seed": 0}
    *_, (_, first) = train_tiny.train(config, tensors, text, train_tiny.Plan(steps=1, **plan))
    *_, (number, last) = train_tiny.train(config, tensors, text, train_tiny.Plan(steps=20, **plan))
    assert number == 20
    assert last < 0.7 * first


@GENERATIONS
def test_failed_write_leaves_nothing_behind(generation: str, tmp_path: Path) -> None:
    _, tensors = new_model(generation)
    with mock.patch("torch.save", side_effect=OSError("disk full")), pytest.raises(OSError, match="disk full"):
        train_tiny.write_checkpoint(tmp_path / "out", {}, tensors)
    assert list((tmp_path / "out").iterdir()) == []


@GENERATIONS
def test_parallel_scans_give_the_numbers_of_the_ops(generation: str) -> None:
    config, tensors = new_model(generation, n_layer=2)
    with torch.device("meta"):
        model = MambaModel(config)
    ids = torch.randint(257, (2, 97), generator=torch.Generator().manual_seed(0))

    def loss_and_gradients() -> list[torch.Tensor]:
        weights = model_weights(config, tensors)
        logits, _ = functional_call(model, weights, (ids[:, :-1],), {"all_logits": True}, strict=True)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return [loss, *torch.autograd.grad(loss, list(tensors.values()))]

    expected = loss_and_gradients()
    scans = {"selective_scan": train_tiny.parallel_selective_scan, "ssd_scan": train_tiny.parallel_ssd_scan}
    with torch.compiler.set_stance("force_eager"), mock.patch.multiple(ops, **scans):
        found = loss_and_gradients()
    for name, a, b in zip(["loss", *tensors], found, expected, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max(), name


def test_initial_values_are_those_of_the_official_code() -> None:
    config, tensors = new_model("mamba")
    assert torch.equal(tensors["layers.0.mixer.A_log"][5], torch.arange(1.0, 17.0).log())
    dt = torch.nn.functional.softplus(tensors["layers.0.mixer.dt_proj.bias"])
    assert 0.00099 < dt.min() < 0.002
    assert 0.05 < dt.max() < 0.1001
    assert tensors["layers.0.mixer.dt_proj.weight"].abs().max() <= config.dt_rank**-0.5
    assert tensors["embedding.weight"].std().item() == pytest.approx(0.02, rel=0.05)


# ---- the committed checkpoints


@GENERATIONS
def test_checkpoint_is_small_and_stores_the_tied_head_once(generation: str) -> None:
    directory = CHECKPOINTS[generation]
    assert sum(path.stat().st_size for path in directory.iterdir()) < 3_000_000
    stored = torch.load(directory / "pytorch_model.bin", weights_only=True)
    head, embedding = stored.pop("lm_head.weight"), stored["backbone.embedding.weight"]
    assert head.data_ptr() == embedding.data_ptr()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    parameters = sum(tensor.numel() for tensor in stored.values())
    assert parameters == record_of(generation)["parameters"]
    assert 800_000 < parameters < 1_200_000


@GENERATIONS
def test_tokenizer_is_the_bytes(generation: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(CHECKPOINTS[generation] / "tokenizer.json"))
    texts = ["".join(map(chr, range(256))), "  x\n\n\ty = 'é € 🐍'\r\n", "def f(self):\n        return  1"]
    for text in texts:
        assert tokenizer.encode(text).ids == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.encode("a<|endoftext|>b").ids == [97, 256, 98]
    assert tokenizer.get_vocab_size() == 257
    config, _ = load_checkpoint(CHECKPOINTS[generation])
    assert config.eos_token_ids == (256,)


@GENERATIONS
def test_record_is_consistent(generation: str) -> None:
    held_out = record_of(generation)["held_out"]
    rows = held_out["modules"]
    assert list(rows) == train_tiny.HELD_OUT
    assert held_out["bytes"] == sum(row["bytes"] for row in rows.values())
    bits = sum(row["bits_per_byte"] * row["bytes"] for row in rows.values())
    assert math.isclose(bits / held_out["bytes"], held_out["bits_per_byte"], abs_tol=1e-5)
    assert held_out["bits_per_byte"] < 1.5


def recorded_modules(generation: str) -> dict[str, bytes]:
    """The held-out modules of this Python that are, byte for byte, those of the record."""
    _, held_out = train_tiny.read_modules(Path(sysconfig.get_path("stdlib")))
    rows = record_of(generation)["held_out"]["modules"]
    same = {name: text for name, text in held_out.items() if train_tiny.sha256(text) == rows[name]["sha256"]}
    if not same:
        pytest.skip("no held-out module of this Python has the recorded sha256")
    return same


@GENERATIONS
def test_pytorch_reproduces_the_recorded_bits_per_byte(generation: str) -> None:
    modules = recorded_modules(generation)
    name = min(modules, key=lambda name: len(modules[name]))
    row = record_of(generation)["held_out"]["modules"][name]
    assert row["bytes"] == len(modules[name])
    found = train_tiny.score(CHECKPOINTS[generation], {name: modules[name]})
    assert found == pytest.approx(row["bits_per_byte"], abs=1e-3)
