import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from models import als
from pipelines import registry, tables
from pipelines.online.writer import OnlineWriter, Row
from pipelines.settings import Settings
from serving import ranking
from serving.answers import Answers
from serving.fallbacks import Deadline
from serving.wire import Filters, Price, RecommendRequest


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
    assert said(ask(answers, customer_id=cast.untrained)) == ("popular", False, ["customer_not_in_model", "segment_missing"])
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


@pytest.mark.parametrize(
    ("who", "causes"),
    [("denied", ["consent"]), ("silent", ["consent"]), ("untrained", ["customer_not_in_model", "segment_missing"])],
    ids=["denied", "silent", "untrained"],
)
def test_customer_who_may_not_be_or_is_not_modelled_gets_what_is_popular(answers, cast, who, causes):
    answer = ask(answers, customer_id=getattr(cast, who))
    assert said(answer) == ("popular", False, causes)
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
    assert answer.causes == ["no_item_matches", "segment_missing"]


def test_item_asks_for_its_neighbours_whoever_asks(answers, cast):
    asked = [ask(answers, customer_id=who, item_id="item-03", k=4) for who in (cast.customers[4], cast.denied, "nobody")]
    assert {said(answer)[0] for answer in asked} == {"folded_in"}
    assert len({tuple(names(answer)) for answer in asked}) == 1
    assert "item-03" not in names(asked[0])
    assert {item.reason for item in asked[0].items} <= {"similar to item-03", "bought together with item-03"}
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
    until = time.monotonic() + 60  # the breaker's pause, and a probe beside the requests
    while (answer := ask(answers, customer_id=cast.customers[4])).degraded and time.monotonic() < until:
        time.sleep(0.05)
    assert said(answer) == ("personal", False, [])


def test_locked_store_does_not_hold_an_answer_up(home, settings, rehearse, cast):
    online = home / "feature_store" / "online.db"
    with sqlite3.connect(online, isolation_level=None) as writer:
        writer.execute("PRAGMA journal_mode = DELETE")  # in this mode a writer lets nobody read
        core = Answers(settings, rehearse=rehearse)
        core.open()
        assert ask(core, customer_id=cast.customers[4]).source == "personal"
        writer.execute("BEGIN EXCLUSIVE")
        answer = ask(core, customer_id=cast.customers[4])
        (waits_ms,) = core.guard.profiles.source._connection().execute("PRAGMA busy_timeout").fetchone()
        writer.execute("ROLLBACK")
    assert said(answer) == ("popular", True, ["store_unavailable"])
    assert waits_ms < 50  # SQLite itself waits no longer for a lock


def test_without_a_model_the_answer_is_popular_and_says_so(home, settings, rehearse, cast):
    shutil.rmtree(home / "models")
    core = Answers(settings, rehearse=rehearse)
    core.open()
    assert said(ask(core, customer_id=cast.customers[4])) == ("popular", True, ["model_missing", "segment_missing"])
    registry.mark_untrainable(home, "recommender", "too few purchases")
    core.refresh()
    assert said(ask(core, customer_id=cast.customers[4])) == ("popular", True, ["model_not_trainable", "segment_missing"])


def test_model_that_fails_costs_the_rung_and_not_the_answer(answers, cast, monkeypatch):
    monkeypatch.setattr("serving.taste.Taste.scores", lambda *_: 1 / 0)
    assert said(ask(answers, customer_id=cast.customers[4])) == ("popular", True, ["model_failed", "segment_missing"])


def test_passed_deadline_is_answered_from_memory(answers, cast):
    answer = ask(answers, customer_id=cast.customers[4], deadline_ms=0)
    assert said(answer) == ("popular", True, ["deadline"])
    assert len(answer.items) == 10


def test_static_list_answers_when_everything_else_fails(answers, cast, monkeypatch):
    popular = names(ask(answers, customer_id="nobody", k=5, exclude=["item-02"], category=["shoes", "books"]))
    monkeypatch.setattr("models.shop.catalogue.Offers.allowed", lambda *_, **__: 1 / 0)
    answer = ask(answers, customer_id="nobody", k=5, exclude=["item-02"], category=["shoes", "books"])
    assert said(answer) == ("static", True, ["unknown_customer", "model_failed"])
    assert names(answer) == popular


def test_empty_home_still_answers(tmp_path, rehearse):
    core = Answers(Settings(home=tmp_path / "new"), rehearse=rehearse)
    core.open()
    answer = ask(core, customer_id="c1")
    assert said(answer) == ("static", True, ["store_unavailable", "catalogue_missing"])
    assert answer.items == []


