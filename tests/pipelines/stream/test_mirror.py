"""The stream where features are served from Redis: what its file says of people, and what they do, is there as well."""

from contextlib import closing

import pytest
import redis

from pipelines import feature_store
from pipelines.errors import StoreError
from pipelines.online.redis_writer import RedisWriter
from pipelines.settings import OnlineSettings

pytestmark = pytest.mark.server


@pytest.fixture
def url(redis_server):
    url = redis_server.url.rsplit("/", 1)[0] + "/11"
    with closing(redis.Redis.from_url(url)) as client:
        client.flushdb()
    with closing(RedisWriter(url)) as there:
        there.migrate(feature_store.declared_schema())
    return url


def in_redis(url, view, feature, key, join_key="customer_id"):
    with closing(RedisWriter(url)) as there:
        return there.read(view, feature, [key], join_key=join_key).get(key, (None, 0))[0]


def test_redis_holds_what_the_file_holds_of_people_events_consent_and_merges(new_world, url):
    world = new_world(online=OnlineSettings(redis_url=url))
    for n in range(4):
        world.say(n, product_id="i1", device="d1")
    world.to(10)
    visitor = world.customer("anonymous_id", "d1")
    assert in_redis(url, "customer_activity", "events_total", visitor) == "4"
    world.say(20, product_id="i1", user="u1")
    world.to(21)
    world.say(30, product_id="i1", user="u1", device="d1", consent={"personalization": False})
    world.to(4_000)
    customer = world.customer("user_id", "u1")
    for view in ("customer_activity", "customer_session", "customer_consent"):
        assert view in world.stream.online.schema
        with closing(RedisWriter(url)) as there:
            for feature in there.schema[view].features:
                here = world.stream.online.read(view, feature, [visitor, customer])
                assert there.read(view, feature, [visitor, customer]) == here
    assert in_redis(url, "customer_consent", "is_personalization_allowed", customer) == "False"
    name = world.vault.pseudonym("anonymous_id", "d1")
    assert in_redis(url, "identifier_customer", "customer_id", name, "identifier") == customer


def test_calls_are_applied_again_once_redis_is_back(new_world, url, brokers):
    world = new_world(online=OnlineSettings(redis_url=url))
    world.say(0, product_id="i1", user="u1")
    world.to(1)
    away, world.stream.online.mirror = world.stream.online.mirror, RedisWriter(f"redis://127.0.0.1:{brokers.free_port()}/0")
    world.say(2, product_id="i1", user="u1")
    with pytest.raises(StoreError, match="start or mend it"):
        world.to(3)
    world.stream.online.mirror = away
    world.to(4)
    customer = world.customer("user_id", "u1")
    assert in_redis(url, "customer_activity", "events_total", customer) == "2"
    assert world.row("customer_activity", customer)["events_total"] == 2
