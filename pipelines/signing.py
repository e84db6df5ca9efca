"""This home's signing key, and signatures with it: who has no key cannot make one, and another home's are not ours.

In: bytes and what they are for. Out: HMAC-SHA256 in hex. Never signs for one purpose what holds for another.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import StoreError
from pipelines.keyfile import kept

KEY_BYTES = 32


def signing_key(home: Path, *, create: bool = False) -> bytes:
    """The key, made on first use where `create`. Another key makes everything signed before foreign. Raises StoreError."""
    path = home / "keys" / "signing.key"
    try:
        key = bytes.fromhex(kept(path, lambda: secrets.token_hex(KEY_BYTES)) if create else path.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise StoreError(f"signing: {path} should hold this home's signing key ({error}); restore it") from error
    if len(key) != KEY_BYTES:
        raise StoreError(f"signing: {path} holds {len(key)} bytes, a signing key has {KEY_BYTES}; restore it")
    return key


def keyed(home: Path, purpose: str, content: bytes) -> str:
    """The content's HMAC for this purpose, 64 hex digits. Makes the key on first use."""
    return _keyed(signing_key(home, create=True), purpose, content)


def signed(home: Path, purpose: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """The document of JSON values with its `signature`."""
    return {**document, "signature": keyed(home, purpose, _canonical(document))}


def is_signed(home: Path, purpose: str, document: Mapping[str, Any]) -> bool:
    """Whether the document is, in every value, one that this home signed for this purpose. Raises StoreError without the key."""
    unsigned = {name: value for name, value in document.items() if name != "signature"}
    try:
        expected = _keyed(signing_key(home), purpose, _canonical(unsigned))
    except (TypeError, ValueError):  # no JSON, so nothing that was signed
        return False
    return hmac.compare_digest(str(document.get("signature", "")).encode(), expected.encode())


def _keyed(key: bytes, purpose: str, content: bytes) -> str:
    return hmac.new(key, purpose.encode() + b"\0" + content, hashlib.sha256).hexdigest()


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
