"""From an event over HTTP to the answer that it changes: the service with its worker, as `rapport serve` starts them."""

import contextlib
import json
import shutil
import sqlite3
import time
import uuid
from datetime import UTC, datetime, timedelta

import httpx
import psutil
import pyarrow as pa
import pytest
from pydantic import SecretStr

from pipelines import tables
from pipelines.identity import surrogate
from pipelines.log import open_log
from pipelines.requests import is_worked
from pipelines.settings import Settings
from pipelines.vault import open_vault
from serving import companions, process

pytestmark = pytest.mark.slow

KEYS = {role: f"{role}-key" for role in ("collect", "decide", "admin")}
ALLOW, DENY = ({"consent": {"categoryPreferences": {"personalization": flag}}} for flag in (True, False))
PATIENCE_S = 60.0  # until an event must have shown; it takes some hundredths


def visitors(home, cast):
    """Make the shop's customers visitors known by their devices alone, named as the identity resolution names them."""
    with contextlib.closing(open_vault(home)) as vault:
        devices = [vault.pseudonym("anonymous_id", f"device-{n}") for n in range(24)]
    names = {old: surrogate(device) for old, device in zip(cast.customers, devices, strict=True)}
    for table in tables.TABLES:
        if tables.exists(home, table) and table.schema is not None and "customer_id" in table.schema.names:
            rows = tables.read(home, table)
            tables.write(home, table, rows.assign(customer_id=rows["customer_id"].map(names)))
    at = cast.now - timedelta(days=40)
    times = {"event_timestamp": at, "created_timestamp": at}

    def put(table, rows):
        tables.write(home, table, pa.Table.from_pylist([dict.fromkeys(table.schema.names) | row for row in rows], table.schema))

    put(tables.IDENTITIES, [{"identifier": device, "customer_id": surrogate(device)} | times for device in devices])
    put(tables.IDENTITY_LINKS, [{"anonymous_id": device.partition(":")[2]} | times for device in devices])
    said = {"purpose": "personalization", "is_allowed": True, "basis": "consent", "source": "segment", "evidence": "m"} | times
    put(tables.CONSENTS, [said | {"identifier": device, "customer_id": surrogate(device)} for device in devices])
    shutil.rmtree(home / "feature_store")
    cast.fill_store(home)
    cast.promote_recommender(home, 3, list(names.values()))
    return list(names.values())


class Live:
    """A running service, and those who call it."""

    def __init__(self, service):
        self.service = service
        self.http = httpx.Client(base_url=service.url, timeout=30)

    def send(self, call, **body):
        sent = body | {"messageId": str(uuid.uuid4()), "timestamp": datetime.now(UTC).isoformat()}
        assert self.http.post(f"/v1/{call}", json=sent, auth=(KEYS["collect"], "")).status_code == 200

    def recommend(self, **body):
        answer = self.http.post("/recommend", json=body, headers=bearer("decide"))
        assert answer.status_code == 200
        return answer.json()

    def until(self, shows, **body):
        """The first answer that shows something; the last one where none did."""
        end = time.monotonic() + PATIENCE_S
        while not shows(answer := self.recommend(**body)) and time.monotonic() < end:
            time.sleep(0.02)
        return answer

    def admin(self, method, path):
        return self.http.request(method, path, headers=bearer("admin"))

    def close(self):
        self.http.close()


def bearer(role):
    return {"Authorization": f"Bearer {KEYS[role]}"}


def settings_of(home):
    patient = {"deadline_ms": 10_000, "log_slow_ms": 60_000}  # a machine that stands still for a second is no degraded answer
    return Settings(home=home, serving=patient, **{f"{role}_key": SecretStr(key) for role, key in KEYS.items()})


@pytest.fixture(scope="module")
def live(shop, cast, tmp_path_factory):
    """Service and worker over a shop of visitors; `customers`: who they are."""
    home = shutil.copytree(shop, tmp_path_factory.mktemp("live") / "home", symlinks=True)
    customers = visitors(home, cast)
    with process.start(settings_of(home), 0) as service, contextlib.closing(Live(service)) as made:
        made.home, made.customers = home, customers
        wait_for(lambda: is_worked(home))
        yield made


def files_with(home, needles):
    paths = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(str(path.relative_to(home)) for path in paths if any(needle in path.read_bytes() for needle in needles))


def wait_for(holds, timeout_s=60.0):
    end = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    assert holds()


def test_newcomer_is_answered_by_their_first_events_until_they_withdraw(live):
    live.send("track", anonymousId="newcomer", event="Product Viewed", properties={"product_id": "item-02"}, context=ALLOW)
    answer = live.until(lambda a: a["source"] == "folded_in", anonymous_id="newcomer", k=29)
    assert (answer["source"], answer["degraded"], answer["causes"]) == ("folded_in", False, [])
    assert {"because you viewed item-02", "because you viewed it before"} <= {item["reason"] for item in answer["items"]}
    live.send("track", anonymousId="newcomer", event="Consent Updated", properties={}, context=DENY)
    withdrawn = live.until(lambda a: a["source"] != "folded_in", anonymous_id="newcomer")
    assert (withdrawn["source"], withdrawn["causes"]) == ("popular", ["consent"])


