from datetime import UTC, datetime, timedelta

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import consent, tables
from pipelines.sources import connect

START = datetime(2024, 1, 1, tzinfo=UTC)
COLUMNS = list(tables.CONSENTS.schema.names)


def at(hour: int) -> pd.Timestamp:
    return pd.Timestamp(START + timedelta(hours=hour))


def told(*rows: tuple, purpose: str = "personalization", policy: str = "1") -> pd.DataFrame:
    """customer, is_allowed, hour [, hour known [, basis]]; everybody has one identifier."""
    full = [(*row, *(row[2], consent.STATED)[len(row) - 3 :]) for row in rows]
    values = [
        (who, f"user_id:{who}", purpose, allowed, basis, "web", policy, f"m{hour}", at(hour), at(known))
        for who, allowed, hour, known, basis in full
    ]
    return pd.DataFrame(values, columns=COLUMNS)


def said(consents: list[str | None], *, hours: list[int] | None = None, customers: list[str] | None = None) -> pd.DataFrame:
    """Events that carry the consents, an hour apart, of one customer unless told otherwise."""
    hours = hours or list(range(len(consents)))
    rows = pd.DataFrame({"customer_id": customers or "c1", "event_timestamp": [at(h) for h in hours], "consent": consents})
    identifier = "user_id:" + rows["customer_id"]
    messages = [f"m{h}" for h in hours]
    return rows.assign(
        identifier=identifier, source="web", message_id=messages, policy_version="1", created_timestamp=rows["event_timestamp"]
    )


def state(consents: pd.DataFrame, *asked: tuple[str, int], purpose: str = "personalization") -> list[bool]:
    rows = pd.DataFrame({"customer_id": [who for who, _ in asked], "event_timestamp": [at(hour) for _, hour in asked]})
    return list(consent.state_at(consents, rows, purpose=purpose))


def query(sql: str, **frames: pd.DataFrame) -> list[tuple]:
    with connect() as db:
        for name, frame in frames.items():
            db.register(name, frame)
        return db.sql(f"SELECT * FROM ({sql}) ORDER BY ALL").fetchall()


def changes(consents: pd.DataFrame) -> list[tuple[str, bool, str, int]]:
    rows = query(consent.changes_sql("told"), told=consents)
    return sorted((r[0], r[3], r[4], int((r[8] - START).total_seconds() // 3600)) for r in rows)


def test_nothing_said_is_nothing_allowed() -> None:
    assert state(told(), ("c1", 5)) == [False]
    assert state(told(("c2", True, 0)), ("c1", 5)) == [False]


def test_a_permission_holds_from_its_instant_until_it_is_withdrawn() -> None:
    consents = told(("c1", True, 2), ("c1", False, 6))
    assert state(consents, *(("c1", hour) for hour in (1, 2, 5, 6, 9))) == [False, True, True, False, False]


def test_a_permission_is_for_its_purpose_alone() -> None:
    assert state(told(("c1", True, 2)), ("c1", 5), purpose="marketing") == [False]
    assert state(told(("c1", True, 2)), ("c1", 5), purpose="it's") == [False]


def test_of_two_statements_at_one_instant_the_refusal_holds() -> None:
    assert state(told(("c1", True, 2), ("c1", False, 2)), ("c1", 3)) == [False]


def test_a_missing_word_is_a_refusal() -> None:
    assert state(told(("c1", True, 0), ("c1", None, 2)), ("c1", 1), ("c1", 3)) == [True, False]


def test_answers_keep_the_order_of_the_questions() -> None:
    consents = told(*((f"c{i}", i % 3 == 0, 0) for i in range(50)))
    asked = [(f"c{i * 7 % 50}", 1) for i in range(50)]
    assert state(consents, *asked) == [int(who[1:]) % 3 == 0 for who, _ in asked]


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), st.integers(0, 9)), max_size=12),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 10)), min_size=1, max_size=12),
)
def test_the_state_is_that_of_the_latest_instant_with_a_word(said: list[tuple], asked: list[tuple[str, int]]) -> None:
    def expected(who: str, hour: int) -> bool:
        before = [(when, allowed) for person, allowed, when in said if person == who and when <= hour]
        return bool(before) and all(allowed for when, allowed in before if when == max(before)[0])

    assert state(told(*said), *asked) == [expected(*question) for question in asked]
    # One row per change says the same as all the rows.
    short = pd.DataFrame(query(consent.changes_sql("told"), told=told(*said)), columns=COLUMNS)
    assert state(short, *asked) == [expected(*question) for question in asked]


def test_repeated_statements_are_one_row_per_change() -> None:
    consents = told(("c1", True, 1), ("c1", True, 2), ("c1", False, 3), ("c1", False, 4), ("c1", True, 5))
    assert [(hour, allowed) for _, allowed, _, hour in changes(consents)] == [(3, False), (1, True), (5, True)]


def test_a_declared_basis_stands_only_until_the_customers_own_word() -> None:
    declared = consent.DECLARED + "contract"
    consents = told(("c1", True, 0, 0, declared), ("c1", False, 3), ("c1", True, 6, 6, declared))
    assert state(consents, *(("c1", hour) for hour in (1, 4, 7))) == [True, False, False]
    # The control: without a word of their own the later declaration is no change, and still stands.
    assert state(consents.iloc[[0, 2]], *(("c1", hour) for hour in (1, 4, 7))) == [True, True, True]
    assert [(hour, allowed) for _, allowed, _, hour in changes(consents.iloc[[0, 2]])] == [(0, True)]


