"""Lines of a CSV file -> its records: a quoted text may hold line ends, a stray quote must not swallow what follows it.

A line whose quotes do not close is joined with the lines up to the one that closes them, if that makes a record of the file's
shape; else it is refused alone and the lines after it are read by themselves. Works on whole blocks; judges no value.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from pipelines.errors import InputError
from pipelines.sources.lines import MAX_LINE_BYTES, REJECTED, Lines, reject, rejected_rows

MAX_RECORD_LINES = 500  # of one record; a quote that stays open for longer is a stray one
_MIN_COLUMNS = 3  # of a file whose lines can be told from lines of a text


@dataclass(frozen=True)
class Form:
    """How a file's records are written: the names of its columns, and what separates them."""

    names: tuple[str, ...]
    delimiter: str


def header(line: str, delimiter: str, path: Path) -> tuple[str, ...]:
    """The names in a file's first line. Raises InputError where two are the same."""
    names = tuple(name.strip() for name in next(csv.reader([line], delimiter=delimiter)))
    if len(set(names)) < len(names):
        raise InputError(f"sources: expected a header with distinct names in {path}, found {', '.join(names)}; rename one of the doubled")
    return names


def read_records(parts: Iterator[Lines], form: Form, *, batch_rows: int) -> Iterator[Lines]:
    """The records of the lines, at most `batch_rows` at a time; `row` is the number of a record's first line."""
    held = Lines(pa.array([], pa.string()), pa.array([], pa.int64()), REJECTED.empty_table())
    for lines in parts:
        records, held = _records(_after(held, lines), form, is_end=False)
        yield from _pieces(records, batch_rows)
    yield from _pieces(_records(held, form, is_end=True)[0], batch_rows)


def parse(records: Lines, form: Form) -> tuple[pa.Table, pa.Table]:
    """The records as text columns named as in the file, with `__raw` and `__row`; and those of another number of columns."""
    is_row = np.ones(len(records.text), bool)
    found: dict[int, int] = {}

    def skip(row: pa_csv.InvalidRow) -> str:
        is_row[row.number - 1] = False
        found[row.number - 1] = row.actual_columns
        return "skip"

    if len(records.text) == 0:
        return _text_table(form, [pa.array([], pa.string())] * len(form.names), records), records.rejected
    buffer = pc.binary_join(pa.ListArray.from_arrays([0, len(records.text)], records.text), "\n")[0].as_buffer()
    parsed = pa_csv.read_csv(
        pa.BufferReader(buffer),
        read_options=pa_csv.ReadOptions(column_names=form.names, use_threads=False, block_size=len(buffer) + 1),
        parse_options=pa_csv.ParseOptions(
            delimiter=form.delimiter, invalid_row_handler=skip, ignore_empty_lines=False, newlines_in_values=True
        ),
        convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(form.names, pa.string()), check_utf8=False),
    )
    rejected = records.rejected
    if found:
        bad = records.select(~is_row)
        detail = [f"{found[at]} columns where {len(form.names)} were expected" for at in sorted(found)]
        rejected = pa.concat_tables([rejected, rejected_rows(bad.row, "column_count", pa.array(detail, pa.string()), bad.text)])
        records = records.select(is_row)
    return _text_table(form, parsed.columns, records), rejected


def _text_table(form: Form, columns: list[pa.Array], records: Lines) -> pa.Table:
    return pa.table([*columns, records.text, records.row], names=[*form.names, "__raw", "__row"])


def _after(held: Lines, lines: Lines) -> Lines:
    if len(held.row) == 0:
        return lines
    text, row = pa.concat_arrays([held.text, lines.text]), pa.concat_arrays([held.row, lines.row])
    return Lines(text, row, lines.rejected)


def _pieces(records: Lines, batch_rows: int) -> Iterator[Lines]:
    rejected = records.rejected
    for start in range(0, max(len(records.row), 1), batch_rows):
        piece = slice(start, start + batch_rows)
        yield Lines(records.text[piece], records.row[piece], rejected)
        rejected = REJECTED.empty_table()


def _records(lines: Lines, form: Form, *, is_end: bool) -> tuple[Lines, Lines]:
    """The records among the lines, and the lines from an open quote on that may find its end among lines not read yet."""
    nothing = Lines(lines.text[:0], lines.row[:0], REJECTED.empty_table())
    is_open = _is_open(lines.text, form.delimiter)
    if not is_open.any():
        return lines, nothing
    starts = np.flatnonzero(is_open)
    ends, joined = _candidates(lines, starts, form)
    row = lines.row.to_numpy()
    last_refused = max(lines.rejected["row"].to_pylist(), default=-1)
    may_end_later = (ends < 0) & (row[-1] - row[starts] < MAX_RECORD_LINES) & (row[starts] > last_refused) & (not is_end)
    keep, is_first, used = np.ones(len(row), bool), np.zeros(len(row), bool), []
    last, until = -1, len(row)
    for at, (start, end, text, is_waiting) in enumerate(
        zip(starts.tolist(), ends.tolist(), joined.is_valid().to_pylist(), may_end_later.tolist(), strict=True)
    ):
        if start <= last:
            continue  # within a record
        if is_waiting:
            until = start
            break
        if text:
            keep[start + 1 : end + 1] = False
            is_first[start], last = True, end
            used.append(at)
    is_stray = is_open & keep & ~is_first
    is_stray[until:] = False
    rejected = pa.concat_tables([lines.rejected, reject(lines, is_stray, "unbalanced_quotes")])
    text = pc.replace_with_mask(lines.text, pa.array(is_first), joined.take(pa.array(used, pa.int64())))
    whole = pa.array(keep & ~is_stray & (np.arange(len(row)) < until))
    return Lines(text.filter(whole), lines.row.filter(whole), rejected), Lines(
        lines.text[until:], lines.row[until:], REJECTED.empty_table()
    )


