"""How models stand against their rivals, as a table."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models.ladder import FOLDED_IN, PERSONAL, STALE, STATIC
from pipelines.commands import terminal

if TYPE_CHECKING:
    from models.evaluation import Interval
    from pipelines.comparison import Comparison


def show_models(models: dict[str, Any], as_json: bool) -> None:
    """By name what `train` told of each: its figure, its rivals, the champion it was held against, and what the figures do not say."""
    from rich.table import Table as Grid

    if as_json:
        print(json.dumps({"models": models}))  # noqa: T201
        return
    grid = Grid(box=None, pad_edge=True)
    for column in ("model", "metric", "value", "rival", "its value", "ahead by (95 %)", "optimum", "version"):
        grid.add_column(column, no_wrap=column != "rival")
    for name, report in models.items():
        if report["trainable"]:
            grid.add_row(name, *_model_cells(report))
            for cells in _further_rivals(report):
                grid.add_row(*cells)
    terminal.out.print(grid)
    for name, report in models.items():
        remark = _remark(report)
        for line in ([remark] if remark else []) + _beside(report):
            terminal.out.print(f"  {name}: {line}", highlight=False, markup=False, soft_wrap=True)


def ladder(rows: Sequence[Mapping[str, Any]], metric: str, value: float | None) -> list[str]:
    """How good the list of each rung was, and where a rung is not shown to be better than the one below it, a sentence each.

    rows: of `training.rungs.qualities`, none for a version of before they were measured; value: of the model's own list.
    """
    if not rows:
        return []
    told = [
        f"{row['rung']} {row['ndcg']:.4f} ({row['customers']:,})" if row["customers"] else f"{row['rung']} not measured: {row['why']}"
        for row in rows
    ]
    own, served = value, next((row.get("ndcg") for row in rows if row["rung"] == PERSONAL), None)
    moved = own is not None and served is not None and abs(own - served) >= 0.00005
    found = [
        f"{metric} of what each rung answers (customers): {', '.join(told)}"
        + (f"; without the places of new arrivals personal is {own:.4f}" if moved else "")
    ]
    for row in rows:
        if row["rung"].startswith(FOLDED_IN) or row.get("low") is None or row["low"] > 0:
            continue
        how = "measured worse than" if row["high"] < 0 else "is not shown to be better than"
        lead = f"{row['lead']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f}) of {row['compared']:,} customers"
        where = "stands below it, without places for new arrivals" if row["rung"] in (STALE, STATIC) else "stands below it"
        found.append(f"{row['above']} {how} {row['rung']}, which {where}: {lead}")
    return found


def show_challenge(found: "Comparison") -> None:
    """A challenger beside the champion, and what the figures do not say."""

    def line(text: str) -> None:
        terminal.out.print(text, highlight=False, markup=False, soft_wrap=True)

    line(
        f"{found.model}: {found.requests:,} requests about {found.customers:,} customers, {found.since[:16].replace('T', ' ')} to "
        f"{found.until[:16].replace('T', ' ')}" + (f"; {found.left_out:,} of other versions left out" if found.left_out else "")
    )
    rows = [_challenge_row("version", found.versions, ""), _challenge_row("mean probability", found.mean, _span(found.mean_difference))]
    if found.foresight is not None:
        told = found.foresight
        rows += [
            _challenge_row("auc", told.auc, _span(told.auc_difference)),
            _challenge_row("brier", told.brier, _span(told.brier_difference)),
        ]
    rows.append(_challenge_row("ms a row, here", found.row_ms, ""))
    terminal.show_rows(rows, as_json=False)
    moved = ", ".join(f"{n:,} {which}" for which, n in found.moved.items())
    alike = "not to be told" if found.rank_correlation is None else f"{found.rank_correlation:.4f}"
    line(f"  rank correlation {alike}, population stability index {found.psi:.4f}")
    line(f"  {found.same_band:.1%} of requests fall into the same band" + (f"; {moved}" if moved else ""))
    if found.foresight is None:
        line(f"  which of them foretells better is not known: {found.why_not}")
    else:
        line(f"  outcomes of {found.foresight.requests:,} requests are known, {found.foresight.positives:,} of them positive")


def _challenge_row(name: str, told: Mapping[str, Any], difference: str) -> dict[str, str]:
    cells = {role: value if isinstance(value, str) else f"{value:.4f}" for role, value in told.items()}
    return {"": name, "champion": cells["champion"], "challenger": cells["challenger"], "difference (95 %)": difference}


def _span(found: "Interval") -> str:
    return f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def _model_cells(report: dict[str, Any]) -> tuple[str, ...]:
    optimum = report.get("optimum")
    return (
        report["metric"],
        f"{report['value']:.4f}",
        report["rival"],
        f"{report['rival_value']:.4f}",
        f"{report['value'] - report['rival_value']:+.3f} ({report['low']:+.3f} to {report['high']:+.3f})",
        "" if optimum is None else f"{optimum:.4f}",
        str(report["version"]),
    )


def _further_rivals(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each baseline but the first, which stands beside the model, and one for the champion that it was held against."""
    rows: list[tuple[str, ...]] = [
        ("", "", "", one["name"], f"{one['value']:.4f}", f"{one['lead']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})", "", "")
        for one in report.get("baselines", [])[1:]
    ]
    champion = report.get("champion")
    if champion is None:
        return rows
    ahead = f"{report['value'] - champion['value']:+.3f}"
    if champion.get("low") is not None:
        ahead += f" ({champion['low']:+.3f} to {champion['high']:+.3f})"
    return [*rows, ("", "", "", f"champion, version {champion['version']}", f"{champion['value']:.4f}", ahead, "", "")]


