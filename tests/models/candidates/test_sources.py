"""One contract for all sources of candidates, and each against its definition on a matrix small enough to calculate by hand."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.base import clone

from models.candidates.content import Content
from models.candidates.ease import Ease
from models.candidates.factors import Factors
from models.candidates.neighbours import Neighbours
from models.candidates.own_history import OwnHistory
from models.candidates.popularity import Popularity
from models.candidates.source import Linear, Source, heaviest
from models.candidates.stack import Stack

SOURCES = [
    pytest.param(Ease(), id="ease"),
    pytest.param(Neighbours(n_neighbours=10), id="neighbours"),
    pytest.param(OwnHistory(), id="own_history"),
    pytest.param(Popularity(), id="popularity"),
    pytest.param(Factors(n_factors=4, n_epochs=4), id="factors"),
    pytest.param(Content(), id="content"),
]


def shop(seed: int = 0, n_customers: int = 40, n_items: int = 25, density: float = 0.2) -> sparse.csr_matrix:
    return sparse.random(n_customers, n_items, density=density, format="csr", random_state=seed)


def fitted(source: Source, weights: sparse.csr_matrix) -> Any:
    fresh = clone(source)
    if isinstance(fresh, Content):
        kinds = np.arange(weights.shape[1]) % 3
        return fresh.fit(weights, attributes=sparse.csr_matrix(np.eye(3)[kinds]))
    return fresh.fit(weights)


@pytest.mark.parametrize("source", SOURCES)
def test_parameters_are_cloned_and_an_unfitted_source_says_so(source: Source, tmp_path: Path) -> None:
    fresh = clone(source)
    assert fresh.get_params() == source.get_params()
    assert not [name for name in vars(fresh) if name.endswith("_")]
    for ask in (lambda: fresh.score(shop()), lambda: fresh.recommend(shop(), 3), lambda: fresh.save(tmp_path)):
        with pytest.raises(ValueError, match="call fit or load first"):
            ask()


@pytest.mark.parametrize("source", SOURCES)
def test_fit_twice_is_once_and_leaves_its_data_as_they_were(source: Source) -> None:
    weights = shop()
    learner = fitted(source, weights)
    once = learner.score(weights)
    assert np.array_equal(once, fitted(source, weights).score(weights))
    assert abs(weights - shop()).nnz == 0
    assert not np.array_equal(once, fitted(source, shop(seed=5)).score(shop(seed=5)))  # control: other data, other scores


@pytest.mark.parametrize("source", SOURCES)
def test_scores_do_not_depend_on_the_order_or_the_company_of_customers(source: Source) -> None:
    weights, order = shop(), np.random.default_rng(1).permutation(40)
    learner, shuffled = fitted(source, weights), fitted(source, weights[order])
    if not isinstance(source, Factors):  # whose start is drawn row by row
        assert np.allclose(shuffled.score(weights), learner.score(weights), rtol=1e-4, atol=1e-6)
    together = learner.score(weights)
    assert np.allclose(learner.score(weights[order]), together[order], rtol=1e-5, atol=1e-6)
    assert np.allclose(learner.score(weights[7]), together[7:8], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", SOURCES)
def test_a_saved_source_answers_to_the_bit_and_the_same_data_give_the_same_bytes(source: Source, tmp_path: Path) -> None:
    for name in ("one", "two"):
        fitted(source, shop()).save(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    assert {Path(name).suffix for name in files} <= {".npy", ".json"}
    for loaded in (type(source).load(tmp_path / "one"), type(source).load(tmp_path / "one", is_mapped=True)):
        assert np.array_equal(loaded.score(shop(3)), fitted(source, shop()).score(shop(3)))
        assert loaded.get_params() == source.get_params()
    (tmp_path / "one" / "source.json").write_text('{"kind": "something else"}')
    with pytest.raises(ValueError, match="something else"):
        type(source).load(tmp_path / "one")


@pytest.mark.parametrize("source", SOURCES)
def test_a_list_is_the_head_of_the_scores_without_what_is_excluded(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, learner = shop(), fitted(source, shop())
    dense = learner.score(weights)
    dense[weights.toarray() > 0] = -np.inf
    expected = np.argsort(-dense, axis=1, kind="stable")[:, :6]
    items, scores = learner.recommend(weights, 6, exclude=weights)
    assert np.array_equal(items, np.where(np.isinf(np.take_along_axis(dense, expected, axis=1)), -1, expected))
    monkeypatch.setattr("models.candidates.source.CHUNK_CELLS", 3 * 25)
    chunked = learner.recommend(weights, 6, exclude=weights)
    assert np.array_equal(chunked[0], items)
    assert (learner.recommend(weights, 40)[0][:, 25:] == -1).all()
    assert (np.diff(scores, axis=1)[:, :3] <= 0).all()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        pytest.param(sparse.csr_matrix((3, 4)), "found none", id="nothing"),
        pytest.param(sparse.csr_matrix(np.array([[1.0, -1.0, 0, 0]])), "not negative", id="negative"),
        pytest.param(sparse.csr_matrix(np.array([[1.0, np.nan, 0, 0]])), "finite", id="nan"),
    ],
)
def test_interactions_that_cannot_teach_are_refused(source: Source, weights: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        clone(source).fit(weights)


@pytest.mark.parametrize("source", SOURCES)
def test_five_customers_and_an_item_seen_once_are_enough(source: Source) -> None:
    weights = sparse.csr_matrix(np.array([[1.0, 0, 1, 0], [1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]))
    learner = clone(source).fit(weights)
    assert np.isfinite(learner.score(weights)).all()
    assert (learner.recommend(weights, 4)[0] >= 0).all()


def test_ease_equals_its_closed_form_and_has_no_diagonal() -> None:
    weights, ridge = shop(n_items=8), 3.0
    dense = weights.toarray()
    gram = dense.T @ dense
    gram += np.eye(8) * ridge * np.diagonal(gram).mean()
    inverse = np.linalg.inv(gram)
    expected = inverse / -np.diagonal(inverse)
    np.fill_diagonal(expected, 0.0)
    learner = Ease(ridge=ridge, n_neighbours=None).fit(weights)
    assert np.allclose(learner.weights_.toarray(), expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-3  # control: there is something to agree on
    assert not learner.weights_.diagonal().any()
    assert np.allclose(learner.score(weights), dense @ expected, atol=1e-5)


def test_ease_solves_what_it_claims_to_minimise() -> None:
    weights, ridge = shop(n_items=6), 2.0
    dense = weights.toarray()
    own = ridge * np.diagonal(dense.T @ dense).mean()
    learned = Ease(ridge=ridge, n_neighbours=None).fit(weights).weights_.toarray()
    for item in range(6):
        others = np.delete(np.arange(6), item)
        direct = np.linalg.solve(dense[:, others].T @ dense[:, others] + own * np.eye(5), dense[:, others].T @ dense[:, item])
        assert np.allclose(learned[others, item], direct, atol=1e-5)


def test_ease_keeps_the_weights_largest_in_size_and_refuses_what_it_cannot_invert() -> None:
    weights = shop()
    whole = np.abs(Ease(n_neighbours=None).fit(weights).weights_.toarray())
    few = Ease(n_neighbours=3).fit(weights).weights_
    assert (np.diff(few.tocsc().indptr) <= 3).all()
    kept = np.sort(np.abs(few.toarray()), axis=0)[-3:]
    assert np.allclose(kept, np.sort(whole, axis=0)[-3:])
    with pytest.raises(ValueError, match="more than the 10 it inverts"):
        Ease(max_items=10).fit(weights)
    for wrong in (Ease(ridge=0.0), Ease(reach=0)):
        with pytest.raises(ValueError, match="ridge must be above 0 and reach 1 or more"):
            wrong.fit(weights)


@pytest.mark.parametrize("kind", [Ease, Neighbours])
def test_an_item_speaks_for_no_more_others_than_its_reach_the_nearest_ones(kind: type[Linear]) -> None:
    whole, near = (kind(n_neighbours=25, reach=reach).fit(shop()).weights_.toarray() for reach in (25, 3))
    assert (np.count_nonzero(near, axis=1) <= 3).all()
    assert np.array_equal(np.sort(np.abs(near), axis=1)[:, -3:], np.sort(np.abs(whole), axis=1)[:, -3:])
    assert np.count_nonzero(whole) > np.count_nonzero(near)  # control: there was something to leave out


@given(st.integers(0, 10_000), st.integers(0, 25), st.integers(1, 30), st.integers(0, 25))
@settings(max_examples=40)
def test_sources_that_are_asked_together_say_what_each_says_of_a_whole_history(seed: int, n: int, k: int, n_barred: int) -> None:
    rng, sources = np.random.default_rng(seed), [fitted(kind, shop(seed)) for kind in (Ease(), Neighbours(n_neighbours=6))]
    stack = Stack.of(sources)
    items, barred = (np.sort(rng.choice(25, size, replace=False)) for size in (n, n_barred))
    told = rng.uniform(0.1, 1.0, (len(sources), n))
    sums, best = stack.asked(items, told), set()
    for place, (source, weights) in enumerate(zip(sources, told, strict=True)):
        (dense,) = source.score(sparse.csr_matrix((weights, (np.zeros(n, dtype=int), items)), (1, 25)))
        assert np.allclose(sums.of(np.arange(25))[place], dense, atol=1e-5)
        said = sums.of(np.arange(25))[place].copy()
        said[barred] = 0.0
        best |= {item for item in np.argsort(-said, kind="stable")[:k].tolist() if said[item] > 0}
    assert set(sums.best(k, barred).tolist()) == best


def test_of_equal_scores_the_lower_position_counts_in_whatever_order_they_were_told() -> None:
    source = Ease()
    source.weights_ = sparse.csr_matrix(([0.5, 1.0, 0.5, 1.0], ([0, 0, 1, 1], [2, 5, 2, 4])), (6, 6), dtype=np.float32)
    sums = Stack.of([source]).asked(np.arange(2), np.ones((1, 2)))
    assert sums.of(np.arange(6)).tolist() == [[0, 0, 1, 0, 1, 1]]
    assert [sorted(sums.best(k, np.empty(0, dtype=np.int64)).tolist()) for k in (1, 2, 3)] == [[2], [2, 4], [2, 4, 5]]


def test_weights_that_are_mapped_stay_in_their_files_however_they_are_asked(tmp_path: Path) -> None:
    for kind in (Ease(), Neighbours(n_neighbours=6)):
        fitted(kind, shop()).save(tmp_path / type(kind).__name__)
    held = {}
    for is_mapped in (True, False):
        sources = [kind.load(tmp_path / kind.__name__, is_mapped=is_mapped) for kind in (Ease, Neighbours)]
        stack = Stack.of(sources)
        stack.asked(np.arange(3), np.ones((2, 3))).best(5, np.array([1]))
        held[is_mapped] = [_is_in_a_file(array) for matrix in stack.matrices for array in (matrix.data, matrix.indices)]
    assert held == {True: [True] * 4, False: [False] * 4}


def _is_in_a_file(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


@given(st.integers(0, 1_000), st.integers(1, 6))
def test_each_row_keeps_its_largest_entries_of_equal_ones_the_first(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    weights = sparse.random(rng.integers(1, 8), 12, density=rng.random(), format="csr", random_state=seed)
    weights.data = rng.integers(-3, 4, weights.nnz).astype(float)
    kept = heaviest(weights, k)
    for row in range(weights.shape[0]):
        mine = weights[row]
        best = np.sort(np.lexsort((mine.indices, -np.abs(mine.data)))[:k])
        assert np.array_equal(kept[row].indices, mine.indices[best])
        assert np.array_equal(kept[row].data, mine.data[best])


def test_of_a_long_history_the_heaviest_items_are_added_up_and_none_that_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.candidates.stack.MOST_ITEMS", 3)
    stack, items = Stack.of([fitted(Ease(), shop())]), np.arange(5)

    def said(weights: list[float]) -> np.ndarray:
        return stack.asked(items, np.array([weights])).scores

    assert np.array_equal(said([0.5, 0.9, 0.4, 1.0, 0.3]), said([0.5, 0.9, 0, 1.0, 0]))
    assert np.array_equal(said([0.002, 0, 1.0, 0, 0]), said([0, 0, 1.0, 0, 0]))
    assert not np.array_equal(said([0.01, 0, 1.0, 0, 0]), said([0, 0, 1.0, 0, 0]))  # control: a little more counts


@given(st.integers(0, 10_000), st.floats(0, 5), st.integers(1, 12))
@settings(max_examples=30)
def test_neighbours_equal_brute_force(seed: int, shrinkage: float, k: int) -> None:
    weights = shop(seed, n_customers=12, n_items=10, density=0.35)
    if not weights.nnz:
        return
    dense = weights.toarray()
    length = np.linalg.norm(dense, axis=0)
    slack = shrinkage * np.mean(length[length > 0] ** 2)
    expected = np.zeros((10, 10), dtype=np.float32)
    for i in range(10):
        cosine = np.array(
            [dense[:, i] @ dense[:, j] / (length[i] * length[j] + slack) if i != j and length[i] * length[j] else 0 for j in range(10)]
        )
        for j in sorted(range(10), key=lambda j: (-np.float32(cosine[j]), j))[:k]:
            expected[j, i] = cosine[j]
    learner = Neighbours(n_neighbours=k, shrinkage=shrinkage).fit(weights)
    assert np.allclose(np.sort(learner.weights_.toarray(), axis=0), np.sort(expected, axis=0), atol=1e-6)
    assert not learner.weights_.diagonal().any()


def test_a_customer_with_everything_counts_with_the_heaviest_items_only() -> None:
    others = sparse.csr_matrix(np.eye(25)[np.arange(30) % 25])
    everything = sparse.csr_matrix(np.linspace(0.1, 2.5, 25))
    heaviest = sparse.csr_matrix(np.where(np.arange(25) >= 20, np.linspace(0.1, 2.5, 25), 0.0))
    capped, expected, uncapped = (
        Neighbours(max_row=limit).fit(sparse.vstack([row, others])).weights_.toarray()
        for limit, row in ((5, everything), (1_000, heaviest), (1_000, everything))
    )
    assert np.allclose(capped, expected)
    assert not np.allclose(uncapped, expected)


def test_own_history_is_the_row_over_its_largest_and_popularity_everybodys_sum() -> None:
    weights = sparse.csr_matrix(np.array([[2.0, 0, 1], [0, 0, 0], [0, 3, 1]]))
    assert np.allclose(OwnHistory().fit(weights).score(weights), [[1, 0, 0.5], [0, 0, 0], [0, 1, 1 / 3]])
    assert np.allclose(Popularity().fit(weights).score(weights), np.tile([2 / 3, 1, 2 / 3], (3, 1)))


def test_factors_score_as_the_recommender_without_repeats_does() -> None:
    from models.recommender import Recommender

    weights = shop(n_customers=80)
    source = Factors(n_factors=4).fit(weights)
    single = Recommender(n_factors=4, repeat_weight=0.0).fit(weights)
    assert np.array_equal(source.item_factors_, single.item_factors_)
    expected = single.customer_factors_ @ single.item_factors_.T
    assert np.allclose(source.score(weights), expected, atol=1e-3 * np.abs(expected).max())


def test_content_ranks_a_new_item_by_what_it_is_where_every_other_source_says_nothing() -> None:
    """Items 0-2 are red, 3-5 blue; nobody has touched item 2 (red) or 5 (blue)."""
    attributes = sparse.csr_matrix(np.repeat(np.eye(2), 3, axis=0))
    weights = sparse.csr_matrix(np.array([[1.0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 1, 0]]))
    learner = Content().fit(weights, attributes=attributes)
    scores = learner.score(weights)
    assert scores[1, 2] > scores[1, 5]
    assert scores[2, 5] > scores[2, 2]
    # (n_a + prior p_a) / (n + prior) over a's share of the catalogue: customer 1 has 1 of red, 4 of all 7 weights are red
    assert scores[1, 2] == pytest.approx((1 + 4 / 7) / 2 / 0.5)
    for source in (Ease(), Neighbours(), OwnHistory(), Popularity()):
        assert not source.fit(weights).score(weights)[:, [2, 5]].any()


def test_content_refuses_attributes_that_are_not_marks_of_these_items() -> None:
    for attributes in (sparse.csr_matrix(np.eye(24)), sparse.csr_matrix(np.full((25, 2), 0.5))):
        with pytest.raises(ValueError, match="attributes of 0 and 1 for 25 items"):
            Content().fit(shop(), attributes=attributes)


def test_loss_is_minus_the_ndcg_and_needs_something_relevant() -> None:
    weights = shop()
    learner = OwnHistory().fit(weights)
    assert learner.loss(weights, weights) == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="nothing to judge by"):
        learner.loss(weights, sparse.csr_matrix(weights.shape))
