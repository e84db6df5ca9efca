"""A file of raw events -> the same file without the lines of a person.

In: text files, a line an event, or Parquet; a person's identifiers as received. Out: the file rewritten in one step, if it held any.
A line is emptied if one of its values is such an identifier, whole; other lines keep every byte, and their numbers.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_CHUNK = 1 << 24
_QUOTES = (b'"', b"'")
_BEFORE, _AFTER = b":,;|\t>=", b",;|\t}]<\r\n"  # around a value that is not quoted


def remove(path: Path, raws: Sequence[str]) -> int:
    """Empty the lines, or take out the rows; returns how many. Nothing happens to a file without any."""
    if not raws:
        return 0
    return _from_parquet(path, raws) if path.suffix == ".parquet" else _from_lines(path, raws)


def forms(value: str) -> set[bytes]:
    """The bytes that a value may stand as in JSON or plain text; none for half a character."""
    spelled = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    return {text.encode() for text in spelled if text.isprintable() or text.isascii()}


def _from_lines(path: Path, raws: Sequence[str]) -> int:
    # an address is one in any case, so chunks are searched in lower case and what is found is looked at again
    exact = sorted({form for raw in raws for form in forms(raw)})
    addresses = sorted({form.lower() for raw in raws if "@" in raw for form in forms(raw)})
    fresh, removed = path.with_name(f".{path.name}.erasing"), 0
    try:
        with path.open("rb") as source, fresh.open("wb") as sink:
            for chunk in _chunks(source):
                at = 0
                for start, end in _lines_with(chunk, {*addresses, *(form.lower() for form in exact)}):
                    if _is_named(chunk[start:end], exact) or _is_named(chunk[start:end].lower(), addresses):
                        sink.write(chunk[at:start] + _line_end(chunk[start:end]))
                        at, removed = end, removed + 1
                sink.write(chunk[at:])
            sink.flush()
            os.fsync(sink.fileno())
        if removed:
            fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return removed


def _chunks(source) -> Iterator[bytes]:  # type: ignore[no-untyped-def]
    """The file in pieces of whole lines."""
    while piece := source.read(_CHUNK):
        yield piece + source.readline()


def _lines_with(chunk: bytes, lowered: set[bytes]) -> list[tuple[int, int]]:
    """Start and end of the lines that hold one of the texts, in order."""
    low, found = chunk.lower(), set()
    for text in lowered:
        at = low.find(text)
        while at >= 0:
            end = low.find(b"\n", at) + 1 or len(low)
            found.add((low.rfind(b"\n", 0, at) + 1, end))
            at = low.find(text, end)
    return sorted(found)


def _line_end(line: bytes) -> bytes:
    return line[len(line.rstrip(b"\r\n")) :]


def _is_named(line: bytes, values: Sequence[bytes]) -> bool:
    """Whether one of the values stands in the line as a whole one."""
    return any(_stands_alone(line, at, at + len(value)) for value in values for at in _places(line, value))


def _places(line: bytes, value: bytes) -> Iterator[int]:
    at = line.find(value)
    while at >= 0:
        yield at
        at = line.find(value, at + 1)


def _stands_alone(line: bytes, start: int, end: int) -> bool:
    before, after = line[start - 1 : start] if start else b"", line[end : end + 1]
    if before in _QUOTES:
        return after == before
    before, after = line[:start].rstrip(b" ")[-1:], line[end:].lstrip(b" ")[:1]
    return (not before or before in _BEFORE) and (not after or after in _AFTER)


def _from_parquet(path: Path, raws: Sequence[str]) -> int:
    rows = pq.read_table(path)
    texts = [name for name, kind in zip(rows.column_names, rows.schema.types, strict=True) if pa.types.is_string(kind)]
    named = pa.array([False] * rows.num_rows)
    for name in texts:
        named = pc.or_(named, pc.is_in(rows[name], pa.array(list(raws), pa.string())))
    removed = int(pc.sum(named).as_py() or 0)
    if removed:
        fresh = path.with_name(f".{path.name}.erasing")
        pq.write_table(rows.filter(pc.invert(named)), fresh, compression="zstd")
        fresh.replace(path)
    return removed
