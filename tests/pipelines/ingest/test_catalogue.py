import pandas as pd
import pytest

from pipelines import tables
from pipelines.errors import InputError


def test_items_come_from_the_catalogue_first_and_from_events_else(shop) -> None:
    items = shop.folder / "items.jsonl"
    items.write_text('{"item_id":"i1","category":"tools","price":5.5,"available_from":"2024-01-01T00:00:00Z"}\n')
    shop.run(shop.call("m1", 3), shop.call("m2", 1, properties={"product_id": "i9", "price": 2, "category": "toys"}), items_file=items)
    rows = shop.table(tables.ITEMS)[["item_id", "category", "price_cents", "event_timestamp"]].to_numpy().tolist()
    assert rows == [["i1", "tools", 550, pd.Timestamp("2024-01-01", tz="UTC")], ["i9", "toys", 200, pd.Timestamp(shop.at(1))]]
    shop.run(shop.call("m3", 5))
    assert shop.table(tables.ITEMS)[["item_id", "category", "price_cents", "event_timestamp"]].to_numpy().tolist() == rows


def test_what_the_catalogue_says_of_stock_holds_until_it_says_otherwise(shop) -> None:
    def told(*lines: str) -> dict[str, object]:
        items = shop.folder / "items.jsonl"
        items.write_text("".join(f'{{"item_id":"{line[:2]}"{line[2:]}}}\n' for line in lines))
        shop.run(shop.call(f"m{len(list(shop.folder.iterdir()))}{len(lines)}"), items_file=items)
        table = shop.table(tables.ITEMS).set_index("item_id")["in_stock"]
        return {name: None if pd.isna(table[name]) else bool(table[name]) for name in ("i1", "i2", "i3")}

    assert told('i1,"in_stock":true', 'i2,"in_stock":false', "i3") == {"i1": True, "i2": False, "i3": None}
    assert told('i1,"in_stock":false', "i2", 'i3,"in_stock":true', "i3") == {"i1": False, "i2": False, "i3": True}


@pytest.mark.parametrize("items", ["none.jsonl", "broken.jsonl"])
def test_a_catalogue_that_cannot_be_read_is_refused(shop, items: str) -> None:
    (shop.folder / "broken.jsonl").write_text("{\n")
    with pytest.raises(InputError, match=items):
        shop.run(shop.call("m1"), items_file=shop.folder / items)


def test_an_item_that_does_not_say_since_when_keeps_its_category_and_price(shop) -> None:
    items = shop.folder / "items.jsonl"
    items.write_text(
        '{"item_id":"i1","category":"tools","price":5.5}\n'
        '{"item_id":"i2","category":"late","price":1}\n'
        '{"item_id":"i2","category":"toys","price":2,"available_from":"2024-01-01T00:00:00Z"}\n'
    )
    shop.run(shop.call("m1", 3, properties={"product_id": "i1"}), items_file=items)
    rows = shop.table(tables.ITEMS).set_index("item_id")[["category", "price_cents"]]
    assert rows.loc["i1"].tolist() == ["tools", 550]
    assert rows.loc["i2"].tolist() == ["toys", 200]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "no line"),
        ('{"item":"i1"}\n', "1 of 1 lines without item_id, 0 with"),
        ('{"item_id":"i1"}\n{"sku":"i2"}\n{"sku":"i3"}\n', "2 of 3 lines without item_id, 0 with"),
        ('{"item_id":"i1","price":"5,50"}\n{"item_id":"i2","price":"6.5"}\n', "0 of 2 lines without item_id, 1 with"),
    ],
    ids=["empty", "other_names", "some_without", "price_of_another_country"],
)
def test_a_catalogue_with_lines_that_say_nothing_is_refused_with_their_number(shop, text: str, found: str) -> None:
    items = shop.folder / "items.jsonl"
    items.write_text(text)
    with pytest.raises(InputError, match=found):
        shop.run(shop.call("m1"), items_file=items)
