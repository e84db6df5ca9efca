from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from models import evaluation
from models.lifetime import HISTORY, BetaGeometric, Lifetime, ParetoNBD

# CDNOW, 1/10 sample, in weeks: published with the models and reproduced by several packages to these digits.
BG = {"r": 0.243, "alpha": 4.414, "a": 0.793, "b": 2.426}
PARETO = {"r": 0.553, "alpha": 10.578, "s": 0.606, "beta": 11.669}
LEARNERS = [pytest.param(BetaGeometric, BG, id="bg"), pytest.param(ParetoNBD, PARETO, id="pareto")]
ELSEWHERE = [  # other shops: what is found is what was put in, not what the search starts from
    pytest.param(BetaGeometric, {"r": 0.6, "alpha": 9.0, "a": 0.5, "b": 3.5}, id="bg elsewhere"),
    pytest.param(ParetoNBD, {"r": 0.9, "alpha": 14.0, "s": 0.4, "beta": 7.0}, id="pareto elsewhere"),
]


def knowing(learner: type[Lifetime], params: dict[str, float]) -> Lifetime:
    made = learner()
    made.params_, made.log_likelihood_, made.converged_ = params, 0.0, True
    return made


def history(*rows: tuple[float, float, float]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=list(HISTORY), dtype=float)


def world(learner: type[Lifetime], params: dict[str, float], n: int, seed: int, horizon: float = 13.0) -> tuple[pd.DataFrame, np.ndarray]:
    """Customers of the model itself, 27 to 39 weeks old, and whether they ordered in the horizon after."""
    rng = np.random.default_rng(seed)
    age = rng.uniform(27, 39, n)
    rate = rng.gamma(params["r"], 1 / params["alpha"], n)
    lifetime = rng.exponential(1 / rng.gamma(params["s"], 1 / params["beta"], n)) if learner is ParetoNBD else np.full(n, np.inf)
    leaves = rng.beta(params["a"], params["b"], n) if learner is BetaGeometric else np.zeros(n)
    at, orders, last, later = (np.zeros(n) for _ in range(4))
    open_ = np.arange(n)
    while len(open_):
        at[open_] += rng.exponential(1 / rate[open_])
        open_ = open_[at[open_] <= np.minimum(lifetime, age + horizon)[open_]]
        seen = open_[at[open_] <= age[open_]]
        orders[seen] += 1
        last[seen] = at[seen]
        later[open_[at[open_] > age[open_]]] = 1
        open_ = open_[rng.random(len(open_)) >= leaves[open_]]
    return pd.DataFrame({"repeat_orders": orders, "recency_days": last, "age_days": age}), later


def gauss(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1], denser towards both ends."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    u = (nodes + 1) / 2
    return 3 * u**2 - 2 * u**3, weights / 2 * 6 * u * (1 - u)


def slow_likelihood(learner: type[Lifetime], params: dict[str, float], x: float, recency: float, age: float, sign: float = 1.0) -> float:
    """The likelihood by its definition: an individual's likelihood averaged over a fine grid of quantiles of both distributions."""
    quantiles, weights = gauss(600)
    rate = stats.gamma(params["r"], scale=1 / params["alpha"]).ppf(quantiles)[:, None]
    second = stats.beta(params["a"], params["b"]) if learner is BetaGeometric else stats.gamma(params["s"], scale=1 / params["beta"])
    leaves = second.ppf(quantiles)[None, :]
    if learner is BetaGeometric:
        value = (1 - leaves) ** x * rate**x * np.exp(-rate * age)
        if x:
            value = value + sign * leaves * (1 - leaves) ** (x - 1) * rate**x * np.exp(-rate * recency)
    else:
        both = rate + leaves
        value = rate**x * (leaves / both * np.exp(-both * recency) + sign * rate / both * np.exp(-both * age))
    return float(weights @ value @ weights)


