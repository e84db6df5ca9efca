import csv
import gzip
import hashlib
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import sources
from pipelines.errors import InputError
from pipelines.events import TYPES
from pipelines.sources import lines, mapping, projection, records

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


def test_the_id_of_a_parquet_row_is_the_hash_of_its_json(write, shop, tmp_path) -> None:
    pq.write_table(pa.table({"at": ["2024-03-01"], "who": ["ü'\""], "what": ["buy"], "item": [5], "más": [None]}), tmp_path / "a.parquet")
    (row,), _ = rows(tmp_path / "a.parquet", shop)
    assert row["raw"] == '{"at":"2024-03-01","who":"ü\'\\"","what":"buy","item":5,"más":null}'
    assert row["message_id"] == hashlib.md5(row["raw"].encode()).hexdigest()


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


# -- records over several lines ----------------------------------------------------------------------------------------


def test_a_quoted_text_may_span_lines_and_the_record_has_the_number_of_its_first(write, shop) -> None:
    text = '2024-03-01,"a, ""b""\n\nc\n",look,i1\n2024-03-02,u2,"look",i2\n2024-03-03,"x\r\ny",look,"i\n3"\n2024-03-04,u4,look,i4\n'
    good, bad = rows(write("a.csv", HEADER + text), shop)
    assert [(r["row"], r["user_id"], r["item_id"]) for r in good] == [
        (2, 'a, "b"\n\nc\n', "i1"), (6, "u2", "i2"), (7, "x\ny", "i\n3"), (10, "u4", "i4"),
    ]  # fmt: skip
    assert good[0]["raw"] == '2024-03-01,"a, ""b""\n\nc\n",look,i1'
    assert bad == []


@pytest.mark.parametrize(
    "stray",
    ['2024-03-01,"u1,look,i1', '2024-03-01,u"1,"look,i1', '"2024-03-01,u1,look,i1', '2024-03-01,u1,look,"i""1'],
)
def test_a_stray_quote_costs_its_own_line_alone_even_where_another_follows(write, shop, stray: str) -> None:
    lines_ = [stray if number in (10, 400) else f"2024-03-01,u{number},look,i{number}" for number in range(2, 700)]
    for batch_rows in (1_000, 130):
        good, bad = rows(write("a.csv", HEADER + "\n".join(lines_)), shop, batch_rows=batch_rows)
        assert [r["row"] for r in good] == [number for number in range(2, 700) if number not in (10, 400)]
        assert [(r["row"], r["reason"], r["raw"]) for r in bad] == [(10, "unbalanced_quotes", stray), (400, "unbalanced_quotes", stray)]


def test_two_stray_quotes_that_would_make_a_record_of_the_rows_between_are_told_by_those_rows(write, shop) -> None:
    between = [f"2024-03-01,u{i},look,i{i}" for i in range(3)]
    good, bad = rows(write("a.csv", HEADER + "\n".join(['2024-03-01,"u,look,i', *between, '2024-03-01,u",look,i'])), shop)
    assert [r["user_id"] for r in good] == ["u0", "u1", "u2", 'u"']
    assert [r["row"] for r in bad] == [2]


CELL = st.text(st.sampled_from('ab, \n"'), max_size=4)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(CELL, min_size=2, max_size=2), min_size=1, max_size=8), st.integers(1, 4), st.integers(2, 40))
def test_what_a_csv_writer_writes_is_read_back_whatever_the_blocks(tmp_path, monkeypatch, cells, batch_rows: int, block: int) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([number, "x" + one, two] for number, (one, two) in enumerate(cells))
    form = records.Form(("number", "one", "two"), ",")
    found, refused = [], 0
    for part in records.read_records(lines.read_lines(path, batch_rows=batch_rows), form, batch_rows=batch_rows):
        assert len(part.row) <= batch_rows
        table, rejected = records.parse(part, form)
        found += table.select(["number", "one", "two"]).to_pylist()
        refused += len(rejected)
    written = [{"number": str(number), "one": "x" + one, "two": two} for number, (one, two) in enumerate(cells)]
    # A text may hold lines that look like the file's own: then its record is the one thing that is refused.
    assert [row for row in found if row in written] == [row for row in written if row in found]
    if not any(text.count(",") >= 2 for one, two in cells for text in (one, two)):
        assert (found, refused) == (written, 0)


# -- XML ---------------------------------------------------------------------------------------------------------------

XML = MAPPING.replace('name = "shop"', 'name = "shop"\nrow = "event"').replace('"who"', '"customer.id"').replace('"item"', '"item.sku"')


