"""The same shop with its features in a real Redis: read directly, held against Feast, and with the server gone and back."""

from contextlib import closing

import pytest
import redis

from pipelines import feature_store
from pipelines.online.feast_format import redis_key
from pipelines.online.redis_writer import RedisWriter
from pipelines.online.writer import Row
from pipelines.settings import OnlineSettings, Settings
from serving import redis_source, store_guard
from serving.answers import Answers
from serving.breaker import Breaker
from serving.fallbacks import Deadline, Unavailable
from serving.online_store import Decoder, FeastSource, StoreFailure, difference
from serving.profile import _resolve, self_check
from serving.profile import feature_store as feast_of
from serving.redis_source import RedisSource
from serving.store_guard import Guard
from serving.wire import RecommendRequest, ScoreRequest

pytestmark = pytest.mark.server

SOON = Deadline.after_ms(3_600_000)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A machine that stands still for a moment is no server that is silent."""
    monkeypatch.setattr(redis_source, "SILENCE_S", 60.0)
    monkeypatch.setattr(redis_source, "CONNECT_S", 60.0)
    monkeypatch.setattr(store_guard, "PROBE_MS", 60_000)


def fill(home, url, now):
    settings = Settings(home=home, online=OnlineSettings(redis_url=url))
    feature_store.apply(home, settings=settings)
    feature_store.materialize(home, as_of=now, settings=settings)
    return settings


@pytest.fixture(scope="module")
def settings(shop, cast, redis_server, tmp_path_factory):
    import shutil

    home = shutil.copytree(shop, tmp_path_factory.mktemp("redis") / "home", symlinks=True)
    url = redis_server.url.rsplit("/", 1)[0] + "/8"
    with closing(redis.Redis.from_url(url)) as client:
        client.flushdb()
    return fill(home, url, cast.now)


@pytest.fixture(scope="module")
def feast(settings):
    return feast_of(settings.home, redis_url=settings.online.redis_url)


@pytest.fixture(scope="module")
def views(feast):
    return {view.name: view for group in _resolve(feast, float("inf")).values() for view in group}


@pytest.fixture
def source(settings):
    return RedisSource(settings.online.redis_url.get_secret_value())


def test_direct_read_equals_feast_for_every_view_and_key(source, feast, views, cast):
    pair, both = (cast.customers[1], "i1"), ("customer_id", "item_id")
    with closing(RedisWriter(source._url)) as online:  # this view is the stream's to fill
        online.write("customer_item", [Row(pair, {"customer_item_views_total": 2}, event_us=1_700_000_000_000_000)], join_key=both)
        for view in views.values():
            stored = [view_key(view, key) for key in source.some_keys(view, 3)]
            assert stored
            assert difference(source, FeastSource(feast), view, [*keys_of(view, [*cast.customers, "nobody", ""]), *stored]) is None
        online.remove("customer_item", [pair], join_key=both)


def keys_of(view, names):
    return names if isinstance(view.join_key, str) else [(name, "return_risk") for name in names]


def view_key(view, key):
    from pipelines.online.feast_format import key_decoder

    return key_decoder(view.join_key)(key)


def test_redis_and_sqlite_hold_the_same_for_every_view_and_key(source, settings, views, cast):
    from serving.online_store import SqliteSource

    feature_store.materialize(settings.home, as_of=cast.now)  # into the file as well
    file = SqliteSource((settings.home / "feature_store" / "online.db").resolve())
    for view in views.values():
        assert difference(source, file, view, keys_of(view, [*cast.customers, "nobody"])) is None


def test_self_check_passes_on_a_sound_store_and_names_a_changed_encoding(source, settings, feast):
    groups = _resolve(feast, float("inf"))
    assert self_check(source, FeastSource(feast), groups) is None
    shifted = RedisSource(source._url, decode=lambda value: Decoder()[value[:-1] + bytes([value[-1] ^ 1])] if value else None)
    found = self_check(shifted, FeastSource(feast), groups)
    assert found
    assert "is not what Feast reads" in found or "that are no" in found


def test_times_that_are_none_are_a_changed_encoding(source, settings, views, cast):
    from pipelines.online.feast_format import key_encoder

    view = views["customer_scores"]
    with closing(redis.Redis.from_url(source._url)) as client:
        client.hset(redis_key(key_encoder("customer_id")("c-odd")), "_ts:customer_scores", b"\x99nonsense")
        with pytest.raises(StoreFailure, match="Timestamp"):
            source.fetch(view, ["c-odd"], SOON)
        client.delete(redis_key(key_encoder("customer_id")("c-odd")))


def test_customer_merged_into_another_is_found_under_both_ids(settings, opened, cast):
    old, new = cast.customers[3], cast.customers[4]
    profiles = opened(settings.home, max_age_hours=24 * 3650, redis_url=settings.online.redis_url)
    assert isinstance(profiles.source, RedisSource)
    with closing(RedisWriter(profiles.source._url)) as online:
        row = Row(f"customer_id:{old}", {"customer_id": new}, event_us=1_800_000_000_000_000)
        online.write("identifier_customer", [row], join_key="identifier")
        assert profiles.formers(new, deadline=SOON) == [old]
        online.remove("identifier_customer", [row.key], join_key="identifier")
    assert profiles.formers(new, deadline=SOON) == []


def test_many_keys_come_back_in_order_with_repeats_and_strangers(source, views, cast):
    keys = [f"nobody-{i}" for i in range(990)] + cast.customers[:5] * 2
    found = source.fetch(views["customer_consent"], keys, SOON)
    assert [then is not None for then, _ in found] == [False] * 990 + [True] * 10
    assert source.present(views["customer_consent"], keys, SOON) == [False] * 990 + [True] * 10


def test_views_asked_for_together_are_what_each_is_by_itself(source, views, cast):
    several, keys = list(views.values()), [*cast.customers[:3], "nobody", "item-01"]
    assert source.fetch_views(several, keys, SOON) == [source.fetch(view, keys, SOON) for view in several]
    assert source.fetch_views([], keys, SOON) == []


def test_server_that_does_not_answer_costs_no_more_than_the_deadline(source, views, cast, redis_server, monkeypatch):
    view = views["customer_consent"]
    assert source.fetch(view, cast.customers[:1], SOON)
    monkeypatch.setattr(redis_source, "CONNECT_S", 0.1)
    with redis_server.frozen():  # until both have given up
        with pytest.raises(Unavailable):
            source.fetch(view, cast.customers[:1], Deadline.after_ms(50))
        with pytest.raises((Unavailable, StoreFailure)):  # nor does one that is only asked for a connection
            RedisSource(source._url).fetch(view, cast.customers[:1], Deadline.after_ms(50))
    monkeypatch.setattr(redis_source, "CONNECT_S", 60.0)
    assert source.fetch(view, cast.customers[:1], SOON)[0][1] == [True]


def test_server_that_says_nothing_is_not_waited_for_however_much_time_there_is(source, views, cast, redis_server, monkeypatch):
    view = views["customer_consent"]
    assert source.fetch(view, cast.customers[:1], SOON)
    monkeypatch.setattr(redis_source, "SILENCE_S", 0.05)
    with redis_server.frozen(), pytest.raises(StoreFailure, match="TimeoutError"):
        source.fetch(view, cast.customers[:1], SOON)


@pytest.mark.slow
def test_service_answers_without_the_server_and_with_it_again(home, cast, brokers, tmp_path, rehearse):
    """Killed: reads fail, the breaker opens, answers are degraded. Started again: they are personal by themselves."""
    (tmp_path / "server").mkdir()
    with brokers.redis(tmp_path / "server") as server:
        settings = fill(home, server.url, cast.now)
        core = Answers(settings, rehearse=rehearse)
        now = [0.0]
        core.guard.breaker = Breaker(limit=3, pause_s=1.0, clock=lambda: now[0])
        core.guard._aside = lambda probe: probe()
        core.open()

        def sources():
            deadline = Deadline.after_ms(60_000)
            churn = core.scoring.answer("churn", ScoreRequest(customer_ids=cast.customers[:2]), deadline)
            return churn.source, core.recommendations.answer(RecommendRequest(customer_id=cast.customers[0]), deadline).source

        assert isinstance(core.guard.profiles.source, RedisSource)
        assert sources() == ("personal", "personal")
        server.kill()
        for _ in range(3):
            assert sources() == ("static", "popular")  # nobody can be asked for consent
        assert core.guard.breaker.is_open
        server.start()
        assert sources() == ("static", "popular")  # the breaker is still open
        now[0] = 1.0
        assert sources() == ("static", "personal")  # the first who comes sends the probe, and does not wait for it
        assert sources() == ("personal", "personal")
        core.close()


def test_guard_counts_a_lost_server_as_a_failure(settings, opened, brokers):
    profiles = opened(settings.home, max_age_hours=1, redis_url=settings.online.redis_url)
    profiles.source = RedisSource(f"redis://127.0.0.1:{brokers.free_port()}/0")
    guard = Guard(profiles=profiles, breaker=Breaker(limit=2, pause_s=60))
    (view,) = profiles.views["customer_consent"]
    for _ in range(2):
        with pytest.raises(Unavailable):
            guard.ask(lambda p: p.source.fetch(view, ["c1"], SOON))
    assert guard.breaker.is_open


def test_keys_under_a_customer_are_theirs_alone_the_newest_first(settings, source, views):
    rows = []
    for customer, item, seconds, is_bought in [("x1", "a", 5, True), ("x1", "b", 9, False), ("x1", "c", 7, True), ("x10", "a", 8, True)]:
        then_us = 1_700_000_000_000_000 + seconds * 1_000_000
        bought = {"customer_item_last_bought_at": then_us if is_bought else None}
        rows.append(Row((customer, item), {"customer_item_last_seen_at": then_us, **bought}, event_us=then_us))
    with closing(RedisWriter(settings.online.redis_url.get_secret_value())) as writer:
        with writer.transaction():
            writer.write("customer_item", rows, join_key=("customer_id", "item_id"))
        view = views["customer_item"]
        seen = source.keys_under(view, "x1", "customer_item_last_seen_at", SOON, since_s=0.0, limit=2)
        bought = source.keys_under(view, "x1", "customer_item_last_bought_at", SOON, since_s=1_700_000_006.0, limit=9)
        assert (seen, bought) == ([("x1", "b"), ("x1", "c")], [("x1", "c")])
        with writer.transaction():
            writer.remove_customers(["x1"])
        assert source.keys_under(view, "x1", "customer_item_last_seen_at", SOON, since_s=0.0, limit=2) == []
