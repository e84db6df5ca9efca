"""A load of events over HTTP, made by a process of its own, and what the collector did under it.

In: settings. Out: durable events a second, waiting times, and what an event cost the server. As a program (`python -m serving.load`) it
is that process: a plan as JSON in, figures as JSON out. Writes to a home of its own, inside the one of the settings; never to that.
"""

import asyncio
import base64
import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from pipelines.log import Incoming, open_log
from pipelines.settings import Settings
from pipelines.vault import open_vault
from serving import process
from serving.access import Role, read_key
from serving.process import Process, ServiceError

WARM_UP_S = 1.5
PLANS = (("single", 128, 1), ("batched", 64, 100))  # name, connections, events in a request
N_PEOPLE = 20_000
_GRACE_S = 30.0
_EVENT = (
    b'{"type":"track","event":"Product Added","messageId":"%b","userId":"u%07d","anonymousId":"d%07d","timestamp":"%b",'
    b'"properties":{"product_id":"i%05d","category":"books","price":19.9,"quantity":1},"context":{"library":{"name":"load"},'
    b'"consent":{"categoryPreferences":{"analytics":true,"personalization":true,"marketing":false}}}}'
)


@dataclass(frozen=True)
class Plan:
    """Who sends what, and for how long. `batch`: events in a request; 1: single calls."""

    host: str
    port: int
    key: str
    connections: int
    batch: int
    seconds: float


@dataclass(frozen=True)
class Load:
    """What a plan came to. `events`: answered with 200 in the measured time; `acked`: before it too; milliseconds of a request."""

    events: int
    acked: int
    seconds: float
    p50_ms: float
    p99_ms: float
    statuses: dict[str, int]
    cpu_us: float | None = None  # of the server, for an event; None where the system does not tell


def measure_collect(settings: Settings, *, seconds: float = 5.0) -> list[dict[str, Any]]:
    """Rows of `rapport bench ingest`: durable events a second over HTTP, beside the same log with a commit for each request.

    Raises ServiceError where the service does not start, answers with anything but 200, or holds another number of events than it
    acknowledged.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.home, prefix="bench-") as folder:
        own = settings.model_copy(update={"home": Path(folder)})
        with process.start(own, 0, is_alone=True) as service:
            loads = [offer(service, connections=connections, batch=batch, seconds=seconds) for _, connections, batch in PLANS]
        _check(own, sum(load.acked for load in loads))
        return [
            row
            for (name, connections, batch), load in zip(PLANS, loads, strict=True)
            for row in _rows(f"collect {name}, {connections} x {batch}", load, _commit_each(own, batch))
        ]


def offer(service: Process, *, connections: int, batch: int, seconds: float) -> Load:
    """Send to a running service from a process of its own. Raises ServiceError for any answer but 200."""
    plan = Plan(service.host, service.port, read_key(service.settings, Role.COLLECT), connections, batch, seconds)
    pids = family(service.child.pid)
    before = cpu_s(pids)
    done = subprocess.run(
        [sys.executable, "-m", "serving.load"],
        input=json.dumps(asdict(plan)).encode(),
        capture_output=True,
        cwd=Path(__file__).resolve().parents[1],
        timeout=seconds + WARM_UP_S + _GRACE_S,
        check=False,
    )
    if done.returncode:
        raise ServiceError(f"load: the sender ended with code {done.returncode}; the end of what it said: {done.stderr[-500:].decode()}")
    load = Load(**json.loads(done.stdout))
    if set(load.statuses) != {"200"}:
        raise ServiceError(f"load: 200 alone is expected, {load.statuses} was answered; look at the service's log")
    after = cpu_s(pids)
    cpu_us = None if before is None or after is None else (after - before) * 1e6 / load.acked
    return Load(**{**asdict(load), "cpu_us": cpu_us})


async def send(plan: Plan) -> Load:
    """What the process does: every connection sends, waits for its answer and sends again, until the time is up."""
    loop = asyncio.get_running_loop()
    run = _Run(plan, started=loop.time() + WARM_UP_S)
    opened = [await loop.create_connection(lambda: _Sender(run), plan.host, plan.port) for _ in range(plan.connections)]
    await asyncio.gather(*(sender.ended for _, sender in opened))
    ordered = sorted(run.took_s) or [0.0]
    return Load(
        len(run.took_s) * plan.batch,
        run.statuses[b"200"] * plan.batch,
        plan.seconds,
        round(ordered[len(ordered) // 2] * 1000, 2),
        round(ordered[int(len(ordered) * 0.99)] * 1000, 2),
        {status.decode(): n for status, n in run.statuses.items()},
    )


class _Run:
    """What the connections share: the clock, the counts, and the next request."""

    def __init__(self, plan: Plan, *, started: float) -> None:
        self.plan, self.started, self.ends = plan, started, started + plan.seconds
        self.took_s: list[float] = []
        self.statuses: Counter[bytes] = Counter()
        basic = base64.b64encode(f"{plan.key}:".encode()).decode()
        path = "/v1/batch" if plan.batch > 1 else "/v1/track"
        self._head = (
            f"POST {path} HTTP/1.1\r\nhost: {plan.host}\r\nauthorization: Basic {basic}\r\n"
            "content-type: application/json\r\ncontent-length: "
        ).encode()
        self._name, self._n = secrets.token_hex(8).encode(), 0

    def request(self) -> bytes:
        """A request with events that were never sent before."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").encode()
        events = [self._event(now) for _ in range(self.plan.batch)]
        body = events[0] if self.plan.batch == 1 else b'{"batch":[' + b",".join(events) + b'],"sentAt":"' + now + b'"}'
        return b"%b%d\r\n\r\n%b" % (self._head, len(body), body)

    def _event(self, now: bytes) -> bytes:
        self._n += 1
        person = (self._n * 7_919) % N_PEOPLE
        return _EVENT % (b"%b-%d" % (self._name, self._n), person, person, now, self._n % 5_000)


