"""Keys -> roles -> what a caller may do. Deny by default: a path that is not declared here does not exist.

In: settings, the `Authorization` header, the path. Out: a role, or the reason for a refusal. Keys come from the settings,
else they are generated once into `keys/<role>.key` of the home folder. Never logs or returns a key except to whoever
generated it, and never compares keys in a time that depends on them.
"""

import hashlib
import hmac
import ipaddress
import os
import secrets
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import SecretStr

from pipelines.settings import Settings


class Role(StrEnum):
    """What a key is for. `ADMIN` may do everything; the other two do not include each other."""

    COLLECT = "collect"
    DECIDE = "decide"
    ADMIN = "admin"


class Need(StrEnum):
    """What a route asks of its caller."""

    NOTHING = "nothing"
    ANY_KEY = "any key"  # or none at all from this machine, while the service listens on loopback only
    DECIDE = "decide"


@dataclass(frozen=True)
class Route:
    """One declared path: the methods it takes and what it needs."""

    methods: tuple[str, ...]
    need: Need


_READ = ("GET", "HEAD")
ROUTES: Mapping[str, Route] = {
    "/recommend": Route(("POST",), Need.DECIDE),
    "/churn": Route(("POST",), Need.DECIDE),
    "/intent": Route(("POST",), Need.DECIDE),
    "/healthz": Route(_READ, Need.NOTHING),
    "/readyz": Route(_READ, Need.NOTHING),
    "/livez": Route(_READ, Need.NOTHING),
    "/": Route(_READ, Need.ANY_KEY),
    "/docs": Route(_READ, Need.ANY_KEY),
    "/docs.json": Route(_READ, Need.ANY_KEY),
    "/schema.json": Route(_READ, Need.ANY_KEY),
    "/metrics": Route(_READ, Need.ANY_KEY),
}
ASSETS = Route(_READ, Need.ANY_KEY)  # style and script of the documentation page
ASSETS_PREFIX = "/static_content/"

_ALLOWED: Mapping[Need, frozenset[Role]] = {
    Need.ANY_KEY: frozenset(Role),
    Need.DECIDE: frozenset({Role.DECIDE, Role.ADMIN}),
}


@dataclass(frozen=True)
class Refusal:
    """Why a caller may not pass: 401 without a valid key, 403 with one of a lesser role."""

    status: int
    code: str
    message: str


UNAUTHENTICATED = Refusal(401, "unauthenticated", "a valid key is expected as 'Authorization: Bearer KEY'")
FORBIDDEN = Refusal(403, "forbidden", "this key's role may not do this; use a key of the role the endpoint needs")


@dataclass(frozen=True)
class Keys:
    """The digest of each role's key; strongest role first, so that a shared key means the stronger one."""

    digests: tuple[tuple[Role, bytes], ...]

    def role_of(self, authorization: bytes | None) -> Role | None:
        """The role of the key in the header: Bearer, or the user name of Basic. None if there is no valid one."""
        given = _key_in(authorization)
        if not given:
            return None
        digest = hashlib.sha256(given).digest()
        found = None
        for role, expected in reversed(self.digests):  # all of them, always: the time says nothing
            if hmac.compare_digest(digest, expected):
                found = role
        return found


def route_of(path: str) -> Route | None:
    """The declaration of the path; None where there is none."""
    return ROUTES.get(path) or (ASSETS if path.startswith(ASSETS_PREFIX) and ".." not in path else None)


def refuse(route: Route, role: Role | None, *, is_local: bool) -> Refusal | None:
    """Why this role may not use the route; None if it may. `is_local`: bound to loopback and called from it."""
    if route.need is Need.NOTHING or (route.need is Need.ANY_KEY and is_local):
        return None
    if role is None:
        return UNAUTHENTICATED
    return None if role in _ALLOWED[route.need] else FORBIDDEN


def is_loopback(host: str | None) -> bool:
    """Whether the address is one of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def ensure_keys(settings: Settings) -> dict[Role, str]:
    """Generate the keys that neither the settings nor the home folder hold; returns the new ones, to be shown once."""
    new = {role: secrets.token_urlsafe(32) for role in Role if not _given(settings, role)}
    return {role: key for role, key in new.items() if _create(_path(settings, role), key)}


def read_key(settings: Settings, role: Role) -> str:
    """The key of the role. Raises FileNotFoundError where there is none yet (see `ensure_keys`)."""
    return _given(settings, role) or _path(settings, role).read_text().strip()


def load_keys(settings: Settings) -> Keys:
    """The keys to compare callers with. Raises FileNotFoundError where one is missing (see `ensure_keys`)."""
    strongest_first = (Role.ADMIN, Role.DECIDE, Role.COLLECT)
    return Keys(tuple((role, hashlib.sha256(read_key(settings, role).encode()).digest()) for role in strongest_first))


def _given(settings: Settings, role: Role) -> str:
    secret: SecretStr | None = getattr(settings, f"{role}_key")
    return secret.get_secret_value().strip() if secret else ""


def _path(settings: Settings, role: Role) -> Path:
    return settings.home / "keys" / f"{role}.key"


def _create(path: Path, key: str) -> bool:
    """Write the key for its owner's eyes only; False if another process was first. A file in place is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(key + "\n")
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _key_in(authorization: bytes | None) -> bytes:
    scheme, _, value = (authorization or b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() != b"basic":
        return b""
    try:
        return b64decode(value.strip(), validate=True).partition(b":")[0]
    except Base64Error:
        return b""
