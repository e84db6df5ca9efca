"""A small shop's home: feature tables, online store, signed champions. Built once, copied for tests that break it."""

import contextlib
import json
import os
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

os.environ["BENTOML_HOME"] = tempfile.mkdtemp(dir=os.environ["TMPDIR"])

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import sparse

from models.classifier import Classifier
from models.recommender import Recommender
from pipelines import registry, tables, windows
from pipelines.settings import ServingSettings, Settings
from pipelines.vault import open_vault

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
CUSTOMERS = [f"c{i:016x}" for i in range(24)]
ITEMS = [f"item-{i:02d}" for i in range(30)]
CATEGORIES = ("shoes", "hats", "books")
DENIED, SILENT, NOT_TRAINED, BARE = CUSTOMERS[20], CUSTOMERS[21], CUSTOMERS[22], CUSTOMERS[23]


GOOD = {"customer_id": "c1"}
# Requests that are wrong: endpoint, body, field at fault. Both paths into the service must refuse them.
BAD = [
    ("/recommend", {}, "customer_id"),
    ("/recommend", {"k": 5}, "customer_id"),
    ("/recommend", GOOD | {"k": 0}, "k"),
    ("/recommend", GOOD | {"k": 201}, "k"),
    ("/recommend", GOOD | {"k": "5"}, "k"),
    ("/recommend", GOOD | {"k": 5.0}, "k"),
    ("/recommend", GOOD | {"k": True}, "k"),
    ("/recommend", GOOD | {"k": None}, "k"),
    ("/recommend", GOOD | {"k": float("nan")}, "k"),
    ("/recommend", GOOD | {"colour": "red"}, "colour"),
    ("/recommend", {"customer_id": 7}, "customer_id"),
    ("/recommend", {"customer_id": ""}, "customer_id"),
    ("/recommend", {"customer_id": "x" * 257}, "customer_id"),
    ("/recommend", {"anonymous_id": ["x"]}, "anonymous_id"),
    ("/recommend", GOOD | {"exclude": "item"}, "exclude"),
    ("/recommend", GOOD | {"exclude": [1]}, "exclude.0"),
    ("/recommend", GOOD | {"exclude": ["x"] * 1_001}, "exclude"),
    ("/recommend", GOOD | {"filters": {"category": []}}, "filters.category"),
    ("/recommend", GOOD | {"filters": {"colour": ["red"]}}, "filters.colour"),
    ("/recommend", GOOD | {"filters": ["shoes"]}, "filters"),
    ("/recommend", GOOD | {"filters": {"in_stock": 1}}, "filters.in_stock"),
    ("/recommend", GOOD | {"filters": {"price": {}}}, "filters.price"),
    ("/recommend", GOOD | {"filters": {"price": {"min": 2, "max": 1}}}, "filters.price"),
    ("/recommend", GOOD | {"filters": {"price": {"min": -1}}}, "filters.price.min"),
    ("/recommend", GOOD | {"filters": {"price": {"max": float("inf")}}}, "filters.price.max"),
    ("/recommend", GOOD | {"new_only": "yes"}, "new_only"),
    ("/recommend", GOOD | {"max_per_category": 0}, "max_per_category"),
    ("/recommend", GOOD | {"context": {"depth": float("nan")}}, "context"),
    ("/recommend", GOOD | {"context": {"depth": [{"x": float("inf")}]}}, "context"),
    ("/recommend", GOOD | {"context": "page"}, "context"),
    ("/churn", {}, "customer_ids"),
    ("/churn", {"customer_ids": []}, "customer_ids"),
    ("/churn", {"customer_ids": ["x"] * 1_001}, "customer_ids"),
    ("/churn", {"customer_ids": "c1"}, "customer_ids"),
    ("/churn", {"customer_ids": ["c1", None]}, "customer_ids.1"),
    ("/churn", {"customer_ids": ["c1"], "k": 1}, "k"),
    ("/score/return_risk", {"customer_ids": ["c1", 2]}, "customer_ids.1"),
    ("/score/return_risk", {"customer_ids": ["c1"], "context": {"price": 1}}, "context"),
]
BROKEN = [b"{", b"nonsense", b"[]", b"null", b'"c1"', b'{"customer_id": "\xff"}', b'{"customer_id": "c1"} trailing', b"[" * 5_000]


def pytest_generate_tests(metafunc):
    """A test that takes `bad_request` runs once for each wrong request."""
    if "bad_request" in metafunc.fixturenames:
        wrong = [(path, json.dumps(body).encode(), field) for path, body, field in BAD]
        wrong += [("/recommend", body, None) for body in BROKEN]
        metafunc.parametrize("bad_request", wrong, ids=[f"{path[1:]}-{field}-{i}" for i, (path, _, field) in enumerate(wrong)])


@pytest.fixture(scope="session", autouse=True)
def own_ports(brokers):
    """A service that may choose its port is given one that no other process of the tests has."""
    from serving import process

    usable = process._usable_port
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "_usable_port", lambda host, port: usable(host, port or brokers.free_port()))
        yield


