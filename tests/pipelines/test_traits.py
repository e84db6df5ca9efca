from datetime import UTC, datetime, timedelta

import duckdb
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import tables, traits

START = datetime(2026, 1, 1, tzinfo=UTC)
COLUMNS = ["customer_id", "trait", "value", "source", "event_timestamp", "created_timestamp"]


def at(day: float) -> pd.Timestamp:
    return pd.Timestamp(START + timedelta(days=day))


def word(
    value: str | None, day: float, *, source: str = "shop", known: float | None = None, trait: str = "region", who: str = "c"
) -> tuple:
    return (who, trait, value, source, at(day), at(day if known is None else known))


def profile(words: list[tuple], *, sources: tuple[str, ...] = ()) -> pd.DataFrame:
    frame = pd.DataFrame(words, columns=COLUMNS).astype({"value": "object"})
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'").register("words", frame)
        return db.sql(f"FROM ({traits.profile_sql('words', sources=sources)}) ORDER BY customer_id, event_timestamp").df()


def regions(words: list[tuple], *, sources: tuple[str, ...] = ()) -> list[tuple[pd.Timestamp, str]]:
    found = profile(words, sources=sources)
    return list(zip(found["event_timestamp"], found["region"], strict=True))


def test_the_newest_word_holds_where_no_source_is_trusted_more() -> None:
    words = [word("north", 0, source="a"), word("south", 2, source="b"), word("south", 3, source="a")]
    assert regions(words) == [(at(0), "north"), (at(2), "south")]


def test_a_trusted_source_holds_against_newer_words_of_others_and_yields_to_its_own() -> None:
    words = [word("north", 0, source="crm"), word("south", 2), word("west", 3, source="form"), word("east", 4, source="crm")]
    assert regions(words, sources=("crm", "form")) == [(at(0), "north"), (at(4), "east")]
    assert regions(words[1:], sources=("crm", "form")) == [(at(2), "south"), (at(3), "west"), (at(4), "east")]
    assert regions(words, sources=("form", "crm")) == [(at(0), "north"), (at(3), "west")]


def test_a_word_that_comes_late_changes_nothing_before_it_was_known() -> None:
    assert regions([word("south", 5), word("north", 1, known=9)]) == [(at(5), "south")]
    assert regions([word("south", 5), word("north", 6, known=9)]) == [(at(5), "south"), (at(9), "north")]
    assert regions([word("south", 5), word("north", 1, known=9, source="crm")], sources=("crm",)) == [(at(5), "south"), (at(9), "north")]


def test_traits_are_settled_one_by_one_and_people_apart() -> None:
    words = [
        word("north", 0),
        word("30-44", 1, trait="age_band"),
        word(None, 2),
        word("7", 2, trait="shoe_size"),
        word("south", 1, who="d"),
    ]
    found = profile(words)
    told = found[["customer_id", "event_timestamp", "age_band", "region"]].astype("object").where(found.notna(), None)
    assert told.to_numpy().tolist() == [["c", at(0), None, "north"], ["c", at(1), "30-44", "north"], ["d", at(1), None, "south"]]
    assert not found[["is_age_band_imputed", "is_gender_imputed", "is_region_imputed"]].to_numpy().any()
    assert found.columns.tolist() == tables.CUSTOMER_PROFILE.schema.names  # type: ignore[union-attr]


WORD = st.tuples(
    st.sampled_from("ab"), st.sampled_from(["age_band", "region"]), st.sampled_from("xyz"), st.sampled_from(["crm", "shop", "form"]),
    st.integers(0, 6), st.integers(0, 4),
)  # fmt: skip


@settings(max_examples=12)
@given(st.lists(WORD, max_size=12), st.randoms(use_true_random=False), st.sampled_from([(), ("crm",), ("form", "crm")]))
def test_the_profile_is_what_the_rule_says_of_the_words_known_so_far_in_any_order(drawn, random, sources) -> None:
    words = [(who, trait, value, source, at(day), at(day + delay)) for who, trait, value, source, day, delay in drawn]
    shuffled = random.sample(words, len(words))
    found = profile(shuffled, sources=sources)
    pd.testing.assert_frame_equal(found, profile(words, sources=sources))

    def rank(source: str) -> int:
        return sources.index(source) if source in sources else len(sources)

    for who in "ab":
        own = found[found["customer_id"] == who]
        for day in range(12):
            so_far = own[own["event_timestamp"] <= at(day)]
            for trait in ("age_band", "region"):
                known = [w for w in words if w[0] == who and w[1] == trait and max(w[4], w[5]) <= at(day)]
                best = min(known, key=lambda w: (rank(w[3]), -w[4].value, -ord(w[2])))[2] if known else None
                held = so_far.iloc[-1][trait] if len(so_far) else None
                assert (None if pd.isna(held) else held) == best
