"""The second stage learns from earlier cut-offs only, and its lists are held against every simple rule on the same customers."""

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from models import evaluation
from models.ranker import Ranker
from models.recommender import Recommender
from models.stages import Stages
from models.two_stage import ALL_ITEMS, NEW_ITEMS
from pipelines.settings import GateSettings, LabelSettings, MonitoringSettings, Settings, TrainingSettings
from pipelines.training import explanations, listing, ranking, recommenders
from pipelines.training.listing import UnderTest
from pipelines.training.ranking import Moments

START = pd.Timestamp("2026-01-01", tz="UTC")
HORIZON = 10
AT = START + pd.Timedelta(80, "D")
FACTORS = {"n_factors": 6, "n_epochs": 4}


def log(seed: int = 0, customers: int = 90, items: int = 30) -> pd.DataFrame:
    """Everybody buys within a taste of six items, each again about every twelve days; what is known is known at once."""
    rng = np.random.default_rng(seed)
    rows = []
    for c in range(customers):
        for item in (6 * (c % 5) + np.arange(6)) % items:
            if rng.random() < 0.6:
                days = rng.uniform(0, 12) + np.cumsum(rng.normal(12, 1, 10))
                rows += [(f"c{c:03d}", f"i{item:02d}", day) for day in days if 0 < day < 100]
        rows += [(f"c{c:03d}", f"i{rng.integers(items):02d}", day) for day in rng.uniform(0, 100, 3)]
    frame = pd.DataFrame(rows, columns=["customer_id", "item_id", "day"])
    at = START + pd.to_timedelta(frame.pop("day"), "D").dt.floor("ms")
    return frame.assign(type="purchase", weight=1.0, event_timestamp=at, created_timestamp=at).sort_values(
        "event_timestamp", ignore_index=True
    )


ITEMS = pd.DataFrame(
    {
        "item_id": [f"i{n:02d}" for n in range(30)],
        "category": [f"k{n % 4}" for n in range(30)],
        "price_cents": np.arange(30) * 10 + 100,
        "event_timestamp": START,
        "created_timestamp": START,
    }
)


