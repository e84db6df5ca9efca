"""Late, repeated and out of order: once everything has arrived, events and features are those of an ordered run.

Every call carries its person's word on its use, as SDKs send it. One that carries none is kept out until such a word is known, and
is not there to be let in later unless it is sent again.
"""

import os
from datetime import timedelta

import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines import features, tables

# who: user, device; what; seconds after the one before; whether its person allows its use
CALL = st.tuples(
    st.sampled_from([("u1", None), ("u2", None), ("u1", "d1"), ("u2", "d1"), (None, "d1"), (None, "d2"), ("u3", "d2")]),
    st.sampled_from(["view", "view", "order", "return", "identify"]),
    st.sampled_from([0.5, 40, 1_000, 2_500, 90_000]),
    st.sampled_from([True, True, True, False]),
)
SCHEDULE = st.tuples(st.lists(CALL, min_size=4, max_size=14), st.randoms(use_true_random=False))
SCHEDULES = int(os.environ.get("RAPPORT_SCHEDULES", "4"))
QUICK = {"deadline": None, "derandomize": True, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}


def calls_of(shop, drawn: list[tuple]) -> list[dict]:
    """The calls in the order in which they happened, received at once."""
    told, minute = [], 0.0
    for number, ((user, device), kind, seconds, is_allowed) in enumerate(drawn):
        minute += seconds / 60
        fields = {"context": shop.allowed if is_allowed else shop.refused, "receivedAt": shop.at(minute + 0.001)}
        fields |= {"anonymousId": device} if device else {}
        if kind == "identify":
            told.append(shop.call(f"m{number}", minute, user=user, type="identify", traits={"region": f"r{number % 3}"}, **fields))
        elif kind == "view":
            told.append(shop.call(f"m{number}", minute, user=user, **fields))
        else:
            name = "Order Completed" if kind == "order" else "Order Refunded"
            told.append(shop.order(f"m{number}", minute, user=user, event=name, n=1 + number % 2, **fields))
    return told


def delayed(shop, calls: list[dict], random) -> list[list[dict]]:
    """The same calls in any order, up to a week late, some of them twice, over one to four files."""
    late = [call | {"receivedAt": shop.at(60 * 24 * random.choice([8, 9, 15]))} for call in calls]
    late += [random.choice(late) for _ in range(3)]
    random.shuffle(late)
    cuts = sorted(random.randrange(len(late) + 1) for _ in range(random.randrange(4)))
    return [part for part in (late[a:b] for a, b in zip([0, *cuts], [*cuts, len(late)], strict=True)) if part]


def features_at(shop, at: pd.Timestamp, table: tables.Table) -> pd.DataFrame:
    """The newest row of each customer or item strictly before `at`.

    Without the counts of sessions: those are told in the order in which events became known (see `pipelines.sessions`).
    """
    rows = shop.table(table)
    key = table.key[0]
    rows = rows[rows["event_timestamp"] < at].sort_values("event_timestamp").drop_duplicates(key, keep="last")
    if key == "customer_id":
        rows = rows.assign(customer_id=rows["customer_id"].map(shop.people()))
    told_as_known = [name for name in rows if name.startswith("sessions_")]
    rows = rows.drop(columns=told_as_known)
    return rows.drop(columns=["event_timestamp"]).sort_values(key).reset_index(drop=True)


@settings(max_examples=SCHEDULES, **QUICK)
@given(SCHEDULE)
def test_any_order_of_arrival_gives_the_events_of_an_ordered_run(new_shop, schedule) -> None:
    check_order(new_shop, *schedule)


def check_order(new_shop, drawn: list[tuple], random) -> None:
    ordered = new_shop()
    late = new_shop(like=ordered)
    calls = calls_of(ordered, drawn)
    ordered.run(*calls)
    for number, part in enumerate(delayed(late, calls, random)):
        late.run(*part, name=f"{number}.jsonl")
        assert late.is_balanced()
    pd.testing.assert_frame_equal(ordered.comparable(), late.comparable())


@pytest.mark.slow
@settings(max_examples=SCHEDULES, **QUICK)
@given(SCHEDULE)
def test_features_after_the_last_arrival_are_those_of_an_ordered_run(new_shop, schedule) -> None:
    drawn, random = schedule
    drawn = [((user, device), kind, seconds, True) for (user, device), kind, seconds, _ in drawn]
    ordered = new_shop()
    late = new_shop(like=ordered)
    calls = calls_of(ordered, drawn)
    ordered.run(*calls)
    for number, part in enumerate(delayed(late, calls, random)):
        late.run(*part, name=f"{number}.jsonl")
    for shop in (ordered, late):
        features.build(shop.home)
    at = pd.Timestamp(ordered.start + timedelta(days=16))
    for table in (tables.CUSTOMER_ACTIVITY, tables.ITEM_ACTIVITY):
        mine, theirs = (features_at(shop, at, table) for shop in (ordered, late))
        pd.testing.assert_frame_equal(mine, theirs, obj=table.name, check_dtype=False)


def test_control_before_everything_has_arrived_the_features_differ(new_shop) -> None:
    ordered = new_shop()
    late = new_shop(like=ordered)
    calls = calls_of(ordered, [(("u1", None), "view", 40, True), (("u1", None), "order", 40, True)])
    ordered.run(*calls)
    late.run(calls[0], calls[1] | {"receivedAt": late.at(60 * 24 * 15)})
    for shop in (ordered, late):
        features.build(shop.home)
    early = pd.Timestamp(ordered.start + timedelta(days=1))
    assert features_at(ordered, early, tables.CUSTOMER_ACTIVITY)["purchases_total"].tolist() == [2]
    assert features_at(late, early, tables.CUSTOMER_ACTIVITY)["purchases_total"].tolist() == [0]
