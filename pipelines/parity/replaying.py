"""The same history twice, online and offline: does the stream say at every instant what a training frame says of it?

In: calls, or the tables of a home. Out: what was compared, and what differs. The calls go through the real worker one after the other,
in small lots, some held up, some given again after a kill; and all at once through the real ingest and the real build. Both in scratch
homes: nothing of the home is touched.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines import engine, feature_store, features, ingest, tables
from pipelines.engine import literal
from pipelines.errors import StoreError
from pipelines.identity.online import Online
from pipelines.log import Incoming, Logged, open_log
from pipelines.log.calls import parse
from pipelines.online.writer import CONSENT_VIEW, IDENTIFIER_VIEW
from pipelines.parity import probing, values
from pipelines.parity.probing import Probe
from pipelines.parity.rehearsal import OpenStream, Rehearsal
from pipelines.parity.values import Comparison, Key, Values, View
from pipelines.settings import Settings
from pipelines.stream import Stream
from pipelines.stream.calls import read
from pipelines.vault import Vault, open_vault

if TYPE_CHECKING:
    from feast import FeatureStore

PEOPLE_VIEWS = (IDENTIFIER_VIEW, CONSENT_VIEW)  # their tables say what is so now: only the end can be compared
LOTS = 800  # that calls are given in: each costs some milliseconds


@dataclass(frozen=True)
class Manner:
    """How the calls come. Shares of all lots: held up until a later lot's time; after which the worker is killed, at work or idle."""

    held_up: float = 0.1
    killed: float = 0.02


@dataclass
class Stage:
    """What one way of looking came to. `what`: figures of its own; why: what it could not look at, empty where it could."""

    compared: Comparison = field(default_factory=Comparison)
    what: dict[str, Any] = field(default_factory=dict)
    why: str = ""


def replay(
    calls: Sequence[Incoming],
    base: Path,
    *,
    settings: Settings,
    probes: int,
    rng: np.random.Generator,
    manner: Manner | None = None,
    open_stream: OpenStream = Stream,
    items: pa.Table | None = None,
) -> Stage:
    """Play the calls, in the order given, in two homes below `base`, and compare at so many instants.

    items: the shop's, of which the categories count. An item is of one category from the start, the one that it has at the end: the batch
    has no other.
    """
    calls = _renamed(calls, base / "offline", settings)
    offline = _offline(calls, base / "offline", settings, items)
    views, feast = _views(offline), feature_store.store(offline)
    arrived = _arrived(calls)
    looks = _looks(
        offline, feast, views, probes=probes, first_us=int(arrived[0]), last_us=int(arrived[-1]), rng=rng, calm=_Calm(calls, arrived)
    )
    stage = Stage(what={"calls": len(calls), "instants": len(looks)})
    home = base / "online"
    for name in ("feature_store", "vault", "keys"):  # applied and empty, and the same names for everybody
        shutil.copytree(offline / name, home / name)
    tables.write(home, tables.ITEMS, tables.read_arrow(offline, tables.ITEMS))
    compared = {view: Comparison() for view in views}
    rehearsal = Rehearsal(settings.model_copy(update={"home": home}), open_stream=open_stream)
    try:
        coming = _Coming(calls, arrived, rehearsal, rng, manner or Manner())
        shop = feature_store.store(home)
        for probe, expected in looks:
            coming.until(probe.at_us)
            _compare(compared, shop, probe, expected)
        coming.until(rehearsal.now_us + 1)
        _join(stage, compared, rehearsal)
        _compare_people(stage.compared, shop, offline, rehearsal.now_us)
        stage.what["kills"] = coming.kills
    finally:
        rehearsal.close()
    return stage


def go_on(home: Path, *, settings: Settings, now_us: int, probes: int, rng: np.random.Generator, open_stream: OpenStream = Stream) -> Stage:
    """A stream that starts at that time on a scratch home with tables and no log: what it was given to start with, from then on."""
    features.build(home, session_gap_minutes=settings.ingest.session_gap_minutes)
    feature_store.apply(home)
    feature_store.materialize(home, as_of=values.instant(now_us))
    views, feast = _views(home), feature_store.store(home)
    looks = _looks(home, feast, views, probes=probes, first_us=now_us, last_us=now_us, rng=rng)
    stage = Stage(what={"events": tables.count(home, tables.EVENTS), "instants": len(looks)})
    compared = {view: Comparison() for view in views}
    rehearsal = Rehearsal(settings.model_copy(update={"home": home}), now_us=now_us, open_stream=open_stream)
    try:
        for probe, expected in looks:
            if rng.random() < Manner.killed:
                rehearsal.kill()
            rehearsal.advance(probe.at_us)
            _compare(compared, feast, probe, expected)
        _join(stage, compared, rehearsal)
        _compare_people(stage.compared, feast, home, rehearsal.now_us)
    finally:
        rehearsal.close()
    return stage


