"""Histories -> the chance of a purchase in the session under way, and of none in the weeks to come.

Visits: Pareto/NBD in shop days (Schmittlein, Morrison and Colombo 1987). With lambda ~ Gamma(r, alpha) visits per day,
mu ~ Gamma(s, beta) drop-outs per day, x visits by T and the last at t, a customer alive at T has
lambda ~ Gamma(r + x, alpha + T) and mu ~ Gamma(s, beta + T), independently; the chance of being alive is one integral.
A customer first seen at f either was there before the log (its clock starts at 0) or arrived with that visit (at f, which
then is no evidence of the rate): both are weighed by what they make of the data.
Sessions: P(mission) = a + b * p with p ~ Beta; a product of such mixtures is a polynomial in p, for which Gauss-Jacobi
nodes are exact up to twice as many sessions as nodes.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln, logsumexp, roots_jacobi, roots_legendre

from pipelines.optimum.histories import SESSION_GAP_MS, Histories, last_sessions, leave_probability, mission_share
from pipelines.simulate.knobs import DROPOUT_FACTOR, GROUPS, VISIT_FACTOR
from pipelines.simulate.people import mission_map
from pipelines.simulate.shop import DAY_MS, Shop
from pipelines.simulate.walk import START

_MISSION_NODES, _TIME_NODES = 40, 24


@dataclass(frozen=True)
class _Clock:
    """One account of a customer's visits, in shop days since its clock started. Arrays of (n_rows,)."""

    log_weight: np.ndarray  # of the account itself, before the visits
    visits: np.ndarray  # that are evidence of the rate
    last: np.ndarray
    now: np.ndarray


def no_purchase(shop: Shop, known: Histories, *, horizon_days: int, gap_days: int) -> np.ndarray:
    """(n_rows,): P(no purchase in the horizon after the gap after `at`)."""
    nodes, weights = _mission_posterior(shop, known)
    a, b = mission_map(shop, known.is_treated, known.effect, known.at_ms)
    late = (known.at_ms >= shop.onset_ms).astype(np.int64)
    browse, mission = shop.hits[late, 0, START], shop.hits[late, 1, START]
    buys = browse[:, None] + (mission - browse)[:, None] * (a[:, None] + b[:, None] * nodes)
    opens, closes = (shop.shop_days(known.at_ms + days * DAY_MS) for days in (gap_days, gap_days + horizon_days))
    gap, window = opens - shop.shop_days(known.at_ms), closes - opens
    evidence, purchase = [], []
    for clock in _clocks(shop, known):
        rate, hazard = _priors(shop, known.region)
        log_alive, log_dead = _lives(shop, clock, rate, hazard)
        shape = shop.visit_shape + clock.visits
        total = np.logaddexp(log_alive, log_dead) + clock.log_weight + gammaln(shape) - gammaln(shop.visit_shape)
        later = _returns(shop, shape, rate + clock.now, hazard + clock.now, buys=buys, gap=gap, window=window)
        evidence.append(total + shop.visit_shape * np.log(rate))
        purchase.append(np.exp(log_alive - np.logaddexp(log_alive, log_dead)) * (weights * later).sum(axis=1))
    share = np.exp(np.array(evidence) - logsumexp(np.array(evidence), axis=0))
    silent = 1.0 - (share * np.array(purchase)).sum(axis=0)
    # A visit under way at t may still end in a purchase, unless the gap outlasts it.
    return np.asarray(silent * (1.0 - _under_way(shop, known)) if gap_days == 0 else silent)


def purchase_now(shop: Shop, known: Histories) -> np.ndarray:
    """(n_rows,): P(a purchase still comes in the session under way); without one, that a visit starts within its silence."""
    idle = shop.visits_per_day * SESSION_GAP_MS / DAY_MS * shop.hits[0, :, START].mean()
    return np.where(_is_open(known), _under_way(shop, known), idle)


def _under_way(shop: Shop, known: Histories) -> np.ndarray:
    """(n_rows,): the same, 0 without a session under way."""
    is_open, at = _is_open(known), np.maximum(last_sessions(known), 0)
    if not is_open.any():
        return np.zeros(len(is_open))
    nodes, weights = _mission_posterior(shop, known)
    a, b = (part[at, None] for part in mission_share(shop, known))
    likelihood = _session_likelihood(shop, known)[at]
    mission = (a + b * nodes) * likelihood[:, 1:]
    mission = (weights * mission / (mission + (1 - a - b * nodes) * likelihood[:, :1])).sum(axis=1)
    late = (known.session_start_ms[at] >= shop.onset_ms).astype(np.int64)
    goes_on = _pause_survival(shop, known.at_ms - known.session_last_ms[at])[:, None]
    leaves = leave_probability(shop, known)[at]
    chance = shop.hits[late, :, known.session_state[at]] * goes_on / (leaves + (1 - leaves) * goes_on)
    return np.where(is_open, (1 - mission) * chance[:, 0] + mission * chance[:, 1], 0.0)


def _is_open(known: Histories) -> np.ndarray:
    last = last_sessions(known)
    if not len(known.session_row):
        return np.zeros(len(last), dtype=bool)
    return np.asarray((last >= 0) & (known.at_ms - known.session_last_ms[last] <= SESSION_GAP_MS))


