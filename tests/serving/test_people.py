"""Requests about one person, through the gateway, with a worker that this file plays."""

import asyncio
import contextlib
import json
import logging
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

from pipelines.requests import Kind, Requests, working
from pipelines.settings import Settings
from pipelines.vault import open_vault
from serving import access, people
from serving.access import Role
from serving.clock import Clock
from serving.gateway import Gateway
from serving.people import People
from serving.store_guard import Guard

ANN = "ann@example.com"


@pytest.fixture(scope="module")
def profiles(shop, opened):
    return opened(shop, max_age_hours=24 * 3650)


@pytest.fixture
def desk(home, profiles, monkeypatch):
    """A gateway whose people are at `home`: `ask(method, path)`."""
    monkeypatch.setattr(people, "READ_MS", 60_000)
    settings = Settings(home=home)
    access.ensure_keys(settings)
    keys = access.load_keys(settings)
    with contextlib.closing(open_vault(home)) as vault:
        made = People(settings, guard=Guard(profiles=profiles), clock=Clock(settings), vault=lambda: vault, wait_s=60.0, poll_s=0.01)

        async def behind(scope, receive, send):
            pytest.fail("BentoML saw it")

        gateway = Gateway(
            behind, handlers={}, pages={}, door=None, people=made, keys=lambda: keys,
            is_loopback_only=True, max_body_bytes=1_000, deadline_ms=100,
        )  # fmt: skip
        with asyncio.Runner() as runner:
            found = SimpleNamespace(people=made, vault=vault, home=home)
            found.ask = lambda method, path, role=Role.ADMIN: runner.run(_ask(gateway, method, path, access.read_key(settings, role)))
            yield found
            made.close()


