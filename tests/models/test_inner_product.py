"""The exact search against the plain ranking of all items; and that it does look at less."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.inner_product import LONGEST, InnerProducts


def plain(items, query, k, allowed=None):
    """What the search promises, of every item: double-precision sums rounded once, ties by position."""
    scores = np.einsum("ij,j->i", items.astype(np.float64), query.astype(np.float64)).astype(np.float32)
    places = np.arange(len(items)) if allowed is None else np.flatnonzero(allowed)
    best = places[np.lexsort((places, -scores[places]))][:k]
    return best, scores[best]


def like_trained(n, width, seed, *, n_queries=20):
    """Factors as training leaves them: few strong axes, many short items; queries along the same axes."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    spread = 1.0 / np.arange(1, width + 1)
    items = rng.normal(size=(n, width)) * spread @ turn * rng.pareto(1.5, (n, 1))
    return items.astype(np.float32), (rng.normal(size=(n_queries, width)) * spread @ turn).astype(np.float32)


@st.composite
def searches(draw):
    """Items with ties, zeros and lengths of all magnitudes; a query; k; who is allowed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, width = draw(st.integers(0, 400)), draw(st.integers(1, 40))
    items = rng.normal(size=(n, width)) * draw(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e12]))
    items *= rng.choice(draw(st.sampled_from([[1.0], [0.0, 1.0], [1e-6, 1.0, 10.0]])), (n, 1))
    if draw(st.booleans()):  # whole numbers: many ties
        items = np.sign(items) * rng.integers(0, 3, (n, width))
    if n and draw(st.booleans()):  # the same items again and again
        items = items[rng.integers(0, max(1, n // 10), n)]
    query = rng.normal(size=width) * draw(st.sampled_from([0.0, 1e-20, 1.0, 1e9]))
    if n and draw(st.booleans()):
        query = items[rng.integers(n)]
    allowed = None if draw(st.booleans()) else rng.random(n) < draw(st.sampled_from([0.0, 0.01, 0.3, 0.99]))
    return items.astype(np.float32), query.astype(np.float32), draw(st.integers(1, 60)), allowed


@settings(max_examples=300)
@given(searches(), st.integers(1, 20), st.integers(1, 4))
def test_the_search_finds_what_the_plain_ranking_finds(search, leading, groups):
    items, query, k, allowed = search
    places, scores = InnerProducts.of(items, leading=leading, groups=groups).best(query, k, allowed=allowed)
    wanted, values = plain(items, query, k, allowed)
    np.testing.assert_array_equal(places, wanted)
    np.testing.assert_array_equal(scores, values)


@pytest.mark.parametrize("share", [None, 0.5, 0.002])
def test_of_many_items_it_finds_the_same(share):
    items, queries = like_trained(20_000, 32, seed=1)
    allowed = None if share is None else np.random.default_rng(2).random(len(items)) < share
    index = InnerProducts.of(items)
    for query in queries:
        places, scores = index.best(query, 100, allowed=allowed)
        wanted, values = plain(items, query, 100, allowed)
        np.testing.assert_array_equal(places, wanted)
        np.testing.assert_array_equal(scores, values)


def plain_searches(monkeypatch, items, queries):
    """How many of the searches scored all items."""
    count, plainly = [], InnerProducts._plainly
    monkeypatch.setattr(InnerProducts, "_plainly", lambda self, *given: (count.append(1), plainly(self, *given))[1])
    index = InnerProducts.of(items)
    for query in queries:
        index.best(query, 50)
    return len(count)


def test_of_trained_factors_few_are_looked_at(monkeypatch):
    assert plain_searches(monkeypatch, *like_trained(20_000, 64, seed=3)) == 0


def test_of_factors_that_no_axis_holds_all_are(monkeypatch):
    rng = np.random.default_rng(4)
    items, queries = (rng.normal(size=(n, 64)).astype(np.float32) for n in (20_000, 5))
    assert plain_searches(monkeypatch, items, queries) == 5


def test_a_score_does_not_depend_on_what_else_is_asked_for():
    items, (query, *_) = like_trained(1_000, 32, seed=5)
    index = InnerProducts.of(items)
    places, scores = index.best(query, 100)
    np.testing.assert_array_equal(scores, index.scores(query, places))
    np.testing.assert_array_equal(scores[7:8], index.scores(query, places[7:8]))


@pytest.mark.parametrize("items", [np.zeros((2, 3)), np.zeros(3, np.float32)], ids=["doubles", "no matrix"])
def test_what_is_no_matrix_of_singles_is_refused(items):
    with pytest.raises(ValueError, match="matrix of float32"):
        InnerProducts.of(items)


@pytest.mark.parametrize("value", [np.nan, np.inf, 2 * LONGEST])
def test_what_is_not_finite_or_too_long_is_refused(value):
    sound, odd = np.ones((3, 2), np.float32), np.array([[1, 1], [1, value]], np.float32)
    with pytest.raises(ValueError, match="found 1 others"):
        InnerProducts.of(odd)
    with pytest.raises(ValueError, match="finite query"):
        InnerProducts.of(sound).best(odd[1], 1)
