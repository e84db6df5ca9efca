"""Features of consenting customers as of now -> segments that are really there, a version of their model, and everybody's segment.

One half of the customers finds segments, the other half tells how good they are beside the tiers of recency, frequency and money;
then everybody finds them once more, which is what is stored and used. Names are those of the champion where a segment is the same.
Never uses data of somebody who does not allow it now, and never invents segments where customers do not fall into groups.
"""

from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models import evaluation
from models.evaluation import mean_difference
from models.segments import Lifecycle, RfmEdges, Segmenter, WeakStructure, behaviour, movement
from models.segments.rfm import TIERS
from models.segments.segmenter import MIN_CUSTOMERS
from pipelines import consent, engine, feature_store, registry, tables, tracking
from pipelines.engine import literal
from pipelines.errors import InputError, NotTrainable, RegistryError
from pipelines.registry import Champion
from pipelines.settings import Settings
from pipelines.training import curves, gate
from pipelines.training.fingerprint import fingerprint
from pipelines.training.gate import Verdict
from pipelines.training.publishing import Fitted, Quality, code_hash, consent_record, finite, signature_rows

NAME = "segments"
FEATURE_SERVICE = "churn_v1"
METRIC = "silhouette"
JUDGED = 2_000  # customers of the test half: a silhouette needs all their distances

_KEYS = ["customer_id", "event_timestamp"]


def fit(home: Path, *, settings: Settings, as_of: datetime, progress: Callable[[int, int], None]) -> tuple[Fitted, tracking.Run]:
    """The segments of everybody, tested once on the other half, and their open run. Raises NotTrainable."""
    frame = read_rows(home, settings=settings, as_of=as_of)
    if len(frame) < 2 * MIN_CUSTOMERS:
        needed = f"{2 * MIN_CUSTOMERS} customers who allow it, one half to find segments and one to judge them"
        raise NotTrainable(f"it takes {needed}; found {len(frame)}")
    rows = _behaviour(frame)
    seed, earlier = settings.training.seed, _sound_versions(home)
    digest = fingerprint(rows)
    params = Segmenter(random_state=seed).get_params()
    study = f"{NAME}/{fingerprint(digest, code_hash(Segmenter))[:16]}/{seed}"
    tags = {"data.sha256": digest, "feature_service": FEATURE_SERVICE, "cutoffs": f"{as_of:%Y-%m-%d}", **tracking.commit()}
    run = tracking.open_run(home, NAME, study=study, tags=tags, server=settings.training.tracking_url)
    try:
        before = Segmenter.load(earlier[0].folder) if earlier else None
        first = max((int(version.manifest.get("next_number", 1)) for version in earlier), default=1)
        served = Segmenter(**params).fit(rows, before=before, first_number=first)
        progress(1, 2)
        fitted = _tested(served, frame, rows, home, params=params, digest=digest, settings=settings)
        progress(2, 2)
    except WeakStructure as reason:
        _show(run, reason.evidence.get("curves", []), reason.evidence)
        raise NotTrainable(f"customers do not fall into groups: {reason}") from reason
    except ValueError as reason:  # all customers alike
        raise NotTrainable(str(reason)) from reason
    _show(run, served.curves_, served.evidence_)
    return fitted, run


def write(home: Path, *, settings: Settings, as_of: datetime) -> dict[str, Any]:
    """Write customer_segments for everybody who allows it; returns customers by tier and by state, and what moved, as JSON values.

    Without a champion the segment is null; tier and state are there all the same. moved: since it was last written.
    """
    before = tables.read(home, tables.CUSTOMER_SEGMENTS, ["customer_id", "segment"])
    frame, champion = read_rows(home, settings=settings, as_of=as_of), _champion(home)
    segment = np.full(len(frame), None, dtype=object)
    if champion is not None and len(frame):
        segment = Segmenter.load(champion.folder).predict(_behaviour(frame))
    written = pd.DataFrame(
        {
            **{name: frame[name] for name in _KEYS},
            "rfm_tier": rfm_tiers(frame),
            "lifecycle": lifecycle(frame),
            "segment": segment,
            "version": pd.Series([None if champion is None else str(champion.version)] * len(frame), dtype="object"),
        }
    )
    tables.write(home, tables.CUSTOMER_SEGMENTS, written)
    counts = {name: {str(key): int(n) for key, n in written[name].value_counts().items()} for name in ("rfm_tier", "lifecycle")}
    return {**counts, "moved": _moved(before, written)}


