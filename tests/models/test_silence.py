"""Six numbers learned from labels, on customers of the model itself; and as the start of trees."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit

from models import evaluation
from models.classifier import Classifier
from models.likelihood import log_power_integral, power_integral
from models.silence import ROLES, Silence
from models.task import Task

TRUE = {"r": 1.3, "alpha": 7.0, "s": 1.1, "beta": 150.0, "p": 0.8, "q": 4.0}
HORIZON_DAYS = 28.0
KNOWN = Silence(HORIZON_DAYS, TRUE, (6.0, 1.0, 60.0, 5.0))


def lives(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Histories (n, 4) of customers first seen 10 to 120 days ago, and whether no order came in the horizon."""
    rng = np.random.default_rng(seed)
    age = rng.uniform(10, 120, n)
    rate, ordering = rng.gamma(TRUE["r"], 1 / TRUE["alpha"], n), rng.beta(TRUE["p"], TRUE["q"], n)
    lifetime = rng.exponential(1 / rng.gamma(TRUE["s"], 1 / TRUE["beta"], n))
    visits, orders = np.ones(n), (rng.random(n) < ordering).astype(float)
    last, silent, at = np.zeros(n), np.ones(n), np.zeros(n)
    open_ = np.arange(n)
    while len(open_):
        at[open_] += rng.exponential(1 / rate[open_])
        open_ = open_[at[open_] <= np.minimum(lifetime, age + HORIZON_DAYS)[open_]]
        is_order, is_seen = rng.random(len(open_)) < ordering[open_], at[open_] <= age[open_]
        seen = open_[is_seen]
        visits[seen], last[seen] = visits[seen] + 1, at[seen]
        orders[open_[is_seen & is_order]] += 1
        silent[open_[~is_seen & is_order]] = 0
    return np.column_stack([visits, orders, age, age - last]), silent


@pytest.fixture(scope="module")
def people() -> tuple[np.ndarray, np.ndarray]:
    """Only those who visited in the last 40 days, as a population of labels has them: nobody long gone."""
    history, silent = lives(12_000, 1)
    is_active = history[:, 3] <= 40
    return history[is_active], silent[is_active]


def test_the_true_numbers_foretell_as_many_as_are_silent_at_any_level() -> None:
    history, silent = lives(30_000, 0)
    foretold = expit(KNOWN.logit(history))
    assert evaluation.expected_calibration_error(silent, foretold) < 0.02
    assert evaluation.expected_calibration_error(silent, foretold**1.3) > 0.03  # control


def test_learned_from_who_is_still_about_it_foretells_as_the_truth_does(people: tuple[np.ndarray, np.ndarray]) -> None:
    history, silent = people
    learned = Silence.learn(history[:4_000], silent[:4_000], horizon_days=HORIZON_DAYS)
    best, found = (expit(model.logit(history[4_000:])) for model in (KNOWN, learned))
    assert evaluation.expected_auc(best, found) > evaluation.expected_auc(best, best) - 0.003
    assert np.mean((found - best) ** 2) < 0.01 * np.mean(best * (1 - best))
    one_number = np.mean(silent[:4_000])
    assert np.mean((one_number - best) ** 2) > 0.05 * np.mean(best * (1 - best))  # control


def test_learned_twice_it_is_the_same_and_a_row_alone_gets_the_same_bits(people: tuple[np.ndarray, np.ndarray]) -> None:
    history, silent = people
    learned = Silence.learn(history, silent, horizon_days=HORIZON_DAYS)
    assert learned == Silence.learn(history, silent, horizon_days=HORIZON_DAYS)
    assert learned != Silence.learn(history, silent, horizon_days=HORIZON_DAYS, random_state=1)  # of more rows than it needs, others
    whole = learned.logit(history[:200])
    assert [learned.logit(row[None])[0] for row in history[:200]] == whole.tolist()
    assert [learned.logit_of(row) for row in history[:200].tolist()] == pytest.approx(whole.tolist(), rel=1e-12)
    again = Silence.from_json(json.loads(json.dumps(learned.as_json())))
    assert again.logit(history[:200]).tolist() == whole.tolist()


NUMBERS = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 500).map(float))


@settings(max_examples=30)
@given(arrays(np.float64, (6, len(ROLES)), elements=NUMBERS), st.integers(0, 63))
def test_of_any_numbers_whatever_it_learns_and_says_finite_ones(history: np.ndarray, labels: int) -> None:
    label = np.array([labels >> bit & 1 for bit in range(6)], dtype=float)
    learned = Silence.learn(history, label, horizon_days=HORIZON_DAYS)
    for model in (learned, KNOWN):
        said, parts = model.logit(history), model.contributions(history)
        assert np.isfinite(said).all()
        one_by_one = np.array([model.logit_of(row) for row in history.tolist()])
        assert np.allclose(expit(one_by_one), expit(said), rtol=0, atol=1e-8)
        assert parts.sum(axis=1) + model.base() == pytest.approx(said, abs=1e-9)


