"""What models were fed, held against what the tables say of those instants today.

In: served rows, a home. Out: the values that were wrong, when, by how much, and which models saw them; and those that are no skew. The
value of an instant never changes by what comes late: `created_timestamp` decides. It changes where history itself was: people decided
to be one or two, a refusal, a retention. That is told apart where the tables say so. Changes nothing; see `mending`.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import feature_store, features, tables
from pipelines.parity import scratch, values
from pipelines.parity.values import Comparison, Value, Values, View
from pipelines.served import Row
from pipelines.settings import Settings

if TYPE_CHECKING:
    from feast import FeatureStore

IN_FLIGHT_US = 2_000_000  # so long an event or an expiry may take from the log to the online store before an answer counts as wrong
# Why history is another one than it was. Who identifies changes nothing of it: what they did before is theirs from that moment.
GONE, DECIDED, REFUSED, RETENTION = "customer_gone", "decided_since", "refused_since", "retention"


@dataclass
class Wrong:
    """One feature that was served wrong. largest: difference of numbers; behind_s: since when at most it had been wrong, null where it
    never was right; first, last: instants of the answers.
    """

    values: int = 0
    largest: float = 0.0
    behind_s: float | None = None
    first: str = ""
    last: str = ""
    models: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row, online: Value, offline: Value, behind_us: int | None) -> None:
        """One value more."""
        at = values.instant(row.served_us).isoformat()
        self.values += 1
        self.first, self.last = min(self.first or at, at), max(self.last, at)
        self.models[row.version] += 1
        if isinstance(online, int | float) and isinstance(offline, int | float):
            self.largest = max(self.largest, abs(online - offline))
        if behind_us is not None:
            self.behind_s = max(self.behind_s or 0.0, behind_us / 1e6)


@dataclass
class Audit:
    """What an audit came to. rows: looked at; in_flight: right a moment before; explained: rows that differ for a reason, by reason."""

    compared: Comparison = field(default_factory=Comparison)
    rows: int = 0
    in_flight: int = 0
    explained: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, Wrong] = field(default_factory=lambda: defaultdict(Wrong))
    affected: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # view -> customers


def audit(home: Path, rows: Sequence[Row], base: Path, *, settings: Settings) -> Audit:
    """Compare the rows with what follows from the events of their customers, whose features are built anew in the scratch home `base`.

    The tables have to know everything that came before the newest row: drain first. Raises StoreError.
    """
    found = Audit(rows=len(rows))
    known = history(home, sorted({row.customer_id for row in rows}))
    found.explained[GONE] += sum(row.customer_id not in known for row in rows)
    there = [row for row in rows if row.customer_id in known]
    if not there or not scratch.take_over(home, base, sorted(known)):
        return found
    features.build(base, session_gap_minutes=settings.ingest.session_gap_minutes)
    feature_store.apply(base)
    feast = feature_store.store(base)
    for service in sorted({row.service for row in there}):
        asked = [row for row in there if row.service == service]
        for view in _views(feast, service, base):
            _compare(found, feast, view, asked, known, settings)
    return found


def changes(home: Path, view: View, customer: str, *, before_us: int) -> list[int]:
    """When the values of a customer changed before an instant, by the view's table; oldest first, in microseconds."""
    table = next(table for table in tables.TABLES if table.name == view.name)
    mine = pc.field("customer_id") == customer
    times = tables.matching(home, table, mine, ["event_timestamp"])["event_timestamp"].to_pylist()
    return sorted(at for time in times if (at := values.micros(time)) < before_us)


@dataclass(frozen=True)
class Past:
    """When something was last learned of a customer that changes their history (microseconds), by reason."""

    since: Mapping[str, int]


