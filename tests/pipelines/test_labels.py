import contextlib
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from models import returns
from pipelines import labels, tables
from pipelines.errors import NotTrainable
from pipelines.settings import LabelSettings, Settings

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
AS_OF = START + 60 * DAY
SETTINGS = Settings(
    labels=LabelSettings(
        churn_horizon_days=10,
        churn_active_days=14,
        churn_cutoffs=2,
        ranking_horizon_days=10,
        intent_points=(1, 3),
        min_rows=10,
        min_class_rows=5,
    )
)


LENIENT = SETTINGS.model_copy(update={"labels": SETTINGS.labels.model_copy(update={"min_rows": 0, "min_class_rows": 0})})


def event(customer, day, kind="purchase", item="i1", session=None, known_after_days=0.0):
    at = START + timedelta(days=float(day))
    return {
        "event_id": f"{customer}-{day}-{kind}-{item}",
        "type": kind,
        "event_timestamp": at,
        "created_timestamp": at + timedelta(days=float(known_after_days)),
        "customer_id": customer,
        "item_id": item,
        "session_id": session,
    }


def log(*rows):
    frame = pd.DataFrame(list(rows))
    for column in ("event_timestamp", "created_timestamp"):
        frame[column] = pd.to_datetime(frame[column], utc=True).astype("datetime64[us, UTC]")
    return frame


def allowed(customers, since=START - DAY, withdrawn=()):
    rows = [(c, since, True) for c in customers] + [(c, at, False) for c, at in withdrawn]
    frame = pd.DataFrame(rows, columns=["customer_id", "event_timestamp", "is_allowed"])
    frame["event_timestamp"] = pd.to_datetime(frame["event_timestamp"], utc=True).astype("datetime64[us, UTC]")
    frame = frame.assign(created_timestamp=frame["event_timestamp"], purpose="personalization", basis="consent")
    frame = frame.assign(identifier=frame["customer_id"], source="web", policy_version="1", evidence="m1")
    return frame[tables.CONSENTS.schema.names]


def shop(seed=0, customers=60, days=60):
    """Random sessions; half of them browse only, every third customer never buys, some stop half-way."""
    rng = np.random.default_rng(seed)
    rows = []
    for c in range(customers):
        stops = rng.uniform(10, days) if c % 2 else days
        for s, day in enumerate(np.sort(rng.uniform(0, stops, rng.integers(6, 16)))):
            kinds = ["view"] * int(rng.integers(1, 5)) + (["cart_add", "purchase"] if c % 3 and rng.random() < 0.5 else [])
            for n, kind in enumerate(kinds):
                rows.append(event(f"c{c:02d}", day + n / 1440, kind, f"i{rng.integers(8)}", f"c{c:02d}-s{s}"))
    return log(*rows)


SHOP = shop()
CONSENTS = allowed(sorted(SHOP["customer_id"].unique()))


def make(which, events=SHOP, consents=CONSENTS, settings=SETTINGS, as_of=AS_OF):
    return getattr(labels, which)(events, consents, settings=settings, as_of=as_of)


# -- churn -------------------------------------------------------------------------------------------------------------


def test_churn_labels_of_three_customers_are_right_at_every_cutoff():
    stays = [event("stays", d) for d in range(1, 60, 5)]
    leaves = [event("leaves", d) for d in (2, 12, 22, 32)]
    browser = [event("browser", d, "view") for d in range(1, 60)]
    rows = make("churn", log(*stays, *leaves, *browser), allowed(["stays", "leaves", "browser"]), LENIENT)
    assert set(rows["customer_id"]) == {"stays", "leaves"}
    assert rows[rows["customer_id"] == "stays"]["label"].eq(0).all()
    found = {(row.event_timestamp - START).days: row.label for row in rows[rows["customer_id"] == "leaves"].itertuples()}
    # Cut-offs: test 50, validation 40, training 30 and 23. At 50 the last purchase is 18 days old: not in the population.
    assert found == {40: 1, 30: 0, 23: 0}


def test_roles_follow_time_and_no_label_window_reaches_into_the_next_role():
    rows = make("churn")
    for earlier, later in (("train", "validation"), ("validation", "test")):
        assert rows.loc[rows["split"] == earlier, "matured_timestamp"].max() <= rows.loc[rows["split"] == later, "event_timestamp"].min()


