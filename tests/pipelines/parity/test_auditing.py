"""Served values held against today's tables: what was wrong is found, exactly that, and what only looks so is told apart."""

from contextlib import closing

import pytest

from pipelines import feature_store, ingest, parity
from pipelines.log import open_log
from pipelines.online.writer import OnlineWriter, Row
from pipelines.parity import auditing, mending, scratch, values
from pipelines.parity.rehearsal import Rehearsal
from pipelines.served import Row as ServedRow
from pipelines.served import Served
from pipelines.vault import open_vault

pytestmark = pytest.mark.slow

DAY = 1_440


class Live:
    """A home with its stream, at a time that the test tells; `serve` notes down what a model is fed."""

    def __init__(self, town):
        self.town, self.home, self.rows = town, town.home, []
        feature_store.apply(town.home)
        self.feast = feature_store.store(town.home)
        self.stream = Rehearsal(town.settings, now_us=town.us(-DAY))

    def hear(self, *told):
        for call, at in told:
            self.stream.tell(self.town.logged([(call, at)]), at_us=round(at.timestamp() * 1e6))

    def keep(self, *told):
        """The log takes them in, and no worker looks."""
        with closing(open_log(self.home, settings=self.town.settings)) as log:
            log.append(self.town.logged(list(told)))

    def at(self, minutes):
        self.stream.advance(self.town.us(minutes))

    def serve(self, minutes, *, service="churn_v1", version="churn 1", only=None):
        """What a request for everybody finds then; the clock of the stream stands where it stands."""
        known = values.view_of(self.feast, "identifier_customer")
        with closing(OnlineWriter(self.home)) as online:
            names = [name for name, _ in online.everything(known.name, "customer_id", join_key="identifier")]
        owners = sorted({row["customer_id"] for row in values.online(self.feast, known, [(name,) for name in names])})
        fresh = []
        for customer in owners if only is None else [only]:
            held = {}
            for projection in self.feast.get_feature_service(service).feature_view_projections:
                (row,) = values.online(self.feast, values.view_of(self.feast, projection.name), [(customer,)])
                held |= row
            fresh.append(ServedRow(customer, service, version, self.town.us(minutes), self.town.us(minutes) + 500, held))
        self.rows += fresh
        return fresh

    def owner(self, kind, name):
        with closing(OnlineWriter(self.home)) as online:
            key = self.stream.vault.pseudonym(kind, name)
            return online.read("identifier_customer", "customer_id", [key], join_key="identifier")[key][0]

    def audit(self):
        ingest.drain(self.home, settings=self.town.settings)
        with scratch.folder() as base:
            return auditing.audit(self.home, self.rows, base, settings=scratch.settings_of(self.town.settings, base))


@pytest.fixture
def live(town):
    made = Live(town)
    yield made
    made.stream.close()


def visits(town, user, *minutes):
    return [town.call(f"{user}-{minute}", minute, user=user, kind="order" if n % 3 == 2 else "view") for n, minute in enumerate(minutes)]


def test_answers_of_a_stream_that_keeps_up_are_right_at_every_instant(live, town):
    for user in ("ann", "ben"):
        live.hear(*visits(town, user, 0, 5, 11, 300))
    for minutes in (301, 340, DAY + 400, 9 * DAY, 40 * DAY, 100 * DAY):
        live.at(minutes)
        live.serve(minutes)
        live.serve(minutes, service="intent_v1", version="intent 1")
    found = live.audit()
    assert (found.compared.by_feature, found.in_flight, dict(found.explained)) == ({}, 0, {"customer_gone": 0})
    assert found.rows == len(live.rows) == 2 * 2 * 6
    assert found.compared.checked > 500


def test_audit_finds_exactly_what_was_served_after_the_stream_stopped_and_a_window_expired(live, town):
    live.hear(*visits(town, "ann", 0, 5, 11))
    live.at(20)
    right = live.serve(21, version="churn 1")
    live.serve(22, version="churn 2")
    # the worker is gone; after two hours the window of one is empty, and nobody says so
    wrong = live.serve(140, version="churn 2")
    found = live.audit()
    assert {f"customer_activity:{what}_1h" for what in ("events", "views", "purchases", "revenue_cents")} <= set(found.wrong)
    assert all(name.endswith("_1h") for name in found.wrong)
    events = found.wrong["customer_activity:events_1h"]
    assert (events.values, events.largest, dict(events.models)) == (1, right[0].values["events_1h"], {"churn 2": 1})
    assert events.first == events.last == values.instant(wrong[0].served_us).isoformat()
    assert 0 < events.behind_s <= 80 * 60
    assert found.affected == {"customer_activity": {wrong[0].customer_id}}


def test_event_that_arrives_late_makes_no_earlier_answer_wrong(live, town):
    live.hear(*visits(town, "ann", 0, 5))
    live.at(30)
    live.serve(30)
    live.hear(town.call("late", 6, late=200, user="ann", kind="order"))  # it had happened, and we did not know
    live.at(210)
    live.serve(210)
    assert live.audit().compared.by_feature == {}


def test_control_the_late_event_would_be_missed_were_its_own_time_to_count(live, town):
    live.hear(*visits(town, "ann", 0, 5))
    live.at(30)
    live.serve(30)
    live.keep(town.call("lost", 6, user="ann", kind="order"))  # received at once, and applied by nobody
    assert live.audit().wrong["customer_activity:orders_total"].values == 1


