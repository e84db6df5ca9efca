"""What lists are worth on average is what many draws of the choices say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from models import evaluation, expectation


@settings(max_examples=60)
@given(
    weights=st.lists(st.floats(0.001, 1.0), min_size=4, max_size=30),
    n=st.integers(1, 4),
    scale=st.floats(1e-3, 1e3),
)
def test_chances_add_up_to_what_is_chosen_and_follow_the_shares(weights: list[float], n: int, scale: float) -> None:
    shares = np.array([weights])
    found = expectation.chances(shares * scale, [n])
    assert found.sum() == pytest.approx(n, rel=1e-6)
    assert ((found > 0) & (found <= 1)).all()
    order = np.argsort(shares[0], kind="stable")
    assert (np.diff(found[0, order]) >= -1e-12).all()
    best, worst = order[::-1][:3][None], order[:3][None]
    assert expectation.ndcg_by_customer(best, found, [n], k=3) >= expectation.ndcg_by_customer(worst, found, [n], k=3)


def test_a_list_is_worth_the_mean_of_what_it_is_worth_over_draws() -> None:
    rng, n_items, k, n_chosen = np.random.default_rng(3), 12, 5, 3
    shares = rng.dirichlet(np.full(n_items, 0.7))
    listed = np.argsort(-shares * rng.uniform(0.5, 2.0, n_items))[:k]
    draws = 4_000
    keys = rng.exponential(size=(draws, n_items)) / shares  # the first to come, by these rates, are drawn one after another
    wanted = np.zeros((draws, n_items))
    np.put_along_axis(wanted, np.argsort(keys, axis=1)[:, :n_chosen], 1.0, axis=1)
    drawn = evaluation.ndcg_by_customer(np.tile(listed, (draws, 1)), sparse.csr_matrix(wanted), k=k).mean()
    found, careless = (
        expectation.ndcg_by_customer([listed], chance, [n_chosen], k=k)[0]
        for chance in (expectation.chances([shares], [n_chosen]), n_chosen * shares[None])
    )
    assert found == pytest.approx(drawn, abs=0.02)
    assert abs(careless - drawn) > 0.03  # control: nobody buys an item twice


def test_empty_places_and_whole_catalogues_count_for_what_they_are() -> None:
    chance = expectation.chances([[3.0, 1.0, 0.0], [1.0, 1.0, 1.0]], [2, 3])
    assert chance == pytest.approx(np.array([[1, 1, 0], [1, 1, 1]]))
    assert expectation.ndcg_by_customer([[0, 1, 2], [2, -1, -1]], chance, [2, 3], k=2) == pytest.approx([1.0, 1 / (1 + 1 / np.log2(3))])


@pytest.mark.parametrize("shares", [[[0.0, 0.0]], [[np.nan, 1.0]], [[-1.0, 2.0]]], ids=["none", "unknown", "negative"])
def test_customers_without_shares_are_refused(shares: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="expected shares of 0 or more"):
        expectation.chances(shares, [1])