def test_no_label_window_is_censored():
    rows = make("churn")
    assert (rows["matured_timestamp"] <= pd.Timestamp(AS_OF)).all()
    censored = rows["event_timestamp"] + timedelta(days=30) <= pd.Timestamp(AS_OF)
    assert not censored.all()  # control: a longer horizon at these cut-offs would be


@given(seed=st.integers(1, 1_000))
@hypothesis_settings(max_examples=5)
def test_truncating_the_log_where_a_label_matured_changes_no_label(seed):
    events = shop(seed)
    full = make("churn", events, settings=LENIENT)
    for (at, matured), expected in full.groupby(["event_timestamp", "matured_timestamp"]):
        cut = events[events["event_timestamp"] <= matured]
        again = labels._churn_rows(cut[cut["type"] == "purchase"], labels.Cutoff(at, "any"), settings=SETTINGS)
        pd.testing.assert_series_equal(
            again.set_index("customer_id")["label"].sort_index(), expected.set_index("customer_id")["label"].sort_index()
        )


def test_truncating_the_log_one_horizon_earlier_does_change_labels():
    full = make("churn")
    at = full["event_timestamp"].max()
    cut = SHOP[(SHOP["event_timestamp"] <= at) & (SHOP["type"] == "purchase")]
    again = labels._churn_rows(cut, labels.Cutoff(at, "any"), settings=SETTINGS)
    assert again["label"].mean() == 1 > full.loc[full["event_timestamp"] == at, "label"].mean()


def test_shuffling_the_future_changes_neither_population_nor_past_labels():
    rng = np.random.default_rng(1)
    rows = make("churn")
    matured = rows.loc[rows["split"] == "validation", "matured_timestamp"].iloc[0]
    future = SHOP["event_timestamp"] > matured
    shuffled = SHOP.copy()
    shuffled.loc[future, "customer_id"] = rng.permutation(SHOP.loc[future, "customer_id"])
    again = make("churn", shuffled)
    earlier = rows["split"] != "test"
    pd.testing.assert_frame_equal(rows[earlier].reset_index(drop=True), again[again["split"] != "test"].reset_index(drop=True))
    assert not rows[~earlier].reset_index(drop=True).equals(again[again["split"] == "test"].reset_index(drop=True))


def test_population_ignores_an_event_that_was_learnt_after_the_cutoff():
    at = START + 20 * DAY
    known = log(event("c1", 15), event("c2", 15, known_after_days=9))
    assert labels.churn_population(known, at, settings=SETTINGS)["customer_id"].tolist() == ["c1"]
    assert labels.churn_population(known, at + 5 * DAY, settings=SETTINGS)["customer_id"].tolist() == ["c1", "c2"]


def test_customer_at_the_edge_of_the_activity_window_is_out_and_at_the_cutoff_is_in():
    at = START + 20 * DAY
    rows = labels.churn_population(log(event("edge", 6), event("inside", 6.001), event("now", 20)), at, settings=SETTINGS)
    assert rows["customer_id"].tolist() == ["inside", "now"]


@pytest.mark.parametrize("which", ["churn", "intent", "interactions"])
def test_withdrawn_consent_removes_the_customer_from_the_whole_past(which):
    someone = make(which)["customer_id"].iloc[0]
    later = make(which, consents=allowed(SHOP["customer_id"].unique(), withdrawn=[(someone, AS_OF - DAY)]))
    assert someone not in set(later["customer_id"])
    assert len(later) > 0


@pytest.mark.parametrize("which", ["churn", "intent"])
def test_consent_given_late_leaves_only_the_rows_after_it(which):
    since = START + 35 * DAY
    rows = make(which, consents=allowed(SHOP["customer_id"].unique(), since=since), settings=LENIENT)
    assert rows["event_timestamp"].min() > pd.Timestamp(since)


@pytest.mark.parametrize("which", ["churn", "intent", "interactions"])
def test_without_any_consent_nothing_is_labelled(which):
    with pytest.raises(NotTrainable):
        make(which, consents=allowed([]))


# -- intent ------------------------------------------------------------------------------------------------------------


def session(*kinds, customer="c1", name="s1", start=1.0, minutes=1.0, known_after_days=0.0):
    return [event(customer, start + n * minutes / 1440, k, f"i{n}", name, known_after_days) for n, k in enumerate(kinds)]


