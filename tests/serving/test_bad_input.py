"""Whatever is sent to the running service, it answers: a refusal of the documented shape or something usable, in little memory."""

import base64
import contextlib
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.client import HTTPConnection

import psutil
import pytest

from serving import access
from serving.access import Need, Role

pytestmark = pytest.mark.slow

DEEP = 10_000
DECIDING = ("/recommend", "/churn", "/intent", "/score/return_risk")
CALLS = ("/v1/track", "/v1/batch", "/v1/identify")
PEOPLE = ("/profile/{}", "/profile/{}/export", "/profile/{}/erasure")
ODD = {  # strings that somebody hopes will be something else
    "sql": "x'; DROP TABLE customers; --",
    "path": "../../../../etc/passwd",
    "file": "file:///etc/passwd",
    "null byte": "c\x00d",
    "markup": "<script>alert(1)</script>",
    "template": "${jndi:ldap://x}{{7*7}}%n%s",
    "right to left": "\u202etxt.exe",
    "far plane": "\U0001f6d2" * 60,
    "newline": "a\r\nset-cookie: a=b",
    "line separator": "a\u2028b",
}
BROKEN = {
    "nothing": b"",
    "no json": b"nonsense",
    "half": b'{"customer_id": "c1"',
    "null": b"null",
    "list": b"[]",
    "number": b"17",
    "infinity": b'{"customer_id": "c1", "k": Infinity, "customer_ids": [Infinity], "userId": "u", "event": "e", "x": 1e999}',
    "nan": b'{"customer_id": "c1", "context": {"request_price_cents": NaN}, "userId": "u", "event": "e", "properties": {"x": NaN}}',
    "huge number": b'{"customer_id": "c1", "k": 1e999, "customer_ids": ["c"], "context": {"request_price_cents": 1e999}}',
    "long number": b'{"customer_id": "c1", "k": ' + b"9" * 6_000 + b"}",
    "lone surrogate": b'{"customer_id": "\\ud800", "customer_ids": ["\\udfff"], "userId": "\\ud800", "event": "\\ud800"}',
    "not utf-8": b'{"customer_id": "\xff\xfe"}',
    "utf-16": '{"customer_id": "c1"}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + b'{"customer_id": "c1"}',
    "deep list": b'{"customer_id": "c1", "context": {"x": ' + b"[" * DEEP + b"]" * DEEP + b"}}",
    "deep object": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep and open": b"[" * DEEP,
    "same name twice": b'{"customer_id": "c1", "customer_id": 7}',
    "number for a name": b'{"customer_id": 1, "customer_ids": [1], "userId": 1}',
    "object for a name": b'{"customer_id": {}, "customer_ids": {}, "userId": {}}',
    "k too small": b'{"customer_id": "c1", "k": 0}',
    "k too large": b'{"customer_id": "c1", "k": 9223372036854775808}',
    "k negative": b'{"customer_id": "c1", "k": -1}',
    "nobody": b'{"customer_ids": []}',
    "empty name": b'{"customer_id": "", "customer_ids": [""]}',
    "unknown field": b'{"customer_id": "c1", "customer_ids": ["c1"], "__proto__": {"admin": true}}',
    "unpacked": gzip.compress(b'{"customer_id": "c1"}'),
}
MANY = json.dumps({"customer_id": "c1", "exclude": [f"item-{i}" for i in range(100_000)]}).encode()
HUGE = 100 * 2**20
BUDGET_S = 30.0  # a hang takes longer
MAX_GROWTH = 64 * 2**20
FUZZ_S = os.environ.get("RAPPORT_FUZZ_S")  # seconds of fuzzing; none: a few requests for each endpoint, the same ones each time


def asked(service, method, path, body=b"", headers=None, key=Role.ADMIN):
    """Status, headers, body."""
    connection = HTTPConnection("127.0.0.1", service.port, timeout=BUDGET_S)
    with contextlib.closing(connection):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a refusal may come before all of the body is sent
            connection.request(method, path, body, {"Authorization": f"Bearer {service.keys[key]}"} | (headers or {}))
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def assert_sound(answer):
    """Usable, or a refusal as it is documented; never a failure of the service."""
    status, headers, body = answer
    assert status < 500 or (status == 503 and json.loads(body)["error"]["code"] in ("worker_unavailable",)), (status, body[:300])
    assert headers["x-content-type-options"] == "nosniff"
    if status >= 400 and headers["content-type"] == "application/json":
        error = json.loads(body)["error"]
        assert {"code", "message"} <= set(error) <= {"code", "message", "field"}
    elif headers["content-type"] == "application/json":
        json.loads(body, parse_constant=pytest.fail)


@pytest.mark.parametrize("path", [*DECIDING, *CALLS, access.SIGN_IN, access.CUSTOMER])
def test_no_body_brings_the_service_down(running, path):
    for name, body in BROKEN.items():
        try:
            assert_sound(asked(running, "POST", path, body))
        except AssertionError as error:
            pytest.fail(f"{name}: {error}")


@pytest.mark.parametrize("path", [*DECIDING, *CALLS])
def test_wrong_request_is_refused_as_such(running, path):
    for name in ("nothing", "no json", "half", "null", "list", "number", "not utf-8", "deep object", "deep and open", "unpacked"):
        status, _, body = asked(running, "POST", path, BROKEN[name])
        assert status in ((400, 413) if len(BROKEN[name]) > 32 * 1024 else (400,)), (name, status, body)


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_string_is_a_name_like_any_other(running, odd):
    for path, body in (
        ("/recommend", {"customer_id": odd, "item_id": odd, "exclude": [odd], "filters": {"category": [odd]}, "context": {odd: odd}}),
        ("/recommend", {"anonymous_id": odd}),
        ("/churn", {"customer_ids": [odd, odd]}),
    ):
        status, _, answer = asked(running, "POST", path, json.dumps(body).encode())
        assert status == 200, (status, answer)
        assert b"passwd" not in answer or odd.encode() in answer
    call = {"userId": odd, "event": odd, "properties": {odd: odd}, "context": {"traits": {odd: odd}}, "messageId": odd}
    assert_sound(asked(running, "POST", "/v1/track", json.dumps(call).encode()))
    quoted = "".join(f"%{byte:02X}" for byte in odd.encode())
    for path in PEOPLE:
        assert_sound(asked(running, "GET", path.format(quoted)))
    status, _, _ = asked(running, "POST", f"/score/{quoted}", b"{}")
    assert status == 404
    status, _, page = asked(running, "POST", access.CUSTOMER, f"name={quoted}".encode())
    assert status in (400, 404, 503)
    assert b"<script" not in page


@pytest.mark.parametrize("path", access.ROUTES)
def test_every_path_bears_every_method_without_a_key_and_with_a_wrong_one(running, path):
    if path == "/metrics":
        pytest.skip("open on this machine; its answer is Prometheus's")
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW"):
        for header in ("Bearer x", "Basic \xff", "", "Bearer " + "x" * 4_000, "Basic " + base64.b64encode(b"\0" * 300).decode()):
            status, _, _ = asked(running, method, path.replace("{customer_id}", "x"), b"{}", {"Authorization": header})
            assert status < 500
            if access.ROUTES[path].need in (Need.DECIDE, Need.ADMIN):
                assert status in (401, 404, 405, 400 if method == "BREW" else 401)  # no method that the server knows


@pytest.mark.parametrize("path", DECIDING)
def test_hundred_thousand_exclusions_are_refused(running, path):
    status, _, body = asked(running, "POST", path, MANY)
    assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("path", ["/recommend", "/v1/batch", access.SIGN_IN])
@pytest.mark.parametrize("is_declared", [True, False])
def test_hundred_megabytes_are_neither_read_nor_kept(running, path, is_declared):
    before = resident(running)
    with socket.create_connection(("127.0.0.1", running.port), timeout=BUDGET_S) as wire:
        length = f"Content-Length: {HUGE}" if is_declared else "Transfer-Encoding: chunked"
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.keys[Role.ADMIN]}\r\n{length}\r\n\r\n"
        wire.sendall(head.encode())
        piece, sent = b" " * 2**20, 0
        framed = piece if is_declared else f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
        with contextlib.suppress(OSError):  # it hangs up, as it may
            while sent < HUGE:
                wire.sendall(framed)
                sent += len(piece)
        with contextlib.suppress(ConnectionResetError):
            assert wire.recv(4_096).startswith(b"HTTP/1.1 413")
    assert resident(running) - before < MAX_GROWTH
    assert asked(running, "GET", "/livez")[0] == 200


