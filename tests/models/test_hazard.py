"""When the next order comes: what is known to be true of a simulated shop is found again, and what is not seen misleads nobody."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from models import evaluation
from models.hazard import PERIOD, Hazard, Waits, expected_days, median_days, person_periods, waits
from models.learner import Learner
from models.task import follows

DAY = pd.Timedelta(1, "D")
START = pd.Timestamp("2026-01-01", tz="UTC")
PERIODS, PERIOD_DAYS = 4, 7.0


@dataclass(frozen=True)
class World:
    """Rows with their true hazards (n, PERIODS), when the event came, and how long each was followed."""

    features: pd.DataFrame
    hazard: np.ndarray
    days: np.ndarray
    followed_days: np.ndarray

    @property
    def survival(self) -> np.ndarray:
        return np.cumprod(1 - self.hazard, axis=1)

    @property
    def waited(self) -> Waits:
        return Waits(np.where(self.days <= self.followed_days, self.days, np.inf), self.followed_days)


def _world(n: int, seed: int) -> World:
    """The hazard falls from period to period, and with a feature; followed for anything from half a period to all of them."""
    rng = np.random.default_rng(seed)
    features = pd.DataFrame({"x": rng.normal(size=n), "place": rng.choice(["north", "south", None], n), "noise": rng.normal(size=n)})
    logit = np.array([-0.6, -1.0, -1.4, -1.8]) + (0.8 * features["x"] + 0.5 * (features["place"] == "north")).to_numpy()[:, None]
    hazard = 1 / (1 + np.exp(-logit))
    came = rng.random((n, PERIODS)) < hazard
    period = np.where(came.any(axis=1), came.argmax(axis=1), np.inf)
    days = (period + rng.uniform(0.01, 0.99, n)) * PERIOD_DAYS
    followed = rng.uniform(0.5, 1.2 * PERIODS, n) * PERIOD_DAYS
    return World(features, hazard, days, followed)


@pytest.fixture(scope="module")
def train() -> World:
    return _world(12_000, 1)


@pytest.fixture(scope="module")
def later() -> World:
    return _world(6_000, 2)


@pytest.fixture(scope="module")
def fitted(train: World) -> Hazard:
    return Hazard(n_periods=PERIODS, period_days=PERIOD_DAYS, learning_rate=0.1).fit(train.features, train.waited)


def _errors(found: np.ndarray, truth: np.ndarray, n_at_risk: np.ndarray) -> np.ndarray:
    """How many standard errors of a rate lie between what was found and the truth, period by period."""
    return (found.mean(axis=0) - truth.mean(axis=0)) / np.sqrt(truth.mean(axis=0) * (1 - truth.mean(axis=0)) / n_at_risk)


def _at_risk(world: World) -> np.ndarray:
    _, period, _ = person_periods(world.waited, period_days=PERIOD_DAYS, n_periods=PERIODS)
    return np.bincount(period, minlength=PERIODS + 1)[1:]


def test_known_hazards_are_found_again_within_their_errors(fitted: Hazard, train: World, later: World) -> None:
    hazard = fitted.predict_hazard(later.features)
    at_risk = _at_risk(train)
    assert at_risk.min() > 300
    for value in (-1.0, 0.0, 1.0):  # also of people who are quick, or slow
        near = np.abs(later.features["x"].to_numpy() - value) < 0.3
        share = near.mean()
        assert (np.abs(_errors(hazard[near], later.hazard[near], at_risk * share)) < 4).all(), value
    assert np.corrcoef(hazard.ravel(), later.hazard.ravel())[0, 1] > 0.97


def test_survival_is_as_good_as_the_truth_and_calibrated(fitted: Hazard, later: World) -> None:
    survival, truth = fitted.predict_survival(later.features)[:, -1], later.survival[:, -1]
    best = evaluation.expected_auc(truth, truth)
    assert evaluation.expected_auc(truth, survival) > best - 0.01
    assert survival.mean() == pytest.approx(truth.mean(), abs=0.02)


def test_who_takes_the_unseen_for_silence_finds_far_too_much_of_it(train: World, later: World) -> None:
    """The control: the same learner, told that everybody was followed to the end."""
    deceived = Waits(train.waited.days, np.full(len(train.days), 10 * PERIODS * PERIOD_DAYS))
    wrong = Hazard(n_periods=PERIODS, period_days=PERIOD_DAYS, learning_rate=0.1).fit(train.features, deceived)
    found = wrong.predict_survival(later.features)[:, -1].mean()
    assert found > later.survival[:, -1].mean() + 0.1


def test_keeping_half_watched_periods_only_where_the_event_came_would_make_people_quick(train: World) -> None:
    """The control of the subtler mistake: hazards counted from periods that were left out only where nothing happened."""
    _, period, label = person_periods(train.waited, period_days=PERIOD_DAYS, n_periods=PERIODS)
    sound = np.bincount(period, weights=label)[1:] / np.bincount(period)[1:]
    seen = train.days <= train.followed_days
    long = np.where(seen, np.inf, train.followed_days)
    _, period, label = person_periods(Waits(train.waited.days, long), period_days=PERIOD_DAYS, n_periods=PERIODS)
    leaning = np.bincount(period, weights=label)[1:] / np.bincount(period)[1:]
    alive = np.column_stack([np.ones(len(train.days)), train.survival[:, :-1]])
    truth = (train.hazard * alive).sum(axis=0) / alive.sum(axis=0)
    errors = np.sqrt(truth * (1 - truth) / _at_risk(train))
    assert (np.abs(sound - truth) < 4 * errors).all()
    assert (leaning > truth + 4 * errors).any()


def test_probabilities_of_the_periods_and_of_none_sum_to_one_and_survival_never_rises(fitted: Hazard, later: World) -> None:
    some = pd.concat([later.features.head(300), pd.DataFrame({"x": [None, 1e12], "place": ["atlantis", None], "noise": [None, -1e12]})])
    both, survival = fitted.predict_proba(some), fitted.predict_survival(some)
    assert both.shape == (302, PERIODS + 1)
    assert np.allclose(both.sum(axis=1), 1)
    assert (both >= 0).all()
    assert (np.diff(survival, axis=1, prepend=1.0) <= 0).all()
    assert fitted.predict_proba(some.head(0)).shape == (0, PERIODS + 1)


def test_silence_through_a_period_is_the_survival_to_its_end_and_in_between_falls_evenly(fitted: Hazard, later: World) -> None:
    some = later.features.head(50)
    survival = fitted.predict_survival(some)
    for t in range(PERIODS):
        assert np.allclose(fitted.silence(some, (t + 1) * PERIOD_DAYS), survival[:, t])
    assert np.allclose(fitted.silence(some, 0), 1)
    assert np.allclose(fitted.silence(some, PERIOD_DAYS / 2) ** 2, survival[:, 0])
    with pytest.raises(ValueError, match="asked for 29 days"):
        fitted.silence(some, 29)


def test_expected_wait_and_median_are_those_of_waits_drawn_from_the_curve() -> None:
    """An even hazard within each period: the first one quick, then slow, then nobody at all."""
    survival = np.array([[0.6, 0.4, 0.35, 0.35]])
    rng = np.random.default_rng(0)
    left, days = rng.random(200_000), np.arange(5) * PERIOD_DAYS
    waited = np.interp(-np.log(left), -np.log([1.0, *survival[0, :3]]), days[:4], right=np.inf)
    found = np.minimum(waited, PERIODS * PERIOD_DAYS)
    assert expected_days(survival, period_days=PERIOD_DAYS)[0] == pytest.approx(found.mean(), abs=4 * found.std() / np.sqrt(len(found)))
    assert median_days(survival, period_days=PERIOD_DAYS)[0] == pytest.approx(np.median(waited), abs=0.1)


curves = st.lists(st.floats(0, 1), min_size=1, max_size=6).map(lambda hazards: np.cumprod(1 - np.array([hazards]), axis=1))


@settings(max_examples=100)
@given(survival=curves, period_days=st.sampled_from([1.0, 7.0]))
@example(survival=np.ones((1, 3)), period_days=7.0)
@example(survival=np.zeros((1, 3)), period_days=7.0)
@example(survival=np.array([[1.0 - 1e-12]]), period_days=1.0)
def test_expected_wait_lies_between_none_and_all_periods_and_the_median_where_half_is_left(
    survival: np.ndarray, period_days: float
) -> None:
    longest = survival.shape[1] * period_days
    mean, median = expected_days(survival, period_days=period_days)[0], median_days(survival, period_days=period_days)[0]
    assert -1e-9 <= mean <= longest + 1e-9
    assert mean <= period_days * (1 + survival[0, :-1].sum()) + 1e-9  # as if all came at the ends of their periods
    assert mean >= period_days * survival[0].sum() - 1e-9  # and at the beginnings
    assert np.isnan(median) == (survival[0, -1] > 0.5)
    if np.isfinite(median):
        at = np.append(1.0, survival[0])
        first, last = int(np.floor(median / period_days + 1e-9)), int(np.ceil(median / period_days - 1e-9))
        assert at[last] <= 0.5 <= at[min(first, last)] or median == first * period_days


instants = st.integers(0, 60).map(lambda halves: START + halves * DAY / 2)
histories = st.lists(st.tuples(st.sampled_from("abc"), instants), max_size=12)


@settings(max_examples=60)
@given(rows=histories.filter(len), orders=histories, horizon=st.integers(1, 20), gap=st.integers(0, 4), end=instants)
@example(rows=[("a", START)], orders=[("a", START + 7 * DAY)], horizon=7, gap=0, end=START + 7 * DAY)
def test_a_wait_within_the_horizon_is_what_the_churn_label_calls_an_order(
    rows: list, orders: list, horizon: int, gap: int, end: pd.Timestamp
) -> None:
    asked, events = (pd.DataFrame(part, columns=["customer_id", "event_timestamp"]) for part in (rows, orders))
    events["event_timestamp"] = pd.to_datetime(events["event_timestamp"], utc=True)
    waited = waits(asked, events, as_of=end, gap_days=gap)
    opened = asked.assign(event_timestamp=asked["event_timestamp"] + gap * DAY)
    matured = waited.followed_days >= horizon
    came = follows(opened, events, within=horizon * DAY)
    assert np.array_equal((waited.days <= horizon)[matured], came[matured] == 1)
    assert (waited.days[np.isfinite(waited.days)] <= waited.followed_days[np.isfinite(waited.days)]).all()


@settings(max_examples=100)
@given(
    waited=st.lists(st.tuples(st.floats(0.01, 60) | st.just(np.inf), st.floats(0, 60)), min_size=1, max_size=20),
    period_days=st.sampled_from([1.0, 7.0, 28 / 3]),
)
def test_periods_are_counted_until_the_event_or_the_end_of_watching(waited: list, period_days: float) -> None:
    days, followed = np.array(waited).T
    row, period, label = person_periods(Waits(days, followed), period_days=period_days, n_periods=PERIODS)
    assert (period * period_days <= followed[row] + 1e-6).all()
    assert ((period - 1) * period_days <= days[row] + 1e-6).all()
    for n in np.unique(row):
        mine = period[row == n]
        assert mine.tolist() == list(range(1, len(mine) + 1))
        assert label[row == n][:-1].sum() == 0


def test_three_customers_by_eye() -> None:
    """One came on day 8 of 14, one not yet, one in a week that was not watched to its end."""
    waited = Waits(np.array([8.0, np.inf, 9.0]), np.array([14.0, 20.0, 13.0]))
    row, period, label = person_periods(waited, period_days=7.0, n_periods=3)
    assert list(zip(row.tolist(), period.tolist(), label.tolist(), strict=True)) == [(0, 1, 0), (0, 2, 1), (1, 1, 0), (1, 2, 0), (2, 1, 0)]
    boundary = person_periods(Waits(np.array([7.0, 28 / 3]), np.array([28.0, 28.0])), period_days=7.0, n_periods=3)
    assert boundary[1][boundary[2] == 1].tolist() == [1, 2]


def test_later_rows_stop_the_training_and_the_loss_is_least_near_the_truth(train: World, later: World, fitted: Hazard) -> None:
    stopped = clone(fitted).fit(train.features, train.waited, (later.features, later.waited))
    assert stopped.loss((later.features, later.waited)) == pytest.approx(fitted.loss((later.features, later.waited)), rel=0.02)
    blind = clone(fitted).fit(train.features[["noise"]], train.waited)
    assert blind.loss((later.features[["noise"]], later.waited)) > 1.02 * fitted.loss((later.features, later.waited))


def test_refitted_it_has_learned_the_later_rows_too_and_keeps_what_they_calibrated(train: World, later: World) -> None:
    few = World(train.features.head(600), train.hazard[:600], train.days[:600], train.followed_days[:600])
    stopped = Hazard(learning_rate=0.1).fit(few.features, few.waited, (later.features, later.waited))
    both = pd.concat([few.features, later.features], ignore_index=True)
    waited = Waits(np.append(few.waited.days, later.waited.days), np.append(few.waited.followed_days, later.waited.followed_days))
    again, fresh = stopped.refitted(both, waited), _world(3_000, 5)
    assert again.classifier_.calibration_ == stopped.classifier_.calibration_
    assert again.loss((fresh.features, fresh.waited)) < stopped.loss((fresh.features, fresh.waited))


def test_it_is_a_learner_like_the_others(train: World, fitted: Hazard, tmp_path: Path) -> None:
    assert isinstance(fitted, Learner)
    some, known = train.features.head(800), Waits(train.waited.days[:800], train.followed_days[:800])
    with pytest.raises(ValueError, match="call fit or load first"):
        clone(fitted).predict_proba(some)
    once = clone(fitted).fit(some, known)
    assert np.array_equal(clone(fitted).fit(some, known).predict_proba(some), once.predict_proba(some))
    assert not np.array_equal(clone(fitted).set_params(random_state=9).fit(some, known).predict_proba(some), once.predict_proba(some))
    once.save(tmp_path / "model")
    assert np.array_equal(Hazard.load(tmp_path / "model").predict_proba(some), once.predict_proba(some))
    assert {path.suffix for path in (tmp_path / "model").rglob("*") if path.is_file()} == {".lgb", ".json"}
    defaults = Hazard().get_params()
    drawn = Hazard.suggest(optuna.trial.FixedTrial(defaults))
    assert drawn == {name: defaults[name] for name in drawn}
    (tmp_path / "model" / "hazard.json").write_text('{"kind": "something else"}')
    with pytest.raises(ValueError, match="something else"):
        Hazard.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("waited", "params", "sentence"),
    [
        (Waits(np.full(9, np.inf), np.full(9, 28.0)), {}, "found 0 with it among 36"),
        (Waits(np.full(9, 1.0), np.full(9, 28.0)), {}, "found 9 with it among 9"),
        (Waits(np.full(9, 1.0), np.full(9, 6.9)), {}, "found 0 with it among 0"),
        (Waits(np.full(8, 1.0), np.full(8, 28.0)), {}, "one wait for each of 9 rows"),
        (Waits(np.full(9, 1.0), np.full(9, 28.0)), {"n_periods": 0}, "1 period or more"),
        (Waits(np.full(9, 1.0), np.full(9, 28.0)), {"period_days": 0.0}, "1 period or more"),
    ],
    ids=["nobody-came", "all-came-at-once", "not-watched", "lengths", "no-periods", "empty-periods"],
)
def test_waits_that_cannot_teach_are_refused_with_a_sentence(waited: Waits, params: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Hazard(**params).fit(pd.DataFrame({"x": np.arange(9.0)}), waited)


def test_a_column_of_the_periods_name_is_refused() -> None:
    with pytest.raises(ValueError, match=f"no column {PERIOD}"):
        Hazard().fit(pd.DataFrame({PERIOD: [1.0, 2.0]}), Waits(np.array([1.0, np.inf]), np.array([28.0, 28.0])))