class _Sender(asyncio.Protocol):
    """One connection."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.loop = asyncio.get_running_loop()
        self.ended = self.loop.create_future()
        self.transport: Any = None
        self._answer, self._sent = b"", 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, found, body = self._answer.partition(b"\r\n\r\n")
        if not found or len(body) < int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]):
            return
        now = self.loop.time()
        self._answer = b""
        self.run.statuses[head[9:12]] += 1
        if self.run.started <= now <= self.run.ends and head[9:12] == b"200":
            self.run.took_s.append(now - self._sent)
        if now < self.run.ends:
            self._send()
        else:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _send(self) -> None:
        request = self.run.request()
        self._sent = self.loop.time()
        self.transport.write(request)


def _check(settings: Settings, acked: int) -> None:
    vault = open_vault(settings.home, master=settings.master_key)
    with contextlib.closing(vault), contextlib.closing(open_log(settings.home, settings=settings, vault=vault)) as log:
        held = log.counts().appended
    if held != acked:
        raise ServiceError(f"load: {acked} events were acknowledged and {held} are in the log; the two are expected to be equal")


def _commit_each(settings: Settings, batch: int, *, seconds: float = 2.0) -> float:
    """Events a second that the log takes from one caller who waits for every commit."""
    vault = open_vault(settings.home, master=settings.master_key)
    with contextlib.closing(vault), contextlib.closing(open_log(settings.home, settings=settings, vault=vault)) as log:
        started, n = time.perf_counter(), 0
        payload = _EVENT % (b"x", 1, 1, b"2026-01-01T00:00:00Z", 1)
        who = (vault.pseudonym("user_id", "u0000001"),)
        while time.perf_counter() < started + seconds:
            log.append([Incoming("bench", f"bench-{n + at}", who, payload, 0) for at in range(batch)])
            n += batch
        return n / (time.perf_counter() - started)


def _rows(what: str, load: Load, rival: float) -> list[dict[str, Any]]:
    found = load.events / load.seconds
    first = {"name": what, "value": round(found), "unit": "durable events/s"}
    rows = [{**first, "rival": "the log alone, a commit for each request", "rival_value": round(rival), "ratio": round(found / rival, 2)}]
    figures = [("p50", load.p50_ms, "ms"), ("p99", load.p99_ms, "ms"), ("CPU of the server", load.cpu_us, "us/event")]
    nothing = {"rival": None, "rival_value": None, "ratio": None}
    return rows + [{"name": f"{what}: {name}", "value": round(value, 1), "unit": unit, **nothing} for name, value, unit in figures if value]


def family(pid: int) -> list[int]:
    """The process and everything that it started; only itself where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return [pid]


def cpu_s(pids: list[int]) -> float | None:
    """Seconds of user and system time of these processes; None where one has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        spent = [psutil.Process(pid).cpu_times() for pid in pids]
        return float(sum(one.user + one.system for one in spent))
    return None


def _main() -> None:
    import uvloop

    plan = Plan(**json.load(sys.stdin))
    sys.stdout.write(json.dumps(asdict(uvloop.run(send(plan)))))


if __name__ == "__main__":
    _main()
