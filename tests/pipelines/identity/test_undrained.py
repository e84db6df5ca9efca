"""What was said together and is in no table yet."""

import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import tables
from pipelines.errors import StoreError
from pipelines.identity import undrained
from pipelines.identity.online import Online
from pipelines.identity.undrained import seen_since
from pipelines.log.ranges import Ranges


def test_it_names_what_no_ingest_has_drained_whoever_saw_it(tmp_path: Path) -> None:
    for worker, position in ((0, 5), (1, 6)):
        with closing(Online(tmp_path, worker=worker)) as online:
            online.link([SimpleNamespace(subjects=("user_id:u1", f"anonymous_id:b{worker}"), event_us=1, received_us=1, position=position)])
    assert seen_since(tmp_path, Ranges.read([])) == {"user_id:u1", "anonymous_id:b0", "anonymous_id:b1"}
    assert seen_since(tmp_path, Ranges.read(["0-5"])) == {"user_id:u1", "anonymous_id:b1"}
    assert seen_since(tmp_path, Ranges.read(["0-6"])) == set()
    (tmp_path / "identity" / "online-1.db").write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match=r"online-1\.db could not be read.*delete online-1\.db\*"):
        seen_since(tmp_path, Ranges.read([]))


def test_a_file_that_takes_the_others_place_meanwhile_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Online(tmp_path)) as online:
        real, looked = undrained.fresh, []

        def fresh(db: sqlite3.Connection) -> object:
            found = real(db)
            if not looked:
                looked.append(found)
                tables.write(tmp_path, tables.IDENTITY_LINKS, tables.IDENTITY_LINKS.schema.empty_table())
                assert online.refresh()
                online.link([SimpleNamespace(subjects=("user_id:u1",), event_us=1, received_us=1, position=5)])
            return found

        monkeypatch.setattr(undrained, "fresh", fresh)
        assert seen_since(tmp_path, Ranges.read([])) == {"user_id:u1"}
        assert looked == [[]], "the control: the first file does not know"
