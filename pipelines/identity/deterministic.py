"""Identifiers seen together -> one stable customer_id for each person, and since when we knew.

In: which identifiers were seen together and when, the edges that were found or decided, and who was who so far. Out: the identities
table. Links are exact: the same user id, e-mail address, phone number or anonymous id, all as pseudonyms. Nothing is guessed here
from names, devices or behaviour, and two user ids are never joined by a shared device.

A person is what user ids, addresses and phone numbers connect. An anonymous id belongs to the person who first logged in on it,
with all it did before; when another person logs in on it later, what it does from then on is theirs, until the next login. So a
later login changes nothing before it, and no customer_id. An address or number that more than MAX_USERS user ids gave is that of
a shop assistant, a family or nobody: it connects no one.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipelines.identity import spanning
from pipelines.identity.spanning import Joins
from pipelines.vault import IDENTIFIERS

LINK_COLUMNS = ("anonymous_id", "user_id", "email", "phone", "event_timestamp", "created_timestamp")
MAX_USERS = 4  # user ids of one person: a person has a few accounts; an address of more is a desk's, a family's or a placeholder
_COLUMNS = ["identifier", "customer_id", "event_timestamp", "created_timestamp"]
_ROLES = IDENTIFIERS  # user id, e-mail, phone, anonymous id: in this order where several were first known at the same instant
_KIND = {kind: number for number, kind in enumerate(_ROLES)}
_WHOLE = ("email:", "phone:")  # a value that starts like this says its kind itself, whatever column it stands in


@dataclass(frozen=True)
class Sightings:
    """Rows of identifiers seen together, as arrays. Per row and role of vault.IDENTIFIERS the identifier's number, -1 for none."""

    name: np.ndarray  # (n,) of str: "user_id:..." and so on
    kind: np.ndarray  # (n,) its kind's place in vault.IDENTIFIERS
    roles: np.ndarray  # (4, rows)
    time: np.ndarray  # (rows,) microseconds, as all times here
    created: np.ndarray


@dataclass(frozen=True)
class Edges:
    """Edges between identifiers by number. `cut`: (m, 2) pairs that no link may connect; `link`: (k, 2), known at `time` (k,)."""

    cut: np.ndarray
    link: np.ndarray
    time: np.ndarray


class Resolved(NamedTuple):
    """Rows of the identities table as arrays: the identifier's number, the number of the one its customer is named after, times."""

    identifier: np.ndarray
    root: np.ndarray
    time: np.ndarray
    created: np.ndarray


@dataclass(frozen=True)
class _Logins:
    """Rows with an anonymous id and a known one, in order of anonymous id and time; one for each instant."""

    anonymous: np.ndarray
    node: np.ndarray  # the user id, else the e-mail address, else the phone number
    time: np.ndarray
    created: np.ndarray


@dataclass(frozen=True)
class _Formed:
    """People, and what formed them: `exact` links, `known` (those and the edges), logins, and the logins that hold."""

    exact: Joins
    known: Joins
    logins: _Logins
    logged_in: Joins
    person: np.ndarray  # (n,) label


def resolve(links: pd.DataFrame, *, edges: pd.DataFrame | None = None, held: pd.DataFrame | None = None) -> pd.DataFrame:
    """The customer of every identifier.

    links: LINK_COLUMNS, one row for identifiers seen together (any of them null), times UTC; any order, rows may repeat. For an
    anonymous id that several people used, every change of login has to be among them. Values are pseudonyms without their kind,
    with it for e-mail and phone.
    edges: rows of the table of edges. State `link` joins the two, known at its created_timestamp; of an anonymous id it joins the
    person to whom what it did at first belongs. State `cut` takes away every link between the two. Other states say nothing.
    held: the identities so far. A customer_id given then is kept as long as its identifier is there; of two that meet in one
    person, that of the identifier known earlier holds, and the part that a cut sets free gets its own back.

    Result: identifier ("user_id:...", "anonymous_id:..."), customer_id, event_timestamp (since when it holds), created_timestamp
    (when the identifier was linked to the customer: the earliest moment at which a chain of links known by then led to the
    identifier that the customer is named after). One row per identifier; for a shared anonymous id one per change of person.
    customer_id is "c" and the first 16 hex digits of the BLAKE2b hash of the person's first known identifier. No links, no rows.
    """
    if links.empty:
        return _frame([], [], np.empty(0, np.int64), np.empty(0, np.int64))
    seen = sightings(links)
    if not len(seen.name):
        return resolve(links.iloc[:0])
    anchors = np.full(len(seen.name), np.iinfo(np.int64).max)
    if held is not None and len(held):
        at = pd.Index(seen.name).get_indexer(pd.Index(held["identifier"]))
        is_anchor = (at >= 0) & _are_anchors(held["identifier"].to_numpy(), held["customer_id"].to_numpy())
        np.minimum.at(anchors, at[is_anchor], micros(held["created_timestamp"])[is_anchor])
    found = people(seen, numbered(seen.name, edges), anchors)
    roots, where = np.unique(found.root, return_inverse=True)
    customer = np.array([surrogate(name) for name in seen.name[roots]], dtype=object)[where]
    return _frame(seen.name[found.identifier], customer, found.time, found.created)


