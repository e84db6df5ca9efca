"""The front door: one thin command line over pipelines, serving and monitoring.

Here are the verbs that join rooms; those of the pipelines alone are in pipelines/commands. Exit 0 done, 1 failed with one sentence on
stderr, 2 usage. With `--json` the last line of stdout is one JSON object. Heavy libraries are imported by the verb that needs them.
"""

import errno
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from pipelines.commands import achieved, events, features, home, models, people, privacy, progress, status, terminal
from pipelines.commands.events import Items, Mapping
from pipelines.commands.terminal import AsJson
from pipelines.errors import PipelineError

# what a folder or disk answers that a person can mend; any other error of the system is a defect, and shows its trace
_MENDABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR})
_INTERRUPTED = "Query interrupted"  # how DuckDB says that Ctrl-C came while it was at work

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
keys_app = typer.Typer(no_args_is_help=True, help="Keys of callers: list, add, revoke; a running service follows within seconds.")
monitor_app = typer.Typer(no_args_is_help=True, help="Drift and bias; and what customers get when something breaks.")
for part in (events, people, features, models, privacy, status):
    app.add_typer(part.app)
app.add_typer(keys_app, name="keys")
app.add_typer(monitor_app, name="monitor")


def main() -> None:
    """Run the command line; expected errors become one sentence and exit 1, Ctrl-C exit 130."""
    try:
        app()
    except PipelineError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        what = f"{error.filename} could not be used ({error.strerror})" if error.filename else str(error.strerror)
        _fail(f"{what}; mend its rights or free space on its disk, or set RAPPORT_HOME to a folder that can be written")
    except RuntimeError as error:
        if str(error) != _INTERRUPTED:
            raise
        raise SystemExit(130) from None


def _fail(sentence: str) -> NoReturn:
    terminal.err.print(f"[red]rapport:[/red] {escape(sentence)}", soft_wrap=True, highlight=False)
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
    settings = home.settings(simulation={"customers": customers}, training={"trials": trials})
    job = flow.Job(settings, (events.resolve(),) if events else (), mapping, items.resolve() if items else None)
    outcome = progress.run((*flow.steps_for(job), *_monitors()), job)
    with process.start(settings, port=None if serve else 0, is_alone=not serve) as service:
        with terminal.step("serve"):
            service.wait_ready()
            latency = service.measure(achieved.probes(settings))
        url = service.url if serve else f"http://{settings.serving.host}:{settings.serving.port}"
        result = achieved.result_of(outcome, flow.plain(latency), url, time.monotonic() - started)
        achieved.show(result, outcome, settings, as_json=as_json)
        if not serve and not as_json:
            terminal.out.print("  (start the service first: rapport serve)")
        if serve:
            _until_interrupted(service)


@app.command()
def serve(
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes.")] = None,
) -> None:
    """Serve decisions over HTTP until stopped. Example: rapport serve --port 3000"""
    from pipelines.log_lines import write_lines
    from serving import access, process

    settings = home.settings(serving={"port": port, "workers": workers})
    write_lines(settings.serving.log_format)
    for role, key in access.ensure_keys(settings).items():
        terminal.err.print(f"new key of the role {role}: {key} (kept in {settings.home / 'keys'})", highlight=False, soft_wrap=True)
    with process.start(settings, to_console=True) as service:
        service.wait_ready()
        _until_interrupted(service)


@keys_app.command("list")
def keys_list(as_json: AsJson = False) -> None:
    """The keys that were made here, by id; never a key itself. Example: rapport keys list"""
    from serving import keyring

    shown = ("id", "role", "made", "revoked")
    terminal.show_rows([{name: getattr(entry, name) or "" for name in shown} for entry in keyring.entries(home.settings().home)], as_json)


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
    settings = home.settings()
    entry, key = keyring.add(settings.home, role, at=datetime.now(UTC))
    home.record(settings, "key_add", role=role, id=entry.id)
    terminal.show({"id": entry.id, "role": role, "key": key}, as_json)


