"""One logged Segment call -> the rows that the ingest would store of it, in Python and one call at a time.

In: a decoded payload, whom it names and when it was received. Out: `CleanRow`s, one for each line of an order, else one; none where
the ingest would refuse the call. The twin of sources/projection.py, ingest/staging.py and contract.py. Numbers and times that are not
written in the plain way are read by the ingest's own SQL. Never looks at other calls, and never judges consent.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from pipelines.events import (
    EARLIEST,
    ITEM_TYPES,
    MAX_PRICE_CENTS,
    MAX_QUANTITY,
    ORDER_TYPES,
    SEGMENT_CALLS,
    SEGMENT_NAMES,
    UNREADABLE,
)
from pipelines.settings import IngestSettings

if TYPE_CHECKING:
    import duckdb

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_DAY_US, _MINUTE_US = 86_400_000_000, 60_000_000
_EARLIEST_US = (EARLIEST - _EPOCH) // _MICROSECOND
_TYPES = {name.lower(): kind for name, kind in SEGMENT_NAMES.items()}
_NEED_ITEM = frozenset((*ITEM_TYPES, "return"))
_COUNTED = frozenset(("cart_add", "cart_remove", *ORDER_TYPES))  # mean one piece where they name no quantity
_NO_LINES = ("[]", "{}")
_REMEMBERED = 10_000  # texts that were read by SQL

# The plain way, which most calls keep to: a decimal, a whole number, an instant in UTC.
_DECIMAL = re.compile(r"(-?)(\d{1,11})(?:\.(\d{1,18}))?", re.ASCII)
_WHOLE = re.compile(r"(-?\d{1,14})(?:\.0+)?", re.ASCII)
_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|\+00:00)", re.ASCII)


class CleanRow(msgspec.Struct, frozen=True):
    """A row of the events table, as far as the online path needs it. Times in microseconds since 1970, UTC."""

    source: str
    event_id: str  # of a line of an order "<message id>:<line>"
    type: str
    event_us: int
    received_us: int  # when we knew; the event's own time where nobody noted the receipt
    who: str  # the main pseudonym
    item_id: str | None
    order_id: str | None
    session_id: str | None  # as the source gave it
    quantity: int | None
    price_cents: int | None
    revenue_cents: int
    allows: tuple[str, ...]  # the purposes that the call itself allows, sorted
    category: str | None = None  # what it says of its item


def read(
    call: Mapping[str, Any],
    *,
    source: str,
    who: str | None,
    logged_us: int,
    limits: IngestSettings,
    message_id: str | None = None,
    said: Mapping[str, bool] | None = None,
) -> tuple[CleanRow, ...]:
    """The rows of one call; none where it is refused. `who`: the main pseudonym, None where it names nobody.

    logged_us: when the log had it, for a call that says no time of receipt. `message_id`, `said`: where they were read already.
    """
    name = message_id or _keyed(call.get("messageId"))
    event_us = instant_us(_first(_text(call.get("timestamp")), _text(call.get("originalTimestamp")), _text(call.get("receivedAt"))))
    received = _text(call.get("receivedAt"))
    received_us = instant_us(received) if received else None
    kind = _kind(call)
    if kind is None or name is None or who is None or event_us is None or not _is_timely(event_us, received_us, logged_us, limits):
        return ()
    properties, context = _object(call.get("properties")), _object(call.get("context"))
    given = given_statement(call) if said is None or kind == "consent" else None
    if kind == "consent" and given is None:
        return ()
    said = statement(given) if said is None else said
    order = _keyed(properties.get("order_id"))
    session = _keyed(context.get("sessionId")) or _keyed(properties.get("session_id"))
    allows = tuple(sorted(purpose for purpose, is_allowed in said.items() if is_allowed))
    known_us = event_us if received_us is None else received_us
    rows = []
    is_listed, lines = _lines(kind, properties)
    for number, (item, quantity, price, category) in enumerate(lines):
        if not _is_good(kind, item, quantity, price, has_order=order is not None and not is_listed):
            return ()
        event_id = f"{name}:{number}" if is_listed else name
        revenue = _revenue(kind, quantity, price)
        rows.append(
            CleanRow(source, event_id, kind, event_us, known_us, who, item, order, session, quantity, price, revenue, allows, category)
        )
    return tuple(rows)


def message_id(call: Mapping[str, Any]) -> str | None:
    """The id under which the call is known, as its payload says it."""
    return _keyed(call.get("messageId"))


def given_statement(call: Mapping[str, Any]) -> Any:
    """What the call says about consent, as it was given: the first that is there; None where nothing is."""
    consent = _object(_object(call.get("context")).get("consent"))
    for found in (consent.get("categoryPreferences"), _object(call.get("properties")).get("categoryPreferences")):
        if found is not None and found != "":
            return found
    return None


def statement(given: Any) -> dict[str, bool]:
    """The same by purpose: only an exact true allows. Empty where nothing is said, or not as an object."""
    if isinstance(given, str):
        try:
            given = msgspec.json.decode(given)
        except msgspec.DecodeError:
            return {}
    return {str(purpose): value is True for purpose, value in given.items()} if isinstance(given, dict) else {}


def instant_us(text: str | None) -> int | None:
    """An ISO 8601 text as microseconds since 1970, UTC where it names no zone; None where it is none."""
    if text is None:
        return None
    if _INSTANT.fullmatch(text):
        try:
            return (datetime.fromisoformat(text) - _EPOCH) // _MICROSECOND
        except ValueError:  # an hour 24, which SQL takes for midnight
            pass
    return _instant_by_sql(text)


def _kind(call: Mapping[str, Any]) -> str | None:
    kind = (_text(call.get("type")) or "").lower()
    if kind != "track":
        return SEGMENT_CALLS.get(kind)
    name = _text(call.get("event")) or _text(call.get("name")) or ""
    return _TYPES.get(name.lower(), "custom")


def _is_timely(event_us: int, received_us: int | None, logged_us: int, limits: IngestSettings) -> bool:
    known_us = min(event_us, logged_us) if received_us is None else received_us
    lead = event_us - known_us
    return event_us >= _EARLIEST_US and -limits.max_age_days * _DAY_US <= lead <= limits.max_future_minutes * _MINUTE_US


_Line = tuple[str | None, int | None, int | None, str | None]


def _lines(kind: str, properties: Mapping[str, Any]) -> tuple[bool, Iterator[_Line]]:
    """Whether they are those of a list of products; item, quantity, price in cents and category of each line."""
    item = _keyed(properties.get("product_id")) or _keyed(properties.get("item_id")) or _keyed(properties.get("sku"))
    price, quantity = _filled(properties.get("price")), _filled(properties.get("quantity"))
    if kind in ORDER_TYPES:
        given = properties.get("products")
        products = _products(given)
        if products:
            return True, (_line(kind, _object(product)) for product in products)
        if item is None and (_filled(given) or "[]") in _NO_LINES:
            # an order without its lines is one piece at its own amount
            quantity = None
            price = next((text for name in ("revenue", "total", "value") if (text := _filled(properties.get(name)))), price)
    return False, iter([(item, _whole(kind, quantity), _cents(price), _filled(properties.get("category")))])


def _line(kind: str, product: Mapping[str, Any]) -> _Line:
    item = next((text for name in ("product_id", "item_id", "sku") if (text := _text(product.get(name))) is not None), None)
    quantity, price = _text(product.get("quantity")), _text(product.get("price"))
    return (item and item.strip(" ")) or None, _whole(kind, quantity), _cents(price), _filled(product.get("category"))


def _products(given: Any) -> Sequence[Any]:
    if isinstance(given, list):
        return given
    if not isinstance(given, str) or not given.lstrip().startswith("["):
        return ()
    try:
        found = msgspec.json.decode(given)
    except msgspec.DecodeError:
        return ()
    return found if isinstance(found, list) else ()


def _is_good(kind: str, item: str | None, quantity: int | None, price: int | None, *, has_order: bool) -> bool:
    """Whether the line keeps the contract; see `contract.passes_sql`."""
    if item is None and kind in _NEED_ITEM and not (has_order and (kind == "return" or (kind == "purchase" and price is not None))):
        return False
    if quantity is None:
        if kind in ORDER_TYPES and item is not None:
            return False
    elif not 1 <= quantity <= MAX_QUANTITY:
        return False
    return price is None or 0 <= price <= MAX_PRICE_CENTS


def _revenue(kind: str, quantity: int | None, price: int | None) -> int:
    if kind not in ORDER_TYPES or quantity is None or price is None:
        return 0
    return quantity * price if kind == "purchase" else -quantity * price


def _whole(kind: str, text: str | None) -> int | None:
    if text is None:
        return 1 if kind in _COUNTED else None
    if text == "":
        return None
    plain = _WHOLE.fullmatch(text)
    return int(plain[1]) if plain else _whole_by_sql(text)


def _cents(text: str | None) -> int | None:
    """By decimals, not by floats: four places first, then two, halves away from zero, as the ingest's SQL rounds."""
    if text is None:
        return None
    plain = _DECIMAL.fullmatch(text)
    if not plain:
        return _cents_by_sql(text)
    sign, whole, places = plain.groups(default="")
    tenths = int(whole) * 10_000 + int(places[:4].ljust(4, "0")) + (places[4:5] >= "5")
    cents = (tenths + 50) // 100
    return -cents if sign else cents


