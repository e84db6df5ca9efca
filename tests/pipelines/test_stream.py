"""The worker on a real log and a real online store."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import profiles, tables
from pipelines.errors import InputError, StoreError
from pipelines.identity.online import Online
from pipelines.log import Incoming, open_log
from pipelines.online.writer import OnlineWriter
from pipelines.requests import Kind, Requests, State
from pipelines.settings import EdgeSettings, Settings
from pipelines.stream import GROUP, Stepped, Stream, worker
from pipelines.stream.acknowledgement import Acknowledgement
from pipelines.stream.answering import Answering
from pipelines.stream.consents import Word
from pipelines.stream.wake import Wake
from pipelines.vault import Fact, open_vault

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ALLOW, DENY = {"personalization": True}, {"personalization": False}


def us(at):
    return (at - EPOCH) // timedelta(microseconds=1)


class World:
    """A home with its log, vault and worker; `say` appends a call, `step` applies what waits."""

    def __init__(self, home):
        self.home = home
        self.settings = Settings(home=home, edges=EdgeSettings(max_tries=3))
        self.vault = open_vault(home)
        self.log = open_log(home, settings=self.settings, vault=self.vault, consumer="stream")
        self.count = 0
        self.start()

    def start(self):
        self.linker = Online(self.home, vault=self.vault)
        self.stream = Stream(self.home, settings=self.settings, vault=self.vault, log=self.log, linker=self.linker)

    def restart(self):
        """As after a crash: what was read and not committed comes again."""
        self.end()
        self.start()

    def name(self, kind, value):
        return self.vault.pseudonym(kind, value)

    def say(self, *, user=None, device=None, email=None, consent=None, after_s=0, late_s=0, payload=None, **more):
        """A call received `after_s` after NOW, made `late_s` before that."""
        received = NOW + timedelta(seconds=after_s)
        made = received - timedelta(seconds=late_s)
        given = (("user_id", user), ("email", email), ("anonymous_id", device))
        subjects = tuple(self.name(kind, value) for kind, value in given if value)
        call = {"type": "track", "timestamp": made.isoformat(), "messageId": str(self.count), "receivedAt": received.isoformat()} | more
        if consent is not None:
            call["context"] = {"consent": {"categoryPreferences": consent}}
        body = payload if payload is not None else json.dumps(call).encode()
        self.log.append([Incoming("web", str(self.count), subjects, body, us(received))])
        self.count += 1

    def step(self):
        done = Stepped()
        while (one := self.stream.step()).read or one.parked:
            done += one
        return done

    def tell(self, **call):
        self.say(**call)
        return self.step()

    def owner(self, kind, value):
        return self.read("identifier_customer", "customer_id", self.name(kind, value), "identifier")

    def is_allowed(self, customer):
        return {"True": True, "False": False, None: None}[self.read("customer_consent", "is_personalization_allowed", customer)]

    def read(self, view, feature, key, join_key="customer_id"):
        with closing(OnlineWriter(self.home)) as online:
            return online.read(view, feature, [key], join_key=join_key).get(key, (None, 0))[0]

    def everything(self):
        """All rows of the two views, without their times."""
        with closing(OnlineWriter(self.home)) as online:
            online.identifiers_of([])
            statement = 'SELECT entity_key, feature_name, value_text FROM "rapport_{}" ORDER BY 1, 2'
            return [online.db.execute(statement.format(view)).fetchall() for view in ("identifier_customer", "customer_consent")]

    def end(self):
        self.stream.close()
        self.linker.close()
        self.log.release(GROUP)

    def close(self):
        self.stream.close()
        self.linker.close()
        self.log.close()
        self.vault.close()


@pytest.fixture
def world(applied, tmp_path):
    shutil.copytree(applied / "feature_store", tmp_path / "feature_store")
    made = World(tmp_path)
    yield made
    made.close()


# -- identity ----------------------------------------------------------------------------------------------------------


def test_visitors_history_belongs_to_the_customer_the_moment_they_identify(world):
    world.tell(device="d1", consent=ALLOW)
    visitor = world.owner("anonymous_id", "d1")
    assert visitor
    assert world.owner("user_id", "ann") is None
    world.tell(user="ann", device="d1", after_s=5)
    assert world.owner("user_id", "ann") == world.owner("anonymous_id", "d1") == visitor
    assert world.is_allowed(visitor) is True  # and so does what they said


def test_customer_merged_into_another_leaves_a_forwarding_id_and_nothing_else(world):
    world.tell(user="ann", consent=ALLOW)
    world.tell(device="d1", consent=ALLOW, after_s=1)
    first, second = world.owner("user_id", "ann"), world.owner("anonymous_id", "d1")
    assert first != second
    world.tell(user="ann", device="d1", after_s=2)
    kept = world.owner("user_id", "ann")
    gone = ({first, second} - {kept}).pop()
    assert world.owner("anonymous_id", "d1") == kept
    assert world.is_allowed(gone) is None
    assert world.read("identifier_customer", "customer_id", f"customer_id:{gone}", "identifier") == kept


def test_chain_of_merges_leads_every_former_id_to_the_last(world):
    for n, (kind, name) in enumerate([("user", "ann"), ("device", "d1"), ("user", "bob"), ("device", "d2"), ("email", "a@x")]):
        world.tell(**{kind: name}, consent=ALLOW, after_s=n)
    names = [("user_id", "ann"), ("anonymous_id", "d1"), ("user_id", "bob"), ("anonymous_id", "d2"), ("email", "a@x")]
    before = {world.owner(kind, value) for kind, value in names}
    assert len(before) == 5
    world.tell(user="bob", device="d2", after_s=10)
    world.tell(user="ann", device="d1", after_s=11)
    world.tell(user="bob", email="a@x", after_s=12)
    world.tell(user="ann", email="a@x", after_s=13)
    (kept,) = {world.owner(kind, value) for kind, value in names}
    for former in before - {kept}:
        assert world.read("identifier_customer", "customer_id", f"customer_id:{former}", "identifier") == kept
        assert world.is_allowed(former) is None
    assert world.is_allowed(kept) is True


def test_what_an_ingest_decided_is_followed(world):
    world.tell(user="ann", consent=ALLOW)
    world.tell(user="bob", consent=DENY, after_s=1)
    names = [world.name("user_id", user) for user in ("ann", "bob")]
    assert world.owner("user_id", "ann") != world.owner("user_id", "bob")
    decide(world, names, "link")
    assert world.owner("user_id", "ann") == world.owner("user_id", "bob")
    assert world.is_allowed(world.owner("user_id", "ann")) is False  # the newer word of what is one person now
    decide(world, names, "cut")
    assert world.owner("user_id", "ann") != world.owner("user_id", "bob")
    assert [world.is_allowed(world.owner("user_id", user)) for user in ("ann", "bob")] == [True, False]


def test_a_worker_of_its_own_follows_what_an_ingest_decides_while_it_runs(world):
    world.tell(user="ann", consent=ALLOW)
    world.tell(user="bob", consent=ALLOW, after_s=1)
    world.end()
    names = [world.name("user_id", user) for user in ("ann", "bob")]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAPPORT_")}
    with (world.home / "worker.log").open("wb") as out:
        command = [sys.executable, "-m", "pipelines.stream"]
        process = subprocess.Popen(command, env=variables | {"RAPPORT_HOME": str(world.home)}, stdout=out, stderr=out)
    try:
        wait_for(world, "at work", process)
        write_edge(world, names, "link")
        until_s = time.monotonic() + 120
        while world.owner("user_id", "ann") != world.owner("user_id", "bob"):
            assert time.monotonic() < until_s, (world.home / "worker.log").read_text()
            time.sleep(0.05)
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert not list((world.home / "identity").glob("*.part"))
    assert len(list((world.home / "identity").glob("online*.db"))) == 1
    world.start()


def wait_for(world, words, process):
    until_s = time.monotonic() + 60
    while words not in (said := (world.home / "worker.log").read_text()):
        assert time.monotonic() < until_s, said
        assert process.poll() is None, said
        time.sleep(0.05)


def decide(world, names, state):
    write_edge(world, names, state)
    world.stream._refreshed_s = 0.0  # as if the time between two looks had passed
    world.step()


def write_edge(world, names, state):
    left, right = sorted(names)
    edge = {"link_id": "l", "left": left, "right": right, "kind": "manual", "state": state, "created_timestamp": NOW}
    schema = tables.IDENTITY_EDGES.schema
    tables.write(world.home, tables.IDENTITY_EDGES, pa.Table.from_pylist([dict.fromkeys(schema.names) | edge], schema))


# -- consent -----------------------------------------------------------------------------------------------------------


def test_withdrawal_is_effective_at_once_and_a_late_permission_does_not_undo_it(world):
    world.tell(user="ann", consent=ALLOW)
    customer = world.owner("user_id", "ann")
    assert world.is_allowed(customer) is True
    world.tell(user="ann", consent=DENY, after_s=0.2)
    assert world.is_allowed(customer) is False
    world.tell(user="ann", consent=ALLOW, after_s=10, late_s=9.9)  # made between the two
    assert world.is_allowed(customer) is False
    world.tell(user="ann", consent=ALLOW, after_s=11)  # the control: a newer one does
    assert world.is_allowed(customer) is True


@pytest.mark.parametrize("said", [{"personalization": "true"}, {"personalization": 1}, {"personalization": None}, {"personalization": {}}])
def test_statement_that_is_not_exactly_true_is_a_refusal(world, said):
    world.tell(user="ann", consent=said)
    assert world.is_allowed(world.owner("user_id", "ann")) is False


@pytest.mark.parametrize("said", [{}, [], "yes", {"marketing": True}, {"other": True}])
def test_what_says_nothing_of_the_purpose_allows_nothing(world, said):
    assert world.tell(user="ann", consent=said).applied == 1
    assert world.is_allowed(world.owner("user_id", "ann")) is None


def test_consent_event_is_a_statement_too(world):
    world.tell(user="ann", event="Consent Updated", properties={"categoryPreferences": ALLOW})
    assert world.is_allowed(world.owner("user_id", "ann")) is True


def test_permission_of_the_far_future_is_no_event(world):
    done = world.tell(user="ann", consent=ALLOW, late_s=-86_400)
    assert (done.ignored, done.applied) == (1, 0)
    world.tell(user="ann", timestamp="yesterday", consent=ALLOW)
    assert world.owner("user_id", "ann") is None


def test_what_the_tables_know_counts_until_somebody_says_otherwise(world):
    ann = world.name("user_id", "ann")
    told = {"identifier": ann, "customer_id": "c1", "purpose": "personalization", "event_timestamp": NOW, "created_timestamp": NOW}
    declared = told | {"is_allowed": True, "basis": "declared: published"}
    publish(world, [declared])
    world.tell(user="ann", after_s=1)
    customer = world.owner("user_id", "ann")
    assert world.is_allowed(customer) is True  # the declared basis of its source
    world.tell(user="ann", consent=DENY, after_s=2)
    assert world.is_allowed(customer) is False
    publish(world, [declared, told | {"is_allowed": True, "basis": "consent", "event_timestamp": NOW + timedelta(hours=1)}])
    world.tell(user="ann", consent=DENY, after_s=3)  # repeated, and older than what a file said
    assert world.is_allowed(customer) is True
    world.tell(user="ann", consent=DENY, after_s=4_000)
    assert world.is_allowed(customer) is False


def publish(world, rows):
    schema = tables.CONSENTS.schema
    world.stream._refreshed_s = 0.0  # as if the time between two looks had passed
    tables.write(world.home, tables.CONSENTS, pa.Table.from_pylist([dict.fromkeys(schema.names) | row for row in rows], schema))


@settings(max_examples=200)
@given(said=st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=8), seed=st.randoms(use_true_random=False))
def test_word_is_the_newest_statement_in_whatever_order_they_arrive(said, seed):
    newest = max(made for made, _ in said)
    expected = all(allowed for made, allowed in said if made == newest)
    shuffled = list(said)
    seed.shuffle(shuffled)
    word = None
    for made, allowed in shuffled:
        word = word.told(made, is_allowed=allowed) if word else Word(allowed, made, made)
    assert word.is_allowed is expected
    assert word.said_us == newest
    assert word.since_us <= newest


def test_online_consent_is_that_of_the_batch_over_the_same_statements(world):
    """Several devices and users, merged on the way, out of order: as consent.py has it over everything."""
    import random

    from pipelines import consent, engine

    rng = random.Random(11)
    rows = []
    for n in range(120):
        user, device = (f"u{rng.randrange(5)}" if rng.random() < 0.6 else None), f"d{rng.randrange(8)}"
        late, said = rng.choice([0, 0, 0, 40]), rng.choice([None, ALLOW, DENY])
        world.say(user=user, device=device, consent=said, after_s=n + 0.5 * rng.random(), late_s=late)
        if rng.random() < 0.3:
            world.step()
    world.step()
    for call in _logged(world):
        said = json.loads(call.payload).get("context", {}).get("consent", {}).get("categoryPreferences")
        if said:
            made = pd.Timestamp(json.loads(call.payload)["timestamp"])
            known = pd.Timestamp(call.received_us, unit="us", tz="UTC")
            rows.append((world.linker.customer(call.subjects[0]), call.subjects[0], json.dumps(said), made, known, call.source, "m", None))
    names = ["customer_id", "identifier", "consent", "event_timestamp", "created_timestamp", "source", "message_id", "policy_version"]
    with closing(engine.connect(world.home)) as db:
        db.register("told", pd.DataFrame(rows, columns=names))
        statements = f"({consent.changes_sql('(' + consent.statements_sql('told') + ')')})"
        frame = db.sql(consent.known_sql(statements, purpose="personalization")).df()
    expected = frame.sort_values("event_timestamp").groupby("customer_id")["is_personalization_allowed"].last().to_dict()
    assert len(expected) >= 4
    assert {customer: world.is_allowed(customer) for customer in expected} == expected


def _logged(world):
    with closing(open_log(world.home, settings=world.settings, vault=world.vault, consumer="reader")) as reader:
        return reader.read("everything", max_events=10_000)


# -- erased people -----------------------------------------------------------------------------------------------------


def test_erased_person_is_taken_out_and_never_written_again(world):
    world.tell(user="ann", device="d1", consent=ALLOW)
    world.tell(user="bob", consent=ALLOW)
    customer = world.owner("user_id", "ann")
    world.say(user="ann", consent=ALLOW, after_s=1)  # in the log when the tombstone is set
    subjects = [world.name("user_id", "ann"), world.name("anonymous_id", "d1")]
    world.vault.entomb(subjects, erased_us=us(NOW), receipt="r")
    assert world.step().erased == 1
    assert world.owner("user_id", "ann") is None
    assert world.is_allowed(customer) is None
    assert world.owner("user_id", "bob")
    world.tell(user="ann", consent=ALLOW, after_s=2)
    assert world.owner("user_id", "ann") is None


# -- crashes and poison ------------------------------------------------------------------------------------------------


class Cut(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("moment", ["write", "renew", "commit"])
def test_crash_at_any_moment_gives_the_same_state(world, monkeypatch, tmp_path, applied, moment):
    calls = [
        {"device": "d1", "consent": ALLOW}, {"user": "ann", "device": "d1"}, {"user": "bob", "consent": ALLOW},
        {"user": "ann", "consent": DENY}, {"user": "bob", "device": "d2", "consent": DENY}, {"device": "d3", "consent": ALLOW},
    ]  # fmt: skip
    other = tmp_path / "other"
    shutil.copytree(applied / "feature_store", other / "feature_store")
    shutil.copytree(world.home / "keys", other / "keys")
    shutil.copytree(world.home / "vault", other / "vault")
    with closing(World(other)) as calm:
        for n, call in enumerate(calls):
            world.say(**call, after_s=n)
            calm.tell(**call, after_s=n)
        expected = calm.everything()
    monkeypatch.setattr(Acknowledgement, "begin", Acknowledgement.finish)  # at once, and in this thread
    target, name = (world.log, "commit") if moment == "commit" else (OnlineWriter, moment)
    real, seen = getattr(target, name), []
    every = 6 if moment == "renew" else 2  # a step renews five views, so that the one after a cut is whole

    def cut(*args, **options):
        seen.append(1)
        if len(seen) % every == 1:
            raise Cut
        return real(*args, **options)

    monkeypatch.setattr(target, name, cut)
    monkeypatch.setattr(Stream, "_failed", lambda self, call, error: (_ for _ in ()).throw(error))  # nothing is caught at the end
    for _ in range(60):
        try:
            if not world.stream.step().read:
                break
        except Cut:
            world.restart()
    monkeypatch.undo()
    world.restart()
    world.step()
    assert len(seen) > 2
    assert world.everything() == expected
    assert world.log.pending(GROUP) == 0


@pytest.mark.parametrize("payload", [b"{", b"[]", b'"x"', b"\xff", b"null"])
def test_poison_is_set_aside_after_some_tries_and_stops_nobody(world, payload, monkeypatch):
    monkeypatch.setattr(worker, "SLICE_S", 3_600.0)
    world.say(user="ann", consent=ALLOW)
    world.say(user="eve", payload=payload, after_s=1)
    world.say(user="bob", consent=ALLOW, after_s=2)
    assert world.stream.step().applied == 1  # one at a time at first: see `_next`
    assert world.stream.step().applied == 1
    assert world.is_allowed(world.owner("user_id", "bob")) is True
    while world.log.pending(GROUP):
        world.stream.step()
    (parked,) = world.log.parked(10)
    assert (parked.payload, parked.reason) == (payload, "not_json")
    assert world.log.group_counts(GROUP).parked == 1


def test_call_that_kills_the_process_is_set_aside_and_its_neighbours_are_not(world, monkeypatch):
    for n in range(6):
        world.say(user=f"u{n}", consent=ALLOW, after_s=n)
    killer = world.name("user_id", "u2")
    real = Online.link

    def die(self, calls):
        if any(killer in call.subjects for call in calls):
            raise KeyboardInterrupt  # passes every handler, as the end of a process does
        return real(self, calls)

    monkeypatch.setattr(Online, "link", die)
    for _ in range(40):
        try:
            if not world.stream.step().read and not world.log.pending(GROUP):
                break
        except KeyboardInterrupt:
            world.restart()
    assert [p.subjects for p in world.log.parked(10)] == [(killer,)]
    assert [bool(world.owner("user_id", f"u{n}")) for n in range(6)] == [True, True, False, True, True, True]


def test_store_that_is_away_costs_nothing_once_it_is_back(world):
    world.say(user="ann", consent=ALLOW)
    aside = (world.home / "feature_store").rename(world.home / "aside")
    for _ in range(10):  # more often than a call may be tried
        with pytest.raises(StoreError):
            world.stream.step()
    aside.rename(world.home / "feature_store")
    assert world.step().applied == 1
    assert world.is_allowed(world.owner("user_id", "ann")) is True
    assert world.log.counts().parked == 0


# -- waking up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_inotify", [True, False])
def test_worker_wakes_at_an_append_and_sleeps_without_one(world, monkeypatch, has_inotify):
    if not has_inotify:
        monkeypatch.setattr("pipelines.stream.wake._watched", lambda folder: None)
    wake = Wake(world.home / "log")
    assert wake.wait(0.05) is False
    world.say(user="ann")
    assert wake.wait(60.0) is True
    while wake.wait(0.05):
        pass
    timer = threading.Timer(0.1, world.say, kwargs={"user": "bob"})
    timer.start()
    assert wake.wait(60.0) is True
    timer.join()
    wake.close()


def test_idle_worker_uses_no_time(world):
    world.step()
    before = time.thread_time()
    world.stream.step(wait_s=1.0)
    assert time.thread_time() - before < 0.1


# -- questions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(world):
    """`asked(kind, who)`: the answer of the thread that answers, with these answerers."""
    stop = threading.Event()

    def held(request):
        if request.who == "nobody":
            raise InputError("nothing is held of secret-nobody")
        if request.who == "busy":
            raise StoreError("a run is working")
        if request.who == "secret":
            raise KeyError(request.who)
        return {"who": request.who, "at": NOW}

    thread = threading.Thread(target=Answering(world.settings, vault=world.vault, answerers=dict.fromkeys(Kind, held)).run, args=(stop,))
    thread.start()

    def ask(kind, who):
        with closing(Requests(world.home, vault=world.vault)) as requests:
            one = requests.ask(kind, who, by="admin", now_us=us(NOW))
            end = time.monotonic() + 60
            while (result := requests.result(one)).state is State.ASKED and time.monotonic() < end:
                time.sleep(0.01)
            return result.state, json.loads(result.answer)

    yield ask
    stop.set()
    thread.join()


def test_questions_are_answered_and_failures_too(asked, caplog):
    assert asked(Kind.EXPORT, "ann") == (State.DONE, {"who": "ann", "at": str(NOW)})
    assert asked(Kind.PROFILE, "nobody")[0] is State.FAILED
    assert asked(Kind.PROFILE, "nobody")[1]["code"] == "not_found"
    assert asked(Kind.ERASE, "busy") == (State.FAILED, {"error": "a run is working"})
    state, answer = asked(Kind.ERASE, "secret")
    assert (state, "KeyError" in answer["error"], "secret" in answer["error"]) == (State.FAILED, True, False)
    assert asked(Kind.EXPORT, "bob")[0] is State.DONE  # it goes on
    assert "KeyError" in caplog.text
    assert "'secret'" not in caplog.text


@contextmanager
def answering(world, script):
    """Erasures and exports go to a process that runs this script."""
    stop = threading.Event()
    command = [sys.executable, "-c", script, str(world.home)]
    thread = threading.Thread(target=Answering(world.settings, vault=world.vault, command=command).run, args=(stop,))
    thread.start()
    try:
        with closing(Requests(world.home, vault=world.vault)) as requests:
            yield requests
    finally:
        stop.set()
        thread.join()


def answer_of(requests, one, timeout_s=60):
    end = time.monotonic() + timeout_s
    while (result := requests.result(one)).state is State.ASKED and time.monotonic() < end:
        time.sleep(0.02)
    return result


def test_erasure_is_answered_by_a_process_of_its_own(world):
    script = """
