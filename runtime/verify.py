"""Compare a session with what PyTorch answered; nothing here needs PyTorch.

The answers are those of the reference in float32, over exactly the weights that were exported, for a few prompts:
logits at every position, the state after the first prompt, and a greedy continuation. A backend is run in each way it
can be used (one call, token by token, rows together, in chunks), so each way is held to the same answers.

Tolerances are relative to the largest value of the tensor compared (a position's logits, a layer's state). With unit
roundoff u (2^-24 for float32, 2^-11 for float16, 2^-8 for bfloat16) and n layers:

- float32 arithmetic: a sum of K products is off by about sqrt(K) u, and the errors of the p matrix products a layer
  (two, in Mamba-1 four) add up as a random walk: 4 u sqrt(K) sqrt(p n), K the wider of d_model and d_inner, four
  standard deviations; at most 1e-4.
- activations in T: ten values a layer (norm, x, z, convolution, low-rank dt, B, C, dt, scan, output) and two in the
  head are rounded, each evenly within u_T: four standard deviations of their sum are 4 u_T sqrt((10 n + 2) / 3).
- state in S: rounded once a token, and forgotten after some 64: u_S sqrt(64).

In half precision a model may also make the errors of its layers larger from layer to layer. So the answers hold how far
PyTorch itself is off with the dtypes of the graph, products summed in float32: eight times that is allowed where it is
more. Two computations that round in different places may be twice as far from each other as each is from the exact one;
and TensorRT 8 sums products of a prompt in half precision where that is faster: random models of up to 790M parameters
were then off by up to 5.3 times what PyTorch is, token by token by 3.5 times (H200, TensorRT 8.6.0, float16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract, to_float32
from mamba_deploy.errors import VerifyError
from mamba_deploy.runtime.picture import picture
from mamba_deploy.runtime.session import Session

__all__ = [
    "GREEDY_TOKENS",
    "Answers",
    "Check",
    "Report",
    "plot",
    "relative_error",
    "tolerance",
    "verification_prompts",
    "verify",
    "verify_layers",
]

GREEDY_TOKENS = 32
PROMPT_TOKENS = (48, 19, 6)
TEXTS = (
    "def read_config(path):\n    with open(path, encoding='utf-8') as file:\n        return json.load(file)\n\n\nclass",
    "The selective state space model keeps a state of fixed size, however long the text.",
    "Gr\u00fc\u00dfe, \u4e16\u754c!",
)
_CHUNK = 5
_ROWS = 8  # prompts verified side by side
_OWN_ROUNDING = 8
_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Answers:
    """What PyTorch answered, by name, as ``reference.safetensors`` holds it.

    ``prompt.{i}`` int32 [L]; ``logits.{i}`` float32 [L, V]; ``greedy.{i}`` int32 [N] and ``greedy_gap.{i}`` float32
    [N], the lead of each greedy token over the second best, relative to the largest logit; ``conv_state.{layer}``
    and ``ssm_state.{layer}`` float32 after prompt 0; ``hidden.{layer}`` float32 [L, d_model], the residual stream after
    a layer at each position of prompt 0, which older files lack. Where dtypes are not all float32,
    ``rounding.logits`` (by prompt) and ``rounding.{conv_state,ssm_state,hidden}`` (by layer) float32: the largest
    relative error of PyTorch with those dtypes; older files lack them.
    """

    arrays: Mapping[str, NDArray]

    @property
    def count(self) -> int:
        """Prompts."""
        return sum(name.startswith("prompt.") for name in self.arrays)

    def prompt(self, i: int) -> list[int]:
        """Token ids of prompt i."""
        return [int(t) for t in self.arrays[f"prompt.{i}"]]

    def allowed(self, kind: str, bound: float, *, layer: int | None = None) -> float:
        """The error that is allowed: ``bound``, or more where PyTorch with the graph's dtypes is itself off by more.

        Args:
            kind: ``logits``, ``conv_state``, ``ssm_state`` or ``hidden``.
            bound: From :func:`tolerance`.
            layer: Of this one and those before; None for all.
        """
        own = self.arrays.get(f"rounding.{kind}", np.zeros(1, np.float32))
        return max(bound, _OWN_ROUNDING * float(own[: None if layer is None else layer + 1].max()))

    def hidden(self, config: MambaConfig) -> list[NDArray[np.float32]]:
        """The residual stream after each layer, float32 [L, d_model] of prompt 0.

        Raises:
            VerifyError: It was not kept, or is of a model of another shape.
        """
        if "hidden.0" not in self.arrays:
            raise VerifyError("the reference holds no values after each layer", hint="export the model again")
        names = [f"hidden.{i}" for i in range(config.n_layer)]
        _check_shapes(self, dict.fromkeys(names, (len(self.prompt(0)), config.d_model)))
        return [self.arrays[name] for name in names]

    @classmethod
    def load(cls, path: Path) -> Answers:
        """Read ``reference.safetensors``.

        Raises:
            VerifyError: The file cannot be read or holds no answers.
        """
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            raise VerifyError(f"{path} cannot be read: {error}", hint="export the model again") from error
        if "prompt.0" not in arrays:
            raise VerifyError(f"{path} holds no reference answers", hint="export the model again")
        return cls(arrays)


def verification_prompts(vocab_size: int, encode: Any = None) -> list[list[int]]:
    """Token ids of the prompts that are verified: real text through ``encode``, else fixed random ids."""
    if encode is not None:
        rows = [encode(text)[:n] for text, n in zip(TEXTS, PROMPT_TOKENS, strict=True)]
        if all(rows) and all(0 <= t < vocab_size for row in rows for t in row):
            return rows
    rng = np.random.default_rng(0)
    return [[int(t) for t in rng.integers(0, vocab_size, n)] for n in PROMPT_TOKENS]


def tolerance(config: MambaConfig, contract: Contract, *, layers: int | None = None) -> float:
    """The largest relative error that rounding explains: see the head of this module.

    Args:
        config: The architecture.
        contract: Its dtypes.
        layers: After so many of them; None for all.
    """
    n_layer = config.n_layer if layers is None else layers
    width = max(config.d_model, config.d_inner)
    products = 4 if config.generation == "mamba" else 2
    bound = min(4 * _ROUNDOFF["float32"] * math.sqrt(width * products * n_layer), 1e-4)
    if contract.dtype != "float32":
        bound += 4 * _ROUNDOFF[contract.dtype] * math.sqrt((10 * n_layer + 2) / 3)
    if contract.state_dtype != "float32":
        bound += _ROUNDOFF[contract.state_dtype] * math.sqrt(64)
    return bound


@dataclass(frozen=True)
class Check:
    """One comparison: the worst relative error found, and where."""

    name: str
    error: float
    tolerance: float
    where: str  # of the first error above the tolerance, else of the worst
    passed: bool
    series: list[float] = field(default_factory=list)  # the error by position, or by layer


@dataclass(frozen=True)
class Report:
    """All comparisons of one backend."""

    backend: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it: an error that is not finite is null."""
        checks = [
            asdict(c) | {"error": _finite(c.error), "series": [_finite(error) for error in c.series]}
            for c in self.checks
        ]
        return {"backend": self.backend, "passed": self.passed, "checks": checks}

    def table(self) -> str:
        """For people."""
        width = max(len(check.name) for check in self.checks)
        lines = [f"{self.backend}", f"  {'check':<{width}}  {'error':>8}  {'allowed':>8}        where"]
        for c in self.checks:
            verdict = "ok" if c.passed else "DIFFERS"
            lines.append(f"  {c.name:<{width}}  {c.error:8.1e}  {c.tolerance:8.1e}  {verdict:<7} {c.where}")
        return "\n".join(lines)


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def verify(session: Session, answers: Answers) -> Report:
    """Hold a session to the reference. Its state is lost.

    Args:
        session: Of the model the answers are about.
        answers: From :meth:`Answers.load`, or made by PyTorch now.

    Raises:
        VerifyError: The answers are about a model of another shape.
    """
    _check_fits(answers, session)
    kinds = ("logits", "conv_state", "ssm_state")
    bounds = {kind: answers.allowed(kind, tolerance(session.config, session.contract)) for kind in kinds}
    bound = bounds["logits"]
    prompts = [answers.prompt(i) for i in range(answers.count)]
    whole, states = _read_prefixes(session, prompts), _state_after(session, prompts[0], None)
    stepped, stepped_states = _read_stepwise(session, prompts), _state_after(session, prompts[0], 1)
    reference = [answers.arrays[f"logits.{i}"] for i in range(len(prompts))]
    known = {name: answers.arrays[name] for name in states}
    checks = [
        _compare_logits("logits, prompt in one call", whole, reference, bound),
        _compare_logits("logits, token by token", stepped, reference, bound),
    ]
    for way, found in (("prompt in one call", states), ("token by token", stepped_states)):
        for kind in kinds[1:]:
            checks.append(_compare_states(f"{kind}, {way}", kind, found, known, bounds[kind]))
    checks.append(_compare_greedy(session, prompts, answers, bound))
    going_on = [int(answers.arrays[f"greedy.{i}"][0]) for i in range(len(prompts))]
    alone = [_read_rows(session, [prompt], [token])[0] for prompt, token in zip(prompts, going_on, strict=True)]
    together, last = _read_rows(session, prompts, going_on), [len(prompt) - 1 for prompt in prompts]
    checks.append(_compare_logits("rows together against alone", together, alone, bound, last))
    chunked = _state_after(session, prompts[0], _CHUNK)
    for kind in kinds[1:]:
        name = f"{kind}, chunks of {_CHUNK} against whole"
        checks.append(_compare_states(name, kind, chunked, states, bounds[kind]))
    session.reset()
    return Report(session.backend.name, checks)


