"""The receipt of an erasure: what was removed where, signed by this home. It holds no identifier, only a keyed digest of one."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.signing import is_signed, signed

_PURPOSE = "receipt"


@dataclass(frozen=True)
class Receipt:
    """What an erasure did. Times are ISO 8601, UTC.

    about: `audit.digest` of the customer. stores: rows removed by store, those that stood there when it began. models: versions that
    may have learned from the person, which are to be trained again. shared: devices that others used too, and that stay theirs.
    """

    receipt_id: str
    about: str
    by: str
    as_of: str
    finished_at: str
    stores: Mapping[str, int]
    models: Mapping[str, list[int]]
    tombstones: int
    shared: int
    signature: str = ""


def folder(home: Path) -> Path:
    """Where receipts lie."""
    return home / "erasures"


def sign(home: Path, receipt: Receipt) -> Receipt:
    """The receipt with its signature, kept as `erasures/ID.json`."""
    document = asdict(receipt)
    document.pop("signature")
    whole = Receipt(**signed(home, _PURPOSE, document))
    replace(folder(home) / f"{receipt.receipt_id}.json", asdict(whole))
    return whole


def verify_receipt(home: Path, receipt: Receipt | Mapping[str, Any]) -> bool:
    """Whether this home signed the receipt as it is. Raises StoreError without the home's key."""
    return is_signed(home, _PURPOSE, asdict(receipt) if isinstance(receipt, Receipt) else receipt)


def checked(home: Path, path: Path) -> Receipt:
    """The receipt in a file, where this home signed it as it is. Raises InputError where it did not, or the file holds none."""
    try:
        document = json.loads(path.read_text())
        receipt = Receipt(**document)
    except OSError as error:
        raise InputError(f"receipt: {path} could not be opened ({error.strerror}); check the path and its rights") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"receipt: expected the JSON of a receipt in {path}, found {type(error).__name__} ({error})") from error
    if not verify_receipt(home, document):
        raise InputError(f"receipt: {path} is not as this home signed it; compare it with the one in {folder(home)}")
    return receipt


def read(home: Path, receipt_id: str) -> Receipt:
    """The receipt as it was kept. Raises InputError where there is none."""
    path = folder(home) / f"{receipt_id}.json"
    if not path.exists():
        raise InputError(f"erasure: expected the receipt {path}, found nothing; the erasure may not be finished: run it again")
    return Receipt(**json.loads(path.read_text()))


def queue_training(home: Path, receipt: Receipt) -> None:
    """Note down the versions to train again, with those of earlier erasures, in `erasures/retrain.json`."""
    path = folder(home) / "retrain.json"
    waiting = json.loads(path.read_text()) if path.exists() else {}
    for name, versions in receipt.models.items():
        waiting[name] = sorted({*waiting.get(name, []), *versions})
    replace(path, waiting)


def replace(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in one step; it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
