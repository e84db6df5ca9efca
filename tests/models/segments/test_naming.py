import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models.segments.naming import Names, by_size, inherited, match

SETTINGS = settings(max_examples=60)
K = 4
partitions = st.lists(st.tuples(st.integers(0, K - 1), st.integers(0, K - 1)), min_size=K, max_size=60)


@SETTINGS
@given(partitions, st.permutations(range(K)), st.permutations(range(K)))
def test_the_numbers_of_clusters_mean_nothing(rows, renumber_before, renumber_after):
    before, after = (np.array(column) for column in zip(*rows, strict=True))
    plain = match(before, after, K, K)
    turned = match(np.array(renumber_before)[before], np.array(renumber_after)[after], K, K)
    for new, old in enumerate(plain):
        assert turned[renumber_after[new]] == (None if old is None else renumber_before[old])


@SETTINGS
@given(st.lists(st.integers(0, K - 1), min_size=K, max_size=60), st.permutations(range(K)), st.randoms(use_true_random=False))
def test_clusters_are_numbered_by_what_is_in_them(labels, renumber, random):
    points = np.array([[random.random(), n] for n, _ in enumerate(labels)])  # no two clusters hold the same
    labels = np.unique(labels, return_inverse=True)[1]
    k = labels.max() + 1
    turned = np.argsort(np.argsort(renumber[:k]))[labels]
    assert np.array_equal(by_size(labels, points), by_size(turned, points))
    sizes = np.bincount(by_size(labels, points))
    assert (np.diff(sizes) <= 0).all()


def test_a_point_left_out_stays_left_out():
    labels = np.array([1, 1, -1, 0, 1])
    assert by_size(labels, np.arange(10.0).reshape(5, 2)).tolist() == [0, 0, -1, 1, 0]


def test_the_larger_part_of_a_split_keeps_the_name_and_the_smaller_gets_a_new_one():
    before = np.repeat([0, 1], 100)
    after = np.concatenate([np.repeat([2, 0], [70, 30]), np.repeat(1, 100)])
    matched = match(before, after, 2, 3)
    assert matched == [None, 1, 0]
    names = inherited(Names(("S1", "S2"), 3), matched)
    assert names == Names(("S3", "S2", "S1"), 4)


def test_a_name_that_is_gone_is_never_given_again():
    once = inherited(Names.fresh(3), [0, 1])
    assert once == Names(("S1", "S2"), 4)
    again = inherited(once, [None, 0, 1])
    assert again.names == ("S4", "S1", "S2")


def test_a_cluster_that_shares_no_more_than_half_is_another():
    before = np.repeat([0, 1], 100)
    assert match(before, np.tile([0, 1], 100), 2, 2) == [None, None]
    same = match(before, 1 - before, 2, 2)
    assert same == [1, 0]  # control: the same clusters under other numbers


@SETTINGS
@given(partitions)
def test_no_old_name_is_given_twice(rows):
    before, after = (np.array(column) for column in zip(*rows, strict=True))
    names = inherited(Names.fresh(K), match(before, after, K, K)).names
    assert len(set(names)) == K
