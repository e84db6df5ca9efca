"""The runner: what is finished is not repeated, what changed is, and what was interrupted resumes."""

import ast
import inspect
import json
import sqlite3
import textwrap
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest

from pipelines import flow, retention, tables
from pipelines.code_version import code_version
from pipelines.errors import InputError, PipelineError, StoreError
from pipelines.ingest import ledger
from pipelines.settings import IngestSettings, PrivacySettings, Settings
from pipelines.vault import open_vault

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
            "in_stock": True,
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


def test_changed_code_runs_the_step_again(job, monkeypatch):
    calls = []
    flow.run(counting_steps(calls), job)
    monkeypatch.setattr(flow.runner, "code_version", lambda modules: "other")
    flow.run(counting_steps(calls), job)
    assert calls == ["first", "second", "first", "second"]


def test_steps_name_all_that_they_import():
    """What a step's own function imports is among the modules that its key is made of."""
    for step in flow.STEPS:
        tree = ast.parse(textwrap.dedent(inspect.getsource(step.run)))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                asked = {f"{node.module}.{alias.name}" if node.module == "pipelines" else node.module for alias in node.names}
                covered = {name for name in asked if code_version((*step.code, name)) == code_version(step.code)}
                assert asked == covered, f"{step.name} imports {asked - covered} beside its code"


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


def event_line(message, when="2026-01-01T10:00:00Z"):
    who = {"userId": "u1", "context": {"consent": {"categoryPreferences": {"personalization": True}}}}
    seen = {"type": "track", "event": "Product Viewed", "properties": {"product_id": "i1", "price": 2}}
    return json.dumps({"messageId": message, "timestamp": when, "receivedAt": when, **seen, **who})


def ingest_step():
    return tuple(step for step in flow.STEPS if step.name == "ingest")


def ingest_only(job, *lines, name="events.jsonl"):
    path = job.home.parent / name
    path.write_text("\n".join(lines) + "\n")
    mine = flow.Job(job.settings, files=(path,))
    return flow.run(ingest_step(), mine).summary("ingest")


def test_home_with_events_of_its_own_is_never_replaced(job):
    tables.write(job.home, tables.EVENTS, tables.EVENTS.schema.empty_table())
    with pytest.raises(PipelineError, match="events of your own"):
        ingest_only(job, event_line("m1"))
    assert tables.exists(job.home, tables.EVENTS)


def test_loop_over_other_files_replaces_what_the_earlier_loop_left(job):
    ingest_only(job, event_line("m1"), event_line("m2"))
    champions = job.home / "models" / "champions.json"
    champions.parent.mkdir()
    champions.write_text("{}")
    tables.write(job.home, tables.ITEM_ACTIVITY, tables.ITEM_ACTIVITY.schema.empty_table())
    ingest_only(job, event_line("m3"), name="other.jsonl")
    assert tables.read(job.home, tables.EVENTS)["event_id"].tolist() == ["m3"]
    assert not champions.exists()
    assert not tables.exists(job.home, tables.ITEM_ACTIVITY)


def test_loop_whose_files_are_refused_leaves_the_earlier_one_whole(job):
    ingest_only(job, event_line("m1"))
    with pytest.raises(InputError, match="none among"):
        ingest_only(job, "not json", name="bad.jsonl")
    assert tables.read(job.home, tables.EVENTS)["event_id"].tolist() == ["m1"]
    refused = tables.read(job.home, tables.QUARANTINE)
    with closing(open_vault(job.home)) as vault:
        assert vault.unseal(refused["subject"].tolist(), refused["raw"].tolist()) == [b"not json"]
    with pytest.raises(InputError, match=r"gone\.jsonl"):
        flow.run(ingest_step(), flow.Job(job.settings, files=(job.home / "gone.jsonl",)))
    assert tables.read(job.home, tables.EVENTS)["event_id"].tolist() == ["m1"]


