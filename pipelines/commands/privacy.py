"""Keys, retention, the audit trail, and what may leave the house: lists of customers and noisy aggregates."""

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands import home, terminal
from pipelines.commands.terminal import AsJson
from pipelines.errors import PipelineError

app = typer.Typer()
activate_app = typer.Typer(no_args_is_help=True, help="Lists of customers for a destination outside: those alone who grant the purpose.")
release_app = typer.Typer(no_args_is_help=True, help="Aggregates that may be published, under differential privacy.")
app.add_typer(activate_app, name="activate")
app.add_typer(release_app, name="release")

To = Annotated[Path, typer.Option("--to", help="The file: .csv or .jsonl.")]
Purpose = Annotated[str, typer.Option(help="What the destination may use it for: a purpose that people grant.")]
Identify = Annotated[str, typer.Option(help="What people are called in the file: customer_id, email, phone or user_id.")]


@app.command("rotate-key")
def rotate_key(as_json: AsJson = False) -> None:
    """Another master key (RAPPORT_NEXT_MASTER_KEY, else a new file); restart what runs on the home. Example: rapport rotate-key"""
    from pipelines import rotation

    settings = home.settings()
    with terminal.step("rotate-key"):
        count = rotation.rotate(settings.home, settings=settings)
    home.record(settings, "rotate master key", keys=count)
    terminal.show({"keys wrapped": count}, as_json)


@app.command()
def retain(as_json: AsJson = False) -> None:
    """Remove what is older than it may be kept (RAPPORT_PRIVACY__RETENTION_DAYS). Example: rapport retain"""
    from datetime import UTC, datetime

    from pipelines import retention

    settings = home.settings()
    with terminal.step("retain"):
        report = retention.apply(settings.home, settings=settings, as_of=datetime.now(UTC))
    home.record(settings, "retain", **{key: str(value) for key, value in asdict(report).items()})
    terminal.show(report, as_json)


@app.command("audit")
def audit_trail(as_json: AsJson = False) -> None:
    """Who exported, erased, promoted or changed what; exit 1 where the trail was tampered with. Example: rapport audit"""
    from pipelines import audit

    folder = home.settings().home
    found = audit.verify(folder)
    terminal.show_rows([entry if isinstance(entry, dict) else asdict(entry) for entry in audit.entries(folder)], as_json)
    if found.problems:
        raise PipelineError(f"audit: the trail is not as it was written: {'; '.join(found.problems)}")


@activate_app.command("segment")
def activate_segment(
    name: Annotated[str, typer.Argument(help="As `rapport train segments` names it.")],
    to: To,
    purpose: Purpose,
    by: Annotated[str, typer.Option(help="segment, lifecycle or rfm_tier.")] = "segment",
    identify: Identify = "customer_id",
    as_json: AsJson = False,
) -> None:
    """The members of a segment. Example: rapport activate segment dormant --by lifecycle --to dormant.csv --purpose marketing"""
    from pipelines import activation

    _activate(activation.Segment(name, by), to, purpose, identify, as_json)


@activate_app.command("score")
def activate_score(
    score: Annotated[str, typer.Argument(help="churn_probability or intent_probability.")],
    at_least: Annotated[float, typer.Option(min=0, max=1, help="The lowest score of the list.")],
    to: To,
    purpose: Purpose,
    identify: Identify = "customer_id",
    as_json: AsJson = False,
) -> None:
    """Customers with a high score. Example: rapport activate score churn_probability --at-least 0.7 --to leaving.csv --purpose marketing"""
    from pipelines import activation

    _activate(activation.Scored(score, at_least), to, purpose, identify, as_json)


def _activate(audience: Any, to: Path, purpose: str, identify: str, as_json: bool) -> None:
    """Write the audience, as of the wall clock's now, or of the home's where that is later."""
    from datetime import UTC, datetime

    from pipelines import activation, flow

    settings, now = home.settings(), datetime.now(UTC)
    with suppress(PipelineError):  # nothing was ingested: the audience says so
        now = max(now, flow.read_clock(settings))
    with terminal.step("activate"):
        told = activation.activate(
            settings.home, audience, to=to, purpose=purpose, settings=settings, by=home.who(), as_of=now, identify=identify
        )
    terminal.show(told, as_json)


@release_app.command("customers")
def release_customers(
    groups: Annotated[list[str], typer.Argument(help="The groups to tell, by name: they are not taken from the data.")],
    by: Annotated[str, typer.Option(help="region, age_band or gender.")] = "region",
    epsilon: Annotated[float, typer.Option(help="What the release may cost of the budget.")] = 0.5,
    as_json: AsJson = False,
) -> None:
    """How many customers each group has, with noise. Example: rapport release customers north south --by region"""
    from pipelines import flow, tables
    from pipelines import release as published

    if by not in ("region", "age_band", "gender"):
        raise typer.BadParameter(f"expected region, age_band or gender; found {by!r}", param_hint="--by")
    settings = home.settings()
    profile = tables.read(settings.home, tables.CUSTOMER_PROFILE, ["customer_id", "event_timestamp", by])
    newest = profile.sort_values("event_timestamp").drop_duplicates("customer_id", keep="last").set_index("customer_id")[by]
    at = flow.read_clock(settings)
    found = published.counts(
        settings.home, f"customers by {by}", newest, groups=groups, epsilon=epsilon, settings=settings, by=home.who(), as_of=at
    )
    terminal.show(found, as_json)


@release_app.command("revenue")
def release_revenue(
    bound: Annotated[int, typer.Option(help="Cents that one customer counts for at most.")],
    days: Annotated[int, typer.Option(help="Of the log's newest days.")] = 28,
    epsilon: Annotated[float, typer.Option(help="What the release may cost of the budget.")] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Cents taken in the last days, with noise. Example: rapport release revenue --days 28 --bound 50000"""
    from datetime import timedelta

    from pipelines import flow, tables
    from pipelines import release as published

    settings = home.settings()
    at = flow.read_clock(settings)
    events = tables.read(settings.home, tables.EVENTS, ["customer_id", "event_timestamp", "revenue_cents"])
    recent = events[events["event_timestamp"] > at - timedelta(days=days)].groupby("customer_id")["revenue_cents"].sum()
    name = f"revenue of {days} days"
    terminal.show(
        published.total(settings.home, name, recent, bound=bound, epsilon=epsilon, settings=settings, by=home.who(), as_of=at), as_json
    )


@release_app.command("budget")
def release_budget(as_json: AsJson = False) -> None:
    """What of the privacy budget is spent. Example: rapport release budget"""
    from pipelines import release as published

    settings = home.settings()
    terminal.show({"spent": published.spent(settings.home), "of": settings.privacy.epsilon_total}, as_json)
