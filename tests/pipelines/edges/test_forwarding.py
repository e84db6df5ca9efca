"""What brokers hold reaches the log once, whatever is killed; what is no event is set aside and stops nobody."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from pipelines.edges import Forwarded, forward, forwarding, open_edges
from pipelines.errors import StoreError
from pipelines.events import REASONS
from pipelines.log import Incoming, LogFull, Logged, open_log
from pipelines.settings import EdgeSettings, Settings
from pipelines.vault import open_vault

BROKERS = [pytest.param(kind, marks=pytest.mark.server) for kind in ("redis", "kafka", "rabbitmq")]
DEADLINE_S = 60.0  # of a machine that does much else
FORWARDER = [sys.executable, "-m", "pipelines.edges"]


def call(n, **fields):
    return {"type": "track", "event": "Product Viewed", "userId": f"u{n % 7}", "messageId": f"m{n}", "properties": {"n": n}} | fields


def body(n, **fields):
    return json.dumps(call(n, **fields)).encode()


def message(n, payload=None):
    return Incoming("shop", f"m{n}", (), body(n) if payload is None else payload, time.time_ns() // 1_000)


class Memory:
    """An edge without a broker: what is not committed comes again at the next read."""

    name = "memory"

    def __init__(self, payloads, refusals=0, subjects=()):
        self.open = {n: [payload, 0] for n, payload in enumerate(payloads)}
        self.refusals, self.subjects, self.reads = refusals, subjects, 0

    def read(self, group, *, max_events, wait_s=0.0):
        if self.refusals:
            self.refusals -= 1
            raise StoreError("memory: away")
        held = list(self.open.items())[:max_events]
        events = [Logged(n, "shop", self.subjects, payload, 10**15, tries, f"memory:{n}") for n, (payload, tries) in held]
        for event in events:
            self.open[event.position][1] += 1
        self.reads += bool(events)
        if not events:
            time.sleep(0.001)
        return events

    def commit(self, group, positions):
        for position in positions:
            del self.open[position]


class World:
    """A home with its log and vault, and pumps that run beside the test."""

    def __init__(self, home, **edges):
        self.settings = Settings(home=home, edges=EdgeSettings(**edges))
        self.vault = open_vault(home)
        self.log = open_log(home, settings=self.settings, vault=self.vault)

    @contextmanager
    def pumping(self, edge, log=None):
        stop, results = threading.Event(), []
        arguments = {"vault": self.vault, "settings": self.settings, "stop": stop, "rng": random.Random(1)}
        pump = threading.Thread(target=lambda: results.append(forward(edge, log or self.log, **arguments)))
        pump.start()
        try:
            yield results
        finally:
            stop.set()
            pump.join(timeout=DEADLINE_S)
            assert not pump.is_alive()

    def pumped(self, edge, log=None):
        """What became of all that the edge holds."""
        with self.pumping(edge, log) as results:
            until(lambda: not edge.open)
        return results[0]

    def ids(self):
        """The message ids of every event in the log, as often as they are there."""
        found = []
        while events := self.log.read("test", max_events=5_000):
            found += [json.loads(event.payload)["messageId"] for event in events]
        self.log.release("test")
        return found

    def close(self):
        self.log.close()
        self.vault.close()


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path / "home")
    yield world
    world.close()


def until(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE_S:g} s"
        time.sleep(0.01)


class Failing:
    """A log that raises the error for batches that hold one of the ids, `times` times (None: always)."""

    def __init__(self, log, error, ids=None, times=None):
        self.log, self.error, self.ids, self.times = log, error, ids, times

    def append(self, events):
        if self.times != 0 and (self.ids is None or any(event.message_id in self.ids for event in events)):
            self.times = self.times and self.times - 1
            raise self.error
        return self.log.append(events)

    def __getattr__(self, name):
        return getattr(self.log, name)


# -- content

POISON = {
    "not_text": b'{"type": "track", "event": "\xff\xfe", "userId": "u1"}',
    "not_json": b'{"type": "track", "event": "cut o',
    "too_long": body(1, properties={"filler": "x" * 40_000}),
    "too_deep": b'{"type":"track","event":"e","userId":"u1","properties":{"a":' + b"[" * 500 + b"]" * 500 + b"}}",
    "type_unknown": body(2, type="teleport"),
    "field_missing": body(3, event=None),
    "field_invalid": body(4, properties=[1]),
    "identifier_missing": body(5, userId=None),
}


def test_every_kind_of_poison_is_set_aside_at_once_with_its_reason_and_its_bytes(world):
    payloads = [*POISON.values(), body(100), b"", b"[1]"]
    edge = Memory(payloads)
    assert world.pumped(edge) == Forwarded(appended=1, duplicate=0, erased=0, set_aside=10)
    assert edge.reads == 1, "nothing was tried twice"
    aside = [(parked.reason, parked.payload, parked.source) for parked in world.log.parked(99)]
    assert aside == [(reason, payload, "shop") for reason, payload in POISON.items()] + [
        ("not_json", b"", "shop"),
        ("not_json", b"[1]", "shop"),
    ]
    assert {reason for reason, *_ in aside} <= set(REASONS)
    assert world.ids() == ["m100"]


def test_a_message_may_be_a_batch_whose_bad_calls_do_not_stop_the_good_ones(world):
    envelope = {"batch": [call(1), call(2, type="teleport"), call(3)], "context": {"ip": "10.0.0.1"}}
    assert world.pumped(Memory([json.dumps(envelope).encode()])) == Forwarded(2, 0, 0, 1)
    assert sorted(world.ids()) == ["m1", "m3"]
    (parked,) = world.log.parked(9)
    assert (parked.reason, json.loads(parked.payload)["type"]) == ("type_unknown", "teleport")
    assert parked.subjects, "an erasure finds it"


def test_bytes_that_were_set_aside_belong_to_whom_they_name_and_never_to_whom_a_header_names(world):
    payloads = [body(1, type="teleport"), body(2), b"{", b'{}],"x":[{"userId":"u9"}']
    edge = Memory(payloads, subjects=("ada@example.com",))
    world.pumped(edge, Failing(world.log, ValueError(), ids={"m2"}))
    user = {n: world.vault.pseudonym("user_id", f"u{n}") for n in (1, 2)}
    assert [parked.subjects for parked in world.log.parked(9)] == [(user[1],), (), (), (user[2],)]
    assert world.log.remove([user[1], user[2]]) == 2


def test_a_call_without_an_id_that_comes_twice_is_applied_once(world):
    nameless = json.dumps({"type": "track", "event": "Product Viewed", "userId": "u1"}).encode()
    assert world.pumped(Memory([nameless])) == Forwarded(1, 0, 0, 0)
    assert world.pumped(Memory([nameless])) == Forwarded(0, 1, 0, 0), "the same place, so the same message"


def test_poison_that_comes_again_because_its_acknowledgement_was_lost_is_set_aside_once(world):
    payloads = [*POISON.values(), json.dumps({"batch": [call(1), call(2, type="teleport")]}).encode()]
    assert world.pumped(Memory(payloads)) == Forwarded(1, 0, 0, len(payloads))
    kept = [parked.payload for parked in world.log.parked(99)]
    assert world.pumped(Memory(payloads)) == Forwarded(0, len(payloads) + 1, 0, 0)
    assert [parked.payload for parked in world.log.parked(99)] == kept


def test_an_event_of_an_erased_person_does_not_enter_and_is_acknowledged(world):
    world.vault.entomb([world.vault.pseudonym("user_id", "u1")], erased_us=1, receipt="r")
    assert world.pumped(Memory([body(1), body(2)])) == Forwarded(1, 0, 1, 0)
    assert world.ids() == ["m2"]


# -- tries


def test_an_event_whose_applying_raises_is_tried_five_times_and_stops_nobody(world):
    payloads = [body(n) for n in range(50)]
    log = Failing(world.log, ValueError("u3 is in here"), ids={"m7", "m31"})
    edge = Memory(payloads)
    assert world.pumped(edge, log) == Forwarded(48, 0, 0, 2)
    assert edge.reads >= world.settings.edges.max_tries
    assert sorted(world.ids()) == sorted(f"m{n}" for n in range(50) if n not in (7, 31))
    assert [(parked.reason, parked.payload) for parked in world.log.parked(9)] == [
        ("tries_used_up", payloads[7]),
        ("tries_used_up", payloads[31]),
    ]


def test_an_event_that_can_be_applied_at_a_later_try_is(world):
    assert world.pumped(Memory([body(n) for n in range(3)]), Failing(world.log, ValueError(), ids={"m1"}, times=5)) == Forwarded(3, 0, 0, 0)
    assert world.log.parked(9) == []


def test_a_log_that_refuses_is_waited_for_and_no_try_is_counted(world, caplog, monkeypatch):
    monkeypatch.setattr(forwarding, "LONGEST_PAUSE_S", 0.1)
    edge = Memory([body(n) for n in range(20)])
    log = Failing(world.log, LogFull("log: full"), times=8)  # longer than an event may be tried
    assert world.pumped(edge, log) == Forwarded(20, 0, 0, 0)
    assert edge.reads == 1, "what was in hand stayed there"
    assert "goes on in" in caplog.text


def test_a_stop_while_the_log_refuses_leaves_everything_with_the_broker(world):
    edge = Memory([body(n) for n in range(5)])
    with world.pumping(edge, Failing(world.log, LogFull("log: full"))) as results:
        until(lambda: edge.reads)
    assert results == [Forwarded(0, 0, 0, 0)]
    assert len(edge.open) == 5
    assert world.pumped(edge) == Forwarded(5, 0, 0, 0)


def test_a_broker_that_is_away_is_waited_for(world):
    assert world.pumped(Memory([body(1)], refusals=4)) == Forwarded(1, 0, 0, 0)


def test_pauses_grow_are_spread_and_end_at_five_seconds():
    some = forwarding._pauses(random.Random(3))
    pauses = [next(some) for _ in range(20)]
    assert 0.05 <= pauses[0] <= 0.1
    assert all(2.5 <= pause <= 5 for pause in pauses[-10:])
    assert len(set(pauses)) == 20


def test_nothing_of_a_person_is_said_in_the_log_of_the_pump(world, caplog):
    caplog.set_level("DEBUG", "rapport.edges")
    secret = "lady.ada@example.com"
    payloads = [body(1, userId=secret), body(2, userId=secret, type=secret), secret.encode(), body(3, userId=secret)]
    world.pumped(Memory(payloads), Failing(world.log, ValueError(secret), ids={"m3"}))
    assert "raised ValueError" in caplog.text
    assert "3 set_aside" in caplog.text
    assert secret not in caplog.text


# -- kills. The edge is a log in another home here, so that the order of append and acknowledgement is tried without any server.

ORDER = """
import os, signal, sys, threading
from pathlib import Path
from pipelines.edges import forward
from pipelines.log import open_log
from pipelines.settings import Settings
from pipelines.vault import open_vault

