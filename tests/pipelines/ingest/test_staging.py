import json
from contextlib import closing
from datetime import UTC, datetime, timedelta
from random import Random

import pyarrow as pa
import pytest

from pipelines.contract import CHECKED, validate
from pipelines.engine import connect
from pipelines.events import REASONS, TYPES
from pipelines.ingest import names, staging
from pipelines.settings import IngestSettings, Settings
from pipelines.sources import CANONICAL, RawBatch
from pipelines.sources.lines import REJECTED
from pipelines.vault import open_vault


def test_an_order_with_one_wrong_line_is_set_aside_whole(shop) -> None:
    bad = shop.order("m1")
    bad["properties"]["products"][1].pop("product_id")
    report = shop.run(bad, shop.order("m2", 1))
    assert report.reasons == {"item_missing": 1}
    assert list(shop.events()["event_id"]) == ["m2:0", "m2:1"]


def test_every_kind_of_bad_row_is_kept_with_its_reason_and_its_bytes(shop) -> None:
    def without(name: str) -> dict:
        return {key: value for key, value in shop.call("x").items() if key != name}

    view = {"product_id": "i1"}
    bad = {
        "not_json": '{"type":"track",',
        "type_unknown": shop.call("x") | {"type": "telemetry"},
        "event_id_missing": without("messageId"),
        "time_unreadable": shop.call("x") | {"timestamp": "yesterday at noon"},
        "time_in_future": shop.call("x") | {"timestamp": shop.at(500)},
        "time_too_old": shop.call("x") | {"timestamp": "1999-01-01"},
        "identifier_missing": shop.call("x", user=None),
        "item_missing": shop.call("x", properties={}),
        "quantity_invalid": shop.call("x", properties=view | {"quantity": -2}),
        "price_invalid": shop.call("x", properties=view | {"price": "9,99"}),
    }
    report = shop.run(shop.call("m1"), *bad.values())
    assert shop.adds_up(report)
    assert report.reasons == dict.fromkeys(bad, 1)
    kept = shop.quarantine().set_index("reason")
    for reason, line in bad.items():
        assert kept.loc[reason, "raw"].decode() == (line if isinstance(line, str) else json.dumps(line))
    assert list(kept["row"]) == list(range(2, 12))
    assert set(bad) <= set(REASONS)


def test_words_for_nobody_do_not_make_a_person(shop) -> None:
    words = ["null", "undefined", "Anonymous", " ", "[object Object]"]
    assert shop.run(shop.call("m"), *(shop.call(f"m{i}", user=word) for i, word in enumerate(words))).reasons == {
        "identifier_missing": len(words)
    }


# -- the rule in SQL and the declared one ------------------------------------------------------------------------------

VALUES = {
    "message_id": [None, "m", "m", "m"],
    "type": [*TYPES, None],
    "event_timestamp": [None, 0, 0, 10, -3_650 * 1_440 - 20, -9_000 * 1_440, -30_000 * 1_440],  # minutes after `START`
    "received_timestamp": [None, 0, -61, -59],
    "user_id": [None, "u", "null"],
    "anonymous_id": [None, "a"],
    "item_id": [None, "i", "i", " "],
    "order_id": [None, "o"],
    "quantity": [None, "1", "1", "", "0", "-1", "1.5", "x", "1000001"],
    "price": [None, "2.5", "2.5", "-1", "x", "1e12"],
    "consent": [None, "{}"],
}
START = datetime(2024, 3, 1, tzinfo=UTC)


def rows_drawn(random: Random, size: int) -> pa.Table:
    rows = []
    for number in range(1, size + 1):
        row = {name: random.choice(values) for name, values in VALUES.items()}
        times = {name: row[name] if row[name] is None else START + timedelta(minutes=row[name]) for name in VALUES if "timestamp" in name}
        rows.append(dict.fromkeys(CANONICAL.names) | row | times | {"row": number, "raw": str(number)})
    return pa.Table.from_pylist(rows, schema=CANONICAL)


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_refused_for_the_reasons_that_the_declared_rules_give_each_of_them(tmp_path, seed) -> None:
    """What staging shows to `contract.validate` is less than the rows: it has to be enough."""
    limits = IngestSettings()
    with closing(open_vault(tmp_path)) as vault, connect(tmp_path) as db:
        names.prepare(db, vault)
        staging.prepare(db)
        origin = staging.Origin(0, "s", "f", written=START + timedelta(days=1))
        batch = RawBatch("s", tmp_path, rows_drawn(Random(seed), 600), REJECTED.empty_table())
        refused = staging.stage(db, batch, origin, limits)
        whole = {"user_id": "CAST(user_no AS VARCHAR)", "anonymous_id": "CAST(anonymous_no AS VARCHAR)"}
        whole["created_timestamp"] = staging._judged_sql(origin)
        columns = ", ".join(f"{whole.get(name, name)} AS {name}" for name in CHECKED)
        staged = db.sql(f"SELECT {columns}, is_good FROM staged ORDER BY row").to_arrow_table()
    expected = validate(staged.select(CHECKED).to_pandas(types_mapper=staging.plain_type), limits).rejected
    told = {row["row"] - 1: why(row) for row in refused.to_pylist()}
    assert told == {row["index"]: why(row) for row in expected.to_dict("records")}
    assert staged["is_good"].to_pylist() == [number not in told for number in range(600)]
    assert 300 < len(told) < 600
    assert len({reason for reason, _ in told.values()}) > 10


def why(row: dict) -> tuple[str, str]:
    """The reason and its detail, where only one check gives that reason."""
    return row["reason"], "" if row["reason"] == "time_too_old" else row["detail"]


def test_no_batch_needs_the_columns_of_another(shop) -> None:
    """Columns are made when a batch first has something for them."""
    few = Settings(home=shop.home, ingest=IngestSettings(batch_rows=1_000))
    plain = [shop.call(f"m{n}", n / 60, context={}, properties={"product_id": "i"}) for n in range(1_000)]
    report = shop.run(
        shop.call("first", -1), *plain, shop.order("order", 50), shop.call("q", 51, event="Products Searched", properties={"query": "x"}),
        settings=few,
    )  # fmt: skip
    assert (report.stored, report.lines) == (1_003, 1_004)
    assert shop.events().set_index("event_id")["query"]["q"] == "x"
