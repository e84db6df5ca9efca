"""How fast the online store is read here, beside Feast's own reader on the same store. In: a home whose store is filled. Out: rows for
`rapport bench features`. Writes nothing."""

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from serving.fallbacks import Deadline
from serving.online_store import FeastSource
from serving.profile import Profiles, feature_store, open_profiles, resolved_view

CUSTOMER_VIEWS = ("customer_profile", "customer_activity", "customer_session")
ITEM_VIEW = "item_activity"


def measure_reads(home: Path, *, at: datetime, n: int = 400, items: int = 200, redis_url: SecretStr | None = None) -> list[dict[str, Any]]:
    """p50 and p99 of one customer with three views, and of many items. The home has customers c0.. and items i0.., as the bench has."""
    profiles = open_profiles(home, max_age_hours=1e9, pseudonym=lambda kind, name: f"{kind}:{name}", redis_url=redis_url)
    store = "SQLite" if redis_url is None else "Redis"
    if isinstance(profiles.source, FeastSource):
        raise RuntimeError(f"bench: {store} is read through Feast, so there is nothing to compare; the service's log says why")
    feast = feature_store(home, redis_url=redis_url)
    view = resolved_view(feast, ITEM_VIEW, None, float("inf"))
    mine = Profiles({**profiles.views, ITEM_VIEW: (view,)}, profiles.source, pseudonym=lambda kind, name: name)
    customers = [[f"c{i * 37 % 97}"] for i in range(n)]
    lists = [[f"i{(i * 31 + j) % 1_000}" for j in range(items)] for i in range(max(n // 8, 20))]
    intent = [f"{v.name}:{column}" for v in mine.views["intent_v1"] for column in v.columns]
    demand = [f"{view.name}:{column}" for column in view.columns]
    return [
        *_compared(
            f"{store}: one customer, {len(intent)} features of {len(CUSTOMER_VIEWS)} views",
            lambda keys: mine.read("intent_v1", keys, at=at, deadline=Deadline.after_ms(60_000)),
            lambda keys: feast.get_online_features(intent, [{"customer_id": key} for key in keys]).to_dict(),
            customers,
        ),
        *_compared(
            f"{store}: {items} items, {len(demand)} features each",
            lambda keys: mine.read(ITEM_VIEW, keys, at=at, deadline=Deadline.after_ms(60_000)),
            lambda keys: feast.get_online_features(demand, [{"item_id": key} for key in keys]).to_dict(),
            lists,
        ),
    ]


def _compared(
    name: str, ours: Callable[[Sequence[str]], Any], theirs: Callable[[Sequence[str]], Any], asked: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """Both in turns, so that what disturbs one disturbs the other; the same values first."""
    read, told = ours(asked[0]).columns, theirs(asked[0])
    odd = [column for column, values in read.items() if list(values) != list(told[column])]
    if odd:
        raise RuntimeError(f"bench: {odd[0]} is not what Feast reads; one of the two is wrong")
    took: dict[str, list[float]] = {"ours": [], "theirs": []}
    for keys in asked:
        for side, call in (("ours", ours), ("theirs", theirs)):
            started = time.perf_counter()
            call(keys)
            took[side].append((time.perf_counter() - started) * 1e3)
    rows = []
    for share in (50, 99):
        value, rival = (sorted(took[side])[min(len(asked) - 1, len(asked) * share // 100)] for side in ("ours", "theirs"))
        told_row = {"name": f"{name}: p{share}", "value": value, "unit": "ms", "rival": "get_online_features"}
        rows.append(told_row | {"rival_value": rival, "ratio": value / rival})
    return rows
