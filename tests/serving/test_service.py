"""The service in process, through both paths: the gateway, and BentoML's own endpoint behind it."""

import asyncio
import base64
import functools
import json
import logging
import threading
from datetime import UTC, datetime
from types import SimpleNamespace

import httpx
import pytest
from starlette.routing import Mount

from models import tasks
from pipelines import registry
from pipelines.log_lines import Lines
from pipelines.settings import Settings
from serving import access, keyring
from serving.access import Need, Role
from serving.gateway import Gateway
from serving.rates import Rates

FAR = ("10.0.0.9", 5_000)
NEAR = ("127.0.0.1", 5_000)


@pytest.fixture(scope="module")
def world(shop, rehearse):
    """The running service: `ask(method, path, ...)` through the gateway, `inner(...)` behind it, and its keys."""
    from serving.service import build

    settings = Settings(home=shop, serving={"deadline_ms": 10_000})  # a machine that stands still for a second is no degraded answer
    access.ensure_keys(settings)
    service = build(settings, rehearse=rehearse, poll_s=3_600)
    gateway = service.to_asgi()
    with asyncio.Runner() as runner:
        stop = asyncio.Event()
        ready = asyncio.Event()

        async def live():
            async with gateway.app.router.lifespan_context(gateway.app):
                ready.set()
                await stop.wait()

        async def begin():
            task = asyncio.get_running_loop().create_task(live())
            await ready.wait()
            return task

        task = runner.run(begin())
        keys = {role: access.read_key(settings, role) for role in Role}
        namespace = SimpleNamespace(gateway=gateway, service=service, runner=runner, keys=keys, settings=settings)
        namespace.ask = _asker(runner, gateway, keys[Role.DECIDE])
        namespace.inner = _asker(runner, gateway.app, keys[Role.DECIDE])
        yield namespace
        runner.run(_end(stop, task))


async def _end(stop, task):
    stop.set()
    await task


def _asker(runner, app, own_key):
    def ask(method, path, *, key=own_key, client=FAR, **options):
        async def once():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=client)
            headers = options.pop("headers", {}) | ({"Authorization": f"Bearer {key}"} if key else {})
            async with httpx.AsyncClient(transport=transport, base_url="http://shop") as http:
                return await http.request(method, path, headers=headers, **options)

        return runner.run(once())

    return ask


def comparable(answer):
    return {key: value for key, value in answer.items() if key != "decision_id"}


# -- one contract, two paths -------------------------------------------------------------------------------------------


def test_both_paths_refuse_the_same_bodies(world, bad_request):
    path, body, field = bad_request
    refused = world.ask("POST", path, content=body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] in ("invalid_request", "invalid_json")
    assert error["message"]
    assert error.get("field") == field
    assert world.inner("POST", path, content=body).status_code == 400


def test_both_paths_give_the_same_answers(world, cast):
    first = cast.customers[1]
    asked = [
        ("/recommend", {"customer_id": first}),
        ("/recommend", {"anonymous_id": "device-2", "k": 3, "exclude": ["item-01"], "filters": {"category": ["hats"]}}),
        ("/recommend", {"customer_id": "nobody", "item_id": "item-03", "context": {"page": "cart"}}),
        ("/churn", {"customer_ids": cast.customers}),
        ("/intent", {"customer_ids": [first, "nobody"]}),
        ("/score/return_risk", {"customer_ids": cast.customers, "context": {"request_price_cents": 5.0}}),
        ("/score/intent_7d", {"customer_ids": [first]}),
    ]
    for path, body in asked:
        mine, theirs = world.ask("POST", path, json=body), world.inner("POST", path, json=body)
        assert (mine.status_code, theirs.status_code) == (200, 200)
        assert comparable(mine.json()) == comparable(theirs.json())
        assert mine.headers["content-type"] == theirs.headers["content-type"] == "application/json"


def test_answer_of_recommend_has_the_documented_fields(world, cast):
    answer = world.ask("POST", "/recommend", json={"customer_id": cast.customers[1], "k": 4}).json()
    assert set(answer) == {"decision_id", "customer_id", "items", "model_version", "source", "degraded", "causes", "as_of"}
    assert [set(item) for item in answer["items"]] == [{"item_id", "score", "rank", "reason"}] * 4
    assert (answer["source"], answer["degraded"], answer["causes"]) == ("personal", False, [])
    assert answer["as_of"] == "2026-03-01T12:00:00Z"


