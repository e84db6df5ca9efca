"""Whoever is erased is in no byte of the home, does not come back, and takes nobody else along."""

import base64
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from models.recommender import Recommender
from pipelines import audit, erasure, feature_store, identity, ingest, registry, simulate, tables
from pipelines.engine import connect
from pipelines.erasure import people, process, rawfiles, receipts, stores
from pipelines.errors import InputError, PipelineError, StoreError
from pipelines.identity import files
from pipelines.identity.online import Online
from pipelines.ingest.accounts import ledger
from pipelines.ingest.messages import halves_sql, message_sql
from pipelines.log import Aside, Incoming, Outcome, open_log
from pipelines.online import writer as online_writer
from pipelines.requests import Kind, Requests
from pipelines.served import Row, Served
from pipelines.settings import Settings
from pipelines.vault import NOBODY, Fact, open_vault

START = datetime(2026, 1, 1, tzinfo=UTC)
AS_OF = START + timedelta(days=30)
PEOPLE = 8
ANNA, BEN = 0, 1
DEVICE = "tablet-in-the-hall-4711"  # Anna's first, then Ben's
STAGES = [name for name, _ in process.STAGES]


def names_of(person):
    """What this person is called, as received."""
    first = ("anna", "ben", "carl", "dora", "emil", "frida", "gerd", "hanna")[person]
    return {
        "user_id": f"{first}-user-{person}71c0",
        "email": f"{first}.smith{person}@example.org",
        "phone": f"+4917055512{person}0",
        "anonymous_id": f"{first}-browser-{person}5f1e",
    }


def served_row(customer):
    return Row(customer, "churn_v1", "churn 3", 1, 2, {"views_7d": 4})


def at(day, hour=0):
    return pd.Timestamp(START) + pd.Timedelta(day, "D") + pd.Timedelta(hour, "h")


def put(home, table, rows, columns=None):
    """Write the rows; declared columns that they lack are null."""
    frame = pd.DataFrame(rows)
    schema = table.schema or pa.Schema.from_pandas(frame, preserve_index=False)
    tables.write(
        home,
        table,
        pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in frame.to_dict("records")], schema=schema),
    )


def write_tables(home, vault):
    """Everybody's rows in every table that can hold any; returns everybody's customer_id."""
    mine = [{kind: vault.pseudonym(kind, value) for kind, value in names_of(p).items()} for p in range(PEOPLE)]
    bare = {kind: [some[kind].split(":")[1] for some in mine] for kind in ("user_id", "anonymous_id")}
    device = vault.pseudonym("anonymous_id", DEVICE).split(":")[1]
    times = lambda p, day=0: {"event_timestamp": at(day, p), "created_timestamp": at(day, p)}  # noqa: E731
    links = [
        {
            "anonymous_id": bare["anonymous_id"][p],
            "user_id": bare["user_id"][p],
            "email": mine[p]["email"],
            "phone": mine[p]["phone"],
            **times(p),
        }
        for p in range(PEOPLE)
    ]
    links += [
        {"anonymous_id": device, "user_id": bare["user_id"][p], "email": None, "phone": None, **times(p, day)}
        for p, day in ((ANNA, 2), (BEN, 9))
    ]
    identities = identity.resolve(pd.DataFrame(links))
    owner = dict(zip(identities["identifier"], identities["customer_id"], strict=True))
    ids = [owner[some["user_id"]] for some in mine]
    events = [
        {
            "source": "shop", "event_id": f"m{p}-{day}" + (":1" if day % 5 == 0 else ""), "type": "view", "name": "Product Viewed",
            "customer_id": ids[p], "user_id": bare["user_id"][p], "anonymous_id": bare["anonymous_id"][p], "item_id": f"i{day}",
            "session_id": f"s:{p}-{day}", "is_outlier": False, "is_near_duplicate": False, "price_cents": 100, **times(p, day),
        }
        for p in range(PEOPLE) for day in range(20)
    ]  # fmt: skip
    for p, day in ((ANNA, 3), (BEN, 10)):  # on the tablet, nobody logged in
        events += [
            {**events[0], "event_id": f"tablet-{day}", **times(p, day), "customer_id": ids[p], "user_id": None, "anonymous_id": device}
        ]
    put(home, tables.EVENTS, events)
    put(home, tables.IDENTITY_LINKS, links)
    tables.write(home, tables.IDENTITIES, identities)
    pairs = [
        (mine[ANNA]["user_id"], mine[BEN]["user_id"], "review"),
        (mine[2]["email"], mine[3]["email"], "cut"),
        (mine[ANNA]["email"], mine[ANNA]["phone"], "link"),
    ]
    put(home, tables.IDENTITY_EDGES, [
        {"link_id": f"l{n}", "left": min(pair), "right": max(pair), "kind": "manual", "state": state, "created_timestamp": at(1)}
        for n, (*pair, state) in enumerate(pairs)
    ])  # fmt: skip
    each = [{"customer_id": ids[p], **times(p)} for p in range(PEOPLE)]
    put(home, tables.CONSENTS, [
        {**row, "identifier": some["user_id"], "purpose": "personalization", "is_allowed": True, "basis": "consent", "source": "shop"}
        for row, some in zip(each, mine, strict=True)
    ])  # fmt: skip
    told = [(some["user_id"], "region", p) for p, some in enumerate(mine)] + [(f"anonymous_id:{device}", "gender", ANNA)]
    put(
        home,
        tables.TRAITS,
        [{"identifier": name, "trait": trait, "value": "x", "source": "shop", **times(p, 3)} for name, trait, p in told],
    )
    by_customer = (
        tables.CUSTOMER_PROFILE, tables.CUSTOMER_CONSENT, tables.CUSTOMER_ACTIVITY, tables.CUSTOMER_SESSION, tables.CUSTOMER_SCORES,
        tables.LABELS_CHURN, tables.LABELS_INTENT, tables.CUSTOMER_SEGMENTS,
    )  # fmt: skip
    for table in by_customer:
        put(home, table, [{**row, "label": 1, "split": "train", "event_timestamp": at(day)} for row in each for day in (5, 6)])
    put(home, tables.SCORED_INTENT, [{"customer_id": None, "probability": 0.5}])  # nobody was scored: a column without a type
    for table in (tables.TRAINING_CHURN, tables.SCORED_CHURN):
        put(home, table, [{**row, "event_timestamp": at(5), "views": 3.0, "probability": 0.5} for row in each])
    put(home, tables.INTERACTIONS, [{**row, "item_id": "i1", "type": "view", "weight": 1.0} for row in each])
    put(
        home, tables.RECOMMENDATIONS, [{**row, "rank": n, "item_id": f"i{n}", "score": 0.5, "version": "1"} for row in each for n in (1, 2)]
    )
    put(home, tables.ITEMS, [{"item_id": f"i{n}", **times(0)} for n in range(20)])
    put(
        home,
        tables.INGESTS,
        [{"source": "shop", "files": "events.jsonl", "accepted": len(events), "stored": len(events), "quarantined": 11}],
    )
    ids_sent = pa.table({"id": [event["event_id"].removesuffix(":1") for event in events]})
    with connect(home) as db:
        db.register("sent", ids_sent)
        halves = db.sql(f"SELECT 'shop' AS source, {halves_sql(message_sql('id'))} FROM sent").to_arrow_table()
    put(home, tables.MESSAGES, [{**row, "outcome": "applied", "created_timestamp": at(0)} for row in halves.to_pylist()])
    return ids, mine