def everybody(learner: type[Lifetime], params: dict[str, float], age: float = 39.0) -> tuple[pd.DataFrame, np.ndarray]:
    """All histories that customers of this age can have, by nodes of their recency, and the probability of each by its definition.

    Rates, and what makes a customer leave, are averaged over quantiles; the time of leaving is integrated. A likelihood is the
    probability density of the dates of all orders: times recency ** (n - 1) / (n - 1)! that of their number and the last of them.
    """
    quantiles, weights = gauss(200)
    rate = stats.gamma(params["r"], scale=1 / params["alpha"]).ppf(quantiles)
    leaves = (stats.beta(params["a"], params["b"]) if learner is BetaGeometric else stats.gamma(params["s"], scale=1 / params["beta"])).ppf(
        quantiles
    )
    most, (places, mass) = 120, gauss(16)
    x, places, mass = np.repeat(np.arange(1.0, most + 1), 16), np.tile(places, most), np.tile(mass, most)
    # with u = t / (alpha + t) what is left beside u ** (x - 1) varies little, so x * log(u) is spread evenly
    u = age / (params["alpha"] + age) * places ** (1 / x)
    recency = params["alpha"] * u / (1 - u)
    x, recency = np.append(0.0, x), np.append(0.0, recency)
    width = np.append(1.0, mass / places / (1 - u))

    def orders(until: np.ndarray) -> np.ndarray:
        """The density of x orders until then, times its width."""
        with np.errstate(divide="ignore"):
            spread = np.exp(special.xlogy(x, recency) - special.gammaln(x + 1))
        return (rate ** x[:, None] * np.exp(-rate * until[:, None]) @ weights) * spread * width

    now = np.full_like(x, age)
    if learner is BetaGeometric:
        stayed = (1 - leaves) ** x[:, None] @ weights
        left = np.where(x > 0, leaves * (1 - leaves) ** (np.maximum(x, 1)[:, None] - 1) @ weights, 0.0)
        probability = orders(now) * stayed + orders(recency) * left
    else:
        probability = orders(now) * (np.exp(-leaves * age) @ weights)
        for place, share in zip(*gauss(16), strict=True):
            gone = recency + (age - recency) * place
            probability += orders(gone) * (leaves * np.exp(-leaves * gone[:, None]) @ weights) * (age - recency) * share
    return history(*zip(x, recency, now, strict=True)), probability


@pytest.mark.parametrize(("learner", "params"), LEARNERS)
@pytest.mark.parametrize(
    "row", [(0.0, 0.0, 10.0), (1.0, 0.5, 30.0), (2.0, 6.0, 9.0), (12.0, 36.0, 39.0)], ids=["none", "one", "two", "many"]
)
def test_likelihood_is_the_definition_integrated_slowly(learner: type[Lifetime], params: dict[str, float], row: tuple) -> None:
    fast = np.exp(knowing(learner, params).log_likelihood(history(row)))[0]
    assert fast == pytest.approx(slow_likelihood(learner, params, *row), rel=1e-4)
    if row[0] or learner is ParetoNBD:  # control: one wrong sign in the definition, and they part
        assert fast != pytest.approx(slow_likelihood(learner, params, *row, sign=-1.0), rel=0.05, abs=0.0)


@pytest.mark.parametrize(("learner", "params"), LEARNERS)
def test_learned_slopes_are_those_of_the_likelihood(learner: type[Lifetime], params: dict[str, float]) -> None:
    rows = history((0, 0, 10), (1, 1e-6, 30), (2, 6, 9), (30, 29, 29.01), (400, 39, 39)).to_numpy().T
    theta = tuple(params.values())
    _, slopes = learner()._slopes(theta, *rows)
    for i in range(4):
        up, down = (learner()._slopes((*theta[:i], theta[i] + step, *theta[i + 1 :]), *rows)[0] for step in (1e-5, -1e-5))
        assert slopes[i] == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-4)


def test_worked_examples_of_the_papers_come_out() -> None:
    bg, pareto = knowing(BetaGeometric, BG), knowing(ParetoNBD, PARETO)
    assert bg.expected_purchases(history((2, 30.43, 38.86)), 39)[0] == pytest.approx(1.226, abs=5e-4)
    assert pareto.expected_purchases(history((0, 0, 0)), 52)[0] == pytest.approx(1.473, abs=5e-4)
    assert pareto.expected_purchases(history((26, 30.86, 31)), 52)[0] == pytest.approx(25.456, abs=5e-3)
    assert pareto.probability_alive(history((26, 30.86, 31)))[0] == pytest.approx(0.9979, abs=1e-4)


