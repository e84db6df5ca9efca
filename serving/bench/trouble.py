"""What callers get in trouble: the champion moves, ten times the load comes, the online store dies, freezes, slows down or resets.

In: settings of a home with champions. Out: rows for `rapport bench serve`. The troubles of the store are made by a relay between the
service and its Redis. Changes champions of the home it is given, and nothing of the store.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from pipelines import registry
from pipelines.settings import Settings
from serving import process
from serving.access import Role, read_key
from serving.bench.relay import TROUBLES, Relay
from serving.bench.row import Row, row
from serving.bench.sending import Plan, Sending, percentile
from serving.load import cpu_s, family
from serving.process import ServiceError

STORE_RATE, STORE_CONNECTIONS = 200.0, 64
BACK_GOAL_S = 10.0
TAKEN_UP_S = 30.0  # a worker looks at the registry every two seconds, and rehearses a new version in a process of its own
LOOKS = 8  # answers, each on a connection of its own, that must have the new version: there are two workers
FEW_CONNECTIONS, MANY_CONNECTIONS = 16, 2_000
OVERLOAD = 10  # times what it can answer
OVERLOAD_TURNS = 3
SLACK_MS = 5.0


@dataclass(frozen=True)
class Load:
    """What a while of load came to: answers with 200, those of them within the deadline, refusals, and all that was answered, a second;
    the share of answers marked degraded; seconds of the server's processor for a second; cores of the sender; answers of another kind.
    """

    ok: float
    degraded: float
    in_time: float
    refused: float
    reached: float
    cpu_s: float
    p99_ms: float
    sender: float
    other: int


@dataclass(frozen=True)
class Turn:
    """Too much load, between two looks at the most that can be answered."""

    before: Load
    load: Load
    after: Load

    @property
    def most(self) -> float:
        """Answers a second."""
        return (self.before.in_time + self.after.in_time) / 2

    @property
    def answer_cpu_s(self) -> float:
        """Of one answer at the peak."""
        return (self.before.cpu_s + self.after.cpu_s) / (self.before.ok + self.after.ok)


def moving_rows(settings: Settings, bodies: Sequence[str], *, moves: int, model: str = "churn") -> list[Row]:
    """The champion moves between two versions while two workers are asked; not before the last move was taken up by both."""
    busy = settings.model_copy(update={"serving": settings.serving.model_copy(update={"workers": 2})})
    first, second = registry.versions(settings.home, model)[:2]
    with process.start(busy, 0, is_alone=True) as service:
        sending = Sending(_plan(service, bodies, seconds=TAKEN_UP_S * (moves + 1)))
        sending.wait_started()
        taken_s = []
        for n in range(moves):
            version = (second, first)[n % 2]
            registry.promote(settings.home, model, version)
            taken_s.append(_taken_up_s(service, json.loads(bodies[0]), str(version)))
        time.sleep(1.0)
        sending.stop()
        sent = sending.result()
    registry.promote(settings.home, model, first)
    name = f"champion moved {moves} times under load, 2 workers"
    return [
        row(f"{name}: requests without 200", sent.failed, "requests", f"of {sent.answered}"),
        row(f"{name}: versions that answered", len(sent.versions), "versions"),
        row(f"{name}: the longest until both workers answered with it", max(taken_s), "s"),
        row(f"{name}: p99", percentile(sent.part().took_ms, 0.99), "ms", "the deadline", settings.serving.deadline_ms),
    ]


def overload_rows(settings: Settings, bodies: Sequence[str], *, seconds: float) -> list[Row]:
    """As much as it can answer and so many times as much offered, in turns, for a machine's own speed changes: a turn's most is the mean of
    before and after it.
    """
    part_s, deadline_ms = max(seconds / 2, 2.0), settings.serving.deadline_ms
    with process.start(settings, 0, is_alone=True) as service:
        few = _plan(service, bodies, seconds=part_s, connections=FEW_CONNECTIONS)
        peaks, busy = [_under(service, few, deadline_ms)], []
        for _ in range(OVERLOAD_TURNS):
            rate = max(peaks[-1].in_time, 1.0) * OVERLOAD
            many = _plan(service, bodies, seconds=part_s, connections=MANY_CONNECTIONS, rate=rate, drops=True)
            busy.append(_under(service, many, deadline_ms))
            peaks.append(_under(service, few, deadline_ms))
    return turns_told(peaks, busy, deadline_ms)


def turns_told(peaks: Sequence["Load"], busy: Sequence["Load"], deadline_ms: float) -> list[Row]:
    """The rows: of the middle one of the turns by its share of the most, and that share in the worst. peaks: one more than there are turns.

    Answers for a second of the server's processor are told beside those for a second of the clock: the sender has the same cores, and needs
    more of them the more it offers.
    """
    turns = [Turn(before, load, after) for before, load, after in zip(peaks, busy, peaks[1:], strict=False)]
    turns.sort(key=lambda turn: turn.load.in_time / turn.most)
    worst, middle = turns[0], turns[len(turns) // 2]
    load, name = middle.load, f"{OVERLOAD} times the load"
    return [
        row(f"{name}: answered within the deadline", load.in_time, "answers/s", "the most it can", middle.most),
        row(f"{name}: the same in the worst of {len(turns)} turns", worst.load.in_time, "answers/s", "the most it can", worst.most),
        row(
            f"{name}: answered within the deadline, by the server's CPU",
            load.in_time / load.cpu_s, "answers/CPU s", "the most it can", 1 / middle.answer_cpu_s,
        ),
        row(f"{name}: p99 of what was accepted", load.p99_ms, "ms", "the deadline", deadline_ms),
        row(f"{name}: refused with 429 or 503", load.refused, "requests/s"),
        row(f"{name}: answers marked degraded", load.degraded, "share"),
        row(f"{name}: reached the server", load.reached, "requests/s", "the most it can answer", middle.most),
        row(f"{name}: the sender's own processor", load.sender, "cores", "at the peak", middle.before.sender),
        row(f"{name}: answered otherwise", sum(turn.load.other for turn in turns), "requests"),
    ]  # fmt: skip


def store_rows(settings: Settings, bodies: Sequence[str], *, seconds: int, back_s: int) -> list[Row]:
    """Each trouble in turn, at a steady rate: healthy, in trouble, and after it. settings: their Redis is the one to be troubled."""
    assert settings.online.redis_url is not None
    found: list[Row] = []
    with Relay(settings.online.redis_url.get_secret_value()) as relay:
        through = settings.model_copy(update={"online": settings.online.model_copy(update={"redis_url": SecretStr(relay.url)})})
        with process.start(through, 0, is_alone=True) as service:
            for trouble in TROUBLES:
                found += _one_trouble(service, relay, bodies, trouble, seconds=seconds, back_s=back_s)
    return found


# -- private -----------------------------------------------------------------------------------------------------------


def _one_trouble(service: process.Process, relay: Relay, bodies: Sequence[str], trouble: str, *, seconds: int, back_s: int) -> list[Row]:
    plan = _plan(service, bodies, seconds=back_s + seconds + back_s, connections=STORE_CONNECTIONS, rate=STORE_RATE)
    sending = Sending(plan)
    sending.wait_started()
    time.sleep(back_s)
    relay.trouble = trouble
    time.sleep(seconds)
    relay.trouble = None
    sent = sending.result()
    healthy = sent.part(0, back_s - 1)
    inside = sent.part(back_s + 1, back_s + seconds)  # the second in which it begins is of both kinds
    usual_ms, deadline_ms = percentile(healthy.took_ms, 0.99), service.settings.serving.deadline_ms
    name = f"store {trouble}, {STORE_RATE:g}/s for {seconds} s"
    return [
        row(f"{name}: requests without 200", sent.failed, "requests", f"of {sent.answered}"),
        row(f"{name}: answers marked degraded", inside.degraded / max(inside.ok, 1), "share"),
        row(f"{name}: the longest", max(sent.part().took_ms, default=0.0), "ms", "the deadline", deadline_ms),
        row(f"{name}: p99", percentile(inside.took_ms, 0.99), "ms", "healthy", usual_ms),
        row(f"{name}: healthy again after", _seconds_back(sent.seconds[back_s + seconds :], usual_ms), "s", "the goal", BACK_GOAL_S),
    ]


def _seconds_back(after: Sequence[Any], usual_ms: float) -> float:
    """Seconds until no answer is degraded and the slowest are as healthy ones are, and stay so."""
    sick = [
        n for n, second in enumerate(after, start=1)
        if second.degraded or percentile(sorted(second.took_ms), 0.99) > 2 * usual_ms + SLACK_MS
    ]  # fmt: skip
    return float(sick[-1]) if sick else 0.0


def _under(service: process.Process, plan: Plan, deadline_ms: float) -> Load:
    """What a plan came to. The service's processor is looked at once the connections are there."""
    pids = family(service.child.pid)
    sending = Sending(plan)
    sending.wait_started()
    before = cpu_s(pids) or 0.0
    sent = sending.result()
    took_s, whole, seconds = max((cpu_s(pids) or 0.0) - before, 0.01), sent.part(), plan.seconds
    refused = sum(n for status, n in sent.statuses.items() if status in ("429", "503"))
    other = sum(n for status, n in sent.statuses.items() if status not in ("200", "429", "503"))
    all_s = seconds + plan.warm_up_s  # statuses are counted from the first request on
    return Load(
        ok=max(whole.ok, 1) / seconds,
        degraded=whole.degraded / max(whole.ok, 1),
        in_time=sum(ms <= deadline_ms for ms in whole.took_ms) / seconds,
        refused=refused / all_s,
        reached=sent.answered / all_s,
        cpu_s=took_s / seconds,
        p99_ms=percentile(whole.took_ms, 0.99),
        sender=sent.cpu_share,
        other=other,
    )


def _taken_up_s(service: process.Process, body: dict[str, Any], version: str) -> float:
    """Seconds until every answer is of this version. Raises ServiceError where that takes too long."""
    began = time.monotonic()
    while time.monotonic() < began + TAKEN_UP_S:
        if all(service.ask("/churn", body)["model_version"] == version for _ in range(LOOKS)):
            return time.monotonic() - began
        time.sleep(0.2)
    raise ServiceError(f"bench: version {version} is the champion, and not all workers answer with it after {TAKEN_UP_S:g} s")


def _plan(
    service: process.Process,
    bodies: Sequence[str],
    *,
    seconds: float,
    connections: int = 8,
    rate: float | None = None,
    drops: bool = False,
) -> Plan:
    headers = {"Authorization": f"Bearer {read_key(service.settings, Role.DECIDE)}", "Content-Type": "application/json"}
    return Plan(service.host, service.port, "/churn", headers, bodies, seconds, connections=connections, rate=rate, drops=drops)
