"""What the gate said of each model version, kept for people, and the versions as they are shown to them.

In a file beside the versions. Nothing is decided by it later, and it is not signed; never changes a version or a champion.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines import registry
from pipelines.errors import RegistryError


def record(home: Path, name: str, version: int, told: Mapping[str, Any]) -> None:
    """Keep what the gate said of a version: `is_champion`, `why`, `checks`, as JSON values."""
    path = _path(home, name)
    content = {str(number): said for number, said in {**read(home, name), version: dict(told)}.items()}
    fresh = path.with_name(f".{path.name}.fresh")
    fresh.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
    fresh.replace(path)


def read(home: Path, name: str) -> dict[int, dict[str, Any]]:
    """By version what the gate said when it was trained; nothing of one that it never saw. Raises RegistryError if it is unreadable."""
    path = _path(home, name)
    if not path.exists():
        return {}
    try:
        return {int(number): dict(said) for number, said in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise RegistryError(f"registry: {path} is not the JSON it was written as ({error}); remove it, or train again") from error


def said(home: Path, name: str, version: int) -> str:
    """One sentence of what the gate said of this version."""
    told = read(home, name).get(version)
    if told is None:
        return "never asked"
    return f"{'passed' if told['is_champion'] else 'refused'}: {told['why']}"


def overview(home: Path) -> list[dict[str, Any]]:
    """One row for each stored version, newest last: model, version, role, metric, value, as_of, ladder, gate, checks; a damaged
    one says so.

    A model without any version has one row that says why.
    """
    rows: list[dict[str, Any]] = []
    nothing: dict[str, Any] = {"version": None, "role": "none", "metric": None, "value": None, "as_of": None, "ladder": [], "checks": []}
    for name, entry in sorted(registry.champions(home).items()):
        numbers = registry.versions(home, name)
        if not numbers:
            rows.append({"model": name, **nothing, "gate": f"not trainable, because {entry.get('why')}"})
        for version in numbers:
            row = {"model": name, **nothing, "version": version, "role": _role(entry, version)}
            try:
                manifest = registry.load_version(home, name, version).manifest
                metric = manifest.get("metric")
                row |= {"metric": metric, "as_of": manifest.get("as_of"), "ladder": manifest.get("ladder", [])}
                row["value"] = manifest.get("metrics", {}).get(str(metric).replace("@", "_at_"))
            except RegistryError as error:
                row["role"] = f"damaged: {error}"
            rows.append({**row, "gate": said(home, name, version), "checks": read(home, name).get(version, {}).get("checks", [])})
    return rows


def _path(home: Path, name: str) -> Path:
    return home / "models" / name / "gate.json"


def _role(entry: Mapping[str, Any], version: int) -> str:
    if entry.get("version") == version:
        return "champion"
    if version in entry.get("rolled_back", []):
        return "rolled back"
    return "former champion" if version in entry.get("history", []) else "challenger"