def verify_layers(
    backend: str, found: Mapping[str, NDArray[np.float32]], answers: Answers, config: MambaConfig, contract: Contract
) -> Report:
    """Hold the residual stream after each layer to the reference: a check a layer, so that the first to drift shows.

    The error is relative to the layer's largest value, and allowed as for a model that ends there.

    Args:
        backend: What made the values, for the report.
        found: ``hidden.{layer}`` [L, d_model] of prompt 0, of every layer.
        answers: As for :func:`verify`.
        config: The architecture.
        contract: Its dtypes.

    Raises:
        VerifyError: The answers hold no such values, or are about a model of another shape.
    """
    checks = []
    for i, expected in enumerate(answers.hidden(config)):
        bound, name = answers.allowed("hidden", tolerance(config, contract, layers=i + 1), layer=i), f"hidden.{i}"
        with np.errstate(invalid="ignore"):
            difference = np.abs(found[name].astype(np.float64) - expected)
        position, channel = (int(k) for k in np.unravel_index(np.argmax(difference), difference.shape))
        error = relative_error(found[name], expected)
        where = f"{name}, position {position}, channel {channel}"
        scale = max(float(np.max(np.abs(expected))), 1e-30)
        series = [float(row.max()) / scale for row in difference]
        checks.append(Check(f"layer {i}", error, bound, where, error <= bound, series))
    return Report(f"{backend}, layer by layer", checks)


