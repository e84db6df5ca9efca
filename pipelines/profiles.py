"""What is known of one person, for those who look after them: names masked, consent, traits, newest events, and why their identifiers
are one.

In: a name as the shop has it. Out: plain data, ready to be shown; nothing in it names the person in full. Features and scores are not
in it: whoever serves them has them newer. Never changes anything: asking is not an export.
"""

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables
from pipelines.erasure import people
from pipelines.erasure.people import Person
from pipelines.errors import InputError
from pipelines.identity import graph
from pipelines.online.writer import OnlineWriter, is_former
from pipelines.settings import Settings
from pipelines.stream import consents, identities
from pipelines.tables import Table
from pipelines.vault import IDENTIFIERS, Vault

TIMELINE = 50  # events shown, newest first
_SHOWN = ["event_timestamp", "type", "name", "item_id", "order_id", "quantity", "revenue_cents", "source"]  # no free text of theirs


def describe(home: Path, who: str, *, settings: Settings, vault: Vault) -> dict[str, Any]:
    """The person: customer_id, identifiers, consent, traits, links. Raises InputError where nobody, or several, are known by this name.

    who: a customer_id, a user id, an address. consent: purpose -> is_allowed, and what the newest statement in the tables said of it.
    segment: their tier, state and segment, None where they have none. timeline: their newest events in the tables, at most TIMELINE.
    """
    person = people.find(home, who, vault=vault)
    now = _live(home, person, settings=settings)
    facts = vault.facts(now.identifiers)
    given = {fact.subject: masked(fact.kind, fact.value) for fact in facts if fact.kind in IDENTIFIERS}
    return {
        "customer_id": now.customer_id,
        # of one that no ingest has seen yet, the kind alone
        "identifiers": [{"kind": name.partition(":")[0], "value": given.get(name)} for name in now.identifiers],
        "consent": _consent(home, person.customer_id, now.allowed),
        "traits": _traits(home, now.identifiers)
        | {fact.kind: {"value": masked(fact.kind, fact.value), "source": fact.source} for fact in facts if fact.kind not in IDENTIFIERS},
        "links": _links(home, person.customer_id),
        "segment": _segment(home, person.customer_id),
        "timeline": _timeline(home, person.customer_id),
    }


def masked(kind: str, value: str) -> str:
    """Enough to recognise a name by, too little to use it: the first sign, of an address its domain, of a number its last two digits."""
    if kind == "phone":
        return f"***{value[-2:]}" if len(value) > 4 else "***"
    name, at, domain = value.partition("@")
    return f"{name[:1] if len(name) > 1 else ''}***{at}{domain}"


class _Now(NamedTuple):
    """Who somebody is at this moment, and what they allow, by purpose."""

    customer_id: str
    identifiers: list[str]
    allowed: Mapping[str, bool]


def _live(home: Path, person: Person, *, settings: Settings) -> _Now:
    names = [*person.identifiers, *person.shared]
    if not (home / "feature_store" / "online.db").exists():
        return _Now(person.customer_id, names, {})
    with closing(OnlineWriter(home, schema=consents.SCHEMA)) as online, online.transaction():
        owners = identities.owners(online, list(person.identifiers))
        customer = next(iter(owners.values()), person.customer_id)
        known = [name for name in online.identifiers_of([customer])[customer] if not is_former(name)]
        allowed = consents.Consents(consents.Table(home), settings=settings.consent).state(online, [customer])[customer]
    return _Now(customer, sorted({*names, *known}), allowed)


def _consent(home: Path, customer: str, allowed: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    columns = ["purpose", "is_allowed", "basis", "source", "policy_version", "event_timestamp"]
    told = {row["purpose"]: row for row in sorted(_rows(home, tables.CONSENTS, "customer_id", [customer], columns), key=_time)}
    said = {purpose: row for purpose, row in told.items() if row["is_allowed"] == allowed.get(purpose)}  # else something newer holds
    return {
        purpose: {"is_allowed": flag} | {name: said.get(purpose, {}).get(name) for name in columns[2:]} for purpose, flag in allowed.items()
    }


def _traits(home: Path, identifiers: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The newest word on each trait that is no direct identifier."""
    rows = _rows(home, tables.TRAITS, "identifier", list(identifiers), ["trait", "value", "source", "event_timestamp"])
    return {row["trait"]: {"value": row["value"], "source": row["source"]} for row in sorted(rows, key=_time)}


def _links(home: Path, customer: str) -> dict[str, Any] | None:
    """Why the identifiers are one person, by their pseudonyms; None of somebody whom no ingest has seen yet."""
    try:
        return asdict(graph.explain(home, customer))
    except InputError:
        return None


def _segment(home: Path, customer: str) -> dict[str, Any] | None:
    columns = ["segment", "rfm_tier", "lifecycle", "version", "event_timestamp"]
    return max(_rows(home, tables.CUSTOMER_SEGMENTS, "customer_id", [customer], columns), key=_time, default=None)


def _timeline(home: Path, customer: str) -> list[dict[str, Any]]:
    newest_first = sorted(_rows(home, tables.EVENTS, "customer_id", [customer], _SHOWN), key=_time, reverse=True)
    return [{name: value for name, value in row.items() if value is not None} for row in newest_first[:TIMELINE]]


def _rows(home: Path, table: Table, column: str, values: list[str], columns: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tables.matching(home, table, pc.field(column).isin(pa.array(values, pa.string())), columns).to_pylist()
    return found


def _time(row: Mapping[str, Any]) -> Any:
    return row["event_timestamp"]
