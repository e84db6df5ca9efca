"""What an ingest wrote is taken over a slice at a time: whatever comes between two of them, the end is as if it had been done at once."""

from contextlib import closing, contextmanager
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines import erasure
from pipelines.stream import Stepped, activity, catalogue, event_files, items, seeding, statements, worker
from pipelines.stream.event_files import EventFiles
from pipelines.stream.state import State

ALLOW, DENY = {"personalization": True}, {"personalization": False}
QUICK = {"deadline": None, "derandomize": True, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}

WHO = st.sampled_from([("u1", None), ("u2", None), ("u1", "d1"), ("u2", "d1"), (None, "d2"), ("u3", "d2"), ("u3", None)])
WHAT = st.sampled_from(["view", "view", "view", "cart", "order", "refuse", "allow", "silent", "silent"])
CALL = st.tuples(WHO, WHAT, st.sampled_from([0, 0.2, 5, 700, 1_801, 90_000]))
BETWEEN = st.lists(st.one_of(CALL, CALL, st.sampled_from(["", "", "", "restart", "ingest"])), max_size=16)


@pytest.fixture
def sliced(monkeypatch):
    """One row of a table, one person at a time."""
    for module in (worker, activity, items, event_files, seeding, statements, catalogue):
        monkeypatch.setattr(module, "SLICE_S", 0.0)
    monkeypatch.setattr(worker, "SLICE_IDENTIFIERS", 1)


def say(world, at_s, number, call) -> None:
    (user, device), what, _ = call
    if what == "silent":
        if user in world.spoke:  # a permission is never late here
            world.say(at_s, user=user, consent=None, product_id=f"i{number % 4}", price=1 + number)
        return
    world.spoke.add(user)
    if what in ("refuse", "allow"):
        if user:  # a visitor's word may come to be that of a person who is not known yet
            world.say(at_s, "identify", user=user, device=device, consent=DENY if what == "refuse" else ALLOW)
        return
    item, category = f"i{number % 4}", "ab"[number % 2] if number % 3 else None
    if what == "order":
        lines = [{"product_id": f"i{n}", "quantity": n + 1, "price": 10.005, "category": category} for n in range(1 + number % 3)]
        world.say(at_s, "Order Completed", user=user, device=device, order_id=f"o{number}", products=lines)
    else:
        name = {"view": "Product Viewed", "cart": "Product Added"}[what]
        world.say(at_s, name, user=user, device=device, product_id=item, price=2.5 + number, category=category)


def slice_of(world):
    """One step as a worker makes it between calls."""
    return world.stream.step(wait_s=0.001)


def behind(world) -> None:
    """A worker that has followed tables once, and has just seen that they are others."""
    world.stream._refreshed_s = 0.0
    slice_of(world)
    assert not world.stream._is_reconciled


def unseen(world) -> None:
    """A worker that has followed no tables yet: what another one held is gone."""
    world.stream.close()
    for path in (world.home / "stream").glob("state*"):
        path.unlink()
    world.restart()
    slice_of(world)


def play(world, before, between, begin) -> float:
    """Calls, some of which only the ingest has seen by its end; then what comes between the slices in which that is taken over."""
    at_s, world.spoke = 0.0, set()
    for number, call in enumerate(before):
        at_s += call[2]
        say(world, at_s, number, call)
        if number == len(before) // 2:
            world.step()
    world.drain()
    begin(world)
    for number, one in enumerate(between, start=len(before)):
        if one == "restart":
            world.restart()
        elif one == "ingest":
            world.drain()
        elif one:
            at_s += one[2]
            say(world, at_s, number, one)
        slice_of(world)
    return at_s


@pytest.mark.parametrize("begin", [behind, unseen], ids=["after_an_ingest", "at_the_first_start"])
@settings(max_examples=12, **QUICK)
@given(before=st.lists(CALL, min_size=4, max_size=14), between=BETWEEN)
def test_whatever_comes_between_two_slices_the_end_is_what_the_batch_says(
    new_world, sliced, tmp_path_factory, begin, before, between
) -> None:
    with closing(new_world()) as world:
        at_s = play(world, before, between, begin)
        world.step()
        world.follow()
        world.to(at_s + 300)
        assert world.is_exact(tmp_path_factory.mktemp("truth") / "home", was_taken_back=True)