def write_quarantine(home, vault, mine):
    """A refused row of everybody; and rows that nobody could be read from, one with Anna's address, one with an address like it."""
    rows = [(some["user_id"], json.dumps({"userId": names_of(p)["user_id"], "quantity": -1})) for p, some in enumerate(mine)]
    rows += [(NOBODY, '{"type":"identify","traits":{"email":"' + names_of(p)["email"].upper() + '"},"ti') for p in (ANNA, BEN)]
    rows += [(NOBODY, "x" + names_of(ANNA)["email"])]
    sealed = vault.seal([subject for subject, _ in rows], [raw.encode() for _, raw in rows])
    put(home, tables.QUARANTINE, [
        {"quarantine_id": f"q{n}", "source": "shop", "file": "events.jsonl", "row": n, "reason": "not_json", "subject": subject,
         "raw": cell, "message_id": f"refused-{n}" if subject != NOBODY else None, "created_timestamp": at(n % 3)}
        for n, ((subject, _), cell) in enumerate(zip(rows, sealed, strict=True))
    ])  # fmt: skip


def write_facts(vault, mine):
    device = vault.pseudonym("anonymous_id", DEVICE)
    micros = lambda day: int(at(day).timestamp() * 1e6)  # noqa: E731
    facts = [Fact(some[kind], kind, value, "shop", micros(1)) for p, some in enumerate(mine) for kind, value in names_of(p).items()]
    facts += [Fact(some["user_id"], "street", f"{5 + p} {street} Road of {names_of(p)['user_id']}", source, micros(1))
              for p, some in enumerate(mine) for street, source in (("Old", "shop"), ("New", "crm"))]  # fmt: skip
    facts += [Fact(device, "anonymous_id", DEVICE, "shop", micros(10)), Fact(device, "first_name", "Anna of the tablet", "shop", micros(3))]
    facts += [Fact(device, "first_name", "Ben of the tablet", "shop", micros(10))]
    vault.remember(facts)


def write_models(home, ids):
    """Two versions of the recommender, the older one under the id that Anna had before a merge; one churn model; MLflow's copy."""
    rng = np.random.default_rng(3)
    weights = sparse.csr_matrix(rng.integers(0, 3, (PEOPLE, 6)).astype(float) + np.eye(PEOPLE, 6))
    learner = Recommender(n_factors=4, n_epochs=2).fit(weights)
    items, scores = learner.recommend(np.arange(5), 3)
    golden = {"customers": list(range(5)), "k": 3, "items": items.tolist(), "scores": scores.astype(float).tolist()}
    with closing(open_vault(home)) as vault:
        before = identity.surrogate(vault.pseudonym("anonymous_id", names_of(ANNA)["anonymous_id"]))
    for n, customers in enumerate(([before, *ids[1:]], ids)):
        manifest = {"golden": golden, "rows": {"serving_customers": PEOPLE}, "as_of": at(10 * n + 8).isoformat(), "training_key": str(n)}
        version = registry.register(home, "recommender", learner=learner, manifest=manifest, arrays={"customer_ids": np.array(customers)})
    registry.promote(home, "recommender", version)
    copy = home / "mlflow" / "artifacts" / "run" / "artifacts" / f"model-{version}"
    shutil.copytree(home / "models" / "recommender" / str(version), copy)
    (copy / "MLmodel").write_text("flavors: {}\n")
    for n, day in enumerate((2, 20)):
        registry.register(home, "churn", learner=SimpleNamespace(save=lambda folder: (folder / "m.txt").write_text("m")),
                          manifest={"as_of": at(day).isoformat(), "training_key": str(n)})  # fmt: skip


def write_files(home, ids):
    raw = home / "raw"
    raw.mkdir()
    lines = [json.dumps({"userId": names_of(p)["user_id"], "n": n}) for n in range(30) for p in range(PEOPLE)]
    lines += [
        json.dumps({"anonymousId": names_of(p)["anonymous_id"], "traits": {"email": names_of(p)["email"].title()}}) for p in range(PEOPLE)
    ]
    lines += ['{"cut off']
    (raw / "events.jsonl").write_text("\n".join(lines) + "\n")
    truth = pa.table({"kind": ["person"] * PEOPLE, "key": [names_of(p)["user_id"] for p in range(PEOPLE)]}).replace_schema_metadata(
        {"shop": "laws"}
    )
    pq.write_table(truth, raw / "truth.parquet")
    for folder, name in (("serving", "service.log"), ("reports", "drift.html"), ("flow", "ingest.json")):
        (home / folder).mkdir()
        (home / folder / name).write_text("".join(f"<p>{one}</p>\n" for one in ids) + names_of(ANNA)["email"] + "\n")
    (home / "flow" / "incoming" / "tables").mkdir(parents=True)
    (home / "flow" / "incoming" / "tables" / "half.bin").write_text(names_of(ANNA)["user_id"])
    left = home / "tables" / ".events-0123456789ab"
    left.mkdir()
    shutil.copy(tables.files(home, tables.EVENTS)[0], left / "part-00000.parquet")


