"""Bodies of Segment's `/batch` among calls -> the calls in them, one each, with what the batch says for all.

In: lines, each one JSON object. Out: the same lines, each envelope in place of its calls. Looks only at lines that are no call.
"""

from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.sources.lines import REJECTED, Lines, reject
from pipelines.sources.projection import register

_SHARED = ("context", "integrations", "sentAt")  # https://segment.com/docs/connections/sources/catalog/libraries/server/http-api/#batch


@dataclass(frozen=True)
class Unpacked:
    """`lines`: the calls, and as rejected what is none; `extra`: by how much the numbers of the lines after them grew."""

    lines: Lines
    extra: int


def unpack(db: duckdb.DuckDBPyConnection, lines: Lines, is_no_call: np.ndarray) -> Unpacked | None:
    """The lines with the calls of the envelopes among those where `is_no_call` (n,) holds; None where there is no envelope.

    A call's own context wins over the batch's, key by key. The calls of an envelope are numbered on from its line, and the lines
    after it after them: `row` stays unique and in the file's order.
    """
    doubtful = lines.select(is_no_call)
    if not pc.any(pc.match_substring(doubtful.text, '"batch"')).as_py():
        return None
    register(db, pa.table({"line": doubtful.text, "row": doubtful.row}))
    fields = ", ".join(f"'{name}', json_extract(line, '$.{name}')" for name in _SHARED)
    shared = f"json_merge_patch('{{}}', json_object({fields}))"  # what is null is not merged on
    calls = db.sql(
        f"""SELECT row, place, is_object, CASE WHEN is_object THEN json_merge_patch(shared, call)::VARCHAR ELSE call::VARCHAR END AS text
        FROM (SELECT row, shared, place, call, json_type(call) = 'OBJECT' AS is_object FROM (
            SELECT row, {shared} AS shared, unnest(calls) AS call, unnest(range(len(calls))) AS place FROM (
                SELECT row, line, json_extract(line, '$.batch[*]') AS calls FROM piece WHERE json_type(line, '$.batch') = 'ARRAY')))
        ORDER BY row, place"""
    ).to_arrow_table()
    if len(calls) == 0:
        return None
    at, inside = calls["row"].to_numpy(), np.unique(calls["row"].to_numpy(), return_counts=True)
    is_line = ~np.isin(lines.row.to_numpy(), inside[0])
    plain, rejected = lines.select(is_line), lines.rejected
    row = np.concatenate([_moved(plain.row.to_numpy(), *inside), _moved(at, *inside) + calls["place"].to_numpy()])
    order = np.argsort(row, kind="stable")
    text = pa.concat_arrays([plain.text, *calls["text"].cast(pa.string()).chunks]).take(pa.array(order))
    is_object = np.concatenate([np.ones(len(plain.row), bool), calls["is_object"].to_numpy()])[order]
    moved = rejected.set_column(0, "row", pa.array(_moved(rejected["row"].to_numpy(), *inside)))
    every = Lines(text, pa.array(row[order]), REJECTED.empty_table())
    good = every.select(is_object)
    refused = pa.concat_tables([moved, reject(every, ~is_object, "not_json")])
    return Unpacked(Lines(good.text, good.row, refused), int((inside[1] - 1).sum()))


def _moved(row: np.ndarray, envelopes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The numbers of lines once each envelope before them has become `sizes` lines."""
    before = np.concatenate(([0], np.cumsum(sizes - 1)))
    moved: np.ndarray = row + before[np.searchsorted(envelopes, row)]
    return moved
