"""What an answer of the service costs, beside rivals that serve the same models in the same run. In: a filled home. Out: rows for
`rapport bench serve`.

Every server runs at the same time and is asked in turns, so that what disturbs one disturbs the others. CPU is that of a server's whole
process tree, over all requests it answered. Before anything is measured the rivals' answers are held against ours; a run in which a
request failed is refused. Writes only into the folder it is given.
"""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from models.classifier import Classifier
from models.silence import ROLES
from pipelines import registry, windows
from pipelines.settings import Settings
from serving import process
from serving.access import Role, read_key
from serving.bench import rivals, trouble
from serving.bench.rivals import Rival
from serving.bench.row import Row, row
from serving.bench.search import search_rows
from serving.bench.sending import Plan, offer, percentile
from serving.clock import Clock
from serving.fallbacks import Deadline
from serving.load import cpu_s, family
from serving.process import Process, ServiceError
from serving.profile import open_profiles

CEILING = "serving.bench.ceiling:Personalization"
CONNECTIONS = 8
PATIENCE_MS = 10_000
COMPARED = 20  # customers whose answers must be the same everywhere
SCORE_GOAL_US, RECOMMEND_GOAL_US = 400.0, 1_500.0
START_GOAL_S, MEMORY_GOAL_MB = 10.0, 400.0


@dataclass(frozen=True)
class ServeSizes:
    """How long everything is looked at. `trouble_s`: of each trouble, 0 leaves them out; `back_s`: before each, and after it."""

    rounds: int
    seconds: float
    trouble_s: int
    back_s: int
    moves: int


SERVE_QUICK = ServeSizes(rounds=1, seconds=1.0, trouble_s=2, back_s=2, moves=1)
SERVE_USUAL = ServeSizes(rounds=3, seconds=4.0, trouble_s=8, back_s=10, moves=4)
SERVE_FULL = ServeSizes(rounds=3, seconds=8.0, trouble_s=60, back_s=10, moves=10)


@dataclass(frozen=True)
class Side:
    """One server asked one thing."""

    name: str
    server: Process | Rival
    path: str
    bodies: Sequence[str]
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Cost:
    """Of one answer, microseconds of CPU; answers a second; milliseconds of waiting."""

    cpu_us: float
    per_s: float
    p50_ms: float
    p99_ms: float


def serve_rows(
    settings: Settings, folder: Path, *, customers: Sequence[str], sizes: ServeSizes, redis: Settings | None = None
) -> list[Row]:
    """The rows. settings: of a home as `fill_shop` makes it, nobody else's; customers: ids in it; redis: the same shop in a Redis.

    Raises ServiceError where a server does not start, a rival answers otherwise than we, or a request fails.
    """
    rivals.write_plain(settings.home, folder / "plain", at=Clock(settings).now().isoformat())
    rivals.write_mlflow(settings.home, folder / "mlflow")
    # every list is ordered anew, for a few customers ask all the time here
    settings = settings.model_copy(update={"serving": settings.serving.model_copy(update={"ranking_s": 0.0})})
    # nothing is turned away while costs are measured, however busy the machine is: what a busy service does is looked at apart
    patient = settings.model_copy(update={"serving": settings.serving.model_copy(update={"deadline_ms": PATIENCE_MS})})
    found: list[Row] = []
    one = [*map(_text, _one(customers))]
    with contextlib.ExitStack() as running:
        started = time.monotonic()
        service = running.enter_context(process.start(patient, 0, is_alone=True))
        start_s = time.monotonic() - started
        plain = running.enter_context(rivals.plain(folder / "plain"))
        mlflow = running.enter_context(rivals.mlflow_serve(folder / "mlflow"))
        ceiling = running.enter_context(process.start(patient, 0, is_alone=True, service=CEILING))
        rows = features(settings, customers)
        _check_alike(settings, service, plain, mlflow, customers, rows)
        costs = _measured(_sides(service, ceiling, plain, mlflow, customers, rows), sizes)
        found += cost_rows(costs)
        found += _footprint(service, start_s)
    found += search_rows(settings.home)
    if sizes.trouble_s:
        found += trouble.overload_rows(settings, one, seconds=sizes.trouble_s)
    if sizes.moves:
        found += trouble.moving_rows(settings, one, moves=sizes.moves)
    if sizes.trouble_s and redis is not None:
        found += trouble.store_rows(redis, one, seconds=sizes.trouble_s, back_s=sizes.back_s)
    return found


