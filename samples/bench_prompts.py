"""A prompt of a whole model through our operator for it, beside its products alone, on random weights.

    mamba-deploy plugin build --kernels-only
    python samples/bench_prompts.py --models mamba-2.8b,mamba2-2.7b --prompt 512,2048

No checkpoint, export, engine or TensorRT is needed: the C function is called as the plugin calls it. One row, float16,
in a CUDA graph and eagerly; the products are those of the same weights by PyTorch, that is by cuBLAS too, in a graph.
The contenders take turns, each after a rest: products at full power leave the GPU at a lower clock for what comes next.
Then where the time of one eager prompt goes, by kernel. Needs PyTorch for CUDA.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import measured
import torch
from bench_chains import layer_arrays, operator_sizes, random_model
from bench_kernels import calibrate
from bench_peers import config_of, counts, names
from torch import Tensor

from mamba_deploy.model import MambaModel
from mamba_deploy.plugins import structs
from mamba_deploy.plugins.build import kernels_library

PRODUCTS = "products alone"
REST = 0.2  # seconds


@click.command()
@click.option("--library", type=click.Path(exists=True, path_type=Path), help="Of the kernels, if not your cache's.")
@click.option("--models", default="mamba-130m,mamba2-130m,mamba-2.8b,mamba2-2.7b", show_default=True, callback=names)
@click.option("--prompt", "lengths", default="512,2048,8192", show_default=True, callback=counts, help="Tokens.")
@click.option("--turns", default=9, show_default=True, help="Of each contender.")
@click.option("--profile/--no-profile", default=True, help="Say where the time goes.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the results as JSON.")
def main(
    library: Path | None, models: list[str], lengths: list[int], turns: int, profile: bool, write: Path | None
) -> None:
    """Print milliseconds of a prompt, and their ratio to those of the products."""
    torch.set_grad_enabled(False)
    machine, rows = calibrate(), []
    click.echo(machine.text)
    opened = ctypes.CDLL(str(library or kernels_library()))
    for name in models:
        model = random_model(config_of(name))
        for length in lengths:
            prompt = Prompt(opened, model, length)
            prompt.launch()
            contenders = {
                "graph": graph_of(prompt.launch),
                "eager": prompt.launch,
                PRODUCTS: graph_of(products_of(model, prompt.products, length)),
            }
            times = take_turns(contenders, turns)
            host = _host_ms(prompt.launch)
            ratio = times["graph"] / times[PRODUCTS]
            click.echo(
                f"{name} L {length}: {times['graph']:.3f} ms in a graph, {times['eager']:.3f} eager "
                f"(the host {host:.3f}), products {times[PRODUCTS]:.3f}: {ratio:.2f}x"
            )
            if profile and length == 2048:
                click.echo(by_kernel(prompt.launch))
            rows.append(
                {
                    "name": f"prompt_kernels/{name}/b1/l{length}",
                    "value": 1e3 * times["graph"],
                    "unit": "us",
                    "limit": 1e3 * times[PRODUCTS],
                    "peers": {},
                    "note": f"the limit is the products alone; eager {1e3 * times['eager']:.0f}",
                }
            )
            if write is not None:
                packages = ("mamba-deploy", "torch")
                measured.write(write, rows, machine=machine.text, packages=packages, on_gpu=True)
            del prompt, contenders
            torch.cuda.empty_cache()
        del model
        torch.cuda.empty_cache()


class Prompt:
    """The call of one row onto a state of zeros; every launch reads the same state."""

    def __init__(self, library: ctypes.CDLL, model: MambaModel, length: int) -> None:
        c, weight = model.config, model.embedding.weight
        new = functools.partial(torch.zeros, device=weight.device)
        self.library, self.kept = library, []
        layers = []
        for layer in model.layers:
            tensors = layer_arrays(layer, c, 1, torch.float32)
            tensors |= {f"{name}_out": torch.zeros_like(tensors[name]) for name in ("conv_state", "ssm_state")}
            self.kept.append(tensors)
            layers.append(structs.MambaLayer(**_addresses(tensors)))
        projections = ("in_proj", "x_proj", "dt_proj", "out_proj")
        self.products = [{name: of[name] for name in projections if name in of} for of in self.kept]
        self.each = (structs.MambaLayer * len(layers))(*layers)
        fixed = {
            "input_ids": torch.randint(0, c.vocab_size, (1, length), device=weight.device, dtype=torch.int32),
            "seq_lens": torch.full((1,), length, device=weight.device, dtype=torch.int32),
            "embedding": weight,
            "norm_weight": model.norm_f.weight,
            "head": weight,
            "logits": new(1, c.vocab_size),
        }
        self.kept.append(fixed)
        self.struct = structs.MambaModel(
            **operator_sizes(c, 1, length), dtype=1, state_dtype=0, eps=c.norm_eps, norm_eps=-1.0, dt_min=c.dt_min,
            dt_max=c.dt_max, each=ctypes.addressof(self.each), **_addresses(fixed),
        )  # fmt: skip
        needed = library.mamba_model_workspace
        needed.restype = ctypes.c_size_t
        self.workspace = new(needed(ctypes.byref(self.struct)), dtype=torch.uint8)

    def launch(self) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        workspace = ctypes.c_void_p(self.workspace.data_ptr())
        if code := self.library.mamba_model(ctypes.byref(self.struct), workspace, stream):
            raise RuntimeError(f"mamba_model: cudaError {code}")


def _addresses(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}


def products_of(model: MambaModel, weights: list[dict[str, Tensor]], length: int) -> Callable[[], None]:
    """All products of a prompt, the head's of its last token; random values go in, results are not used."""
    c, like = model.config, model.embedding.weight
    new = functools.partial(torch.randn, device=like.device, dtype=like.dtype)
    shapes = {tuple(w.shape) for products in weights for w in products.values()}
    given = {shape: (new(length, shape[0]), new(length, shape[1])) for shape in shapes}
    last, logits = new(1, c.d_model), new(1, c.vocab_size)

    def run() -> None:
        for products in weights:
            for w in products.values():
                x, y = given[tuple(w.shape)]
                torch.mm(x, w, out=y)
        torch.mm(last, like.t(), out=logits)

    return run


def graph_of(run: Callable[[], None]) -> Callable[[], None]:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def take_turns(contenders: dict[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """Median milliseconds by the GPU's clock; of a turn the second of two runs that follow one another."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, run in contenders.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            time.sleep(REST)
            run()
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def _host_ms(run: Callable[[], None]) -> float:
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def by_kernel(run: Callable[[], None]) -> str:
    """A line for each kernel of one run: how often, its microseconds and their share."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[_short(event.name)].append(event.device_time)
    total = sum(map(sum, found.values()))
    lines = [
        f"  {sum(us):9.1f} us {100 * sum(us) / total:5.1f} %  {len(us):4d} x {statistics.mean(us):7.2f}  {name}"
        for name, us in sorted(found.items(), key=lambda item: -sum(item[1]))
    ]
    return "\n".join([*lines, f"  {total:9.1f} us in kernels"])


def _short(name: str) -> str:
    return re.sub(r"\(.*|^void |__nv_|mamba::", "", name)[:100]


if __name__ == "__main__":
    main()
