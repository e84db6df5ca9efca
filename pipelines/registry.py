"""Model versions as signed folders of native files, and which of them is the champion.

A version `models/NAME/N/` holds what the learner saved and `manifest.json`: its description, the SHA-256 of every file and
an HMAC over all of it with this home's key. Nothing is handed to a native loader before every byte was checked; a damaged
model file does not fail there, it crashes the process or changes scores. Reading never needs MLflow.
"""

import hashlib
import hmac
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipelines.errors import RegistryError, StoreError
from pipelines.private_file import replace_file, sync
from pipelines.signing import signing_key

MANIFEST = "manifest.json"


class Learner(Protocol):
    """What can be registered: it saves itself as native files."""

    def save(self, folder: Path) -> None:
        """Write everything that `load` needs into `folder`."""


@dataclass(frozen=True)
class Champion:
    """A verified version: every file in `folder` is what was registered."""

    name: str
    version: int
    folder: Path
    manifest: dict[str, Any]


def register(
    home: Path,
    name: str,
    *,
    learner: Learner,
    manifest: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray] | None = None,
    beside: Mapping[str, Learner] | None = None,
) -> int:
    """Store a new version and return its number. It serves nobody before `promote`.

    arrays: saved beside the learner's files as NAME.npy; texts as fixed-width unicode. beside: further learners, each in a folder of its
    name. manifest: JSON values. A manifest with a `training_key` that some sound version already carries is that version: an
    interrupted run registers once.
    """
    known = find(home, name, training_key=manifest["training_key"]) if "training_key" in manifest else None
    if known is not None:
        return known
    staging = _folder(home, name) / f".staging-{uuid.uuid4().hex[:12]}"
    staging.mkdir(parents=True)
    try:
        learner.save(staging)
        for label, values in (arrays or {}).items():
            _save_array(staging, label, values)
        for label, other in (beside or {}).items():
            other.save(staging / label)
        return _publish(home, name, staging, dict(manifest))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def amend(
    home: Path, name: str, version: int, *, why: str, change: Callable[[Path, dict[str, Any]], Mapping[str, Any] | None]
) -> Champion | None:
    """The version with some of its content changed, under its old number and signed anew; None where nothing had to be changed.

    change: gets a copy of the folder, to change files in, and the manifest; returns the manifest's values that change, None for
    leave all as it is. The manifest's `amendments` tell each `why`. Whoever serves the champion sees `amended` count up in
    `champions`. Raises RegistryError if the version is not sound.
    """
    folder = _folder(home, name) / str(version)
    aside = folder.with_name(f".amended-{version}")
    if aside.exists() and not folder.exists():
        aside.rename(folder)  # an amendment was killed between its two moves
    shutil.rmtree(aside, ignore_errors=True)
    held = load_version(home, name, version)
    staging = folder.with_name(f".staging-{uuid.uuid4().hex[:12]}")
    try:
        shutil.copytree(folder, staging)
        values = change(staging, held.manifest)
        if values is not None:
            (staging / MANIFEST).unlink()
            amendments = [*held.manifest.get("amendments", []), {"why": why}]
            _sign(home, staging, {**held.manifest, **values, "amendments": amendments, "name": name, "version": version})
            folder.rename(aside)
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)
    amended, entry = load_version(home, name, version), champions(home).get(name, {})
    told = {**entry, "amended": len(amended.manifest.get("amendments", []))}
    if entry.get("version") == version and told != {"amended": 0, **entry}:
        _set_champion(home, name, told)
    return None if values is None else amended


def versions(home: Path, name: str) -> tuple[int, ...]:
    """Numbers of the stored versions, ascending; sound or not."""
    base = _folder(home, name)
    return tuple(sorted(int(p.name) for p in base.iterdir() if p.name.isdecimal())) if base.is_dir() else ()


def find(home: Path, name: str, *, training_key: str) -> int | None:
    """The newest sound version whose manifest carries `training_key`."""
    for version in reversed(versions(home, name)):
        try:
            if load_version(home, name, version).manifest.get("training_key") == training_key:
                return version
        except RegistryError:
            continue
    return None


def load_version(home: Path, name: str, version: int) -> Champion:
    """The version with its manifest, verified. Raises RegistryError if it is unknown, damaged or not signed by this home."""
    folder = _folder(home, name) / str(version)
    if type(version) is not int or not folder.is_dir():
        raise RegistryError(f"registry: {name} has no version {version} under {folder.parent}; {_known(home, name)}")
    manifest = _read_manifest(home, folder)
    if (manifest.get("name"), manifest.get("version")) != (name, version):
        raise RegistryError(f"registry: {folder} holds {manifest.get('name')} version {manifest.get('version')}; it was moved, restore it")
    _check_files(folder, manifest["files"])
    return Champion(name, version, folder, manifest)


def load_champion(home: Path, name: str) -> Champion:
    """The champion's version, verified. Raises RegistryError if there is none, or it is damaged or not signed by this home."""
    entry = champions(home).get(name, {})
    if entry.get("version") is None:
        why = f" ({entry['why']})" if entry.get("why") else ""
        raise RegistryError(f"registry: {name} has no champion under {home / 'models'}{why}; train it, or promote a version")
    return load_version(home, name, entry["version"])


def champions(home: Path) -> dict[str, dict[str, Any]]:
    """By model: `version` (None: not trainable), `previous`, and where known `why`, `prior`, `history`, `rolled_back`."""
    path = _champions_path(home)
    if not path.exists():
        return {}
    try:
        entries: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): dict(entry) for name, entry in entries.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise RegistryError(f"registry: {path} is not the JSON it was written as ({error}); restore it, or promote again") from error


