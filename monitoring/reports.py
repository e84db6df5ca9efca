"""A judged run as plain values -> one JSON file and one page that opens offline. The only module that knows Evidently.

The page takes every figure and verdict from the same values as the JSON; beside them Evidently draws the distributions of a
sample of the rows. Judges nothing, and needs no network. Evidently is heavy, so it is imported where it is used.
"""

import hashlib
import json
import os
import types
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from pipelines.settings import MonitoringSettings

WORST_FIRST = ("alarm", "drift", "ok", "not_enough_data")
PROBABILITY = "probability"
METHOD = "rapport"  # the drift score that Evidently shows: our effect in units of its limit
CHARTS_IN_SIGHT = 4  # of the worst columns; every column's chart is behind its row of the table
METRICS = {"selection_rate": "Selection rate", "true_positive_rate": "True-positive rate", "calibration": "Calibration", "auc": "AUC"}
COLOURS = {"alarm": "#c00000", "ok": "#4d4d4d"}
HOW_TO_READ_DRIFT = (
    "A column has **drifted** when its effect is large (PSI from {psi_limit:g}, W1 from {w1_limit:g} reference standard deviations, share "
    "of nulls changed by {null_limit:.0%} or more) **and** larger than chance explains (p, corrected over all columns, at most {alpha:g}). "
    "Effect 1 is the limit. It is an **alarm** when 2 of the last 3 windows show it, or the only one known. **Ageing** columns change "
    "because the log grows. Open a row to see the distributions, drawn from a sample of at most {sample_rows:,} rows; the figures are of "
    "all rows."
)
HOW_TO_READ_BIAS = (
    "Each point is the gap between a group and **all other rows**, with its 95 % interval. It is an **alarm** only where the whole "
    "interval lies outside the shaded band of ±{tolerated_gap:g}. Groups of fewer than {min_group} rows, or {min_group_positives} "
    "positives where a metric needs them, are not judged. Calibration is the observed rate minus the mean prediction. Where base rates "
    "differ between groups, selection rates and true-positive rates cannot both be equal: read them beside the base rate."
)
TAILS = 0.01  # of a chart's values at either end are drawn at its edge: one far value would flatten the rest

Frame = pd.DataFrame
Values = Mapping[str, Any]


class Verdict(Protocol):
    """What every run of a monitor has."""

    @property
    def verdict(self) -> str:
        """One of WORST_FIRST."""


def worst(verdicts: Iterable[str]) -> str:
    """The verdict of several together. One that could be judged outweighs those that could not."""
    return min(verdicts, key=WORST_FIRST.index, default="not_enough_data")


def write_json(path: Path, values: Values) -> None:
    """Replace `path` by `values` in one step. Raises ValueError on a figure that JSON cannot hold."""
    _replace(path, json.dumps(values, indent=1, allow_nan=False))


def write_drift(
    path: Path, run: Values, frames: Mapping[str, tuple[Frame, Sequence[Frame]]], *, settings: MonitoringSettings, alpha: float
) -> list[Any]:
    """Replace the page of a drift run; returns Evidently's snapshots, one for each subject.

    run: the values of drift.json. alpha: the largest corrected p-value that drift was judged by. frames: name -> current rows, and the
    reference's parts: rows of different columns.
    """
    e, snapshots = _evidently(), []
    widgets = _head("Drift", run, HOW_TO_READ_DRIFT.format(**settings.model_dump(), alpha=alpha))
    for name, subject in run["subjects"].items():
        seed = _seed(name, run["references"][name], subject["n"])
        current, reference = _samples(*frames[name], settings.sample_rows, seed)
        drawn = _drawn(subject["columns"], current, reference)
        drift = {c.name: e.ValueDrift(column=c.name, method=METHOD, threshold=1.0) for c in drawn}
        nulls = {c.name: e.MissingValueCount(column=c.name) for c in drawn}
        verdicts = e.DriftVerdicts(model=name, rows=json.dumps(subject["columns"]))
        snapshot = _snapshot([verdicts, *drift.values(), *nulls.values()], drawn, current, reference)
        widgets += _drift_part(name, subject, {c: _distribution(_widgets(snapshot, metric)) for c, metric in drift.items()})
        snapshots.append(snapshot)
    _replace(path, _page("Rapport: drift", widgets))
    return snapshots