@pytest.fixture
def marked(write) -> sources.Mapping:
    return sources.load_mapping(write("xml.toml", XML))


def event(number: int, what: str = "look", more: str = "") -> str:
    return f'<event at="2024-03-01"><customer><id>u{number}</id></customer><what>{what}</what><item sku="i&amp;{number}"/>{more}</event>'


def test_xml_rows_have_their_attributes_and_children_as_columns(write, marked) -> None:
    days = f"<day>{event(1)}</day><day>{event(2, 'buy', '<price>2.5</price>')}</day>"
    text = f'<?xml version="1.0"?><x:all xmlns:x="urn:x"><meta/>{days}</x:all>'
    for path in (write("a.xml", text), write("a.xml.gz", gzip.compress(text.encode()))):
        good, bad = rows(path, marked)
        assert [(r["row"], r["user_id"], r["type"], r["item_id"], r["price"]) for r in good] == [
            (1, "u1", "view", "i&1", None), (2, "u2", "purchase", "i&2", "2.5"),
        ]  # fmt: skip
        assert good[0]["event_timestamp"] == utc(2024, 3, 1)
        assert good[0]["raw"].startswith('<event at="2024-03-01">') or good[0]["raw"].startswith("<event xmlns")
        assert bad == []


def test_an_optional_column_that_only_later_rows_have_is_read(write, marked, shop) -> None:
    first, second = event(1), event(2, more="<price>3</price>")
    good, _ = rows(write("a.xml", f"<all>{first}{second}</all>"), marked, batch_rows=1)
    assert [r["price"] for r in good] == [None, "3"]
    calls = [{"at": "2024-03-01", "who": "u", "what": "look", "item": "i"} | ({"price": 3} if n > 1_500 else {}) for n in range(2_000)]
    good, _ = rows(write("a.jsonl", "\n".join(map(json.dumps, calls))), shop)
    assert [r["price"] for r in good] == [None] * 1_501 + ["3"] * 499


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10 if n else "ha" * 50}">' for n in range(9))


@pytest.mark.parametrize(
    "declared",
    [
        f"<!DOCTYPE all [{LAUGHS}]>",
        '<!DOCTYPE all [<!ENTITY l8 SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE all SYSTEM "http://127.0.0.1:9/x.dtd">',
        "<!DOCTYPE all [<!ENTITY % p \"<!ENTITY l8 'x'>\"> %p;]>",
    ],
)
def test_xml_with_a_grammar_of_its_own_is_refused_before_anything_is_expanded(write, marked, declared: str) -> None:
    path = write("a.xml", f"{declared}<all><event><what>{'&l8;' if 'l8' in declared else ''}</what></event></all>")
    with pytest.raises(InputError, match=r"found a DOCTYPE|found something else"):
        rows(path, marked)


def test_xml_that_breaks_off_is_refused_and_so_is_one_without_rows(write, marked) -> None:
    with pytest.raises(InputError, match="expected XML in"):
        rows(write("cut.xml", f"<all>{event(1)}{event(2)[:30]}"), marked)
    with pytest.raises(InputError, match="found none"):
        rows(write("none.xml", "<all><other/></all>"), marked)


def test_flat_rows_are_read_whatever_signs_are_in_them_and_the_first_of_two_equal_names_counts(write) -> None:
    plan = sources.load_mapping(write("flat.toml", MAPPING.replace('name = "shop"', 'name = "shop"\nrow = "e"')))
    rest = "<what>look</what><item>i</item><price>1</price><price>2</price></e>"
    users = ["u1", "u=1", "u1<!-- = -->", "<![CDATA[u&1]]>", "u<?go on?><!-- -->1", "", "&#252;"]
    good, _ = rows(write("a.xml", "<all>" + "".join(f"<e><at>2024-03-01</at><who>{who}</who>{rest}" for who in users) + "</all>"), plan)
    assert [r["user_id"] for r in good] == ["u1", "u=1", "u1", "u&1", "u1", None, "ü"]
    assert {r["price"] for r in good} == {"1"}


PEAK = """
import sys
from pathlib import Path
from pipelines.sources import elements

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))

for forget in (elements._forget, elements._forget, lambda element: None):
    elements._forget, before = forget, peak()
    rows = sum(len(table) for table in elements.read_elements(Path(sys.argv[1]), "e", batch_rows=20))
    print(rows, (peak() - before) // 1024)
"""


