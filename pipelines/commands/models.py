"""Models: trained, promoted, rolled back, shadowed, and the scores that they give."""

from typing import Annotated, Any

import typer

from pipelines.commands import comparison, home, progress, terminal
from pipelines.commands.terminal import AsJson

app = typer.Typer()
models_app = typer.Typer(no_args_is_help=True, help="Model versions: list, compare, promote, roll back, shadow.")
app.add_typer(models_app, name="models")


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="churn, intent, recommender, segments or all.")],
    trials: Annotated[int | None, typer.Option(help="Optuna trials.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds of tuning per model.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that try parameters.")] = None,
    when: Annotated[int | None, typer.Option(min=1, help="churn: also when the next order comes, so many days ahead.")] = None,
    value: Annotated[int | None, typer.Option(min=1, help="churn: also what each customer is worth, so many days ahead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Label, join, tune, fit, evaluate against the rivals, pass the gate, register. Example: rapport train churn --trials 30

    Any task that a file of models/ declares is trained by its name: rapport train intent_24h
    """
    from pipelines import flow

    names = ("churn", "intent", "recommender", "segments") if model == "all" else (model,)
    steps = tuple(step for step in flow.STEPS if step.name in {"labels", *(f"train {name}" for name in names)})
    if len(steps) != len(names) + 1:
        steps = (*steps, flow.train_step(_declared_task(model)))
    if "churn" not in names and (when or value):
        raise typer.BadParameter(f"expected churn or all, found {model}: these are told beside churn", param_hint="--when, --value")
    given = {"trials": trials, "timeout_s": timeout, "workers": workers, "when_days": when, "value_days": value}
    settings = home.settings(training=given)
    outcome = progress.run(steps, flow.Job(settings))
    comparison.show_models({name: outcome.summary(f"train {name}") for name in names}, as_json)
    if "segments" in names and not as_json:
        comparison.show_segments(outcome.summary("train segments"))


def _declared_task(name: str) -> str:
    """`name`, if a file of models/ declares a task of it."""
    from pipelines.training import tasks

    known = tasks.discover()
    if name not in known:
        expected = ", ".join(sorted({*known, "recommender", "segments"}))
        raise typer.BadParameter(f"expected one of {expected}, or all; found {name!r}", param_hint="MODEL")
    return name


@models_app.command("list")
def models_list(as_json: AsJson = False) -> None:
    """Champions, the versions behind them, and what the gate said of each. Example: rapport models list"""
    from pipelines import registry, verdicts

    folder = home.settings().home
    versions = verdicts.overview(folder)
    if as_json:
        behind = {name: [row for row in versions if row["model"] == name] for name in registry.champions(folder)}
        terminal.show_rows(
            [{"model": name, **entry, "versions": behind[name]} for name, entry in registry.champions(folder).items()], as_json
        )
        return
    shown = ("model", "version", "role", "metric", "value", "made as of")
    terminal.show_rows([dict(zip(shown, _version_cells(row), strict=True)) for row in versions], as_json)
    for row in versions:
        terminal.out.print(f"  {row['model']} {row['version'] or ''}: {row['gate']}", highlight=False, markup=False, soft_wrap=True)
        for check in row["checks"]:
            found = f"    {'holds' if check['holds'] else 'FAILS'}  {check['name']}: {check['found']}"
            terminal.out.print(found, highlight=False, markup=False, soft_wrap=True)
        for line in comparison.ladder(row["ladder"], row["metric"], row["value"]):
            terminal.out.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)


def _version_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Of a row of the versions, as a person reads it."""
    value, made = "" if row["value"] is None else f"{row['value']:.4f}", (row["as_of"] or "")[:16].replace("T", " ")
    return row["model"], str(row["version"] or ""), row["role"], row["metric"] or "", value, made


@models_app.command("promote")
def models_promote(name: str, version: int, as_json: AsJson = False) -> None:
    """Make a version the champion, whatever the gate said of it. Example: rapport models promote churn 3"""
    from pipelines import registry, tracking, verdicts

    settings = home.settings()
    registry.promote(settings.home, name, version)
    tracking.follow_champion(settings.home, name, settings.training.tracking_url)
    home.record(settings, "promote", model=name, version=version)
    terminal.show({"model": name, "champion": version, "gate": verdicts.said(settings.home, name, version)}, as_json)


@models_app.command("rollback")
def models_rollback(name: str, as_json: AsJson = False) -> None:
    """Return to the champion before. Example: rapport models rollback churn"""
    from pipelines import registry, tracking, verdicts

    settings = home.settings()
    champion = registry.rollback(settings.home, name)
    tracking.follow_champion(settings.home, name, settings.training.tracking_url)
    home.record(settings, "rollback", model=name, champion=champion)
    terminal.show({"model": name, "champion": champion, "gate": verdicts.said(settings.home, name, champion)}, as_json)


@models_app.command("shadow")
def models_shadow(
    name: str,
    version: Annotated[int | None, typer.Argument(help="The challenger; none with --off.")] = None,
    off: Annotated[bool, typer.Option("--off", help="Take the challenger back.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let a version score the same requests as the champion, answering none. Example: rapport models shadow churn 3"""
    from pipelines import challengers

    if (version is None) != off:
        raise typer.BadParameter("expected a version, or --off", param_hint="VERSION")
    settings = home.settings()
    challengers.challenge(settings.home, name, version)
    home.record(settings, "shadow", model=name, version=version)
    terminal.show({"model": name, "challenger": version}, as_json)


@models_app.command("compare")
def models_compare(
    name: str,
    version: Annotated[int | None, typer.Argument(help="The challenger; none: the one that scored last.")] = None,
    as_json: AsJson = False,
) -> None:
    """Champion and challenger on the requests that both scored. Example: rapport models compare churn"""
    from pipelines.comparison import compare

    settings = home.settings()
    with home.vault(settings) as vault:
        found = compare(settings.home, name, settings=settings, vault=vault, version=version)
    terminal.show(found, True) if as_json else comparison.show_challenge(found)


@app.command()
def score(as_json: AsJson = False) -> None:
    """Champion models to scores and candidate lists, into the online store. Example: rapport score"""
    progress.run_one("score", as_json)