def write_bias(path: Path, run: Values, frames: Mapping[str, Frame], *, settings: MonitoringSettings) -> list[Any]:
    """Replace the page of a bias run; returns Evidently's snapshots, one for each subject.

    run: the values of bias.json. frames: name -> the rows that were judged, with the protected columns they have.
    """
    e, snapshots = _evidently(), []
    widgets = _head("Bias", run, HOW_TO_READ_BIAS.format(**settings.model_dump()))
    for name, subject in run["subjects"].items():
        attributes = list(dict.fromkeys(m["attribute"] for m in subject["metrics"]))
        rows = {a: json.dumps([m for m in subject["metrics"] if m["attribute"] == a]) for a in attributes}
        groups = [e.GroupFairness(model=name, attribute=a, rows=rows[a]) for a in attributes]
        nulls = [e.MissingValueCount(column=a) for a in attributes]
        sample = _sample(frames[name], settings.sample_rows, _seed(name, len(frames[name])))
        drawn = [*(_Column(a, False) for a in attributes), _Column(PROBABILITY, True)]
        snapshots.append(_snapshot([*groups, *nulls], drawn, sample, None))
        widgets += _bias_part(name, subject)
    _replace(path, _page("Rapport: bias", widgets))
    return snapshots


# -- what Evidently is given -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A column to draw; `effect` and `has_drifted` as judged over all rows."""

    name: str
    is_numeric: bool
    effect: float = 0.0
    has_drifted: bool = False


def _sample(frame: Frame, rows: int, seed: int) -> Frame:
    return (frame if len(frame) <= rows else frame.sample(rows, random_state=seed)).reset_index(drop=True)


def _seed(*content: object) -> int:
    """The same content, the same sample."""
    return int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=4).digest(), "big")


def _samples(current: Frame, references: Sequence[Frame], rows: int, seed: int) -> tuple[Frame, Frame]:
    """As many rows of either side. The parts of the reference are other rows, of other columns; they are drawn side by side."""
    rows = min(rows, len(current), *map(len, references))
    parts = [_sample(part, rows, seed) for part in references]
    reference = pd.concat(parts, axis=1)
    return _sample(current, rows, seed), reference.loc[:, ~reference.columns.duplicated()]


def _drawn(columns: Sequence[Values], current: Frame, reference: Frame) -> list[_Column]:
    """The columns that both samples have values of, in the order of the report."""
    shared = [c for c in columns if c["column"] in current and c["column"] in reference]
    found = [_Column(c["column"], c["kind"] == "numeric", c["effect"], c["verdict"] in ("alarm", "drift", "ageing")) for c in shared]
    return [c for c in found if all(_tidy(side[c.name], c.is_numeric).notna().any() for side in (current, reference))]


def _tidy(column: pd.Series, is_numeric: bool) -> pd.Series:
    """Finite floats, or text; missing stays missing."""
    if is_numeric:
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=float, na_value=np.nan)
        return pd.Series(np.where(np.isinf(numbers), np.nan, numbers))
    return column.astype(object).map(str, na_action="ignore")


def _snapshot(metrics: list[Any], drawn: Sequence[_Column], current: Frame, reference: Frame | None) -> Any:
    """Evidently's run over the drawn columns, all of them named: it would take whole numbers for categories."""
    e = _evidently()
    numeric, text = [c.name for c in drawn if c.is_numeric], [c.name for c in drawn if not c.is_numeric]
    sides = [pd.DataFrame({c.name: _tidy(side[c.name], c.is_numeric) for c in drawn}) for side in (current, reference) if side is not None]
    for name in numeric:
        low, high = pd.concat([side[name] for side in sides]).quantile([TAILS, 1 - TAILS])
        if low < high:
            sides = [side.assign(**{name: side[name].clip(low, high)}) for side in sides]
    e.judged.clear()
    e.judged.update({c.name: (c.effect, c.has_drifted) for c in drawn})
    definition = e.DataDefinition(numerical_columns=numeric, categorical_columns=text)
    data = [e.Dataset.from_pandas(side, data_definition=definition) for side in sides]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, about pandas to come
        return e.Report(metrics, include_tests=False).run(*data, *[None] * (2 - len(data)))


def _widgets(snapshot: Any, metric: Any) -> list[Any]:
    return list(snapshot.metric_results[metric.metric_id].get_widgets())


