"""What customers get when something breaks: faults made on purpose, one after the other, under load. In: settings. Out: a row for each.

A real service answers on a copy of the home, so that what is broken here is nobody's. The store: cut off, frozen, slow and resetting
through a relay where it is a Redis, cut off and locked where it is a file. The models: a damaged version is made the champion, and the
registry becomes unreadable. Never touches the home itself, nor its Redis.
"""

import contextlib
import json
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from pipelines import registry, tables
from pipelines.errors import RegistryError
from pipelines.settings import Settings
from serving import process
from serving.access import Role, read_key
from serving.bench.relay import FROZEN, KILLED, RESETTING, SLOW, Relay
from serving.bench.sending import Plan, Sending, Sent, percentile
from serving.champions import RECOMMENDER
from serving.process import Process, ServiceError

log = logging.getLogger("rapport.serving")

HEALTHY = "nothing broken"
SECONDS = 10
BACK_S = 5  # that a phase goes on after its fault has ended
RATE = 50.0
CONNECTIONS = 16
N_CUSTOMERS = 200
RECOMMEND = "/recommend"
ENDPOINTS = ("/churn", RECOMMEND)
BROKEN = "churn"  # whose artifact is damaged
# What a service does not read: the path to the models, and what it makes anew.
_LEFT_OUT = shutil.ignore_patterns(
    "raw", "log", "identity", "mlflow", "optuna", "flow", "stream", "requests", "reports", "serving", "served", "drill-*"
)
_SQLITE = b"SQLite format 3\x00"

Fault = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Row:
    """What one endpoint answered while `fault` lasted, and after. `healthy_after_s`: None where it was not, `BACK_S` after the end.

    quality: how good the lists of the sources were when the champion was tested, NDCG@k; nothing where that was not measured.
    """

    fault: str
    endpoint: str
    requests: int
    statuses: Mapping[str, int]  # "lost": no answer
    sources: Mapping[str, int]
    degraded: float  # share of the answers, while it lasted
    p50_ms: float
    p99_ms: float
    healthy_after_s: float | None
    versions: Mapping[str, int]
    quality: Mapping[str, float]

    @property
    def is_passed(self) -> bool:
        """Every request had a usable answer, and all is as before soon after."""
        return set(self.statuses) == {"200"} and self.healthy_after_s is not None


def drill(settings: Settings, *, seconds: int = SECONDS, rate: float = RATE, only: Sequence[str] = ()) -> list[Row]:
    """A row for each fault and endpoint. rate: requests a second to each endpoint; `only`: names of some faults; none: all.

    Raises ServiceError where nothing can be asked.
    """
    home = settings.home.resolve()
    with tempfile.TemporaryDirectory(dir=home, prefix="drill-") as folder, contextlib.ExitStack() as stack:
        own = settings.model_copy(update={"home": Path(folder) / "home"})
        copy_home(home, own.home)
        url = settings.online.redis_url
        relay = None if url is None else stack.enter_context(Relay(url.get_secret_value()))
        if relay is not None:
            own = own.model_copy(update={"online": own.online.model_copy(update={"redis_url": SecretStr(relay.url)})})
        found = faults(own.home, relay)
        if unknown := sorted(set(only) - set(found)):
            raise ServiceError(f"drill: there is no fault named {', '.join(unknown)}; there are: {', '.join(found)}")
        bodies = _bodies(own.home)
        service = stack.enter_context(process.start(own, 0, is_alone=True))
        bodies = {endpoint: _sound(service, endpoint, some) for endpoint, some in bodies.items()}
        asked = {name: fault for name, fault in found.items() if name in (only or found)}
        measured = qualities(own.home)
        return [row for name, fault in asked.items() for row in _phase(service, name, fault, bodies, seconds, rate, measured)]


def faults(home: Path, relay: Relay | None) -> dict[str, Fault]:
    """What can be broken for a service on this home, by name; each lasts as long as its context."""
    store: dict[str, Fault] = {"store cut off": lambda: _moved(home / "feature_store" / "online.db"), "store locked": lambda: _locked(home)}
    if relay is not None:
        troubles = (("store cut off", KILLED), ("store frozen", FROZEN), ("store slow", SLOW), ("store resetting", RESETTING))
        store = {name: lambda trouble=trouble: _troubled(relay, trouble) for name, trouble in troubles}  # type: ignore[misc]
    champions = home / "models" / "champions.json"
    return {
        HEALTHY: contextlib.nullcontext,
        **store,
        "model damaged": lambda: _damaged(home, BROKEN),
        "registry unreadable": lambda: _replaced(champions, b"{"),
    }


def qualities(home: Path) -> dict[str, float]:
    """By source how good the lists of the recommender's champion were on its test window; none where it does not tell, or is none."""
    try:
        told = registry.load_champion(home, RECOMMENDER).manifest.get("ladder", [])
    except RegistryError as error:
        log.warning("drill: how good the lists of each rung are is not known: %s", error)
        return {}
    return {row["rung"]: row["ndcg"] for row in told if row.get("ndcg") is not None}


def copy_home(home: Path, to: Path) -> None:
    """What a service reads of a home, as it is at this moment, writers or not. Tables, which are replaced whole, are linked."""
    shutil.copytree(home, to, symlinks=True, ignore=_LEFT_OUT, copy_function=_copy)


# -- private -----------------------------------------------------------------------------------------------------------


