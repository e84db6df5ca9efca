"""Any sequence of calls, restarts and erasures, against a model of forty lines: nothing is lost, repeated or counted twice."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pipelines.errors import StoreError
from pipelines.log import Aside, LogCounts

GROUPS = ("ingest", "online")
PEOPLE = tuple(f"user_id:{letter * 32}" for letter in "abc")
PLAN = settings(max_examples=60, stateful_step_count=40, phases=[Phase.generate])


class Against(RuleBasedStateMachine):
    """The model: every event in order with its people; per group what it was given, and what became of it."""

    tools = None

    @initialize()
    def begin(self):
        self.home = Path(tempfile.mkdtemp(dir=self.tools.memory))
        self.world = self.tools.World(self.home)
        self.log = self.world.open()
        self.ids, self.rows, self.dead = set(), [], set()  # rows: (number, people) or None once erased
        self.counted = {"appended": 0, "duplicate": 0, "erased": 0, "parked": 0}
        self.fates = {group: {} for group in GROUPS}  # position -> committed, parked or erased
        self.held = {group: {} for group in GROUPS}  # position -> event, in this reader's hands
        self.given = {group: {} for group in GROUPS}  # position -> how often
        self.aside, self.brought = [], set()  # (people, reason); numbers of what was set aside ever
        self.forgotten, self.begun = 0, set()

    @rule(numbers=st.lists(st.integers(0, 60), min_size=1, max_size=12), people=st.lists(st.sampled_from(PEOPLE), max_size=2, unique=True))
    def append(self, numbers, people):
        expected = []
        for number in numbers:
            if number in self.ids:
                expected.append("duplicate")
            else:
                self.ids.add(number)
                expected.append("erased" if self.dead & set(people) else "appended")
                if expected[-1] == "appended":
                    self.rows.append((number, tuple(people)))
            self.counted[expected[-1]] += 1
        events = [self.tools.event(number, people=people, received_us=self.world.now_us) for number in numbers]
        assert self.log.append(events) == expected

    @rule(group=st.sampled_from(GROUPS), limit=st.integers(1, 9))
    def read(self, group, limit):
        fates, held = self.fates[group], self.held[group]
        events = self.log.read(group, max_events=limit)
        self.begun.add(group)
        ahead = [at for at in range(1, len(self.rows) + 1) if at not in fates and at not in held and self.rows[at - 1]]
        assert [event.position for event in events] == ahead[: len(events)], "the next ones, none left out"
        assert len(events) <= limit
        assert bool(events) == bool(ahead)
        for event in events:
            number, people = self.rows[event.position - 1]
            assert event.payload == b'{"n": %d}' % number
            assert event.subjects == people
            assert event.tries == self.given[group].get(event.position, 0)
            held[event.position] = event
        if events:
            low, high = events[0].position, events[-1].position
            for at in range(low, high + 1):
                self.given[group][at] = self.given[group].get(at, 0) + 1

    @rule(group=st.sampled_from(GROUPS), data=st.data())
    def commit(self, group, data):
        if self.held[group]:
            chosen = data.draw(st.lists(st.sampled_from(sorted(self.held[group])), min_size=1, unique=True))
            self.log.commit(group, chosen)
            for at in chosen:
                del self.held[group][at]
                self.fates[group].setdefault(at, "committed")

    @rule(group=st.sampled_from(GROUPS), data=st.data())
    def park(self, group, data):
        if self.held[group]:
            at = data.draw(st.sampled_from(sorted(self.held[group])))
            event = self.held[group].pop(at)
            self.log.park(group, event, "item_missing")
            is_dead = bool(self.dead & set(event.subjects))
            self.fates[group][at] = "erased" if is_dead else "parked"
            if not is_dead:
                self.aside.append((event.subjects, "item_missing"))
                self.counted["parked"] += 1

    @rule(brought=st.lists(st.tuples(st.integers(0, 9), st.lists(st.sampled_from(PEOPLE), max_size=1).map(tuple)), max_size=4))
    def set_aside(self, brought):
        expected = []
        for number, people in brought:
            is_new = number not in self.brought
            self.brought.add(number)
            expected.append("duplicate" if not is_new else "erased" if self.dead & set(people) else "appended")
            if expected[-1] == "appended":
                self.aside.append((people, "not_json"))
            self.counted["parked" if expected[-1] == "appended" else expected[-1]] += 1
        assert self.log.set_aside([Aside("shop", b"no event %d" % number, "not_json", people) for number, people in brought]) == expected

    @rule()
    def everybody_does_everything(self):
        for group in GROUPS:
            self.read(group, 10_000)
            self.log.commit(group, sorted(self.held[group]))
            self.fates[group].update(dict.fromkeys(self.held[group], "committed"))
            self.held[group].clear()

    @rule(group=st.sampled_from(GROUPS))
    def release(self, group):
        self.log.release(group)
        self.held[group].clear()

    @rule(person=st.sampled_from(PEOPLE))
    def erase(self, person):
        self.world.vault.entomb([person], erased_us=1, receipt="r")
        self.dead.add(person)
        hit = [at for at, row in enumerate(self.rows, 1) if row and person in row[1] and at > self.forgotten]
        aside = [kept for kept in self.aside if person in kept[0]]
        assert self.log.remove([person]) == len(hit) + len(aside)
        self.world.vault.destroy([person])
        for at in hit:
            self.rows[at - 1] = None
        self.aside = [kept for kept in self.aside if person not in kept[0]]

    @rule()
    def trim(self):
        before = self.forgotten
        gone = self.log.trim(before_us=self.world.now_us)
        self.forgotten = self.log._readers.catalogue.places()[0].first - 1
        assert gone == sum(row is not None for row in self.rows[before : self.forgotten])
        for group in GROUPS:
            if group in self.begun:
                assert all(at in self.fates[group] or self.rows[at - 1] is None for at in range(before + 1, self.forgotten + 1))
            else:
                self.fates[group].update(dict.fromkeys(range(1, self.forgotten + 1), "committed"))

    @rule(hours=st.sampled_from([-3, 1, 30]))
    def time_passes(self, hours):
        self.world.hours_pass(hours)

    @rule()
    def what_came_is_sent_again_a_day_later(self):
        self.time_passes(30)
        self.append(sorted(self.ids) or [0], [])

    @rule()
    def restart(self):
        self.log.close()
        self.log = self.world.open()
        for held in self.held.values():
            held.clear()

    @rule()
    def another_reader_takes_over(self):
        self.world.seconds_pass(60)
        self.log = self.world.open()
        for held in self.held.values():
            held.clear()

    @invariant()
    def books_balance(self):
        if hasattr(self, "log"):
            assert self.log.counts() == LogCounts(**self.counted)
            assert [(kept.subjects, kept.reason) for kept in self.log.parked(10_000)] == self.aside
            for group in GROUPS:
                counts = self.log.group_counts(group)
                assert sum((counts.committed, counts.parked, counts.erased, counts.pending)) == self.counted["appended"]
                fates = list(self.fates[group].values())
                assert (counts.committed, counts.parked) == (fates.count("committed"), fates.count("parked"))

    def teardown(self):
        if hasattr(self, "world"):
            self.world.close()
            shutil.rmtree(self.home)


def machine(tools):
    return type("Machine", (Against,), {"tools": tools})


def test_any_sequence_of_calls_agrees_with_the_model(tools):
    run_state_machine_as_test(machine(tools), settings=PLAN)


@pytest.mark.parametrize(
    ("where", "broken"),
    [
        ("pipelines.log.groups.settle", lambda db, name, positions, counter: set()),
        ("pipelines.log.segments.Segment.remove", lambda self, subjects: 0),
        ("pipelines.log.catalogue.Catalogue.known", lambda self, digests: set()),
        ("pipelines.log.parking.known", lambda db, digests: set()),
        ("pipelines.log.groups.give", lambda db, name, first, last: None),
    ],
)
def test_the_model_does_catch_a_log_that_forgets(tools, monkeypatch, where, broken):
    monkeypatch.setattr(where, broken)
    with pytest.raises((AssertionError, ValueError, StoreError, BaseExceptionGroup)):  # whichever law it breaks first
        run_state_machine_as_test(machine(tools), settings=PLAN)
