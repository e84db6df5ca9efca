"""Who identifiers belong to, online: what was seen together in the newest calls -> rows of the view identifier_customer.

In: the links of `identity.online`, which knows all that was ever seen together. Out: rows for each identifier whose customer is new or
another one, so that a visitor's history belongs to the customer from the moment they identify. A customer whom nobody is any more
leaves a forwarding row under their former id, and nothing else. Never decides who is who.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol

from pipelines.online.writer import FORMER, IDENTIFIER_VIEW, OnlineWriter, Row, is_former
from pipelines.stream.calls import Call

JOIN_KEY = "identifier"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Linked(Protocol):
    """An identifier and whose it is since when."""

    @property
    def identifier(self) -> str:
        """A full pseudonym."""

    @property
    def customer_id(self) -> str:
        """The person."""

    @property
    def event_timestamp(self) -> datetime:
        """Since when."""

    @property
    def created_timestamp(self) -> datetime:
        """When we knew."""


class Linker(Protocol):
    """Knows all that was ever seen together (identity.online.Online)."""

    def link(self, sightings: Sequence[Call]) -> Sequence[Linked]:
        """The identifiers whose customer changed or is new by these sightings; of one used by several, the last row is whose it is."""

    def identities(self) -> Sequence[Linked]:
        """Everything."""

    def known(self, identifiers: Sequence[str]) -> set[str]:
        """Which of these it knows; a few hundred at a time."""

    def words(self, identifiers: Sequence[str]) -> Sequence[tuple[str, str, bool, bool, int]]:
        """What an ingest wrote of their words on consent: see `consents.Stored`."""

    @property
    def version(self) -> str:
        """Of what an ingest wrote, as it is held."""

    def refresh(self) -> bool:
        """Take over what an ingest wrote, once it is read; whether that was now."""

    @property
    def is_reading(self) -> bool:
        """Whether what an ingest wrote is being read."""

    def changes(self) -> Sequence[Linked]:
        """Of the identifiers of which the last `refresh` made it say something else, all rows."""


class Owner(NamedTuple):
    """Whose an identifier is, and when we knew (microseconds)."""

    customer_id: str
    known_us: int


def newest(links: Iterable[Linked]) -> dict[str, Owner]:
    """Identifier -> whose it is now."""
    # the time is when we knew: a late call may move the first sight of an identifier back, and still say something new
    return {
        link.identifier: Owner(link.customer_id, (max(link.event_timestamp, link.created_timestamp) - _EPOCH) // _MICROSECOND)
        for link in links
    }


def follow(online: OnlineWriter, links: Mapping[str, Owner]) -> set[str]:
    """Write whose each identifier is; returns the customers for whom something follows: those with more identifiers, or fewer.

    What the linker says holds, so the rows are made newer than whatever is there.
    """
    if not links:
        return set()
    before = online.read(IDENTIFIER_VIEW, "customer_id", list(links), join_key=JOIN_KEY)
    at = {name: max(owner.known_us, before[name][1] if name in before else 0) for name, owner in links.items()}
    _write(online, {name: Owner(owner.customer_id, at[name]) for name, owner in links.items()})
    moved = {name: former for name, (former, _) in before.items() if former is not None and former != links[name].customer_id}
    empty = unnamed(online.identifiers_of(sorted(set(moved.values()))))
    _forward(online, {former: Owner(links[name].customer_id, at[name]) for name, former in moved.items() if former in empty})
    return ({owner.customer_id for owner in links.values()} | set(moved.values())) - empty


def changed(online: OnlineWriter, links: Mapping[str, Owner]) -> dict[str, Owner]:
    """The links that the store does not have yet."""
    held = owners(online, list(links))
    return {name: owner for name, owner in links.items() if held.get(name) != owner.customer_id}


def owners(online: OnlineWriter, identifiers: Sequence[str]) -> dict[str, str]:
    """Whose each identifier is; those of nobody are left out."""
    found = online.read(IDENTIFIER_VIEW, "customer_id", identifiers, join_key=JOIN_KEY)
    return {name: owner for name, (owner, _) in found.items() if owner is not None}


def forget(online: OnlineWriter, identifiers: Sequence[str]) -> int:
    """Delete the rows of these identifiers, and of the customers whom nobody else names; returns the values deleted."""
    theirs = sorted(set(owners(online, identifiers).values()))
    removed = online.remove(IDENTIFIER_VIEW, identifiers, join_key=JOIN_KEY)
    left = online.identifiers_of(theirs)
    gone = unnamed(left)
    removed += online.remove(IDENTIFIER_VIEW, [name for customer in gone for name in left[customer]], join_key=JOIN_KEY)
    return removed + online.remove_customers(sorted(gone))


def unnamed(names: Mapping[str, Sequence[str]]) -> set[str]:
    """The customers whom nothing but former ids leads to. names: customer -> identifiers."""
    return {customer for customer, some in names.items() if all(is_former(name) for name in some)}


def _forward(online: OnlineWriter, former: Mapping[str, Owner]) -> None:
    """Customers whom no identifier names any more: their rows go, and their ids, and those that led to them, lead on."""
    online.remove_customers(list(former))
    led = {name: former[old] for old, names in online.identifiers_of(list(former)).items() for name in names}
    _write(online, led | {f"{FORMER}:{old}": owner for old, owner in former.items()})


def _write(online: OnlineWriter, links: Mapping[str, Owner]) -> None:
    rows = [Row(name, {"customer_id": owner.customer_id}, event_us=owner.known_us) for name, owner in links.items()]
    online.write(IDENTIFIER_VIEW, rows, join_key=JOIN_KEY)
