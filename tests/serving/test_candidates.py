import shutil
import sqlite3
import time
from contextlib import closing
from datetime import timedelta

import pandas as pd
import pytest

from pipelines import registry, tables
from pipelines.online_writer import OnlineWriter, Row
from pipelines.settings import Settings
from serving.answers import Answers
from serving.fallbacks import Deadline
from serving.wire import Filters, RecommendRequest


def ask(answers, deadline_ms=5_000, **body):
    filters = Filters(category=body.pop("category", None))
    return answers.recommendations.answer(RecommendRequest(filters=filters, **body), Deadline.after_ms(deadline_ms))


def said(answer):
    return answer.source, answer.degraded, answer.causes


def names(answer):
    return [item.item_id for item in answer.items]


def is_well_formed(answer, k):
    assert len(answer.decision_id) == 36
    assert [item.rank for item in answer.items] == list(range(1, len(answer.items) + 1))
    assert len(set(names(answer))) == len(answer.items) <= k
    assert all(a.score >= b.score for a, b in zip(answer.items, answer.items[1:], strict=False))
    assert all(item.reason for item in answer.items)
    return True


def test_known_customer_gets_what_the_champion_ranks_for_them(answers, cast):
    answer = ask(answers, customer_id=cast.customers[4], k=5)
    assert said(answer) == ("personal", False, [])
    assert is_well_formed(answer, 5)
    assert answer.customer_id == cast.customers[4]
    assert answer.model_version == "1"
    assert answer.as_of == cast.now
    model = answers.champions.bundle.recommender
    best, _ = model.learner.recommend([4], 5)
    assert names(answer) == [cast.items[i] for i in best[0] if i != 29][:5]


@pytest.mark.parametrize("who", [{"customer_id": "user-4"}, {"anonymous_id": "device-4"}])
def test_identifier_leads_to_the_same_customer(answers, cast, who):
    answer = ask(answers, **who)
    assert answer.customer_id == cast.customers[4]
    assert names(answer) == names(ask(answers, customer_id=cast.customers[4]))


def test_customer_merged_since_the_training_gets_what_suits_all_that_they_were(answers, cast, settings):
    """A visitor who identifies as a customer the model knows apart: both histories count."""
    customer, visitor = cast.customers[4], cast.customers[9]
    apart = {name: ask(answers, customer_id=name, k=29) for name in (customer, visitor)}
    merge(settings.home, visitor, customer)
    merged = ask(answers, customer_id=customer, k=29)
    assert said(merged) == ("personal", False, [])
    assert names(merged) != names(apart[customer])
    scores = [{item.item_id: item.score for item in answer.items} for answer in (*apart.values(), merged)]
    theirs = max(scores[1], key=lambda item: scores[1][item] - scores[0][item])  # what the visitor liked and the customer did not know
    assert scores[2][theirs] > scores[0][theirs]
    assert ask(answers, customer_id=visitor).customer_id == customer  # their former id leads there


def test_customer_whom_the_model_knows_by_a_former_id_alone_is_answered_by_it(answers, cast, settings):
    visitor = cast.customers[9]
    alone = ask(answers, customer_id=visitor)
    assert said(ask(answers, customer_id=cast.untrained)) == ("popular", False, ["customer_not_in_model"])
    merge(settings.home, visitor, cast.untrained)
    merged = ask(answers, customer_id=cast.untrained)
    assert said(merged) == ("personal", False, [])
    assert names(merged) == names(alone)


def merge(home, former, customer):
    """As the stream does when two customers turn out to be one."""
    with closing(OnlineWriter(home)) as online, online.transaction():
        online.identifiers_of([customer])
        online.remove_customers([former])
        row = Row(f"customer_id:{former}", {"customer_id": customer}, event_us=1_800_000_000_000_000)
        online.write("identifier_customer", [row], join_key="identifier")


@pytest.mark.parametrize(("who", "cause"), [("denied", "consent"), ("silent", "consent"), ("untrained", "customer_not_in_model")])
def test_customer_who_may_not_be_or_is_not_modelled_gets_what_is_popular(answers, cast, who, cause):
    answer = ask(answers, customer_id=getattr(cast, who))
    assert said(answer) == ("popular", False, [cause])
    assert is_well_formed(answer, 10)
    assert names(answer)[:2] == ["item-01", "item-02"]


@pytest.mark.parametrize("who", [{"customer_id": "nobody"}, {"anonymous_id": "nothing"}])
def test_stranger_is_a_cold_start_and_no_degradation(answers, who):
    answer = ask(answers, **who)
    assert said(answer) == ("popular", False, ["unknown_customer"])
    assert answer.customer_id == who.get("customer_id")
    assert len(answer.items) == 10


def test_withdrawn_consent_ends_personal_answers(answers, home, cast):
    assert ask(answers, customer_id=cast.customers[4]).source == "personal"
    consent = tables.read(home, tables.CUSTOMER_CONSENT)
    withdrawn = pd.DataFrame({"customer_id": [cast.customers[4]], "event_timestamp": [cast.now - timedelta(hours=1)]})
    withdrawn["is_personalization_allowed"] = False
    tables.write(home, tables.CUSTOMER_CONSENT, pd.concat([consent, withdrawn], ignore_index=True))
    cast.fill_store(home)
    assert said(ask(answers, customer_id=cast.customers[4])) == ("popular", False, ["consent"])