def _copy(source: str, target: str) -> None:
    if source.endswith((".db-wal", ".db-shm")):  # in what `backup` copies
        return
    if source.endswith(".db") and _is_sqlite(source):
        uri = f"{Path(source).resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as held, closing(sqlite3.connect(target)) as made:
            held.backup(made)
        return
    if source.endswith(".parquet"):
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)


def _is_sqlite(path: str) -> bool:
    with Path(path).open("rb") as file:
        return file.read(len(_SQLITE)) == _SQLITE


def _phase(
    service: Process, name: str, fault: Fault, bodies: Mapping[str, Sequence[str]], seconds: int, rate: float, measured: Mapping[str, float]
) -> list[Row]:
    """The fault lasts for the first `seconds` of the load."""
    sendings = {endpoint: Sending(_plan(service, endpoint, bodies[endpoint], seconds + BACK_S, rate)) for endpoint in ENDPOINTS}
    for sending in sendings.values():
        sending.wait_started()
    with fault():
        time.sleep(seconds)
    return [
        _row(name, endpoint, sending.result(), seconds, measured if endpoint == RECOMMEND else {}) for endpoint, sending in sendings.items()
    ]


def _row(name: str, endpoint: str, sent: Sent, seconds: int, measured: Mapping[str, float]) -> Row:
    during, after = sent.part(0, seconds), sent.seconds[seconds:]
    sick = [n for n, second in enumerate(after, start=1) if second.degraded]
    is_back = bool(after) and after[-1].ok > 0 and not after[-1].degraded
    statuses = {**sent.statuses, **({"unsent": sent.unsent} if sent.unsent else {})}
    return Row(
        name, endpoint, sum(statuses.values()), statuses, sent.sources, round(during.degraded / max(during.ok, 1), 3),
        percentile(during.took_ms, 0.5), percentile(during.took_ms, 0.99), (float(sick[-1]) if sick else 0.0) if is_back else None,
        sent.versions, {source: round(measured[source], 4) for source in sent.sources if source in measured},
    )  # fmt: skip


def _plan(service: Process, endpoint: str, bodies: Sequence[str], seconds: float, rate: float) -> Plan:
    headers = {"Authorization": f"Bearer {read_key(service.settings, Role.DECIDE)}", "Content-Type": "application/json"}
    return Plan(service.host, service.port, endpoint, headers, bodies, seconds, connections=CONNECTIONS, rate=rate)


def _bodies(home: Path) -> dict[str, list[str]]:
    if not tables.exists(home, tables.CUSTOMER_CONSENT):
        raise ServiceError(f"drill: nobody is known under {home}; run `rapport demo`, or ingest, build the features and train")
    known = tables.read(home, tables.CUSTOMER_CONSENT)
    customers = [str(customer) for customer in known["customer_id"][known["is_personalization_allowed"]].unique()[:N_CUSTOMERS]]
    asked = customers or ["nobody"]
    return {
        "/churn": [json.dumps({"customer_ids": [customer]}) for customer in asked],
        "/recommend": [json.dumps({"customer_id": customer}) for customer in asked],
    }


def _sound(service: Process, endpoint: str, bodies: Sequence[str]) -> list[str]:
    """Those whose answers are not degraded to begin with: a customer may lack features, fault or none."""
    answers = [(body, service.ask(endpoint, json.loads(body))) for body in bodies]
    sound = [body for body, answer in answers if not answer["degraded"]]
    if not sound:
        causes = sorted({cause for _, answer in answers for cause in answer["causes"]})
        raise ServiceError(
            f"drill: every answer of {endpoint} is degraded before anything is broken ({', '.join(causes)}); mend that first"
        )
    return sound


@contextmanager
def _moved(path: Path) -> Iterator[None]:
    """The file, and what SQLite keeps beside it, is not where it was."""
    parts = [part for end in ("", "-wal", "-shm") if (part := path.with_name(path.name + end)).exists()]
    for part in parts:
        part.rename(part.with_name(f"{part.name}.away"))
    try:
        yield
    finally:
        for part in parts:
            part.with_name(f"{part.name}.away").rename(part)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """A writer holds the store, and does not end."""
    with closing(sqlite3.connect(home / "feature_store" / "online.db", timeout=5.0, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            db.execute("ROLLBACK")


@contextmanager
def _troubled(relay: Relay, trouble: str) -> Iterator[None]:
    relay.trouble = trouble
    try:
        yield
    finally:
        relay.trouble = None


@contextmanager
def _damaged(home: Path, name: str) -> Iterator[None]:
    """A version whose files are not those that were signed is the champion."""
    path = home / "models" / "champions.json"
    told: dict[str, dict[str, Any]] = json.loads(path.read_bytes())
    version = told.get(name, {}).get("version")
    if version is None:  # no model to damage
        yield
        return
    folder = home / "models" / name
    sound = next(one for one in folder.iterdir() if one.name.isdigit() and int(one.name) == int(version))
    copy = shutil.copytree(sound, folder / str(int(version) + 1_000))
    largest = max((file for file in copy.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        file.write(b"\x00damaged\x00")
    told[name]["version"] = int(version) + 1_000
    with _replaced(path, json.dumps(told).encode()):
        yield


@contextmanager
def _replaced(path: Path, content: bytes) -> Iterator[None]:
    """The file holds something else, from one moment to the next."""
    before = path.read_bytes()
    _put(path, content)
    try:
        yield
    finally:
        _put(path, before)


def _put(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}-drill")
    draft.write_bytes(content)
    draft.replace(path)
