"""Who is turned away before their request is parsed: whole requests, in order, in the words that the gateway uses too."""

import asyncio
import logging
from types import SimpleNamespace

import httptools
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState

from serving import admission, crowd
from serving.admission import Admission, Gate, is_whole, written
from serving.crowd import Crowd
from tests.serving.transport import Transport

BODY = b'{"customer_ids":["c1"]}'


def request(path=b"/churn", *, method=b"POST", body=BODY, version=b"1.1", headers=()):
    lines = [b"%b %b HTTP/%b" % (method, path, version), b"host: shop", *headers, b"Content-Length: %d" % len(body)]
    return b"\r\n".join((*lines, b"", body))


class Application:
    """Answers 200 once it may. `gate`: with a line of its own."""

    def __init__(self):
        self.crowd = Crowd(0.25)
        self.gate = Gate(self.crowd, ["/churn", "/recommend"])
        self.asked, self.may_answer = [], asyncio.Event()
        self.may_answer.set()

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.asked.append((scope["path"], body))
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def is_crowded(self, flag=True):
        self.crowd._in_line, self.crowd.answer_s = (10_000, 1.0) if flag else (0, 0.001)


@pytest.fixture
def world():
    """`app`, and a connection to it: `feed` gives it bytes, and lets it work."""
    with asyncio.Runner() as runner:

        async def made():
            app = Application()
            config = uvicorn.Config(app=app, log_config=None, proxy_headers=False, lifespan="off", timeout_keep_alive=60)
            connection = Admission(config, ServerState(), {}, asyncio.get_running_loop())
            connection.connection_made(Transport())
            return app, connection

        app, connection = runner.run(made())

        def feed(*some):
            async def fed():
                for data in some:
                    connection.data_received(data)
                for _ in range(5):
                    await asyncio.sleep(0)

            runner.run(fed())
            return statuses(connection.transport.said)

        yield SimpleNamespace(app=app, connection=connection, feed=feed, runner=runner)


def statuses(said):
    return [int(part[:3]) for part in said.split(b"HTTP/1.1 ")[1:]]


def test_request_that_finds_a_long_line_is_turned_away_and_nobody_sees_it(world):
    world.app.is_crowded()
    assert world.feed(request()) == [503]
    assert b'"code":"overloaded"' in world.connection.transport.said
    assert world.app.asked == []
    world.app.is_crowded(False)
    assert world.feed(request()) == [503, 200]  # on the same connection, which stays open
    assert world.app.asked == [("/churn", BODY)]


@pytest.mark.parametrize(
    "data",
    [
        request(b"/v1/track"),
        request(b"/healthz", method=b"GET", body=b""),
        request(b"/churn", method=b"PUT"),
        request(headers=[b"Connection: close"]),
        request(headers=[b"Expect: 100-continue"]),
        request(version=b"1.0"),
    ],
    ids=["events", "health", "another method", "a last request", "one that asks first", "an old client"],
)
def test_others_go_their_usual_way_however_long_the_line(world, data):
    world.app.is_crowded()
    assert 503 not in world.feed(data)
    assert world.app.asked


def test_request_in_pieces_is_the_gateways_to_refuse(world):
    world.app.is_crowded()
    data = request()
    assert world.feed(data[:40], data[40:]) == [200]
    world.app.is_crowded()
    assert world.feed(data[:-1]) == [200]
    world.app.is_crowded()
    assert world.feed(data[-1:], data) == [200, 200, 200]  # what was left of one, and a whole one behind it while its answer is owed
    assert world.app.asked == [("/churn", BODY)] * 3


def test_request_behind_one_that_is_not_answered_yet_waits_for_its_answer(world):
    world.app.may_answer.clear()
    world.feed(request(b"/recommend"))
    world.app.is_crowded()
    assert world.feed(request()) == []
    world.app.may_answer.set()
    assert world.feed() == [200, 200]
    assert [path for path, _ in world.app.asked] == ["/recommend", "/churn"]


def test_connection_is_not_idle_while_it_is_refused(world):
    world.feed(request())
    timer = world.connection.timeout_keep_alive_task
    world.app.is_crowded()
    world.feed(request())

    async def time_is_up():
        world.connection.timeout_keep_alive_handler()

    world.runner.run(time_is_up())
    assert not world.connection.transport.is_closed
    assert world.connection.timeout_keep_alive_task is not timer
    world.runner.run(time_is_up())
    assert world.connection.transport.is_closed


def test_those_turned_away_are_counted_together_and_told_once(world, caplog):
    from prometheus_client import REGISTRY

    names = (("rapport_shed_total", {"priority": "scores"}), ("rapport_request_seconds_count", {"endpoint": "/churn", "code": "503"}))
    before = [REGISTRY.get_sample_value(*name) or 0 for name in names]
    world.app.is_crowded()
    with caplog.at_level(logging.WARNING, logger="rapport.serving"):
        world.feed(*[request()] * 50)
    assert [REGISTRY.get_sample_value(*name) for name in names] == [n + 50 for n in before]
    assert caplog.text.count("50 requests were turned away") == 1


