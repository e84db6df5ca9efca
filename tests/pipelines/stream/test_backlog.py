"""What an ingest says of who is who is taken over a few people at a time, between calls: the end is as if it had been done at once."""

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from pipelines import identity, ingest
from pipelines.identity import graph
from pipelines.identity.links import Linked
from pipelines.stream import worker
from pipelines.stream.backlog import Backlog
from pipelines.stream.state import State

AT = datetime(2026, 3, 1, tzinfo=UTC)


def linked(name, customer, at_s=0):
    return Linked(name, customer, AT + timedelta(seconds=at_s), AT)


def test_people_come_whole_and_each_once() -> None:
    links = [linked("a1", "c2"), linked("a1", "c1", 5), linked("a2", "c1"), linked("b1", "c2"), linked("d1", "c3"), linked("e1", "c4")]
    backlog = Backlog(links)
    assert len(backlog) == 5
    assert backlog.of(["b1", "never seen"], ["c4"]) in ([links[3], links[5]], [links[5], links[3]])
    backlog.drop(["d1", "b1"])
    assert backlog.some(1) == links[:3], "the identifiers of one person together, each with all that is said of it"
    assert (len(backlog), backlog.some(9), backlog.of(["a1"], [])) == (0, [], [])


@pytest.fixture
def parted(world, monkeypatch):
    """Ann, a visitor who was taken for her, and others like them; an ingest has just taken that back; people are taken over one by one."""
    for n in range(6):
        world.say(n * 3_000, device="d1", product_id=f"i{n % 2}", price=n)
        world.say(n * 3_000 + 5, user="bob" if n % 2 else "ann", product_id="i1")
    for n in range(8):  # more than the calls of a test name, whoever comes first
        world.say(18_000 + n, device=f"e{n}", product_id="i2")
        world.say(19_000 + n, user=f"u{n}", device=f"e{n}", product_id="i2")
    world.say(20_000, "identify", device="d1", user="ann")
    world.step()
    world.drain()
    world.follow()
    for user, device in [("ann", "d1"), *((f"u{n}", f"e{n}") for n in range(2, 8))]:
        link = identity.link_id(world.vault.pseudonym("user_id", user), world.vault.pseudonym("anonymous_id", device))
        graph.unmerge(world.home, link, by="eve")
    ingest.reassign(world.home, settings=world.settings)
    monkeypatch.setattr(worker, "SLICE_S", 0.0)
    monkeypatch.setattr(worker, "SLICE_IDENTIFIERS", 1)
    world.stream._refreshed_s = 0.0  # as if the time between two looks at the tables had passed
    return world


def slices(world):
    """Steps as a worker makes them, until all is taken over; how many."""
    n = 1
    while world.stream.step(wait_s=0.001) and not world.stream._is_reconciled:
        n += 1
    return n


def moved(world):
    """One who is somebody else's now, and not yet online."""
    some = (("anonymous_id", "d1"), ("user_id", "ann"))
    return next(one for one in some if world.customer(*one) != world.linker.customer(world.vault.pseudonym(*one)))


@pytest.mark.parametrize("dies", [False, True], ids=["goes_on", "dies_between"])
def test_calls_come_first_and_any_order_ends_alike(parted, tmp_path, dies) -> None:
    parted.stream._reconcile()
    kind, name = moved(parted)
    parted.say(30_000, product_id="i3", **{{"anonymous_id": "device", "user_id": "user"}[kind]: name})
    parted.say(30_010, user="u1", product_id="i1")
    assert sum(parted.stream.step(wait_s=0.001).applied for _ in range(2)) == 2
    assert len(parted.stream.backlog) > 3, "a call does not wait until all is taken over"
    assert parted.customer(kind, name) == parted.linker.customer(parted.vault.pseudonym(kind, name)), "who calls comes first"
    parted.say(30_020, "identify", user="u2", device="e3")  # who is somebody else's by now
    parted.say(30_021, user="new", product_id="i1")
    if dies:
        parted.restart()
        parted.step()
    else:
        assert slices(parted) > 1
    parted.step()
    assert parted.is_exact(tmp_path / "truth", was_taken_back=True)


