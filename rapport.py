"""The front door: one thin command line over pipelines, serving and monitoring.

Every verb parses its words, calls one room and prints what came back. Exit 0 done, 1 failed with one sentence on stderr,
2 usage. With `--json` the last line of stdout is one JSON object. Heavy libraries are imported by the verb that needs them.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from pipelines.errors import InputError, PipelineError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
features_app = typer.Typer(no_args_is_help=True, help="The feature store: declare, compute, load.")
models_app = typer.Typer(no_args_is_help=True, help="Model versions: list, promote, roll back.")
monitor_app = typer.Typer(no_args_is_help=True, help="Drift and bias.")
quarantine_app = typer.Typer(no_args_is_help=True, help="Rows that were set aside, and why.")
identity_app = typer.Typer(no_args_is_help=True, help="Which identifiers are one person, and why.")
activate_app = typer.Typer(no_args_is_help=True, help="Lists of customers for a destination outside: those alone who grant the purpose.")
keys_app = typer.Typer(no_args_is_help=True, help="Keys of callers: list, add, revoke; a running service follows within seconds.")
release_app = typer.Typer(no_args_is_help=True, help="Aggregates that may be published, under differential privacy.")
for name, group in (
    ("quarantine", quarantine_app), ("identity", identity_app), ("features", features_app), ("models", models_app),
    ("monitor", monitor_app), ("activate", activate_app), ("release", release_app), ("keys", keys_app),
):  # fmt: skip
    app.add_typer(group, name=name)

PIPED_WIDTH = 132  # of a table that no terminal limits
out, err = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH), Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]
Mapping = Annotated[
    str | None, typer.Option(help="A mapping file, or the name of a shipped one: retailrocket, online_retail, rees46, taobao.")
]
Person = Annotated[str, typer.Argument(help="A customer_id, a user id, an e-mail address, or kind:value.")]
To = Annotated[Path, typer.Option("--to", help="The file: .csv or .jsonl.")]
Purpose = Annotated[str, typer.Option(help="What the destination may use it for: a purpose that people grant.")]
Identify = Annotated[str, typer.Option(help="What people are called in the file: customer_id, email, phone or user_id.")]
Items = Annotated[Path | None, typer.Option(help="The catalogue: JSON lines of item_id, category, price, available_from.")]


def main() -> None:
    """Run the command line; expected errors become one sentence and exit 1."""
    try:
        app()
    except PipelineError as error:
        err.print(f"[red]rapport:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None


@app.command()
def demo(
    events: Annotated[Path | None, typer.Option(help="An event file of your own; none: the simulated shop.")] = None,
    mapping: Mapping = None,
    items: Items = None,
    customers: Annotated[int | None, typer.Option(help="People in the simulated shop.")] = None,
    trials: Annotated[int | None, typer.Option(help="Optuna trials per model.")] = None,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Keep serving at the end, or only measure.")] = True,
    as_json: AsJson = False,
) -> None:
    """The whole loop: events to served decisions, with a table of what it achieved.

    Example: rapport demo --events events.csv --mapping retailrocket --no-serve
    """
    from pipelines import flow
    from serving import process

    started = time.monotonic()
    settings = _settings(simulation={"customers": customers}, training={"trials": trials})
    job = flow.Job(settings, (events.resolve(),) if events else (), mapping, items.resolve() if items else None)
    outcome = _run((*flow.steps_for(job), *_monitors()), job)
    with process.start(settings, port=None if serve else 0, is_alone=not serve) as service:
        with _step("serve"):
            service.wait_ready()
            latency = service.measure(_probes(settings))
        url = service.url if serve else f"http://{settings.serving.host}:{settings.serving.port}"
        result = _demo_result(outcome, flow.plain(latency), url, time.monotonic() - started)
        _show_demo(result, outcome, settings, as_json=as_json)
        if not serve and not as_json:
            out.print("  (start the service first: rapport serve)")
        if serve:
            _until_interrupted(service)


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

    s = _settings(simulation={"customers": customers, "days": days, "seed": seed}).simulation
    # Knobs itself says which drifts there are
    knobs = shop.Knobs(drift, strength, onset_day, bias, bias_group, treatment_effect, experiment_day)  # type: ignore[arg-type]
    with _step("simulate"):
        report = shop.simulate(out_dir, customers=s.customers, days=s.days, seed=s.seed, knobs=knobs)
    _show(report, as_json)


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

    settings = _settings()
    with _rows_done() as progress:
        if files:
            report = arrow.ingest(settings.home, files, mapping=mapping, items_file=items, settings=settings, progress=progress)
        else:
            report = arrow.drain(settings.home, settings=settings)
    if report.last_event is not None:
        flow.write_clock(settings, report.last_event, datetime.now(UTC))
    _show(report, as_json)


@quarantine_app.command("list")
def quarantine_list(
    source: Annotated[str | None, typer.Option(help="The rows of one source, one by one.")] = None, as_json: AsJson = False
) -> None:
    """Counts by source and reason, or a source's rows. Example: rapport quarantine list --source segment"""
    from pipelines import events, tables

    rows = tables.read(_settings().home, tables.QUARANTINE, ["quarantine_id", "source", "file", "row", "reason", "detail"])
    if source is not None:
        _show_rows(rows[rows["source"] == source].to_dict("records"), as_json)
        return
    counts = rows.value_counts(["source", "reason"]).reset_index()
    counts["meaning"] = counts["reason"].map(events.REASONS)
    _show_rows(counts.to_dict("records"), as_json)


