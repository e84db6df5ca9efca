"""Training reference + the population scored now -> which columns drifted, and whether that is an alarm. Changes no table.

A column drifts when its effect is large AND larger than chance explains: quantile PSI, W1 in reference standard deviations
or the changed share of nulls at its limit or above, with p-values corrected over all columns. Drift becomes an alarm when
it shows in 2 of the last 3 windows; where no earlier window is known, one is enough. Columns that change as the log itself
grows older are judged and listed, but do not alarm by themselves.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from monitoring import distributions, reports, subjects
from monitoring.distributions import Distance, Kept, Numbers
from pipelines import tables, windows
from pipelines.settings import MonitoringSettings, Settings

ALPHA = 0.005  # false alarms per clean window that we accept, over all columns together
MEMORY = 3  # windows looked at, this one among them
CONFIRMED = 2  # of those, so many must show the drift
FILLED = 0.9  # of a window's days that the log must reach back before a reference row
SCORE = "probability"
NOT_FEATURES = frozenset({"customer_id", "session_id", "label", "split"})
VERDICTS = ("alarm", "drift", "ok", "ageing", "not_enough_data")

_INPUTS = {ratio.name: (ratio.numerator, ratio.denominator) for ratio in windows.RATIOS} | {
    span.name: tuple(f"{end.removesuffix('_at')}_age_days" for end in (span.start, span.end)) for span in windows.SPANS
}
_AGES = {f"{name.removesuffix('_at')}_age_days" for name in getattr(tables.CUSTOMER_ACTIVITY.schema, "names", ()) if name.endswith("_at")}
_FIRST_AGES = {name for name in _AGES if name.startswith("first_")}
_LAST_AGES = _AGES - _FIRST_AGES
_LASTING = {windows.CUSTOMER_ACTIVITY.column(a): a.is_first for a in windows.CUSTOMER_ACTIVITY.latests if a.window is None}  # of all time
_LONGEST_DAYS = max(window.size.days for window in windows.WINDOWS.values())


@dataclass(frozen=True)
class Reference:
    """The distributions that windows are compared with, by column."""

    rows: int
    columns: Mapping[str, Kept]


@dataclass(frozen=True)
class ColumnDrift:
    """One column's judgement. verdict: one of VERDICTS. None: could not be computed."""

    column: str
    kind: str  # numeric | category
    verdict: str
    effect: float  # the largest effect in units of its limit; drift needs 1 or more
    psi: float | None
    w1: float | None  # in reference standard deviations,
    scale: str | None  # measured on the raw or on a log scale
    null_share_reference: float
    null_share: float | None
    null_share_change: float | None
    p_value: float | None  # of the distribution, before correction
    p_value_nulls: float | None
    p_adjusted: float | None  # the smaller of the two, corrected over all columns
    n: int
    n_reference: int
    windows: str  # "2 of 3": of the windows known, those in which this column drifted
    why: str  # what is beyond its limit


@dataclass(frozen=True)
class DriftReport:
    """One model's window. verdict: ok | drift (seen, not confirmed) | alarm | not_enough_data."""

    verdict: str
    why: str
    n: int
    n_reference: int
    drifted: tuple[str, ...]  # columns whose verdict is drift or alarm
    ageing: Mapping[str, str]  # columns that drifted too, but by construction -> why
    columns: tuple[ColumnDrift, ...]  # in the order of VERDICTS, largest effect first


@dataclass(frozen=True)
class DriftRun:
    """All models: name -> report, or name -> why it was not judged. `windows`: name -> the last ones, oldest first."""

    as_of: str
    verdict: str
    subjects: Mapping[str, DriftReport]
    not_judged: Mapping[str, str]
    references: Mapping[str, str] = field(default_factory=dict)  # name -> hash of the training table
    windows: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)


def build_reference(frame: pd.DataFrame, *, columns: Collection[str] | None = None, unit: str = "customer_id") -> Reference:
    """The distributions of `columns`, by default all but keys, times and labels. Rows of one `unit` are not independent."""
    wanted = feature_columns(frame) if columns is None else columns
    share = _unit_share(frame, unit)
    return Reference(len(frame), {name: distributions.keep(frame[name], share) for name in wanted})