def write_online(home, vault, ids, mine):
    feature_store.apply(home)
    rows = [online_writer.Row(one, {"is_personalization_allowed": True}, event_us=1) for one in ids]
    names = [
        online_writer.Row(name, {"customer_id": one}, event_us=1) for one, some in zip(ids, mine, strict=True) for name in some.values()
    ]
    with closing(online_writer.OnlineWriter(home)) as online, online.transaction():
        online.write("customer_consent", rows)
        online.write("customer_scores", [online_writer.Row(one, {"churn_probability": 0.5}, event_us=1) for one in ids])
        online.write("identifier_customer", names, join_key="identifier")
    with closing(Online(home, vault=vault)) as graph:
        graph.link([SimpleNamespace(subjects=list(some.values()), event_us=5, received_us=6, position=0) for some in mine])
    shutil.copy(home / "identity" / "online.1.db", files.unfinished(home, 0))  # as if an ingest were being followed just then


def call(person, message_id, vault, **more):
    names = names_of(person)
    body = {"type": "track", "userId": names["user_id"], "messageId": message_id, **more}
    subjects = [vault.pseudonym("user_id", names["user_id"]), *(vault.pseudonym("email", address) for address in more.values())]
    return Incoming("shop", message_id, tuple(subjects), json.dumps(body).encode(), 5_000_000)


def write_log(home, vault):
    """Calls that no run has applied yet; in one of them Anna says an address that nobody has heard of."""
    with closing(open_log(home, settings=Settings(home=home), vault=vault)) as log:
        log.append([call(p, f"logged-{p}-{n}", vault) for n in range(5) for p in range(PEOPLE)])
        log.append([call(ANNA, "new-address", vault, email=NEW_ADDRESS)])
        hers = Aside("shop", b"{ broken by Anna", "not_json", (vault.pseudonym("user_id", names_of(ANNA)["user_id"]),))
        nobodys = [b"{ broken, of " + names_of(ANNA)["email"].encode(), b"{ broken, of anybody"]
        log.set_aside([hers, *(Aside("app", raw, "not_json") for raw in nobodys)])
    vault.remember([Fact(vault.pseudonym("email", NEW_ADDRESS), "email", NEW_ADDRESS, "shop", 5_000_000)])


NEW_ADDRESS = "anna.newly.married@example.net"


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """No test here is about power cuts, and waiting for the disk is most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A home with eight people in every store that there is."""
    home = tmp_path_factory.mktemp("shop") / "home"
    with closing(open_vault(home)) as vault:
        ids, mine = write_tables(home, vault)
        write_quarantine(home, vault, mine)
        write_facts(vault, mine)
        write_models(home, ids)
        write_files(home, ids)
        write_online(home, vault, ids, mine)
        write_log(home, vault)
        with closing(Requests(home, vault=vault)) as asked:
            for p in (ANNA, BEN):
                one = asked.ask(Kind.PROFILE, names_of(p)["user_id"], by="admin", now_us=1)
                asked.answer(one, json.dumps({"customer_id": ids[p]}).encode(), now_us=2)
        with closing(Served(home, vault=vault)) as sample:
            sample.add([served_row(customer) for customer in ids], now_us=3)
    audit.record(home, "export", by="officer", about=audit.digest(home, ids[ANNA]))
    return SimpleNamespace(home=home, ids=ids, mine=mine)


