"""A home with its log, vault and worker under a clock of its own, and what the ingest and the feature tables say of the same home."""

import json
import math
import shutil
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from pipelines import features, tables
from pipelines.identity.online import Online
from pipelines.ingest import drain
from pipelines.log import Incoming, open_log
from pipelines.online.feast_format import key_decoder, table_of
from pipelines.online.writer import OnlineWriter
from pipelines.settings import EdgeSettings, Settings
from pipelines.stream import Stepped, Stream
from pipelines.vault import open_vault

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ALLOW, DENY = {"personalization": True}, {"personalization": False}
VIEWS = {
    "customer_activity": tables.CUSTOMER_ACTIVITY,
    "customer_session": tables.CUSTOMER_SESSION,
    "customer_item": tables.CUSTOMER_ITEM,
    "customer_category": tables.CUSTOMER_CATEGORY,
    "item_activity": tables.ITEM_ACTIVITY,
}


def us(at):
    return (at - EPOCH) // timedelta(microseconds=1)


def persons(identities):
    """customer -> the identifiers that are or were theirs."""
    names = {}
    for identifier, customer in identities:
        names.setdefault(customer, set()).add(identifier)
    return {customer: frozenset(some) for customer, some in names.items()}


def of_person(people, key):
    """The key with a person in the place of a customer_id."""
    return people.get(key, key) if isinstance(key, str) else (people.get(key[0], key[0]), *key[1:])


class World:
    """`say` appends a call at a time in seconds after START, `to` moves the clock and lets the worker do all there is to do."""

    def __init__(self, home, **options):
        self.home = home
        self.settings = Settings(home=home, edges=EdgeSettings(max_tries=3), **options)
        self.vault = open_vault(home)
        self.log = open_log(home, settings=self.settings, vault=self.vault, consumer="stream")
        self.now = us(START)
        self.count = 0
        self.is_closed = False
        self.taken_back = set()  # views of which something was taken out
        self.start()

    def start(self):
        self.linker = Online(self.home, vault=self.vault)
        self.stream = self.made()

    def made(self, share=(0, 1)):
        return Stream(
            self.home, settings=self.settings, vault=self.vault, log=self.log, linker=self.linker, now_us=lambda: self.now, share=share
        )

    def restart(self):
        """As after a crash: what was read and not committed comes again."""
        self.stream.close()
        self.linker.close()
        self.log.release("online")
        self.start()

    def say(
        self, at_s, event="Product Viewed", *, user=None, device=None, email=None, consent=ALLOW, made_s=None, message=None, **properties
    ):
        """A call received at `at_s` and made at `made_s`."""
        received, made = (START + timedelta(seconds=seconds) for seconds in (at_s, at_s if made_s is None else made_s))
        given = (("user_id", user), ("email", email), ("anonymous_id", device))
        subjects = tuple(self.vault.pseudonym(kind, value) for kind, value in given if value)
        self.count += 1
        call = {
            "type": "track", "event": event, "timestamp": made.isoformat(), "receivedAt": received.isoformat(),
            "messageId": message or f"m{self.count}", "userId": user, "anonymousId": device, "properties": properties,
            "traits": {"email": email} if email else {},
        }  # fmt: skip
        if event == "identify":
            call["type"] = "identify"
        if consent is not None:
            call["context"] = {"consent": {"categoryPreferences": consent}}
        self.log.append([Incoming("web", str(self.count), subjects, json.dumps(call).encode(), us(received))])
        self.now = max(self.now, us(received))

    def step(self):
        """All there is to do now."""
        done = Stepped()
        while (one := self.stream.step()).read or one.parked or one.expired:
            done += one
        return done

    def to(self, at_s):
        self.now = us(START + timedelta(seconds=at_s))
        return self.step()

    def follow(self):
        """As if the time between two looks at the tables had passed."""
        self.stream._refreshed_s = 0.0
        return self.step()

    def drain(self):
        return drain(self.home, settings=self.settings, vault=self.vault)

    def customer(self, kind, value):
        with closing(OnlineWriter(self.home)) as online:
            name = self.vault.pseudonym(kind, value)
            return online.read("identifier_customer", "customer_id", [name], join_key="identifier").get(name, (None, 0))[0]

    def row(self, view, customer):
        """The customer's row online: feature -> value."""
        return self.online(view).get(customer, (None, {}))[1]

    def online(self, view):
        """customer, or customer and item or category -> (microseconds of its row, values), as stored."""
        table, decode = VIEWS[view], key_decoder(VIEWS[view].key if len(VIEWS[view].key) > 1 else VIEWS[view].key[0])
        rows = {}
        with closing(OnlineWriter(self.home)) as online:
            for key, name, text, at in online.db.execute(
                f'SELECT entity_key, feature_name, value_text, coalesce(created_ts, event_ts) FROM "{table_of(view)}"'
            ):
                row = rows.setdefault(decode(key), (math.ceil(at * 1e6), {}))
                row[1][name] = None if text is None else int(text)
        names = [name for name in table.schema.names if name not in (*table.key, "event_timestamp")]
        return {key: (at, {name: values[name] for name in names}) for key, (at, values) in rows.items()}

    def truth(self, folder, view=None):
        """What an ingest, the feature tables and a point-in-time join say of this instant, by view: as `online`."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.home, folder, ignore=shutil.ignore_patterns("stream", "feature_store", "online.db*"), symlinks=True)
        with closing(open_vault(folder)) as vault:
            drain(folder, settings=self.settings.model_copy(update={"home": folder}), vault=vault)
        return {view: {} for view in VIEWS} if not tables.count(folder, tables.EVENTS) else self._built(folder)

    def _built(self, folder):
        features.build(folder)
        found = {}
        for name, table in VIEWS.items():
            rows = tables.read_arrow(folder, table).to_pylist()
            found[name] = {}
            for row in sorted(rows, key=lambda row: row["event_timestamp"]):
                at, key = us(row.pop("event_timestamp")), tuple(row.pop(part) for part in table.key)
                if at <= self.now:
                    found[name][key if len(key) > 1 else key[0]] = (at, row)
        return found

    def is_exact(self, folder, *, was_taken_back=False):
        """By people and not by ids: of two names known at one instant a late call may change after which a person is called.

        `was_taken_back`: a row of which something was taken out is told to be newer than what it was, so that it is believed.
        """
        truth = self.truth(folder)
        people = persons((row.identifier, row.customer_id) for row in tables.read(folder, tables.IDENTITIES).itertuples())
        here = persons((link.identifier, link.customer_id) for link in self.linker.identities())
        for view in VIEWS:
            expected = {of_person(people, key): row for key, row in truth[view].items()}
            online = {of_person(here, key): row for key, row in self.online(view).items()}
            assert {key: row[1] for key, row in online.items()} == {key: row[1] for key, row in expected.items()}, view
            assert was_taken_back or view in self.taken_back or online == expected, view
            assert all(online[key][0] >= expected[key][0] for key in online), view
        return True

    def close(self):
        if self.is_closed:
            return
        self.is_closed = True
        self.stream.close()
        self.linker.close()
        self.log.close()
        self.vault.close()


@pytest.fixture
def new_world(applied, tmp_path_factory):
    """Makes a world in a home of its own; `like` another one, it gives people the same pseudonyms."""
    made = []

    def make(*, like=None, **options):
        home = tmp_path_factory.mktemp("home")
        shutil.copytree(applied / "feature_store", home / "feature_store")
        for name in ("vault", "keys") if like else ():
            shutil.copytree(like.home / name, home / name)
        made.append(World(home, **options))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.fixture
def world(new_world):
    return new_world()
