"""Who is signed in at the console: a cookie that holds no key, only the proof that its owner showed one that is still valid.

In: the digests of the admin keys, the wall clock. Out: cookies, and whether one is good. Nothing is remembered, so every worker knows every
session; it ends with its time, with its key's revocation, and with the browser. The secret behind the proof is this home's.
"""

import functools
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterable

from pipelines.keyfile import kept
from pipelines.settings import Settings

COOKIE = "rapport_console"
MINUTES = 30  # without a page asked for


class Sessions:
    """Begins and checks sessions. `secret`: asked for at the first use."""

    def __init__(self, secret: Callable[[], str], *, is_tls: bool, now_s: Callable[[], float] = time.time) -> None:
        self._secret, self._is_tls, self._now_s = secret, is_tls, now_s

    @classmethod
    def of(cls, settings: Settings) -> "Sessions":
        """Those of a home."""
        path = settings.home / "keys" / "console.key"
        secret = functools.cache(lambda: kept(path, lambda: secrets.token_hex(32)))
        return cls(secret, is_tls=settings.serving.tls_cert is not None)

    def cookie(self, digest: bytes) -> bytes:
        """Set-Cookie for whoever showed the key of this digest just now."""
        until = b"%d" % (self._now_s() + MINUTES * 60)
        return self._set(until + b"." + self._proof(until, digest), MINUTES * 60)

    def no_cookie(self) -> bytes:
        """Set-Cookie that ends the session."""
        return self._set(b"", 0)

    def digest_of(self, header: bytes | None, digests: Iterable[bytes]) -> bytes | None:
        """With which of these keys the session in the Cookie header began; None where there is none, or it is over."""
        until, _, proof = _value(header).partition(b".")
        if not until.isdigit() or len(until) > 12 or int(until) < self._now_s():
            return None
        found = [digest for digest in digests if hmac.compare_digest(proof, self._proof(until, digest))]
        return found[0] if found else None

    def _proof(self, until: bytes, digest: bytes) -> bytes:
        return hmac.new(self._secret().encode(), b"console\0" + until + b"\0" + digest, hashlib.sha256).hexdigest().encode()

    def _set(self, value: bytes, seconds: int) -> bytes:
        secure = b"; Secure" if self._is_tls else b""
        return b"%s=%s; Path=/console; Max-Age=%d; HttpOnly; SameSite=Strict%s" % (COOKIE.encode(), value, seconds, secure)


def _value(header: bytes | None) -> bytes:
    named = (part.strip().partition(b"=") for part in (header or b"").split(b";"))
    return next((value for name, _, value in named if name == COOKIE.encode()), b"")
