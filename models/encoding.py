"""Columns of features -> the matrix that trees read; and whether rows and labels can be learned from at all.

Numbers stay, booleans become 0 and 1, text becomes the place of its value among those that were learned; null, or text never seen, is NaN.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def check_training(features: pd.DataFrame, label: ArrayLike) -> Floats:
    """The labels (n,) of rows that can be learned from. Raises ValueError."""
    if features.empty:
        raise ValueError(f"Classifier: expected rows and columns to learn from, found shape {features.shape}")
    nameless = [name for name in features.columns if not isinstance(name, str)]
    if nameless:
        raise ValueError(f"Classifier: expected columns with names, found {nameless[:5]}; name them, so that files can tell them apart")
    repeated = features.columns[features.columns.duplicated()].tolist()
    if repeated:
        raise ValueError(f"Classifier: expected each column once, found {repeated} repeatedly; rename or drop them")
    y = check_label(label, len(features))
    if y.min() == y.max():
        raise ValueError(f"Classifier: expected labels of both classes, found only {y[0]:g} in {len(y)} rows; widen the label window")
    return y


def check_label(label: ArrayLike, n_rows: int) -> Floats:
    """Labels 0 or 1 as numbers (n_rows,). Raises ValueError."""
    y = _numbers("label", label)
    if y.shape != (n_rows,):
        raise ValueError(f"Classifier: expected one label for each of {n_rows} rows, found shape {y.shape}")
    wrong = y[(y != 0) & (y != 1)]
    if wrong.size:
        raise ValueError(f"Classifier: labels must be 0 or 1, found {wrong[0]:g} (and {wrong.size - 1} more); drop rows without a label")
    return y


def check_columns(features: pd.DataFrame, names: list[str], what: str) -> None:
    """The columns are these, each once, in any order. Raises ValueError; `what`: whose columns."""
    found = [str(name) for name in features.columns]
    if sorted(found) != sorted(names):
        missing, extra = sorted(set(names) - set(found)), sorted(set(found) - set(names))
        raise ValueError(f"Classifier: {what} must have the columns of fit, each once; missing {missing}, not known {extra}")


def learn_categories(features: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """The sorted values of each text column; none for a column without values, whatever its type."""
    learned: dict[str, tuple[str, ...]] = {}
    for name, column in features.items():
        if column.isna().all():
            learned[str(name)] = ()
        elif _is_text(column):
            learned[str(name)] = tuple(sorted({str(value) for value in column.dropna().unique()}))
    return learned


def _is_text(column: pd.Series) -> bool:
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind in ("string", "categorical"):
        return True
    if kind in ("boolean", "integer", "floating", "mixed-integer-float", "decimal"):
        return False
    raise ValueError(f"Classifier: column {column.name} holds {kind} values; expected numbers, booleans or text (turn times into ages)")


def encoded(columns: Mapping[str, Any] | pd.DataFrame, names: list[str], categories: Mapping[str, tuple[str, ...]]) -> Floats:
    """A new matrix, or where a frame is one already, that one: to be read only."""
    if isinstance(columns, pd.DataFrame) and list(columns) == names and not categories and (columns.dtypes == np.float64).all():
        return columns.to_numpy()
    absent = [name for name in names if name not in columns]
    if absent:
        raise ValueError(f"Classifier: the columns {absent} are missing; expected {names}")
    matrix = np.empty((len(columns[names[0]]), len(names)))
    for j, name in enumerate(names):
        known = categories.get(name)
        values = _numbers(name, columns[name]) if known is None else codes_of(columns[name], known)
        if values.shape != matrix.shape[:1]:
            raise ValueError(f"Classifier: column {name} has shape {values.shape}; expected {matrix.shape[:1]} as the first column")
        matrix[:, j] = values
    return matrix


def _numbers(name: str, values: Any) -> Floats:
    try:
        if isinstance(values, pd.Series):
            return values.to_numpy(dtype=np.float64, na_value=np.nan)
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Classifier: {name} must hold numbers ({error})") from error


def codes_of(values: Any, known: tuple[str, ...]) -> Floats:
    """The place (n,) of each text among those known; NaN of the others and of null."""
    # a single row without pandas needs none of the tools for many
    if len(values) == 1 and not isinstance(values, pd.Series) and (values[0] is None or type(values[0]) is str):
        return np.array([known.index(values[0]) if values[0] in known else np.nan])
    position = {value: float(code) for code, value in enumerate(known)}
    codes, seen = pd.factorize(np.asarray(values, dtype=object))
    return np.array([*(position.get(str(value), np.nan) for value in seen), np.nan])[codes]  # null has code -1: the last