def feature_columns(frame: pd.DataFrame) -> list[str]:
    """The columns that can be judged: all but keys, instants and labels."""
    return [c for c in frame.columns if c not in NOT_FEATURES and not pd.api.types.is_datetime64_any_dtype(frame[c])]


def judge(
    reference: Reference,
    current: pd.DataFrame,
    *,
    settings: MonitoringSettings,
    history: Sequence[Collection[str]] = (),
    ageing: Mapping[str, str] | None = None,
    unit: str = "customer_id",
) -> DriftReport:
    """The window's verdict. A column that the reference has and `current` lacks has drifted.

    history: the drifted columns of earlier windows, newest last. ageing: column -> why it changes by construction.
    """
    if min(len(current), reference.rows) < settings.min_window_rows:
        side, rows = ("window", len(current)) if len(current) <= reference.rows else ("reference", reference.rows)
        why = f"the {side} holds {rows} rows, {settings.min_window_rows} are needed"
        return DriftReport("not_enough_data", why, len(current), reference.rows, (), {}, ())
    share = _unit_share(current, unit)
    found = {name: distributions.measure(kept, current[name], share) for name, kept in reference.columns.items() if name in current}
    ages = ageing or {}
    # Ageing columns are a family of their own: their certain changes would make the correction lenient with the rest.
    adjusted = _adjusted({n: d for n, d in found.items() if n not in ages}) | _adjusted({n: d for n, d in found.items() if n in ages})
    judged = [_judge_column(n, k, found.get(n), adjusted.get(n), settings, history, ages.get(n)) for n, k in reference.columns.items()]
    return _summarise(judged, len(current), reference.rows, len(history), ages)


def ageing_columns(reference: pd.DataFrame, *, settings: MonitoringSettings) -> dict[str, str]:
    """Columns of a training reference that change as the log grows, each with the reason.

    Life-time counters always do, and what rests on them. A window, and the age of a last event, do so while too few
    reference rows lie deep enough in the log to have filled them.
    """
    ageing: dict[str, str] = {}
    for needed, names in _by_need(reference).items():
        deep = _deep(reference, needed)
        if np.isinf(needed):
            ageing |= dict.fromkeys(names, "grows with the log: it spans a life time, or rests on what does")
        elif len(deep) < min(settings.min_window_rows, len(reference)):
            ageing |= dict.fromkeys(names, f"grows with the log: only {len(deep)} reference rows had {needed:g} days of it before them")
    return ageing


def run(home: Path, *, settings: Settings, as_of: datetime) -> DriftRun:
    """Judge every model that has been trained and has scored; writes reports/drift.json and reports/drift.html.

    Features are compared with the rows the model was fitted on, its score with held-out rows where there are enough: a
    model is surer of rows it has learned. A windowed feature is compared with the rows that lay deep enough in the log to
    have filled the window. Earlier windows come from the previous drift.json, while the training table is
    the same. A damaged previous report counts as none.
    """
    limits, path = settings.monitoring, home / "reports" / "drift.json"
    earlier, judged, not_judged, references, kept, frames = _earlier(path), {}, {}, {}, {}, {}
    for name in subjects.names(home):
        trained, scored = subjects.tables_of(name)
        why = subjects.why_not_judged(home, name, (trained, scored))
        if why:
            not_judged[name] = why
            continue
        training, current = subjects.rows(home, name, trained), subjects.rows(home, name, scored)
        references[name] = subjects.reference_hash(home, trained, training)
        past = _windows_before(earlier, name, references[name], as_of)
        parts = _references(training, current, limits)
        reference = Reference(max(map(len, parts), default=0), {n: k for part in parts for n, k in build_reference(part).columns.items()})
        ageing = ageing_columns(training[training["split"] == "train"], settings=limits)
        seen = [window["drifted"] for window in past]
        judged[name] = judge(reference, current, settings=limits, history=seen, ageing=ageing)
        frames[name] = (current, parts)
        is_judged = judged[name].verdict != "not_enough_data"
        this = [{"as_of": as_of.isoformat(), "drifted": list(judged[name].drifted)}] if is_judged else []
        kept[name] = [*past, *this][-MEMORY:]
    verdict = reports.worst(report.verdict for report in judged.values())
    result = DriftRun(as_of.isoformat(), verdict, judged, not_judged, references, kept)
    reports.write_json(path, asdict(result))
    reports.write_drift(path.with_suffix(".html"), asdict(result), frames, settings=limits, alpha=ALPHA)
    return result


