"""A model's labelled rows with what it said of them -> the tables of those who watch: the reference of drift, the evidence of bias."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables


def keep(home: Path, name: str, frame: pd.DataFrame) -> None:
    """Put the rows of model `name` in the place of those that were kept of it before; another model's stay."""
    if name in tables.OWN_ROWS:
        learned_from, _ = tables.OWN_ROWS[name]
        tables.write(home, learned_from, frame)
        return
    mine = pa.Table.from_pandas(frame.assign(model=name), preserve_index=False)
    with tables.locked(home):  # two models may be trained at once
        tables.write(home, tables.TRAINING_TASKS, pa.concat_tables([*_others(home, name), mine], promote_options="permissive"))


def _others(home: Path, name: str) -> list[pa.Table]:
    if not tables.exists(home, tables.TRAINING_TASKS):
        return []
    kept = tables.read_arrow(home, tables.TRAINING_TASKS)
    return [kept.filter(pc.field("model") != name)]
