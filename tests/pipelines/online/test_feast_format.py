"""Feast's bytes, held against Feast's own code for any text and value."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.online import feast_format as ff

TEXTS = st.text(max_size=40)
NAMES = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=20)
WHOLE = st.integers(-(2**63), 2**63 - 1)
VALUES = st.none() | st.booleans() | st.text(max_size=300) | WHOLE | st.floats()
FIELDS = {bool: "bool_val", str: "string_val", int: "int64_val", float: "double_val"}
PAIRS = st.lists(NAMES, min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.tuples(st.just(names), st.tuples(*(TEXTS for _ in names)))
)


def message(value):
    from feast.protos.feast.types.Value_pb2 import Value as Proto

    return Proto() if value is None else Proto(**{FIELDS[type(value)]: value})


def feasts_key(names, texts):
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey

    return serialize_entity_key(EntityKey(join_keys=names, entity_values=[message(t) for t in texts]), entity_key_serialization_version=3)


def ours(names, texts):
    return (names[0], texts[0]) if len(names) == 1 else (tuple(names), texts)


@settings(max_examples=200)
@given(PAIRS)
@example((["item_id", "customer_id"], ("i", "c")))
def test_key_is_the_bytes_that_feast_makes_of_it_and_is_read_back(pair):
    names, texts = pair
    join_key, key = ours(names, texts)
    made = ff.key_encoder(join_key)(key)
    assert made == feasts_key(names, texts)
    assert ff.key_decoder(join_key)(made) == key
    first = key if isinstance(key, str) else dict(zip(names, texts, strict=True))[sorted(names)[0]]
    assert made.startswith(ff.key_prefix(join_key, first))


def test_keys_that_are_not_sorted_as_feast_sorts_them_would_be_told_apart():
    """Control: the order of the declaration is not the order of the bytes."""
    assert ff.key_encoder(("item_id", "customer_id"))(("i", "c")) == feasts_key(["customer_id", "item_id"], ("c", "i"))
    assert ff.key_encoder(("item_id", "customer_id"))(("i", "c")) != feasts_key(["customer_id", "item_id"], ("i", "c"))


@settings(max_examples=300)
@given(VALUES)
@example(math.nan)
@example(-0.0)
def test_value_is_the_bytes_that_feast_makes_of_it_and_is_read_back(value):
    made = ff.encode_value(value)
    if isinstance(value, float) and math.isnan(value):
        assert made == b"", "Feast's own writer keeps NaN as a null"
        value = None
    assert made == message(value).SerializeToString()
    assert repr(ff.decode_value(made)) == repr(value)


@settings(max_examples=200)
@given(st.integers(-(2**31), 2**31 - 1), st.floats(width=32), WHOLE)
def test_other_numbers_that_feast_writes_are_read(small, single, instant):
    from feast.protos.feast.types.Value_pb2 import Value as Proto

    for field, value in (("int32_val", small), ("float_val", single), ("unix_timestamp_val", instant)):
        assert repr(ff.decode_value(Proto(**{field: value}).SerializeToString())) == repr(value)
    assert ff.decode_value(Proto(null_val=0).SerializeToString()) is None


@pytest.mark.parametrize("data", [b"\x29\x00\x00", b"\x20", b"\x20\x80", b"\x12\x05ab", b"\x20\x01\x00", b"\x62\x00", b"\x12\x02\xff\xff"])
def test_bytes_that_feast_cannot_have_written_are_refused(data):
    with pytest.raises(ValueError, match="bytes that are no"):
        ff.decode_value(data)


@settings(max_examples=200)
@given(st.binary(max_size=30))
def test_any_bytes_are_a_value_or_refused(data):
    try:
        ff.decode_value(data)
    except ValueError:
        return


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_number_beyond_64_bits_is_refused_not_wrapped(value):
    with pytest.raises(OverflowError):
        ff.encode_value(value)


def test_what_is_no_value_is_refused():
    import numpy as np

    for value in (np.int64(3), b"x", [1], np.bool_(True)):
        with pytest.raises(TypeError, match=type(value).__name__):
            ff.encode_value(value)


@settings(max_examples=100)
@given(NAMES, NAMES, TEXTS)
def test_place_in_redis_is_feasts(view, feature, text):
    from feast.infra.online_stores.helpers import _mmh3, _redis_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey

    assert ff.redis_field(view, feature) == _mmh3(f"{view}:{feature}")
    key = ff.key_encoder("customer_id")(text)
    assert ff.redis_key(key) == _redis_key(ff.PROJECT, EntityKey(join_keys=["customer_id"], entity_values=[message(text)]))
    assert ff.entity_of(ff.redis_key(key)) == key


@settings(max_examples=200)
@given(st.integers(-(10**15), 10**16))
@example(0)
@example(1_000_000)
@example(-1)
def test_time_is_the_bytes_that_feast_makes_of_it_and_is_read_back(time_us):
    from google.protobuf.timestamp_pb2 import Timestamp

    made = ff.encode_time(time_us)
    assert made == Timestamp(seconds=time_us // 10**6, nanos=time_us % 10**6 * 1_000).SerializeToString()
    assert ff.decode_time(made) == time_us


@settings(max_examples=100)
@given(st.integers(0, 4 * 10**15))
def test_seconds_in_sqlite_are_read_back_whole(time_us):
    assert ff.read_seconds(ff.stored_seconds(time_us)) == time_us // 10**6
