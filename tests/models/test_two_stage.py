"""Retrieval and ranker: what is a candidate, what the second stage learns, and that the same data give the same bytes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.base import clone

from models import evaluation
from models.candidates.history import DAY_US, NOTHING, Histories, History
from models.candidates.occasion import Occasion
from models.candidates.pairs import Pairs, pairs
from models.candidates.retrieval import KINDS, READS, Retrieval
from models.ranker import Ranker
from models.two_stage import ALL_ITEMS, MODES, NEW_ITEMS, TwoStage

N_CUSTOMERS, N_ITEMS, N_GROUPS = 150, 40, 4
AT_US = 300 * DAY_US


def world(seed: int) -> tuple[Occasion, sparse.csr_matrix]:
    """Customers buy within their group; an item bought between 5 and 10 days ago is bought again, what is newer or older is not."""
    rng = np.random.default_rng(seed)
    group = np.arange(N_CUSTOMERS) % N_GROUPS
    customer = np.repeat(np.arange(N_CUSTOMERS), 12)
    own = rng.integers(0, N_ITEMS // N_GROUPS, customer.size) * N_GROUPS + group[customer]
    item = np.where(rng.random(customer.size) < 0.8, own, rng.integers(0, N_ITEMS, customer.size))
    age = rng.uniform(0.1, 60, customer.size)
    newest = np.full((N_CUSTOMERS, N_ITEMS), np.inf)
    np.minimum.at(newest, (customer, item), age)
    again = (newest > 5) & (newest < 10)
    fresh = (rng.random(again.shape) < 0.05) & (group[:, None] == np.arange(N_ITEMS) % N_GROUPS) & np.isinf(newest)
    now = Occasion(
        n_customers=N_CUSTOMERS,
        n_items=N_ITEMS,
        at_us=AT_US,
        customer=customer,
        item=item,
        done_us=AT_US - (age * DAY_US).astype(np.int64),
        weight=np.ones(customer.size),
        category=(np.arange(N_ITEMS) % N_GROUPS).astype(np.int64),
        price=np.linspace(1, 50, N_ITEMS),
        offered_us=np.full(N_ITEMS, AT_US - 90 * DAY_US),
    )
    return now, sparse.csr_matrix((again | fresh).astype(float))


def examples(seed: int, *, new_only: bool = False) -> Pairs:
    now, later = world(seed)
    if new_only:
        later = sparse.csr_matrix(later.multiply(now.bought().toarray() == 0))
    retrieval = Retrieval(n_candidates=15).fit(now)
    (found,) = pairs(retrieval, now.histories(), np.flatnonzero(np.diff(later.indptr)), AT_US, new_only=new_only, relevant=later)
    return found


@pytest.fixture(scope="module")
def trained() -> TwoStage:
    given = {ALL_ITEMS: [examples(1), examples(2)], NEW_ITEMS: [examples(1, new_only=True), examples(2, new_only=True)]}
    return TwoStage(retrieval={"n_candidates": 15}, random_state=3).fit(world(0)[0], given)


def lists(trained: TwoStage, people: np.ndarray, k: int, **options: object) -> tuple[np.ndarray, np.ndarray]:
    return trained.recommend(world(0)[0].histories(), people, k, at_us=AT_US, **options)


def test_candidates_are_what_the_sources_find_each_once_with_scores_and_ranks() -> None:
    now, _ = world(0)
    retrieval, known = Retrieval(n_candidates=5).fit(now), now.histories()
    for customer in (3, 7, 20):
        history = known.customer(customer)
        found, expected = retrieval.candidates(history.at(AT_US), new_only=False), set()
        assert list(retrieval.sources_) == list(KINDS)
        for column, (name, source) in enumerate(retrieval.sources_.items()):
            (weights,) = history.at(AT_US).weights([READS[name]["half_life_days"]])
            dense = source.score(sparse.csr_matrix((weights, (np.zeros(len(weights), dtype=int), history.item)), (1, N_ITEMS)))[0]
            assert np.allclose(found.scores[:, column], dense[found.items], atol=1e-5), name
            order = np.argsort(-found.scores[:, column], kind="stable")
            assert found.ranks[order, column].tolist() == list(range(1, len(order) + 1))
            expected |= set(np.flatnonzero((dense > 0) & (dense >= np.sort(dense)[-5])).tolist())
        assert found.items.tolist() == sorted(expected)


def test_new_items_only_leaves_out_what_was_bought_and_nothing_else() -> None:
    now, _ = world(0)
    retrieval, known = Retrieval(n_candidates=N_ITEMS).fit(now), now.histories()
    for customer in range(0, N_CUSTOMERS, 10):
        history = known.customer(customer)
        every, new = (set(retrieval.candidates(history.at(AT_US), new_only=flag).items.tolist()) for flag in (False, True))
        bought = set(history.item[history.purchases > 0].tolist())
        assert bought & every
        assert new == every - bought


@given(
    st.lists(st.tuples(st.integers(0, N_ITEMS - 1), st.sampled_from([0.15, 0.5, 1.0]), st.integers(1, 60 * 24)), max_size=40),
    st.integers(0, 60 * 24),
    st.sampled_from(MODES),
)
@settings(max_examples=40)
def test_what_is_ranked_live_is_what_the_whole_log_would_give_to_the_last_bit(
    trained: TwoStage, acts: list[tuple[int, float, int]], since: int, mode: str
) -> None:
    """A customer known up to some moment, and then by the rows of what they touched since, against the same acts counted at once."""
    minute = 60_000_000
    item, weight, ago = (np.array(column) for column in zip(*acts, strict=True)) if acts else [np.empty(0, dtype=int)] * 3
    done, one = AT_US - ago * minute, np.zeros(len(acts), dtype=np.int64)

    def known(chosen: np.ndarray) -> History:
        return Histories.of(one[chosen], item[chosen], weight[chosen].astype(float), done[chosen], n_customers=1).customer(0)

    whole, before = known(np.full(len(acts), True)), known(ago > since)
    fresh = np.isin(whole.item, item[ago <= since])
    newer = History(**{name: column[fresh] for name, column in vars(whole).items()})
    live, batch = (trained.rank(history, AT_US, mode=mode) for history in (before.updated(newer), whole))
    assert np.array_equal(live.items, batch.items)
    assert np.array_equal(live.scores, batch.scores)


def test_an_act_since_the_training_moves_the_order(trained: TwoStage) -> None:
    """The control of the law above: who is not brought up to date is ranked differently."""
    history = world(0)[0].histories().customer(4)
    seven = AT_US - 7 * DAY_US
    newer = History(np.array([1]), np.zeros(1), np.ones(1), np.array([seven]), np.array([seven]))
    before, after = (trained.rank(known, AT_US) for known in (history, history.updated(newer)))
    assert not np.array_equal(before.scores, after.scores)
    assert list(after.items).index(1) < list(before.items).index(1) if 1 in before.items else 1 in after.items


def test_somebody_of_whom_nothing_is_known_is_ranked_what_is_popular(trained: TwoStage) -> None:
    found = trained.rank(NOTHING, AT_US)
    assert len(found.items)
    assert np.isfinite(found.scores).all()


def test_the_second_stage_learns_what_no_source_can_say(trained: TwoStage) -> None:
    now, later = world(0)
    people = np.flatnonzero(np.diff(later.indptr))
    ours = evaluation.ndcg_at_k(lists(trained, people, 10)[0], later[people], k=10)
    own = now.matrix(half_life_days=60.0)[people]
    for name in ("own_history", "factors", "neighbours", "ease"):
        source = trained.retrieval_.sources_[name]
        rival = evaluation.ndcg_at_k(source.recommend(own, 10)[0], later[people], k=10)
        assert ours > rival + 0.1, name


def test_lists_hold_distinct_items_best_first_and_only_new_ones_where_asked(trained: TwoStage) -> None:
    now, _ = world(0)
    items, scores = lists(trained, np.arange(N_CUSTOMERS), 10, mode=NEW_ITEMS)
    assert not now.bought()[np.repeat(np.arange(N_CUSTOMERS), 10), np.maximum(items, 0).ravel()].A1[(items >= 0).ravel()].any()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in items)
    assert (np.diff(np.where(np.isinf(scores), -1e9, scores), axis=1) <= 0).all()


def test_questions_may_come_in_any_order_twice_and_with_exclusions(trained: TwoStage) -> None:
    asked = np.array([9, 2, 9, 140])
    items, _ = lists(trained, asked, 6)
    one_by_one = np.concatenate([lists(trained, [customer], 6)[0] for customer in asked])
    assert np.array_equal(items, one_by_one)
    exclude = sparse.csr_matrix((np.ones(2), ([0, 0], items[0, :2])), (4, N_ITEMS))
    without, _ = lists(trained, asked, 4, exclude=exclude)
    assert np.array_equal(without[0], items[0, 2:])
    assert np.array_equal(without[2], items[2, :4])


def test_nobody_is_in_the_files_and_they_answer_to_the_bit(trained: TwoStage, tmp_path: Path) -> None:
    trained.save(tmp_path)
    loaded = TwoStage.load(tmp_path)
    for mode in MODES:
        assert np.array_equal(lists(loaded, np.arange(40), 10, mode=mode)[1], lists(trained, np.arange(40), 10, mode=mode)[1])
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".lgb", ".json", ".npy"}
    lengths = {len(np.load(path)) for path in tmp_path.rglob("*.npy") if np.load(path).ndim}
    assert N_CUSTOMERS not in lengths
    assert N_CUSTOMERS + 1 not in lengths


def test_the_same_data_and_seed_give_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    given = [examples(1), examples(2)]
    texts = []
    for number, learner in enumerate((Ranker(), Ranker(num_threads=2), Ranker(random_state=9))):
        learner.fit(given).save(tmp_path / str(number))
        texts.append((tmp_path / str(number) / "ranker.lgb").read_text().split("parameters:")[0])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_what_was_only_looked_at_teaches_by_its_worth() -> None:
    some = examples(1)
    bought, rng = some.label > 0, np.random.default_rng(4)
    values = np.stack([bought + 0.5 * rng.standard_normal(len(bought)), rng.random(len(bought)) < 0.3], axis=1).astype(np.float32)
    looked = values[:, 1] > 0
    fitted = {}
    for worth in (0.0, 0.15, 2.0):  # 0: as if nobody had told; 2: a look is worth more than a purchase
        label = np.where(bought, 1.0, np.where(looked, worth, 0.0)).astype(np.float32)
        ranker = Ranker(min_data_in_leaf=20).fit([Pairs(some.customer, some.item, values, ("clue", "looked"), label)])
        fitted[worth] = ranker.score_rows(np.array([[1, 0], [0, 1], [0, 0]], dtype=np.float32))
    purchase, look, nothing = fitted[0.15]
    assert purchase > look > nothing
    assert abs(fitted[0.0][1] - fitted[0.0][2]) < (look - nothing) / 3
    assert fitted[2.0][1] > fitted[2.0][0]  # control: the worth is what is learned


def test_learners_are_cloned_say_when_unfitted_and_refuse_foreign_files(trained: TwoStage, tmp_path: Path) -> None:
    known = world(0)[0].histories()
    for learner in (Ranker(n_rounds=7), TwoStage(ranker={"n_rounds": 7}), Retrieval(n_candidates=3)):
        assert clone(learner).get_params() == learner.get_params()
    for ask in (
        lambda: Ranker().score(examples(1)),
        lambda: TwoStage().recommend(known, [0], 3, at_us=AT_US),
        lambda: Retrieval().candidates(NOTHING.at(AT_US), new_only=False),
        lambda: TwoStage().save(tmp_path),
    ):
        with pytest.raises(ValueError, match="call fit or load first"):
            ask()
    trained.save(tmp_path)
    (tmp_path / "two_stage.json").write_text('{"kind": "something else"}')
    with pytest.raises(ValueError, match="something else"):
        TwoStage.load(tmp_path)


def test_rows_that_cannot_teach_or_do_not_fit_are_refused(trained: TwoStage) -> None:
    now, _ = world(0)
    some = examples(1)
    nothing = Pairs(some.customer, some.item, some.values, some.names, np.zeros_like(some.label))
    renamed = Pairs(some.customer, some.item, some.values, (*some.names[:-1], "odd"), some.label)
    for ask, sentence in (
        (lambda: Ranker().fit([nothing]), "there is no order to learn"),
        (lambda: Ranker().fit([some, renamed]), "same columns"),
        (lambda: trained.rankers_[ALL_ITEMS].score(renamed), "missing or foreign"),
        (lambda: lists(trained, [0], 3, mode="odd"), "not trained for 'odd'"),
        (lambda: lists(trained, [N_CUSTOMERS], 3), r"rows in \[0, 150\)"),
        (lambda: lists(trained, [0], 3, exclude=sparse.csr_matrix((2, N_ITEMS))), "one row for each customer asked"),
        (lambda: TwoStage().fit(now, {"odd": [some]}), "examples of all_items, new_items"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ask()


def test_a_catalogue_too_large_for_ease_goes_without_it_and_keeps_the_columns() -> None:
    now, later = world(1)
    people = np.flatnonzero(np.diff(later.indptr))
    small, large = (Retrieval(ease_items=limit).fit(now) for limit in (N_ITEMS, N_ITEMS - 1))
    assert set(small.sources_) - set(large.sources_) == {"ease"}
    (one,), (two,) = (pairs(retrieval, now.histories(), people, AT_US, new_only=False, relevant=later) for retrieval in (small, large))
    assert one.names == two.names
    assert np.isnan(two.values[:, two.names.index("ease_score")]).all()


def test_thinning_keeps_what_was_chosen_and_the_share_of_the_rest() -> None:
    whole = examples(1)
    thin = whole.thinned(0.3, seed=1)
    assert thin.label.sum() == whole.label.sum()
    assert 0.2 < (thin.label == 0).sum() / (whole.label == 0).sum() < 0.4
    assert np.array_equal(thin.item, whole.thinned(0.3, seed=1).item)
