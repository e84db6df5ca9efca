"""Identifiers seen together -> one stable customer_id for each person, and since when we knew.

In: which identifiers were seen together and when. Out: the identities table. Links are exact: the same user id, anonymous id
or e-mail hash. Nothing is guessed from names, devices or behaviour, and two user ids are never joined by a shared device.

A person is what user ids and e-mail hashes connect. An anonymous id belongs to the person who first logged in on it, with all
it did before; when another person logs in on it later, what it does from then on is theirs, until the next login. So a later
login changes nothing before it, and no customer_id.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse import csgraph

LINK_COLUMNS = ("anonymous_id", "user_id", "email", "event_timestamp", "created_timestamp")
_COLUMNS = ["identifier", "customer_id", "event_timestamp", "created_timestamp"]
_KINDS = ("user_id", "email", "anonymous_id")  # in this order where several were first seen at the same instant


def resolve(links: pd.DataFrame) -> pd.DataFrame:
    """The customer of every identifier.

    links: LINK_COLUMNS, one row for identifiers seen together (any of them null), times UTC; any order, rows may repeat. For an
    anonymous id that several people used, every change of login has to be among them. An `email` is its hashed form; a user_id
    that starts with "email:" is one too.

    Result: identifier ("user_id:...", "anonymous_id:...", "email:..."), customer_id, event_timestamp (since when it holds),
    created_timestamp (when the identifier was linked to the customer: the earliest moment at which a chain of links known by
    then led to the first identifier of the person). One row per identifier; for a shared anonymous id one per change of person.
    customer_id is "c" and the first 16 hex digits of the BLAKE2b hash of the person's first-seen identifier. No links, no rows.
    """
    if links.empty:
        return _frame([], [], np.empty(0, np.int64), np.empty(0, np.int64))
    seen = _sightings(links)
    person = _components(len(seen.name), seen.user, seen.email)
    logins = _logins(seen, person)
    owner = np.full(len(seen.name), -1)
    first = np.unique(logins.anonymous, return_index=True)[1]
    owner[logins.anonymous[first]] = logins.person[first]
    root, linked = _spread(seen, _edges(seen, person, owner))
    customer = _surrogates(seen.name, root)
    later = _changes(logins)
    at = np.concatenate([np.arange(len(seen.name)), logins.anonymous[later]])
    since = np.concatenate([seen.first, logins.time[later]])
    known = np.concatenate([linked, np.maximum(logins.created[later], linked[logins.node[later]])])
    whose = np.concatenate([np.arange(len(seen.name)), logins.node[later]])
    return _frame(seen.name[at], customer[whose], since, known)


def assigned_sql(rows: str, identities: str) -> str:
    """SQL: every row of the relation `rows` (columns user_id, anonymous_id, event_timestamp) with the customer it belongs to.

    Adds owner_id and linked_timestamp, null for a row without a known identifier. A user id decides before an anonymous id;
    a shared anonymous id goes by the time of the row.
    """
    return f"""
        WITH named AS (
            SELECT *, CASE WHEN user_id LIKE 'email:%' THEN user_id
                WHEN user_id IS NOT NULL THEN 'user_id:' || user_id ELSE 'anonymous_id:' || anonymous_id END AS identifier FROM {rows}),
        counted AS (SELECT *, count(*) OVER (PARTITION BY identifier) AS owners FROM {identities}),
        single AS (SELECT identifier, customer_id, created_timestamp FROM counted WHERE owners = 1),
        shared AS (SELECT identifier, customer_id, created_timestamp, event_timestamp FROM counted WHERE owners > 1)
        SELECT named.* EXCLUDE (identifier), coalesce(single.customer_id, shared.customer_id) AS owner_id,
            coalesce(single.created_timestamp, shared.created_timestamp) AS linked_timestamp
        FROM named LEFT JOIN single ON named.identifier = single.identifier
        ASOF LEFT JOIN shared ON named.identifier = shared.identifier AND named.event_timestamp >= shared.event_timestamp"""


def renamed_sql(before: str, after: str) -> str:
    """SQL: the customers of the identities `before` who have another id in the identities `after`, having been merged since.

    customer_id, owner_id (the new id), linked_timestamp (when the link that merged them was known).
    """
    return f"""
        WITH best AS (
            SELECT customer_id, min_by(identifier, CASE split_part(identifier, ':', 1) WHEN 'user_id' THEN 0 WHEN 'email' THEN 1 ELSE 2 END)
                AS identifier FROM {before} GROUP BY customer_id),
        now AS (
            SELECT identifier, min_by(customer_id, event_timestamp) AS owner_id,
                min_by(created_timestamp, event_timestamp) AS linked_timestamp
            FROM {after} GROUP BY identifier)
        SELECT best.customer_id, now.owner_id, now.linked_timestamp FROM best JOIN now USING (identifier)
        WHERE best.customer_id <> now.owner_id"""


@dataclass(frozen=True)
class _Sightings:
    """Identifiers by number. Per row of the links: the number in each role, -1 for none, and the times in microseconds."""

    name: np.ndarray  # (n,) of str
    first: np.ndarray  # (n,) first seen
    created: np.ndarray  # (n,) first known
    rank: np.ndarray  # (n,) position in order of first sight
    user: np.ndarray
    email: np.ndarray
    anonymous: np.ndarray
    row_time: np.ndarray
    row_created: np.ndarray


@dataclass(frozen=True)
class _Logins:
    """Rows with an anonymous id and a known one, in order of anonymous id and time."""

    anonymous: np.ndarray
    node: np.ndarray  # the user id, else the e-mail
    person: np.ndarray
    time: np.ndarray
    created: np.ndarray


def _sightings(links: pd.DataFrame) -> _Sightings:
    time, created = _micros(links["event_timestamp"]), _micros(links["created_timestamp"])
    texts = [_named(links, kind) for kind in _KINDS]
    codes, names = pd.factorize(np.concatenate(texts))
    user, email, anonymous = codes.reshape(3, len(links))
    at, rows = codes[codes >= 0], np.tile(np.arange(len(links)), 3)[codes >= 0]
    name = np.asarray(names, dtype=object)
    first, known = (_earliest(at, value[rows], len(name)) for value in (time, created))
    kind = np.array([_KINDS.index(text.split(":", 1)[0]) for text in name])
    rank = np.empty(len(name), np.int64)
    rank[np.lexsort((name.astype(str), kind, first))] = np.arange(len(name))
    return _Sightings(name, first, known, rank, user, email, anonymous, time, created)


def _named(links: pd.DataFrame, kind: str) -> np.ndarray:
    column = links[kind].astype("object")
    text = column.where(column.isna(), f"{kind}:" + column.astype("str"))
    is_hash = column.astype("str").str.startswith("email:") & column.notna()
    return text.mask(is_hash, column).mask(column.isna(), None).to_numpy()


def _components(size: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    both = (left >= 0) & (right >= 0)
    graph = sparse.coo_array((np.ones(both.sum(), np.int8), (left[both], right[both])), shape=(size, size))
    return np.asarray(csgraph.connected_components(graph, directed=False)[1])


def _logins(seen: _Sightings, person: np.ndarray) -> _Logins:
    node = np.where(seen.user >= 0, seen.user, seen.email)
    rows = np.flatnonzero((seen.anonymous >= 0) & (node >= 0))
    rows = rows[np.lexsort((seen.rank[node[rows]], seen.row_created[rows], seen.row_time[rows], seen.anonymous[rows]))]
    return _Logins(seen.anonymous[rows], node[rows], person[node[rows]], seen.row_time[rows], seen.row_created[rows])


def _changes(logins: _Logins) -> np.ndarray:
    """Positions of the logins by another person than the one before on the same anonymous id."""
    same_device = logins.anonymous[1:] == logins.anonymous[:-1]
    return np.flatnonzero(same_device & (logins.person[1:] != logins.person[:-1])) + 1


def _edges(seen: _Sightings, person: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both ends and the time of the links that hold: all between known identifiers, and of anonymous ids those to their owner."""
    lefts, rights, times = [], [], []
    for left, right, is_anonymous in (
        (seen.user, seen.email, False),
        (seen.anonymous, seen.user, True),
        (seen.anonymous, seen.email, True),
    ):
        holds = (left >= 0) & (right >= 0) & (left != right)
        if is_anonymous:
            holds[holds] = owner[left[holds]] == person[right[holds]]
        lefts.append(left[holds])
        rights.append(right[holds])
        times.append(seen.row_created[holds])
    return np.concatenate(lefts), np.concatenate(rights), np.concatenate(times)


