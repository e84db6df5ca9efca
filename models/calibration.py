"""Scores and 0/1 labels -> probabilities that mean what they say, and the cut from which on acting pays. Arrays in and out.

Source: Platt, Probabilistic outputs for support vector machines, 1999, with a prior where rows are few.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MIN_SLOPE = 0.01  # a calibration may flatten the scores but never turn their order around
# Pulls Platt's numbers to "already calibrated" (1, 0) with the force of a standard deviation of 0.2: some hundred rows say less of them.
PRIOR_PRECISION = 25.0


def sigmoid(calibration: tuple[float, float], raw: Floats | float) -> Floats:
    """Probabilities (n,) of logits (n,), or () of one; calibration: slope and intercept of the logit."""
    return np.asarray(_expit()(calibration[0] * raw + calibration[1]))


def platt(raw: Floats, y: Floats) -> tuple[float, float]:
    """Slope and intercept of the logit that make the labels most likely; (1, 0) without rows. Source: Platt 1999."""
    from scipy.optimize import minimize

    design, prior = np.column_stack([raw, np.ones_like(raw)]), np.array([1.0, 0.0])

    def cost(theta: Floats) -> tuple[float, Floats]:
        logit, away = design @ theta, theta - prior
        gradient = design.T @ (sigmoid((1.0, 0.0), logit) - y) + PRIOR_PRECISION * away
        return float(np.sum(np.logaddexp(0.0, logit) - y * logit) + PRIOR_PRECISION / 2 * away @ away), gradient

    best = minimize(cost, prior, jac=True, method="L-BFGS-B", bounds=[(MIN_SLOPE, None), (None, None)], options={"ftol": 1e-12}).x
    return float(best[0]), float(best[1])


def cheapest_threshold(probability: Floats, y: Floats, false_positive: float, false_negative: float) -> float:
    """The cut with the least cost on these rows; of equally cheap ones that nearest to the cut of perfect calibration."""
    ideal = false_positive / (false_positive + false_negative)
    levels, place = np.unique(-probability, return_inverse=True)
    if not levels.size:
        return ideal
    positives = np.bincount(place, weights=y, minlength=levels.size)
    negatives = np.bincount(place, weights=1 - y, minlength=levels.size)
    # acting on the first i levels, for i = 0 .. all of them
    cost = np.append(0.0, np.cumsum(false_positive * negatives - false_negative * positives))
    edges = np.concatenate([[1.0], -levels, [0.0]])
    cuts = (edges[:-1] + edges[1:]) / 2
    cheapest = cuts[cost <= cost.min() + 1e-9]
    return float(cheapest[np.abs(cheapest - ideal).argmin()])


# -- private -----------------------------------------------------------------------------------------------------------


@cache
def _expit() -> Callable[[Floats | float], Floats]:
    from scipy.special import expit  # whoever only looks for tasks need not wait for it

    return expit  # type: ignore[no-any-return]
