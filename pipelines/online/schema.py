"""What an online store was made for: its views, their join keys, their features and their types, as `rapport features apply` left them.

In: the declarations of feature_repo as plain data. Out: the same, read back from the store, so that a writer that does not know Feast
refuses a row which the store was not made for. Never opens a store.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.errors import InputError, StoreError
from pipelines.online.feast_format import JoinKey, Value, table_of

MEND = "run `rapport features apply`"
TABLE = "declared_views"  # beside Feast's tables, and named unlike them
_CLUSTERED = "WITHOUT ROWID"

# Feast's names of types -> the Python type whose values they take, and the type in Arrow
KINDS: Mapping[str, type] = {"String": str, "Int64": int, "Float64": float, "Bool": bool}
_ARROW = {
    "String": ("string", "large_string"),
    "Int64": ("int64", "int32", "int16", "int8"),
    "Float64": ("double", "float"),
    "Bool": ("bool",),
}


@dataclass(frozen=True)
class ViewSchema:
    """Of one view. `join_key`: in the order of the declaration; `features`: name -> Feast's name of its type."""

    join_key: JoinKey
    features: Mapping[str, str]


Schema = Mapping[str, ViewSchema]  # by view


def of(views: Iterable[Any]) -> dict[str, ViewSchema]:
    """Of Feast's feature views. Raises InputError for a type that the online stores do not keep."""
    found = {}
    for view in views:
        keys = tuple(column.name for column in view.entity_columns)
        features = {field.name: str(field.dtype) for field in view.features}
        odd = [f"{name} ({kind})" for name, kind in features.items() if kind not in KINDS]
        if odd:
            raise InputError(
                f"features: {view.name} declares {', '.join(odd)}; the online store keeps {', '.join(KINDS)}: use one of these"
            )
        found[view.name] = ViewSchema(keys[0] if len(keys) == 1 else keys, features)
    return found


def differences(stored: Schema, declared: Schema) -> list[str]:
    """What the declarations say that a store or registry does not, and the other way round; in words, empty where they agree."""
    told = [f"the view {name} is new" for name in declared if name not in stored]
    told += [f"the view {name} is declared no more" for name in stored if name not in declared]
    for name in declared.keys() & stored.keys():
        if declared[name].join_key != stored[name].join_key:
            told.append(f"{name} has the join key {declared[name].join_key}, before {stored[name].join_key}")
        mine, theirs = declared[name].features, stored[name].features
        told += [f"{name}:{f} is {mine.get(f, 'gone')}, before {theirs.get(f, 'not there')}" for f in mine if mine[f] != theirs.get(f)]
        told += [f"{name}:{f} is declared no more" for f in theirs if f not in mine]
    return sorted(told)


def check_same(stored: Schema, declared: Schema, where: str) -> None:
    """Raises StoreError where a store or registry was made for other declarations than these."""
    if told := differences(stored, declared):
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        raise StoreError(f"features: {where} was made by other definitions ({'; '.join(told[:3])}{more}); {MEND}")


def view_of(schema: Schema, view: str, features: Iterable[str], join_key: JoinKey, where: str) -> ViewSchema:
    """The view. Raises StoreError where the store was not made for it, for one of these features, or for this join key."""
    found = schema.get(view)
    unknown = [name for name in features if found is None or name not in found.features]
    if found is None or unknown:
        what = f"the features {unknown} of {view}" if found else f"the view {view}"
        raise StoreError(f"online store: {where} was made without {what}; {MEND}, and start the stream again")
    if found.join_key != join_key:
        raise StoreError(f"online store: in {where}, {view} has the join key {found.join_key}, expected {join_key}; {MEND}")
    return found


def checked(view: str, kinds: Mapping[str, str], values: Mapping[str, Value]) -> Mapping[str, Value]:
    """The values; whole numbers as floats where the feature is one. Raises InputError where one is not of its feature's type."""
    floats = {}
    for name, value in values.items():
        kind = kinds[name]
        if value is None or type(value) is KINDS[kind]:
            continue
        if kind != "Float64" or type(value) is not int:
            raise InputError(
                f"online store: {view}:{name} takes {kind}, found {type(value).__name__}; nothing was written, mend the writer"
            )
        floats[name] = float(value)
    return {**values, **floats} if floats else values


def check_columns(view: str, kinds: Mapping[str, str], columns: Mapping[str, str]) -> None:
    """Raises InputError where a column's type in Arrow is not the feature's. columns: name -> Arrow's name of its type."""
    for name, found in columns.items():
        if found not in (*_ARROW[kinds[name]], "null"):
            raise InputError(f"online store: {view}:{name} takes {kinds[name]}, found a column of {found}; cast it where the table is made")


def dump(schema: Schema) -> str:
    """As JSON."""
    return json.dumps({name: [view.join_key, dict(view.features)] for name, view in schema.items()})


def load(text: str | bytes) -> dict[str, ViewSchema]:
    """The inverse of `dump`."""
    found = json.loads(text)
    return {name: ViewSchema(key if isinstance(key, str) else tuple(key), features) for name, (key, features) in found.items()}


def put(db: sqlite3.Connection, schema: Schema) -> None:
    """Note in a SQLite store what it is made for. Made anew, so that open connections see that the file's schema changed."""
    db.execute(f"DROP TABLE IF EXISTS {TABLE}")
    db.execute(f"CREATE TABLE {TABLE} (views TEXT NOT NULL)")
    db.execute(f"INSERT INTO {TABLE} VALUES (?)", (dump(schema),))


def cluster(db: sqlite3.Connection, view: str) -> None:
    """Keep the view's cells by their key alone. Feast numbers them and keeps the keys in an index beside: a quarter more to write.

    A store that has them so is rewritten, once. Inside a transaction; who has the file open goes on.
    """
    table = table_of(view)
    (made,) = db.execute("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)).fetchone()
    if made.endswith(_CLUSTERED):
        return
    indexes = db.execute("SELECT sql FROM sqlite_master WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL", (table,)).fetchall()
    db.execute(f'ALTER TABLE "{table}" RENAME TO "{table}_numbered"')
    db.execute(f"{made} {_CLUSTERED}")
    db.execute(f'INSERT INTO "{table}" SELECT * FROM "{table}_numbered" ORDER BY entity_key, feature_name')
    db.execute(f'DROP TABLE "{table}_numbered"')
    for (index,) in indexes:  # the stream's, who makes them when it starts
        db.execute(index)


def get(db: sqlite3.Connection) -> dict[str, ViewSchema]:
    """What a SQLite store was made for; nothing where that was never noted."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (TABLE,)).fetchone() is None:
        return {}
    return load(db.execute(f"SELECT views FROM {TABLE}").fetchone()[0])