def read_rows(home: Path, *, settings: Settings, as_of: datetime) -> pd.DataFrame:
    """The features of everybody known who allows it, as of now; one row a customer, in order of customer_id."""
    events = literal(tables.glob(home, tables.EVENTS)) if tables.exists(home, tables.EVENTS) else None
    if events is None:
        return pd.DataFrame(columns=_KEYS)
    with closing(engine.connect(home)) as db:
        everybody = db.sql(
            f"SELECT DISTINCT customer_id FROM read_parquet({events}, hive_partitioning = false) "
            "WHERE customer_id IS NOT NULL AND event_timestamp <= $now AND created_timestamp <= $now ORDER BY customer_id",
            params={"now": as_of},
        ).df()
    everybody = everybody.assign(event_timestamp=pd.Timestamp(as_of))
    is_allowed = consent.state_at(tables.read(home, tables.CONSENTS), everybody, purpose=settings.consent.purpose)
    allowed = everybody[np.asarray(is_allowed, dtype=bool)].reset_index(drop=True)
    return feature_store.training_frame(home, allowed, service=FEATURE_SERVICE) if len(allowed) else allowed


def found_at(home: Path, *, settings: Settings, at: datetime, as_of: datetime) -> pd.DataFrame:
    """Everybody's segment and state of life cycle as they would have been found at `at`, of those who allow it then and at `as_of`.

    Columns customer_id, event_timestamp, segment, lifecycle; the segment is null where customers did not fall into groups then. Raises
    StoreError without features, InputError where they are of other code.
    """
    frame = read_rows(home, settings=settings, as_of=at)
    if frame.empty:
        return pd.DataFrame(columns=[*_KEYS, "segment", "lifecycle"])
    now = frame[_KEYS].assign(event_timestamp=pd.Timestamp(as_of))
    is_allowed = consent.state_at(tables.read(home, tables.CONSENTS), now, purpose=settings.consent.purpose)
    frame = frame[np.asarray(is_allowed, dtype=bool)].reset_index(drop=True)
    segment = np.full(len(frame), None, dtype=object)
    if len(frame) >= 2 * MIN_CUSTOMERS:
        rows = _behaviour(frame)
        with suppress(WeakStructure, ValueError):  # no groups to be found, or all customers alike
            segment = Segmenter(random_state=settings.training.seed).fit(rows).predict(rows)
    return pd.DataFrame({**{name: frame[name] for name in _KEYS}, "segment": segment, "lifecycle": lifecycle(frame)})


def rfm_tiers(frame: pd.DataFrame) -> np.ndarray:
    """The tier (n,) of each row of features, by edges of these rows: days since the last purchase, orders and cents of all time."""
    if frame.empty:
        return np.empty(0, dtype=object)
    values = [_floats(frame, name) for name in ("last_purchase_age_days", "orders_total", "revenue_cents_total")]
    return np.asarray(RfmEdges.learn(*values).score(*values)["tier"].to_numpy(dtype=object))


def lifecycle(frame: pd.DataFrame) -> np.ndarray:
    """The state (n,) of each row of features."""
    if frame.empty:
        return np.empty(0, dtype=object)
    values = (_floats(frame, name) for name in ("first_event_age_days", "last_event_age_days", "sessions_30d"))
    return Lifecycle().states(*values)


# -- private -----------------------------------------------------------------------------------------------------------


def _champion(home: Path) -> Champion | None:
    """The champion; None where there is none yet. Raises RegistryError where it is damaged."""
    if registry.champions(home).get(NAME, {}).get("version") is None:
        return None
    return registry.load_champion(home, NAME)


def _sound_versions(home: Path) -> list[Champion]:
    """The champion, then all other versions from the newest on; what is damaged names nobody any more."""
    present = registry.champions(home).get(NAME, {}).get("version")
    found = []
    for version in sorted(registry.versions(home, NAME), key=lambda number: (number != present, -number)):
        with suppress(RegistryError):
            found.append(registry.load_version(home, NAME, version))
    return found


def _behaviour(frame: pd.DataFrame) -> pd.DataFrame:
    if frame.empty:
        raise NotTrainable("nobody who allows it is known")
    try:
        return behaviour(frame)
    except ValueError as error:
        raise InputError(f"{error}; run `rapport features apply` and `rapport features build`") from error


def _floats(frame: pd.DataFrame, name: str) -> np.ndarray:
    if name not in frame.columns:
        raise InputError(f"segments: expected {name} among the features of {FEATURE_SERVICE}; run `rapport features apply`")
    return np.asarray(frame[name].astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan))


def _moved(before: pd.DataFrame, written: pd.DataFrame) -> dict[str, Any]:
    """Of customers by their segments; nothing where either time has none of them."""
    if before.empty or written.empty:
        return {}
    found = movement(before.set_index("customer_id")["segment"], written.set_index("customer_id")["segment"])
    told = {name: value for name, value in vars(found).items() if name != "flows"}
    return {**{name: finite(value) for name, value in told.items()}, "is_material": found.is_material}


