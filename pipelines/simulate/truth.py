"""The hidden truth of a simulated shop, as one Parquet file: a row per person and item, the shop's numbers beside them.

Only the optimum and the tests read it. Real data have no such file, and nothing else may need one.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import InputError
from pipelines.simulate import walk
from pipelines.simulate.catalogue import CATEGORIES, Catalogue
from pipelines.simulate.knobs import DROPOUT_FACTOR, EFFECT_FACTOR, GROUPS, VISIT_FACTOR
from pipelines.simulate.people import NEVER, People
from pipelines.simulate.shop import Shop
from pipelines.simulate.wire import user_ids

_KEY = b"rapport_shop"
_TIME = "datetime64[ms, UTC]"


@dataclass(frozen=True)
class Truth:
    """`people`: one row per customer, index user_id; `items`: one row per item, index item_id, by availability.

    People: region, age_band, gender, is_old, arrival, departure (UTC; may lie after the log), visit_rate and dropout_rate
    (per day), mission_probability, purchase_control and purchase_treated (probability that a session holds a purchase,
    before any drift), treatment_effect, is_treated, orders_control and orders_treated (orders since the experiment began,
    had the customer been in that arm, on the same luck; 0 without one), taste, price_sensitivity, grants, withdrawn_at.
    Items: category, price_cents, relative_price, available_from, quality, embedding.
    """

    shop: Shop
    people: pd.DataFrame
    items: pd.DataFrame

    @classmethod
    def load(cls, path: Path) -> "Truth":
        """Read the file that `simulate` wrote. Raises InputError if it is something else, or of other laws."""
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"truth: expected the truth.parquet of a simulated shop at {path}, found {error}") from error
        metadata = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
        if metadata.get("laws") != _laws():
            raise InputError(f"truth: {path} was not written by this version of the simulator; simulate the shop again")
        frame = table.to_pandas()
        return cls(Shop.from_constants(metadata["shop"]), _part(frame, "person", "user_id"), _part(frame, "item", "item_id"))


def write(
    path: Path, shop: Shop, people: People, items: Catalogue, *, withdrawn_ms: np.ndarray, orders: tuple[np.ndarray, np.ndarray]
) -> None:
    """Write the file. `orders`: per person, in the control and in the treated arm. Raises OSError."""
    control = people.mission_probability
    treated = people.treatment_effect + (1 - people.treatment_effect) * control
    browse, mission = shop.hits[0, :, walk.START]
    rows = pa.table(
        {
            "kind": pa.array(np.full(len(people.number), "person")),
            "key": pa.array(user_ids(people.number)),
            **{name: pa.array(np.array(list(groups))[getattr(people, name)]) for name, groups in GROUPS.items()},
            "is_old": pa.array(people.is_old),
            "arrival": _times(shop.instant_ms(people.arrival)),
            "departure": _times(shop.instant_ms(np.minimum(people.departure, 100 * 365.0))),
            "visit_rate": pa.array(people.visit_rate),
            "dropout_rate": pa.array(people.dropout_rate),
            "mission_probability": pa.array(control),
            "purchase_control": pa.array(browse + (mission - browse) * control),
            "purchase_treated": pa.array(browse + (mission - browse) * treated),
            "treatment_effect": pa.array(people.treatment_effect),
            "is_treated": pa.array(people.is_treated),
            "orders_control": pa.array(orders[0]),
            "orders_treated": pa.array(orders[1]),
            "taste": _vectors(people.taste),
            "price_sensitivity": pa.array(people.price_sensitivity),
            "grants": pa.array(people.grants),
            "withdrawn_at": _times(withdrawn_ms, withdrawn_ms == NEVER),
        }
    )
    things = pa.table(
        {
            "kind": pa.array(np.full(len(items.item_id), "item")),
            "key": pa.array(items.item_id),
            "category": pa.array(np.array(CATEGORIES)[items.category]),
            "price_cents": pa.array(items.price_cents),
            "relative_price": pa.array(items.relative_price),
            "available_from": _times(items.available_ms),
            "quality": pa.array(items.quality),
            "embedding": _vectors(items.embedding),
        }
    )
    metadata = {_KEY: json.dumps({"laws": _laws(), "shop": shop.constants()})}
    whole = pa.concat_tables([rows, things], promote_options="default").replace_schema_metadata(metadata)
    pq.write_table(whole, path, compression="zstd")


def _part(frame: pd.DataFrame, kind: str, key: str) -> pd.DataFrame:
    part = frame[frame["kind"] == kind].drop(columns="kind").dropna(axis=1, how="all")
    part = part.rename(columns={"key": key}).set_index(key).infer_objects()
    return part if kind == "item" or "withdrawn_at" in part else part.assign(withdrawn_at=pd.Series(pd.NaT, part.index, dtype=_TIME))


def _times(instant_ms: np.ndarray, missing: np.ndarray | None = None) -> pa.Array:
    return pa.array(np.where(missing, 0, instant_ms) if missing is not None else instant_ms, pa.timestamp("ms", tz="UTC"), mask=missing)


def _vectors(matrix: np.ndarray) -> pa.Array:
    ends = np.arange(len(matrix) + 1) * matrix.shape[1]  # lists of fixed size cannot be null in Parquet
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(matrix.ravel()))


def _laws() -> str:
    """A digest of the laws that are code, not numbers in the file."""
    tables: dict[str, Any] = {"walk": walk.probabilities().tolist(), "groups": GROUPS}
    tables |= {"visit": VISIT_FACTOR, "dropout": DROPOUT_FACTOR, "effect": EFFECT_FACTOR}
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:16]
