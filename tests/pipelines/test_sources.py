import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import sources
from pipelines.errors import InputError
from pipelines.events import TYPES
from pipelines.sources import lines, mapping

MAPPING = """
[source]
name = "shop"
[time]
column = "at"
unit = "iso"
formats = ["%d.%m.%Y %H:%M"]
[columns]
user_id = "who"
type = "what"
item_id = "item"
price = "price?"
[types]
look = "view"
buy = "purchase"
[consent]
legal_basis = "contract"
purposes = ["personalization"]
"""
HEADER = "at,who,what,item\n"


@pytest.fixture
def write(tmp_path: Path):
    def _write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write


@pytest.fixture
def shop(write) -> sources.Mapping:
    return sources.load_mapping(write("shop.toml", MAPPING))


def rows(path: Path, plan: sources.Mapping | None, *, batch_rows: int = 1000) -> tuple[list[dict], list[dict]]:
    good, bad = [], []
    for batch in sources.read([path], plan, batch_rows=batch_rows):
        assert batch.rows.schema == sources.CANONICAL
        assert batch.rows.num_rows <= batch_rows
        good += batch.rows.to_pylist()
        bad += batch.rejected.to_pylist()
    return good, bad


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[arg-type, misc]


# -- tables ------------------------------------------------------------------------------------------------------------


def test_a_csv_comes_out_in_our_names_with_its_line_numbers_and_text(write, shop) -> None:
    path = write("a.csv", HEADER + "2024-03-01T10:00:00Z,u1,look,i1\n\n2024-03-01 12:00:00+02:00, u2 ,buy,i2\n")
    first, second = rows(path, shop)[0]
    assert (first["row"], first["raw"]) == (2, "2024-03-01T10:00:00Z,u1,look,i1")
    assert (first["type"], first["name"], first["item_id"], first["user_id"]) == ("view", "look", "i1", "u1")
    assert (second["row"], second["user_id"]) == (4, "u2")
    assert first["event_timestamp"] == second["event_timestamp"] == utc(2024, 3, 1, 10)


@pytest.mark.parametrize("form", ["plain", "gz", "crlf", "bom", "tsv", "quoted"])
def test_the_way_a_csv_is_written_does_not_matter(write, shop, form: str) -> None:
    text = HEADER + "2024-03-01,u1,look,i1\n2024-03-02,u2,buy,i2"
    contents = {
        "plain": ("a.csv", text.encode()),
        "gz": ("a.csv.gz", gzip.compress(text.encode())),
        "crlf": ("a.csv", text.replace("\n", "\r\n").encode()),
        "bom": ("a.csv", b"\xef\xbb\xbf" + text.encode()),
        "tsv": ("a.tsv", text.replace(",", "\t").encode()),
        "quoted": ("a.csv", text.replace("look", '"look"').encode()),
    }
    good, bad = rows(write(*contents[form]), shop)
    found = [(r["row"], r["event_timestamp"], r["user_id"], r["type"], r["item_id"]) for r in good]
    assert found == [(2, utc(2024, 3, 1), "u1", "view", "i1"), (3, utc(2024, 3, 2), "u2", "purchase", "i2")]
    assert bad == []


def test_lines_that_are_no_rows_are_set_aside_with_their_text_and_the_others_are_read(write, shop) -> None:
    good_line = b"2024-03-01,u1,look,i1\n"
    broken = [b"2024-03-01,u1\n", b'2024-03-01,"u1,look,i1\n', b"2024-03-01,u\xff,look,i1\n", b"2024-03-01,u1,look,i1,extra\n"]
    path = write("a.csv", HEADER.encode() + good_line + b"".join(line + good_line for line in broken))
    good, bad = rows(path, shop)
    assert [r["row"] for r in good] == [2, 4, 6, 8, 10]
    found = {r["row"]: (r["reason"], r["raw"]) for r in bad}
    assert found == {
        3: ("column_count", "2024-03-01,u1"),
        5: ("unbalanced_quotes", '2024-03-01,"u1,look,i1'),
        7: ("not_text", "2024-03-01,u\\xff,look,i1"),
        9: ("column_count", "2024-03-01,u1,look,i1,extra"),
    }


