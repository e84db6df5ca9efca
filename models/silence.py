"""Visits and orders so far -> the probability that no order follows within a horizon: six numbers, learned from labelled rows.

Buy till you die where visits are seen as well as orders: visits come and end as in Pareto/NBD, and each brings an order with a
probability of the customer's own. The numbers are those that make the labels likeliest, not the histories: what a history foretells
does not depend on why its customer is among the rows, while the likelihood of histories would need everybody's, who left included.
Arrays in and out; no clock, no files.

Source: Schmittlein, Morrison & Colombo, Management Science 1987 (Pareto/NBD); the rest follows by thinning its Poisson process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import factorial, log, log1p
from typing import Any, Self

import numpy as np

from models import one_history
from models.likelihood import Floats, log_power_integral
from models.one_history import MOST, ORDER_PLACES, ORDER_WEIGHTS, RAREST, two_shares

ROLES = ("visits", "orders", "first_age_days", "last_age_days")  # the columns of a history: two counts, ages of the first and last event
NAMES = ("r", "alpha", "s", "beta", "p", "q")  # visit rates: gamma (r, alpha), leaving: gamma (s, beta), orders a visit: beta (p, q)

MAX_ROWS = 5_000  # that six numbers are learned from
MAX_STEPS = 20
PRIOR_PRECISION = 1.0  # of the log of each number, around a start that fits the rows' means: a few rows say little
SMALLEST, LARGEST = 1e-3, 1e5  # of a number

_STEP = 1e-4  # of a numerical derivative, in logs
_LARGEST_STEP = 1.5  # of the search, in logs

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
        """The logit of one history (4,): what `logit` says of it but for the last digits, at a fraction of the price."""
        orders = one_history.probability_of_order(self._numbers, one_history.sound(history, self.reference), self.horizon_days)
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

    def contributions_of(self, history: Sequence[float]) -> Floats:
        """The contributions (4,) of one history: what `contributions` says but for the last digits, at half the price."""
        found = one_history.logits_of_mixtures(self._numbers, history, self.reference, self.horizon_days)
        return np.asarray(found @ _SHAPLEY)

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
    known: Floats = np.minimum(np.maximum(np.where(np.isnan(history), reference, history), 0.0), np.array(MOST)).T.copy()
    visits, orders, first, last = known
    np.maximum(visits, 1.0, out=visits)  # of whom nothing is known: comes now
    np.minimum(orders, visits, out=orders)
    np.minimum(last, first, out=last, where=visits > 1)
    np.copyto(last, first, where=visits <= 1)
    return known


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
        two = two_shares(p + orders, q + visits - orders, root=np.sqrt)
        share, weight = (np.array(both) for both in zip(*two, strict=True))  # (2, n, 1)
        to_order = to_rate / share
        by_horizon = -np.expm1(-shape * np.log1p(horizon_days / to_order))
        none_yet = 1.0 - by_horizon * ORDER_PLACES
        at = np.minimum(to_order * np.expm1(-np.log(none_yet) / shape), horizon_days)
        stays = np.exp(-s * np.log1p(at / to_leave))
        # a sum along rows, not a product of matrices: those round differently for one row and for many
        first, second = weight * by_horizon * (stays * ORDER_WEIGHTS).sum(axis=-1, keepdims=True)
        orders_if_alive = first + second
        found = np.minimum(np.maximum(orders_if_alive / (1.0 + np.exp(left - alive)), RAREST), 1.0 - RAREST)
    return np.asarray(found).reshape(known.shape[1])


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
