"""Traces over the wire: a collector that decodes what the service sends."""

import asyncio
import json
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from pydantic import SecretStr

from pipelines.settings import ServingSettings, Settings
from serving import access, metrics, otlp
from serving.access import Role
from serving.otlp import Exporter
from serving.tracing import Span, Trace

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """An end waits for the thread that sends, however long the machine lets it wait; not as long as a collector may ask for."""
    monkeypatch.setattr(otlp, "CLOSE_S", otlp.LONGEST_WAIT_S / 2)


@pytest.fixture
def collector():
    """An OTLP receiver: `url`, what it was `sent`; answers with the `statuses` and then with `status`, and says `later`."""
    found = SimpleNamespace(sent=[], status=200, statuses=[], later=None)

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            found.sent.append((self.path, dict(self.headers), ExportTraceServiceRequest.FromString(body)))
            self.send_response(found.statuses.pop(0) if found.statuses else found.status)
            if found.later:
                self.send_header("retry-after", found.later)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    yield found
    server.shutdown()
    server.server_close()


def attributes(span):
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def count(outcome):
    return metrics.traces(outcome)._value.get()


def test_sampled_request_is_told_to_the_collector_and_names_nobody(shop, rehearse, cast, collector, monkeypatch):
    from serving.service import build

    monkeypatch.setattr(otlp, "BATCH_S", 0.01)
    serving = ServingSettings(otlp_endpoint=collector.url, otlp_headers={"x-key": SecretStr("of the collector")}, deadline_ms=10_000)
    settings = Settings(home=shop, serving=serving)
    access.ensure_keys(settings)
    service = build(settings, rehearse=rehearse, poll_s=3_600)
    gateway, key, who = service.to_asgi(), access.read_key(settings, Role.DECIDE), cast.customers[1]

    async def ask():
        transport = httpx.ASGITransport(gateway, client=("10.1.2.3", 5))
        async with gateway.app.router.lifespan_context(gateway.app), httpx.AsyncClient(transport=transport, base_url="http://shop") as http:
            answers = []
            for path, body in (("/churn", {"customer_ids": [who]}), ("/recommend", {"customer_id": who}), (f"/profile/{who}", {})):
                for flags in ("01", "00"):
                    headers = {"Authorization": f"Bearer {key}", "traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
                    answers.append(await http.post(f"{path}?q={who}", json=body, headers=headers))
            return answers

    answers = asyncio.run(ask())  # its end closes the exporter
    paths, headers, requests = zip(*collector.sent, strict=True)
    assert set(paths) == {"/v1/traces"}
    assert headers[0]["Content-Type"] == "application/x-protobuf"
    assert headers[0]["x-key"] == "of the collector"
    spans = [span for request in requests for group in request.resource_spans for scope in group.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    roots = {span.name: span for span in spans if span.parent_span_id.hex() == PARENT}
    assert set(roots) == {"POST /churn", "POST /recommend", "POST /profile/{customer_id}"}  # the sampled ones alone
    for path, parts in (
        ("/churn", {"rung", "consent", "features", "model", "reasons"}),
        ("/recommend", {"rung", "consent", "features", "model"}),
    ):
        root = roots[f"POST {path}"]
        below, ids = set(), {root.span_id}
        for _ in spans:
            found = [span for span in spans if span.parent_span_id in ids]
            below, ids = below | {span.name for span in found}, ids | {span.span_id for span in found}
        assert parts <= below
        told = attributes(root)
        assert (told["http.route"], told["http.response.status_code"]) == (path, 200)
        assert told["rapport.request_id"] in {answer.headers["x-request-id"] for answer in answers}
    for request in requests:
        text = str(request)
        assert not [mark for mark in (who, key, "10.1.2.3", "item-") if mark in text]
    assert who in str(answers[0].content)  # control: it is what was asked for


def one(name="POST /churn"):
    return Trace(b"t" * 16, Span(name, b"p" * 8, attributes={"text": "x", "whole": 3, "share": 0.5, "flag": True}))


def test_attributes_keep_their_kinds():
    request = ExportTraceServiceRequest.FromString(otlp.encode([one()]))
    (span,) = request.resource_spans[0].scope_spans[0].spans
    assert attributes(span) == {"text": "x", "whole": 3, "share": 0.5, "flag": True}
    assert attributes(request.resource_spans[0].resource) == {"service.name": "rapport"}


def test_collector_that_refuses_or_is_gone_costs_the_traces_alone_and_is_told_once(collector, caplog):
    collector.status, before = 503, count("failed")
    exporter = Exporter(collector.url)
    exporter.offer(one())
    exporter.close()
    gone = Exporter("http://127.0.0.1:9/v1/traces")
    for _ in range(3):
        gone.offer(one())
        gone.close()
    assert count("failed") == before + 4
    assert caplog.text.count("dropped") == 2


class Patience(threading.Event):
    """Waits no time, and notes how long it was to."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def wait(self, timeout=None):
        self.waits.append(timeout)
        return self.is_set()


def delivered(collector):
    """What becomes of one trace, how often it was sent, and the waits between."""
    exporter = Exporter(collector.url)
    exporter._is_closing = Patience()
    outcome = exporter._send([one()])
    assert len({request.SerializeToString() for _, _, request in collector.sent}) == 1  # the same each time
    return outcome, len(collector.sent), exporter._is_closing.waits


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_a_collector_cannot_take_now_is_sent_again_ever_later(collector, status):
    collector.statuses = [status] * 3
    outcome, n, waits = delivered(collector)
    assert (outcome, n) == ("exported", 4)
    assert all(0.5 * 2**i <= wait <= 1.5 * 2**i for i, wait in enumerate(waits))


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 501])
def test_what_a_collector_refuses_is_not_sent_again(collector, status):
    collector.status = status
    assert delivered(collector) == ("failed", 1, [])


def test_collector_says_when_and_is_believed_within_reason(collector):
    for later, expected in (("7", 7.0), ("86400", otlp.LONGEST_WAIT_S), ("0", 0.0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0)):
        collector.statuses, collector.later = [429], later
        collector.sent.clear()
        assert delivered(collector) == ("exported", 2, [expected])
    assert otlp._seconds(format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)) == pytest.approx(3_600, abs=60)
    assert [otlp._seconds(text) for text in (None, "", "soon", "-1", "1e9", "\u0665")] == [None] * 6


def test_what_is_sent_in_vain_is_given_up(collector):
    collector.status = 503
    outcome, n, waits = delivered(collector)
    assert (outcome, n, len(waits)) == ("failed", otlp.TRIES, otlp.TRIES - 1)


def test_end_does_not_wait_for_a_collector_that_is_ill(collector, monkeypatch):
    monkeypatch.setattr(otlp, "BATCH_S", 0.0)
    collector.status, collector.later, before = 503, "60", count("failed")
    exporter = Exporter(collector.url, queue_traces=1)
    exporter.offer(one())
    while not collector.sent:
        time.sleep(0.005)
    exporter.offer(one())  # the queue is full: nothing more can be put into it
    exporter.close()
    assert count("failed") == before + 2


def test_traces_beyond_what_may_wait_are_dropped_and_counted(monkeypatch):
    release, reached = threading.Event(), threading.Event()

    def hangs(self, traces):
        reached.set()
        assert release.wait(60)
        return "exported"

    monkeypatch.setattr(Exporter, "_send", hangs)
    monkeypatch.setattr(otlp, "BATCH_S", 0.0)
    exporter, before = Exporter("http://nowhere", queue_traces=2), count("dropped")
    exporter.offer(one())
    assert reached.wait(60)
    for _ in range(5):
        exporter.offer(one())
    assert count("dropped") == before + 3
    release.set()
    exporter.close()


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://x", "http:///v1", "file:///etc"])
def test_endpoint_that_is_none_is_refused_by_the_settings(endpoint):
    with pytest.raises(ValueError, match="otlp_endpoint"):
        ServingSettings(otlp_endpoint=endpoint)


def test_settings_reach_the_service_of_a_process(tmp_path):
    from serving.process import environment

    made = Settings(home=tmp_path, serving=ServingSettings(otlp_endpoint="http://c:4318/v1/traces", otlp_headers={"a": SecretStr("b")}))
    told = json.loads(environment(made, tmp_path)["RAPPORT_SERVING"])
    assert (told["otlp_endpoint"], told["otlp_headers"]) == ("http://c:4318/v1/traces", {"a": "b"})
