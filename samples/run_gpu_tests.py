"""Runs the GPU tests, also under compute-sanitizer, and writes what passed, failed and was skipped.

    python samples/run_gpu_tests.py --write samples/results/gpu-tests.json
    python samples/run_gpu_tests.py --engines /path/to/python --write samples/results/gpu-tests.json

The second form runs the tests of TensorRT engines alone, by the Python that has TensorRT, and keeps the other rows;
what they measure, properties named ``figure [unit]`` in their report, becomes rows too. The
sanitizer runs what is small: no replays of CUDA graphs and no test marked slow. It looks at our kernels alone, and
PyTorch gives every tensor memory of its own, so that an access beside one is seen.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import measured

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
ENGINES = ("test_tensorrt.py", "test_engine.py")
ORT = "test_ort_cuda.py"  # runs no kernel of ours
NVRTC = "nvrtc"  # kernels compiled one by one, without the library
ALONE = "alone"  # tests that look at the GPU's memory, after all others
WORKERS = os.environ.get("MAMBA_DEPLOY_TEST_WORKERS", "").split()  # for pytest-xdist: "-n 4"
SMALL = "not graph and not more_rows and not long_prompt"


@click.command()
@click.option("--sanitizer", default="compute-sanitizer", show_default=True, help="The program; empty to leave it out.")
@click.option("--engines", metavar="PYTHON", help=f"Run {' and '.join(ENGINES)} alone, by this Python.")
@click.option("--only", default="", help="Files whose name contains this.")
@click.option("--at-once", default=4, show_default=True, help="Files that run side by side.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the results as JSON, or into what is there.")
def main(sanitizer: str, engines: str | None, only: str, at_once: int, write: Path | None) -> None:
    """Run, print, and write the results; exit with 1 where a test failed."""
    jobs: list[tuple[str, str, list[str]]] = []  # file, tool, the Python that runs it
    last: list[tuple[str, str, list[str]]] = []
    if engines:
        jobs += [(file, "", [engines]) for file in ENGINES]
        last += [(ENGINES[-1], ALONE, [engines])]
    else:
        files = [file for file in FILES if file not in (*ENGINES, ORT)]
        jobs += [(file, tool, [sys.executable]) for tool in ("", NVRTC) for file in files]
        jobs += [(ORT, "", [sys.executable])]
        if sanitizer and shutil.which(sanitizer):
            for tool in ("memcheck", "racecheck"):
                command = [sanitizer, "--tool", tool, "--error-exitcode", "86", "--print-limit", "10000"]
                command += ["--kernel-regex", "kns=mamba"]
                jobs += [(file, tool, [*command, sys.executable]) for file in files]
        elif sanitizer:
            click.echo(f"no {sanitizer} here: left out")
    failed = False
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(at_once) as pool:
        for part in (jobs, last):
            chosen = [job for job in part if only in job[0]]
            for rows in pool.map(lambda job: _run(*job, Path(scratch)), chosen):
                for row in rows:
                    click.echo(f"{row['name']}: {row['value']} {row['unit']} {row['note']}")
                failed |= any("FAILED" in row["note"] for row in rows)
                if write is not None:
                    _write(write, rows, engines)
    sys.exit(failed)


def _write(path: Path, rows: list[dict[str, Any]], engines: str | None) -> None:
    """Put rows into the file, in place of those with their names."""
    names = {row["name"] for row in rows}
    versions = {}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in before["rows"] if row["name"] not in names] + rows
        versions = before["versions"]
    if engines:
        versions["tensorrt"] = measured.output([engines, "-c", "import tensorrt; print(tensorrt.__version__)"])
    packages = ("mamba-deploy", "numpy", "pytest", "torch")
    measured.write(path, rows, machine="", packages=packages, versions=versions, on_gpu=True)


def _run(file: str, tool: str, python: list[str], scratch: Path) -> list[dict[str, Any]]:
    """Rows of the results for a file of tests, what it measured after it; with a tool only what is small runs."""
    report = scratch / f"{file}{tool}.xml"
    command = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", f"tests/gpu/{file}"]
    environment = dict(os.environ)
    if tool == NVRTC:
        command += ["-m", "not slow"]
        environment["MAMBA_DEPLOY_TEST_KERNELS"] = NVRTC
    elif tool == ALONE:
        command += ["-m", ALONE]
    elif file in ENGINES:
        command += ["-m", f"not {ALONE}", *WORKERS]
    elif tool:
        command += ["-m", "not slow", "-k", SMALL]
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed, bad, skipped, figures = 0, 0, Counter[str](), []
    if report.exists():
        for case in ElementTree.parse(report).iter("testcase"):
            figures += [_figure(entry, case.get("name", "")) for entry in case.iter("property")]
            if (skip := case.find("skipped")) is not None:
                skipped[skip.get("message", "")] += 1
            elif case.find("failure") is not None or case.find("error") is not None:
                bad += 1
            else:
                passed += 1
    notes = [f"{count} skipped: {reason}" for reason, count in skipped.items()]
    if done.returncode not in (0, 5) or bad:
        kernels = sorted(set(re.findall(r"mamba::\w+::\w+(?:<[^>]*>)?", done.stdout))) if tool != ALONE else []
        notes.insert(0, f"FAILED: {bad} tests, exit {done.returncode} {', '.join(kernels)}".strip())
        click.echo(done.stdout[-4000:] + done.stderr[-2000:], err=True)
    elif tool not in ("", NVRTC, ALONE):
        notes.insert(0, "no errors")
    name = f"{tool}/{file}" if tool else file
    return [_row(name, passed, "tests passed", "; ".join(notes)), *figures]


def _figure(entry: ElementTree.Element, test: str) -> dict[str, Any]:
    """From a property ``name [unit]``."""
    name, _, unit = entry.get("name", "").partition(" [")
    return _row(name, float(entry.get("value", "nan")), unit.removesuffix("]"), test)


def _row(name: str, value: float, unit: str, note: str) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "limit": None, "peers": {}, "note": note}


if __name__ == "__main__":
    main()
