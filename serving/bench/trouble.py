"""What callers get in trouble: the champion moves, ten times the load comes, the online store dies, freezes, slows down or resets.

In: settings of a home with champions. Out: rows for `rapport bench serve`. The troubles of the store are made by a relay between the
service and its Redis. Changes champions of the home it is given, and nothing of the store.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

from pydantic import SecretStr

from pipelines import registry
from pipelines.settings import Settings
from serving import process
from serving.access import Role, read_key
from serving.bench.relay import TROUBLES, Relay
from serving.bench.row import Row, row
from serving.bench.sending import Plan, Sending, Sent, percentile
from serving.load import cpu_s, family
from serving.process import ServiceError

STORE_RATE, STORE_CONNECTIONS = 200.0, 64
BACK_GOAL_S = 10.0
TAKEN_UP_S = 30.0  # a worker looks at the registry every two seconds, and rehearses a new version in a process of its own
LOOKS = 8  # answers, each on a connection of its own, that must have the new version: there are two workers
FEW_CONNECTIONS, MANY_CONNECTIONS = 16, 2_000
OVERLOAD = 10  # times what it can answer
SLACK_MS = 5.0


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
    """As much as it can answer, then so many times as much offered.

    Answers in time for a second of the server's processor are told beside those for a second of the clock: the sender has the same cores,
    and needs more of them the more it offers.
    """
    with process.start(settings, 0, is_alone=True) as service:
        at_peak, peak_cpu_s = _sent(service, _plan(service, bodies, seconds=seconds, connections=FEW_CONNECTIONS))
        peak = at_peak.part().ok / seconds
        many = _plan(service, bodies, seconds=seconds, connections=MANY_CONNECTIONS, rate=max(peak, 1.0) * OVERLOAD, drops=True)
        sent, busy_cpu_s = _sent(service, many)
    whole, deadline_ms = sent.part(), settings.serving.deadline_ms
    in_time = sum(ms <= deadline_ms for ms in whole.took_ms)
    refused = sum(n for status, n in sent.statuses.items() if status in ("429", "503"))
    other = sum(n for status, n in sent.statuses.items() if status not in ("200", "429", "503"))
    name = f"{OVERLOAD} times the load"
    return [
        row(f"{name}: answered within the deadline", in_time / seconds, "answers/s", "the most it can", peak),
        row(
            f"{name}: answered within the deadline, by the server's CPU",
            in_time / busy_cpu_s, "answers/CPU s", "the most it can", at_peak.part().ok / peak_cpu_s,
        ),
        row(f"{name}: p99 of what was accepted", percentile(whole.took_ms, 0.99), "ms", "the deadline", deadline_ms),
        row(f"{name}: refused with 429 or 503", refused, "requests"),
        row(f"{name}: reached the server", sent.answered / (seconds + many.warm_up_s), "requests/s", "the most it can answer", peak),
        row(f"{name}: the sender's own processor", sent.cpu_share, "cores", "at the peak", at_peak.cpu_share),
        row(f"{name}: answered otherwise", other, "requests"),
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


def _sent(service: process.Process, plan: Plan) -> tuple[Sent, float]:
    """What a plan came to, and the seconds of processor time that it took the service once its connections were there."""
    pids = family(service.child.pid)
    sending = Sending(plan)
    sending.wait_started()
    before = cpu_s(pids) or 0.0
    sent = sending.result()
    return sent, max((cpu_s(pids) or 0.0) - before, 0.01)


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
