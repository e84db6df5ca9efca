"""Keys -> roles -> what a caller may do. Deny by default: a path that is not declared here does not exist.

In: settings, the `Authorization` header, the path. Out: a role, or the reason for a refusal. Keys come from the settings, else they are
generated once; of those the service reads the digests alone (`keyring`). Copies for this machine's own programs are put into
`keys/<role>.key` of the home folder, and may be taken away from there. Never logs or returns a key except to whoever generated it, and
never compares keys in a time that depends on them. A write key is public, for web pages carry it: it opens collection and nothing else.
"""

import functools
import hmac
import ipaddress
import secrets
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote_to_bytes

from pydantic import SecretStr

from pipelines.errors import PipelineError
from pipelines.settings import Settings
from serving import keyring
from serving.keyring import digest

N = TypeVar("N", bound=str)


class Role(StrEnum):
    """What a key is for. `ADMIN` may do everything; the other two do not include each other."""

    COLLECT = "collect"
    DECIDE = "decide"
    ADMIN = "admin"


class Need(StrEnum):
    """What a route asks of its caller."""

    NOTHING = "nothing"
    READ = "read"  # a key of the shop's own programs, or none at all from this machine while the service listens on loopback only
    DECIDE = "decide"
    ADMIN = "admin"
    COLLECT = "collect"  # the key may also stand in the body or the query: a web page's beacon can set no header
    CONSOLE = "console"  # what it shows needs an admin's key, or the session that one began; who has none is asked for it


@dataclass(frozen=True)
class Route:
    """One declared path: the methods it takes and what it needs."""

    methods: tuple[str, ...]
    need: Need


_READ = ("GET", "HEAD")
_EVENTS = Route(("POST", "OPTIONS"), Need.COLLECT)
# The Segment HTTP API: path -> the call that it takes. The short forms are those of its browser and mobile SDKs, `import` that of
# older mobile and server ones, of which the Java one ends in a slash.
COLLECTION: Mapping[str, str] = {
    "/v1/track": "track", "/v1/identify": "identify", "/v1/page": "page", "/v1/screen": "screen", "/v1/group": "group",
    "/v1/alias": "alias", "/v1/batch": "batch", "/v1/t": "track", "/v1/i": "identify", "/v1/p": "page", "/v1/s": "screen",
    "/v1/g": "group", "/v1/a": "alias", "/v1/b": "batch", "/v1/import": "batch", "/v1/import/": "batch",
}  # fmt: skip
PIXEL = "/v1/pixel.gif"
PROFILE = "/profile/{customer_id}"
EXPORT, ERASURE = f"{PROFILE}/export", f"{PROFILE}/erasure"
SCORE = "/score/{model}"
CONSOLE = "/console"
SIGN_IN, SIGN_OUT, CUSTOMER, STYLE = f"{CONSOLE}/sign-in", f"{CONSOLE}/sign-out", f"{CONSOLE}/customer", f"{CONSOLE}/style.css"
ROUTES: Mapping[str, Route] = {
    "/recommend": Route(("POST",), Need.DECIDE),
    "/churn": Route(("POST",), Need.DECIDE),
    "/intent": Route(("POST",), Need.DECIDE),
    SCORE: Route(("POST",), Need.DECIDE),
    "/healthz": Route(_READ, Need.NOTHING),
    "/readyz": Route(_READ, Need.NOTHING),
    "/livez": Route(_READ, Need.NOTHING),
    "/": Route(_READ, Need.READ),
    "/docs": Route(_READ, Need.READ),
    "/docs.json": Route(_READ, Need.READ),
    "/schema.json": Route(_READ, Need.READ),
    "/metrics": Route(_READ, Need.READ),
    PROFILE: Route(("GET", "DELETE"), Need.ADMIN),
    EXPORT: Route(("GET",), Need.ADMIN),
    ERASURE: Route(("GET",), Need.ADMIN),
    CONSOLE: Route(_READ, Need.CONSOLE),
    SIGN_IN: Route(("POST",), Need.CONSOLE),
    SIGN_OUT: Route(("POST",), Need.CONSOLE),
    CUSTOMER: Route(("POST", "GET"), Need.CONSOLE),
    STYLE: Route(_READ, Need.CONSOLE),
    **dict.fromkeys(COLLECTION, _EVENTS),
    PIXEL: Route(("GET", "OPTIONS"), Need.COLLECT),
}
MAX_NAME_BYTES = 256  # of the name in a path, decoded
SOURCE = "segment"  # whose events come with the key of the role collect
ASSETS = Route(_READ, Need.READ)  # style and script of the documentation page
ASSETS_PREFIX = "/static_content/"
SHORT: Mapping[str, str] = {"churn": "/churn", "intent": "/intent"}  # models that are asked at a path of their own as well
_SCORE_PREFIX = SCORE.partition("{")[0]

