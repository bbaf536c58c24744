"""samples/bench_peers.py, peers.py and bench_worker.py without a GPU: peers are the same models, rows add up."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from click.testing import CliRunner
from torch import Tensor

from mamba_deploy.bundle import ENGINES, Bundle
from mamba_deploy.checkpoint import load_checkpoint, read_config
from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract
from mamba_deploy.limits import Limits, parameter_count
from mamba_deploy.model import MambaModel
from mamba_deploy.runtime.session import Session

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
MILLIONS = {  # of parameters, by the published tables
    "mamba-130m": 129.14, "mamba-370m": 371.52, "mamba-790m": 793.20, "mamba-1.4b": 1372.18, "mamba-2.8b": 2768.35,
    "mamba2-130m": 128.99, "mamba2-370m": 368.35, "mamba2-780m": 780.16, "mamba2-1.3b": 1343.76, "mamba2-2.7b": 2702.60,
}  # fmt: skip


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SAMPLES)
    return importlib.import_module("bench_peers")


@pytest.fixture
def peers(sample: Any) -> Any:
    return sys.modules["peers"]


@pytest.fixture
def worker(sample: Any) -> Any:
    return sys.modules["bench_worker"]


# --- models -------------------------------------------------------------------------------------------------------


def config_of(sample: Any, name: str) -> MambaConfig:
    kind = transformers.Mamba2Config if name.startswith("mamba2") else transformers.MambaConfig
    with tempfile.TemporaryDirectory() as folder:
        kind(**sample.model_options(name)).save_pretrained(folder)
        return MambaConfig.from_foreign(read_config(Path(folder)))


def test_models_have_the_published_sizes(sample: Any) -> None:
    found = {name: round(parameter_count(config_of(sample, name)) / 1e6, 2) for name in sample.MODELS}
    assert found == MILLIONS


def test_a_model_is_made_once(sample: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sample.MODELS, "mamba2-130m", (128, 2))
    monkeypatch.setattr(
        sample, "model_options", lambda name, make=sample.model_options: {**make(name), "vocab_size": 61}
    )
    checkpoint, bundle = sample.make("mamba2-130m", tmp_path)
    assert (checkpoint, bundle) == (tmp_path / "mamba2-130m" / "checkpoint", tmp_path / "mamba2-130m-fp16")
    assert Bundle.open(bundle).contract.dtype == "float16"
    assert Bundle.open(bundle).config == load_checkpoint(checkpoint)[0]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    sample.make("mamba2-130m", tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


# --- peers: the same models ---------------------------------------------------------------------------------------


def rms_norm(
    x: Tensor, weight: Tensor, bias: None, residual: Tensor | None = None, eps: float = 0, prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:  # fmt: skip
    assert bias is None
    assert residual_in_fp32
    added = x.float() if residual is None else x.float() + residual
    y = F.rms_norm(added, weight.shape, weight, eps).to(x.dtype)
    return (y, added) if prenorm else y


def gated_norm(
    x: Tensor, weight: Tensor, bias: None, z: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    assert bias is None
    assert not norm_before_gate
    gated = (x.float() * F.silu(z.float())).unflatten(-1, (-1, group_size))
    return (F.rms_norm(gated, (group_size,), eps=eps).flatten(-2) * weight).to(x.dtype)


def state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """With the layouts that ``selective_state_update`` of mamba_ssm takes."""
    if state.dim() == 4:  # tied over a head
        assert (A.stride(-1), A.stride(-2), dt.stride(-1), dt_bias.stride(-1)) == (0, 0, 0, 0)
        assert B.shape == (len(x), B.shape[1], state.shape[3])
        B, C = (v.repeat_interleave(state.shape[1] // v.shape[1], 1)[:, :, None] for v in (B, C))
    else:
        B, C = B[:, None], C[:, None]
    assert dt_softplus
    delta = F.softplus(dt.float() + dt_bias)[..., None]
    state.copy_(state * torch.exp(delta * A) + delta * B.float() * x.float()[..., None])
    y = (state.float() * C.float()).sum(-1) + D * x.float()
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


def conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    window = torch.cat([state, x[:, None]], 1)  # [B, K, C]
    state.copy_(window[:, 1:])
    return F.silu((window.float() * weight.float()).sum(1) + bias.float()).to(x.dtype)


def chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int, D: Tensor, dt_bias: Tensor, dt_softplus: bool
) -> Tensor:
    state, size = x.new_zeros(len(x), *x.shape[2:], B.shape[-1]), x.shape[-1]
    steps, bias, skip = (v[..., None].expand(*v.shape, size) for v in (dt, dt_bias, D))
    rates = A[:, None, None].expand(*state.shape[1:])
    tokens = range(x.shape[1])
    return torch.stack(
        [
            state_update(state, x[:, t], steps[:, t], rates, B[:, t], C[:, t], skip, None, bias, dt_softplus)
            for t in tokens
        ],
        1,
    )


@pytest.fixture
def kernels(peers: Any) -> Any:
    return peers.Kernels(rms_norm, gated_norm, state_update, chunk_scan, conv)


OF_BOTH = pytest.mark.parametrize(("family", "options"), [("mamba", {}), ("mamba2", {}), ("mamba2", {"n_groups": 2})])


def load(folder: Path, family: Any, options: dict[str, Any]) -> tuple[Path, MambaModel]:
    path, _ = checkpoints.hugging_face(folder, family, **options)
    return path, MambaModel.from_weights(*load_checkpoint(path), torch.float32)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@OF_BOTH
@torch.no_grad()
def test_the_step_of_mamba_ssm_is_that_of_the_reference(
    peers: Any, kernels: Any, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    _, model = load(tmp_path, family, options)
    peer, state = peers.Peer(model, kernels, 3, torch.float32), model.new_state(3)
    for tokens in torch.randint(0, 61, (12, 3), generator=torch.Generator().manual_seed(0)):
        wanted, state = model.step(tokens, state)
        assert_same(peer.read(tokens), wanted)
    assert_same(torch.stack(peer.ssm), torch.stack(state.ssm))


@torch.no_grad()
def test_the_prompt_of_mamba_ssm_is_that_of_the_reference(peers: Any, kernels: Any, tmp_path: Path) -> None:
    _, model = load(tmp_path, "mamba2", {"n_groups": 2})
    ids = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    assert_same(peers.Peer(model, kernels).read(ids), model(ids)[0])


@OF_BOTH
@torch.no_grad()
def test_transformers_reads_the_same_steps_and_prompts(
    peers: Any, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    path, model = load(tmp_path, family, options)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    assert_same(peers.eager(theirs, ids).feed(ids), model(ids)[0])
    steps = peers.eager(theirs, ids[:, 0])
    for t in range(9):
        logits = steps.feed(ids[:, t])
    assert_same(logits, model(ids)[0])
    wanted = model(torch.cat([ids, logits.argmax(-1)[:, None]], 1))[0]
    assert_same(steps.run(), wanted)  # what is timed reads the likeliest token


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_projections_are_all_products_but_the_embedding(
    peers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: Any
) -> None:
    _, model = load(tmp_path, name, {})
    monkeypatch.setattr(peers, "captured", lambda read, tokens: peers.Contender(None, lambda: read(tokens), 1))
    operations = 0

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal operations
        operations += 2 * inputs[0].numel() * output.shape[-1]

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    assert peers.projections(model, 7).run().shape == (1, 61)
    c, contract = model.config, Contract.of(model.config)
    of_one, of_two = (Limits.of(c, contract, seq=seq).flops for seq in (1, 2))
    scan = c.n_layer * c.d_inner * c.d_state * (7 if name == "mamba" else 5)
    assert operations == 7 * (of_two - of_one - scan)


# --- the worker ---------------------------------------------------------------------------------------------------


class Toy:
    """A backend whose likeliest token is the one after the last, and which counts what it is asked."""

    name, steps_ahead = "toy", 1

    def __init__(self, config: MambaConfig) -> None:
        self.config, self.contract = config, Contract.of(config)
        self.read: list[tuple[int, int]] = []
        self.replayed: list[tuple[list[int], int]] = []
        self.seconds: float | None = 2e-3

    def new_state(self, batch: int) -> Any:
        self.state = SimpleNamespace(batch=batch, tokens=0, snapshot=lambda: None)
        return self.state

    def run(self, ids: Any, lens: Any, state: Any) -> Any:
        assert state is self.state, "a state that is gone"
        state.tokens += ids.shape[1]
        self.read.append(ids.shape)
        return np.eye(self.config.vocab_size, dtype=np.float32)[(ids[:, -1] + 1) % self.config.vocab_size]

    def kernels_a_step(self, state: Any) -> int:
        assert state is self.state
        return 42

    def time_replays(self, tokens: Any, count: int, state: Any) -> float | None:
        assert state is self.state
        self.replayed.append((tokens.tolist(), count))
        return None if self.seconds is None else count * self.seconds

    def close(self) -> None:
        pass


@pytest.fixture
def toy() -> Toy:
    return Toy(MambaConfig("mamba2", 11, d_model=8, n_layer=1, d_inner=16, d_state=4, head_dim=8))


@pytest.fixture
def ask(worker: Any, toy: Toy) -> Callable[..., Any]:
    """``ask("replays", steps=10)``, as lines of JSON."""
    one = worker.Worker(Path("nowhere"))
    one.session = Session(toy, toy.config, max_chunk=8)  # type: ignore[arg-type]

    def of(do: str, **arguments: Any) -> Any:
        out = io.StringIO()
        worker.serve(one, [json.dumps({"do": do, **arguments}) + "\n"], out)
        assert out.getvalue().endswith("\n")
        return json.loads(out.getvalue())

    return of


def test_the_worker_feeds_the_likeliest_tokens_and_tells_them(ask: Callable[..., Any], toy: Toy) -> None:
    reply = ask("logits", ids=[[3], [9]], greedy=3)
    assert reply["fed"] == [[4, 10], [5, 0], [6, 1]]
    assert np.argmax(reply["logits"], -1).tolist() == [7, 2]
    assert toy.read == [(2, 1)] * 4


def test_the_worker_times_replays_of_the_state_that_it_prepared(ask: Callable[..., Any], toy: Toy) -> None:
    assert ask("prepare", batch=2, length=20) == {"kernels": 42}
    assert toy.read == [(2, 8), (2, 8), (2, 4)]
    assert ask("replays", steps=50) == {"us": pytest.approx(2000)}
    [(warm, first), (timed, second)] = toy.replayed
    assert (first, second) == (10, 50)
    assert warm == timed
    assert len(timed) == 2


def test_the_worker_says_what_it_cannot_do_and_goes_on(ask: Callable[..., Any], toy: Toy) -> None:
    ask("prepare", batch=1, length=1)
    toy.seconds = None
    assert ask("replays", steps=50) == {"error": "RuntimeError: there is no CUDA graph of a step"}
    assert "no attribute 'dance'" in ask("dance")["error"]
    toy.seconds = 1e-3
    assert ask("replays", steps=50) == {"us": pytest.approx(1000)}


def test_the_worker_times_prompts_and_generated_tokens(ask: Callable[..., Any], toy: Toy) -> None:
    assert ask("prompt", ids=[[1, 2, 3]], count=2)["us"] > 0
    assert toy.read == [(1, 3)] * 3
    reply = ask("generate", batch=2)
    assert 0 < reply["us"] <= reply["p95"]


def test_the_worker_builds_an_engine_only_for_more_rows(
    worker: Any, monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Any]
) -> None:
    from mamba_deploy.exporters import engine_build

    built = []
    monkeypatch.setattr(engine_build, "build_engine", lambda path, **options: built.append(options["max_batch"]))
    for engines, wanted in (({}, [64]), ({"tensorrt": {"max_batch": 8}}, [64]), ({"tensorrt": {"max_batch": 64}}, [])):
        manifest = SimpleNamespace(manifest={"engines": engines})
        monkeypatch.setattr(worker.Bundle, "open", lambda path, found=manifest: found)
        assert ask("build", max_batch=64) == {}
        assert built == wanted
        built.clear()
    assert "tensorrt" in ENGINES


def test_a_real_process_answers_in_a_python_without_torch(worker: Any, tmp_path: Path) -> None:
    launcher = tmp_path / "python"
    without = "import runpy, sys; sys.modules.update(torch=None, triton=None); sys.argv = sys.argv[1:]; "
    run = f"{without}sys.path.insert(0, {str(SAMPLES)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{run}" "$@"\n')
    launcher.chmod(0o755)
    with worker.Ours(str(launcher), tmp_path / "no-bundle") as ours:
        with pytest.raises(RuntimeError, match=r"mamba-deploy, asked to open: BundleError: .*no-bundle"):
            ours.ask("open")
        with pytest.raises(RuntimeError, match="asked to replays: AttributeError"):
            ours.ask("replays", steps=1)
    assert ours.process.returncode == 0


def test_a_worker_that_has_ended_is_an_error(worker: Any, tmp_path: Path) -> None:
    with worker.Ours("false", tmp_path) as ours:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the process has ended with 1"):
                ours.ask("open")


# --- turns, rows and what is left out -----------------------------------------------------------------------------


def test_contenders_take_turns_and_the_first_turn_does_not_count(sample: Any) -> None:
    calls: list[str] = []

    def contender(name: str, values: list[float]) -> Callable[[], float]:
        left = iter(values)
        return lambda: (calls.append(name), next(left))[1]  # type: ignore[func-returns-value]

    runs = {"mamba-deploy": contender("ours", [99, 1, 5, 3]), "peer": contender("peer", [0, 7, 9, 8])}
    assert sample.take_turns(runs, 3) == ({"mamba-deploy": 3, "peer": 8}, [])
    assert calls == ["ours", "peer"] * 4


def test_a_peer_that_fails_does_not_stop_the_others(sample: Any) -> None:
    left = iter([1.0, 2.0])
    runs = {"mamba-deploy": lambda: 1.0, "broken": lambda: next(left), "peer": lambda: 4.0}
    times, notes = sample.take_turns(runs, 3)
    assert times == {"mamba-deploy": 1.0, "peer": 4.0}
    assert notes == ["broken left out: StopIteration: "]
    with pytest.raises(ZeroDivisionError):
        sample.take_turns({"mamba-deploy": lambda: 1 / 0}, 3)


def test_a_slow_contender_has_fewer_turns(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []

    def slow() -> float:
        now[0] += 4.0
        calls.append("slow")
        return 4e6

    monkeypatch.setattr(sample.time, "perf_counter", lambda: now[0])
    times, _ = sample.take_turns({"mamba-deploy": lambda: 1.0, "slow": slow}, 7)
    assert times["slow"] == 4e6
    assert len(calls) == 4  # one that does not count, and three


def test_a_peer_with_other_logits_is_left_out(sample: Any) -> None:
    logits = [[1.0, -4.0], [2.0, 3.0]]

    def answers(values: Any) -> Callable[[], Any]:
        return lambda: sample.Contender(lambda tokens: torch.tensor(values) + tokens, lambda: None, 1)

    def fails() -> Any:
        raise ValueError("no such kernel\nand more")

    builders = {
        "same": answers([[1.1, -4.1], [2.0, 3.0]]),
        "other": answers([[1.0, -4.0], [2.0, 3.3]]),
        "lost": answers([[1.0, float("nan")], [2.0, 3.0]]),
        "broken": fails,
        "no model": lambda: sample.Contender(None, lambda: None, 1),
    }
    found, notes = sample.admit(builders, [torch.tensor(5.0), torch.tensor(0.0)], logits)
    assert list(found) == ["same", "no model"]
    assert notes == [
        "other left out: ValueError: its logits are off by 7.5%",
        "lost left out: ValueError: its logits are off by nan%",
        "broken left out: ValueError: no such kernel",
    ]


def test_a_row_is_held_to_bytes_and_a_prompt_to_its_products_too(sample: Any) -> None:
    limits = Limits(weight_bytes=3_000_000, state_bytes=900_000, logits_bytes=100_000, flops=12_000_000_000)
    machine = SimpleNamespace(bandwidth=4e12, product=6e14, l2_bytes=1_700_000)
    times = {"mamba-deploy": 5.0, "peer": 10.0}
    row = sample.make_row("decode/m/b1", times, ["57 kernels a step"], limits, machine)
    assert row == {
        "name": "decode/m/b1", "value": 5.0, "unit": "us", "limit": pytest.approx(1.0), "peers": {"peer": 10.0},
        "note": "20% of the limit; 57 kernels a step",
    }  # fmt: skip
    assert sample.make_row("prompt/m/b1/l2048", times, [], limits, machine)["limit"] == pytest.approx(20.0)
    machine.l2_bytes *= 2
    assert "may come from the L2 cache" in sample.make_row("decode/m/b1", times, [], limits, machine)["note"]
    assert sample.table(row).splitlines() == [
        "decode/m/b1",
        "  mamba-deploy                                                     5.0 us    1.00x",
        "  limit                                                            1.0 us    0.20x",
        "  peer                                                            10.0 us    2.00x",
        "  20% of the limit; 57 kernels a step",
    ]


def test_rows_of_other_names_stay_in_the_file(sample: Any, tmp_path: Path) -> None:
    path, row = tmp_path / "decode.json", {"name": "a", "value": 1.0}
    sample.write(path, [row, {"name": "b", "value": 2.0}], "one machine", {})
    sample.write(path, [{"name": "a", "value": 3.0}], "another", {"tensorrt": "8.6"})
    found = json.loads(path.read_text())
    assert [(row["name"], row["value"]) for row in found["rows"]] == [("b", 2.0), ("a", 3.0)]
    assert found["machine"] == "another"
    assert found["versions"]["tensorrt"] == "8.6"


@pytest.mark.parametrize(
    ("lacking", "folder", "wanted"),
    [
        ((), Path("there"), {}),
        ((), None, {"STEP": "needs --mamba-ssm", "PROMPT": "needs --mamba-ssm"}),
        (
            ("triton", "einops"),
            Path("there"),
            {"STEP": "needs einops and triton", "PROMPT": "needs einops and triton", "COMPILED": "needs triton"},
        ),
        (("transformers",), Path("there"), {"TRANSFORMERS": "needs transformers"}),
    ],
)
def test_what_is_missing_is_named(
    peers: Any, monkeypatch: pytest.MonkeyPatch, lacking: tuple[str, ...], folder: Path | None, wanted: dict[str, str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in lacking else object())
    assert peers.missing(folder) == {getattr(peers, name): reason for name, reason in wanted.items()}


def test_a_run_measures_every_row_prints_what_is_left_out_and_goes_on(
    sample: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of it but the GPU: the model, its peers' times and the worker are stand-ins."""
    asked: list[tuple[str, dict[str, Any]]] = []

    class Worker:
        def __init__(self, python: str, bundle: Path) -> None:
            self.is_bad = "2.8b" in bundle.name

        def ask(self, do: str, **arguments: Any) -> Any:
            asked.append((do, arguments))
            if self.is_bad:
                raise RuntimeError("no engine")
            batch = len(arguments.get("ids", []))
            return {
                "build": {}, "open": {"tensorrt": "8.6.0"}, "prepare": {"kernels": 123}, "replays": {"us": 200.0},
                "generate": {"us": 220.0, "p95": 230.0}, "prompt": {"us": 3000.0},
                "logits": {"fed": [[1] * batch] * arguments.get("greedy", 0), "logits": [[1.0, 2.0]] * batch},
            }[do]  # fmt: skip

        def __enter__(self) -> Worker:
            return self

        def __exit__(self, *exception: Any) -> None:
            pass

    class Model(sample.Model):  # type: ignore[misc, name-defined]
        def __init__(self, name: str, paths: Any, ours: Any, peers: Any, machine: Any, options: Any) -> None:
            self.name, self.ours, self.machine, self.options = name, ours, machine, options
            self.kernels, self.left_out = peers
            self.config, self.reference, self.theirs = config_of(sample, name), None, None
            contract = Contract.of(self.config, dtype="float16")
            self.limits = lambda **sizes: Limits.of(self.config, contract, **sizes)

    def contender(*arguments: Any) -> Any:
        return sample.Contender(lambda tokens: torch.tensor([[1.0, 2.0]] * len(tokens)), lambda: None, 1)

    machine = SimpleNamespace(bandwidth=4.3e12, product=7.9e14, l2_bytes=60 << 20, node=0.5, text="a machine")
    stand_ins = {
        "Ours": Worker, "Model": Model, "make": lambda name, folder: (folder, folder / name), "eager": contender,
        "calibrate": lambda: machine, "projections": lambda *arguments: contender()._replace(feed=None),
        "gpu_us": lambda peer: 800.0, "prompt_us": lambda peer: 2000.0,
        "missing": lambda folder: {sample.STEP: "needs triton", sample.COMPILED: "needs triton"},
    }  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(sample, name, value)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    command = ["--engines", "python", "--bundles", str(tmp_path), "--models", "mamba-2.8b,mamba-130m", "--batch", "1,8"]
    command += ["--context", "32768", "--write", str(tmp_path / "decode.json")]
    try:
        done = CliRunner().invoke(sample.main, command)
    finally:
        torch.set_grad_enabled(True)
    assert done.exit_code == 1
    assert "mamba-2.8b is not measured further: RuntimeError: no engine" in done.stderr
    assert "left out: mamba_ssm step, CUDA graph: needs triton" in done.stdout
    found = json.loads((tmp_path / "decode.json").read_text())
    assert found["machine"] == "a machine, node 0.50 us"
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [
        "decode/mamba-130m/b1", "decode/mamba-130m/b8", "prompt/mamba-130m/b1/l2048",
        "decode/mamba-130m/b1/context_32768",
    ]  # fmt: skip
    decode, _, prompt, context = rows.values()
    assert (decode["value"], decode["unit"], decode["peers"]) == (200.0, "us", {"transformers": 800.0})
    assert decode["limit"] == pytest.approx(61, abs=0.5)  # of the table of limits
    assert decode["note"] == (
        "31% of the limit; 123 kernels a step; generate, host included: 220.0 us a step, p95 230.0"
    )
    assert prompt["peers"] == {"projections alone": 2000.0, "transformers": 2000.0}
    assert "1.50x the projections alone" in prompt["note"]
    assert context["peers"] == {"mamba-deploy after 1 token": 200.0}
    assert "1.000x the step after one token" in context["note"]
    assert ("build", {"max_batch": 8}) in asked
    assert {"batch": 1, "length": 32768} in [arguments for do, arguments in asked if do == "prepare"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing option '--engines'"),
        (["--engines", "python", "--bundles", ".", "--models", "mamba-1b"], "there is no model mamba-1b"),
    ],
)
def test_what_is_asked_for_in_vain_is_an_error(sample: Any, arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(sample.main, arguments)
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.mark.parametrize(("script", "says"), [("peers", "--context"), ("worker", "BUNDLE"), ("kernels", "--turns")])
def test_help_needs_neither_a_gpu_nor_triton(script: str, says: str) -> None:
    without = (
        "import runpy, sys; sys.modules['triton'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, 'samples'); "
    )
    run = f"{without}runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", run, f"samples/bench_{script}.py", "--help"]
    done = subprocess.run(command, cwd=SAMPLES.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
