"""One history -> what `models.silence` says of it, for a caller who waits: plain numbers where arrays would hold a few each, and arrays
over the nodes of its integrals alone. The same formulas and rules, so the same but for the last digits, at a fraction of the price.
"""

from collections.abc import Callable, Sequence
from itertools import product
from math import exp, expm1, log, log1p, sqrt
from typing import Any

import numpy as np

from models.likelihood import DEEP, FEW_NODES, Floats

ORDER_NODES = 12  # of the integral over the time to an order
RAREST = 1e-9  # no probability is nearer to 0 or 1
MOST = (1e6, 1e6, 1e5, 1e5)  # of a history's columns

_LARGEST_LOG = 700.0  # of a number whose like is still a number
_NEVER = -1e9  # logarithm of what cannot be
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(ORDER_NODES)
ORDER_PLACES, ORDER_WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2  # on [0, 1]
_NODES, _LEAVING_WEIGHTS = np.polynomial.legendre.leggauss(FEW_NODES)
_LEAVING_PLACES = (_NODES + 1) / 2
# the same as numbers
_ORDER_RULE = list(zip(ORDER_PLACES.tolist(), ORDER_WEIGHTS.tolist(), strict=True))
_LEAVING_STEPS, _LEAVING_SHARES = _LEAVING_PLACES.tolist(), _LEAVING_WEIGHTS.tolist()
_LEAVING_LINE = np.array([np.ones(FEW_NODES), _LEAVING_PLACES])  # from a start and a length to all nodes between
# which of the eight of either kind each mixture has
_VISITS, _ORDERS, _FIRST, _LAST = np.array(list(product([0, 1], repeat=4))).T
_ORDERS_OF, _LEAVING_OF = 4 * _VISITS + 2 * _FIRST + _ORDERS, 4 * _VISITS + 2 * _FIRST + _LAST

Known = tuple[float, float, float, float]  # visits, orders, and the ages of the first and the last event in days


def sound(history: Sequence[float], reference: Sequence[float]) -> Known:
    """`silence._sound` of one history (4,)."""
    visits, orders, first, last = held(history, reference)
    return (visits, min(orders, visits), first, min(last, first)) if visits > 1.0 else (1.0, min(orders, 1.0), first, first)


def held(history: Sequence[float], reference: Sequence[float]) -> Known:
    """Each number for itself: no nulls, nothing negative or absurd."""
    visits, orders, first, last = [
        value if 0.0 <= value <= most else min(max(instead if value != value else value, 0.0), most)
        for value, instead, most in zip(history, reference, MOST, strict=True)
    ]
    return max(visits, 1.0), orders, first, last


def probability_of_order(params: Sequence[float], known: Known, horizon_days: float) -> float:
    """`silence._probability_of_order` of one sound history."""
    r, alpha, s, beta, p, q = params
    visits, orders, age, last = known
    shape, to_rate, to_leave = r + visits - 1.0, alpha + age, beta + age
    orders_if_alive = 0.0
    for share, weight in two_shares(p + orders, q + visits - orders):
        to_order = to_rate / share
        by_horizon, slowness = -expm1(-shape * log1p(horizon_days / to_order)), to_order / to_leave
        stays = [half * exp(-s * log1p(slowness * expm1(-log1p(-by_horizon * place) / shape))) for place, half in _ORDER_RULE]
        orders_if_alive += weight * by_horizon * sum(stays)
    start, length, k, other, apart = _cut(age - last, age, shape, alpha, s + 1.0, beta)
    odds_of_leaving = 0.0
    if length > 0.0:
        logs = [k * w - other * log(exp(w) + apart) for w in [start + length * step for step in _LEAVING_STEPS]]
        top = max(logs)
        mass = sum([exp(value - top) * share for value, share in zip(logs, _LEAVING_SHARES, strict=True)])
        left = top + log(s * mass * length / 2)
        odds_of_leaving = exp(min(left + shape * log(to_rate) + s * log(to_leave), _LARGEST_LOG))
    return min(max(orders_if_alive / (1.0 + odds_of_leaving), RAREST), 1.0 - RAREST)


