"""What people told of themselves -> pairs that are probably one person, each with its probability and its evidence.

In: names, addresses, dates of birth, phone numbers and e-mail addresses, in memory. Out: pairs to link, and pairs for a person to
review; `run` reads the vault and writes the table of edges. How pairs are weighed: `agreement`.
Never writes a trait anywhere: what is stored of a pair are the level of agreement of each field and its weight in bits.

Two people of one household agree on all that a household shares. So a link needs agreement on what is a person's own, their first
name, date of birth or e-mail address (`personal_bits`); without it a pair goes to review, and teaches the model nothing. Twins who
live together, and a child named like a parent, remain the hard cases: review is where they should be looked at.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field
from scipy import sparse
from scipy.cluster import hierarchy
from scipy.sparse import csgraph

from pipelines import tables
from pipelines.identity import agreement
from pipelines.identity.agreement import FIELDS
from pipelines.identity.deterministic import link_id, resolve
from pipelines.identity.graph import newest
from pipelines.vault import IDENTIFIERS, Vault

_PAIR_COLUMNS = ["left", "right", "state", "probability", "weight", "evidence"]
_APART_BITS = -5.0  # weight of a pair within a component that no blocking key brought together, or that is improbable
_NEVER_BITS = -1e6  # of a pair that a person cut or rejected
_FROM_WHOLE_NAME = -1  # time of a first name taken from a whole one: what was told apart is newer


class LinkageSettings(BaseModel):
    """When two records are one person."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    link_probability: float = Field(0.99, ge=0.5, le=1, description="pairs at least this probable are linked")
    review_probability: float = Field(0.5, ge=0.01, le=1, description="less probable pairs, down to this, wait for a person to decide")
    personal_bits: float = Field(2.0, ge=-50, le=50, description="weight of the personal fields together that a link needs, in bits")
    max_block: int = Field(200, ge=2, le=10_000, description="a blocking key that more records share brings no pairs together")
    sample_pairs: int = Field(400_000, ge=1_000, le=100_000_000, description="random pairs from which chance agreement is estimated")
    prior_pairs: float = Field(30.0, gt=0, description="pairs that the expected agreement within a person counts as, beside the data")
    seed: int = Field(7, ge=0, description="of the random pairs")


@dataclass(frozen=True)
class Linkage:
    """What was found. `prior`: the estimated probability that two random records are one person.

    pairs: left < right (identifiers of records), state (link or review), probability, weight (bits), evidence (JSON text: field ->
    [level of agreement, bits]); sorted.
    """

    pairs: pd.DataFrame
    records: int
    prior: float


@dataclass(frozen=True)
class LinkageRun:
    """What a run wrote: links and reviews; the pairs found that somebody had decided before; and the records compared."""

    records: int
    links: int
    reviews: int
    decided: int


def link(records: pd.DataFrame, *, settings: LinkageSettings | None = None, apart: Sequence[tuple[str, str]] = ()) -> Linkage:
    """The pairs of records that are probably one person. Same records, in any order, same answer.

    records: `identifier` (unique), and any of agreement.FIELDS as text, null where unknown; other columns are not looked at.
    apart: pairs of identifiers that no chain of links may join. Fewer than two records, no pairs.
    """
    settings = settings or LinkageSettings()
    if len(records) < 2:
        return Linkage(_no_pairs(), len(records), 0.0)
    with _connected() as db, _quiet():
        fields = agreement.prepare(db, records, max_block=settings.max_block)
        if not fields:
            return Linkage(_no_pairs(), len(records), 0.0)
        model = agreement.train(db, fields, **settings.model_dump(include={"sample_pairs", "prior_pairs", "personal_bits", "seed"}))
        found = agreement.score(db, model, fields, least=min(settings.review_probability, settings.link_probability))
    enough = (found["probability"] >= settings.link_probability) & (found["personal"] >= settings.personal_bits)
    found = found.assign(state=np.where(enough, "link", "review"))
    found.loc[_bridges(found, apart), "state"] = "review"
    return Linkage(found[_PAIR_COLUMNS], len(records), float(model["probability_two_random_records_match"]))


def run(home: Path, *, settings: LinkageSettings | None = None, vault: Vault) -> LinkageRun:
    """Compare everybody with everybody on what the vault holds, and write the links and reviews that come of it.

    Replaces what earlier runs found; an edge that is found again keeps its time, a new one is known since the newest of the home's
    links was. People between whom somebody decided stay as was decided. Customers change with the next `ingest.reassign`.
    """
    edges = tables.read(home, tables.IDENTITY_EDGES)
    decided, earlier = edges[edges["decided_by"].notna()], edges[edges["decided_by"].isna()]
    # Without what earlier runs found, so that a run finds the same again.
    people = resolve(tables.read(home, tables.IDENTITY_LINKS), edges=decided).drop_duplicates("identifier", keep="last")
    records = _records(vault, people)
    whose = people.set_index("identifier")["customer_id"]
    teller = records.set_index("customer_id")["identifier"]
    settled = pd.DataFrame({side: decided[side].map(whose).to_numpy() for side in ("left", "right")}, dtype="object")
    is_apart = (decided["state"] != "link").to_numpy() & settled.notna().all(axis=1).to_numpy()
    apart = settled[is_apart].apply(lambda customers: customers.map(teller)).dropna()
    pairs = link(records, settings=settings, apart=list(apart.itertuples(index=False, name=None))).pairs
    known = {frozenset(pair) for pair in settled.itertuples(index=False, name=None)}
    ends = zip(pairs["left"].map(whose), pairs["right"].map(whose), strict=True)
    is_settled = np.fromiter((frozenset(pair) in known for pair in ends), bool, len(pairs))
    fresh = _rows(pairs[~is_settled], earlier, newest(home))
    tables.write(home, tables.IDENTITY_EDGES, pd.concat([decided, fresh]) if len(decided) else fresh)
    is_link = fresh["state"] == "link"
    return LinkageRun(len(records), int(is_link.sum()), int((~is_link).sum()), int(is_settled.sum()))