@keys_app.command("revoke")
def keys_revoke(
    one: Annotated[str, typer.Argument(metavar="ID", help="As `rapport keys list` shows it.")],
    as_json: AsJson = False,
) -> None:
    """Make a key invalid, in running services too. Example: rapport keys revoke 1f0c9a3e"""
    from datetime import UTC, datetime

    from serving import keyring

    settings = home.settings()
    entry = keyring.revoke(settings.home, one, at=datetime.now(UTC))
    home.record(settings, "key_revoke", role=entry.role, id=entry.id)
    terminal.show({"id": entry.id, "role": entry.role, "revoked": entry.revoked}, as_json)


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
    settings = home.settings()
    outcome = progress.run(steps, flow.Job(settings))
    verdicts = {step.name: outcome.summary(step.name) for step in steps}
    if as_json:
        terminal.show(verdicts, as_json)
    else:
        achieved.show_reports(verdicts, settings)
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

    rows = drill(home.settings(), seconds=seconds, only=only or ())
    if as_json:
        print(json.dumps({"drill": [asdict(row) for row in rows]}))  # noqa: T201
    else:
        told = [
            {name: (json.dumps(cell) if cell else "") if isinstance(cell, dict) else cell for name, cell in asdict(row).items()}
            for row in rows
        ]
        terminal.show_rows(told, as_json=False)
    if failed := [f"{row.fault} at {row.endpoint}" for row in rows if not row.is_passed]:
        terminal.err.print(f"[red]rapport:[/red] drill: not as promised: {', '.join(failed)}", soft_wrap=True, highlight=False)
        raise typer.Exit(1)


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
    settings = home.settings()
    settings.home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.home, prefix=".bench-") as folder:
        rows = benches[what](Path(folder))
    if as_json:
        print(json.dumps({"bench": what, "rows": rows}))  # noqa: T201
    else:
        terminal.show_rows(rows, as_json=False)


def _bench_ingest(folder: Path) -> list[dict[str, Any]]:
    from pipelines import bench as measures
    from serving import load

    rows: list[dict[str, Any]] = []
    with terminal.step("files"):
        rows += [asdict(row) for row in measures.ingest_rows(folder / "files")]
    with terminal.step("log"):
        rows += [asdict(row) for row in measures.log_rows(folder / "log")]
    with terminal.step("http"):
        rows += load.measure_collect(home.settings())
    return rows


def _bench_features(folder: Path, *, quick: bool, full: bool) -> list[dict[str, Any]]:
    from pipelines import bench as measures
    from pipelines.settings import OnlineSettings, Settings
    from serving import reading

    sizes = measures.QUICK if quick else measures.FULL if full else measures.USUAL
    with measures.redis_beside(folder / "redis") as url:
        _tell_without_redis(url, "what is written to and read from Redis")
        with terminal.step("training sets, building, loading, freshness"):
            rows = [asdict(row) for row in measures.feature_rows(folder / "features", sizes=sizes, redis_url=url)]
        home = folder / "read"
        with terminal.step("reading"):
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
    with terminal.step("an epoch, a search, fits of more and more rows"):
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
        _tell_without_redis(url, "a store that fails")
        with terminal.step(f"a shop of {shop.customers:,} customers and {shop.items:,} items"):
            generated.fill_shop(settings, sizes=shop)
            if url is not None:
                troubled = Settings(home=folder / "troubled", serving=unlimited, online=OnlineSettings(redis_url=url))
                generated.fill_shop(troubled, sizes=generated.SHOP_TINY)
        with terminal.step("four servers, asked in turns, then in trouble"):
            customers = [f"c{n}" for n in range(generated.SHOP_TINY.customers)]
            return measures.serve_rows(settings, folder, customers=customers, sizes=sizes, redis=troubled)


def _tell_without_redis(url: str | None, what: str) -> None:
    if url is None:
        terminal.err.print(f"not measured: {what}; redis-server is not installed here", highlight=False)


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


def _until_interrupted(service: Any) -> None:
    from serving.clock import Clock

    stands_at = Clock(service.settings).stands_at
    if stands_at is not None:
        terminal.err.print(
            f"answers are as of {stands_at:%Y-%m-%d %H:%M} UTC, where this home stands; events collected from now on lie after that",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    terminal.err.print(f"serving on {service.url}; Ctrl-C stops it", highlight=False)
    with suppress(KeyboardInterrupt):
        service.child.wait()


if __name__ == "__main__":
    main()
