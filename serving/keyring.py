"""The keys that were made for this home's service: of each its role and its digest, in `keys/ring.json`. No key can be read from it.

In: a home, a role. Out: entries; a new key once, to whoever asked for it. Keys have 256 random bits, so that a bare SHA-256 hides them.
Several keys of a role are valid at once: a new one is handed out before the old one is revoked. A revoked one stays known, so that a role
whose keys were all revoked is not given a new one by itself. Never changes an entry but to revoke it.
"""

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from pipelines.errors import InputError, StoreError
from pipelines.private_file import replace_file

RING = "ring.json"


@dataclass(frozen=True)
class Entry:
    """One key. `copy`: it was generated at the first start, and a file beside the ring may hold it for this machine's own programs."""

    id: str
    role: str
    digest: str  # SHA-256, hexadecimal
    made: str  # ISO 8601, UTC
    revoked: str | None = None
    copy: bool = False


def digest(key: bytes) -> bytes:
    """What is kept of a key, and compared."""
    return hashlib.sha256(key).digest()


def entries(home: Path) -> tuple[Entry, ...]:
    """All of them, oldest first, the revoked ones too. Raises StoreError."""
    path = _path(home)
    try:
        return tuple(Entry(**entry) for entry in json.loads(path.read_bytes()))
    except FileNotFoundError:
        return ()
    except (ValueError, TypeError) as error:
        raise StoreError(f"keys: {path} is not a list of keys ({error}); restore it, or remove it to have new keys made") from error


def stamp(home: Path) -> tuple[int, int] | None:
    """Changes whenever the ring does; None where there is none."""
    try:
        status = _path(home).stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def made(role: str, key: str, *, at: datetime, copy: bool = False) -> Entry:
    """The entry of a new key."""
    return Entry(secrets.token_hex(4), role, digest(key.encode()).hex(), at.isoformat(timespec="seconds"), copy=copy)


def add(home: Path, role: str, *, at: datetime) -> tuple[Entry, str]:
    """A new key of the role beside those there are; its entry, and the key, which is nowhere else. Raises StoreError."""
    key = secrets.token_urlsafe(32)
    entry = made(role, key, at=at)
    with changing(home) as ring:
        ring.append(entry)
    return entry, key


def revoke(home: Path, one: str, *, at: datetime) -> Entry:
    """The key is valid no longer; its copy in the home, if there is one, goes. Raises InputError where no valid key has this id."""
    with changing(home) as ring:
        place = next((i for i, entry in enumerate(ring) if entry.id == one and not entry.revoked), None)
        if place is None:
            raise InputError(f"keys: no valid key has the id {one}; `rapport keys list` shows them")
        ring[place] = replace(ring[place], revoked=at.isoformat(timespec="seconds"))
    copy = copy_path(home, ring[place].role)
    if copy.exists() and digest(copy.read_bytes().strip()).hex() == ring[place].digest:
        copy.unlink()
    return ring[place]


def copy_path(home: Path, role: str) -> Path:
    """Where the first key of the role is kept for this machine's own programs."""
    return home / "keys" / f"{role}.key"


@contextmanager
def changing(home: Path) -> Iterator[list[Entry]]:
    """The entries, to be changed; written whole at the end of the block, by one process at a time. Raises StoreError."""
    path = _path(home)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ring = list(entries(home))
        before = tuple(ring)
        yield ring
        if tuple(ring) != before:
            write_private(path, json.dumps([asdict(entry) for entry in ring], indent=1).encode())


def write_private(path: Path, content: bytes) -> None:
    """Replace the file, for its owner's eyes only; whoever reads it finds the old content or the new. Raises StoreError."""
    try:
        replace_file(path, content, rights=0o600)
    except OSError as error:
        raise StoreError(f"keys: {path} could not be written ({error}); free space or mend its rights") from error


def _path(home: Path) -> Path:
    return home / "keys" / RING


def of_role(ring: Sequence[Entry], role: str) -> list[Entry]:
    """The role's entries, revoked ones too."""
    return [entry for entry in ring if entry.role == role]
