"""Customers as the second stage ranks for them live: from what the training knew of them and what the store says since."""

from contextlib import closing
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from models.candidates.history import DAY_US, NOTHING, Histories, History
from models.candidates.occasion import Occasion
from models.candidates.pairs import pairs
from models.candidates.retrieval import Retrieval
from models.recommender import Recommender
from models.stages import Stages
from models.two_stage import ALL_ITEMS, MODES, NEW_ITEMS, TwoStage
from pipelines import registry
from pipelines.events import WEIGHTS
from pipelines.online.writer import OnlineWriter, Row
from serving.champions import Recommending
from serving.fallbacks import Deadline
from serving.ranking import Ranking, known
from serving.recent import Act
from serving.wire import Filters, RecommendRequest

N_CUSTOMERS, N_ITEMS = 22, 29
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
NOW_US = int(NOW.timestamp() * 1e6)
TRAINED = NOW - timedelta(hours=2)
TRAINED_US = int(TRAINED.timestamp() * 1e6)
MINUTE_US = 60_000_000
CATEGORY = np.arange(N_ITEMS) % 3


def stages(seed: int = 0) -> Stages:
    rng, n = np.random.default_rng(seed), 400
    now = Occasion(
        n_customers=N_CUSTOMERS,
        n_items=N_ITEMS,
        at_us=TRAINED_US,
        customer=rng.integers(0, N_CUSTOMERS - 1, n),  # of the last one nothing is known
        item=rng.integers(0, N_ITEMS, n),
        done_us=TRAINED_US - rng.integers(1, 60 * DAY_US, n),
        weight=rng.choice([0.15, 0.5, 1.0], n),
        category=CATEGORY,
        price=np.linspace(1, 30, N_ITEMS),
        offered_us=np.full(N_ITEMS, TRAINED_US - 90 * DAY_US),
    )
    histories, retrieval = now.histories(), Retrieval(n_candidates=4, factors={"n_factors": 6, "n_epochs": 4}).fit(now)
    relevant = sparse.random(N_CUSTOMERS, N_ITEMS, density=0.2, format="csr", random_state=seed)
    given_ = {
        mode: list(pairs(retrieval, histories, np.arange(N_CUSTOMERS), TRAINED_US, new_only=mode == NEW_ITEMS, relevant=relevant))
        for mode in MODES
    }
    second = TwoStage(ranker={"n_rounds": 8}).fit(now, given_, retrieval=retrieval)
    first = Recommender(n_factors=6, n_epochs=4).fit(now.matrix(half_life_days=90.0))
    return Stages(first, second, histories)


@pytest.fixture(scope="module")
def model() -> Recommending:
    names = [f"item-{i:02d}" for i in range(N_ITEMS)]
    items = {name: i for i, name in enumerate(names)}
    return Recommending("1", stages(), {}, names, items, np.zeros((N_ITEMS, 6), np.float32), 90.0, TRAINED_US)


def row_of(history: History, place: int) -> Act:
    """What the store holds of one item of a history, as `serving.recent` reads it."""
    told = (history.touches, history.purchases, history.seen_us, history.bought_us)
    return Act(f"item-{history.item[place]:02d}", 1.0, 1.0, *(column[place].item() for column in told))


ACTS = st.lists(st.tuples(st.integers(0, N_ITEMS - 1), st.sampled_from([0.15, 0.5, 1.0]), st.integers(0, 119)), min_size=1, max_size=12)


@given(row=st.none() | st.integers(0, N_CUSTOMERS - 1), acts=ACTS, new_only=st.booleans())
@settings(max_examples=40)
def test_what_is_served_is_what_the_whole_log_says_to_the_last_bit(model, row, acts, new_only) -> None:
    """Known to the training and active since, or new: the same order as if training had counted every act until now."""
    before = NOTHING if row is None else known(model, [row], [])
    since = Histories.of(
        np.zeros(len(acts), dtype=int), np.array([a[0] for a in acts]), np.array([a[1] for a in acts], dtype=float),
        NOW_US - np.array([a[2] for a in acts]) * MINUTE_US, n_customers=1,
    ).customer(0)  # fmt: skip
    whole = History.of([before, since])
    touched = np.flatnonzero(np.isin(whole.item, since.item))
    live = Ranking.of(model, [] if row is None else [row], [row_of(whole, place) for place in touched], NOW, new_only=new_only)
    batch = model.stages.second.rank(whole, NOW_US, mode=NEW_ITEMS if new_only else ALL_ITEMS)
    assert live.is_folded
    assert np.array_equal(live.order.items, batch.items)
    assert np.array_equal(live.order.scores, batch.scores)