@pytest.fixture
def shop(built, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(built.home, home, symlinks=True)
    return SimpleNamespace(home=home, ids=built.ids, mine=built.mine, settings=Settings(home=home))


def erase(shop, who=None, by="officer"):
    return erasure.erase(shop.home, who or shop.ids[ANNA], settings=shop.settings, by=by, as_of=AS_OF)


# -- the search, which knows nothing of how erasing works


def spelled(text):
    """The forms in which a text may lie in a file."""
    plain = text.encode()
    forms = {plain, text.encode("utf-16-le"), text.encode("utf-32-le"), plain.hex().encode(), plain.hex().upper().encode()}
    for shift in range(3):  # wherever it stands in what was encoded; the ends depend on the neighbours
        forms.add(base64.b64encode(b"\0" * shift + plain)[4 if shift else 0 :].rstrip(b"=")[:-1])
    return forms


def wanted(built, person):
    """Every form of everything that names this person alone."""
    texts = [*names_of(person).values(), *(name.split(":")[1] for name in built.mine[person].values()), built.ids[person]]
    texts += [identity.surrogate(name) for name in built.mine[person].values()]
    texts += [f"Road of {names_of(person)['user_id']}"] + ([NEW_ADDRESS] if person == ANNA else [])
    return {form for text in texts for form in spelled(text)}


def contents(path):
    """The bytes of a file, and of a Parquet file what its pages hold."""
    whole = path.read_bytes()
    if path.suffix == ".parquet":
        for column in pq.read_table(path).columns:
            whole += b"".join(
                str(value).encode() if not isinstance(value, bytes) else value for value in column.to_pylist() if value is not None
            )
    return whole


def found_in(home, forms):
    hits = []
    for path in sorted(home.rglob("*")):
        if path.is_file() and not path.is_symlink():
            whole = contents(path)
            if any(form in whole for form in forms):
                hits.append(path.relative_to(home).as_posix())
    return hits


def others(shop):
    """Every row of every table that is not Anna's."""
    rows = {}
    hers = {*shop.mine[ANNA].values(), *(name.split(":")[1] for name in shop.mine[ANNA].values()), shop.ids[ANNA]}
    for table in tables.TABLES:
        if tables.exists(shop.home, table) and table not in (tables.MESSAGES, tables.QUARANTINE, tables.TRAITS, tables.INGESTS):
            some = tables.read_arrow(shop.home, table).to_pylist()
            rows[table.name] = [row for row in some if hers.isdisjoint(value for value in row.values() if isinstance(value, str))]
    return rows


# -- erased


def test_erased_person_is_in_no_byte_of_the_home(built, shop):
    forms = wanted(built, ANNA)
    before = found_in(shop.home, forms)
    stores_of_every_kind = (
        "raw/events.jsonl", "raw/truth.parquet", "models/recommender/1/customer_ids.npy", "models/recommender/2/customer_ids.npy",
        "mlflow/artifacts/run/artifacts/model-2/customer_ids.npy", "feature_store/online.db", "identity/online.1.db",
        "identity/online.part", "vault/vault.db", "log/segments/00000001.db", "flow/incoming/tables/half.bin", "serving/service.log",
        "reports/drift.html",
    )  # fmt: skip
    for store in stores_of_every_kind:
        assert store in before  # control: the search sees into every kind of file
    assert len({name.split("/")[1] for name in before if name.startswith("tables/")}) > 12
    receipt = erase(shop)
    assert found_in(shop.home, forms) == []
    assert found_in(shop.home, wanted(built, BEN)) != []
    assert erasure.verify_receipt(shop.home, receipt)
    assert audit.verify(shop.home).is_sound


def test_nobody_else_loses_a_row_or_a_word(built, shop):
    before, bens = others(shop), found_in(shop.home, wanted(built, BEN))
    with closing(open_vault(shop.home)) as vault:
        facts = [fact for fact in vault.facts() if fact.subject not in shop.mine[ANNA].values() and "Anna" not in fact.value]
    erase(shop)
    assert others(shop) == before
    gone = {name.split("/")[1] for name in set(bens) - set(found_in(shop.home, wanted(built, BEN)))}
    assert all(name.startswith(".") or name == "online.part" for name in gone)  # old versions of tables, and what was made of one
    with closing(open_vault(shop.home)) as vault:
        assert [fact for fact in vault.facts() if fact.value != NEW_ADDRESS] == [fact for fact in facts if fact.value != NEW_ADDRESS]
        rows = tables.read_arrow(shop.home, tables.QUARANTINE)
        opened = vault.unseal(rows["subject"].to_pylist(), rows["raw"].to_pylist())
        assert len(opened) == PEOPLE + 3 - 2
        assert None not in opened
        with closing(open_log(shop.home, settings=shop.settings, vault=vault)) as log:
            left = log.read("ingest", max_events=1_000)
    assert sorted(event.payload for event in left) == sorted(
        json.dumps({"type": "track", "userId": names_of(p)["user_id"], "messageId": f"logged-{p}-{n}"}).encode()
        for n in range(5)
        for p in range(1, PEOPLE)
    )
    with closing(open_log(shop.home, settings=shop.settings)) as log:
        assert [one.payload for one in log.parked(10)] == [b"{ broken, of anybody"]
    assert others(shop)["events"]
    text = (shop.home / "raw" / "events.jsonl").read_text()
    assert text.count("\n") == 31 * PEOPLE + 1  # every line keeps its number
    assert text.count("{") == 31 * (PEOPLE - 1) + PEOPLE - 1 + 1
    assert pq.read_schema(shop.home / "raw" / "truth.parquet").metadata == {b"shop": b"laws"}


def test_receipt_names_each_store_with_what_stood_there_and_nobody(built, shop):
    receipt = erase(shop, by=names_of(ANNA)["email"])
    assert receipt.stores["tables/events"] == 21
    assert receipt.stores["tables/messages"] == 21 + 2  # and the two that were in quarantine
    assert receipt.stores["tables/recommendations"] == 2
    assert receipt.stores["tables/identity_edges"] == 2
    assert receipt.stores["tables/traits"] == 2  # one of them told on the tablet while it was hers
    assert receipt.stores["quarantine without a name"] == 1
    assert receipt.stores["log"] == 8
    assert receipt.stores["raw/events.jsonl"] == 31
    assert receipt.stores["raw/truth.parquet"] == 1
    assert receipt.stores["models"] == 3
    assert receipt.stores["requests"] == 1
    assert {"vault", "online store", "identity graph", "other files"} <= set(receipt.stores)
    assert receipt.models == {"churn": [2], "recommender": [1, 2]}
    assert (receipt.by, receipt.shared, receipt.tombstones) == ("the customer", 1, 5 + 5)
    kept = json.loads((shop.home / "erasures" / f"{receipt.receipt_id}.json").read_text())
    assert erasure.verify_receipt(shop.home, kept)
    assert not erasure.verify_receipt(shop.home, {**kept, "stores": {}})
    assert not erasure.verify_receipt(built.home, kept | {"by": "somebody"})
    given = shop.home.parent / "given.json"
    given.write_text(json.dumps(kept))
    assert erasure.checked(shop.home, given) == receipt
    for wrong, complaint in (
        (json.dumps(kept | {"by": "somebody"}), "not as this home signed it"),
        ("[1]", "expected the JSON of a receipt"),
    ):
        given.write_text(wrong)
        with pytest.raises(InputError, match=complaint):
            erasure.checked(shop.home, given)
    assert json.loads((shop.home / "erasures" / "retrain.json").read_text()) == {"churn": [2], "recommender": [1, 2]}
    (entry,) = [entry for entry in audit.entries(shop.home, receipt.about) if entry.action == "erase"]
    assert entry.details == {"receipt": receipt.receipt_id}
    assert audit.digest(shop.home, shop.ids[ANNA]) == receipt.about
    assert list((shop.home / "erasures").glob("*.journal")) == []


@pytest.mark.parametrize("stage", [*STAGES, "vault"])
def test_search_finds_the_person_where_one_store_was_left_out(built, shop, monkeypatch, stage):
    is_sealed = stage in ("messages", "quarantine", "requests")  # what is left there is a hash, or sealed with nobody's key
    left_out = {stage} if is_sealed or stage == "vault" else {stage, "elsewhere"}
    kept = tuple((name, (lambda task: {}) if name in left_out else remove) for name, remove in process.STAGES)
    monkeypatch.setattr(process, "STAGES", kept)
    if stage == "vault":
        monkeypatch.setattr("pipelines.vault.Vault.destroy", lambda vault, subjects: 0)
    erase(shop)
    assert (found_in(shop.home, wanted(built, ANNA)) == []) == is_sealed
    if is_sealed:
        with closing(open_vault(shop.home)) as vault, closing(Requests(shop.home, vault=vault)) as asked:
            task = stores.Task(shop.home, shop.settings, vault, people.Person("", (), ()), tuple(names_of(ANNA).values()))
            assert len(stores.nameless_rows(task)) == (stage == "quarantine")
            answers = asked._db.execute("SELECT answer FROM requests").fetchall()
            assert len(answers) == 1 + (stage == "requests")
            is_known = "erased" in set(tables.read(shop.home, tables.MESSAGES)["outcome"])
            assert is_known == (stage != "messages")


@pytest.mark.parametrize("who", ["customer_id", "former customer_id", "pseudonym", "email", "user_id", "phone", "said kind"])
def test_person_is_found_by_whatever_they_are_called(built, shop, who):
    named = {
        **names_of(ANNA),
        "email": f" {names_of(ANNA)['email'].title()}",
        "customer_id": shop.ids[ANNA],
        "former customer_id": identity.surrogate(shop.mine[ANNA]["anonymous_id"]),
        "pseudonym": shop.mine[ANNA]["anonymous_id"],
        "said kind": f"anonymous_id:{names_of(ANNA)['anonymous_id']}",
    }
    with closing(open_vault(shop.home)) as vault:
        found = people.find(shop.home, named[who], vault=vault)
    assert found.customer_id == shop.ids[ANNA]
    assert set(found.identifiers) > set(shop.mine[ANNA].values())
    assert len(found.identifiers) == 5  # with the address that only the log has heard of
    assert len(found.shared) == len(found.spells) == 1
    assert found.used(found.shared[0], int(at(3).timestamp() * 1e6))
    assert not found.used(found.shared[0], int(at(10).timestamp() * 1e6))


def test_name_of_nobody_or_of_two_people_is_refused_and_nothing_happens(built, shop):
    with pytest.raises(InputError, match="found none"):
        erase(shop, who="nobody@example.org")
    with pytest.raises(InputError, match="held of 2 people"):
        erase(shop, who=f"anonymous_id:{DEVICE}")
    assert found_in(shop.home, wanted(built, ANNA)) == found_in(built.home, wanted(built, ANNA))


def test_erasing_again_gives_the_receipt_of_then(shop):
    receipt = erase(shop)
    assert erase(shop, who=names_of(ANNA)["email"]) == receipt
    assert erase(shop, who=shop.ids[ANNA]) == receipt
    assert erase(shop, who=identity.surrogate(shop.mine[ANNA]["phone"])) == receipt
    assert erasure.resume(shop.home, settings=shop.settings) == []


def test_person_known_to_the_log_alone_is_forgotten_too(shop):
    with closing(open_vault(shop.home)) as vault, closing(open_log(shop.home, settings=shop.settings, vault=vault)) as log:
        subject = vault.pseudonym("user_id", "only-in-the-log")
        log.append([Incoming("shop", "x", (subject,), b"{}", 1)])
    receipt = erase(shop, who="only-in-the-log")
    assert receipt.stores["log"] == 1
    with closing(open_vault(shop.home)) as vault:
        assert vault.entombed([subject]) == {subject}


def test_events_that_arrive_afterwards_are_not_taken_in(built, shop):
    erase(shop)
    with closing(open_vault(shop.home)) as vault, closing(open_log(shop.home, settings=shop.settings, vault=vault)) as log:
        outcomes = log.append([call(ANNA, "late", vault), call(BEN, "late too", vault)])
        assert outcomes == [Outcome.ERASED, Outcome.APPENDED]
        assert vault.remember([Fact(shop.mine[ANNA]["email"], "email", names_of(ANNA)["email"], "shop", 9)]) == 0
        names = [*shop.mine[ANNA].values(), shop.ids[ANNA]]
        assert vault.entombed(names) == set(names)
        assert vault.entombed([vault.pseudonym("anonymous_id", DEVICE), *shop.mine[BEN].values()]) == frozenset()
    assert found_in(shop.home, wanted(built, ANNA)) == []


def test_message_that_was_erased_stays_known_as_erased(shop):
    before = tables.read(shop.home, tables.MESSAGES)["outcome"].value_counts().to_dict()
    erase(shop)
    after = tables.read(shop.home, tables.MESSAGES)["outcome"].value_counts().to_dict()
    assert before == {"applied": 20 * PEOPLE + 2}
    assert after == {"applied": 20 * (PEOPLE - 1) + 1, "erased": 21 + 2}  # hers, the tablet's while it was hers, and two set aside
    assert not tables.read(shop.home, tables.MESSAGES).duplicated(["source", "message_high", "message_low"]).any()


def test_ledger_balances_before_and_after(shop):
    before = ledger(shop.home, settings=shop.settings)
    receipt = erase(shop)
    after = ledger(shop.home, settings=shop.settings)
    assert before["balance"] == after["balance"] == 0
    assert after["accepted"] == before["accepted"]
    assert after["applied"] == before["applied"] - 21
    assert after["quarantined"] == before["quarantined"] - 2
    assert after["erased"] == before["erased"] + 21 + 2 + 2  # applied; in quarantine; set aside by the log
    with closing(open_log(shop.home, settings=shop.settings)) as log:  # a reader finds the others gone when it comes to them
        log.commit("ingest", [event.position for event in log.read("ingest", max_events=1_000)])
    read = ledger(shop.home, settings=shop.settings)
    assert read["erased"] - after["erased"] == receipt.stores["log"] - 2


def test_recommender_answers_everybody_else_as_before(shop):
    def answers():
        champion = registry.load_champion(shop.home, "recommender")
        names, learner = np.load(champion.folder / "customer_ids.npy"), Recommender.load(champion.folder)
        items, scores = learner.recommend(np.arange(len(names)), 3)
        return champion, {name: (row.tolist(), score.tolist()) for name, row, score in zip(names, items, scores, strict=True)}

    before = answers()[1]
    erase(shop)
    champion, after = answers()
    del before[shop.ids[ANNA]]
    assert after == before
    told = champion.manifest["golden"]
    assert told["scores"] == [after[name][1] for name in list(after)[:5]]
    assert champion.manifest["rows"]["serving_customers"] == PEOPLE - 1
    assert champion.manifest["amendments"] == [{"why": "a customer was erased"}]
    copy = shop.home / "mlflow" / "artifacts" / "run" / "artifacts" / "model-2"
    assert {path.name for path in copy.iterdir()} == {path.name for path in champion.folder.iterdir()} | {"MLmodel"}
    assert (copy / "manifest.json").read_bytes() == (champion.folder / "manifest.json").read_bytes()


def test_damaged_version_with_a_row_of_the_person_goes_as_a_whole(built, shop):
    (shop.home / "models" / "recommender" / "1" / "item_factors.npy").write_bytes(b"")
    erase(shop)
    assert registry.versions(shop.home, "recommender") == (2,)
    assert found_in(shop.home, wanted(built, ANNA)) == []


def test_version_of_other_code_goes_as_a_whole_with_its_copy(shop, monkeypatch):
    copies = list((shop.home / "mlflow").rglob("customer_ids.npy"))
    assert copies
    for copy in copies:  # of a version that the registry has no more
        manifest = json.loads((copy.parent / "manifest.json").read_bytes())
        (copy.parent / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))

    def refuse(folder, **_):
        raise ValueError(f"{folder}: its second stage is kept in another way; train the recommender again")

    monkeypatch.setattr("pipelines.erasure.models.Stages.load", refuse)
    erase(shop)
    assert registry.versions(shop.home, "recommender") == ()
    assert not any(copy.exists() for copy in copies)