settings, source, order = Settings(), Path(sys.argv[1]), sys.argv[2]
edge, vault = open_log(source, settings=settings), open_vault(settings.home)
edge.name = "log"
log = open_log(settings.home, settings=settings, vault=vault)
append, read, commit, appends = log.append, edge.read, edge.commit, []

def dying(events):
    appends.append(len(events))
    if len(appends) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return append(events)

def early(group, **options):
    events = read(group, **options)
    commit(group, [event.position for event in events])
    return events

log.append = dying
if order == "early":
    edge.read, edge.commit = early, lambda *_: None
forward(edge, log, vault=vault, settings=settings, stop=threading.Event())
"""


@pytest.mark.parametrize(("order", "lost"), [("late", 0), ("early", 50)])
def test_an_edge_that_acknowledges_before_the_append_loses_events_when_killed_and_this_one_does_not(order, lost, tmp_path, brokers):
    source = World(tmp_path / "source")
    source.log.append([message(n) for n in range(200)])
    source.close()
    environment = brokers.place("sqlite", tmp_path / "home", batch_events=50, takeover_s=0.5).environment()
    with brokers.process(ORDER, environment, str(tmp_path / "source"), order) as pump:
        assert pump.wait(timeout=DEADLINE_S) == -signal.SIGKILL
    world, source = World(tmp_path / "home", takeover_s=0.5), World(tmp_path / "source", takeover_s=0.5)
    source.log.name = "log"
    with world.pumping(source.log):
        until(lambda: source.log.pending("rapport") == 0)
    found = world.ids()
    for one in (world, source):
        one.close()
    assert len(found) == len(set(found)), "nothing twice"
    assert 200 - len(found) == lost


# As FORWARDER; argv: the append at which it is killed, and whether before or after it.
DYING = """
import os, runpy, signal, sys
from pipelines.log.store import Log

