"""samples/bench_chains.py without a GPU: the chain, made of the operator's reference, is the step of the model; and
samples/plot_decode.py."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from click.testing import CliRunner

from mamba_deploy import step_ops
from mamba_deploy.checkpoint import load_checkpoint
from mamba_deploy.limits import parameter_count
from mamba_deploy.model import MambaModel
from mamba_deploy.plugins import launches
from mamba_deploy.plugins import pending as rows_of_pending
from mamba_deploy.plugins.arguments import SIGNATURES

SAMPLES = Path(__file__).resolve().parents[1] / "samples"


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SAMPLES)
    return importlib.import_module("bench_chains")


class References:
    """What ``plugins/kernels.py`` offers, of the references."""

    def workspace_bytes(self, op: str, dtype: str, state_dtype: str, **sizes: int) -> int:
        return launches.workspace_bytes(op, SIGNATURES[op].struct(**sizes))

    def pending_row(self, **sizes: int) -> int:
        return rows_of_pending.pending_row(SIGNATURES["model"].struct(**sizes))

    def model(
        self, *args: Any, logits: torch.Tensor, pending: torch.Tensor | None, workspace: torch.Tensor, stream: int
    ) -> None:
        assert pending is None or not pending.any()
        assert workspace.numel() > 0
        made, states = step_ops.model(*args)
        logits.copy_(made)
        for layer, (conv, ssm) in zip(args[5], states, strict=True):
            layer["conv_state_out"].copy_(conv)
            layer["ssm_state_out"].copy_(ssm)

    def sample_token(
        self, logits: torch.Tensor, uniform: None, *, steps: torch.Tensor, tokens: torch.Tensor, log: None, stream: int
    ) -> None:
        assert steps.shape == tokens.shape == logits.shape[:1]
        tokens.copy_(logits.argmax(-1))


@pytest.mark.parametrize(("family", "options"), [("mamba", {}), ("mamba2", {}), ("mamba2", {"n_groups": 2})])
@torch.no_grad()
def test_a_chain_is_the_step_of_the_model(sample: Any, tmp_path: Path, family: Any, options: dict[str, Any]) -> None:
    path, _ = checkpoints.hugging_face(tmp_path, family, **options)
    model = MambaModel.from_weights(*load_checkpoint(path), torch.float32)
    chain, state = sample.Chain(model, References(), 3), model.new_state(3)
    for tokens in torch.randint(0, 61, (5, 3), generator=torch.Generator().manual_seed(0)):
        wanted, state = model.step(tokens, state)
        logits = chain.read(tokens)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
        assert chain.choose(logits).tolist() == wanted.argmax(-1).tolist()


@pytest.mark.parametrize("name", ["mamba-130m", "mamba2-130m"])
def test_random_models_have_the_published_sizes(sample: Any, name: str) -> None:
    model = sample.random_model(sample.config_of(name), device="cpu")
    assert round(parameter_count(model.config) / 1e6) == 129
    kept = {weight.dtype for key, weight in model.named_parameters() if key.endswith((".A", ".D", "norm.weight"))}
    assert kept == {torch.float32}
    assert model.embedding.weight.dtype == model.layers[0].mixer.in_proj.weight.dtype == torch.float16


def test_another_model_is_refused(sample: Any) -> None:
    done = CliRunner().invoke(sample.main, ["--models", "mamba-1b"])
    assert done.exit_code == 2
    assert "there is no model mamba-1b" in done.output


def test_the_picture_is_of_the_rows_with_peers(sample: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    plot, step = importlib.import_module("plot_decode"), "mamba_ssm step, CUDA graph"
    rows = [
        {"name": "decode/mamba-130m/b1", "value": 20.0, "limit": 10.0, "peers": {step: 50.0, f"{step}, 1 warp": 40.0}},
        {"name": "chain/mamba-130m/b1", "value": 15.0, "limit": 10.0, "peers": {step: 40.0}},  # has an engine
        {"name": "chain/mamba-2.8b/b64", "value": 30.0, "limit": 10.0, "peers": {step: 10.0, "transformers": 5.0}},
        {"name": "chain/mamba-2.8b/b64/float16 state", "value": 15.0, "limit": 10.0, "peers": {step: 10.0}},
        {"name": "decode/mamba-130m/b8", "value": 20.0, "limit": 10.0, "peers": {}},
        {"name": "prompt/mamba2-130m/b1/l2048", "value": 20.0, "limit": 10.0, "peers": {step: 50.0}},
    ]
    assert plot.bars(rows) == {
        "mamba-130m, 1 row\n(TensorRT engine)": (2.0, 4.0),
        "mamba-2.8b, 64 rows\n(kernels alone)": (3.0, 1.0),
        "mamba-2.8b, 64 rows, float16 state\n(kernels alone)": (1.5, 1.0),
    }
    (tmp_path / "a.json").write_text(json.dumps({"gpu": "a GPU", "rows": rows}), encoding="utf-8")
    for name in ("a.svg", "a.png"):
        done = CliRunner().invoke(plot.main, [str(tmp_path / "a.json"), "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        assert (tmp_path / name).stat().st_size > 1000
    (tmp_path / "b.json").write_text(json.dumps({"gpu": "a GPU", "rows": rows[4:]}), encoding="utf-8")
    done = CliRunner().invoke(plot.main, [str(tmp_path / "b.json"), "--out", str(tmp_path / "b.svg")])
    assert done.exit_code == 1
    assert "mamba_ssm" in done.output
