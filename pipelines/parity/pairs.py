"""What the online store holds of customers and something else (an item, a category), held against the feature tables.

In: a home, some of its customers, a scratch home in which their features were built. Out: the values that differ, those of rows that
should not be there or are not there among them; and, where it is asked for, those rows written anew or taken out.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from pipelines import feature_store, tables
from pipelines.online import schema as online_schema
from pipelines.online.feast_format import key_decoder
from pipelines.online.opening import open_writer
from pipelines.online.writer import CUSTOMER, Row
from pipelines.parity import values
from pipelines.parity.auditing import IN_FLIGHT_US
from pipelines.parity.values import Comparison, Key, Values, View
from pipelines.settings import Settings
from pipelines.stream.clock import Clock

Wrong = Mapping[str, Mapping[Key, Sequence[str]]]  # view -> key -> features that differ


@dataclass(frozen=True)
class Held:
    """What a view held of these customers at some instant between the two: key -> values."""

    view: View
    rows: Mapping[Key, Values]
    at_us: int
    read_us: int


def held(home: Path, customers: Sequence[str], *, settings: Settings) -> list[Held]:
    """The rows of these customers as they are read now, of each streamed view with a second key."""
    feast, now_us, found = feature_store.store(home, settings=settings), Clock(settings), []
    with closing(open_writer(home, settings)) as writer:
        for name in feature_store.STREAMED_VIEWS:
            if not writer.has(name):
                continue
            view = values.view_of(feast, name)
            if CUSTOMER not in view.keys or len(view.keys) == 1:
                continue
            at_us, decode = now_us(), key_decoder(view.keys)
            keys: list[Key] = sorted(tuple(decode(key)) for key in writer.keys_of(name, customers))
            rows = dict(zip(keys, values.online(feast, view, keys), strict=True))
            found.append(Held(view, rows, at_us, now_us()))
    return found


def compare(some: Sequence[Held], base: Path, customers: Collection[str], found: Comparison) -> Wrong:
    """Note what differs of these customers; the features that do, by view and key. Nothing where `base` holds no features."""
    wrong: dict[str, dict[Key, list[str]]] = defaultdict(dict)
    if not tables.exists(base, tables.CUSTOMER_ITEM):
        return wrong
    feast = feature_store.store(base)
    for one in some:
        place = one.view.keys.index(CUSTOMER)
        keys = sorted({key for key in one.rows if key[place] in customers} | _keys(base, one.view))
        found.checked += len(keys) * len(one.view.features)
        then = [values.offline(feast, one.view, [(key, at_us) for key in keys]) for at_us in _instants(one)]
        for key, *states in zip(keys, *then, strict=True):
            online = one.rows.get(key) or values.filled(dict.fromkeys(one.view.features))
            names = [values.unequal(one.view, online, state) for state in states]
            if all(names):
                wrong[one.view.name][key] = names[0]
                for name in names[0]:
                    found.note(f"{one.view.name}:{name}", online[name], states[0][name], one.at_us)
    return wrong


def mend(home: Path, wrong: Wrong, base: Path, *, settings: Settings, known_us: int) -> Counter[str]:
    """Write these rows anew as the tables have them, and take out those that they do not have; the values changed, by feature.

    A row that the stream wrote after `known_us` knows more than the tables, and stays. Raises StoreError.
    """
    changed: Counter[str] = Counter()
    feast = feature_store.store(base)
    with closing(open_writer(home, settings)) as writer:
        for name, keys in sorted(wrong.items()):
            view, there = values.view_of(feast, name), _keys(base, values.view_of(feast, name))
            join_key = online_schema.of([feast.get_feature_view(name)])[name].join_key
            written_us: dict[Key, int] = {}
            for feature in {feature for names in keys.values() for feature in names}:
                for key, (_, at_us) in writer.read(name, feature, list(keys), join_key=join_key).items():
                    written_us[key] = max(at_us, written_us.get(key, at_us))
            stale = [key for key in keys if written_us.get(key, 0) <= known_us]
            expected = dict(zip(stale, values.offline(feast, view, [(key, known_us) for key in stale]), strict=True))
            with writer.transaction() as online:
                online.remove(name, [key for key in stale if key not in there], join_key=join_key)
                rows = [Row(key, expected[key], event_us=written_us.get(key, known_us)) for key in stale if key in there]
                online.write(name, rows, join_key=join_key)
            changed.update(f"{name}:{feature}" for key in stale for feature in keys[key])
    return changed


def _instants(one: Held) -> list[int]:
    """At which the row may be right: as of the look, when it had ended, and so long before as something may be on its way."""
    return [one.at_us - 1, one.read_us, one.at_us - IN_FLIGHT_US]


def _keys(base: Path, view: View) -> set[Key]:
    table = next(table for table in tables.TABLES if table.name == view.name)
    if not tables.exists(base, table):
        return set()
    found = tables.matching(base, table, pc.scalar(True), list(view.keys))
    return set(zip(*(found[name].to_pylist() for name in view.keys), strict=True))