# -- what was done since the training -----------------------------------------------------------------------------------------------


def write_acts(cast, home, customer, *acts):
    """As the stream does with every event. acts: item, kind of the last one, minutes ago; counts by kind where it is not the only one."""
    rows = []
    for item, kind, minutes, *counts in acts:
        at_us = int((cast.now - timedelta(minutes=minutes)).timestamp() * 1e6)
        n = {"view": 0, "cart_add": 0, "purchase": 0} | (counts[0] if counts else {kind: 1})
        told = {f"customer_item_{name}s_{window}": count for name, count in n.items() for window in ("30d", "total")}
        times = {"customer_item_last_seen_at": at_us, "customer_item_last_bought_at": at_us if n["purchase"] else None}
        rows.append(Row((customer, item), {**told, **times}, event_us=at_us))
    with closing(OnlineWriter(home)) as online, online.transaction():
        online.write("customer_item", rows, join_key=("customer_id", "item_id"))


def test_customer_newer_than_the_model_is_solved_for_from_their_first_events(answers, cast, home):
    write_acts(cast, home, cast.untrained, ("item-03", "view", 5), ("item-07", "purchase", 1), ("not-in-model", "view", 1))
    answer = ask(answers, customer_id=cast.untrained, k=29)
    assert said(answer) == ("folded_in", False, [])
    assert is_well_formed(answer, 29)
    learner = answers.champions.bundle.recommender.learner
    weights, factors = sparse.csr_matrix(([0.15, 1.0], ([0, 0], [3, 7])), (1, 30)), learner.item_factors_
    folded = als.fold_in(weights, learner.objective_, factors, gram=factors.T @ factors, num_threads=1)[0]
    scores = factors @ folded + learner.repeat_weight * weights.toarray()[0]
    kept = [(cast.items[i], scores[i]) for i in np.argsort(-scores, kind="stable").tolist() if i != 29]
    assert names(answer) == [name for name, _ in kept]
    assert np.allclose([item.score for item in answer.items], [score for _, score in kept], atol=1e-4)
    assert "because you bought item-07" in {item.reason for item in answer.items}


def test_last_events_of_a_known_customer_count_in_the_next_request(answers, cast, home):
    customer = cast.customers[4]
    before = ask(answers, customer_id=customer, k=29)
    last = next(item for item in reversed(before.items))
    write_acts(cast, home, customer, (last.item_id, "purchase", 1))
    after = ask(answers, customer_id=customer, k=29)
    assert said(after) == ("folded_in", False, [])
    assert names(after).index(last.item_id) < names(before).index(last.item_id)
    assert after.items[names(after).index(last.item_id)].reason == "because you bought it before"


def test_events_that_the_model_knew_change_nothing(answers, cast, home):
    customer = cast.customers[4]
    before = ask(answers, customer_id=customer)
    write_acts(cast, home, customer, ("item-09", "purchase", 121))
    after = ask(answers, customer_id=customer)
    assert (after.source, names(after)) == ("personal", names(before))


@pytest.mark.parametrize("who", ["denied", "silent"])
def test_behaviour_without_consent_changes_nothing(answers, cast, home, who):
    customer = getattr(cast, who)
    before = ask(answers, customer_id=customer)
    write_acts(cast, home, customer, ("item-20", "purchase", 1), ("item-21", "view", 1))
    for more in ({}, {"new_only": True}):
        after = ask(answers, customer_id=customer, **more)
        assert said(after) == ("popular", False, ["consent"])
        assert names(after) == names(before)


def test_what_was_bought_does_not_come_back_where_only_new_items_are_wanted(answers, cast, home):
    customer = cast.customers[4]
    write_acts(cast, home, customer, ("item-01", "purchase", 9_000), ("item-05", "view", 1), ("item-06", "purchase", 1))
    allowed, new = (names(ask(answers, customer_id=customer, k=50, new_only=flag)) for flag in (False, True))
    assert set(allowed) - set(new) == {"item-01", "item-06"}
    answers.champions.bundle = replace(answers.champions.bundle, recommender=None)  # nor from a lesser rung
    assert not {"item-01", "item-06"} & set(names(ask(answers, customer_id=customer, k=50, new_only=True)))


# -- several lists of one page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranked(monkeypatch):
    """Whose items were ordered, once for each time."""
    found, rank = [], ranking.seen

    def seen(model, rows, acts, at, *, new_only):
        found.append((tuple(rows), new_only))
        return rank(model, rows, acts, at, new_only=new_only)

    monkeypatch.setattr(ranking, "seen", seen)
    return found