@pytest.mark.parametrize(("learner", "params"), [*LEARNERS, *ELSEWHERE])
def test_parameters_are_recovered_to_three_digits_from_all_that_can_happen(learner: type[Lifetime], params: dict[str, float]) -> None:
    rows, probability = everybody(learner, params)
    assert probability.sum() == pytest.approx(1.0, abs=1e-5)
    found = learner(n_starts=2).fit(rows, probability)
    assert found.converged_
    assert {name: round(value, 3) for name, value in found.params_.items()} == params


@pytest.mark.parametrize(("learner", "params"), LEARNERS)
@pytest.mark.parametrize("first", [0, 2], ids=["rate", "leaving"])
def test_one_wrong_sign_in_a_likelihood_does_not_recover_them(learner: type[Lifetime], params: dict[str, float], first: int) -> None:
    """Of r log(alpha), which stands for the rates, or of what stands alike for leaving: s log(beta), log B(a, b)."""
    second = first + 1

    class Wrong(learner):  # type: ignore[misc, valid-type]
        def _slopes(self, theta: tuple[float, ...], *rows: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
            value, by = super()._slopes(theta, *rows)
            one, other = theta[first], theta[second]
            term, slopes = one * np.log(other), (np.log(other), one / other)
            if learner is BetaGeometric and first == 2:
                both = special.digamma(one + other)
                term, slopes = -special.betaln(one, other), (both - special.digamma(one), both - special.digamma(other))
            turned = list(by)
            turned[first], turned[second] = by[first] - 2 * slopes[0], by[second] - 2 * slopes[1]
            return value - 2 * term, tuple(turned)

    found = Wrong(n_starts=1).fit(*everybody(learner, params)).params_
    assert max(abs(found[name] / value - 1) for name, value in params.items()) > 0.1


@pytest.mark.parametrize(("learner", "params"), LEARNERS)
def test_a_sample_of_customers_gives_them_within_their_standard_errors(learner: type[Lifetime], params: dict[str, float]) -> None:
    rows, _ = world(learner, params, n=5_000, seed=1)
    found = learner(n_starts=2).fit(rows)
    assert found.converged_
    scores = np.array(learner()._slopes(tuple(params.values()), *rows.to_numpy().T)[1])
    errors = np.sqrt(np.diag(np.linalg.inv(scores @ scores.T)))  # of the information, as its scores show it
    away = (np.array(list(found.params_.values())) - np.array(list(params.values()))) / errors
    assert (np.abs(away) < 3.5).all(), dict(zip(params, away, strict=True))
    assert found.log_likelihood_ >= knowing(learner, params).log_likelihood(rows).sum()


@pytest.mark.parametrize(("learner", "params"), LEARNERS)
def test_a_history_with_a_weight_is_that_many_customers(learner: type[Lifetime], params: dict[str, float]) -> None:
    rows, _ = world(learner, params, 300, seed=6)
    times = np.random.default_rng(0).integers(1, 4, len(rows))
    repeated, weighed = learner(n_starts=1).fit(rows.loc[rows.index.repeat(times)]), learner(n_starts=1).fit(rows, times)
    assert weighed.params_ == repeated.params_
    assert weighed.log_likelihood_ == repeated.log_likelihood_ == pytest.approx(weighed.log_likelihood(rows) @ times)
    assert weighed.params_ != learner(n_starts=1).fit(rows).params_  # control


@pytest.mark.parametrize("weight", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, np.nan]], ids=["too few", "zero", "negative", "nan"])
def test_weights_that_count_nobody_are_refused(weight: list[float]) -> None:
    with pytest.raises(ValueError, match="sample_weight"):
        BetaGeometric().fit(history((1, 2, 5), (0, 0, 5)), weight)