def promote(home: Path, name: str, version: int, *, why: str = "promoted by name") -> None:
    """Make `version` the champion, in one replacement of `champions.json`. Raises RegistryError if it is not sound."""
    load_version(home, name, version)
    entry = champions(home).get(name, {})
    past = [v for v in entry.get("history", []) if v != version]
    refused = [v for v in entry.get("rolled_back", []) if v != version]
    _set_champion(home, name, _entry([*past, version], why=why, rolled_back=refused))


def rollback(home: Path, name: str) -> int:
    """Make the previous champion the champion again; returns its number. What was rolled back is not promoted by training.

    Raises RegistryError if there is no previous one, or it is not sound.
    """
    entry = champions(home).get(name, {})
    past = entry.get("history", [])
    if len(past) < 2:
        now = f"before version {entry['version']}" if "version" in entry else "yet"
        raise RegistryError(f"registry: {name} has no champion {now}; {_known(home, name)}; promote one by name")
    load_version(home, name, past[-2])
    refused = [*(v for v in entry.get("rolled_back", []) if v != past[-1]), past[-1]]
    _set_champion(home, name, _entry(past[:-1], why=f"version {past[-1]} was rolled back", rolled_back=refused))
    return int(past[-2])


def mark_untrainable(home: Path, name: str, why: str, prior: float | None = None) -> None:
    """Record why the newest data cannot train `name`. A champion trained earlier stays: it is better than none."""
    entry = champions(home).get(name) or _entry([], why=why, rolled_back=[])
    _set_champion(home, name, {**entry, "why": why, "prior": prior})


# -- private -----------------------------------------------------------------------------------------------------------


def _folder(home: Path, name: str) -> Path:
    if not name.isidentifier():
        raise RegistryError(f"registry: a model's name is letters, digits and underscores, not {name!r}")
    return home / "models" / name


def _known(home: Path, name: str) -> str:
    """Which versions there are, in a sentence."""
    return f"it has {', '.join(map(str, versions(home, name))) or 'none, so train it first'}"


def _champions_path(home: Path) -> Path:
    return home / "models" / "champions.json"


def _entry(past: list[int], *, why: str, rolled_back: list[int]) -> dict[str, Any]:
    return {
        "version": past[-1] if past else None,
        "previous": past[-2] if len(past) > 1 else None,
        "why": why,
        "history": past,
        "rolled_back": rolled_back,
    }


def _set_champion(home: Path, name: str, entry: dict[str, Any]) -> None:
    path = _champions_path(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**champions(home), name: entry}, indent=1, sort_keys=True)
    replace_file(path, content.encode())


def _save_array(folder: Path, label: str, values: np.ndarray) -> None:
    path = folder / f"{label}.npy"
    if path.exists():
        raise RegistryError(f"registry: the learner already saved {path.name}; give the array another name")
    array = np.asarray(values)
    np.save(path, array.astype(np.str_) if array.dtype == object else array, allow_pickle=False)


def _publish(home: Path, name: str, staging: Path, manifest: dict[str, Any]) -> int:
    """Number, describe and sign the staged files, then move them in place; the next number if another run took this one."""
    while True:
        version = max(versions(home, name), default=0) + 1
        _sign(home, staging, {**manifest, "name": name, "version": version})
        try:
            staging.rename(_folder(home, name) / str(version))
        except OSError:
            if version not in versions(home, name):
                raise
            continue
        return version


def _sign(home: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of what lies in the folder; all of it is on disk then."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
    files = {_relative(path, folder): _digest(path) for path in _files(folder)}
    unsigned = {**json.loads(json.dumps(manifest, allow_nan=False)), "files": files}
    replace_file(folder / MANIFEST, _signed(_key(home, create=True), unsigned))


def _read_manifest(home: Path, folder: Path) -> dict[str, Any]:
    """The manifest, its signature checked. Bytes other than those that were signed are refused, even in the white space."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        unsigned = {key: value for key, value in manifest.items() if key != "signature"}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise RegistryError(f"registry: {path} was expected to be a signed manifest and cannot be read ({error}); train again") from error
    if not hmac.compare_digest(content, _signed(_key(home), unsigned)):
        raise RegistryError(f"registry: {path} is not what this home signed; it was changed, or comes from another home; train again")
    return unsigned


def _check_files(folder: Path, expected: Mapping[str, str]) -> None:
    found = {_relative(path, folder): path for path in _files(folder)}
    if set(found) != set(expected):
        odd = sorted(set(found) ^ set(expected))
        raise RegistryError(f"registry: {folder} should hold {len(expected)} files; missing or foreign: {odd}; restore, or train again")
    for name, path in found.items():
        if path.is_symlink() or not hmac.compare_digest(_digest(path), expected[name]):
            raise RegistryError(f"registry: {path} is not the file that was registered; restore it, or train again")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if (path.is_symlink() or not path.is_dir()) and path != folder / MANIFEST)


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _signed(key: bytes, unsigned: Mapping[str, Any]) -> bytes:
    """The one way to write this manifest: canonical JSON with the signature of its content."""
    canonical = json.dumps(unsigned, sort_keys=True, separators=(",", ":")).encode()
    signature = hmac.new(key, canonical, hashlib.sha256).hexdigest()
    return json.dumps({**unsigned, "signature": signature}, sort_keys=True, indent=1).encode()


def _key(home: Path, *, create: bool = False) -> bytes:
    try:
        return signing_key(home, create=create)
    except StoreError as error:
        raise RegistryError(f"registry: {error}, or train again") from error
