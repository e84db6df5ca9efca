"""Visits and orders so far -> the probability that no order follows within a horizon: six numbers, learned from labelled rows.

Buy till you die where visits are seen as well as orders: visits come and end as in Pareto/NBD, and each brings an order with a
probability of the customer's own. The numbers are those that make the labels likeliest, not the histories: what a history foretells
does not depend on why its customer is among the rows, while the likelihood of histories would need everybody's, who left included.
Arrays in and out; no clock, no files.

Source: Schmittlein, Morrison & Colombo, Management Science 1987 (Pareto/NBD); the rest follows by thinning its Poisson process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import exp, expm1, factorial, inf, log, log1p, sqrt
from typing import Any, Self

import numpy as np

from models.likelihood import DEEP, FEW_NODES, Floats, log_power_integral

ROLES = ("visits", "orders", "first_age_days", "last_age_days")  # the columns of a history: two counts, ages of the first and last event
NAMES = ("r", "alpha", "s", "beta", "p", "q")  # visit rates: gamma (r, alpha), leaving: gamma (s, beta), orders a visit: beta (p, q)

MAX_ROWS = 5_000  # that six numbers are learned from
MAX_STEPS = 20
PRIOR_PRECISION = 1.0  # of the log of each number, around a start that fits the rows' means: a few rows say little
SMALLEST, LARGEST = 1e-3, 1e5  # of a number
MOST = np.array([1e6, 1e6, 1e5, 1e5])  # of a history's columns
RAREST = 1e-9  # no probability is nearer to 0 or 1

_MOST = MOST.tolist()
_STEP = 1e-4  # of a numerical derivative, in logs
_LARGEST_STEP = 1.5  # of the search, in logs
_LARGEST_LOG = 700.0  # of a number whose like is still a number
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)
_PLACES, _HALF_WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2  # on [0, 1]
_FEW, _FEW_WEIGHTS = np.polynomial.legendre.leggauss(FEW_NODES)
# the same for one row: pairs of numbers
_RULE_OF_ONE = list(zip(_PLACES.tolist(), _HALF_WEIGHTS.tolist(), strict=True))
_FEW_OF_ONE = list(zip(((_FEW + 1) / 2).tolist(), _FEW_WEIGHTS.tolist(), strict=True))

_KNOWN = np.array(list(product([False, True], repeat=len(ROLES))))  # every choice of columns that are known (16, 4)
_ORDERS = np.array([factorial(count) * factorial(len(ROLES) - 1 - count) / factorial(len(ROLES)) for count in range(len(ROLES))])
# What the logit of each choice counts for in each column's contribution (16, 4): added by the column, or by another without it.
_SHAPLEY = np.where(_KNOWN, _ORDERS[_KNOWN.sum(axis=1, keepdims=True) - 1], -_ORDERS[np.minimum(_KNOWN.sum(axis=1, keepdims=True), 3)])


@dataclass(frozen=True)
class Silence:
    """The model as it was learned. Its logit is a start for others, who learn what it does not know.

    params: by name of `NAMES`, times in days. reference: the median history (4,), which stands for what is null, and from which
    contributions are counted.
    """

    horizon_days: float
    params: Mapping[str, float]
    reference: tuple[float, ...]

    @classmethod
    def learn(cls, history: Floats, label: Floats, *, horizon_days: float, random_state: int = 0) -> Self:
        """history: (n, 4), columns `ROLES`, nulls NaN. label: (n,), 1 where no order came. Of more than `MAX_ROWS` rows a sample.

        Raises ValueError on a horizon that is no time.
        """
        if not 0 < horizon_days < np.inf:
            raise ValueError(f"Silence: expected a horizon of more than 0 days, found {horizon_days}")
        reference = _reference(history)
        rows, y = _sound(history, reference), np.asarray(label, dtype=np.float64)
        if len(y) > MAX_ROWS:
            chosen = np.sort(np.random.default_rng(random_state).choice(len(y), MAX_ROWS, replace=False))
            rows, y = rows[:, chosen], y[chosen]
        theta = _likeliest(rows, y, float(horizon_days))
        return cls(float(horizon_days), dict(zip(NAMES, (float(value) for value in np.exp(theta)), strict=True)), tuple(reference.tolist()))

    def logit(self, history: Floats) -> Floats:
        """Logit of the probability of silence (n,) for histories (n, 4)."""
        orders = _probability_of_order(self._numbers, _sound(history, np.asarray(self.reference)), self.horizon_days)
        return np.asarray(np.log1p(-orders) - np.log(orders))

    def logit_of(self, history: Sequence[float]) -> float:
        """The logit of one history (4,): what `logit` says of it but for the last digits, at a third of the price."""
        orders = _probability_of_one(self._numbers, _sound_one(history, self.reference), self.horizon_days)
        return log1p(-orders) - log(orders)

    def base(self) -> float:
        """The logit of the reference history."""
        return float(self.logit(np.array([self.reference]))[0])

    def contributions(self, history: Floats) -> Floats:
        """What each column adds to the logit (n, 4); with `base` they add up to it. Exact Shapley values against the reference.

        Source: Lundberg & Lee, NeurIPS 2017, with one background row.
        """
        rows = np.where(np.isnan(history), self.reference, history)
        mixed = np.where(_KNOWN[:, None, :], rows[None, :, :], np.asarray(self.reference))
        value = self.logit(mixed.reshape(-1, len(ROLES))).reshape(len(_KNOWN), len(rows))
        return np.asarray(np.einsum("kn,kc->nc", value, _SHAPLEY))

    @cached_property
    def _numbers(self) -> tuple[float, ...]:
        return tuple(self.params[name] for name in NAMES)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"horizon_days": self.horizon_days, "params": dict(self.params), "reference": list(self.reference)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The model as it was. Raises KeyError where a number is missing."""
        params = {name: float(content["params"][name]) for name in NAMES}
        return cls(float(content["horizon_days"]), params, tuple(float(value) for value in content["reference"]))