@pytest.mark.parametrize(("learner", "params"), LEARNERS)
def test_probability_of_purchase_is_the_rate_that_then_buys_and_being_alive_is_not(learner: type[Lifetime], params: dict) -> None:
    rows, buys = world(learner, params, 30_000, seed=2)
    knows = knowing(learner, params)
    probability, alive = knows.probability_of_purchase(rows, 13.0), knows.probability_alive(rows)
    assert evaluation.expected_calibration_error(buys, probability) < 0.015
    assert evaluation.expected_calibration_error(buys, alive) > 0.2  # control: the trap
    assert evaluation.auc(buys, probability) > evaluation.auc(buys, alive) + 0.025


@pytest.mark.parametrize(("learner", "params"), LEARNERS)
def test_answers_grow_with_the_horizon_and_keep_their_bounds(learner: type[Lifetime], params: dict) -> None:
    rows, _ = world(learner, params, 500, seed=3)
    knows = knowing(learner, params)
    last = np.zeros(len(rows))
    for horizon in (0.0, 1.0, 13.0, 520.0):
        probability, expected = knows.probability_of_purchase(rows, horizon), knows.expected_purchases(rows, horizon)
        assert (probability >= last - 1e-12).all()
        assert (probability <= expected + 1e-9).all()  # Markov
        assert (probability <= knows.probability_alive(rows) + 1e-9).all()
        last = probability


@pytest.mark.parametrize(("learner", "params"), LEARNERS)
def test_a_customer_with_fifty_thousand_orders_and_one_of_today_get_finite_answers(learner: type[Lifetime], params: dict) -> None:
    rows = history((50_000, 38.999999, 39), (50_000, 1.0, 39), (0, 0, 0), (1, 1e-9, 1e-9), (3, 39, 39))
    knows = knowing(learner, params)
    assert np.isfinite(knows.log_likelihood(rows)).all()
    assert knows.probability_of_purchase(rows, 4.0)[:2] == pytest.approx([1.0, 0.0], abs=1e-3)
    assert np.isfinite(knows.expected_purchases(rows, 4.0)).all()


@pytest.mark.parametrize(("learner", "params"), LEARNERS)
def test_the_unit_of_time_changes_no_answer(learner: type[Lifetime], params: dict) -> None:
    weeks, _ = world(learner, params, 1_500, seed=4)
    days = weeks.assign(recency_days=weeks["recency_days"] * 7, age_days=weeks["age_days"] * 7)
    in_weeks, in_days = learner().fit(weeks), learner().fit(days)
    assert in_weeks.probability_of_purchase(weeks, 4.0) == pytest.approx(in_days.probability_of_purchase(days, 28.0), abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (history((1, 0, 5)), "recency of 0"),
        (history((1, 6, 5)), "recency <= age"),
        (history((-1, 0, 5)), "repeat orders >= 0"),
        (history((0, 0, 5), (0, 0, 7)), "some repeat orders"),
        (history(), "expected rows"),
        (history((1, np.nan, 5)), "finite"),
        (history((1, 1, 5)).drop(columns="age_days"), "age_days"),
    ],
    ids=["no recency", "beyond age", "negative", "nobody came back", "empty", "nan", "column"],
)
def test_histories_that_are_none_are_refused(rows: pd.DataFrame, sentence: str) -> None:
    for learner in (BetaGeometric, ParetoNBD):
        with pytest.raises(ValueError, match=sentence):
            learner().fit(rows)


@pytest.mark.parametrize(("learner", "params"), LEARNERS)
def test_saved_and_loaded_it_answers_to_the_bit_and_another_kind_is_refused(learner: type[Lifetime], params: dict, tmp_path: Path) -> None:
    rows, _ = world(learner, params, 400, seed=5)
    fitted = learner(n_starts=2).fit(rows)
    fitted.save(tmp_path)
    assert np.array_equal(learner.load(tmp_path).probability_of_purchase(rows, 13.0), fitted.probability_of_purchase(rows, 13.0))
    assert learner(n_starts=2).fit(rows).params_ == fitted.params_
    with pytest.raises(ValueError, match="expected the description"):
        (ParetoNBD if learner is BetaGeometric else BetaGeometric).load(tmp_path)
