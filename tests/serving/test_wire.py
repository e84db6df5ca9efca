import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.wire import BadRequest, RecommendRequest, ScoreRequest, decode, encode_problem

GOOD = {"customer_id": "c1"}
NAMES = st.sampled_from(["customer_id", "customer_ids", "k", "exclude", "filters", "context"]) | st.text()


def test_request_out_of_bounds_is_refused_with_the_field_at_fault(bad_request):
    path, body, field = bad_request
    with pytest.raises(BadRequest) as refused:
        decode(RecommendRequest if path == "/recommend" else ScoreRequest, body)
    assert refused.value.field == field
    assert refused.value.message


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (RecommendRequest, GOOD),
        (RecommendRequest, {"anonymous_id": "a", "k": 200, "item_id": "i", "exclude": ["x"], "filters": {"category": ["b"]}}),
        (RecommendRequest, GOOD | {"item_id": None, "context": {"page": "home", "depth": [1, {"x": 2.5}]}}),
        (RecommendRequest, {"customer_id": "x" * 256, "anonymous_id": "🛒", "k": 1}),
        (ScoreRequest, {"customer_ids": ["x"] * 1_000}),
    ],
)
def test_request_at_the_bounds_is_accepted(kind, body):
    assert decode(kind, json.dumps(body).encode())


@settings(max_examples=150)
@given(
    body=st.binary(max_size=80) | st.recursive(st.none() | st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_whatever_is_sent_is_a_request_or_a_bad_request(body):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    for kind in (RecommendRequest, ScoreRequest):
        assert _outcome(kind, raw)


def _outcome(kind, raw):
    try:
        return decode(kind, raw)
    except BadRequest as refused:
        return json.loads(encode_problem(refused.code, refused.message, refused.field))["error"]["code"]


def test_refusal_never_repeats_the_value():
    with pytest.raises(BadRequest) as refused:
        decode(RecommendRequest, b'{"customer_id": {"secret": "eve@example.com"}, "k": "eve@example.com"}')
    assert "eve@example.com" not in refused.value.message


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"customer_id": "eve@example.com"', "EOF while parsing an object at line 1 column 33"),
        (b'{"customer_id": eve@example.com}', "expected value at line 1 column 17"),
        (b'{"context": ' + b"[" * 10_000, "recursion limit exceeded"),
        (b'{"customer_id": "\\ud800"}', "hex escape at line 1 column 24"),
        (b'{"customer": "eve@example.com"}', "customer: no field of this name is expected; there are: customer_id, anonymous_id, k,"),
        (b'{"customer_id": "c", "filters": {"x": "eve@example.com"}}', "filters.x: no field of this name is expected"),
    ],
    ids=["ends early", "no value", "deep", "surrogate", "unknown field", "unknown field within"],
)
def test_refusal_says_where_and_what_is_expected_instead(body, told):
    with pytest.raises(BadRequest) as refused:
        decode(RecommendRequest, body)
    assert told in refused.value.message
    assert "eve@" not in refused.value.message