def moments(frame: pd.DataFrame, tmp_path) -> Moments:
    settings = Settings(
        home=tmp_path,
        labels=LabelSettings(ranking_horizon_days=HORIZON),
        training=TrainingSettings(k=5, bootstrap_draws=100, seed=3),
    )
    return Moments(frame, ITEMS, settings, 90.0, FACTORS)


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Moments:
    return moments(log(), tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def tested(known) -> UnderTest:
    moment = known.at(AT)
    return UnderTest(moment, Recommender(**FACTORS).fit(moment.ranking.history), known.second_stage(AT))


def lists(known: Moments, mode: str) -> np.ndarray:
    moment = known.at(AT)
    people = np.arange(moment.occasion.n_customers)
    return known.second_stage(AT).recommend(moment.histories, people, 10, at_us=moment.occasion.at_us, mode=mode)[1]


def test_nothing_after_the_cutoff_moves_the_second_stage(known, tmp_path):
    frame = log()
    past = frame[frame["event_timestamp"] < AT]
    shuffled = frame.copy()
    later = np.flatnonzero(frame["event_timestamp"] >= AT)
    shuffled.loc[later, "item_id"] = frame["item_id"].to_numpy()[np.random.default_rng(1).permutation(later)]
    for mode in (ALL_ITEMS, NEW_ITEMS):
        whole = lists(known, mode)
        assert np.array_equal(lists(moments(past, tmp_path), mode), whole)
        assert np.array_equal(lists(moments(shuffled, tmp_path), mode), whole)
    less = frame[(frame["event_timestamp"] < AT - pd.Timedelta(2, "D")) | (frame["event_timestamp"] >= AT)]
    assert not np.array_equal(lists(moments(less, tmp_path), ALL_ITEMS), lists(known, ALL_ITEMS))  # control: the past does


def test_what_was_learnt_late_is_not_known_at_the_cutoff(tmp_path):
    frame = log()
    late = frame["event_timestamp"].between(AT - pd.Timedelta(5, "D"), AT)
    delayed = frame.assign(created_timestamp=frame["created_timestamp"].mask(late, AT + pd.Timedelta(1, "D")))
    occasion, without = (moments(part, tmp_path).at(AT).occasion for part in (delayed, frame[~late]))
    assert np.array_equal(np.sort(occasion.age_days), np.sort(without.age_days))
    assert occasion.age_days.min() > 5


def test_label_windows_of_the_examples_end_by_the_cutoff(known):
    known.second_stage(AT)
    for examples, days in ((known._pairs, HORIZON), (known._visited, HORIZON / ranking.STEPS_A_HORIZON)):
        used = [cut for cut, mode in examples if mode == ALL_ITEMS]
        assert len(used) > 1
        assert max(used) + pd.Timedelta(days, "D") == AT


def test_the_second_stage_learns_from_those_who_come_back_too(known):
    """Each is asked as they come, and nobody twice in a window."""
    known.second_stage(AT)
    learned = [found for (_, mode), found in known._visited.items() if mode == ALL_ITEMS]
    assert all(found is not None and (found.label > 0).any() for found in learned)
    age = learned[0].names.index("customer_touch_age")
    asked = [np.unique(np.stack([found.customer, found.values[:, age]]), axis=1)[1] for found in learned]
    assert all(len(np.unique(ages)) > 0.9 * len(ages) for ages in asked)


def test_new_items_are_those_never_bought_before(known):
    moment = known.at(AT)
    assert moment.relevant[NEW_ITEMS].nnz < moment.relevant[ALL_ITEMS].nnz
    assert moment.relevant[NEW_ITEMS].multiply(moment.occasion.bought()).nnz == 0


def test_a_log_with_too_few_buyers_has_no_second_stage(tmp_path):
    frame = log()
    few = frame[frame["customer_id"].isin(frame["customer_id"].unique()[:5])]
    assert moments(few, tmp_path).second_stage(AT) is None
    assert moments(frame, tmp_path).second_stage(START + pd.Timedelta(HORIZON, "D")) is None


def test_the_second_stage_knows_when_something_is_due_and_leads_the_lists(tested, known):
    moment = tested.moment
    people, wanted = moment.judged(ALL_ITEMS)
    alone = tested.stage.recommend(moment.histories, people, 5, at_us=moment.occasion.at_us)[0]
    ours = tested.recommend(people, 5)
    assert np.array_equal(ours[alone >= 0], alone[alone >= 0])
    one = Stages(tested.first, None, moment.histories)
    assert ranking.ndcg_of(tested.stages, moment, k=5) > ranking.ndcg_of(one, moment, k=5) + 0.05
    assert ranking.ndcg_of(tested.stages, moment, k=5) == pytest.approx(evaluation.ndcg_at_k(ours, wanted, k=5))


@pytest.mark.parametrize("mode", [ALL_ITEMS, NEW_ITEMS])
def test_what_orders_the_candidates_adds_up_to_the_differences_of_their_scores(tested, mode):
    overall, parts, values = explanations.order_contributions(tested, mode)
    assert (overall["mean_absolute"].diff().dropna() <= 0).all()
    assert len(parts) == len(values) <= explanations.ROWS
    moment, people = tested.moment, tested.moment.judged(mode)[0][: explanations.LISTS]
    ranked = [tested.stage.rank(moment.histories.customer(row), moment.occasion.at_us, mode=mode) for row in people.tolist()]
    beyond = np.concatenate([(one.scores - one.scores.mean())[np.argsort(one.items)] for one in ranked])
    if len(beyond) <= explanations.ROWS:
        assert parts.sum(axis=1).to_numpy() == pytest.approx(beyond, abs=1e-4)
    assert parts.sum(axis=1).std() == pytest.approx(beyond.std(), rel=0.05)


def test_rival_lists_are_the_rules_they_are_named_after(tested):
    found, new = (listing.sheet(tested, mode=mode, k=5) for mode in (ALL_ITEMS, NEW_ITEMS))
    now, frame = tested.moment.occasion, log()
    recent = frame[frame["event_timestamp"].between(AT - pd.Timedelta(28, "D"), AT)].drop_duplicates(
        ["customer_id", "item_id", "event_timestamp"]
    )
    counts = recent["item_id"].value_counts().reindex(tested.moment.ranking.items, fill_value=0)
    best = counts.sort_values(ascending=False, kind="stable").index[:5].tolist()
    assert tested.moment.ranking.items[found.rivals[listing.POPULARITY][0]].tolist() == best
    own = now.matrix(half_life_days=listing.OWN_HALF_LIFE_DAYS, purchases_only=True)[found.people].toarray()
    for row, mine in zip(found.rivals[listing.OWN_HISTORY], own, strict=True):
        head = [item for item in row if mine[item] > 0]
        assert head == np.argsort(-mine, kind="stable")[: len(head)].tolist()
        assert len(head) == min(5, np.count_nonzero(mine))
        assert len(set(row)) == 5
    bought = now.bought()[new.people].toarray() > 0
    for shown in (new.ours, *new.rivals.values()):
        assert not np.take_along_axis(bought, np.maximum(shown, 0), axis=1)[shown >= 0].any()


def test_als_alone_is_the_product_of_the_factors_and_nothing_else(tested):
    found, first = listing.sheet(tested, mode=ALL_ITEMS, k=5), tested.first
    product = first.customer_factors_[found.people] @ first.item_factors_.T
    assert np.array_equal(found.rivals[listing.ALS_ALONE], np.argsort(-product, axis=1, kind="stable")[:, :5])
    assert first.repeat_weight > 0
    assert np.array_equal(found.rivals[listing.FIRST_STAGE], first.recommend(found.people, 5)[0])
    assert not np.array_equal(found.rivals[listing.FIRST_STAGE], found.rivals[listing.ALS_ALONE])


def test_share_of_the_optimum_is_one_for_the_best_lists_none_for_the_popular_and_the_same_whatever_was_drawn(tested):
    found, rng = listing.sheet(tested, mode=ALL_ITEMS, k=5), np.random.default_rng(2)
    shares = rng.dirichlet(np.full(tested.moment.occasion.n_items, 0.3), len(found.people))
    best = replace(found, ours=listing.best_lists(shares, k=5))
    share = lambda sheet: listing.share_of_optimum(sheet, shares, k=5)  # noqa: E731
    assert share(best) == pytest.approx(1.0)
    assert share(replace(found, ours=found.rivals[listing.POPULARITY])) == 0.0
    assert share(replace(best, ours=best.ours[:, ::-1])) < 1.0
    assert np.isnan(listing.share_of_optimum(found, np.zeros_like(shares), k=5))
    other = found.wanted.copy()
    other.indices = rng.permuted(np.tile(np.arange(other.shape[1]), (other.shape[0], 1)), axis=1)[
        np.repeat(np.arange(other.shape[0]), np.diff(other.indptr)),
        np.arange(other.nnz) - np.repeat(other.indptr[:-1], np.diff(other.indptr)),
    ].astype(other.indices.dtype)  # as many other items of each customer
    drawn = replace(found, wanted=other)
    assert share(drawn) == share(found)
    assert drawn.ndcg(found.ours, k=5).mean() != found.ndcg(found.ours, k=5).mean()  # control


def test_those_who_bought_teach_before_those_who_only_looked(known, monkeypatch):
    moment = known.at(AT - pd.Timedelta(HORIZON, "D"))
    everybody = np.arange(moment.occasion.n_customers)
    relevant = sparse.diags((everybody % 3 == 0).astype(float)) @ moment.relevant[ALL_ITEMS]
    looked = sparse.csr_matrix(np.full((len(everybody), moment.occasion.n_items), 0.1))
    buyers = np.flatnonzero(np.diff(relevant.indptr))
    assert np.array_equal(ranking._teachers(relevant, looked, seed=0), everybody)
    monkeypatch.setattr(ranking, "MOST_PEOPLE", len(buyers) + 2)
    some = ranking._teachers(relevant, looked, seed=0)
    assert len(some) == len(buyers) + 2
    assert set(buyers) <= set(some)
    assert not np.array_equal(some, ranking._teachers(relevant, looked, seed=1))
    monkeypatch.setattr(ranking, "MOST_PEOPLE", len(buyers) - 1)
    assert set(ranking._teachers(relevant, looked, seed=0)) < set(buyers)


def test_baselines_segments_and_figures_tell_of_the_same_customers(tested, known):
    found = listing.sheet(tested, mode=ALL_ITEMS, k=5)
    rivals = listing.baselines(found, settings=known.settings)
    figures = listing.figures(found, tested.moment, k=5)
    assert [one.name for one in rivals] == [
        listing.POPULARITY,
        listing.NEIGHBOURS,
        listing.ALS_ALONE,
        listing.FIRST_STAGE,
        listing.OWN_HISTORY,
    ]
    for one in rivals:
        assert one.low <= one.lead <= one.high
        assert one.value + one.lead == pytest.approx(figures["ndcg@5"])
    assert 0 < figures["gini@5"] < 1
    assert 0 < figures["coverage@5"] <= 1
    segments = listing.by_segment(found, tested.moment, settings=known.settings)
    assert sum(row["customers"] for row in segments) == figures["judged_customers"]
    mean = sum(row["ndcg"] * row["customers"] for row in segments) / figures["judged_customers"]
    assert mean == pytest.approx(figures["ndcg@5"])


def test_second_stage_that_is_behind_on_the_validation_window_is_not_used(known, monkeypatch):
    params = {**FACTORS, "random_state": 3}
    verdict = recommenders._validated(known, AT, params, settings=known.settings)
    assert verdict.is_used
    assert "with a second stage" in verdict.why
    right = Ranker.score_rows
    monkeypatch.setattr(Ranker, "score_rows", lambda self, values: -right(self, values))
    assert not recommenders._validated(known, AT, params, settings=known.settings).is_used


def test_without_a_second_stage_the_first_is_no_rival_and_new_items_come_from_it(tested):
    alone = UnderTest(tested.moment, tested.first, None)
    found = listing.sheet(alone, mode=NEW_ITEMS, k=5)
    assert listing.FIRST_STAGE not in found.rivals
    expected = tested.first.recommend(found.people, 5, exclude=tested.moment.occasion.bought()[found.people])[0]
    assert np.array_equal(found.ours, expected)


class Lists:
    """A learner that gives the lists it was made with; slow: so many seconds a call."""

    def __init__(self, lists, slow=0.0):
        self.lists, self.slow = lists, slow

    def recommend(self, people, k, exclude=None):
        time.sleep(self.slow)
        return self.lists[people][:, :k], None


def refusals(ours, theirs, moment, *, slow=0.0, is_newer=True):
    """Names of the gate's checks that ours fail against theirs."""
    settings = Settings(
        training=TrainingSettings(k=5, bootstrap_draws=100), monitoring=MonitoringSettings(min_group=30), gate=GateSettings(max_list_ms=5)
    )
    people, _ = moment.judged(ALL_ITEMS)
    traits = pd.DataFrame({"age_band": np.where(people % 2, "18-29", "30-44"), "gender": None})
    sides = (UnderTest(moment, Lists(lists, late), None) for lists, late in ((ours, slow), (theirs, 0.0)))
    checks = listing.examine(*sides, traits, is_newer=is_newer, settings=settings).checks
    assert all(any(character.isdigit() for character in check.found) for check in checks)
    return {check.name: check.found for check in checks if not check.holds}


def test_gate_of_lists_refuses_each_planted_fault_by_its_name(tested):
    moment = tested.moment
    n_items = moment.occasion.n_items
    everybody = np.arange(moment.occasion.n_customers)
    theirs = tested.recommend(everybody, 5)
    assert refusals(theirs, theirs, moment) == {}
    assert list(refusals(theirs, theirs, moment, is_newer=False)) == ["better"]
    assert list(refusals(theirs, theirs, moment, slow=0.006)) == ["fast"]

    junk = (theirs + n_items // 2) % n_items
    assert "not worse" in refusals(junk, theirs, moment)
    assert refusals(theirs, junk, moment, is_newer=False) == {}

    one = np.where((everybody % 2)[:, None] == 1, junk, theirs)  # as good for one group as it is bad for the other
    other = np.where((everybody % 2)[:, None] == 1, theirs, junk)
    found = refusals(one, other, moment)
    assert "age_band 18-29 -" in found["no group worse"]
    assert "no group worse" not in refusals(theirs, other, moment)  # control

    rng = np.random.default_rng(0)
    everything = np.hstack([theirs[:, :1], rng.integers(0, n_items, (len(theirs), 4))])
    assert "as varied" in refusals(np.tile(theirs[:1], (len(theirs), 1)), everything, moment)
