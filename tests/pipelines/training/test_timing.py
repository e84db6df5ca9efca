"""When the next order comes, and what a customer is worth: options of churn, kept in its version, judged on its test, told of each."""

import json
import shutil
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from models import evaluation
from models.classifier import Classifier
from models.customer_value import CustomerValue
from models.hazard import Hazard
from pipelines import labels, registry, scoring, tables, tracking, training
from pipelines.errors import InputError, RegistryError
from pipelines.training import timing, valuing
from pipelines.training.rows import read_rows
from pipelines.training.tasks import discover

pytestmark = pytest.mark.slow

DAYS = 21  # the small shop is followed for 28 days before its test


def asking(settings, days=DAYS, home=None, value_days=None):
    options = settings.training.model_copy(update={"when_days": days, "value_days": value_days})
    return settings.model_copy(update={"training": options, **({} if home is None else {"home": home})})


@pytest.fixture(scope="module")
def told(trained, tmp_path_factory):
    """A home whose churn was trained once more, asked for when, and its scores."""
    home = tmp_path_factory.mktemp("when") / "home"
    shutil.copytree(trained.home, home, symlinks=True)
    settings = asking(trained.settings, home=home, value_days=90)
    report = training.train("churn", home, settings=settings, as_of=trained.as_of)
    scored = scoring.score(home, settings=settings, as_of=trained.as_of)
    return SimpleNamespace(home=home, settings=settings, report=report, as_of=trained.as_of, scored=scored)


def test_the_same_model_with_others_beside_it_leads(told, trained):
    assert (told.report.version, told.report.details["champion"]) == (2, 2)
    assert "its model is that of version 1 to the byte; when, value stand beside it" in told.report.details["why"]
    one, two = (registry.load_version(told.home, "churn", version).manifest["files"] for version in (1, 2))
    assert {path: digest for path, digest in two.items() if "/" not in path} == one
    assert set(two) - set(one) == {
        *(f"when/{name}" for name in ("hazard.json", "periods/model.lgb", "periods/classifier.json")),
        *(f"value/{name}" for name in ("customer_value.json", "lifetime/lifetime.json", "spend/spend.json")),
    }
    assert told.report.value == trained.reports["churn"].value


def test_it_is_judged_on_the_rows_of_the_test_up_to_the_horizon_of_churn(told):
    judged = pd.DataFrame(told.report.details["when"]["judged"])
    assert told.report.details["when"]["periods"] * told.report.details["when"]["period_days"] >= DAYS
    assert judged["days"].tolist() == [3.5, 7.0, 10.5, 14.0]  # the horizon is a fortnight
    assert judged["observed"].is_monotonic_increasing
    test = tables.read(told.home, tables.LABELS_CHURN).query("split == 'test'")
    assert judged["observed"].iloc[-1] == pytest.approx(1 - test["label"].mean())
    baseline = next(one for one in told.report.baselines if one["name"] == "discrete-time hazard")
    assert judged["auc"].iloc[-1] == pytest.approx(baseline["value"])
    metrics = registry.load_version(told.home, "churn", 2).manifest["metrics"]
    assert {"when_auc_14d", "when_ece_14d", "when_brier_7d"} <= set(metrics)
    json.dumps(told.report.details, allow_nan=False)


def test_its_calibration_lies_beside_the_run(told):
    client = tracking.connect(told.home)
    runs = client.search_runs([client.get_experiment_by_name("churn").experiment_id], "tags.study LIKE '%days'")
    assert len(runs) == 1
    assert {"when_auc_14d", "when_ece_14d"} <= set(runs[0].data.metrics)
    listed = {item.path for item in client.list_artifacts(runs[0].info.run_id, "explanations")}
    assert {"explanations/when.csv", "explanations/when_calibration.csv", "explanations/when.png", "explanations/gain.png"} <= listed


def test_everybody_who_may_churn_is_told_when(told):
    rows = tables.read(told.home, tables.NEXT_ORDERS)
    population = labels.churn_population(tables.read(told.home, tables.EVENTS), told.as_of, settings=told.settings)
    assert rows["customer_id"].tolist() == population["customer_id"].tolist()
    assert told.scored.rows["next_orders"] == len(rows)
    assert set(rows["version"]) == {"2"}
    silence = np.stack(rows["silence"].to_numpy())
    assert silence.shape == (len(rows), DAYS / 3.5)
    assert (np.diff(silence, axis=1, prepend=1.0) <= 0).all()
    assert rows["expected_days"].between(0, DAYS).all()
    assert (rows["median_days"].isna() == (silence[:, -1] > 0.5)).all()
    champion = registry.load_champion(told.home, "churn")
    watched = tables.read(told.home, tables.SCORED_CHURN)
    learner = Hazard.load(champion.folder / timing.FOLDER)
    names = Classifier.load(champion.folder).feature_names_
    assert np.array_equal(learner.predict_survival(watched[names]), silence)
    assert evaluation.auc(watched["probability"] > watched["probability"].median(), rows["expected_days"]) > 0.6  # they agree on who waits


def test_everybody_who_ever_ordered_has_a_value_of_what_orders_are_worth(told):
    rows, events = tables.read(told.home, tables.CUSTOMER_VALUES), tables.read(told.home, tables.EVENTS)
    assert rows["customer_id"].tolist() == sorted(events.loc[events["type"] == "purchase", "customer_id"].unique())
    assert rows["order_value_cents"].between(990, 2_000).all()  # each costs 1,000, some days have two
    assert set(rows["horizon_days"]) == {90.0}
    assert (rows["value_cents"] <= rows["expected_orders"] * rows["order_value_cents"]).all()  # later money is less
    assert (rows["value_cents"] > 0.95 * rows["expected_orders"] * rows["order_value_cents"]).all()
    learner = CustomerValue.load(registry.load_champion(told.home, "churn").folder / valuing.FOLDER)
    acts = timing.orders(told.home, settings=told.settings, also=[valuing.VALUE])
    history, cents = valuing.known(told.home, acts, pd.Timestamp(told.as_of), settings=told.settings)
    assert np.array_equal(learner.predict(history, cents)["value"], rows["value_cents"])


