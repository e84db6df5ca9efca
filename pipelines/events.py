"""The event vocabulary, and the check that every row passes on its way from raw to clean.

In: frames whose columns have the names of the events table. Out: the rows that pass, and the others with a reason. Never
drops or mends a row: whoever calls decides what becomes of the rejected ones.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache

import pandas as pd
import pandera.pandas as pa
from pandera.errors import SchemaErrors

from pipelines.settings import IngestSettings

TYPES = (
    "view", "cart_add", "cart_remove", "cart_view", "wishlist", "checkout", "search", "purchase", "return",
    "click", "exposure", "identify", "consent", "page", "custom",
)  # fmt: skip
ITEM_TYPES = ("view", "cart_add", "cart_remove", "wishlist", "purchase")  # mean nothing without an item
ORDER_TYPES = ("purchase", "return")  # carry revenue; a return without items is that of the whole order

# https://segment.com/docs/connections/spec/ecommerce/v2/ ; compared without regard to case. Unknown names are `custom`.
SEGMENT_NAMES = {
    "Product Viewed": "view",
    "Product Added": "cart_add",
    "Product Removed": "cart_remove",
    "Product Added to Wishlist": "wishlist",
    "Wishlist Product Added to Cart": "cart_add",
    "Cart Viewed": "cart_view",
    "Checkout Started": "checkout",
    "Checkout Step Viewed": "checkout",
    "Checkout Step Completed": "checkout",
    "Payment Info Entered": "checkout",
    "Products Searched": "search",
    "Order Completed": "purchase",
    "Order Refunded": "return",
    "Order Cancelled": "return",
    "Product Clicked": "click",
    "Promotion Clicked": "click",
    "Recommendation Clicked": "click",
    "Product List Viewed": "exposure",
    "Promotion Viewed": "exposure",
    "Recommendation Shown": "exposure",
    "Recommendation Viewed": "exposure",
    "Experiment Viewed": "exposure",
    "Consent Updated": "consent",
    "Segment Consent Preference": "consent",
    "Segment Consent Preference Updated": "consent",
}
SEGMENT_CALLS = {"identify": "identify", "alias": "identify", "page": "page", "screen": "page", "group": "custom"}

# In the order in which they are tried: a row is set aside for the first that applies.
REASONS = {
    "not_text": "the line holds bytes that are not text in the file's encoding",
    "too_long": "the line is longer than any event can be",
    "not_json": "the line is not one JSON object",
    "column_count": "the row has another number of columns than the file",
    "unbalanced_quotes": "the row opens a quote that it does not close",
    "type_unknown": "the row's type is not one that the mapping or the Segment spec names",
    "event_id_missing": "the row has no message id",
    "time_unreadable": "the event's time is missing or cannot be read",
    "time_in_future": "the event lies further after its arrival than a clock may be wrong",
    "time_too_old": "the event lies further before its arrival than events are accepted for",
    "identifier_missing": "the row names no user, anonymous visitor or e-mail address",
    "item_missing": "the row's type needs an item and names none",
    "quantity_invalid": "the quantity is not a whole number from 1 to 1,000,000",
    "price_invalid": "the price is not a number from 0 to 10,000,000,000",
}

UNREADABLE = -(2**62)  # stands for a quantity or price that was given but is not a number
MAX_QUANTITY = 1_000_000
MAX_PRICE_CENTS = 1_000_000_000_000  # times the largest quantity it still fits 64 bits
EARLIEST = datetime(1990, 1, 1, tzinfo=UTC)  # no shop kept events before; a clock that was never set says 1970

# Values that programs send where they know nobody: joining on them would make one person out of thousands.
NOBODY = ("", "null", "none", "nil", "nan", "undefined", "unknown", "anonymous", "guest", "[object object]", "n/a")


@dataclass(frozen=True)
class Checked:
    """`clean`: the rows that pass, index kept. `rejected`: index, reason (a code of REASONS), detail; one row per refused row."""

    clean: pd.DataFrame
    rejected: pd.DataFrame


def email_identifier(address: str) -> str:
    """The identifier of an e-mail address: "email:" and the SHA-256 of its trimmed, lower-cased form; never the address."""
    return "email:" + hashlib.sha256(address.strip().lower().encode()).hexdigest()


def validate(frame: pd.DataFrame, limits: IngestSettings | None = None) -> Checked:
    """Tell the rows that may become events from those that may not.

    frame: the columns of CLEAN, any others untouched; `created_timestamp` is the receipt, null where nobody noted it (the
    event is then judged by its own time alone). A unique index. All checks run, on whole columns.
    Raises KeyError if the frame lacks a column.
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
        },
        parsers=pa.Parser(_with_derived),
    )


def _with_derived(rows: pd.DataFrame) -> pd.DataFrame:
    """What rules on absence and over several columns look at, as columns.

    pandera reports a failed frame-wide check once for every column, and nulls among its failure cases cost it warnings.
    """
    return rows.assign(
        lead=rows["event_timestamp"] - rows["created_timestamp"],  # null, and not judged, where nobody noted the receipt
        has_type=rows["type"].notna(),
        has_id=rows["event_id"].notna(),
        has_time=rows["event_timestamp"].notna(),
        has_identifier=rows["user_id"].notna() | rows["anonymous_id"].notna(),
        has_item=rows["item_id"].notna() | ~rows["type"].isin(ITEM_TYPES),
    )


def _column(*checks: pa.Check) -> pa.Column:
    return pa.Column(checks=list(checks), nullable=True)


def _holds(reason: str) -> pa.Column:
    return pa.Column(checks=pa.Check.eq(True, error=reason))


CLEAN = _schema(IngestSettings().max_future_minutes, IngestSettings().max_age_days)