def test_lists_of_one_page_are_cut_from_one_order(answers, cast, ranked):
    every = ask(answers, customer_id=cast.customers[4], k=29)
    hats = ask(answers, customer_id=cast.customers[4], k=3, category=["hats"], exclude=names(every)[:1])
    assert names(hats) == [name for name in names(every)[1:] if int(name[-2:]) % 3 == 1][:3]
    assert hats.decision_id != every.decision_id
    assert ranked == [((4,), False)]
    ask(answers, customer_id=cast.customers[4], new_only=True)
    ask(answers, customer_id=cast.customers[5])
    assert ranked[1:] == [((4,), True), ((5,), False)]


def test_what_is_new_of_a_customer_or_another_version_orders_anew(answers, cast, home, ranked):
    customer, bundle = cast.customers[4], answers.champions.bundle
    changes = [
        lambda: write_acts(cast, home, customer, ("item-20", "view", 1)),
        lambda: write_acts(cast, home, customer, ("item-20", "view", 1, {"view": 2})),
        lambda: merge(home, cast.customers[9], customer),
        lambda: setattr(answers.champions, "bundle", replace(bundle, recommender=replace(bundle.recommender))),
    ]
    for n, change in enumerate([lambda: None, *changes], start=1):
        change()
        ask(answers, customer_id=customer)
        ask(answers, customer_id=customer)
        assert len(ranked) == n


def test_nothing_of_a_customer_who_withdraws_stays_in_memory(answers, cast, home):
    customer = cast.customers[4]
    for new_only in (False, True):
        ask(answers, customer_id=customer, new_only=new_only)
    assert len(answers.recommendations._ranked._found) == 2
    with closing(OnlineWriter(home)) as online, online.transaction():
        online.write("customer_consent", [Row(customer, {"is_personalization_allowed": False}, event_us=1_800_000_000_000_000)])
    ask(answers, customer_id=customer)
    assert not answers.recommendations._ranked._found


def test_nothing_of_anybody_stays_in_memory_once_somebody_was_erased(answers, cast, home):
    kept = answers.recommendations._ranked._found, answers.recommendations._answered._found, answers.guard.profiles._pseudonym.cache_info
    ask(answers, customer_id=cast.customers[4])
    ask(answers, customer_id="somebody@example.com")
    answers.refresh()
    assert kept[0]
    assert kept[1]
    assert kept[2]().currsize
    (home / "erasures").mkdir()
    (home / "erasures" / "r1.json").write_text("{}")  # the receipt is the last that an erasure writes
    answers.refresh()
    assert (len(kept[0]), len(kept[1]), kept[2]().currsize) == (0, 0, 0)


def test_without_time_for_it_every_list_is_ordered_anew(settings, home, cast, rehearse, ranked):
    core = Answers(settings.model_copy(update={"serving": settings.serving.model_copy(update={"ranking_s": 0.0})}), rehearse=rehearse)
    core.open()
    for _ in range(2):
        ask(core, customer_id=cast.customers[4])
    assert ranked == [((4,), False)] * 2
    core.close()


# -- reasons, filters, caps ---------------------------------------------------------------------------------------------------------


def test_reason_names_the_item_that_adds_most_to_the_score(answers, cast):
    learner = answers.champions.bundle.recommender.learner
    weights = learner.history_[4] * learner.largest_[4]
    solved = learner.solve(weights.indices, weights.data)
    for item in ask(answers, customer_id=cast.customers[4], k=29).items:
        place = cast.items.index(item.item_id)
        shares = solved.shares(learner.item_factors_[[place]])[0]
        shares[weights.indices == place] += learner.repeat_weight * learner.history_[4].data[weights.indices == place]
        strongest = cast.items[weights.indices[shares.argmax()]]
        told = "it before" if strongest == item.item_id else strongest
        assert item.reason == (f"because you viewed or bought {told}" if shares.max() > 0 else "suits what you did")


REQUESTS = st.fixed_dictionaries(
    {"who": st.sampled_from([4, 11, 20, 22]), "k": st.integers(1, 40)},
    optional={
        "exclude": st.lists(st.sampled_from([f"item-{i:02d}" for i in range(30)]), max_size=12),
        "category": st.lists(st.sampled_from(["shoes", "hats", "books", "none"]), min_size=1, max_size=2),
        "price": st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted),
        "in_stock": st.just(True),
        "max_per_category": st.integers(1, 6),
        "item_id": st.sampled_from(["item-03", "item-12", "item-29", "nothing"]),
        "new_only": st.booleans(),
    },
)