# -- one column --------------------------------------------------------------------------------------------------------


def _adjusted(found: Mapping[str, Distance]) -> dict[str, tuple[float, float]]:
    """Column -> corrected p-values of its distribution and of its nulls. One correction over all of them."""
    raw = np.array([[1.0 if d.p_value is None else d.p_value, d.p_value_nulls] for d in found.values()]).reshape(-1, 2)
    looked_at = np.array([[d.p_value is not None, True] for d in found.values()], dtype=bool).reshape(-1, 2)
    raw[looked_at] = distributions.adjust(raw[looked_at])
    return {name: (float(values), float(nulls)) for name, (values, nulls) in zip(found, raw, strict=True)}


def _judge_column(
    name: str,
    kept: Kept,
    found: Distance | None,
    adjusted: tuple[float, float] | None,
    settings: MonitoringSettings,
    history: Sequence[Collection[str]],
    ageing: str | None,
) -> ColumnDrift:
    nulls_before = 1 - kept.n / kept.rows if kept.rows else 0.0
    reasons, effect = _reasons(found, adjusted, settings)
    seen = [name in window for window in history[1 - MEMORY :]] + [bool(reasons)]
    is_numeric = isinstance(kept, Numbers)
    return ColumnDrift(
        column=name,
        kind="numeric" if is_numeric else "category",
        verdict=_verdict(found, reasons, seen, ageing),
        effect=effect,
        psi=found.psi if found else None,
        w1=found.w1 if found else None,
        scale=None if found is None or found.w1 is None else "raw" if isinstance(kept, Numbers) and kept.log_unit is None else "log",
        null_share_reference=nulls_before,
        null_share=found.null_share if found else None,
        null_share_change=found.null_share_change if found else None,
        p_value=found.p_value if found else None,
        p_value_nulls=found.p_value_nulls if found else None,
        p_adjusted=min(adjusted) if adjusted else None,
        n=found.n if found else 0,
        n_reference=kept.n,
        windows=f"{sum(seen)} of {len(seen)}",
        why=_why(found, reasons),
    )


def _reasons(found: Distance | None, adjusted: tuple[float, float] | None, settings: MonitoringSettings) -> tuple[list[str], float]:
    """What is both at its limit and beyond chance, by name; and the largest effect in units of its limit."""
    if found is None or adjusted is None:
        return ["the window lacks this column"], 1 / settings.null_limit
    limits = (("PSI", found.psi, settings.psi_limit), ("W1", found.w1, settings.w1_limit))
    effects = [(label, value / limit, adjusted[0]) for label, value, limit in limits if value is not None]
    effects.append(("nulls", abs(found.null_share_change) / settings.null_limit, adjusted[1]))
    reasons = [label for label, effect, p_value in effects if effect >= 1 and p_value <= ALPHA]
    if reasons and found.new_levels:
        reasons.append("new: " + " ".join(found.new_levels[:5]))
    return reasons, max(effect for _, effect, _ in effects)


def _verdict(found: Distance | None, reasons: Sequence[str], seen: Sequence[bool], ageing: str | None) -> str:
    if not reasons:
        return "not_enough_data" if found is not None and found.psi is None else "ok"
    # Growth fills a column; one that empties, or is gone, has broken.
    has_emptied = found is None or ("nulls" in reasons and found.null_share_change > 0)
    if ageing and not has_emptied:
        return "ageing"
    return "alarm" if sum(seen) >= min(CONFIRMED, len(seen)) else "drift"


def _why(found: Distance | None, reasons: Sequence[str]) -> str:
    if not reasons and found is not None and found.psi is None:
        return f"under {distributions.MIN_VALUES} values: only nulls were judged"
    return ", ".join(reasons)


