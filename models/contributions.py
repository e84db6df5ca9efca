"""One row -> what each feature adds to the sum of a booster's trees: exact Shapley values, as LightGBM's `pred_contrib` gives them but for
the last digits, looked up instead of worked out.

What a leaf adds to the features on its path hangs only on which way the row goes at each node there. Leaves of a tree that share nodes
share a table, worked out beforehand: a line for every outcome at these nodes. A row is then one comparison at all nodes, one line of each
table, and a sum by feature. Where tables would be too large LightGBM works it out.

Sources: Lundberg et al., Nature Machine Intelligence 2020 (Shapley values of trees); Yang, "Fast TreeSHAP", 2021 (tables of outcomes).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from models.branching import Branching, Flags, Floats, Integers, Node
from models.single_row import CONTRIBUTIONS, SingleRow

if TYPE_CHECKING:
    import lightgbm as lgb

TOGETHER = 8  # nodes of one table, unless there are more above a single leaf
DEEPEST = 12  # nodes above a leaf
MOST_NUMBERS = 4_000_000  # in the tables of a booster: 32 MB

_BITS = 16  # of an outcome: the i-th is 1 where the row goes left at the i-th node of the table


class Contributions:
    """Keeps the booster alive. Tables are made for the first row that is asked about, in some tenths of a second."""

    def __init__(self, booster: "lgb.Booster") -> None:
        self._booster = booster
        self._ask: Tables | SingleRow | None = None

    def __call__(self, row: Floats) -> Floats:
        """What each feature adds for one row (n_features,), in an array of its own. Raises LightGBMError where LightGBM refuses it."""
        if self._ask is None:
            self._ask = Tables.of(self._booster) or SingleRow(self._booster, CONTRIBUTIONS)
        return self._ask(row)[: len(row)]


@dataclass(frozen=True)
class Tables:
    """The tables of a booster, one after another in `numbers`: its lines, each with a number for each feature that its nodes look at. The
    cells are what a row finds: the numbers of one line of each.
    """

    n_features: int
    is_left: Branching  # at `_BITS` nodes for each table
    start: Integers  # (tables,) its first line
    width: Integers  # (tables,) of its lines
    table: Integers  # (cells,)
    column: Integers  # (cells,) in the line
    feature: Integers  # (cells,)
    numbers: Floats

    @classmethod
    def of(cls, booster: "lgb.Booster") -> Self | None:
        """None where they would be too large."""
        groups: list[_Group] = []
        n_numbers = 0
        for tree in booster.dump_model()["tree_info"]:
            for group in _groups(tree["tree_structure"]):
                n_numbers += 2 ** len(group.nodes) * len(group.features)
                if len(group.nodes) > DEEPEST or n_numbers > MOST_NUMBERS:
                    return None
                groups.append(group)
        nodes = [node for group in groups for node in (*group.nodes.values(), *[None] * (_BITS - len(group.nodes)))]
        lines, width = [group.lines() for group in groups], np.array([len(group.features) for group in groups], dtype=np.int64)
        return cls(
            booster.num_feature(),
            Branching.of(nodes, booster.num_feature()),
            start=np.cumsum([0, *(one.size for one in lines)])[:-1],
            width=width,
            table=np.repeat(np.arange(len(groups)), width),
            column=np.array([column for group in groups for column in range(len(group.features))], dtype=np.int64),
            feature=np.array([feature for group in groups for feature in group.features], dtype=np.int64),
            numbers=np.concatenate([np.empty(0), *(one.ravel() for one in lines)]),
        )

    def __call__(self, row: Floats) -> Floats:
        """See Contributions."""
        outcome = np.packbits(self.is_left(row), bitorder="little").view(np.dtype("<u2"))
        found = self.numbers.take((self.start + outcome * self.width).take(self.table) + self.column)
        return np.bincount(self.feature, weights=found, minlength=self.n_features).astype(np.float64, copy=False)


# -- private -----------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """From a node towards a leaf. share: of the rows in training that came to the node, those that went this way."""

    node: Node
    is_left: bool
    share: float


class _Leaf(NamedTuple):
    """What it says, and the way there."""

    value: float
    path: tuple[_Step, ...]


@dataclass(frozen=True)
class _Group:
    """Leaves that share a table, and the nodes above them by their number in the tree."""

    leaves: list[_Leaf]
    nodes: dict[int, Node]

    @property
    def features(self) -> list[int]:
        """That the nodes look at."""
        return sorted({node["split_feature"] for node in self.nodes.values()})

    def lines(self) -> Floats:
        """What the leaves add to each feature (outcomes, features)."""
        features, bit = self.features, {number: i for i, number in enumerate(self.nodes)}
        is_left = (np.arange(2 ** len(bit)) >> np.arange(len(bit))[:, None]) & 1 == 1
        found = np.zeros((is_left.shape[1], len(features)))
        for value, path in self.leaves:
            met, shares = [], []
            looked_at = sorted({step.node["split_feature"] for step in path})
            for feature in looked_at:  # a path may look at a feature several times
                steps = [step for step in path if step.node["split_feature"] == feature]
                met.append(np.all([is_left[bit[step.node["split_index"]]] == step.is_left for step in steps], axis=0))
                shares.append(prod(step.share for step in steps))
            found[:, [features.index(feature) for feature in looked_at]] += value * _shapley(np.array(met), np.array(shares)).T
        return found


def _groups(tree: Node) -> Iterator[_Group]:
    """All leaves of a tree that has more than one, each in one group."""
    group = _Group([], {})
    for leaf in _leaves(tree, ()):
        above = {step.node["split_index"]: step.node for step in leaf.path}
        if group.leaves and len(group.nodes | above) > TOGETHER:
            yield group
            group = _Group([], {})
        group.leaves.append(leaf)
        group.nodes.update(above)
    if group.nodes:
        yield group


def _leaves(node: Node, path: tuple[_Step, ...]) -> Iterator[_Leaf]:
    """Those under the node, to which the path leads, from left to right."""
    if "leaf_value" in node:
        yield _Leaf(node["leaf_value"], path)
        return
    for side in ("left_child", "right_child"):
        child = node[side]
        share = child.get("internal_count", child.get("leaf_count")) / node["internal_count"]
        yield from _leaves(child, (*path, _Step(node, side == "left_child", share)))


def _shapley(met: Flags, share: Floats) -> Floats:
    """Of a game whose worth is 1, what each player adds (players, outcomes). A player who is in multiplies the worth by `met`
    (players, outcomes), one who is not by `share` (players,).

    A player joins at a time that is uniform on [0, 1], after the others with a probability of just that time: an integral over time of a
    polynomial, for which a Gauss rule of half as many nodes as there are players is exact.
    """
    time, weights = _gauss_rule((len(met) + 1) // 2)
    time, share = time[:, None, None], share[:, None]
    worth = time * met + (1 - time) * share
    one = np.ones_like(worth[:, :1])
    # products of all before and of all after, not of all over one's own, which may be 0
    before = np.cumprod(np.concatenate([one, worth[:, :-1]], axis=1), axis=1)
    after = np.cumprod(np.concatenate([one, worth[:, :0:-1]], axis=1), axis=1)[:, ::-1]
    return np.asarray((met - share) * np.tensordot(weights, before * after, axes=1))


@cache
def _gauss_rule(n: int) -> tuple[Floats, Floats]:
    """Nodes and weights (n,) of an integral over [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return (nodes + 1) / 2, weights / 2
