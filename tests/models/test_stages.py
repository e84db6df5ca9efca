"""Both stages as one version: the second leads, the first follows; and what is saved is what answers."""

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from models.candidates.history import DAY_US
from models.candidates.occasion import Occasion
from models.candidates.pairs import pairs
from models.candidates.retrieval import Retrieval
from models.recommender import Recommender
from models.stages import HISTORIES, SECOND_STAGE, Stages
from models.two_stage import ALL_ITEMS, NEW_ITEMS, TwoStage

N_CUSTOMERS, N_ITEMS, AT_US = 40, 30, 400 * DAY_US


@pytest.fixture(scope="module")
def stages() -> Stages:
    rng, n = np.random.default_rng(1), 600
    now = Occasion(
        n_customers=N_CUSTOMERS,
        n_items=N_ITEMS,
        at_us=AT_US,
        customer=rng.integers(0, N_CUSTOMERS - 1, n),  # of the last one nothing is known
        item=rng.integers(0, N_ITEMS, n),
        done_us=AT_US - rng.integers(1, 60 * DAY_US, n),
        weight=rng.choice([0.15, 1.0], n),
        category=np.arange(N_ITEMS) % 3,
        price=np.linspace(1, 30, N_ITEMS),
        offered_us=np.full(N_ITEMS, AT_US - 90 * DAY_US),
    )
    histories, retrieval = now.histories(), Retrieval(n_candidates=3, factors={"n_factors": 6, "n_epochs": 4}).fit(now)
    relevant = sparse.random(N_CUSTOMERS, N_ITEMS, density=0.2, format="csr", random_state=2)
    examples = list(pairs(retrieval, histories, np.arange(N_CUSTOMERS), AT_US, new_only=False, relevant=relevant))
    second = TwoStage(ranker={"n_rounds": 8}).fit(now, {ALL_ITEMS: examples}, retrieval=retrieval)
    return Stages(Recommender(n_factors=6, n_epochs=4).fit(now.matrix(half_life_days=90.0)), second, histories)


def test_the_second_stage_leads_and_the_first_follows_in_its_order(stages: Stages) -> None:
    rows = np.arange(N_CUSTOMERS - 1)
    items, scores = stages.recommend(rows, N_ITEMS, at_us=AT_US)
    rest = stages.first.recommend(rows, N_ITEMS)[0]
    for row in rows.tolist():
        lead = stages.second.rank(stages.histories.customer(row), AT_US).items.tolist()
        assert 0 < len(lead) < N_ITEMS
        assert items[row].tolist() == lead + [item for item in rest[row].tolist() if item not in lead]
    assert (np.diff(scores, axis=1) <= 1e-6).all()


def test_strangers_and_modes_without_a_ranker_get_the_first_stage(stages: Stages) -> None:
    asked = [N_CUSTOMERS - 1, -1]
    assert np.array_equal(stages.recommend(asked, 5, at_us=AT_US)[0], stages.first.recommend(asked, 5)[0])
    new = stages.recommend(np.arange(5), 5, at_us=AT_US, mode=NEW_ITEMS)[0]
    bought = stages.histories.bought(N_ITEMS)[np.arange(5)]
    assert np.array_equal(new, stages.first.recommend(np.arange(5), 5, exclude=bought)[0])
    with pytest.raises(ValueError, match="does not know what is new"):
        Stages(stages.first, None, None).recommend([0], 5, at_us=AT_US, mode=NEW_ITEMS)


def test_a_saved_version_answers_the_same_read_or_mapped_and_with_fewer_customers(stages: Stages, tmp_path: Path) -> None:
    stages.save(tmp_path)
    rows = np.arange(N_CUSTOMERS)
    expected = stages.recommend(rows, 8, at_us=AT_US)
    for loaded in (Stages.load(tmp_path), Stages.load(tmp_path, is_mapped=True)):
        assert all(np.array_equal(one, two) for one, two in zip(loaded.recommend(rows, 8, at_us=AT_US), expected, strict=True))
    assert np.array_equal(Recommender.load(tmp_path).recommend(rows, 8)[0], stages.first.recommend(rows, 8)[0])
    kept = np.array([7, 3, 20])
    few = stages.keep(kept)
    assert np.array_equal(few.recommend(np.arange(3), 8, at_us=AT_US)[1], expected[1][kept])
    few.save(tmp_path / "few")
    assert len(Stages.load(tmp_path / "few").histories) == 3


def test_a_version_without_a_second_stage_is_the_first(stages: Stages, tmp_path: Path) -> None:
    Stages(stages.first, None, stages.histories).save(tmp_path)
    loaded = Stages.load(tmp_path)
    assert loaded.second is loaded.histories is None
    assert np.array_equal(loaded.recommend([0, 1], 5, at_us=0)[0], stages.first.recommend([0, 1], 5)[0])


def test_versions_of_the_earlier_kind_and_parts_that_do_not_belong_together_are_refused(stages: Stages, tmp_path: Path) -> None:
    stages.first.save(tmp_path)
    stages.second.save(tmp_path / SECOND_STAGE)
    with pytest.raises(ValueError, match="ranked when it was trained, and now ranks when it is asked; train the recommender again"):
        Stages.load(tmp_path)
    stages.histories.keep(np.arange(3)).save(tmp_path / HISTORIES)
    with pytest.raises(ValueError, match="same customers and items"):
        Stages.load(tmp_path)
