"""Feature tables -> where to look: instants at which something may be wrong, and whose values to look at then.

In: the feature tables of a home. Out: probes in order of time: on change points (an event, an expiry on its hop edge, the end of a
session), one microsecond before and after, anywhere between, and long after everything. Never looks at a value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines import engine
from pipelines.engine import literal
from pipelines.parity.values import Key, View

BESIDE = 3  # keys of each view that are looked at with the one that changes
KEYS = 2_000  # of a view that are chosen from
LATER_US = 120 * 86_400_000_000  # beyond the longest window
SHARES = (0.65, 0.25)  # on and around change points, anywhere between; the rest after everything


@dataclass(frozen=True)
class Probe:
    """An instant (microseconds) and the keys to look at, by view."""

    at_us: int
    keys: dict[View, list[Key]]


def probes(folders: dict[View, Path], *, number: int, first_us: int, last_us: int, rng: np.random.Generator) -> list[Probe]:
    """Probes from `first_us` on, in order. folders: each view's table; last_us: of the newest event. None where the tables are empty."""
    keys, changes = {}, []
    wanted = -(-int(number * SHARES[0]) // max(1, len(folders)))
    with engine.connect(next(iter(folders.values())).parent) as con:
        for view, folder in folders.items():
            files, names = literal(str(folder / "**" / "*.parquet")), ", ".join(view.keys)
            rows = f"(SELECT DISTINCT {names} FROM read_parquet({files}, hive_partitioning = false))"
            salt = int(rng.integers(2**62))
            keys[view] = [tuple(row) for row in con.execute(f"SELECT * FROM {rows} ORDER BY hash({names}, {salt}) LIMIT {KEYS}").fetchall()]
            found = con.execute(
                f"""SELECT {names}, epoch_us(event_timestamp) AS at_us FROM read_parquet({files}, hive_partitioning = false)
                WHERE at_us >= {first_us} ORDER BY hash({names}, at_us, {salt}) LIMIT {wanted}"""
            ).fetchall()
            changes += [(int(row[-1]), view, tuple(row[:-1])) for row in found]
    if not any(keys.values()):
        return []
    made = [_probe(at_us + int(rng.integers(-1, 2)), keys, rng, view, key) for at_us, view, key in changes]
    between = rng.integers(first_us, max(last_us, first_us) + 1, int(number * SHARES[1]))
    after = last_us + rng.integers(0, LATER_US, max(1, number - len(made) - len(between)))
    made += [_probe(int(at_us), keys, rng) for at_us in (*between.tolist(), *after.tolist())]
    return sorted((probe for probe in made if probe.at_us >= first_us), key=lambda probe: probe.at_us)


def _probe(at_us: int, keys: dict[View, list[Key]], rng: np.random.Generator, view: View | None = None, key: Key = ()) -> Probe:
    chosen = {each: _some(known, rng) for each, known in keys.items()}
    if view is not None:
        chosen[view] = list(dict.fromkeys([key, *chosen[view]]))
    return Probe(at_us, chosen)


def _some(known: Sequence[Key], rng: np.random.Generator) -> list[Key]:
    return [known[place] for place in rng.permutation(len(known))[:BESIDE]]
