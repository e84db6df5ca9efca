"""Why identifiers are one person, and what a person in charge decides about it.

In: the identity tables of a home. Out: explanations, the queue of reviews, and decisions written to the table of edges. A decision
changes no customer by itself: the caller runs `ingest.reassign` after it, which gives everybody their own events and features.
Names people by pseudonyms only.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables
from pipelines.errors import InputError
from pipelines.identity import deterministic, spanning
from pipelines.identity.deterministic import link_id, surrogate
from pipelines.vault import HEX_DIGITS, IDENTIFIERS, Vault, normalised

EXACT = "exact"  # kind of a link that is no row of the table of edges: the two were seen together

_SEEN_TOGETHER = '{"seen": ["together", null]}'
_PSEUDONYM = re.compile(rf"({'|'.join(IDENTIFIERS)}):[0-9a-f]{{{HEX_DIGITS}}}")
_CUSTOMER = re.compile(r"c[0-9a-f]{16}")
_REVIEW_COLUMNS = ["link_id", "left", "right", "left_customer", "right_customer", "weight", "evidence", "created_timestamp"]


@dataclass(frozen=True)
class Link:
    """One link between two identifiers. `weight`: the probability that they are one person; `evidence`: JSON, never a value."""

    link_id: str
    left: str
    right: str
    kind: str  # exact, probabilistic or manual
    state: str  # link, review, reject or cut
    weight: float
    evidence: str
    decided_by: str | None
    created_timestamp: datetime


@dataclass(frozen=True)
class Explanation:
    """Why these identifiers are one customer.

    `path`: as few links as connect them all, each the earliest that does. `others`: further rows of the table of edges that touch
    the customer, cuts and rejections among them. `reviews`: pairs that wait for a decision.
    """

    customer_id: str
    identifiers: tuple[str, ...]
    path: tuple[Link, ...]
    others: tuple[Link, ...]
    reviews: tuple[Link, ...]


@dataclass(frozen=True)
class Decision:
    """What was decided. `is_one`: whether the two are one person now, which other links between them may still make them."""

    link: Link
    is_one: bool


def find(home: Path, who: str, vault: Vault | None = None) -> str:
    """The customer_id of a person, whatever they are called: a customer_id (a former one too), a pseudonym, "user_id:42",
    "anna@example.org", a plain id.

    Raises InputError where nobody is called that, without repeating the name.
    """
    who, identities = who.strip(), tables.read_arrow(home, tables.IDENTITIES)
    if is_customer_id(who):
        if pc.any(pc.equal(identities["customer_id"], who)).as_py():
            return who
        named = [name for name in identities["identifier"].to_pylist() if surrogate(name) == who]
    else:
        named = spellings(who, vault)
    mine = identities.filter(pc.is_in(identities["identifier"], pa.array(named, pa.string()))).sort_by("event_timestamp")
    known = dict(zip(mine["identifier"].to_pylist(), mine["customer_id"].to_pylist(), strict=True))  # of a shared device, whose it is now
    found: str | None = next((known[name] for name in named if name in known), None)
    if found is None:
        raise InputError(
            "identity: a customer_id, a pseudonym or an identifier of a known person was expected, nobody here is called that; "
            "write it as kind:value, with one of the kinds " + ", ".join(IDENTIFIERS)
        )
    return found


def is_customer_id(text: str) -> bool:
    """Whether it has the form of one; somebody's user id may have it as well."""
    return _CUSTOMER.fullmatch(text) is not None


def spellings(who: str, vault: Vault | None) -> list[str]:
    """The pseudonyms that a name may stand for, the likeliest first: itself if it is one, else those of the kinds it may be of.

    "phone:..." says the kind. An address is one whichever kind is said, as it is in the rows that are read. Without the vault
    nothing but a pseudonym is known.
    """
    text = who.strip()
    if _PSEUDONYM.fullmatch(text):
        return [text]
    if vault is None:
        return []
    kind, _, value = text.partition(":")
    kinds, value = ((kind,), value) if kind in IDENTIFIERS and value else (IDENTIFIERS, text)
    if "@" in value and kinds != ("phone",):
        kinds = ("email",)
    return [vault.pseudonym(kind, value) for kind in kinds if normalised(kind, value)]


