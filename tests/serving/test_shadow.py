"""A challenger scores what the champion scored: off the way of answers, kept beside them, and never mistaken for what models were fed."""

import asyncio
import threading
from contextlib import closing

import pytest

from pipelines import challengers, registry
from pipelines.errors import RegistryError
from pipelines.served import Served
from pipelines.settings import ServingSettings, Settings
from serving import metrics, shadow
from serving.answers import Answers
from serving.fallbacks import Deadline
from serving.wire import ScoreRequest

PATIENCE_S = 60.0


@pytest.fixture
def core(home, cast, rehearse):
    """A core whose whole sample is kept, with a second version of churn as the challenger."""
    learner, sample, base_rate = cast.classifier("churn", 11)
    golden = {"features": {c: [] for c in sample}, "probability": []}
    version = registry.register(home, "churn", learner=learner, manifest={"base_rate": base_rate, "golden": golden})
    challengers.challenge(home, "churn", version)
    core = Answers(Settings(home=home, serving=ServingSettings(audit_share=1.0)), rehearse=rehearse)
    core.open()
    core.refresh()
    yield core
    core.close()


def ask(core, customers):
    return asyncio.run(core.score("churn", ScoreRequest(customer_ids=customers), Deadline.after_ms(5_000)))


def count(outcome):
    return metrics.shadow("churn", outcome)._value.get()


def test_challenger_scores_the_same_requests_and_its_answers_are_kept_apart(core, cast):
    before, asked = count("scored"), cast.customers[:3]
    answer = ask(core, asked)
    assert answer.model_version == "1"
    core.close()
    assert count("scored") == before + 1
    with closing(Served(core.settings.home, vault=core.vault)) as served:
        rows = {row.customer_id: row for row in served.challenged("churn")}
        fed = list(served.rows())
    champions = {prediction.customer_id: prediction.probability for prediction in answer.predictions}
    assert {name: row.values["champion_probability"] for name, row in rows.items()} == champions
    assert {row.version for row in rows.values()} == {"churn 2"}
    assert all(row.values["champion"] == "1" and row.values["probability"] != champions[row.customer_id] for row in rows.values())
    assert sorted(row.customer_id for row in fed) == sorted(asked)  # what `features parity` looks at
    assert {row.service for row in fed} == {"churn_v1"}


def test_challenger_that_hangs_delays_no_answer_and_what_it_misses_is_counted(core, cast, monkeypatch):
    release, reached = threading.Event(), threading.Event()

    def hangs(asked, scorer):
        reached.set()
        assert release.wait(PATIENCE_S)
        return "scored"

    monkeypatch.setattr(core.shadow, "_score", hangs)
    before = count("dropped")
    ask(core, cast.customers[:1])
    assert reached.wait(PATIENCE_S)
    n = core.shadow._queue.maxsize + 5
    answers = [ask(core, cast.customers[:1]) for _ in range(n)]
    assert {answer.source for answer in answers} == {"personal"}
    assert count("dropped") == before + 5
    monkeypatch.setattr(shadow, "CLOSE_S", 0.05)
    core.shadow.close()  # nor does it hold up the end, full as the queue is
    release.set()


def test_challenger_that_fails_costs_the_answer_nothing(core, cast, monkeypatch, caplog):
    def fails(asked, scorer):
        raise ZeroDivisionError

    monkeypatch.setattr(core.shadow, "_score", fails)
    before = count("failed")
    assert ask(core, cast.customers[:1]).source == "personal"
    core.shadow.close()
    assert count("failed") == before + 1
    assert "ZeroDivisionError" in caplog.text


def test_challenger_that_is_taken_back_scores_no_more(core, cast):
    challengers.challenge(core.settings.home, "churn", None)
    core.refresh()
    before = count("scored")
    ask(core, cast.customers[:1])
    core.close()
    assert count("scored") == before


def test_only_a_sound_version_of_what_scores_can_challenge(home):
    with pytest.raises(RegistryError, match="no version 9"):
        challengers.challenge(home, "churn", 9)
    with pytest.raises(RegistryError, match="does not score"):
        challengers.challenge(home, "recommender", 1)
    assert challengers.challengers(home) == {}
    (home / "models" / "challengers.json").write_text("[")
    with pytest.raises(RegistryError, match="remove it"):
        challengers.challengers(home)