def test_longer_silence_is_likelier_to_last_and_orders_make_it_less_likely() -> None:
    silence = np.arange(0.0, 60.0, 3.0)
    waits = KNOWN.logit(np.column_stack([np.full(20, 9.0), np.full(20, 2.0), np.full(20, 80.0), silence]))
    assert (np.diff(waits) > 0).all()
    orders = KNOWN.logit(np.column_stack([np.full(9, 9.0), np.arange(9.0), np.full(9, 80.0), np.full(9, 5.0)]))
    assert (np.diff(orders) < 0).all()


def test_the_shorter_rule_of_its_integral_gives_six_digits_of_the_long_one() -> None:
    rng = np.random.default_rng(5)
    lower, visits = rng.uniform(0, 300, 2_000), rng.integers(1, 400, 2_000).astype(float)
    upper = lower + rng.exponential(40, 2_000)
    for alpha, s, beta in ((7.0, 2.1, 150.0), (0.5, 1.2, 5_000.0), (90.0, 9.0, 0.3)):
        long = power_integral(lower, upper, visits, alpha, s, beta).log_value
        assert np.abs(log_power_integral(*(values[:, None] for values in (lower, upper, visits)), alpha, s, beta)[:, 0] - long).max() < 1e-6


def test_a_horizon_that_is_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 0 days"):
        Silence.learn(np.ones((3, 4)), np.array([0.0, 1.0, 1.0]), horizon_days=0.0)


# -- the start of trees ------------------------------------------------------------------------------------------------

HISTORY = dict(zip(ROLES, ("sessions", "orders", "first_age", "last_age"), strict=True))


def rows(history: np.ndarray, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(history, columns=list(HISTORY.values())).assign(
        noise=rng.normal(size=len(history)), place=rng.choice(["a", "b"], len(history))
    )


@pytest.fixture(scope="module")
def started(people: tuple[np.ndarray, np.ndarray]) -> Classifier:
    history, silent = people
    return Classifier(history=HISTORY, n_seeds=2).fit(rows(history[:3_000], 2), silent[:3_000])


def test_trees_that_start_from_it_are_nearer_to_the_truth_than_trees_alone(
    started: Classifier, people: tuple[np.ndarray, np.ndarray]
) -> None:
    history, silent = people
    later, best = rows(history[3_000:], 3), expit(KNOWN.logit(history[3_000:]))
    alone = Classifier(n_seeds=2).fit(rows(history[:3_000], 2), silent[:3_000])
    excess = [np.mean((learner.predict_proba(later)[:, 1] - best) ** 2) for learner in (started, alone)]
    assert excess[0] < 0.5 * excess[1]
    assert alone.silence_ is None


def test_what_it_says_is_explained_and_kept_with_the_trees(started: Classifier, people: tuple[np.ndarray, np.ndarray], tmp_path) -> None:
    some = rows(people[0][-300:], 4)
    some.loc[:4, "last_age"] = np.nan
    positive, parts = started.predict_proba(some)[:, 1], started.explain(some)
    assert np.allclose(parts.sum(axis=1) + started.base_, np.log(positive / (1 - positive)), atol=1e-9)
    assert parts["last_age"].abs().mean() > 10 * parts["noise"].abs().mean()
    started.save(tmp_path)
    loaded = Classifier.load(tmp_path)
    assert loaded.predict_values(loaded.encode(some.iloc[7:8])) == pytest.approx(positive[7:8], rel=1e-12)
    assert np.array_equal(loaded.explain(some), parts)


def test_a_later_fit_learns_it_anew_with_the_newest_rows(started: Classifier, people: tuple[np.ndarray, np.ndarray]) -> None:
    history, silent = people
    again = started.refitted(rows(history[:4_000], 2), silent[:4_000])
    assert again.silence_ is not None
    assert again.silence_ != started.silence_
    assert again.calibration_ == started.calibration_


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"history": HISTORY | {"visits": "absent"}}, "history expects a column"),
        ({"history": HISTORY | {"visits": "place"}}, "history expects a column"),
        ({"history": {"visits": "sessions"}}, "history expects a column"),
        ({"history": HISTORY, "monotone": {"orders": -1}}, "none of a history"),
    ],
    ids=["absent", "text", "incomplete", "directed"],
)
def test_a_history_that_is_none_is_refused(params, match, people: tuple[np.ndarray, np.ndarray]) -> None:
    history, silent = people
    with pytest.raises(ValueError, match=match):
        Classifier(**params).fit(rows(history[:200], 2), silent[:200])


def test_a_task_has_a_history_only_where_its_label_is_silence() -> None:
    with pytest.raises(ValueError, match="declare is_silence"):
        Task(
            name="t",
            feature_service="churn_v1",
            metric="auc",
            rival_name="r",
            rival=lambda features: np.zeros(len(features)),
            history=HISTORY,
        )
