"""Numerics of likelihoods: the best of several searches, an integral of two powers, a Gauss rule of a beta distribution.

Arrays in and out. Knows nothing of customers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Parameters = tuple[float, ...]
Slopes = tuple[Floats, tuple[Floats, ...]]  # log-likelihood of each row, and its derivative by each parameter

SMALLEST, LARGEST = 1e-4, 1e5  # of a parameter: beyond it the likelihoods here are flat
SCOUTS = 2_000  # rows that the starts are compared on
NODES, FEW_NODES = 48, 20  # of the integrals
DEEP = 45.0  # an integrand that fell by e**-45 adds nothing to a double

_MANY, _FEW = (np.polynomial.legendre.leggauss(count) for count in (NODES, FEW_NODES))


def maximise(
    slopes: Callable[[Parameters, Floats], Slopes], rows: Floats, size: int, *, n_starts: int, rng: np.random.Generator,
    weights: Floats | None = None,
) -> Any:  # fmt: skip
    """The best of several searches over the logs of the parameters; the first starts from ones.

    slopes: (parameters, rows) -> log-likelihood of the rows and its derivatives. rows: (n, anything). size: of the parameters. weights:
    (n,), how often each row counts. With many rows the starts are tried on some of them, and the best is followed on all.
    """
    from scipy import optimize  # half a second to import, for which whoever only looks for tasks need not wait

    def search(start: Floats, part: Floats, counts: Floats | None) -> Any:
        def cost(theta: Floats) -> tuple[float, Floats]:
            point = tuple(float(value) for value in np.exp(theta))
            value, by = slopes(point, part)
            return -float(np.average(value, weights=counts)), -np.array([np.average(slope, weights=counts) for slope in by]) * point

        bounds = [(np.log(SMALLEST), np.log(LARGEST))] * size
        return optimize.minimize(cost, start, method="L-BFGS-B", jac=True, bounds=bounds, options={"ftol": 1e-14, "gtol": 1e-9})

    starts = [np.zeros(size), *(rng.uniform(-2.0, 2.0, size) for _ in range(n_starts - 1))]
    some, counts = rows, weights
    if len(rows) > SCOUTS:
        chosen = rng.choice(len(rows), SCOUTS, replace=False)
        some, counts = rows[chosen], None if weights is None else weights[chosen]
    best = min((search(start, some, counts) for start in starts), key=lambda result: result.fun)
    return best if some is rows else search(best.x, rows, weights)


@dataclass(frozen=True)
class PowerIntegral:
    """log of an integral of (alpha + t) ** -k * (beta + t) ** -l, and means over t with the integrand as their weight."""

    log_value: Floats
    log_alpha: Floats  # of log(alpha + t)
    inverse_alpha: Floats  # of 1 / (alpha + t)
    log_beta: Floats
    inverse_beta: Floats


def power_integral(lower: Floats, upper: Floats, k: Floats, alpha: float, l: float, beta: float) -> PowerIntegral:  # noqa: E741
    """The integral for t from lower to upper; its log is -inf where they meet.

    With w = log(min(alpha, beta) + t) the integrand is analytic in a strip around the real line, and falls ever faster: it is cut
    where it has fallen by `DEEP`, and what is left suits a Gauss-Legendre rule, whatever k is. The difference of two hypergeometric
    functions that is usually printed cancels where `lower` is near `upper`, and overflows for large k.
    """
    log_value, mass, to_alpha, to_beta, log_alpha, log_beta = _power_integral(
        lower[:, None], upper[:, None], k[:, None], alpha, l, beta, _MANY
    )
    total = mass.sum(axis=1)
    mean = lambda values: np.asarray(np.einsum("ij,ij->i", mass, values) / total)  # noqa: E731
    return PowerIntegral(log_value[:, 0], mean(log_alpha), mean(1 / to_alpha), mean(log_beta), mean(1 / to_beta))


def log_power_integral(
    lower: Floats | float, upper: Floats | float, k: Floats | float, alpha: float, l: float, beta: float  # noqa: E741
) -> Floats:  # fmt: skip
    """Its log alone (n, 1), to six digits and at half the work. lower, upper, k: (n, 1), or numbers of one row, of which the bits are the
    same and the work is less.
    """
    return _power_integral(lower, upper, k, alpha, l, beta, _FEW)[0]


def beta_rule(a: float, b: float) -> tuple[Floats, Floats]:
    """Nodes and weights (`NODES`) that average a smooth function over beta (a, b). Source: Golub & Welsch 1969, Jacobi's recurrence."""
    from scipy import linalg  # as above

    n = np.arange(1, NODES)
    p, q = b - 1, a - 1  # Jacobi's exponents on [-1, 1]
    total = 2 * n + p + q
    middle = np.concatenate([[(q - p) / (p + q + 2)], (q**2 - p**2) / (total * (total + 2))])
    beside = 4 * n * (n + p) * (n + q) * (n + p + q) / (total**2 * (total + 1) * np.where(n == 1, 1.0, total - 1))
    beside[0] = 4 * (1 + p) * (1 + q) / ((2 + p + q) ** 2 * (3 + p + q))
    roots, vectors = linalg.eigh_tridiagonal(middle, np.sqrt(beside))
    return np.clip((roots + 1) / 2, 1e-300, 1.0), vectors[0] ** 2


# -- private -----------------------------------------------------------------------------------------------------------


def _power_integral(
    lower: Floats | float, upper: Floats | float, k: Floats | float, alpha: float, l: float, beta: float, rule: tuple[Floats, Floats]  # noqa: E741
) -> tuple[Floats, Floats, Floats, Floats, Floats, Floats]:  # fmt: skip
    """Log of the integral (n, 1); the mass of each node, alpha + t and beta + t there, and the logs of both, (n, nodes)."""
    nodes, weights = rule
    small = min(alpha, beta)
    from_small = small + lower
    start = np.log(from_small)
    full = np.log(small + upper) - start
    falls = from_small * (k / (alpha + lower) + l / (beta + lower)) - 1  # of the log, at the lower end
    length = np.minimum(full, DEEP / np.maximum(falls, 1e-300))
    w = start + length * (nodes + 1) / 2
    grown = np.exp(w)
    to_alpha, to_beta = grown + (alpha - small), grown + (beta - small)
    log_alpha, log_beta = np.log(to_alpha), np.log(to_beta)
    logs = w - k * log_alpha - l * log_beta
    top = logs.max(axis=-1, keepdims=True)
    mass = np.exp(logs - top) * weights
    with np.errstate(divide="ignore"):
        log_value = top + np.log(mass.sum(axis=-1, keepdims=True)) + np.log(length / 2)
    return log_value, mass, to_alpha, to_beta, log_alpha, log_beta
