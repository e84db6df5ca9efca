"""The contract of a clean event: the checks that every row passes on its way from raw to clean.

In: frames whose columns have the names of the events table. Out: the rows that pass, and the others with a reason. Never
drops or mends a row: whoever calls decides what becomes of the rejected ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import pandas as pd
import pandera.pandas as pa
from pandera.errors import SchemaErrors

from pipelines.events import EARLIEST, ITEM_TYPES, MAX_PRICE_CENTS, MAX_QUANTITY, ORDER_TYPES, REASONS, TYPES, UNREADABLE
from pipelines.settings import IngestSettings

# What is judged of a row; the last two where there are such columns.
CHECKED = (
    "type", "event_id", "event_timestamp", "created_timestamp", "user_id", "anonymous_id", "item_id", "quantity", "price_cents",
    "order_id", "consent",
)  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """`clean`: the rows that pass, index kept. `rejected`: index, reason (a code of REASONS), detail; one row per refused row."""

    clean: pd.DataFrame
    rejected: pd.DataFrame


def validate(frame: pd.DataFrame, limits: IngestSettings | None = None) -> Checked:
    """Tell the rows that may become events from those that may not.

    frame: the columns of CLEAN, any others untouched; `created_timestamp` is the receipt, null where nobody noted it (the
    event is then judged by its own time alone). A unique index. All checks run, on whole columns.
    `order_id` and `consent` are judged where the frame has them. A return without its purchase is not seen here: see `quality`.
    Raises KeyError if the frame lacks another column.
    """
    limits = limits or IngestSettings()
    try:
        _schema(limits.max_future_minutes, limits.max_age_days).validate(frame, lazy=True)
    except SchemaErrors as error:
        if error.failure_cases["index"].isna().any():
            raise  # a column of another type: the caller's defect, not a row's
        rejected = _first_reasons(error.failure_cases)
        return Checked(frame.loc[~frame.index.isin(rejected["index"])], rejected)
    return Checked(frame, _REJECTED.copy())


def passes_sql(limits: IngestSettings | None = None, columns: Mapping[str, str] | None = None) -> str:
    """SQL: whether a row is sure to pass `validate`; true or false, never null. False means that `validate` has to say.

    columns: names of CHECKED that are called something else -> their expressions; "NULL" for one that there is not.
    """
    limits = limits or IngestSettings()
    names = {name: name for name in CHECKED} | dict(columns or {})
    kind, lead = names["type"], f"epoch_us({names['event_timestamp']}) - epoch_us({names['created_timestamp']})"
    return f"""coalesce({kind} IN {TYPES} AND {names["event_id"]} IS NOT NULL AND {names["event_timestamp"]} >= TIMESTAMPTZ '{EARLIEST}'
        AND ({names["user_id"]} IS NOT NULL OR {names["anonymous_id"]} IS NOT NULL)
        AND ({names["item_id"]} IS NOT NULL OR {kind} NOT IN {(*ITEM_TYPES, "return")} OR {names["order_id"]} IS NOT NULL
            AND ({kind} = 'return' OR {kind} = 'purchase' AND {names["price_cents"]} IS NOT NULL))
        AND ({kind} <> 'consent' OR {names["consent"]} IS NOT NULL)
        AND CASE WHEN {names["quantity"]} IS NULL THEN {kind} NOT IN {ORDER_TYPES} ELSE {names["quantity"]} BETWEEN 1 AND {MAX_QUANTITY} END
        AND coalesce({names["price_cents"]} BETWEEN 0 AND {MAX_PRICE_CENTS}, true)
        AND coalesce({lead} BETWEEN {-limits.max_age_days * 86_400_000_000} AND {limits.max_future_minutes * 60_000_000}, true), false)"""


_REJECTED = pd.DataFrame({"index": pd.Series(dtype="int64"), "reason": pd.Series(dtype="str"), "detail": pd.Series(dtype="str")})
_RANK = {reason: rank for rank, reason in enumerate(REASONS)}


def _first_reasons(cases: pd.DataFrame) -> pd.DataFrame:
    """One row per refused row: the first of its reasons, in the order of REASONS, and what was found."""
    first = cases.assign(rank=cases["check"].map(_RANK)).sort_values(["index", "rank"], kind="stable").drop_duplicates("index")
    found = first["failure_case"].astype("str").mask(first["failure_case"] == UNREADABLE, "not a number")
    detail = (first["column"].astype("str") + ": " + found).mask(first["column"].str.startswith("has_"), "")
    return pd.DataFrame({"index": first["index"].astype("int64"), "reason": first["check"].astype("str"), "detail": detail}).reset_index(
        drop=True
    )


@cache
def _schema(max_future_minutes: int, max_age_days: int) -> pa.DataFrameSchema:
    future, age = pd.Timedelta(minutes=max_future_minutes), pd.Timedelta(days=max_age_days)
    return pa.DataFrameSchema(
        {
            "type": _column(pa.Check.isin(TYPES, error="type_unknown")),
            "event_timestamp": _column(pa.Check.ge(EARLIEST, error="time_too_old")),
            "quantity": _column(pa.Check.in_range(1, MAX_QUANTITY, error="quantity_invalid")),
            "price_cents": _column(pa.Check.in_range(0, MAX_PRICE_CENTS, error="price_invalid")),
            "lead": _column(pa.Check.le(future, error="time_in_future"), pa.Check.ge(-age, error="time_too_old")),
            "has_type": _holds("type_unknown"),
            "has_id": _holds("event_id_missing"),
            "has_time": _holds("time_unreadable"),
            "has_identifier": _holds("identifier_missing"),
            "has_item": _holds("item_missing"),
            "has_order": _holds("order_empty"),
            "has_return": _holds("return_empty"),
            "has_consent": _holds("consent_missing"),
            "has_quantity": _holds("quantity_missing"),
        },
        parsers=pa.Parser(_with_derived),
    )


def _with_derived(rows: pd.DataFrame) -> pd.DataFrame:
    """What rules on absence and over several columns look at, as columns.

    pandera reports a failed frame-wide check once for every column, and nulls among its failure cases cost it warnings.
    """
    item, kind = rows["item_id"].notna(), rows["type"]
    has_order = rows["order_id"].notna() if "order_id" in rows else pd.Series(False, rows.index)
    is_of_order = kind.isin(["purchase"]) & has_order & ~item  # known by its amount alone
    return rows.assign(
        lead=rows["event_timestamp"] - rows["created_timestamp"],  # null, and not judged, where nobody noted the receipt
        has_type=kind.notna(),
        has_id=rows["event_id"].notna(),
        has_time=rows["event_timestamp"].notna(),
        has_identifier=rows["user_id"].notna() | rows["anonymous_id"].notna(),
        has_item=item | ~kind.isin(ITEM_TYPES) | is_of_order,
        has_order=~is_of_order | rows["price_cents"].notna(),
        has_return=~kind.isin(["return"]) | item | has_order | ("order_id" not in rows),
        has_consent=~kind.isin(["consent"]) | (rows["consent"].notna() if "consent" in rows else True),
        has_quantity=~kind.isin(ORDER_TYPES) | rows["quantity"].notna() | ~item,
    )


def _column(*checks: pa.Check) -> pa.Column:
    return pa.Column(checks=list(checks), nullable=True)


def _holds(reason: str) -> pa.Column:
    return pa.Column(checks=pa.Check.eq(True, error=reason))


CLEAN = _schema(IngestSettings().max_future_minutes, IngestSettings().max_age_days)