_ALLOWED: Mapping[Need, frozenset[Role]] = {
    Need.READ: frozenset({Role.DECIDE, Role.ADMIN}),
    Need.DECIDE: frozenset({Role.DECIDE, Role.ADMIN}),
    Need.ADMIN: frozenset({Role.ADMIN}),
    Need.COLLECT: frozenset({Role.COLLECT, Role.ADMIN}),
    Need.CONSOLE: frozenset({Role.ADMIN}),
}


class KeyMissing(PipelineError, FileNotFoundError):
    """The key itself is not here: it was taken away, or revoked."""


@dataclass(frozen=True)
class Refusal:
    """Why a caller may not pass: 401 without a valid key, 403 with one of a lesser role."""

    status: int
    code: str
    message: str


UNAUTHENTICATED = Refusal(401, "unauthenticated", "a valid key is expected as 'Authorization: Bearer KEY'")
NO_WRITE_KEY = Refusal(
    401,
    "unauthenticated",
    "a valid write key is expected: as user name of Basic, as 'Authorization: Bearer KEY', or as writeKey in the call",
)
FORBIDDEN: Mapping[Need, Refusal] = {
    need: Refusal(403, "forbidden", f"this key's role may not do this; a key of the role {' or '.join(sorted(roles))} may")
    for need, roles in _ALLOWED.items()
}


@dataclass(frozen=True)
class Keys:
    """Digests of each role's keys, strongest role first, so that a shared key means the stronger one; `sources`: of their write keys."""

    digests: tuple[tuple[Role, bytes], ...]
    sources: tuple[tuple[str, bytes], ...] = ()

    def role_of_key(self, key: bytes) -> Role | None:
        """The role of a key; None if it is not valid."""
        return self.role_of_digest(digest(key)) if key else None

    def role_of_digest(self, mine: bytes) -> Role | None:
        """The role of the key with this digest; None if it is not a valid one's."""
        return _matching(mine, self._all)

    def of(self, role: Role) -> tuple[bytes, ...]:
        """The digests of the role's keys."""
        return tuple(expected for other, expected in self.digests if other is role)

    def source_of(self, key: bytes) -> str:
        """Whose events come with this valid key."""
        return _matching(digest(key), self.sources) or SOURCE

    @functools.cached_property
    def _all(self) -> tuple[tuple[Role, bytes], ...]:
        return (*self.digests, *((Role.COLLECT, expected) for _, expected in self.sources))


