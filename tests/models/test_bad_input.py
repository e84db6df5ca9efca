"""Data that no shop should have, and some have: a clear refusal or a sane answer, never a number that means nothing.

What a single learner refuses, and its small cases, stand in its own tests; here is what all of them are asked alike.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from models import evaluation
from models.candidates.history import DAY_US
from models.candidates.occasion import Occasion
from models.candidates.pairs import pairs
from models.candidates.retrieval import Retrieval
from models.classifier import Classifier
from models.hazard import Hazard, Waits
from models.lists import Ranked
from models.recommender import Recommender
from models.segments import Segmenter
from models.two_stage import ALL_ITEMS, NEW_ITEMS, TwoStage

HEAVY = 50_000  # events of one customer
BLOCKS, BLOCK_ITEMS, BLOCK_CUSTOMERS = 4, 10, 30


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    """A library that warns of what it was given has got something that we should have caught."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def _frame(n: int = 400, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"x": rng.normal(size=n), "y": rng.normal(size=n) + 4 * (np.arange(n) % 2), "place": rng.choice(["a", "b"], n)})


def _label(features: pd.DataFrame) -> np.ndarray:
    return (np.random.default_rng(1).random(len(features)) < 0.3).astype(int)


def _waits(features: pd.DataFrame) -> Waits:
    days = np.where(_label(features) == 1, np.inf, 3.0 + np.arange(len(features)) % 20)
    return Waits(days, np.full(len(features), 28.0))


def _classified(features: pd.DataFrame) -> Classifier:
    return Classifier(n_rounds=30, min_data_in_leaf=5).fit(features, _label(features))


def _timed(features: pd.DataFrame) -> Hazard:
    return Hazard(n_rounds=30, min_data_in_leaf=5).fit(features, _waits(features))


def _segmented(features: pd.DataFrame) -> Segmenter:
    return Segmenter(method="kmeans", k_max=3, bootstrap_draws=3, reference_draws=0).fit(features.drop(columns="place", errors="ignore"))


OF_FRAMES = [
    pytest.param(_classified, id="classifier"),
    pytest.param(_timed, id="hazard"),
    pytest.param(_segmented, id="segmenter"),
]
OF_LABELS = OF_FRAMES[:2]


def _probability(learner: Any, features: pd.DataFrame) -> np.ndarray:
    return learner.predict_proba(features)[:, 1] if isinstance(learner, Classifier) else learner.silence(features, 28.0)


# -- frames ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", OF_FRAMES)
def test_a_column_given_twice_is_refused_by_name(fit: Any) -> None:
    twice = pd.concat([_frame(), _frame()[["x"]]], axis=1)
    with pytest.raises(ValueError, match=r"each column once, found \['x'\]"):
        fit(twice)
    with pytest.raises(ValueError, match="columns with names"):
        fit(_frame()[["x", "y"]].set_axis([0, "0"], axis=1))


@pytest.mark.parametrize("fit", OF_FRAMES)
def test_constant_and_empty_columns_change_nothing(fit: Any) -> None:
    more = _frame().assign(constant=1.0, empty=np.nan, nothing=None)
    plain, padded = fit(_frame()), fit(more)
    if isinstance(plain, Segmenter):
        assert np.array_equal(plain.predict_codes(_frame()), padded.predict_codes(more))
        return
    # which columns a tree may look at is drawn, so the trees are others; what they find is not
    near = np.corrcoef(_probability(plain, _frame()), _probability(padded, more))[0, 1]
    assert near > 0.8


@pytest.mark.parametrize("values", [1.0, np.nan, None], ids=["constant", "nan", "null"])
@pytest.mark.parametrize("fit", OF_LABELS)
def test_features_that_say_nothing_give_the_base_rate_to_everybody_and_an_auc_of_one_half(fit: Any, values: float | None) -> None:
    blank = pd.DataFrame({"x": values, "y": values}, index=range(400))
    learner, label = fit(blank), _label(blank)
    probability = _probability(learner, blank)
    assert np.ptp(probability) < 1e-9
    assert probability.mean() == pytest.approx(label.mean(), abs=0.06)
    assert evaluation.auc(label, probability) == 0.5
    full = _probability(learner, _frame()[["x", "y"]])
    assert np.ptp(full) < 1e-9  # nor is anything read from them later


