"""Which version of each model was used last in this home, for a worker that starts where the champions cannot be read, or are unsound.

In: the versions in use. Out: the same, from `serving/last_good.json`. A hint and nothing more: whoever loads one verifies it as any other.
"""

import json
import logging
from pathlib import Path

from pipelines.private_file import replace_file

log = logging.getLogger("rapport.serving")


def note(home: Path, versions: dict[str, int]) -> None:
    """Keep these in place of what was kept of the same models. A home that cannot be written is as good as one that was never used."""
    path, before = _path(home), read(home)
    if not versions or before == (after := before | versions):
        return
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, json.dumps(after, sort_keys=True).encode())
    except OSError as error:
        log.warning("the versions in use could not be noted in %s: %s", path.name, error.strerror)


def read(home: Path) -> dict[str, int]:
    """By model; empty where nothing was noted that can be read."""
    try:
        return {str(name): int(version) for name, version in json.loads(_path(home).read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _path(home: Path) -> Path:
    return home / "serving" / "last_good.json"
