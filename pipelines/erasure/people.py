"""Who is meant: a customer_id, a pseudonym or a raw identifier -> a person, with everything that names them and nobody else.

In: what a caller wrote, the identities table, the vault, the log. Out: a `Person`. A device that others logged in on too is no
name of theirs alone: what they did on it is theirs, the device is not. Never guesses: a text that names two people is refused.
"""

import functools
import itertools
import operator
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables
from pipelines.erasure import logged
from pipelines.errors import InputError
from pipelines.identity import graph, surrogate
from pipelines.vault import IDENTIFIERS, Fact, Vault

_DEVICE = "anonymous_id:"
_NOBODY = "erasure: expected a customer_id, a pseudonym or an identifier that something is held under, found none"
_EPOCH, _MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
_FAR = 1 << 60  # microseconds: before and after everything


@dataclass(frozen=True)
class Person:
    """A person. `customer_id`: of now. `customers`: with the ids that they had before merges. `identifiers`: pseudonyms that name
    nobody else. `spells`: of devices that somebody else used too: the device, since when and until when it was theirs (microseconds).
    """

    customer_id: str
    customers: tuple[str, ...]
    identifiers: tuple[str, ...]
    spells: tuple[tuple[str, int, int], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that is theirs alone and may stand in a store."""
        return (*self.identifiers, *self.customers)

    @property
    def hashes(self) -> tuple[str, ...]:
        """The identifiers without their kinds."""
        return tuple(name.split(":")[1] for name in self.identifiers)

    @property
    def shared(self) -> tuple[str, ...]:
        """The devices that somebody else used too."""
        return tuple(sorted({name for name, _, _ in self.spells}))

    def used(self, name: str, event_us: int) -> bool:
        """Whether a shared device was theirs then."""
        return any(name == device and since <= event_us < until for device, since, until in self.spells)


def find(home: Path, who: str, *, vault: Vault) -> Person:
    """The person. Raises InputError where nothing is held under this name, or several people are."""
    asked = graph.spellings(who, vault)
    owners = sorted({row["customer_id"] for row in _identities(home, "identifier", asked)})
    if graph.is_customer_id(who.strip()):
        owners = [_customer(home, who.strip())]
    if len(owners) > 1:
        raise InputError(
            f"erasure: this name is held of {len(owners)} people; say which is meant, as user_id:..., email:... or {_DEVICE}..."
        )
    if owners:
        return of_customer(home, owners[0])
    known = {fact.subject for fact in vault.facts(asked)} | {name for row in logged.about(home, asked) for name in row.subjects}
    quarantined = tables.matching(home, tables.QUARANTINE, pc.field("subject").isin(pa.array(asked, pa.string())), ["subject"])
    found = sorted((known | set(quarantined["subject"].to_pylist())) & set(asked))
    if not found:
        raise InputError(_NOBODY)
    return Person(surrogate(found[0]), tuple(surrogate(name) for name in found), tuple(found))


def raw_names(person: Person, *, vault: Vault) -> list[str]:
    """Their identifiers as they were received."""
    return sorted({fact.value for fact in vault.facts(person.identifiers) if fact.kind in IDENTIFIERS})


def told_on_shared(person: Person, *, vault: Vault) -> list[Fact]:
    """What was said of them on devices that others used too, while they were theirs; without the device's own id."""
    return [fact for fact in vault.facts(person.shared) if fact.kind != "anonymous_id" and person.used(fact.subject, fact.event_us)]


def condition(person: Person, columns: Iterable[str], *, time: str | None = None) -> pc.Expression | None:
    """The rows that are theirs, of a table with these columns; None where no column can name anybody. `time`: its column of times."""
    columns = list(columns)
    values = {
        "customer_id": person.customers,
        "user_id": [_stored(name) for name in person.identifiers if not name.startswith(_DEVICE)],
        "anonymous_id": [_stored(name) for name in person.identifiers if name.startswith(_DEVICE)],
        **dict.fromkeys(("identifier", "subject", "left", "right", "email", "phone"), person.identifiers),
    }
    found = [pc.field(name).isin(pa.array(values[name], pa.string())) for name in columns if name in values]
    name = next((name for name in ("identifier", "subject") if name in columns), None)
    if name and time and "customer_id" not in columns:
        found += [
            (pc.field(name) == device) & (pc.field(time) >= _instant(since)) & (pc.field(time) < _instant(until))
            for device, since, until in person.spells
        ]
    return functools.reduce(operator.or_, found) if found else None


def _stored(name: str) -> str:
    """As the columns user_id and anonymous_id hold it: addresses and numbers with their kind, the others without."""
    kind, _, digits = name.partition(":")
    return name if kind in ("email", "phone") else digits


def of_customer(home: Path, customer_id: str) -> Person:
    """The person with this customer_id."""
    theirs = {row["identifier"] for row in _identities(home, "customer_id", [customer_id])}
    spells = _spells(home, theirs, customer_id)
    alone = theirs - {name for name, _, _ in spells}
    alone |= _not_yet_applied(home, alone)
    others = {row["customer_id"] for row in _identities(home, "customer_id", [surrogate(name) for name in alone])}
    customers = {customer_id} | ({surrogate(name) for name in alone} - others)
    return Person(customer_id, tuple(sorted(customers)), tuple(sorted(alone)), tuple(spells))


def _spells(home: Path, theirs: set[str], customer_id: str) -> list[tuple[str, int, int]]:
    """Of the devices among their identifiers that others used too: when they were theirs."""
    rows = sorted(_identities(home, "identifier", sorted(theirs)), key=lambda row: (row["identifier"], row["event_timestamp"]))
    found = []
    for name, some in itertools.groupby(rows, key=lambda row: row["identifier"]):
        states = [(_micros(row["event_timestamp"]), row["customer_id"]) for row in some]
        if {owner for _, owner in states} != {customer_id}:
            starts = [-_FAR, *(since for since, _ in states[1:]), _FAR]  # the first owner's from the beginning
            found += [(name, starts[at], starts[at + 1]) for at, (_, owner) in enumerate(states) if owner == customer_id]
    return found


def _not_yet_applied(home: Path, alone: set[str]) -> set[str]:
    """Identifiers that only the log has seen with the person's: of calls of theirs that name no other user, and known of nobody else."""
    users = {name for name in alone if not name.startswith(_DEVICE)}
    rows = logged.about(home, sorted(users))
    named = {name for row in rows for name in row.subjects if not users.isdisjoint(row.subjects)} - alone
    others = {name for row in logged.about(home, sorted(named)) if users.isdisjoint(row.subjects) for name in row.subjects}
    held = {row["identifier"] for row in _identities(home, "identifier", sorted(named))}
    users_too = {name for name in named if name.startswith("user_id:")}
    return named - users_too - others - held


def _identities(home: Path, column: str, values: list[str]) -> list[dict[str, Any]]:
    rows = pc.field(column).isin(pa.array(values, pa.string()))
    found: list[dict[str, Any]] = tables.matching(
        home, tables.IDENTITIES, rows, ["identifier", "customer_id", "event_timestamp"]
    ).to_pylist()
    return found


def _customer(home: Path, customer_id: str) -> str:
    """The id of now; one that the events alone know is that of somebody without identifiers. Raises InputError."""
    with suppress(InputError):
        return graph.find(home, customer_id)
    if tables.matching(home, tables.EVENTS, pc.field("customer_id") == customer_id, ["customer_id"]).num_rows:
        return customer_id
    raise InputError(_NOBODY)


def _micros(instant: datetime) -> int:
    return (instant - _EPOCH) // _MICROSECOND


def _instant(micros: int) -> pa.Scalar:
    return pa.scalar(max(-_FAR, min(micros, _FAR)), pa.timestamp("us", tz="UTC"))
