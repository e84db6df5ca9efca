import shutil
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from models.classifier import Classifier
from pipelines import registry, tables, windows
from serving import profile, scores
from serving.answers import Answers
from serving.fallbacks import Deadline
from serving.profile import feature_store
from serving.wire import ScoreRequest


def ask(answers, ids, task="churn", deadline_ms=5_000):
    return answers.scoring.answer(task, ScoreRequest(customer_ids=list(ids)), Deadline.after_ms(deadline_ms))


def said(answer):
    return answer.source, answer.degraded, answer.causes


def sources(answer):
    return [prediction.source for prediction in answer.predictions]


@pytest.mark.parametrize(("task", "service"), [("churn", "churn_v1"), ("intent", "intent_v1"), ("return_risk", "churn_v1")])
def test_live_probability_is_the_models_on_what_feast_says(answers, home, cast, task, service):
    ids = cast.customers[:20]
    answer = ask(answers, ids, task)
    assert said(answer) == ("personal", False, [])
    assert [p.customer_id for p in answer.predictions] == ids
    assert answer.model_version == "1"
    assert answer.as_of == cast.now
    store = feature_store(home)
    online = store.get_online_features(store.get_feature_service(service), [{"customer_id": c} for c in ids]).to_df()
    learner = Classifier.load(home / "models" / task / "1")
    expected = learner.predict_proba(windows.derive(online.drop(columns="customer_id"), cast.now)[learner.feature_names_])[:, 1]
    np.testing.assert_allclose([p.probability for p in answer.predictions], expected, rtol=1e-12)


def test_what_a_request_tells_goes_through_the_function_that_training_uses(answers, cast, monkeypatch):
    """Bit for bit what `windows.derive` makes of the same rows for a training frame; without a context it is unknown, not missing."""
    seen, fed = [], []
    for way in ("predict_values", "explain_values"):
        real = getattr(Classifier, way)
        monkeypatch.setattr(Classifier, way, lambda self, matrix, real=real: fed.append(matrix) or real(self, matrix))
    monkeypatch.setattr(scores, "Derived", lambda *given, **told: seen.append((given, windows.Derived(*given, **told))) or seen[-1][1])
    several = {"request_price_cents": 1_250, "request_cart_cents": 99.5}
    for ids, context in ((cast.customers[:5], several), (cast.customers[:5], {}), (cast.customers[:1], several), (cast.customers[:1], {})):
        request = ScoreRequest(customer_ids=ids, context=context)
        assert answers.scoring.answer("churn", request, Deadline.after_ms(5_000)).source == "personal"
        ((plan, rows, at), served), learner = seen.pop(), answers.champions.bundle.scorers["churn"].learner
        frame = pd.DataFrame(rows, columns=plan.columns[: -len(windows.REQUEST)])
        labelled = pd.DataFrame({name: context.get(name) for name in windows.REQUEST}, index=frame.index, dtype=float)
        trained = windows.derive(frame, pd.Timestamp(at, unit="us", tz="UTC"), request=labelled)
        matrices = fed.copy()
        seen.clear()
        fed.clear()
        pd.testing.assert_frame_equal(pd.DataFrame(dict(served)), trained, check_exact=True)
        assert matrices
        for matrix in matrices:
            np.testing.assert_array_equal(matrix, learner.encode(trained))
        np.testing.assert_array_equal(learner.encode(served), learner.encode(trained))
        assert trained["request_price_cents"].isna().all() == (not context)
    with pytest.raises(ValueError, match="request_price_cents"):
        ScoreRequest(customer_ids=ids, context={"price": 1.0})


def test_reasons_are_the_three_strongest_contributions_with_their_values(answers, home, cast):
    answer = ask(answers, cast.customers[:5])
    learner = answers.champions.bundle.scorers["churn"].learner
    for prediction in answer.predictions:
        weights = [abs(reason.contribution) for reason in prediction.reasons]
        assert len(weights) == 3
        assert weights == sorted(weights, reverse=True)
        assert {reason.feature for reason in prediction.reasons} <= set(learner.feature_names_)
    first = answer.predictions[0].reasons[0]
    stored = answers.guard.ask(lambda p: p.read("churn_v1", cast.customers[:1], at=cast.now, deadline=Deadline.after_ms(60_000)))
    derived = windows.derive(pd.DataFrame(stored.columns), cast.now)
    assert first.value == pytest.approx(derived[first.feature].iloc[0])
    explained = learner.explain(derived[learner.feature_names_]).iloc[0]
    assert first.contribution == pytest.approx(explained[first.feature])
    assert abs(first.contribution) == pytest.approx(explained.abs().max())