def kept_after(world, monkeypatch, *words) -> int:
    """Ann is held ready; her last word the worker reads of the tables only. Then she calls without one: how many rows that gives."""
    world.say(0, user="ann", product_id="i1")
    for number, word in enumerate(words):
        world.step()
        world.say(10 + number, "identify", user="ann", consent=word)
    world.drain()
    world.log.commit("online", [call.position for call in world.log.read("online", max_events=9)])
    monkeypatch.setattr(world.stream, "_expire", Stepped)  # others are due before her
    behind(world)
    state, last = (
        world.stream.activity.state.db,
        f"SELECT 1 FROM said WHERE is_stored AND is_allowed = {words[-1] == ALLOW} AND said_us > ?",
    )
    while not state.execute(last, (world.now - 1_000_000,)).fetchone():
        slice_of(world)
    world.say(20, user="ann", consent=None, product_id="i3")
    assert slice_of(world).applied
    assert not world.stream._is_reconciled
    return state.execute("SELECT count(*) FROM rows WHERE item_id = 'i3'").fetchone()[0]


def test_a_refusal_counts_from_the_slice_that_brings_it(world, sliced, monkeypatch) -> None:
    assert kept_after(world, monkeypatch, DENY) == 0


def test_a_permission_counts_from_the_slice_that_brings_it(world, sliced, monkeypatch) -> None:
    assert kept_after(world, monkeypatch, DENY, ALLOW) == 1


def test_control_a_customer_that_is_held_ready_would_not_know_it(world, sliced, monkeypatch) -> None:
    monkeypatch.setattr(activity.Activity, "_let_go_of", lambda *_: None)
    assert kept_after(world, monkeypatch, DENY, ALLOW) == 0


def shop(world) -> None:
    """People of whom the worker knows half of what an ingest has stored, one of them from a device that she shares."""
    world.say(0, user="bob", device="d1", product_id="i1")
    world.step()
    for n in range(4):
        world.say(10 + n, user="ann", device="d1", product_id=f"i{n % 2}", category="a")
        world.say(20 + n, user="eve", device="d2", product_id="i1")
        world.say(30 + n, user="bob", device="d3", product_id="i2", price=n)
    world.say(40, "identify", user="ann", device="d1", consent=DENY)
    world.say(40, "identify", user="eve", consent=DENY)
    world.say(41, "identify", user="cid", device="d3", consent=DENY)
    world.drain()


def kept(world):
    """What of the tables the state has."""
    state = world.stream.activity.state.db
    return (
        state.execute("SELECT source, event_id, who, event_us, allows, category, position FROM rows ORDER BY 1, 2").fetchall(),
        state.execute("SELECT who, purpose, is_stated, is_allowed, is_stored FROM said ORDER BY 1, 2, 3, 4").fetchall(),
        state.execute("SELECT item_id, listed, category FROM categories ORDER BY 1").fetchall(),
        [stamp for (stamp,) in state.execute("SELECT stamp FROM files WHERE stamp LIKE 'begun%'")],
    )


class DiedError(Exception):
    """In the place of the end of a process."""


def die_after_commit(world, monkeypatch, nth) -> None:
    """The worker ends with this transaction of its state."""
    state, n = world.stream.activity.state, 0

    @contextmanager
    def transaction():
        nonlocal n
        with State.transaction(state):
            yield state
        n += 1
        if n == nth:
            raise DiedError

    monkeypatch.setattr(state, "transaction", transaction)


def test_a_worker_that_dies_after_any_slice_ends_alike(new_world, sliced, tmp_path, monkeypatch) -> None:
    calm = new_world()
    torn = new_world(like=calm)
    for world in (calm, torn):
        shop(world)
    calm.follow()
    assert calm.is_exact(tmp_path / "truth", was_taken_back=True)
    deaths = 0
    for nth in range(1, 100):
        die_after_commit(torn, monkeypatch, nth)
        try:
            torn.follow()
            break
        except DiedError:
            deaths += 1
            torn.restart()
    assert deaths > len(kept(calm)[0])
    assert kept(torn) == kept(calm)
    assert torn.is_exact(tmp_path / "torn", was_taken_back=True)