import sys; from pathlib import Path; from pipelines.requests import Requests; from pipelines.vault import open_vault
home = Path(sys.argv[1]); requests = Requests(home, vault=open_vault(home))
[requests.answer(request.id, b'"elsewhere"', now_us=1) for request in requests.pending()]
"""
    with answering(world, script) as requests:
        one = requests.ask(Kind.ERASE, "ann", by="admin", now_us=us(NOW))
        assert answer_of(requests, one).answer == b'"elsewhere"'


def test_question_that_ends_its_process_time_and_again_is_given_up(world, tmp_path):
    with answering(world, "import sys; open(sys.argv[1] + '/lives', 'a').write('x'); sys.exit(9)") as requests:
        one = requests.ask(Kind.ERASE, "ann", by="admin", now_us=us(NOW))
        result = answer_of(requests, one)
        assert result.state is State.FAILED
        assert "3 times" in json.loads(result.answer)["error"]
    assert (world.home / "lives").read_text() == "xxx"


def test_erasure_that_was_left_half_done_is_taken_up_at_the_start(world):
    (world.home / "erasures").mkdir()
    (world.home / "erasures" / "one.journal").touch()
    with answering(world, "import sys; open(sys.argv[1] + '/lives', 'a').write('x')"):
        end = time.monotonic() + 60
        while not (world.home / "lives").exists() and time.monotonic() < end:
            time.sleep(0.02)
    assert (world.home / "lives").exists()


# -- profiles ----------------------------------------------------------------------------------------------------------


def test_profile_names_nobody_in_full(world):
    world.vault.remember([Fact(world.name("email", "ann@example.com"), "email", "ann@example.com", "web", us(NOW))])
    world.vault.remember([Fact(world.name("user_id", "ann"), "first_name", "Annabel", "web", us(NOW))])
    world.tell(user="ann", email="ann@example.com", consent=ALLOW | {"marketing": False})
    world.tell(user="ann", device="d1", after_s=1)
    told = profiles.describe(world.home, "Ann@Example.com", settings=world.settings, vault=world.vault)
    assert told["customer_id"] == world.owner("user_id", "ann")
    assert {"kind": "email", "value": "a***@example.com"} in told["identifiers"]
    assert sorted(entry["kind"] for entry in told["identifiers"]) == ["anonymous_id", "email", "user_id"]
    assert {purpose: said["is_allowed"] for purpose, said in told["consent"].items()} == {"marketing": False, "personalization": True}
    assert told["traits"]["first_name"]["value"] == "A***"
    assert "ann@example.com" not in json.dumps(told, default=str)
    with pytest.raises(InputError):
        profiles.describe(world.home, "nobody", settings=world.settings, vault=world.vault)


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        ("email", "ann@example.com", "a***@example.com"), ("email", "a@example.com", "***@example.com"), ("user_id", "u-123", "u***"),
        ("phone", "+49123456789", "***89"), ("phone", "112", "***"), ("city", "Ulm", "U***"), ("city", "", "***"),
    ],
)  # fmt: skip
def test_masked_value_is_recognised_but_not_known(kind, value, shown):
    assert profiles.masked(kind, value) == shown
