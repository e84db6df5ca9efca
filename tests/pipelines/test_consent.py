from datetime import UTC, datetime, timedelta

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import consent
from pipelines.sources import connect

START = datetime(2024, 1, 1, tzinfo=UTC)
COLUMNS = ["customer_id", "purpose", "is_allowed", "basis", "event_timestamp", "created_timestamp"]


def at(hour: int) -> pd.Timestamp:
    return pd.Timestamp(START + timedelta(hours=hour))


def told(*rows: tuple) -> pd.DataFrame:
    """customer, is_allowed, hour [, hour known [, basis]]; the purpose is personalization."""
    full = [(*row, *(row[2], consent.STATED)[len(row) - 3 :]) for row in rows]
    values = [(who, "personalization", allowed, basis, at(hour), at(known)) for who, allowed, hour, known, basis in full]
    return pd.DataFrame(values, columns=COLUMNS)


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
    return sorted((r[0], r[2], r[3], int((r[4] - START).total_seconds() // 3600)) for r in rows)


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


@settings(max_examples=20, deadline=None)
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
    short = pd.DataFrame(query(consent.changes_sql("told"), told=told(*said)), columns=["customer_id", "purpose", *COLUMNS[2:]])
    assert state(short, *asked) == [expected(*question) for question in asked]


def test_repeated_statements_are_one_row_per_change() -> None:
    consents = told(("c1", True, 1), ("c1", True, 2), ("c1", False, 3), ("c1", False, 4), ("c1", True, 5))
    assert [(hour, allowed) for _, allowed, _, hour in changes(consents)] == [(3, False), (1, True), (5, True)]


def test_a_declared_basis_stands_only_until_the_customers_own_word() -> None:
    declared = consent.DECLARED + "contract"
    consents = told(("c1", True, 0, 0, declared), ("c1", False, 3), ("c1", True, 6, 6, declared))
    assert [(hour, allowed) for _, allowed, _, hour in changes(consents)] == [(3, False), (0, True)]
    # The control: without a word of their own the later declaration is no change, and still stands.
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
    rows = pd.DataFrame({"customer_id": "c1", "event_timestamp": [at(h) for h in range(4)], "consent": [both, both, None, one]})
    rows["created_timestamp"] = rows["event_timestamp"]
    found = query(consent.statements_sql("said"), said=rows)
    assert [(r[1], r[2], (r[4] - START).total_seconds() / 3600) for r in found] == [
        ("ads", False, 0), ("ads", False, 3), ("personalization", False, 3), ("personalization", True, 0),
    ]  # fmt: skip


def test_only_the_word_true_is_a_permission() -> None:
    words = ['{"p":"true"}', '{"p":1}', '{"p":null}', '{"p":"yes"}', '{"p":{"a":true}}', '["p"]', "true", "nonsense", '{"p":true}']
    rows = pd.DataFrame({"customer_id": [f"c{i}" for i in range(len(words))], "event_timestamp": at(0), "consent": words})
    rows["created_timestamp"] = rows["event_timestamp"]
    assert [row[0] for row in query(consent.statements_sql("said"), said=rows) if row[2]] == ["c8"]


def test_a_statement_counts_for_us_from_when_it_was_known() -> None:
    # Said at 1 and known at 5; said at 3 and known at once: the older word changes nothing when it arrives.
    rows = query(consent.known_sql("told", purpose="personalization"), told=told(("c1", True, 1, 5), ("c1", False, 3, 3)))
    assert [(r[2], (r[1] - START).total_seconds() / 3600) for r in rows] == [(False, 3)]
    rows = query(consent.known_sql("told", purpose="personalization"), told=told(("c1", False, 1, 5), ("c1", True, 0, 0)))
    assert [(r[2], (r[1] - START).total_seconds() / 3600) for r in rows] == [(True, 0), (False, 5)]