@pytest.fixture(scope="session")
def cast():
    """Who is who in the shop, and when it is."""
    return SimpleNamespace(
        now=NOW, customers=CUSTOMERS, items=ITEMS, denied=DENIED, silent=SILENT, untrained=NOT_TRAINED, bare=BARE,
        fill_store=fill_store, promote_recommender=promote_recommender, classifier=classifier,
    )  # fmt: skip


@pytest.fixture(scope="session")
def shop(once):
    """A home with everything in place. Not to be changed: see `home`."""
    from serving import resolution

    def make(home):
        write_tables(home)
        fill_store(home)
        train(home)
        (home / "clock.json").write_text(f'{{"as_of": "{NOW.isoformat()}", "is_history": true}}')
        resolution.keep(home)  # as the first service on it would: the others are spared Feast

    return once("served-shop", make)


@pytest.fixture
def home(shop, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(shop, tmp_path / "home", symlinks=True))


@pytest.fixture
def settings(home):
    return Settings(home=home)


def write_tables(home):
    rng = np.random.default_rng(7)
    then = [NOW - timedelta(days=float(d)) for d in rng.uniform(0.5, 20, len(CUSTOMERS))]
    tables.write(home, tables.CUSTOMER_ACTIVITY, activity(rng, tables.CUSTOMER_ACTIVITY, CUSTOMERS[:-1], then[:-1]))
    tables.write(home, tables.CUSTOMER_SESSION, activity(rng, tables.CUSTOMER_SESSION, CUSTOMERS[:-1], then[:-1]))
    tables.write(home, tables.ITEM_ACTIVITY, activity(rng, tables.ITEM_ACTIVITY, ITEMS, [NOW - timedelta(days=1)] * len(ITEMS)))
    whole = {"customer_id": CUSTOMERS[:-1], "event_timestamp": [NOW - timedelta(days=30)] * (len(CUSTOMERS) - 1)}
    regions = [None if i % 5 == 0 else ("north", "süd 🛒")[i % 2] for i in range(len(CUSTOMERS) - 1)]
    imputed = dict.fromkeys(("is_age_band_imputed", "is_gender_imputed", "is_region_imputed"), False)
    write(home, tables.CUSTOMER_PROFILE, {**whole, "age_band": ["30-44"] * 23, "gender": [None] * 23, "region": regions, **imputed})
    asked = [c for c in CUSTOMERS if c != SILENT]
    allowed = [c != DENIED for c in asked]
    consent = {"customer_id": asked, "event_timestamp": [NOW - timedelta(days=400)] * len(asked), "is_personalization_allowed": allowed}
    write(home, tables.CUSTOMER_CONSENT, consent)
    with contextlib.closing(open_vault(home)) as vault:
        names = [
            vault.pseudonym(kind, f"{name}-{i}") for kind, name in (("user_id", "user"), ("anonymous_id", "device")) for i in range(24)
        ]
    identities = {"identifier": names, "customer_id": CUSTOMERS * 2, "event_timestamp": NOW - timedelta(days=40)}
    write(home, tables.IDENTITIES, {**identities, "created_timestamp": NOW - timedelta(days=40)})
    scores = {"customer_id": CUSTOMERS[:20], "event_timestamp": [NOW - timedelta(days=1)] * 20, "churn_probability": rng.uniform(size=20)}
    write(
        home, tables.CUSTOMER_SCORES, {**scores, "churn_version": "1", "intent_probability": rng.uniform(size=20), "intent_version": None}
    )
    kept = {"customer_id": CUSTOMERS[:20], "event_timestamp": [NOW - timedelta(days=1)] * 20, "model": "return_risk", "version": "4"}
    write(home, tables.TASK_SCORES, {**kept, "probability": np.linspace(0.05, 0.95, 20)})
    told = {"customer_id": CUSTOMERS[10:20], "event_timestamp": NOW - timedelta(days=1), "rfm_tier": "high", "lifecycle": "frequent"}
    write(home, tables.CUSTOMER_SEGMENTS, {**told, "segment": "keen", "version": "1"})
    stock = [None if i % 4 else i != 8 for i in range(30)]
    listed = {"item_id": ITEMS, "category": [CATEGORIES[i % 3] for i in range(30)], "price_cents": range(30), "in_stock": stock}
    since = [NOW - timedelta(days=90)] * 29 + [NOW + timedelta(days=3)]
    write(home, tables.ITEMS, {**listed, "event_timestamp": since, "created_timestamp": since})
    bought = [(c, ITEMS[j]) for i, c in enumerate(CUSTOMERS[:22]) for j in {i % 29, (i * 3) % 29, (i * i) % 29, 1, 2}]
    pairs = {"customer_id": [c for c, _ in bought], "item_id": [i for _, i in bought], "type": "purchase", "weight": 1.0}
    write(home, tables.INTERACTIONS, {**pairs, "event_timestamp": NOW - timedelta(days=5), "created_timestamp": NOW - timedelta(days=5)})


def write(home, table, columns):
    tables.write(home, table, pa.Table.from_pandas(pd.DataFrame(columns)[table.schema.names], table.schema, preserve_index=False))


