import json

import duckdb
import pandas as pd
import pytest

from pipelines.identity import agreement


def prepared(**fields: list[str | None]) -> pd.DataFrame:
    size = len(next(iter(fields.values())))
    with duckdb.connect() as db:
        agreement.prepare(db, pd.DataFrame({"identifier": [f"user_id:{n}" for n in range(size)], **fields}), max_block=2)
        return db.sql("SELECT * FROM prepared ORDER BY unique_id").df()


@pytest.mark.parametrize(
    ("field", "given", "compared"),
    [
        ("first_name", " Zoë-Anne ", "zoeanne"),
        ("last_name", "O'Brien", "obrien"),
        ("postcode", "SW1A 1AA", "sw1a1aa"),
        ("phone", "+49 (151) 234-56789", "123456789"),
        ("email", " Anna@Example.ORG", "anna@example.org"),
        ("date_of_birth", "1980-03-07", "19800307"),
        ("date_of_birth", "19800307", "19800307"),
        ("date_of_birth", "07.03.1980", "19800307"),
        ("date_of_birth", "1980-03-07T00:00:00Z", "19800307"),
        ("date_of_birth", "unknown", None),
        ("city", "---", None),
    ],
)
def test_equal_values_are_equal_however_they_are_written(field: str, given: str, compared: str | None) -> None:
    found = prepared(**{field: [given, None]})[field][0]
    assert (None if pd.isna(found) else found) == compared


@pytest.mark.parametrize(
    ("street", "number", "name"), [("12b High Street", "12b", "highstreet"), ("Hauptstr. 5", "5", "hauptstr"), ("Green", None, "green")]
)
def test_a_house_number_is_told_from_the_street(street: str, number: str | None, name: str) -> None:
    row = prepared(street=[street, None]).iloc[0]
    assert (None if pd.isna(row["house_number"]) else row["house_number"], row["street"]) == (number, name)


def test_a_key_that_many_share_brings_nobody_together() -> None:
    blocks = prepared(date_of_birth=["1980-01-01"] * 3 + ["1990-01-01"] * 2)["block_0"]
    assert blocks.isna().tolist() == [True] * 3 + [False] * 2


def test_evidence_names_levels_and_bits_and_no_value() -> None:
    people = pd.DataFrame(
        {
            "identifier": [f"user_id:{n}" for n in range(60)],
            "first_name": [f"{'abcdefghij'[n % 10] * 5}{n % 30}" for n in range(60)],
            "last_name": [f"{'klmnopqrst'[n % 10] * 5}{n % 30}" for n in range(60)],
            "date_of_birth": [f"19{50 + n % 30}-01-{10 + n % 10}" for n in range(60)],
            "city": [None] * 60,
        }
    )
    with duckdb.connect() as db:
        fields = agreement.prepare(db, people, max_block=50)
        model = agreement.train(db, fields, sample_pairs=10_000, prior_pairs=10, personal_bits=2, seed=1)
        found = agreement.score(db, model, fields, least=0.5)
    assert len(found) == 30
    for text in found["evidence"]:
        told = json.loads(text)
        assert set(told) == {"first_name", "last_name", "date_of_birth"}
        assert all(level in ("equal", "near", "close", "swapped", "differs") and isinstance(bits, float) for level, bits in told.values())