def surrogate(identifier: str) -> str:
    """The customer_id that an identifier gives its name to."""
    return "c" + hashlib.blake2b(identifier.encode()).hexdigest()[:16]


def link_id(one: str, other: str) -> str:
    """The name of the link between two identifiers, in either order: what `unmerge` takes."""
    return "l" + hashlib.blake2b(f"{min(one, other)}|{max(one, other)}".encode()).hexdigest()[:16]


def joins(links: pd.DataFrame, *, edges: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every link that holds, once, since it was first known: left, right (identifiers, left < right), created_timestamp.

    They are what `resolve` forms people of; the edges in state `link` stand among them as they are.
    """
    seen = sightings(links)
    known = numbered(seen.name, edges)
    formed = _formed(seen, known, _ranks(seen, _earliest(seen, seen.time), _earliest(seen, seen.created)))
    found = _stacked(formed.exact, formed.logged_in, Joins(known.link[:, 0], known.link[:, 1], known.time))
    ends = np.sort(np.stack([seen.name[found.left], seen.name[found.right]], axis=1).astype("object"), axis=1)
    frame = pd.DataFrame({"left": ends[:, 0], "right": ends[:, 1], "time": found.time})
    frame = frame.sort_values(["left", "right", "time"]).drop_duplicates(["left", "right"]).reset_index(drop=True)
    return frame.assign(created_timestamp=_utc(frame["time"].to_numpy(np.int64))).drop(columns="time")


def sightings(links: pd.DataFrame) -> Sightings:
    """The links as arrays."""
    codes, names = pd.factorize(np.concatenate([_named(links[kind], kind) for kind in _ROLES]))
    return arranged(names, codes.reshape(4, -1), micros(links["event_timestamp"]), micros(links["created_timestamp"]))


def arranged(name: np.ndarray, roles: np.ndarray, time: np.ndarray, created: np.ndarray) -> Sightings:
    """The same of names and numbers."""
    kind = np.array([_KIND[text.partition(":")[0]] for text in name], np.int64)
    return Sightings(np.asarray(name, dtype=object), kind, roles, time, created)


def numbered(name: np.ndarray, edges: pd.DataFrame | None) -> Edges:
    """The edges by the numbers of their ends; those of identifiers that were never seen are left out."""
    if edges is None or edges.empty:
        return Edges(np.empty((0, 2), np.int64), np.empty((0, 2), np.int64), np.empty(0, np.int64))
    index = pd.Index(name)
    ends = np.stack([index.get_indexer(pd.Index(edges["left"])), index.get_indexer(pd.Index(edges["right"]))], axis=1)
    there, state = (ends >= 0).all(axis=1), edges["state"].to_numpy()
    cut, link = there & (state == "cut"), there & (state == "link")
    return Edges(ends[cut], ends[link], micros(edges["created_timestamp"])[link])


def micros(time: pd.Series) -> np.ndarray:
    """Microseconds since 1970 of UTC times."""
    told = pd.to_datetime(time, utc=True, cache=False)  # to see whether a cache pays, pandas looks at every time of a whole table
    return told.dt.tz_localize(None).to_numpy().astype("datetime64[us]").astype(np.int64)


def people(seen: Sightings, edges: Edges, anchors: np.ndarray) -> Resolved:
    """The arithmetic of `resolve`. anchors: (n,) when an identifier that names a customer was known, the largest integer for others."""
    first, known = _earliest(seen, seen.time), _earliest(seen, seen.created)
    rank = _ranks(seen, first, known)
    formed = _formed(seen, edges, rank)
    root, linked = spanning.spread(_stacked(formed.known, formed.logged_in), np.lexsort((rank, anchors)), known)
    logins, size = formed.logins, len(seen.name)
    later = _changes(logins, formed.person)
    node = logins.node[later]
    return Resolved(
        np.concatenate([np.arange(size), logins.anonymous[later]]),
        np.concatenate([root, root[node]]),
        np.concatenate([first, logins.time[later]]),
        np.concatenate([linked, np.maximum(logins.created[later], linked[node])]),
    )


def are_shared(seen: Sightings) -> np.ndarray:
    """(n,) whether more than MAX_USERS user ids gave this address or number."""
    user = seen.roles[_KIND["user_id"]]
    is_user = (user >= 0) & (seen.kind[user] == _KIND["user_id"])
    pairs = [user[at] * len(seen.name) + role[at] for role in seen.roles[1:3] for at in [is_user & (role >= 0)]]
    given = np.unique(np.concatenate(pairs)) % len(seen.name)
    return np.bincount(given, minlength=len(seen.name)) > MAX_USERS


def assigned_sql(rows: str, identities: str) -> str:
    """SQL: every row of the relation `rows` (columns user_id, anonymous_id, event_timestamp) with the customer it belongs to.

    Adds owner_id and linked_timestamp, null for a row without a known identifier. A user id decides before an anonymous id;
    a shared anonymous id goes by the time of the row.
    """
    return f"""
        WITH named AS (
            SELECT *, CASE WHEN user_id LIKE 'email:%' OR user_id LIKE 'phone:%' THEN user_id
                WHEN user_id IS NOT NULL THEN 'user_id:' || user_id ELSE 'anonymous_id:' || anonymous_id END AS identifier_ FROM {rows}),
        counted AS (SELECT *, count(*) OVER (PARTITION BY identifier) AS owners FROM {identities}),
        single AS (SELECT identifier, customer_id, created_timestamp FROM counted WHERE owners = 1),
        shared AS (SELECT identifier, customer_id, created_timestamp, event_timestamp FROM counted WHERE owners > 1)
        SELECT named.* EXCLUDE (identifier_), coalesce(single.customer_id, shared.customer_id) AS owner_id,
            coalesce(single.created_timestamp, shared.created_timestamp) AS linked_timestamp
        FROM named LEFT JOIN single ON named.identifier_ = single.identifier
        ASOF LEFT JOIN shared ON named.identifier_ = shared.identifier AND named.event_timestamp >= shared.event_timestamp"""


def renamed_sql(before: str, after: str) -> str:
    """SQL: the customers of the identities `before` who have another id in the identities `after`, having been merged since.

    customer_id, owner_id (the new id), linked_timestamp (when the link that merged them was known).
    """
    order = " ".join(f"WHEN '{kind}' THEN {number}" for kind, number in _KIND.items())
    return f"""
        WITH best AS (
            SELECT customer_id, min_by(identifier, CASE split_part(identifier, ':', 1) {order} END) AS identifier
            FROM {before} GROUP BY customer_id),
        now AS (
            SELECT identifier, min_by(customer_id, event_timestamp) AS owner_id,
                min_by(created_timestamp, event_timestamp) AS linked_timestamp
            FROM {after} GROUP BY identifier)
        SELECT best.customer_id, now.owner_id, now.linked_timestamp FROM best JOIN now USING (identifier)
        WHERE best.customer_id <> now.owner_id"""


# -- what was seen


def _named(column: pd.Series, kind: str) -> np.ndarray:
    """The values as identifiers, None for none."""
    text = column.astype("object")
    given = text[text.notna()].astype("str")
    whole = given.str.startswith(_WHOLE) if kind != "anonymous_id" else pd.Series(False, index=given.index)
    named = np.full(len(text), None, dtype=object)
    named[text.notna().to_numpy()] = np.where(whole, given, f"{kind}:" + given)
    return named


def _earliest(seen: Sightings, value: np.ndarray) -> np.ndarray:
    """Per identifier the lowest value of its rows."""
    lowest = np.full(len(seen.name), np.iinfo(np.int64).max)
    for role in seen.roles:
        there = role >= 0
        np.minimum.at(lowest, role[there], value[there])
    return lowest


def _ranks(seen: Sightings, first: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(n,) the identifier's place in order of when it was known, then first seen, then by kind and name.

    By when it was known: what arrives later never comes before what a customer was named after.
    """
    rank = np.empty(len(seen.name), np.int64)
    rank[np.lexsort((seen.name.astype(str), seen.kind, first, known))] = np.arange(len(rank))
    return rank


# -- who is one person


def _formed(seen: Sightings, edges: Edges, rank: np.ndarray) -> _Formed:
    size = len(seen.name)
    exact, logins = _links(seen, edges, rank)
    owner = _owners(logins, size)
    known = _stacked(exact, Joins(owner[edges.link[:, 0]], owner[edges.link[:, 1]], edges.time))
    person = spanning.components(size, known.left, known.right)
    holds = person[owner[logins.anonymous]] == person[logins.node]
    logged_in = Joins(logins.anonymous[holds], logins.node[holds], logins.created[holds])
    return _Formed(exact, known, logins, logged_in, person)


def _links(seen: Sightings, edges: Edges, rank: np.ndarray) -> tuple[Joins, _Logins]:
    """The links between known identifiers, and the logins, without the cut ones.

    Within a row all hangs on the first that it names: one cut sets one identifier free.
    """
    useless = np.append(are_shared(seen), False)  # for the number -1
    user, email, phone = (np.where(useless[role], -1, role) for role in seen.roles[:3])
    node = np.where(user >= 0, user, np.where(email >= 0, email, phone))
    left, right = np.concatenate([node, node]), np.concatenate([email, phone])
    at = np.flatnonzero(_hold(left, right, edges.cut, len(seen.name)))
    exact = Joins(left[at], right[at], seen.created[at % len(node)])
    anonymous = seen.roles[3]
    rows = np.flatnonzero(_hold(anonymous, node, edges.cut, len(seen.name)))
    rows = rows[np.lexsort((rank[node[rows]], seen.created[rows], seen.time[rows], anonymous[rows]))]
    # Of several people at one instant on one device the one who was known first: from one time on it is one person's.
    same = (np.diff(anonymous[rows]) == 0) & (np.diff(seen.time[rows]) == 0)
    rows = rows[np.append(np.ones(min(len(rows), 1), bool), ~same)]
    return exact, _Logins(anonymous[rows], node[rows], seen.time[rows], seen.created[rows])


def _hold(left: np.ndarray, right: np.ndarray, cut: np.ndarray, size: int) -> np.ndarray:
    """Whether both are there, differ, and nobody cut the link between them."""
    there = (left >= 0) & (right >= 0) & (left != right)
    if len(cut):
        apart = cut.min(axis=1) * size + cut.max(axis=1)
        there = there & ~np.isin(np.minimum(left, right) * size + np.maximum(left, right), apart)
    return np.asarray(there)


def _owners(logins: _Logins, size: int) -> np.ndarray:
    """(n,) of an anonymous id that somebody logged in on, the first who did; everything else is its own."""
    owner = np.arange(size)
    who, at = np.unique(logins.anonymous, return_index=True)
    owner[who] = logins.node[at]
    return owner


def _changes(logins: _Logins, person: np.ndarray) -> np.ndarray:
    """Positions of the logins by another person than the one before on the same anonymous id."""
    who = person[logins.node]
    return np.flatnonzero((logins.anonymous[1:] == logins.anonymous[:-1]) & (who[1:] != who[:-1])) + 1


def _stacked(*some: Joins) -> Joins:
    return Joins(*(np.concatenate([getattr(joins, name) for joins in some]) for name in ("left", "right", "time")))


# -- frames


def _are_anchors(identifier: np.ndarray, customer: np.ndarray) -> np.ndarray:
    """Whether the customer is named after the identifier."""
    return np.fromiter((surrogate(name) == whose for name, whose in zip(identifier, customer, strict=True)), bool, len(identifier))


def _utc(micros: np.ndarray) -> pd.Series:
    return pd.Series(micros.astype("datetime64[us]")).dt.tz_localize("UTC")


def _frame(identifier: object, customer: object, since: np.ndarray, known: np.ndarray) -> pd.DataFrame:
    columns = [pd.Series(identifier, dtype="object"), pd.Series(customer, dtype="object"), _utc(since), _utc(known)]
    frame = pd.DataFrame(dict(zip(_COLUMNS, columns, strict=True)))
    return frame.sort_values(["identifier", "event_timestamp"], kind="stable").reset_index(drop=True)
