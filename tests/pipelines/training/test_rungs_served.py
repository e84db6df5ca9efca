"""The lists that are measured are those that the service answers with, its tables and its store cut at the same moment."""

import os
import shutil
import tempfile
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

os.environ.setdefault("BENTOML_HOME", tempfile.mkdtemp(dir=os.environ["TMPDIR"]))

import numpy as np
import pandas as pd
import pytest

from models.stages import Stages
from models.two_stage import ALL_ITEMS
from pipelines import feature_store, features, registry, tables, training
from pipelines.training import recommenders, rungs
from pipelines.training.ranking import Moments
from pipelines.training.rungs import Earlier
from serving.answers import Answers
from serving.champions import golden
from serving.fallbacks import Deadline
from serving.wire import RecommendRequest

pytestmark = pytest.mark.slow

K = 10
HORIZON = timedelta(days=14)
PARAMS = {"n_factors": 6, "n_epochs": 4, "random_state": 3}


def cut_home(whole, to, at):
    """What the tables held just before this moment, with features, segments and an online store of then, and no recommender."""
    shutil.copytree(whole.home, to, symlinks=True, ignore=shutil.ignore_patterns("models"))
    for table in (tables.EVENTS, tables.INTERACTIONS, tables.ITEMS):
        rows = tables.read(to, table)
        tables.write(to, table, rows[rows["event_timestamp"] < at])
    features.build(to)
    feature_store.apply(to)
    training.train("segments", to, settings=whole.settings.model_copy(update={"home": to}), as_of=at)
    feature_store.materialize(to, as_of=at)
    (to / "clock.json").write_text(f'{{"as_of": "{at.isoformat()}", "is_history": true}}')
    return whole.settings.model_copy(update={"home": to})


def serve(settings, stages, customers, items, *, as_of):
    """The service's core with these stages as the champion."""
    arrays = {"customer_ids": np.asarray(customers, dtype=str), "item_ids": np.asarray(items, dtype=str)}
    version = registry.register(
        settings.home, "recommender", learner=stages, arrays=arrays, manifest={"as_of": as_of.isoformat(), "half_life_days": 90.0}
    )
    registry.promote(settings.home, "recommender", version)
    core = Answers(settings, rehearse=lambda pending: {name: golden(Stages.load(folder), {}) for name, folder in pending})
    core.open()
    return core


def answered(core, customer):
    answer = core.recommendations.answer(RecommendRequest(customer_id=customer, k=K), Deadline.after_ms(30_000))
    return answer.source, [item.item_id for item in answer.items]


@pytest.fixture(scope="module")
def world(trained, tmp_path_factory):
    """The shop with an item that came two days before the cut-off, both fits, and the lists that are measured."""
    home = tmp_path_factory.mktemp("rungs") / "home"
    shutil.copytree(trained.home, home, symlinks=True)
    whole = SimpleNamespace(home=home, settings=trained.settings.model_copy(update={"home": home}))
    at = trained.as_of - HORIZON
    items = tables.read(home, tables.ITEMS)
    new = items.iloc[:1].assign(item_id="new", event_timestamp=pd.Timestamp(at - timedelta(days=2)).as_unit("us"))
    tables.write(home, tables.ITEMS, pd.concat([items, new], ignore_index=True))
    frame, items = recommenders.read_interactions(home, settings=whole.settings, as_of=trained.as_of)
    moments = Moments(frame, items, whole.settings, recommenders.HALF_LIFE_DAYS, {"n_factors": 6, "n_epochs": 4})
    tested, before = (recommenders._both_stages(moments, when, PARAMS, is_used=True) for when in (at, at - HORIZON))
    assert tested.stage is not None
    earlier = Earlier(before.moment.ranking, before.stages)
    known = rungs.known_at(home, frame, items, at=at, as_of=trained.as_of, settings=whole.settings)
    people = tested.moment.judged(ALL_ITEMS)[0]
    made = rungs.lists(tested, tested.recommend(people, K), known, earlier, k=K, half_life_days=recommenders.HALF_LIFE_DAYS)
    names = tested.moment.ranking.items
    told = {rung: [[str(names[place]) for place in row if place >= 0] for row in rows] for rung, rows in made.items()}
    customers = [str(one) for one in tested.moment.ranking.customers[people]]
    settings = cut_home(whole, tmp_path_factory.mktemp("cut") / "home", at)
    return SimpleNamespace(
        whole=whole, settings=settings, at=at, tested=tested, before=before, customers=customers, lists=told, frame=frame, items=names
    )  # fmt: skip


@pytest.fixture(scope="module")
def core(world):
    ranking = world.tested.moment.ranking
    core = serve(world.settings, world.tested.stages, ranking.customers, ranking.items, as_of=world.at)
    yield core
    core.close()


def test_personal_lists_are_those_answered(world, core):
    assert len(world.customers) > 20
    assert any("new" in row for row in world.lists["personal"])
    for customer, row in zip(world.customers, world.lists["personal"], strict=True):
        assert answered(core, customer) == ("personal", row)


def test_segment_popular_and_static_lists_are_those_answered(world, core, monkeypatch):
    core.recommendations.forget_everybody()
    monkeypatch.setattr(core.champions, "bundle", replace(core.champions.bundle, recommender=None))
    assert len({tuple(row) for row in world.lists["segment"]}) > 1
    for customer, row in zip(world.customers, world.lists["segment"], strict=True):
        assert answered(core, customer) == ("segment", row)
    assert answered(core, "nobody") == ("popular", world.lists["popular"][0])
    monkeypatch.setattr("models.shop.catalogue.Offers.allowed", lambda *_: 1 / 0)
    assert answered(core, world.customers[0]) == ("static", world.lists["static"][0])


def test_lists_folded_in_are_those_of_an_older_version_that_sees_what_was_done_since(world, tmp_path):
    settings = world.settings.model_copy(update={"home": tmp_path / "home"})
    shutil.copytree(world.settings.home, settings.home, symlinks=True)
    ranking = world.before.moment.ranking
    core = serve(settings, world.before.stages, ranking.customers, ranking.items, as_of=ranking.at)
    try:
        sources = {"folded_in": 0, "personal": 0}
        for customer, row in zip(world.customers, world.lists["folded_in"], strict=True):
            source, names = answered(core, customer)
            sources[source] += 1
            assert (source == "folded_in") == bool(row)
            if row:
                assert names == row
        assert sources["folded_in"] > 20
    finally:
        core.close()


def test_stale_list_is_what_an_hour_old_answer_says_once_the_model_is_gone(world, tmp_path, monkeypatch):
    mine = world.frame[(world.frame["customer_id"] == world.customers[0]) & (world.frame["event_timestamp"] < world.at)]
    then = mine["event_timestamp"].max() - timedelta(hours=1)
    settings = cut_home(world.whole, tmp_path / "home", then)
    ranking = world.tested.moment.ranking
    other = np.flatnonzero(ranking.customers != world.customers[0])[:1]  # of the customer themselves the store alone tells
    core = serve(settings, world.tested.stages.keep(other), ranking.customers[other], ranking.items, as_of=then)
    try:
        assert answered(core, world.customers[0])[0] == "folded_in"
        monkeypatch.setattr(core.champions, "bundle", replace(core.champions.bundle, recommender=None))
        assert answered(core, world.customers[0]) == ("stale", world.lists["stale"][0])
    finally:
        core.close()