# -- private -----------------------------------------------------------------------------------------------------------


class _Coming:
    """Calls on their way: in lots of a few, each at its time or held up."""

    def __init__(
        self, calls: Sequence[Incoming], arrived: np.ndarray, rehearsal: Rehearsal, rng: np.random.Generator, manner: Manner
    ) -> None:
        self.calls, self.arrived, self.rehearsal, self.rng, self.manner = calls, arrived, rehearsal, rng, manner
        self.share = min(0.9, LOTS / max(1, len(calls)))  # of the geometric distribution of a lot's size
        self.firsts = np.flatnonzero(_are_first(calls))
        self.told = self.kills = 0

    def until(self, at_us: int) -> None:
        """Everything that had arrived by then, and then it is that time."""
        end = int(np.searchsorted(self.arrived, at_us, side="right"))
        while self.told < end:
            last = min(self._end(), end)
            lot, then = self.calls[self.told : last], int(self.arrived[last - 1])
            self.told = last
            drawn = self.rng.random()
            if drawn < self.manner.held_up:  # time goes on before they come
                self.rehearsal.advance(int(self.rng.integers(then, at_us + 1)))
            if drawn > 1 - self.manner.killed:
                self.rehearsal.kill(lot, at_us=then)
                self.kills += 1
            self.rehearsal.tell(lot if drawn < self.manner.held_up else [*lot, *lot[:1]], at_us=then)  # what is there is not taken again
        self.rehearsal.advance(at_us)

    def _end(self) -> int:
        """Where the next lot ends. Who is new comes alone: of what comes together nothing was known first, and any of it gives its name."""
        place = int(np.searchsorted(self.firsts, self.told))
        next_first = int(self.firsts[place]) if place < len(self.firsts) else len(self.calls)
        return self.told + 1 if next_first == self.told else min(self.told + int(self.rng.geometric(self.share)), next_first)


def _are_first(calls: Sequence[Incoming]) -> np.ndarray:
    """Which calls name somebody who was not named before."""
    seen: set[str] = set()
    firsts = []
    for call in calls:
        firsts.append(not seen.issuperset(call.subjects))
        seen.update(call.subjects)
    return np.array(firsts, bool)


class _Calm:
    """The first instant from a given one on at which nothing is on its way: received, and not in the log yet."""

    def __init__(self, calls: Sequence[Incoming], arrived: np.ndarray) -> None:
        received = np.array([call.received_us for call in calls], np.int64)
        order = np.argsort(received, kind="stable")
        self.received, self.arrived = received[order], np.maximum.accumulate(arrived[order])

    def __call__(self, at_us: int) -> int:
        place = int(np.searchsorted(self.received, at_us, side="right"))
        then = max(at_us, int(self.arrived[place - 1])) if place else at_us
        return at_us if then == at_us else self(then)


def _arrived(calls: Sequence[Incoming]) -> np.ndarray:
    """When each call was in the log: one may have been received before another that stands before it."""
    return np.maximum.accumulate(np.array([call.received_us for call in calls], np.int64))


def _renamed(calls: Sequence[Incoming], home: Path, settings: Settings) -> list[Incoming]:
    """The calls with the names that their people have under this home's own key."""
    with closing(open_vault(home, master=settings.master_key)) as vault:
        return [replace(call, subjects=_subjects(call, vault, settings)) for call in calls]


def _subjects(call: Incoming, vault: Vault, settings: Settings) -> tuple[str, ...]:
    received = values.instant(call.received_us)
    read = parse(call.payload, None, source=call.source, received=received, vault=vault, limits=settings.collect)
    return read.events[0].subjects


def _offline(calls: Sequence[Incoming], home: Path, settings: Settings, items: pa.Table | None) -> Path:
    """A home with the tables that all the calls together make."""
    own = settings.model_copy(update={"home": home})
    if items is not None:  # without what makes them lines of a catalogue
        schema = tables.ITEMS.schema
        assert schema is not None
        told = ("item_id", "category", "event_timestamp")
        bare = [items[each.name] if each.name in told else pa.nulls(len(items), each.type) for each in schema]
        tables.write(home, tables.ITEMS, pa.Table.from_arrays(bare, schema=schema))
    tables.write(home, tables.IDENTITIES, _named(calls, home.with_name("names"), settings))
    log = open_log(home, settings=own)
    try:
        log.append(calls)
    finally:
        log.close()
    ingest.drain(home, settings=own)
    if not tables.exists(home, tables.EVENTS) or not tables.count(home, tables.EVENTS):
        raise StoreError(
            f"parity: of {len(calls)} calls none became an event; see `rapport quarantine list` and the consent of their people"
        )
    features.build(home, session_gap_minutes=settings.ingest.session_gap_minutes)
    feature_store.apply(home)
    return home


