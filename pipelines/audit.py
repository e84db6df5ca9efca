"""Who did what about whom, and when: one line for each act, appended, chained to the line before and signed.

In: an act. Out: `audit/audit.jsonl` under the home, and whether it still is what was written. Lines are only ever added; a line
that is changed, removed or moved is told by `verify`, the last one too. Never holds an identifier: `about` is a keyed digest.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from pipelines.errors import StoreError
from pipelines.signing import is_signed, keyed, signed

_DIGEST = 32  # hex digits of a customer's digest
_START = "0" * 64  # what the first line is chained to
_PURPOSE = "audit"


@dataclass(frozen=True)
class Entry:
    """One act. `about`: see `digest`; empty where it is about nobody."""

    number: int  # from 1
    at: datetime  # UTC
    action: str
    by: str
    about: str
    details: dict[str, Any]


@dataclass(frozen=True)
class AuditReport:
    """What `verify` found: the lines there are, and a sentence for everything that is not as it was written."""

    lines: int
    problems: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether every line is there, unchanged and in its place."""
        return not self.problems

    @property
    def why(self) -> str:
        """The problems as one sentence; empty where there are none."""
        return "; ".join(self.problems)


@dataclass(frozen=True)
class _End:
    """Where the trail ends: its lines, its bytes and the last signature."""

    lines: int
    bytes: int
    signature: str


def digest(home: Path, customer_id: str) -> str:
    """By what the trail knows a customer, or an identifier: a keyed digest, the same every time."""
    return keyed(home, "about", customer_id.encode())[:_DIGEST]


def record(
    home: Path, action: str, *, by: str, about: str = "", details: Mapping[str, Any] | None = None, at: datetime | None = None
) -> Entry:
    """Add a line; it is on disk when this returns. Writers take turns. `details`: JSON values, none of them about a person.

    `at`: when; the wall clock's now where None. Raises StoreError where the disk refuses.
    """
    moment = (at or datetime.now(UTC)).astimezone(UTC)
    try:
        with _locked(home) as file:
            end = _mended_end(home, file)
            entry = Entry(end.lines + 1, moment, action, by, about, dict(details or {}))
            line = signed(home, _PURPOSE, {**_plain(entry), "previous": end.signature})
            content = json.dumps(line, sort_keys=True).encode() + b"\n"
            file.seek(0, os.SEEK_END)
            file.write(content)
            _flush(file)
            _write_end(home, _End(entry.number, file.tell(), line["signature"]))
            return entry
    except OSError as error:
        raise StoreError(f"audit: {_path(home)} could not be written ({error.strerror}); free space or mend its rights") from error


def entries(home: Path, about: str | None = None) -> list[Entry]:
    """The lines, oldest first; only those about one customer where `about` is given. Lines that cannot be read are left out."""
    found = (_parsed(line) for line in _lines(home))
    return [_entry(line) for line in found if line is not None and about in (None, line["about"])]


def verify(home: Path) -> AuditReport:
    """Read the trail from its first line to its last and hold it against its signatures and its known end."""
    problems, previous, lines = [], _START, _lines(home)
    for number, raw in enumerate(lines, start=1):
        line = _parsed(raw)
        if line is None or not is_signed(home, _PURPOSE, line):
            problems.append(f"line {number} is not what was written")
        elif line["previous"] != previous or line["number"] != number:
            problems.append(f"line {number} does not follow the line before it: one was removed, added or moved")
        previous = line["signature"] if line is not None else ""
    return AuditReport(len(lines), (*problems, *_end_problems(home, lines)))


# -- private -----------------------------------------------------------------------------------------------------------


def _path(home: Path) -> Path:
    return home / "audit" / "audit.jsonl"


def _end_path(home: Path) -> Path:
    return home / "audit" / "end.json"


@contextmanager
def _locked(home: Path) -> Iterator[IO[bytes]]:
    path = _path(home)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _plain(entry: Entry) -> dict[str, Any]:
    return {**vars(entry), "at": entry.at.isoformat()}


def _entry(line: Mapping[str, Any]) -> Entry:
    return Entry(line["number"], datetime.fromisoformat(line["at"]), line["action"], line["by"], line["about"], line["details"])


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """A line as it was made; None for anything else."""
    try:
        line = json.loads(raw)
        _entry(line), line["previous"], line["signature"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return dict(line)


def _lines(home: Path) -> list[bytes]:
    """Whole lines; one that was cut short was never acknowledged."""
    path = _path(home)
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _known_end(home: Path) -> _End | None:
    """The end as it was last written down, if it is this home's word."""
    try:
        told = json.loads(_end_path(home).read_bytes())
        return _End(told["lines"], told["bytes"], told["last"]) if is_signed(home, _PURPOSE, told) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _mended_end(home: Path, file: IO[bytes]) -> _End:
    """Where the next line goes. A writer that was killed leaves half a line, which is cut off, or a whole one, which counts."""
    end = _known_end(home) or _End(0, 0, _START)
    file.seek(min(end.bytes, file.seek(0, os.SEEK_END)))
    *whole, rest = file.read().split(b"\n")
    if rest:
        file.truncate(file.tell() - len(rest))
    for raw in whole:
        line = _parsed(raw)
        if line is not None:
            end = _End(line["number"], end.bytes, line["signature"])
    return end


def _write_end(home: Path, end: _End) -> None:
    path = _end_path(home)
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        file.write(json.dumps(signed(home, _PURPOSE, {"lines": end.lines, "bytes": end.bytes, "last": end.signature})).encode())
        _flush(file)
    fresh.replace(path)


def _end_problems(home: Path, lines: list[bytes]) -> list[str]:
    end = _known_end(home)
    if end is None:
        return ["the trail's known end is missing or not what was written"] if lines or _end_path(home).exists() else []
    if len(lines) < end.lines:
        return [f"{end.lines - len(lines)} lines are missing: {end.lines} were written"]
    last = _parsed(lines[end.lines - 1]) if end.lines else None
    return [] if last is not None and last["signature"] == end.signature else [f"line {end.lines} is not the one that was written"]


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