def test_a_worker_that_starts_anew_applies_calls_before_it_has_looked_at_everybody(parted, tmp_path) -> None:
    parted.follow()
    parted.restart()
    parted.say(30_000, user="u1", product_id="i3")
    assert parted.stream.step(wait_s=0.001).applied == 1
    assert len(parted.stream.backlog) > 3
    parted.step()
    assert parted.is_exact(tmp_path / "truth", was_taken_back=True)


@pytest.fixture
def unseen(parted):
    """The same tables, which no worker ever followed; Ann calls."""
    parted.follow()
    parted.stream.close()
    for path in (parted.home / "stream").glob("state*"):
        path.unlink()
    parted.linker.close()
    parted.start()
    parted.say(30_000, user="ann", product_id="i3")
    return parted


def total(world):
    return world.row("customer_activity", world.customer("user_id", "ann"))["events_total"]


@pytest.mark.parametrize("dies", [False, True], ids=["goes_on", "dies_between"])
def test_at_the_first_start_calls_do_not_wait_until_everybody_is_taken_over(unseen, tmp_path, dies) -> None:
    before = total(unseen)
    assert before > 1
    assert unseen.stream.step(wait_s=0.001).applied == 1
    assert len(unseen.stream.backlog) > 3
    assert total(unseen) == before + 1, "what she did before counts, although most are not taken over yet"
    if dies:
        unseen.restart()
    unseen.step()
    assert unseen.is_exact(tmp_path / "truth", was_taken_back=True)


def test_control_a_call_before_the_tables_is_counted_alone(unseen) -> None:
    unseen.stream._has_begun = True
    assert unseen.stream.step(wait_s=0.001).applied == 1
    assert total(unseen) == 1


def test_control_a_slice_that_is_lost_leaves_somebody_wrong(parted, tmp_path, monkeypatch) -> None:
    real, lost = Backlog.some, []
    theirs = {parted.vault.pseudonym("anonymous_id", "d1"), parted.vault.pseudonym("user_id", "ann")}

    def some(self, n):
        found = real(self, n)
        names = {link.identifier for link in found}
        if not names.isdisjoint(theirs):
            lost.extend(names)
            return []
        return found

    monkeypatch.setattr(Backlog, "some", some)
    slices(parted)
    parted.step()
    assert lost
    with pytest.raises(AssertionError):
        parted.is_exact(tmp_path / "truth", was_taken_back=True)


class DiedError(Exception):
    """In the place of the end of a process."""


@pytest.fixture
def dropped(world, monkeypatch):
    """Eve, of whom an ingest keeps nothing: the worker is mistaken about her call."""
    monkeypatch.setattr("pipelines.stream.rows._is_good", lambda *args, **options: True)
    world.say(0, user="ann", product_id="i1")
    world.say(1, user="eve", product_id="", price=1)
    world.step()
    world.drain()
    assert world.customer("user_id", "eve")
    return world


def die_after_the_states_commit(world, monkeypatch, nth):
    """The online store's, around it, is then rolled back."""
    state, n = world.stream.activity.state, 0

    @contextmanager
    def transaction():
        nonlocal n
        with State.transaction(state):
            yield
        n += 1
        if n == nth:
            raise DiedError

    monkeypatch.setattr(state, "transaction", transaction)


def test_whom_an_ingest_dropped_goes_whenever_the_worker_dies_and_though_it_was_away_meanwhile(dropped, monkeypatch) -> None:
    for nth in range(1, 20):
        dropped.restart()  # the linker takes the tables over when it is opened: nobody tells the worker of it
        die_after_the_states_commit(dropped, monkeypatch, nth)
        try:
            dropped.step()
        except DiedError:
            continue
        break
    assert nth > 3
    assert dropped.customer("user_id", "eve") is None
    assert dropped.customer("user_id", "ann")
    assert dropped.stream.activity.state.spells_of(dropped.linker.customer(dropped.vault.pseudonym("user_id", "ann")))
    held = dropped.stream.activity.state.db.execute("SELECT count(*) FROM rows").fetchone()
    assert held == (1,)


def test_control_a_worker_that_notes_it_before_they_are_gone_leaves_them(dropped, monkeypatch) -> None:
    dropped.stream.activity.state.put_note("known", dropped.linker.version)
    dropped.linker.refresh()
    dropped.stream.activity.state.put_note("known", dropped.linker.version)
    dropped.restart()
    dropped.step()
    assert dropped.customer("user_id", "eve")