# -- JSON values as the texts that SQL makes of them


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    return _nested_by_sql(msgspec.json.encode(value).decode())


def _filled(value: Any) -> str | None:
    return _text(value) or None


def _keyed(value: Any) -> str | None:
    """Of what is joined on: blanks around it are not its own."""
    text = _text(value)
    return (text.strip(" ") or None) if text else None


def _first(*texts: str | None) -> str | None:
    return next((text for text in texts if text), None)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


# -- what is not plain


@cache
def _sql() -> "duckdb.DuckDBPyConnection":
    from pipelines.sources import connect

    return connect(threads="1", memory_limit="256MB")


def _asked(expression: str, text: str) -> int | None:
    with _sql().cursor() as db:
        db.execute("SET TimeZone = 'UTC'")
        found = db.execute(f"SELECT CAST({expression} AS BIGINT) FROM (SELECT CAST($1 AS VARCHAR) AS told, 'custom' AS type)", [text])
        value: int | None = found.fetchall()[0][0]
    return value


@lru_cache(_REMEMBERED)
def _nested_by_sql(text: str) -> str:
    """A list or an object, which nobody should send there, as SQL writes it: its floats are not written as ours."""
    with _sql().cursor() as db:
        found = db.execute("""SELECT json_transform('{"told":' || $1 || '}', '{"told":"VARCHAR"}').told""", [text]).fetchall()
    told: str = found[0][0]
    return told


@lru_cache(_REMEMBERED)
def _instant_by_sql(text: str) -> int | None:
    from pipelines.sources.projection import instant_sql

    return _asked(f"epoch_us({instant_sql('told')})", text)


@lru_cache(_REMEMBERED)
def _whole_by_sql(text: str) -> int | None:
    from pipelines.ingest.staging import whole_sql

    return _asked(whole_sql("told"), text)


@lru_cache(_REMEMBERED)
def _cents_by_sql(text: str) -> int:
    from pipelines.ingest.staging import cents_sql

    found = _asked(cents_sql("told"), text)
    return UNREADABLE if found is None else found
