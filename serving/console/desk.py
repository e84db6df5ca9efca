"""Requests of the console -> pages. In: an arrival, the keys. Out: HTML, or the way to another page.

What is shown comes from where the endpoints take it: `People` for the profile, the decision core for scores and recommendations. The name
that is searched for and the key come in the body of a form, never in an address. Never logs either.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Any, Protocol
from urllib.parse import parse_qs

from serving import access
from serving.access import Keys, Role
from serving.console import pages
from serving.console.sessions import Sessions
from serving.fallbacks import Deadline
from serving.gateway import Answer, Arrival, Desk, Refused
from serving.keyring import digest
from serving.wire import Recommendation, RecommendRequest, ScoreRequest, Scores

MAX_FORM_BYTES = 4_096
MAX_FIELDS = 4
K = 8  # recommendations shown
DEADLINE_MS = 1_000
POLICY = (
    b"content-security-policy",
    b"default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
)
_HTML, _CSS = b"text/html; charset=utf-8", b"text/css; charset=utf-8"


class Core(Protocol):
    """What decides."""

    async def recommend(self, request: RecommendRequest, deadline: Deadline) -> Recommendation:
        """Ranked items for a customer."""

    async def score(self, task: str, request: ScoreRequest, deadline: Deadline) -> Scores:
        """Probabilities, with their reasons."""


class Console:
    """Answers the paths below /console."""

    def __init__(self, people: Desk, core: Core, *, tasks: Callable[[], Sequence[str]], sessions: Sessions) -> None:
        self._people, self._core, self._tasks, self._sessions = people, core, tasks, sessions
        self._answers: dict[str, Callable[[Arrival, Keys], Awaitable[Answer]]] = {
            access.CONSOLE: self._search,
            access.SIGN_IN: self._sign_in,
            access.SIGN_OUT: self._sign_out,
            access.CUSTOMER: self._customer,
        }

    async def answer(self, arrival: Arrival, keys: Keys) -> Answer:
        """The page, with what it may load. Raises Refused: a form from another site, too large, or no form."""
        if arrival.path == access.STYLE:
            return Answer(200, resources.files(__package__).joinpath("style.css").read_bytes(), _CSS)
        if arrival.method == "POST" and arrival.headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
            raise Refused(403, "forbidden", "the console answers its own pages only")
        return await self._answers[arrival.path](arrival, keys)

    async def _search(self, arrival: Arrival, keys: Keys) -> Answer:
        admin = self._admin(arrival, keys)
        return _page(200, pages.sign_in()) if admin is None else self._shown(200, pages.search(), admin)

    async def _sign_in(self, arrival: Arrival, keys: Keys) -> Answer:
        key = (await _field(arrival, "key")).strip().encode()
        if keys.role_of_key(key) is not Role.ADMIN:
            return _page(401, pages.sign_in("This is not a valid admin key."))
        return _onward(self._sessions.cookie(digest(key)))

    async def _sign_out(self, arrival: Arrival, keys: Keys) -> Answer:
        return _onward(self._sessions.no_cookie())

    async def _customer(self, arrival: Arrival, keys: Keys) -> Answer:
        if arrival.method != "POST":  # somebody who loads the address of a result again
            return _onward()
        admin = self._admin(arrival, keys)
        if admin is None:
            return _page(401, pages.sign_in("Please sign in again."))
        name = (await _field(arrival, "name")).strip()
        if not 0 < len(name.encode("utf-8", "replace")) <= access.MAX_NAME_BYTES:
            told = f"A customer id, a user id or an address of at most {access.MAX_NAME_BYTES} bytes is expected."
            return self._shown(400, pages.search(told), admin)
        try:
            found = json.loads((await self._people.answer(access.PROFILE, "GET", name, b"")).body)
        except Refused as refused:
            return self._shown(refused.status, pages.search(_sentence(refused), name), admin)
        scores, recommended = await self._decided(str(found["customer_id"]))
        return self._shown(200, pages.customer(found, scores, recommended), admin)

    async def _decided(self, customer: str) -> tuple[dict[str, Scores], Recommendation]:
        tasks, deadline = self._tasks(), Deadline.after_ms(DEADLINE_MS)
        asked = [self._core.score(task, ScoreRequest(customer_ids=[customer], reasons=pages.REASONS), deadline) for task in tasks]
        scores = dict(zip(tasks, await asyncio.gather(*asked), strict=True))
        return scores, await self._core.recommend(RecommendRequest(customer_id=customer, k=K), deadline)

    def _admin(self, arrival: Arrival, keys: Keys) -> bytes | None:
        """The digest of the admin key that the caller showed, now or when signing in; None of anybody else."""
        shown = access.key_in(arrival.headers.get(b"authorization"))
        if keys.role_of_key(shown) is Role.ADMIN:
            return digest(shown)
        return self._sessions.digest_of(arrival.headers.get(b"cookie"), keys.of(Role.ADMIN))

    def _shown(self, status: int, page: bytes, admin: bytes) -> Answer:
        """The page, and the session goes on from now."""
        return _page(status, page, (b"set-cookie", self._sessions.cookie(admin)))


def _page(status: int, page: bytes, *headers: tuple[bytes, bytes]) -> Answer:
    return Answer(status, page, _HTML, (POLICY, *headers))


def _onward(cookie: bytes | None = None) -> Answer:
    """To the search page, by GET."""
    set_cookie = ((b"set-cookie", cookie),) if cookie else ()
    return Answer(303, b"", _HTML, ((b"location", access.CONSOLE.encode()), *set_cookie))


async def _field(arrival: Arrival, name: str) -> str:
    """The field of the form in the body; empty where it is not there. Raises Refused."""
    body = await arrival.read(MAX_FORM_BYTES)
    try:
        fields = parse_qs(body.decode(), max_num_fields=MAX_FIELDS)
    except ValueError:
        raise Refused(400, "invalid_request", f"a form of at most {MAX_FIELDS} fields in UTF-8 is expected") from None
    return fields.get(name, [""])[0]


def _sentence(refused: Refused) -> str:
    error: dict[str, Any] = json.loads(refused.body)["error"]
    message = str(error["message"])
    return f"{message[:1].upper()}{message[1:]}."