@pytest.mark.parametrize("values", [1.0, np.nan], ids=["constant", "nan"])
def test_nobody_is_segmented_by_features_that_say_nothing(values: float) -> None:
    with pytest.raises(ValueError, match="no column tells customers apart"):
        _segmented(pd.DataFrame({"x": values, "y": values}, index=range(400)))


@pytest.mark.parametrize("fit", OF_LABELS)
def test_a_category_never_seen_is_a_null_and_nothing_more(fit: Any) -> None:
    learner, some = fit(_frame()), _frame(50, seed=3)
    assert np.array_equal(_probability(learner, some.assign(place="atlantis")), _probability(learner, some.assign(place=None)))


def test_one_class_and_five_customers() -> None:
    few = _frame(5)
    with pytest.raises(ValueError, match="both classes"):
        Classifier().fit(few, np.ones(5))
    with pytest.raises(ValueError, match="with and without the event"):
        Hazard().fit(few, Waits(np.full(5, np.inf), np.full(5, 28.0)))
    with pytest.raises(ValueError, match="50 customers or more, found 5"):
        _segmented(few)
    label = np.array([0, 1, 0, 1, 0])
    certain = Classifier().fit(few, label).predict_proba(few)[:, 1]
    assert ((certain > 0.1) & (certain < 0.9)).all()  # five rows make nobody certain
    spread = Hazard().fit(few, Waits(np.where(label, np.inf, 3.0), np.full(5, 28.0))).predict_proba(few)
    assert np.allclose(spread.sum(axis=1), 1)


def test_waits_that_are_none_are_refused() -> None:
    for days, followed in ((np.nan, 28.0), (-1.0, 28.0), (3.0, np.nan)):
        with pytest.raises(ValueError, match="days of 0 or more"):
            Hazard().fit(_frame(9), Waits(np.full(9, days), np.full(9, followed)))


def test_a_fold_without_positives_has_no_auc_and_a_log_loss() -> None:
    learner, later = _classified(_frame()), _frame(60, seed=4)
    probability = _probability(learner, later)
    assert np.isnan(evaluation.auc(np.zeros(60), probability))
    assert np.isnan(evaluation.average_precision(np.zeros(60), probability))
    assert learner.loss((later, np.zeros(60))) == pytest.approx(-np.log(1 - probability).mean())
    gap = evaluation.difference(evaluation.auc, np.zeros(60), probability, probability[::-1])
    found = evaluation.paired_bootstrap(gap, np.arange(60), draws=20, seed=0)
    assert np.isnan([found.value, found.low, found.high]).all()


def test_a_feature_of_fifty_thousand_moves_no_segment_and_no_probability_out_of_its_bounds() -> None:
    usual = _frame().assign(events=np.random.default_rng(5).poisson(4, 400).astype(float))
    giant = usual.assign(events=usual["events"].where(usual.index != 7, float(HEAVY)))
    codes, with_giant = (_segmented(frame).predict_codes(frame) for frame in (usual, giant))
    others = np.arange(400) != 7
    assert (codes == with_giant)[others].mean() > 0.98
    for fit in (_classified, _timed):
        probability = _probability(fit(giant), giant)
        assert ((probability > 0) & (probability < 1)).all()


# -- interactions ------------------------------------------------------------------------------------------------------


def _blocks(*, heavy: bool) -> tuple[Occasion, np.ndarray]:
    """Customers who each bought five items of their block of ten, and perhaps one who did everything; and the block of each item."""
    rng = np.random.default_rng(2)
    customer = np.repeat(np.arange(BLOCKS * BLOCK_CUSTOMERS), 5)
    item = np.concatenate([c % BLOCKS * BLOCK_ITEMS + rng.choice(BLOCK_ITEMS, 5, replace=False) for c in range(BLOCKS * BLOCK_CUSTOMERS)])
    age, n = rng.uniform(1, 60, len(item)), BLOCKS * BLOCK_CUSTOMERS
    if heavy:
        customer, item = np.append(customer, np.full(HEAVY, n)), np.append(item, rng.integers(0, BLOCKS * BLOCK_ITEMS, HEAVY))
        age, n = np.append(age, rng.uniform(0.1, 60, HEAVY)), n + 1
    # and an item that only the first customer ever touched
    customer, item, age = np.append(customer, 0), np.append(item, BLOCKS * BLOCK_ITEMS), np.append(age, 2.0)
    n_items = BLOCKS * BLOCK_ITEMS + 1
    category = np.append(np.repeat(np.arange(BLOCKS), BLOCK_ITEMS), -1)
    now = Occasion(
        n_customers=n, n_items=n_items, at_us=0, customer=customer, item=item, done_us=-(age * DAY_US).astype(np.int64),
        weight=np.ones(len(item)), category=category, price=np.full(n_items, np.nan), offered_us=np.full(n_items, -90 * DAY_US),
    )  # fmt: skip
    return now, category


