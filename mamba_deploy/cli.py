"""The `mamba-deploy` command: one verb a function, imports inside the verbs so that `--help` is quick.

Results go to stdout, progress and statistics to stderr. Exit codes: 0 done, 1 an expected failure (``error:`` and
``hint:`` on stderr), 2 wrong usage, 3 outputs differ, 130 interrupted, 143 terminated. ``MAMBA_DEPLOY_DEBUG=1`` shows
tracebacks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mamba_deploy.errors import EngineError, InputError, MambaDeployError, require

if TYPE_CHECKING:
    from mamba_deploy.runtime.generate import Statistics
    from mamba_deploy.runtime.session import Session
    from mamba_deploy.runtime.verify import Answers, Report

__all__ = ["main"]

EXIT_MISMATCH = 3
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Command(click.Group):
    """A group that turns the package's errors into messages and exit codes."""

    def invoke(self, context: click.Context) -> Any:
        """Run the verb."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminated)
        try:
            with _as_raised():
                return super().invoke(context)
        except MambaDeployError as error:
            failure: Exception = error
            hint = error.hint
        except OSError as error:
            failure, hint = error, ""
        except UnicodeEncodeError as error:
            failure, hint = error, "this terminal cannot show that text; set PYTHONIOENCODING=utf-8"
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            context.exit(130)
        if isinstance(failure, BrokenPipeError):  # the reader of our output has gone: `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            context.exit(1)
        if os.environ.get("MAMBA_DEPLOY_DEBUG", "0") != "0":
            raise failure
        click.echo(f"error: {failure}", err=True)
        if hint:
            click.echo(f"hint: {hint}", err=True)
        context.exit(1)


def _terminated(number: int, frame: Any) -> None:
    """End as an error does, so that what is half-written is removed."""
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _as_raised() -> Iterator[None]:
    """Python before 3.12 wraps in a RuntimeError what a signal raises while a class is made, as heavy imports do."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__cause__, (KeyboardInterrupt, SystemExit)):
            raise error.__cause__ from None
        raise


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mamba-deploy")
def main() -> None:
    """Put Mamba and Mamba-2 models on devices: export, verify, generate, bench."""


def _backend_option(default: str = "onnxruntime") -> Callable[..., Any]:
    return click.option(
        "--backend",
        type=click.Choice(["onnxruntime", "torch", "tensorrt", "tensorrt-rtx"]),
        default=default,
        show_default=True,
        help="What runs it.",
    )


_provider_option = click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Of ONNX Runtime; cuda is the first GPU.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
_threads_option = click.option("--threads", type=click.IntRange(min=1), help="Threads of one operator.")


def _say(message: str) -> None:
    click.echo(message, err=True)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, allow_nan=False))