def _remark(report: dict[str, Any]) -> str:
    """What the figures alone do not say."""
    if not report["trainable"]:
        return f"not trainable, because {report['why']}"
    if report.get("champion") and not report["details"]["is_champion"]:
        return f"version {report['champion']['version']} stays the champion: {report['details']['why']}"
    if report["low"] <= 0:
        judged = int(report["details"].get("judged_customers", 0)) or report["details"]["rows"]["test"]
        return f"not shown to be ahead: {judged:,} judged in the test window leave an interval that reaches {report['low']:+.3f}"
    return ""


def _beside(report: dict[str, Any]) -> list[str]:
    """How good what a model tells beside its probability is, a sentence each."""
    details = report["details"]
    told = ladder(details.get("ladder", ()), report["metric"], report["value"])
    if when := details.get("when"):
        last = when["judged"][-1]
        quality = f"auc {last['auc'] or 0:.4f}, calibration error {last['ece'] or 0:.4f}"
        ahead = f"when the next order comes, {when['periods'] * when['period_days']:g} days ahead"
        told.append(
            f"{ahead}: by day {last['days']:g} {last['expected']:.1%} were to have ordered, {last['observed']:.1%} have ({quality})"
        )
    if value := details.get("value"):
        ranks = (
            f"rank correlation {value['rank_correlation'] or 0:.2f}, of what was spent before {value['rival_rank_correlation'] or 0:.2f}"
        )
        sums = f"{value['expected_cents'] / 100:,.0f} expected of {value['customers']:,} customers, {value['spent_cents'] / 100:,.0f} spent"
        told.append(f"what customers are worth: in the {value['days']:g} days of the test {sums} ({ranks})")
    return told


def show_segments(report: dict[str, Any]) -> None:
    """What the segments are, in words, and how many customers have moved since they were last written."""
    shown = ("segment", "customers", "share", "stability", "description")
    rows = [
        {name: f"{row[name]:.2f}" if name in ("share", "stability") else row[name] for name in shown}
        for row in report["details"].get("segments", ())
    ]
    if rows:
        terminal.show_rows(rows, as_json=False)
    for name, title in (("lifecycle", "life cycle"), ("rfm_tier", "recency, frequency and money")):
        counts = ", ".join(f"{count:,} {key}" for key, count in report["details"].get(name, {}).items())
        terminal.out.print(f"  {title}: {counts or 'nobody'}", highlight=False)
    moved = report["details"].get("moved")
    if rows and moved and moved["share_moved"] is not None:
        word = "more than chance and little" if moved["is_material"] else "no more than chance or little"
        terminal.out.print(
            f"  {moved['share_moved']:.1%} of customers have another segment than before; shares moved by {word}", highlight=False
        )