def _bridges(found: pd.DataFrame, apart: Sequence[tuple[str, str]]) -> np.ndarray:
    """Which links only a chain holds: within each component, people are formed by average linkage, over all their pairs.

    One wrong link between two people's records does not make one of them: the other pairs speak against it.
    """
    names = pd.Index(pd.unique(found[["left", "right"]].to_numpy().ravel()))
    left, right = names.get_indexer(pd.Index(found["left"])), names.get_indexer(pd.Index(found["right"]))
    linked = (found["state"] == "link").to_numpy()
    graph = sparse.coo_array((np.ones(linked.sum(), np.int8), (left[linked], right[linked])), shape=(len(names), len(names)))
    component = csgraph.connected_components(graph, directed=False)[1]
    far = np.array([names.get_indexer(pd.Index(pair)) for pair in apart], np.int64).reshape(-1, 2)
    far = far[(far >= 0).all(axis=1)]
    far = far[component[far[:, 0]] == component[far[:, 1]]]
    doubtful = (np.bincount(component, minlength=1) > 2)[component]
    doubtful[far.ravel()] = True
    pairs = pd.DataFrame({"component": component[left], "left": left, "right": right, "bits": found["weight"]})
    inside = pairs[(component[left] == component[right]) & doubtful[left] & doubtful[right]]
    members = pd.Series(np.arange(len(names))).groupby(component).indices
    part = np.zeros(len(names), np.int64)
    for number, some in inside.groupby("component"):
        at = np.asarray(members[number])
        part[at] = _parts(at, some, far[component[far[:, 0]] == number])
    return np.asarray(linked & (part[left] != part[right]))


def _parts(at: np.ndarray, pairs: pd.DataFrame, far: np.ndarray) -> np.ndarray:
    """(len(at),) the person of each record of a component."""
    bits = np.full((len(at), len(at)), _APART_BITS)
    rows, columns = np.searchsorted(at, pairs["left"]), np.searchsorted(at, pairs["right"])
    bits[rows, columns] = bits[columns, rows] = pairs["bits"]
    one, other = np.searchsorted(at, far[:, 0]), np.searchsorted(at, far[:, 1])
    bits[one, other] = bits[other, one] = _NEVER_BITS
    highest = bits.max()
    tree = hierarchy.linkage((highest - bits)[np.triu_indices(len(at), 1)], "average")
    return np.asarray(hierarchy.fcluster(tree, highest, "distance"))


def _records(vault: Vault, people: pd.DataFrame) -> pd.DataFrame:
    """One row per person with at least two known fields: customer_id, FIELDS, and as `identifier` the one that told the most."""
    told = [(fact.subject, fact.kind, fact.value, fact.event_us) for fact in vault.facts()]
    facts = pd.DataFrame(told, columns=["identifier", "field", "value", "us"])
    facts = pd.concat([facts, *_names(facts)])
    facts = facts[facts["field"].isin(FIELDS)].merge(people[["identifier", "customer_id"]], on="identifier")
    last = facts.sort_values(["us", "value"], kind="stable").drop_duplicates(["customer_id", "field"], keep="last")
    wide = last.pivot(index="customer_id", columns="field", values="value")
    counted = facts.groupby(["customer_id", "identifier"])["field"].nunique().reset_index()
    kind = counted["identifier"].str.split(":").str[0].map({kind: place for place, kind in enumerate(IDENTIFIERS)})
    counted = counted.assign(kind=kind).sort_values(["field", "kind", "identifier"], ascending=[False, True, True])
    wide = wide.assign(identifier=counted.drop_duplicates("customer_id").set_index("customer_id")["identifier"])
    return wide[wide.notna().sum(axis=1) > 2].rename_axis(columns=None).reset_index()


def _names(facts: pd.DataFrame) -> list[pd.DataFrame]:
    """First and last names from whole ones."""
    whole = facts[facts["field"] == "name"]
    parts = whole["value"].str.strip().str.split(n=1, expand=True).reindex(columns=[0, 1])
    named = [whole.assign(field=field, value=parts[at], us=_FROM_WHOLE_NAME) for at, field in enumerate(("first_name", "last_name"))]
    return [some[some["value"].notna()] for some in named]


def _rows(pairs: pd.DataFrame, earlier: pd.DataFrame, known: pd.Timestamp) -> pd.DataFrame:
    """The pairs as rows of the table of edges."""
    rows = pairs.drop(columns="weight").rename(columns={"probability": "weight"})
    rows = rows.merge(earlier[["left", "right", "state", "created_timestamp"]], on=["left", "right", "state"], how="left")
    created = pd.to_datetime(rows["created_timestamp"], utc=True).fillna(known)
    ids = [link_id(left, right) for left, right in zip(rows["left"], rows["right"], strict=True)]
    nobody = pd.Series(None, index=rows.index, dtype="object")
    return rows.assign(link_id=ids, kind="probabilistic", decided_by=nobody, created_timestamp=created.astype("datetime64[us, UTC]"))


def _no_pairs() -> pd.DataFrame:
    kinds = dict.fromkeys(_PAIR_COLUMNS, "object") | {"probability": "float64", "weight": "float64"}
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in kinds.items()})


@contextmanager
def _connected() -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in memory that never spills: traits do not touch a disk. One thread, so that sums come out the same."""
    with duckdb.connect(":memory:") as db:
        db.execute("SET threads = 1; SET temp_directory = ''; SET enable_progress_bar = false").fetchall()
        yield db


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("splink")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