def explain(home: Path, who: str, *, vault: Vault | None = None) -> Explanation:
    """Why this customer's identifiers are one. `who` as in `find`. Raises InputError where nobody is called that."""
    customer = find(home, who, vault)
    identities = tables.read_arrow(home, tables.IDENTITIES, ["identifier", "customer_id"])
    mine = sorted(set(identities.filter(pc.equal(identities["customer_id"], customer))["identifier"].to_pylist()))
    edges = tables.read(home, tables.IDENTITY_EDGES)
    about = edges[edges["left"].isin(mine) | edges["right"].isin(mine)]
    path = _path(_links_of(home, mine), edges, mine)
    rows = [_link(row) for row in about.itertuples(index=False)]
    on_path = {link.link_id for link in path}
    return Explanation(
        customer,
        tuple(mine),
        tuple(path),
        tuple(row for row in rows if row.link_id not in on_path and row.state != "review"),
        tuple(row for row in rows if row.state == "review"),
    )


def reviews(home: Path) -> pd.DataFrame:
    """The pairs that wait for a decision, the most probable first; empty where none does.

    link_id, left and right (identifiers), left_customer and right_customer, weight (probability), evidence (JSON), created_timestamp.
    """
    edges = tables.read(home, tables.IDENTITY_EDGES)
    waiting = edges[edges["state"] == "review"].sort_values(["weight", "link_id"], ascending=[False, True])
    identities = tables.read(home, tables.IDENTITIES).sort_values("event_timestamp").drop_duplicates("identifier", keep="last")
    whose = identities.set_index("identifier")["customer_id"]
    waiting = waiting.assign(left_customer=waiting["left"].map(whose), right_customer=waiting["right"].map(whose))
    return waiting[_REVIEW_COLUMNS].reset_index(drop=True)


def newest(home: Path) -> pd.Timestamp:
    """When the newest of the home's links was known: what is found or decided now is known since then. 1970 where there is none."""
    known = pc.max(tables.read_arrow(home, tables.IDENTITY_LINKS, ["created_timestamp"])["created_timestamp"]).as_py()
    return pd.Timestamp(known or datetime(1970, 1, 1, tzinfo=UTC)).as_unit("us")


def unmerge(home: Path, link_id: str, *, by: str) -> Decision:
    """Cut a link: from now on nothing joins its two identifiers directly, whatever is found or seen of them.

    link_id: as `explain` shows it. Raises InputError for one that is not there.
    """
    edges = tables.read(home, tables.IDENTITY_EDGES)
    if not (edges["link_id"] == link_id).any():
        exact = _exact(home, link_id)
        edges = pd.concat([edges, exact]) if len(edges) else exact
    return _decided(home, edges.reset_index(drop=True), link_id, "cut", by)


def decide(home: Path, link_id: str, *, accept: bool, by: str) -> Decision:
    """Say whether the two of a pair are one person. What was linked, rejected or cut before can be decided anew.

    An accepted link is known since the newest of the home's links was. Raises InputError for a pair that is not in the table of edges.
    """
    edges = tables.read(home, tables.IDENTITY_EDGES)
    row = edges[edges["link_id"] == link_id]
    if row.empty:
        raise InputError("identity: a pair of the review queue was expected, none has that link id; see `rapport identity reviews`")
    if accept and (row["state"] != "link").any():
        edges.loc[row.index, "created_timestamp"] = newest(home)
    return _decided(home, edges, link_id, "link" if accept else "reject", by)


