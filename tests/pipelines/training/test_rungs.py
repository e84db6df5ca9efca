"""Five groups with tastes of their own: what each rung of the ladder is worth there, known in advance, and nothing known too early."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from models import ladder
from models.recommender import Recommender
from models.stages import Stages
from models.two_stage import ALL_ITEMS
from pipelines import registry, tracking
from pipelines.errors import StoreError
from pipelines.settings import LabelSettings, Settings, TrainingSettings
from pipelines.training import listing, recommenders, rungs, segments
from pipelines.training.listing import UnderTest
from pipelines.training.ranking import Moments
from pipelines.training.rungs import Earlier, Known

START = pd.Timestamp("2026-01-01", tz="UTC")
HORIZON, K = 10, 5
AT = START + pd.Timedelta(80, "D")
FACTORS = {"n_factors": 6, "n_epochs": 4}
RUNGS = ("personal", "folded_in", "folded_in_newcomers", "stale", "segment", "popular", "static")
ITEMS = pd.DataFrame(
    {"item_id": [f"i{n:02d}" for n in range(30)], "category": "all", "price_cents": 100, "in_stock": None, "event_timestamp": START}
)


def act(customer, item, day, kind="purchase"):
    return customer, item, day, kind, day


def log(rows):
    frame = pd.DataFrame(rows, columns=["customer_id", "item_id", "day", "type", "known"])
    at, known = (START + pd.to_timedelta(frame.pop(name), "D").dt.floor("ms") for name in ("day", "known"))
    frame = frame.assign(weight=frame["type"].map({"purchase": 1.0, "view": 0.1}), event_timestamp=at, created_timestamp=known)
    return frame.sort_values("event_timestamp", ignore_index=True)


def shop_of_tastes(seed=0, n_groups=5):
    """Everybody buys within the taste of their group, six of thirty items; every tenth customer comes within the horizon before `AT`."""
    rng, rows = np.random.default_rng(seed), []
    for c in range(100):
        first = 72.0 if c % 10 == 0 else 0.0
        taste = (6 * (c % n_groups) + np.arange(6)) % 30
        rows += [act(f"c{c:03d}", f"i{rng.choice(taste):02d}", day) for day in rng.uniform(first, 100, 16)]
        rows += [act(f"c{c:03d}", f"i{rng.choice(taste):02d}", first + 1.0, "view"), act(f"c{c:03d}", f"i{rng.choice(taste):02d}", 85.0)]
    return rows


def groups(n_groups=5):
    people = [f"c{c:03d}" for c in range(100)]
    told = {"customer_id": people, "event_timestamp": AT, "segment": [f"s{c % n_groups}" for c in range(100)], "lifecycle": "new"}
    return pd.DataFrame(told)


def under_test(frame, tmp_path, items=ITEMS):
    settings = Settings(
        home=tmp_path, labels=LabelSettings(ranking_horizon_days=HORIZON), training=TrainingSettings(k=K, bootstrap_draws=100, seed=3)
    )
    known = Moments(frame, items, settings, 90.0, FACTORS)
    moment, before = known.at(AT), known.at(AT - pd.Timedelta(HORIZON, "D"))
    fitted = [Recommender(**FACTORS).fit(one.ranking.history) for one in (moment, before)]
    earlier = Earlier(before.ranking, Stages(fitted[1], None, before.histories))
    return UnderTest(moment, fitted[0], None), earlier, settings


def lists(tested, known, earlier, k=K):
    people = tested.moment.judged(ALL_ITEMS)[0]
    return rungs.lists(tested, tested.recommend(people, k), known, earlier, k=k, half_life_days=90.0)


def measured(rows, tmp_path, items=ITEMS, found=None):
    """By rung the row that the measure tells of it, and the lists."""
    frame = log(rows)
    tested, earlier, settings = under_test(frame, tmp_path, items)
    known = Known.of(frame, items, groups() if found is None else found, at=AT)
    people, wanted = tested.moment.judged(ALL_ITEMS)
    made = lists(tested, known, earlier)
    told = rungs.qualities(made, wanted, people, why={ladder.SEGMENT: known.why}, settings=settings)
    return {row["rung"]: row for row in told}, made, listing.sheet(tested, mode=ALL_ITEMS, k=K)


@pytest.mark.parametrize("seed", [0, 1])
def test_where_segments_decide_taste_theirs_is_worth_more_than_what_is_popular(tmp_path, seed):
    told, *_ = measured(shop_of_tastes(seed), tmp_path)
    assert tuple(told) == RUNGS
    assert told["segment"]["ndcg"] > 2 * told["popular"]["ndcg"]
    assert told["popular"]["above"] == "segment"
    assert told["popular"]["low"] > 0
    assert told["personal"]["ndcg"] > told["popular"]["ndcg"]
    assert told["folded_in"]["compared"] == told["folded_in"]["customers"] > told["folded_in_newcomers"]["customers"] > 0


def test_where_segments_mean_nothing_theirs_is_not_shown_to_be_worth_more(tmp_path):
    drawn = groups().assign(segment=np.random.default_rng(1).permutation(groups()["segment"]))
    told, *_ = measured(shop_of_tastes(), tmp_path, found=drawn)
    assert told["popular"]["low"] < 0.05 < 0.2 < measured(shop_of_tastes(), tmp_path)[0]["popular"]["low"]


def test_popular_rung_is_the_baseline_where_all_was_bought_lately(tmp_path):
    rows = [one for one in shop_of_tastes() if AT.dayofyear - 1 - 28 < one[2] and one[3] == "purchase"]
    told, made, found = measured(rows, tmp_path)
    theirs = found.rivals[listing.POPULARITY]
    assert np.array_equal(made["popular"], theirs)
    assert told["popular"]["ndcg"] == pytest.approx(np.nanmean(found.ndcg(theirs, k=K)))
    assert np.array_equal(made["static"], made["popular"])  # nothing is new here
    assert told["personal"]["ndcg"] == pytest.approx(np.nanmean(found.ndcg(found.ours, k=K)))
    assert told["personal"]["customers"] == len(found.people)


def test_nothing_that_comes_after_the_cut_off_or_was_known_after_it_is_in_a_list(tmp_path):
    rows, (_, before, found) = shop_of_tastes(), measured(shop_of_tastes(), tmp_path)
    judged = sorted({one[0] for one in rows if 80 < one[2] < 90})
    later = [act(customer, "i07", 81.0 + n / 100) for n, customer in enumerate(judged)]
    late = [(customer, "i07", 79.9 - n / 100, "purchase", 80.5) for n, customer in enumerate(judged)]
    since = pd.DataFrame({"item_id": ["new"], "category": "all", "price_cents": 1, "event_timestamp": AT + pd.Timedelta(1, "h")})
    _, after, again = measured([*rows, *later, *late], tmp_path, items=pd.concat([ITEMS, since], ignore_index=True))
    assert np.array_equal(found.people, again.people)
    assert {name for name in before if not np.array_equal(before[name], after[name])} == set()


def test_what_is_listed_after_the_cut_off_makes_no_arrival_rarer(tmp_path):
    fresh, since = (
        pd.concat([ITEMS.iloc[:1].assign(item_id=f"{name}{i}", event_timestamp=when) for i in range(n)])
        for name, n, when in (("new", 8, AT - pd.Timedelta(2, "D")), ("later", 60, AT + pd.Timedelta(2, "D")))
    )
    frame, items = log(shop_of_tastes()), pd.concat([ITEMS, fresh], ignore_index=True)
    tested, earlier, _ = under_test(frame, tmp_path, items)
    made = [lists(tested, Known.of(frame, some, groups(), at=AT), earlier, k=10) for some in (items, pd.concat([items, since]))]
    assert {name for name in made[0] if not np.array_equal(made[0][name], made[1][name])} == set()


def test_newcomers_are_those_whom_the_earlier_model_never_met(tmp_path):
    _, made, found = measured(shop_of_tastes(), tmp_path)
    told = {name: found.people[made[name][:, 0] >= 0] for name in ("folded_in", "folded_in_newcomers")}
    assert set(told["folded_in_newcomers"] % 10) == {0}  # all hundred are known at the cut-off, so their places are their numbers
    assert set(told["folded_in"][told["folded_in"] % 10 == 0]) == set(told["folded_in_newcomers"])


def test_stale_list_knows_nothing_of_the_last_hour_and_is_nobodys_who_came_within_it(tmp_path):
    rows = [*shop_of_tastes(), act("c003", "i01", 79.5), act("new", "i02", 79.5), act("new", "i03", 85.0)]
    frame = log(rows)
    tested, earlier, _ = under_test(frame, tmp_path)
    names = tested.moment.ranking.customers[tested.moment.judged(ALL_ITEMS)[0]].tolist()
    known = Known.of(frame, ITEMS, groups(), at=AT)
    last_hour = log([act(who, f"i{n:02d}", 79.5 - 0.9 / 24 + n / 1e4) for who in ("c003", "new") for n in range(20, 26)])
    before_it = log([act(who, f"i{n:02d}", 79.5 - 1.1 / 24 - n / 1e4) for who in ("c003", "new") for n in range(20, 26)])
    first, more, older = (
        lists(tested, replace(known, acts=pd.concat([known.acts, added], ignore_index=True)), earlier)
        for added in (last_hour.iloc[:0], last_hour, before_it)
    )
    assert np.array_equal(first["stale"], more["stale"])
    c003, new = names.index("c003"), names.index("new")
    assert (first["stale"][new] == -1).all()
    assert not np.array_equal(first["folded_in"][c003], more["folded_in"][c003])  # control: these acts do move a list that knows them
    assert not np.array_equal(first["stale"][c003], older["stale"][c003])
    assert (older["stale"][new] >= 0).any()


def test_new_arrivals_have_their_place_in_what_is_answered_with_them(tmp_path):
    fresh = ITEMS.iloc[:1].assign(item_id="new", event_timestamp=AT - pd.Timedelta(2, "D"))
    items = pd.concat([ITEMS, fresh], ignore_index=True)
    frame = log(shop_of_tastes())
    tested, earlier, _ = under_test(frame, tmp_path, items)
    made = lists(tested, Known.of(frame, items, groups(), at=AT), earlier, k=10)
    new = tested.moment.ranking.items.tolist().index("new")
    is_last = {name: {bool(row[-1] == new) for row in rows if row[0] >= 0} for name, rows in made.items()}
    joined = ("personal", "folded_in", "folded_in_newcomers", "popular")  # of a segment's six items none gives way
    assert is_last == {name: {name in joined} for name in RUNGS}


def test_rung_that_answers_nobody_says_why_and_the_next_is_held_against_what_stands_above_it(tmp_path):
    settings = Settings(home=tmp_path, training=TrainingSettings(k=2, bootstrap_draws=100))
    wanted = sparse.csr_matrix([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    nobody, right, wrong = np.full((3, 2), -1), np.array([[0, -1], [1, -1], [-1, -1]]), np.array([[1, 0], [0, 1], [0, 1]])
    made = {"personal": wrong, "stale": right, "segment": nobody, "popular": wrong}
    told = {row["rung"]: row for row in rungs.qualities(made, wanted, np.arange(3), why={"segment": "no groups"}, settings=settings)}
    assert told["segment"] == {"rung": "segment", "customers": 0, "why": "no groups"}
    assert told["stale"]["customers"] == told["stale"]["compared"] == 2
    assert (told["stale"]["ndcg"], told["stale"]["recall"]) == (1.0, 1.0)
    assert told["stale"]["lead"] == pytest.approx(1 / np.log2(3) - 1)  # it is the lower one that is ahead
    assert (told["popular"]["above"], told["popular"]["compared"], told["popular"]["customers"]) == ("stale", 2, 3)
    assert told["popular"]["ndcg"] == pytest.approx(2 / 3 / np.log2(3))
    assert rungs.metrics(list(told.values()), k=2)["rung_stale_recall@2"] == 1.0
    assert not any("segment" in name for name in rungs.metrics(list(told.values()), k=2))


def test_home_without_features_has_no_segments_and_says_so(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise StoreError("features: not registered")

    monkeypatch.setattr(segments, "found_at", refuse)
    frame = log(shop_of_tastes())
    known = rungs.known_at(tmp_path, frame, ITEMS, at=AT, as_of=AT, settings=Settings(home=tmp_path))
    assert (known.why, len(known.groups), known.catalogue.segments) == ("features: not registered", 0, {})
    few = Known.of(frame, ITEMS, groups().iloc[:9], at=AT)
    assert "held 10 customers" in few.why


def test_every_rung_is_told_in_manifest_report_and_run(trained):
    champion, report = registry.load_champion(trained.home, "recommender"), trained.reports["recommender"]
    told = champion.manifest["ladder"]
    assert tuple(row["rung"] for row in told) == RUNGS
    assert told == report.details["ladder"]
    assert all(row["customers"] <= told[0]["customers"] == report.details["judged_customers"] for row in told)
    assert told[0]["ndcg"] == pytest.approx(report.value)  # nothing is new in this shop
    (run,) = [one for one in runs(trained.home) if one.info.status == "FINISHED" and "rung_popular_ndcg_at_5" in one.data.metrics]
    assert run.data.metrics["rung_popular_ndcg_at_5"] == next(row["ndcg"] for row in told if row["rung"] == "popular")


def runs(home):
    client = tracking.connect(home)
    return client.search_runs([client.get_experiment_by_name("recommender").experiment_id])


def test_validation_leaves_the_stages_that_folding_in_is_measured_with(tmp_path):
    frame = log(shop_of_tastes())
    _, _, settings = under_test(frame, tmp_path)
    known = Moments(frame, ITEMS, settings, 90.0, FACTORS)
    choice = recommenders._validated(known, AT - pd.Timedelta(HORIZON, "D"), FACTORS, settings=settings)
    assert (choice.stages.second is not None) == choice.is_used
    assert len(choice.stages.histories) == len(choice.stages.first.customer_factors_)