@pytest.mark.parametrize("path", ["/churn", "/intent", "/score/return_risk"])
def test_answer_of_scores_has_the_documented_fields(world, cast, path):
    answer = world.ask("POST", path, json={"customer_ids": cast.customers[:3]}).json()
    assert set(answer) == {"predictions", "model_version", "source", "degraded", "causes", "as_of", "feature_age_s"}
    for prediction in answer["predictions"]:
        assert set(prediction) == {"customer_id", "probability", "band", "source", "reasons"}
        assert 0 <= prediction["probability"] <= 1
        assert prediction["band"] in ("low", "medium", "high")
        assert {key for reason in prediction["reasons"] for key in reason} == {"feature", "value", "contribution"}


def test_documentation_describes_the_answers_that_are_given(world, cast):
    document = world.ask("GET", "/docs.json").json()
    for path, body in (
        ("/recommend", {"customer_id": "nobody"}),
        ("/churn", {"customer_ids": cast.customers[:1]}),
        ("/score/return_risk", {"customer_ids": cast.customers[:1]}),
    ):
        operation = document["paths"][path]["post"]
        described = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert set(described["properties"]) == set(world.ask("POST", path, json=body).json())
        assert {"400", "401", "403", "413", "429", "503"} <= set(operation["responses"])
        assert operation["security"]
    assert set(document["paths"]) >= {"/recommend", "/churn", "/intent", *(f"/score/{task}" for task in tasks.declared())}
    assert document["paths"]["/score/return_risk"]["post"]["responses"]["404"]


def test_documented_requests_are_answered_as_they_are_shown(world):
    document = world.ask("GET", "/docs.json").json()
    decisions = {path: one["post"] for path, one in document["paths"].items() if "post" in one and one["post"]["tags"] == ["Decisions"]}
    assert set(decisions) == {"/recommend", "/churn", "/intent", *(f"/score/{task}" for task in tasks.declared())}
    assert document["tags"][0]["name"] == "Decisions"
    for path, operation in decisions.items():
        assert world.ask("POST", path, json=operation["requestBody"]["content"]["application/json"]["example"]).status_code == 200, path
        assert operation["summary"]


def test_a_model_at_a_path_of_its_own_and_under_its_name_is_one(world, cast):
    body = {"customer_ids": [*cast.customers, "nobody"]}
    for task in ("churn", "intent"):
        assert world.ask("POST", f"/{task}", json=body).json() == world.ask("POST", f"/score/{task}", json=body).json()


@pytest.mark.parametrize("model", ["weather", "{model}", "Churn", "churn%20", "recommender", "x" * 300])
def test_unknown_model_is_404_with_the_names_of_those_there_are(world, model):
    refused = world.ask("POST", f"/score/{model}", json={"customer_ids": ["c1"]})
    assert refused.status_code == 404
    message = f"no such model; there are: {', '.join(sorted(tasks.declared()))}"
    assert refused.json() == {"error": {"code": "not_found", "message": message, "field": "model"}}
    assert world.ask("POST", f"/score/{model}", key=None).status_code == 401  # who has no key learns no names


def test_documentation_describes_the_paths_of_one_person(world):
    paths = world.ask("GET", "/docs.json").json()["paths"]
    for path, route in access.ROUTES.items():
        if route.need is Need.ADMIN:
            assert {method.upper() for method in paths[path]} == set(route.methods)
            assert all({"401", "403", "404", "503"} <= set(operation["responses"]) for operation in paths[path].values())


# -- the gateway -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", access.ROUTES)
@pytest.mark.parametrize("role", [None, *Role])
@pytest.mark.parametrize("client", [FAR, NEAR])
def test_route_answers_exactly_those_it_is_declared_for(world, path, role, client):
    if path == "/metrics":
        pytest.skip("needs a process of its own: see test_process.py")
    route = access.ROUTES[path]
    key = world.keys[role] if role else None
    status = world.ask(route.methods[0], path.replace("{model}", "churn"), key=key, client=client, content=b"{}").status_code
    is_near = client == NEAR
    if route.need is Need.DECIDE:
        expected = 401 if role is None else 403 if role is Role.COLLECT else 400  # past the gate, an empty request
    elif route.need is Need.COLLECT:
        expected = 401 if role is None else 403 if role is Role.DECIDE else 400  # also on this machine
    elif route.need is Need.ADMIN:
        past = 400 if path == access.ERASURE else 503  # no request is named; no worker is there
        expected = 401 if role is None else past if role is Role.ADMIN else 403  # also on this machine
    elif route.need is Need.CONSOLE:
        past = 400 if role is Role.ADMIN else 401  # an admin who names nobody; the others are asked for a key
        expected = {access.SIGN_IN: 401, access.CUSTOMER: past, access.SIGN_OUT: 303}.get(path, 200)
    elif route.need is Need.READ:
        expected = 200 if is_near else 401 if role is None else 403 if role is Role.COLLECT else 200
    else:
        expected = 200
    assert status == expected


