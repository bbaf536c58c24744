"""What is shipped: the package table, the wheel's contents, and the wheel alone in a clean environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
FOLDERS: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]
PLUGIN_SOURCES = ("*.cu", "*.cuh", "*.cpp", "*.h")


def run(*command: str | Path, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_package_table_lists_every_folder_that_is_a_package():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"samples", "tests"}
    assert set(FOLDERS.values()) == found
    assert sorted(FOLDERS) == sorted(PYPROJECT["tool"]["setuptools"]["packages"])


def test_every_package_is_imported_below_mamba_deploy():
    assert all(name.partition(".")[0] == "mamba_deploy" for name in FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_packages_are_flat(folder):
    """setuptools leaves an unlisted sub-folder out of the wheel without failing."""
    assert [p.name for p in (ROOT / folder).iterdir() if p.is_dir() and p.name != "__pycache__"] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a release is, in a copy of the tree: sdist, then wheel from the sdist. Needs no network."""
    source = tmp_path_factory.mktemp("source")
    built = tmp_path_factory.mktemp("built")
    for folder in (*FOLDERS.values(), "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, source, cwd=built)
    assert len(list(built.glob("*.tar.gz"))) == 1
    (path,) = built.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_is_pure_python_and_named_for_this_version(wheel):
    assert wheel.name == f"mamba_deploy-{PROJECT['version']}-py3-none-any.whl"


@pytest.mark.slow
def test_wheel_holds_the_packages_the_plugin_sources_and_nothing_else(wheel):
    expected = {"mamba_deploy/py.typed"}
    for package, folder in FOLDERS.items():
        patterns = ("*.py", *PLUGIN_SOURCES) if folder == "plugins" else ("*.py",)
        for pattern in patterns:
            expected |= {f"{package.replace('.', '/')}/{path.name}" for path in (ROOT / folder).glob(pattern)}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    described = {name for name in names if name.startswith(f"mamba_deploy-{PROJECT['version']}.dist-info/")}
    assert names - described == expected
    assert f"mamba_deploy-{PROJECT['version']}.dist-info/licenses/LICENSE" in described


class Environment:
    """A virtual environment that holds the wheel and the core dependencies, and a folder far from the tree."""

    def __init__(self, path: Path, outside: Path) -> None:
        self.bin = path / "bin"
        self.outside = outside

    def python(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(self.bin / "python", *arguments, cwd=self.outside, check=check)


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("clean")
    environment = Environment(folder / "venv", folder)
    venv.create(folder / "venv")
    pip = (sys.executable, "-m", "pip", "--python", environment.bin / "python", "--disable-pip-version-check")
    install = (*pip, "--no-input", "install", "--quiet", "--no-compile")
    fetch = (*install, "--retries", "1", "--timeout", "20", *PROJECT["dependencies"])
    fetched = run(*fetch, cwd=folder, check=False)
    if fetched.returncode != 0:
        assert "No matching distribution" not in fetched.stderr or "Connection" in fetched.stderr, fetched.stderr
        pytest.skip(f"the package index is out of reach: {fetched.stderr.strip().splitlines()[-1]}")
    run(*install, "--no-deps", "--no-index", wheel, cwd=folder)
    run(*pip, "check", cwd=folder)
    return environment


@pytest.mark.slow
@pytest.mark.parametrize("as_module", [True, False], ids=["python -m mamba_deploy", "mamba-deploy"])
def test_installed_command_tells_its_version(clean, as_module):
    command = (clean.bin / "python", "-m", "mamba_deploy") if as_module else (clean.bin / "mamba-deploy",)
    done = run(*command, "--version", cwd=clean.outside)
    assert PROJECT["version"] in done.stdout
    assert "mamba-deploy" in done.stdout


@pytest.mark.slow
def test_installed_package_leaks_no_top_level_module(clean):
    program = (
        "import importlib.util, json, mamba_deploy.exporters, mamba_deploy.plugins, mamba_deploy.runtime\n"
        "print(json.dumps([n for n in ('exporters', 'plugins', 'runtime', 'samples', 'tests')"
        " if importlib.util.find_spec(n)]))"
    )
    assert json.loads(clean.python("-c", program).stdout) == []


@pytest.mark.slow
def test_installed_package_reads_a_config_without_any_extra(clean):
    clean.python("-c", "import mamba_deploy, mamba_deploy.contract; mamba_deploy.MambaConfig")


@pytest.mark.slow
def test_export_without_its_extra_ends_with_the_pip_command(clean):
    checkpoint = clean.outside / "checkpoint"
    checkpoint.mkdir()
    config = {"d_model": 16, "n_layer": 1, "vocab_size": 32, "ssm_cfg": {}, "rms_norm": True}
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (checkpoint / "pytorch_model.bin").write_bytes(b"never read: torch comes first")
    done = clean.python("-m", "mamba_deploy", "export", checkpoint, "bundle", check=False)
    assert done.returncode == 1, done.stderr
    assert "error:" in done.stderr
    assert "pip install 'mamba-deploy[export]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (clean.outside / "bundle").exists()