def test_one_customer_is_told_the_same_with_reasons_and_without_in_company_and_in_a_crowd(answers, cast):
    several = ask(answers, cast.customers[:5])
    for name, among in zip(cast.customers[:5], several.predictions, strict=True):
        (alone,) = ask(answers, [name]).predictions
        (bare,) = answers.scoring.answer("churn", ScoreRequest(customer_ids=[name], reasons=0), Deadline.after_ms(10_000)).predictions
        crowded = answers.scoring.answer("churn", ScoreRequest(customer_ids=[name]), Deadline.after_ms(10_000, is_crowded=True))
        assert said(crowded) == ("personal", True, ["reasons_missing"])
        told = [one.probability for one in (alone, bare, crowded.predictions[0])]
        assert told == pytest.approx([among.probability] * 3, rel=1e-12)
        assert [reason.feature for reason in alone.reasons] == [reason.feature for reason in among.reasons]
        contributions = [[reason.contribution for reason in one.reasons] for one in (alone, among)]
        assert contributions[0] == pytest.approx(contributions[1], rel=1e-9)
    assert len({one.probability for one in several.predictions}) > 1  # control: it is not one answer for all


def test_band_follows_the_cuts(answers, cast):
    medium, high = answers.champions.bundle.scorers["churn"].cuts
    for prediction in ask(answers, cast.customers[:20]).predictions:
        p = prediction.probability
        assert prediction.band == ("high" if p >= high else "medium" if p >= medium else "low")


def test_customers_on_different_rungs_are_told_apart(answers, cast):
    ids = [cast.customers[0], cast.denied, "nobody", cast.silent, "user-1"]
    answer = ask(answers, ids)
    assert sources(answer) == ["personal", "static", "static", "static", "personal"]
    assert said(answer) == ("static", False, ["unknown_customer", "consent"])
    prior = answers.champions.bundle.scorers["churn"].prior
    assert {p.probability for p in answer.predictions[1:4]} == {prior}
    assert answer.predictions[4].customer_id == "user-1"
    assert answer.predictions[4].probability == pytest.approx(ask(answers, cast.customers[1:2]).predictions[0].probability, rel=1e-12)


def test_behaviour_of_those_without_consent_is_not_read(answers, cast, monkeypatch):
    read, real = [], answers.guard.profiles.source.fetch_views

    def watched(views, keys, deadline):
        read.extend((view.name, list(keys)) for view in views)
        return real(views, keys, deadline)

    monkeypatch.setattr(answers.guard.profiles.source, "fetch_views", watched)
    for alone in (cast.denied, cast.silent):
        ask(answers, [alone])
    assert {name for name, _ in read} <= {"customer_consent", "identifier_customer"}
    read.clear()
    ask(answers, [cast.denied, cast.silent, cast.customers[0]])
    assert {name for name, _ in read} == {"customer_consent", "customer_profile", "customer_activity"}
    assert all(keys == [cast.customers[0]] for name, keys in read if name != "customer_consent")


def test_customer_without_features_is_answered_from_the_rungs_below(answers, cast):
    assert said(ask(answers, [cast.bare])) == ("static", True, ["features_missing", "score_missing"])


def test_feature_age_is_that_of_the_longest_unchanged_customer(answers, home, cast):
    changed = tables.read(home, tables.CUSTOMER_ACTIVITY, ["customer_id", "event_timestamp"]).set_index("customer_id")["event_timestamp"]
    ages = (cast.now - changed).dt.total_seconds()
    answer = ask(answers, cast.customers[:4])
    assert answer.feature_age_s == pytest.approx(ages[cast.customers[:4]].max(), abs=1.0)  # the store keeps whole seconds
    assert ask(answers, ["nobody"]).feature_age_s is None


