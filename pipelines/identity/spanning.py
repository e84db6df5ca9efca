"""Links between numbered nodes -> what they connect, and since when.

In: both ends and the time of each link. Out: labels, roots and times, as arrays. Knows nothing of identifiers. Few nodes are
done one by one, for scipy's preparations cost more than they are worth then; many by scipy. The answers are the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

FEW = 64


@dataclass(frozen=True)
class Joins:
    """Links between nodes by number, each with the time at which it was known."""

    left: np.ndarray
    right: np.ndarray
    time: np.ndarray


def components(size: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(size,) equal labels for what the links connect."""
    if size <= FEW:
        find = union(size, left.tolist(), right.tolist())[0]
        return np.array([find(node) for node in range(size)], np.int64)
    graph = sparse.coo_array((np.ones(len(left), np.int8), (left, right)), shape=(size, size))
    return np.asarray(csgraph.connected_components(graph, directed=False)[1])


def spread(joins: Joins, order: np.ndarray, created: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per node: the first in `order` of what it is connected to, and when a chain of links to that one was complete.

    A node that is the first has its own time, `created`. The earliest moment of a chain is the largest link time on the path in a
    minimum spanning tree.
    """
    return _one_by_one(joins, order, created) if len(created) <= FEW else _at_once(joins, order, created)


def union(size: int, left: Sequence[int], right: Sequence[int]) -> tuple[Callable[[int], int], list[int]]:
    """Who stands for each node once all are joined, and the places of the links that joined two that were apart."""
    parent = list(range(size))

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    joined = []
    for at, (one, other) in enumerate(zip(left, right, strict=True)):
        one, other = find(one), find(other)
        if one != other:
            parent[other] = one
            joined.append(at)
    return find, joined


def _one_by_one(joins: Joins, order: np.ndarray, created: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kruskal's tree, then a walk from each root."""
    by_time = np.argsort(joins.time, kind="stable")
    left, right, time = (part[by_time].tolist() for part in (joins.left, joins.right, joins.time))
    near: list[list[tuple[int, int]]] = [[] for _ in created]
    for at in union(len(created), left, right)[1]:
        near[left[at]].append((right[at], time[at]))
        near[right[at]].append((left[at], time[at]))
    root, linked = [-1] * len(near), created.tolist()
    for first in order.tolist():
        if root[first] >= 0:
            continue
        root[first] = first
        waiting = [(first, np.iinfo(np.int64).min)]
        while waiting:
            node, worst = waiting.pop()
            for other, when in near[node]:
                if root[other] < 0:
                    root[other], linked[other] = first, max(worst, when)
                    waiting.append((other, linked[other]))
    return np.array(root, np.int64), np.array(linked, np.int64)


def _at_once(joins: Joins, order: np.ndarray, created: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = len(created)
    differ = joins.left != joins.right
    left, right = (side[differ] for side in (np.minimum(joins.left, joins.right), np.maximum(joins.left, joins.right)))
    if len(left) == 0:
        return np.arange(size), created
    times, weight = np.unique(joins.time[differ], return_inverse=True)
    by_ends = np.lexsort((weight, right, left))
    is_first = np.ones(len(by_ends), bool)
    is_first[1:] = (np.diff(left[by_ends]) != 0) | (np.diff(right[by_ends]) != 0)
    kept = by_ends[is_first]  # the earliest of parallel links: a sparse matrix would add them up
    # Weights start at 2: zero means no edge, and 1 is left for the links from outside to the roots.
    graph = sparse.coo_array((weight[kept] + 2.0, (left[kept], right[kept])), shape=(size + 1, size + 1)).tocsr()
    tree = csgraph.minimum_spanning_tree(graph).tocoo()
    label = csgraph.connected_components(tree, directed=False)[1][:size]
    root: np.ndarray = order[np.unique(label[order], return_index=True)[1]][label]
    roots = np.unique(root)
    ends = (np.concatenate([tree.row, np.full(len(roots), size)]), np.concatenate([tree.col, roots]))
    rooted = sparse.coo_array((np.concatenate([tree.data, np.ones(len(roots))]), ends), shape=(size + 1, size + 1)).tocsr()
    parent = csgraph.breadth_first_order(rooted, size, directed=False)[1]
    parent[size] = size
    worst = np.zeros(size + 1, np.int64)
    is_child = parent[tree.row] == tree.col
    worst[np.where(is_child, tree.row, tree.col)] = tree.data.astype(np.int64)
    worst[roots] = 0
    while (parent != size).any():  # each round doubles the length of path that is covered
        worst, parent = np.maximum(worst, worst[parent]), parent[parent]
    return root, np.where(worst[:size] > 0, times[np.maximum(worst[:size] - 2, 0)], created)
