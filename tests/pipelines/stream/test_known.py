"""What the live ranker knows of a customer, through log, stream and online store, is what a training on the whole log would know."""

import shutil
from contextlib import closing
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from models.candidates.history import _ALL
from pipelines import labels, tables
from pipelines.ingest import drain
from pipelines.training import ranking as training
from pipelines.vault import open_vault
from serving import ranking, recent
from serving.fallbacks import Deadline
from serving.profile import open_profiles

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
HALF_LIFE = 90.0
ITEMS = [f"i{n}" for n in range(8)]
EVENTS = [
    "Product Viewed", "Product Viewed", "Product Viewed", "Product Added", "Product Added", "Order Completed", "Product Removed",
    "Order Refunded", "Product Clicked", "Product Added to Wishlist", "Product List Viewed",
]  # fmt: skip
PEOPLE = [f"u{n}" for n in range(10)]
TRAINED_S, END_S = 40 * 86_400.0, 45 * 86_400.0


def tell(world, rng, start_s, end_s, n, people) -> None:
    """Calls in order; some share an instant, for a clock of whole seconds tells no more."""
    at = np.sort(np.floor(rng.uniform(start_s, end_s, n)))
    same = rng.random(n) < 0.4
    for i in range(1, n):
        if same[i]:
            at[i] = at[i - 1]
    who = ""
    for i in range(n):
        who = who if same[i] and who else str(rng.choice(people))
        event, item = str(rng.choice(EVENTS)), str(rng.choice(ITEMS[: 2 + i % 7]))
        more = {"products": [{"product_id": item}], "order_id": f"o{world.count}"} if event.startswith("Order") else {"product_id": item}
        world.say(float(at[i]), event, user=who, **more)


def histories(world, folder, at):
    """By customer what training knows just after this instant: its ids, names of items, and histories."""
    shutil.copytree(world.home, folder, ignore=shutil.ignore_patterns("stream", "feature_store"), symlinks=True)
    with closing(open_vault(folder)) as vault:
        drain(folder, settings=world.settings.model_copy(update={"home": folder}), vault=vault)
    events, consents = tables.read(folder, tables.EVENTS), tables.read(folder, tables.CONSENTS)
    frame = labels.interactions(events, consents, settings=world.settings, as_of=at)
    items = pd.DataFrame({"item_id": ITEMS, "event_timestamp": EPOCH, "category": "a", "price_cents": 1})
    found = labels.ranking(frame, items, at=pd.Timestamp(at) + pd.Timedelta(1, "us"), settings=world.settings)
    rows = {str(name): i for i, name in enumerate(found.customers)}
    return SimpleNamespace(row=rows, items=found.items, of=training.occasion(frame, items, found).histories())


@pytest.fixture
def told(new_world, tmp_path, monkeypatch):
    """The world after calls before and after a training, what was known at both times, and the reader of its online store."""
    monkeypatch.setattr(labels, "_require_ranking", lambda *given, **named: None)
    world, rng = new_world(), np.random.default_rng(11)
    tell(world, rng, 0, TRAINED_S, 80, PEOPLE[:8])
    world.to(TRAINED_S)
    then = EPOCH + timedelta(microseconds=world.now)
    before = histories(world, tmp_path / "then", then)
    tell(world, rng, TRAINED_S + 1, END_S, 80, PEOPLE[2:])
    world.to(END_S)
    now = EPOCH + timedelta(microseconds=world.now)
    whole = histories(world, tmp_path / "now", now)
    profiles = open_profiles(world.home, max_age_hours=24_000, pseudonym=world.vault.pseudonym)
    assert before.items.tolist() == whole.items.tolist() == ITEMS
    return SimpleNamespace(world=world, then=then, now=now, before=before, whole=whole, profiles=profiles)


def live(told, customer):
    """What the service knows of the customer now."""
    rows = [told.before.row[customer]] if customer in told.before.row else []
    since_us = (told.then - EPOCH) // timedelta(microseconds=1) if rows else 0
    acts = recent.acts(
        told.profiles, customer, since_us=since_us, half_life_days=HALF_LIFE, at=told.now, deadline=Deadline.after_ms(60_000)
    )  # fmt: skip
    model = SimpleNamespace(stages=SimpleNamespace(histories=told.before.of), items={name: i for i, name in enumerate(ITEMS)})
    return ranking.known(model, rows, acts)


def same(one, other) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in _ALL)


def test_what_is_known_live_is_what_the_whole_log_says_to_the_last_bit(told):
    """Known to the training or not, active since or not; whatever happened, however much of it at one instant."""
    n_new = n_moved = 0
    for customer, row in told.whole.row.items():
        found, expected = live(told, customer), told.whole.of.customer(row)
        assert same(found, expected), (found, expected)
        n_new += customer not in told.before.row
        n_moved += customer in told.before.row and not same(told.before.of.customer(told.before.row[customer]), expected)
    assert n_new >= 2  # control: what the training knew of the others was not all
    assert n_moved >= 4
    assert len(told.whole.row) == len(PEOPLE)