def test_a_file_without_a_header_takes_its_names_from_the_mapping(write) -> None:
    path = write("a.csv", "1,2,3,pv,1511658000\n4,5,6,nope,1511658001\n")
    good, _ = rows(path, sources.load_mapping("taobao"))
    assert [(r["user_id"], r["item_id"], r["category"], r["type"], r["name"]) for r in good] == [
        ("1", "2", "3", "view", "pv"), ("4", "5", "6", None, "nope"),
    ]  # fmt: skip


@pytest.mark.parametrize(("factor", "unit"), [(1, "s"), (1_000, "ms"), (1_000_000, "us")])
def test_unix_times_are_read_in_the_unit_of_their_magnitude(write, factor: int, unit: str) -> None:
    lines_ = "".join(f"{(1_430_623_510 + i) * factor},{i},view,{i},\n" for i in range(5))
    path = write("events.csv", "timestamp,visitorid,event,itemid,transactionid\n" + lines_)
    (batch,) = sources.read([path], sources.load_mapping("retailrocket"), batch_rows=1000)
    assert batch.unit == unit
    assert batch.rows["event_timestamp"][0].as_py() == utc(2015, 5, 3, 3, 25, 10)


def test_a_time_that_is_none_is_null_and_the_row_stays(write, shop) -> None:
    words = ["yesterday", "2024-13-01", "infinity", "1700000000", "", "01.03.2024 10:00"]
    good, bad = rows(write("a.csv", HEADER + "".join(f"{word},u,look,i\n" for word in words)), shop)
    assert [r["event_timestamp"] for r in good] == [None] * 5 + [utc(2024, 3, 1, 10)]
    assert bad == []


def test_a_file_wrong_by_one_unit_in_one_row_loses_that_row_alone(write) -> None:
    times = ["1430623510"] * 3 + ["1430623510000", "-5", "x"]
    path = write("e.csv", "timestamp,visitorid,event,itemid\n" + "".join(f"{t},1,view,2\n" for t in times))
    good, _ = rows(path, sources.load_mapping("retailrocket"))
    assert [r["event_timestamp"] is None for r in good] == [False] * 3 + [True] * 3


def test_parquet_and_csv_of_the_same_rows_agree(write, shop, tmp_path) -> None:
    table = pa.table({"at": pa.array([utc(2024, 3, 1)], pa.timestamp("us")), "who": [17.0], "what": ["buy"], "item": [5], "price": [2.5]})
    pq.write_table(table, tmp_path / "a.parquet")
    (from_parquet,), _ = rows(tmp_path / "a.parquet", shop)
    (from_csv,), _ = rows(write("a.csv", "at,who,what,item,price\n2024-03-01,17,buy,5,2.5\n"), shop)
    own = ("row", "raw", "message_id")
    assert {k: v for k, v in from_parquet.items() if k not in own} == {k: v for k, v in from_csv.items() if k not in own}
    assert json.loads(from_parquet["raw"]) == {"at": "2024-03-01 00:00:00", "who": 17.0, "what": "buy", "item": 5, "price": 2.5}


def test_a_row_without_an_id_is_named_by_its_content(write, shop) -> None:
    line, other = "2024-03-01,u1,look,i1\n", "2024-03-01,u1,look,i2\n"
    one, two, three = (r["message_id"] for r in rows(write("a.csv", HEADER + line + other + line), shop)[0])
    assert one == three != two


def test_returns_are_told_by_their_rule_and_counted_positively(write) -> None:
    header = "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,Customer ID,Country\n"
    path = write(
        "ii.csv", (header + "C5,i,caf\xe9,-3,12/1/2010 8:26,2.55,17850.0,UK\n6,i,x,3,2010-12-01 08:26:00,2.55,17850,UK\n").encode("latin-1")
    )
    (back, bought), bad = rows(path, sources.load_mapping("online_retail"))
    assert (back["type"], back["quantity"], bought["type"], bought["quantity"]) == ("return", "3", "purchase", "3")
    assert back["user_id"] == bought["user_id"] == "17850"
    assert back["event_timestamp"] == bought["event_timestamp"] == utc(2010, 12, 1, 8, 26)
    assert (back["region"], bad) == ("UK", [])


