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


@pytest.mark.parametrize("items", ["none.jsonl", "broken.jsonl"])
def test_a_catalogue_that_cannot_be_read_is_refused(shop, items: str) -> None:
    (shop.folder / "broken.jsonl").write_text("{\n")
    with pytest.raises(InputError, match=items):
        shop.run(shop.call("m1"), items_file=shop.folder / items)
