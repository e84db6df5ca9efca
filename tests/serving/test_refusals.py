"""One law for every refusal, whoever makes it and however early: its shape, its number, and the headers that every answer has."""

import asyncio
import json
import re
from types import SimpleNamespace

import httptools
import pytest
import uvicorn
from pydantic import SecretStr
from uvicorn.server import ServerState

from pipelines.settings import Settings
from serving import access, admission, gateway, wire
from serving.admission import Admission
from serving.gateway import Gateway
from serving.rates import Rates
from tests.serving.transport import Transport

GUARDS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "date": "now",
}
BODY = b'{"customer_ids": ["c1"]}'
HEAD = b"x-filler: " + b"x" * admission.HEAD_BYTES


def request(path=b"/churn", *, method=b"POST", key=b"decide", body=BODY, headers=(), length=None):
    told = [b"Authorization: Bearer " + key] if key else []
    lines = [b"%b %b HTTP/1.1" % (method, path), b"Host: shop", *told, *headers, b"Content-Length: %d" % (length or len(body))]
    return b"\r\n".join((*lines, b"", body))


# What is sent, and the status and code of the refusal.
REFUSED = {
    "no json": (request(body=b"{"), 400, "invalid_json"),
    "wrong field": (request(body=b'{"customer_ids": []}'), 400, "invalid_request"),
    "no key": (request(key=None), 401, "unauthenticated"),
    "lesser key": (request(key=b"collect"), 403, "forbidden"),
    "no path": (request(b"/nothing"), 404, "not_found"),
    "no model": (request(b"/score/nothing"), 404, "not_found"),
    "method": (request(method=b"PUT"), 405, "method_not_allowed"),
    "another protocol": (request(method=b"PUT", headers=[b"Connection: Upgrade", b"Upgrade: websocket"]), 405, "method_not_allowed"),
    "long body": (request(length=10_000_000), 413, "body_too_large"),
    "slow body": (request(length=100), 408, "body_timeout"),
    "rate": (request(key=b"often"), 429, "rate_limited"),
    "failure": (request(b"/intent"), 500, "internal"),
    "crowd": (request(headers=[b"Expect: nothing"]), 503, "overloaded"),
    "crowd, early": (request(), 503, "overloaded"),
    "nonsense": (b"nonsense\r\n\r\n", 400, "invalid_http"),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "invalid_http"),
    "two lengths": (request(headers=[b"Content-Length: 7"]), 400, "invalid_http"),
    "no method": (request(method=b"BREW"), 400, "invalid_http"),
    "damaged chunk": (request(headers=[b"Transfer-Encoding: chunked"]).replace(b"Content-Length: 24\r\n", b""), 400, "invalid_http"),
    "long head": (request(headers=[HEAD])[:-40], 431, "head_too_large"),
    "long path": (b"GET /" + b"x" * admission.HEAD_BYTES, 431, "head_too_large"),
    "slow head": (request()[:20], 408, "head_timeout"),
}  # fmt: skip


class Answer:
    """One answer, parsed."""

    def __init__(self, said):
        self.headers, self.body, self.names = {}, b"", []
        parser = httptools.HttpResponseParser(self)
        parser.feed_data(said)
        self.status = parser.get_status_code()

    def on_header(self, name, value):
        self.names.append(name.decode())
        self.headers[name.decode()] = value.decode()

    def on_body(self, body):
        self.body += body


async def scored(body, deadline):
    wire.decode(wire.ScoreRequest, body)
    return b"{}"


async def fails(body, deadline):
    raise RuntimeError("planted")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """`connected()`: a new connection to a gateway; `feed(connection, *data)` returns what was said until nothing happens any more.

    `hurry()`: from now on there is little time for a head or a body.
    """

    def hurry():
        monkeypatch.setattr(gateway, "BODY_TIMEOUT_S", 0.02)
        monkeypatch.setattr(admission, "HEAD_S", 0.02)

    given = {f"{role}_key": SecretStr(role) for role in ("collect", "decide", "admin")}
    settings = Settings(home=tmp_path, **given)
    access.ensure_keys(settings)
    keys = access.load_keys(settings)
    app = Gateway(
        None, handlers={"/churn": scored, "/intent": fails}, pages={}, door=None, people=None, keys=lambda: keys, is_loopback_only=True,
        max_body_bytes=1_000, deadline_ms=250,
    )  # fmt: skip
    config = uvicorn.Config(app=app, log_config=None, proxy_headers=False, lifespan="off")
    with asyncio.Runner() as runner:

        async def connected():
            state = ServerState()
            state.default_headers = [(b"date", b"now")]  # as uvicorn tells it, every second another
            made = Admission(config, state, {}, asyncio.get_running_loop())
            made.connection_made(Transport())
            return made

        async def fed(connection, data):
            for some in data:
                connection.data_received(some)
            await _until(lambda: connection.transport.said)
            return connection.transport.said

        yield SimpleNamespace(
            app=app, runner=runner, hurry=hurry, connected=lambda: runner.run(connected()),
            feed=lambda connection, *data: runner.run(fed(connection, data)),
        )  # fmt: skip


