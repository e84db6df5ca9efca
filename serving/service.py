"""The BentoML service `serving.service:Personalization`: /recommend, /score/{model}, /churn, /intent, and the collection of events.

The endpoints are declared to BentoML, which serves their documentation, health and metrics. The calls themselves are answered
by the gateway in front of it, from the same core (`Answers`), without BentoML's middleware. This module is an entry point: it
silences telemetry, bounds threads and reads the settings when it is imported. Never does the work of a request itself.
"""

# ruff: noqa: E402 - thread pools are sized when numpy is first imported
import os
import sys
from pathlib import Path

from pipelines.settings import Settings, silence_telemetry
from serving import rehearsal


def _is_server(part: str = "") -> bool:
    """Whether this process is BentoML's: its command, or one of the workers that the command starts; `part`: only this."""
    program = getattr(sys.modules["__main__"], "__file__", None) or ""
    parts = Path(program).parts[-3:]
    return any("bentoml" in one for one in parts) and (not part or part in parts)


silence_telemetry()
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
if _is_server("worker"):
    sys.modules["sklearn"] = None  # type: ignore[assignment] # LightGBM imports it where there is one; nothing here needs it
    rehearsal.call_in()  # it imports the same as this process: both at once

import asyncio
import functools
import gc
import json
import logging
import random
import signal
from collections.abc import Callable, Sequence
from typing import Any

import bentoml
from _bentoml_sdk.service.factory import Service  # `service_class` is public, the class to derive from is not
from starlette.responses import Response

from pipelines.log_lines import where_from, write_lines
from serving import access, admission
from serving.access_log import AccessLog
from serving.answers import Answers
from serving.champions import TASKS, Rehearse
from serving.collect import Collector
from serving.console.desk import Console
from serving.console.sessions import Sessions
from serving.fallbacks import Deadline, trace
from serving.gateway import Gateway
from serving.metrics import SECONDS
from serving.openapi import describe_collection, describe_decisions, describe_nulls, describe_people
from serving.otlp import Exporter
from serving.people import People
from serving.process import starter_lives
from serving.profile import open_profiles
from serving.rates import Rates
from serving.resolution import Resolver
from serving.tracing import Tracer
from serving.wire import Recommendation, RecommendRequest, ScoreRequest, Scores, encode

log = logging.getLogger("rapport.serving")

POLL_S = 2.0
SCORED = {path: task for task in TASKS for path in dict.fromkeys((access.SCORE.format(model=task), access.score_path(task)))}
ABOUT = """Recommendations, churn, purchase intent and what else a model foretells of the customers of a shop.

Every valid request gets a usable answer: `source` names the rung of the ladder that gave it, `degraded` is true when a better rung
should have answered and could not, `causes` says why, and `as_of` is the instant that the answer holds for.

People of the shop look at one customer at a time in the [console](/console)."""


class Served(Service):
    """A BentoML service with the gateway in front. `core` is what both paths ask, `collector` where events go, `people` for one person,
    `console` for those who look, `valid` the keys, `exporter` for traces, if somebody takes them."""

    core: Answers
    collector: Collector
    people: People
    console: Console
    valid: access.Valid
    exporter: Exporter | None

    def to_asgi(self, is_main: bool = True) -> Gateway:
        """The app of one worker: the gateway, BentoML's app behind it."""
        settings = self.core.settings
        self.valid.open()
        admission.use()
        serving = settings.serving
        return Gateway(
            super().to_asgi(is_main),
            handlers={"/recommend": self.core.recommend_body, **{path: self.core.score_body(task) for path, task in SCORED.items()}},
            pages={"/docs.json": functools.cache(lambda: _described(self.openapi_spec.asdict()))},
            door=self.collector,
            people=self.people,
            keys=lambda: self.valid.keys,
            is_loopback_only=access.is_loopback(serving.host),
            max_body_bytes=serving.max_body_bytes,
            deadline_ms=serving.deadline_ms,
            console=self.console,
            # a connection stays with one worker, so each has its share
            rates=Rates(serving.rate_per_s / serving.workers, serving.burst / serving.workers),
            is_tls=serving.tls_cert is not None,
            access_log=AccessLog(serving.log_requests, slow_ms=serving.log_slow_ms, per_s=serving.log_per_s),
            tracer=Tracer(self.exporter.offer) if self.exporter else None,
        )


