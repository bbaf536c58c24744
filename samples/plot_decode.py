"""Draws what bench_peers.py and bench_chains.py found: times of a decode step over the least that its bytes take.

    cd samples/results
    python ../plot_decode.py decode.json chains.json --out decode.svg

Rows that have peers, mamba_ssm's fastest among them; of an operator alone only where no engine was measured. Needs
matplotlib (the extra ``plot``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from bench_worker import OURS
from peers import STEP

from mamba_deploy.runtime.picture import picture


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The picture, .svg or .png.")
def main(files: tuple[Path, ...], out: Path) -> None:
    """Draw the rows of FILES."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    found = bars([row for result in results for row in result["rows"]])
    if not found:
        raise click.ClickException("no row of these files has a step of mamba_ssm beside it")
    draw(found, ", ".join(sorted({result["gpu"] for result in results})), out)


def bars(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Of decode rows: how many times the limit ours takes, and the fastest step of mamba_ssm."""
    found, engines = {}, {row["name"].removeprefix("decode/") for row in rows if row["name"].startswith("decode/")}
    for row in rows:
        theirs = [us for name, us in row["peers"].items() if name.startswith(STEP)]
        if theirs and not row["name"].startswith("prompt") and row["name"].removeprefix("chain/") not in engines:
            kind, model, batch, *state = row["name"].split("/")
            label = ", ".join([model, f"{batch.removeprefix('b')} row{'' if batch == 'b1' else 's'}", *state])
            label += "\n(kernels alone)" if kind == "chain" else "\n(TensorRT engine)"
            found[label] = (row["value"] / row["limit"], min(theirs) / row["limit"])
    return found


def draw(found: dict[str, tuple[float, float]], gpu: str, out: Path) -> None:
    """Pairs of bars, one below the other."""
    kind, size = out.suffix.lower().removeprefix("."), (8, 1.2 + 0.5 * len(found))
    with picture(out, kind, why="draw decode steps", panels=1, size=size) as (_, axes):
        for at, (name, colour) in enumerate(((OURS, "tab:blue"), (f"{STEP}, its fastest", "tab:gray"))):
            places = [place + 0.38 * at for place in range(len(found))]
            drawn = axes.barh(places, [pair[at] for pair in found.values()], height=0.36, color=colour, label=name)
            axes.bar_label(drawn, fmt="%.2f", padding=3)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks([place + 0.19 for place in range(len(found))], list(found))
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set_xlim(right=1.1 * max(max(pair) for pair in found.values()))
        axes.set(xlabel="time of a decode step over the least that its bytes take", title=gpu)
        axes.legend(loc="lower right")


if __name__ == "__main__":
    main()