@quarantine_app.command("show")
def quarantine_show(quarantine_id: Annotated[str, typer.Argument(help="As listed in the table.")], as_json: AsJson = False) -> None:
    """One row as received, with the reason. Example: rapport quarantine show ID"""
    from pipelines import tables

    settings = _settings()
    rows = tables.read(settings.home, tables.QUARANTINE)
    found = rows[rows["quarantine_id"] == quarantine_id]
    if found.empty:
        raise PipelineError(
            f"quarantine: expected the id of a row set aside, found none called {quarantine_id!r}; see `rapport quarantine list --source`"
        )
    with _vault(settings) as vault:
        (raw,) = vault.unseal(found["subject"].tolist(), found["raw"].tolist())
    text = None if raw is None else raw.decode("utf-8", "backslashreplace")
    _show(found.drop(columns="subject").iloc[0].astype(str).to_dict() | {"raw": text}, as_json)


@quarantine_app.command("replay")
def quarantine_replay(
    ids: Annotated[list[str] | None, typer.Argument(help="Rows; none: all of them.")] = None,
    mapping: Mapping = None,
    as_json: AsJson = False,
) -> None:
    """Read the rows again after a rule or a mapping was mended; each is applied once. Example: rapport quarantine replay"""
    from pipelines import ingest as arrow

    settings = _settings()
    with _step("replay"):
        report = arrow.replay(settings.home, settings=settings, mapping=mapping, ids=ids or None)
    _show(report, as_json)


@identity_app.command("resolve")
def identity_resolve(as_json: AsJson = False) -> None:
    """Find people under several names by what they said of themselves; the sure ones are joined. Example: rapport identity resolve"""
    from pipelines import ingest as arrow
    from pipelines.identity import linkage

    settings = _settings()
    with _step("resolve"):
        with _vault(settings) as vault:
            found = linkage.run(settings.home, vault=vault)
        arrow.reassign(settings.home, settings=settings)
    _show(found, as_json)


@identity_app.command("explain")
def identity_explain(customer: Person, as_json: AsJson = False) -> None:
    """Why this person's identifiers are one. Example: rapport identity explain anna@example.org"""
    from pipelines.identity import graph

    settings = _settings()
    with _vault(settings) as vault:
        found = graph.explain(settings.home, customer, vault=vault)
    if as_json:
        _show(found, as_json)
        return
    out.print(f"{found.customer_id} is", *found.identifiers, sep="\n  ", highlight=False)
    shown = ("link_id", "left", "right", "kind", "state", "weight", "created_timestamp")
    for title, links in (("linked by", found.path), ("also decided", found.others), ("waiting for review", found.reviews)):
        if links:
            out.print(f"\n{title}")
            _show_rows([{name: getattr(link, name) for name in shown} for link in links], as_json=False)


@identity_app.command("unmerge")
def identity_unmerge(link: Annotated[str, typer.Argument(help="A link, as `explain` shows it.")], as_json: AsJson = False) -> None:
    """Take a link back: both people get their own events and features again. Example: rapport identity unmerge LINK"""
    from pipelines import ingest as arrow
    from pipelines.identity import graph

    settings = _settings()
    with _step("unmerge"):
        decision = graph.unmerge(settings.home, link, by=_who())
        _record(settings, "unmerge", link=link)
        arrow.reassign(settings.home, settings=settings)
    _show(decision, as_json)
    if decision.is_one:
        err.print("other links still join the two; see `rapport identity explain`", highlight=False)


@identity_app.command("reviews")
def identity_reviews(as_json: AsJson = False) -> None:
    """Pairs that a person has to decide. Example: rapport identity reviews"""
    from pipelines.identity import graph

    _show_rows(graph.reviews(_settings().home).to_dict("records"), as_json)


@identity_app.command("decide")
def identity_decide(
    link: Annotated[str, typer.Argument(help="A pair, as `reviews` lists it.")],
    accept: Annotated[bool, typer.Option("--same/--different", help="Whether the two are one person.")],
    as_json: AsJson = False,
) -> None:
    """Decide a pair of the review queue. Example: rapport identity decide LINK --same"""
    from pipelines import ingest as arrow
    from pipelines.identity import graph

    settings = _settings()
    decision = graph.decide(settings.home, link, accept=accept, by=_who())
    _record(settings, "decide link", link=link, same=accept)
    arrow.reassign(settings.home, settings=settings)
    _show(decision, as_json)