async def _ask(gateway, method, path, key):
    transport = httpx.ASGITransport(gateway, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as http:
        return await http.request(method, path, headers={"Authorization": f"Bearer {key}"})


@contextlib.contextmanager
def worker(desk, answer, *, may_answer=None):
    """Answers each request with `answer(request)` -> (body, is_failure), once it may."""
    stop, seen = threading.Event(), []

    def work():
        with working(desk.home), contextlib.closing(Requests(desk.home, vault=desk.vault)) as requests:
            there.set()
            while not stop.wait(0.01):
                for request in requests.pending():
                    if may_answer is not None:
                        may_answer.wait(60)
                    seen.append(request)
                    body, is_failure = answer(request)
                    requests.answer(request.id, json.dumps(body).encode(), now_us=int(time.time() * 1e6), is_failure=is_failure)

    there = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    assert there.wait(60)
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def wait_for_answer(desk, one):
    end = time.monotonic() + 60
    with contextlib.closing(Requests(desk.home, vault=desk.vault)) as requests:
        while any(request.id == one for request in requests.pending()) and time.monotonic() < end:
            time.sleep(0.01)


def told(request):
    return {"held": request.kind}, False


def test_profile_is_what_the_worker_tells_and_what_the_store_holds_now(desk, cast):
    customer = cast.customers[3]
    with worker(desk, lambda request: ({"customer_id": customer, "identifiers": []}, False)) as seen:
        answer = desk.ask("GET", "/profile/ann%40example.com")
    assert answer.status_code == 200
    body = answer.json()
    assert body["customer_id"] == customer
    assert body["features"]["events_total"] is not None
    assert body["features_age_s"] > 0
    assert 0 <= body["scores"]["churn_probability"] <= 1
    assert (body["segment"], body["as_of"]) == (None, cast.now.isoformat())
    (request,) = seen
    assert (request.kind, request.who, request.by) == (Kind.PROFILE, ANN, people.BY)


def test_profile_without_a_store_is_what_the_worker_tells(desk):
    desk.people._guard.profiles = None
    with worker(desk, lambda request: ({"customer_id": "c1"}, False)):
        body = desk.ask("GET", "/profile/ann").json()
    assert body["customer_id"] == "c1"
    assert "features" not in body


@pytest.mark.parametrize(("method", "path", "kind"), [("DELETE", "", Kind.ERASE), ("GET", "/export", Kind.EXPORT)])
def test_answer_within_the_wait_is_200(desk, method, path, kind):
    with worker(desk, told) as seen:
        answer = desk.ask(method, f"/profile/ann{path}")
    assert (answer.status_code, answer.json()) == (200, {"held": kind})
    assert [request.kind for request in seen] == [kind]


@pytest.mark.parametrize(("method", "path", "again"), [("DELETE", "", "/erasure"), ("GET", "/export", "/export")])
def test_answer_that_takes_longer_is_202_and_can_be_asked_for_again(desk, method, path, again):
    desk.people.wait_s = 0.05
    may_answer = threading.Event()
    with worker(desk, told, may_answer=may_answer):
        first = desk.ask(method, f"/profile/ann{path}")
        assert first.status_code == 202
        assert first.json()["status"] == "pending"
        one = first.json()["request_id"]
        where = f"/profile/ann{again}?request_id={one}"
        assert desk.ask("GET", where).status_code == 202
        may_answer.set()
        wait_for_answer(desk, one)
        assert desk.ask("GET", where).status_code == 200
        gone = desk.ask("GET", where)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


def test_request_of_another_kind_is_not_given_out(desk):
    desk.people.wait_s = 0.0
    may_answer = threading.Event()
    with worker(desk, told, may_answer=may_answer):
        one = desk.ask("DELETE", "/profile/ann").json()["request_id"]
        may_answer.set()
        wait_for_answer(desk, one)
        assert desk.ask("GET", f"/profile/ann/export?request_id={one}").status_code == 404
        assert desk.ask("GET", f"/profile/ann/erasure?request_id={one}").status_code == 200


def test_unknown_person_is_404_and_a_failure_is_told(desk):
    with worker(desk, lambda request: ({"error": "x", "code": "not_found"}, True)):
        assert desk.ask("GET", "/profile/nobody").status_code == 404
    with worker(desk, lambda request: ({"error": "a run is working"}, True)):
        refused = desk.ask("DELETE", "/profile/ann")
    assert (refused.status_code, refused.json()["error"]["message"]) == (500, "a run is working")


def test_without_a_worker_it_says_how_to_start_one(desk):
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/export")):
        refused = desk.ask(method, f"/profile/ann{path}")
        assert refused.status_code == 503
        assert "rapport serve" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"]


def test_erasure_without_a_request_is_400_and_an_unknown_one_404(desk):
    refused = desk.ask("GET", "/profile/ann/erasure")
    assert (refused.status_code, refused.json()["error"]["field"]) == (400, "request_id")
    assert desk.ask("GET", "/profile/ann/erasure?request_id=x").status_code == 404


@pytest.mark.parametrize(("method", "path"), [("POST", ""), ("PUT", ""), ("DELETE", "/export"), ("DELETE", "/erasure"), ("HEAD", "")])
def test_other_method_is_405(desk, method, path):
    refused = desk.ask(method, f"/profile/ann{path}")
    assert refused.status_code == 405
    assert refused.headers["allow"]


@pytest.mark.parametrize("role", [Role.DECIDE, Role.COLLECT])
def test_lesser_key_learns_nothing(desk, role):
    for method, path in (("GET", "/profile/ann"), ("DELETE", "/profile/ann"), ("GET", "/profile/ann/export")):
        assert desk.ask(method, path, role).status_code == 403


def test_too_many_who_wait_are_429(desk, monkeypatch):
    monkeypatch.setattr(people, "MAX_WAITING", 0)
    with worker(desk, told):
        assert desk.ask("GET", "/profile/ann/export").status_code == 429


def test_no_name_becomes_a_label_or_a_line_of_the_log(desk, caplog):
    from prometheus_client import REGISTRY

    def broken(request):
        return "no object", False

    with caplog.at_level(logging.DEBUG, logger="rapport"), worker(desk, broken):
        assert desk.ask("GET", "/profile/very-secret-name").status_code == 500
        desk.ask("GET", "/profile/very-secret-name/nothing")
    assert "very-secret-name" not in caplog.text
    labels = {sample.labels["endpoint"] for metric in REGISTRY.collect() for sample in metric.samples if "endpoint" in sample.labels}
    assert access.PROFILE in labels
    assert not [label for label in labels if "secret" in label]
