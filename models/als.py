"""Interactions -> customer and item factors: alternating least squares whose ridge grows with a row's frequency.

The loss is that of iALS (Hu, Koren & Volinsky, ICDM 2008; Rendle et al., RecSys 2022): an interaction of weight w has target
1 and confidence 1 + w / alpha0, every other cell target 0 and confidence 1. Solved by the compiled kernel of `implicit`,
which knows one ridge for all rows only: rows that share a ridge share a call, and the few that do not get theirs through
columns added to their data. Without the kernel numpy solves the same systems, slower. Never ranks or recommends.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import lapack

Singles = NDArray[np.float32]

FREQUENCY_STEP = 0.1  # frequencies are rounded to this grid of logarithms, at most 5 % away: rows of similar frequency share a ridge
CG_STEPS = 3
LAST_STEPS = 12  # of the customers' last solution, so that folding in a trained row gives what it was trained to
# A shared call costs one Gram matrix, an own ridge n_factors more entries a row: above n_fixed * n_factors / this many rows, share.
SHARED_CALL_GAIN = 4_000


@dataclass(frozen=True)
class Objective:
    """The loss: weight of an unobserved cell, and the ridge of a row as a function of its frequency.

    `n_customers`, `n_items`: rows of each side that have interactions; the ridge is not moved by empty ones.
    """

    alpha0: float
    ridge_scale: float
    nu: float
    n_customers: int
    n_items: int

    @classmethod
    def balanced(cls, interactions: Any, *, alpha0: float, regularization: float, nu: float) -> "Objective":
        """The objective whose ridges have the same total for every nu: comparing exponents then compares shapes.

        regularization: the ridge per unit of frequency. nu = 1: proportional to the frequency; nu = 0: the same for all rows.
        """
        per_customer, per_item = np.diff(interactions.indptr), np.bincount(interactions.indices, minlength=interactions.shape[1])
        n_customers, n_items = np.count_nonzero(per_customer), np.count_nonzero(per_item)
        frequencies = np.concatenate(
            [
                _rounded(per_customer[per_customer > 0] + alpha0 * n_items),
                _rounded(per_item[per_item > 0] + alpha0 * n_customers),
            ]
        )
        scale = regularization * frequencies.sum() / (frequencies**nu).sum()
        return cls(alpha0, float(scale), nu, int(n_customers), int(n_items))

    def confidence(self, interactions: Any) -> Any:
        """The confidence of each observed cell, csr of float32."""
        data = (1.0 + interactions.data / self.alpha0).astype(np.float32)
        return sparse.csr_matrix((data, interactions.indices, interactions.indptr), interactions.shape)

    def ridge(self, counts: NDArray[np.integer], n_other: int) -> NDArray[np.float64]:
        """The ridge of rows (m,) with `counts` interactions each, `n_other` rows being on the other side."""
        frequency = _rounded(counts + self.alpha0 * n_other)
        return np.asarray(self.ridge_scale * frequency**self.nu * (1.0 + self.alpha0) / self.alpha0)


def factorize(
    interactions: Any, objective: Objective, *, n_factors: int, n_epochs: int, seed: int, num_threads: int
) -> tuple[Singles, Singles]:
    """Customer factors (n_customers, n_factors) and item factors (n_items, n_factors); zeros for a row without interactions.

    interactions: csr of weights > 0 only. Ends with the customers, solved with more steps against the final items.
    """
    rng, confidence = np.random.default_rng(seed), objective.confidence(interactions)
    by_customer = _Side.of(confidence, objective, objective.n_items, n_factors)
    by_item = _Side.of(confidence.T.tocsr(), objective, objective.n_customers, n_factors)
    customers, items = (_start(side, rng, n_factors) for side in (by_customer, by_item))
    for _ in range(n_epochs):
        by_customer.solve(customers, items, num_threads)
        by_item.solve(items, customers, num_threads)
    by_customer.solve(customers, items, num_threads, steps=LAST_STEPS)
    return customers, items


def fold_in(interactions: Any, objective: Objective, items: Singles, *, gram: Singles, num_threads: int) -> Singles:
    """The exact factors (m, n_factors) of customers with these interactions, items held fixed; gram: items' = items.T @ items."""
    counts = np.diff(interactions.indptr)
    confidence, ridge = objective.confidence(interactions), objective.ridge(counts, objective.n_items)
    factors = np.zeros((len(counts), items.shape[1]), dtype=np.float32)
    kernel = load_kernel()
    for rows, shared in _groups(ridge, counts):
        part = confidence if len(rows) == len(counts) else confidence[rows]
        if kernel is None:
            factors[rows] = solve_rows(part, items, gram, shared)
        else:
            solved = factors[rows]
            kernel._least_squares(gram, part.indptr, part.indices, part.data, solved, items, shared, num_threads)
            factors[rows] = solved
    return factors


