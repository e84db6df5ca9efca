import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.log_lines import fields
from serving.access_log import AccessLog
from serving.tracing import Request


class Lines(logging.Handler):
    """What was written."""

    def __init__(self):
        super().__init__()
        self.told = []

    def emit(self, record):
        self.told.append(fields(record))


@pytest.fixture
def lines():
    handler, logger = Lines(), logging.getLogger("rapport.access")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.told
    logger.removeHandler(handler)
    logger.setLevel(before)


def written(which, lines, *, status=200, took_s=0.001, is_degraded=False):
    request = Request()
    request.is_degraded = is_degraded
    AccessLog(which, slow_ms=100, per_s=5).note(request, "/churn", status, took_s)
    return len(lines)


@pytest.mark.parametrize(
    ("which", "asked", "expected"),
    [
        ("notable", {}, 0),
        ("notable", {"status": 302}, 0),
        ("notable", {"status": 404}, 1),
        ("notable", {"status": 503}, 1),
        ("notable", {"took_s": 0.2}, 1),
        ("notable", {"is_degraded": True}, 1),
        ("all", {}, 1),
        ("none", {"status": 500, "took_s": 9.0, "is_degraded": True}, 0),
    ],
    ids=["good", "onward", "refused", "failed", "slow", "degraded", "all", "none"],
)
def test_requests_get_a_line_that_somebody_will_ask_about(lines, which, asked, expected):
    assert written(which, lines, **asked) == expected


def test_line_says_what_became_of_the_request(lines):
    request = Request()
    request.steps = [("personal", "store_unavailable"), ("stale", "store_unavailable")]
    AccessLog("notable", slow_ms=100, per_s=5).note(request, "/churn", 503, 0.0123)
    (line,) = lines
    assert {name: line[name] for name in ("message", "level", "endpoint", "rung", "cause", "status", "duration_ms")} == {
        "message": "request", "level": "WARNING", "endpoint": "/churn", "rung": "personal, stale", "cause": "store_unavailable",
        "status": 503, "duration_ms": 12.3,
    }  # fmt: skip


@given(gaps=st.lists(st.sampled_from([0.0, 0.01, 0.3, 2.0]), min_size=1, max_size=60), per_s=st.integers(1, 5))
def test_no_second_has_more_lines_than_allowed_and_each_request_is_told_or_counted(gaps, per_s):
    handler, logger, now = Lines(), logging.getLogger("rapport.access"), [100.0]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        log, seconds = AccessLog("notable", slow_ms=100, per_s=per_s, clock=lambda: now[0]), []
        for gap in gaps:
            now[0] += gap
            before = len(handler.told)
            log.note(Request(), "other", 404, 0.0)
            seconds += [int(now[0])] * (len(handler.told) - before)
        assert max(map(seconds.count, seconds)) <= per_s
        now[0] += 1
        log.note(Request(), "other", 404, 0.0)
        assert len(handler.told) + sum(line.get("suppressed", 0) for line in handler.told) == len(gaps) + 1
    finally:
        logger.removeHandler(handler)
