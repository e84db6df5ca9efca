"""A secret of this home in a file of its own: made once, whoever comes first, and readable by its owner alone.

In: a path, a way to make the secret. Out: the secret. Never replaces one that is there.
"""

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def kept(path: Path, make: Callable[[], str]) -> str:
    """The secret in the file, which is made where there is none. Raises OSError."""
    if not path.exists():
        _write_once(path, make())
    return path.read_text(encoding="ascii").strip()


def _write_once(path: Path, secret: str) -> None:
    """Written whole before it gets its name, and never over another's: two first runs agree on one secret."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(fresh, path)
    except FileExistsError:
        pass  # another run was first; its secret is the home's
    finally:
        fresh.unlink()
