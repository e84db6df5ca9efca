"""Feast's bytes in the online stores: keys (serialisation version 3) and Value messages, both ways, and where Redis keeps a row.

In: texts and values of Python. Out: what Feast 0.67 writes for them, and back. The writers and the readers of the online store share
this, so it stands once; tests hold it against Feast's own code. Feast itself is not imported: its import costs seconds.
Never opens a store.
"""

import math
import struct
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache

import mmh3

PROJECT = "rapport"  # of feature_repo/feature_store.yaml

Value = str | int | float | bool | None
Key = str | tuple[str, ...]  # a tuple where the entity has several join keys, in their order
JoinKey = str | tuple[str, ...]

_TEXT = 2  # feast's ValueType.STRING
_LARGEST = 2**63
_EPOCH = datetime(1970, 1, 1)
_SIZE = struct.Struct("<I")
_DOUBLE = struct.Struct("<d")
_SINGLE = struct.Struct("<f")


# -- keys --------------------------------------------------------------------------------------------------------------


@cache
def key_encoder(join_key: JoinKey) -> Callable[[Key], bytes]:
    """Text or texts of an entity -> its key. Several: a tuple in the order of `join_key`; Feast sorts them by the keys' names."""
    head, order = _head(join_key), _order(join_key)
    if isinstance(join_key, str):
        return lambda key: head + _piece(key)  # type: ignore[arg-type]
    return lambda key: head + b"".join([_piece(key[i]) for i in order])


@cache
def key_decoder(join_key: JoinKey) -> Callable[[bytes], Key]:
    """Key -> text, or texts in the order of `join_key`. Raises ValueError for bytes that are no key of these."""
    head, order = _head(join_key), _order(join_key)

    def decode(key: bytes) -> Key:
        if not key.startswith(head):
            raise ValueError(f"a key of {join_key} is expected to begin with these names; found {len(key)} other bytes")
        found, at = [""] * len(order), len(head)
        for i in order:
            (size,) = _SIZE.unpack_from(key, at + 4)
            found[i], at = key[at + 8 : at + 8 + size].decode(), at + 8 + size
        if at != len(key):
            raise ValueError(f"a key of {join_key} is expected to end after {at} bytes; found {len(key)}")
        return found[0] if isinstance(join_key, str) else tuple(found)

    return decode


def key_prefix(join_key: JoinKey, first: str | None = None) -> bytes:
    """What every key of these names begins with; `first`: of those whose first text, in Feast's order, is this one."""
    return _head(join_key) + (b"" if first is None else _piece(first))


def sorted_names(join_key: JoinKey) -> list[str]:
    """The join keys in Feast's order."""
    return [join_key] if isinstance(join_key, str) else sorted(join_key)


@cache
def _head(join_key: JoinKey) -> bytes:
    names = [name.encode() for name in sorted_names(join_key)]
    return _SIZE.pack(len(names)) + b"".join(struct.pack("<II", _TEXT, len(name)) + name for name in names)


def _order(join_key: JoinKey) -> list[int]:
    return [0] if isinstance(join_key, str) else [join_key.index(name) for name in sorted_names(join_key)]


def _piece(text: str) -> bytes:
    data = text.encode()
    return b"\x02\x00\x00\x00" + _SIZE.pack(len(data)) + data


# -- values ------------------------------------------------------------------------------------------------------------


def encode_value(value: Value) -> bytes:
    """Feast's Value message: string_val 2, int64_val 4, double_val 5, bool_val 7; empty for a null, and NaN is one, as Feast has it.

    Raises OverflowError for a whole number beyond 64 bits, TypeError for what is no text, number or truth value.
    """
    kind = type(value)
    if kind is int:
        if not -_LARGEST <= value < _LARGEST:  # type: ignore[operator]
            raise OverflowError("a whole number of at most 64 bits was expected, found a larger one")
        return b"\x20" + _varint(value & 0xFFFFFFFFFFFFFFFF)  # type: ignore[operator]
    if value is None:
        return b""
    if isinstance(value, str):
        data = value.encode()
        return b"\x12" + _varint(len(data)) + data
    if kind is bool:
        return b"\x38\x01" if value else b"\x38\x00"
    if isinstance(value, float):
        return b"" if math.isnan(value) else b"\x29" + _DOUBLE.pack(value)
    raise TypeError(f"a text, a number of Python's, a truth value or None was expected, found {kind.__name__}")


