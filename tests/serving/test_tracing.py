import contextvars

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import tracing
from serving.fallbacks import Declined, Rung, Unavailable, descend
from serving.tracing import Tracer, parent_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def isolated(work):
    """A request has a context of its own, as each call of an ASGI server has."""
    return contextvars.copy_context().run(work)


@pytest.mark.parametrize(
    ("header", "is_followed"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-ff", True),
        (f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like", True),
        (f"00-{TRACE}-{PARENT}-00", False),
        (f"00-{TRACE}-{PARENT}-02", False),
        (f"00-{TRACE}-{PARENT}-01-more", False),
        (f"ff-{TRACE}-{PARENT}-01", False),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{PARENT}-01", False),
        (f" 00-{TRACE}-{PARENT}-01", False),
        ("eve@example.com", False),
        ("", False),
    ],
)
def test_trace_is_followed_where_its_caller_sampled_it(header, is_followed):
    expected = (bytes.fromhex(TRACE), bytes.fromhex(PARENT)) if is_followed else None
    assert parent_of(header.encode()) == expected


@given(st.binary(max_size=80))
def test_no_other_header_is_a_trace(header):
    assert parent_of(header) is None


def test_spans_hang_below_the_request_as_they_were_nested():
    exported = []
    tracer = Tracer(exported.append)

    def work():
        request = tracing.begin(tracer.begin([(b"host", b"x"), (b"traceparent", f"00-{TRACE}-{PARENT}-01".encode())]))
        with tracing.span("rung", "personal"), tracing.span("features"):
            pass
        with tracing.span("model"):
            pass
        tracer.end(request, "POST", "/churn", 200)

    isolated(work)
    (trace,) = exported
    root, *spans = tracing.ended(trace)
    named = {span.name: span for span in spans}
    assert (trace.id.hex(), root.parent.hex(), root.name) == (TRACE, PARENT, "POST /churn")
    assert named["features"].parent == named["rung"].id
    assert named["rung"].parent == named["model"].parent == root.id
    assert len({span.id for span in (root, *spans)}) == 4
    assert all(root.start_ns <= span.start_ns <= span.end_ns <= root.end_ns for span in spans)


def test_ladder_is_told_by_its_rungs_and_a_rung_that_does_not_apply_is_no_failure():
    exported, tracer = [], Tracer(lambda trace: exported.append(trace))

    def declines():
        raise Declined("consent")

    def fails():
        raise Unavailable("store_unavailable")

    def work():
        request = tracing.begin(tracer.begin([(b"traceparent", f"00-{TRACE}-{PARENT}-01".encode())]))
        descend("/recommend", [Rung("personal", fails), Rung("segment", declines), Rung("static", lambda: 1)])
        tracer.end(request, "BREW", "/recommend", 200)

    isolated(work)
    root, *rungs = tracing.ended(exported[0])
    assert [(span.attributes["rapport.rung"], span.attributes.get("rapport.cause"), span.is_failed) for span in rungs] == [
        ("personal", "store_unavailable", True), ("segment", "consent", False), ("static", None, False),
    ]  # fmt: skip
    assert root.attributes["rapport.causes"] == "store_unavailable, consent"
    assert root.attributes["rapport.degraded"] is True
    assert root.name == "_OTHER /recommend"


@pytest.mark.parametrize("header", [None, f"00-{TRACE}-{PARENT}-00"])
def test_without_a_sampled_trace_no_span_is_made(header, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a span was made")

    monkeypatch.setattr(tracing, "Span", never)
    tracer = Tracer(never)

    def work():
        headers = [(b"traceparent", header.encode())] if header else []
        request = tracing.begin(tracer.begin(headers))
        with tracing.span("model"), tracing.span("rung", "personal"):
            tracing.step_down("personal", "consent", is_failure=False)
        tracer.end(request, "POST", "/churn", 200)
        return request

    request = isolated(work)
    assert request.steps == [("personal", "consent")]
    assert not request.is_degraded
    assert set(request.log_fields()) == {"request_id"}