@app.command()
def export(customer: Person, to: Annotated[Path | None, typer.Option("--out", help="A file; none: printed.")] = None) -> None:
    """Everything held about a person, as JSON. Example: rapport export anna@example.org --out anna.json"""
    from pipelines import erasure

    settings = _settings()
    _drain(settings)
    held = json.dumps(erasure.export(settings.home, customer, settings=settings, by=_who()), indent=1, default=str, ensure_ascii=False)
    if to is None:
        print(held)  # noqa: T201
    else:
        to.touch(mode=0o600)
        to.write_text(held + "\n")


@app.command()
def erase(customer: Person, as_json: AsJson = False) -> None:
    """Forget a person everywhere, and give a signed receipt. Example: rapport erase anna@example.org"""
    from datetime import UTC, datetime

    from pipelines import erasure

    settings = _settings()
    with _step("erase"):
        _drain(settings)
        receipt = erasure.erase(settings.home, customer, settings=settings, by=_who(), as_of=datetime.now(UTC))
    _show(receipt, as_json)


@app.command()
def receipt(file: Annotated[Path, typer.Argument(help="A receipt of an erasure, as JSON.")], as_json: AsJson = False) -> None:
    """Whether this home signed a receipt as it is; exit 1 where it did not. Example: rapport receipt .rapport/erasures/ID.json"""
    from pipelines import erasure

    _show(erasure.checked(_settings().home, file), as_json)


@app.command("rotate-key")
def rotate_key(as_json: AsJson = False) -> None:
    """Another master key (RAPPORT_NEXT_MASTER_KEY, else a new file); restart what runs on the home. Example: rapport rotate-key"""
    from pipelines import rotation

    settings = _settings()
    with _step("rotate-key"):
        count = rotation.rotate(settings.home, settings=settings)
    _record(settings, "rotate master key", keys=count)
    _show({"keys wrapped": count}, as_json)


@app.command()
def retain(as_json: AsJson = False) -> None:
    """Remove what is older than it may be kept (RAPPORT_PRIVACY__RETENTION_DAYS). Example: rapport retain"""
    from datetime import UTC, datetime

    from pipelines import retention

    settings = _settings()
    with _step("retain"):
        report = retention.apply(settings.home, settings=settings, as_of=datetime.now(UTC))
    _record(settings, "retain", **{key: str(value) for key, value in asdict(report).items()})
    _show(report, as_json)


@app.command("audit")
def audit_trail(as_json: AsJson = False) -> None:
    """Who exported, erased, promoted or changed what; exit 1 where the trail was tampered with. Example: rapport audit"""
    from pipelines import audit

    home = _settings().home
    found = audit.verify(home)
    _show_rows([entry if isinstance(entry, dict) else asdict(entry) for entry in audit.entries(home)], as_json)
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
    settings = _settings()
    profile = tables.read(settings.home, tables.CUSTOMER_PROFILE, ["customer_id", "event_timestamp", by])
    newest = profile.sort_values("event_timestamp").drop_duplicates("customer_id", keep="last").set_index("customer_id")[by]
    at = flow.read_clock(settings)
    found = published.counts(
        settings.home, f"customers by {by}", newest, groups=groups, epsilon=epsilon, settings=settings, by=_who(), as_of=at
    )
    _show(found, as_json)


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

    settings = _settings()
    at = flow.read_clock(settings)
    events = tables.read(settings.home, tables.EVENTS, ["customer_id", "event_timestamp", "revenue_cents"])
    recent = events[events["event_timestamp"] > at - timedelta(days=days)].groupby("customer_id")["revenue_cents"].sum()
    name = f"revenue of {days} days"
    _show(published.total(settings.home, name, recent, bound=bound, epsilon=epsilon, settings=settings, by=_who(), as_of=at), as_json)


@release_app.command("budget")
def release_budget(as_json: AsJson = False) -> None:
    """What of the privacy budget is spent. Example: rapport release budget"""
    from pipelines import release as published

    settings = _settings()
    _show({"spent": published.spent(settings.home), "of": settings.privacy.epsilon_total}, as_json)


@features_app.command("apply")
def features_apply(as_json: AsJson = False) -> None:
    """Register the definitions with Feast. Example: rapport features apply"""
    _run_one("apply", as_json)


@features_app.command("build")
def features_build(as_json: AsJson = False) -> None:
    """Clean events to feature tables. Example: rapport features build"""
    _run_one("features", as_json, then="impute")