def _spread(seen: _Sightings, edges: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Per identifier: the first-seen one of its person, and when a chain of links to that one was complete.

    The earliest such moment is the largest link time on the path in a minimum spanning tree.
    """
    size = len(seen.name)
    left, right, time = np.minimum(edges[0], edges[1]), np.maximum(edges[0], edges[1]), edges[2]
    if len(left) == 0:
        return np.arange(size), seen.created
    times, weight = np.unique(time, return_inverse=True)
    order = np.lexsort((weight, right, left))
    is_first = np.ones(len(order), bool)
    is_first[1:] = (np.diff(left[order]) != 0) | (np.diff(right[order]) != 0)
    kept = order[is_first]  # the earliest of parallel links: a sparse matrix would add them up
    # Weights start at 2: zero means no edge, and 1 is left for the links from outside to the roots.
    graph = sparse.coo_array((weight[kept] + 2.0, (left[kept], right[kept])), shape=(size + 1, size + 1)).tocsr()
    tree = csgraph.minimum_spanning_tree(graph.maximum(graph.T)).tocoo()
    label = csgraph.connected_components(tree, directed=False)[1][:size]
    root = _first_ranked(label, seen.rank)
    roots = np.unique(root)
    ends = (np.concatenate([tree.row, np.full(len(roots), size)]), np.concatenate([tree.col, roots]))
    rooted = sparse.coo_array((np.concatenate([tree.data, np.ones(len(roots))]), ends), shape=(size + 1, size + 1)).tocsr()
    parent = csgraph.breadth_first_order(rooted, size, directed=False)[1]
    parent[size] = size
    worst = np.zeros(size + 1, np.int64)
    is_child = parent[tree.row] == tree.col
    worst[np.where(is_child, tree.row, tree.col)] = tree.data.astype(np.int64)
    while (parent != size).any():  # each round doubles the length of path that is covered
        worst, parent = np.maximum(worst, worst[parent]), parent[parent]
    linked = np.where(worst[:size] > 0, times[np.maximum(worst[:size] - 2, 0)], seen.created)
    return root, linked


def _first_ranked(label: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Per identifier, the number of the first-seen one with the same label."""
    order = np.argsort(rank)
    first = np.unique(label[order], return_index=True)[1]
    return np.asarray(order[first][label])


def _surrogates(name: np.ndarray, root: np.ndarray) -> np.ndarray:
    roots, where = np.unique(root, return_inverse=True)
    ids = ["c" + hashlib.blake2b(text.encode()).hexdigest()[:16] for text in name[roots]]
    return np.array(ids, dtype=object)[where]


def _earliest(at: np.ndarray, value: np.ndarray, size: int) -> np.ndarray:
    lowest = np.full(size, np.iinfo(np.int64).max)
    np.minimum.at(lowest, at, value)
    return lowest


def _micros(time: pd.Series) -> np.ndarray:
    return pd.to_datetime(time, utc=True).dt.tz_localize(None).to_numpy().astype("datetime64[us]").astype(np.int64)


def _frame(identifier: object, customer: object, since: np.ndarray, known: np.ndarray) -> pd.DataFrame:
    times = [pd.Series(value.astype("datetime64[us]")).dt.tz_localize("UTC") for value in (since, known)]
    frame = pd.DataFrame(
        dict(zip(_COLUMNS, [pd.Series(identifier, dtype="object"), pd.Series(customer, dtype="object"), *times], strict=True))
    )
    return frame.sort_values(["identifier", "event_timestamp"], kind="stable").reset_index(drop=True)