def test_decision_points_lie_after_the_nth_event_and_none_after_a_purchase():
    rows = labels.decision_points(log(*session("view", "view", "view", "purchase", "view", "view")), settings=SETTINGS)
    assert rows["session_events"].tolist() == [1, 3]
    assert rows["label"].tolist() == [1, 1]
    assert (rows["event_timestamp"] == pd.Timestamp(START + DAY) + pd.to_timedelta([0, 2], "min") + pd.Timedelta(1, "us")).all()
    bought_early = labels.decision_points(log(*session("view", "purchase", "view", "view")), settings=SETTINGS)
    assert bought_early["session_events"].tolist() == [1]


def test_purchase_in_another_session_is_no_label():
    bought_later = session("view", "purchase", name="s2", start=1.5)
    bought_by_another = session("purchase", customer="c2")
    rows = labels.decision_points(log(*session("view", "view"), *bought_later, *bought_by_another), settings=SETTINGS)
    assert rows.set_index("session_id")["label"].to_dict() == {"s1": 0, "s2": 1}


def test_events_of_one_instant_are_one_moment():
    rows = labels.decision_points(log(*session("view", "view", "view", minutes=0)), settings=SETTINGS)
    assert rows["session_events"].tolist() == [3]


def test_decision_waits_until_the_event_is_known_and_is_dropped_when_the_session_is_over():
    two_seconds = labels.decision_points(log(*session("view", known_after_days=2 / 86_400)), settings=SETTINGS)
    assert two_seconds["event_timestamp"].tolist() == [pd.Timestamp(START + DAY + timedelta(seconds=2, microseconds=1))]
    assert labels.decision_points(log(*session("view", known_after_days=1)), settings=SETTINGS).empty


def test_what_the_shop_did_is_no_step_of_the_session():
    rows = labels.decision_points(log(*session("exposure", "view", "consent", "purchase")), settings=SETTINGS)
    assert rows["session_events"].tolist() == [1]


def test_whole_sessions_lie_on_one_side_and_no_label_of_one_side_reads_the_next():
    rows = make("intent")
    assert rows.groupby("session_id")["split"].nunique().max() == 1
    assert rows.groupby("split")["matured_timestamp"].max()["train"] <= rows.groupby("split")["matured_timestamp"].min()["validation"]
    assert rows.groupby("split")["matured_timestamp"].max()["validation"] <= rows.groupby("split")["matured_timestamp"].min()["test"]
    assert (rows["matured_timestamp"] <= pd.Timestamp(AS_OF)).all()
    assert not rows.duplicated(["customer_id", "event_timestamp"]).any()


def test_session_still_open_is_not_labelled():
    last = SHOP["event_timestamp"].max()
    newest = SHOP.loc[SHOP["event_timestamp"].idxmax(), "session_id"]
    assert newest not in set(make("intent", as_of=last)["session_id"])
    assert newest in set(make("intent", as_of=last + timedelta(hours=1))["session_id"])


def test_planted_leak_is_visible_and_the_labels_do_not_carry_it():
    rows = make("intent")
    lengths = SHOP.groupby("session_id").size()
    leak = rows["session_id"].map(lengths)  # the whole session, known only at its end
    assert leak[rows["label"] == 1].mean() > leak[rows["label"] == 0].mean() + 1
    honest = rows["session_events"]
    assert abs(honest[rows["label"] == 1].mean() - honest[rows["label"] == 0].mean()) < 1


# -- not trainable -----------------------------------------------------------------------------------------------------


def test_log_without_views_has_no_decision_points():
    with pytest.raises(NotTrainable, match=r"no view among them"):
        make("intent", SHOP[SHOP["type"] == "purchase"])


def test_log_drawn_by_purchase_cannot_carry_an_intent_rate():
    buyers = SHOP.loc[SHOP["type"] == "purchase", "customer_id"].unique()
    with pytest.raises(NotTrainable, match=rf"{len(buyers)} of the log's {len(buyers)} customers are buyers"):
        make("intent", SHOP[SHOP["customer_id"].isin(buyers)])


def test_log_shorter_than_four_horizons_says_how_long_it_is():
    with pytest.raises(NotTrainable, match=r"covers 3\d\.\d days and 40 are needed"):
        make("churn", SHOP[SHOP["event_timestamp"] < pd.Timestamp(START + 35 * DAY)], as_of=START + 35 * DAY)


