"""Feature frame -> points on one scale: nulls filled, skewed columns on a log scale, outliers drawn in, unit spread.

In: numbers and booleans by column. Out: an array without nulls, one column for each feature that tells customers apart. What was
learned from one frame is applied to any other as it is. Never sees a label.
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SKEW_LIMIT = 1.0  # sample skewness beyond which a column is called highly skewed (Bulmer 1979, ch. 5)
TAIL = 0.01  # share at either end that counts as outlying: drawn in to where it begins


@dataclass(frozen=True)
class Column:
    """How one feature is scaled. `unit`: of the log scale, the median of its positive values; 0 where the scale is not a log."""

    name: str
    fill: float
    unit: float
    low: float
    high: float
    center: float
    spread: float

    def apply(self, values: Floats) -> Floats:
        """The values (n,) on the common scale."""
        filled = np.where(np.isnan(values), self.fill, values)
        if self.unit:
            filled = np.log1p(np.maximum(filled, 0.0) / self.unit)
        return (np.clip(filled, self.low, self.high) - self.center) / self.spread


@dataclass(frozen=True)
class Scaling:
    """The scaling of a frame. `dropped`: features that are empty or the same for nearly everybody; they tell nobody apart."""

    names: tuple[str, ...]
    columns: tuple[Column, ...]
    dropped: tuple[str, ...]

    @classmethod
    def learn(cls, features: pd.DataFrame) -> Self:
        """Raises ValueError on no rows, a column twice, values that are no numbers or infinite, or no column that tells apart."""
        names = tuple(sorted(_check_names(features)))  # an order of its own, so that the frame's makes no difference
        learned = {name: _learn(name, numbers(features, name)) for name in names}
        columns = tuple(column for column in learned.values() if column is not None)
        if not columns:
            raise ValueError(f"Segmenter: no column tells customers apart; {list(names)} are empty or the same for nearly everybody")
        return cls(names, columns, tuple(name for name, column in learned.items() if column is None))

    def apply(self, features: pd.DataFrame) -> Floats:
        """Points (n, d) of a frame with the columns of `learn`, in any order, and perhaps others."""
        absent = [name for name in self.names if name not in features.columns]
        if absent:
            raise ValueError(f"Segmenter: expected the columns of fit, {list(self.names)}; {absent} are missing")
        return np.column_stack([column.apply(numbers(features, column.name)) for column in self.columns])

    def to_json(self) -> dict[str, Any]:
        """As `from_json` takes it."""
        return {"names": list(self.names), "columns": [asdict(column) for column in self.columns], "dropped": list(self.dropped)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Self:
        """The scaling as it was saved."""
        return cls(tuple(saved["names"]), tuple(Column(**column) for column in saved["columns"]), tuple(saved["dropped"]))


def numbers(features: pd.DataFrame, name: str) -> Floats:
    """A column as floats (n,), null as NaN. Raises ValueError where it holds anything but finite numbers, booleans and nulls."""
    column = features[name]
    if isinstance(column, pd.DataFrame):
        raise ValueError(f"Segmenter: expected each column once, found {name} {column.shape[1]} times")
    if column.isna().all():
        return np.full(len(column), np.nan)
    try:
        if pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_string_dtype(column.dropna()):
            raise TypeError(column.dtype)
        values: Floats = np.asarray(column.astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Segmenter: {name} must hold numbers, found {column.dtype}; turn times into ages, leave text out") from error
    if np.isinf(values).any():
        raise ValueError(f"Segmenter: {name} holds infinite values; mend what it is divided by")
    return values


def _check_names(features: pd.DataFrame) -> tuple[str, ...]:
    if features.empty:
        raise ValueError(f"Segmenter: expected rows and columns to learn from, found shape {features.shape}")
    names = list(features.columns)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"Segmenter: expected columns with names, found {names}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Segmenter: expected each column once, found {twice} twice")
    return tuple(names)


def _learn(name: str, values: Floats) -> Column | None:
    known = values[~np.isnan(values)]
    if not known.size:
        return None
    fill, unit = float(np.median(known)), 0.0
    filled = np.where(np.isnan(values), fill, values)
    if known.min() >= 0 and _skewness(known) > SKEW_LIMIT:
        unit = float(np.median(known[known > 0]))
        filled = np.log1p(filled / unit)
    low, high = (float(value) for value in np.quantile(filled, [TAIL, 1 - TAIL]))
    drawn_in = np.clip(filled, low, high)
    spread = float(drawn_in.std())
    if spread <= 1e-9 * max(1.0, abs(low), abs(high)):
        return None
    return Column(name, fill, unit, low, high, float(drawn_in.mean()), spread)


def _skewness(values: Floats) -> float:
    centered = values - values.mean()
    variance = float(np.mean(centered**2))
    return float(np.mean(centered**3) / variance**1.5) if variance > 0 else 0.0
