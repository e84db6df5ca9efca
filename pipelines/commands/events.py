"""Events: simulated, taken in, and those that were set aside."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands import home, terminal
from pipelines.commands.terminal import AsJson
from pipelines.errors import PipelineError

app = typer.Typer()
quarantine_app = typer.Typer(no_args_is_help=True, help="Rows that were set aside, and why.")
app.add_typer(quarantine_app, name="quarantine")

Mapping = Annotated[
    str | None, typer.Option(help="A mapping file, or the name of a shipped one: retailrocket, online_retail, rees46, taobao.")
]
Items = Annotated[Path | None, typer.Option(help="The catalogue: JSON lines of item_id, category, price, available_from.")]


@app.command()
def simulate(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for events.jsonl, items.jsonl, truth.parquet.")],
    customers: Annotated[int | None, typer.Option(help="People in the shop.")] = None,
    days: Annotated[int | None, typer.Option(help="Length of the log.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same shop.")] = None,
    drift: Annotated[str, typer.Option(help="none, covariate, concept, prior or outage.")] = "none",
    strength: Annotated[float, typer.Option(help="Of the drift, 0 to 1.")] = 0.0,
    onset_day: Annotated[int | None, typer.Option(help="Day on which the drift begins.")] = None,
    bias: Annotated[float, typer.Option(help="Share of one group's browser events that go unrecorded.")] = 0.0,
    bias_group: Annotated[str, typer.Option(help="The group, as column:value.")] = "gender:female",
    treatment_effect: Annotated[float, typer.Option(help="Of the shop's experiment, 0 to 1.")] = 0.0,
    experiment_day: Annotated[int | None, typer.Option(help="Day on which the experiment begins.")] = None,
    as_json: AsJson = False,
) -> None:
    """A small shop with known truth: events, items, and the truth beside them.

    Example: rapport simulate --customers 2500 --days 182 --seed 7 --out shop
    """
    from pipelines import simulate as shop

    s = home.settings(simulation={"customers": customers, "days": days, "seed": seed}).simulation
    # Knobs itself says which drifts there are
    knobs = shop.Knobs(drift, strength, onset_day, bias, bias_group, treatment_effect, experiment_day)  # type: ignore[arg-type]
    with terminal.step("simulate"):
        report = shop.simulate(out_dir, customers=s.customers, days=s.days, seed=s.seed, knobs=knobs)
    terminal.show(report, as_json)


@app.command()
def ingest(
    files: Annotated[list[Path] | None, typer.Argument(help="Event files: JSON, CSV, XML, Parquet; none: what the log holds.")] = None,
    mapping: Mapping = None,
    items: Items = None,
    as_json: AsJson = False,
) -> None:
    """Add event files, or what was collected, to the clean events; what is refused goes to quarantine with a reason.

    Example: rapport ingest events.csv --mapping retailrocket
    """
    from datetime import UTC, datetime

    from pipelines import flow
    from pipelines import ingest as arrow

    settings = home.settings()
    with terminal.rows_done() as progress:
        if files:
            report = arrow.ingest(settings.home, files, mapping=mapping, items_file=items, settings=settings, progress=progress)
        else:
            report = arrow.drain(settings.home, settings=settings)
    if report.last_event is not None:
        flow.write_clock(settings, report.last_event, datetime.now(UTC))
    terminal.show(report, as_json)


@quarantine_app.command("list")
def quarantine_list(
    source: Annotated[str | None, typer.Option(help="The rows of one source, one by one.")] = None, as_json: AsJson = False
) -> None:
    """Counts by source and reason, or a source's rows. Example: rapport quarantine list --source segment"""
    from pipelines import events, tables

    rows = tables.read(home.settings().home, tables.QUARANTINE, ["quarantine_id", "source", "file", "row", "reason", "detail"])
    if source is not None:
        terminal.show_rows(rows[rows["source"] == source].to_dict("records"), as_json)
        return
    counts = rows.value_counts(["source", "reason"]).reset_index()
    counts["meaning"] = counts["reason"].map(events.REASONS)
    terminal.show_rows(counts.to_dict("records"), as_json)


@quarantine_app.command("show")
def quarantine_show(quarantine_id: Annotated[str, typer.Argument(help="As listed in the table.")], as_json: AsJson = False) -> None:
    """One row as received, with the reason. Example: rapport quarantine show ID"""
    from pipelines import tables

    settings = home.settings()
    rows = tables.read(settings.home, tables.QUARANTINE)
    found = rows[rows["quarantine_id"] == quarantine_id]
    if found.empty:
        raise PipelineError(
            f"quarantine: expected the id of a row set aside, found none called {quarantine_id!r}; see `rapport quarantine list --source`"
        )
    with home.vault(settings) as vault:
        (raw,) = vault.unseal(found["subject"].tolist(), found["raw"].tolist())
    text = None if raw is None else raw.decode("utf-8", "backslashreplace")
    terminal.show(found.drop(columns="subject").iloc[0].astype(str).to_dict() | {"raw": text}, as_json)


@quarantine_app.command("replay")
def quarantine_replay(
    ids: Annotated[list[str] | None, typer.Argument(help="Rows; none: all of them.")] = None,
    mapping: Mapping = None,
    as_json: AsJson = False,
) -> None:
    """Read the rows again after a rule or a mapping was mended; each is applied once. Example: rapport quarantine replay"""
    from pipelines import ingest as arrow

    settings = home.settings()
    with terminal.step("replay"):
        report = arrow.replay(settings.home, settings=settings, mapping=mapping, ids=ids or None)
    terminal.show(report, as_json)
