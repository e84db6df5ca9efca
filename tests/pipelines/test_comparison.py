"""Two models on the same requests: what is logged of them, held against a shop whose truth is known."""

from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from models.classifier import Classifier
from pipelines import challengers, comparison, registry, tables
from pipelines.errors import InputError
from pipelines.served import SHADOW, Row, Served
from pipelines.settings import LabelSettings, Settings, TrainingSettings

T0 = pd.Timestamp("2026-01-01", tz="UTC")
N = 400
DAY_US = 86_400_000_000
AGAIN, BACK = ("purchase", T0 + pd.Timedelta(2, "D")), ("return", T0 + pd.Timedelta(3, "D"))


class Nobody:
    def entombed(self, subjects):
        return frozenset()


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Two versions of two models, and N customers who ordered the day before the first: each either orders again or, as likely as
    `truth` says, sends that back.
    """
    home, rng = tmp_path_factory.mktemp("home"), np.random.default_rng(5)
    features = pd.DataFrame({"views_7d": rng.normal(size=200), "views_30d": rng.normal(size=200)})
    label = (features["views_7d"] > 0).astype(int)
    for seed in (1, 2):
        learner = Classifier(n_rounds=5, random_state=seed).fit(features, label)
        for name in ("churn", "return_risk"):
            registry.register(home, name, learner=learner, manifest={})
    registry.promote(home, "churn", 1)
    truth = rng.uniform(0.1, 0.9, N)
    stays = rng.uniform(size=N) > truth
    acts = [(f"c{i}", "purchase", T0 - pd.Timedelta(1, "D")) for i in range(N)]
    acts += [(f"c{i}", *(AGAIN if stays[i] else BACK)) for i in range(N)]
    acts.append(("clock", "purchase", T0 + pd.Timedelta(30, "D")))
    rows = [
        dict.fromkeys(tables.EVENTS.schema.names)
        | {
            "event_id": str(n),
            "type": kind,
            "customer_id": who,
            "event_timestamp": when,
            "created_timestamp": when,
            "session_id": "s",
        }
        for n, (who, kind, when) in enumerate(acts)
    ]
    tables.write(home, tables.EVENTS, pa.Table.from_pylist(rows, tables.EVENTS.schema))
    return SimpleNamespace(home=home, truth=truth, rng=rng)


@pytest.fixture
def logged(shop):
    """`log(champion, challenger, version=2, days=0, model="churn")` keeps what both foretold; the sample is empty before."""
    path = shop.home / "served"
    for file in path.glob("*") if path.exists() else ():
        file.unlink()

    def log(champion, challenger, version="2", days=0.0, model="churn"):
        at = int(T0.timestamp() * 1e6 + days * DAY_US)
        rows = [
            Row(f"c{i}", SHADOW, f"{model} {version}", at, at, {"probability": float(q), "champion_probability": float(p), "champion": "1"})
            for i, (p, q) in enumerate(zip(champion, challenger, strict=True))
        ]
        with closing(Served(shop.home, vault=Nobody())) as served:
            served.add(rows, now_us=at)

    return log


def compared(shop, model="churn", **options):
    settings = Settings(home=shop.home, labels=LabelSettings(churn_horizon_days=10), training=TrainingSettings(bootstrap_draws=200))
    return comparison.compare(shop.home, model, settings=settings, vault=Nobody(), **options)


def noisy(shop, scale):
    odds = np.log(shop.truth / (1 - shop.truth)) + shop.rng.normal(0, scale, N)
    return 1 / (1 + np.exp(-odds))


def test_model_against_itself_differs_in_nothing(shop, logged):
    logged(shop.truth, shop.truth)
    found = compared(shop)
    assert (found.requests, found.customers, found.versions) == (N, N, {"champion": "1", "challenger": "2"})
    assert (found.mean_difference.value, found.mean_difference.low, found.mean_difference.high) == (0.0, 0.0, 0.0)
    assert found.rank_correlation == pytest.approx(1.0)
    assert found.psi == 0.0
    assert found.foresight.auc_difference.value == found.foresight.brier_difference.value == 0.0


def test_challenger_that_foretells_better_is_shown_to_and_one_that_does_not_is_not(shop, logged):
    logged(noisy(shop, 3.0), shop.truth)
    better = compared(shop).foresight
    assert better.auc["challenger"] > better.auc["champion"]
    assert better.auc_difference.low > 0
    assert better.brier_difference.high < 0
    assert better.requests == N
    logged(shop.truth, noisy(shop, 3.0), version="2", days=0.5)  # later, by the same versions: both count
    even = compared(shop)
    assert even.requests == 2 * N
    assert even.customers == N
    assert even.foresight.auc_difference.low < 0 < even.foresight.auc_difference.high


def test_model_with_labels_of_its_own_is_held_against_what_became_of_its_occasions(shop, logged):
    logged(noisy(shop, 3.0), shop.truth, model="return_risk")
    found = compared(shop, "return_risk").foresight
    assert found.requests == N
    assert found.auc_difference.low > 0
    assert found.brier_difference.high < 0


def test_too_few_occasions_are_said_to_be_so(shop, logged):
    logged(shop.truth[:30], shop.truth[:30], model="return_risk")
    logged(shop.truth, shop.truth, model="return_risk", days=5)  # by then whatever came back had done so, or something else was ordered
    found = compared(shop, "return_risk")
    assert (found.requests, found.foresight) == (N + 30, None)
    assert "the outcome of 30 is known" in found.why_not


def test_shift_is_told_by_mean_psi_and_bands(shop, logged):
    logged(shop.truth, np.clip(shop.truth + 0.1, 0, 1))
    found = compared(shop)
    assert found.mean_difference.value == pytest.approx(0.1, abs=1e-3)
    assert found.rank_correlation == pytest.approx(1.0, abs=1e-3)
    assert found.psi > 0.1
    assert found.same_band < 1
    assert sum(found.moved.values()) == round((1 - found.same_band) * N)
    assert set(found.moved) <= {"low to medium", "medium to high", "low to high"}


def test_only_those_who_met_last_are_compared_unless_a_version_is_asked_for(shop, logged):
    logged(shop.truth, shop.truth, version="1")
    logged(shop.truth[:50], shop.truth[:50], version="2", days=1)
    assert (compared(shop).requests, compared(shop).left_out) == (50, N)
    assert compared(shop, version=1).requests == N
    with pytest.raises(InputError, match="version 7"):
        compared(shop, version=7)


def test_outcomes_that_are_not_known_yet_are_said_to_be_so(shop, logged):
    logged(shop.truth, shop.truth, days=25)
    found = compared(shop)
    assert found.foresight is None
    assert "the outcome of 0 is known" in found.why_not


def test_without_a_challenger_it_says_what_to_do(shop, logged):
    challengers.challenge(shop.home, "churn", 2)
    with pytest.raises(InputError, match="rapport models shadow churn VERSION"):
        compared(shop)