def test_without_what_was_done_since_the_order_is_another(model) -> None:
    """The control of the law above."""
    act = Act("item-05", 1.0, 1.0, touches=0.3, purchases=0, seen_us=NOW_US - MINUTE_US, bought_us=0)
    before, after = (Ranking.of(model, [3], acts, NOW, new_only=False) for acts in ([], [act]))
    assert (before.is_folded, after.is_folded) == (False, True)
    assert not np.array_equal(before.order.scores, after.order.scores)


@given(
    allowed=st.lists(st.booleans(), min_size=N_ITEMS, max_size=N_ITEMS), k=st.integers(1, 35), most=st.none() | st.integers(1, 9),
    row=st.integers(0, N_CUSTOMERS - 2),
)  # fmt: skip
@settings(max_examples=60)
def test_lists_are_the_second_stages_then_what_suits_as_long_as_anything_is_allowed(model, allowed, k, most, row) -> None:
    flags, ranking = np.array(allowed), Ranking.of(model, [row], [], NOW, new_only=False)
    found, scores = ranking.best(lambda places: flags.copy() if places is None else flags[places], k, category=CATEGORY, most=most)
    assert flags[found].all()
    assert len(set(found.tolist())) == len(found)
    assert (np.diff(scores) <= 1e-6).all()
    limit = N_ITEMS if most is None else most
    of_category = np.bincount(CATEGORY[found], minlength=3)
    assert (of_category <= limit).all()
    liked = ranking.liked.products.items.any(axis=1)  # an item nobody ever touched has no factors; it is found all the same
    assert len(liked) == N_ITEMS
    assert len(found) == min(k, int(np.minimum(np.bincount(CATEGORY[flags], minlength=3), limit).sum()))
    if most is None:
        lead = [item for item in ranking.order.items.tolist() if flags[item]][:k]
        assert found[: len(lead)].tolist() == lead


def test_of_whom_nothing_is_known_there_is_no_ranking(model) -> None:
    unknown = Act("not-in-model", 1.0, 1.0, touches=1.0, purchases=0, seen_us=NOW_US, bought_us=0)
    assert Ranking.of(model, [], [], NOW, new_only=False) is None
    assert Ranking.of(model, [N_CUSTOMERS - 1], [unknown], NOW, new_only=False) is None


def test_who_were_merged_are_ranked_by_all_that_they_did(model) -> None:
    both = Ranking.of(model, [3, 4], [], NOW, new_only=False)
    parts = [model.stages.histories.customer(row) for row in (3, 4)]
    assert np.array_equal(both.order.scores, model.stages.second.rank(History.of(parts), NOW_US).scores)


def test_the_strongest_of_a_history_adds_most_to_the_score(model) -> None:
    ranking = Ranking.of(model, [3], [], NOW, new_only=False)
    wanted, liked = np.arange(N_ITEMS), ranking.liked
    shares = liked.solved.shares(liked.products.items)
    assert np.allclose(shares.sum(axis=1), liked.products.scores(liked.factors, wanted), atol=1e-4)
    shares[liked.items, np.arange(liked.items.size)] += model.learner.repeat_weight * liked.weights / liked.weights.max()
    assert np.array_equal(ranking.strongest(wanted), np.where(shares.max(axis=1) > 0, liked.items[shares.argmax(axis=1)], -1))


# -- through the service's core ---------------------------------------------------------------------------------------------


@pytest.fixture
def ranked(answers, cast, home):
    """The shop with a version that has a second stage."""
    made = stages()
    items, scores = made.recommend(np.arange(3), 5, at_us=TRAINED_US)
    golden = {"customers": [0, 1, 2], "k": 5, "at_us": TRAINED_US, "items": items.tolist(), "scores": scores.astype(float).tolist()}
    arrays = {"customer_ids": np.array(cast.customers[:N_CUSTOMERS]), "item_ids": np.array(cast.items[:N_ITEMS])}
    manifest = {"as_of": TRAINED.isoformat(), "golden": golden}
    registry.promote(home, "recommender", registry.register(home, "recommender", learner=made, manifest=manifest, arrays=arrays))
    answers.refresh()
    assert answers.champions.bundle.version("recommender") == "2"
    return answers