def _summarise(judged: Sequence[ColumnDrift], n: int, n_reference: int, n_earlier: int, ages: Mapping[str, str]) -> DriftReport:
    ordered = tuple(sorted(judged, key=lambda c: (VERDICTS.index(c.verdict), -c.effect, c.column)))
    drifted = tuple(c.column for c in ordered if c.verdict in ("drift", "alarm"))
    ageing = {c.column: ages[c.column] for c in ordered if c.verdict == "ageing"}
    alarms = sum(c.verdict == "alarm" for c in ordered)
    verdict = "alarm" if alarms else "drift" if drifted else "ok" if ordered else "not_enough_data"
    earlier = f"{min(n_earlier, MEMORY - 1)} earlier windows known"
    why = f"{len(drifted)} of {len(ordered)} columns drifted, {alarms} confirmed, {len(ageing)} ageing; {earlier}"
    return DriftReport(verdict, why, n, n_reference, drifted, ageing, ordered)


def _unit_share(frame: pd.DataFrame, unit: str) -> float:
    """Independent units per row."""
    return frame[unit].nunique(dropna=False) / len(frame) if unit in frame and len(frame) else 1.0


# -- columns that age --------------------------------------------------------------------------------------------------


def _needed_days(name: str) -> float:
    """Days of log before a row that fill the column; infinite for life times. A ratio needs what its parts need."""
    if name in _INPUTS:
        return max(map(_needed_days, _INPUTS[name]))
    if name.endswith("_total") or name in _FIRST_AGES or _LASTING.get(name, False):
        return np.inf
    window = re.search(r"_(\d+)(h|d)$", name)
    if window:
        return int(window[1]) / (24 if window[2] == "h" else 1)
    return _LONGEST_DAYS if name in _LAST_AGES or name in _LASTING else 0.0


def _by_need(frame: pd.DataFrame) -> dict[float, list[str]]:
    """Days of log needed -> the feature columns that need them."""
    needs: dict[float, list[str]] = {}
    for name in feature_columns(frame):
        needs.setdefault(_needed_days(name), []).append(name)
    return needs


def _deep(reference: pd.DataFrame, needed: float) -> pd.DataFrame:
    """The rows with enough log before them; all where that is unknown. The log begins with its customers' first event."""
    if "first_event_age_days" not in reference or "event_timestamp" not in reference or np.isinf(needed):
        return reference
    first = reference["event_timestamp"] - pd.to_timedelta(reference["first_event_age_days"].astype(float), unit="D")
    depth_days = (reference["event_timestamp"] - first.min()) / pd.Timedelta(1, "D")
    return reference[~(depth_days < FILLED * needed)]


# -- the two sides, and the windows before -----------------------------------------------------------------------------


def _references(training: pd.DataFrame, current: pd.DataFrame, settings: MonitoringSettings) -> list[pd.DataFrame]:
    """The reference rows, in parts that hold different columns: features as fitted, deep enough in the log; the score held out.

    Where too few rows are held out, or deep enough, all fitted rows serve. Protected columns are no features: where
    scoring did not carry them along, there is nothing to compare.
    """
    is_fitted = training["split"] == "train"
    fitted, held_out = training[is_fitted], training[~is_fitted]
    fitted = fitted.drop(columns=[name for name in settings.protected if name in fitted and name not in current])
    units = [name for name in ("customer_id",) if name in fitted]
    parts = []
    for needed, names in _by_need(fitted.drop(columns=SCORE, errors="ignore")).items():
        deep = _deep(fitted, needed)
        parts.append((deep if len(deep) >= settings.min_window_rows else fitted)[[*units, *names]])
    if SCORE in fitted:
        parts.append((held_out if len(held_out) >= settings.min_window_rows else fitted)[[*units, SCORE]])
    return parts


def _earlier(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _windows_before(earlier: Mapping[str, Any], name: str, reference: str, as_of: datetime) -> list[dict[str, Any]]:
    """Earlier windows against the same reference. Windows at or after `as_of` are this one, judged before."""
    try:
        known = earlier["windows"][name] if earlier["references"][name] == reference else []
        past = [w for w in known if datetime.fromisoformat(w["as_of"]) < as_of]
        return [{"as_of": w["as_of"], "drifted": list(w["drifted"])} for w in past][1 - MEMORY :]
    except (KeyError, TypeError, ValueError):
        return []