# -- private -----------------------------------------------------------------------------------------------------------


def _reference(history: Floats) -> Floats:
    """Medians of what is known; a newcomer's single visit where nothing is."""
    known = [column[np.isfinite(column)] for column in history.T]
    return np.array([np.median(column) if len(column) else default for column, default in zip(known, (1.0, 0.0, 1.0, 1.0), strict=True)])


def _sound(history: Floats, reference: Floats) -> Floats:
    """Histories that can be, a column a row (4, n): no nulls, nothing negative or absurd, no last event before the first, no more orders
    than visits."""
    known: Floats = np.minimum(np.maximum(np.where(np.isnan(history), reference, history), 0.0), MOST).T.copy()
    visits, orders, first, last = known
    np.maximum(visits, 1.0, out=visits)  # of whom nothing is known: comes now
    np.minimum(orders, visits, out=orders)
    np.minimum(last, first, out=last, where=visits > 1)
    np.copyto(last, first, where=visits <= 1)
    return known


def _sound_one(history: Sequence[float], reference: Sequence[float]) -> tuple[float, ...]:
    """`_sound` of one history, as numbers."""
    known = zip(history, reference, _MOST, strict=True)
    visits, orders, first, last = (min(max(value if value == value else instead, 0.0), most) for value, instead, most in known)
    visits = max(visits, 1.0)
    return visits, min(orders, visits), first, min(last, first) if visits > 1 else first


def _probability_of_order(params: Sequence[float], known: Floats, horizon_days: float) -> Floats:
    """P(an order within the horizon) (n,) of sound histories.

    The first visit starts the clock, so it is no evidence of the rate. Of who is still there the visits that bring an order come at
    the share of the rate; the first of them falls at t, before the horizon and before the customer leaves: integrated over the
    probability u that none came by t, in which it is smooth.
    """
    r, alpha, s, beta, p, q = params
    visits, orders, age, last = known[:, :, None]  # (n, 1) beside nodes
    shape, to_rate, to_leave = r + visits - 1.0, alpha + age, beta + age
    left = np.log(s) + log_power_integral(age - last, age, shape, alpha, s + 1.0, beta)
    alive = -shape * np.log(to_rate) - s * np.log(to_leave)
    with np.errstate(over="ignore"):  # of a rate that is nearly zero: held by the horizon; and of one who is long gone
        two = _two_shares(p + orders, q + visits - orders)
        share, weight = (np.array(both) for both in zip(*two, strict=True))  # (2, n, 1)
        to_order = to_rate / share
        by_horizon = -np.expm1(-shape * np.log1p(horizon_days / to_order))
        none_yet = 1.0 - by_horizon * _PLACES
        at = np.minimum(to_order * np.expm1(-np.log(none_yet) / shape), horizon_days)
        stays = np.exp(-s * np.log1p(at / to_leave))
        # a sum along rows, not a product of matrices: those round differently for one row and for many
        first, second = weight * by_horizon * (stays * _HALF_WEIGHTS).sum(axis=-1, keepdims=True)
        orders_if_alive = first + second
        found = np.minimum(np.maximum(orders_if_alive / (1.0 + np.exp(left - alive)), RAREST), 1.0 - RAREST)
    return np.asarray(found).reshape(known.shape[1])


