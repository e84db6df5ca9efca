from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from models import als, evaluation
from models.lists import best
from models.recommender import Recommender


def _blocks(seed: int, n_customers: int = 240, n_items: int = 60, n_blocks: int = 4) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Customers who buy within their own block of items, mostly: what they bought before, and then (new items)."""
    rng = np.random.default_rng(seed)
    is_own = (np.arange(n_customers) % n_blocks)[:, None] == (np.arange(n_items) % n_blocks)[None, :]
    bought = rng.random((n_customers, n_items)) < np.where(is_own, 0.6, 0.03)
    is_later = rng.random(bought.shape) < 0.4
    return sparse.csr_matrix((bought & ~is_later).astype(float)), sparse.csr_matrix((bought & is_later).astype(float))


@pytest.fixture(scope="module")
def before() -> sparse.csr_matrix:
    return _blocks(0)[0]


@pytest.fixture(scope="module")
def fitted(before: sparse.csr_matrix) -> Recommender:
    return Recommender(n_factors=8, repeat_weight=0.0).fit(before)


def test_new_items_of_the_customers_block_are_found_where_popularity_finds_none(fitted: Recommender, before: sparse.csr_matrix) -> None:
    after, customers = _blocks(0)[1], np.arange(before.shape[0])
    ours = fitted.recommend(customers, 10, exclude=before)[0]
    popular = fitted.recommend(np.full(before.shape[0], -1), 10, exclude=before)[0]
    assert evaluation.ndcg_at_k(ours, after, k=10) > 1.5 * evaluation.ndcg_at_k(popular, after, k=10)


def test_lists_are_sorted_scored_as_score_says_and_free_of_repeats(fitted: Recommender) -> None:
    items, scores = fitted.recommend([3, 7, -1], 20)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(row)) == 20 for row in items.tolist())
    for row, customer in enumerate((3, 7, -1)):
        assert np.allclose(fitted.score(np.full(20, customer), items[row]), scores[row], atol=1e-5)


def test_a_list_is_the_head_of_the_full_ranking(fitted: Recommender) -> None:
    everything = fitted.recommend(np.arange(20), 60)[0]
    assert np.array_equal(fitted.recommend(np.arange(20), 5)[0], everything[:, :5])
    assert np.array_equal(np.sort(everything, axis=1), np.tile(np.arange(60), (20, 1)))


def test_excluded_items_are_never_returned_and_missing_places_are_marked(fitted: Recommender) -> None:
    exclude = sparse.csr_matrix(np.ones((2, 60)) * (np.arange(60) >= 3))
    items, scores = fitted.recommend([0, -1], 5, exclude=exclude)
    assert [sorted(row) for row in items[:, :3].tolist()] == [[0, 1, 2]] * 2
    assert (items[:, 3:] == -1).all()
    assert np.isneginf(scores[:, 3:]).all()
    assert np.isfinite(scores[:, :3]).all()
    assert (fitted.recommend([0], 100)[0][:, 60:] == -1).all()
    no_bar = sparse.csr_matrix((np.zeros(1), ([0], [int(fitted.recommend([0], 1)[0][0, 0])])), (1, 60))
    assert np.array_equal(fitted.recommend([0], 5, exclude=no_bar)[0], fitted.recommend([0], 5)[0])


def test_customers_without_history_get_popularity_in_order_ties_by_position() -> None:
    weights = sparse.csr_matrix(np.array([[1.0, 0, 3, 1], [0, 0, 2, 0], [0, 0, 0, 0]]))
    recommender = Recommender(n_factors=2).fit(weights)
    for stranger in (2, -1):
        items, scores = recommender.recommend([stranger], 4)
        assert items.tolist() == [[2, 0, 3, 1]]
        assert np.allclose(scores, [[1, 0.2, 0.2, 0]])
    assert recommender.popularity_.tolist() == [1, 0, 5, 1]


def test_own_history_raises_an_item_by_its_share_of_the_repeat_weight(before: sparse.csr_matrix) -> None:
    weights = before.copy()
    weights[0, weights[0].indices[0]] = 5.0
    plain, repeating = (Recommender(n_factors=8, repeat_weight=weight).fit(weights) for weight in (0.0, 2.0))
    items = np.arange(60)
    gain = repeating.score(np.zeros(60, dtype=int), items) - plain.score(np.zeros(60, dtype=int), items)
    assert np.allclose(gain, 2.0 * weights[0].toarray().ravel() / 5.0, atol=1e-5)
    assert gain.max() == pytest.approx(2.0)


def test_a_trained_customer_solved_again_is_the_same_customer(fitted: Recommender, before: sparse.csr_matrix) -> None:
    rows = np.flatnonzero(np.diff(before.indptr))[:40]
    solved = np.stack([fitted.solve(before[row].indices, before[row].data).factors for row in rows])
    assert np.abs(solved - fitted.customer_factors_[rows]).max() < 1e-3 * np.abs(solved).max()
    assert np.abs(solved[::-1] - fitted.customer_factors_[rows]).max() > 0.1 * np.abs(solved).max()


def test_customers_who_are_not_kept_leave_nothing_behind(before: sparse.csr_matrix) -> None:
    learner = Recommender(n_factors=8).fit(before)
    rest = np.delete(np.arange(240), [0, 17])
    expected = learner.recommend(rest, 15)
    kept = learner.keep(rest)
    assert np.array_equal(kept.recommend(np.arange(238), 15)[0], expected[0])
    assert {len(kept.customer_factors_), kept.history_.shape[0]} == {238}


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 400))
@settings(max_examples=40)
def test_the_best_k_equal_a_full_stable_sort_whatever_the_ties(seed: int, k: int, n_items: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=(4, n_items)), 1).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    items, values = best(scores, k)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    expected = np.take_along_axis(scores, order, axis=1)
    assert np.array_equal(items[:, : order.shape[1]], np.where(np.isneginf(expected), -1, order))
    assert np.array_equal(values[:, : order.shape[1]], expected)


def test_chunks_do_not_show(fitted: Recommender, before: sparse.csr_matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    customers = np.arange(50)
    whole = fitted.recommend(customers, 5, exclude=before[:50])
    monkeypatch.setattr("models.recommender.CHUNK_CELLS", 7 * 60)
    parts = fitted.recommend(customers, 5, exclude=before[:50])
    assert np.array_equal(whole[0], parts[0])
    assert np.allclose(whole[1], parts[1])


def test_five_customers_and_an_item_seen_once_are_enough() -> None:
    weights = sparse.csr_matrix(np.array([[1.0, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]))
    recommender = Recommender().fit(weights)
    items, scores = recommender.recommend(np.arange(5), 3)
    assert np.isfinite(scores).all()
    assert items[3, :2].tolist() == [0, 2]
    assert items[2, 0] == 1


def test_loss_is_minus_the_ndcg_of_those_with_something_relevant(fitted: Recommender, before: sparse.csr_matrix) -> None:
    relevant = before.copy().tolil()
    relevant[:100] = 0
    rows = np.arange(100, 240)
    expected = -evaluation.ndcg_at_k(fitted.recommend(rows, 20)[0], before[rows], k=20)
    assert fitted.loss(relevant.tocsr()) == pytest.approx(expected)
    with pytest.raises(ValueError, match="nothing to judge by"):
        fitted.loss(sparse.csr_matrix((240, 60)))


def test_duplicate_cells_add_up_and_explicit_zeros_are_nothing() -> None:
    split = sparse.csr_matrix((np.array([1.0, 1.0, 3.0, 0.0]), np.array([0, 0, 1, 2]), np.array([0, 3, 4])), (2, 3))
    whole = sparse.csr_matrix(np.array([[2.0, 3.0, 0.0], [0.0, 0.0, 0.0]]))
    ours, expected = (Recommender(n_factors=2).fit(matrix) for matrix in (split, whole))
    assert np.array_equal(ours.item_factors_, expected.item_factors_)
    assert ours.recommend([1], 3)[0].tolist() == expected.recommend([-1], 3)[0].tolist()


def test_a_mapped_model_answers_as_one_read_into_memory(fitted: Recommender, before: sparse.csr_matrix, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    mapped = Recommender.load(tmp_path, is_mapped=True)
    assert np.array_equal(mapped.recommend([0, 1, -1], 5)[0], fitted.recommend([0, 1, -1], 5)[0])
    asked = before[0].indices, before[0].data
    assert np.array_equal(mapped.solve(*asked).factors, fitted.solve(*asked).factors)
    assert not isinstance(mapped.item_factors_.base, type(None))


def test_arrays_that_do_not_belong_together_are_refused(fitted: Recommender, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    np.save(tmp_path / "popularity.npy", np.ones(3))
    with pytest.raises(ValueError, match="do not belong together"):
        Recommender.load(tmp_path)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (sparse.csr_matrix((3, 4)), "found none"),
        (sparse.csr_matrix(np.array([[1.0, -1.0]])), "not negative"),
        (sparse.csr_matrix(np.array([[1.0, np.nan]])), "finite"),
        (np.ones((2, 2)), "sparse matrix"),
    ],
)
def test_interactions_that_cannot_teach_are_refused_with_a_sentence(weights: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Recommender().fit(weights)


@pytest.mark.parametrize("params", [{"nu": 1.5}, {"alpha0": 0.0}, {"regularization": -1.0}, {"n_factors": 0}, {"repeat_weight": -0.1}])
def test_parameters_outside_their_range_are_refused_at_fit(params: dict, before: sparse.csr_matrix) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        Recommender(**params).fit(before)


def test_questions_of_the_wrong_shape_are_refused(fitted: Recommender, before: sparse.csr_matrix) -> None:
    for ask, sentence in (
        (lambda: fitted.recommend([240], 5), r"rows in \[0, 240\)"),
        (lambda: fitted.recommend([0], 0), "k must be 1 or more"),
        (lambda: fitted.recommend([0], 5, exclude=before), "one row for each customer asked"),
        (lambda: fitted.score([0], [60]), r"items in \[0, 60\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ask()


@pytest.mark.slow
def test_real_shop_is_ranked_better_than_by_popularity_and_by_own_history(shared_data: Path) -> None:
    """UCI Online Retail, four weeks from 2011-11-11, repeats allowed, weights halving in 60 days."""
    rows = pd.read_parquet(
        shared_data / "online_retail" / "online_retail.parquet", columns=["CustomerID", "StockCode", "InvoiceDate", "Quantity"]
    )
    rows = rows[rows["CustomerID"].notna() & (rows["Quantity"] > 0)]
    age = (pd.Timestamp("2011-11-11") - pd.to_datetime(rows["InvoiceDate"]).dt.floor("D")).dt.days.to_numpy()
    customers, items = pd.factorize(rows["CustomerID"])[0], pd.factorize(rows["StockCode"])[0]
    shape, is_past, is_later = (customers.max() + 1, items.max() + 1), age > 0, (age <= 0) & (age > -28)
    past = sparse.csr_matrix((0.5 ** (age[is_past] / 60), (customers[is_past], items[is_past])), shape)
    later = sparse.csr_matrix((np.ones(is_later.sum()), (customers[is_later], items[is_later])), shape)
    later = later.multiply((np.diff(past.indptr) > 0)[:, None]).tocsr()
    ours = -Recommender().fit(past).loss(later)
    own = -Recommender(n_factors=1, n_epochs=1, repeat_weight=1e6).fit(past).loss(later)
    buyers = np.flatnonzero(np.diff(later.indptr))
    popular = evaluation.ndcg_at_k(
        Recommender(n_factors=1, n_epochs=1).fit(past).recommend(np.full(buyers.size, -1), 20)[0], later[buyers], k=20
    )
    assert popular < 0.2 < 0.3 < own < ours


def folded_in(learner: Recommender, weights: sparse.csr_matrix) -> np.ndarray:
    items = learner.item_factors_
    return als.fold_in(weights, learner.objective_, items, gram=items.T @ items, num_threads=1)[0]


def test_one_customer_solved_is_what_they_are_folded_in_to_and_shares_add_up(fitted: Recommender, before: sparse.csr_matrix) -> None:
    for row in (0, 5, 100):
        solved = fitted.solve(before[row].indices, before[row].data)
        assert np.allclose(solved.factors, folded_in(fitted, before[row]), atol=1e-4)
        assert np.allclose(solved.shares(fitted.item_factors_).sum(axis=1), fitted.item_factors_ @ solved.factors, atol=1e-4)


def test_weights_of_a_row_are_those_of_the_training_also_when_loaded_or_kept(before: sparse.csr_matrix, tmp_path: Path) -> None:
    weights = before * 0.3
    weights[4] *= 7
    learner = Recommender(n_factors=4, n_epochs=2).fit(weights)
    assert np.allclose((learner.history_[4] * learner.largest_[4]).toarray(), weights[4].toarray())
    learner.save(tmp_path)
    kept = Recommender.load(tmp_path).keep([9, 4])
    assert np.allclose((kept.history_[1] * kept.largest_[1]).toarray(), weights[4].toarray())
    (tmp_path / "largest.npy").unlink()  # as versions of before were written
    assert np.isnan(Recommender.load(tmp_path).largest_).all()


def test_customers_folded_in_are_those_of_the_training_and_leave_it_as_it_was(before: sparse.csr_matrix) -> None:
    learner = Recommender(n_factors=8, repeat_weight=0.7, random_state=3).fit(before)
    rows = np.array([9, 4, 200])
    other = learner.folded(before[rows])
    assert np.allclose(other.customer_factors_, learner.customer_factors_[rows], atol=1e-3)
    assert np.array_equal(other.recommend([0, 1, 2, -1], 5)[0], learner.recommend([*rows, -1], 5)[0])
    assert len(learner.customer_factors_) == before.shape[0]
    assert other.get_params() == learner.get_params()
    nobody = learner.folded(sparse.csr_matrix((1, before.shape[1])))
    assert np.array_equal(nobody.recommend([0], 5)[0], learner.recommend([-1], 5)[0])
    with pytest.raises(ValueError, match="items as in fit"):
        learner.folded(before[:, :-1])
