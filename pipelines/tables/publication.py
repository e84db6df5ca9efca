"""Several tables changed as one: all of them or none, whatever is killed when, and by one process at a time.

In: the data of tables of one home. Out: their new versions, in place. Each is written beside the current one first; a journal on
disk names them all; then the links are moved, and the journal goes. A journal that is found was left by a kill in between: what it
names is put in place before anybody changes a table again. Never leaves some tables new and others old for longer than that.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pyarrow as pa

from pipelines.errors import StoreError
from pipelines.private_file import sync
from pipelines.tables.declared import Table
from pipelines.tables.stored import Draft, draft, exists, files, folder

_WAIT_S = 900.0  # for another process that changes the tables: the longest that a large file takes
_JOURNAL = ".journal.json"
_MARK = "~"  # of versions that only the holder of the lock writes: one that is not in place was left by a kill

_held = threading.local()  # homes whose lock this thread has


class Changes:
    """The changes of one block of `together`. They can be seen when it ends."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._drafts: dict[str, Draft] = {}

    def write(self, table: Table, data: pa.Table | pd.DataFrame | Iterable[pa.RecordBatch]) -> int:
        """As `tables.write`; returns the rows written."""
        return self.replace(table, data, keep=())

    def append(self, table: Table, data: pa.Table | pd.DataFrame | Iterable[pa.RecordBatch]) -> int:
        """As `tables.append`; returns the rows added."""
        return self.replace(table, data, keep=files(self._home, table) if exists(self._home, table) else ())

    def replace(self, table: Table, data: pa.Table | pd.DataFrame | Iterable[pa.RecordBatch], *, keep: Sequence[Path]) -> int:
        """The files to `keep` of the current version, and `data`; returns the rows of `data`. A table is changed once in a block."""
        if table.name in self._drafts:
            raise ValueError(f"{table.name} is changed twice in one block")
        self._drafts[table.name] = made = draft(self._home, table, data, keep=keep, mark=_MARK)
        return made.rows

    def _publish(self) -> None:
        if not self._drafts:
            return
        for made in self._drafts.values():
            _sync(made.version)
        journal = self._home / "tables" / _JOURNAL
        fresh = journal.with_suffix(".tmp")
        with fresh.open("w") as file:
            json.dump({name: made.version.name for name, made in self._drafts.items()}, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(journal)
        sync(journal.parent)
        for made in self._drafts.values():
            made.publish()
        sync(journal.parent)
        journal.unlink()

    def _discard(self) -> None:
        for made in self._drafts.values():
            made.discard()


@contextmanager
def together(home: Path) -> Iterator[Changes]:
    """Change several tables: `with together(home) as change: change.write(...)`. Nothing is changed if the block raises.

    On disk when the block ends. Holds the lock of `locked`, so that what is read in the block is what is changed.
    Raises StoreError where the disk refuses.
    """
    with locked(home):
        changes = Changes(home)
        try:
            yield changes
        except BaseException:
            changes._discard()
            raise
        try:
            changes._publish()
        except OSError as error:
            if not (home / "tables" / _JOURNAL).exists():  # else they are as good as in place: see `recover`
                changes._discard()
            raise StoreError(
                f"tables: {home / 'tables'} could not be written ({error.strerror or error}); free space or fix its rights, then run again"
            ) from error


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Let no other process or thread change the home's tables by `together` meanwhile; finishes what a killed one had begun.

    For whoever reads tables and writes what follows from them. May be nested. Raises StoreError after a quarter of an hour.
    """
    mine = _held.__dict__.setdefault("homes", {})
    place = str(home.resolve())
    if place in mine:
        yield
        return
    try:
        (home / "tables").mkdir(parents=True, exist_ok=True)
        file = (home / "tables" / ".lock").open("w")
    except OSError as error:
        raise StoreError(f"tables: {home} could not be written ({error.strerror}); set RAPPORT_HOME to a folder that can") from error
    with file:
        _wait_for(file.fileno(), home)
        mine[place] = True
        try:
            _recover(home)
            yield
        finally:
            del mine[place]


@contextmanager
def snapshot(home: Path, some: Iterable[Table]) -> Iterator[Path]:
    """A home that holds these tables as they are at this moment and goes with the block: links to their files, which outlive a change.

    For whoever reads for long, or reads several tables that belong together. Its folder is one that `sweep` removes, should it be killed.
    """
    with locked(home):
        base = home / "tables" / f".snapshot-{uuid.uuid4().hex[:12]}"
        try:
            for table in some:
                if exists(home, table):
                    _link(files(home, table), folder(home, table).resolve(), base / "tables" / table.name)
        except OSError as error:
            shutil.rmtree(base, ignore_errors=True)
            raise StoreError(
                f"tables: {base} could not be written ({error.strerror}); free space or fix its rights, then run again"
            ) from error
    try:
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


def recover(home: Path) -> None:
    """Put in place what a killed `together` had written and not all of which can be seen. Nothing to do: costs a look at one file."""
    if (home / "tables" / _JOURNAL).exists():
        with locked(home):
            pass


def _recover(home: Path) -> None:
    base = home / "tables"
    journal = base / _JOURNAL
    named = set()
    if journal.exists():
        for name, version in json.loads(journal.read_text()).items():
            named.add(version)
            Draft(base / name, base / version, 0).publish()
        sync(base)
        journal.unlink()
    current = {path.resolve().name for path in base.iterdir() if path.is_symlink()}
    for path in base.iterdir():
        if path.name.startswith(".") and _MARK in path.name and path.is_dir() and path.name not in current | named:
            shutil.rmtree(path, ignore_errors=True)


def _link(paths: Iterable[Path], source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in paths:
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        os.link(path, place)


def _wait_for(handle: int, home: Path) -> None:
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES) or time.monotonic() > until:
                raise StoreError(f"tables: another run has been changing {home / 'tables'} for too long; wait for it, or end it") from error
            time.sleep(0.02)


def _sync(version: Path) -> None:
    for path in version.rglob("*"):
        sync(path)
    sync(version)