def test_served_values_are_told_and_then_erased_and_not_taken_in_again(shop):
    (told,) = erasure.export(shop.home, shop.ids[ANNA], settings=shop.settings)["served"]
    assert told == {"service": "churn_v1", "model": "churn 3", "time_us": 1, "values": {"views_7d": 4}}
    assert erase(shop).stores["served values"] == 1
    with closing(open_vault(shop.home)) as vault, closing(Served(shop.home, vault=vault)) as sample:
        assert {row.customer_id for row in sample.rows()} == set(shop.ids) - {shop.ids[ANNA]}
        assert sample.add([served_row(shop.ids[ANNA])], now_us=4) == 0  # a worker had it in its queue


# -- killed


class Killed(BaseException):
    """What a kill is to a program: nothing that it could catch."""


def test_erasure_killed_before_and_after_the_end_of_every_stage_is_finished(built, shop, monkeypatch):
    note, record, kills = process._noted, audit.record, []
    places = [(stage, is_noted) for stage in (*STAGES, "vault", "trail") for is_noted in (False, True)]

    def die_at(place, does, *arguments, **named):
        """`does`, but killed once before it and once after it."""
        if (place, False) not in kills:
            kills.append((place, False))
            raise Killed
        done = does(*arguments, **named)
        if (place, True) not in kills:
            kills.append((place, True))
            raise Killed
        return done

    monkeypatch.setattr(process, "_noted", lambda home, journal, stage, counts: die_at(stage, note, home, journal, stage, counts))
    monkeypatch.setattr(audit, "record", lambda *arguments, **named: die_at("trail", record, *arguments, **named))
    with pytest.raises(Killed):
        erase(shop)
    while len(kills) < len(places):
        with pytest.raises(Killed):
            erasure.resume(shop.home, settings=shop.settings)
    assert kills == places
    (receipt,) = erasure.resume(shop.home, settings=shop.settings)
    check_finished(built, shop, receipt)