# -- the ladder: each dependency taken away ------------------------------------------------------------------------------


def stored_scores(home, cast, column):
    return tables.read(home, tables.CUSTOMER_SCORES).set_index("customer_id")[column][cast.customers[:3]].tolist()


def test_without_a_model_the_last_batch_score_answers(home, settings, rehearse, cast):
    shutil.rmtree(home / "models" / "churn")
    core = Answers(settings, rehearse=rehearse)
    core.open()
    answer = ask(core, cast.customers[:3])
    assert said(answer) == ("stale", True, ["model_refused"])
    assert [p.probability for p in answer.predictions] == stored_scores(home, cast, "churn_probability")
    assert answer.model_version == "1"
    assert all(not p.reasons for p in answer.predictions)


def test_task_without_columns_of_its_own_falls_back_to_its_stored_score_like_any_other(home, settings, rehearse, cast):
    shutil.rmtree(home / "models" / "return_risk")
    core = Answers(settings, rehearse=rehearse)
    core.open()
    answer = ask(core, [*cast.customers[:3], cast.bare], "return_risk")
    kept = tables.read(home, tables.TASK_SCORES).set_index("customer_id")["probability"]
    assert said(answer) == ("static", True, ["model_refused", "score_missing"])
    assert sources(answer) == ["stale", "stale", "stale", "static"]
    assert [p.probability for p in answer.predictions[:3]] == kept[cast.customers[:3]].tolist()
    assert answer.model_version == "4"
    assert said(ask(core, cast.customers[:3], "intent_7d")) == (
        "static",
        True,
        ["model_missing", "score_missing"],
    )  # another's score is none


def test_model_that_was_trained_with_another_service_is_fed_from_that_one(home, settings, rehearse, cast):
    learner, _, base_rate = cast.classifier("intent", 9)
    fed = {"base_rate": base_rate, "feature_service": "intent_v1"}
    registry.promote(home, "return_risk", registry.register(home, "return_risk", learner=learner, manifest=fed))
    unfed = {"base_rate": base_rate, "feature_service": "ranker_v1"}  # of items, too
    registry.promote(home, "intent", registry.register(home, "intent", learner=learner, manifest=unfed))
    core = Answers(settings, rehearse=rehearse)
    core.open()
    assert said(ask(core, cast.customers[:3], "return_risk")) == ("personal", False, [])
    assert said(ask(core, cast.customers[:3], "intent")) == ("stale", True, ["features_missing"])


def test_untrainable_model_is_named_and_its_prior_is_the_answer(home, settings, rehearse):
    shutil.rmtree(home / "models")
    registry.mark_untrainable(home, "intent", "no sessions", prior=0.07)
    core = Answers(settings, rehearse=rehearse)
    core.open()
    answer = ask(core, ["user-21"], "intent")  # allowed nothing
    assert answer.predictions[0].probability == 0.07
    answer = ask(core, ["user-22"], "intent")  # allowed, never scored
    assert said(answer) == ("static", True, ["model_not_trainable", "score_missing"])
    assert answer.predictions[0].probability == 0.07


def test_without_a_store_everybody_gets_the_base_rate(answers, home, cast):
    (home / "feature_store" / "online.db").unlink()
    answer = ask(answers, cast.customers[:3])
    assert said(answer) == ("static", True, ["store_unavailable"])
    assert {p.probability for p in answer.predictions} == {answers.champions.bundle.scorers["churn"].prior}


@pytest.mark.parametrize("broken", [lambda *_: 1 / 0, lambda _, rows: np.full(len(rows), np.nan), lambda _, rows: np.full(len(rows), 1.5)])
def test_model_that_fails_or_talks_nonsense_costs_the_rung_and_not_the_answer(answers, home, cast, monkeypatch, broken):
    for way in ("predict_values", "probability_of"):  # of several, and of one that is explained
        monkeypatch.setattr(f"models.classifier.Classifier.{way}", broken)
    stored = stored_scores(home, cast, "churn_probability")
    for n in (3, 1):
        answer = ask(answers, cast.customers[:n])
        assert said(answer) == ("stale", True, ["model_failed"])
        assert [p.probability for p in answer.predictions] == stored[:n]


