"""The content of what a step reads, as one word."""

import hashlib
from pathlib import Path

from pipelines import tables
from pipelines.tables import Table


def content_of(item: Table | str | Path, home: Path) -> str:
    """SHA-256 of what a step reads; a fixed word where it does not exist."""
    if isinstance(item, Table):
        return tables.content_hash(home, item) if tables.exists(home, item) else "absent"
    path = home / item
    if path.is_dir():
        inside = (content_of(child, home) for child in sorted(path.rglob("*")) if child.is_file())
        return hashlib.sha256("".join(inside).encode()).hexdigest()
    if not path.is_file():
        return "absent"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