def check_finished(built, shop, receipt):
    assert found_in(shop.home, wanted(built, ANNA)) == []
    assert erasure.verify_receipt(shop.home, receipt)
    assert receipt.stores["tables/events"] == 21
    assert [entry.details for entry in audit.entries(shop.home) if entry.action == "erase"] == [{"receipt": receipt.receipt_id}]
    assert audit.verify(shop.home).is_sound
    assert registry.load_champion(shop.home, "recommender").version == 2
    assert tables.count(shop.home, tables.EVENTS) == 20 * (PEOPLE - 1) + 1
    assert erasure.resume(shop.home, settings=shop.settings) == []


KILLED = """
import os, signal, sys
from datetime import datetime, UTC
from pathlib import Path
from pipelines import erasure
from pipelines.settings import Settings

home, who, kills = Path(sys.argv[1]), sys.argv[2], 0
for attempt in range(40):
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_PROF, 0.01 + 0.04 * attempt)  # of processor time: SIGPROF ends it as SIGKILL would
        erasure.erase(home, who, settings=Settings(home=home), by="officer", as_of=datetime(2026, 1, 31, tzinfo=UTC))
        os._exit(0)
    if os.waitpid(child, 0)[1] != signal.SIGPROF:
        break
    kills += 1
print(kills)
"""


@pytest.mark.slow
def test_erasure_survives_a_kill_at_any_moment(built, shop):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(shop.home), shop.ids[ANNA]], capture_output=True, timeout=120, check=True, env=dict(os.environ)
    )
    assert int(done.stdout) >= 3  # control: the test does kill
    check_finished(built, shop, erase(shop))


def test_erasure_waits_for_a_run_of_the_loop_and_takes_nothing_in_meanwhile(built, shop, monkeypatch):
    import fcntl

    monkeypatch.setattr(process, "_WAIT_S", 0.2)
    with (shop.home / "flow" / "lock").open("w") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        with pytest.raises(PipelineError, match="a run is working"):
            erase(shop)
        with closing(open_vault(shop.home)) as vault, closing(open_log(shop.home, settings=shop.settings, vault=vault)) as log:
            assert log.append([call(ANNA, "meanwhile", vault)]) == [Outcome.ERASED]
    check_finished(built, shop, erase(shop))


