"""Interactions -> lists as they are asked for: customers who come back, what was known of them as they did, and what they did then.

A visit ends with a silence. Who is there for the first time has no list of their own and is left out. Never reads anything that was not
known by the end of the time that is looked at.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import pandas as pd
from scipy import sparse

from models.candidates.history import PURCHASE, Histories
from pipelines.labels import Ranking


@dataclass(frozen=True)
class Visits:
    """Rows (m,), by customer, then time. at_us: the begin of each. customers: whose it is. histories: of all that they did before, by row.
    worth: csr (m, n_items) of what they did on the visit, by what weighs most; items by the positions of the cut-off.
    """

    at_us: np.ndarray
    customers: np.ndarray
    histories: Histories
    worth: sparse.csr_matrix

    @property
    def relevant(self) -> sparse.csr_matrix:
        """1 where they bought."""
        bought = self.worth.copy()
        bought.data = (bought.data >= PURCHASE).astype(float)
        bought.eliminate_zeros()
        return bought


def between(frame: pd.DataFrame, found: Ranking, *, until: datetime, silence: timedelta, rng: np.random.Generator | None = None) -> Visits:
    """The visits that began from the cut-off of `found` on and before `until`; with `rng` one of each customer, drawn.

    frame: columns of tables.INTERACTIONS. Without visits: no rows.
    """
    known = frame[(frame["event_timestamp"] < until) & (frame["created_timestamp"] < until)]
    done, knew = (known[name].to_numpy(dtype="datetime64[us]").astype(np.int64) for name in ("event_timestamp", "created_timestamp"))
    customer, names = pd.factorize(known["customer_id"])
    opens = pd.Timestamp(found.at).value // 1_000
    kept = np.flatnonzero(np.isin(customer, customer[done >= opens]))
    kept = kept[np.lexsort((done[kept], customer[kept]))]
    done, knew, customer = done[kept], knew[kept], customer[kept]
    item = pd.Index(found.items).get_indexer(pd.Index(known["item_id"].iloc[kept])).astype(np.int64)
    weight = known["weight"].to_numpy(dtype=float)[kept]
    is_first = np.diff(customer, prepend=-1) != 0
    is_begin = is_first | (np.diff(done, prepend=0) > silence // timedelta(microseconds=1))
    visit, first = np.cumsum(is_begin), np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
    begin = np.flatnonzero(is_begin & ~is_first & (done >= opens))
    if rng is not None:
        drawn = rng.permutation(begin)
        begin = np.sort(drawn[np.unique(customer[drawn], return_index=True)[1]])
    before, past = _ranges(first[begin], begin)
    knows = (item[past] >= 0) & (np.maximum(done, knew)[past] < done[begin][before])
    before, past = before[knows], past[knows]
    ends = np.searchsorted(visit, visit[begin], side="right")
    after, then = _ranges(begin, ends)
    is_item = item[then] >= 0
    return Visits(
        at_us=done[begin],
        customers=np.asarray(names)[customer[begin]],
        histories=Histories.of(before, item[past], weight[past], done[past], n_customers=len(begin)),
        worth=_heaviest(after[is_item], item[then[is_item]], weight[then[is_item]], (len(begin), len(found.items))),
    )


# -- private -----------------------------------------------------------------------------------------------------------


def _ranges(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All positions from each start up to before its end, and which of the ranges each is of."""
    sizes = ends - starts
    of = np.repeat(np.arange(len(sizes)), sizes)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + starts[of]


def _heaviest(row: np.ndarray, column: np.ndarray, weight: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """Of each cell its largest weight."""
    order = np.lexsort((-weight, column, row))
    row, column, weight = row[order], column[order], weight[order]
    is_first = np.ones(len(row), dtype=bool)
    is_first[1:] = (np.diff(row) != 0) | (np.diff(column) != 0)
    return sparse.csr_matrix((weight[is_first], (row[is_first], column[is_first])), shape)
