"""From a checkpoint to text: export it, build the engine, compare with PyTorch, generate.

    python samples/01_export_build_generate.py
    python samples/01_export_build_generate.py --checkpoint samples/tiny-mamba2 --out out2 --backend tensorrt

The text goes to stdout as it is made, all else to stderr. What --out then holds is all that the other samples, or
another machine, need; an engine of TensorRT alone is built on the machine that runs it.
"""

from __future__ import annotations

from pathlib import Path

import click

from mamba_deploy import Session, export
from mamba_deploy.exporters.engine_build import build_engine
from mamba_deploy.runtime.verify import Answers, verify


@click.command()
@click.option("--checkpoint", default="samples/tiny-mamba", show_default=True, help="Directory, or hub id.")
@click.option("--out", type=click.Path(path_type=Path), default="out", show_default=True, help="The bundle.")
@click.option("--backend", type=click.Choice(["onnxruntime", "tensorrt"]), default="onnxruntime", show_default=True)
@click.option("-p", "--prompt", default="import os\n\n\ndef main(", help="Text to continue.")
@click.option("-n", "--max-tokens", default=200, show_default=True)
def main(checkpoint: str, out: Path, backend: str, prompt: str, max_tokens: int) -> None:
    """Export a checkpoint, verify it, and continue a prompt."""
    bundle = export(checkpoint, out, force=True, progress=say)
    if backend == "tensorrt":
        bundle = build_engine(out, say=say)
    with Session.open(out, backend) as session:
        report = verify(session, Answers.load(bundle.file("reference.safetensors")))
        say(report.table())
        if not report.passed:
            raise click.ClickException("the outputs differ from PyTorch's")
        click.echo(prompt, nl=False)
        for token in session.generate(prompt, max_tokens=max_tokens, temperature=0.7, top_p=0.95, seed=3):
            click.echo(token, nl=False)
        click.echo()


def say(message: str) -> None:
    click.echo(message, err=True)


if __name__ == "__main__":
    main()
