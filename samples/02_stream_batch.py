"""Continuous batching: prompts of unequal lengths share a batch, and a row that has ended takes the next prompt.

    python samples/01_export_build_generate.py     # writes the bundle, out
    python samples/02_stream_batch.py
    python samples/02_stream_batch.py --rows 2 -p "import " -p "class Node" -p "for name in "

Each prompt is continued to the end of its line. Each step prints, by row, the text that came; a row that has ended
when no prompt is left reads nothing, an empty list, while the others go on.
"""

from __future__ import annotations

from pathlib import Path

import click

from mamba_deploy import Session
from mamba_deploy.runtime.tokenizer import Detokenizer, Tokenizer

PROMPTS = ("def main(", "for i in range(", "class Node:\n    def __init__(", "try:\n    value =", "    while ")


class Request:
    """A prompt, and what has come of it."""

    def __init__(self, prompt: str, tokenizer: Tokenizer) -> None:
        self.prompt, self.text, self.count = prompt, "", 0
        self.ids = tokenizer.encode(prompt)
        self._detokenizer = Detokenizer(tokenizer)  # a token may hold a part of a character

    def take(self, token: int) -> str:
        """The text that a token completes."""
        piece = self._detokenizer.push(token)
        self.text, self.count = self.text + piece, self.count + 1
        return piece

    @property
    def line(self) -> str:
        """What the prompt is continued with."""
        return self.text.partition("\n")[0]


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), default="out", show_default=True)
@click.option(
    "--backend", type=click.Choice(["onnxruntime", "torch", "tensorrt"]), default="onnxruntime", show_default=True
)
@click.option("-p", "--prompt", "prompts", multiple=True, default=PROMPTS, help="May be given several times.")
@click.option("--rows", type=click.IntRange(min=1), default=3, show_default=True, help="Of the batch.")
@click.option("-n", "--max-tokens", default=40, show_default=True, help="Of each prompt.")
def main(bundle: Path, backend: str, prompts: tuple[str, ...], rows: int, max_tokens: int) -> None:
    """Continue each prompt to the end of its line, several at a time."""
    with Session.open(bundle, backend) as session:
        tokenizer = session.tokenizer
        if tokenizer is None:
            raise click.ClickException(f"{bundle} has no tokenizer")
        requests = [Request(prompt, tokenizer) for prompt in prompts]
        running, waiting = requests[:rows], requests[rows:]
        reads = [request.ids for request in running]  # what each row reads next
        while any(reads):
            logits = session.prefill(reads)
            tokens = {row: int(logits[row].argmax()) for row, ids in enumerate(reads) if ids}
            click.echo("  ".join(f"{row} {running[row].take(token)!r:<6}" for row, token in tokens.items()).rstrip())
            for row, token in tokens.items():
                request = running[row]
                reads[row] = [token]
                if token in session.config.eos_token_ids or "\n" in request.text or request.count == max_tokens:
                    click.echo(f"row {row}: {request.prompt!r} -> {request.line!r}")
                    reads[row] = []
                    if waiting:  # the row forgets and reads another prompt, while the others read a token
                        running[row] = waiting.pop(0)
                        session.reset(rows=[row])
                        reads[row] = running[row].ids


if __name__ == "__main__":
    main()
