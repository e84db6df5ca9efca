"""Requests over HTTP, made by a process of its own, and what they came to, second by second.

In: an address, bodies, how many at a time or how many a second. Out: statuses, waiting times, what the answers said of themselves. As a
program (`python -m serving.bench.sending`) it is that process: a plan as JSON in, figures as JSON out.

With a rate, a request's time begins when it was due, not when a connection was free: a server that stalls is not let off. What found no
connection until the end is counted as unsent. Where more is offered than can be answered, a plan `drops` at once what finds none free: the
line that would grow here is the sender's own, and every answer would be late however soon the server gave it. Keeps no answer.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic, process_time  # the loop's own clock may know whole milliseconds only
from typing import Any

WARM_UP_S = 0.5
_GRACE_S = 60.0
_TICK_S = 0.001


@dataclass(frozen=True)
class Plan:
    """Who is asked what, and for how long. `rate`: requests a second; None: each connection sends when it was answered."""

    host: str
    port: int
    path: str
    headers: Mapping[str, str]
    bodies: Sequence[str]
    seconds: float
    connections: int = 8
    rate: float | None = None
    warm_up_s: float = WARM_UP_S
    drops: bool = False


@dataclass
class Second:
    """What became of the requests that were due in one second: answered with 200, how long they took, and which of them were degraded."""

    ok: int = 0
    degraded: int = 0
    took_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Sent:
    """What a plan came to. `statuses`: of all answers, warm-up included; "lost": the connection ended first. `versions`: of models."""

    statuses: dict[str, int]
    versions: dict[str, int]
    unsent: int
    seconds: list[Second]
    sources: dict[str, int] = field(default_factory=dict)  # rungs that answered
    cpu_share: float = 0.0  # of one core that the sender needed: near 1 it is the sender that is measured

    @property
    def answered(self) -> int:
        """Requests that got any answer, warm-up included."""
        return sum(n for status, n in self.statuses.items() if status != "lost")

    @property
    def failed(self) -> int:
        """Requests that got no answer, or another one than 200."""
        return sum(n for status, n in self.statuses.items() if status != "200") + self.unsent

    def part(self, start: int = 0, stop: int | None = None) -> Second:
        """These seconds as one."""
        some = self.seconds[start:stop]
        took = sorted(ms for second in some for ms in second.took_ms)
        return Second(sum(second.ok for second in some), sum(second.degraded for second in some), took)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of values in order; 0 where there are none."""
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


