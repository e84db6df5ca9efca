"""The runner: what is finished is not repeated, what changed is, and what was interrupted resumes."""

import json
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest

from pipelines import flow, tables
from pipelines.errors import PipelineError, StoreError
from pipelines.settings import Settings

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def job(tmp_path):
    return flow.Job(Settings(home=tmp_path / "home"))


def items(*prices):
    return pd.DataFrame(
        {
            "item_id": [f"i{n}" for n in range(len(prices))],
            "category": "c",
            "price_cents": prices,
            "event_timestamp": pd.Timestamp(NOW),
            "created_timestamp": pd.Timestamp(NOW),
        }
    )


def counting_steps(calls, prices=(1, 2)):
    def first(job):
        calls.append("first")
        return {"rows": tables.write(job.home, tables.ITEMS, items(*prices))}

    def second(job):
        calls.append("second")
        return {"seen": len(tables.read(job.home, tables.ITEMS))}

    return (
        flow.Step("first", first, writes=(tables.ITEMS,), settings=("simulation",)),
        flow.Step("second", second, reads=(tables.ITEMS,)),
    )


def test_second_run_repeats_nothing_and_reports_the_same(job):
    calls = []
    one = flow.run(counting_steps(calls), job)
    two = flow.run(counting_steps(calls), job)
    assert calls == ["first", "second"]
    assert [two.summary(n) for n in ("first", "second")] == [one.summary(n) for n in ("first", "second")]
    assert all(step.is_skipped for step in two.steps.values())


def test_changed_setting_reruns_the_step_but_not_readers_of_equal_content(job):
    calls = []
    flow.run(counting_steps(calls), job)
    changed = flow.Job(job.settings.model_copy(update={"simulation": job.settings.simulation.model_copy(update={"seed": 8})}))
    flow.run(counting_steps(calls), changed)
    assert calls == ["first", "second", "first"]


def test_changed_content_reruns_the_reader(job):
    calls = []
    flow.run(counting_steps(calls), job)
    flow.run(counting_steps(calls, prices=(3, 4)), job, force=("first",))
    assert calls == ["first", "second", "first", "second"]


def test_missing_output_runs_the_step_again(job):
    calls = []
    flow.run(counting_steps(calls), job)
    tables.drop(job.home, tables.ITEMS)
    flow.run(counting_steps(calls), job)
    assert calls.count("first") == 2


def test_interrupted_run_resumes_at_the_step_that_failed(job):
    calls = []
    first, second = counting_steps(calls)

    def interrupted(job):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flow.run((first, flow.Step("second", interrupted, reads=(tables.ITEMS,))), job)
    flow.run((first, second), job)
    assert calls == ["first", "second"]
    assert [row["outcome"] for row in flow.history(job.home)] == ["done", "failed: KeyboardInterrupt", "done"]


def test_second_run_beside_a_running_one_is_refused(job):
    def nested(inner):
        flow.run((), inner)
        return {}

    with pytest.raises(PipelineError, match="another run is working"):
        flow.run((flow.Step("outer", nested),), job)


def test_home_with_events_of_its_own_is_never_cleared(job):
    tables.write(job.home, tables.EVENTS, tables.EVENTS.schema.empty_table())
    with pytest.raises(PipelineError, match="events of your own"):
        flow.run((flow.Step("ingest", lambda job: {}),), job)
    assert tables.exists(job.home, tables.EVENTS)


def test_loop_over_other_files_clears_what_the_earlier_loop_left(job, tmp_path):
    step = flow.Step("ingest", lambda job: {"rows": tables.write(job.home, tables.ITEMS, items(1))})
    flow.run((step,), job)
    other = tmp_path / "other.csv"
    other.write_text("a")
    seen = []
    look = flow.Step("ingest", lambda job: seen.append(tables.exists(job.home, tables.ITEMS)) or {})
    flow.run((look,), flow.Job(job.settings, files=(other,)))
    assert seen == [False]


def test_clock_of_an_old_log_is_its_last_event_and_of_a_live_one_the_wall(job):
    last = NOW - timedelta(days=40)
    assert flow.write_clock(job.settings, last, NOW) == last == flow.read_clock(job.settings)
    assert flow.write_clock(job.settings, NOW - timedelta(hours=1), NOW) == NOW
    pinned = job.settings.model_copy(update={"as_of": last})
    assert flow.read_clock(pinned) == last


def test_clock_before_any_event_says_what_to_do(job):
    with pytest.raises(StoreError, match="ingest events first"):
        flow.read_clock(job.settings)


def test_steps_are_in_path_order_and_read_only_what_earlier_ones_write():
    written = {"clock.json"}
    for step in flow.STEPS:
        reads = {getattr(item, "name", item) for item in step.reads}
        assert reads <= written, f"{step.name} reads {reads - written} before anything wrote it"
        written |= {getattr(item, "name", item) for item in step.writes}


def test_unwritable_home_is_one_sentence(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text(json.dumps({}))
    with pytest.raises(StoreError, match="RAPPORT_HOME"):
        flow.run((), flow.Job(Settings(home=blocked / "home")))
