"""What the running service and its workers write, whatever is sent to them: lines of one form, and nobody's name in any."""

import asyncio
import base64
import contextlib
import gzip
import io
import json
import logging
import socket

import httpx
import pytest

from pipelines.log_lines import Lines
from pipelines.settings import Settings
from serving import access
from serving.access import Role
from serving.gateway import Gateway

MARK = "zqeve"  # stands in everything that a caller can choose


def marks(keys):
    """What no line may hold: what callers chose, their address, and the keys."""
    return [MARK, "127.0.0.1:", *keys.values()]


def leaks(text, marks):
    """The marks that a log holds, as they are or as somebody would write them out."""
    lowered = text.lower()
    return [mark for mark in marks if mark.lower() in lowered or base64.b64encode(mark.encode()).decode().rstrip("=").lower() in lowered]


def requests():
    """Method, path, headers, body: good ones and bad ones, with the mark in each place that there is."""
    name = f"{MARK}@example.com"
    asked = {"customer_id": name, "item_id": MARK, "exclude": [MARK], "filters": {"category": [MARK]}, "context": {MARK: MARK}}
    context = {"ip": MARK, "traits": {"email": name}, "consent": {"categoryPreferences": {"personalization": True}}}
    call = {"userId": name, "anonymousId": MARK, "messageId": MARK, "event": "Product Viewed", "context": context}
    call["properties"] = {"product_id": MARK, "email": name}
    odd = {"userId": {MARK: MARK}, "event": [MARK], "type": MARK, "timestamp": MARK, "properties": {"price": MARK, "quantity": MARK}}
    yield from (
        ("POST", "/recommend", {}, body) for body in (asked, asked | {"k": MARK}, {MARK: MARK}, {"anonymous_id": MARK}, [MARK], MARK)
    )
    yield "POST", "/churn", {}, {"customer_ids": [name] * 30}
    yield "POST", "/intent", {}, {"customer_ids": [name, {"x": MARK}], "context": {MARK: MARK}}
    yield "POST", f"/score/{MARK}", {}, {"customer_ids": [name]}
    yield "POST", "/recommend", {}, f'{{"customer_id": "{MARK}", '.encode()
    yield "POST", "/recommend", {}, b'{"customer_id": "\xff' + MARK.encode()
    yield from (
        ("POST", path, {}, body) for path in ("/v1/track", "/v1/identify", "/v1/page") for body in (call, odd, [MARK], MARK.encode())
    )
    yield "POST", "/v1/batch", {}, {"batch": [call | {"type": "track"}, odd, MARK, {"type": "identify", "userId": name}]}
    yield "POST", "/v1/batch", {"Content-Encoding": "gzip"}, gzip.compress(json.dumps(asked).encode())[:-9]
    yield "POST", "/v1/batch", {"Content-Encoding": MARK}, MARK.encode()
    yield "GET", f"/v1/pixel.gif?data={MARK}&writeKey={MARK}&event={MARK}", {}, None
    yield from (("GET", f"/profile/{name}{rest}", {}, None) for rest in ("", f"/erasure?request={MARK}", f"/{MARK}"))
    yield "POST", access.SIGN_IN, {"Cookie": f"rapport_console={MARK}"}, f"key={MARK}&{MARK}={MARK}".encode()
    yield "POST", access.CUSTOMER, {"Sec-Fetch-Site": MARK}, f"name={MARK}".encode()
    yield "POST", access.CUSTOMER, {}, f"name={MARK}".encode()
    yield (
        "GET",
        f"/{MARK}?{MARK}={MARK}",
        {"Traceparent": MARK, "X-Request-Id": MARK, "X-Forwarded-For": MARK, "Forwarded": f"for={MARK}"},
        None,
    )
    yield "GET", "/docs", {"User-Agent": MARK, "Referer": f"http://{MARK}/", "Origin": f"http://{MARK}"}, None
    yield "PATCH", "/metrics", {"Authorization": f"Bearer {MARK}"}, None
    yield "POST", "/churn", {"Authorization": f"Bearer {MARK}"}, {"customer_ids": [name]}
    yield "POST", "/churn", {"Authorization": "Basic " + base64.b64encode(f"{MARK}:".encode()).decode()}, {"customer_ids": [name]}


RAW = (
    f"GET /{MARK} HTTP/9.9\r\n{MARK}\r\n\r\n",
    f"{MARK}\r\n\r\n",
    f"GET /{MARK} HTTP/1.1\r\nHost: {MARK}\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Key: {MARK}\r\n\r\n",
    f"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Length: -{MARK}\r\n\r\n",
    f"POST /recommend HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{MARK}\r\n{MARK}\r\n\r\n",
    f"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{MARK}",  # and it leaves
)


def drive(service):
    """Send everything; the statuses that came back."""
    statuses = set()
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {service.keys[Role.ADMIN]}"}, timeout=30) as http:
        for method, path, headers, body in requests():
            content = body if body is None or isinstance(body, bytes) else json.dumps(body)
            statuses.add(http.request(method, path, headers=headers, content=content).status_code)
    for raw in RAW:
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as wire, contextlib.suppress(OSError):
            wire.sendall(raw.encode())
            if "999" not in raw:
                wire.recv(4_096)
    return statuses


@pytest.mark.slow
def test_no_line_of_the_service_names_anybody_whatever_is_sent(running):
    needles = marks(running.keys)
    assert {200, 400, 401, 404, 405} <= drive(running)
    text = running.output.read_text()
    assert not leaks(text, needles)
    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "pid", "message"} <= set(line) for line in lines)
    asked = [line for line in lines if line["logger"] == "rapport.access"]
    assert {line["endpoint"] for line in asked} >= {"/recommend", "/churn", "/score/{model}", "other"}
    assert {line.get("cause") for line in asked} >= {"invalid_json", "unauthenticated", "not_found"}
    assert all(line["request_id"] and line["status"] and line["duration_ms"] >= 0 for line in asked)


def test_control_a_leak_that_is_planted_is_found(tmp_path):
    settings, said = Settings(home=tmp_path), io.StringIO()
    keys = access.ensure_keys(settings)
    handler, log = logging.StreamHandler(said), logging.getLogger("rapport.serving")
    handler.setFormatter(Lines("json"))

    async def leaky(body, deadline):
        log.error("could not answer %s", body)
        return b"{}"

    gateway = Gateway(
        None, handlers={"/recommend": leaky}, pages={}, door=None, people=None, keys=lambda: access.load_keys(settings),
        is_loopback_only=True, max_body_bytes=1_000, deadline_ms=100,
    )  # fmt: skip

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://shop") as http:
            headers = {"Authorization": f"Bearer {keys[Role.DECIDE]}"}
            return await http.post("/recommend", content=MARK, headers=headers)

    log.addHandler(handler)
    try:
        assert asyncio.run(ask()).status_code == 200
    finally:
        log.removeHandler(handler)
    assert leaks(said.getvalue(), marks(keys)) == [MARK]
    assert json.loads(said.getvalue())["request_id"]
    assert leaks(base64.b64encode(MARK.encode()).decode(), [MARK]) == [MARK]