def _mission_posterior(shop: Shop, known: Histories) -> tuple[np.ndarray, np.ndarray]:
    """(nodes (k,), weights (n_rows, k)) of the customer's mission probability, given all sessions seen."""
    x, prior = roots_jacobi(_MISSION_NODES, shop.mission_beta - 1, shop.mission_alpha - 1)
    nodes = (1 + x) / 2
    a, b = mission_share(shop, known)
    likelihood, share = _session_likelihood(shop, known), a[:, None] + b[:, None] * nodes
    logs = np.log(share * likelihood[:, 1:] + (1 - share) * likelihood[:, :1])
    total = np.tile(np.log(prior / prior.sum()), (len(known.at_ms), 1))
    if len(logs):
        first = np.flatnonzero(np.diff(known.session_row, prepend=-1))
        total[known.session_row[first]] += np.add.reduceat(logs, first, axis=0)
    return nodes, np.exp(total - logsumexp(total, axis=1, keepdims=True))


def _session_likelihood(shop: Shop, known: Histories) -> np.ndarray:
    """(n_sessions, 2 kinds) of the events and of the silence after them; the larger of the two is 1."""
    leaves = leave_probability(shop, known)
    silence = known.at_ms[known.session_row] - known.session_last_ms
    is_last = np.diff(known.session_row, append=-1) != 0
    goes_on = np.where(is_last, _pause_survival(shop, silence), 0.0)[:, None]
    logs = known.session_log_likelihood + np.log(leaves + (1 - leaves) * goes_on)
    return np.asarray(np.exp(logs - logs.max(axis=1, keepdims=True, initial=-np.inf)))


def _pause_survival(shop: Shop, silence_ms: np.ndarray) -> np.ndarray:
    """P(the next event takes longer than this), if there is one."""
    drawn = np.clip(silence_ms - shop.pause_ms, 0, shop.pause_cap_ms)
    tail = np.exp(-shop.pause_cap_ms / shop.pause_mean_ms)
    return np.asarray((np.exp(-drawn / shop.pause_mean_ms) - tail) / (1 - tail))


def _clocks(shop: Shop, known: Histories) -> tuple[_Clock, _Clock]:
    """The customer was there before the log started, or arrived with the first visit seen. Unseen: arrives now."""
    rows = len(known.at_ms)
    now = shop.shop_days(known.at_ms)
    first, last = now.copy(), now.copy()
    starts = shop.shop_days(known.session_start_ms)
    first[known.session_row[::-1]], last[known.session_row] = starts[::-1], starts
    visits = np.bincount(known.session_row, minlength=rows)
    old = _Clock(np.where(visits > 0, np.log(shop.share_old), -np.inf), visits, last, now)
    new = _Clock(np.full(rows, np.log((1 - shop.share_old) / shop.length)), np.maximum(visits - 1, 0), last - first, now - first)
    return old, new


def _priors(shop: Shop, region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, beta) of each row: the rate parameters of the gamma priors of visits and drop-outs."""
    visits = shop.visits_per_day * np.array([VISIT_FACTOR[name] for name in GROUPS["region"]])
    dropouts = shop.dropouts_per_day * np.array([DROPOUT_FACTOR[name] for name in GROUPS["region"]])
    return shop.visit_shape / visits[region], shop.dropout_shape / dropouts[region]


def _lives(shop: Shop, clock: _Clock, alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log evidence of (still alive, gone since the last visit), up to what both clocks share.

    Gone: the integral over the moment tau of dropping out of s beta^s (beta + tau)^-(s+1) (alpha + tau)^-n, in the
    variable v = ((alpha + tau) / (alpha + t))^(1 - n), which takes out the steep factor.
    """
    n, s = shop.visit_shape + clock.visits, shop.dropout_shape
    alive = -n * np.log(alpha + clock.now) + s * (np.log(beta) - np.log(beta + clock.now))
    x, w = roots_legendre(_TIME_NODES)
    ends = ((alpha + clock.now) / (alpha + clock.last)) ** (1 - n)
    v = ends[:, None] + (1 - ends)[:, None] * (1 + x) / 2
    tau = (alpha + clock.last)[:, None] * v ** (-1 / (n - 1))[:, None] - alpha[:, None]
    mean = ((beta[:, None] + tau) ** (-s - 1) @ w) / 2
    with np.errstate(divide="ignore"):  # seen this very moment: cannot have gone
        gone = np.log((1 - ends) / (n - 1) * mean) + np.log(s) + s * np.log(beta) + (1 - n) * np.log(alpha + clock.last)
    return alive, gone


def _returns(
    shop: Shop, shape: np.ndarray, alpha: np.ndarray, beta: np.ndarray, *, buys: np.ndarray, gap: np.ndarray, window: np.ndarray
) -> np.ndarray:
    """(n_rows, k): P(a purchase in the window after the gap), alive now, for each share `buys` of visits with a purchase.

    The first purchase comes at t with survival u(t) = (alpha / (alpha + buys t))^shape unless the customer has gone by
    gap + t; integrated over u, where the integrand is smooth.
    """
    x, w = roots_legendre(_TIME_NODES)
    ends = (1 + buys * (window / alpha)[:, None]) ** -shape[:, None]
    total = np.zeros_like(buys)
    for node, weight in zip((1 + x) / 2, w / 2, strict=True):
        u = ends + (1 - ends) * node
        t = alpha[:, None] * (u ** (-1 / shape)[:, None] - 1) / buys
        total += weight * (beta[:, None] / (beta[:, None] + gap[:, None] + t)) ** shop.dropout_shape
    return np.asarray((1 - ends) * total)
