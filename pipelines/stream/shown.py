"""What is true now -> the online store: rows, keys of which nothing is left, and pairs that went with a customer's rows.

In: customers and items as they are at this moment, told while the state is written. Out: rows of the online store, written all together
at the end: others who write it wait for that alone, and not for the counting before it. Never counts anything.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

from feature_repo.aggregates import ITEM_ACTIVITY
from pipelines.online.feast_format import JoinKey, Key, key_decoder
from pipelines.online.writer import CUSTOMER, OnlineWriter, Row
from pipelines.stream import live
from pipelines.stream.live import Live

ITEM_VIEW = "item_activity"
_KEYS: dict[str, JoinKey] = {
    **dict.fromkeys(live.VIEWS, CUSTOMER),
    **{view: aggregates.key for view, aggregates in live.PAIRS.items()},
    ITEM_VIEW: ITEM_ACTIVITY.key[0],
}


@dataclass(frozen=True, slots=True)
class Shown:
    """By view: rows to be written, keys to be taken out, and all that is left of customers of whom any pair may have gone."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    gone: dict[str, list[Key]] = field(default_factory=dict)
    left: dict[str, dict[str, Set[str]]] = field(default_factory=dict)

    def add(self, customer: str, ready: Live, *, is_whole: bool) -> None:
        """A customer, as of now. `is_whole`: all pairs are told anew, and no others are theirs."""
        shown = ready.shown()
        for view in live.VIEWS:
            if view in shown:
                self.rows.setdefault(view, []).append(Row(customer, shown[view].values, event_us=shown[view].since_us))
            else:
                self.gone.setdefault(view, []).append(customer)
        for view, keyed in ready.pairs.items():
            taken = keyed.take().items()
            self.rows.setdefault(view, []).extend(Row((customer, key), one.values, event_us=one.since_us) for key, one in taken)
            if is_whole:
                self.left.setdefault(view, {})[customer] = keyed.keys()

    def plus(self, other: "Shown") -> "Shown":
        """Both together, of different views."""
        return Shown(self.rows | other.rows, self.gone | other.gone, self.left | other.left)

    def write(self, online: OnlineWriter) -> int:
        """Write it, inside the writer's transaction; returns the values written. Raises StoreError where the store was not made for it."""
        for view, keys in self.gone.items():
            online.remove(view, keys, join_key=_KEYS[view])
        for view, left in self.left.items():
            _remove_others(online, view, left)
        return sum(online.renew(view, rows, join_key=_KEYS[view]) for view, rows in self.rows.items())


def _remove_others(online: OnlineWriter, view: str, left: Mapping[str, Iterable[str]]) -> None:
    """Take out the pairs of these customers of which nothing is left, whose rows may have gone at any time."""
    join_key, first = live.PAIRS[view].key, live.PAIRS[view].columns()[0]
    kept = {customer: frozenset(keys) for customer, keys in left.items()}
    pairs = map(key_decoder(join_key), online.keys_of(view, list(kept)))
    gone = [pair for pair in pairs if pair[1] not in kept[pair[0]]]
    online.remove(view, sorted(online.read(view, first, gone, join_key=join_key)), join_key=join_key)
