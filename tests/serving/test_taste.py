from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from models import als
from models.recommender import Recommender
from serving.recent import Act
from serving.taste import Taste

NOW, HALF_LIFE = datetime(2026, 3, 1, tzinfo=UTC), 90.0
N_CUSTOMERS, N_ITEMS = 40, 25


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    weights = sparse.random(N_CUSTOMERS, N_ITEMS, density=0.25, format="csr", random_state=1, data_rvs=lambda n: rng.uniform(0.1, 3.0, n))
    weights = sparse.vstack([weights, sparse.csr_matrix((1, N_ITEMS))]).tocsr()  # the last one did nothing
    learner = Recommender(n_factors=6, random_state=2).fit(weights)
    names = [f"i{i}" for i in range(N_ITEMS)]
    items = {name: i for i, name in enumerate(names)}
    return SimpleNamespace(
        learner=learner, items=items, item_ids=names, weights=weights, half_life_days=HALF_LIFE, trained_us=int(NOW.timestamp() * 1e6)
    )


def act(item, weight, last_weight):
    """What a version with one stage looks at."""
    return Act(item, weight, last_weight, touches=0.0, purchases=0, seen_us=0, bought_us=0)


def acts_of(weights, row):
    return [act(f"i{i}", w, w) for i, w in zip(weights[row].indices, weights[row].data, strict=True)]


@pytest.mark.parametrize("row", [0, 7, 39])
def test_who_did_what_a_customer_of_the_training_did_is_solved_to_what_was_trained(model, row):
    stranger, trained = Taste.of(model, [], acts_of(model.weights, row), NOW), Taste.of(model, [row], [], NOW)
    assert np.allclose(stranger.factors, trained.factors, atol=2e-3)
    assert np.allclose(stranger.scores(), trained.scores(), atol=2e-3)
    assert (stranger.is_folded, trained.is_folded) == (True, False)
    assert np.allclose(trained.weights, model.weights[row].data, rtol=1e-5)


def test_scores_of_the_trained_are_the_learners(model):
    taste = Taste.of(model, [3], [], NOW)
    assert np.allclose(taste.scores(), model.learner.score(np.full(N_ITEMS, 3), np.arange(N_ITEMS)), atol=1e-5)


def test_nothing_to_go_by_is_nothing(model):
    unknown = [act("unknown", 1.0, 1.0)]
    assert Taste.of(model, [], [], NOW) is Taste.of(model, [], unknown, NOW) is Taste.of(model, [N_CUSTOMERS], unknown, NOW) is None
    assert Taste.of(model, [3], unknown, NOW).is_folded is False


def test_what_was_merged_counts_together(model):
    both = Taste.of(model, [3, 4], [], NOW)
    summed = np.asarray((model.weights[3] + model.weights[4]).todense()).ravel()
    assert np.allclose(both.weights, summed[both.items], rtol=1e-5)
    items = model.learner.item_factors_
    summed = sparse.csr_matrix(model.weights[3] + model.weights[4])
    folded = als.fold_in(summed, model.learner.objective_, items, gram=items.T @ items, num_threads=1)
    assert np.allclose(both.factors, folded[0], atol=1e-4)


def test_what_the_training_knew_fades_until_the_day_that_something_new_is_done(model):
    later = NOW + timedelta(days=HALF_LIFE)
    known = int(model.weights[3].indices[0])
    new = next(i for i in range(N_ITEMS) if i not in model.weights[3].indices)
    taste = Taste.of(model, [3], [act(f"i{new}", 0.7, 0.15), act(f"i{known}", 9.0, 1.0)], later)
    found = dict(zip(taste.items.tolist(), taste.weights.tolist(), strict=True))
    wanted = {int(i): w / 2 for i, w in zip(model.weights[3].indices, model.weights[3].data, strict=True)}
    assert found == pytest.approx(wanted | {new: 0.7, known: wanted[known] + 1.0}, rel=1e-5)


@settings(max_examples=60)
@given(row=st.none() | st.integers(0, N_CUSTOMERS - 1), item=st.integers(0, N_ITEMS - 1), low=st.floats(0.1, 2), more=st.floats(0.1, 5))
def test_the_more_is_done_with_an_item_the_higher_it_scores(model, row, item, low, more):
    """The exact solution moves towards an item whose weight grows, while it is not yet above its target of 1."""
    others = [act("i2", 1.0, 1.0), act("i5", 0.5, 0.5)]
    rows = [] if row is None else [row]

    def product(weight):
        acts = [*(one for one in others if one.item_id != f"i{item}"), act(f"i{item}", weight, weight)]
        return float(model.learner.item_factors_[item] @ Taste.of(model, rows, acts, NOW).factors)

    before = product(low)
    assert product(low + more) >= before - 1e-5 or before > 1


@settings(max_examples=60)
@given(row=st.integers(0, N_CUSTOMERS - 1))
def test_shares_add_up_to_the_score_and_the_strongest_is_the_largest(model, row):
    taste, wanted = Taste.of(model, [row], [], NOW), np.arange(N_ITEMS)
    if taste is None:
        return
    learner = model.learner
    solved = learner.solve(taste.items, taste.weights)
    shares = solved.shares(learner.item_factors_)
    assert np.allclose(shares.sum(axis=1), learner.item_factors_ @ solved.factors, atol=1e-4)
    shares[taste.items, np.arange(taste.items.size)] += learner.repeat_weight * taste.own
    strongest = taste.strongest(wanted)
    assert np.array_equal(strongest, np.where(shares.max(axis=1) > 0, taste.items[shares.argmax(axis=1)], -1))


def test_a_version_that_does_not_tell_its_weights_answers_as_trained_without_reasons(model, tmp_path):
    model.learner.save(tmp_path)
    (tmp_path / "largest.npy").unlink()
    older = SimpleNamespace(**{**vars(model), "learner": Recommender.load(tmp_path)})
    taste = Taste.of(older, [3], acts_of(model.weights, 4), NOW)
    assert not taste.is_folded
    assert np.array_equal(taste.factors, model.learner.customer_factors_[3])
    assert (taste.strongest(np.arange(4)) == -1).all()
    assert np.allclose(Taste.of(older, [3, 4], [], NOW).factors, model.learner.customer_factors_[[3, 4]].mean(axis=0))
    assert Taste.of(older, [], acts_of(model.weights, 4), NOW).is_folded
