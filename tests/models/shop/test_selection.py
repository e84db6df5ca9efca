import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models.shop.selection import best_of, capped, first_of

LISTS = st.integers(1, 150).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-4, 4), min_size=n, max_size=n),  # few different scores: ties
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.lists(st.integers(-1, 3), min_size=n, max_size=n),
    )
)


def greedy(order, allowed, k, category, most):
    """The definition: walk down the list, and take what may still be taken."""
    found, count = [], {}
    for place in order:
        kind = category[place]
        if len(found) < k and allowed[place] and (most is None or kind < 0 or count.get(kind, 0) < most):
            found.append(place)
            count[kind] = count.get(kind, 0) + 1
    return found


@settings(max_examples=60)
@given(LISTS, st.integers(1, 60), st.none() | st.integers(1, 5))
def test_selection_is_the_walk_down_the_list(parts, k, most):
    scores, allowed, category = np.array(parts[0], np.float32), np.array(parts[1]), np.array(parts[2])
    order = np.lexsort((np.arange(len(scores)), -scores))
    wanted = greedy(order, allowed, k, category, most)
    assert best_of(scores, allowed, k, category=category, most=most).tolist() == wanted
    assert first_of(order, allowed, k, category=category, most=most).tolist() == wanted


@given(st.lists(st.integers(-1, 3), max_size=50), st.integers(1, 5))
def test_cap_holds_and_leaves_out_no_more_than_it_must(category, most):
    stays = capped(np.array(category, dtype=np.int64), most)
    for kind in set(category):
        mine = [flag for flag, one in zip(stays, category, strict=True) if one == kind]
        kept = len(mine) if kind < 0 else min(len(mine), most)
        assert mine == [True] * kept + [False] * (len(mine) - kept)
