"""Everything that is held about a person, readable: JSON values, their names as they gave them, and nothing of anybody else.

In: who. Out: one object. Every table that can name people is in it by itself, so a new one is not forgotten. Changes nothing but
the audit trail, which gets a line.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import audit, requests, served, tables
from pipelines.erasure import logged, models, people, stores
from pipelines.erasure.people import Person
from pipelines.erasure.stores import Task
from pipelines.errors import InputError
from pipelines.identity import graph
from pipelines.online import writer as online_writer
from pipelines.settings import Settings
from pipelines.tables import Table
from pipelines.vault import IDENTIFIERS, Fact, open_vault

# Change points: the newest row is what is known now, and the rest follows from the events, which are all told.
_NEWEST = (tables.CUSTOMER_PROFILE, tables.CUSTOMER_CONSENT, *tables.FEATURE_TABLES)
_NAMING = ("identifier", "subject", "left", "right", "user_id", "anonymous_id", "email", "phone")

Rows = list[dict[str, Any]]


def export(home: Path, who: str, *, settings: Settings, by: str = "") -> dict[str, Any]:
    """All that is held about a person. `who`: a customer_id, a pseudonym, or an identifier as the person gives it.

    identifiers and facts: as received, with source and newest time, contradicting ones too; then each table by its name (of feature
    tables the newest row), `quarantine` with the rows as received, `identity`: the links between their identifiers, `log`, `online`,
    `models` that may have learned from them, `served`: what models were fed of them, `requests` and `audit`. Raises InputError where
    nothing is held under this name.
    """
    with closing(open_vault(home, master=settings.master_key)) as vault:
        person = people.find(home, who, vault=vault)
        task = Task(home, settings, vault, person, tuple(people.raw_names(person, vault=vault)))
        facts = [*vault.facts([*person.identifiers, *person.shared])]
        facts = [fact for fact in facts if fact.subject in person.identifiers or fact.kind == "anonymous_id"]
        facts += people.told_on_shared(person, vault=vault)
        names = _readable(facts)
        held = {
            "customer_id": person.customer_id,
            "identifiers": [_told(fact, names) for fact in facts if fact.kind in IDENTIFIERS],
            "facts": [_told(fact, names) for fact in facts if fact.kind not in IDENTIFIERS],
            **{table.name: _rows(task, table, names) for table in stores.tables_of(home)},
            "identity": _explained(home, person, names),
            "log": _log(task),
            "online": _online(home, person),
            "models": models.trained_with(home, person),
            "served": _served(task),
            "requests": _requests(task),
        }
    about = audit.digest(home, person.customer_id)
    audit.record(home, "export", by=by, about=about)
    return {**held, "audit": [_plain(asdict(entry)) for entry in audit.entries(home, about)]}


def _readable(facts: Iterable[Fact]) -> dict[str, str]:
    """What stands in columns -> the identifier as it was received."""
    told = {fact.subject: fact.value for fact in facts if fact.kind in IDENTIFIERS}
    return told | {name.split(":")[1]: value for name, value in told.items()}


def _told(fact: Fact, names: Mapping[str, str]) -> dict[str, Any]:
    at = datetime.fromtimestamp(fact.event_us / 1e6, UTC).isoformat()
    return {"kind": fact.kind, "value": fact.value, "source": fact.source, "time": at, "told_of": names.get(fact.subject, fact.subject)}


def _rows(task: Task, table: Table, names: Mapping[str, str]) -> Rows:
    found = stores.rows_of(task, table)
    if table in _NEWEST and found.num_rows:
        newest = found.group_by(list(table.key)).aggregate([(str(table.event_time), "max")])
        names_of = [*table.key, str(table.event_time)]
        found = found.join(newest.rename_columns(names_of), names_of, join_type="inner").select(found.column_names)
    rows = _opened(task, found) if table == tables.QUARANTINE else found.to_pylist()
    if table == tables.IDENTITY_EDGES:  # a pair that was only suspected tells something of somebody else
        rows = [row for row in rows if {row["left"], row["right"]} <= set(task.person.identifiers)]
    return [_plain({name: names.get(value, value) if name in _NAMING else value for name, value in row.items()}) for row in rows]


def _opened(task: Task, found: pa.Table) -> Rows:
    rows = pa.concat_tables([found, stores.nameless_rows(task)]).to_pylist()
    raws = task.vault.unseal([row["subject"] for row in rows], [row["raw"] for row in rows])
    return [{**row, "raw": None if raw is None else raw.decode(errors="replace")} for row, raw in zip(rows, raws, strict=True)]


def _explained(home: Path, person: Person, names: Mapping[str, str]) -> Rows:
    """The links that make their identifiers one person, and those that were decided on."""
    with suppress(InputError):
        found = graph.explain(home, person.customer_id)
        theirs = {*person.identifiers, *person.shared}
        links = [link for link in (*found.path, *found.others) if {link.left, link.right} <= theirs]
        told = [asdict(link) for link in links]
        return [_plain({**link, "left": names.get(link["left"]), "right": names.get(link["right"])}) for link in told]
    return []


def _log(task: Task) -> Rows:
    """Calls of theirs that the log still has; not those that name another person too."""
    mine = {*task.person.names, *task.person.shared}
    rows = [row for row in logged.about(task.home, task.person.identifiers) if mine.issuperset(row.subjects)]
    rows += stores.nameless_logged(task)
    return [
        _plain({"source": row.source, "received_us": row.received_us, "set_aside": row.reason, "call": _call(payload)})
        for row, payload in zip(rows, logged.opened(rows, vault=task.vault), strict=True)
    ]


def _call(payload: bytes | None) -> Any:
    try:
        return None if payload is None else json.loads(payload)
    except ValueError:
        return payload.decode(errors="replace") if payload else None


def _online(home: Path, person: Person) -> dict[str, dict[str, str | None]]:
    """By view and feature, as text: what is served now. A view with a second join key is told once for each of its values: view/value."""
    if not (home / "feature_store" / "online.db").exists():
        return {}
    found: dict[str, dict[str, str | None]] = {}
    with closing(online_writer.OnlineWriter(home)) as online:
        for view in sorted(name for name in online.schema if online.has(name)):
            for key, feature, text in online.held_of(view, person.customers, person.identifiers):
                other = "" if isinstance(key, str) else "/" + "/".join(part for part in key if part not in person.customers)
                found.setdefault(view + other, {})[feature] = text
    return found


def _served(task: Task) -> Rows:
    """What models were fed of them, of the answers that were kept for the audit."""
    if not served.file_of(task.home).exists():
        return []
    with closing(served.Served(task.home, vault=task.vault)) as sample:
        rows = sample.of(task.person.customers)
    return [_plain({"service": row.service, "model": row.version, "time_us": row.served_us, "values": row.values}) for row in rows]


def _requests(task: Task) -> Rows:
    """What was asked about them and waits for its answer."""
    if not (task.home / "requests" / "requests.db").exists():
        return []
    theirs = {*task.person.names, *task.raws}
    with closing(requests.Requests(task.home, vault=task.vault)) as asked:
        waiting = asked.pending()
    return [{"kind": str(one.kind), "by": one.by} for one in waiting if theirs & {one.who, *graph.spellings(one.who, task.vault)}]


def _plain(value: Any) -> Any:
    """The value as JSON has it: times in ISO 8601, bytes as text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return value.decode(errors="replace") if isinstance(value, bytes) else value
