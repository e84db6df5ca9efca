"""A shop's calls as the collector keeps them, and a way to play them."""

import json
from contextlib import closing
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from pipelines.log.calls import parse
from pipelines.parity import replaying, scratch
from pipelines.settings import Settings
from pipelines.stream import Stream
from pipelines.vault import open_vault

START = datetime(2026, 3, 1, 10, tzinfo=UTC)
ALLOWED = {"consent": {"categoryPreferences": {"personalization": True}}}
CATEGORIES = {"i1": "a", "i2": "a", "i3": "b"}  # said of some views; an order says nothing
REFUSED = {"consent": {"categoryPreferences": {"personalization": False}}}


class Town:
    """Calls of a few people. Times are minutes after START."""

    start = START

    def __init__(self, folder):
        self.home = folder / "home"
        self.settings = Settings(home=self.home)

    @staticmethod
    def at(minutes):
        return START + timedelta(minutes=minutes)

    @classmethod
    def us(cls, minutes):
        return round(cls.at(minutes).timestamp() * 1e6)

    def call(self, number, minutes, *, late=0.05, user=None, device=None, kind="view", item="i1", allowed=True, session=None):
        """One call, made at `minutes`, received `late` minutes after."""
        name = {"view": "Product Viewed", "add": "Product Added", "order": "Order Completed", "search": "Products Searched"}.get(kind)
        product = {"product_id": item, "price": 9.99, "quantity": 1 + len(str(number)) % 3}
        product |= {"category": CATEGORIES[item]} if item in CATEGORIES and len(str(number)) > 1 else {}
        properties = {"order_id": f"o{number}", "products": [product, {**product, "product_id": "i9"}]} if kind == "order" else product
        call = {
            "type": "identify" if kind == "identify" else "track", "messageId": f"m{number}", "timestamp": self.at(minutes).isoformat(),
            "context": ALLOWED if allowed else REFUSED, "properties": properties,
        }  # fmt: skip
        call |= {"event": name} if name else {}
        call |= {"userId": user} if user else {}
        call |= {"anonymousId": device} if device else {}
        if session:
            call["properties"] = {**properties, "session_id": session}
        return call, self.at(minutes + late)

    def logged(self, calls):
        """The calls in order of arrival, as they are appended."""
        with closing(open_vault(self.home)) as vault:
            return [
                parse(json.dumps(call).encode(), None, source="web", received=at, vault=vault, limits=self.settings.collect).events[0]
                for call, at in sorted(calls, key=lambda told: told[1])
            ]


def busy(town):
    """Three people over forty days: visits, orders, a cart, late calls, one from a fast clock, a visitor who becomes a customer."""
    told = []

    def say(minutes, **call):
        told.append(town.call(len(told), minutes, **call))

    for day in (0, 1, 2, 6, 9, 29, 35):
        for who, offset in (("ann", 0), ("ben", 37)):
            for step, kind in enumerate(("view", "view", "add", "search", "order" if day % 2 else "view")):
                # now and then an hour late, or more than a window late
                late = 90 if (day, step) == (2, 1) else 3 * 1440 if (day, step) == (1, 3) else 0.05
                say(day * 1440 + offset + 7.3 * step, user=who, kind=kind, item=f"i{(day + step) % 4}", late=late)
    say(100, device="d1", item="i2")
    say(131, device="d1", item="i3")  # a gap of thirty-one minutes
    say(160.99, device="d1", item="i3")  # and one of less
    say(161, device="d1", user="eve", kind="identify")
    say(3000, device="d1", user="eve", kind="order")
    say(3100, user="eve", late=-20)  # its clock is twenty minutes fast
    say(3101, user="eve")
    return town.logged(told)


@pytest.fixture
def town(tmp_path):
    return Town(tmp_path)


@pytest.fixture(scope="session")
def new_town(tmp_path_factory):
    return lambda: Town(tmp_path_factory.mktemp("town"))


@pytest.fixture(scope="session")
def busy_of():
    return busy


@pytest.fixture(scope="session")
def busy_calls(new_town):
    return busy(new_town())


@pytest.fixture(scope="session")
def play():
    """Play calls in scratch homes; the stage it came to."""

    def run(calls, *, probes=60, seed=1, manner=None, open_stream=Stream, settings=None):
        with scratch.folder() as base:
            own = scratch.settings_of(settings or Settings(home=base), base)
            return replaying.replay(
                calls, base, settings=own, probes=probes, rng=np.random.default_rng(seed), manner=manner, open_stream=open_stream
            )

    return run
