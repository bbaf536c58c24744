"""Shared by tests: bundles exported once a run, and ONNX Runtime on torch tensors."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from locks import locked

if TYPE_CHECKING:
    from torch import Tensor

SAMPLES = Path(__file__).parent.parent / "samples"

# The models here are tiny: on a busy machine PyTorch's threads wait for one another 50 times longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """No workers beside a GPU, whose memory some tests look at; one for each core elsewhere.

    All cores wait for the answer: PyTorch is not imported for it.
    """
    from mamba_deploy.plugins.toolchain import gpu_architectures

    return 0 if gpu_architectures() else None


# A worker takes file after file: they end together where the longest do not come last.
LONGEST = (
    *("test_launches", "test_engine_build", "test_onnx_export", "test_verify", "test_samples", "test_cli"),
    *("test_session", "test_bundled_checkpoints", "test_plugin_build", "test_rtx"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest go first, the others stay in their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _operators_are_listed_once() -> None:
    """PyTorch's exporter lists its operators, and reads the signatures of what they become, anew for every export:
    that is two fifths of the time of ours.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from torch._export import utils
        from torch.onnx._internal._lazy_import import onnxscript_apis
        from torch.onnx._internal.exporter import _schemas

        onnxscript_apis.get_torchlib_ops = functools.cache(onnxscript_apis.get_torchlib_ops)
        utils._materialize_cpp_cia_ops = functools.cache(utils._materialize_cpp_cia_ops)
        _schemas.op_signature_from_function = functools.cache(_schemas.op_signature_from_function)


def _kinds() -> dict[str, Callable[[Path], tuple[Path, Any]]]:
    """Checkpoints by name: what writes one, and gives its directory and the transformers model that it holds."""
    import checkpoints as c

    def native(**options: Any) -> Callable[[Path], tuple[Path, None]]:  # what transformers has not
        return lambda path: (c.native_mamba2(path, n_layer=1, **options)[0], None)

    def untrained(path: Path) -> tuple[Path, Any]:  # its norms and skips are all 1
        directory, model = c.hugging_face(path, "mamba2")
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                parameter.data.fill_(1)
        model.save_pretrained(directory)
        return directory, model

    one = {"num_hidden_layers": 1}
    return {
        "mamba": lambda p: c.state_spaces(p, "mamba"),  # two layers, tied, a padded vocabulary
        "mamba2": lambda p: c.hugging_face(p, "mamba2"),  # two layers, tied
        "mamba-one-layer": lambda p: c.hugging_face(p, "mamba", **one),
        "mamba2-one-layer": lambda p: c.hugging_face(p, "mamba2", n_groups=2, **one),
        "mamba-untied-no-conv-bias": lambda p: c.hugging_face(
            p, "mamba", use_conv_bias=False, tie_word_embeddings=False, **one
        ),
        "mamba-projection-bias": lambda p: c.hugging_face(p, "mamba", use_bias=True, conv_kernel=2, **one),
        "falcon": lambda p: c.hugging_face(p, "falcon_mamba", mixer_rms_eps=0.1, **one),
        "mamba2-untied": lambda p: c.hugging_face(p, "mamba2", tie_word_embeddings=False, conv_kernel=3, **one),
        "mamba2-no-conv-bias": lambda p: c.hugging_face(p, "mamba2", use_conv_bias=False, **one),
        "mamba2-projection-bias": lambda p: c.hugging_face(p, "mamba2", use_bias=True, **one),
        "mamba2-dt-limits": lambda p: c.hugging_face(p, "mamba2", time_step_limit=(0.1, 0.4), **one),
        "codestral-groups-8": lambda p: c.codestral(p, n_groups=8, hidden_size=256, **one),
        "mamba2-untrained": untrained,
        "mamba2-mlp-part": native(d_ssm=16),
        "mamba2-skip-per-channel": native(D_has_hdim=True),
        "mamba2-norm-before-gate": native(norm_before_gate=True, ngroups=2),
        "mamba2-no-gated-norm": native(rmsnorm=False),
        "tiny-mamba": lambda p: (SAMPLES / "tiny-mamba", None),  # the bundled ones
        "tiny-mamba2": lambda p: (SAMPLES / "tiny-mamba2", None),
    }