def ask(core, customer, **body):
    filters = Filters(category=body.pop("category", None))
    return core.recommendations.answer(RecommendRequest(customer_id=customer, filters=filters, **body), Deadline.after_ms(5_000))


def names(answer):
    return [item.item_id for item in answer.items]


def bought(cast, home, customer, *items):
    rows = [
        Row((customer, item), {
            **{f"customer_item_{kind}s_{window}": int(kind == "purchase") for kind in WEIGHTS for window in ("30d", "total")},
            "customer_item_last_seen_at": NOW_US - MINUTE_US, "customer_item_last_bought_at": NOW_US - MINUTE_US,
        }, event_us=NOW_US - MINUTE_US)
        for item in items
    ]  # fmt: skip
    with closing(OnlineWriter(home)) as online, online.transaction():
        online.write("customer_item", rows, join_key=("customer_id", "item_id"))


def test_a_customer_is_answered_with_the_second_stages_order(ranked, cast):
    answer = ask(ranked, cast.customers[4], k=5)
    model = ranked.champions.bundle.recommender
    order = model.stages.second.rank(model.stages.histories.customer(4), NOW_US)
    assert (answer.source, answer.degraded) == ("personal", False)
    assert names(answer) == [cast.items[place] for place in order.items[:5]]
    assert [item.score for item in answer.items] == pytest.approx(order.scores[:5].tolist())
    assert all(item.reason.startswith(("because you", "suits")) for item in answer.items)
    assert len(ask(ranked, cast.customers[4], k=N_ITEMS).items) == N_ITEMS  # beyond the candidates: what suits


def test_a_newcomers_first_acts_are_ranked_by_the_second_stage(ranked, cast, home):
    bought(cast, home, cast.untrained, "item-03", "item-07")
    answer = ask(ranked, cast.untrained, k=5)
    assert (answer.source, answer.degraded) == ("folded_in", False)
    model = ranked.champions.bundle.recommender
    at = NOW_US - MINUTE_US
    history = Histories.of(np.zeros(2, int), np.array([3, 7]), np.ones(2), np.full(2, at), n_customers=1).customer(0)
    assert names(answer) == [cast.items[place] for place in model.stages.second.rank(history, NOW_US).items[:5]]


def test_filters_exclusions_and_caps_hold_and_new_means_never_bought(ranked, cast, home):
    customer = cast.customers[4]
    every = names(ask(ranked, customer, k=N_ITEMS))
    assert not set(every[:3]) & set(names(ask(ranked, customer, k=N_ITEMS, exclude=every[:3])))
    hats = names(ask(ranked, customer, k=N_ITEMS, category=["hats"]))
    assert sorted(hats) == sorted(item for item in every if int(item[-2:]) % 3 == 1)
    capped = names(ask(ranked, customer, k=N_ITEMS, max_per_category=2))
    assert len(capped) == 6
    bought(cast, home, customer, every[0])
    new = ask(ranked, customer, k=N_ITEMS, new_only=True)
    assert every[0] in names(ask(ranked, customer, k=N_ITEMS))
    assert every[0] not in names(new)
    near = names(ask(ranked, customer, k=N_ITEMS, item_id="item-03", new_only=True))
    assert every[0] not in near
    assert every[0] in names(ask(ranked, customer, k=N_ITEMS, item_id="item-03")) or every[0] == "item-03"


def test_a_version_whose_golden_lists_are_not_told_right_is_refused(ranked, cast, home):
    made = stages(seed=5)
    golden = {"customers": [0], "k": 2, "at_us": TRAINED_US, "scores": [[9.0, 8.0]]}
    arrays = {"customer_ids": np.array(cast.customers[:N_CUSTOMERS]), "item_ids": np.array(cast.items[:N_ITEMS])}
    registry.promote(home, "recommender", registry.register(home, "recommender", learner=made, manifest={"golden": golden}, arrays=arrays))
    ranked.refresh()
    assert ranked.champions.bundle.version("recommender") == "2"
    assert ("recommender", 3) in ranked.champions.refused
