"""The bench gives a figure and its rival's for each thing measured."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from pipelines import bench
from pipelines.bench.measured import measured
from pipelines.errors import PipelineError


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


def test_a_side_is_measured_in_a_process_of_its_own_and_its_peak_is_its_own():
    big = measured(lambda _: len(bytearray(200 << 20)))
    small = measured(lambda _: os.getpid())
    assert (big.value, small.value != os.getpid()) == (200 << 20, True)
    assert big.peak_mb > small.peak_mb + 150
    with pytest.raises(PipelineError, match="ended with exit code 1;"):
        measured(lambda _: 1 / 0)
    with pytest.raises(PipelineError, match="ended with SIGKILL;"):
        measured(lambda _: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.slow
def test_features_are_measured_beside_their_rivals_which_give_the_same(tmp_path, monkeypatch):
    """The rows themselves check that both sides agree; here a small size runs through all of them, in a relative folder."""
    monkeypatch.chdir(tmp_path)
    with bench.redis_beside(Path("redis")) as url:
        rows = bench.feature_rows(Path(".rapport/.bench-1/features"), sizes=bench.TINY, redis_url=url)
    assert {row.rival for row in rows} >= {
        "hand-written ASOF join",
        "Feast's DuckDB store",
        "pandas",
        "Feast's materialize",
        "Feast's write of one row",
    }
    assert {row.unit for row in rows} <= {"s", "ms", "MB", "rows/s", "events/s", "times"}
    for row in rows:
        assert row.value > 0
        assert row.ratio == pytest.approx(row.value / row.rival_value)
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.slow
def test_training_is_measured_beside_implicit_and_lightgbm(tmp_path, empty_tracking):
    shutil.copytree(empty_tracking, tmp_path / "training" / "search" / "mlflow")
    rows = bench.training_rows(tmp_path / "training", sizes=bench.TRAINING_TINY)
    assert {row.rival for row in rows} == {
        "implicit's own epoch",
        "LightGBM's fits of the same parameters",
        "LightGBM alone",
        "one worker",
        "in step with the rows",
    }
    assert {row.unit for row in rows} == {"CPU s", "s", "MB", "times"}
    for row in rows:
        assert row.value > 0
        assert row.ratio == pytest.approx(row.value / row.rival_value)
    assert len({row.name for row in rows}) == len(rows)