def test_every_path_that_bentoml_serves_has_a_rule(world):
    """A route that comes with a new version of BentoML, or a new endpoint, does not open by itself."""
    served = [route.path + ("/index.css" if isinstance(route, Mount) else "") for route in world.gateway.app.routes]
    assert len(served) > 10
    assert [path for path in served if access.route_of(path) is None] == []
    for path in world.gateway.handlers:
        assert access.route_of(path).need is Need.DECIDE


def test_every_answer_has_the_guards_of_a_browser(world):
    asked = [("POST", "/recommend"), ("GET", "/healthz"), ("GET", "/docs"), ("GET", "/nothing"), ("POST", "/v1/track"), ("PUT", "/churn")]
    for method, path in (*asked, ("GET", "/profile/x"), ("GET", "/console"), ("GET", "/static_content/swagger-ui.css")):
        headers = world.ask(method, path).headers
        found = [headers.get(name) for name in ("x-content-type-options", "x-frame-options", "referrer-policy")]
        assert found == ["nosniff", "DENY", "no-referrer"], path
        assert "strict-transport-security" not in headers
        assert "server" not in headers


def test_browser_is_told_to_stay_with_https_where_that_is_spoken(world):
    gateway = Gateway(
        None, handlers={}, pages={}, door=None, people=None, keys=lambda: access.Keys(()), is_loopback_only=True, max_body_bytes=1_000,
        deadline_ms=100, is_tls=True,
    )  # fmt: skip
    assert _asker(world.runner, gateway, None)("GET", "/nothing").headers["strict-transport-security"] == "max-age=31536000"


def test_answer_carries_the_number_under_which_the_log_tells_of_it(world):
    told = [world.ask("POST", "/recommend", json={"customer_id": "c1"}).headers["x-request-id"] for _ in range(3)]
    assert len(set(told)) == 3


def test_key_that_asks_for_more_than_it_may_is_429_and_others_are_not(world, monkeypatch):
    from prometheus_client import REGISTRY

    def limited():
        return REGISTRY.get_sample_value("rapport_rate_limited_total", {"role": "decide"}) or 0

    monkeypatch.setattr(world.gateway, "rates", Rates(0.1, 2))
    before = limited()
    codes = [world.ask("POST", "/recommend", json={"customer_id": "c1"}) for _ in range(3)]
    assert [answer.status_code for answer in codes] == [200, 200, 429]
    assert codes[-1].json()["error"]["code"] == "rate_limited"
    assert 1 <= int(codes[-1].headers["retry-after"]) <= 10
    assert limited() == before + 1
    assert world.ask("POST", "/recommend", key=world.keys[Role.ADMIN], json={"customer_id": "c1"}).status_code == 200
    assert world.ask("POST", "/recommend", key="wrong", json={"customer_id": "c1"}).status_code == 401
    assert world.ask("GET", "/healthz").status_code == 200


def test_revoked_key_is_refused_by_the_running_service(world):
    entry, key = keyring.add(world.settings.home, Role.DECIDE, at=datetime.now(UTC))
    answers = []
    for change in (lambda: None, lambda: keyring.revoke(world.settings.home, entry.id, at=datetime.now(UTC))):
        change()
        world.service.valid.refresh()  # as the watcher does every two seconds
        answers.append(world.ask("POST", "/recommend", key=key, json={"customer_id": "c1"}).status_code)
    assert answers == [200, 401]


@pytest.mark.parametrize("header", ["Bearer", "Bearer ", "Bearer x", "bearer", "Basic", "Basic !!", "Token x", "", " "])
def test_malformed_key_is_no_key(world, header):
    refused = world.ask("POST", "/churn", key=None, headers={"Authorization": header}, json={"customer_ids": ["c1"]})
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "unauthenticated"
    assert refused.headers["www-authenticate"] == "Bearer"


def test_write_key_of_collection_decides_nothing(world):
    basic = "Basic " + base64.b64encode(f"{world.keys[Role.COLLECT]}:".encode()).decode()
    assert world.ask("POST", "/churn", key=None, headers={"Authorization": basic}, json={"customer_ids": ["c"]}).status_code == 403


