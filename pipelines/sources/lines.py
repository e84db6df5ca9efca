"""A text file -> its lines as Arrow columns, numbered, in blocks; the bytes of lines that are not text are kept apart.

Works on whole blocks: no Python runs per line. Never parses what a line says, and never fails because of one line.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import InputError

BLOCK_BYTES = 32 * 2**20
MAX_LINE_BYTES = 8 * 2**20  # a longer line is no event; it is refused, and read past without being held
KEPT_BYTES = 64 * 2**10  # of a refused line that is too long
REJECTED = pa.schema([("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string()), ("raw", pa.string())])


@dataclass(frozen=True)
class Lines:
    """Lines that are not blank. `text`: without line ends; `row`: their 1-based numbers in the file; `rejected`: as REJECTED."""

    text: pa.Array
    row: pa.Array
    rejected: pa.Table

    def select(self, mask: np.ndarray) -> "Lines":
        """The lines where `mask` (n,) holds, with nothing rejected."""
        keep = pa.array(mask)
        return Lines(self.text.filter(keep), self.row.filter(keep), REJECTED.empty_table())


def read_lines(path: Path, *, encoding: str = "utf-8", batch_rows: int) -> Iterator[Lines]:
    """The file's lines, at most `batch_rows` at a time. A name that ends in .gz is unpacked. Raises InputError if reading fails."""
    first = 1
    try:
        with _open(path, encoding) as stream:
            for block in _blocks(stream):
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
                offsets = np.concatenate(([0], ends)).astype(np.int32)
                for start in range(0, len(ends), batch_rows):
                    yield _lines(block, offsets[start : start + batch_rows + 1], first + start)
                first += len(ends)
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        what = getattr(error, "strerror", None) or error
        raise InputError(f"sources: {path} could not be read to its end ({what}); fetch the file again, then run again") from error


def reject(lines: Lines, mask: np.ndarray, reason: str, detail: str = "") -> pa.Table:
    """The lines where `mask` (n,) holds, as rejected rows."""
    bad = lines.select(mask)
    return rejected_rows(bad.row, reason, pa.array([detail] * len(bad.row), pa.string()), bad.text)


def rejected_rows(row: pa.Array, reason: str, detail: pa.Array, raw: pa.Array) -> pa.Table:
    """Rejected rows that share a reason."""
    return pa.table([row, pa.array([reason] * len(row), pa.string()), detail, raw], schema=REJECTED)


def _open(path: Path, encoding: str) -> IO[bytes]:
    plain = cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb"))  # noqa: SIM115  (closed with the stream)
    return plain if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else cast(IO[bytes], _Recoded(plain, encoding))


class _Recoded(io.RawIOBase):
    """A stream in another encoding, read as UTF-8; bytes that mean nothing in it become U+FFFD."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._text = io.TextIOWrapper(stream, encoding=encoding, errors="replace", newline="")

    def read(self, size: int = -1) -> bytes:
        return self._text.read(size).encode()

    def close(self) -> None:
        self._text.close()
        super().close()


def _blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """Blocks of whole lines, the last one closed by a line end. A line beyond the limit is cut to just beyond it."""
    rest = b""
    is_first = True
    while block := stream.read(BLOCK_BYTES):
        if is_first:
            block, is_first = block.removeprefix(b"\xef\xbb\xbf"), False
        cut = block.rfind(b"\n") + 1
        if cut:
            yield rest + block[:cut]
            rest = b""
        rest += block[cut : cut + MAX_LINE_BYTES + 1 - len(rest)]
    if rest:
        yield rest + b"\n"


def _lines(block: bytes, offsets: np.ndarray, first: int) -> Lines:
    """The lines of a block between `offsets` (n + 1,); `first` is the number of the first of them."""
    row = np.arange(first, first + len(offsets) - 1)
    too_long = np.diff(offsets) > MAX_LINE_BYTES
    whole = pa.StringArray.from_buffers(len(row), pa.py_buffer(offsets), pa.py_buffer(block))
    is_text = _is_text(whole) & ~too_long
    lines = Lines(whole, pa.array(row), REJECTED.empty_table())
    if not is_text.all():
        lines = lines.select(is_text)
    text = pc.ascii_rtrim(lines.text, characters="\r\n")
    filled = pc.not_equal(text, "")
    if not pc.all(filled).as_py():
        lines, text = Lines(lines.text, lines.row.filter(filled), lines.rejected), text.filter(filled)
    unread = ((too_long, "too_long"), (~is_text & ~too_long, "not_text"))
    rejected = [_unreadable(block, offsets, row, mask, reason) for mask, reason in unread]
    return Lines(text, lines.row, pa.concat_tables(rejected))


def _is_text(lines: pa.Array) -> np.ndarray:
    try:
        lines.validate(full=True)
    except pa.ArrowInvalid:
        # Halving finds the few bad lines of a block without looking at each line by itself.
        if len(lines) == 1:
            return np.zeros(1, bool)
        middle = len(lines) // 2
        return np.concatenate((_is_text(lines[:middle]), _is_text(lines[middle:])))
    return np.ones(len(lines), bool)


def _unreadable(block: bytes, offsets: np.ndarray, row: np.ndarray, mask: np.ndarray, reason: str) -> pa.Table:
    at = np.flatnonzero(mask)
    raw = [block[offsets[i] : offsets[i + 1]][:KEPT_BYTES].decode("utf-8", "backslashreplace").rstrip("\r\n") for i in at]
    return rejected_rows(pa.array(row[at]), reason, pa.array([""] * len(at), pa.string()), pa.array(raw, pa.string()))