# -- private -----------------------------------------------------------------------------------------------------------


def _one(customers: Sequence[str]) -> list[dict[str, Any]]:
    return [{"customer_ids": [customer]} for customer in customers]


def _text(body: Mapping[str, Any]) -> str:
    return json.dumps(body)


def _ours(path: str, service: Process, bodies: Sequence[Mapping[str, Any]], name: str = "") -> Side:
    headers = {"Authorization": f"Bearer {read_key(service.settings, Role.DECIDE)}", "Content-Type": "application/json"}
    return Side(name or path, service, path, [*map(_text, bodies)], headers)


def _sides(service: Process, ceiling: Process, plain: Rival, mlflow: Rival, customers: Sequence[str], rows: Sequence[str]) -> list[Side]:
    one = _one(customers)
    lists = [{"customer_id": customer, "k": 10} for customer in customers]
    bare = [{**body, "reasons": 0} for body in one]
    return [
        _ours("/churn", service, bare, "ours: churn, no reasons"),
        Side("mlflow", mlflow, "/invocations", rows, mlflow.headers),
        _ours("/churn", service, one, "ours: churn"),
        Side("plain: churn", plain, "/churn", [*map(_text, one)], plain.headers),
        _ours("/intent", service, bare, "ours: intent, no reasons"),
        _ours("/churn", ceiling, one, "ceiling"),
        _ours("/recommend", service, lists, "ours: recommend"),
        Side("plain: recommend", plain, "/recommend", [*map(_text, lists)], plain.headers),
    ]


def _measured(sides: Sequence[Side], sizes: ServeSizes) -> dict[str, Cost]:
    """Medians over the rounds."""
    costs: dict[str, list[Cost]] = {side.name: [] for side in sides}
    for _ in range(sizes.rounds):
        for side in sides:
            costs[side.name].append(_cost(side, sizes.seconds))
    return {
        name: Cost(*(statistics.median(getattr(cost, what) for cost in some) for what in ("cpu_us", "per_s", "p50_ms", "p99_ms")))
        for name, some in costs.items()
    }


def _cost(side: Side, seconds: float) -> Cost:
    pids = family(side.server.child.pid)
    before = cpu_s(pids)
    plan = Plan(side.server.host, side.server.port, side.path, side.headers, side.bodies, seconds, connections=CONNECTIONS)
    sent = offer(plan)
    after, whole = cpu_s(pids), sent.part()
    if before is None or after is None:
        raise ServiceError(f"bench: a process of {side.name} ended while it was measured")
    return Cost((after - before) * 1e6 / sent.answered, whole.ok / seconds, percentile(whole.took_ms, 0.5), percentile(whole.took_ms, 0.99))


def cost_rows(costs: Mapping[str, Cost]) -> list[Row]:
    """The figures of each of our sides, beside its goal, its rivals and the front alone."""
    names = {
        "ours: churn, no reasons": ("/churn, one customer, no reasons", SCORE_GOAL_US, "plain: churn"),
        "ours: churn": ("/churn, one customer", SCORE_GOAL_US, "plain: churn"),
        "ours: intent, no reasons": ("/intent, one customer, no reasons", SCORE_GOAL_US, None),
        "ours: recommend": ("/recommend, 10 of all items", RECOMMEND_GOAL_US, "plain: recommend"),
    }
    told = {"plain: churn": "plain BentoML + Feast SDK + wrapper", "plain: recommend": "plain BentoML + implicit + wrapper"}
    found = []
    for side, (name, goal, rival) in names.items():
        cost = costs[side]
        found.append(row(f"{name}: CPU", cost.cpu_us, "us", "the goal", goal))
        if rival is not None:
            found.append(row(f"{name}: CPU", cost.cpu_us, "us", told[rival], costs[rival].cpu_us))
        if side == "ours: churn, no reasons":
            found.append(row(f"{name}: CPU", cost.cpu_us, "us", "mlflow models serve", costs["mlflow"].cpu_us))
        found.append(row(f"{name}: CPU", cost.cpu_us, "us", "the front alone", costs["ceiling"].cpu_us))
        found.append(row(f"{name}: answers", cost.per_s, "answers/s", "the front alone", costs["ceiling"].per_s))
        found += [row(f"{name}: {what}", value, "ms") for what, value in (("p50", cost.p50_ms), ("p99", cost.p99_ms))]
    return found


