"""Collection in process: the gateway before a real log. What is answered with 200 is on disk, and everything else says why not."""

import asyncio
import base64
import gzip
import json
import threading
import time
from concurrent.futures import Future
from contextlib import closing, contextmanager
from types import SimpleNamespace
from urllib.parse import quote, urlencode

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import SecretStr

from pipelines.errors import StoreError
from pipelines.log import LogFull, Outcome, QueueFull, open_log
from pipelines.settings import Settings
from serving import access, collect
from serving.access import COLLECTION, PIXEL, Role
from serving.collect import Collector, Store, open_store
from serving.commits import Commits
from serving.gateway import Gateway
from serving.openapi import describe_collection
from serving.rates import Bucket

ORIGIN = "https://shop.example"
CALLS = {
    "track": {"userId": "u1", "event": "Product Viewed"},
    "identify": {"userId": "u1", "traits": {"email": "eve@example.com"}},
    "page": {"anonymousId": "a1", "name": "Home"},
    "screen": {"anonymousId": "a1", "name": "Home"},
    "group": {"userId": "u1", "groupId": "g1"},
    "alias": {"userId": "u1", "previousId": "a1"},
    "batch": {"batch": [{"type": "track", "userId": "u1", "event": "x"}, {"type": "page", "anonymousId": "a1"}]},
}
SIZES = {"collect": {"origins": (ORIGIN,), "max_event_bytes": 2_048, "max_batch_bytes": 8_192}}


@contextmanager
def running(settings, **options):
    """A gateway over a collector: `send(path, body, ...)`, its settings and keys."""
    access.ensure_keys(settings)
    keys = access.load_keys(settings)
    collector = Collector(settings, **options)
    collector.open()
    gateway = Gateway(
        behind,
        handlers={},
        pages={},
        door=collector,
        people=None,
        keys=lambda: keys,
        is_loopback_only=True,
        max_body_bytes=2_048,
        deadline_ms=50,
    )
    with asyncio.Runner() as runner:
        written = {role: access.read_key(settings, role) for role in Role}
        found = SimpleNamespace(settings=settings, collector=collector, gateway=gateway, runner=runner, keys=written)
        found.send = sender(found)
        try:
            yield found
        finally:
            collector.close()


async def behind(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def sender(world):
    async def one(path, body=None, *, key=Role.COLLECT, method="POST", headers=None, client=None):
        given = {"Authorization": basic(world.keys.get(key, key))} if key else {}
        content = json.dumps(body).encode() if isinstance(body, dict | list) else body
        return await client.request(method, path, content=content, headers=given | (headers or {}))

    async def several(requests):
        transport = httpx.ASGITransport(world.gateway, raise_app_exceptions=False, client=("10.0.0.9", 5_000))
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            return await asyncio.gather(*(one(*args, client=client, **options) for args, options in requests))

    def send(*args, **options):
        return world.runner.run(several([(args, options)]))[0]

    send.together = lambda requests: world.runner.run(several([(args, {}) for args in requests]))
    return send


def basic(key):
    return "Basic " + base64.b64encode(f"{key}:".encode()).decode()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    settings = Settings(home=tmp_path_factory.mktemp("home"), sources={"app": SecretStr("app key")}, **SIZES)
    with running(settings) as world:
        yield world


def events_of(world, group="test"):
    """What came into the log since the last look: source and payload."""
    log = world.collector._store.log
    found = log.read(group, max_events=10_000)
    log.commit(group, [event.position for event in found])
    return [(event.source, json.loads(event.payload)) for event in found]


def code_of(answer):
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) <= {"code", "message", "field"}
    assert error["message"]
    return answer.status_code, error["code"]


# -- what is answered with 200 is in the log


@pytest.mark.parametrize("path", COLLECTION)
def test_call_sent_to_its_path_is_in_the_log_when_it_is_answered(world, path):
    events_of(world)
    call = COLLECTION[path]
    answer = world.send(path, CALLS[call])
    assert (answer.status_code, answer.json()) == (200, {"success": True})
    kept = events_of(world)
    assert [event["type"] for _, event in kept] == (["track", "page"] if call == "batch" else [call])
    assert {source for source, _ in kept} == {"segment"}