@cache
def _evidently() -> types.SimpleNamespace:
    """Evidently's names, with metrics that carry our figures into its snapshots and a drift score that is our effect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what it imports
        from evidently import DataDefinition, Dataset, Report
        from evidently.core.metric_types import DataframeCalculation, DataframeMetric, render_widgets
        from evidently.legacy.calculations.stattests.registry import StatTest, register_stattest
        from evidently.legacy.core import ColumnType
        from evidently.metrics import MissingValueCount, ValueDrift

    class DriftVerdicts(DataframeMetric):
        model: str
        rows: str  # JSON: the columns of a drift report

    class GroupFairness(DataframeMetric):
        model: str
        attribute: str
        rows: str  # JSON: the metrics of a bias report that are about `attribute`

    def calculate(self: Any, context: Any, current_data: Any, reference_data: Any) -> Any:
        value = self.result(pd.DataFrame(json.loads(self.metric.rows)))
        value.widget = []  # drawn by the page's own part; without any widget Evidently refuses the metric
        return value, None

    def display_name(self: Any) -> str:
        return f"{type(self.metric).__name__} of {self.metric.model}"

    carried = {"calculate": calculate, "display_name": display_name, "__module__": __name__}
    for metric in (DriftVerdicts, GroupFairness):
        types.new_class(f"{metric.__name__}Calculation", (DataframeCalculation[metric],), exec_body=lambda body: body.update(carried))

    judged: dict[str, tuple[float, bool]] = {}
    test = StatTest(METHOD, "effect in units of its limit, over all rows", [ColumnType.Numerical, ColumnType.Categorical], 1.0)
    register_stattest(test, lambda reference, current, kind, threshold: judged[reference.name])
    return types.SimpleNamespace(
        DataDefinition=DataDefinition,
        Dataset=Dataset,
        Report=Report,
        ValueDrift=ValueDrift,
        MissingValueCount=MissingValueCount,
        DriftVerdicts=DriftVerdicts,
        GroupFairness=GroupFairness,
        render_widgets=render_widgets,
        judged=judged,
    )


# -- what the page shows -----------------------------------------------------------------------------------------------


def _head(title: str, run: Values, how_to_read: str) -> list[Any]:
    from evidently.legacy.renderers.html_widgets import CounterData, counter, text_widget

    verdicts = [CounterData(name, subject["verdict"].replace("_", " ")) for name, subject in run["subjects"].items()]
    verdicts += [CounterData(name, "not judged") for name in run["not_judged"]]
    missing = [f"**{name}** was not judged: {why}." for name, why in run["not_judged"].items()]
    as_of = f"As of {run['as_of'][:16].replace('T', ' ')} UTC."
    return [counter(title=title, counters=verdicts), text_widget(text="\n\n".join([as_of, how_to_read, *missing]))]


def _distribution(widgets: Sequence[Any]) -> Any:
    """The chart of values out of what Evidently draws for a column, in per cent; its other one, over row numbers, says nothing."""
    chart = next(tab.widget for widget in widgets for tab in widget.tabs if tab.title == "DATA DISTRIBUTION")
    data, layout = chart.params["data"], {**chart.params["layout"]}
    per_cent = layout.pop("updatemenus")[0]["buttons"][1]["args"]
    traces = [{**trace, "visible": visible} for trace, visible in zip(data, per_cent[0]["visible"], strict=True)]
    layout["yaxis"] = {**layout["yaxis"], "title": {"text": "per cent"}}
    return chart.copy(update={"params": {"data": traces, "layout": layout}})


def _drift_part(name: str, subject: Values, charts: Mapping[str, Any]) -> list[Any]:
    from evidently.legacy.renderers.html_widgets import ColumnDefinition, RichTableDataRow, RowDetails, rich_table_data

    titles = {
        "column": "Column", "verdict": "Verdict", "effect": "Effect", "psi": "PSI", "w1": "W1 / sd", "nulls": "Nulls before → now",
        "p_adjusted": "p, corrected", "windows": "Windows", "why": "Beyond its limit",
    }  # fmt: skip
    rows = []
    for column in subject["columns"]:
        details = RowDetails().with_part("Distribution", charts[column["column"]]) if column["column"] in charts else None
        rows.append(RichTableDataRow(_drift_fields(column), details))
    part = [_title(name, subject["why"])]
    if rows:
        columns = [ColumnDefinition(title, field) for field, title in titles.items()]
        part.append(rich_table_data(columns=columns, data=rows, rows_per_page=20))
    in_sight = [c for c in subject["columns"] if c["column"] in charts and c["verdict"] != "ageing"][:CHARTS_IN_SIGHT]
    headings = {c["column"]: f"{name}: {c['column']} ({_words(c['verdict'])})" for c in in_sight}
    return part + [charts[column].copy(update={"title": heading, "size": 1}) for column, heading in headings.items()]


def _drift_fields(column: Values) -> dict[str, str]:
    nulls = f"{_share(column['null_share_reference'])} → {_share(column['null_share'])}"
    numbers = {field: _figure(column[field]) for field in ("effect", "psi", "w1")}
    numbers["p_adjusted"] = "< 0.0001" if (column["p_adjusted"] or 1) < 1e-4 or column["p_adjusted"] == 0 else _figure(column["p_adjusted"])
    w1 = numbers["w1"] + (" (log)" if column["scale"] == "log" else "")
    texts = {"column": column["column"], "verdict": _words(column["verdict"]), "windows": column["windows"], "why": column["why"]}
    return {**texts, **numbers, "w1": w1, "nulls": nulls}


def _bias_part(name: str, subject: Values) -> list[Any]:
    from evidently.legacy.renderers.html_widgets import text_widget

    about = f"threshold {subject['threshold']:.3g} ({subject['threshold_source']}), {subject['rows']} test rows"
    part = [_title(name, f"{subject['why']}; {about}")]
    if subject["not_judged"]:
        part.append(text_widget(text="\n\n".join(f"Not judged: {why}." for why in subject["not_judged"].values())))
    for attribute in dict.fromkeys(m["attribute"] for m in subject["metrics"]):
        part += _attribute_part(name, attribute, subject)
    return part


def _attribute_part(name: str, attribute: str, subject: Values) -> list[Any]:
    """The chart of gaps, unless no group is large enough for one, and the figures of all groups."""
    from evidently.legacy.renderers.html_widgets import plotly_figure, table_data

    found = [m for m in subject["metrics"] if m["attribute"] == attribute]
    left_out = f" ({subject['unknown'][attribute]} rows of unknown {attribute} left out)" if subject["unknown"][attribute] else ""
    title = f"{name} by {attribute}: gap to all others{left_out}"
    header = ["Group", "Rows", "Positives", "Base rate", *METRICS.values()]
    groups = [g for g in subject["groups"] if g["attribute"] == attribute]
    cells = [[g["group"], g["n"], g["positives"], *(_cell(found, g["group"], m) for m in ("base_rate", *METRICS))] for g in groups]
    if all(m["gap"] is None for m in found if m["metric"] in METRICS):
        return [table_data(title=title, column_names=header, data=cells)]
    chart = plotly_figure(title=title, figure=_gaps(found, subject["tolerated_gap"]))
    return [chart, table_data(column_names=header, data=cells)]


def _gaps(found: Sequence[Values], tolerated: float) -> Any:
    """One panel a metric: gaps with intervals, the tolerated band behind them."""
    from plotly.subplots import make_subplots

    groups = list(dict.fromkeys(m["group"] for m in found))
    known = [m for m in found if m["metric"] in METRICS and m["gap"] is not None]
    reach = 1.1 * max([1.5 * tolerated, *(abs(m[end]) for m in known for end in ("gap_low", "gap_high"))])
    figure = make_subplots(cols=len(METRICS), shared_yaxes=True, subplot_titles=list(METRICS.values()), horizontal_spacing=0.03)
    for m in known:
        bars = {"array": [m["gap_high"] - m["gap"]], "arrayminus": [m["gap"] - m["gap_low"]]}
        dot = {"color": COLOURS[m["verdict"]], "size": 9}
        at = {"row": 1, "col": list(METRICS).index(m["metric"]) + 1}
        figure.add_scatter(x=[m["gap"]], y=[m["group"]], error_x=bars, mode="markers", marker=dot, showlegend=False, **at)
    for number in range(1, len(METRICS) + 1):
        figure.add_vrect(
            -tolerated, tolerated, fillcolor="#8fb78f", opacity=0.3, line_width=0, row=1, col=number, exclude_empty_subplots=False
        )
    figure.update_xaxes(range=[-reach, reach], zeroline=True, zerolinecolor="#999999")
    figure.update_yaxes(categoryorder="array", categoryarray=groups[::-1], range=[-0.5, len(groups) - 0.5])
    figure.update_layout(height=max(420, 110 + 34 * len(groups)), margin={"t": 70, "b": 40, "l": 90, "r": 20}, plot_bgcolor="#ffffff")
    return figure


def _cell(found: Sequence[Values], group: str, metric: str) -> str:
    m = next(m for m in found if m["group"] == group and m["metric"] == metric)
    if m["value"] is None:
        return "not enough data"
    return f"{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]" + (" ALARM" if m["verdict"] == "alarm" else "")


def _title(name: str, why: str) -> Any:
    from evidently.legacy.renderers.html_widgets import text_widget

    return text_widget(text=f"## {name}\n\n{why[:1].upper()}{why[1:]}.")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "absent" if value is None else f"{value:.1%}"


def _words(verdict: str) -> str:
    return verdict.replace("_", " ")


# -- files -------------------------------------------------------------------------------------------------------------


def _page(title: str, widgets: Sequence[Any]) -> str:
    html: str = _evidently().render_widgets(list(widgets))
    return html.lstrip().replace("<head>", f"<head><title>{title}</title>", 1)


def _replace(path: Path, text: str) -> None:
    """Readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