@dataclass(frozen=True)
class Exported:
    """A bundle, and what it was made from."""

    bundle: Any  # mamba_deploy.bundle.Bundle
    checkpoint: Path
    theirs: Any  # the transformers model of the same weights; None where transformers has no such model

    @property
    def path(self) -> Path:
        return self.bundle.path

    @property
    def tolerance(self) -> float:
        """How far float32 arithmetic may be off, relative to the largest value of a tensor.

        5 sqrt(n) u for n roundings one after the other (Higham and Mary 2019), u = 2^-24. A layer: norms and
        projections, each a sum as long as its input; the taps of the convolution; N products with C; two a token for
        the 64 tokens a state remembers; and about 60 for softplus, silu, skip and gate. Then the last norm and the
        head.
        """
        c = self.bundle.config
        layer = 2 * c.d_model + 2 * (c.d_inner + c.d_mlp) + c.dt_rank + c.d_conv + c.d_state + 2 * 64 + 60
        return 5 * math.sqrt(c.n_layer * layer + 2 * c.d_model) * 2.0**-24

    @cached_property
    def reference(self) -> Any:
        """Our PyTorch model in float32 over the checkpoint's weights, rounded to the dtype of the export.

        Through the checkpoint, not through the bundle: a weight that was exported wrong shows.
        """
        import torch

        from mamba_deploy.checkpoint import load_checkpoint
        from mamba_deploy.model import MambaModel, cast_weight

        config, weights = load_checkpoint(self.checkpoint)
        stored = getattr(torch, self.bundle.contract.dtype)
        rounded = {name: cast_weight(name, tensor, stored) for name, tensor in weights.items()}
        return MambaModel.from_weights(config, rounded, torch.float32)

    def feeds(self, batch: int, seq: int, seq_lens: list[int] | None = None) -> dict[str, Tensor]:
        """Random inputs of the graph, the state among them; every row is full unless told otherwise."""
        import torch

        generator = torch.Generator().manual_seed(1000 * batch + seq)
        contract, vocabulary = self.bundle.contract, self.bundle.config.vocab_size
        values = {
            "input_ids": torch.randint(0, vocabulary, (batch, seq), generator=generator, dtype=torch.int32),
            "seq_lens": torch.tensor([seq] * batch if seq_lens is None else seq_lens, dtype=torch.int32),
        }
        for spec in contract.states:
            values[spec.name] = torch.randn(spec.shape(batch), generator=generator).to(getattr(torch, spec.dtype))
        return values

    def answer(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What PyTorch gives for these inputs, in float32, by the names of the graph's outputs."""
        import torch

        from mamba_deploy.model import ModelState

        states = [feeds[spec.name].float() for spec in self.bundle.contract.states]
        with torch.inference_mode():
            logits, after = self.reference(
                feeds["input_ids"],
                ModelState(states[0::2], states[1::2]),
                feeds["seq_lens"],
                self.bundle.contract.all_logits,
            )
        answers = {"logits": logits}
        for i, (conv, ssm) in enumerate(zip(after.conv, after.ssm, strict=True)):
            answers |= {f"conv_state_out.{i}": conv, f"ssm_state_out.{i}": ssm}
        return answers

    def check(self, found: Mapping[str, Tensor], feeds: Mapping[str, Tensor], *, half: bool = False) -> None:
        """Hold a graph's outputs against :meth:`answer`, and against what the contract says of them.

        Args:
            found: Outputs by name.
            feeds: The inputs.
            half: Activations were rounded to the contract's half precision: six times a layer, twice at the head. Then
                the typical error is compared, as the largest is that of the worst conditioned value.
        """
        import torch

        contract, want, lens = self.bundle.contract, self.answer(feeds), feeds["seq_lens"]
        assert list(found) == [spec.name for spec in contract.outputs]
        batch, seq = feeds["input_ids"].shape
        for spec in contract.outputs:
            assert found[spec.name].dtype == getattr(torch, spec.dtype), spec.name
            assert found[spec.name].shape == spec.shape(batch, seq), spec.name
        used = lens > 0
        roundoff = torch.finfo(getattr(torch, contract.dtype)).eps / 2
        allowed = self.tolerance + (roundoff * math.sqrt(6 * self.bundle.config.n_layer + 2) if half else 0.0)

        def compare(name: str, got: Tensor, expected: Tensor) -> None:
            error, scale = (got.double() - expected.double()).abs(), expected.double().abs()
            assert error.isfinite().all(), name
            if half:
                assert error.square().mean().sqrt() <= allowed * scale.square().mean().sqrt(), name
            else:
                stored = torch.finfo(got.dtype)  # one rounding more where the output is narrow
                storage = 0.0 if got.dtype == torch.float32 else stored.eps / 2 * scale + stored.tiny * stored.eps
                assert (error <= allowed * scale.max() + storage).all(), name

        logits = found["logits"]
        last = logits
        if contract.all_logits:
            last = logits[torch.arange(batch), (lens - 1).clamp(min=0)]
            valid = torch.arange(seq) < lens[:, None]
            compare("logits", logits[valid], want["logits"][valid])
        else:
            compare("logits", logits[used], want["logits"][used])
        assert torch.equal(found["next_token"][used].long(), last[used].argmax(-1))
        for spec in contract.states:
            before, after = feeds[spec.name], found[str(spec.partner)]
            bits = torch.int32 if before.dtype == torch.float32 else torch.int16
            assert torch.equal(before[~used].view(bits), after[~used].view(bits)), f"{spec.name} of a row of length 0"
            compare(str(spec.partner), after[used], want[str(spec.partner)][used])


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """``bundle(kind, **options)``: a bundle exported with these options, made when first asked for. Not to be changed.

    Kinds are those of ``_kinds``; options are those of ``mamba_deploy.exporters.export.export``. An export takes
    seconds, so that workers of pytest-xdist share the bundles.
    """
    from mamba_deploy.bundle import Bundle
    from mamba_deploy.exporters.export import export

    kinds = _kinds()
    defaults = {name: parameter.default for name, parameter in inspect.signature(export).parameters.items()}
    checkpoints: dict[str, tuple[Path, Any]] = {}
    made: dict[tuple[Any, ...], Exported] = {}
    own = tmp_path_factory.getbasetemp()
    bundles = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "bundles"
    bundles.mkdir(exist_ok=True)

    def make(kind: str, **options: Any) -> Exported:
        key = (kind, *sorted(option for option in options.items() if option not in defaults.items()))
        if kind not in checkpoints:
            checkpoints[kind] = kinds[kind](tmp_path_factory.mktemp(kind))
        if key not in made:
            out = bundles / "-".join([kind, *(f"{name}={value}" for name, value in key[1:])])
            with locked(out):
                opened = Bundle.open(out) if out.exists() else export(checkpoints[kind][0], out, **options)
            made[key] = Exported(opened, *checkpoints[kind])
        return made[key]

    return make


@pytest.fixture(scope="session")
def run_onnx() -> Callable[..., dict[str, Any]]:
    """``run_onnx(model, feeds)``: outputs by name of a file, or of a ``ModelProto``, in stock ONNX Runtime.

    Feeds and outputs are torch tensors, because NumPy has no bfloat16. Sessions of files are kept.
    """
    import onnxruntime
    import torch

    sessions: dict[Path, Any] = {}

    def session(model: Any) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        content = str(model) if isinstance(model, Path) else model.SerializeToString()
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def value(tensor: Tensor) -> Any:
        tensor = tensor.detach().contiguous()
        if tensor.dtype != torch.bfloat16:
            return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
        bits = tensor.view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)  # TensorProto.BFLOAT16

    def run(model: Any, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(model, Path):
            opened = session(model)
        else:
            opened = sessions[model] if model in sessions else sessions.setdefault(model, session(model))
        names = [output.name for output in opened.get_outputs()]
        found = opened.run_with_ort_values(names, {name: value(tensor) for name, tensor in feeds.items()})
        # cloned: the memory is ONNX Runtime's
        return {n: torch.from_dlpack(v._ortvalue.to_dlpack()).clone() for n, v in zip(names, found, strict=True)}

    return run