def test_log_without_the_churn_event_says_so():
    with pytest.raises(NotTrainable, match="no purchase event"):
        make("churn", SHOP[SHOP["type"] == "view"])


def test_small_split_is_named_with_its_counts_and_the_prior_is_kept():
    strict = SETTINGS.model_copy(update={"labels": SETTINGS.labels.model_copy(update={"min_rows": 100_000})})
    with pytest.raises(NotTrainable, match=r"test has \d+ rows with \d+ customers") as caught:
        make("churn", settings=strict)
    assert caught.value.prior is not None
    assert 0 < caught.value.prior < 1


def test_ranking_needs_buyers_after_the_cutoff():
    with pytest.raises(NotTrainable, match=r"0 of those customers buying"):
        make("interactions", SHOP[SHOP["type"] != "purchase"])


# -- ranking -----------------------------------------------------------------------------------------------------------


def test_interactions_count_every_event_of_an_instant():
    """As the online store does: see tests/pipelines/stream/test_known.py."""
    twin = log(*(event("c1", day, kind) for day, kind in ((1, "view"), (1, "purchase"), (1, "view"), (2, "cart_add"), (2, "return"))))
    rows = make("interactions", pd.concat([SHOP, twin]), allowed([*CONSENTS["customer_id"], "c1"]))
    assert rows.loc[rows["customer_id"] == "c1", "type"].tolist() == ["view", "view", "purchase", "cart_add"]
    assert rows.loc[rows["customer_id"] == "c1", "weight"].tolist() == [0.15, 0.15, 1.0, 0.5]


def test_ranking_separates_what_was_known_from_what_was_bought():
    at = START + 20 * DAY
    rows = log(
        event("c1", 10, "view", "i1"),
        event("c1", 19.9, "purchase", "i2"),
        event("c1", 19.9, "purchase", "i3", known_after_days=1),  # learnt too late
        event("c1", 25, "purchase", "i1"),
        event("c1", 25, "view", "i2"),
        event("c1", 27, "view", "i1"),
        event("c1", 26, "purchase", "new"),  # not on offer at the cut-off
        event("c1", 31, "purchase", "i2"),  # after the horizon
        event("c2", 25, "purchase", "i1"),  # unknown at the cut-off
    )
    rows = rows.assign(weight=rows["type"].map(labels.WEIGHTS))
    items = pd.DataFrame({"item_id": ["i4", "new"], "event_timestamp": pd.to_datetime([START, START + 26 * DAY], utc=True)})
    found = labels.ranking(rows, items, at=at, settings=SETTINGS)
    assert found.customers.tolist() == ["c1"]
    assert found.items.tolist() == ["i1", "i2", "i4"]
    assert found.history.toarray().tolist() == [[0.15, 1.0, 0.0]]
    assert found.relevant.toarray().tolist() == [[1.0, 0.0, 0.0]]
    assert found.worth.toarray().tolist() == [[1.0, 0.15, 0.0]]  # what they did with i1 that weighs most, whatever came last
    decayed = labels.ranking(rows, items, at=at, settings=SETTINGS, half_life_days=10)
    assert decayed.history.toarray()[0, 0] == pytest.approx(0.075)


# -- build -------------------------------------------------------------------------------------------------------------


def test_build_writes_three_tables_and_an_empty_one_where_there_is_no_label(tmp_path):
    buyers = SHOP.loc[SHOP["type"] == "purchase", "customer_id"].unique()
    events = SHOP[SHOP["customer_id"].isin(buyers)].assign(source="shop", received_timestamp=pd.Timestamp(START))
    tables.write(tmp_path, tables.EVENTS, events.reindex(columns=tables.EVENTS.schema.names))
    tables.write(tmp_path, tables.CONSENTS, CONSENTS)
    report = labels.build(tmp_path, settings=SETTINGS, as_of=AS_OF)
    assert list(report.why) == ["intent"]
    assert report.rows == {
        "churn": tables.count(tmp_path, tables.LABELS_CHURN),
        "intent": 0,
        "recommender": tables.count(tmp_path, tables.INTERACTIONS),
    }
    assert report.rows["churn"] > 0
    assert 0 < report.base_rate["churn"] < 1
    assert tables.read(tmp_path, tables.LABELS_INTENT).columns.tolist() == tables.LABELS_INTENT.schema.names