def _decided(home: Path, edges: pd.DataFrame, which: str, state: str, by: str) -> Decision:
    chosen = edges["link_id"] == which
    edges = edges.assign(state=edges["state"].mask(chosen, state), decided_by=edges["decided_by"].astype("object").mask(chosen, by))
    tables.write(home, tables.IDENTITY_EDGES, edges)
    link = _link(next(edges[chosen].itertuples(index=False)))
    joins = deterministic.joins(tables.read(home, tables.IDENTITY_LINKS), edges=edges)
    names = pd.Index(pd.unique(np.append(joins[["left", "right"]].to_numpy().ravel(), [link.left, link.right])))
    stands_for = spanning.union(len(names), *(names.get_indexer(pd.Index(joins[side])).tolist() for side in ("left", "right")))[0]
    one, other = names.get_indexer(pd.Index([link.left, link.right])).tolist()
    return Decision(link, stands_for(one) == stands_for(other))


def _exact(home: Path, which: str) -> pd.DataFrame:
    """The row of the table of edges that a link between two identifiers that were seen together would have."""
    joins = deterministic.joins(tables.read(home, tables.IDENTITY_LINKS))
    named = [link_id(left, right) == which for left, right in zip(joins["left"], joins["right"], strict=True)]
    found = joins[named]
    if found.empty:
        raise InputError(
            "identity: a link was expected, none has that link id; `rapport identity explain CUSTOMER` shows those of a person"
        )
    return found.assign(link_id=which, kind="manual", state="link", weight=1.0, evidence=_SEEN_TOGETHER, decided_by=None)


def _path(links: pd.DataFrame, edges: pd.DataFrame, mine: Sequence[str]) -> list[Link]:
    """The earliest links that connect them all, oldest first."""
    joins = deterministic.joins(links, edges=edges)
    joins = joins[joins["left"].isin(mine) & joins["right"].isin(mine)].sort_values(["created_timestamp", "left", "right"])
    names = pd.Index(mine)
    ends = [names.get_indexer(pd.Index(joins[side])).tolist() for side in ("left", "right")]
    rows = {row.link_id: row for row in edges[edges["state"] == "link"].itertuples(index=False)}
    path = []
    for left, right, known in joins.iloc[spanning.union(len(names), *ends)[1]].itertuples(index=False):
        row = rows.get(link_id(left, right))
        if row is not None:  # found or decided, and perhaps seen together as well
            path.append(_link(row))
        else:
            path.append(Link(link_id(left, right), left, right, EXACT, "link", 1.0, _SEEN_TOGETHER, None, known.to_pydatetime()))
    return path


def _links_of(home: Path, mine: Sequence[str]) -> pd.DataFrame:
    """The stored links that name them, and those that say whether an address in these is shared by many."""
    links = tables.read_arrow(home, tables.IDENTITY_LINKS)
    near = links.filter(_naming(links, mine))
    contacts = [name for column in ("user_id", "email", "phone") for name in pc.unique(near[column].drop_null()).to_pylist() if ":" in name]
    frame: pd.DataFrame = links.filter(pc.or_(_naming(links, mine), _naming(links, contacts))).to_pandas()
    return frame


def _naming(links: pa.Table, names: Sequence[str]) -> pa.Array:
    """Whether a row names one of the identifiers; columns of user ids and devices hold them without their kind."""
    masks = []
    for column in ("user_id", "email", "phone", "anonymous_id"):
        bare = (
            [name.removeprefix(f"{column}:") for name in names if name.startswith(f"{column}:")]
            if column in ("user_id", "anonymous_id")
            else []
        )
        whole = [name for name in names if name.startswith(("email:", "phone:"))] if column != "anonymous_id" else []
        masks.append(pc.is_in(links[column], pa.array(bare + whole, pa.string())))
    return functools.reduce(pc.or_, masks)


def _link(row: Any) -> Link:
    created = row.created_timestamp.to_pydatetime()
    return Link(row.link_id, row.left, row.right, row.kind, row.state, float(row.weight), row.evidence, row.decided_by, created)