def test_packed_body_is_unpacked_to_the_limit_only(running):
    bomb = gzip.compress(b" " * HUGE)
    before = resident(running)
    status, _, body = asked(running, "POST", "/v1/batch", bomb, {"Content-Encoding": "gzip"})
    assert (status, json.loads(body)["error"]["code"]) == (413, "too_long")
    assert resident(running) - before < MAX_GROWTH


def test_those_who_drip_are_sent_away_and_keep_nobody_waiting(running):
    """Two hundred who never finish: heads, bodies by the byte, and silence."""
    head = f"POST /recommend HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.keys[Role.DECIDE]}\r\nContent-Length: 60000\r\n"
    starts = [head.encode() + b"\r\n{", head.encode(), b"POST /v1/batch HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", b"G"]
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", running.port))) for _ in range(200)]
        for i, wire in enumerate(slow):
            wire.sendall(starts[i % len(starts)])
        for _ in range(20):
            assert asked(running, "POST", "/recommend", b'{"customer_id": "c1"}')[0] == 200
        slow[0].settimeout(BUDGET_S)
        assert slow[0].recv(4_096).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/9.9\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"GET " + b"/x" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"".join(b"x-%d: y\r\n" % i for i in range(5_000)) + b"\r\n",
        b"POST /churn HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /churn HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 7\r\n\r\nabcde",
        b"POST /churn HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"GET /%00%ff%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://elsewhere/recommend HTTP/1.1\r\nHost: \x00/../profile/x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["version", "nonsense", "long path", "many headers", "negative length", "two lengths", "smuggled", "odd path", "odd host", "tls"],
)
def test_what_is_no_request_is_refused_and_the_service_goes_on(running, head):
    with (
        socket.create_connection(("127.0.0.1", running.port), timeout=BUDGET_S) as wire,
        contextlib.suppress(ConnectionResetError, TimeoutError),
    ):
        wire.sendall(head)
        wire.shutdown(socket.SHUT_WR)
        answer = wire.recv(65_536)
        assert not answer.startswith(b"HTTP/1.1 5"), answer[:200]
        assert b"root:" not in answer
    assert asked(running, "GET", "/livez")[0] == 200