def test_visitor_identifies_is_known_withdraws_and_is_forgotten(live):
    visitor = live.customers[3]
    live.send("track", anonymousId="device-3", event="Product Viewed", properties={"product_id": "item-01"}, context=ALLOW)
    assert live.recommend(customer_id="ann")["causes"] == ["unknown_customer"]
    of_the_visitor = live.recommend(anonymous_id="device-3", k=5)
    assert of_the_visitor["source"] == "personal"

    live.send("identify", anonymousId="device-3", userId="ann", traits={"email": "Ann@Example.com"}, context=ALLOW)
    answer = live.until(lambda a: a["source"] == "personal", customer_id="ann", k=5)
    assert (answer["source"], answer["customer_id"]) == ("personal", visitor)
    assert answer["items"] == of_the_visitor["items"]
    assert live.recommend(customer_id="ann@example.com")["customer_id"] == visitor

    live.send("track", userId="ann", event="Consent Updated", properties={}, context=DENY)
    withdrawn = live.until(lambda a: a["source"] != "personal", customer_id="ann")
    assert (withdrawn["source"], withdrawn["causes"], withdrawn["degraded"]) == ("popular", ["consent"], False)
    for name in ("ann", "ann@example.com", visitor):
        assert live.recommend(customer_id=name)["causes"] == ["consent"]
    assert live.recommend(anonymous_id="device-3")["causes"] == ["consent"]
    for path in ("/churn", "/intent"):
        scores = live.http.post(path, json={"customer_ids": ["ann"]}, headers=bearer("decide")).json()
        assert (scores["source"], scores["causes"]) == ("static", ["consent"])

    def is_told_whole():
        nonlocal profile
        profile = live.admin("GET", "/profile/ann%40example.com")
        return profile.status_code == 200 and "features" in profile.json()  # the store is not waited for

    profile = None
    wait_for(is_told_whole)
    told = profile.json()
    assert told["customer_id"] == visitor
    assert told["consent"]["personalization"]["is_allowed"] is False
    assert {entry["kind"] for entry in told["identifiers"]} >= {"user_id", "email"}
    assert told["features"]["events_total"] >= 0
    assert told["features_age_s"] >= 0  # the stream keeps them as of this moment
    assert "Ann@Example.com" not in profile.text
    export = live.admin("GET", "/profile/ann/export")
    assert export.status_code == 200
    assert "Ann@Example.com" in export.text

    with contextlib.closing(open_vault(live.home)) as vault:
        pseudonyms = [vault.pseudonym(*name) for name in (("user_id", "ann"), ("email", "ann@example.com"), ("anonymous_id", "device-3"))]
    needles = [visitor.encode(), *(name.partition(":")[2].encode() for name in pseudonyms)]
    assert files_with(live.home, needles)  # the control: the search finds what is there
    erased = live.admin("DELETE", "/profile/ann")
    assert erased.status_code == 200, erased.text
    assert erased.json()["receipt_id"]
    assert files_with(live.home, [*needles, b"Ann@Example.com", b"ann@example.com"]) == []
    for name in ("ann", "ann@example.com", visitor):
        assert live.recommend(customer_id=name)["causes"] == ["unknown_customer"]
    live.send("track", userId="ann", event="Product Viewed", properties={"product_id": "item-01"}, context=ALLOW)
    time.sleep(0.5)
    assert live.recommend(customer_id="ann")["causes"] == ["unknown_customer"]
    assert live.admin("GET", "/profile/ann").status_code == 404
    with contextlib.closing(open_log(live.home, settings=live.service.settings)) as log:
        assert log.counts().erased == 1
    assert live.recommend(anonymous_id="device-4")["source"] == "personal"  # nobody else is touched


def test_worker_that_dies_is_started_again_and_nothing_is_lost(live):
    (stream,) = [one for one in live.service.companions if one.module == companions.STREAM]
    first = stream.pid
    psutil.Process(first).kill()
    live.send("identify", anonymousId="device-5", userId="bob", context=ALLOW)
    assert live.recommend(anonymous_id="device-5")["source"] == "personal"  # the service needs no worker to answer
    wait_for(lambda: stream.pid not in (first, None) and is_worked(live.home))
    assert live.until(lambda a: a["source"] == "personal", customer_id="bob")["causes"] == []
    assert live.recommend(customer_id="bob")["customer_id"] == live.customers[5]


def test_lines_of_the_service_and_its_worker_name_nobody_even_when_the_store_breaks(live):
    """The last but one of this file: it breaks the store."""
    mark = "zqeve"

    def act():
        live.send("track", userId=f"{mark}@example.com", event="Product Viewed", properties={"product_id": mark, mark: mark}, context=ALLOW)
        live.send("track", anonymousId="device-6", event="Product Viewed", properties={"product_id": mark, "price": mark}, context=ALLOW)
        return [live.recommend(**asked) for asked in ({"customer_id": f"{mark}@example.com"}, {"anonymous_id": "device-6"})]

    act()
    with contextlib.closing(sqlite3.connect(live.home / "feature_store" / "online.db")) as db:
        db.executescript("DROP TABLE rapport_customer_consent; DROP TABLE rapport_customer_activity")
    assert {cause for answer in act() for cause in answer["causes"]} >= {"store_unavailable"}
    wait_for(lambda: '"level": "ERROR"' in (live.home / "serving" / "stream.log").read_text())
    for name in ("service.log", "stream.log"):
        text = (live.home / "serving" / name).read_text()
        assert not [one for one in (mark, "device-", "newcomer", "example.com", *KEYS.values(), *live.customers) if one in text]
        assert all({"time", "level", "logger", "message"} <= set(json.loads(line)) for line in text.splitlines())
    degraded = [line for line in map(json.loads, (live.home / "serving" / "service.log").read_text().splitlines()) if "rung" in line]
    assert {(line["endpoint"], line["status"]) for line in degraded} == {("/recommend", 200)}


def test_what_runs_beside_the_service_ends_with_it(live):
    """The last of this file: it stops the service."""
    (stream,) = [one for one in live.service.companions if one.module == companions.STREAM]
    pid = stream.pid
    assert psutil.pid_exists(pid)
    live.service.stop()
    assert stream.pid is None
    assert not is_worked(live.home)