def build(settings: Settings, *, rehearse: Rehearse | None = None, poll_s: float = POLL_S) -> Served:
    """The service for these settings."""
    core = Answers(settings, rehearse=rehearse, open_store=Resolver() if _is_server("worker") else open_profiles)
    collector = Collector(settings)
    people = People(settings, guard=core.guard, clock=core.clock, vault=lambda: core.vault)
    console = Console(people, core, tasks=lambda: sorted(core.champions.bundle.scorers), sessions=Sessions.of(settings))
    valid = access.Valid(settings)
    deadline_ms = settings.serving.deadline_ms
    exporter = _exporter(settings)

    @bentoml.service(
        name="Personalization",
        service_class=Served,
        workers=settings.serving.workers,
        traffic={"timeout": 2},  # timers of the whole timeout stay in memory: keep it short
        logging={"access": {"enabled": False}},
        tracing={"excluded_urls": ".*"},
        metrics={"enabled": True, "duration": {"buckets": list(SECONDS)}},
    )
    class Personalization(_scores(core, deadline_ms)):  # type: ignore[misc]
        """Recommendations, and scores of every declared task, for the customers of a shop."""

        def __init__(self) -> None:
            self.watchers: list[asyncio.Task[None]] = []

        @bentoml.on_startup
        async def start(self) -> None:
            gc.set_threshold(50_000, 20, 50)
            parent = os.getppid()
            try:
                await asyncio.to_thread(collector.open)
                await asyncio.to_thread(core.open)
                await asyncio.to_thread(rehearsal.dismiss)
            except Exception as error:  # what the server says of it, with the error's message, is not kept
                log.critical("the worker could not start: %s", where_from(error))
                raise
            # a revoked key must not wait for models that are being loaded
            followed = ([core.refresh, collector.open], [valid.refresh])
            self.watchers = [asyncio.create_task(_watch(some, poll_s, parent)) for some in followed]

        @bentoml.on_shutdown
        async def stop(self) -> None:
            for watcher in self.watchers:
                watcher.cancel()
            await asyncio.to_thread(collector.close)
            people.close()
            core.close()
            if exporter:
                exporter.close()

        @bentoml.api
        async def recommend(self, request: RecommendRequest, /) -> Recommendation:
            """Ranked items for a customer, or items that go with one item."""
            return _json(encode(await core.recommend(request, Deadline.after_ms(deadline_ms))))  # type: ignore[return-value]

    service: Any = Personalization  # the decorator turns the class into a Served
    service.core, service.collector, service.people, service.console, service.valid = core, collector, people, console, valid
    service.exporter = exporter
    return service  # type: ignore[no-any-return]


def _exporter(settings: Settings) -> Exporter | None:
    """Who takes traces; nobody where no endpoint is set."""
    serving = settings.serving
    if serving.otlp_endpoint is None:
        return None
    return Exporter(serving.otlp_endpoint, headers={name: value.get_secret_value() for name, value in serving.otlp_headers.items()})


def _scores(core: Answers, deadline_ms: int) -> type:
    """A class with an endpoint for each path of SCORED, to be derived from."""

    def declared(path: str, task: str) -> Any:
        async def endpoint(self: Any, request: ScoreRequest, /) -> Scores:
            return _json(encode(await core.score(task, request, Deadline.after_ms(deadline_ms))))  # type: ignore[return-value]

        endpoint.__name__ = path[1:].replace("/", "_")
        endpoint.__doc__ = f"The probability of {task} for each customer, with its reasons."
        return bentoml.api(route=path)(endpoint)

    endpoints = [declared(path, task) for path, task in SCORED.items()]
    return type("Scored", (), {endpoint.name: endpoint for endpoint in endpoints})


async def _watch(refreshes: Sequence[Callable[[], None]], poll_s: float, parent: int) -> None:
    """Follow what changes on disk, for as long as the worker lives and somebody wants it to."""
    while True:
        await asyncio.sleep(poll_s * random.uniform(0.8, 1.2))  # workers must not all load at once
        if os.getppid() != parent:
            log.error("the supervisor is gone; this worker ends")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if not starter_lives():
            os.kill(parent, signal.SIGTERM)  # the supervisor ends us in turn
            return
        for refresh in refreshes:
            try:
                await asyncio.to_thread(refresh)
            except Exception as error:
                log.error("the watcher failed and goes on: %s", trace(error))


def _json(body: bytes) -> Response:
    """BentoML passes a ready response on; building one from the declared type costs more than the answer."""
    return Response(body, media_type="application/json")


def _described(document: dict[str, Any]) -> bytes:
    """The OpenAPI document with what BentoML does not say: whose service it is, the key, and the shape of a refusal."""
    document["info"] = {"title": "Rapport", "version": "1", "description": ABOUT}
    components = document.setdefault("components", {})
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "a key of the role decide or admin"}}
    text = {"type": "string"}
    problem = {"type": "object", "required": ["code", "message"], "properties": {"code": text, "message": text, "field": text}}
    components.setdefault("schemas", {})["Refusal"] = {"type": "object", "required": ["error"], "properties": {"error": problem}}
    describe_decisions(document, ["/recommend", *SCORED])
    describe_nulls(document)
    describe_collection(document)
    describe_people(document)
    return json.dumps(document, default=str).encode()


_settings = Settings()
if _is_server():
    write_lines(_settings.serving.log_format)
Personalization = build(_settings)
