"""What a run of the whole loop achieved, for a person or a program."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines.commands import comparison, terminal

if TYPE_CHECKING:
    from pipelines.settings import Settings


def probes(settings: "Settings") -> dict[str, list[dict[str, Any]]]:
    """Request bodies of each endpoint, over real customers."""
    customers = _known_customers(settings)
    one_each = [{"customer_ids": [customer]} for customer in customers]
    return {"/recommend": [{"customer_id": customer, "k": 10} for customer in customers], "/churn": one_each, "/intent": one_each}


def _known_customers(settings: "Settings") -> list[str]:
    """Up to 250 customers, those with recommendations first: so many are asked for, and a second list of one costs less."""
    from pipelines import tables

    for table in (tables.RECOMMENDATIONS, tables.IDENTITIES):
        known = tables.read(settings.home, table, ["customer_id"])["customer_id"].drop_duplicates()
        if len(known):
            return known.iloc[:250].tolist()
    return ["nobody"]


def result_of(outcome: Any, latency: dict[str, Any], url: str, took_s: float) -> dict[str, Any]:
    """Of the steps and of the requests that were measured; `took_s`: of all of it."""
    events = outcome.summary("ingest")
    return {
        "events": {key: events[key] for key in ("accepted", "duplicate", "quarantined", "consent_dropped")},
        "models": {name: outcome.summary(f"train {name}") for name in ("churn", "intent", "recommender")},
        "latency_ms": latency,
        "reports": {name: outcome.summary(name)["verdict"] for name in ("drift", "bias")},
        "urls": {"service": url, "docs": url + "/", "health": f"{url}/healthz", "metrics": f"{url}/metrics"},
        "took_s": round(took_s, 1),
    }


def show(result: dict[str, Any], outcome: Any, settings: "Settings", *, as_json: bool) -> None:
    """What the loop achieved, for a person or a program."""
    if as_json:
        print(json.dumps(result), flush=True)  # noqa: T201
        return
    events, reasons = result["events"], outcome.summary("ingest").get("reasons", {})
    terminal.out.print("\n[bold]Events[/bold]")
    terminal.out.print("  " + ", ".join(f"{count:,} {key.replace('_', '-')}" for key, count in events.items()), highlight=False)
    for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]):
        terminal.out.print(f"  quarantined: {count:,} {reason}", highlight=False)
    terminal.out.print("\n[bold]Models[/bold] on the newest, unseen window")
    comparison.show_models(result["models"], as_json=False)
    terminal.out.print("\n[bold]Latency[/bold] over HTTP, one request at a time")
    for endpoint, latency in result["latency_ms"].items():
        terminal.out.print(f"  {endpoint:<12} p50 {latency['p50']:.2f} ms   p99 {latency['p99']:.2f} ms", highlight=False)
    terminal.out.print("\n[bold]Reports[/bold]")
    show_reports({name: outcome.summary(name) for name in result["reports"]}, settings)
    terminal.out.print(f"\n[bold]Try[/bold] (as of {_as_of(settings)}; the whole run took {result['took_s']:.0f} s)")
    curl = f'curl -s {result["urls"]["service"]}/recommend -H "Authorization: Bearer $(cat {settings.home}/keys/decide.key)"'
    body = json.dumps({"customer_id": _known_customers(settings)[0], "k": 5})
    terminal.out.print(f"  {curl} -d '{body}'", markup=False, highlight=False, soft_wrap=True)
    terminal.out.print(f"  documentation {result['urls']['docs']}", highlight=False)
    runs = "$RAPPORT_TRAINING__TRACKING_URL" if settings.training.tracking_url else f"sqlite:///{settings.home}/mlflow/mlflow.db"
    terminal.out.print(f"  experiments   mlflow ui --backend-store-uri {runs}", highlight=False, soft_wrap=True)


def show_reports(judged: Mapping[str, dict[str, Any]], settings: "Settings") -> None:
    """What each report found of each model, and where it lies. judged: summaries of the steps that watch, by name."""
    for name, found in judged.items():
        path = settings.home / "reports" / f"{name}.html"
        terminal.out.print(f"  {name:<6} {found['verdict']:<16} {path}", highlight=False, soft_wrap=True)
        said = {model: f"{subject['verdict']}, {subject['why']}" for model, subject in found["subjects"].items()}
        for model, why in (said | {model: f"not judged, {why}" for model, why in found["not_judged"].items()}).items():
            terminal.out.print(f"         {model}: {why}", highlight=False, markup=False, soft_wrap=True)


def _as_of(settings: "Settings") -> str:
    from pipelines import flow

    return f"{flow.read_clock(settings):%Y-%m-%d %H:%M} UTC"
