"""Several tables change as one."""

import multiprocessing

import pandas as pd
import pytest

from pipelines import tables
from pipelines.errors import StoreError

NOW = pd.Timestamp("2026-01-01", tz="UTC")


def items(*ids: str) -> pd.DataFrame:
    told = {"category": None, "price_cents": 5, "in_stock": None}
    return pd.DataFrame({"item_id": list(ids), **told, "event_timestamp": NOW, "created_timestamp": NOW})


def consents(*customers: str) -> pd.DataFrame:
    return pd.DataFrame({"customer_id": list(customers), "event_timestamp": NOW, "is_personalization_allowed": True})


def ids(home) -> list[str]:
    return tables.read(home, tables.ITEMS)["item_id"].tolist()


def test_all_changes_are_there_after_the_block_and_none_within_it(tmp_path) -> None:
    tables.write(tmp_path, tables.ITEMS, items("old"))
    with tables.together(tmp_path) as change:
        change.append(tables.ITEMS, items("new"))
        change.write(tables.CUSTOMER_CONSENT, consents("c"))
        assert ids(tmp_path) == ["old"]
        assert not tables.exists(tmp_path, tables.CUSTOMER_CONSENT)
    assert ids(tmp_path) == ["old", "new"]
    assert tables.count(tmp_path, tables.CUSTOMER_CONSENT) == 1


def test_a_block_that_raises_changes_nothing_and_leaves_nothing_behind(tmp_path) -> None:
    tables.write(tmp_path, tables.ITEMS, items("old"))
    held = set((tmp_path / "tables").iterdir())
    with pytest.raises(StoreError, match="declared types"):
        change_two(tmp_path, items("new"), items("dear").assign(price_cents="dear"))
    assert ids(tmp_path) == ["old"]
    assert {path for path in (tmp_path / "tables").iterdir() if path.name != ".lock"} == held


def change_two(home, first: pd.DataFrame, second: pd.DataFrame) -> None:
    with tables.together(home) as change:
        change.write(tables.ITEMS, first)
        change.write(tables.Table("other_items", ("item_id",), None, None, tables.ITEMS.schema), second)


def test_files_that_are_kept_are_linked_and_the_others_are_gone(tmp_path) -> None:
    tables.append(tmp_path, tables.ITEMS, items("a"))
    tables.append(tmp_path, tables.ITEMS, items("b"))
    first, _ = tables.files(tmp_path, tables.ITEMS)
    with tables.together(tmp_path) as change:
        assert change.replace(tables.ITEMS, items("c", "d"), keep=[first]) == 2
    assert ids(tmp_path) == ["a", "c", "d"]


def test_a_table_is_changed_once_in_a_block(tmp_path) -> None:
    with tables.together(tmp_path) as change:
        change.write(tables.ITEMS, items("a"))
        with pytest.raises(ValueError, match="twice"):
            change.write(tables.ITEMS, items("b"))


def test_the_lock_may_be_taken_within_itself(tmp_path) -> None:
    with tables.locked(tmp_path), tables.together(tmp_path) as change:
        change.write(tables.ITEMS, items("a"))
    assert ids(tmp_path) == ["a"]


def add(home, name: str) -> None:
    for _ in range(5):
        with tables.together(home) as change:
            change.write(tables.ITEMS, items(*ids(home), name))


def test_two_processes_that_read_and_write_lose_nothing(tmp_path) -> None:
    tables.write(tmp_path, tables.ITEMS, items())
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=add, args=(tmp_path, name)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(ids(tmp_path)) == ["a"] * 5 + ["b"] * 5


def test_a_folder_that_cannot_be_written_is_a_store_error(tmp_path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(StoreError, match="RAPPORT_HOME"), tables.together(tmp_path / "home"):
        pass