@pytest.fixture(scope="module")
def steady(shop, rehearse):
    """The decision core over the shop that nobody changes."""
    core = Answers(Settings(home=shop), rehearse=rehearse)
    core.open()
    yield core
    core.close()


@settings(max_examples=150)
@given(wanted=REQUESTS, is_broken=st.sampled_from(["", "model", "catalogue", "store"]))
def test_whatever_is_asked_and_broken_the_answer_keeps_to_the_request(steady, cast, wanted, is_broken):
    wanted = dict(wanted)
    customer, band, k = cast.customers[wanted.pop("who")], wanted.pop("price", None), wanted["k"]
    price = None if band is None else Price(min=band[0] / 100, max=band[1] / 100)
    filters = Filters(category=wanted.pop("category", None), in_stock=wanted.pop("in_stock", False), price=price)
    bundle, deadline = steady.champions.bundle, Deadline.after_ms(-1 if is_broken == "store" else 5_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steady.champions, "bundle", replace(bundle, recommender=None) if is_broken == "model" else bundle)
        if is_broken == "catalogue":
            patch.setattr("models.shop.catalogue.Offers.allowed", lambda *_: 1 / 0)
        answer = steady.recommendations.answer(RecommendRequest(customer_id=customer, filters=filters, **wanted), deadline)
    assert is_well_formed(answer, k)
    found = [int(name[-2:]) for name in names(answer)]
    assert not {*wanted.get("exclude", []), wanted.get("item_id")} & set(names(answer))
    assert 29 not in found  # it is yet to come
    assert not (filters.in_stock and 8 in found)  # it is sold out
    kinds = [("shoes", "hats", "books")[i % 3] for i in found]
    assert filters.category is None or set(kinds) <= set(filters.category)
    assert band is None or all(band[0] <= i <= band[1] for i in found)  # an item costs its number in cents
    assert all(kinds.count(kind) <= wanted.get("max_per_category", k) for kind in kinds)


# -- lesser rungs -------------------------------------------------------------------------------------------------------------------


def test_without_a_model_customers_of_a_segment_get_what_is_popular_in_it(answers, cast, home):
    shutil.rmtree(home / "models")
    core = Answers(Settings(home=home))
    core.open()
    mine, everybody = (ask(core, customer_id=who, k=8) for who in (cast.customers[12], "nobody"))
    assert said(mine) == ("segment", True, ["model_missing"])
    assert {item.reason for item in mine.items} == {"popular in keen"}
    rows = tables.read(home, tables.INTERACTIONS)
    counts = rows[rows["customer_id"].isin(cast.customers[10:20])]["item_id"].value_counts()
    assert [counts[name] for name in names(mine)] == sorted(counts, reverse=True)[:8]
    assert names(mine) != names(everybody)
    core.close()


def test_last_good_answer_is_given_where_a_new_one_cannot_be_had_and_filtered_as_asked(answers, cast):
    customer = cast.customers[4]
    good = ask(answers, customer_id=customer, k=5)
    answers.champions.bundle = replace(answers.champions.bundle, recommender=None)
    stale = ask(answers, customer_id=customer, k=8, exclude=names(good)[:2])
    assert said(stale) == ("stale", True, ["model_missing"])
    assert is_well_formed(stale, 8)
    assert names(stale)[:3] == names(good)[2:]
    assert stale.model_version == "1"
    assert ask(answers, customer_id=cast.customers[5]).source != "stale"  # nobody else's


def test_last_good_answer_is_not_given_while_nobody_can_be_asked_for_consent(answers, cast, home):
    """It rests on behaviour, and a withdrawal would go unseen."""
    customer = cast.customers[4]
    assert ask(answers, customer_id=customer).source == "personal"
    (home / "feature_store" / "online.db").unlink()
    assert said(ask(answers, customer_id=customer)) == ("popular", True, ["store_unavailable"])


def test_withdrawal_that_was_seen_ends_the_last_good_answer_too(answers, cast, home):
    customer = cast.customers[4]
    assert ask(answers, customer_id=customer).source == "personal"
    with closing(OnlineWriter(home)) as online, online.transaction():
        online.write("customer_consent", [Row(customer, {"is_personalization_allowed": False}, event_us=1_800_000_000_000_000)])
    assert said(ask(answers, customer_id=customer)) == ("popular", False, ["consent"])
    (home / "feature_store" / "online.db").unlink()
    assert said(ask(answers, customer_id=customer)) == ("popular", True, ["store_unavailable"])