@pytest.mark.parametrize("who", ["nobody", "known"])
def test_excluded_items_and_other_categories_never_come_back(answers, cast, who):
    customer = cast.customers[4] if who == "known" else who
    every = names(ask(answers, customer_id=customer, k=50))
    assert len(every) == 29
    barred = every[:3]
    assert names(ask(answers, customer_id=customer, k=50, exclude=barred)) == every[3:]
    hats = names(ask(answers, customer_id=customer, k=50, category=["hats"]))
    assert hats == [item for item in every if int(item[-2:]) % 3 == 1]


def test_item_that_is_not_yet_to_be_had_is_not_recommended(answers, cast):
    for customer in (cast.customers[4], "nobody"):
        assert cast.items[29] not in names(ask(answers, customer_id=customer, k=50))


def test_filter_that_nothing_satisfies_is_an_empty_answer_with_its_cause(answers, cast):
    answer = ask(answers, customer_id=cast.customers[4], category=["submarines"])
    assert (answer.items, answer.source, answer.degraded) == ([], "static", False)
    assert answer.causes == ["no_item_matches"]


def test_item_asks_for_its_neighbours_whoever_asks(answers, cast):
    asked = [ask(answers, customer_id=who, item_id="item-03", k=4) for who in (cast.customers[4], cast.denied, "nobody")]
    assert {said(answer)[0] for answer in asked} == {"folded_in"}
    assert len({tuple(names(answer)) for answer in asked}) == 1
    assert "item-03" not in names(asked[0])
    assert {item.reason for item in asked[0].items} == {"goes with item-03"}
    assert asked[0].causes == []


def test_unknown_item_leads_to_the_customers_own_list_without_it(answers, cast):
    answer = ask(answers, customer_id=cast.customers[4], item_id="item-xx")
    assert said(answer) == ("personal", False, ["unknown_item"])


# -- the ladder: each dependency taken away ------------------------------------------------------------------------------


def test_without_a_store_the_answer_is_popular_and_says_so(answers, home, cast):
    (home / "feature_store" / "online.db").unlink()
    answer = ask(answers, customer_id=cast.customers[4])
    assert said(answer) == ("popular", True, ["store_unavailable"])
    assert len(answer.items) == 10


def test_store_that_comes_back_serves_again(answers, home, cast):
    online = home / "feature_store" / "online.db"
    hidden = online.rename(online.with_suffix(".hidden"))
    for _ in range(5):
        assert ask(answers, customer_id=cast.customers[4]).degraded
    hidden.rename(online)
    time.sleep(1.05)  # the breaker's pause
    assert said(ask(answers, customer_id=cast.customers[4])) == ("personal", False, [])


def test_locked_store_does_not_hold_an_answer_up(home, settings, rehearse, cast):
    online = home / "feature_store" / "online.db"
    with sqlite3.connect(online, isolation_level=None) as writer:
        writer.execute("PRAGMA journal_mode = DELETE")  # in this mode a writer lets nobody read
        core = Answers(settings, rehearse=rehearse)
        core.open()
        assert ask(core, customer_id=cast.customers[4]).source == "personal"
        writer.execute("BEGIN EXCLUSIVE")
        started = time.perf_counter()
        answer = ask(core, customer_id=cast.customers[4])
        took_s = time.perf_counter() - started
        writer.execute("ROLLBACK")
    assert said(answer) == ("popular", True, ["store_unavailable"])
    assert took_s < 0.25


def test_without_a_model_the_answer_is_popular_and_says_so(home, settings, rehearse, cast):
    shutil.rmtree(home / "models")
    core = Answers(settings, rehearse=rehearse)
    core.open()
    assert said(ask(core, customer_id=cast.customers[4])) == ("popular", True, ["model_missing"])
    registry.mark_untrainable(home, "recommender", "too few purchases")
    core.refresh()
    assert said(ask(core, customer_id=cast.customers[4])) == ("popular", True, ["model_not_trainable"])


def test_model_that_fails_costs_the_rung_and_not_the_answer(answers, cast, monkeypatch):
    monkeypatch.setattr("models.recommender.Recommender.recommend", lambda *_: 1 / 0)
    assert said(ask(answers, customer_id=cast.customers[4])) == ("popular", True, ["model_failed"])


def test_passed_deadline_is_answered_from_memory(answers, cast):
    answer = ask(answers, customer_id=cast.customers[4], deadline_ms=0)
    assert said(answer) == ("popular", True, ["deadline"])
    assert len(answer.items) == 10


def test_static_list_answers_when_everything_else_fails(answers, cast, monkeypatch):
    popular = names(ask(answers, customer_id="nobody", k=5, exclude=["item-02"], category=["shoes", "books"]))
    monkeypatch.setattr("serving.catalogue.Catalogue.allowed", lambda *_, **__: 1 / 0)
    answer = ask(answers, customer_id="nobody", k=5, exclude=["item-02"], category=["shoes", "books"])
    assert said(answer) == ("static", True, ["unknown_customer", "model_failed"])
    assert names(answer) == popular


def test_empty_home_still_answers(tmp_path, rehearse):
    core = Answers(Settings(home=tmp_path / "new"), rehearse=rehearse)
    core.open()
    answer = ask(core, customer_id="c1")
    assert said(answer) == ("static", True, ["store_unavailable", "catalogue_missing"])
    assert answer.items == []
