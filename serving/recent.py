"""What one customer did with items lately, as the online store holds it -> weights as the recommender was trained on.

In: rows of the view customer_item, which the stream writes with every event. Out: weights by item, and what the customer bought. Asked
for people who allow it alone: that is the caller's to look at first. Never keeps anything.

The store counts by item and does not tell the instant of each act, so two things are taken for what they nearly are: the acts that an
item's row counts all happened at its last instant, and of an item that the model knew the customer by, what came since was one act.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from models.shop.interest import OF_LIFECYCLE
from pipelines.events import WEIGHTS
from pipelines.online.feast_format import Value
from serving.fallbacks import Deadline
from serving.profile import Profiles

VIEW = "customer_item"
MOST = 100  # items that the customer touched last
MOST_BOUGHT = 5_000
_SEEN, _BOUGHT = "customer_item_last_seen_at", "customer_item_last_bought_at"
_COUNTS = {kind: f"customer_item_{kind}s_total" for kind in WEIGHTS}
_TOUCHES = sorted((kind for kind in WEIGHTS if kind != "purchase"), key=WEIGHTS.__getitem__)  # lightest first, as training adds them up
_DAY_US = 86_400_000_000
EVER = -1


@dataclass(frozen=True)
class Act:
    """What a customer did with one item: weights at this moment, of everything that is counted and of the last act alone.

    touches, purchases, seen_us, bought_us: as `models.candidates.history.History` keeps them.
    """

    item_id: str
    weight: float
    last_weight: float
    touches: float
    purchases: int
    seen_us: int
    bought_us: int

    @property
    def done(self) -> tuple[object, ...]:
        """What of it does not change by the mere passing of time."""
        return self.item_id, self.touches, self.purchases, self.seen_us, self.bought_us

    @property
    def is_bought(self) -> bool:
        """Whether they ever bought it."""
        return self.purchases > 0


def acts(profiles: Profiles, customer: str, *, since_us: int, half_life_days: float, at: datetime, deadline: Deadline) -> list[Act] | None:
    """The items that the customer touched after this instant, the last first; None where the store cannot find them.

    Raises StoreFailure.
    """
    (view,) = profiles.views[VIEW]
    keys = profiles.source.keys_under(view, customer, _SEEN, deadline, since_s=since_us / 1e6, limit=MOST)
    if not keys:
        return keys if keys is None else []
    fetched = profiles.source.fetch(view, keys, deadline)
    rows = [(key[1], dict(zip(view.columns, values, strict=True))) for key, (_, values) in zip(keys, fetched, strict=True) if values]
    now_us = at.timestamp() * 1e6
    found = [(_whole(row, _SEEN), _act(item, row, now_us, half_life_days)) for item, row in rows if since_us < _whole(row, _SEEN)]
    return [act for _, act in sorted(found, key=lambda one: -one[0]) if act.weight > 0]


def bought(profiles: Profiles, customer: str, *, deadline: Deadline) -> list[str] | None:
    """What the customer ever bought; None where the store cannot find it. Raises StoreFailure."""
    (view,) = profiles.views[VIEW]
    keys = profiles.source.keys_under(view, customer, _BOUGHT, deadline, since_s=0.0, limit=MOST_BOUGHT)
    return None if keys is None else [key[1] for key in keys]


def segment(profiles: Profiles, customer: str, *, at: datetime, deadline: Deadline) -> str | None:
    """The segment that the customer is in; else the group of their state of life cycle, if it is known. Raises StoreFailure."""
    found = profiles.read("customer_segments", [customer], at=at, deadline=deadline).columns
    named, lifecycle = found["segment"][0], found["lifecycle"][0]
    return str(named) if named is not None else None if lifecycle is None else f"{lifecycle}{OF_LIFECYCLE}"


def _act(item: str, row: Mapping[str, Value], now_us: float, half_life_days: float) -> Act:
    def faded(kind: str, n: int) -> float:
        then_us = _whole(row, _BOUGHT if kind == "purchase" else _SEEN)
        age_us = max(0.0, now_us - then_us)  # of a log of the past "now" is its last event, and people may act after it
        return float(n * WEIGHTS[kind] * 2.0 ** (-age_us / _DAY_US / half_life_days))

    counts = {kind: _whole(row, column, 0) for kind, column in _COUNTS.items()}
    seen_us, bought_us = _whole(row, _SEEN), _whole(row, _BOUGHT)
    newest = "purchase" if bought_us == seen_us else "view"
    touches = 0.0
    for kind in _TOUCHES:
        touches += WEIGHTS[kind] * counts[kind]
    weight = sum(faded(kind, n) for kind, n in counts.items() if n)
    return Act(item, weight, faded(newest, 1), touches, counts["purchase"], seen_us, max(bought_us, 0))


def _whole(row: Mapping[str, Value], column: str, absent: int = EVER) -> int:
    value = row.get(column)
    return absent if value is None else int(value)