def test_many_at_once_with_nonsense_do_not_grow_the_service(running):
    def fire():
        for _ in range(5):
            for body in BROKEN.values():
                asked(running, "POST", "/recommend", body)

    before = resident(running)
    threads = [threading.Thread(target=fire) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert resident(running) - before < MAX_GROWTH


def resident(service):
    """Bytes of memory of the service and its children."""
    parent = psutil.Process(service.child.pid)
    return sum(process.memory_info().rss for process in (parent, *parent.children(recursive=True)))


def test_service_does_what_its_own_documentation_says(running, tmp_path):
    """Schemathesis invents requests from the OpenAPI document. Not judged: which of the invented events and names are refused."""
    checks = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
              "unsupported_method", "ignored_auth")  # fmt: skip
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/docs.json", "--checks", ",".join(checks)]
    command += ["--exclude-path-regex", "^/profile", "--header", f"Authorization: Bearer {running.keys[Role.ADMIN]}"]
    command += ["--no-color", "--seed", "7", "--no-shrink", "--generation-database", "none", "--suppress-health-check", "all"]
    bounds = ("coverage,fuzzing", "10000", "--max-time", FUZZ_S) if FUZZ_S else ("fuzzing", "6")
    command += ["--phases", bounds[0], "--max-examples", *bounds[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]
    assert re.search(r"Tested: +\d{2}", done.stdout), done.stdout
