"""The feature store: declared, computed, loaded, and held against what was served."""

from typing import Annotated, Any

import typer

from pipelines.commands import home, progress, terminal
from pipelines.commands.terminal import AsJson

app = typer.Typer()
features_app = typer.Typer(no_args_is_help=True, help="The feature store: declare, compute, load.")
app.add_typer(features_app, name="features")


@features_app.command("apply")
def features_apply(as_json: AsJson = False) -> None:
    """Register the definitions with Feast. Example: rapport features apply"""
    progress.run_one("apply", as_json)


@features_app.command("build")
def features_build(as_json: AsJson = False) -> None:
    """Clean events to feature tables. Example: rapport features build"""
    progress.run_one("features", as_json, then="impute")


@features_app.command("materialize")
def features_materialize(as_json: AsJson = False) -> None:
    """Load the newest feature values into the online store. Example: rapport features materialize"""
    progress.run_one("materialize", as_json)


@features_app.command("parity")
def features_parity(
    customers: Annotated[int, typer.Option(min=1, help="People looked at, chosen at random.")] = 100,
    probes: Annotated[int, typer.Option(min=1, help="Instants looked at: on events, expiries, one microsecond beside, long after.")] = 300,
    seed: Annotated[int, typer.Option(help="Same seed, same choice.")] = 7,
    repair: Annotated[bool, typer.Option("--repair", help="Write online rows that are wrong anew from the tables.")] = False,
    as_json: AsJson = False,
) -> None:
    """Whether models see when serving what they were trained on, to the last bit; exit 1 where not.

    Example: rapport features parity --customers 200 --json
    """
    from pipelines import parity

    settings = home.settings()
    with terminal.step("parity"):
        report = parity.check(settings.home, settings=settings, customers=customers, probes=probes, seed=seed, repairs=repair)
    if repair:
        home.record(settings, "repair features", **{name: str(number) for name, number in report.repaired.items()})
    _show_parity(report, as_json)
    if report.mismatches:
        raise typer.Exit(1)


def _show_parity(report: Any, as_json: bool) -> None:
    """Values compared and values that differ, each way of looking on a line; then what differs."""
    if as_json:
        terminal.show(report, as_json)
        return
    stages = report.stages
    terminal.show_rows(
        [{"looked at": name, **{key: stage[key] for key in ("checked", "mismatches")}} for name, stage in stages.items()], as_json
    )
    for name, stage in stages.items():
        for feature, wrong in stage.get("wrong", {}).items():
            behind = "never right" if wrong["behind_s"] is None else f"up to {wrong['behind_s']:,.0f} s behind"
            models = ", ".join(f"{model} {number} times" for model, number in wrong["models"].items())
            terminal.out.print(
                f"  {name}: {feature} {behind}, {wrong['first']} to {wrong['last']}, fed to {models}", markup=False, soft_wrap=True
            )
    for feature, number in report.by_feature.items():
        terminal.out.print(f"  {feature}: {number:,} values differ", highlight=False)
    for part, found in stages["training"]["parts"].items():
        if found["differing_rows"]:
            what = f"{found['differing_rows']:,} of {found['rows']:,} rows are other than the tables say now; train it again"
            terminal.out.print(f"  {part}: {what}", highlight=False, soft_wrap=True)
    for feature, number in report.repaired.items():
        terminal.out.print(f"  repaired {feature}: {number:,} values", highlight=False)