# --- export -------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=click.Choice(list(_DTYPES)), default="fp32", show_default=True, help="Of weights and activations."
)
@click.option(
    "--state-dtype", type=click.Choice(list(_DTYPES)), default="fp32", show_default=True, help="Of the scan's state."
)
@click.option("--opset", type=click.IntRange(18, 23), default=18, show_default=True, help="ONNX opset.")
@click.option(
    "--logits", type=click.Choice(["last", "all"]), default="last", show_default=True, help="After which tokens."
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json to use instead of the checkpoint's.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there; files it does not own are kept.")
@_json_option
def export(
    checkpoint: str,
    out: Path,
    dtype: str,
    state_dtype: str,
    opset: int,
    logits: str,
    tokenizer: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write CHECKPOINT, a directory or hub id, as a bundle OUT: ONNX graphs, weights, reference answers."""
    for module in ("torch", "onnx", "onnx_ir", "onnxscript"):
        require(module, extra="export", why="export a model")
    from mamba_deploy.exporters.export import export as run

    bundle = run(
        checkpoint,
        out,
        dtype=_DTYPES[dtype],  # type: ignore[arg-type]
        state_dtype=_DTYPES[state_dtype],  # type: ignore[arg-type]
        opset=opset,
        all_logits=logits == "all",
        tokenizer=tokenizer,
        force=force,
        progress=_say,
    )
    size = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    if as_json:
        _print_json({"path": str(bundle.path), "bytes": size, "files": bundle.manifest["files"]})
    else:
        click.echo(f"{bundle.path}: {bundle.config.generation}, {dtype}, {size / 1e6:.1f} MB")


# --- build --------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--backend", type=click.Choice(["tensorrt", "tensorrt-rtx"]), help="Default: tensorrt, or what is installed."
)
@click.option("--max-batch", type=click.IntRange(min=1), default=8, show_default=True, help="Rows of a step.")
@click.option(
    "--max-prefill", type=click.IntRange(min=1, max=1 << 20), default=2048, show_default=True,
    help="Tokens of a prompt call; longer prompts are read in several.",
)  # fmt: skip
@click.option(
    "--prefill-batch", type=click.IntRange(min=1), default=1, show_default=True,
    help="Rows of a prompt call; memory grows with it.",
)  # fmt: skip
@click.option(
    "--plugins", type=click.Choice(["auto", "library", "python"]), default="auto", show_default=True,
    help="C++ library, or Python over NVRTC.",
)  # fmt: skip
@click.option("--workspace", "workspace_mib", type=click.IntRange(min=1), help="Most MiB the builder may use.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="Of the builder; higher is slower to build.")
@click.option(
    "--compute-capability", "compute_capabilities", multiple=True, metavar="8.6",
    help="For tensorrt-rtx: build for this GPU, without having it; may be given several times.",
)  # fmt: skip
@click.option("--timing-cache/--no-timing-cache", "use_timing_cache", default=True, help="Keep timings between builds.")
@click.option("--fuse/--no-fuse", default=True, help="One operator for the whole model, or the graph's own.")
@_json_option
def build(out: Path, backend: str | None, as_json: bool, **options: Any) -> None:
    """Build the TensorRT engine of the bundle OUT, on the machine that is to run it."""
    require("onnx", extra="tensorrt", why="read the graph")
    from mamba_deploy.bundle import ENGINES, bound_weight_bytes
    from mamba_deploy.exporters.engine_build import build_engine

    backend = backend or _installed_backend()
    bundle = build_engine(out, backend=backend, say=_say, **options)
    facts, size = bundle.engine(backend), bundle.manifest["files"][ENGINES[backend]]["bytes"]
    path = str(bundle.path / ENGINES[backend])
    if as_json:
        _print_json({"path": path, "bytes": size, "engine": facts})
    else:
        bound = bound_weight_bytes(facts)
        beside = f", {bound / 1e6:.1f} MB of weights stay in model.onnx.data" if bound else ""
        product = f"{facts['product']} {facts['version']}"
        click.echo(f"{path}: {product}, {size / 1e6:.1f} MB{beside}, built in {facts['build_seconds']} s")


def _installed_backend() -> str:
    from importlib.util import find_spec

    only_rtx = find_spec("tensorrt") is None and find_spec("tensorrt_rtx_bindings") is not None
    return "tensorrt-rtx" if only_rtx else "tensorrt"


# --- verify -------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@_backend_option()
@_provider_option
@click.option("--checkpoint", help="Compare with this checkpoint's answers, made by PyTorch now.")
@click.option("--layers", is_flag=True, help="Compare the values after each layer too, and name the first to drift.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw the errors as a PNG file.")
@_threads_option
@_json_option
def verify(
    out: Path,
    backend: str,
    provider: str,
    checkpoint: str | None,
    layers: bool,
    plot_file: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare the bundle OUT with PyTorch: logits, states, greedy tokens. Exit code 3 if they differ.

    The answers of PyTorch are in the bundle; PyTorch itself is needed for --checkpoint and --backend torch only.
    For --layers, TensorRT builds a second engine, and keeps it no longer than it needs it.
    """
    from mamba_deploy.bundle import Bundle
    from mamba_deploy.runtime.ort import cannot_run
    from mamba_deploy.runtime.verify import plot
    from mamba_deploy.runtime.verify import verify as run

    _check_provider(backend, provider)
    if layers and backend == "torch":
        raise click.UsageError("--layers is not for --backend torch: it is what the layers are compared with")
    if layers:
        require("onnx", extra="export", why="make outputs of what the layers give")
    if plot_file is not None:
        require("matplotlib", extra="plot", why="draw the errors")  # said before the work, not after
    bundle = Bundle.open(out)
    answers = _answers(bundle, checkpoint)
    if layers:
        answers.hidden(bundle.config)  # raises where there are none
    reports, by_layer = [], []
    for graph in ("lowered", "portable") if backend == "onnxruntime" else ("auto",):
        if backend == "onnxruntime" and (reason := cannot_run(graph, bundle.config, bundle.contract, provider)):
            _say(f"the {graph} graph is not run: {reason}")
            continue
        with _open(out, backend, provider, threads, graph) as session:
            _say(f"verifying {session.backend.name}")
            reports.append(run(session, answers))
            name = session.backend.name
        if layers:
            _say("verifying it layer by layer")
            by_layer.append(_verify_layers(name, bundle, answers, backend, provider, threads, graph))
            reports.append(by_layer[-1])
    if not reports:
        raise EngineError(f"nothing was verified: no graph of {out} runs here", hint="try --backend torch")
    passed = all(report.passed for report in reports)
    if as_json:
        _print_json({"passed": passed, "reports": [report.to_dict() for report in reports]})
    else:
        for report in reports:
            click.echo(report.table())
        click.echo("all outputs agree with PyTorch" if passed else "outputs DIFFER from PyTorch")
    if plot_file is not None:
        plot(reports, plot_file)
        _say(f"wrote {plot_file}")
    if not passed:
        for what, among in (("first difference", reports), ("first layer to drift", by_layer)):
            first = next((c for r in among for c in r.checks if not c.passed), None)
            if first is not None:
                _say(f"{what}: {first.where} (error {first.error:.1e}, allowed {first.tolerance:.1e})")
        click.get_current_context().exit(EXIT_MISMATCH)


def _answers(bundle: Any, checkpoint: str | None) -> Answers:
    from mamba_deploy.bundle import REFERENCE
    from mamba_deploy.errors import VerifyError
    from mamba_deploy.runtime.verify import Answers

    stored = Answers.load(bundle.file(REFERENCE))
    if checkpoint is None:
        return stored
    torch = require("torch", extra="export", why="compute a checkpoint's answers")
    from mamba_deploy.checkpoint import load_checkpoint
    from mamba_deploy.exporters.reference import reference_answers
    from mamba_deploy.model import cast_weight

    config, weights = load_checkpoint(checkpoint)
    if config != bundle.config:
        raise VerifyError(f"{checkpoint} is of another architecture than {bundle.path}")
    dtype = getattr(torch, bundle.contract.dtype)
    rounded = {name: cast_weight(name, tensor, dtype) for name, tensor in weights.items()}
    _say("asking PyTorch")
    prompts = [stored.prompt(i) for i in range(stored.count)]
    return reference_answers(config, rounded, prompts, bundle.contract)


def _verify_layers(
    name: str, bundle: Any, answers: Answers, backend: str, provider: str, threads: int | None, graph: str
) -> Report:
    from mamba_deploy.exporters.layers import onnxruntime_layers, tensorrt_layers
    from mamba_deploy.runtime.verify import verify_layers

    prompt = answers.prompt(0)
    if backend == "onnxruntime":
        found = onnxruntime_layers(bundle, prompt, graph=graph, provider=provider, threads=threads)
    else:
        found = tensorrt_layers(bundle, prompt, backend=backend, say=_say)
    return verify_layers(name, found, answers, bundle.config, bundle.contract)


def _open(out: Path, backend: str, provider: str, threads: int | None, graph: str = "auto") -> Session:
    from mamba_deploy.runtime.session import Session

    return Session.open(out, backend, provider=provider, threads=threads, graph=graph)  # type: ignore[arg-type]


def _check_provider(backend: str, provider: str) -> None:
    if provider != "cpu" and backend != "onnxruntime":
        raise click.UsageError(f"--provider {provider} is for --backend onnxruntime, not {backend}")


# --- generate -----------------------------------------------------------------------------------------------------


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="Text to continue; '-' reads stdin. Without a tokenizer: token ids, '1 2 3'.")
@click.option("--prompts", type=click.File(encoding="utf-8"), help="File with a prompt a line, run as one batch.")
@click.option("-n", "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Of each prompt.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, default=0, help="Sample from the k likeliest; 0 is off.")
@click.option("--top-p", type=float, default=1.0, help="Sample from the likeliest that make up this probability.")
@click.option("--min-p", type=float, default=0.0, help="Drop tokens below this share of the likeliest's probability.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1: repeat less.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, help="Text that ends a row; may be given several times.")
@_backend_option()
@_provider_option
@_threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line: each token, then statistics.")
@click.pass_context
def generate(
    context: click.Context,
    out: Path,
    prompt: str | None,
    prompts: Any,
    max_tokens: int,
    stop: tuple[str, ...],
    backend: str,
    provider: str,
    threads: int | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue a prompt with the bundle OUT. The text alone goes to stdout, as it comes."""
    from mamba_deploy.runtime.generate import Statistics

    if (prompt is None) == (prompts is None):
        raise click.UsageError("give either --prompt or --prompts")
    _check_provider(backend, provider)
    for name in ("top_k", "top_p", "min_p", "seed"):
        given = context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        if given and sampling["temperature"] == 0:
            _say(f"--{name.replace('_', '-')} changes nothing without --temperature: the likeliest token is taken")
    texts = _texts(prompt, prompts)
    statistics = Statistics()
    with _open(out, backend, provider, threads) as session:
        rows = texts if session.tokenizer is not None else [_ids(text) for text in texts]
        if not rows or not all(rows):
            empty = next((i for i, row in enumerate(rows) if not row), 0)
            raise InputError(f"prompt {empty} is empty", hint="give at least one character, or one token id")
        tokens = session.generate(rows, max_tokens=max_tokens, stop=stop, statistics=statistics, **sampling)
        write = _json_tokens if as_json else _text if len(rows) == 1 else _blocks
        write(tokens, texts, session.tokenizer is not None)
    _report(statistics, as_json)


def _texts(prompt: str | None, prompts: Any) -> list[str]:
    try:
        if prompts is not None:
            return [line.rstrip("\n") for line in prompts]
        return [sys.stdin.read() if prompt == "-" else str(prompt)]
    except UnicodeDecodeError as error:
        raise InputError(
            f"{'standard input' if prompts is None else prompts.name} cannot be read as text: {error}",
            hint="prompts are UTF-8",
        ) from error


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise InputError(
            f"the bundle has no tokenizer.json, and {text[:40]!r} is not a list of token ids",
            hint="give ids like -p '1 2 3', or export again with --tokenizer FILE",
        ) from error


def _json_tokens(tokens: Any, texts: list[str], has_text: bool) -> None:
    for token in tokens:
        event = {"event": "token", "row": token.row, "index": token.index, "id": token.id, "text": token.text}
        _print_json(event | {"finish_reason": token.finish_reason})
        sys.stdout.flush()


def _text(tokens: Any, texts: list[str], has_text: bool) -> None:
    for token in tokens:
        click.echo(token.text if has_text else f"{token.id} ", nl=False)
        sys.stdout.flush()
    click.echo()


def _blocks(tokens: Any, texts: list[str], has_text: bool) -> None:
    """Rows of a batch grow side by side, so each is printed when it ends, under its prompt."""
    parts: list[list[str]] = [[] for _ in texts]
    for token in tokens:
        parts[token.row].append(token.text if has_text else f"{token.id} ")
        if token.finish_reason is not None:
            click.echo(f"=== {token.row}: {texts[token.row]}\n{''.join(parts[token.row])}")


def _report(statistics: Statistics, as_json: bool) -> None:
    if as_json:
        _print_json({"event": "done", **statistics.to_dict()})
        return
    _say(
        f"prompt: {statistics.prompt_tokens} tokens in {statistics.prompt_seconds:.3f} s "
        f"({statistics.prompt_tokens_per_second:.1f} tokens/s); "
        f"generated: {statistics.generated_tokens} tokens, {statistics.decode_tokens_per_second:.1f} tokens/s"
    )


# --- bench --------------------------------------------------------------------------------------------------------


class _Counts(click.ParamType):
    """``1,8,64``: numbers, 1 or above, each once."""

    name = "N,N,..."

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[int, ...]:
        """Read it, or name the part that is wrong."""
        if isinstance(value, tuple):
            return value
        for part in value.split(","):
            if not part.strip().isdecimal() or int(part) < 1:
                self.fail(f"{part.strip()!r} in {value!r} is not a number, 1 or above", parameter, context)
        return tuple(dict.fromkeys(int(part) for part in value.split(",")))


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@_backend_option()
@_provider_option
@click.option("--batch", "batches", type=_Counts(), default="1,8", show_default=True, help="Rows of decode steps.")
@click.option("--prompt", "prompts", type=_Counts(), default="1,128,2048", show_default=True, help="Tokens of prompts.")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Of each figure of decode.")
@click.option(
    "--seconds", type=float, default=5.0, show_default=True,
    help="Of each figure; then it has to do with fewer steps, but 5 samples at least.",
)  # fmt: skip
@click.option(
    "--tflops", type=float, metavar="X",
    help="1e12 operations a second that matrix products of this dtype reach on this machine, for the limit of prompts; "
    "it cannot be measured without a library for them. Without it the limit is that of the bytes.",
)  # fmt: skip
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw it as an SVG or PNG file.")
@_threads_option
@_json_option
def bench(
    out: Path,
    backend: str,
    provider: str,
    plot_file: Path | None,
    threads: int | None,
    as_json: bool,
    **measured: Any,
) -> None:
    """Measure the bundle OUT: decode by rows, prompts by tokens, beside the least time that their bytes take.

    For decode it prints the time of the bare CUDA graph where there is one, of generate, and of a step whose logits
    come to the host; for a prompt the time to its first token. The bandwidth is that of a copy, in the same run.
    """
    from mamba_deploy.bundle import ENGINES, Bundle
    from mamba_deploy.runtime.bench import Plan
    from mamba_deploy.runtime.bench import bench as run
    from mamba_deploy.runtime.bench_report import check_plot, engine_facts, plot
    from mamba_deploy.runtime.device import Device

    _check_provider(backend, provider)
    plan = Plan(**measured)
    if plot_file is not None:
        check_plot(plot_file)
    bundle = Bundle.open(out)
    engine = engine_facts(bundle, backend) if backend in ENGINES else None
    on_gpu = engine is not None or provider == "cuda"
    with contextlib.closing(Device()) if on_gpu else contextlib.nullcontext() as device:
        report = run(
            lambda: _open(out, backend, provider, threads),
            plan, device=device, threads=threads, engine=engine, say=_say,
        )  # fmt: skip
    if as_json:
        _print_json(report.to_dict())
    else:
        click.echo(report.table())
    if plot_file is not None:
        plot(report, plot_file)
        _say(f"wrote {plot_file}")


# --- inspect ------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@_json_option
def inspect(path: Path, as_json: bool) -> None:
    """Say what PATH is: a checkpoint, a bundle, an ONNX file, or an engine; its sizes, dtypes, inputs and outputs."""
    from mamba_deploy.inspection import describe, render

    facts = describe(path)
    if facts["kind"] == "engine":
        from mamba_deploy.runtime.engine_report import layers

        facts |= layers(path.parent, facts["backend"])
    if as_json:
        _print_json(facts)
    else:
        click.echo(render(facts))


# --- plugin -------------------------------------------------------------------------------------------------------


@main.group()
def plugin() -> None:
    """Compile the CUDA kernels and TensorRT plugins, and say where they are."""


@plugin.command("build")
@click.option(
    "--arch", "architectures", multiple=True, metavar="sm_NN", help="For this GPU; may be given several times."
)
@click.option("--tensorrt-include", type=click.Path(path_type=Path), help="Folder of TensorRT's headers.")
@click.option("--cuda", type=click.Path(path_type=Path), help="Folder of the CUDA toolkit.")
@click.option("--kernels-only", is_flag=True, help="Without the plugins: needs no TensorRT.")
@click.option("--force", is_flag=True, help="Compile even what is built already.")
@_json_option
def build_plugin(
    architectures: tuple[str, ...],
    tensorrt_include: Path | None,
    cuda: Path | None,
    kernels_only: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Compile into the cache, for the GPUs of this machine, or for all usual ones where there is none."""
    from mamba_deploy.plugins.build import build

    name = "kernels" if kernels_only else "plugin"
    built = build(name, architectures=architectures, cuda=cuda, include=tensorrt_include, force=force, say=_say)
    if as_json:
        _print_json({**built.to_dict(), "path": str(built.path)})
    else:
        click.echo(built.path)


@plugin.command("path")
@click.option(
    "--library",
    type=click.Choice(["plugin", "register", "kernels"]),
    default="plugin",
    show_default=True,
    help="register: for programs that only dlopen (trtexec --staticPlugins, LD_PRELOAD, ONNX Runtime).",
)
@_json_option
def plugin_path(library: str, as_json: bool) -> None:
    """Print the path of the library that was built for this machine from these sources."""
    from mamba_deploy.errors import PluginError
    from mamba_deploy.plugins.build import cache_folder, library_path

    path = library_path(library)
    if path is None:
        only = " --kernels-only" if library == "kernels" else ""
        raise PluginError(
            f"no {library} library that fits this machine and these sources is in the cache, {cache_folder()}",
            hint=f"mamba-deploy plugin build{only}",
        )
    if as_json:
        _print_json({"library": library, "path": str(path)})
    else:
        click.echo(path)


@plugin.command("info")
@_json_option
def plugin_info(as_json: bool) -> None:
    """Say what there is to build with, for which GPUs, and what is built."""
    from mamba_deploy.plugins.build import describe

    facts = describe()
    if as_json:
        _print_json(facts)
        return
    compiler, headers = facts["compiler"], facts["headers"]
    found = {
        "compiler": f"nvcc {compiler.get('version')}, {compiler.get('path')}",
        "headers": f"{headers.get('product')} {headers.get('version')}, {headers.get('folder')}",
    }
    for name in ("compiler", "headers"):
        click.echo(f"{name + ':':14}{facts[name].get('missing') or found[name]}")
        if facts[name].get("hint"):
            click.echo(f"{'':14}hint: {facts[name]['hint']}")
    if "architectures" in compiler:
        click.echo(f"{'it knows:':14}{' '.join(f'sm_{a}' for a in compiler['architectures'])}")
    click.echo(f"{'GPUs here:':14}{' '.join(facts['gpus']) or 'none'}")
    click.echo(f"{'cache:':14}{facts['cache']}")
    for entry in facts["built"]:
        state = "current" if entry["current"] else "not current"
        shown = " ".join(f"sm_{a}" for a in entry["architectures"])
        made_with = ", ".join(part for part in (f"CUDA {entry['cuda']}", entry["tensorrt"]) if part)
        click.echo(f"{entry['name'] + ':':14}{state}, {shown}, {made_with}, {entry['date']}\n{'':14}{entry['path']}")


# --- doctor -------------------------------------------------------------------------------------------------------


@main.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Say what this machine has to export, build and run models, what it lacks, and how to get it."""
    from mamba_deploy.runtime.doctor import diagnose, render

    facts = diagnose()
    if as_json:
        _print_json(facts)
    else:
        click.echo(render(facts))
