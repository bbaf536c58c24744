"""PyTorch's own answers: as a backend of a session, and as the file other machines verify against."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mamba_deploy.bundle import PORTABLE, WEIGHTS, Bundle
from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract
from mamba_deploy.model import MambaModel, ModelState
from mamba_deploy.runtime.state import State
from mamba_deploy.runtime.verify import GREEDY_TOKENS, Answers, relative_error, verification_prompts

__all__ = ["TorchBackend", "bundle_weights", "reference_answers"]


class TorchBackend:
    """The reference model behind the interface of :class:`mamba_deploy.runtime.backend.Backend`."""

    def __init__(self, model: MambaModel, contract: Contract, *, threads: int | None = None) -> None:
        """Wrap a model whose activation dtype is the contract's."""
        self._model = model
        self._contract = contract
        if threads is not None:
            torch.set_num_threads(threads)
        self.name = f"torch {torch.__version__} (cpu)"

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, threads: int | None = None) -> TorchBackend:
        """The reference over the weights that were exported."""
        weights = bundle_weights(bundle)
        dtype = getattr(torch, bundle.contract.dtype)
        return cls(MambaModel.from_weights(bundle.config, weights, dtype), bundle.contract, threads=threads)

    @property
    def contract(self) -> Contract:
        """As given."""
        return self._contract

    def new_state(self, batch: int) -> State:
        """See the protocol."""
        return State(self._contract, batch)

    def run(self, input_ids: NDArray[np.int32], seq_lens: NDArray[np.int32], state: State) -> NDArray[np.float32]:
        """See the protocol."""
        tensors = [_tensor(state.current[spec.name], spec.dtype) for spec in self._contract.states]
        with torch.inference_mode():
            logits, after = self._model(
                torch.from_numpy(input_ids),
                ModelState(tensors[0::2], tensors[1::2]),
                torch.from_numpy(seq_lens),
                self._contract.all_logits,
            )
            new = [tensor for pair in zip(after.conv, after.ssm, strict=True) for tensor in pair]
            for spec, tensor in zip(self._contract.states, new, strict=True):
                _tensor(state.spare[spec.name], spec.dtype).copy_(tensor)
        state.swap()
        return logits.numpy()

    def close(self) -> None:
        """Let the model go."""
        del self._model


def _tensor(array: NDArray, dtype: str) -> Tensor:
    """A tensor over the memory of an array; bfloat16 travels as uint16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def bundle_weights(bundle: Bundle) -> dict[str, Tensor]:
    """The weights in a bundle's ONNX file, by the names of ``MambaModel.state_dict()``; not copied."""
    bundle.file(WEIGHTS)
    graph = onnx_ir.load(bundle.file(PORTABLE)).graph
    with torch.device("meta"):
        wanted = MambaModel(bundle.config).state_dict()
    found: dict[str, Tensor] = {}
    for name, value in graph.initializers.items():
        stem = name.removesuffix("_t")
        if stem not in wanted or value.const_value is None:
            continue
        array = value.const_value.numpy()
        narrow = value.dtype == onnx_ir.DataType.BFLOAT16
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # and nobody writes to it
            tensor = torch.from_numpy(array.view(np.uint16) if narrow else array)
        tensor = tensor.view(torch.bfloat16) if narrow else tensor
        found[stem] = tensor if stem == name else tensor.t()
    return found


def reference_answers(
    config: MambaConfig,
    weights: Mapping[str, Tensor],
    prompts: list[list[int]] | None = None,
    contract: Contract | None = None,
) -> Answers:
    """What PyTorch answers to the verification prompts, computed in float32 with exactly these weights.

    Args:
        config: The architecture.
        weights: As stored, rounded to the exported dtype.
        prompts: Token ids; None for :func:`verification_prompts`.
        contract: Where its dtypes are not all float32, how far PyTorch is off with them is found too.
    """
    model = MambaModel.from_weights(config, weights, torch.float32)
    prompts = prompts or verification_prompts(config.vocab_size)
    arrays: dict[str, NDArray] = {}
    with torch.inference_mode():
        for i, prompt in enumerate(prompts):
            with _kept(model.layers if i == 0 else []) as hidden:
                logits, state = model(torch.tensor([prompt]), all_logits=True)
            arrays[f"prompt.{i}"] = np.array(prompt, np.int32)
            arrays[f"logits.{i}"] = logits[0].numpy()
            if i == 0:
                arrays |= {f"hidden.{layer}": h[0].numpy() for layer, h in enumerate(hidden)}
                for layer, (conv, ssm) in enumerate(zip(state.conv, state.ssm, strict=True)):
                    arrays[f"conv_state.{layer}"], arrays[f"ssm_state.{layer}"] = conv[0].numpy(), ssm[0].numpy()
            last, tokens, gaps = logits[:, -1], [], []
            for _ in range(GREEDY_TOKENS):
                best = last[0].topk(min(2, config.vocab_size)).values
                token = last.argmax(-1)
                tokens.append(int(token))
                gaps.append(float(best[0] - best[-1]) / float(last.abs().max()))
                last, state = model.step(token, state)
            arrays[f"greedy.{i}"] = np.array(tokens, np.int32)
            arrays[f"greedy_gap.{i}"] = np.array(gaps, np.float32)
    if contract is not None and {contract.dtype, contract.state_dtype} != {"float32"}:
        arrays |= _rounding(MambaModel.from_weights(config, weights, getattr(torch, contract.dtype)), contract, arrays)
    return Answers(arrays)


def _rounding(model: MambaModel, contract: Contract, answers: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """``rounding.KIND``: how far a model with the contract's dtypes is from the answers, each prompt read at once."""
    found: dict[str, list[float]] = {"logits": [], "conv_state": [], "ssm_state": [], "hidden": []}
    with torch.inference_mode(), _WideProducts():
        for i in range(Answers(answers).count):
            empty = model.new_state(1, getattr(torch, contract.state_dtype))
            with _kept(model.layers if i == 0 else []) as hidden:
                logits, state = model(torch.tensor(answers[f"prompt.{i}"])[None], empty, all_logits=True)
            wanted = answers[f"logits.{i}"]
            found["logits"].append(max(map(relative_error, logits[0].numpy(), wanted)))
            if i == 0:
                for kind, tensors in (("hidden", hidden), ("conv_state", state.conv), ("ssm_state", state.ssm)):
                    for layer, tensor in enumerate(tensors):
                        error = relative_error(tensor[0].float().numpy(), answers[f"{kind}.{layer}"])
                        found[kind].append(error)
    return {f"rounding.{kind}": np.array(errors, np.float32) for kind, errors in found.items()}


class _WideProducts(TorchFunctionMode):
    """Matrix products of half precision are summed in float32: as GPUs do it, and faster on a CPU that has none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        wide = [None if a is None else a.float() for a in (*args, *(kwargs or {}).values())]
        return F.linear(*wide).to(args[0].dtype)


@contextlib.contextmanager
def _kept(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """What these layers give to the next, [B, L, d_model] each, as they run."""
    hidden: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda layer, given, found: hidden.append(found[0])) for layer in layers]
    try:
        yield hidden
    finally:
        for hook in hooks:
            hook.remove()


def write_answers(answers: Answers, path: Path) -> None:
    """As ``reference.safetensors``."""
    # Not save_file: it makes the file unreadable for other users, and says "no space left" with an error of its own.
    about = {"about": json.dumps({"made by": f"torch {torch.__version__}"})}
    path.write_bytes(safetensors.numpy.save(dict(answers.arrays), metadata=about))
