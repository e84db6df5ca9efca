"""What a feature view says of some keys: online as serving reads it, and offline as a training frame has it. And where they differ.

In: an open Feast store, a view, keys, instants. Out: one row of values for each key, in order. Counts are 0 where nothing is stored, as
for training and serving (`windows.derive`). Reads no clock and writes nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipelines import windows

if TYPE_CHECKING:
    from feast import FeatureStore

Key = tuple[str, ...]
Value = str | int | float | bool | None
Values = dict[str, Value]

EXAMPLES = 5
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class View:
    """A feature view: the columns of its key, in the order of its declaration, and its features."""

    name: str
    keys: tuple[str, ...]
    features: tuple[str, ...]

    def refs(self) -> list[str]:
        """Its features as Feast calls them."""
        return [f"{self.name}:{feature}" for feature in self.features]


@dataclass(frozen=True)
class Difference:
    """One value that differs, of nobody in particular. `at`: the instant it was asked for, UTC."""

    feature: str
    online: Value
    offline: Value
    at: str


@dataclass
class Comparison:
    """Values compared, those that differ by feature ("view:feature"), and some of them."""

    checked: int = 0
    by_feature: Counter[str] = field(default_factory=Counter)
    examples: list[Difference] = field(default_factory=list)

    @property
    def mismatches(self) -> int:
        """Values that differ."""
        return self.by_feature.total()

    def add(self, view: View, online: Mapping[str, Value], offline: Mapping[str, Value], at_us: int) -> None:
        """Compare two rows of a view, to the last bit."""
        self.checked += len(view.features)
        for feature in unequal(view, online, offline):
            self.note(f"{view.name}:{feature}", online.get(feature), offline.get(feature), at_us)

    def note(self, feature: str, online: Value, offline: Value, at_us: int) -> None:
        """One value that differs."""
        if self.by_feature[feature] == 0 or len(self.examples) < EXAMPLES:
            self.examples.append(Difference(feature, online, offline, instant(at_us).isoformat()))
        self.by_feature[feature] += 1

    def __iadd__(self, other: "Comparison") -> "Comparison":
        """Both together."""
        self.checked += other.checked
        self.by_feature += other.by_feature
        self.examples = (self.examples + other.examples)[: max(EXAMPLES, len(self.by_feature))]
        return self


def instant(time_us: int) -> datetime:
    """Microseconds since 1970 as UTC."""
    return EPOCH + timedelta(microseconds=time_us)


def micros(at: Any) -> int:
    """The reverse, of an aware time."""
    return int((at - EPOCH) // timedelta(microseconds=1))


def view_of(feast: "FeatureStore", name: str) -> View:
    """The view as it was applied."""
    declared = feast.get_feature_view(name)
    return View(name, tuple(column.name for column in declared.entity_columns), tuple(field.name for field in declared.features))


def online(feast: "FeatureStore", view: View, keys: Sequence[Key]) -> list[Values]:
    """What is served of the keys now."""
    if not keys:
        return []
    rows = [dict(zip(view.keys, key, strict=True)) for key in keys]
    found = feast.get_online_features(features=view.refs(), entity_rows=rows).to_dict()
    return [filled({name: found[name][place] for name in view.features}) for place in range(len(keys))]


def offline(feast: "FeatureStore", view: View, asked: Sequence[tuple[Key, int]]) -> list[Values]:
    """What a training frame has of each key at its instant (microseconds): the state of everything up to and including that instant.

    A training frame takes what is strictly before an instant, so one microsecond later is asked for: instants are whole microseconds.
    """
    if not asked:
        return []
    rows = pd.DataFrame([key for key, _ in asked], columns=list(view.keys))
    rows["event_timestamp"] = pd.to_datetime([at_us + 1 for _, at_us in asked], unit="us", utc=True).astype("datetime64[us, UTC]")
    found: Any = feast.get_historical_features(rows, view.refs()).to_arrow()
    columns = {name: found[name].to_pylist() for name in view.features}
    return [filled({name: column[place] for name, column in columns.items()}) for place in range(len(asked))]


def filled(values: Mapping[str, Value]) -> Values:
    """The values with 0 for a count of nothing."""
    return {name: 0 if value is None and name in windows.COUNTS else value for name, value in values.items()}


def unequal(view: View, one: Mapping[str, Value], other: Mapping[str, Value]) -> list[str]:
    """The features that are not the same in both, by value and by type."""
    return [name for name in view.features if repr(one.get(name)) != repr(other.get(name))]
