"""The law: for any schedule, what is online is what the ingest, the feature tables and a point-in-time join say of that instant.

Calls come late, twice, shuffled, from clocks that run ahead, of visitors who log in and of devices that several people use; the worker
is stopped at any time between two steps; an ingest runs at any time. A permission is never late here: of a call that carries none it is
judged when it comes, and an ingest that comes later may know more. Nor does such a call link anybody: an ingest that drops it forgets.
Some say of which category their item is, and now and then the catalogue says something else of all items.
"""

import os
from contextlib import closing
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines import tables

ALLOW, DENY = {"personalization": True}, {"personalization": False}
SCHEDULES = int(os.environ.get("RAPPORT_SCHEDULES", "5"))
QUICK = {"deadline": None, "derandomize": True, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}

WHO = st.sampled_from([("u1", None), ("u2", None), ("u1", "d1"), ("u2", "d1"), (None, "d1"), (None, "d2"), ("u3", "d2"), ("u3", None)])
WHAT = st.sampled_from(
    ["view", "view", "view", "cart", "search", "order", "return", "identify", "exposure", "refuse", "again", "session", "silent", "silent"]
)
LATE_S = st.sampled_from([0, 0, 0, 0, 0.001, 40, 2_000, 90_000, -0.5, -600])  # how long before its receipt it was made
GAP_S = st.sampled_from([0, 0.2, 0.2, 5, 40, 700, 1_790, 1_801, 4_000, 50_000, 90_000, 9 * 86_400])
DO = st.sampled_from(["", "", "step", "step", "step", "restart", "ingest", "list"])
CALL = st.tuples(WHO, WHAT, GAP_S, LATE_S, DO)
SCHEDULE = st.tuples(
    st.lists(CALL, min_size=6, max_size=22), st.sampled_from([0, 1e-6, 1, 300, 1_800, 3_600, 86_400, 40 * 86_400]), st.booleans()
)


def play(world, schedule) -> None:
    """Say the calls; what is left of them is applied at the end, at the given time after the last."""
    calls, after_s, is_shuffled = schedule
    at_s, held = 0.0, []
    world.spoke = set()
    for number, ((user, device), what, gap_s, late_s, do) in enumerate(calls):
        at_s += gap_s
        held.append((number, user, device, what, at_s, late_s))
        if do or not is_shuffled or len(held) > 3:
            for one in sorted(held, key=lambda call: (call[0] * 7) % 5 if is_shuffled else call[0]):
                say(world, at_s, *one)
            held = []
        if do == "step":
            world.step()
        elif do == "restart":
            world.step()
            world.restart()
        elif do == "ingest":
            world.step()
            world.drain()
            world.follow()
        elif do == "list":
            relist(world, {f"i{n}": "abc"[(n * number) % 3] for n in range(number % 5)})
    for one in held:
        say(world, at_s, *one)
    world.now += round(after_s * 1e6)
    world.step()
    world.step()


def relist(world, categories) -> None:
    at = datetime(2026, 2, 1, tzinfo=UTC)
    rows = [{"item_id": item, "category": category, "event_timestamp": at} for item, category in categories.items()]
    tables.write(world.home, tables.ITEMS, pa.Table.from_pylist(rows, schema=tables.ITEMS.schema))
    world.follow()
    world.taken_back.add("customer_category")


def check(new_world, tmp_path_factory, schedule) -> None:
    with closing(new_world()) as world:
        play(world, schedule)
        assert world.is_exact(tmp_path_factory.mktemp("truth") / "home")


def say(world, received_s, number, user, device, what, _at_s, late_s) -> None:
    item = f"i{number % 4}"
    category = {"i0": "a", "i1": "a", "i2": "b"}.get(item) if number % 3 else None
    options = {"user": user, "device": device, "made_s": received_s - late_s, "category": category}
    if (what in ("refuse", "silent") and user is None) or (what == "silent" and user not in world.spoke):
        what = "view"  # a visitor's permission may come to be that of a person who is not known yet
    world.spoke.add(user)
    if what == "refuse":
        world.say(received_s, "identify", **options, consent=DENY)
    elif what == "silent":
        world.say(received_s, user=user, made_s=received_s - late_s, consent=None, product_id=item, price=1 + number)
    elif what == "order" or what == "return":
        lines = [{"product_id": f"i{n}", "quantity": n + 1, "price": 10.005, "category": "a" if n else None} for n in range(1 + number % 3)]
        name = "Order Completed" if what == "order" else "Order Refunded"
        world.say(received_s, name, **options, order_id=f"o{number // 3}", products=lines)
    elif what == "again":
        world.say(received_s, **options, message="same", product_id=item)
    elif what == "session":
        world.say(received_s, **options, session_id=f"s{number % 2}", product_id=item)
    else:
        names = {"view": "Product Viewed", "cart": "Product Added", "search": "Products Searched", "exposure": "Product List Viewed"}
        world.say(received_s, names.get(what, what), **options, product_id=item, price=2.5 + number)


@pytest.mark.slow
@settings(max_examples=SCHEDULES, **QUICK)
@given(SCHEDULE)
def test_online_is_what_the_batch_says(new_world, tmp_path_factory, schedule) -> None:
    check(new_world, tmp_path_factory, schedule)
