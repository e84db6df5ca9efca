"""Segment calls as bytes -> events for the log, and each call that is none with its reason.

In: a body as an SDK, a browser or a broker gives it: one call, or a batch of them. Out: `Incoming` events, ready to append.
What is checked here is the form that the spec demands; what an event means is the ingest's business. Never reads a clock or the
disk, and never puts a value into a message.

    CallError     the body as a whole is no call: 400, or 413 where it is too large
"""

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import msgspec

from pipelines.events import NOBODY
from pipelines.log.port import Incoming
from pipelines.settings import CollectSettings
from pipelines.vault import Vault, normalised

CALLS = ("identify", "track", "page", "screen", "group", "alias")
BATCH = "batch"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_TOO_LARGE = ("too_long", "too_many")
_NAMES = ("userId", "anonymousId", "previousId", "groupId", "messageId")  # numbers are taken for their digits, as the SDKs do
_OBJECTS = ("context", "integrations", "properties", "traits")
_NEEDS = {"track": ("event",), "group": ("groupId",), "alias": ("previousId", "userId")}
_MAX_NAME = 1_024
_NOBODY = frozenset(NOBODY)


class CallError(Exception):
    """Not a call. `code`: of events.REASONS, or `too_many`; `field`: the one at fault; `status`: what HTTP calls it."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.field = code, message, field

    @property
    def status(self) -> int:
        """413 for what is too large, else 400."""
        return 413 if self.code in _TOO_LARGE else 400


@dataclass(frozen=True, slots=True)
class RefusedCall:
    """A call of a batch that cannot be an event. `reason`: of events.REASONS; `raw`: its bytes as they came."""

    raw: bytes
    reason: str
    subjects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Calls:
    """What a body holds: its events in order, and the calls of its batch that are none."""

    events: list[Incoming]
    refused: list[RefusedCall]


class _Batch(msgspec.Struct):
    batch: list[msgspec.Raw]
    context: Any = None
    integrations: Any = None
    sentAt: Any = None  # noqa: N815


class _Key(msgspec.Struct):
    writeKey: str = ""  # noqa: N815


class _Outline(msgspec.Struct):
    batch: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_decode_batch = msgspec.json.Decoder(_Batch).decode
_decode_key = msgspec.json.Decoder(_Key).decode
_decode_outline = msgspec.json.Decoder(_Outline).decode
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, ValueError)


def write_key(body: bytes) -> str:
    """The write key that a browser puts into the body, for it can set no header; empty where there is none."""
    try:
        return _decode_key(body).writeKey
    except (*_NOT_JSON, RecursionError):
        return ""


def parse(
    body: bytes, call: str | None, *, source: str, received: datetime, vault: Vault, limits: CollectSettings, message_id: str = ""
) -> Calls:
    """The events in a body. `call`: one of CALLS, BATCH, or None for a broker's message: its JSON says its `type` or holds a `batch`.

    Each event gets a `messageId` where it has none (from `message_id` where that is given, so that a broker's redelivery is known),
    its `type` and the `receivedAt` of this receipt. Its time is corrected for the sender's clock by `sentAt`, except a broker's, which
    lay in a queue for who knows how long: https://segment.com/docs/connections/spec/common/#timestamps. The batch's context and
    integrations fill in what an event does not say. Raises CallError where the body is no call; in a batch only where it is no
    batch, for a bad call does not stop the others: see `Calls.refused`.
    """
    if len(body) > limits.max_batch_bytes:
        raise CallError("too_long", f"a body of at most {limits.max_batch_bytes} bytes is expected")
    body = body.removeprefix(b"\xef\xbb\xbf")
    reader = _Reader(source, received, vault, limits, message_id, is_direct=call is not None)
    if call == BATCH or (call is None and _is_batch(body)):
        return reader.batch(body)
    return Calls([reader.incoming(reader.decoded(body), call)], [])


class _Reader:
    """What the calls of one body have in common."""

    def __init__(self, source: str, received: datetime, vault: Vault, limits: CollectSettings, message_id: str, *, is_direct: bool) -> None:
        self.source, self.received, self.limits, self.message_id, self.is_direct = source, received, limits, message_id, is_direct
        self.pseudonym = vault.pseudonym
        self.received_us = (received - _EPOCH) // _MICROSECOND
        self.received_text = _text(received)

    def batch(self, body: bytes) -> Calls:
        """The calls of an envelope, each for itself."""
        envelope, raws = _opened(body)
        self.pseudonym = cache(self.pseudonym)  # a device's batch names the same people over and over
        if len(raws) > self.limits.max_batch_events:
            raise CallError("too_many", f"a batch of at most {self.limits.max_batch_events} calls is expected", BATCH)
        shared = {name: value for name in ("context", "integrations") if isinstance(value := getattr(envelope, name), dict) and value}
        sent = _instant(envelope.sentAt)
        calls = Calls([], [])
        for at, raw in enumerate(raws):
            text, event = bytes(raw), {}
            try:
                event = self.decoded(text)
                calls.events.append(self.incoming(event, None, sent=sent, shared=shared, at=at))
            except CallError as error:
                calls.refused.append(RefusedCall(text, error.code, self._subjects(event)))
        return calls

    def decoded(self, raw: bytes) -> dict[str, Any]:
        """One call as an object, its size and depth within the limits."""
        if len(raw) > self.limits.max_event_bytes:
            raise CallError("too_long", f"an event of at most {self.limits.max_event_bytes} bytes is expected")
        try:
            event = _decode(raw)
        except RecursionError:
            raise _too_deep(self.limits) from None
        except UnicodeDecodeError:
            raise CallError("not_text", "text in UTF-8 is expected") from None
        except _NOT_JSON:
            raise CallError("not_json", "one JSON object is expected; numbers are finite, and text is Unicode") from None
        if not isinstance(event, dict):
            raise CallError("not_json", "one JSON object is expected")
        brackets = raw.count(b"{") + raw.count(b"[")  # as deep as it could be: most events need no closer look
        if brackets > self.limits.max_depth and _depth(event, at_most=self.limits.max_depth) > self.limits.max_depth:
            raise _too_deep(self.limits)
        return event

    def incoming(
        self, event: dict[str, Any], call: str | None, *, sent: datetime | None = None, shared: Mapping[str, Any] = {}, at: int = 0
    ) -> Incoming:
        """The event of a call; `event` is changed. `sent`, `shared`: of the batch around it."""
        event.pop("writeKey", None)  # a key is no part of what happened
        event["type"] = kind = _kind(event, call)
        _check(event, kind)
        for name, value in shared.items():
            event[name] = {**value, **(event.get(name) or {})}
        self._set_times(event, _instant(event.get("sentAt")) or sent)
        if "messageId" not in event:
            event["messageId"] = f"{self.message_id}:{at}" if self.message_id else f"api-{uuid.uuid4().hex}"
        return Incoming(self.source, event["messageId"], self._subjects(event), _encode(event), self.received_us)

    def _subjects(self, event: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_subjects(event, self.pseudonym)))

    def _set_times(self, event: dict[str, Any], sent: datetime | None) -> None:
        event["receivedAt"] = self.received_text
        given, original = event.get("timestamp"), event.get("originalTimestamp")
        if not given and not original:
            event["timestamp"] = self.received_text
            return
        happened = _instant(given or original)
        is_raw = self.is_direct and not (given and original)  # whoever sends both forwards what was corrected already
        try:
            if happened is None:
                raise OverflowError
            event["timestamp"] = _text(happened + (self.received - sent) if sent and is_raw else happened)
        except OverflowError:
            raise CallError("time_unreadable", "timestamp: a time as in ISO 8601 is expected", "timestamp") from None
        event["originalTimestamp"] = original or given


def _is_batch(body: bytes) -> bool:
    try:
        return bytes(_decode_outline(body).batch).startswith(b"[")
    except (*_NOT_JSON, RecursionError):
        return False


def _opened(body: bytes) -> tuple[_Batch, list[Any]]:
    """An envelope and the bytes of its calls."""
    try:
        envelope = _decode_batch(body)
    except RecursionError:
        raise CallError("too_deep", "a batch that is nested like calls is expected") from None
    except msgspec.ValidationError:
        raise CallError("field_invalid", "batch: a list of calls is expected", BATCH) from None
    except _NOT_JSON:
        return _rescued(body)
    return envelope, envelope.batch


def _rescued(body: bytes) -> tuple[_Batch, list[Any]]:
    """An envelope that is JSON but for NaN, Infinity or half a surrogate pair, which SDKs do send: the good calls are still good."""
    try:
        document = json.loads(body)
        envelope = _Batch(document[BATCH], *(document.get(name) for name in ("context", "integrations", "sentAt")))
        raws = [json.dumps(event).encode() for event in envelope.batch]
        _encode([envelope.context, envelope.integrations])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CallError("not_json", "one JSON object with the list `batch` is expected") from None
    return envelope, raws


def _kind(event: dict[str, Any], call: str | None) -> str:
    kind = call or event.get("type")
    if isinstance(kind, str) and (kind := kind.lower()) in CALLS:
        return kind
    raise CallError("type_unknown", f"type: one of {', '.join(CALLS)} is expected", "type")


def _check(event: dict[str, Any], kind: str) -> None:
    """What the spec demands of this kind of call; names become text, and what is null is as if it were not there."""
    for name in [name for name, value in event.items() if value is None]:
        del event[name]
    for name in _NAMES:
        if name in event:
            event[name] = _name(event[name], name)
            if not event[name]:
                del event[name]
    for name in _OBJECTS:
        if not isinstance(event.get(name, {}), dict):
            raise CallError("field_invalid", f"{name}: an object is expected", name)
    for name in _NEEDS.get(kind, ()):
        if not event.get(name):
            raise CallError("field_missing", f"{name}: expected in a call of the type {kind}", name)
    if not isinstance(event.get("event", ""), str):
        raise CallError("field_invalid", "event: a name is expected", "event")
    if "userId" not in event and "anonymousId" not in event and not any(_contacts(event)):
        raise CallError("identifier_missing", "userId: a userId or an anonymousId is expected", "userId")


def _name(value: Any, name: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise CallError("field_invalid", f"{name}: text is expected", name)
    if len(value) > _MAX_NAME:
        raise CallError("field_invalid", f"{name}: at most {_MAX_NAME} characters are expected", name)
    return value.strip()


def _subjects(event: Mapping[str, Any], pseudonym: Callable[[str, str], str]) -> Iterator[str]:
    """The pseudonyms of everybody whom the call names, in the order of vault.IDENTIFIERS; some may come twice.

    Shops give addresses as ids: they are addresses then. The previous id of an alias may be a user's or a visitor's: both are named.
    """
    user, visitor, previous = (_known(event.get(name)) for name in ("userId", "anonymousId", "previousId"))
    contacts = sorted(_contacts(event))  # e-mail addresses before phone numbers
    if user and "@" not in user:
        yield pseudonym("user_id", user)
    yield from (pseudonym("email", name) for name in (user, visitor, previous) if "@" in name)
    yield from (pseudonym(kind, value) for kind, value in contacts)
    yield from (pseudonym("anonymous_id", name) for name in (visitor, previous) if name and "@" not in name)
    if previous and "@" not in previous:
        yield pseudonym("user_id", previous)


def _known(value: Any) -> str:
    return value if isinstance(value, str) and value.lower() not in _NOBODY else ""


def _contacts(event: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The addresses and numbers in a call: kind and value."""
    context = event.get("context")
    for holder in (event.get("traits"), context.get("traits") if isinstance(context, dict) else None, event.get("properties")):
        if not isinstance(holder, dict):
            continue
        email, phone = holder.get("email"), holder.get("phone")
        if isinstance(email, str) and "@" in email:
            yield "email", email
        if isinstance(phone, str | int) and normalised("phone", str(phone)).strip("+"):
            yield "phone", str(phone)


def _instant(text: Any) -> datetime | None:
    """A time as in ISO 8601, UTC where it names no zone; None where it cannot be read."""
    try:
        instant = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def _text(instant: datetime) -> str:
    return instant.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def _too_deep(limits: CollectSettings) -> CallError:
    return CallError("too_deep", f"an event nested at most {limits.max_depth} deep is expected")


def _depth(event: dict[str, Any], *, at_most: int) -> int:
    """How deeply the event is nested; counting ends beyond `at_most`."""
    level: list[Any] = [event]
    depth = 0
    while level and depth <= at_most:
        depth += 1
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    return depth