def test_passed_deadline_is_the_base_rate(answers, cast):
    assert said(ask(answers, cast.customers[:3], deadline_ms=0)) == ("static", True, ["deadline"])


def test_reasons_give_way_to_the_deadline_and_probabilities_do_not(answers, cast, monkeypatch):
    real, now = Classifier.explain_values, [0.0]

    def slow(self, matrix):
        now[0] += 0.03
        return real(self, matrix)

    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr("models.classifier.Classifier.explain_values", slow)
    monkeypatch.setattr("serving.fallbacks.time", clock)
    monkeypatch.setattr("serving.scores.time", clock)
    answer = ask(answers, cast.customers[:20] * 50, deadline_ms=250)
    assert set(sources(answer)) == {"personal"}
    assert answer.causes == ["reasons_missing"]
    assert answer.degraded
    told = [bool(p.reasons) for p in answer.predictions]
    assert any(told)
    assert not all(told)
    assert now[0] <= 0.25


def test_reasons_are_left_out_where_more_wait_than_can_be_answered(answers, cast):
    crowded = Deadline.after_ms(10_000, is_crowded=True)
    answer = answers.scoring.answer("churn", ScoreRequest(customer_ids=cast.customers[:3]), crowded)
    assert said(answer) == ("personal", True, ["reasons_missing"])
    assert not any(p.reasons for p in answer.predictions)
    bare = answers.scoring.answer("churn", ScoreRequest(customer_ids=cast.customers[:3], reasons=0), crowded)
    assert said(bare) == ("personal", False, [])
    assert [p.probability for p in bare.predictions] == [p.probability for p in answer.predictions]


def test_thousand_customers_cost_less_than_a_deadline_of_two_seconds(answers, cast):
    ids = cast.customers[:20] * 50
    ask(answers, ids)
    started = time.thread_time()  # not how long the machine let it wait
    answer = ask(answers, ids, deadline_ms=60_000)
    assert time.thread_time() - started < 2.0
    assert len(answer.predictions) == 1_000
    assert said(answer) == ("personal", False, [])


def test_rows_are_encoded_as_the_model_itself_does_it_whatever_their_columns_held_in_training():
    """Text, a column that was empty then and holds numbers or text by now, text that the model does not read, a truth value, nulls."""
    rng, n = np.random.default_rng(3), 200
    frame = pd.DataFrame(
        {
            "region": rng.choice(["north", "south"], n),
            "views_7d": rng.integers(0, 9, n).astype(float),
            "age_band": pd.Series([None] * n, dtype=object),
            "max_bought_cents_total": np.full(n, np.nan),
            "is_region_imputed": rng.random(n) < 0.5,
        }
    )
    learner = Classifier(n_rounds=2).fit(frame, np.arange(n) % 2)
    names = ("gender", *frame.columns)
    now = [
        ["f", "south", 3, "30-39", 500, True],
        [None, "west", None, None, None, None],
        ["m", None, 4.0, "40-49", None, False],
    ]
    scoring, case = scores.Scoring(guard=None, bundle=None, clock=None), SimpleNamespace(at_us=0, context={})
    for values in (now, *([row] for row in now)):
        rows = profile.Rows(names, values, [1.0] * len(values))
        derived, matrix = scoring._derived(learner, rows, range(len(values)), case)
        plain = {name: np.array([row[place] for row in values], dtype=object) for place, name in enumerate(names)}
        np.testing.assert_array_equal(matrix, learner.encode(windows.derive_columns(plain, 0)))
        assert [derived.value("gender", i) for i in range(len(values))] == plain["gender"].tolist()
    assert np.isnan(matrix[0, 2:4]).all()
    present = scoring._derived(learner, profile.Rows(names, now, [1.0, None, 1.0]), [0, 2], case)[1]
    np.testing.assert_array_equal(present[:, 1], [3.0, 4.0])
    alien = scores._Encoding.of(learner, ("views_7d", "region"))
    assert alien.pick is None
