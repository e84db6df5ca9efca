"""The bench gives a figure and its rival's for each thing measured."""

import pytest

from pipelines import bench


def test_the_log_is_measured_beside_one_commit_per_event(tmp_path):
    rows = bench.log_rows(tmp_path, events=600, rounds=1)
    assert [row.unit for row in rows] == ["events/s"] * 3
    for row in rows:
        assert row.value > 0
        assert row.ratio == pytest.approx(row.value / row.rival_value)
    assert not list(tmp_path.glob("rival*")), "the rival's files are gone"


def test_the_ingest_is_measured_beside_pandas_over_the_same_rows(tmp_path):
    (row,) = bench.ingest_rows(tmp_path / "home", rows=3_000)
    assert (row.unit, row.rival) == ("rows/s", "pandas")
    assert row.ratio == pytest.approx(row.value / row.rival_value)
