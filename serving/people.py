"""Requests about one person: their profile, everything held about them, and their erasure. For the role admin.

In: a name as the shop has it (a customer_id, a user id, an address). Out: JSON. What the online store knows is read here; the rest is
asked of the worker beside the service (`pipelines.requests`), which alone may read the tables and the log. An answer that takes longer
than a caller waits can be asked for again. Never logs a name, and keeps no answer.
"""

import asyncio
import contextlib
import functools
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import parse_qs

from pipelines.errors import StoreError
from pipelines.online.feast_format import Value
from pipelines.requests import Kind, Requests, Result, State, is_worked
from pipelines.settings import Settings
from pipelines.vault import Vault
from serving import access
from serving.clock import Clock
from serving.fallbacks import Deadline, Unavailable
from serving.gateway import Answer, Refused
from serving.profile import Profiles
from serving.store_guard import Guard

T = TypeVar("T")

BY = "an admin key over HTTP"
WAIT_S = 20.0  # that a caller is kept waiting; then 202
POLL_S = 0.05
MAX_WAITING = 16  # callers at once
READ_MS = 1_000
NO_WORKER = (
    "this needs the worker beside the service, which is not running; start both with `rapport serve`, or the worker alone with "
    "`python -m pipelines.stream`"
)
_ID = "request_id"


class People:
    """Answers the paths below /profile. `close` it at the end. `vault`: opened on first use."""

    def __init__(
        self, settings: Settings, *, guard: Guard, clock: Clock, vault: Callable[[], Vault], wait_s: float = WAIT_S, poll_s: float = POLL_S
    ) -> None:
        self.settings, self.wait_s, self.poll_s = settings, wait_s, poll_s
        self._guard, self._clock, self._vault = guard, clock, vault
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="people")
        self._waiting = 0

    async def answer(self, path: str, method: str, name: str, query: bytes) -> Answer:
        """The answer for the person of this name; `path`: of access.PERSON. Raises Refused."""
        known = parse_qs(query.decode("latin-1")).get(_ID, [])
        if path == access.PROFILE and method == "GET":
            return await self._profile(name)
        kind = Kind.EXPORT if path == access.EXPORT else Kind.ERASE
        if path == access.ERASURE and not known:
            raise Refused(400, "invalid_request", f"{_ID} is expected, as DELETE answered it", _ID)
        return await self._asked(kind, name, known[0] if known else None)

    def close(self) -> None:
        """Let the thread go."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _asked(self, kind: Kind, name: str, known: str | None) -> Answer:
        one = known or await self._ask(kind, name)
        # who asks again has waited already
        result = await self._wait(one, kind, self.wait_s if known is None else 0.0)
        if result.state is State.ASKED:
            return Answer(202, json.dumps({_ID: one, "status": "pending"}).encode())
        return Answer(200, _told(result))

    async def _profile(self, name: str) -> Answer:
        """What the worker tells of the person, and what the online store holds at this moment."""
        result = await self._wait(await self._ask(Kind.PROFILE, name), Kind.PROFILE, self.wait_s)
        if result.state is State.ASKED:
            raise _unavailable("the worker did not answer in time; try again")
        told: dict[str, Any] = json.loads(_told(result))
        with contextlib.suppress(Unavailable):  # the store is down: what the worker knows is still an answer
            told |= self._guard.ask(lambda profiles: self._live(profiles, str(told["customer_id"])))
        return Answer(200, json.dumps({"segment": None} | told | {"as_of": self._clock.now().isoformat()}, default=str).encode())

    def _live(self, profiles: Profiles, customer: str) -> dict[str, Any]:
        at, deadline = self._clock.now(), Deadline.after_ms(READ_MS)
        features = profiles.read("intent_v1", [customer], at=at, deadline=deadline)
        scores = profiles.read("customer_scores", [customer], at=at, deadline=deadline)
        return {
            "features": {name: _shown(values[0]) for name, values in features.columns.items()},
            "features_age_s": _age_s(features.changed_at[0], at),
            "scores": {name: _shown(values[0]) for name, values in scores.columns.items()},
            "scores_age_s": _age_s(scores.changed_at[0], at),
        }

    async def _ask(self, kind: Kind, name: str) -> str:
        if not is_worked(self.settings.home):
            raise _unavailable(NO_WORKER)
        return await self._run(lambda requests: requests.ask(kind, name, by=BY, now_us=int(datetime.now(UTC).timestamp() * 1e6)))

    async def _wait(self, one: str, kind: Kind, wait_s: float) -> Result:
        """The result, waited for. Raises Refused where there is no such request, or it failed."""
        if self._waiting >= MAX_WAITING:
            raise Refused(429, "too_many_requests", f"{MAX_WAITING} such requests wait; try again", header=(b"retry-after", b"5"))
        self._waiting += 1
        try:
            until = asyncio.get_running_loop().time() + wait_s
            while True:
                result = await self._run(lambda requests: requests.result(one, kind=kind))
                if result is None:
                    raise Refused(404, "not_found", "no such request; its answer was fetched, or nobody asked for it within the hour")
                if result.state is not State.ASKED or asyncio.get_running_loop().time() >= until:
                    return result
                await asyncio.sleep(self.poll_s)
        finally:
            self._waiting -= 1

    async def _run(self, call: Callable[[Requests], T]) -> T:
        """In the thread that has the file open: a commit waits for the disk."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(self._requests))
        except StoreError:
            raise _unavailable("the requests could not be kept or read; free space on the disk, then try again") from None

    @functools.cached_property
    def _requests(self) -> Requests:
        return Requests(self.settings.home, vault=self._vault())


def _told(result: Result) -> bytes:
    """The answer. Raises Refused for a failure, in the words of whoever failed."""
    body = result.answer or b"{}"
    if result.state is State.DONE:
        return body
    told = json.loads(body)
    if told.get("code") == "not_found":
        raise Refused(404, "not_found", "nobody is known under this name")
    raise Refused(500, "failed", str(told.get("error", "the worker could not do this; its log says why")))


def _unavailable(message: str) -> Refused:
    return Refused(503, "worker_unavailable", message, header=(b"retry-after", b"5"))


def _age_s(changed_at: float | None, at: datetime) -> float | None:
    return None if changed_at is None else round(max(0.0, at.timestamp() - changed_at), 3)


def _shown(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value