append, appends, nth, when = Log.append, [], int(sys.argv[1]), sys.argv[2]

def dying(log, events):
    appends.append(len(events))
    if (len(appends), when) == (nth, "before"):
        os.kill(os.getpid(), signal.SIGKILL)
    told = append(log, events)
    if len(appends) == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return told

Log.append = dying
runpy.run_module("pipelines.edges", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKERS)
def test_a_killed_forwarder_loses_nothing_and_applies_nothing_twice(kind, place_of):
    total, kills = 600, ("after", "before") if kind == "redis" else ("after",)
    place = place_of(kind, batch_events=20)
    port = place.open()
    port.append([message(n) for n in range(total)])
    port.close()
    world = World(place.settings.home)
    for when in kills:
        with _forwarder(place, [sys.executable, "-c", DYING, "6", when]) as forwarder:
            assert forwarder.wait(timeout=DEADLINE_S) == -signal.SIGKILL
        assert 0 < world.log.counts().appended < total, "killed with work in hand"
    with _forwarder(place) as forwarder:
        until(lambda: world.log.counts().appended == total)
        forwarder.send_signal(signal.SIGTERM)
        said = forwarder.communicate(timeout=DEADLINE_S)[0]
        assert forwarder.returncode == 0, said
    found = world.ids()
    counts = world.log.counts()
    world.close()
    assert sorted(found) == sorted(f"m{n}" for n in range(total))
    assert (counts.appended, counts.parked) == (total, 0)
    assert "appended" in said
    assert "u1" not in said