def key_in(authorization: bytes | None) -> bytes:
    """The key in the header: Bearer, or the user name of Basic; empty where there is none."""
    scheme, _, value = (authorization or b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() != b"basic":
        return b""
    try:
        return b64decode(value.strip(), validate=True).partition(b":")[0]
    except Base64Error:
        return b""


def person_in(raw_path: bytes) -> tuple[str, str] | None:
    """The declared path below /profile that this one is of, and the name in it; None for any other.

    From the path as it came: in the decoded one, a slash of the name could not be told from one of the path.
    """
    if not raw_path.startswith(b"/profile/"):
        return None
    steps = raw_path.split(b"/")[1:]
    if len(steps) not in (2, 3):
        return None
    path = "/".join([PROFILE, *(step.decode("latin-1") for step in steps[2:])])
    name = unquote_to_bytes(steps[1])
    if path not in ROUTES or not 0 < len(name) <= MAX_NAME_BYTES:
        return None
    try:
        return path, name.decode()
    except UnicodeDecodeError:
        return None


def route_of(path: str) -> Route | None:
    """The declaration of the path; None where there is none."""
    if path.startswith(ASSETS_PREFIX) and ".." not in path:
        return ASSETS
    return ROUTES.get(SCORE if is_score(path) else path)


def is_score(path: str) -> bool:
    """Whether it is of the form `SCORE`, whatever the model."""
    return path.startswith(_SCORE_PREFIX) and "/" not in path[len(_SCORE_PREFIX) :] and path != _SCORE_PREFIX


def score_path(model: str) -> str:
    """Where a model is asked for scores; the name under which it is measured."""
    return SHORT.get(model, _SCORE_PREFIX + model)


def refuse(route: Route, role: Role | None, *, is_local: bool) -> Refusal | None:
    """Why this role may not use the route; None if it may. `is_local`: bound to loopback and called from it."""
    if route.need is Need.NOTHING or (route.need is Need.READ and is_local):
        return None
    if role is None:
        return NO_WRITE_KEY if route.need is Need.COLLECT else UNAUTHENTICATED
    return None if role in _ALLOWED[route.need] else FORBIDDEN[route.need]


def is_loopback(host: str | None) -> bool:
    """Whether the address is one of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def ensure_keys(settings: Settings) -> dict[Role, str]:
    """Generate a key for each role that neither the settings nor the ring know one of; returns the new ones, to be shown once.

    A key that somebody put into a role's file takes the place of the one that was generated. Raises StoreError.
    """
    ring, asked = keyring.entries(settings.home), [role for role in Role if not _given(settings, role)]
    if all(_is_known(ring, role, _copy(settings, role)) for role in asked):
        return {}
    new: dict[Role, str] = {}
    with keyring.changing(settings.home) as entries:
        for role in asked:
            key = _copy(settings, role)
            if _is_known(entries, role, key):
                continue
            if not key:
                key = new[role] = secrets.token_urlsafe(32)
                keyring.write_private(_path(settings, role), f"{key}\n".encode())
            at = datetime.now(UTC)
            former = [i for i, entry in enumerate(entries) if entry.role == role and entry.copy and not entry.revoked]
            for i in former:
                entries[i] = replace(entries[i], revoked=at.isoformat(timespec="seconds"))
            entries.append(keyring.made(role, key, at=at, copy=True))
    return new


def read_key(settings: Settings, role: Role) -> str:
    """The key of the role, as the settings or its file have it. Raises KeyMissing."""
    key = _given(settings, role) or _copy(settings, role)
    if not key:
        raise KeyMissing(
            f"keys: {_path(settings, role)} holds no key of the role {role}; give RAPPORT_{role.upper()}_KEY, or make one: "
            f"`rapport keys add {role}`"
        )
    return key


def load_keys(settings: Settings) -> Keys:
    """The keys to compare callers with: those of the settings, and those of the ring. Raises StoreError."""
    ring = keyring.entries(settings.home)
    found: list[tuple[Role, bytes]] = []
    for role in (Role.ADMIN, Role.DECIDE, Role.COLLECT):
        given = _given(settings, role)
        if given:
            found.append((role, digest(given.encode())))
        valid = [entry for entry in keyring.of_role(ring, role) if not entry.revoked and not (given and entry.copy)]
        found += [(role, bytes.fromhex(entry.digest)) for entry in valid]
    written = {name: secret.get_secret_value().strip() for name, secret in settings.sources.items()}
    return Keys(tuple(found), tuple((name, digest(key.encode())) for name, key in written.items() if key))


class Valid:
    """The keys that are valid now: none before `open`. What is added or revoked is so in every worker at its next `refresh`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stamp: tuple[int, int] | None = None
        self.keys = Keys(())

    def open(self) -> None:
        """Generate what is missing, and read them. Raises StoreError."""
        ensure_keys(self._settings)
        self.keys = load_keys(self._settings)

    def refresh(self) -> None:
        """Read the ring again if it changed. Raises StoreError, and what was read before stays."""
        stamp = keyring.stamp(self._settings.home)
        if stamp != self._stamp:
            self.keys, self._stamp = load_keys(self._settings), stamp


def _matching(mine: bytes, expected: Iterable[tuple[N, bytes]]) -> N | None:
    """The first name whose key has this digest. All of them are compared, always: the time says nothing."""
    found = [name for name, other in expected if hmac.compare_digest(mine, other)]
    return found[0] if found else None


def _is_known(ring: Iterable[keyring.Entry], role: Role, copy: str) -> bool:
    """Whether the role has, or had, a key of its own; with a copy in its file, whether it is that one."""
    mine = [entry.digest for entry in ring if entry.role == role]
    return digest(copy.encode()).hex() in mine if copy else bool(mine)


def _given(settings: Settings, role: Role) -> str:
    secret: SecretStr | None = getattr(settings, f"{role}_key")
    return secret.get_secret_value().strip() if secret else ""


def _copy(settings: Settings, role: Role) -> str:
    try:
        return _path(settings, role).read_text().strip()
    except FileNotFoundError:
        return ""


def _path(settings: Settings, role: Role) -> Path:
    return keyring.copy_path(settings.home, role)
