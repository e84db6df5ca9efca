"""Clean events -> churn, intent and interaction labels. Reads nothing after cut-off + gap + horizon, or after `as_of`.

Churn and ranking look forward from cut-offs that are counted back from `as_of`; intent looks forward inside a session.
Roles follow time: the test lies after the validation, the validation after the training. Consent is needed twice: when
the label's instant passed, and now. Data that cannot carry a label raise NotTrainable with the counts that say why.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from models.task import LABELLED, TICK, Task, follows
from pipelines import consent, horizon, tables
from pipelines.errors import InputError, NotTrainable
from pipelines.events import WEIGHTS
from pipelines.settings import LabelSettings, Settings
from pipelines.windows import NOT_BEHAVIOUR

SPLITS = ("train", "validation", "test")
EVERYBODY_BUYS = 0.99  # above this share of buyers a log with views was drawn by purchase: its rate is not the shop's

_EVENT_COLUMNS = ["event_id", "type", "event_timestamp", "created_timestamp", "customer_id", "item_id", "session_id"]


@dataclass(frozen=True)
class Cutoff:
    """The last moment seen, and the role of the rows that are labelled from it."""

    at: pd.Timestamp
    split: str


@dataclass(frozen=True)
class Ranking:
    """What was known at a cut-off, and what was then bought. Rows are `customers`, columns `items`, in all matrices.

    relevant: 1 where they bought. worth: the weight of what they did with it that weighs most, 1 where they bought.
    """

    at: pd.Timestamp
    customers: np.ndarray
    items: np.ndarray  # available at the cut-off; what came later cannot be ranked
    history: sparse.csr_matrix
    relevant: sparse.csr_matrix
    worth: sparse.csr_matrix


@dataclass(frozen=True)
class LabelReport:
    """Rows and base rate of each label table, by model; `why` holds the reason where a model has no labels."""

    rows: dict[str, int] = field(default_factory=dict)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    base_rate: dict[str, float] = field(default_factory=dict)
    churn_horizon_days: int | None = None
    why: dict[str, str] = field(default_factory=dict)


def build(home: Path, *, settings: Settings, as_of: datetime) -> LabelReport:
    """Write the three label tables of `home` as of `as_of`. A model that cannot be trained gets an empty table.

    Events and consents are those of one moment; an ingest may go on meanwhile.
    """
    with tables.snapshot(home, (tables.EVENTS, tables.CONSENTS)) as seen:
        events, consents = tables.read(seen, tables.EVENTS, _EVENT_COLUMNS), tables.read(seen, tables.CONSENTS)
    report = LabelReport()
    for name, table, make in (
        ("churn", tables.LABELS_CHURN, churn),
        ("intent", tables.LABELS_INTENT, intent),
        ("recommender", tables.INTERACTIONS, interactions),
    ):
        try:
            frame = make(events, consents, settings=settings, as_of=as_of)
        except NotTrainable as reason:
            report.why[name] = str(reason)
            frame = pd.DataFrame(columns=_columns(table))
        report.rows[name] = tables.write(home, table, frame)
        if "label" in frame and len(frame):
            report.base_rate[name] = float(frame["label"].mean())
            report.splits[name] = {str(split): int(n) for split, n in frame["split"].value_counts().items()}
            if name == "churn":
                report = replace(report, churn_horizon_days=horizon.of_rows(frame, settings=settings))
    return report


def churn(events: pd.DataFrame, consents: pd.DataFrame, *, settings: Settings, as_of: datetime) -> pd.DataFrame:
    """One row per cut-off and customer active before it; label 1 where no `churn_event` follows within the horizon.

    Columns of tables.LABELS_CHURN. Where the settings name no horizon, it is that of `pipelines.horizon`. Raises NotTrainable.
    """
    known, options = _known(events, as_of), settings.labels
    acts = known[known["type"] == options.churn_event]
    if acts.empty:
        raise NotTrainable(f"the log holds no {options.churn_event} event, and churn is the absence of that event")
    if options.churn_horizon_days is None:
        settings = horizon.chosen(acts, known["event_timestamp"].min(), as_of, settings=settings)
    cutoffs = churn_cutoffs(known["event_timestamp"].min(), as_of, settings=settings)
    rows = pd.concat([_churn_rows(acts, cutoff, settings=settings) for cutoff in cutoffs], ignore_index=True)
    rows = _consenting(rows, consents, settings=settings, as_of=as_of)
    _require_both_classes(rows, options, positive=f"customers without a later {options.churn_event}")
    return rows.sort_values(["event_timestamp", "customer_id"], ignore_index=True)


def churn_cutoffs(start: datetime, as_of: datetime, *, settings: Settings) -> tuple[Cutoff, ...]:
    """Test, validation and training cut-offs, newest first. No label window of one role reaches into the next role's.

    A training cut-off needs one horizon of log before it. Raises NotTrainable where not even one fits.
    """
    options = settings.labels
    silence = timedelta(days=horizon.of_settings(settings))
    window = timedelta(days=options.churn_gap_days) + silence
    newest, first = pd.Timestamp(as_of), pd.Timestamp(start)
    step = max(timedelta(days=7), silence / 4)
    past = [newest - 3 * window - k * step for k in range(options.churn_cutoffs)]
    usable = [at for at in past if at - silence >= first]
    if not usable:
        needed, found = (3 * window + silence).days, (newest - first).total_seconds() / 86_400
        raise NotTrainable(
            f"the log covers {found:.1f} days and {needed} are needed: a horizon of {silence.days} days (gap "
            f"{options.churn_gap_days}) for each of training, validation and test, and one of history"
        )
    return (Cutoff(newest - window, "test"), Cutoff(newest - 2 * window, "validation"), *(Cutoff(at, "train") for at in usable))


def churn_population(events: pd.DataFrame, at: datetime, *, settings: Settings) -> pd.DataFrame:
    """Who can churn at `at`: customers with a `churn_event` in the activity window that was known by then.

    Columns customer_id, event_timestamp (= `at`), sorted by customer.
    """
    options, cut = settings.labels, pd.Timestamp(at)
    seen = events[(events["type"] == options.churn_event) & (events["event_timestamp"] <= cut) & (events["created_timestamp"] <= cut)]
    active = seen[seen["event_timestamp"] > cut - timedelta(days=options.churn_active_days)]
    return pd.DataFrame({"customer_id": np.sort(active["customer_id"].dropna().unique()), "event_timestamp": cut})


def intent(
    events: pd.DataFrame, consents: pd.DataFrame, *, settings: Settings, as_of: datetime, horizon_hours: float | None = None
) -> pd.DataFrame:
    """One row per decision point; label 1 where a purchase follows in the same session, or in any within `horizon_hours`.

    Columns of tables.LABELS_INTENT. A session belongs to the role in whose time it was finished, whole. With a horizon no label window
    reaches into the next role's time: rows whose window would are left out. Raises NotTrainable.
    """
    known = _known(events, as_of)
    _require_browsing(known)
    rows = decision_points(known, settings=settings)
    if horizon_hours is not None:
        within = pd.Timedelta(horizon_hours, "h")
        rows["label"] = follows(rows, known[known["type"] == "purchase"], within=within)
        rows["matured_timestamp"] = rows["event_timestamp"] + within
    rows = rows[rows["matured_timestamp"] <= pd.Timestamp(as_of)]
    rows = _consenting(rows, consents, settings=settings, as_of=as_of)
    if horizon_hours is None:
        rows["split"] = _split_by_time(rows["matured_timestamp"], known["event_timestamp"].min(), as_of, settings.labels.intent_test_share)
    else:
        rows = _split_apart(rows, share=settings.labels.intent_test_share)
    _require_both_classes(rows, settings.labels, positive="decision points before a purchase")
    return rows[_columns(tables.LABELS_INTENT)].sort_values(["event_timestamp", "customer_id"], ignore_index=True)


def declared(task: Task, events: pd.DataFrame, consents: pd.DataFrame, *, settings: Settings, as_of: datetime) -> pd.DataFrame:
    """The rows of a task that defines its own label, with their `split`: `models.task.LABELLED` and split, sorted by time and customer.

    Rows that are not known at `as_of` are left out, and so are those whose label window reaches into the next role's time, and people
    without consent. Raises NotTrainable; InputError where what the task's label gives is none; ValueError where it declares none.
    """
    if task.label is None:
        raise ValueError(f"labels: expected a task that defines its label, found {task.name}")
    rows = _labelled(task, task.label(_known(events, as_of)))
    rows = rows[rows["matured_timestamp"] <= pd.Timestamp(as_of)]
    rows = _split_apart(_consenting(rows, consents, settings=settings, as_of=as_of), share=settings.labels.intent_test_share)
    _require_both_classes(rows, settings.labels, positive="positive labels")
    return rows.sort_values(["event_timestamp", "customer_id"], ignore_index=True)


def decision_points(events: pd.DataFrame, *, settings: Settings) -> pd.DataFrame:
    """The instants at which a session could be acted upon: after its n-th event, none once a purchase was made.

    Columns customer_id, event_timestamp (just after we knew the event), session_id, session_events, label,
    matured_timestamp (the session's last event + the silence that ends it). One row per customer and instant.
    """
    moments = _moments(events)
    session = moments.groupby(["customer_id", "session_id"], sort=False)
    reached = session["n"].cumsum().to_numpy()
    points = np.sort(np.asarray(settings.labels.intent_points))
    is_point = np.searchsorted(points, reached, "right") > np.searchsorted(points, reached - moments["n"].to_numpy(), "right")
    silence = pd.Timedelta(settings.ingest.session_gap_minutes, "min")
    knew = session["created_timestamp"].cummax().clip(lower=moments["event_timestamp"])
    rows = pd.DataFrame(
        {
            "customer_id": moments["customer_id"],
            "event_timestamp": knew + TICK,
            "session_id": moments["session_id"],
            "session_events": reached,
            "label": moments["purchase_timestamp"].notna().astype("int64"),
            "matured_timestamp": session["event_timestamp"].transform("max") + silence,
        }
    )
    # An event learnt after the session went silent was no occasion to act; nor is any once the first purchase was made.
    in_time = knew - moments["event_timestamp"] <= silence
    is_open = moments["purchase_timestamp"].isna() | (moments["purchase_timestamp"] > rows["event_timestamp"])
    rows = rows[is_point & in_time & is_open]
    unique: pd.DataFrame = rows.drop_duplicates(["customer_id", "event_timestamp"], keep="last").reset_index(drop=True)
    return unique


def interactions(events: pd.DataFrame, consents: pd.DataFrame, *, settings: Settings, as_of: datetime) -> pd.DataFrame:
    """One row per view, addition to a cart and purchase of an item, with its weight, in time order.

    Several of one instant all count, as they do in the online store, which adds up what happened and forgets when. Columns of
    tables.INTERACTIONS. Raises NotTrainable where the ranking windows hold too few purchases.
    """
    known = _known(events, as_of)
    rows = known[known["type"].isin(WEIGHTS) & known["item_id"].notna()]
    rows = rows.assign(weight=rows["type"].map(WEIGHTS).astype(float))
    rows = rows.sort_values(["event_timestamp", "customer_id", "item_id", "weight"], kind="stable")
    people = pd.DataFrame({"customer_id": rows["customer_id"].unique(), "event_timestamp": pd.Timestamp(as_of)})
    people = people[_is_allowed(people, consents, settings=settings)]
    rows = rows[rows["customer_id"].isin(people["customer_id"])][_columns(tables.INTERACTIONS)].reset_index(drop=True)
    for cutoff in ranking_cutoffs(as_of, settings=settings):
        _require_ranking(rows, cutoff, settings=settings)
    return rows


def ranking_cutoffs(as_of: datetime, *, settings: Settings) -> tuple[Cutoff, Cutoff]:
    """The test and validation cut-offs of ranking, newest first: one and two horizons before `as_of`."""
    newest, window = pd.Timestamp(as_of), timedelta(days=settings.labels.ranking_horizon_days)
    return Cutoff(newest - window, "test"), Cutoff(newest - 2 * window, "validation")


def ranking(frame: pd.DataFrame, items: pd.DataFrame, *, at: datetime, settings: Settings, half_life_days: float | None = None) -> Ranking:
    """Interactions known before `at` against purchases, and weaker interactions, in the horizon after it.

    frame: columns of tables.INTERACTIONS; items: of tables.ITEMS, may be empty (then an item exists from its first
    interaction). `half_life_days`: older interactions weigh less. Customers: all with history, sorted.
    """
    cut, window = pd.Timestamp(at), timedelta(days=settings.labels.ranking_horizon_days)
    past = frame[(frame["event_timestamp"] < cut) & (frame["created_timestamp"] < cut)]
    offered = items.loc[items["event_timestamp"] <= cut, "item_id"]
    later = frame[(frame["event_timestamp"] > cut) & (frame["event_timestamp"] <= cut + window)]
    later = later.sort_values("weight", kind="stable").drop_duplicates(["customer_id", "item_id"], keep="last")
    weight = past["weight"].to_numpy(dtype=float)
    if half_life_days is not None:
        age_days = (cut - past["event_timestamp"]).dt.total_seconds().to_numpy() / 86_400
        weight = weight * np.exp2(-age_days / half_life_days)
    customers = np.sort(past["customer_id"].unique())
    names = np.unique(np.concatenate([past["item_id"].to_numpy(dtype=object), offered.to_numpy(dtype=object)]))
    history = _matrix(past, weight, customers, names)
    worth = _matrix(later, later["weight"].to_numpy(dtype=float), customers, names)
    bought = later[later["type"] == "purchase"]
    relevant = _matrix(bought, np.ones(len(bought)), customers, names)
    return Ranking(cut, customers, names, history, relevant, worth)


# -- private -----------------------------------------------------------------------------------------------------------


def _columns(table: tables.Table) -> list[str]:
    return [] if table.schema is None else list(table.schema.names)


def _labelled(task: Task, found: object) -> pd.DataFrame:
    """What the task's label gave, if it is what `models.task.Task` asks for; labels as whole numbers."""
    if not isinstance(found, pd.DataFrame) or not set(LABELLED) <= set(found):
        had = f"the columns {[str(name) for name in found]}" if isinstance(found, pd.DataFrame) else f"the type {type(found).__name__}"
        raise InputError(f"labels: the label of task {task.name} is to give a frame with {', '.join(LABELLED)}; it gave {had}")
    rows = found[list(LABELLED)]
    for name in ("event_timestamp", "matured_timestamp"):
        if not isinstance(rows[name].dtype, pd.DatetimeTZDtype):
            raise InputError(f"labels: the label of task {task.name} is to give {name} in UTC; it gave {rows[name].dtype}")
    wrong = {
        "a customer_id or a timestamp is null": rows[["customer_id", "event_timestamp", "matured_timestamp"]].isna().any(axis=1),
        "the label is not 0 or 1": ~rows["label"].isin([0, 1]),
        "the label is known before it is asked for": rows["matured_timestamp"] < rows["event_timestamp"],
    }
    for said, is_wrong in wrong.items():
        if is_wrong.any():
            raise InputError(f"labels: the label of task {task.name} gave {len(rows):,} rows, and in {int(is_wrong.sum()):,} {said}")
    return rows.astype({"label": "int64"})


def _known(events: pd.DataFrame, as_of: datetime) -> pd.DataFrame:
    """Events that had happened, and that we knew of, at `as_of`."""
    cut = pd.Timestamp(as_of)
    return events[(events["event_timestamp"] <= cut) & (events["created_timestamp"] <= cut) & events["customer_id"].notna()]


def _churn_rows(acts: pd.DataFrame, cutoff: Cutoff, *, settings: Settings) -> pd.DataFrame:
    rows = churn_population(acts, cutoff.at, settings=settings)
    opens = cutoff.at + timedelta(days=settings.labels.churn_gap_days)
    closes = opens + timedelta(days=horizon.of_settings(settings))
    later = acts.loc[(acts["event_timestamp"] > opens) & (acts["event_timestamp"] <= closes), "customer_id"]
    gone = ~rows["customer_id"].isin(later.unique())
    return rows.assign(label=gone.astype("int64"), split=cutoff.split, matured_timestamp=closes)


def _moments(events: pd.DataFrame) -> pd.DataFrame:
    """Sessions instant by instant: events of one instant are one moment, since nobody can act between them."""
    rows = events[~events["type"].isin(NOT_BEHAVIOUR) & events["session_id"].notna()]
    keys = ["customer_id", "session_id"]
    moments = rows.groupby([*keys, "event_timestamp"], sort=True).agg(n=("type", "size"), created_timestamp=("created_timestamp", "max"))
    moments = moments.reset_index()
    bought = rows[rows["type"] == "purchase"].groupby(keys)["event_timestamp"].min()
    return moments.merge(bought.rename("purchase_timestamp").reset_index(), on=keys, how="left")


def _split_by_time(when: pd.Series, start: datetime, as_of: datetime, share: float) -> np.ndarray:
    newest = pd.Timestamp(as_of)
    part = (newest - pd.Timestamp(start)) * share
    return np.select([when <= newest - 2 * part, when <= newest - part], SPLITS[:2], SPLITS[2])


def _split_apart(rows: pd.DataFrame, *, share: float) -> pd.DataFrame:
    """Rows with their role by time. Between two roles lies the longest label window, whose rows are left out: no label reaches over."""
    if rows.empty:
        return rows.assign(split=pd.Series(dtype="object"))
    at, window = rows["event_timestamp"], (rows["matured_timestamp"] - rows["event_timestamp"]).max()
    last = at.max()
    part = max((last - at.min() - 2 * window) * share, pd.Timedelta(0))
    test, validation, train = last - part, last - part - window, last - 2 * part - window
    split = np.select([at > test, (at > train) & (at <= validation), at <= train - window], SPLITS[::-1], "")
    kept: pd.DataFrame = rows.assign(split=split)[split != ""].reset_index(drop=True)
    return kept


def _consenting(rows: pd.DataFrame, consents: pd.DataFrame, *, settings: Settings, as_of: datetime) -> pd.DataFrame:
    """The rows whose customer allowed it at the row's instant and still does at `as_of`."""
    then = _is_allowed(rows, consents, settings=settings)
    now = _is_allowed(rows.assign(event_timestamp=pd.Timestamp(as_of)), consents, settings=settings)
    kept: pd.DataFrame = rows[then & now].reset_index(drop=True)
    return kept


def _is_allowed(rows: pd.DataFrame, consents: pd.DataFrame, *, settings: Settings) -> np.ndarray:
    if rows.empty:
        return np.zeros(0, dtype=bool)
    return np.asarray(consent.state_at(consents, rows[["customer_id", "event_timestamp"]], purpose=settings.consent.purpose), dtype=bool)


def _require_browsing(known: pd.DataFrame) -> None:
    """Raises NotTrainable where sessions show no browsing, or every customer bought because that is how they were drawn."""
    viewers = known.loc[known["type"] == "view", "customer_id"]
    if viewers.empty:
        raise NotTrainable(
            f"the log holds {len(known):,} events and no view among them, so no session has a decision point before a purchase"
        )
    customers = known["customer_id"].nunique()
    buyers = known.loc[known["type"] == "purchase", "customer_id"].nunique()
    if buyers > EVERYBODY_BUYS * customers:
        raise NotTrainable(
            f"{buyers:,} of the log's {customers:,} customers are buyers although it holds {len(viewers):,} views: customers were drawn by "
            "their purchases, so the rate of purchase is an artefact of the sample; give a log that holds visitors who did not buy"
        )


def _require_both_classes(rows: pd.DataFrame, options: LabelSettings, *, positive: str) -> None:
    """Raises NotTrainable, naming each split that is too small, with its counts."""
    labels = rows.groupby("split")["label"].agg(["size", "sum"]).reindex(list(SPLITS), fill_value=0)
    rarer = np.minimum(labels["sum"], labels["size"] - labels["sum"])
    short = labels[(labels["size"] < options.min_rows) | (rarer < options.min_class_rows)]
    if short.empty:
        return
    found = "; ".join(f"{split} has {row['size']:,} rows with {row['sum']:,} {positive}" for split, row in short.iterrows())
    prior = float(rows["label"].mean()) if len(rows) else None
    raise NotTrainable(f"each split needs {options.min_rows} rows and {options.min_class_rows} of each class: {found}", prior=prior)


def _require_ranking(rows: pd.DataFrame, cutoff: Cutoff, *, settings: Settings) -> None:
    options = settings.labels
    past = rows[(rows["event_timestamp"] < cutoff.at) & (rows["created_timestamp"] < cutoff.at)]
    closes = cutoff.at + timedelta(days=options.ranking_horizon_days)
    buys = rows[(rows["type"] == "purchase") & (rows["event_timestamp"] > cutoff.at) & (rows["event_timestamp"] <= closes)]
    if past["item_id"].nunique() == 1:
        raise NotTrainable(
            f"all {len(past):,} interactions before the {cutoff.split} cut-off {cutoff.at:%Y-%m-%d} are with one item: there is no choice"
        )
    people = buys.loc[buys["customer_id"].isin(past["customer_id"].unique()), "customer_id"].nunique()
    if len(past) >= options.min_rows and people >= options.min_class_rows:
        return
    raise NotTrainable(
        f"the {cutoff.split} cut-off {cutoff.at:%Y-%m-%d} has {len(past):,} interactions before it and {people:,} of those customers "
        f"buying in the {options.ranking_horizon_days} days after it; {options.min_rows} and {options.min_class_rows} are needed"
    )


def _matrix(rows: pd.DataFrame, weight: np.ndarray, customers: np.ndarray, items: np.ndarray) -> sparse.csr_matrix:
    """Weights summed per customer and item; rows of unknown customers or items are outside the matrix and left out."""
    u, i = pd.Index(customers).get_indexer(pd.Index(rows["customer_id"])), pd.Index(items).get_indexer(pd.Index(rows["item_id"]))
    inside = (u >= 0) & (i >= 0)
    matrix = sparse.csr_matrix((weight[inside], (u[inside], i[inside])), shape=(len(customers), len(items)))
    matrix.sum_duplicates()
    return matrix
