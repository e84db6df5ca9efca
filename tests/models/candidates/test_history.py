"""What is kept of acts by customer and item: the same whether it is counted at once, or in part and then brought up to date."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.candidates.history import DAY_US, NOTHING, Histories, History

WEIGHTS = (0.15, 0.5, 1.0)
ACT = st.tuples(st.integers(0, 2), st.integers(0, 3), st.sampled_from(WEIGHTS), st.integers(1, 1_000))  # customer, item, weight, instant


def counted(acts: list[tuple[int, int, float, int]], n_customers: int = 3) -> Histories:
    customer, item, weight, at = (np.array(column) for column in zip(*acts, strict=True)) if acts else [np.empty(0, dtype=int)] * 4
    return Histories.of(customer, item, weight.astype(float), at, n_customers=n_customers)


def is_same(one: History, two: History) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True))


@given(acts=st.lists(ACT, max_size=40, unique_by=lambda act: (act[0], act[3])), until=st.integers(0, 1_000))
@settings(max_examples=60)
def test_rows_of_what_was_touched_since_bring_a_history_up_to_date(acts: list[tuple[int, int, float, int]], until: int) -> None:
    whole, then = counted(acts), counted([act for act in acts if act[3] <= until])
    for customer in range(3):
        now, before = whole.customer(customer), then.customer(customer)
        touched = {item for c, item, _, at in acts if c == customer and at > until}
        kept = np.isin(now.item, list(touched))
        newer = History(**{name: column[kept] for name, column in vars(now).items()})
        assert is_same(before.updated(newer), now)
        assert touched <= set(now.item.tolist())


@given(acts=st.lists(ACT, max_size=40))
@settings(max_examples=40)
def test_who_turn_out_to_be_one_are_counted_as_one(acts: list[tuple[int, int, float, int]]) -> None:
    parts, one = counted(acts), counted([(0, *act[1:]) for act in acts], 1).customer(0)
    found = History.of([parts.customer(customer) for customer in range(3)])
    assert np.allclose(found.touches, one.touches)
    assert is_same(History(**{**vars(found), "touches": one.touches}), one)


def test_a_row_says_how_much_and_when_first_and_last() -> None:
    known = counted([(1, 2, 1.0, 10), (1, 2, 0.15, 30), (1, 2, 1.0, 20), (1, 0, 0.15, 5), (1, 0, 0.5, 4)])
    assert len(known) == 3
    assert known.customer(0).item.size == known.customer(2).item.size == 0
    found = {name: column.tolist() for name, column in vars(known.customer(1)).items()}
    assert found == {
        "item": [0, 2], "touches": [0.65, 0.15], "purchases": [0, 2], "seen_us": [5, 30], "bought_us": [0, 20]
    }  # fmt: skip
    assert known.bought(4).toarray().tolist() == [[0] * 4, [0, 0, 1, 0], [0] * 4]


def test_weights_fade_by_halves_from_the_last_purchase_and_the_last_act() -> None:
    acts = [
        (0, 0, 1.0, 80 * DAY_US),
        (0, 0, 1.0, 90 * DAY_US),
        (0, 1, 0.5, 80 * DAY_US),
        (0, 2, 1.0, 80 * DAY_US),
        (0, 2, 0.5, 90 * DAY_US),
    ]
    assert counted(acts).customer(0).at(100 * DAY_US).weights([10.0])[0] == pytest.approx([1.0, 0.125, 0.25 + 0.25])
    assert counted([(0, 0, 1.0, 50)]).customer(0).at(40).weights([10.0]).tolist() == [[1.0]]  # not before it happened


def test_saved_kept_and_mapped_histories_are_the_same(tmp_path: Path) -> None:
    known = counted([(0, 1, 1.0, 3), (2, 0, 0.15, 5), (2, 3, 0.5, 7)])
    known.save(tmp_path)
    for loaded in (Histories.load(tmp_path), Histories.load(tmp_path, is_mapped=True)):
        assert all(is_same(loaded.customer(row), known.customer(row)) for row in range(3))
    kept = known.keep(np.array([2, 1]))
    assert len(kept) == 2
    assert is_same(kept.customer(0), known.customer(2))
    assert kept.customer(1).item.size == 0
    np.save(tmp_path / "seen_us.npy", np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match="do not belong together"):
        Histories.load(tmp_path)


def test_nothing_is_brought_up_to_date_to_what_is_new() -> None:
    new = counted([(0, 1, 1.0, 3)]).customer(0)
    assert is_same(NOTHING.updated(new), new)
    assert is_same(new.updated(NOTHING), new)