def test_application_without_a_gate_is_served_as_ever():
    async def served():
        answered = []

        async def app(scope, receive, send):
            answered.append(scope["path"])
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})

        config = uvicorn.Config(app=app, log_config=None, proxy_headers=False, lifespan="off")
        connection = Admission(config, ServerState(), {}, asyncio.get_running_loop())
        connection.connection_made(Transport())
        connection.data_received(request())
        await asyncio.sleep(0.01)
        return answered

    assert asyncio.run(served()) == ["/churn"]


def test_uvicorn_as_bentoml_starts_it_takes_connections_in_this_way(monkeypatch):
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    usual = uvicorn.Config(app=Application())
    usual.load()
    assert usual.http_protocol_class is not Admission
    admission.use()
    config = uvicorn.Config(app=Application())
    config.load()
    assert config.http_protocol_class is Admission
    assert isinstance(config.app.gate, Gate)  # whatever uvicorn wraps around it


@given(
    body=st.binary(max_size=60),
    path=st.text("abcdefghijklmnop/", max_size=20),
    names=st.lists(st.sampled_from([b"Accept: */*", b"Authorization: Bearer x", b"Connection: keep-alive", b"X: \xff"]), max_size=4),
    cut=st.integers(1, 400),
    more=st.binary(min_size=1, max_size=8),
)
def test_a_request_is_whole_and_neither_a_part_of_it_nor_more_than_it(body, path, names, cut, more):
    data = request(b"/" + path.encode(), body=body, headers=names)
    assert is_whole(data)
    assert not is_whole(data[:-cut])
    assert not is_whole(data + more)
    assert seen_by_httptools(data) == [body]


@pytest.mark.parametrize(
    "headers",
    [[b"Transfer-Encoding: chunked"], [b"Content-Length: 5"], [b"CONNECTION: Close"], [b"Upgrade: websocket"], [b"expect: 100-continue"]],
    ids=["chunked", "two lengths", "last", "upgrade", "asks first"],
)
def test_request_whose_end_is_not_beyond_doubt_is_not_called_whole(headers):
    assert not is_whole(request(headers=headers))


def test_length_that_is_none_is_not_called_whole():
    for length in (b"-1", b"+23", b"0x17", b"", b"2 3", b"\xb2\xb3"):
        assert not is_whole(request().replace(b"23", length))
    assert not is_whole(b"GET /docs HTTP/1.1\r\nhost: shop\r\n\r\n")


def seen_by_httptools(data):
    class Seen:
        def __init__(self):
            self.bodies = []

        def on_message_begin(self):
            self.bodies.append(b"")

        def on_body(self, body):
            self.bodies[-1] += body

    seen = Seen()
    httptools.HttpRequestParser(seen).feed_data(data)
    return seen.bodies


def test_what_is_written_is_what_uvicorn_would_have_written():
    said = written(503, b"{}", [(b"retry-after", b"1")])([(b"date", b"now")])
    assert said.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")

    class Answer:
        def __init__(self):
            self.headers, self.body = {}, b""

        def on_header(self, name, value):
            self.headers[name] = value

        def on_body(self, body):
            self.body += body

    answer = Answer()
    parser = httptools.HttpResponseParser(answer)
    parser.feed_data(said)
    assert parser.get_status_code() == 503
    assert (answer.headers[b"date"], answer.headers[b"retry-after"]) == (b"now", b"1")
    assert answer.headers[b"content-type"] == b"application/json"
    assert (answer.body, answer.headers[b"content-length"]) == (b"{}", b"2")


def test_an_answer_sent_at_once_says_what_uvicorn_says_of_it(world):
    told = [(b"cache-control", b"no-store"), (b"x-request-id", b"1"), (b"content-length", b"2")]
    at_once, way = [], {}

    async def app(scope, receive, send):
        await receive()
        head = b"".join(b"%b: %b\r\n" % one for one in told)
        connection = scope.get(admission.CONNECTION)
        at_once.append(way["is_at_once"] and connection is not None and connection.answer(scope, head, b"{}"))
        if not at_once[-1]:
            await send({"type": "http.response.start", "status": 200, "headers": told})
            await send({"type": "http.response.body", "body": b"{}"})

    world.connection.app, world.connection.server_state.default_headers = app, [(b"server", b"uvicorn")]
    said = []
    for way["is_at_once"] in (False, True):
        world.connection.transport.said = b""
        assert world.feed(request(), request()) == [200, 200]  # two at once: the second waits for the first
        said.append(world.connection.transport.said)
    assert said[0] == said[1]
    assert at_once == [False, False, False, True]
    assert world.connection.timeout_keep_alive_task is not None  # who is silent now is idle
    assert world.feed(request(headers=[b"Connection: close"]))[-1] == 200
    assert world.connection.transport.is_closed


def test_as_many_as_wait_little_are_let_in_however_long_an_answer_took():
    line = Crowd(0.25, loop=lambda: SimpleNamespace(call_soon=lambda call: None))
    line.answer_s = 10.0
    let_in = 0
    while not line.is_long or line.lets_in(crowd.Priority.DECISION):
        line.stand_in_line()
        let_in += 1
    assert let_in == crowd.FEW