@dataclass(frozen=True)
class Solved:
    """One customer's exact solution, and what it is made of. touched (r, n_factors): the items' factors; c (r,): their confidence."""

    cholesky: NDArray[np.float64]  # lower factor of the left side of the normal equations
    touched: NDArray[np.float64]
    c: NDArray[np.float64]

    @property
    def factors(self) -> Singles:
        """(n_factors,)."""
        return self._divided(self.c @ self.touched).astype(np.float32)

    def shares(self, wanted: Singles) -> NDArray[np.float64]:
        """What each interaction adds to the score of each item, given by its factors (k, n_factors): (k, r), rows add up to the scores.

        x is linear in the interactions: y_j'x = sum_i y_j' W y_i c_i, W the inverse of the left side. Source: Hu et al., section 5.
        """
        return np.asarray(self._divided(wanted.T.astype(np.float64)).T @ self.touched.T * self.c)

    def _divided(self, right: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(lapack.dpotrs(self.cholesky, right, lower=1)[0])


def solve_one(
    places: NDArray[np.integer], weights: NDArray[np.floating], objective: Objective, items: Singles, *, gram: NDArray[np.floating]
) -> Solved:
    """One customer's factors from the items touched (r,), each once, and their weights; as `fold_in`, in double precision."""
    touched, c = items.take(places, axis=0).astype(np.float64), 1.0 + np.asarray(weights, dtype=np.float64) / objective.alpha0
    normal = (touched.T * (c - 1.0)) @ touched
    normal += gram
    normal.ravel()[:: len(normal) + 1] += _ridge_of(objective, len(c))
    factor, failed = lapack.dpotrf(normal.T, lower=1, clean=0, overwrite_a=1)  # in Fortran's order nothing is copied
    if failed:
        raise ValueError("als: the normal equations cannot be solved; factors or weights are not finite")
    return Solved(factor, touched, c)


def solve_rows(confidence: Any, fixed: Singles, gram: Singles, ridge: float | NDArray[np.float64]) -> Singles:
    """The exact solution (m, n_factors) of each row's normal equations, by numpy: the definition, and the fallback.

    (F'F + F_r' (C_r - 1) F_r + ridge_r I) x_r = F_r' c_r, with F_r the fixed rows that row r touches and C_r their confidence.
    """
    n_rows, n_factors = confidence.shape[0], fixed.shape[1]
    ridges, solved = np.broadcast_to(ridge, n_rows), np.zeros((n_rows, n_factors), dtype=np.float32)
    for row in range(n_rows):
        entries = slice(confidence.indptr[row], confidence.indptr[row + 1])
        touched, c = fixed[confidence.indices[entries]].astype(np.float64), confidence.data[entries].astype(np.float64)
        if len(c):
            normal = gram + (touched.T * (c - 1.0)) @ touched + ridges[row] * np.eye(n_factors)
            solved[row] = np.linalg.solve(normal, touched.T @ c)
    return solved


def load_kernel() -> Any:
    """The compiled solver of `implicit`, or None. A private module of theirs: a test holds it to `solve_rows`."""
    try:
        from implicit.cpu import _als
    except ImportError:
        return None
    return _als if hasattr(_als, "least_squares_cg") and hasattr(_als, "_least_squares") else None


# -- private -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """One side's systems, cut into calls of the kernel: (rows, confidence, shared ridge), ridge 0 where it is in the data."""

    confidence: Any
    ridge: NDArray[np.float64]
    calls: tuple[tuple[NDArray[np.intp], Any, float], ...]

    @classmethod
    def of(cls, confidence: Any, objective: Objective, n_other: int, n_factors: int) -> "_Side":
        counts = np.diff(confidence.indptr)
        ridge = objective.ridge(counts, n_other)
        groups = list(_groups(ridge, counts))
        few = max(1.0, confidence.shape[1] * n_factors / SHARED_CALL_GAIN)
        calls = [(rows, confidence[rows], shared) for rows, shared in groups if len(rows) >= few or len(groups) == 1]
        alone = [rows for rows, _ in groups if len(rows) < few and len(groups) > 1]
        if alone:
            rows = np.concatenate(alone)
            calls.append((rows, _augment(confidence[rows], ridge[rows], n_factors), 0.0))
        return cls(confidence, ridge, tuple(calls))

    def solve(self, solved: Singles, fixed: Singles, num_threads: int, *, steps: int = CG_STEPS) -> None:
        """Move `solved` to (near) the solution given `fixed`, in place."""
        kernel = load_kernel()
        if kernel is None:
            solved[:] = solve_rows(self.confidence, fixed, fixed.T @ fixed, self.ridge)
            return
        for rows, confidence, shared in self.calls:
            part = solved[rows]
            other = fixed if shared else np.vstack([fixed, np.eye(fixed.shape[1], dtype=np.float32)])
            kernel.least_squares_cg(confidence, part, other, shared, num_threads, steps)
            solved[rows] = part


def _groups(ridge: NDArray[np.float64], counts: NDArray[np.integer]) -> Iterator[tuple[NDArray[np.intp], float]]:
    """The rows that have interactions, by ridge."""
    filled = np.flatnonzero(counts)
    values, place = np.unique(ridge[filled], return_inverse=True)
    order = np.argsort(place, kind="stable")
    bounds = np.searchsorted(place[order], np.arange(len(values) + 1))
    for number, value in enumerate(values):
        yield filled[order[bounds[number] : bounds[number + 1]]], float(value)


def _augment(confidence: Any, ridge: NDArray[np.float64], n_factors: int) -> Any:
    """The rows with n_factors more columns, one for each row of an identity matrix that is put below the fixed side.

    The kernel takes a confidence of -r for "target 0, weight r": the identity adds I to the Gram matrix and these columns
    (r - 1) I, together the ridge r I of the row.
    """
    n_rows = len(ridge)
    data = np.repeat(-ridge.astype(np.float32), n_factors)
    columns = np.tile(np.arange(n_factors, dtype=np.int32), n_rows)
    starts = np.arange(n_rows + 1, dtype=np.int32) * n_factors
    return sparse.hstack([confidence, sparse.csr_matrix((data, columns, starts), (n_rows, n_factors))], format="csr")


def _start(side: _Side, rng: np.random.Generator, n_factors: int) -> Singles:
    factors = rng.normal(0.0, 0.1 / np.sqrt(n_factors), (side.confidence.shape[0], n_factors)).astype(np.float32)
    factors[np.diff(side.confidence.indptr) == 0] = 0.0
    return factors


@lru_cache(4_096)
def _ridge_of(objective: Objective, count: int) -> float:
    """The ridge of one customer with so many interactions."""
    return float(objective.ridge(np.array([count]), objective.n_items)[0])


def _rounded(frequency: Any) -> NDArray[np.float64]:
    return np.asarray(np.exp(FREQUENCY_STEP * np.round(np.log(np.maximum(frequency, 1e-12)) / FREQUENCY_STEP)))