def test_answer_waits_for_the_commit(tmp_path):
    held = []

    class Held:
        def submit(self, events):
            held.append((Future(), len(events)))
            return held[-1][0]

        def close(self):
            pass

    def open_held(settings):
        store = open_store(settings)
        store.writer.close()
        return Store(store.log, Held(), store.vault)

    with running(Settings(home=tmp_path), open_store=open_held) as world:

        async def scenario():
            transport = httpx.ASGITransport(world.gateway)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://shop", headers={"Authorization": basic(world.keys[Role.COLLECT])}
            ) as http:
                answers = [asyncio.create_task(http.post("/v1/track", json=CALLS["track"])) for _ in range(5)]
                while sum(n for _, n in held) < 5:
                    await asyncio.sleep(0.001)
                _, waiting = await asyncio.wait(answers, timeout=0.2)
                assert len(waiting) == 5
                for future, n in held:
                    future.set_result([Outcome.APPENDED] * n)
                return [answer.status_code for answer in await asyncio.gather(*answers)]

        assert world.runner.run(scenario()) == [200] * 5
        assert len(held) < 5  # what arrives together is written together


def test_event_sent_again_is_success_and_is_kept_once(world):
    events_of(world)
    for _ in range(3):
        assert world.send("/v1/track", CALLS["track"] | {"messageId": "same"}).status_code == 200
    assert world.send("/v1/track", CALLS["track"] | {"messageId": "same"}, key="app key").status_code == 200
    assert [source for source, _ in events_of(world)] == ["segment", "app"]


def test_bad_calls_of_a_batch_are_set_aside_and_the_good_ones_kept(world):
    events_of(world)
    log = world.collector._store.log
    log.drop_parked([one.id for one in log.parked(1_000)])
    bad = [{"type": "track", "userId": "u1"}, {"type": "nothing", "userId": "u1"}, 7]
    answer = world.send("/v1/batch", {"batch": [*bad, *CALLS["batch"]["batch"]]}, key="app key")
    assert (answer.status_code, answer.json()) == (200, {"success": True})
    assert len(events_of(world)) == 2
    parked = log.parked(10)
    assert [(one.source, one.reason) for one in parked] == [("app", "field_missing"), ("app", "type_unknown"), ("app", "not_json")]
    assert [json.loads(one.payload) for one in parked] == bad
    assert code_of(world.send("/v1/track", bad[0])) == (400, "field_missing")  # alone it is the sender's to mend
    assert world.send("/v1/batch", {"batch": bad}, key="app key").status_code == 200  # a sender that missed the answer
    assert len(log.parked(10)) == 3


ACTIONS = st.lists(st.tuples(st.sampled_from(["u1", "u2", "erased"]), st.integers(0, 5), st.booleans()), max_size=25)