def test_rees46_rows_are_read(write) -> None:
    header = "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session\n"
    path = write("2019-Oct.csv", header + "2019-10-01 00:00:00 UTC,cart,44600062,210,a.b,x,35.79,541312140,72d76fde\n")
    (row,), _ = rows(path, sources.load_mapping("rees46"))
    assert (row["event_timestamp"], row["type"], row["price"], row["session_id"]) == (utc(2019, 10, 1), "cart_add", "35.79", "72d76fde")


# -- JSON --------------------------------------------------------------------------------------------------------------


def segment(**fields: object) -> dict:
    return {"type": "track", "event": "Product Viewed", "messageId": "m1", "userId": "u1", "timestamp": "2024-03-01T10:00:00.5Z", **fields}


def test_segment_calls_come_out_in_our_names(write) -> None:
    context = {"consent": {"categoryPreferences": {"personalization": True}}, "sessionId": 12}
    calls = [
        segment(properties={"product_id": "i1", "price": 9.99, "category": "books", "decision_id": "d1"}, context=context),
        segment(event="Products Searched", properties={"query": "blue, red"}, receivedAt="2024-03-01T10:00:02Z"),
        segment(event="Something Else"),
        {
            "type": "identify",
            "messageId": "m",
            "anonymousId": "a1",
            "timestamp": "2024-03-01",
            "traits": {"email": "A@b.c", "age_band": "18-24"},
        },
        {"type": "alias", "messageId": "m", "previousId": "a0", "userId": 7, "timestamp": "2024-03-01"},
        {"type": "page", "name": "Home", "messageId": "m", "anonymousId": "a1", "receivedAt": "2024-03-01"},
        {"type": "telemetry", "messageId": "m"},
        segment(event="Order Completed", properties={"order_id": "o", "products": [{"product_id": "i", "quantity": 2}]}),
    ]
    good, bad = rows(write("s.jsonl", "\n".join(map(json.dumps, calls))), None)
    view, search, custom, identify, alias, page, unknown, order = good
    assert bad == []
    assert [r["type"] for r in good] == ["view", "search", "custom", "identify", "identify", "page", None, "purchase"]
    assert (view["item_id"], view["price"], view["category"], view["decision_id"], view["session_id"]) == (
        "i1",
        "9.99",
        "books",
        "d1",
        "12",
    )
    assert json.loads(view["consent"]) == {"personalization": True}
    assert view["event_timestamp"] == utc(2024, 3, 1, 10, 0, 0, 500_000)
    assert (view["received_timestamp"], search["received_timestamp"]) == (None, utc(2024, 3, 1, 10, 0, 2))
    assert (search["query"], custom["name"], page["name"], unknown["name"]) == ("blue, red", "Something Else", "Home", "telemetry")
    assert (identify["email"], identify["age_band"], identify["anonymous_id"]) == ("A@b.c", "18-24", "a1")
    assert (alias["anonymous_id"], alias["user_id"]) == ("a0", "7")
    assert page["event_timestamp"] == utc(2024, 3, 1)
    assert json.loads(order["products"]) == [{"product_id": "i", "quantity": 2}]


def test_lines_that_are_no_json_objects_are_set_aside_with_their_text(write) -> None:
    broken = ['{"type":"track"', "[1]", '"x"', "12", "null", '{"a":1}{"b":2}', '{"userId":"\\ud800"}', "hello"]
    good_line = json.dumps(segment())
    good, bad = rows(write("s.jsonl", "\n".join(line for text in broken for line in (good_line, text))), None)
    assert len(good) == len(broken)
    assert [(r["row"], r["reason"], r["raw"]) for r in bad] == [(2 * i + 2, "not_json", text) for i, text in enumerate(broken)]


def test_values_of_odd_types_are_no_failure(write) -> None:
    odd = [
        segment(properties=value, context=value, traits=value, userId=value, timestamp=value)
        for value in (1, "x", [], None, {"a": {}}, True)
    ]
    good, bad = rows(write("s.jsonl", "\n".join(map(json.dumps, odd))), None)
    assert (len(good), bad) == (len(odd), [])