@pytest.mark.parametrize("kind", BROKERS)
def test_one_percent_of_poison_stops_none_of_the_good_ones(kind, place_of):
    place = place_of(kind, takeover_s=0.5)
    rng, kinds = random.Random(2), [*POISON.values(), None]
    poison = {n: kinds[i % len(kinds)] for i, n in enumerate(sorted(rng.sample(range(2_000), 20)))}
    raising = {f"m{n}" for n, payload in poison.items() if payload is None}
    publisher, edge = place.open(), place.open()
    for start in range(0, 2_000, 500):
        publisher.append([message(n, poison.get(n)) for n in range(start, start + 500)])
    world = World(place.settings.home, takeover_s=0.5)
    with world.pumping(edge, Failing(world.log, ValueError(), ids=raising)) as results:
        until(lambda: world.log.counts().appended == 1_980 and world.log.counts().parked == 20)
    found, aside = world.ids(), world.log.parked(99)
    for one in (publisher, edge, world):
        one.close()
    assert results[0].set_aside == 20
    assert sorted(found) == sorted(f"m{n}" for n in range(2_000) if n not in poison)
    assert sorted(parked.payload for parked in aside) == sorted(payload or body(n) for n, payload in poison.items())
    assert {parked.payload: parked.reason for parked in aside} == {payload: reason for reason, payload in POISON.items()} | {
        body(n): "tries_used_up" for n, payload in poison.items() if payload is None
    }


@pytest.mark.parametrize("kind", BROKERS)
def test_a_server_killed_and_started_again_while_forwarding_costs_no_acknowledged_event_and_no_restart(kind, place_of, request):
    server, place = request.getfixturevalue(f"{kind}_server"), place_of(kind)
    publisher, edge, world = place.open(), place.open(), World(place.settings.home)
    acknowledged = []

    def publish(batches):
        for _ in range(batches):
            some = list(range(len(acknowledged), len(acknowledged) + 50))
            while True:
                try:
                    publisher.append([message(n) for n in some])
                    break
                except StoreError:  # nobody knows whether they are there: they are sent again
                    time.sleep(0.2)
            acknowledged.extend(some)

    with world.pumping(edge):
        publish(10)
        if kind == "rabbitmq":
            time.sleep(3.0)  # a queue's place in its directory is written down up to half a second after it was declared
        publishing = threading.Thread(target=publish, args=(20,))
        publishing.start()
        time.sleep(0.05)
        server.kill()
        time.sleep(1.0)
        server.start()
        publishing.join(timeout=60)
        assert len(acknowledged) == 1_500
        until(lambda: world.log.counts().appended == 1_500)
    found = world.ids()
    for one in (publisher, edge, world):
        one.close()
    assert sorted(found) == sorted(f"m{n}" for n in acknowledged), "none lost, none twice"


@contextmanager
def _forwarder(place, command=FORWARDER):
    child = subprocess.Popen(
        command, env=place.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait(timeout=DEADLINE_S)
        child.stdout.close()


# -- which


def test_only_the_brokers_that_the_settings_name_are_opened_and_none_is_asked_for_anything():
    assert open_edges(Settings()) == []
    nowhere = EdgeSettings(redis_url="redis://127.0.0.1:1", kafka_servers="127.0.0.1:1", rabbitmq_url="amqp://127.0.0.1:1")
    edges = open_edges(Settings(edges=nowhere))
    assert [edge.name for edge in edges] == ["redis", "kafka", "rabbitmq"]
    for edge in edges:
        edge.close()


def test_a_process_without_a_broker_says_so_and_ends(tmp_path, brokers):
    environment = brokers.place("sqlite", tmp_path).environment()
    done = subprocess.run(FORWARDER, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "RAPPORT_EDGES__REDIS_URL" in done.stderr) == (0, True)


def test_a_process_on_a_home_of_another_master_key_says_so_and_fails(tmp_path, brokers):
    open_vault(tmp_path).close()
    place = brokers.place("redis", tmp_path, "redis://127.0.0.1:1")
    environment = place.environment() | {"RAPPORT_MASTER_KEY": "another"}
    done = subprocess.run(FORWARDER, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "RAPPORT_MASTER_KEY" in done.stderr) == (1, True)