def test_what_is_older_than_it_may_be_kept_does_not_come_back_with_the_files_of_the_loop(job):
    now = datetime.now(UTC)
    kept, old = (event_line(name, (now - timedelta(days=days)).isoformat()) for name, days in (("m1", 1), ("m2", 40)))
    search = event_line("m3", (now - timedelta(days=40)).isoformat()).replace("Product Viewed", "Products Searched")
    ingest_only(job, kept, old, search)
    assert tables.count(job.home, tables.EVENTS) == 3  # the control: without days all of them are there
    limited = job.settings.model_copy(update={"privacy": PrivacySettings(retention_days={"view": 30})})
    retention.apply(job.home, settings=limited, as_of=now)
    for _ in range(2):
        flow.run(ingest_step(), flow.Job(limited, files=(job.home.parent / "events.jsonl",)), force=("ingest",))
        assert sorted(tables.read(job.home, tables.EVENTS)["event_id"]) == ["m1", "m3"]
    assert ledger(job.home)["balance"] == 0
    ingest_only(job, kept, old, search)  # days are part of what the step depends on
    assert tables.count(job.home, tables.EVENTS) == 3


def test_table_that_a_later_step_writes_again_is_not_asked_of_an_earlier_one(job):
    planned = flow.Job(job.settings.model_copy(update={"ingest": IngestSettings(imputation={"region": "mode"})}))
    writers = [step.name for step in flow.steps_for(planned) if tables.CUSTOMER_PROFILE in step.writes]
    assert writers == ["impute"]
    assert [step.name for step in flow.steps_for(job) if tables.CUSTOMER_PROFILE in step.writes] == ["ingest"]
    for steps in (flow.steps_for(planned), flow.steps_for(job)):
        every = [item for step in steps for item in step.writes if isinstance(item, tables.Table)]
        assert len(every) == len(set(every))
    every = [item for step in flow.STEPS for item in step.writes if isinstance(item, tables.Table)]
    assert len(every) > len(set(every)), "the control: as declared, a table is written twice"


def test_same_file_again_counts_nothing_twice(job):
    one = ingest_only(job, event_line("m1"), event_line("m1"))
    assert (one["accepted"], one["duplicate"]) == (1, 1)
    assert ingest_only(job, event_line("m1"), event_line("m1")) == one
    assert tables.count(job.home, tables.EVENTS) == 1


def test_clock_of_an_old_log_is_its_last_event_and_of_a_live_one_the_wall(job):
    last = NOW - timedelta(days=40)
    assert flow.write_clock(job.settings, last, NOW) == last == flow.read_clock(job.settings)
    assert flow.write_clock(job.settings, NOW - timedelta(hours=1), NOW) == NOW
    pinned = job.settings.model_copy(update={"as_of": last})
    assert flow.read_clock(pinned) == last


def test_clock_that_leaves_a_history_says_how_far_it_leaps_and_no_other_says_a_word(job, caplog):
    flow.write_clock(job.settings, NOW - timedelta(days=40), NOW)
    flow.write_clock(job.settings, NOW - timedelta(days=30), NOW)
    assert not caplog.messages
    flow.write_clock(job.settings, NOW, NOW)
    (leap,) = caplog.messages
    assert "30 days later" in leap
    flow.write_clock(job.settings, NOW, NOW)
    assert caplog.messages == [leap]


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


@pytest.mark.parametrize("cause", [OSError(28, "No space left on device"), sqlite3.OperationalError("database or disk is full")])
def test_full_disk_in_any_library_is_one_sentence(job, cause):
    def breaks(job):
        raise RuntimeError("of a library") from cause

    with pytest.raises(StoreError, match="no space left under"):
        flow.run((flow.Step("train", breaks),), job)


def test_other_defect_is_not_taken_for_a_full_disk(job):
    def breaks(job):
        raise RuntimeError("of our own")

    with pytest.raises(RuntimeError, match="of our own"):
        flow.run((flow.Step("train", breaks),), job)