def test_a_source_without_a_basis_does_not_live_on_anothers_declaration() -> None:
    declared = told(("c1", True, 0, 0, consent.DECLARED + "contract"))
    rows = pd.DataFrame({"customer_id": ["c1"], "event_timestamp": [at(5)]})
    strict = consent.allowed_sql("asked", "told", purpose="personalization", is_stated=True)
    lenient = consent.allowed_sql("asked", "told", purpose="personalization")
    assert [row[-1] for row in query(strict, asked=rows, told=declared)] == [False]
    assert [row[-1] for row in query(lenient, asked=rows, told=declared)] == [True]


def test_statements_on_events_become_rows_per_purpose_where_they_change() -> None:
    both, one = '{"personalization":true,"ads":false}', '{"personalization":false,"ads":false}'
    found = query(consent.statements_sql("said"), said=said([both, both, None, one]))
    assert [(r[2], r[3], (r[8] - START).total_seconds() / 3600) for r in found] == [
        ("ads", False, 0), ("ads", False, 3), ("personalization", False, 3), ("personalization", True, 0),
    ]  # fmt: skip


def test_only_the_word_true_is_a_permission() -> None:
    words = ['{"p":"true"}', '{"p":1}', '{"p":null}', '{"p":"yes"}', '{"p":{"a":true}}', '["p"]', "true", "nonsense", '{"p":true}']
    rows = said(words, customers=[f"c{i}" for i in range(len(words))])
    assert [row[0] for row in query(consent.statements_sql("said"), said=rows) if row[3]] == ["c8"]


def test_a_statement_counts_for_us_from_when_it_was_known() -> None:
    # Said at 1 and known at 5; said at 3 and known at once: the older word changes nothing when it arrives.
    rows = query(consent.known_sql("told", purpose="personalization"), told=told(("c1", True, 1, 5), ("c1", False, 3, 3)))
    assert [(r[2], (r[1] - START).total_seconds() / 3600) for r in rows] == [(False, 3)]
    rows = query(consent.known_sql("told", purpose="personalization"), told=told(("c1", False, 1, 5), ("c1", True, 0, 0)))
    assert [(r[2], (r[1] - START).total_seconds() / 3600) for r in rows] == [(True, 0), (False, 5)]


def test_a_statement_keeps_who_said_it_where_under_which_policy_and_in_which_message() -> None:
    rows = said(['{"personalization":true}'] * 2).assign(policy_version=["1", "2"])
    found = pd.DataFrame(query(consent.statements_sql("said"), said=rows), columns=COLUMNS)
    kept = found[["identifier", "source", "policy_version", "evidence"]].to_numpy().tolist()
    # The same word under a newer notice is a new statement.
    assert kept == [["user_id:c1", "web", "1", "m0"], ["user_id:c1", "web", "2", "m1"]]
    assert len(query(consent.changes_sql("told"), told=found)) == 2


def test_any_of_several_purposes_is_enough() -> None:
    both = pd.concat([told(("c1", False, 1), ("c1", True, 5)), told(("c1", True, 3), ("c1", False, 7), purpose="analytics")])
    asked = [("c1", hour) for hour in (0, 2, 4, 6, 8)]
    assert state(both, *asked, purpose=("personalization", "analytics")) == [False, False, True, True, True]
    assert state(both, *asked, purpose="personalization") == [False, False, False, True, True]


def test_what_came_after_a_refusal_of_every_purpose_is_refused() -> None:
    both = pd.concat([told(("c1", True, 1), ("c1", False, 4)), told(("c1", True, 3), ("c1", False, 7), purpose="analytics")])
    rows = pd.DataFrame({"customer_id": "c1", "event_timestamp": [at(hour) for hour in (0, 2, 5, 8)]})

    def refused(purpose: consent.Purpose) -> list[int]:
        found = query(consent.refused_sql("asked", "told", purpose=purpose), asked=rows, told=both)
        return [int((row[1] - START).total_seconds() // 3600) for row in found]

    assert refused("personalization") == [5, 8]
    assert refused(("personalization", "analytics")) == [8]
    assert refused("marketing") == []  # nothing allowed, but nobody took anything back either


def test_people_taken_for_one_and_told_apart_again_have_their_own_words() -> None:
    words = pd.concat([told(("a", True, 1)), told(("b", False, 2))])
    merged = pd.DataFrame(query(consent.changes_sql("told"), told=words.assign(customer_id="a")), columns=COLUMNS)
    assert state(merged, ("a", 3)) == [False]
    apart = merged.assign(customer_id=merged["identifier"].str.removeprefix("user_id:"))
    assert state(apart, ("a", 3), ("b", 3)) == [True, False]


def test_policies_count_the_customers_by_the_notice_they_agreed_to() -> None:
    words = pd.concat([told(("a", True, 1), ("b", True, 1)), told(("b", True, 2), ("c", True, 2), policy="2"), told(("d", False, 1))])
    declared = told(("e", True, 0, 0, consent.DECLARED + "contract")).assign(policy_version=None)
    people = pd.Series(["a", "b", "c", "d", "e", "f", "a"])
    found = consent.policies(pd.concat([words, declared]), people, purpose="personalization")
    assert found == {"1": 1, "2": 2, "declared: contract": 1, "none": 2}