@examples(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_acknowledged_is_appended_plus_duplicate_plus_erased(world, actions):
    vault, log = world.collector._store.vault, world.collector._store.log
    vault.entomb([vault.pseudonym("user_id", "erased")], erased_us=0, receipt="r")
    before = log.counts()
    sent = [{"type": "page", "userId": who, "messageId": f"law-{n}"} for who, n, _ in actions]
    single = [("/v1/page", call) for call, (_, _, is_single) in zip(sent, actions, strict=True) if is_single]
    batch = [call for call, (_, _, is_single) in zip(sent, actions, strict=True) if not is_single]
    answers = world.send.together([*single, ("/v1/batch", {"batch": batch})])
    assert {answer.status_code for answer in answers} == {200}
    after = log.counts()
    grown = [getattr(after, name) - getattr(before, name) for name in ("appended", "duplicate", "erased")]
    assert sum(grown) == len(actions)
    assert not any(event.get("userId") == "erased" for _, event in events_of(world, "law"))


def test_events_that_were_taken_are_on_disk_when_the_collector_is_closed(tmp_path):
    with running(Settings(home=tmp_path)) as world:

        async def leave():
            kept = asyncio.create_task(world.collector._keep(json.dumps(CALLS["batch"]).encode(), "batch", "segment"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.to_thread(world.collector.close)
            await kept

        world.runner.run(leave())
        assert open_store(world.settings).log.counts().appended == 2


# -- keys


def test_key_says_whose_the_event_is(world):
    events_of(world)
    for key, source in ((Role.COLLECT, "segment"), (Role.ADMIN, "segment"), ("app key", "app")):
        assert world.send("/v1/page", CALLS["page"], key=key).status_code == 200
        assert (
            world.send("/v1/page", CALLS["page"], key=None, headers={"Authorization": f"Bearer {world.keys.get(key, key)}"}).status_code
            == 200
        )
        body = json.dumps(CALLS["page"] | {"writeKey": world.keys.get(key, key)}).encode()
        assert world.send("/v1/page", body, key=None, headers={"Content-Type": "text/plain;charset=UTF-8"}).status_code == 200
        kept = events_of(world)
        assert [found for found, _ in kept] == [source] * 3
        assert not any("writeKey" in event for _, event in kept)


@pytest.mark.parametrize("path", [*COLLECTION, PIXEL])
def test_without_a_key_that_collects_nothing_is_taken(world, path):
    method = "GET" if path == PIXEL else "POST"
    body = CALLS[COLLECTION.get(path, "page")]
    assert code_of(world.send(path, body, method=method, key=None)) == (401, "unauthenticated")
    assert code_of(world.send(path, body, method=method, key="wrong")) == (401, "unauthenticated")
    assert "user name of Basic" in world.send(path, body, method=method, key="wrong").json()["error"]["message"]
    assert code_of(world.send(path, body | {"writeKey": world.keys[Role.COLLECT]}, method=method, key="wrong")) == (401, "unauthenticated")
    assert code_of(world.send(path, body, method=method, key=Role.DECIDE)) == (403, "forbidden")
    assert (
        world.send(path, body, method=method, key="wrong").headers["www-authenticate"] == "Bearer"
    )  # Basic would open a browser's dialogue


def test_wrong_key_in_the_header_is_refused_before_a_body_is_read(world):
    async def endless():
        pytest.fail("the body was read")
        yield b""

    assert world.send("/v1/track", endless(), key="wrong").status_code == 401


def test_write_key_cannot_be_told_from_the_answer(world):
    answers = [world.send("/v1/track", b"{", key=key) for key in ("wrong", "app ke", "x" * 5_000)]
    assert len({(answer.status_code, answer.text) for answer in answers}) == 1


# -- bodies


def test_gzip_body_is_unpacked(world):
    events_of(world)
    packed = gzip.compress(json.dumps(CALLS["batch"]).encode())
    assert world.send("/v1/batch", packed, headers={"Content-Encoding": "gzip"}).status_code == 200
    text = json.dumps(CALLS["track"]).encode()
    assert (
        world.send("/v1/track", gzip.compress(text[:9]) + gzip.compress(text[9:]), headers={"Content-Encoding": "GZIP"}).status_code == 200
    )
    assert len(events_of(world)) == 3


def test_bomb_is_refused_before_it_is_unpacked(world):
    bomb = gzip.compress(b" " * 2_000_000, mtime=0)
    assert len(bomb) < 8_192
    before = time.process_time()
    assert code_of(world.send("/v1/batch", bomb, headers={"Content-Encoding": "gzip"})) == (413, "too_long")
    assert code_of(world.send("/v1/batch", gzip.compress(b"", mtime=0) * 400, headers={"Content-Encoding": "gzip"}))[0] in (400, 413)
    assert time.process_time() - before < 1


@pytest.mark.parametrize(
    ("body", "encoding", "expected"),
    [
        (b"nonsense", "gzip", (400, "not_gzip")),
        (gzip.compress(b"{}", mtime=0)[:-4], "gzip", (400, "not_gzip")),
        (gzip.compress(b"{}", mtime=0) + b"rest", "gzip", (400, "not_gzip")),
        (b"", "gzip", (400, "not_json")),
        (b"{}", "br", (415, "encoding_unknown")),
        (b"{}", "gzip, gzip", (415, "encoding_unknown")),
        (b"{", "identity", (400, "not_json")),
        (b" " * 8_193, "identity", (413, "body_too_large")),
        (b'{"userId": "u", "event": "' + b"x" * 2_100 + b'"}', "identity", (413, "too_long")),
    ],
)
def test_body_that_is_no_call_is_refused(world, body, encoding, expected):
    assert code_of(world.send("/v1/track", body, headers={"Content-Encoding": encoding})) == expected


def test_large_body_is_parsed_beside_the_loop_with_the_same_answer(world, monkeypatch):
    monkeypatch.setattr(collect, "INLINE_BYTES", 0)
    events_of(world)
    assert world.send("/v1/batch", CALLS["batch"]).status_code == 200
    assert code_of(world.send("/v1/batch", {"batch": 7})) == (400, "field_invalid")
    assert len(events_of(world)) == 2


def test_field_at_fault_is_named(world):
    for body, field in (({"event": "x"}, "userId"), ({"userId": "u"}, "event"), ({"userId": "u", "event": "x", "context": 7}, "context")):
        answer = world.send("/v1/track", body)
        assert answer.status_code == 400
        assert answer.json()["error"]["field"] == field


# -- too much


def failing(error):
    """A store whose writer refuses: an exception raised at once, or one that its future raises."""

    class Refusing:
        def submit(self, events):
            if isinstance(error, QueueFull):
                raise error
            future = Future()
            if error is not None:
                future.set_exception(error)
            return future

        def close(self):
            pass

    def open_failing(settings):
        store = open_store(settings)
        store.writer.close()
        return Store(store.log, Refusing(), store.vault)

    return open_failing


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (QueueFull("full"), (503, "queue_full")),
        (LogFull("full"), (507, "log_full")),
        (StoreError("locked"), (503, "log_unavailable")),
        (None, (503, "commit_timeout")),
    ],
)
def test_event_that_is_not_on_disk_is_never_a_success(tmp_path, monkeypatch, error, expected):
    monkeypatch.setattr(collect, "COMMIT_TIMEOUT_S", 0.05)
    with running(Settings(home=tmp_path), open_store=failing(error)) as world:
        for path in ("/v1/track", "/v1/batch"):
            answer = world.send(path, CALLS[path[4:]])
            assert code_of(answer) == expected
            assert int(answer.headers["retry-after"]) >= 1


def test_event_that_cannot_be_written_fails_alone(tmp_path):
    def open_picky(settings):
        store = open_store(settings)
        append = store.log.append

        def picky(events):
            if any(event.message_id == "bad" for event in events):
                raise ValueError("cannot be written")
            return append(events)

        store.log.append = picky
        return store

    with running(Settings(home=tmp_path), open_store=open_picky) as world:
        sent = [("/v1/page", CALLS["page"] | {"messageId": name}) for name in ("good-1", "bad", "good-2")]
        assert [answer.status_code for answer in world.send.together(sent)] == [200, 500, 200]


def test_more_events_than_may_wait_are_refused_and_come_through_later(tmp_path, monkeypatch):
    refused, kept = threading.Event(), Commits.kept

    async def told(commits, events):
        try:
            return await kept(commits, events)
        except QueueFull:
            refused.set()
            raise

    def open_slow(settings):
        store = open_store(settings)
        append = store.log.append
        store.log.append = lambda events: (refused.wait(60), append(events))[1]  # no commit ends before somebody was refused
        return store

    monkeypatch.setattr(Commits, "kept", told)
    with running(Settings(home=tmp_path, collect={"queue_events": 1_000}), open_store=open_slow) as world:
        batch = {"batch": [CALLS["page"] | {"type": "page"}] * 400}
        answers = world.send.together([("/v1/batch", batch)] * 8)
        assert {answer.status_code for answer in answers} == {200, 503}
        n_kept = sum(answer.status_code == 200 for answer in answers)
        assert world.send("/v1/batch", batch).status_code == 200
        assert world.collector._store.log.counts().appended == 400 * (n_kept + 1)


def test_bodies_beyond_what_may_be_held_are_refused(world, monkeypatch):
    monkeypatch.setattr(collect, "MAX_HELD_BYTES", 4_096)
    assert world.send("/v1/page", CALLS["page"]).status_code == 200
    refused = world.send("/v1/page", b"x" * 4_097)
    assert code_of(refused) == (503, "busy")
    assert refused.headers["retry-after"]
    monkeypatch.undo()
    assert world.collector._held == 0


def test_source_that_sends_too_much_is_told_when_to_go_on_and_others_are_not(tmp_path):
    settings = Settings(home=tmp_path, collect={"rate_per_s": 1, "burst": 2}, sources={"app": SecretStr("app key")})
    with running(settings) as world:
        assert world.send("/v1/batch", {"batch": [CALLS["page"] | {"type": "page"}] * 30}).status_code == 200  # a batch is never cut
        refused = world.send("/v1/page", CALLS["page"])
        assert code_of(refused) == (429, "rate_limited")
        assert 25 <= int(refused.headers["retry-after"]) <= 30
        assert world.send("/v1/page", CALLS["page"], key="app key").status_code == 200


@examples(max_examples=100)
@given(
    rate=st.floats(0.5, 1_000),
    burst=st.integers(1, 500),
    sends=st.lists(st.tuples(st.floats(0, 20), st.integers(1, 50)), max_size=40),
)
def test_no_source_ever_gets_more_than_its_burst_its_rate_and_one_batch(rate, burst, sends):
    bucket, now, taken = Bucket(rate, burst, 0.0), 0.0, 0
    for pause, n in sends:
        now += pause
        wait = bucket.wait_s(now)
        if wait == 0:
            bucket.take(n)
            taken += n
        else:
            assert bucket.wait_s(now + wait * 1.001) == 0  # what it is told is true
            now += wait * 1.001
        assert taken <= burst + rate * now + 50


def test_log_that_cannot_be_opened_costs_the_events_only_until_it_can(tmp_path, caplog):
    opens = iter([StoreError("no rights"), None])

    def open_later(settings):
        if error := next(opens):
            raise error
        return open_store(settings)

    with running(Settings(home=tmp_path), open_store=open_later) as world:
        answer = world.send("/v1/track", CALLS["track"])
        assert code_of(answer) == (503, "log_unavailable")
        assert answer.headers["retry-after"]
        assert "the log could not be opened" in caplog.text
        world.collector.open()
        assert world.send("/v1/track", CALLS["track"]).status_code == 200


# -- browsers


def pixel(**parameters):
    return f"{PIXEL}?{urlencode(parameters)}"


def test_pixel_is_an_image_that_nobody_may_keep_and_its_event_is_in_the_log(world):
    events_of(world)
    call = {"type": "track", "event": "Email Opened", "userId": "ü1?", "properties": {"n": 1}}
    plain = json.dumps(call).encode()
    key = world.keys[Role.COLLECT]
    for data in (base64.urlsafe_b64encode(plain).decode().rstrip("="), base64.b64encode(plain).decode()):
        answer = world.send(pixel(data=data, writeKey=key), method="GET", key=None)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/gif")
        assert answer.headers["cache-control"] == "no-store"
        assert answer.content.startswith(b"GIF89a\x01\x00\x01\x00")
    inside = base64.urlsafe_b64encode(json.dumps(call | {"writeKey": key}).encode()).decode()
    assert world.send(pixel(data=inside), method="GET", key=None).status_code == 200
    kept = [event for _, event in events_of(world)]
    assert len(kept) == 3
    assert all(event | call == event for event in kept)
    assert "writeKey" not in json.dumps(kept)


def test_pixel_of_simple_parameters_keeps_the_others_as_properties(world):
    events_of(world)
    key = world.keys[Role.COLLECT]
    for parameters in (
        {"event": "Email Opened", "userId": "u1", "campaign": "März"},
        {"anonymousId": "a1", "name": "Home", "path": "/"},
        {"type": "identify", "userId": "u1", "region": "north"},
    ):
        assert world.send(pixel(**parameters, writeKey=key), method="GET", key=None).status_code == 200
    track, page, identify = (event for _, event in events_of(world))
    assert (track["type"], track["event"], track["properties"]) == ("track", "Email Opened", {"campaign": "März"})
    assert (page["type"], page["name"], page["properties"]) == ("page", "Home", {"path": "/"})
    assert (identify["type"], identify["traits"]) == ("identify", {"region": "north"})


@pytest.mark.parametrize(
    "query", ["", "data=", "data=!!!", "data=e30", "data=W10", "event=x", f"data={'A' * 9_000}", "data=%ff", "userId=%ff%fe"]
)
def test_pixel_that_is_no_call_is_refused(world, query):
    answer = world.send(f"{PIXEL}?{query}&writeKey={quote(world.keys[Role.COLLECT])}", method="GET", key=None)
    if query == "userId=%ff%fe":  # bytes that are not text stand as the mark for that
        assert answer.status_code == 200
    else:
        assert code_of(answer)[0] in (400, 413)


def test_page_of_a_configured_origin_may_send_and_see_the_answer(world):
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = world.send("/v1/track", method="OPTIONS", key=None, headers=asked)
    assert (allowed.status_code, allowed.content) == (204, b"")
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert {"authorization", "content-type", "x-retry-count"} <= set(allowed.headers["access-control-allow-headers"].split(", "))
    for key, status in ((Role.COLLECT, 200), ("wrong", 401)):  # a refusal must be readable too
        answer = world.send("/v1/track", CALLS["track"], key=key, headers={"Origin": ORIGIN})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["vary"] == "origin"
        assert "retry-after" in answer.headers["access-control-expose-headers"]
        assert "set-cookie" not in answer.headers
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("origin", ["https://evil.example", "http://shop.example", "null", f"{ORIGIN}.evil.example", ""])
def test_page_of_any_other_origin_is_told_nothing(world, origin):
    for method, body in (("OPTIONS", None), ("POST", CALLS["track"])):
        answer = world.send("/v1/track", body, method=method, headers={"Origin": origin})
        assert "access-control-allow-origin" not in answer.headers


def test_other_routes_know_no_origins(world):
    answer = world.send("/healthz", method="GET", headers={"Origin": ORIGIN})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert world.send("/recommend", method="OPTIONS", headers={"Origin": ORIGIN}).status_code in (403, 405)


def test_any_origin_may_send_where_that_is_configured(tmp_path):
    with running(Settings(home=tmp_path, collect={"origins": ("*",)})) as world:
        assert (
            world.send("/v1/track", CALLS["track"], headers={"Origin": "https://a.example"}).headers["access-control-allow-origin"] == "*"
        )


@pytest.mark.parametrize(("path", "method"), [("/v1/track", "GET"), ("/v1/batch", "PUT"), (PIXEL, "POST"), (PIXEL, "HEAD")])
def test_other_method_is_405(world, path, method):
    answer = world.send(path, method=method)
    assert answer.status_code == 405
    assert "OPTIONS" in answer.headers["allow"]


# -- rubbish in


NAMES = st.sampled_from(["batch", "type", "userId", "context", "event", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
RUBBISH = st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=80).map(gzip.compress)


@examples(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([*COLLECTION, PIXEL]),
    body=RUBBISH,
    is_packed=st.booleans(),
    query=st.binary(max_size=60),
    header=st.binary(max_size=20),
)
def test_no_body_query_or_header_makes_the_service_fail(world, path, body, is_packed, query, header):
    is_pixel = path == PIXEL
    if is_pixel:
        given = base64.urlsafe_b64encode(body).decode() if is_packed else quote(body)
        path = f"{path}?data={given}&{quote(query, safe='=&%+')}&writeKey={quote(world.keys[Role.COLLECT])}"
    headers = {"Content-Encoding": "gzip"} if is_packed else {}
    headers |= {"Origin": header.hex(), "Content-Type": header.hex()}
    answer = world.send(path, None if is_pixel else body, method="GET" if is_pixel else "POST", headers=headers)
    if answer.status_code != 200:
        status, _ = code_of(answer)
        assert 400 <= status < 500


@examples(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from([*COLLECTION, PIXEL]), header=st.binary(max_size=60).filter(lambda b: b"\n" not in b and b"\r" not in b))
def test_no_header_is_a_key_by_accident(world, path, header):
    method = "GET" if path == PIXEL else "POST"
    answer = world.send(path, CALLS["track"], method=method, key=None, headers={"Authorization": header.hex(), "X-Header": "1"})
    assert code_of(answer) == (401, "unauthenticated")


# -- told


def test_what_becomes_of_events_is_counted_by_source_and_code_alone(world):
    from prometheus_client import REGISTRY

    def seen(name, **labels):
        return REGISTRY.get_sample_value(f"rapport_collect_{name}_total", labels) or 0

    def all_seen():
        return (
            seen("events", source="app", outcome="appended"),
            seen("events", source="app", outcome="duplicate"),
            seen("set_aside", source="app", reason="type_unknown"),
            seen("refused", source="app", reason="not_json"),
            seen("refused", source="unknown", reason="unauthenticated"),
        )

    before = all_seen()
    batch = {"batch": [{"type": "nothing"}, *[CALLS["page"] | {"type": "page", "messageId": "counted"}] * 3]}
    world.send("/v1/batch", batch, key="app key")
    world.send("/v1/track", b"{", key="app key")
    world.send("/v1/track", b"{}", key="a stranger's")
    assert tuple(now - then for now, then in zip(all_seen(), before, strict=True)) == (1, 2, 1, 1, 1)


def test_nothing_of_an_event_is_logged(world, caplog):
    secret = "eve@example.com"
    with caplog.at_level("DEBUG", logger="rapport"):
        world.send("/v1/identify", {"userId": secret, "traits": {"email": secret}})
        world.send("/v1/track", {"userId": secret})
        world.send("/v1/batch", {"batch": [{"type": secret, "userId": secret}]})
        world.send(f"{PIXEL}?userId={secret}", method="GET", key=secret)
    assert secret not in caplog.text


def test_documented_bodies_are_kept_as_they_are_shown(tmp_path):
    document = {"paths": {}, "components": {"schemas": {"Refusal": {}}, "securitySchemes": {"key": {}}}}
    describe_collection(document)
    with running(Settings(home=tmp_path)) as world:
        for path in (f"/v1/{call}" for call in CALLS):
            for shown in document["paths"][path]["post"]["requestBody"]["content"].values():
                assert world.send(path, shown["example"]).status_code == 200, path
                kept = events_of(world)
                assert len(kept) == (2 if path == "/v1/batch" else 1), path
        with closing(open_log(tmp_path, settings=world.settings)) as log:
            assert log.counts().parked == 0


def test_documentation_describes_every_call_and_what_it_refers_to():
    document = {"paths": {}, "components": {"schemas": {"Refusal": {}}, "securitySchemes": {"key": {}}}}
    describe_collection(document)
    assert set(document["paths"]) == {f"/v1/{call}" for call in CALLS} | {PIXEL}
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]
    for call in CALLS:
        body = document["paths"][f"/v1/{call}"]["post"]["requestBody"]["content"]
        assert set(body) == {"application/json", "text/plain"}