@pytest.mark.parametrize("is_held", [True, False], ids=["held", "control"])
def test_ingest_during_a_build_changes_no_label(tmp_path, monkeypatch, is_held):
    events = SHOP.assign(source="shop", received_timestamp=pd.Timestamp(START)).reindex(columns=tables.EVENTS.schema.names)
    tables.write(tmp_path, tables.EVENTS, events)
    tables.write(tmp_path, tables.CONSENTS, CONSENTS)
    before, real = labels.build(tmp_path, settings=SETTINGS, as_of=AS_OF), tables.read

    def read(home, table, *columns):
        found = real(home, table, *columns)
        if table == tables.EVENTS:  # an ingest publishes: most had refused
            tables.write(tmp_path, tables.EVENTS, events.head(50))
            tables.write(tmp_path, tables.CONSENTS, CONSENTS.head(2))
        return found

    monkeypatch.setattr(tables, "read", read)
    if not is_held:
        monkeypatch.setattr(tables, "snapshot", lambda home, some: contextlib.nullcontext(home))
    assert (labels.build(tmp_path, settings=SETTINGS, as_of=AS_OF) == before) == is_held


# -- horizons beyond the session, and tasks that define their own label ------------------------------------------------


@pytest.mark.parametrize("hours", [24.0, 168.0])
def test_intent_within_a_horizon_counts_any_purchase_of_the_customer_after_the_instant(hours):
    rows = labels.intent(SHOP, CONSENTS, settings=LENIENT, as_of=AS_OF, horizon_hours=hours)
    assert (rows["matured_timestamp"] - rows["event_timestamp"]).eq(pd.Timedelta(hours, "h")).all()
    assert (rows["matured_timestamp"] <= pd.Timestamp(AS_OF)).all()
    bought = SHOP[SHOP["type"] == "purchase"]
    for row in rows.iloc[::9].itertuples():
        theirs = bought.loc[bought["customer_id"] == row.customer_id, "event_timestamp"]
        assert row.label == int(((theirs > row.event_timestamp) & (theirs <= row.matured_timestamp)).any())


def test_longer_horizons_hold_more_purchases_and_no_label_window_reaches_into_the_next_role():
    day, week = (labels.intent(SHOP, CONSENTS, settings=LENIENT, as_of=AS_OF, horizon_hours=hours) for hours in (24.0, 168.0))
    both = day.merge(week, on=["customer_id", "event_timestamp"], suffixes=("_day", "_week"))
    assert (both["label_week"] >= both["label_day"]).all()
    assert both["label_week"].sum() > both["label_day"].sum()
    for rows in (day, week):
        for earlier, later in (("train", "validation"), ("validation", "test")):
            ends = rows.loc[rows["split"] == earlier, "matured_timestamp"].max()
            assert ends <= rows.loc[rows["split"] == later, "event_timestamp"].min()


def test_declared_task_keeps_matured_and_consenting_rows_in_roles_that_do_not_overlap(monkeypatch):
    task = returns.TASK
    monkeypatch.setattr(returns, "HORIZON", pd.Timedelta(6, "D"))
    bought = SHOP[SHOP["type"] == "purchase"]
    back = bought.iloc[::2].assign(type="return", event_timestamp=bought["event_timestamp"] + 3 * DAY)
    log = pd.concat([SHOP, back], ignore_index=True)
    rows = labels.declared(task, log, CONSENTS, settings=LENIENT, as_of=AS_OF)
    assert 0 < rows["label"].mean() < 1
    assert (rows["matured_timestamp"] <= pd.Timestamp(AS_OF)).all()
    assert len(rows) < len(task.label(log))  # the last days are not known yet
    for earlier, later in (("train", "validation"), ("validation", "test")):
        assert rows.loc[rows["split"] == earlier, "matured_timestamp"].max() <= rows.loc[rows["split"] == later, "event_timestamp"].min()
    assert rows["split"].value_counts().min() >= 20
    silent = labels.declared(task, log, CONSENTS[CONSENTS["customer_id"] != rows["customer_id"].iloc[0]], settings=LENIENT, as_of=AS_OF)
    assert rows["customer_id"].iloc[0] not in set(silent["customer_id"])
    with pytest.raises(NotTrainable, match="each split needs"):
        labels.declared(task, SHOP, CONSENTS, settings=SETTINGS, as_of=AS_OF)  # nobody returns anything
