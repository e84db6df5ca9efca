"""Nodes of LightGBM's trees and a row -> at which of them the row goes left, all asked at once. Knows no tree.

Source: LightGBM's `Tree::NumericalDecision` and `Tree::CategoricalDecision`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Node = Mapping[str, Any]  # as `Booster.dump_model` has it

_IN, _BETWEEN, _OUT = 0.0, 0.5, 1.0  # of a set of categories
_INFINITE = 1e300  # what `dump_model` writes for thresholds that are


@dataclass(frozen=True)
class Branching:
    """Each node compares one value with its threshold. The values are the row's, the same with a missing one lower than all, and for each
    set of categories whether the row's is in it.
    """

    values: Integers  # (nodes,) which one
    thresholds: Floats  # (nodes,) up to which the row goes left; NaN: never
    set_features: Integers  # (sets,) whose category it is about
    sets: Floats  # (sets, categories + 1) `_IN` or `_OUT` for each category; the last is any other

    @classmethod
    def of(cls, nodes: Sequence[Node | None], n_features: int) -> Self:
        """None stands for a node where no row goes left. Raises ValueError on trees to which a zero is a missing value."""
        values, thresholds = np.zeros(len(nodes), dtype=np.int64), np.full(len(nodes), np.nan)
        features: list[int] = []
        members: list[list[int]] = []
        for i, node in enumerate(nodes):
            if node is None:
                continue
            if node["missing_type"] == "Zero":
                raise ValueError("branching: expected trees that tell a zero from a missing value; train them without zero_as_missing")
            if node["decision_type"] == "==":
                values[i], thresholds[i] = 2 * n_features + len(members), _BETWEEN
                features.append(node["split_feature"])
                members.append([int(category) for category in node["threshold"].split("||")])
            else:
                threshold = node["threshold"] if abs(node["threshold"]) < _INFINITE else node["threshold"] * math.inf
                # without missing values in training one is taken for 0
                is_left_if_missing = node["default_left"] if node["missing_type"] == "NaN" else threshold >= 0
                values[i], thresholds[i] = node["split_feature"] + (n_features if is_left_if_missing else 0), threshold
        sets = np.full((len(members), max(map(max, members), default=-1) + 2), _OUT)
        for row, some in zip(sets, members, strict=True):
            row[some] = _IN
        return cls(values, thresholds, np.array(features, dtype=np.int64), sets)

    def __call__(self, row: Floats) -> Flags:
        """(nodes,) for one row (n_features,)."""
        values = [row, np.where(np.isnan(row), -np.inf, row)]  # a missing value is not up to anything
        if len(self.sets):
            values.append(self._set_values(row))
        return np.asarray(np.concatenate(values).take(self.values) <= self.thresholds)

    def _set_values(self, row: Floats) -> Floats:
        categories, others = row.take(self.set_features), self.sets.shape[1] - 1
        is_known = (categories > -1.0) & (categories < others)  # NaN is neither; towards 0 is LightGBM's rounding
        known = np.where(is_known, categories, others).astype(np.int64)
        return self.sets[np.arange(len(known)), known]
