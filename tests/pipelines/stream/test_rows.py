"""The twin's law: for any payload the rows are those that the ingest's own SQL makes of it."""

import json
import os
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipelines.engine import connect
from pipelines.events import SEGMENT_NAMES
from pipelines.ingest import names, rereading, staging
from pipelines.ingest.messages import _REVENUE
from pipelines.log import Incoming, Logged
from pipelines.log.calls import CallError, parse
from pipelines.settings import CollectSettings, IngestSettings
from pipelines.sources.lines import REJECTED, Lines
from pipelines.stream import calls, rows
from pipelines.vault import open_vault

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
LIMITS = IngestSettings()
SCHEDULES = int(os.environ.get("RAPPORT_SCHEDULES", "5"))
QUICK = {"deadline": None, "derandomize": True, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}

TEXTS = st.sampled_from(
    ["", " ", "x", " i1 ", "i2", "\t", "null", "true", "1", "1.0", "2.555", "2.55545", "1e3", "-1", "+5", ".5", "5.", "0.005", "1_000", "٣",
     "9,99", "inf", "nan", "1e400", "0x10", "100000000000", "12345678901.99995", "99999999999.99999", "1e15", "1000001", " 3 ", "[]", "{}",
     '[{"product_id":"p"}]', '{"personalization":true}', "ÄÖ", "i\u0000", "-0.00005", "00012", "1.5"]
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 5), st.sampled_from([10**6, 10**6 + 1, 10**15, 2**63, -(2**70), 1e16, 1e-7, -0.0, 2.0, 9.990000000000002, 1e308]),
    st.floats(-10, 10_000, allow_nan=False), st.integers(0, 10**6).map(lambda cents: cents / 100),
)  # fmt: skip
PLAIN = st.one_of(TEXTS, NUMBERS, st.none(), st.booleans())
VALUE = st.one_of(PLAIN, PLAIN, PLAIN, st.lists(PLAIN, max_size=2), st.dictionaries(st.sampled_from(["a", "email"]), PLAIN, max_size=2))
COUNT = st.one_of(st.none(), st.integers(1, 4), st.sampled_from(["1", "2", 2.0, "2.0"]), VALUE)
PRICE = st.one_of(st.none(), st.integers(0, 10**5).map(lambda cents: cents / 100), st.sampled_from(["2.555", "19.99"]), VALUE)
ITEM = st.one_of(st.sampled_from(["i1", "i2", " i3 "]), VALUE)


