"""Files + a mapping -> batches of raw rows in our column names.

In: CSV (also .gz), Parquet, JSON lines, JSON arrays and XML; without a mapping, the JSON of the Segment spec, single calls or
bodies of `/batch`. Out: text as received, times already UTC. A line that cannot be read comes out as a rejected row with its
bytes, never as an exception; nothing is judged, dropped or written here.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pipelines.errors import InputError
from pipelines.sources.mapping import Mapping, load_mapping
from pipelines.sources.projection import CANONICAL
from pipelines.sources.readers import SEGMENT, RawBatch, connect, read_csv, read_json_array, read_json_lines, read_parquet, read_xml

__all__ = ["CANONICAL", "SEGMENT", "Mapping", "RawBatch", "connect", "load_mapping", "read"]

_READERS = {"csv": read_csv, "parquet": read_parquet, "lines": read_json_lines, "array": read_json_array, "xml": read_xml}
_PACKED = {  # what a packed file begins with -> what it is and what to do
    b"\x1f\x8b": "gzip under a name that does not say so; let the name end in .gz",
    b"PK\x03\x04": "a ZIP archive (Excel workbooks are such); unpack it, or save the sheet as CSV",
}

_HEAD_BYTES = 64 * 2**10  # of a file, that tell its kind


def read(paths: Iterable[str | Path], mapping: Mapping | None, *, batch_rows: int) -> Iterator[RawBatch]:
    """The rows of the files, in order, at most `batch_rows` at a time.

    Without a mapping: JSON of the Segment spec. Every file is opened before the first row is given out, so that a wrong path
    costs no work. Raises InputError for a file that is missing, a folder, empty, of another format, or lacks a column.
    """
    files = [Path(path) for path in paths]
    formats = [_format(path, mapping) for path in files]
    with connect() as db:
        for number, (path, kind) in enumerate(zip(files, formats, strict=True)):
            found = False
            for batch in _READERS[kind](db, path, mapping, batch_rows):
                found = True
                yield replace(batch, number=number)
            if not found:
                raise InputError(f"sources: expected rows in {path}, found none; the file is empty; give one that holds events")


def _format(path: Path, mapping: Mapping | None) -> str:
    kind = _named_format(path)
    if path.is_dir():
        raise InputError(f"sources: expected a file, found the folder {path}; name the files in it")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise InputError(f"sources: {path} could not be opened ({error.strerror}); check the path and its rights") from error
    if not head:
        raise InputError(f"sources: expected rows in {path}, found none; the file is empty; give one that holds events")
    for mark, what in _PACKED.items():
        if head.startswith(mark) and path.suffix != ".gz":
            raise InputError(f"sources: expected rows in {path}, found {what}")
    if mapping is None and (kind in ("csv", "parquet", "xml") or head == b"PAR1"):
        raise InputError(f"sources: {path} is a table, and only Segment JSON needs no mapping; say what its columns are with --mapping")
    if mapping is not None and mapping.source.format is not None and head != b"PAR1":
        kind = mapping.source.format
    if kind == "parquet" and head != b"PAR1":
        raise InputError(f"sources: expected Parquet in {path}, found a file without its mark; fetch it again, or correct the format")
    if head == b"PAR1":
        return "parquet"
    return kind if kind in ("csv", "xml") else _json_format(path)


def _named_format(path: Path) -> str:
    kinds = {".parquet": "parquet", ".pq": "parquet", ".xml": "xml", ".csv": "csv", ".tsv": "csv", ".txt": "csv", ".data": "csv"}
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return kinds.get(suffixes[-1].lower() if suffixes else "", "json")


def _json_format(path: Path) -> str:
    """JSON lines, or one array of objects: what the first character that is not blank says."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file, suppress(OSError, EOFError, zlib.error):
        head = file.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
        return "array" if head.startswith(b"[") else "lines"
    return "lines"  # its reader says what is wrong with it