def _candidates(lines: Lines, starts: np.ndarray, form: Form) -> tuple[np.ndarray, pa.Array]:
    """For each open line the line that may close it, -1 where none does; and the record that the two and those between make, or null."""
    odd = np.flatnonzero(pc.bit_wise_and(pc.count_substring(lines.text, '"'), 1).to_numpy(zero_copy_only=False))
    ends = np.append(odd, -1)[np.searchsorted(odd, starts, side="right")]
    row, refused = lines.row.to_numpy(), np.sort(lines.rejected["row"].to_numpy())
    size = np.cumsum(pc.binary_length(lines.text).to_numpy(zero_copy_only=False).astype(np.int64))
    is_near = (ends >= 0) & (row[ends] - row[starts] < MAX_RECORD_LINES) & (size[ends] - size[starts] < MAX_LINE_BYTES)
    is_near &= np.searchsorted(refused, row[ends]) == np.searchsorted(refused, row[starts])  # a line in between was not text
    is_near &= ~_are_rows_between(lines.text, starts, ends, form)
    joined = _join(lines, starts[is_near], ends[is_near])
    is_record = pc.and_(
        pc.match_substring_regex(joined, rf"\A(?:{_strict(form.delimiter)})\z"),
        pc.equal(pc.count_substring(pc.replace_substring_regex(joined, '"(?:[^"]|"")*"', ""), form.delimiter), len(form.names) - 1),
    )
    found = pc.if_else(is_record, joined, pa.scalar(None, pa.string()))
    return ends, pc.replace_with_mask(pa.nulls(len(starts), pa.string()), pa.array(is_near), found)


def _are_rows_between(text: pa.Array, starts: np.ndarray, ends: np.ndarray, form: Form) -> np.ndarray:
    """Whether all lines between have the shape of rows without quotes: then those on either side are strays, and no text opens there."""
    is_row = pc.and_not(pc.equal(pc.count_substring(text, form.delimiter), len(form.names) - 1), pc.match_substring(text, '"'))
    is_no_row = np.cumsum(~is_row.to_numpy(zero_copy_only=False))
    between = ends - starts - 1
    are_rows: np.ndarray = (between > 0) & (is_no_row[np.maximum(ends - 1, 0)] == is_no_row[starts]) & (len(form.names) >= _MIN_COLUMNS)
    return are_rows


def _join(lines: Lines, starts: np.ndarray, ends: np.ndarray) -> pa.Array:
    """The lines from each start to its end as one text, the blank lines among them put back."""
    counts = ends - starts + 1
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    at = np.repeat(starts - offsets[:-1], counts) + np.arange(offsets[-1])
    row = lines.row.to_numpy()[at]
    blank = np.diff(row, prepend=row[:1]) - 1
    blank[offsets[:-1]] = 0
    text = pc.binary_join_element_wise(pc.binary_repeat("\n", pa.array(blank)), lines.text.take(pa.array(at)), "")
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), text), "\n")


def _is_open(text: pa.Array, delimiter: str) -> np.ndarray:
    """Which lines open a quote that they do not close. A quote within a text that is not quoted is a sign like any other."""
    quoted = pc.match_substring(text, '"')
    if not pc.any(quoted).as_py():
        return np.zeros(len(text), bool)
    is_closed = pc.match_substring_regex(text.filter(quoted), rf"\A(?:{_lenient(delimiter)})\z")
    is_open: np.ndarray = quoted.to_numpy(zero_copy_only=False).copy()
    is_open[is_open] = pc.invert(is_closed).to_numpy(zero_copy_only=False)
    return is_open


def _lenient(delimiter: str) -> str:
    """Fields as the parser reads them: signs after a closing quote belong to the text."""
    d = f"\\x{{{ord(delimiter):x}}}"
    field = rf'(?:"(?:[^"]|"")*"(?:[^{d}"][^{d}]*)?|(?:[^{d}"][^{d}]*)?)'
    return f"{field}(?:{d}{field})*"


def _strict(delimiter: str) -> str:
    """Fields of a record over several lines: a quote opens before a text and closes after it, and only quoted texts hold line ends."""
    d = f"\\x{{{ord(delimiter):x}}}"
    field = rf'(?:"(?:[^"]|"")*"|(?:[^{d}"\n][^{d}\n]*)?)'
    return f"{field}(?:{d}{field})*"
