"""A long text is read once and the state after it saved; other processes, on any backend, go on from the file.

    python samples/01_export_build_generate.py     # writes the bundle, out
    python samples/03_save_and_resume_state.py save state.safetensors
    python samples/03_save_and_resume_state.py resume state.safetensors --backend torch

The file is as small for a million tokens as for ten, and what comes is what text and prompt would have given in one,
but for rounding. Where they meet, the tokenizer must cut as it would in the whole: at the end of a line, say. If yours
puts a special token before every text, give session.generate the prompt's ids without it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TextIO

import click

from mamba_deploy import Session
from mamba_deploy.runtime.state import Snapshot

state_argument = click.argument("state", type=click.Path(path_type=Path))
bundle_option = click.option("--bundle", type=click.Path(path_type=Path), default="out", show_default=True)
backend_option = click.option(
    "--backend", type=click.Choice(["onnxruntime", "torch", "tensorrt"]), default="onnxruntime", show_default=True
)


@click.group()
def main() -> None:
    """Read a long text once; go on from it as often as you like."""


@main.command()
@state_argument
@bundle_option
@backend_option
@click.option("--text", type=click.File(encoding="utf-8"), default=__file__, help="Read it; default: this script.")
def save(state: Path, bundle: Path, backend: str, text: TextIO) -> None:
    """Read a text and write what the model remembers of it to the file STATE."""
    with Session.open(bundle, backend) as session:
        if session.tokenizer is None:
            raise click.ClickException(f"{bundle} has no tokenizer")
        ids = session.tokenizer.encode(text.read())
        start = time.perf_counter()
        session.prefill([ids])
        click.echo(f"read {len(ids)} tokens in {time.perf_counter() - start:.2f} s", err=True)
        session.snapshot().save(state)
    click.echo(f"wrote {state}, {state.stat().st_size} bytes", err=True)


@main.command()
@state_argument
@bundle_option
@backend_option
@click.option("-p", "--prompt", default="def load(", show_default=True, help="What follows the text that was read.")
@click.option("-n", "--max-tokens", default=100, show_default=True)
def resume(state: Path, bundle: Path, backend: str, prompt: str, max_tokens: int) -> None:
    """Go on from the file STATE."""
    with Session.open(bundle, backend) as session:
        session.restore(Snapshot.load(state))
        click.echo(prompt, nl=False)
        for token in session.generate(prompt, max_tokens=max_tokens):
            click.echo(token, nl=False)
        click.echo()


if __name__ == "__main__":
    main()