def _probability_of_one(params: Sequence[float], known: Sequence[float], horizon_days: float) -> float:
    """The same of one sound history: a few dozen numbers cost less one by one than as arrays."""
    r, alpha, s, beta, p, q = params
    visits, orders, age, last = known
    shape, to_rate, to_leave = r + visits - 1.0, alpha + age, beta + age
    orders_if_alive: float = 0.0
    for share, weight in _two_shares(p + orders, q + visits - orders, root=sqrt):
        to_order = to_rate / share
        by_horizon = -expm1(-shape * log1p(horizon_days / to_order))
        stays = 0.0
        for place, half_weight in _RULE_OF_ONE:
            grown = -log(1.0 - by_horizon * place) / shape
            at = min(to_order * expm1(grown), horizon_days) if grown < DEEP else horizon_days
            stays += half_weight * exp(-s * log1p(at / to_leave))
        orders_if_alive += weight * by_horizon * stays
    left = log(s) + _log_power_integral(age - last, age, shape, alpha, s + 1.0, beta)
    odds_of_leaving = exp(min(left + shape * log(to_rate) + s * log(to_leave), _LARGEST_LOG))
    found: float = orders_if_alive / (1.0 + odds_of_leaving)
    return min(max(found, RAREST), 1.0 - RAREST)


def _log_power_integral(lower: float, upper: float, k: float, alpha: float, l: float, beta: float) -> float:  # noqa: E741
    """`likelihood.log_power_integral` of one row, one number after the other."""
    small = min(alpha, beta)
    to_alpha, to_beta, from_small = alpha - small, beta - small, small + lower
    start = log(from_small)
    falls = from_small * (k / (alpha + lower) + l / (beta + lower)) - 1.0
    length = min(log(small + upper) - start, DEEP / max(falls, 1e-300))
    if length <= 0.0:
        return -inf
    logs: list[float] = []
    for place, _ in _FEW_OF_ONE:
        w = start + length * place
        grown = exp(w)
        logs.append(w - k * log(grown + to_alpha) - l * log(grown + to_beta))
    top = max(logs)
    mass: float = sum([exp(value - top) * weight for value, (_, weight) in zip(logs, _FEW_OF_ONE, strict=True)])
    return top + log(mass) + log(length / 2)


def _two_shares(a: Any, b: Any, *, root: Callable[[Any], Any] = np.sqrt) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Nodes and weights that average a cubic over beta (a, b): mean, spread and skew, in closed form (two-point Gauss-Jacobi)."""
    total = a + b
    mean, spread = a / total, root(a * b / (total + 1.0)) / total
    lean = (b - a) / (total + 2.0) * root((total + 1.0) / (a * b))  # half the skew
    wide = root(lean * lean + 1.0)
    return (mean + (lean - wide) * spread, (1.0 + lean / wide) / 2), (mean + (lean + wide) * spread, (1.0 - lean / wide) / 2)


def _likeliest(rows: Floats, y: Floats, horizon_days: float) -> Floats:
    """Logs of the numbers that make the labels likeliest, by Fisher scoring with Marquardt's damping."""
    visits, orders, age, _ = rows
    per_order = visits.sum() / max(orders.sum(), 1.0)
    prior = np.log([1.0, max(age.sum() / visits.sum(), 1.0), 1.0, max(2.0 * age.mean(), 1.0), 1.0, max(per_order - 1.0, 0.5)])

    def cost(theta: Floats) -> tuple[Floats, float]:
        found, away = _probability_of_order(np.exp(theta).tolist(), rows, horizon_days), theta - prior
        unlikely = -float(np.sum(y * np.log1p(-found) + (1.0 - y) * np.log(found)))
        return found, unlikely + PRIOR_PRECISION / 2 * float(np.sum(away**2))

    theta, damping = prior, 1e-3
    found, least = cost(theta)
    for _ in range(MAX_STEPS):
        slopes = np.column_stack(
            [_probability_of_order(near, rows, horizon_days) - found for near in np.exp(theta + _STEP * np.eye(len(theta))).tolist()]
        )
        slopes, spread = slopes / _STEP, found * (1.0 - found)
        gradient = np.einsum("ij,i->j", slopes, (found - (1.0 - y)) / spread) + PRIOR_PRECISION * (theta - prior)
        # einsum, not BLAS: the same bits on any number of threads
        information = np.einsum("ij,ik->jk", slopes / spread[:, None], slopes) + PRIOR_PRECISION * np.eye(len(theta))
        before = least
        while damping < 1e6:
            step = np.linalg.solve(information + damping * np.diag(np.diag(information)), -gradient)
            moved = np.clip(theta + np.clip(step, -_LARGEST_STEP, _LARGEST_STEP), np.log(SMALLEST), np.log(LARGEST))
            there, value = cost(moved)
            if value <= least:
                theta, found, least, damping = moved, there, value, damping / 4
                break
            damping *= 8
        if before - least < 1e-4:
            break
    return theta