def test_event_on_its_way_is_in_flight_for_two_seconds_and_no_longer(live, town):
    live.hear(*visits(town, "ann", 0))
    live.keep(town.call("next", 5, late=0, user="ann"))
    live.serve(5 + 1.5 / 60)
    assert live.serve(5 + 2.5 / 60)
    found = live.audit()
    assert found.in_flight == 1
    assert found.wrong["customer_activity:events_total"].values == 1


def test_customer_who_was_merged_into_another_since_is_told_apart(live, town):
    live.hear(*visits(town, "ann", 0, 5), town.call("d", 10, device="d1"))
    live.serve(11)
    live.hear(town.call("both", 20, device="d1", user="ann", kind="identify"))
    live.serve(21)
    found = live.audit()
    assert found.compared.by_feature == {}
    assert found.explained["customer_gone"] == 1


def test_customer_who_refused_since_is_told_apart(live, town):
    live.hear(*visits(town, "ann", 0, 5))
    live.serve(6)
    live.rows[-1] = ServedRow(**{**_fields(live.rows[-1]), "values": {**live.rows[-1].values, "views_total": 99}})
    live.hear(town.call("no", 20, user="ann", allowed=False))
    found = live.audit()
    assert (found.explained["refused_since"], found.compared.by_feature) == (1, {})


def _fields(row):
    return {name: getattr(row, name) for name in row.__slots__}


def test_value_that_never_was_right_says_so(live, town):
    live.hear(*visits(town, "ann", 0, 5))
    live.serve(6)
    live.rows[-1] = ServedRow(**{**_fields(live.rows[-1]), "values": {**live.rows[-1].values, "views_total": 99}})
    wrong = live.audit().wrong
    assert set(wrong) == {"customer_activity:views_total"}
    assert (wrong["customer_activity:views_total"].behind_s, wrong["customer_activity:views_total"].largest) == (None, 97)


# -- repair


def test_repair_writes_wrong_rows_anew_and_leaves_what_knows_more(live, town):
    live.hear(*visits(town, "ann", 0, 5), *visits(town, "ben", 0, 5), *visits(town, "eve", 0, 5))
    live.at(6)
    spoilt, newer, _ = (live.owner("user_id", name) for name in ("ann", "ben", "eve"))
    with closing(OnlineWriter(live.home)) as writer, writer.transaction() as online:
        online.write("customer_activity", [Row(spoilt, {"views_total": 77}, event_us=town.us(6))])
        online.write("customer_activity", [Row(newer, {"views_total": 78}, event_us=town.us(60))])
    live.serve(6)
    ingest.drain(live.home, settings=town.settings)
    with scratch.folder() as base:
        found = auditing.audit(live.home, live.rows, base, settings=scratch.settings_of(town.settings, base))
        assert found.affected == {"customer_activity": {spoilt, newer}}
        assert mending.mend(live.home, found.affected, base, settings=town.settings, known_us=town.us(7)) == {
            "customer_activity:views_total": 1
        }
    live.rows.clear()
    live.serve(6)
    assert {row.customer_id: row.values["views_total"] for row in live.rows if row.values["views_total"] > 5} == {newer: 78}


def test_check_looks_everywhere_repairs_what_is_wrong_and_is_clean_then(live, town):
    live.hear(*visits(town, "ann", 0, 5, 11), *visits(town, "ben", 3, 9, 4000))
    live.at(4001)
    ann = live.owner("user_id", "ann")
    live.stream.close()
    settings = town.settings.model_copy(update={"as_of": town.at(4001)})
    with closing(open_vault(live.home)) as vault, closing(Served(live.home, vault=vault)) as sample:
        sample.add(live.serve(4001), now_us=1)
    with closing(OnlineWriter(live.home)) as writer, writer.transaction() as online:
        online.write("customer_activity", [Row(ann, {"views_total": 77}, event_us=town.us(4001))])
        ghost, spoilt = (Row((ann, item), {"customer_item_views_total": 78}, event_us=town.us(4001)) for item in ("ghost", "i1"))
        online.write("customer_item", [ghost, spoilt], join_key=("customer_id", "item_id"))
    ingest.drain(live.home, settings=settings)
    look = {"settings": settings, "customers": 5, "probes": 12, "seed": 1}
    found = parity.check(live.home, repairs=True, **look)
    wrong = {"customer_activity:views_total": 1, "customer_item:customer_item_views_total": 2}
    assert found.by_feature | {"customer_activity:views_total": 1} == wrong, (found.stages, found.examples)  # once for each service
    assert [found.stages[name]["mismatches"] for name in ("replay", "seeded", "served")] == [0, 0, 0]
    assert all(found.stages[name]["checked"] for name in ("replay", "seeded", "store", "served"))
    assert found.repaired == wrong  # the row of an item that they never saw is gone
    assert ann not in repr(found.examples)
    again = parity.check(live.home, **look)
    assert (again.mismatches, again.repaired) == (0, {})
    assert again.checked > 1_000  # the home's keys are random, so which are looked at is
    live.stream = Rehearsal(town.settings)