def history(home: Path, customers: Sequence[str]) -> dict[str, Past]:
    """The customers who are there, and what became known of them when."""
    mine = pc.field("customer_id").isin(pa.array(customers, pa.string()))
    known: dict[str, dict[str, int]] = {}
    owner: dict[str, str] = {}
    for row in tables.matching(home, tables.IDENTITIES, mine, ["identifier", "customer_id"]).to_pylist():
        known.setdefault(row["customer_id"], {})
        owner[row["identifier"]] = row["customer_id"]
    is_decided = pc.field("state").isin(["cut", "link"])
    for row in tables.matching(home, tables.IDENTITY_EDGES, is_decided, ["left", "right", "created_timestamp"]).to_pylist():
        for name in (row["left"], row["right"]):
            if name in owner:
                _later(known[owner[name]], DECIDED, row["created_timestamp"])
    is_refusal = mine & ~pc.field("is_allowed")
    for row in tables.matching(home, tables.CONSENTS, is_refusal, ["customer_id", "created_timestamp"]).to_pylist():
        _later(known.setdefault(row["customer_id"], {}), REFUSED, row["created_timestamp"])
    return {customer: Past(since) for customer, since in known.items()}


def reason(past: Past, at_us: int, first: Value, left: Value, *, settings: Settings) -> str | None:
    """Why the history of then is another one today; None where nothing is known. first, left: when it began, by then and today."""
    reasons = [why for why in (DECIDED, REFUSED) if past.since.get(why, 0) > at_us]
    if settings.privacy.retention_days and isinstance(first, int | float):
        reasons += [RETENTION] if left is None or (isinstance(left, int | float) and left > first) else []
    return reasons[0] if reasons else None


# -- private -----------------------------------------------------------------------------------------------------------


def _later(since: dict[str, int], reason: str, at: object) -> None:
    time_us = values.micros(at)
    since[reason] = max(since.get(reason, time_us), time_us)


def _views(feast: "FeatureStore", service: str, home: Path) -> list[View]:
    """What the service takes from views of customers that the stream keeps fresh."""
    found = []
    for projection in feast.get_feature_service(service).feature_view_projections:
        view = values.view_of(feast, projection.name)
        if projection.name in feature_store.STREAMED_VIEWS and view.keys == ("customer_id",) and (home / "tables" / view.name).exists():
            found.append(View(view.name, view.keys, tuple(each.name for each in projection.features)))
    return found


def _compare(found: Audit, feast: "FeatureStore", view: View, rows: Sequence[Row], known: Mapping[str, Past], settings: Settings) -> None:
    served = [values.filled({name: row.values.get(name) for name in view.features}) for row in rows]
    expected = values.offline(feast, view, [((row.customer_id,), row.served_us - 1) for row in rows])
    found.compared.checked += len(rows) * len(view.features)
    differing = [place for place in range(len(rows)) if values.unequal(view, served[place], expected[place])]
    # the stream may have written between the instant of the answer and its look, and what changes at that very instant may be either
    meanwhile = values.offline(feast, view, [((rows[place].customer_id,), rows[place].read_us) for place in differing])
    for place, other in zip(differing, meanwhile, strict=True):
        if names := values.unequal(view, served[place], other) and values.unequal(view, served[place], expected[place]):
            _judge(found, feast, view, rows[place], served[place], expected[place], names, known[rows[place].customer_id], settings)


def _judge(
    found: Audit, feast: "FeatureStore", view: View, row: Row, served: Values, expected: Values, names: Sequence[str], past: Past,
    settings: Settings,
) -> None:  # fmt: skip
    """Say what a row that differs is: in flight, history that was changed since, or wrong."""
    behind_us = _behind_us(feast, view, row, served)
    if behind_us is not None and behind_us <= IN_FLIGHT_US:
        found.in_flight += 1
        return
    first = (served.get("first_event_at"), expected.get("first_event_at"))
    why = None if behind_us is not None else reason(past, row.served_us, *first, settings=settings)
    if why is not None:
        found.explained[why] += 1
        return
    found.affected[view.name].add(row.customer_id)
    for name in names:
        found.compared.note(f"{view.name}:{name}", served[name], expected[name], row.served_us)
        found.wrong[f"{view.name}:{name}"].add(row, served[name], expected[name], behind_us)


def _behind_us(feast: "FeatureStore", view: View, row: Row, served: Values) -> int | None:
    """How long before the answer the served values had ceased to be right; None where they never were."""
    ends = changes(Path(str(feast.config.repo_path)), view, row.customer_id, before_us=row.served_us)
    states = values.offline(feast, view, [((row.customer_id,), end - 1) for end in ends])
    for end, state in zip(reversed(ends), reversed(states), strict=True):
        if not values.unequal(view, served, state):
            return row.served_us - end
    return None
