"""What `mamba-deploy bench` measured: figures beside their limits, as a table, as JSON and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mamba_deploy.bundle import ENGINES, WEIGHTS, Bundle, bound_weight_bytes
from mamba_deploy.errors import InputError, require
from mamba_deploy.limits import Limits
from mamba_deploy.runtime.picture import picture

if TYPE_CHECKING:
    from mamba_deploy.runtime.bench import Machine, Plan

__all__ = ["Figure", "Report", "Row", "check_plot", "engine_facts", "plot"]

_WHY = "draw what is measured"  # matplotlib is needed


@dataclass(frozen=True)
class Figure:
    """Seconds of a step of all rows, or of a prompt."""

    samples: Sequence[float]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.samples)

    @property
    def p95(self) -> float:
        """Seconds; between two samples by a straight line."""
        return float(np.percentile(self.samples, 95))


@dataclass(frozen=True)
class Row:
    """A decode step of ``batch`` rows, or a prompt of ``seq`` tokens."""

    batch: int
    seq: int
    limits: Limits
    limit: float  # seconds
    limited_by: str  # "bytes" or "products"
    cache: str  # that it may come from; "" if it does not fit in any
    figures: Mapping[str, Figure]
    kernels: int | None = None  # of a step's CUDA graph

    def rates(self, figure: Figure) -> dict[str, float]:
        """Of the median: tokens, bytes and operations a second, and the limit over it."""
        return {
            "tokens_per_second": self.batch * self.seq / figure.median,
            "bytes_per_second": self.limits.bytes / figure.median,
            "flops_per_second": self.limits.flops / figure.median,
            "share_of_limit": self.limit / figure.median,
        }

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        figures = {
            name: {
                "median_ms": 1e3 * figure.median,
                "p95_ms": 1e3 * figure.p95,
                "samples": len(figure.samples),
                **self.rates(figure),
            }
            for name, figure in self.figures.items()
        }
        return {
            "batch": self.batch,
            "tokens": self.seq,
            "bytes": self.limits.bytes,
            "flops": self.limits.flops,
            "limit_ms": 1e3 * self.limit,
            "limited_by": self.limited_by,
            "cache": self.cache or None,
            "kernels": self.kernels,
            "figures": figures,
        }


@dataclass(frozen=True)
class Report:
    """All that was measured."""

    backend: str
    machine: Machine
    plan: Plan
    decode: Sequence[Row]
    prompt: Sequence[Row]
    versions: Mapping[str, str]
    gpu_memory_bytes: int | None = None  # that the session took, CUDA's own context not counted
    engine: Mapping[str, Any] | None = None  # of engine_facts
    gpu_memory: Mapping[str, int] = field(default_factory=dict)  # of these bytes, those that it asked for, by what for

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {
            "backend": self.backend,
            "machine": self.machine.name,
            "copy_bytes_per_second": self.machine.bandwidth,
            "cache_bytes": self.machine.cache_bytes,
            "tflops": self.plan.tflops,
            "versions": dict(self.versions),
            "gpu_memory_bytes": self.gpu_memory_bytes,
            "gpu_memory": dict(self.gpu_memory),
            "engine": self.engine,
            "decode": [row.to_dict() for row in self.decode],
            "prompt": [row.to_dict() for row in self.prompt],
        }

    def table(self) -> str:
        """For people."""
        bandwidth = f"{self.machine.bandwidth / 1e9:.1f} GB/s, read and written"
        facts = {self.machine.name: f"a copy reaches {bandwidth}"}
        if self.engine is not None:
            engine = self.engine
            bound = engine["bound_weight_bytes"]
            beside = f" and {bound / 1e6:.1f} MB of weights in {WEIGHTS}" if bound else ""
            share = f"{engine['share_of_weights']:.2f} of the weights"
            facts["engine"] = f"{engine['bytes'] / 1e6:.1f} MB{beside}, {share}, built in {engine['build_seconds']} s"
        if self.gpu_memory_bytes is not None:
            facts["GPU memory"] = f"{self.gpu_memory_bytes / 1e6:.1f} MB taken by the session"
            known = sorted(((nbytes, what) for what, nbytes in self.gpu_memory.items()), reverse=True)
            parts = [f"{what} {nbytes / 1e6:.1f}" for nbytes, what in known if nbytes >= 1e5]
            if parts:
                other = self.gpu_memory_bytes - sum(self.gpu_memory.values())
                facts["  of it"] = ", ".join([*parts, f"other (kernels, TensorRT) {other / 1e6:.1f}"])
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        width = max(len(name) for name in facts)
        lines = [self.backend, *(f"  {name:<{width}}  {value}" for name, value in facts.items())]
        lines += ["decode, a step of all rows", *_aligned(self._decode_cells())]
        lines += ["prompt, to its first token", *_aligned(self._prompt_cells())]
        if self.plan.tflops is None:
            lines.append("  the limit of a prompt is that of its bytes; --tflops adds that of its products")
        return "\n".join(lines)

    def _decode_cells(self) -> list[list[str]]:
        kernels = any(row.kernels is not None for row in self.decode)
        head = ["rows", "figure", "ms", "p95", "tokens/s", "MB", "GB/s", "limit ms", "of limit"]
        cells = [[*head, *(["kernels"] if kernels else []), ""]]
        for row in self.decode:
            for name, figure in row.figures.items():
                rates = row.rates(figure)
                middle = [f"{row.limits.bytes / 1e6:.2f}", f"{rates['bytes_per_second'] / 1e9:.1f}"]
                cells.append([str(row.batch), name, *_times(figure, rates), *middle, *_limit(row, rates)])
                if kernels:
                    cells[-1].append(str(row.kernels) if name == "device" else "")
                cells[-1].append(_cached(row))
        return cells

    def _prompt_cells(self) -> list[list[str]]:
        cells = [["tokens", "ms", "p95", "tokens/s", "TFLOP/s", "limit ms", "of limit", "limited by", ""]]
        for row in self.prompt:
            for figure in row.figures.values():
                rates = row.rates(figure)
                operations = f"{rates['flops_per_second'] / 1e12:.3f}"
                ends = [*_limit(row, rates), row.limited_by, _cached(row)]
                cells.append([str(row.seq), *_times(figure, rates), operations, *ends])
        return cells


def _times(figure: Figure, rates: Mapping[str, float]) -> list[str]:
    return [f"{1e3 * figure.median:.3f}", f"{1e3 * figure.p95:.3f}", f"{rates['tokens_per_second']:.1f}"]


def _limit(row: Row, rates: Mapping[str, float]) -> list[str]:
    return [f"{1e3 * row.limit:.3f}", f"{100 * rates['share_of_limit']:.0f} %"]


def _cached(row: Row) -> str:
    return f"(from the {row.cache} cache)" if row.cache else ""


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Columns flush right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rows = ("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells)
    return [f"  {row}".rstrip() for row in rows]


def engine_facts(bundle: Bundle, backend: str) -> dict[str, Any]:
    """Size of the engine, in bytes and beside the weights, those it is given at opening counted in; and build time.

    Raises:
        BundleError: None was built for this backend.
    """
    facts, files = bundle.engine(backend), bundle.manifest["files"]
    size, bound = files[ENGINES[backend]]["bytes"], bound_weight_bytes(facts)
    return {
        "bytes": size,
        "bound_weight_bytes": bound,
        "share_of_weights": (size + bound) / files[WEIGHTS]["bytes"],
        "build_seconds": facts["build_seconds"],
    }


# --- a picture ----------------------------------------------------------------------------------------------------


def check_plot(path: Path) -> None:
    """Raise before any work is done if :func:`plot` could not write there.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InputError: The name is neither an SVG's nor a PNG's, or there is no such folder.
    """
    require("matplotlib", extra="plot", why=_WHY)
    if path.suffix.lower() not in (".svg", ".png"):
        raise InputError(f"{path} is neither an .svg nor a .png file", hint="its ending says what is drawn")
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for {path.name}", hint="make it, or choose another")


def plot(report: Report, path: Path) -> None:
    """Draw ms a step by rows, and ms to the first token by the prompt's length, beside their limits: an SVG or a PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with picture(path, path.suffix.lower().removeprefix("."), why=_WHY) as (figure, panels):
        for panel, measured, across, up in (
            (panels[0], report.decode, "rows", "ms a token"),
            (panels[1], report.prompt, "tokens of the prompt", "ms to the first token"),
        ):
            rows = {row.batch * row.seq: row for row in measured}
            ticks = sorted(rows)
            for name in dict.fromkeys(name for row in measured for name in row.figures):
                having = [tick for tick in ticks if name in rows[tick].figures]
                panel.plot(having, [1e3 * rows[tick].figures[name].median for tick in having], marker="o", label=name)
            limits = [1e3 * rows[tick].limit for tick in ticks]
            panel.plot(ticks, limits, color="black", linestyle="--", marker=".", label="limit")
            panel.set(xscale="log", yscale="log", xlabel=across, ylabel=up)
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.set_xticks([], minor=True)
            panel.legend()
        figure.suptitle(
            f"{report.backend}: a copy reaches {report.machine.bandwidth / 1e9:.1f} GB/s", fontsize="medium"
        )