def test_a_json_array_is_read_as_its_lines_are(write) -> None:
    calls = [segment(messageId=f"m{i}") for i in range(2_500)]
    from_lines, _ = rows(write("s.jsonl", "\n".join(json.dumps(call, separators=(",", ":")) for call in calls)), None)
    from_array, _ = rows(write("s.json", json.dumps(calls, indent=1)), None)
    assert [r["message_id"] for r in from_array] == [r["message_id"] for r in from_lines] == [f"m{i}" for i in range(2_500)]


def test_mapped_json_is_found_by_key_and_by_path(write) -> None:
    text = MAPPING.replace('"who"', '"customer.id"').replace('"item"', '"item.sku?"')
    plan = sources.load_mapping(write("nested.toml", text))
    lines_ = [
        '{"at":"2024-03-01","customer":{"id":"u1"},"what":"look","item":{"sku":"i1"}}',
        '{"at":"2024-03-01","customer":{"id":2},"what":"buy"}',
    ]
    good, _ = rows(write("n.jsonl", "\n".join(lines_)), plan)
    assert [(r["user_id"], r["item_id"], r["type"]) for r in good] == [("u1", "i1", "view"), ("2", None, "purchase")]


def test_a_mapped_key_that_no_object_has_is_refused(write, shop) -> None:
    with pytest.raises(InputError, match=r"\[columns\] item_id expects the column item in .*which has at, what, who"):
        rows(write("n.jsonl", '{"at":"2024-03-01","who":"u1","what":"look"}'), shop)


# -- order, size, lines ------------------------------------------------------------------------------------------------


def test_rows_keep_the_files_order_beside_their_text_however_they_are_cut(write, shop) -> None:
    n = 45_000  # several of DuckDB's chunks, which it may read on several threads
    path = write("a.csv", HEADER + "".join(f"2024-03-01,u{i},look,i\n" for i in range(n)))
    for batch_rows in (n, 10_007):
        seen = 0
        for batch in sources.read([path], shop, batch_rows=batch_rows):
            for name, prefix in (("user_id", "u"), ("raw", "2024-03-01,u")):
                expected = [f"{prefix}{i}" + (",look,i" if name == "raw" else "") for i in range(seen, seen + len(batch.rows))]
                assert batch.rows[name].to_pylist() == expected
            seen += len(batch.rows)
        assert seen == n


LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=12).map(str.encode) | st.binary(max_size=6)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 16)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 20)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINE.filter(lambda line: b"\n" not in line), max_size=12), st.integers(1, 5))
def test_every_line_comes_out_once_with_its_number_whatever_the_blocks(
    tmp_path, small_blocks, written: list[bytes], batch_rows: int
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\n".join(written))
    found: dict[int, tuple[str, str | None]] = {}
    for part in lines.read_lines(path, batch_rows=batch_rows):
        new = [(row, ("good", text)) for row, text in zip(part.row.to_pylist(), part.text.to_pylist(), strict=True)]
        new += [(r["row"], (r["reason"], None)) for r in part.rejected.to_pylist()]
        assert not {row for row, _ in new} & set(found)
        found |= dict(new)
    expected: dict[int, tuple[str, str | None]] = {}
    for number, line in enumerate(b"\n".join(written).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if len(line) + 1 > 20:
            expected[number] = ("too_long", None)
            continue
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            expected[number] = ("not_text", None)
        else:
            if text:
                expected[number] = ("good", text)
    assert found == expected


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_refused_in_one_sentence(write, shop, tmp_path) -> None:
    pq.write_table(pa.table({"at": ["x"] * 5000}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    cases = {
        tmp_path / "none.csv": "could not be opened",
        tmp_path: "expected a file, found the folder",
        write("empty.csv", ""): "the file is empty",
        write("blank.csv", "\n\n"): "is empty",
        write("header.csv", HEADER): "found none",
        write("fake.parquet", "hello"): "without its mark",
        write("cut.parquet", whole[: len(whole) // 2]): "damaged",
        write("a.xml", "<a/>"): "not supported yet",
        write("cut.csv.gz", gzip.compress(HEADER.encode() * 500)[:40]): "could not be read to its end",
        write("names.csv", "at,who,kind\n1,2,3\n"): r"type expects the column what in .*which has at, who, kind",
        write("twice.csv", "at,at\n1,2\n"): "distinct names",
        write("bad.json", '[{"a":1}, {"b"'): "expected a JSON array",
    }
    for path, words in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            rows(path, shop)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet"])
def test_a_table_without_a_mapping_is_refused(write, name: str) -> None:
    with pytest.raises(InputError, match="--mapping"):
        rows(write(name, "a,b\n1,2\n"), None)


def test_a_later_wrong_path_is_refused_before_the_first_row_is_read(write, shop, tmp_path) -> None:
    good = write("a.csv", HEADER + "2024-03-01,u1,look,i1\n")
    with pytest.raises(InputError, match=r"none\.csv"):
        next(sources.read([good, tmp_path / "none.csv"], shop, batch_rows=1000))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "shop"', "name = 5", r"\[source\] name: .*found 5 \(int\)"),
        ('unit = "iso"', 'unit = "sec"', r"\[time\] unit: .*'unix' or 'iso'.*found 'sec'"),
        ('unit = "iso"', "", r"\[time\] unit: expected a value; found nothing"),
        ('name = "shop"', 'name = "shop"\ncolour = "red"', r"\[source\] colour: expected one of name, format.*unknown key colour"),
        ("[types]", "[kinds]\n[types]", r"kinds: expected one of source, time.*unknown key kinds"),
        ('user_id = "who"', "user_id = 7", r"\[columns\] user_id: .*found 7 \(int\)"),
        ('user_id = "who"', 'userid = "who"', r"columns: expected names among message_id.*found userid"),
        ('user_id = "who"', "", r"user_id, anonymous_id or email"),
        ('look = "view"', 'look = "glance"', r"types: expected one of view.*found glance"),
        ('purposes = ["personalization"]', "purposes = []", r"\[consent\] purposes"),
        ('legal_basis = "contract"', "", r"\[consent\] legal_basis: expected a value"),
        ("[time]", "[time", r"expected TOML"),
    ],
)
def test_a_mapping_with_a_mistake_says_which_key_and_what_was_expected(write, old: str, new: str, words: str) -> None:
    assert old in MAPPING
    with pytest.raises(InputError, match=words) as caught:
        sources.load_mapping(write("m.toml", MAPPING.replace(old, new, 1)))
    assert "m.toml" in str(caught.value)


def test_a_mapping_that_is_nowhere_names_the_shipped_ones() -> None:
    with pytest.raises(InputError, match="online_retail, rees46, retailrocket, taobao"):
        sources.load_mapping("amazon")


@pytest.mark.parametrize("name", sorted(path.stem for path in mapping.SHIPPED.glob("*.toml")))
def test_shipped_mappings_load_declare_a_basis_and_lead_to_known_types(name: str) -> None:
    plan = sources.load_mapping(name)
    assert plan.source.name == name
    assert plan.consent is not None
    assert set(plan.types.values()) <= set(TYPES)


def test_nothing_is_fetched_from_the_network_by_the_reader() -> None:
    with sources.connect() as db:
        found = db.sql("SELECT name, value FROM duckdb_settings() WHERE name LIKE 'auto%known_extensions' ORDER BY name").fetchall()
    assert found == [("autoinstall_known_extensions", "false"), ("autoload_known_extensions", "false")]


# -- the real files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name", "expected", "unit"),
    [
        ("retailrocket_subset/events.parquet", "retailrocket", 97_381, "s"),
        ("online_retail/online_retail.parquet", "online_retail", 541_909, None),
        ("taobao_userbehavior_2h/UserBehavior.csv.gz", "taobao", 110_300, "s"),
    ],
)
def test_the_real_files_are_read_to_the_last_row(shared_data: Path, file: str, name: str, expected: int, unit: str | None) -> None:
    if not (shared_data / file).is_file():
        pytest.skip(f"{file} is not at {shared_data}")
    batches = list(sources.read([shared_data / file], sources.load_mapping(name), batch_rows=250_000))
    assert sum(len(batch.rows) for batch in batches) == expected
    assert sum(len(batch.rejected) for batch in batches) == 0
    assert {batch.unit for batch in batches} == {unit}
    assert all(batch.rows[column].null_count == 0 for batch in batches for column in ("type", "event_timestamp", "message_id"))