def test_file_of_an_unknown_kind_that_names_the_person_is_told_and_not_touched(built, shop):
    strange = shop.home / "models" / "notes.bin"
    strange.write_bytes(b"\0\1" + shop.ids[ANNA].encode())
    with pytest.raises(StoreError, match=r"models/notes\.bin"):
        erase(shop)
    assert shop.ids[ANNA].encode() in strange.read_bytes()
    strange.unlink()
    check_finished(built, shop, erase(shop))


def _keep_clicking(home, stop, sent):
    with closing(open_vault(home)) as vault, closing(open_log(home, settings=Settings(home=home), vault=vault)) as log:
        while not stop.is_set():
            outcomes = log.append([call(ANNA, f"click-{sent.value + n}", vault) for n in range(25)])
            sent.value += len(outcomes)
            time.sleep(0.05)


def clicked(sent):
    """Return once they have clicked again, be it before the erasure, meanwhile or afterwards."""
    before, end = sent.value, time.monotonic() + 60
    while sent.value == before:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_person_who_keeps_clicking_is_erased_all_the_same(built, shop, monkeypatch):
    context = multiprocessing.get_context("fork")
    stop, sent = context.Event(), context.Value("i", 0)
    clicking = context.Process(target=_keep_clicking, args=(shop.home, stop, sent))
    clicking.start()
    try:
        clicked(sent)
        noted = process._noted
        monkeypatch.setattr(process, "_noted", lambda *told: (clicked(sent), noted(*told))[1])
        receipt = erase(shop)
        clicked(sent)
    finally:
        stop.set()
        clicking.join(timeout=60)
    assert found_in(shop.home, wanted(built, ANNA)) == []
    with closing(open_vault(shop.home)) as vault, closing(open_log(shop.home, settings=shop.settings, vault=vault)) as log:
        counts = log.counts()
        assert counts.appended + counts.erased == sent.value + 5 * PEOPLE + 1
        assert counts.erased > 0
        assert {event.subjects[0] for event in log.read("ingest", max_events=10_000)} == {some["user_id"] for some in shop.mine[1:]}
    assert receipt.stores["log"] > 8


# -- the real path


@pytest.mark.slow
def test_simulated_customer_is_forgotten_and_no_file_brings_them_back(tmp_path):
    home, settings = tmp_path / "home", Settings(home=tmp_path / "home")
    simulate.simulate(home / "raw", customers=60, days=40, seed=3, items=20)
    kept, again = tmp_path / "backup.jsonl", tmp_path / "again.jsonl"
    shutil.copy(home / "raw" / "events.jsonl", kept)
    again.write_bytes(kept.read_bytes().replace(b'"messageId":"', b'"messageId":"new-'))
    assert ingest.ingest(home, [home / "raw" / "events.jsonl"], mapping=None, settings=settings).stored
    events = tables.read(home, tables.EVENTS)
    who = events["customer_id"].value_counts().index[2]
    told = erasure.export(home, who, settings=settings)
    names = [one["value"] for one in told["identifiers"]]
    assert {one["kind"] for one in told["identifiers"]} == {"user_id", "email", "anonymous_id"}
    forms = {form for name in [*names, who] for form in spelled(name)}
    assert {"raw/events.jsonl", "raw/truth.parquet"} < set(found_in(home, forms))
    receipt = erasure.erase(home, names[-1], settings=settings, by="officer", as_of=AS_OF)
    assert receipt.stores["tables/events"] == len(told["events"]) > 10
    assert found_in(home, forms) == []
    left = tables.read(home, tables.EVENTS)
    pd.testing.assert_frame_equal(left, events[events["customer_id"] != who].reset_index(drop=True))
    assert ingest.ledger(home, settings=settings)["balance"] == 0

    for path in (home / "raw" / "events.jsonl", kept):
        assert ingest.ingest(home, [path], mapping=None, settings=settings).stored == 0
    report = ingest.ingest(home, [again], mapping=None, settings=settings)  # the same people do new things
    assert report.erased == receipt.stores["tables/messages"]
    assert report.stored
    assert found_in(home, forms) == []
    assert who not in set(tables.read(home, tables.EVENTS)["customer_id"])
    ledger_now = ingest.ledger(home, settings=settings)
    assert (ledger_now["balance"], ledger_now["erased"]) == (0, receipt.stores["tables/messages"] + report.erased)


# -- told


def test_export_tells_everything_and_nothing_of_others(built, shop):
    told = erasure.export(shop.home, names_of(ANNA)["email"], settings=shop.settings, by="officer")
    text = json.dumps(told)
    assert {(one["kind"], one["value"]) for one in told["identifiers"]} == {
        *names_of(ANNA).items(),
        ("email", NEW_ADDRESS),
        ("anonymous_id", DEVICE),
    }
    streets = [(fact["value"], fact["source"]) for fact in told["facts"] if fact["kind"] == "street"]
    assert len(streets) == 2  # the one that holds and the one that lost
    assert [fact["value"] for fact in told["facts"] if fact["kind"] == "first_name"] == ["Anna of the tablet"]
    assert len(told["events"]) == 21
    assert {row["user_id"] for row in told["events"]} == {names_of(ANNA)["user_id"], None}
    assert told["consents"][0]["identifier"] == names_of(ANNA)["user_id"]
    assert len(told["customer_activity"]) == 1  # what is known now
    assert told["customer_activity"][0]["event_timestamp"].startswith("2026-01-07")
    for table in ("traits", "labels_churn", "customer_scores", "recommendations", "interactions", "training_churn", "identity_links"):
        assert told[table], table
    assert sorted(row["raw"][:10] for row in told["quarantine"]) == ['{"type":"i', '{"userId":']
    assert [row["link_id"] for row in told["identity_edges"]] == ["l2"]  # not the suspicion that she is Ben
    joined = [{link["left"], link["right"]} for link in told["identity"]]
    assert {names_of(ANNA)["user_id"], names_of(ANNA)["email"]} in joined
    assert {names_of(ANNA)["user_id"], DEVICE} in joined
    assert len(told["log"]) == 8
    assert told["log"][0]["call"]["userId"] == names_of(ANNA)["user_id"]
    assert told["online"]["identifier_customer"] == {"customer_id": shop.ids[ANNA]}
    assert told["online"]["customer_scores"] == {"churn_probability": "0.5"}
    assert told["models"] == {"churn": [2], "recommender": [1, 2]}
    assert [entry["action"] for entry in told["audit"]] == ["export", "export"]
    for person in range(1, PEOPLE):
        assert not [form for form in wanted(built, person) if form.decode(errors="replace") in text], person


