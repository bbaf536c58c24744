"""The output directory: what `export` writes and every other command reads.

``manifest.json`` names the format, the tools, the dtypes, the contract, and the sha256 of each other file. The
directory appears under its name whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamba_deploy.config import MambaConfig
from mamba_deploy.contract import Contract
from mamba_deploy.errors import BundleError

__all__ = [
    "CONFIG",
    "ENGINES",
    "FORMAT_VERSION",
    "LOWERED",
    "MANIFEST",
    "PORTABLE",
    "REFERENCE",
    "TOKENIZER",
    "WEIGHTS",
    "Bundle",
    "add_engine",
    "bound_weight_bytes",
    "write_bundle",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
PORTABLE = "model.onnx"
LOWERED = "model.cpu.onnx"
WEIGHTS = "model.onnx.data"
REFERENCE = "reference.safetensors"
ENGINES = {"tensorrt": "model.tensorrt.engine", "tensorrt-rtx": "model.tensorrt-rtx.engine"}  # by backend


@dataclass(frozen=True)
class Bundle:
    """An opened output directory, its manifest and config checked."""

    path: Path
    config: MambaConfig
    contract: Contract
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the manifest and the config.

        Raises:
            BundleError: The directory or its manifest is missing, damaged, or of another format version, or the
                config does not match its hash.
        """
        path = Path(path).expanduser()
        manifest = _read_manifest(path)
        config = MambaConfig.from_dict(_read_json(_checked(path, manifest, CONFIG)))
        dtypes = manifest["dtypes"]
        contract = Contract.of(
            config,
            dtype=dtypes["activation"],
            state_dtype=dtypes["state"],
            all_logits=manifest["logits"] == "all",
        )
        if contract.to_list() != manifest["contract"]:
            raise BundleError(f"{path / MANIFEST}: the contract does not fit {CONFIG}", hint="export the model again")
        return cls(path, config, contract, manifest)

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files, after comparing it with its hash.

        Raises:
            BundleError: The bundle has no such file, or it is not what was written.
        """
        return _checked(self.path, self.manifest, name)

    def engine(self, backend: str) -> Mapping[str, Any]:
        """What the manifest says of the engine that was built for a backend.

        Raises:
            BundleError: None was built.
        """
        found = self.manifest.get("engines", {}).get(backend)
        if found is None:
            other = "" if backend == "tensorrt" else f" --backend {backend}"
            raise BundleError(f"{self.path} has no engine for {backend}", hint=f"mamba-deploy build {self.path}{other}")
        return found

    def has(self, name: str) -> bool:
        """Whether the manifest lists the file."""
        return name in self.manifest["files"]


def _read_manifest(path: Path) -> dict[str, Any]:
    if not (path / MANIFEST).is_file():
        what = "there is no directory" if not path.exists() else f"there is no {MANIFEST} in"
        raise BundleError(f"{what} {path}", hint="give a directory that 'mamba-deploy export' wrote")
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{path / MANIFEST} is of format version {manifest.get('format_version')!r}; this program reads "
            f"{FORMAT_VERSION}",
            hint="export the model again with this version of mamba-deploy",
        )
    missing = [key for key in ("dtypes", "logits", "contract", "files") if key not in manifest]
    if missing:
        raise BundleError(f"{path / MANIFEST} lacks {', '.join(missing)}", hint="export the model again")
    dtypes, files = manifest["dtypes"], manifest["files"]
    if not (
        isinstance(dtypes, dict)
        and {"activation", "state"} <= dtypes.keys()
        and isinstance(files, dict)
        and all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values())
    ):
        raise BundleError(f"{path / MANIFEST}: dtypes or files are damaged", hint="export the model again")
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}", hint="export the model again") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path} does not hold a JSON object", hint="export the model again")
    return value


def _checked(directory: Path, manifest: Mapping[str, Any], name: str) -> Path:
    listed = manifest["files"].get(name)
    if listed is None:
        raise BundleError(f"{directory} has no {name}", hint="export the model again")
    path = directory / name
    if not path.is_file():
        raise BundleError(f"{path} is missing", hint="copy the whole directory, or make it again")
    size = path.stat().st_size
    made, again = ("built", "build the engine") if name in ENGINES.values() else ("exported", "export the model")
    if size != listed["bytes"]:
        raise BundleError(
            f"{path} has {size} bytes where the manifest says {listed['bytes']}",
            hint=f"the copy may be incomplete; copy it again, or {again} again",
        )
    if sha256(path) != listed["sha256"]:
        raise BundleError(
            f"{path} is not the file that was {made}: its sha256 differs from the manifest's",
            hint=f"the file was damaged or changed; copy it again, or {again} again",
        )
    return path


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def write_bundle(
    path: str | Path,
    config: MambaConfig,
    contract: Contract,
    tools: Mapping[str, str],
    *,
    force: bool = False,
) -> Iterator[Path]:
    """Give a fresh temporary directory to fill; when the block ends, it becomes the bundle.

    The temporary directory is a sibling of ``path`` (of what it points to, if it is a link), so the last step is a
    rename. If the block raises, or is interrupted, it is removed and ``path`` is as it was. With ``force`` an existing
    directory is replaced; files in it that no bundle owns are kept.

    Args:
        path: The bundle's directory.
        config: Written as ``config.json``.
        contract: Written into the manifest.
        tools: Names and versions of what made the files.
        force: Replace a directory that is not empty.

    Raises:
        BundleError: The directory exists and is not empty, is a file, or cannot be written.
    """
    path = Path(path).expanduser().resolve()
    refuse_to_overwrite(path, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise BundleError(f"{path} cannot be written: {error}", hint="choose another output directory") from error
    try:
        work.chmod(0o777 & ~_umask())
        yield work
        (work / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(work.iterdir())}
        manifest = {
            "format_version": FORMAT_VERSION,
            "tools": dict(tools),
            "dtypes": {"activation": contract.dtype, "state": contract.state_dtype},
            "logits": "all" if contract.all_logits else "last",
            "files": files,
            "contract": contract.to_list(),
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _put_in_place(work, path)
    except OSError as error:
        raise BundleError(
            f"{path} could not be written: {error}", hint="check the free space and the permissions there"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def add_engine(bundle: Bundle, backend: str, made: Path, facts: Mapping[str, Any]) -> Bundle:
    """Put an engine into a bundle, in place of one for the same backend.

    Args:
        bundle: As it was when the build began.
        backend: A key of :data:`ENGINES`.
        made: The engine, in the bundle's file system; it is moved.
        facts: What the engine hangs on, for the manifest.

    Returns:
        The bundle, opened again.

    Raises:
        BundleError: The directory cannot be written, or was changed by another program meanwhile.
    """
    name = ENGINES[backend]
    if _read_manifest(bundle.path) != bundle.manifest:
        raise BundleError(f"{bundle.path} was changed during the build", hint="build again")
    manifest = dict(bundle.manifest)
    manifest["files"] = {**manifest["files"], name: {"bytes": made.stat().st_size, "sha256": sha256(made)}}
    manifest["engines"] = {**manifest.get("engines", {}), backend: dict(facts)}
    place, written, before = bundle.path / name, made.with_name(MANIFEST), made.with_name("before")
    try:
        written.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if place.exists():
            place.replace(before)
        made.replace(place)
        written.replace(bundle.path / MANIFEST)
    except BaseException as error:  # an interrupt too
        with contextlib.suppress(OSError):
            if written.exists():  # not in place yet: so the engine is to be the one before
                if before.exists():
                    before.replace(place)
                elif not made.exists():
                    place.unlink()
        if not isinstance(error, OSError):
            raise
        raise BundleError(
            f"{bundle.path} could not be written: {error}", hint="check the free space and the permissions there"
        ) from error
    return Bundle.open(bundle.path)


def bound_weight_bytes(facts: Mapping[str, Any]) -> int:
    """Bytes of the weights that an engine is given at opening; 0: all are inside."""
    return sum(length for _, length in facts["weights"].values())


def refuse_to_overwrite(path: Path, *, force: bool) -> None:
    """Raise before any work is done if a bundle may not be written at ``path``.

    Raises:
        BundleError: It is a file, or a directory that is not empty and ``force`` is not given, or it cannot be read.
    """
    try:
        in_the_way = path.exists() and not path.is_dir()
        filled = path.is_dir() and any(path.iterdir())
    except OSError as error:
        raise BundleError(f"{path} cannot be written: {error}", hint="choose another output directory") from error
    if in_the_way:
        raise BundleError(f"{path} exists and is not a directory", hint="choose another output directory")
    if filled and not force:
        raise BundleError(f"{path} is not empty", hint="choose another directory, or pass --force to replace it")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _put_in_place(work: Path, path: Path) -> None:
    if not path.exists():
        work.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        path.rename(aside / path.name)
        work.rename(path)
    finally:
        try:
            _settle(aside, path)
        except BaseException:  # an interrupt: what it broke off is done before it is passed on
            _settle(aside, path)
            raise


def _settle(aside: Path, path: Path) -> None:
    """After two renames, or one, or none: the old directory goes back if nothing stands in its place; else files that
    no bundle owns are carried over from it. If that fails, what is aside stays there.
    """
    old = aside / path.name
    if old.exists() and not path.exists():
        old.rename(path)
    elif old.exists():
        owned = _owned_names(old)
        for entry in list(old.iterdir()):
            if entry.name not in owned and not os.path.lexists(path / entry.name):
                entry.rename(path / entry.name)
    shutil.rmtree(aside, ignore_errors=True)


def _owned_names(path: Path) -> set[str]:
    """Names of a directory that a bundle put there: what its manifest lists."""
    try:
        files = _read_json(path / MANIFEST).get("files")
    except BundleError:
        files = None
    return {MANIFEST, *(files if isinstance(files, dict) else {})}
