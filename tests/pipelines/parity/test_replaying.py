"""Online equals offline at every instant, whatever the calls and however they come; and each skew that is planted shows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines import step_functions, tiles
from pipelines.parity.replaying import Manner
from pipelines.settings import IngestSettings, Settings
from pipelines.stream import Stepped, Stream
from pipelines.stream.categories import Categories

pytestmark = pytest.mark.slow

QUICK = {"deadline": None, "derandomize": True, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}
# who: user, device; what; minutes after the one before; minutes from it to its receipt (a fast clock: before it)
CALL = st.tuples(
    st.sampled_from([("u1", None), ("u2", None), ("u1", "d1"), (None, "d1"), (None, "d2"), ("u3", "d2"), ("u3", None)]),
    st.sampled_from(["view", "view", "add", "order", "search", "identify"]),
    st.sampled_from([0, 0.01, 7, 29.9999, 30, 30.0001, 61, 1_440, 9_000]),
    st.sampled_from([0.0, 0.0, 0.05, 45, 1_500, 12_000, -30]),
    st.sampled_from(["i1", "i2", "i3"]),
)


def test_busy_shop_is_the_same_online_and_offline(busy_calls, play):
    stage = play(busy_calls, probes=150)
    assert (stage.compared.mismatches, stage.compared.by_feature) == (0, {})
    assert stage.compared.checked > 5_000
    views = {"customer_activity", "customer_session", "customer_item", "customer_category", "item_activity"}
    assert (set(stage.what["views"]), stage.what["not_streamed"]) == (views, [])


def test_worker_that_is_killed_again_and_again_loses_and_doubles_nothing(busy_calls, play):
    stage = play(busy_calls, manner=Manner(held_up=0.3, killed=0.3))
    assert stage.compared.by_feature == {}
    assert stage.what["kills"] > 3


def test_event_of_a_clock_that_is_fast_counts_from_its_own_time(new_town, play):
    drawn = [(("u3", None), "view", 1_440, 12_000, "i2"), ((None, "d2"), "add", 30.0001, 45, "i3"), (("u3", None), "search", 30, -30, "i2"),
             (("u2", None), "order", 1_440, 0.0, "i1"), ((None, "d2"), "view", 29.9999, 0.05, "i2"),
             (("u3", "d2"), "identify", 61, 0.0, "i1"), (("u1", None), "view", 61, 0.05, "i2")]  # fmt: skip
    check_schedule(new_town(), play, drawn, 72)


@settings(max_examples=4, **QUICK)
@given(st.lists(CALL, min_size=3, max_size=14), st.integers(0, 99))
def test_any_schedule_is_the_same_online_and_offline(new_town, play, drawn, seed):
    check_schedule(new_town(), play, drawn, seed)


def check_schedule(town, play, drawn, seed):
    told, minute = [], 0.0
    for number, ((user, device), kind, minutes, late, item) in enumerate(drawn):
        minute += minutes
        told.append(town.call(number, minute, late=late, user=user, device=device, kind=kind, item=item))
    stage = play(town.logged(told), probes=40, seed=seed, manner=Manner(held_up=0.2, killed=0.1))
    assert stage.compared.by_feature == {}, stage.compared.examples
    assert stage.compared.checked


def test_simulated_shop_is_the_same_online_and_offline(new_town, play, tmp_path):
    import json
    from contextlib import closing
    from datetime import datetime

    from pipelines import simulate
    from pipelines.log.calls import CallError, parse
    from pipelines.vault import open_vault

    town = new_town()
    simulate.simulate(tmp_path, customers=25, days=30, seed=5)
    calls = []
    with closing(open_vault(town.home)) as vault:
        for line in (tmp_path / "events.jsonl").read_bytes().splitlines():
            try:
                received = datetime.fromisoformat(json.loads(line)["receivedAt"])
                calls += parse(line, None, source="web", received=received, vault=vault, limits=town.settings.collect).events
            except (CallError, ValueError):
                continue
    first = {call.message_id: call for call in reversed(calls)}
    stage = play(sorted(first.values(), key=lambda call: call.received_us), probes=120)
    assert stage.compared.by_feature == {}
    assert stage.compared.checked > 5_000


# -- planted skews: each alone turns it red


class OnEventsOnly(Stream):
    """Windows are pushed when something happens, and not when they expire."""

    def _expire(self):
        return Stepped()


def other_gap(home, *, settings, **more):
    return Stream(home, settings=settings.model_copy(update={"ingest": IngestSettings(session_gap_minutes=31)}), **more)


def test_control_windows_pushed_on_events_only(busy_calls, play):
    found = play(busy_calls, open_stream=OnEventsOnly).compared.by_feature
    assert found["item_activity:item_views_7d"]
    assert found["customer_activity:events_7d"] > found["customer_activity:events_total"]  # which one event from the future moves


def test_control_hop_that_is_off_by_one(busy_calls, play, monkeypatch):
    monkeypatch.setattr(tiles._Life, "exit_us", lambda life, ts: ts - ts % life.hop_us + life.life_us - life.hop_us)
    found = play(busy_calls, probes=120).compared.by_feature
    assert found
    assert all(name.rsplit("_", 1)[-1] in ("1h", "24h", "7d", "30d", "90d") for name in found)


def test_control_items_whose_category_is_known_later_only(busy_calls, play, monkeypatch):
    monkeypatch.setattr(Categories, "of", lambda *_: {})
    found = play(busy_calls).compared.by_feature
    assert found["customer_category:customer_category_views_total"]
    assert {name.partition(":")[0] for name in found} == {"customer_category"}


def test_control_event_that_is_applied_twice(busy_calls, play, monkeypatch):
    add = tiles.Tiles.add

    def twice(held, row, enter_us):
        add(held, row, enter_us)
        if row["type"] == "cart_add":
            add(held, row, enter_us)

    monkeypatch.setattr(tiles.Tiles, "add", twice)
    assert play(busy_calls).compared.by_feature["customer_activity:cart_adds_total"]


def test_control_late_event_that_counts_from_its_own_time(busy_calls, play, monkeypatch):
    changelog = step_functions.changelog  # of the build: online nobody can count what is not known yet

    def at_its_own_time(events, aggregates):
        place = events.schema.get_field_index("created_timestamp")
        return changelog(events.set_column(place, "created_timestamp", events["event_timestamp"]), aggregates)

    monkeypatch.setattr(step_functions, "changelog", at_its_own_time)
    assert play(busy_calls, probes=150).compared.by_feature["customer_activity:events_total"]


def test_control_session_gap_that_is_not_the_builds(busy_calls, play):
    found = play(busy_calls, probes=150, open_stream=other_gap).compared.by_feature
    assert any(name.startswith("customer_session:") or "sessions" in name for name in found)


def test_control_call_that_is_lost(busy_calls, play):
    class Deaf(Stream):
        def _handle(self, online, heard):
            return super()._handle(online, [call for call in heard if "m3" not in call.message_id])

    assert play(busy_calls, open_stream=Deaf).compared.by_feature["customer_activity:events_total"]


# -- people


def test_visitor_who_identifies_and_accounts_that_merge_are_the_same_online_and_offline(new_town, play):
    town = new_town()
    told = [
        town.call(0, 0, device="d1"),
        town.call(1, 5, device="d1", item="i2"),
        town.call(2, 10, user="ann", kind="order"),
        town.call(3, 20, device="d1", user="ann", kind="identify"),  # the visitor is ann
        town.call(4, 25, device="d1", user="ann", item="i3"),
        town.call(5, 30, device="d2", user="bea"),
        town.call(6, 2_000, device="d2", user="bea", kind="order"),
        town.call(7, 2_010, device="d3", user="bea"),
        town.call(8, 2_020, device="d3", user="ann"),  # a browser that both used
        town.call(9, 50_000, user="bea"),
    ]
    calls = town.logged(told)
    for end in (4, 6, 9, len(calls)):  # as of each of these instants the tables are what an ingest at that moment makes
        stage = play(calls[:end], probes=60, seed=end)
        assert stage.compared.by_feature == {}, end


def test_settings_of_the_home_are_those_of_the_replay(busy_calls, play):
    other = Settings(home=".", ingest=IngestSettings(session_gap_minutes=10))
    assert play(busy_calls, settings=other).compared.by_feature == {}


def test_order_of_the_log_counts_where_it_is_not_that_of_receipt(busy_calls, play):
    rng = np.random.default_rng(4)
    shaken = sorted(busy_calls, key=lambda call: call.received_us + int(rng.integers(0, 120_000_000)))
    assert play(shaken).compared.by_feature == {}


def test_calls_of_nobody_we_may_know_leave_nothing_to_compare(new_town, play):
    from pipelines.errors import StoreError

    town = new_town()
    with pytest.raises(StoreError, match="consent"):
        play(town.logged([town.call(n, n, user="ann", allowed=False) for n in range(3)]))


def test_same_call_told_twice_is_one(busy_calls, play):
    again = [replace(call, received_us=call.received_us + 1) for call in busy_calls[:10]]
    told = sorted([*busy_calls, *again], key=lambda call: call.received_us)
    assert play(told).compared.by_feature == {}
