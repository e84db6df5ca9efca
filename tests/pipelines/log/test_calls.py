"""Segment calls -> events for the log: the form is checked, nothing else changes, and a bad call stops nobody."""

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.events import REASONS
from pipelines.log import calls
from pipelines.log.calls import CALLS, CallError
from pipelines.settings import CollectSettings
from pipelines.vault import open_vault

NOW = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
LIMITS = CollectSettings()
SMALL = CollectSettings(max_event_bytes=1_024, max_batch_bytes=8_192, max_batch_events=5, max_depth=6)
WHOLE = {
    "track": {"userId": "u1", "event": "Product Viewed"},
    "identify": {"userId": "u1"},
    "page": {"anonymousId": "a1"},
    "screen": {"anonymousId": "a1"},
    "group": {"userId": "u1", "groupId": "g1"},
    "alias": {"userId": "u1", "previousId": "a1"},
}

# Any JSON that Python can write, NaN and halves of surrogate pairs among it.
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8
)
FIELDS = (
    "type",
    "event",
    "userId",
    "anonymousId",
    "previousId",
    "groupId",
    "messageId",
    "timestamp",
    "sentAt",
    "context",
    "traits",
    "properties",
)
EVENTS = ANYTHING | st.dictionaries(st.sampled_from(FIELDS), ANYTHING | st.sampled_from([*CALLS, "u1", "2026-01-01"]), max_size=8)
fuzz = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def vault(tmp_path_factory):
    vault = open_vault(tmp_path_factory.mktemp("home"))
    yield vault
    vault.close()


@pytest.fixture(scope="module")
def parse(vault):
    def parse(body, call, *, limits=LIMITS, **options):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return calls.parse(raw, call, source="shop", received=NOW, vault=vault, limits=limits, **options)

    return parse


def attempt(parse, *given):
    """What came of it: calls, or the refusal."""
    try:
        return parse(*given)
    except CallError as error:
        return error


def only(found):
    """The one event of a call, as an object."""
    assert not found.refused
    (event,) = found.events
    return json.loads(event.payload)


# -- laws


@fuzz
@given(body=st.binary(max_size=60) | ANYTHING.map(lambda value: json.dumps(value).encode()), call=st.sampled_from([*CALLS, "batch", None]))
def test_no_bytes_raise_anything_but_what_the_caller_can_answer(parse, body, call):
    found = attempt(parse, body, call)
    if isinstance(found, CallError):
        assert found.status in (400, 413)
        assert str(found)
    else:
        assert all(json.loads(event.payload)["messageId"] == event.message_id for event in found.events)


@fuzz
@given(events=st.lists(EVENTS, max_size=6))
def test_every_call_of_a_batch_is_an_event_or_is_set_aside_with_a_reason(parse, events):
    found = parse({"batch": events}, "batch")
    assert len(found.events) + len(found.refused) == len(events)
    assert {refused.reason for refused in found.refused} <= set(REASONS)
    for event in found.events:
        assert json.loads(event.payload)["type"] in CALLS
        assert event.source == "shop"
        assert event.received_us == NOW.timestamp() * 1e6


@fuzz
@given(bad=st.lists(EVENTS, max_size=4), place=st.integers(0, 4))
def test_good_call_is_the_same_whatever_stands_beside_it(parse, bad, place):
    good = {"type": "track", "event": "Searched \U0001f6d2", "userId": "u1", "messageId": "good", "timestamp": "2026-02-28T10:00:00Z"}
    alone = parse({"batch": [good]}, "batch").events[0]
    among = parse({"batch": [*bad[:place], good, *bad[place:]]}, "batch").events
    assert alone in among