def activity(rng, table, keys, then):
    """Random change points: counts, and instants that some never had."""
    micros = np.array([t.timestamp() * 1e6 for t in then])
    columns = {table.key[0]: keys, "event_timestamp": then}
    for name in table.schema.names[2:]:
        if name.endswith("_at"):
            values = (micros - rng.integers(0, 10**12, len(keys))).astype("int64")
            columns[name] = pd.array([None if rng.uniform() < 0.2 else v for v in values], dtype="Int64")
        else:
            columns[name] = rng.integers(-1 if name.startswith("revenue") else 0, 2_000, len(keys))
    return pa.Table.from_pandas(pd.DataFrame(columns)[table.schema.names], table.schema, preserve_index=False)


def fill_store(home):
    from pipelines import feature_store

    feature_store.apply(home)
    feature_store.materialize(home, as_of=NOW)


def train(home):
    for name, seed in (("churn", 1), ("intent", 2), ("return_risk", 5)):
        learner, sample, base_rate = classifier(name, seed)
        golden = {"features": {c: [None if pd.isna(v) else v for v in sample[c]] for c in sample}}
        golden["probability"] = learner.predict_proba(sample)[:, 1].tolist()
        version = registry.register(home, name, learner=learner, manifest={"base_rate": base_rate, "golden": golden})
        registry.promote(home, name, version)
    promote_recommender(home, seed=3, as_of=(NOW - timedelta(hours=2)).isoformat())


def classifier(name, seed, rows=400):
    """A model of columns as they are served: random features, a label that hangs on two of them."""
    rng = np.random.default_rng(seed)
    views = [tables.CUSTOMER_ACTIVITY, *([tables.CUSTOMER_SESSION] if name == "intent" else [])]
    then = [NOW - timedelta(days=float(d)) for d in rng.uniform(0, 20, rows)]
    stored = pd.concat([activity(rng, t, [f"c{i}" for i in range(rows)], then).to_pandas().iloc[:, 2:] for t in views], axis=1)
    stored.insert(0, "region", rng.choice(["north", "süd 🛒", None], rows))
    features = windows.derive(stored, NOW)
    label = (features["views_30d"] + features["events_total"] + rng.normal(0, 500, rows) > 2_000).astype(int)
    learner = Classifier(n_rounds=30, random_state=seed).fit(features, label)
    return learner, features.head(5), float(label.mean())


def promote_recommender(home, seed, customers=CUSTOMERS, **manifest):
    known = customers[:22]
    rows = tables.read(home, tables.INTERACTIONS)
    places = ([known.index(c) for c in rows["customer_id"]], [ITEMS.index(i) for i in rows["item_id"]])
    weights = sparse.csr_matrix((rows["weight"], places), (len(known), len(ITEMS)))
    learner = Recommender(n_factors=8, n_epochs=5, random_state=seed).fit(weights)
    arrays = {"customer_ids": np.array(known), "item_ids": np.array(ITEMS)}
    version = registry.register(home, "recommender", learner=learner, manifest={"seed": seed, **manifest}, arrays=arrays)
    registry.promote(home, "recommender", version)
    return version


@pytest.fixture(scope="session")
def rehearse():
    """The rehearsal without its child process, which takes seconds to start."""
    from serving import champions

    def here(pending):
        told = {}
        for name, folder in pending:
            with contextlib.suppress(ValueError):  # the child would have ended there
                manifest = json.loads((folder / registry.MANIFEST).read_bytes())
                told[name] = champions.golden(champions._learner(name, folder), manifest)
        return told

    return here


@pytest.fixture(scope="session")
def opened():
    """open_profiles with the pseudonyms of the home."""
    from serving.profile import open_profiles

    def open_with_vault(home, **options):
        return open_profiles(home, pseudonym=open_vault(home).pseudonym, **options)

    return open_with_vault


@pytest.fixture
def answers(settings, rehearse):
    """The decision core over the test's own home, opened."""
    from serving.answers import Answers

    core = Answers(settings, rehearse=rehearse)
    core.open()
    yield core
    core.close()


@pytest.fixture(scope="session")
def running(shop, tmp_path_factory):
    """The service as a process of its own, without the worker beside it: `port`, `keys` by role, `child`, `output`."""
    from serving.access import Role, read_key
    from serving.process import start

    home = Path(shutil.copytree(shop, tmp_path_factory.mktemp("running") / "home", symlinks=True))
    told = ServingSettings(log_per_s=10_000)  # a line for every request that a test may ask about
    with start(Settings(home=home, serving=told), 0, is_alone=True) as service:
        keys = {role: read_key(service.settings, role) for role in Role}
        yield SimpleNamespace(port=service.port, url=service.url, keys=keys, child=service.child, output=service.output, home=home)


@pytest.fixture
def browser(tmp_path):
    """The words that start a browser without a window, a profile of its own, and without calls home."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no browser on this machine")
    quiet = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
    return [program, *quiet, f"--user-data-dir={tmp_path}"]