def test_a_long_xml_file_is_read_in_constant_memory(write) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell the memory a process used at most")
    path = write("long.xml", "<all>" + f"<day><e><t>{'x' * 20_000}</t></e></day>" * 1_500 + "</all>")
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True, timeout=60)
    _, freed, kept = (tuple(map(int, line.split())) for line in done.stdout.splitlines())  # the first warms the allocators up
    assert freed[0] == kept[0] == 1_500
    assert freed[1] < 5 < 15 < kept[1]  # of the 30 MB that the file holds


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


def test_what_a_call_says_of_a_person_comes_out_as_direct_traits(write) -> None:
    calls = [
        {
            "type": "identify",
            "messageId": "1",
            "userId": "u",
            "traits": {
                "firstName": "Ann",
                "last_name": 'Lee "L"',
                "phone": "+49 1",
                "birthday": "1990-01-01",
                "address": {"street": "A 1", "city": "B", "postalCode": "012", "country": "DE"},
            },
            "context": {"consent": {"categoryPreferences": {"a": True}, "policyVersion": 3}},
        },
        {"type": "identify", "messageId": "2", "userId": "u", "traits": {"address": "Somewhere 3", "first_name": "  "}},
        segment(properties={"name": "A product, no person", "policyVersion": "2"}, context={"traits": {"name": "Bo", "zip": 123}}),
        segment(),
    ]
    identify, plain, view, nothing = rows(write("s.jsonl", "\n".join(map(json.dumps, calls))), None)[0]
    assert json.loads(identify["direct"]) == {
        "first_name": "Ann", "last_name": 'Lee "L"', "street": "A 1", "city": "B", "postcode": "012", "date_of_birth": "1990-01-01",
    }  # fmt: skip
    assert (identify["phone"], identify["policy_version"]) == ("+49 1", "3")
    assert (json.loads(plain["direct"]), view["policy_version"]) == ({"address": "Somewhere 3"}, "2")
    assert json.loads(view["direct"]) == {"name": "Bo", "postcode": "123"}
    assert (nothing["direct"], nothing["phone"], nothing["policy_version"]) == (None, None, None)


def test_a_mapping_names_direct_traits_phone_and_policy_version(write) -> None:
    text = MAPPING.replace("[types]", 'phone = "tel"\npolicy_version = "policy?"\n[direct]\nname = "full"\ncity = "town?"\n[types]')
    plan = sources.load_mapping(write("direct.toml", text))
    good, _ = rows(write("d.csv", "at,who,what,item,tel,full\n2024-03-01,u1,look,i1,+49 1,Ann\n2024-03-01,u1,look,i1,,\n"), plan)
    assert [(r["phone"], r["name"], r["policy_version"]) for r in good] == [("+49 1", "look", None), (None, "look", None)]
    assert [r["direct"] for r in good] == ['{"name":"Ann"}', None]
    with pytest.raises(InputError, match=r"\[direct\] name expects the column full"):
        rows(write("e.csv", "at,who,what,item,tel\n2024-03-01,u1,look,i1,1\n"), plan)


def test_an_order_without_its_lines_is_one_piece_at_its_own_amount(write) -> None:
    def order(name: str, **properties: object) -> dict:
        return segment(event=name, properties={"order_id": "o", **properties})

    calls = [
        order("Order Completed", revenue=30.5, quantity=3),
        order("Order Completed", total=40, products=[]),
        order("Order Completed", revenue=9, products=[{"product_id": "i"}]),
        order("Order Refunded", total=12),
        order("Order Completed", product_id="i", quantity=2, price=3, revenue=6),
        order("Order Completed"),
    ]
    good, _ = rows(write("s.jsonl", "\n".join(map(json.dumps, calls))), None)
    assert [(r["price"], r["quantity"]) for r in good] == [
        ("30.5", None),
        ("40", None),
        (None, None),
        ("12", None),
        ("3", "2"),
        (None, None),
    ]


def test_a_purchase_that_does_not_say_how_many_where_the_file_does_is_marked(write) -> None:
    plan = sources.load_mapping(write("q.toml", MAPPING.replace('price = "price?"', 'price = "price?"\nquantity = "n?"')))
    lines_ = "2024-03-01,u,buy,i,\n2024-03-01,u,look,i,\n2024-03-01,u,buy,i,2\n"
    assert [r["quantity"] for r in rows(write("a.csv", "at,who,what,item,n\n" + lines_), plan)[0]] == ["", None, "2"]
    assert [r["quantity"] for r in rows(write("b.csv", HEADER + "2024-03-01,u,buy,i\n"), plan)[0]] == [None]


# -- envelopes ---------------------------------------------------------------------------------------------------------