@fuzz
@given(properties=st.dictionaries(st.text(max_size=8), st.none() | st.integers(-(2**53), 2**53) | st.text(max_size=20), max_size=5))
def test_what_was_said_of_the_event_is_kept_as_it_was(parse, properties):
    try:
        json.dumps(properties, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    assert only(parse(WHOLE["track"] | {"properties": properties}, "track"))["properties"] == properties


# -- the form


@pytest.mark.parametrize("call", CALLS)
def test_whole_call_is_an_event_of_its_type(parse, call):
    assert only(parse(WHOLE[call], call))["type"] == call
    assert only(parse({"batch": [WHOLE[call] | {"type": call.upper()}]}, "batch"))["type"] == call
    assert only(parse(WHOLE[call] | {"type": call}, None))["type"] == call


@pytest.mark.parametrize(
    ("call", "body", "code", "field"),
    [
        ("track", {"event": "x"}, "identifier_missing", "userId"),
        ("track", {"event": "x", "userId": "  "}, "identifier_missing", "userId"),
        ("track", {"event": "x", "userId": None, "anonymousId": ""}, "identifier_missing", "userId"),
        ("track", {"userId": "u"}, "field_missing", "event"),
        ("track", {"userId": "u", "event": ""}, "field_missing", "event"),
        ("track", {"userId": "u", "event": 7}, "field_invalid", "event"),
        ("group", {"userId": "u"}, "field_missing", "groupId"),
        ("alias", {"userId": "u"}, "field_missing", "previousId"),
        ("alias", {"previousId": "u"}, "field_missing", "userId"),
        ("page", {"userId": ["u"]}, "field_invalid", "userId"),
        ("page", {"userId": True}, "field_invalid", "userId"),
        ("page", {"userId": 1.5}, "field_invalid", "userId"),
        ("page", {"userId": "u" * 1_025}, "field_invalid", "userId"),
        ("page", {"userId": "u", "properties": []}, "field_invalid", "properties"),
        ("identify", {"userId": "u", "traits": "x"}, "field_invalid", "traits"),
        ("identify", {"userId": "u", "context": 1}, "field_invalid", "context"),
        ("identify", {"userId": "u", "timestamp": "yesterday"}, "time_unreadable", "timestamp"),
        ("identify", {"userId": "u", "timestamp": 1_700_000_000}, "time_unreadable", "timestamp"),
        (None, {"userId": "u"}, "type_unknown", "type"),
        (None, {"userId": "u", "type": "telemetry"}, "type_unknown", "type"),
        (None, {"userId": "u", "type": ["track"]}, "type_unknown", "type"),
        ("track", [], "not_json", None),
        ("track", b"{", "not_json", None),
        ("track", b'{"userId": "u", "event": NaN}', "not_json", None),
        ("track", b'{"userId": "u", "event": "x", "n": 1e999}', "not_json", None),
        ("track", b'{"userId": "u", "event": "\\ud800"}', "not_json", None),
        ("track", b'{"userId": "u", "event": "x"} {}', "not_json", None),
        ("track", b'{"userId": "u", "event": "\xff"}', "not_text", None),
        ("track", b"[" * 400 + b"]" * 400, "not_json", None),
        ("track", b'{"a":' * 9_000, "too_long", None),
        ("track", b'{"a":' * 5_000, "too_deep", None),
        ("batch", {}, "field_invalid", "batch"),
        ("batch", {"batch": {}}, "field_invalid", "batch"),
        ("batch", [], "field_invalid", "batch"),
        ("batch", b"[NaN]", "field_invalid", "batch"),
        ("batch", b'{"batch": [NaN', "not_json", None),
        ("batch", b'{"batch":' + b"[" * 200_000, "too_deep", None),
    ],
)  # fmt: skip
def test_what_is_no_call_is_refused_with_the_field_at_fault(parse, call, body, code, field):
    with pytest.raises(CallError) as refused:
        parse(body, call)
    assert (refused.value.code, refused.value.field) == (code, field)
    assert refused.value.status == (413 if code == "too_long" else 400)
    assert code in REASONS


def test_refusal_repeats_nothing_that_was_sent(parse):
    secret = "eve@example.com"
    for body in ({"userId": secret}, {"userId": [secret]}, {"userId": "u", "timestamp": secret}, {"userId": "u", "type": secret}):
        with pytest.raises(CallError) as refused:
            parse(body, "track" if "type" not in body else None)
        assert secret not in str(refused.value)


@pytest.mark.parametrize(
    "bad", [b'{"type":"track","userId":"u","event":"x","properties":{"price":NaN}}', b'{"event":"\\ud83d"}', b"Infinity"]
)
def test_number_or_text_that_sdks_should_not_send_costs_its_own_call_only(parse, bad):
    good = json.dumps(WHOLE["track"] | {"type": "track", "event": "Gesehen \U0001f6d2"}).encode()
    found = parse(b'{"batch":[' + good + b"," + bad + b"," + good + b'],"sentAt":"2026-03-01T12:00:00Z"}', "batch")
    assert [json.loads(event.payload)["event"] for event in found.events] == ["Gesehen \U0001f6d2"] * 2
    assert [refused.reason for refused in found.refused] == ["not_json"]


# -- the limits


def test_event_beyond_its_limit_is_refused_alone(parse):
    def sized(n):
        event = {"type": "page", "userId": "u", "name": ""}
        return event | {"name": "x" * (n - len(json.dumps(event)))}

    largest, larger = sized(1_024), sized(1_025)
    assert only(parse(largest, "page", limits=SMALL))
    with pytest.raises(CallError) as refused:
        parse(larger, "page", limits=SMALL)
    assert (refused.value.code, refused.value.status) == ("too_long", 413)
    found = parse({"batch": [largest, larger]}, "batch", limits=SMALL)
    assert (len(found.events), [r.reason for r in found.refused]) == (1, ["too_long"])
    assert found.refused[0].raw == json.dumps(larger).encode()


def test_batch_beyond_its_limits_is_refused_whole(parse):
    event = {"type": "page", "userId": "u"}
    assert len(parse({"batch": [event] * 5}, "batch", limits=SMALL).events) == 5
    with pytest.raises(CallError) as refused:
        parse({"batch": [event] * 6}, "batch", limits=SMALL)
    assert (refused.value.code, refused.value.status) == ("too_many", 413)
    padded = json.dumps({"batch": [event]}).encode()
    assert parse(padded.ljust(8_192), "batch", limits=SMALL).events
    with pytest.raises(CallError) as refused:
        parse(padded.ljust(8_193), "batch", limits=SMALL)
    assert (refused.value.code, refused.value.status) == ("too_long", 413)


def test_event_nested_beyond_the_limit_is_refused(parse):
    def nested(depth):
        value = 1
        for _ in range(depth - 2):
            value = [value]
        return {"type": "page", "userId": "u", "properties": {"x": value}} if depth > 1 else {"type": "page", "userId": "u"}

    flat = {"type": "page", "userId": "u", "properties": {"items": [{}] * 40}}  # many brackets, no depth
    assert only(parse(flat, "page", limits=SMALL))
    assert only(parse(nested(5), "page", limits=SMALL))
    with pytest.raises(CallError) as refused:
        parse(nested(7), "page", limits=SMALL)
    assert refused.value.code == "too_deep"
    assert [r.reason for r in parse({"batch": [nested(7), flat]}, "batch", limits=SMALL).refused] == ["too_deep"]


# -- times


@pytest.mark.parametrize(
    ("sent", "given", "corrected"),
    [
        ("2026-03-01T11:00:00Z", "2026-03-01T10:59:00Z", "2026-03-01T11:59:00.250000Z"),  # an hour and a quarter second slow
        ("2026-03-01T15:00:00+02:00", "2026-03-01T14:00:00.5+02:00", "2026-03-01T11:00:00.750000Z"),
        (None, "2026-02-28T10:00:00+01:00", "2026-02-28T09:00:00.000000Z"),
        ("nonsense", "2026-02-28T10:00:00", "2026-02-28T10:00:00.000000Z"),
        ("2026-03-01T11:00:00Z", None, "2026-03-01T12:00:00.250000Z"),  # it happened when it came
    ],
)
def test_time_is_corrected_for_the_senders_clock(parse, sent, given, corrected):
    event = WHOLE["page"] | {"type": "page", "timestamp": given}
    for found in (parse(event | {"sentAt": sent}, "page"), parse({"batch": [event], "sentAt": sent}, "batch")):
        kept = only(found)
        assert kept["timestamp"] == corrected
        assert kept.get("originalTimestamp") == given
        assert kept["receivedAt"] == "2026-03-01T12:00:00.250000Z"


def test_broker_s_time_is_taken_as_it_is_for_it_lay_in_a_queue(parse):
    event = WHOLE["page"] | {"type": "page", "timestamp": "2026-03-01T08:00:00Z", "sentAt": "2026-03-01T08:00:01Z"}
    assert only(parse(event, None))["timestamp"] == "2026-03-01T08:00:00.000000Z"
    assert only(parse(event, "page"))["timestamp"] != "2026-03-01T08:00:00.000000Z"


def test_event_that_somebody_forwards_was_corrected_already(parse):
    forwarded = {"timestamp": "2026-02-01T08:00:00Z", "originalTimestamp": "2026-02-01T07:00:00Z", "sentAt": "2026-02-01T07:00:01Z"}
    kept = only(parse(WHOLE["page"] | forwarded, "page"))
    assert (kept["timestamp"], kept["originalTimestamp"]) == ("2026-02-01T08:00:00.000000Z", "2026-02-01T07:00:00Z")


def test_receipt_is_ours_whatever_the_sender_says(parse):
    assert only(parse(WHOLE["page"] | {"receivedAt": "1999-01-01T00:00:00Z"}, "page"))["receivedAt"].startswith("2026-03-01")


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"])
@pytest.mark.parametrize("sent", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_time_beyond_the_calendar_is_unreadable_not_a_defect(parse, time, sent):
    found = attempt(parse, WHOLE["page"] | {"timestamp": time, "sentAt": sent}, "page")
    assert getattr(found, "code", "time_unreadable") == "time_unreadable"


# -- names


def test_event_without_a_message_id_gets_one_of_its_own(parse):
    found = parse({"batch": [WHOLE["page"] | {"type": "page"}] * 3}, "batch")
    assert len({event.message_id for event in found.events}) == 3
    assert all(json.loads(event.payload)["messageId"] == event.message_id for event in found.events)


def test_redelivered_message_without_an_id_gets_the_same_again(parse):
    message = {"batch": [WHOLE["page"] | {"type": "page"}] * 2}
    first, again = (parse(message, None, message_id="redis:17-0") for _ in range(2))
    assert [event.message_id for event in first.events] == [event.message_id for event in again.events] == ["redis:17-0:0", "redis:17-0:1"]


def test_numbers_as_ids_become_text_and_blanks_go(parse):
    kept = only(parse({"userId": 17, "groupId": " g ", "messageId": 5, "anonymousId": " "}, "group"))
    assert (kept["userId"], kept["groupId"], kept["messageId"]) == ("17", "g", "5")
    assert "anonymousId" not in kept


def test_key_given_twice_is_one_value_for_every_reader(parse):
    found = parse(b'{"userId": "innocent", "userId": "u1", "event": "x"}', "track")
    assert found.events[0].payload.count(b"userId") == 1
    assert found.events[0].subjects == parse(WHOLE["track"], "track").events[0].subjects


def test_write_key_is_not_kept(parse):
    event = WHOLE["page"] | {"type": "page", "writeKey": "secret"}
    for found in (parse(event, "page"), parse({"batch": [event], "writeKey": "secret"}, "batch")):
        assert b"secret" not in found.events[0].payload
    assert calls.write_key(json.dumps({"batch": [], "writeKey": "secret"}).encode()) == "secret"
    assert [calls.write_key(body) for body in (b"", b"[]", b"{", b'{"writeKey": 7}', b"[" * 90_000, b'{"writeKey": "\xff"}')] == [""] * 6


def test_batch_fills_in_what_an_event_does_not_say(parse):
    own = WHOLE["page"] | {"type": "page", "context": {"ip": "10.0.0.1"}}
    shared = {"context": {"ip": "0.0.0.0", "locale": "de"}, "integrations": {"All": False}}
    first, second = (json.loads(e.payload) for e in parse({"batch": [own, WHOLE["page"] | {"type": "page"}], **shared}, "batch").events)
    assert first["context"] == {"ip": "10.0.0.1", "locale": "de"}
    assert second["context"] == {"ip": "0.0.0.0", "locale": "de"}
    assert first["integrations"] == second["integrations"] == {"All": False}


# -- people


def test_subjects_are_everybody_the_call_names_the_user_first(parse, vault):
    call = {"userId": "u1", "anonymousId": "a1", "traits": {"email": "Eve@Example.com ", "phone": "+49 30 123"}}
    call["context"] = {"traits": {"email": "eve@example.org"}}
    named = [("user_id", "u1"), ("email", "eve@example.com"), ("email", "eve@example.org"), ("phone", "+4930123"), ("anonymous_id", "a1")]
    found = parse(call, "identify").events[0].subjects
    assert found[0] == vault.pseudonym("user_id", "u1")
    assert set(found) == {vault.pseudonym(kind, value) for kind, value in named}
    order = [name.split(":")[0] for name in found]
    assert order == sorted(order, key=("user_id", "email", "phone", "anonymous_id").index)


@pytest.mark.parametrize("place", ["userId", "anonymousId"])
def test_address_given_as_an_id_is_an_address(parse, vault, place):
    assert parse({place: "Eve@example.com"}, "page").events[0].subjects == (vault.pseudonym("email", "eve@example.com"),)


@pytest.mark.parametrize("word", ["null", "undefined", "Guest", "[object Object]"])
def test_word_for_nobody_names_nobody(parse, word):
    assert parse({"userId": word}, "page").events[0].subjects == ()


def test_previous_id_of_an_alias_is_named_as_either_kind(parse, vault):
    found = parse({"userId": "u1", "previousId": "p1"}, "alias").events[0].subjects
    assert found == tuple(vault.pseudonym(*name) for name in [("user_id", "u1"), ("anonymous_id", "p1"), ("user_id", "p1")])


def test_call_known_by_its_address_alone_is_somebody_s(parse, vault):
    assert parse({"traits": {"email": "eve@example.com"}}, "identify").events[0].subjects == (vault.pseudonym("email", "eve@example.com"),)


@pytest.mark.parametrize("traits", [{"email": "none"}, {"phone": "unknown"}, {"phone": "+"}, {"email": 7}, {"phone": True}])
def test_contact_that_is_none_names_nobody(parse, traits):
    assert parse({"userId": "guest", "traits": traits}, "identify").events[0].subjects == ()


def test_call_that_is_set_aside_still_says_whose_it_is(parse, vault):
    refused = parse({"batch": [{"type": "track", "userId": "u1"}]}, "batch").refused[0]
    assert (refused.reason, refused.subjects) == ("field_missing", (vault.pseudonym("user_id", "u1"),))


def test_clock_of_the_receipt_may_be_in_any_zone(vault):
    east = NOW.replace(microsecond=0).astimezone(timezone(timedelta(hours=9)))
    found = calls.parse(b'{"userId":"u"}', "page", source="s", received=east, vault=vault, limits=LIMITS)
    assert json.loads(found.events[0].payload)["receivedAt"] == "2026-03-01T12:00:00.000000Z"