def _tested(
    served: Segmenter, frame: pd.DataFrame, rows: pd.DataFrame, home: Path, *, params: dict[str, Any], digest: str, settings: Settings
) -> Fitted:
    seed = settings.training.seed
    train, test = _halves(rows, seed)
    # the other half is judged by the same search, without asking once more whether there is anything to find
    tried = Segmenter(**{**params, "reference_draws": 0, "bootstrap_draws": 0}).fit(rows.iloc[train])
    held_out = rows.iloc[test]

    def judge(champion: Champion, is_newer: bool) -> Verdict | None:
        other = Segmenter.load(champion.folder)
        if not set(other.scaling_.names) <= set(rows.columns):
            return None
        ours, theirs = tried.silhouettes(held_out), tried.silhouettes(held_out, other.predict_codes(held_out))
        customers = frame["customer_id"].to_numpy()[test]
        checks = (
            gate.quality(lambda on: mean_difference(ours[on], theirs[on]), customers, is_newer=is_newer, settings=settings),
            gate.stability(float(served.stability_.min()), float(other.stability_.min()), settings=settings),
            gate.kept(float(np.mean(served.predict(rows) == other.predict(rows))), settings=settings),
        )
        return Verdict(float(theirs.mean()), checks)

    sample = signature_rows(rows)
    answer = pd.DataFrame({"segment": pd.Series(served.predict(sample), dtype="object").fillna("")})
    profile = served.profile(rows)
    return Fitted(
        name=NAME,
        learner=served,
        params=params,
        quality=_quality(tried, served, frame.iloc[test], held_out, settings=settings),
        data_sha256=digest,
        manifest={
            "feature_service": FEATURE_SERVICE,
            "features": list(rows.columns),
            "rows": {"train": len(train), "test": len(test), "fit": len(rows)},
            "segments": _segments(profile),
            "next_number": served.next_number,
            "method": served.method_,
            "setting": served.setting_,
            "p_values": served.evidence_["p_values"],
            "assigned_by": "trees" if served.assigner_.trees is not None else "nearest centroid",
            "rfm_edges": _edges(frame),
            "consent": consent_record(home, frame["customer_id"], settings=settings),
            "fit": "fitted on everybody as of now; the metrics are those of a fit on one half of the customers, judged on the other",
            "golden": {
                "features": {str(name): [finite(value) for value in column] for name, column in sample.items()},
                "segment": answer["segment"].tolist(),
            },
        },
        features=sample,
        output=answer,
        judge=judge,
    )


def _halves(rows: pd.DataFrame, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the customers that find segments and of those that judge them; the same customers, whatever they are called."""
    order = np.lexsort(rows.to_numpy(dtype=np.float64).T[::-1])
    drawn = order[np.random.default_rng(seed).permutation(len(rows))]
    half = len(rows) // 2
    return np.sort(drawn[half:]), np.sort(drawn[:half][:JUDGED])


def _quality(tried: Segmenter, served: Segmenter, frame: pd.DataFrame, held_out: pd.DataFrame, *, settings: Settings) -> Quality:
    options = settings.training
    ours = tried.silhouettes(held_out)
    tiers = pd.Series(rfm_tiers(frame)).map({tier: code for code, tier in enumerate(TIERS)}).to_numpy(dtype=np.int64)
    theirs = tried.silhouettes(held_out, np.unique(tiers, return_inverse=True)[1].ravel())
    gain = evaluation.paired_bootstrap(
        mean_difference(ours, theirs), frame["customer_id"], draws=options.bootstrap_draws, seed=options.seed
    )
    return Quality(
        metric=METRIC,
        value=float(ours.mean()),
        rival="RFM tiers",
        rival_value=float(theirs.mean()),
        low=gain.low,
        high=gain.high,
        optimum=None,
        others={
            "n_segments": float(len(served.names_)),
            "adjusted_rand_of_draws": float(served.evidence_["adjusted_rand"]),
            "least_jaccard": float(served.stability_.min()),
            "reference_silhouette": float(served.evidence_["reference_silhouette"]),
            "assigned_as_clustered": served.assigner_.accuracy,
            "judged_customers": float(len(held_out)),
        },
    )


def _segments(profile: pd.DataFrame) -> list[dict[str, Any]]:
    """Each segment's row of the profile as JSON values; what no number could be formed of is null."""
    rows = profile.to_dict("records")
    return [{str(name): finite(value) if isinstance(value, float) else value for name, value in row.items()} for row in rows]


def _edges(frame: pd.DataFrame) -> dict[str, list[float]]:
    values = [_floats(frame, name) for name in ("last_purchase_age_days", "orders_total", "revenue_cents_total")]
    return {name: list(edges) for name, edges in asdict(RfmEdges.learn(*values)).items()}


def _show(run: tracking.Run, rows: list[dict[str, Any]], evidence: dict[str, Any]) -> None:
    """Curves and evidence with the run, as data and drawn."""
    run.client.log_dict(run.run_id, {"curves": rows, **evidence}, "segments.json")
    for name, figure in curves.figures(rows, evidence).items():
        run.client.log_figure(run.run_id, figure, name)
