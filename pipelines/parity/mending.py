"""Online rows that are not what the tables say -> rows that are.

In: views and their customers, a scratch home that an audit has built, an instant up to which its tables know everything. Out: what was
changed. A row that the stream wrote after that instant knows more than the tables, and stays.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path

from pipelines import feature_store
from pipelines.online.opening import open_writer
from pipelines.online.writer import Row
from pipelines.parity import auditing, values
from pipelines.settings import Settings


def mend(home: Path, affected: Mapping[str, Collection[str]], base: Path, *, settings: Settings, known_us: int) -> Counter[str]:
    """Write the rows of these customers anew, by view, as they are now; the values changed, by feature. Raises StoreError."""
    changed: Counter[str] = Counter()
    told, served = feature_store.store(base), feature_store.store(home, settings=settings)
    with closing(open_writer(home, settings)) as writer:
        for name, customers in sorted(affected.items()):
            view = values.view_of(told, name)
            keys = [(customer,) for customer in sorted(customers)]
            rows = []
            expected = values.offline(told, view, [(key, known_us) for key in keys])
            for (customer,), online, offline in zip(keys, values.online(served, view, keys), expected, strict=True):
                names = values.unequal(view, online, offline)
                stamps = [writer.read(name, feature, [customer]).get(customer, (None, 0)) for feature in names]
                written_us = max((at_us for _, at_us in stamps), default=0)
                if names and written_us <= known_us:
                    changed.update(f"{name}:{feature}" for feature in names)
                    since = auditing.changes(base, view, customer, before_us=known_us + 1)
                    rows.append(Row(customer, offline, event_us=max(written_us, *since)))
            with writer.transaction() as online_store:
                online_store.write(name, rows)
    return changed
