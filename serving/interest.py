"""The table of interactions -> who did what with which item, as numbers. Names of customers are not kept beyond the loading."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from models.shop.interest import Acts
from pipelines import tables

PURCHASE = "purchase"


def read_interest(home: Path) -> Acts:
    """All interactions; where there is no such table yet, each event with an item as one of weight 1 and of nobody."""
    if tables.count(home, tables.INTERACTIONS):
        rows = tables.read_arrow(home, tables.INTERACTIONS, ["customer_id", "item_id", "type", "weight", "event_timestamp"])
        rows = rows.filter(pc.is_valid(rows["item_id"]))
        (customer, customer_ids), (item, item_ids) = _coded(rows["customer_id"]), _coded(rows["item_id"])
        weight = rows["weight"].to_numpy().astype(np.float64)
        at_us = rows["event_timestamp"].cast(pa.int64()).to_numpy()
        return Acts(customer_ids, item_ids, customer, item, weight, at_us, pc.equal(rows["type"], PURCHASE).to_numpy())
    nothing = np.empty(0, np.int64)
    if not tables.count(home, tables.EVENTS):
        return Acts([], [], nothing, nothing, np.empty(0), nothing, np.empty(0, bool))
    seen = tables.read_arrow(home, tables.EVENTS, ["item_id"])["item_id"].drop_null()
    item, item_ids = _coded(seen)
    n = len(item)
    return Acts([], item_ids, np.zeros(n, np.int64), item, np.ones(n), np.zeros(n, np.int64), np.zeros(n, bool))


def _coded(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    whole = column.combine_chunks().dictionary_encode() if len(column) else pa.array([], pa.string()).dictionary_encode()
    return whole.indices.to_numpy(zero_copy_only=False).astype(np.int64), whole.dictionary.to_pylist()
