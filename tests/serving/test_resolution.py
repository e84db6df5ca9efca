"""What Feast said of the store is kept for as long as it holds, and not believed beyond that."""

import json
from types import SimpleNamespace

import pytest

from pipelines import feature_store
from pipelines.vault import open_vault
from serving import profile, resolution
from serving.fallbacks import Deadline
from serving.online_store import FeastSource, SqliteSource, StoreFailure
from serving.resolution import Resolver

AT_ONCE = Deadline.after_ms(3_600_000)


@pytest.fixture
def home(home):
    """Nothing was kept of it yet."""
    (home / "serving" / "resolved.json").unlink()
    return home


@pytest.fixture
def child(monkeypatch):
    """The child process, here: `asked` counts it."""
    made = SimpleNamespace(asked=0)

    def run(command, **_):
        made.asked += 1
        resolution.keep(resolution.Path(command[3]))

    monkeypatch.setattr(resolution.subprocess, "run", run)
    return made


@pytest.fixture
def resolve(home):
    """One start of a worker: the profiles, and who resolved them."""

    def resolved(resolver=None):
        resolver = resolver or Resolver()
        return resolver(home, max_age_hours=48.0, pseudonym=open_vault(home).pseudonym), resolver

    return resolved


def settle(resolver):
    if resolver._beside is not None:
        resolver._beside.join(60)


def test_what_was_kept_is_what_feast_says_and_is_not_asked_again(home, child, resolve, opened, monkeypatch):
    feast = opened(home, max_age_hours=48.0)
    first, _ = resolve()
    monkeypatch.setattr(profile, "open_profiles", lambda *_, **__: pytest.fail("Feast was asked here"))
    again, _ = resolve()
    assert child.asked == 1
    for found in (first, again):
        assert found.views == feast.views
        assert isinstance(found.source, SqliteSource)
        assert found.source.path == feast.source.path
        assert not found.is_provisional


def test_another_materialization_is_no_reason_to_wait_and_one_to_ask_beside(home, cast, child, resolve):
    resolve()
    feature_store.materialize(home, as_of=cast.now)  # the registry keeps when
    found, resolver = resolve()
    assert found.is_provisional
    settle(resolver)
    assert child.asked == 2
    found, _ = resolve(resolver)
    assert not found.is_provisional
    assert child.asked == 2


@pytest.mark.parametrize("change", ["declarations", "damaged file", "a table that is no name"])
def test_what_was_kept_for_something_else_is_not_used(home, child, resolve, change, monkeypatch):
    resolve()
    kept = home / "serving" / "resolved.json"
    told = json.loads(kept.read_bytes())
    if change == "declarations":
        kept.write_text(json.dumps(told | {"declared": "of another release"}))
    elif change == "damaged file":
        kept.write_bytes(kept.read_bytes()[:-20])
    else:
        told["views"]["customer_consent"][0]["table"] = 'x" UNION SELECT 1'
        kept.write_text(json.dumps(told))
    found, _ = resolve()
    assert found.views["customer_consent"][0].table == "rapport_customer_consent"
    assert not found.is_provisional


def test_store_that_is_not_read_directly_is_read_through_feast_and_nothing_is_kept(home, child, resolve, monkeypatch):
    monkeypatch.setattr(profile, "self_check", lambda *_: "odd")
    found, resolver = resolve()
    assert isinstance(found.source, FeastSource)
    assert not (home / "serving" / "resolved.json").exists()
    resolve(resolver)
    assert child.asked == 1  # it said so


def test_rows_of_another_encoding_are_noticed_at_the_start(home, child, resolve, monkeypatch):
    found, _ = resolve()
    assert resolution.oddity(found.source, found.views) is None
    view = found.views["customer_consent"][0]
    shifted = SqliteSource(found.source.path, decode=lambda value: (_ for _ in ()).throw(resolution.EncodingChanged("shifted")))
    assert "shifted" in resolution.oddity(shifted, {"one": (view,)})
    found.source.path.rename(found.source.path.with_suffix(".away"))
    assert resolution.oddity(found.source, {"one": (view,)}) is None  # nothing is known against it


def test_store_that_is_away_at_the_start_is_no_reason_not_to_start(home, child, resolve):
    resolve()
    store = home / "feature_store" / "online.db"
    store.rename(store.with_suffix(".away"))
    found, _ = resolve()
    with pytest.raises(StoreFailure):
        found.check(AT_ONCE)
    store.with_suffix(".away").rename(store)
    found.check(AT_ONCE)


def test_home_where_nothing_was_applied_is_a_failure_with_a_reason(tmp_path, child):
    with pytest.raises(StoreFailure):
        Resolver()(tmp_path, max_age_hours=1.0, pseudonym=lambda kind, name: name)
    assert child.asked == 0
