"""Purchase histories -> the probability of another purchase, and how many are to be expected: buy till you die.

BG/NBD and Pareto/NBD by maximum likelihood. A history is three numbers of a customer: repeat
orders, time from the first to the last order, time from the first order to now. Never ranks by the probability of being alive: BG/NBD
gives 1 to everybody without a repeat order. Arrays and frames in and out; no clock.

Sources: Fader, Hardie & Lee, Marketing Science 2005 (BG/NBD); Schmittlein, Morrison & Colombo, Management Science 1987 and Fader &
Hardie's note of 2005 (Pareto/NBD).
"""

from abc import abstractmethod
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import special

from models.learner import Learner, read_json, write_json
from models.likelihood import Floats, Parameters, PowerIntegral, Slopes, beta_rule, maximise, power_integral

HISTORY = ("repeat_orders", "recency_days", "age_days")


class Lifetime(Learner):
    """What both models of a customer's lifetime share: the history, the fit from several starts, the files.

    history: frame with the columns of `HISTORY`, one row a customer; any one unit of time, the same in `fit` and in questions.
    Learned: `params_`, by name; `log_likelihood_`; `converged_`.
    """

    names: tuple[str, ...] = ()
    kind = ""

    def __init__(self, *, n_starts: int = 4, max_customers: int = 100_000, random_state: int = 0) -> None:
        self.n_starts = n_starts
        self.max_customers = max_customers
        self.random_state = random_state

    def fit(self, history: pd.DataFrame, sample_weight: ArrayLike | None = None) -> Self:
        """Learn from the histories of everybody who ever bought, those who left included; of more than `max_customers` rows a sample.

        sample_weight: (n,), how many customers have each history, by default one. Raises ValueError on no rows, numbers that are no
        history (`recency_days` of 0 with repeat orders, beyond `age_days`), histories without a single repeat order, or a weight that is
        not above 0.
        """
        x, recency, age = _history(history)
        if not (x > 0).any() or age.max() <= 0:
            raise ValueError(f"{type(self).__name__}: expected some repeat orders to learn from, found none in {len(x)} histories")
        weight = _weight(sample_weight, len(x))
        rng = np.random.default_rng(self.random_state)
        if len(x) > self.max_customers:
            chosen = np.sort(rng.choice(len(x), self.max_customers, replace=False))
            x, recency, age, weight = x[chosen], recency[chosen], age[chosen], weight[chosen]
        histories, place = np.unique(np.column_stack([x, recency, age]), axis=0, return_inverse=True)  # told in days, they repeat
        (x, recency, age), weight = histories.T, np.bincount(place.ravel(), weight).astype(np.float64)
        unit = float(np.average(age, weights=weight))  # the fit does not see whether these are days or weeks
        rows = np.column_stack([x, recency / unit, age / unit])
        best = maximise(
            lambda theta, part: self._slopes(theta, *part.T), rows, len(self.names), n_starts=self.n_starts, rng=rng, weights=weight
        )
        found = self._in_units(tuple(float(v) for v in np.exp(best.x)), unit)
        self.params_ = dict(zip(self.names, found, strict=True))
        self.log_likelihood_ = float(self._log_likelihood(found, x, recency, age) @ weight)
        self.converged_ = bool(best.success)
        return self

    def probability_of_purchase(self, history: pd.DataFrame, horizon: float) -> Floats:
        """P(at least one order in the next `horizon` | history) (n,): 1 minus it is the churn that a label observes."""
        x, recency, age = _history(history)
        return np.clip(self._probability_of_purchase(self._fitted(), x, recency, age, horizon), 0.0, 1.0)

    def expected_purchases(self, history: pd.DataFrame, horizon: float) -> Floats:
        """Expected orders in the next `horizon` (n,)."""
        x, recency, age = _history(history)
        return self._expected_purchases(self._fitted(), x, recency, age, horizon)

    def probability_alive(self, history: pd.DataFrame) -> Floats:
        """P(has not left | history) (n,). A part of the other answers; as a score of churn it misleads."""
        x, recency, age = _history(history)
        return self._probability_alive(self._fitted(), x, recency, age)

    def log_likelihood(self, history: pd.DataFrame) -> Floats:
        """Log-likelihood of each history (n,) under the learned parameters."""
        return self._log_likelihood(self._fitted(), *_history(history))

    def loss(self, history: pd.DataFrame) -> float:
        """Mean negative log-likelihood."""
        return float(-self.log_likelihood(history).mean())

    def save(self, folder: Path) -> None:
        """Write `lifetime.json` into the folder, made if absent."""
        self._check_fitted("params_")
        folder.mkdir(parents=True, exist_ok=True)
        learned = {"learned": self.params_, "log_likelihood": self.log_likelihood_, "converged": self.converged_}
        write_json(folder / "lifetime.json", {"kind": self.kind, "params": self.get_params(), **learned})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The learner as it was saved. Raises ValueError if it is another model."""
        saved = read_json(folder / "lifetime.json", cls.kind)
        learner = cls(**saved["params"])
        learner.params_, learner.log_likelihood_, learner.converged_ = saved["learned"], saved["log_likelihood"], saved["converged"]
        return learner

    def _fitted(self) -> Parameters:
        self._check_fitted("params_")
        return tuple(self.params_[name] for name in self.names)

    @abstractmethod
    def _in_units(self, found: Parameters, unit: float) -> Parameters:
        """Parameters of times divided by `unit` as parameters of the times themselves."""

    def _log_likelihood(self, theta: Parameters, x: Floats, recency: Floats, age: Floats) -> Floats:
        return self._slopes(theta, x, recency, age)[0]

    @abstractmethod
    def _slopes(self, theta: Parameters, x: Floats, recency: Floats, age: Floats) -> Slopes:
        """Log-likelihood (n,) and its derivative by each parameter."""

    @abstractmethod
    def _probability_alive(self, theta: Parameters, x: Floats, recency: Floats, age: Floats) -> Floats: ...

    @abstractmethod
    def _probability_of_purchase(self, theta: Parameters, x: Floats, recency: Floats, age: Floats, horizon: float) -> Floats: ...

    @abstractmethod
    def _expected_purchases(self, theta: Parameters, x: Floats, recency: Floats, age: Floats, horizon: float) -> Floats: ...


class BetaGeometric(Lifetime):
    """BG/NBD: order rates are gamma (r, alpha); after each order a customer leaves with a probability that is beta (a, b)."""

    names, kind = ("r", "alpha", "a", "b"), "bg_nbd"

    def _in_units(self, found: Parameters, unit: float) -> Parameters:
        r, alpha, a, b = found
        return r, alpha * unit, a, b

    def _slopes(self, theta: Parameters, x: Floats, recency: Floats, age: Floats) -> Slopes:
        r, alpha, a, b = theta
        rate = special.gammaln(r + x) - special.gammaln(r) + r * np.log(alpha) - special.betaln(a, b)
        alive = special.betaln(a, b + x) - (r + x) * np.log(alpha + age)
        before = np.maximum(x, 1) - 1  # orders after which the customer stayed
        left = np.where(x > 0, special.betaln(a + 1, b + before) - (r + x) * np.log(alpha + recency), -np.inf)
        stays = special.expit(alive - left)
        goes = 1 - stays
        digamma = special.digamma
        all_orders = digamma(a + b + x)
        return rate + np.logaddexp(alive, left), (
            digamma(r + x) - digamma(r) + np.log(alpha) - stays * np.log(alpha + age) - goes * np.log(alpha + recency),
            r / alpha - (r + x) * (stays / (alpha + age) + goes / (alpha + recency)),
            digamma(a + b) - digamma(a) + stays * digamma(a) + goes * digamma(a + 1) - all_orders,
            digamma(a + b) - digamma(b) + stays * digamma(b + x) + goes * digamma(b + before) - all_orders,
        )

    def _probability_alive(self, theta: Parameters, x: Floats, recency: Floats, age: Floats) -> Floats:
        r, alpha, a, b = theta
        log_odds_left = np.log(a) - np.log(b + np.maximum(x, 1) - 1) + (r + x) * (np.log(alpha + age) - np.log(alpha + recency))
        return np.where(x > 0, special.expit(-log_odds_left), 1.0)

    def _probability_of_purchase(self, theta: Parameters, x: Floats, recency: Floats, age: Floats, horizon: float) -> Floats:
        r, alpha, _, _ = theta
        # who is alive leaves only at an order, so none until the horizon needs no more than the rate
        silent = (r + x) * (np.log(alpha + age) - np.log(alpha + age + horizon))
        return np.asarray(self._probability_alive(theta, x, recency, age) * -np.expm1(silent))

    def _expected_purchases(self, theta: Parameters, x: Floats, recency: Floats, age: Floats, horizon: float) -> Floats:
        # E[(1 - (1 + p h / (alpha + T)) ** -(r + x)) / p] over p ~ beta (a, b + x), by the Gauss rule of that beta; unlike the published
        # closed form it has no pole at a = 1
        r, alpha, a, b = theta
        counts, place = np.unique(x, return_inverse=True)
        rules = [beta_rule(a, b + count) for count in counts]
        nodes, weights = (np.array([rule[i] for rule in rules])[place.ravel()] for i in (0, 1))
        silent = -(r + x)[:, None] * np.log1p(nodes * (horizon / (alpha + age))[:, None])
        while_alive = np.sum(weights * -np.expm1(silent) / nodes, axis=1)
        return np.asarray(self._probability_alive(theta, x, recency, age) * while_alive)


class ParetoNBD(Lifetime):
    """Pareto/NBD: order rates are gamma (r, alpha), lifetimes exponential with rates that are gamma (s, beta)."""

    names, kind = ("r", "alpha", "s", "beta"), "pareto_nbd"

    def __init__(self, *, n_starts: int = 4, max_customers: int = 5_000, random_state: int = 0) -> None:
        super().__init__(n_starts=n_starts, max_customers=max_customers, random_state=random_state)

    def _in_units(self, found: Parameters, unit: float) -> Parameters:
        r, alpha, s, beta = found
        return r, alpha * unit, s, beta * unit

    def _slopes(self, theta: Parameters, x: Floats, recency: Floats, age: Floats) -> Slopes:
        r, alpha, s, beta = theta
        alive, left, within = self._parts(theta, x, recency, age)
        stays = special.expit(alive - left)
        goes, digamma = 1 - stays, special.digamma
        return np.logaddexp(alive, left), (
            digamma(r + x) - digamma(r) + np.log(alpha) - stays * np.log(alpha + age) - goes * within.log_alpha,
            r / alpha - (r + x) * (stays / (alpha + age) + goes * within.inverse_alpha),
            np.log(beta) - stays * np.log(beta + age) + goes * (1 / s - within.log_beta),
            s / beta - stays * s / (beta + age) - goes * (s + 1) * within.inverse_beta,
        )

    def _probability_alive(self, theta: Parameters, x: Floats, recency: Floats, age: Floats) -> Floats:
        alive, left, _ = self._parts(theta, x, recency, age)
        return np.asarray(special.expit(alive - left))

    def _probability_of_purchase(self, theta: Parameters, x: Floats, recency: Floats, age: Floats, horizon: float) -> Floats:
        r, alpha, s, beta = theta
        # the next order falls at tau, and the lifetime outlasts it
        first = power_integral(age, age + horizon, r + x + 1, alpha, s, beta).log_value
        orders = special.gammaln(r + x + 1) - special.gammaln(r) + r * np.log(alpha) + s * np.log(beta)
        return np.asarray(np.exp(first + orders - self._log_likelihood(theta, x, recency, age)))

    def _expected_purchases(self, theta: Parameters, x: Floats, recency: Floats, age: Floats, horizon: float) -> Floats:
        r, alpha, s, beta = theta
        # beta ** s * the integral of (beta + tau) ** -s from T to T + h, by log of the ratio so that s = 1 is no pole
        ratio = np.log1p(horizon / (beta + age))
        with np.errstate(divide="ignore"):  # a horizon of 0 holds no orders
            spans = s * np.log(beta) + (1 - s) * np.log(beta + age) + np.log(ratio * special.exprel((1 - s) * ratio))
        orders = special.gammaln(r + x + 1) - special.gammaln(r) + r * np.log(alpha) - (r + x + 1) * np.log(alpha + age)
        return np.asarray(np.exp(spans + orders - self._log_likelihood(theta, x, recency, age)))

    @staticmethod
    def _parts(theta: Parameters, x: Floats, recency: Floats, age: Floats) -> tuple[Floats, Floats, PowerIntegral]:
        """Log-likelihood of the history with a customer who is still there, with one who left since the last order, and when."""
        r, alpha, s, beta = theta
        rate = special.gammaln(r + x) - special.gammaln(r) + r * np.log(alpha) + s * np.log(beta)
        alive = rate - (r + x) * np.log(alpha + age) - s * np.log(beta + age)
        within = power_integral(recency, age, r + x, alpha, s + 1, beta)
        return alive, rate + np.log(s) + within.log_value, within


def floats(name: str, values: Any) -> Floats:
    """The values as (n,) finite numbers. Raises ValueError naming them where they are not."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError(f"lifetime: {name} must be one finite number for each customer; found shape {array.shape}")
    return array


# -- private -----------------------------------------------------------------------------------------------------------


def _weight(values: ArrayLike | None, n: int) -> Floats:
    weight = np.ones(n) if values is None else floats("sample_weight", values)
    if len(weight) != n or not (weight > 0).all():
        raise ValueError(f"lifetime: expected a sample_weight above 0 for each of {n} histories, found {len(weight)}, not all such")
    return weight


def _history(history: pd.DataFrame) -> tuple[Floats, Floats, Floats]:
    absent = [name for name in HISTORY if name not in history]
    if absent or history.empty:
        raise ValueError(f"lifetime: expected rows with the columns {list(HISTORY)}, found {len(history)} rows without {absent}")
    x, recency, age = (floats(name, history[name]) for name in HISTORY)
    wrong = (x < 0) | (recency < 0) | (recency > age) | ((x > 0) != (recency > 0))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"lifetime: expected repeat orders >= 0, and 0 <= recency <= age with a recency of 0 where there are none; found "
            f"{x[row]:g}, {recency[row]:g}, {age[row]:g} in row {row} (and {int(wrong.sum()) - 1} more)"
        )
    return x, recency, age