def test_value_is_judged_by_what_was_then_spent(told):
    judged = told.report.details["value"]
    churned = tables.read(told.home, tables.LABELS_CHURN).query("split == 'test'")
    events, cut = tables.read(told.home, tables.EVENTS), churned["event_timestamp"].iloc[0]
    seen = set(events.loc[(events["type"] == "purchase") & (events["event_timestamp"] < cut), "customer_id"])
    spent = events.loc[(events["event_timestamp"] > cut) & events["customer_id"].isin(seen), "revenue_cents"].sum()
    assert (judged["customers"], judged["spent_cents"], judged["days"]) == (len(seen), spent, 14.0)
    assert judged["expected_cents"] == pytest.approx(spent, rel=0.5)
    assert judged["rank_correlation"] > 0.1
    metrics = registry.load_version(told.home, "churn", 2).manifest["metrics"]
    assert {"value_expected_to_spent", "value_rank_correlation", "value_rival_rank_correlation"} <= set(metrics)


def test_who_takes_consent_back_is_told_no_more_and_nobody_where_it_is_not_asked_for_any_more(told, trained, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(told.home, home, symlinks=True)
    someone, consents = tables.read(home, tables.NEXT_ORDERS)["customer_id"].iloc[0], tables.read(home, tables.CONSENTS)
    at = pd.Timestamp(told.as_of) - pd.Timedelta(1, "h")
    row = consents[consents["customer_id"] == someone].assign(is_allowed=False, event_timestamp=at, created_timestamp=at)
    tables.write(home, tables.CONSENTS, pd.concat([consents, row.astype(consents.dtypes)]))
    scoring.score(home, settings=told.settings, as_of=told.as_of)
    for table in (tables.NEXT_ORDERS, tables.CUSTOMER_VALUES):
        assert someone in set(tables.read(told.home, table)["customer_id"])
        assert someone not in set(tables.read(home, table)["customer_id"])
    report = training.train("churn", home, settings=trained.settings.model_copy(update={"home": home}), as_of=told.as_of)
    assert (report.version, report.details["champion"]) == (1, 1)
    scoring.score(home, settings=told.settings, as_of=told.as_of)
    assert not tables.exists(home, tables.NEXT_ORDERS)  # a champion that does not tell: no stale answers
    assert not tables.exists(home, tables.CUSTOMER_VALUES)


def test_a_byte_of_it_that_is_changed_makes_the_version_unsound(told, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(told.home, home, symlinks=True)
    model = registry.load_champion(home, "churn").folder / "when" / "periods" / "model.lgb"
    model.write_bytes(model.read_bytes() + b"\n")
    with pytest.raises(RegistryError, match=r"when/periods/model\.lgb"):
        registry.load_champion(home, "churn")


def test_further_ahead_than_rows_were_watched_is_refused_before_anything_is_tried(copied):
    with pytest.raises(InputError, match=r"asks for 60 days ahead; 0 rows were watched .* Ask for \d+ days or fewer"):
        training.train("churn", copied.home, settings=asking(copied.settings, 60), as_of=copied.as_of)
    assert registry.versions(copied.home, "churn") == (1,)


def test_nothing_after_the_cutoff_of_the_test_teaches_it_and_the_control_sees_it(copied):
    task, settings = discover()["churn"], copied.settings
    rows = read_rows(copied.home, task, settings=settings, as_of=copied.as_of)
    whole = timing.fit(copied.home, rows, days=DAYS, settings=settings, as_of=copied.as_of)
    cut = rows.test()["event_timestamp"].iloc[0]
    events = tables.read(copied.home, tables.EVENTS)
    tables.write(copied.home, tables.EVENTS, events[events["event_timestamp"] < cut])
    blind = timing.fit(copied.home, rows, days=DAYS, settings=settings, as_of=copied.as_of)
    assert np.array_equal(whole.survival, blind.survival)
    assert blind.judged["observed"].max() == 0 < whole.judged["observed"].max()
    tables.write(copied.home, tables.EVENTS, events[events["event_timestamp"] < cut - timedelta(days=14)])
    assert not np.array_equal(timing.fit(copied.home, rows, days=DAYS, settings=settings, as_of=copied.as_of).survival, whole.survival)


def test_nothing_after_the_cutoff_teaches_a_value_and_the_control_sees_it(copied):
    settings = asking(copied.settings, None, value_days=90)
    cut = pd.Timestamp(copied.as_of) - pd.Timedelta(14, "D")

    def fitted():
        return valuing.fit(copied.home, at=cut, days=14.0, settings=settings, as_of=copied.as_of)

    events, whole = tables.read(copied.home, tables.EVENTS), fitted()
    tables.write(copied.home, tables.EVENTS, events[events["event_timestamp"] < cut])
    blind = fitted()
    assert blind.learner.lifetime_.params_ == whole.learner.lifetime_.params_
    assert blind.learner.spend_.params_ == whole.learner.spend_.params_
    assert (blind.expected_cents, blind.spent_cents) == (whole.expected_cents, 0)
    tables.write(copied.home, tables.EVENTS, events[events["event_timestamp"] < cut - timedelta(days=14)])
    assert fitted().learner.lifetime_.params_ != whole.learner.lifetime_.params_