@features_app.command("materialize")
def features_materialize(as_json: AsJson = False) -> None:
    """Load the newest feature values into the online store. Example: rapport features materialize"""
    _run_one("materialize", as_json)


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

    settings = _settings()
    with _step("parity"):
        report = parity.check(settings.home, settings=settings, customers=customers, probes=probes, seed=seed, repairs=repair)
    if repair:
        _record(settings, "repair features", **{name: str(number) for name, number in report.repaired.items()})
    _show_parity(report, as_json)
    if report.mismatches:
        raise typer.Exit(1)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="churn, intent, recommender, segments or all.")],
    trials: Annotated[int | None, typer.Option(help="Optuna trials.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds of tuning per model.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that try parameters.")] = None,
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
    settings = _settings(training={"trials": trials, "timeout_s": timeout, "workers": workers})
    outcome = _run(steps, flow.Job(settings))
    _show_models({name: outcome.summary(f"train {name}") for name in names}, as_json)
    if "segments" in names and not as_json:
        _show_segments(outcome.summary("train segments"))


@models_app.command("list")
def models_list(as_json: AsJson = False) -> None:
    """Champions, the versions behind them, and what the gate said of each. Example: rapport models list"""
    from pipelines import registry, verdicts

    home = _settings().home
    versions = verdicts.overview(home)
    if as_json:
        behind = {name: [row for row in versions if row["model"] == name] for name in registry.champions(home)}
        _show_rows([{"model": name, **entry, "versions": behind[name]} for name, entry in registry.champions(home).items()], as_json)
        return
    shown = ("model", "version", "role", "metric", "value", "made as of")
    _show_rows([dict(zip(shown, _version_cells(row), strict=True)) for row in versions], as_json)
    for row in versions:
        out.print(f"  {row['model']} {row['version'] or ''}: {row['gate']}", highlight=False, markup=False, soft_wrap=True)
        for check in row["checks"]:
            found = f"    {'holds' if check['holds'] else 'FAILS'}  {check['name']}: {check['found']}"
            out.print(found, highlight=False, markup=False, soft_wrap=True)


def _version_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Of a row of the versions, as a person reads it."""
    value, made = "" if row["value"] is None else f"{row['value']:.4f}", (row["as_of"] or "")[:16].replace("T", " ")
    return row["model"], str(row["version"] or ""), row["role"], row["metric"] or "", value, made


@models_app.command("promote")
def models_promote(name: str, version: int, as_json: AsJson = False) -> None:
    """Make a version the champion, whatever the gate said of it. Example: rapport models promote churn 3"""
    from pipelines import registry, verdicts

    settings = _settings()
    registry.promote(settings.home, name, version, tracking_url=settings.training.tracking_url)
    _record(settings, "promote", model=name, version=version)
    _show({"model": name, "champion": version, "gate": verdicts.said(settings.home, name, version)}, as_json)


@models_app.command("rollback")
def models_rollback(name: str, as_json: AsJson = False) -> None:
    """Return to the champion before. Example: rapport models rollback churn"""
    from pipelines import registry, verdicts

    settings = _settings()
    champion = registry.rollback(settings.home, name, tracking_url=settings.training.tracking_url)
    _record(settings, "rollback", model=name, champion=champion)
    _show({"model": name, "champion": champion, "gate": verdicts.said(settings.home, name, champion)}, as_json)


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
    settings = _settings()
    challengers.challenge(settings.home, name, version)
    _record(settings, "shadow", model=name, version=version)
    _show({"model": name, "challenger": version}, as_json)


@app.command()
def score(as_json: AsJson = False) -> None:
    """Champion models to scores and candidate lists, into the online store. Example: rapport score"""
    _run_one("score", as_json)


@app.command()
def serve(
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes.")] = None,
) -> None:
    """Serve decisions over HTTP until stopped. Example: rapport serve --port 3000"""
    from serving import access, process

    settings = _settings(serving={"port": port, "workers": workers})
    for role, key in access.ensure_keys(settings).items():
        err.print(f"new key of the role {role}: {key} (kept in {settings.home / 'keys'})", highlight=False, soft_wrap=True)
    with process.start(settings, to_console=True) as service:
        service.wait_ready()
        _until_interrupted(service)


@keys_app.command("list")
def keys_list(as_json: AsJson = False) -> None:
    """The keys that were made here, by id; never a key itself. Example: rapport keys list"""
    from serving import keyring

    shown = ("id", "role", "made", "revoked")
    _show_rows([{name: getattr(entry, name) or "" for name in shown} for entry in keyring.entries(_settings().home)], as_json)


@keys_app.command("add")
def keys_add(
    role: Annotated[str, typer.Argument(help="collect, decide or admin.")],
    as_json: AsJson = False,
) -> None:
    """Make a further key of a role and print it, once: only its hash is kept. Example: rapport keys add decide"""
    from datetime import UTC, datetime

    from serving import keyring
    from serving.access import Role

    if role not in list(Role):
        raise typer.BadParameter(f"expected {', '.join(Role)}; found {role!r}", param_hint="ROLE")
    settings = _settings()
    entry, key = keyring.add(settings.home, role, at=datetime.now(UTC))
    _record(settings, "key_add", role=role, id=entry.id)
    _show({"id": entry.id, "role": role, "key": key}, as_json)


@keys_app.command("revoke")
def keys_revoke(
    one: Annotated[str, typer.Argument(metavar="ID", help="As `rapport keys list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Make a key invalid, in running services too. Example: rapport keys revoke 1f0c9a3e"""
    from datetime import UTC, datetime

    from serving import keyring

    settings = _settings()
    entry = keyring.revoke(settings.home, one, at=datetime.now(UTC))
    _record(settings, "key_revoke", role=entry.role, id=entry.id)
    _show({"id": entry.id, "role": entry.role, "revoked": entry.revoked}, as_json)


