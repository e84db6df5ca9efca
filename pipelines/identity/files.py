"""Which file holds the links of a worker. After each ingest it is another one: made whole beside the one before, then put in its place.

In: a home, and a worker's number. Out: paths in `identity/` of the home. Only who is `alone` puts a file in place, removes one, or writes
to another's. Reads and writes no file itself.
"""

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import StoreError

_NAME = re.compile(r"online(?:-(\d+))?(?:\.(\d+))?\.db")


@contextmanager
def alone(home: Path, *, waits: bool = True) -> Iterator[bool]:
    """Whether nobody else changes which files there are while the block runs. Raises StoreError where the folder cannot be written."""
    folder = _folder(home)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "online.lock").open("w")
    except OSError as error:
        raise StoreError(f"identity: {folder} could not be written ({error}); free space or mend its rights") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def newest(home: Path) -> dict[int, Path]:
    """Of each worker that ever was, the file that holds."""
    return {worker: max(numbered)[1] for worker, numbered in _found(home).items()}


def first(home: Path, worker: int) -> Path:
    """Of a worker that has none."""
    return _folder(home) / f"{_stem(worker)}.db"


def following(home: Path, worker: int) -> Path:
    """The one that is to be put in place next."""
    there = _found(home).get(worker)
    return _folder(home) / f"{_stem(worker)}.{max(there)[0] + 1}.db" if there else first(home, worker)


def unfinished(home: Path, worker: int) -> Path:
    """The one that is being made."""
    return _folder(home) / f"{_stem(worker)}.part"


def tidy(home: Path, worker: int) -> None:
    """Remove what is unfinished, and what another one has taken the place of."""
    unfinished(home, worker).unlink(missing_ok=True)
    for _, path in sorted(_found(home).get(worker, []))[:-1]:
        remove(path)


def remove(path: Path) -> None:
    """The file, and what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _found(home: Path) -> dict[int, list[tuple[int, Path]]]:
    """Of each worker its files, with the number that each was put in place as."""
    found: dict[int, list[tuple[int, Path]]] = {}
    for path in _folder(home).glob("online*.db"):
        if named := _NAME.fullmatch(path.name):
            worker, number = (int(text or 0) for text in named.groups())
            found.setdefault(worker, []).append((number, path))
    return found


def _folder(home: Path) -> Path:
    return home / "identity"


def _stem(worker: int) -> str:
    return f"online-{worker}" if worker else "online"