def decode_value(data: bytes) -> Value:
    """Bytes of a Value message -> the value; None for a null. Raises ValueError for bytes that Feast cannot have written."""
    if not data:
        return None
    try:
        tag, body = data[0], data[1:]
        if tag in (0x18, 0x20, 0x38, 0x40):  # int32_val, int64_val, bool_val, unix_timestamp_val
            number, rest = _number(body)
            if rest:
                raise ValueError
            return bool(number) if tag == 0x38 else number - 2**64 if number >= _LARGEST else number
        if tag == 0x12:
            size, text = _number(body)
            if size != len(text):
                raise ValueError
            return text.decode()
        if tag in (0x29, 0x35):
            found: float = (_DOUBLE if tag == 0x29 else _SINGLE).unpack(body)[0]
            return found
        if data == _NULL:
            return None
    except (IndexError, ValueError, struct.error):
        pass
    raise ValueError(f"{len(data)} bytes that are no text, number or truth value of Feast's")


_NULL = b"\x98\x01\x00"  # null_val, field 19


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _ONE[number]
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


_ONE = [bytes([n]) for n in range(0x80)]


def _number(data: bytes) -> tuple[int, bytes]:
    number = shift = at = 0
    while True:
        digit = data[at]
        number |= (digit & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if digit < 0x80:
            break
    if number >= 2**64:
        raise ValueError
    return number, data[at:]


# -- SQLite ------------------------------------------------------------------------------------------------------------


def table_of(view: str) -> str:
    """The view's table in the SQLite store."""
    return f"{PROJECT}_{view}"


def stored_seconds(time_us: int) -> int:
    """`event_ts` as Feast writes it to SQLite: naive UTC taken for local time, in whole seconds."""
    return int((_EPOCH + timedelta(microseconds=time_us)).timestamp())


def read_seconds(stored: int | float | str) -> float:
    """A stored `event_ts` -> seconds since 1970, UTC."""
    if isinstance(stored, str):
        read = datetime.fromisoformat(stored)
        return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()
    return stored + time.localtime(stored).tm_gmtoff


# -- Redis -------------------------------------------------------------------------------------------------------------


def redis_key(key: bytes) -> bytes:
    """An encoded key -> the hash in which Redis keeps the rows of all views of that entity."""
    return key + PROJECT.encode()


def entity_of(key: bytes) -> bytes:
    """The inverse of `redis_key`."""
    return key[: -len(PROJECT)]


@cache
def redis_field(view: str, feature: str) -> bytes:
    """The field of that hash which holds a feature."""
    return _SIZE.pack(mmh3.hash(f"{view}:{feature}", signed=False))


@cache
def redis_time_field(view: str) -> bytes:
    """The field which holds when the row of the view changed."""
    return f"_ts:{view}".encode()


def encode_time(time_us: int) -> bytes:
    """A protobuf Timestamp of so many microseconds since 1970."""
    seconds, micros = divmod(time_us, 1_000_000)
    out = b"\x08" + _varint(seconds & 0xFFFFFFFFFFFFFFFF) if seconds else b""
    return out + (b"\x10" + _varint(micros * 1_000) if micros else b"")


def decode_time(data: bytes) -> int:
    """Bytes of a Timestamp -> microseconds since 1970. Raises ValueError for bytes that are none."""
    parts = {0x08: 0, 0x10: 0}
    while data:
        if data[0] not in parts:
            raise ValueError(f"{len(data)} bytes that are no Timestamp")
        tag = data[0]
        try:
            parts[tag], data = _number(data[1:])
        except IndexError:
            raise ValueError("the bytes of a Timestamp end too early") from None
    seconds = parts[0x08] - (2**64 if parts[0x08] >= _LARGEST else 0)
    return seconds * 1_000_000 + parts[0x10] // 1_000