def theirs(world, names):
    """Rows and statements that the state has under these names."""
    marks = ",".join("?" * len(names))
    found = [f"SELECT '{table}', who FROM {table} WHERE who IN ({marks})" for table in ("rows", "said")]
    return world.stream.activity.state.db.execute(" UNION ".join(found), (*names, *names)).fetchall()


ALLOWANCES = "SELECT count(*) > 1 FROM said WHERE is_stored AND is_allowed"
WHEN = {
    "statements": ALLOWANCES,
    "begun": "SELECT count(*) FROM files WHERE stamp LIKE 'begun%'",
    "rows": "SELECT count(*) > 3 FROM rows WHERE file IS NOT NULL",
    "more": "SELECT count(*) > 7 FROM rows WHERE file IS NOT NULL",
}


def seen_after_erasure(world, when):
    """Eve is erased between the first two slices of which this is true; what of her is seen from then on, until all is taken over."""
    behind(world)
    while not world.stream.activity.state.db.execute(when).fetchone()[0]:
        slice_of(world)
    assert not world.stream._is_reconciled
    eve = [world.vault.pseudonym(*name) for name in (("user_id", "eve"), ("anonymous_id", "d2"))]
    erasure.erase(world.home, "user_id:eve", settings=world.settings, by="admin", as_of=datetime(2026, 4, 1, tzinfo=UTC))
    seen = set()
    while not world.stream._is_reconciled:
        seen |= set(theirs(world, eve))
        slice_of(world)
    return seen | set(theirs(world, eve))


@pytest.mark.parametrize("when", WHEN)
def test_nothing_of_who_is_erased_between_two_slices_comes_back(world, sliced, when) -> None:
    shop(world)
    assert seen_after_erasure(world, WHEN[when]) == set()


def test_control_rows_that_were_read_before_would_come_back(world, sliced, monkeypatch) -> None:
    monkeypatch.setattr(EventFiles, "_require", lambda *_: None)
    shop(world)
    assert {table for table, _ in seen_after_erasure(world, WHEN["rows"])} == {"rows"}


def test_control_so_would_statements(world, sliced, monkeypatch) -> None:
    monkeypatch.setattr(seeding, "_require", lambda *_: None)
    shop(world)
    assert "said" in {table for table, _ in seen_after_erasure(world, WHEN["statements"])}


def test_where_an_ingest_stores_what_the_stream_counts_nobody_is_made_anew(world) -> None:
    allows = ALLOW | {"analytics": True, "marketing": False}  # more than events are stored for
    for number, (user, device) in enumerate([("u1", "d1"), ("u2", "d2"), (None, "d1"), ("u1", None)]):
        world.say(60 * number, user=user, device=device, consent=allows, product_id="i1", price=2.5, category="a")
        lines = [{"product_id": f"i{n}", "quantity": n + 1, "price": 10.005} for n in range(2)]
        world.say(60 * number + 5, "Order Completed", user=user, device=device, consent=allows, order_id=f"o{number}", products=lines)
    world.step()
    world.drain()
    world.follow()  # the catalogue and who is who are followed once; the second ingest says nothing new of them
    world.say(600, user="u1", device="d1", consent=allows, product_id="i1", price=2.5, category="a")
    world.step()

    def marks():
        state = world.stream.activity.state.db
        return [state.execute(f"SELECT {key}, mark FROM {table} ORDER BY 1").fetchall() for table, key in MARKED.items()]

    before = marks()
    world.drain()
    world.follow()
    assert marks() == before
    assert not world.stream.activity.state.db.execute("SELECT 1 FROM rows WHERE file IS NULL").fetchone(), "the control: it was followed"
    with world.stream.activity.state.transaction():
        world.stream.activity.state.timetable.mark_all()
    assert marks() != before, "the control: what is made anew shows"


MARKED = {"due": "customer_id", "item_due": "item_id"}