def logits_of_mixtures(params: Sequence[float], history: Sequence[float], reference: Sequence[float], horizon_days: float) -> Floats:
    """The logit of silence (16,) of every mixture of the two, in the order of `product([False, True], repeat=4)`: True is the history's.

    Whether an order comes does not hang on the last event, nor whether the customer left on the orders: eight of either, not sixteen.
    """
    r, alpha, s, beta, p, q = params
    both_visits, both_orders, firsts, lasts = zip(held(reference, reference), held(history, reference), strict=True)
    orders: list[float] = []
    leaving: list[float] = []
    for visits in both_visits:
        shape, shares = r + visits - 1.0, list[tuple[float, float]]()
        for n_orders in both_orders:
            brings = min(n_orders, visits)
            shares += two_shares(p + brings, q + visits - brings)
        for first in firsts:
            to_rate, to_leave = alpha + first, beta + first
            for share, weight in shares:
                to_order = to_rate / share
                none_by_horizon = expm1(-shape * log1p(horizon_days / to_order))  # less 1
                orders += (none_by_horizon, -1.0 / shape, to_order / to_leave, -weight * none_by_horizon)
            scale = shape * log(to_rate) + s * log(to_leave)
            for last in lasts:
                start, length, k, other, _ = _cut(first - min(last, first) if visits > 1.0 else 0.0, first, shape, alpha, s + 1.0, beta)
                size = scale + log(s * length / 2) if length > 0.0 else _NEVER
                leaving += (start, length, size + k * start, k * length, other)
    columns = np.array(orders).reshape(16, 4)
    by_horizon, by_shape, slowness = columns[:, :3].T[:, :, None]
    stays = np.exp(-s * np.log1p(slowness * np.expm1(by_shape * np.log1p(by_horizon * ORDER_PLACES)))) @ ORDER_WEIGHTS
    stays *= columns[:, 3]
    columns = np.array(leaving).reshape(8, 5)
    nodes, powers = columns[:, :2] @ _LEAVING_LINE, columns[:, 2:4] @ _LEAVING_LINE
    logs = powers - columns[:, 4:] * np.log(np.exp(nodes) + abs(beta - alpha))
    odds = np.exp(np.minimum(logs, _LARGEST_LOG)) @ _LEAVING_WEIGHTS
    found = (stays[::2] + stays[1::2]).take(_ORDERS_OF) / (odds + 1.0).take(_LEAVING_OF)
    return np.asarray(np.log(1.0 / np.minimum(np.maximum(found, RAREST), 1.0 - RAREST) - 1.0))


def two_shares(a: Any, b: Any, *, root: Callable[[Any], Any] = sqrt) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Nodes and weights that average a cubic over beta (a, b): mean, spread and skew, in closed form (two-point Gauss-Jacobi)."""
    total = a + b
    mean, spread = a / total, root(a * b / (total + 1.0)) / total
    lean = (b - a) / (total + 2.0) * root((total + 1.0) / (a * b))  # half the skew
    wide = root(lean * lean + 1.0)
    return (mean + (lean - wide) * spread, (1.0 + lean / wide) / 2), (mean + (lean + wide) * spread, (1.0 - lean / wide) / 2)


def _cut(lower: float, upper: float, k: float, alpha: float, l: float, beta: float) -> tuple[float, float, float, float, float]:  # noqa: E741
    """Where `likelihood.log_power_integral` begins and how far it goes, both in w = log(t + the smaller of alpha and beta); what is left
    of the smaller one's power there, the other one's, and how far the two lie apart. No length: the integral is 0.
    """
    if beta < alpha:
        k, alpha, l, beta = l, beta, k, alpha  # noqa: E741
    begins = alpha + lower
    start = log(begins)
    falls = k + l * begins / (beta + lower) - 1.0
    length = min(log(alpha + upper) - start, DEEP / max(falls, 1e-300))
    return start, length, 1.0 - k, l, beta - alpha
