"""Which version of a model scores beside the champion without answering: `models/challengers.json`.

In: a model and a sound version, or none. Out: entries as `registry.champions` has them. Never changes who answers.
"""

import json
from pathlib import Path
from typing import Any

from models import tasks
from pipelines import registry
from pipelines.errors import RegistryError
from pipelines.private_file import replace_file


def challengers(home: Path) -> dict[str, dict[str, Any]]:
    """By model: `version`, None once it was taken back. Raises RegistryError where the file cannot be read."""
    path = _path(home)
    try:
        entries: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): dict(entry) for name, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RegistryError(
            f"registry: {path} is not the JSON it was written as ({error}); remove it and name challengers again"
        ) from error


def challenge(home: Path, name: str, version: int | None) -> None:
    """Make `version` the challenger of the champion; None: there is none any more.

    Raises RegistryError if it is not sound, or the model does not score: lists are not compared yet.
    """
    if name not in tasks.declared():
        raise RegistryError(f"registry: {name} does not score customers; expected one of {', '.join(sorted(tasks.declared()))}")
    if version is not None:
        registry.load_version(home, name, version)
    path = _path(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {**challengers(home), name: {"version": version}}
    replace_file(path, json.dumps(entries, indent=1, sort_keys=True).encode())


def _path(home: Path) -> Path:
    return home / "models" / "challengers.json"