class Sending:
    """A plan under way in a process of its own."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._told = tempfile.NamedTemporaryFile(prefix="rapport-sent-")  # noqa: SIM115 - read at the end, which removes it
        self._child = subprocess.Popen(
            [sys.executable, "-m", "serving.bench.sending", self._told.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(asdict(plan)).encode() + b"\n")
        self._child.stdin.flush()

    def wait_started(self) -> None:
        """Return when the measured time begins."""
        assert self._child.stdout is not None
        self._child.stdout.readline()

    def stop(self) -> None:
        """End it before its time."""
        assert self._child.stdin is not None
        self._child.stdin.write(b"stop\n")
        self._child.stdin.flush()

    def result(self) -> Sent:
        """Wait for the end. Raises ServiceError where the sender failed."""
        try:
            _, said = self._child.communicate(timeout=self.plan.seconds + _GRACE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            raise _failure(f"bench: the sender did not end {_GRACE_S:g} s after its time; look at the service's log") from None
        if self._child.returncode:
            code, end = self._child.returncode, said[-500:].decode(errors="replace")
            raise _failure(f"bench: the sender ended with code {code}; the end of what it said: {end}")
        with self._told as told:
            found = json.load(told)
        return Sent(**{**found, "seconds": [Second(**second) for second in found["seconds"]]})


def offer(plan: Plan) -> Sent:
    """Send, wait for the end. Raises ServiceError for any answer but 200: what failed fast is no figure."""
    sent = Sending(plan).result()
    if sent.failed:
        raise _failure(f"bench: {plan.path} is expected to answer 200 always; found {sent.statuses}, {sent.unsent} unsent")
    return sent


def _failure(message: str) -> Exception:
    from serving.process import ServiceError  # not at the top: the sender must be there at once

    return ServiceError(message)


class _Run:
    """What the connections share: requests, clock, counts."""

    def __init__(self, plan: Plan, *, now: float) -> None:
        self.plan, self.started = plan, now + plan.warm_up_s
        self.ends = self.started + plan.seconds
        self.statuses: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.seconds = [Second() for _ in range(max(1, round(plan.seconds)))]
        self.due: deque[float] = deque()
        self.idle: list[_Connection] = []
        self.dropped = 0
        told = "".join(f"{name}: {value}\r\n" for name, value in plan.headers.items())
        head = f"POST {plan.path} HTTP/1.1\r\nhost: {plan.host}\r\n{told}content-length: "
        encoded = [body.encode() for body in plan.bodies]
        self._requests = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in encoded]
        self._n = 0

    def request(self) -> bytes:
        self._n += 1
        return self._requests[self._n % len(self._requests)]

    def note(self, status: str, body: bytes, due: float, now: float) -> None:
        self.statuses[status] += 1
        if status == "200":
            version = body.partition(b'"model_version":')[2].partition(b",")[0]
            self.versions[version.decode()] += 1
            self.sources[body.rpartition(b'"source":"')[2].partition(b'"')[0].decode()] += 1  # the last one: of the whole answer
        place = int((due - self.started) / self.plan.seconds * len(self.seconds))
        if due < self.started or place >= len(self.seconds) or status != "200":
            return
        second = self.seconds[place]
        second.ok += 1
        second.degraded += b'"degraded":true' in body
        second.took_ms.append(round((now - due) * 1e3, 3))


class _Connection(asyncio.Protocol):
    """One connection, one request at a time; a new one where it is lost."""

    def __init__(self, run: _Run) -> None:
        self.run, self.loop = run, asyncio.get_running_loop()
        self.transport: Any = None
        self._answer, self._length, self._due, self._is_busy = b"", -1, 0.0, False

    async def open(self) -> None:
        plan = self.run.plan
        while monotonic() < self.run.ends:
            try:
                await self.loop.create_connection(lambda: self, plan.host, plan.port)
                return
            except OSError:
                self.run.statuses["lost"] += 1
                await asyncio.sleep(0.05)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._next()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if self._length < 0:
            end = self._answer.find(b"\r\n\r\n")
            if end < 0:
                return
            told = self._answer[:end].lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            self._length = end + 4 + int(told or 0)
        if len(self._answer) < self._length:
            return
        answer, self._answer, self._length, self._is_busy = self._answer, b"", -1, False
        self.run.note(answer[9:12].decode(), answer, self._due, monotonic())
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if self._is_busy:
            self.run.statuses["lost"] += 1
        if self in self.run.idle:
            self.run.idle.remove(self)
        self._answer, self._length, self._is_busy = b"", -1, False
        if monotonic() < self.run.ends:
            self.reopening = asyncio.ensure_future(self.open())

    def send(self, due: float) -> None:
        self._due, self._is_busy = due, True
        self.transport.write(self.run.request())

    def close(self) -> None:
        self._is_busy = False
        if self.transport is not None:
            self.transport.abort()

    @property
    def is_busy(self) -> bool:
        return self._is_busy

    def _next(self) -> None:
        now, run = monotonic(), self.run
        if now >= run.ends:
            return
        if run.plan.rate is None:
            self.send(now)
        elif run.due:
            self.send(run.due.popleft())
        else:
            run.idle.append(self)


async def send(plan: Plan, *, stop: asyncio.Event | None = None) -> Sent:
    """What the process does. `stop`: ends it before its time."""
    loop, began_cpu_s = asyncio.get_running_loop(), process_time()
    stop = stop or asyncio.Event()
    run = _Run(plan, now=monotonic())
    connections = [_Connection(run) for _ in range(plan.connections)]
    await asyncio.gather(*(connection.open() for connection in connections))
    starting = loop.call_later(run.started - monotonic(), lambda: (sys.stdout.write("started\n"), sys.stdout.flush()))
    pace = asyncio.ensure_future(_keep_pace(run, plan.rate) if plan.rate is not None else asyncio.sleep(0))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), max(0.0, run.ends - monotonic()))
        run.ends = monotonic()
    await pace
    cpu_share = (process_time() - began_cpu_s) / (plan.warm_up_s + max(run.ends - run.started, 0.001))
    patience = monotonic() + 5.0
    while any(connection.is_busy for connection in connections) and monotonic() < patience:
        await asyncio.sleep(0.01)
    run.statuses["lost"] += sum(connection.is_busy for connection in connections)
    for connection in connections:
        connection.close()
    starting.cancel()
    return Sent(dict(+run.statuses), dict(run.versions), len(run.due) + run.dropped, run.seconds, dict(run.sources), round(cpu_share, 3))


async def _keep_pace(run: _Run, rate: float) -> None:
    """Let requests fall due evenly; each goes out on a connection that is free, or on the next that becomes so."""
    began, n = monotonic(), 0
    while (now := monotonic()) < run.ends:
        while began + n / rate <= now:
            due, n = began + n / rate, n + 1
            if run.idle:
                run.idle.pop().send(due)
            elif run.plan.drops:
                run.dropped += due >= run.started
            else:
                run.due.append(due)
        await asyncio.sleep(_TICK_S)


def _main() -> None:
    import resource

    import uvloop

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    plan = Plan(**json.loads(sys.stdin.buffer.raw.readline()))  # type: ignore[union-attr] # unbuffered: what else comes is `stop`

    async def sent_until_told() -> Sent:
        stop, loop, told = asyncio.Event(), asyncio.get_running_loop(), sys.stdin.fileno()

        def listen() -> None:
            loop.remove_reader(told)
            if os.read(told, 16):  # the end of it: who listens for the result has nothing more to say
                stop.set()

        loop.add_reader(told, listen)
        return await send(plan, stop=stop)

    sent = uvloop.run(sent_until_told())
    Path(sys.argv[1]).write_text(json.dumps(asdict(sent)))  # a file: what is many megabytes long is no pipe's


if __name__ == "__main__":
    _main()