async def _until(is_so):
    for _ in range(12_000):
        if is_so():
            break
        await asyncio.sleep(0.005)


def refused(world, name):
    """The answer to what is to be refused under this name."""
    data, status, code = REFUSED[name]
    if name.startswith("slow"):
        world.hurry()
    if name == "rate":
        data, world.app.rates = request(), Rates(0.001, 1)
        world.feed(world.connected(), data)
    if name.startswith("crowd"):
        world.app.crowd._in_line, world.app.crowd.answer_s = 10_000, 1.0
    if name == "crowd":
        world.app.crowd.under_way = 10_000
    answer = Answer(world.feed(world.connected(), data))
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (status, code)
    return answer


@pytest.mark.parametrize("name", REFUSED)
def test_every_refusal_has_the_shape_the_number_and_the_guards_of_every_answer(world, name):
    answer = refused(world, name)
    error = json.loads(answer.body)["error"]
    assert {"code", "message"} <= set(error) <= {"code", "message", "field"}
    assert len(error["message"]) > 10
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]+", answer.headers["x-request-id"])
    assert answer.headers | GUARDS == answer.headers
    assert len(answer.names) == len(set(answer.names))
    if answer.status in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1


def test_usable_answer_has_them_too_and_no_two_have_one_number(world):
    answers = [Answer(world.feed(world.connected(), request())), *(refused(world, "crowd, early") for _ in range(3))]
    assert [answer.status for answer in answers] == [200, 503, 503, 503]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4
    assert answers[0].headers | GUARDS == answers[0].headers


def test_control_the_servers_own_refusal_has_none_of_them(world, monkeypatch):
    monkeypatch.setattr(Admission, "send_400_response", Admission.__mro__[1].send_400_response)
    answer = Answer(world.feed(world.connected(), b"nonsense\r\n\r\n"))
    assert (answer.status, answer.headers.get("x-request-id")) == (400, None)


def test_body_that_is_too_long_is_heard_out_before_it_is_refused_if_it_is_not_much_longer(world):
    connection = world.connected()
    world.runner.run(_said_in_pieces(connection, request(length=100_000)[: -len(BODY)], b"x" * 10_000, 9))
    assert connection.transport.said == b""
    assert Answer(world.feed(connection, b"x" * 10_000)).status == 413


async def _said_in_pieces(connection, head, piece, n):
    for data in (head, *[piece] * n):
        connection.data_received(data)
        await asyncio.sleep(0)


@pytest.mark.parametrize("name", ["no key", "no path", "long body", "slow body"])
def test_those_who_were_refused_and_go_on_dripping_are_not_waited_for(world, name):
    data = request(b"/nothing" if name == "no path" else b"/churn", key=None if name == "no key" else b"decide", length=10_000_000)
    world.hurry()
    connection = world.connected()
    assert Answer(world.feed(connection, request(length=100) if name == "slow body" else data)).status >= 400
    world.runner.run(_until(lambda: connection.transport.is_closed or connection.data_received(b"x")))
    assert connection.transport.is_closed


def test_head_that_never_ends_is_not_kept(world):
    """Two thousand kilobytes, as headers or as one: the connection is closed at the first that is too many."""
    for start, more in ((b"GET / HTTP/1.1\r\n", b"x: " + b"y" * 1_000 + b"\r\n"), (b"GET / HTTP/1.1\r\nx: ", b"y" * 1_000)):
        connection = world.connected()
        world.runner.run(_drip(connection, start, more))
        assert Answer(connection.transport.said).status == 431
        assert connection.transport.is_closed


async def _drip(connection, start, more):
    connection.data_received(start)
    for n in range(2_000):
        if connection.transport.is_closed:
            assert n * len(more) <= 2 * admission.HEAD_BYTES
            return
        connection.data_received(more)


def test_connection_that_says_nothing_ends_and_one_that_is_answered_does_not(world):
    world.hurry()
    silent, busy = world.connected(), world.connected()
    world.feed(busy, request())
    world.feed(busy, *[request()[i : i + 1] for i in range(len(request()))])  # slowly, but within the time
    world.runner.run(_until(lambda: silent.transport.is_closed and busy.transport.said.count(b"HTTP/1.1 200") == 2))
    world.runner.run(asyncio.sleep(0.05))
    assert (silent.transport.is_closed, silent.transport.said) == (True, b"")
    assert not busy.transport.is_closed
    assert busy.transport.said.count(b"HTTP/1.1 200") == 2


def test_nonsense_behind_a_request_is_not_taken_for_its_answer(world):
    connection = world.connected()
    said = world.feed(connection, request(), b"nonsense\r\n\r\n")
    assert b"invalid_http" not in said
    assert connection.transport.is_closed
