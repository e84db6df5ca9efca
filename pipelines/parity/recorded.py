"""The home's log -> the calls of some of its people, in the order of the log, to be played again elsewhere.

In: a home. Out: calls as the collector appended them, of whole people: whoever is named together with somebody in them is in too, so
that what follows from the calls needs no other. Takes no place in any group, so that it holds nothing back, and commits nothing.
Never gives a call of an erased person. What the log has trimmed is gone, and counted.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from pipelines.log import Incoming, connection
from pipelines.log.catalogue import Catalogue
from pipelines.log.intake import sealer
from pipelines.log.segments import Row
from pipelines.vault import Vault

AT_A_TIME = 5_000  # rows read together
MOST_CALLS = 20_000  # played again one by one, a few hundred a second


@dataclass(frozen=True)
class Recording:
    """Calls in the order of the log. trimmed: positions that the log has no more; left_out: calls of people who were not chosen."""

    calls: tuple[Incoming, ...] = ()
    people: int = 0
    trimmed: int = 0
    left_out: int = 0


def record(home: Path, *, vault: Vault, people: int, rng: np.random.Generator) -> Recording:
    """The calls of up to so many people, chosen at random, and never more than MOST_CALLS. Raises StoreError."""
    if not (home / "log" / "log.db").exists():
        return Recording()
    with closing(Catalogue(home / "log", connection.connect)) as catalogue:
        crowd = _Crowd(row.subjects for row in _rows(catalogue) if row.sealed is not None)
        chosen = crowd.some(people, rng)
        dead = vault.entombed([name for name in crowd.parents if crowd.of(name) in chosen])
        gone = {crowd.of(name) for name in dead}
        calls: list[Incoming] = []
        for rows in _batches(row for row in _rows(catalogue) if row.subjects and crowd.of(row.subjects[0]) in chosen - gone):
            calls += _opened(rows, vault)
        trimmed = catalogue.places()[0].first - 1
    return Recording(tuple(calls), len(chosen - gone), trimmed, crowd.calls - len(calls))


class _Crowd:
    """Who is named together with whom, through any number of others; calls that name nobody are not looked at."""

    def __init__(self, named: Iterable[Sequence[str]]) -> None:
        self.parents: dict[str, str] = {}
        self.calls, told = 0, dict[str, int]()
        for subjects in named:
            if subjects:
                self.calls += 1
                self._join(subjects)
                told[subjects[0]] = told.get(subjects[0], 0) + 1
        self._calls_of: dict[str, int] = {}
        for name, calls in told.items():
            root = self.of(name)
            self._calls_of[root] = self._calls_of.get(root, 0) + calls

    def of(self, name: str) -> str:
        """Who stands for everybody that this one is named with; itself where it was never seen."""
        while (parent := self.parents.get(name, name)) != name:
            self.parents[name] = name = self.parents[parent]
        return name

    def some(self, people: int, rng: np.random.Generator) -> set[str]:
        """Up to so many, and of those as many as have MOST_CALLS calls together; one at least, where there is one."""
        roots = sorted(self._calls_of)
        order = [roots[place] for place in rng.permutation(len(roots))[:people]]
        calls = np.cumsum([self._calls_of[root] for root in order])
        return set(order[: max(1, int(np.searchsorted(calls, MOST_CALLS, side="right")))])

    def _join(self, subjects: Sequence[str]) -> None:
        first = self.of(subjects[0])
        for name in subjects:
            self.parents[self.of(name)] = first
        self.parents.setdefault(first, first)


def _rows(catalogue: Catalogue) -> Iterator[Row]:
    for place in catalogue.places():
        with closing(catalogue.segment(place.number)) as segment:
            after = place.first - 1
            while rows := segment.read(after, AT_A_TIME):
                yield from (row for row in rows if not row.is_damaged)
                after += len(rows)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == AT_A_TIME:
            yield batch
            batch = []
    yield batch


def _opened(rows: Collection[Row], vault: Vault) -> list[Incoming]:
    whole = [(row, row.sealed) for row in rows if row.sealed is not None]
    payloads = vault.unseal([sealer(row.subjects) for row, _ in whole], [sealed for _, sealed in whole])
    return [
        Incoming(row.source, _message_id(payload), row.subjects, payload, row.received_us)
        for (row, _), payload in zip(whole, payloads, strict=True)
        if payload is not None
    ]


def _message_id(payload: bytes) -> str:
    return str(msgspec.json.decode(payload)["messageId"])