def _named(calls: Sequence[Incoming], base: Path, settings: Settings) -> pa.Table:
    """Whose everybody's identifiers are when the calls come one by one. An ingest goes on from whom it knows: so that of those who are
    merged the first known gives its name here too. Of what is ingested at once, nobody is known before the others.
    """
    logged = (Logged(place, call.source, call.subjects, call.payload, call.received_us, 0) for place, call in enumerate(calls))
    with closing(Online(base)) as linker:
        for call in logged:
            if (heard := read(call, settings.ingest)) is not None:
                linker.link([heard])
        rows = [link._asdict() for link in linker.identities()]
    return pa.Table.from_pylist(rows, schema=tables.IDENTITIES.schema)


def _views(home: Path) -> dict[View, Path]:
    """The views that the stream writes event by event, and their tables."""
    feast = feature_store.store(home)
    declared: dict[str, Any] = {name: feast.get_feature_view(name) for name in feature_store.STREAMED_VIEWS if name not in PEOPLE_VIEWS}
    folders = {values.view_of(feast, name): (home / view.batch_source.path).resolve() for name, view in declared.items()}
    return {view: folder for view, folder in folders.items() if folder.is_dir()}


def _looks(
    home: Path,
    feast: "FeatureStore",
    views: dict[View, Path],
    *,
    probes: int,
    first_us: int,
    last_us: int,
    rng: np.random.Generator,
    calm: Callable[[int], int] = int,
) -> list[tuple[Probe, dict[View, list[Values]]]]:
    """Where to look, and what a training frame has there; read at once for each view. calm: the instant to look at in place of one."""
    found = probing.probes(views, number=probes, first_us=first_us, last_us=last_us, rng=rng) if views else []
    found = sorted((replace(probe, at_us=calm(probe.at_us)) for probe in found), key=lambda probe: probe.at_us)
    expected: list[dict[View, list[Values]]] = [{} for _ in found]
    for view in views:
        asked = [(key, probe.at_us) for probe in found for key in probe.keys[view]]
        rows = iter(values.offline(feast, view, asked))
        for place, probe in enumerate(found):
            expected[place][view] = [next(rows) for _ in probe.keys[view]]
    return list(zip(found, expected, strict=True))


def _compare(compared: dict[View, Comparison], feast: "FeatureStore", probe: Probe, expected: dict[View, list[Values]]) -> None:
    for view, keys in probe.keys.items():
        for online, offline in zip(values.online(feast, view, keys), expected[view], strict=True):
            compared[view].add(view, online, offline, probe.at_us)


def _join(stage: Stage, compared: dict[View, Comparison], rehearsal: Rehearsal) -> None:
    """All views together, but for those that the stream has written no row of: they are as fresh as the last load, and are named."""
    online = rehearsal.stream.online
    written = [view for view in compared if online.is_streamed(view.name)]
    for view in written:
        stage.compared += compared[view]
    stage.what["views"] = [view.name for view in written]
    stage.what["not_streamed"] = [view.name for view in compared if view not in written]


def _compare_people(compared: Comparison, feast: "FeatureStore", home: Path, at_us: int) -> None:
    """Who is who and what they allow, at the end."""
    for name, table in ((IDENTIFIER_VIEW, tables.IDENTITIES), (CONSENT_VIEW, tables.CUSTOMER_CONSENT)):
        if not tables.count(home, table):
            continue
        view = values.view_of(feast, name)
        with engine.connect(home) as con:
            rows = con.execute(
                f"""SELECT {view.keys[0]}, {", ".join(view.features)} FROM read_parquet({literal(tables.glob(home, table))})
                WHERE epoch_us(event_timestamp) <= {at_us}
                QUALIFY row_number() OVER (PARTITION BY {view.keys[0]} ORDER BY event_timestamp DESC) = 1 LIMIT {probing.KEYS}"""
            ).fetchall()
        keys: list[Key] = [row[:1] for row in rows]
        for online, row in zip(values.online(feast, view, keys), rows, strict=True):
            compared.add(view, online, dict(zip(view.features, row[1:], strict=True)), at_us)