@monitor_app.command("run")
def monitor_run(
    report: Annotated[str, typer.Option(help="drift, bias or all.")] = "all",
    as_json: AsJson = False,
) -> None:
    """Write the reports; exit 1 when one raises an alarm. Example: rapport monitor run --report drift"""
    from pipelines import flow

    steps = tuple(step for step in _monitors() if report in (step.name, "all"))
    if not steps:
        raise typer.BadParameter(f"expected drift, bias or all; found {report!r}", param_hint="--report")
    outcome = _run(steps, flow.Job(_settings()))
    verdicts = {step.name: outcome.summary(step.name) for step in steps}
    _show(verdicts, as_json)
    if any(verdict["verdict"] == "alarm" for verdict in verdicts.values()):
        raise typer.Exit(1)


@monitor_app.command("drill")
def monitor_drill(
    seconds: Annotated[int, typer.Option(help="How long each fault lasts.")] = 10,
    only: Annotated[list[str] | None, typer.Option(help="The name of a fault; may be given several times. None: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Break store, models and registry of a copy, under load, and tell what customers got; exit 1 where one got nothing of use.

    Example: rapport monitor drill --seconds 10
    """
    from serving.drill import drill

    rows = drill(_settings(), seconds=seconds, only=only or ())
    if as_json:
        print(json.dumps({"drill": [asdict(row) for row in rows]}))  # noqa: T201
    else:
        told = [{name: json.dumps(cell) if isinstance(cell, dict) else cell for name, cell in asdict(row).items()} for row in rows]
        _show_rows(told, as_json=False)
    if failed := [f"{row.fault} at {row.endpoint}" for row in rows if not row.is_passed]:
        err.print(f"[red]rapport:[/red] drill: not as promised: {', '.join(failed)}", soft_wrap=True, highlight=False)
        raise typer.Exit(1)


@app.command()
def status(as_json: AsJson = False) -> None:
    """Rows per table, champion versions, freshness. Example: rapport status --json"""
    from datetime import UTC, datetime

    from pipelines import ingest, registry, tables

    home = _settings().home
    champions = registry.champions(home)
    built = tables.folder(home, tables.CUSTOMER_ACTIVITY)
    _show(
        {
            "log": ingest.ledger(home),
            "tables": {table.name: tables.count(home, table) for table in tables.TABLES if tables.exists(home, table)},
            "models": {name: entry["version"] for name, entry in champions.items()},
            "freshness_s": round(datetime.now(UTC).timestamp() - built.resolve().stat().st_mtime, 1) if built.exists() else None,
        },
        as_json,
    )


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="ingest, features, training or serve.")],
    quick: Annotated[bool, typer.Option("--quick", help="features, training, serve: smaller sizes.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="features: up to ten million events; training: five million rows; serve: troubles of a minute.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """How fast it is here, each figure beside a named rival in the same run. Example: rapport bench ingest --json"""
    import tempfile

    benches: dict[str, Any] = {
        "ingest": _bench_ingest,
        "features": lambda folder: _bench_features(folder, quick=quick, full=full),
        "training": lambda folder: _bench_training(folder, quick=quick, full=full),
        "serve": lambda folder: _bench_serve(folder, quick=quick, full=full),
    }
    if what not in benches:
        raise typer.BadParameter(f"expected one of {', '.join(benches)}; found {what!r}", param_hint="WHAT")
    settings = _settings()
    settings.home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.home, prefix=".bench-") as folder:
        rows = benches[what](Path(folder))
    if as_json:
        print(json.dumps({"bench": what, "rows": rows}))  # noqa: T201
    else:
        _show_rows(rows, as_json=False)


def _bench_ingest(folder: Path) -> list[dict[str, Any]]:
    from pipelines import bench as measures
    from serving import load

    rows: list[dict[str, Any]] = []
    with _step("files"):
        rows += [asdict(row) for row in measures.ingest_rows(folder / "files")]
    with _step("log"):
        rows += [asdict(row) for row in measures.log_rows(folder / "log")]
    with _step("http"):
        rows += load.measure_collect(_settings())
    return rows


def _bench_features(folder: Path, *, quick: bool, full: bool) -> list[dict[str, Any]]:
    from pipelines import bench as measures
    from pipelines.settings import OnlineSettings, Settings
    from serving import reading

    sizes = measures.QUICK if quick else measures.FULL if full else measures.USUAL
    with measures.redis_beside(folder / "redis") as url:
        with _step("training sets, building, loading, freshness"):
            rows = [asdict(row) for row in measures.feature_rows(folder / "features", sizes=sizes, redis_url=url)]
        home = folder / "read"
        with _step("reading"):
            measures.fill_for_reads(Settings(home=home))
            rows += reading.measure_reads(home, at=measures.AS_OF)
            if url is not None:
                settings = Settings(home=home, online=OnlineSettings(redis_url=url))
                measures.fill_for_reads(settings)
                rows += reading.measure_reads(home, at=measures.AS_OF, redis_url=settings.online.redis_url)
    return rows


def _bench_training(folder: Path, *, quick: bool, full: bool) -> list[dict[str, Any]]:
    from pipelines import bench as measures

    sizes = measures.TRAINING_QUICK if quick else measures.TRAINING_FULL if full else measures.TRAINING_USUAL
    with _step("an epoch, a search, fits of more and more rows"):
        return [asdict(row) for row in measures.training_rows(folder, sizes=sizes)]


def _bench_serve(folder: Path, *, quick: bool, full: bool) -> list[dict[str, Any]]:
    from pipelines import bench as generated
    from pipelines.settings import OnlineSettings, Settings
    from serving.bench import serve as measures

    shop = generated.SHOP_QUICK if quick else generated.SHOP_USUAL
    sizes = measures.SERVE_QUICK if quick else measures.SERVE_FULL if full else measures.SERVE_USUAL
    unlimited: dict[str, Any] = {"rate_per_s": 1e9, "burst": 10**9}  # one key asks for all
    settings, troubled = Settings(home=folder / "shop", serving=unlimited), None
    with generated.redis_beside(folder / "redis") as url:
        with _step(f"a shop of {shop.customers:,} customers and {shop.items:,} items"):
            generated.fill_shop(settings, sizes=shop)
            if url is not None:
                troubled = Settings(home=folder / "troubled", serving=unlimited, online=OnlineSettings(redis_url=url))
                generated.fill_shop(troubled, sizes=generated.SHOP_TINY)
        with _step("four servers, asked in turns, then in trouble"):
            customers = [f"c{n}" for n in range(generated.SHOP_TINY.customers)]
            return measures.serve_rows(settings, folder, customers=customers, sizes=sizes, redis=troubled)


# -- what the verbs share ----------------------------------------------------------------------------------------------


def _settings(**groups: dict[str, Any]) -> Any:
    """The settings of the environment, with what was given on the command line over them. Telemetry is off from here on."""
    from pydantic import ValidationError

    from pipelines.settings import Settings, silence_telemetry

    silence_telemetry()
    try:
        settings = Settings()
        given = {name: {key: value for key, value in group.items() if value is not None} for name, group in groups.items()}
        merged = {name: getattr(settings, name).model_dump() | group for name, group in given.items() if group}
        return Settings(**(settings.model_dump() | merged)) if merged else settings
    except ValidationError as error:
        first = error.errors()[0]
        place = "__".join(str(part) for part in first["loc"]).upper()
        raise InputError(f"settings: RAPPORT_{place} is not usable: {first['msg']}; found {first['input']!r}; mend or unset it") from None


def _activate(audience: Any, to: Path, purpose: str, identify: str, as_json: bool) -> None:
    """Write the audience, as of the wall clock's now, or of the home's where that is later."""
    from datetime import UTC, datetime

    from pipelines import activation, flow

    settings, now = _settings(), datetime.now(UTC)
    with suppress(PipelineError):  # nothing was ingested: the audience says so
        now = max(now, flow.read_clock(settings))
    with _step("activate"):
        told = activation.activate(
            settings.home, audience, to=to, purpose=purpose, settings=settings, by=_who(), as_of=now, identify=identify
        )
    _show(told, as_json)


def _drain(settings: Any) -> None:
    """Put what the log still holds into the tables: somebody may be known from there alone."""
    from pipelines import ingest as arrow

    if (settings.home / "log").is_dir():
        arrow.drain(settings.home, settings=settings)


def _vault(settings: Any) -> Any:
    """The home's vault, closed at the end of the block."""
    from pipelines.vault import open_vault

    return closing(open_vault(settings.home, master=settings.master_key))


def _who() -> str:
    """Who sits at this terminal, for the audit trail."""
    import getpass

    return f"{getpass.getuser()} at the command line"


def _record(settings: Any, action: str, **details: Any) -> None:
    from pipelines import audit

    audit.record(settings.home, action, by=_who(), details=details)


def _monitors() -> tuple[Any, ...]:
    """The steps that watch: they read tables and write reports only."""
    from pipelines import flow, tables

    def step(name: str, run: Callable[[flow.Job], dict[str, Any]]) -> flow.Step:
        watched = (tables.TRAINING_CHURN, tables.TRAINING_INTENT, tables.TRAINING_TASKS)
        reads = (*watched, tables.SCORED_CHURN, tables.SCORED_INTENT, tables.SCORED_TASKS, "models/champions.json")
        writes = (f"reports/{name}.html", f"reports/{name}.json")
        return flow.Step(name, run, reads=reads, writes=writes, settings=("monitoring",), code=("monitoring",))

    def drift(job: flow.Job) -> dict[str, Any]:
        from monitoring import drift

        return flow.plain(drift.run(job.home, settings=job.settings, as_of=job.as_of()))

    def bias(job: flow.Job) -> dict[str, Any]:
        from monitoring import bias

        return flow.plain(bias.run(job.home, settings=job.settings, as_of=job.as_of()))

    return step("drift", drift), step("bias", bias)


def _run(steps: tuple[Any, ...], job: Any) -> Any:
    """Run the steps with a bar on a terminal and one line a step elsewhere."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from pipelines import flow

    def line(done: flow.StepRun) -> None:
        if not err.is_terminal:
            err.print(f"{done.name}: {'unchanged' if done.is_skipped else f'{done.took_s:.1f} s'}", highlight=False)

    def ended(done: flow.StepRun) -> None:
        line(done)
        bar.advance(task)

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=len(steps))
        return flow.run(
            steps,
            job,
            on_start=lambda step: bar.update(task, description=step.name),
            on_end=ended,
        )


def _run_one(name: str, as_json: bool, *, then: str | None = None) -> None:
    """Run this step, and after it `then` where it belongs to the job; show what the first one did."""
    from pipelines import flow

    job = flow.Job(_settings())
    steps = tuple(step for step in flow.steps_for(job) if step.name in (name, then))
    _show(_run(steps, job).summary(name), as_json)


def _until_interrupted(service: Any) -> None:
    err.print(f"serving on {service.url}; Ctrl-C stops it", highlight=False)
    with suppress(KeyboardInterrupt):
        service.child.wait()


@contextmanager
def _rows_done() -> Iterator[Callable[[int, int | None], None]]:
    """A bar of rows on a terminal, and the call that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _step(label: str) -> Iterator[None]:
    """A spinner on a terminal while something long happens."""
    with err.status(label) if err.is_terminal else nullcontext():
        yield


def _show(report: Any, as_json: bool) -> None:
    from pipelines import flow

    plain = flow.plain(report)
    if as_json:
        print(json.dumps(plain))  # noqa: T201
        return
    for key, value in plain.items():
        out.print(f"{key}: {value if not isinstance(value, dict) else json.dumps(value)}", markup=False, soft_wrap=True)


def _show_parity(report: Any, as_json: bool) -> None:
    """Values compared and values that differ, each way of looking on a line; then what differs."""
    if as_json:
        _show(report, as_json)
        return
    stages = report.stages
    _show_rows([{"looked at": name, **{key: stage[key] for key in ("checked", "mismatches")}} for name, stage in stages.items()], as_json)
    for name, stage in stages.items():
        for feature, wrong in stage.get("wrong", {}).items():
            behind = "never right" if wrong["behind_s"] is None else f"up to {wrong['behind_s']:,.0f} s behind"
            models = ", ".join(f"{model} {number} times" for model, number in wrong["models"].items())
            out.print(f"  {name}: {feature} {behind}, {wrong['first']} to {wrong['last']}, fed to {models}", markup=False, soft_wrap=True)
    for feature, number in report.by_feature.items():
        out.print(f"  {feature}: {number:,} values differ", highlight=False)
    for part, found in stages["training"]["parts"].items():
        if found["differing_rows"]:
            what = f"{found['differing_rows']:,} of {found['rows']:,} rows are other than the tables say now; train it again"
            out.print(f"  {part}: {what}", highlight=False, soft_wrap=True)
    for feature, number in report.repaired.items():
        out.print(f"  repaired {feature}: {number:,} values", highlight=False)


def _show_rows(rows: Sequence[dict[Any, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"rows": rows}, default=str))  # noqa: T201
        return
    from rich.table import Table as Grid

    grid = Grid(box=None)
    for column in rows[0] if rows else ():
        grid.add_column(column)
    for row in rows:
        grid.add_row(*(str(value) for value in row.values()))
    out.print(grid if rows else "none")


# -- the demo's table --------------------------------------------------------------------------------------------------


def _probes(settings: Any) -> dict[str, list[dict[str, Any]]]:
    """Request bodies of each endpoint, over real customers."""
    customers = _known_customers(settings)
    one_each = [{"customer_ids": [customer]} for customer in customers]
    return {"/recommend": [{"customer_id": customer, "k": 10} for customer in customers], "/churn": one_each, "/intent": one_each}


def _known_customers(settings: Any) -> list[str]:
    """Up to 50 customers, those with recommendations first."""
    from pipelines import tables

    for table in (tables.RECOMMENDATIONS, tables.IDENTITIES):
        known = tables.read(settings.home, table, ["customer_id"])["customer_id"].drop_duplicates()
        if len(known):
            return known.iloc[:50].tolist()
    return ["nobody"]


def _demo_result(outcome: Any, latency: dict[str, Any], url: str, took_s: float) -> dict[str, Any]:
    events = outcome.summary("ingest")
    return {
        "events": {key: events[key] for key in ("accepted", "duplicate", "quarantined", "consent_dropped")},
        "models": {name: outcome.summary(f"train {name}") for name in ("churn", "intent", "recommender")},
        "latency_ms": latency,
        "reports": {name: outcome.summary(name)["verdict"] for name in ("drift", "bias")},
        "urls": {"service": url, "docs": url + "/", "health": f"{url}/healthz", "metrics": f"{url}/metrics"},
        "took_s": round(took_s, 1),
    }


def _show_demo(result: dict[str, Any], outcome: Any, settings: Any, *, as_json: bool) -> None:
    """What the loop achieved, for a person or a program."""
    if as_json:
        print(json.dumps(result), flush=True)  # noqa: T201
        return
    home = settings.home
    events, reasons = result["events"], outcome.summary("ingest").get("reasons", {})
    out.print("\n[bold]Events[/bold]")
    out.print("  " + ", ".join(f"{count:,} {key.replace('_', '-')}" for key, count in events.items()), highlight=False)
    for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]):
        out.print(f"  quarantined: {count:,} {reason}", highlight=False)
    out.print("\n[bold]Models[/bold] on the newest, unseen window")
    _show_models(result["models"], as_json=False)
    out.print("\n[bold]Latency[/bold] over HTTP, one request at a time")
    for endpoint, latency in result["latency_ms"].items():
        out.print(f"  {endpoint:<12} p50 {latency['p50']:.2f} ms   p99 {latency['p99']:.2f} ms", highlight=False)
    out.print("\n[bold]Reports[/bold]")
    for name, verdict in result["reports"].items():
        out.print(f"  {name:<6} {verdict:<16} {home / 'reports' / f'{name}.html'}", highlight=False, soft_wrap=True)
        judged = outcome.summary(name)
        said = {model: f"{subject['verdict']}, {subject['why']}" for model, subject in judged["subjects"].items()}
        for model, why in (said | {model: f"not judged, {why}" for model, why in judged["not_judged"].items()}).items():
            out.print(f"         {model}: {why}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"\n[bold]Try[/bold] (as of {_as_of(settings)}; the whole run took {result['took_s']:.0f} s)")
    curl = f'curl -s {result["urls"]["service"]}/recommend -H "Authorization: Bearer $(cat {home}/keys/decide.key)"'
    body = json.dumps({"customer_id": _known_customers(settings)[0], "k": 5})
    out.print(f"  {curl} -d '{body}'", markup=False, highlight=False, soft_wrap=True)
    out.print(f"  documentation {result['urls']['docs']}", highlight=False)
    runs = "$RAPPORT_TRAINING__TRACKING_URL" if settings.training.tracking_url else f"sqlite:///{home}/mlflow/mlflow.db"
    out.print(f"  experiments   mlflow ui --backend-store-uri {runs}", highlight=False, soft_wrap=True)


def _as_of(settings: Any) -> str:
    from pipelines import flow

    return f"{flow.read_clock(settings):%Y-%m-%d %H:%M} UTC"


def _show_models(models: dict[str, Any], as_json: bool) -> None:
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
    out.print(grid)
    for name, report in models.items():
        remark = _remark(report)
        if remark:
            out.print(f"  {name}: {remark}", highlight=False, markup=False, soft_wrap=True)


def _declared_task(name: str) -> str:
    """`name`, if a file of models/ declares a task of it."""
    from pipelines.training import tasks

    known = tasks.discover()
    if name not in known:
        expected = ", ".join(sorted({*known, "recommender", "segments"}))
        raise typer.BadParameter(f"expected one of {expected}, or all; found {name!r}", param_hint="MODEL")
    return name


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


def _show_segments(report: dict[str, Any]) -> None:
    """What the segments are, in words, and how many customers have moved since they were last written."""
    shown = ("segment", "customers", "share", "stability", "description")
    rows = [
        {name: f"{row[name]:.2f}" if name in ("share", "stability") else row[name] for name in shown}
        for row in report["details"].get("segments", ())
    ]
    if rows:
        _show_rows(rows, as_json=False)
    for name, title in (("lifecycle", "life cycle"), ("rfm_tier", "recency, frequency and money")):
        counts = ", ".join(f"{count:,} {key}" for key, count in report["details"].get(name, {}).items())
        out.print(f"  {title}: {counts or 'nobody'}", highlight=False)
    moved = report["details"].get("moved")
    if rows and moved and moved["share_moved"] is not None:
        word = "more than chance and little" if moved["is_material"] else "no more than chance or little"
        out.print(f"  {moved['share_moved']:.1%} of customers have another segment than before; shares moved by {word}", highlight=False)


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


if __name__ == "__main__":
    main()