def mapping(**fields):
    """An object with some of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


PRODUCT = st.one_of(
    mapping(product_id=ITEM, item_id=ITEM, sku=ITEM, quantity=COUNT, price=PRICE, category=VALUE),
    st.fixed_dictionaries({"product_id": st.just("i1"), "quantity": st.integers(1, 3), "price": st.just(9.99)}),
    VALUE,
)
PRODUCTS = st.one_of(st.lists(PRODUCT, max_size=3), st.lists(PRODUCT, max_size=2).map(json.dumps), VALUE)
SAID = st.one_of(mapping(personalization=VALUE, marketing=VALUE), VALUE)
PROPERTIES = st.one_of(
    mapping(product_id=ITEM, item_id=ITEM, sku=ITEM, order_id=VALUE, session_id=VALUE, quantity=COUNT, price=PRICE, revenue=PRICE,
            total=PRICE, value=PRICE, products=PRODUCTS, category=VALUE, categoryPreferences=SAID),
    VALUE,
)  # fmt: skip
TIME = st.one_of(
    st.sampled_from([0, 1, -1, 59, 61, -3_651 * 1_440, -9_000 * 1_440]).map(lambda m: (NOW + timedelta(minutes=m)).isoformat()),
    st.integers(-(10**9), 10**6).map(lambda us: (NOW + timedelta(microseconds=us)).isoformat().replace("+00:00", "Z")),
    st.sampled_from(
        ["2026-03-01", "2026-03-01 10:00:00", "2026-03-01T10:00:00+02:00", "2026-03-01T10:00Z", "20260301T100000Z", "2026-W09-1",
         "2026-03-01T10:00:00.1234567Z", "2026-03-01T24:00:00Z", "2026-03-01T10:00:60Z", "infinity", "epoch", "yesterday", "",
         " 2026-03-01T10:00:00Z ", "2026-03-01T10:00:00 Europe/Berlin", "10000-01-01", "2026-02-30T00:00:00Z", "0000-01-01T00:00:00Z"]
    ),
    VALUE,
)  # fmt: skip
NAME = st.one_of(st.sampled_from(sorted(SEGMENT_NAMES)), st.sampled_from(["order completed", "ORDER REFUNDED", "Anything"]), VALUE)
CALL = st.fixed_dictionaries(
    {
        "type": st.one_of(st.sampled_from(["track"] * 6 + ["identify", "page", "group", "alias", "Track"]), VALUE),
        "messageId": st.one_of(st.uuids().map(str), VALUE),
    },
    optional={
        "event": NAME,
        "name": NAME,
        "timestamp": TIME,
        "originalTimestamp": TIME,
        "receivedAt": st.one_of(st.just(NOW.isoformat()), TIME),
        "properties": PROPERTIES,
        "context": st.one_of(mapping(sessionId=VALUE, consent=st.one_of(mapping(categoryPreferences=SAID), VALUE)), VALUE),
        "userId": st.sampled_from(["u1", "u2", ""]),
        "anonymousId": st.sampled_from(["d1", "null"]),
    },
)
SALE = st.fixed_dictionaries(
    {
        "type": st.just("track"),
        "messageId": st.uuids().map(str),
        "event": st.sampled_from(["Order Completed", "Order Refunded", "Product Added", "Product Viewed"]),
        "timestamp": st.just(NOW.isoformat()),
        "receivedAt": st.just((NOW + timedelta(seconds=1)).isoformat()),
        "userId": st.just("u1"),
        "properties": PROPERTIES,
    }
)
CALLS = st.lists(st.one_of(CALL, SALE), min_size=30, max_size=60)


@pytest.fixture(scope="module")
def vault(tmp_path_factory):
    with closing(open_vault(tmp_path_factory.mktemp("vault"))) as opened:
        yield opened


def by_sql(calls: list[str], vault, home) -> list[list[tuple]]:
    """Of each call, as JSON, what the ingest stages and finds good, line by line."""
    with connect(home) as db:
        names.prepare(db, vault)
        staging.prepare(db)
        lines = Lines(pa.array(calls, pa.string()), pa.array(range(len(calls)), pa.int64()), REJECTED.empty_table())
        origin = staging.Origin(0, "web", "log", NOW)
        staging.stage(db, rereading.calls(db, lines, source="web"), origin, LIMITS)
        found = db.execute(
            f"""SELECT row, event_id, type, epoch_us(event_timestamp), epoch_us(coalesce(received_timestamp, event_timestamp)), identifier,
                item_id, order_id, session_id, quantity, price_cents, {_REVENUE} AS revenue_cents, category, consent
            FROM staged LEFT JOIN names ON number = who_no WHERE is_good ORDER BY row, line"""
        ).fetchall()
    lines_of: list[list[tuple]] = [[] for _ in calls]
    for row, *values, said in found:
        lines_of[row].append((*values, allowed(said)))
    return lines_of


def allowed(said: str | None) -> tuple[str, ...]:
    try:
        read = json.loads(said or "null")
    except ValueError:
        return ()
    return tuple(sorted(purpose for purpose, value in read.items() if value is True)) if isinstance(read, dict) else ()


def by_twin(call: dict, vault) -> list[tuple]:
    who = [
        (kind, call[key])
        for kind, key in (("user_id", "userId"), ("anonymous_id", "anonymousId"))
        if call.get(key) not in (None, "", "null")
    ]
    main = vault.pseudonym(*who[0]) if who else None
    made = rows.read(json.loads(json.dumps(call)), source="web", who=main, logged_us=rows.instant_us(NOW.isoformat()), limits=LIMITS)
    assert all(row.source == "web" for row in made)
    return told(made)


def told(made) -> list[tuple]:
    return [
        (r.event_id, r.type, r.event_us, r.received_us, r.who, r.item_id, r.order_id, r.session_id, r.quantity, r.price_cents,
         r.revenue_cents, r.category, r.allows)
        for r in made
    ]  # fmt: skip


@settings(max_examples=5 * SCHEDULES, **QUICK)
@given(CALLS)
def test_rows_are_those_of_the_ingest(vault, tmp_path_factory, calls) -> None:
    check(calls, vault, tmp_path_factory.mktemp("home"))


def check(said: list[dict], vault, home) -> None:
    for call, expected in zip(said, by_sql([json.dumps(call) for call in said], vault, home), strict=True):
        assert by_twin(call, vault) == expected, json.dumps(call)


def sale(event="Order Completed", **properties):
    return {"type": "track", "messageId": "m", "event": event, "timestamp": NOW.isoformat(), "userId": "u1", "properties": properties}


def test_an_order_with_one_bad_line_has_no_rows(vault, tmp_path) -> None:
    good = {"product_id": "i1", "quantity": 2, "price": "2.555"}
    whole, broken = sale(products=[good, good]), sale(products=[good, good | {"quantity": 0}])
    assert [row[10] for row in by_twin(whole, vault)] == [512, 512]  # 2.555 is 256 cents: by decimals
    assert by_twin(broken, vault) == by_sql([json.dumps(broken)], vault, tmp_path)[0] == []


def test_a_twin_that_rounds_by_floats_is_found_out(vault, tmp_path, monkeypatch) -> None:
    """The control."""
    call = sale("Product Viewed", product_id="i1", price="1.005")
    check([call], vault, tmp_path)
    monkeypatch.setattr(rows, "_cents", lambda text: None if text is None else round(float(text) * 100))
    with pytest.raises(AssertionError):
        check([call], vault, tmp_path)


ODD = [
    None, True, False, "", " ", " i1 ", "NaN", "Infinity", "-inf", "null", "1e16", "\u2028\x7f", 'a/b"\\', "[1e16]", '{"a":1e16}',
    "i\u0000", "\ud800", 0, -1, 2, 10**15, 2**53 + 1, 2**63, 2**64, -(2**70), -0.0, 0.0, 2.0, 2.555, 1e-5, 1e-7, 5e-324, 1e15, 1e16,
    123456789012345680.0, 1e20, 1e21, 1e22, 1.7976931348623157e308,
]  # fmt: skip
NESTED = [*([value] for value in ODD), [], {}, [[]], [[[1e16, -0.0]]], {"a": {"b": [1e16, {"c": 1e17}]}}, {"": 1e20}, [1e16] * 3]
FIELDS = (
    "type", "event", "name", "messageId", "timestamp", "originalTimestamp", "receivedAt", "properties", "context", "context.sessionId",
    "context.consent", "context.consent.categoryPreferences", "context.consent.categoryPreferences.personalization",
    *(f"properties.{name}" for name in ("product_id", "item_id", "sku", "order_id", "session_id", "quantity", "price", "revenue", "total",
                                        "value", "category", "categoryPreferences", "products")),
    *(f"properties.products.{name}" for name in ("product_id", "item_id", "sku", "quantity", "price", "category")),
)  # fmt: skip


def with_value(call: dict, path: str, value) -> dict:
    """The call with this value there; `products`: of its one line."""
    first, *rest = path.split(".")
    if not rest:
        return call | {first: value}
    if first == "products":
        return call | {first: [with_value({"product_id": "i1", "quantity": 1, "price": 9.99}, rest[0], value)]}
    return call | {first: with_value(call.get(first, {}), ".".join(rest), value)}


def through_door(call: dict, vault) -> list[Incoming]:
    """What the log takes in of it: nothing where the call is none."""
    try:
        return parse(json.dumps(call).encode(), None, source="web", received=NOW, vault=vault, limits=CollectSettings()).events
    except CallError:
        return []


def by_stream(event: Incoming) -> list[tuple]:
    found = calls.read(Logged(1, event.source, event.subjects, event.payload, event.received_us, 0, event.message_id), LIMITS)
    return told(found.rows if found else ())


def test_every_field_with_every_odd_value_is_read_alike_by_stream_and_ingest(vault, tmp_path) -> None:
    """Through the log's own door: what it lets in, both read from the same bytes."""
    plain = [sale(order_id="o1", product_id="i1", price=9.5, quantity=2), sale(order_id="o1", revenue=5)]
    asked = [with_value(call, path, value) for path in FIELDS for value in (*ODD, *NESTED) for call in plain]
    let_in = [event for call in asked for event in through_door(call, vault)]
    assert len(let_in) > len(asked) * 0.8
    found = by_sql([event.payload.decode() for event in let_in], vault, tmp_path)
    for event, expected in zip(let_in, found, strict=True):
        assert by_stream(event) == expected, event.payload


def test_a_list_that_is_written_by_another_library_is_found_out(vault, tmp_path, monkeypatch) -> None:
    """The control: as it was."""
    monkeypatch.setattr(rows, "_nested_by_sql", lambda text: text)
    (event,) = through_door(sale("Product Viewed", product_id=[1e16]), vault)
    assert by_stream(event) != by_sql([event.payload.decode()], vault, tmp_path)[0]