def test_export_is_written_down_without_a_name(built, shop):
    erasure.export(shop.home, names_of(ANNA)["email"], settings=shop.settings, by="officer")
    entry = audit.entries(shop.home)[-1]
    assert (entry.action, entry.by, entry.about) == ("export", "officer", audit.digest(shop.home, shop.ids[ANNA]))
    assert "audit/audit.jsonl" not in found_in(shop.home, wanted(built, ANNA))


def test_export_after_an_erasure_finds_nobody(shop):
    erase(shop)
    for who in (shop.ids[ANNA], *names_of(ANNA).values()):
        with pytest.raises(InputError, match="found none"):
            erasure.export(shop.home, who, settings=shop.settings)


def test_request_that_waits_is_told_to_whom_it_is_about(shop):
    with closing(open_vault(shop.home)) as vault, closing(Requests(shop.home, vault=vault)) as asked:
        asked.ask(Kind.EXPORT, names_of(ANNA)["user_id"], by="admin", now_us=1)
        asked.ask(Kind.EXPORT, names_of(BEN)["user_id"], by="admin", now_us=1)
    assert erasure.export(shop.home, shop.ids[ANNA], settings=shop.settings)["requests"] == [{"kind": "export", "by": "admin"}]


# -- the parts


IMPERSONAL = {
    "source", "event_id", "type", "name", "item_id", "order_id", "session_id", "decision_id", "query", "consent", "outcome", "file",
    "quarantine_id", "reason", "detail", "message_id", "origin", "files", "sha256", "plan", "positions", "link_id", "kind", "state",
    "evidence", "decided_by", "purpose", "basis", "policy_version", "trait", "value", "category", "alert_id", "column", "age_band",
    "gender", "region", "label", "split", "churn_version", "intent_version", "version", "rfm_tier", "model",
    "lifecycle", "segment", "audience", "identify", "destination",
}  # fmt: skip
NAMING = {"customer_id", "user_id", "anonymous_id", "identifier", "subject", "left", "right", "email", "phone"}


def test_every_text_column_of_every_table_is_known_to_name_people_or_not():
    person = people.Person("c1", ("c1",), ("email:" + "a" * 32,))
    for table in tables.TABLES:
        for field in table.schema or ():
            if pa.types.is_string(field.type):
                assert (people.condition(person, [field.name]) is not None) == (field.name in NAMING), f"{table.name}.{field.name}"
                assert field.name in NAMING | IMPERSONAL, (
                    f"decide whether {table.name}.{field.name} can name a person, and tell erasure.people"
                )


@pytest.mark.parametrize(
    ("line", "is_hers"),
    [
        ('{"userId":"anna-1"}', True),
        ('{"traits": {"email": "Anna@Example.ORG"}}', True),
        ("anna-1,view,i3", True),
        ("i3;anna-1", True),
        ('{"userId":"anna-10"}', False),
        ('{"userId":"dianna-1"}', False),
        ('{"userId":"ANNA-1"}', False),  # only addresses are the same in another case
        ('{"email":"anna-1@example.org"}', False),
        ('{"note":"about anna-1 again"}', False),
        ('{"userId": 4711, "n": 1}', True),
        ('{"n": 14711}', False),
        ('{"userId":"J\\u00f6rg"}', True),
        ('{"userId":"Jörg"}', True),
    ],
)
def test_line_goes_if_one_of_its_values_is_the_person(tmp_path, line, is_hers):
    path = tmp_path / "events.jsonl"
    before = f'{{"userId":"ben"}}\n{line}\n{{"userId":"carl"}}'
    path.write_text(before)
    assert rawfiles.remove(path, ["anna-1", "anna@example.org", "4711", "Jörg"]) == is_hers
    assert path.read_text() == ('{"userId":"ben"}\n\n{"userId":"carl"}' if is_hers else before)
    assert [found.name for found in tmp_path.iterdir()] == ["events.jsonl"]


def test_lines_are_found_across_the_pieces_that_a_file_is_read_in(tmp_path, monkeypatch):
    monkeypatch.setattr(rawfiles, "_CHUNK", 64)
    path = tmp_path / "events.jsonl"
    lines = [f'{{"userId":"{"anna" if n % 3 else "ben"}-1","n":{n}}}\n' for n in range(200)]
    path.write_text("".join(lines))
    assert rawfiles.remove(path, ["anna-1"]) == sum(n % 3 != 0 for n in range(200))
    assert path.read_text() == "".join(line if "ben" in line else "\n" for line in lines)


def test_note_of_another_person_whose_name_only_begins_alike_is_left_alone(shop):
    log = shop.home / "serving" / "service.log"
    longer = names_of(ANNA)["user_id"][:-1] + "x-and-more"
    log.write_text(f"asked about {names_of(ANNA)['email']}, {longer}\n")
    erase(shop)
    assert log.read_text() == f"asked about {'*' * len(names_of(ANNA)['email'])}, {longer}\n"


def test_receipts_of_several_people_queue_their_models_together(shop):
    first = erase(shop)
    second = erasure.erase(shop.home, shop.ids[BEN], settings=shop.settings, by="officer", as_of=AS_OF)
    assert first.about != second.about
    assert second.models == {"churn": [2], "recommender": [1, 2]}
    assert receipts.read(shop.home, second.receipt_id) == second
    assert erasure.verify_receipt(shop.home, second)
