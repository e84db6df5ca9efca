"""Segments of two fits -> who is who: a segment that holds mostly the same customers keeps its name, every other gets a new one.

In: the segment of the same customers by an older and a newer fit; by the older, of those only whom it can know. Out: names of the newer.
The numbers that a method gives its clusters mean nothing, so nothing here depends on them. Never gives a name to two segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.segments.clustering import Floats, Labels, centroids_of
from models.segments.structure import DISSOLVED, overlaps

PREFIX = "S"


@dataclass(frozen=True)
class Names:
    """The names (k,) of segments in order of their codes, and the number that the next new segment will get."""

    names: tuple[str, ...]
    next_number: int

    @classmethod
    def fresh(cls, k: int, *, start: int = 1) -> "Names":
        """New names for k segments."""
        return cls(tuple(f"{PREFIX}{start + i}" for i in range(k)), start + k)


def by_size(labels: Labels, points: Floats) -> Labels:
    """The same clusters numbered from the largest on, equal ones by their centroids: one numbering, whatever the method's was."""
    centroids = centroids_of(points, labels)
    sizes = np.bincount(labels[labels >= 0], minlength=len(centroids))
    order = np.lexsort((*np.round(centroids, 9).T[::-1], -sizes))
    number = np.empty(len(order) + 1, dtype=np.int64)
    number[order], number[-1] = np.arange(len(order)), -1  # the last place is that of label -1
    return number[labels]


def match(before: Labels, after: Labels, n_before: int, n_after: int) -> list[int | None]:
    """For each new segment the old one that it is, None where it is none of them.

    before, after: (n,) segments of the same customers, negative for none. The assignment with the largest sum of Jaccard similarities
    (Kuhn 1955); a pair that shares half or less of its members is no match, since such a cluster counts as dissolved (Hennig 2007).
    """
    from scipy.optimize import linear_sum_assignment

    shared = overlaps(before, after, n_before, n_after)
    found: list[int | None] = [None] * n_after
    for old, new in zip(*linear_sum_assignment(-shared), strict=True):
        if shared[old, new] > DISSOLVED:
            found[int(new)] = int(old)
    return found


def inherited(names: Names, matched: Sequence[int | None]) -> Names:
    """The names of new segments: of their match, else new ones."""
    number, given = names.next_number, []
    for old in matched:
        if old is None:
            given.append(f"{PREFIX}{number}")
            number += 1
        else:
            given.append(names.names[old])
    return Names(tuple(given), number)
