"""Bytes of a person in any file of the home -> where they are, and out of the files that nothing else can clean.

In: byte strings. Out: the files that hold one. Databases are written anew, lines of text are blotted out in place; what is neither
is told, never changed. Never follows a link out of the home.
"""

import mmap
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from pipelines.errors import StoreError
from pipelines.private_file import sweep

TEXTS = frozenset({".css", ".csv", ".html", ".json", ".jsonl", ".log", ".md", ".out", ".txt", ".yaml", ".yml"})
_SQLITE = b"SQLite format 3\0"
_BESIDE = ("-wal", "-shm", "-journal")  # what SQLite keeps next to a file
_BLOT = b"*"
_BUSY_S = 20.0
_CHUNK = 1 << 24


def holding(home: Path, needles: Sequence[bytes], *, outside: Iterable[str] = ()) -> list[Path]:
    """The files of the home that hold one of the byte strings, sorted. `outside`: folders at its top that are not looked into."""
    return [path for path in _files(home, outside) if _is_in(path, lambda content: any(content.find(one) >= 0 for one in needles))]


def naming(home: Path, pattern: re.Pattern[bytes], forms: Sequence[bytes], *, outside: Iterable[str] = ()) -> list[Path]:
    """The files of text in which the pattern is found, sorted. `forms`: of which it finds one, in any case; looked for first, as faster."""
    lowered = sorted({form.lower() for form in forms})
    texts = [path for path in _files(home, outside) if path.suffix in TEXTS and _is_in(path, lambda content: _has_any(content, lowered))]
    return [path for path in texts if _is_in(path, lambda content: pattern.search(content) is not None)]


def clean(path: Path, pattern: re.Pattern[bytes]) -> bool:
    """Take deleted bytes out of a database, or what the pattern finds out of a text; False for a file of another kind."""
    base = next((path.with_name(path.name.removesuffix(end)) for end in _BESIDE if path.name.endswith(end)), path)
    if is_database(base):
        rewrite_database(base)
        return True
    if path.suffix not in TEXTS:
        return False
    _blot(path, pattern)
    return True


def is_database(path: Path) -> bool:
    """Whether it is a file of SQLite's."""
    try:
        with path.open("rb") as file:
            return file.read(len(_SQLITE)) == _SQLITE
    except FileNotFoundError:
        return False


def rewrite_database(path: Path) -> None:
    """Leave only what its tables hold: pages that were split keep copies of deleted rows. Raises StoreError where it is in use."""
    try:
        with closing(sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)) as db:
            db.execute("PRAGMA secure_delete = ON").fetchall()
            sweep(db, path, room="erasure")
    except sqlite3.Error as error:
        raise StoreError(f"erasure: {path} could not be written anew ({error}); free space, then run the erasure again") from error


def _is_in(path: Path, look: Callable[[mmap.mmap], bool]) -> bool:
    """What `look` says of the file; a file that goes away meanwhile holds nothing."""
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return look(content)
    except FileNotFoundError:
        return False


def _has_any(content: mmap.mmap, lowered: Sequence[bytes]) -> bool:
    overlap = max(map(len, lowered), default=1)
    for start in range(0, len(content), _CHUNK):
        chunk = content[start : start + _CHUNK + overlap].lower()
        if any(form in chunk for form in lowered):
            return True
    return False


def _blot(path: Path, pattern: re.Pattern[bytes]) -> None:
    """In place and at the same length: whoever writes to the file goes on where they were."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        for start, end in [match.span() for match in pattern.finditer(content)]:
            content[start:end] = _BLOT * (end - start)
        content.flush()


def _files(home: Path, outside: Iterable[str]) -> Iterator[Path]:
    left_out = {home / name for name in outside}
    files = (path for path in sorted(home.rglob("*")) if path.is_file() and not path.is_symlink())
    return (path for path in files if left_out.isdisjoint(path.parents))
