"""A small shop with known truth: a seed -> a Segment log, its catalogue, and everything that the log hides.

Exactly tractable: `pipelines.optimum` computes from the truth the best scores that any model of the log could give.
Nothing here reads the clock or other files; nothing that runs on real data imports this.
"""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pipelines.errors import InputError, StoreError
from pipelines.simulate import catalogue, dirt, draws, messages, people, truth, visits, walk, wire
from pipelines.simulate.dirt import Lines
from pipelines.simulate.knobs import Drift, Knobs
from pipelines.simulate.messages import Messages
from pipelines.simulate.people import NEVER, People
from pipelines.simulate.shop import END, Shop
from pipelines.simulate.visits import Sessions

__all__ = ["END", "EVENTS_FILE", "ITEMS_FILE", "TRUTH_FILE", "Drift", "Knobs", "Shop", "SimulationReport", "simulate"]

EVENTS_FILE, ITEMS_FILE, TRUTH_FILE = "events.jsonl", "items.jsonl", "truth.parquet"


@dataclass(frozen=True)
class SimulationReport:
    """What lies in the folder. lines = events + duplicates + malformed."""

    folder: Path
    customers: int  # people; those who never came in the log's time are among them
    items: int
    lines: int
    events: int  # well-formed messages, each once
    duplicates: int
    late: int  # of `events`: arrived an hour or more after they happened
    malformed: int
    malformed_by_kind: dict[str, int] = field(default_factory=dict)
    events_by_name: dict[str, int] = field(default_factory=dict)
    never_granted: int = 0  # people who never allowed personalisation
    withdrawn: int = 0  # people who allowed it and took it back
    first_event: datetime | None = None
    last_event: datetime | None = None


def simulate(out: Path, *, customers: int, days: int, seed: int, items: int = 400, knobs: Knobs | None = None) -> SimulationReport:
    """Write events.jsonl, items.jsonl and truth.parquet into `out`; the log ends at END, the same arguments give the same bytes.

    Raises InputError for sizes or knobs that make no shop, StoreError if the folder cannot be written; it then holds
    either the old files or the new ones.
    """
    shop = _open(customers, days, seed, items, knobs or Knobs())
    folk, goods = people.draw(shop), catalogue.draw(shop)
    sessions, steps = visits.draw(shop, folk, goods)
    said, orders, withdrawn_ms = messages.draw(shop, folk, sessions, steps)
    lines = dirt.plant(shop, said)
    outcomes = _potential_orders(shop, folk, sessions)
    try:
        out.mkdir(parents=True, exist_ok=True)
        parts = {name: out / f".{name}.part" for name in (EVENTS_FILE, ITEMS_FILE, TRUTH_FILE)}
        try:
            wire.write_events(parts[EVENTS_FILE], shop, folk, goods, messages=said, orders=orders, lines=lines, withdrawn_ms=withdrawn_ms)
            wire.write_items(parts[ITEMS_FILE], goods)
            truth.write(parts[TRUTH_FILE], shop, folk, goods, withdrawn_ms=withdrawn_ms, orders=outcomes)
            for name, part in parts.items():
                part.replace(out / name)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"simulate: the folder {out} could not be written ({error.strerror or error}); free space or choose another folder with --out"
        ) from error
    return _report(out, shop, folk, said, lines, withdrawn_ms)


def _open(customers: int, days: int, seed: int, items: int, knobs: Knobs) -> Shop:
    for name, found, least in (("customers", customers, 1), ("days", days, 14), ("items", items, 2), ("seed", seed, 0)):
        if found < least:
            raise InputError(f"simulate: {name} must be {least} or more; found {found}")
    for name in ("onset_day", "experiment_day"):
        day = getattr(knobs, name)
        if day is not None and day >= days:
            raise InputError(f"simulate: {name} must lie within the {days} days of the log; found {day}")
    return Shop(customers=customers, days=days, seed=seed, items=items, knobs=knobs)


def _potential_orders(shop: Shop, folk: People, sessions: Sessions) -> tuple[np.ndarray, np.ndarray]:
    """(orders of each person since the experiment began in the control arm, in the treated arm), on the same luck."""
    inside = (sessions.planned_ms >= shop.experiment_ms) & (sessions.start_ms <= shop.end_ms)
    key, person, start = sessions.key[inside], sessions.person[inside], sessions.planned_ms[inside]
    counts = []
    for arm in (False, True):
        a, b = people.mission_map(shop, np.full(len(key), arm), folk.treatment_effect[person], start)
        is_mission = draws.uniform(key, 0) < a + b * folk.mission_probability[person]
        session, _, event, _ = visits.walk(shop, key, is_mission, start)
        counts.append(np.bincount(person[session[event == walk.PURCHASE]], minlength=len(folk.number)))
    return counts[0], counts[1]


def _report(out: Path, shop: Shop, folk: People, said: Messages, lines: Lines, withdrawn_ms: np.ndarray) -> SimulationReport:
    once = lines.message[lines.flavour == dirt.NORMAL]
    kinds = Counter(dict(zip(dirt.MALFORMED, np.bincount(lines.flavour, minlength=2 + len(dirt.MALFORMED))[2:].tolist(), strict=True)))
    names = {**wire.SEGMENT_NAMES, messages.IDENTIFY: "identify"}
    codes = np.bincount(said.code[once], minlength=max(names) + 1)
    first, last = (said.time_ms[once].min(), said.time_ms[once].max()) if len(once) else (None, None)
    return SimulationReport(
        folder=out,
        customers=shop.customers,
        items=shop.items,
        lines=len(lines.message),
        events=len(once),
        duplicates=int((lines.flavour == dirt.REPEATED).sum()),
        late=int(lines.is_late.sum()),
        malformed=sum(kinds.values()),
        malformed_by_kind=dict(kinds),
        events_by_name={name: int(codes[code]) for code, name in sorted(names.items()) if codes[code]},
        never_granted=int((~folk.grants).sum()),
        withdrawn=int((withdrawn_ms != NEVER).sum()),
        first_event=None if first is None else datetime.fromtimestamp(first / 1000, UTC),
        last_event=None if last is None else datetime.fromtimestamp(last / 1000, UTC),
    )
