"""A home for a while: a folder of one's own that nobody else may look into, gone at the end, and gone too where its owner is killed.

In: nothing, or a home of whose people some are taken over. Out: a folder. Sealed by a vault of its own. Never changes the home.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables
from pipelines.settings import OnlineSettings, Settings
from pipelines.tables import Table
from pipelines.vault import IDENTIFIERS

PREFIX = "rapport-parity-"
# Reads until the other end of the pipe is closed, which the kernel does for whoever is killed.
_SWEEP = "import shutil, sys; sys.stdin.buffer.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"
_OF_CUSTOMERS = (
    tables.EVENTS, tables.IDENTITIES, tables.CONSENTS, tables.CUSTOMER_CONSENT, tables.CUSTOMER_PROFILE,
)  # fmt: skip


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder with the rights of its owner alone."""
    made = Path(tempfile.mkdtemp(prefix=PREFIX))
    # in a session of its own: an interrupt of the terminal is not for it
    sweeper = subprocess.Popen([sys.executable, "-IS", "-c", _SWEEP, str(made)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield made
    finally:
        sweeper.communicate()
        shutil.rmtree(made, ignore_errors=True)


def settings_of(settings: Settings, home: Path) -> Settings:
    """The same settings for a scratch home: what is now is told it, its keys are its own, and its stores are files below it."""
    own = {"home": home, "as_of": None, "master_key": None, "online": OnlineSettings()}
    return settings.model_copy(update=own)


def take_over(home: Path, to: Path, customers: Sequence[str]) -> int:
    """Copy what the tables of the home hold of these customers, and the catalogue; returns their events. Raises StoreError."""
    with tables.locked(home):  # what belongs together is of one version
        chosen = pc.field("customer_id").isin(pa.array(customers, pa.string()))
        copied = {table: _rows(home, table, chosen) for table in _OF_CUSTOMERS}
        names = copied[tables.IDENTITIES]["identifier"].combine_chunks()
        told = pa.array(
            {form for name in names.to_pylist() for form in (name, name.partition(":")[2])}, pa.string()
        )  # with a kind or without
        copied[tables.IDENTITY_LINKS] = _rows(home, tables.IDENTITY_LINKS, reduce(or_, (pc.field(kind).isin(told) for kind in IDENTIFIERS)))
        copied[tables.IDENTITY_EDGES] = _rows(home, tables.IDENTITY_EDGES, pc.field("left").isin(names) & pc.field("right").isin(names))
        copied[tables.ITEMS] = tables.read_arrow(home, tables.ITEMS)
    for table, rows in copied.items():
        tables.write(to, table, rows)
    return int(copied[tables.EVENTS].num_rows)


def _rows(home: Path, table: Table, rows: pc.Expression) -> pa.Table:
    assert table.schema is not None
    return tables.matching(home, table, rows, table.schema.names)
