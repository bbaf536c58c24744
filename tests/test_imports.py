"""The import rules of the design, held by reading every import; and what importing the package costs."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import mamba_deploy
from mamba_deploy.errors import MissingDependencyError

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "mamba_deploy": ROOT / "mamba_deploy",
    "mamba_deploy.exporters": ROOT / "exporters",
    "mamba_deploy.plugins": ROOT / "plugins",
    "mamba_deploy.runtime": ROOT / "runtime",
}
OUTER = tuple(package for package in FOLDERS if package != "mamba_deploy")
# What each package may import of ours beside itself. Exporters may use everything.
OURS_ALLOWED = {
    "mamba_deploy.plugins": {"mamba_deploy.errors", "mamba_deploy.versions"},
    "mamba_deploy.runtime": {
        "mamba_deploy.bundle",
        "mamba_deploy.config",
        "mamba_deploy.contract",
        "mamba_deploy.errors",
        "mamba_deploy.limits",
        "mamba_deploy.plugins",
        "mamba_deploy.versions",
    },
}
OURS_ALLOWED_LAZILY = {"mamba_deploy.runtime.session": {"mamba_deploy.exporters.reference"}}
TORCH_ALLOWED = {"mamba_deploy.checkpoint", "mamba_deploy.model", "mamba_deploy.ops", "mamba_deploy.step_ops"}
RUNTIME_NEVER = {"onnx", "onnx_ir", "onnxscript", "torch", "transformers"}
CUDA = {"cuda", "pycuda"}
HEAVY = {"huggingface_hub", "matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "scipy", "tokenizers"} | {
    "torch",
    "transformers",
}


@dataclass(frozen=True)
class Import:
    """One imported module; ``lazy`` when a function does it."""

    target: str
    lazy: bool
    line: int

    @property
    def top(self) -> str:
        return self.target.partition(".")[0]


def read_imports(source: str, module: str, known: set[str]) -> list[Import]:
    """Every import of a module: statements, and ``require`` or ``import_module`` of a literal name.

    ``from package import name`` counts as ``package.name`` where that is one of the ``known`` modules or a name
    that ``mamba_deploy`` brings on demand, else as ``package``.
    """
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                on_demand = base == "mamba_deploy" and alias.name != "__version__"
                found.append(Import(full if full in known or on_demand else base, lazy, node.lineno))
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0]
            if called in ("require", "import_module", "__import__") and isinstance(name, ast.Constant):
                found.append(Import(str(name.value), lazy, node.lineno))
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def module_paths() -> dict[str, Path]:
    paths = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.glob("*.py")):
            paths[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return paths


PATHS = module_paths()
IMPORTS = {name: read_imports(path.read_text(encoding="utf-8"), name, set(PATHS)) for name, path in PATHS.items()}


def package_of(module: str) -> str:
    return next((outer for outer in OUTER if module == outer or module.startswith(f"{outer}.")), "mamba_deploy")


CORE = [name for name in PATHS if package_of(name) == "mamba_deploy"]
RUNTIME = [name for name in PATHS if package_of(name) == "mamba_deploy.runtime"]
PLUGINS = [name for name in PATHS if package_of(name) == "mamba_deploy.plugins"]


def offending(module: str, is_wrong) -> list[str]:
    where = PATHS[module].relative_to(ROOT)
    return [f"{where}:{i.line} imports {i.target}" for i in IMPORTS[module] if is_wrong(i)]


@pytest.mark.parametrize("module", [m for m in CORE if m not in ("mamba_deploy", "mamba_deploy.cli")])
def test_core_imports_no_outer_package(module):
    reexported = {name for name, home in mamba_deploy._HOMES.items() if package_of(home) != "mamba_deploy"}
    outer = {f"mamba_deploy.{name}" for name in reexported}
    assert not offending(module, lambda i: package_of(i.target) != "mamba_deploy" or i.target in outer)


@pytest.mark.parametrize("module", [m for m in CORE if m not in TORCH_ALLOWED and m != "mamba_deploy"])
def test_only_checkpoint_model_and_ops_of_the_core_import_torch(module):
    """The command may ask for it inside a verb, to say early that it is missing."""
    assert not offending(module, lambda i: i.top == "torch" and not (i.lazy and module == "mamba_deploy.cli"))


@pytest.mark.parametrize("module", RUNTIME + PLUGINS)
def test_runtime_and_plugins_import_of_ours_only_what_they_may(module):
    package = package_of(module)

    def is_wrong(found: Import) -> bool:
        if found.top != "mamba_deploy" or found.target == "mamba_deploy":
            return False
        if package_of(found.target) == package:
            return False
        if found.lazy and found.target in OURS_ALLOWED_LAZILY.get(module, ()):
            return False
        allowed = OURS_ALLOWED[package]
        return found.target not in allowed and package_of(found.target) not in allowed

    assert not offending(module, is_wrong)


@pytest.mark.parametrize("module", RUNTIME)
def test_runtime_never_imports_the_exporting_side(module):
    assert not offending(module, lambda i: i.top in RUNTIME_NEVER)


@pytest.mark.parametrize("module", [m for m in RUNTIME if m != "mamba_deploy.runtime.device"])
def test_device_alone_touches_cuda_in_the_runtime(module):
    assert not offending(module, lambda i: i.top in CUDA)


@pytest.mark.parametrize("module", PATHS)
def test_nothing_imports_tests_or_a_package_under_its_folder_name(module):
    leaked = {"exporters", "plugins", "runtime", "samples", "tests"}
    assert not offending(module, lambda i: i.top in leaked)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn as nn", ("torch.nn", False)),
        ("from torch import Tensor", ("torch", False)),
        ("def f():\n    import torch", ("torch", True)),
        ("class A:\n    import torch", ("torch", False)),
        ("from mamba_deploy import config", ("mamba_deploy.config", False)),
        ("from mamba_deploy import Session", ("mamba_deploy.Session", False)),
        ("from mamba_deploy import __version__", ("mamba_deploy", False)),
        ("from mamba_deploy.exporters import reference", ("mamba_deploy.exporters.reference", False)),
        ("from . import state", ("mamba_deploy.runtime.state", False)),
        ("from .state import State", ("mamba_deploy.runtime.state", False)),
        ("from ..errors import require", ("mamba_deploy.errors", False)),
        ("ort = require('onnxruntime', extra='cpu', why='run')", ("onnxruntime", False)),
        ("f = lambda: importlib.import_module('onnx')", ("onnx", True)),
    ],
)
def test_the_reader_sees_every_form_of_import(source, expected):
    known = {"mamba_deploy.config", "mamba_deploy.exporters.reference", "mamba_deploy.runtime.state"}
    found = read_imports(source, "mamba_deploy.runtime.session", known)
    assert [(i.target, i.lazy) for i in found] == [expected]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    program = f"import json, sys; {statement}; print(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_package_loads_no_dependency():
    assert not loaded_by("import mamba_deploy") & (HEAVY | {"click", "numpy", "safetensors"})


def test_importing_the_command_loads_no_extra():
    assert not loaded_by("import mamba_deploy.cli") & HEAVY


@pytest.mark.parametrize("name", sorted(mamba_deploy._HOMES))
def test_names_of_the_package_are_those_of_their_modules(name):
    assert name in mamba_deploy.__all__
    assert name in dir(mamba_deploy)
    assert getattr(mamba_deploy, name) is getattr(importlib.import_module(mamba_deploy._HOMES[name]), name)


def test_version_is_the_installed_one():
    assert mamba_deploy.__version__ == importlib.metadata.version("mamba-deploy")


def test_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        mamba_deploy.Sesion  # noqa: B018


@pytest.mark.parametrize("name", ["export", "load_checkpoint"])
def test_name_that_needs_a_missing_extra_says_how_to_get_it(name, monkeypatch):
    monkeypatch.delitem(vars(mamba_deploy), name, raising=False)
    monkeypatch.setattr("importlib.import_module", fail_to_import)
    with pytest.raises(MissingDependencyError, match="torch") as caught:
        getattr(mamba_deploy, name)
    assert caught.value.hint == "pip install 'mamba-deploy[export]'"


def fail_to_import(module: str):
    raise ModuleNotFoundError(f"No module named {module!r}", name=module)