def test_the_calls_of_a_batch_come_out_one_by_one_with_what_the_batch_says_for_all(write) -> None:
    envelope = {
        "batch": [
            segment(messageId="a", context={"ip": "1", "consent": {"categoryPreferences": {"x": True}}}),
            "no call",
            segment(messageId="b"),
        ],
        "context": {"consent": {"categoryPreferences": {"x": False}}, "locale": "de"},
        "integrations": {"All": False},
        "sentAt": "2024-03-01T10:00:01Z",
    }
    lines_ = [segment(messageId="first"), envelope, "broken", segment(messageId="last"), {"batch": []}, {"batch": [segment(messageId="c")]}]
    text = "\n".join(line if line == "broken" else json.dumps(line) for line in lines_)
    for path, shift in ((write("s.jsonl", text), 0), (write("t.jsonl", "\n" + text), 1)):
        good, bad = rows(path, None)
        assert [(r["row"] - shift, r["message_id"]) for r in good] == [(1, "first"), (2, "a"), (4, "b"), (6, "last"), (7, None), (8, "c")]
        refused = sorted((r["row"] - shift, r["reason"], r["raw"]) for r in bad)
        assert refused == [(3, "not_json", '"no call"'), (5, "not_json", "broken")]
        a, b = good[1], good[2]
        assert (json.loads(a["consent"]), json.loads(b["consent"])) == ({"x": True}, {"x": False})
        assert json.loads(a["raw"])["context"] == {"ip": "1", "locale": "de", "consent": {"categoryPreferences": {"x": True}}}
        assert json.loads(b["raw"])["integrations"] == {"All": False}
        assert good[4]["type"] is None  # an envelope without calls is a row that says nothing


def test_envelopes_in_an_array_and_across_batches_keep_rows_apart(write) -> None:
    calls = [{"batch": [segment(messageId=f"{n}-{m}") for m in range(n % 4 + 1)]} for n in range(15)]
    expected = [f"{n}-{m}" for n in range(15) for m in range(n % 4 + 1)]
    for path in (write("s.json", json.dumps(calls)), write("s.jsonl", "\n".join(map(json.dumps, calls)))):
        for batch_rows in (1_000, 7):
            good, bad = rows(path, None, batch_rows=batch_rows)
            assert [r["message_id"] for r in good] == expected
            assert [r["row"] for r in good] == list(range(1, len(expected) + 1))
            assert bad == []


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


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        write("a.xml", "<a/>"): r"name the element that is one row under \[source\] row",
        write("cut.csv.gz", gzip.compress(HEADER.encode() * 500)[:40]): "could not be read to its end",
        write("packed.csv", gzip.compress(HEADER.encode())): r"gzip under a name .* end in \.gz",
        write("packed.jsonl", gzip.compress(b"{}")): r"gzip under a name",
        write("sheet.xlsx", b"PK\x03\x04" + b"x" * 40): "Excel workbooks are such",
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
        ('user_id = "who"', "", r"user_id, anonymous_id, email or phone"),
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


def test_rows_keep_their_order_on_a_connection_that_promises_none() -> None:
    traits = {"firstName": "Ann"}
    calls = [json.dumps(segment(messageId=f"m{i}") | ({"traits": traits | {"lastName": str(i)}} if i % 3 else {})) for i in range(30_000)]
    table = pa.table({"__raw": calls, "__row": list(range(30_000))})
    with sources.connect(preserve_insertion_order="false", threads="4") as db:
        found = projection.segment_rows(db, table)
    assert found["row"].to_pylist() == list(range(30_000))
    assert found["message_id"].to_pylist() == [f"m{i}" for i in range(30_000)]
    assert found["raw"].to_pylist() == calls
    direct = [f'{{"first_name":"Ann","last_name":"{i}"}}' if i % 3 else None for i in range(30_000)]
    assert found["direct"].to_pylist() == direct


@given(st.lists(st.one_of(st.floats(width=64), st.integers(-(10**6), 10**6).map(float)), min_size=1, max_size=40))
def test_numbers_of_a_file_are_texts_without_the_point_that_whole_ones_need_not_have(values: list[float]) -> None:
    values = [*values, 0.0, -0.0, 1e15, 1e16, -1e15, float("inf"), float("nan"), 17850.0, 2.5]
    table = pa.table({"x": values})
    with duckdb.connect() as db:
        db.register("rows", table)
        told = db.sql(f"SELECT CAST(x AS VARCHAR), {projection._read_text('x', table, whole=False)} FROM rows").fetchall()
    for plain, found in told:
        assert found == re.sub(r"^(-?[0-9]+)\.0+$", r"\1", plain)