def _footprint(service: Process, start_s: float) -> list[Row]:
    worker = max(map(_resident_mb, family(service.child.pid)))
    return [
        row("cold start to ready", start_s, "s", "the goal", START_GOAL_S),
        row("memory of a worker, resident", worker, "MB", "the goal", MEMORY_GOAL_MB),
    ]


def _resident_mb(pid: int) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        return float(psutil.Process(pid).memory_info().rss) / 2**20
    return 0.0


def features(settings: Settings, customers: Sequence[str]) -> list[str]:
    """What `mlflow models serve` is asked: the rows that our service would feed to the same booster."""
    clock, champion = Clock(settings), registry.load_champion(settings.home, "churn")
    learner = Classifier.load(champion.folder)
    profiles = open_profiles(settings.home, max_age_hours=1e9, pseudonym=lambda kind, name: f"{kind}:{name}")
    service = champion.manifest.get("feature_service", "churn_v1")
    read = profiles.read(service, list(customers), at=clock.now(), deadline=Deadline.after_ms(60_000)).columns
    columns = {name: np.array(values, dtype=object if any(isinstance(v, str) for v in values) else float) for name, values in read.items()}
    told = {name: np.full(len(customers), np.nan) for name in windows.REQUEST}
    matrix = learner.encode(windows.derive_columns(columns, round(clock.now().timestamp() * 1e6), request=told))
    rows = [[None if math.isnan(value) else float(value) for value in line] for line in matrix]
    return [rivals.rows_of([line], learner.feature_names_) for line in rows]


def _check_alike(settings: Settings, service: Process, plain: Rival, mlflow: Rival, customers: Sequence[str], rows: Sequence[str]) -> None:
    """Raises ServiceError where a rival's probability is not ours."""
    learner = Classifier.load(registry.load_champion(settings.home, "churn").folder)
    first = _text(_one(customers)[0]).encode()
    rivals.wait_for(plain, "/churn", first)
    rivals.wait_for(mlflow, "/invocations", rows[0].encode())
    for customer, line in list(zip(customers, rows, strict=True))[:COMPARED]:
        body = {"customer_ids": [customer]}
        (ours,) = service.ask("/churn", body)["predictions"]
        if ours["source"] != "personal":
            raise ServiceError(f"bench: a customer of the generated shop was answered from {ours['source']!r}; expected 'personal'")
        _, answer = rivals.ask(plain, "/churn", _text(body).encode())
        theirs = json.loads(answer)["predictions"][0]["probability"]
        _, answer = rivals.ask(mlflow, "/invocations", line.encode())
        raw = json.loads(answer)["predictions"][0]
        calibrated = _calibrated(learner, raw, line)
        for who, value in (("the plain service", theirs), ("mlflow models serve", calibrated)):
            if not math.isclose(value, ours["probability"], rel_tol=1e-6):
                raise ServiceError(f"bench: {who} says {value} where we say {ours['probability']}; one of the two is wrong")


def _calibrated(learner: Classifier, raw: float, line: str) -> float:
    """What the trees alone said of a row, with what they start from and as a probability that means what it says."""
    logit = math.log(raw / (1 - raw))
    if learner.silence_ is not None and learner.history:
        asked = json.loads(line)["dataframe_split"]
        values = dict(zip(asked["columns"], asked["data"][0], strict=True))
        logit += float(learner.silence_.logit(np.array([[values[learner.history[role]] for role in ROLES]], dtype=np.float64))[0])
    slope, intercept = learner.calibration_
    return 1 / (1 + math.exp(-(slope * logit + intercept)))
