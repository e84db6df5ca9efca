"""What the worker writes between two looks for calls is bounded: it does not grow with how much there is to do.

Counted are steps of SQLite's virtual machine on the online store and the state, which no other process moves. Not so bounded, and not
counted: what the linker reads anew of tables that an ingest replaced.
"""

import pytest

from pipelines import tables
from pipelines.stream import Stepped, activity, catalogue, event_files, items, pace, seeding, statements, worker

FEW, MANY = 5, 25
EVERY = 10
SLICED = (worker, activity, items, seeding, event_files, statements, catalogue)
DAY = 86_400.0


class Looks:
    """Counts what is done from one look to the next."""

    def __init__(self, stream, monkeypatch):
        self._most, self._since = 0, 0
        for db in (stream.online.db, stream.activity.state.db):
            db.set_progress_handler(self._count, EVERY)
        real = stream._next

        def look(wait_s):
            self._most, self._since = max(self._most, self._since), 0
            return real(wait_s)

        monkeypatch.setattr(stream, "_next", look)

    def _count(self):
        self._since += EVERY

    def most(self):
        """At most, since this was last asked."""
        found, self._most, self._since = max(self._most, self._since), 0, 0
        return found


def steps(world):
    """As a worker makes them, until there is nothing to do."""
    while world.stream.step(wait_s=0.001) != Stepped() or not world.stream._is_reconciled:
        pass


def most_of(world, monkeypatch, n):
    """What is done at most between two looks for n people: for calls of them all that wait, an ingest, what it wrote, and took out, and
    what expires.
    """
    for person in range(n):
        world.say(person, user=f"u{person}", device=f"d{person}", product_id=f"i{person}")
    world.step()
    world.drain()
    world.follow()
    looks = Looks(world.stream, monkeypatch)
    for person in range(n):
        world.say(100 + person, user=f"u{person}", product_id=f"i{person}")
    steps(world)
    calls = looks.most()
    world.stream.activity.state.put_note("known", "")
    world.stream._is_reconciled = False  # as after an ingest
    steps(world)
    people = looks.most()
    for person in range(n):  # the worker never hears these
        world.say(200 + person, user=f"u{person}", product_id=f"i{person}", category=f"c{person}")
    world.drain()
    follow(world)
    written = looks.most()
    for table in (tables.EVENTS, tables.CONSENTS, tables.ITEMS):
        tables.write(world.home, table, tables.read_arrow(world.home, table).slice(0, 1))
    follow(world)
    assert world.stream.activity.state.db.execute("SELECT count(*) FROM rows").fetchone() == (1,)
    taken_out = looks.most()
    world.now += int(20 * DAY * 1e6)
    steps(world)
    return calls, people, written, taken_out, looks.most()


def follow(world):
    """What is in the tables by now, between calls."""
    world.stream._refreshed_s = 0.0
    world.stream.linker.refresh()
    steps(world)


@pytest.fixture
def sliced(monkeypatch):
    """As few at a time as there may be, whatever the machine does meanwhile."""
    for module in SLICED:
        monkeypatch.setattr(module, "SLICE_S", 0.0)
    monkeypatch.setattr(worker, "SLICE_IDENTIFIERS", 4)
    monkeypatch.setattr(pace, "SHARE", 0.0)


def test_between_two_looks_no_more_is_done_for_many_people_than_for_few(new_world, sliced, monkeypatch) -> None:
    few, many = (most_of(new_world(), monkeypatch, n) for n in (FEW, MANY))
    for some, more in zip(few, many, strict=True):
        assert 0 < more <= 2 * some


def test_control_without_slices_it_grows_with_them(new_world, monkeypatch) -> None:
    for module in SLICED:
        monkeypatch.setattr(module, "SLICE_S", 3_600.0)
    few, many = (most_of(new_world(), monkeypatch, n) for n in (FEW, MANY))
    for some, more in zip(few, many, strict=True):
        assert more > 3 * some
