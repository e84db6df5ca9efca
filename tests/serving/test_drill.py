"""The drill on a small shop: what is broken is the copy's, everybody gets an answer, and what was broken is seen in it."""

import sqlite3
from contextlib import closing

import pytest

from pipelines.settings import Settings
from serving import drill
from serving.bench.sending import Second, Sent
from serving.process import ServiceError


@pytest.mark.slow
def test_faults_degrade_answers_and_cost_none(shop):
    before = {path: path.stat().st_mtime_ns for path in (shop / "models").rglob("*") if path.is_file()}
    settings = Settings(home=shop, serving={"deadline_ms": 10_000})
    rows = drill.drill(settings, seconds=4, rate=10.0, only=["store cut off"])
    assert [(row.fault, row.endpoint) for row in rows] == [("store cut off", path) for path in drill.ENDPOINTS]
    assert [row for row in rows if not row.is_passed] == []
    assert all(row.degraded > 0.5 and len(row.sources) > 1 for row in rows)
    assert {path: path.stat().st_mtime_ns for path in (shop / "models").rglob("*") if path.is_file()} == before
    assert not list(shop.glob("drill-*"))


def test_fault_that_does_not_exist_is_named_with_those_that_do(shop):
    with pytest.raises(ServiceError, match=r"no fault named flood; there are: .*store cut off"):
        drill.drill(Settings(home=shop), only=["flood"])


def test_home_without_customers_cannot_be_drilled(tmp_path):
    with pytest.raises(ServiceError, match="nobody is known"):
        drill.drill(Settings(home=tmp_path))


def test_faults_end_as_they_began(home):
    def state():
        with closing(sqlite3.connect(home / "feature_store" / "online.db", timeout=0)) as db:
            db.execute("BEGIN IMMEDIATE")  # nobody holds it
        return (home / "models" / "champions.json").read_bytes()

    before = state()
    for name, fault in drill.faults(home, None).items():
        with fault():
            if name == "store cut off":
                assert not (home / "feature_store" / "online.db").exists()
        assert state() == before


def test_copy_shares_no_file_that_is_written_in_place(home, tmp_path):
    to = tmp_path / "copy"
    drill.copy_home(home, to)
    for path in to.rglob("*"):
        if path.is_file() and path.suffix != ".parquet":
            assert path.stat().st_nlink == 1
            assert not path.samefile(home / path.relative_to(to))
    assert (to / "feature_store" / "online.db").exists()
    assert not (to / "log").exists()


@pytest.mark.parametrize(
    ("statuses", "after", "is_passed"),
    [({"200": 5}, [1, 0], True), ({"200": 5}, [0, 1], False), ({"200": 4, "503": 1}, [0, 0], False)],
    ids=["healed", "still degraded", "refused one"],
)
def test_row_passes_where_everybody_was_answered_and_all_is_as_before(statuses, after, is_passed):
    seconds = [Second(ok=2, degraded=2, took_ms=[1.0, 2.0]), *(Second(ok=2, degraded=n, took_ms=[1.0]) for n in after)]
    row = drill._row("fault", "/churn", Sent(statuses, {"1": 5}, 0, seconds, {"stale": 2, "static": 1}), 1, {"stale": 0.25, "popular": 0.1})
    assert row.is_passed is is_passed
    assert row.degraded == 1.0
    assert row.p99_ms == 2.0
    assert row.quality == {"stale": 0.25}  # of what answered, where it was measured


def test_quality_of_each_source_is_the_champions_and_none_where_it_does_not_tell(home, cast, tmp_path):
    assert drill.qualities(home) == {}  # it was trained before they were measured
    told = [{"rung": "personal", "customers": 9, "ndcg": 0.5}, {"rung": "segment", "customers": 0, "why": "no groups"}]
    cast.promote_recommender(home, seed=4, ladder=told)
    assert drill.qualities(home) == {"personal": 0.5}
    assert drill.qualities(tmp_path / "nothing") == {}