def _check_fits(answers: Answers, session: Session) -> None:
    wanted: dict[str, tuple[int, ...]] = {spec.name: spec.shape(1)[1:] for spec in session.contract.states}
    for i in range(answers.count):
        wanted[f"prompt.{i}"] = (answers.arrays.get(f"prompt.{i}", np.empty(0)).size,)
        wanted[f"logits.{i}"] = (*wanted[f"prompt.{i}"], session.config.vocab_size)
        wanted[f"greedy.{i}"] = wanted[f"greedy_gap.{i}"] = (answers.arrays.get(f"greedy.{i}", np.empty(0)).size,)
    layers = (session.config.n_layer,)
    roundings = {"logits": (answers.count,), "conv_state": layers, "ssm_state": layers, "hidden": layers}
    wanted |= {n: shape for k, shape in roundings.items() if (n := f"rounding.{k}") in answers.arrays}
    _check_shapes(answers, wanted)


def _check_shapes(answers: Answers, wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        found = answers.arrays.get(name)
        if found is None or found.shape != shape or found.size == 0:
            has = "no such tensor" if found is None else f"one of shape {list(found.shape)}"
            raise VerifyError(
                f"the model gives '{name}' of shape {list(shape)}, and the reference has {has}",
                hint="the reference is of another model; export it again",
            )


def _read_rows(session: Session, prompts: Sequence[list[int]], tokens: Sequence[int]) -> list[NDArray[np.float32]]:
    """Logits [2, V] of each row: after its prompt, and after one more token, which it reads while the others wait."""
    session.reset()
    after_prompts = session.prefill(prompts)
    after_tokens = [
        session.prefill([[token] if row == other else [] for other in range(len(prompts))])[row]
        for row, token in enumerate(tokens)
    ]
    return [np.stack(pair) for pair in zip(after_prompts, after_tokens, strict=True)]


def _read_prefixes(session: Session, prompts: Sequence[list[int]]) -> list[NDArray[np.float32]]:
    """Logits [L, V] of each prompt, position by position through prompts of every length, several a call."""
    results = []
    for prompt in prompts:
        parts = []
        for start in range(0, len(prompt), _ROWS):
            session.reset()
            ends = range(start + 1, min(start + _ROWS, len(prompt)) + 1)
            parts.append(session.prefill([prompt[:end] for end in ends]))
        results.append(np.concatenate(parts))
    return results


def _read_stepwise(session: Session, prompts: Sequence[list[int]]) -> list[NDArray[np.float32]]:
    results = []
    for prompt in prompts:
        session.reset()
        results.append(np.concatenate([session.step([token]) for token in prompt]))
    return results


def _state_after(session: Session, prompt: list[int], chunk: int | None) -> dict[str, NDArray[np.float32]]:
    """States after a prompt, read at once or in chunks, as float32 without the batch axis."""
    session.reset()
    size = chunk or len(prompt)
    for start in range(0, len(prompt), size):
        session.prefill([prompt[start : start + size]])
    snapshot = session.snapshot()
    return {name: to_float32(array[0], snapshot.dtypes[name]) for name, array in snapshot.arrays.items()}


def relative_error(found: NDArray, expected: NDArray) -> float:
    """max |found - expected| / max |expected|; infinite where something is not finite."""
    with np.errstate(invalid="ignore"):  # infinity less infinity
        difference = float(np.max(np.abs(found.astype(np.float64) - expected)))
    return difference / max(float(np.max(np.abs(expected))), 1e-30) if math.isfinite(difference) else math.inf


def _check(name: str, errors: list[tuple[str, float]], bound: float) -> Check:
    """From the error at each place, in order: the first above the bound is named, else the worst."""
    worst = max(errors, key=lambda item: item[1])
    above = next((item for item in errors if not item[1] <= bound), None)
    where = (above or worst)[0]
    return Check(name, worst[1], bound, where, above is None, [error for _, error in errors])


def _compare_logits(
    name: str, found: list[NDArray], expected: list[NDArray], bound: float, start: Sequence[int] | None = None
) -> Check:
    """Of each prompt logits [L, V], the first of them at position ``start`` of it, or 0."""
    errors = [
        (
            f"logits of prompt {i}, position {t + (start[i] if start else 0)}",
            relative_error(found[i][t], expected[i][t]),
        )
        for i in range(len(found))
        for t in range(len(found[i]))
    ]
    return _check(name, errors, bound)


def _compare_states(
    name: str, kind: str, found: Mapping[str, NDArray], expected: Mapping[str, NDArray], bound: float
) -> Check:
    errors = []
    for tensor in (t for t in found if t.startswith(kind)):
        with np.errstate(invalid="ignore"):
            difference = np.abs(found[tensor].astype(np.float64) - expected[tensor])
        index = [int(i) for i in np.unravel_index(np.argmax(difference), difference.shape)]
        errors.append((f"{tensor} at {index}", relative_error(found[tensor], expected[tensor])))
    return _check(name, errors, bound)


def _compare_greedy(session: Session, prompts: Sequence[list[int]], answers: Answers, bound: float) -> Check:
    """Feed the reference's greedy tokens; each must be this session's choice too, unless it led by less than rounding.

    The error of a step at which another was chosen is its lead over the reference's token here, or the lead of the
    reference's token there, the larger, relative to the largest logit: rounding explains twice the error of a logit.
    """
    errors = []
    for i, prompt in enumerate(prompts):
        tokens = [int(t) for t in answers.arrays[f"greedy.{i}"]]
        gaps = answers.arrays[f"greedy_gap.{i}"]
        session.reset()
        logits = session.prefill([prompt])[0]
        for t, token in enumerate(tokens):
            chosen = int(np.argmax(logits))
            where = f"greedy token {t} of prompt {i}: {chosen}, PyTorch chose {token}"
            if not np.isfinite(logits).all():
                errors.append((f"greedy token {t} of prompt {i}: logits are not finite", math.inf))
            else:
                lead = float(logits[chosen] - logits[token]) / max(float(np.abs(logits).max()), 1e-30)
                errors.append((where, 0.0 if chosen == token else max(lead, float(gaps[t]))))
            logits = session.step([token])[0]
    check = _check(f"greedy tokens, {len(tokens)} a prompt", errors, 2 * bound)
    agreed = sum(error == 0.0 for _, error in errors)
    if check.error == 0.0:
        return Check(check.name, 0.0, check.tolerance, f"all {agreed} are the same", True, check.series)
    return check


def plot(reports: Sequence[Report], path: Path) -> None:
    """Draw the error by position and by layer, as a PNG file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with picture(path, "png", why="draw the errors") as (figure, panels):
        for panel, kinds, axis in (
            (panels[0], ("logits",), "position, prompts one after another"),
            (panels[1], ("conv_state", "ssm_state"), "layer"),
        ):
            bound = 0.0
            for report in reports:
                for check in (c for c in report.checks if c.name.startswith(kinds)):
                    panel.plot(
                        [max(e, 1e-12) for e in check.series], marker=".", label=f"{check.name} ({report.backend})"
                    )
                    bound = check.tolerance
            panel.axhline(bound, color="black", linestyle="--", label="allowed")
            panel.set(yscale="log", xlabel=axis, ylabel="relative error")
            panel.legend(fontsize="x-small")
        figure.suptitle("Error against PyTorch")