def _share_in_own_block(found: Ranked, category: np.ndarray) -> float:
    """Of the first three items of the customers but the heavy one."""
    items = found[0][: BLOCKS * BLOCK_CUSTOMERS, :3]
    return float((category[items] == (np.arange(len(items)) % BLOCKS)[:, None]).mean())


def test_a_customer_with_fifty_thousand_events_does_not_take_over_the_others_lists() -> None:
    shares = []
    for heavy in (False, True):
        now, category = _blocks(heavy=heavy)
        weights = now.matrix(half_life_days=90.0)
        learner = Recommender(n_factors=8, n_epochs=8).fit(weights)
        found = learner.recommend(np.arange(now.n_customers), 5, exclude=now.bought())
        assert np.isfinite(found[1][: BLOCKS * BLOCK_CUSTOMERS]).all()
        shares.append(_share_in_own_block(found, category))
    assert shares[0] > 0.9
    assert shares[1] > shares[0] - 0.1


def test_no_source_loses_the_others_to_one_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(heavy: bool) -> dict[str, float]:
        now, category = _blocks(heavy=heavy)
        sources, histories = Retrieval().fit(now).sources_, now.matrix(half_life_days=60.0)
        names = ("factors", "ease", "neighbours", "recent_neighbours", "content")
        return {name: _share_in_own_block(sources[name].recommend(histories, 5, now.bought()), category) for name in names}

    assert min(shares(heavy=False).values()) > 0.9
    assert min(shares(heavy=True).values()) > 0.9
    monkeypatch.setattr("models.candidates.source.LONGEST", np.inf)  # the control: without the bound one robot decides for all
    assert shares(heavy=True)["ease"] < 0.3
    assert shares(heavy=True)["neighbours"] < 0.3


def test_an_item_seen_once_is_scored_and_found_for_the_one_who_saw_it() -> None:
    now, _ = _blocks(heavy=False)
    once = now.n_items - 1
    found = Retrieval().fit(now).candidates(now.histories().customer(0).at(now.at_us), new_only=False)
    assert np.isfinite(found.scores).all()
    assert once in found.items
    listed, scores = Recommender(n_factors=8, n_epochs=5).fit(now.matrix(half_life_days=90.0)).recommend([0, 1], now.n_items)
    assert once in listed[0, :6]
    assert np.isfinite(scores).all()


def test_five_customers_have_candidates_and_an_order_is_learned_from_those_who_chose() -> None:
    few = Occasion(
        n_customers=5, n_items=3, at_us=0, customer=np.array([0, 0, 1, 2]), item=np.array([0, 1, 0, 1]),
        done_us=-np.arange(1, 5) * DAY_US, weight=np.ones(4), category=np.full(3, -1), price=np.full(3, np.nan),
        offered_us=np.full(3, -9 * DAY_US),
    )  # fmt: skip
    retrieval, known = Retrieval().fit(few), few.histories()
    chosen = sparse.csr_matrix(([1.0], ([0], [1])), (5, 3))
    (one,) = pairs(retrieval, known, np.arange(5), 0, new_only=False, relevant=chosen)
    learner = TwoStage().fit(few, {ALL_ITEMS: [one]}, retrieval=retrieval)
    items, scores = learner.recommend(known, np.arange(5), 3, at_us=0)
    assert (np.sort(items, axis=1)[:, 1:] != np.sort(items, axis=1)[:, :-1]).all() or (items == -1).any()
    assert np.isfinite(scores[items >= 0]).all()
    with pytest.raises(ValueError, match=f"not trained for '{NEW_ITEMS}'"):
        learner.recommend(known, [0], 3, at_us=0, mode=NEW_ITEMS)
    everything = sparse.csr_matrix(np.ones((5, 3)))
    (all_chosen,) = pairs(retrieval, known, np.arange(5), 0, new_only=False, relevant=everything)
    with pytest.raises(ValueError, match="no order to learn"):
        TwoStage().fit(few, {ALL_ITEMS: [all_chosen]}, retrieval=retrieval)