def test_service_that_listens_beyond_loopback_keeps_its_documentation_to_itself(world):
    world.gateway.is_loopback_only = False
    try:
        assert world.ask("GET", "/docs.json", key=None, client=NEAR).status_code == 401
        assert world.ask("GET", "/healthz", key=None, client=FAR).status_code == 200
    finally:
        world.gateway.is_loopback_only = True


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nothing"),
        ("POST", "/recommend/"),
        ("POST", "/decide"),
        ("GET", "/.env"),
        ("PUT", "/x" * 99),
        ("POST", "/score/"),
        ("POST", "/score/a/b"),
    ],
)
def test_undeclared_path_ends_at_the_gateway(world, method, path, monkeypatch):
    async def unreachable(*_):
        pytest.fail("BentoML saw it")

    monkeypatch.setattr(world.gateway, "app", unreachable)
    refused = world.ask(method, path)
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/recommend"), ("DELETE", "/churn"), ("POST", "/healthz"), ("POST", "/docs.json"), ("GET", "/score/churn")]
)
def test_other_method_is_405_with_those_allowed(world, method, path):
    refused = world.ask(method, path)
    assert refused.status_code == 405
    assert refused.headers["allow"]
    assert refused.json()["error"]["code"] == "method_not_allowed"


def test_body_beyond_the_limit_is_413_declared_or_not(world):
    limit = world.settings.serving.max_body_bytes

    async def in_pieces():
        for _ in range(3):
            yield b" " * (limit // 2)

    for content in (b" " * (limit + 1), in_pieces()):
        refused = world.ask("POST", "/recommend", content=content)
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "body_too_large"
    padded = b'{"customer_ids": ["c1"]}'.ljust(limit)
    assert world.ask("POST", "/churn", content=padded).status_code == 200


def test_largest_batch_of_long_names_fits_the_limit(world):
    ids = [f"c{i:016x}" for i in range(1_000)]
    answer = world.ask("POST", "/churn", json={"customer_ids": ids})
    assert answer.status_code == 200
    assert [p["customer_id"] for p in answer.json()["predictions"]] == ids


def test_too_many_requests_at_once_are_503_and_told_when_to_come_again(world, monkeypatch):
    monkeypatch.setattr(world.gateway.crowd, "under_way", 10_000)
    for path in ("/recommend", "/churn", "/docs"):
        refused = world.ask("POST", path, json={"customer_id": "c1"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"]
    assert world.ask("GET", "/healthz").status_code == 200


def test_where_rounds_are_long_scores_come_without_reasons_and_say_so(world, cast, monkeypatch):
    asked = {"customer_ids": cast.customers[:1]}
    assert world.ask("POST", "/churn", json=asked).json()["predictions"][0]["reasons"]
    crowd = world.gateway.crowd
    monkeypatch.setattr(crowd, "_end_round", lambda: setattr(crowd, "_of", None))  # which would look at how long this one was
    monkeypatch.setattr(crowd, "is_crowded", True)
    told = world.ask("POST", "/churn", json=asked).json()
    assert (told["source"], told["degraded"], told["causes"]) == ("personal", True, ["reasons_missing"])
    assert told["predictions"][0]["reasons"] == []


def test_body_that_never_ends_is_408(world, monkeypatch):
    monkeypatch.setattr("serving.gateway.BODY_TIMEOUT_S", 0.05)

    async def trickle():
        yield b"{"
        await asyncio.Event().wait()

    assert world.ask("POST", "/recommend", content=trickle()).status_code == 408


def test_defect_is_a_500_at_once_and_tells_nothing(world, monkeypatch, caplog):
    secret = "eve@example.com"

    async def broken(body, deadline):
        raise KeyError(body)

    monkeypatch.setitem(world.gateway.handlers, "/recommend", broken)
    with caplog.at_level(logging.ERROR):
        refused = world.ask("POST", "/recommend", json={"customer_id": secret})
    assert refused.status_code == 500
    assert refused.json()["error"]["code"] == "internal"
    assert "KeyError" in caplog.text
    assert secret not in caplog.text + refused.text


def test_no_identifier_is_logged_whatever_is_sent(world, caplog):
    secret = "eve@example.com"
    with caplog.at_level(logging.DEBUG, logger="rapport"):
        for path, body in (("/recommend", {"customer_id": secret}), ("/churn", {"customer_ids": [secret] * 20}), ("/churn", {secret: 1})):
            world.ask("POST", path, json=body)
        world.ask("POST", "/recommend", json={"customer_id": "x", "context": secret})
        world.ask("GET", f"/profile/{secret}")
    assert secret not in caplog.text


def test_what_bentoml_says_of_a_wrong_request_is_written_without_it(world, caplog):
    secret = "eve@example.com"
    with caplog.at_level(logging.DEBUG):
        assert world.inner("POST", "/recommend", json={"customer_id": "c1", secret: 1}).status_code == 400
    said = [record for record in caplog.records if not record.name.startswith("rapport")]
    assert secret in caplog.text  # what it would write itself
    assert not [line for line in map(Lines("json").format, said) if secret in line]


def test_websocket_is_closed(world):
    sent = []

    async def send(message):
        sent.append(message)

    world.runner.run(world.gateway({"type": "websocket", "path": "/"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_documentation_page_may_load_nothing_from_elsewhere(world):
    for path in ("/", "/docs"):
        page = world.ask("GET", path)
        assert page.status_code == 200
        assert "swagger" in page.text
        assert page.headers["content-security-policy"].startswith("default-src 'self'")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/livez"])
def test_health_is_open_and_bentomls(world, path):
    assert world.ask("GET", path, key=None).status_code == 200
    assert world.ask("HEAD", path, key=None).status_code == 200


def test_requests_are_measured_by_endpoint_and_code(world):
    from prometheus_client import REGISTRY

    def seen(endpoint, code):
        return REGISTRY.get_sample_value("rapport_request_seconds_count", {"endpoint": endpoint, "code": code}) or 0

    asked = [("/recommend", "200"), ("/recommend", "400"), ("other", "404"), ("/score/return_risk", "200"), ("/score/{model}", "404")]
    before = [seen(*one) for one in asked]
    world.ask("POST", "/recommend", json={"customer_id": "c1"})
    world.ask("POST", "/recommend", json={})
    world.ask("GET", "/one-of-many-paths")
    world.ask("POST", "/score/return_risk", json={"customer_ids": ["c1"]})
    world.ask("POST", "/score/one-of-many-models", json={"customer_ids": ["c1"]})
    assert [seen(*one) for one in asked] == [n + 1 for n in before]
    assert seen("/score/one-of-many-models", "404") == 0


def test_batch_that_cannot_be_had_in_time_is_answered_in_time(world, cast, monkeypatch):
    is_answered, is_over = threading.Event(), threading.Event()

    def endless(*_):
        is_answered.wait(60)
        is_over.set()

    monkeypatch.setattr("serving.scores.Scoring.answer", endless)
    monkeypatch.setattr(world.gateway, "deadline_ms", 250)
    answer = world.ask("POST", "/churn", json={"customer_ids": cast.customers}).json()
    assert not is_over.is_set()
    assert (answer["source"], answer["degraded"], answer["causes"]) == ("static", True, ["deadline"])
    assert len(answer["predictions"]) == len(cast.customers)
    is_answered.set()
    assert is_over.wait(60)  # the thread is free again for the next test


def test_watcher_follows_a_new_champion_and_a_rollback(home, rehearse, cast):
    from serving.service import build

    service = build(Settings(home=home), rehearse=rehearse, poll_s=0.05)
    gateway = service.to_asgi()

    async def promote_and_wait():
        async with gateway.app.router.lifespan_context(gateway.app):
            assert service.core.champions.bundle.version("recommender") == "1"
            assert service.core.champions.bundle.version("return_risk") == "1"
            await asyncio.to_thread(cast.promote_recommender, home, 6)
            learner, _, base_rate = cast.classifier("return_risk", 9)
            newer = await asyncio.to_thread(
                functools.partial(registry.register, home, "return_risk", learner=learner, manifest={"base_rate": base_rate})
            )
            await asyncio.to_thread(registry.promote, home, "return_risk", newer)
            found = [await seen(["2", "2"])]
            await asyncio.to_thread(registry.rollback, home, "recommender")
            return [*found, await seen(["1", "2"])]

    async def seen(expected):
        for _ in range(3_000):
            if versions() == expected:
                break
            await asyncio.sleep(0.02)
        return versions()

    def versions():
        return [service.core.champions.bundle.version(name) for name in ("recommender", "return_risk")]

    assert asyncio.run(promote_and_wait()) == [["2", "2"], ["1", "2"]]


def test_declared_service_is_the_one_that_is_served():
    from serving import process, service

    module, _, name = process.SERVICE.partition(":")
    assert service.__name__ == module
    assert set(getattr(service, name).apis) == {"recommend", "churn", "intent", *(f"score_{task}" for task in tasks.declared())}
    assert json.dumps(getattr(service, name).schema())
