import numpy as np
import pytest
from scipy import sparse

from models import als
from models.als import Objective, _Side


def _shop(seed: int = 0, n_customers: int = 300, n_items: int = 80, density: float = 0.15) -> sparse.csr_matrix:
    return sparse.random(n_customers, n_items, density=density, format="csr", random_state=seed, data_rvs=lambda n: np.full(n, 2.0))


def _direct(weights: sparse.csr_matrix, objective: Objective, items: np.ndarray) -> np.ndarray:
    """The factors of every row from the definition, in double precision, nothing shared with the code under test."""
    factors = np.zeros((weights.shape[0], items.shape[1]))
    for row, dense in enumerate(weights.toarray()):
        if dense.any():
            c = np.where(dense > 0, 1 + dense / objective.alpha0, 1.0)
            frequency = np.count_nonzero(dense) + objective.alpha0 * objective.n_items
            rounded = np.exp(als.FREQUENCY_STEP * np.round(np.log(frequency) / als.FREQUENCY_STEP))
            ridge = objective.ridge_scale * rounded**objective.nu * (1 + objective.alpha0) / objective.alpha0
            normal = items.T @ (items * c[:, None]) + ridge * np.eye(items.shape[1])
            factors[row] = np.linalg.solve(normal, items.T @ (c * (dense > 0)))
    return factors


@pytest.mark.parametrize("nu", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("gain", [0.001, 4_000, 1e9], ids=["all augmented", "mixed", "all shared"])
def test_the_compiled_solver_with_a_ridge_of_each_row_equals_numpy(nu: float, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(als, "SHARED_CALL_GAIN", gain)
    assert als.load_kernel() is not None, "the pinned implicit no longer has the solver; als falls back to numpy and is slow"
    weights, items = _shop(), np.random.default_rng(1).normal(0, 0.5, (80, 8)).astype(np.float32)
    objective = Objective.balanced(weights, alpha0=0.05, regularization=0.02, nu=nu)
    solved = np.zeros((300, 8), dtype=np.float32)
    _Side.of(objective.confidence(weights), objective, objective.n_items, 8).solve(solved, items, 1, steps=40)
    expected = _direct(weights, objective, items)
    assert np.abs(solved - expected).max() < 1e-4 * np.abs(expected).max()
    other = _direct(weights, Objective.balanced(weights, alpha0=0.05, regularization=0.08, nu=nu), items)
    assert np.abs(other - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("has_kernel", [True, False])
def test_folding_in_is_exact_with_and_without_the_kernel(has_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_kernel:
        monkeypatch.setattr(als, "load_kernel", lambda: None)
    weights, items = _shop(), np.random.default_rng(1).normal(0, 0.5, (80, 8)).astype(np.float32)
    objective = Objective.balanced(weights, alpha0=0.05, regularization=0.02, nu=0.7)
    folded = als.fold_in(weights, objective, items, gram=items.T @ items, num_threads=1)
    expected = _direct(weights, objective, items)
    assert np.abs(folded - expected).max() < 1e-4 * np.abs(expected).max()


def test_training_without_the_kernel_reaches_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = _shop(n_customers=60, n_items=30)
    objective = Objective.balanced(weights, alpha0=0.3, regularization=0.01, nu=0.5)
    fit = lambda: als.factorize(weights, objective, n_factors=4, n_epochs=25, seed=1, num_threads=1)  # noqa: E731
    compiled = fit()
    monkeypatch.setattr(als, "load_kernel", lambda: None)
    plain = fit()
    scores, expected = (customers @ items.T for customers, items in (compiled, plain))
    assert np.corrcoef(scores.ravel(), expected.ravel())[0, 1] > 0.98


def test_without_frequency_scaling_an_epoch_is_that_of_plain_implicit() -> None:
    kernel = als.load_kernel()
    weights, alpha0 = _shop(), 0.5
    weights.data[:] = 1.0
    objective = Objective.balanced(weights, alpha0=alpha0, regularization=0.01, nu=0.0)
    rng = np.random.default_rng(2)
    customers, items = rng.normal(0, 0.1, (300, 8)).astype(np.float32), rng.normal(0, 0.1, (80, 8)).astype(np.float32)
    plain = customers.copy()
    ridge = objective.ridge_scale * (1 + alpha0) / alpha0  # the regularization, and 1 + 1 / alpha0 the alpha, of implicit
    kernel.least_squares_cg((weights * (1 + 1 / alpha0)).astype(np.float32), plain, items, ridge, 1, als.CG_STEPS)
    _Side.of(objective.confidence(weights), objective, objective.n_items, 8).solve(customers, items, 1)
    assert np.allclose(customers, plain, rtol=1e-5, atol=1e-7)


def test_the_total_ridge_does_not_move_with_nu_but_its_spread_does() -> None:
    weights = _shop()
    weights = weights.multiply(np.random.default_rng(3).random((300, 80)) < np.linspace(0.05, 1, 300)[:, None]).tocsr()
    per_customer, per_item = np.diff(weights.indptr), np.bincount(weights.indices, minlength=80)
    totals, spreads = [], []
    for nu in (0.0, 0.5, 1.0):
        objective = Objective.balanced(weights, alpha0=0.05, regularization=0.02, nu=nu)
        ridge = objective.ridge(per_customer[per_customer > 0], objective.n_items)
        totals.append(ridge.sum() + objective.ridge(per_item, objective.n_customers).sum())
        spreads.append(ridge.max() / ridge.min())
    assert totals == pytest.approx([totals[0]] * 3)
    assert spreads[0] == 1 < spreads[1] < spreads[2]


def test_rows_without_interactions_change_nothing() -> None:
    weights = _shop(n_customers=50, n_items=20)
    padded = sparse.csr_matrix((weights.data, weights.indices, np.append(weights.indptr, [weights.nnz] * 30)), (80, 20))
    objectives = [Objective.balanced(matrix, alpha0=0.3, regularization=0.01, nu=0.5) for matrix in (weights, padded)]
    assert objectives[0] == objectives[1]
    customers, _ = als.factorize(padded, objectives[1], n_factors=4, n_epochs=3, seed=1, num_threads=1)
    assert not customers[50:].any()
    assert customers[:50].any()
