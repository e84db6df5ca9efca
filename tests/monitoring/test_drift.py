"""Drift alarms mean something: clean windows stay quiet, planted changes are found, and what cannot be judged is named."""

import json
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from monitoring import distributions, drift, reports
from pipelines import tables
from pipelines.settings import MonitoringSettings, Settings

LIMITS = MonitoringSettings()
AS_OF = datetime(2025, 7, 1, tzinfo=UTC)


def shop(rng, n):
    """Twenty columns of a shop: ages, skewed money with and without zeros, counts, shares, categories, a score."""
    frame = {f"plain_{i}": rng.normal(i, 1 + i, n) for i in range(4)}
    frame |= {f"money_{i}": np.round(rng.lognormal(8, 1, n) * (rng.random(n) < p)) for i, p in enumerate((1, 0.6, 0.1))}
    frame |= {f"count_{i}": rng.poisson(rng.gamma(1, mean, n)) for i, mean in enumerate((0.1, 1, 5, 20))}
    frame |= {f"kind_{i}": rng.choice([f"k{j}" for j in range(k)], n, p=_zipf(k)) for i, k in enumerate((3, 8, 70))}
    frame |= {"age_days": np.where(rng.random(n) < 0.4, np.nan, rng.exponential(20, n)), "share": rng.beta(0.3, 2, n)}
    frame |= {"is_new": rng.random(n) < 0.05, "constant": 1.0, "all_null": np.nan, "probability": rng.beta(2, 8, n)}
    return pd.DataFrame(frame)


def _zipf(k):
    return (1 / np.arange(1, k + 1)) / (1 / np.arange(1, k + 1)).sum()


def judged(reference, current, **options):
    return drift.judge(drift.build_reference(reference), current, settings=LIMITS, **options)


def column(report, name):
    return next(c for c in report.columns if c.column == name)


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def test_300_clean_windows_raise_at_most_one_percent_alarms(rng):
    alarms = 0
    for k in range(300):
        if k % 10 == 0:
            reference = drift.build_reference(shop(rng, 2_000))
        alarms += drift.judge(reference, shop(rng, 600), settings=LIMITS).verdict != "ok"
    assert alarms <= 3


def test_without_the_significance_part_the_same_clean_windows_would_alarm(rng, monkeypatch):
    """The control of the test above: effect limits alone do not keep small windows quiet."""
    monkeypatch.setattr(drift, "ALPHA", 1.0)
    reference = drift.build_reference(shop(rng, 2_000))
    tight = LIMITS.model_copy(update={"w1_limit": 0.06})
    assert sum(drift.judge(reference, shop(rng, 600), settings=tight).verdict == "alarm" for _ in range(20)) >= 10


def _shift(frame, rng):
    return frame.assign(plain_1=frame["plain_1"] + 0.3 * 2)


def _wider(frame, rng):
    return frame.assign(plain_2=2 + (frame["plain_2"] - 2) * 1.5)


def _dearer(frame, rng):
    return frame.assign(money_0=frame["money_0"] * 1.5)


def _dearer_with_zeros(frame, rng):
    return frame.assign(money_1=frame["money_1"] * 1.5)


def _half_null(frame, rng):
    return frame.assign(count_3=frame["count_3"].where(rng.random(len(frame)) < 0.5))


def _new_level(frame, rng):
    return frame.assign(kind_0=frame["kind_0"].where(rng.random(len(frame)) < 0.94, "never seen"))


def _no_longer_constant(frame, rng):
    return frame.assign(constant=np.where(rng.random(len(frame)) < 0.9, 1.0, -1.0))


def _filled(frame, rng):
    return frame.assign(all_null=1.0)


def _infinite(frame, rng):
    return frame.assign(plain_3=frame["plain_3"].where(rng.random(len(frame)) < 0.8, np.inf))


PLANTED = {
    "plain_1": _shift, "plain_2": _wider, "money_0": _dearer, "money_1": _dearer_with_zeros, "count_3": _half_null,
    "kind_0": _new_level, "constant": _no_longer_constant, "all_null": _filled, "plain_3": _infinite,
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_change_is_found_in_its_column_and_no_other(rng, name):
    report = judged(shop(rng, 5_000), PLANTED[name](shop(rng, 2_000), rng))
    assert (report.verdict, report.drifted) == ("alarm", (name,))
    assert column(report, name).effect >= 1


def test_a_price_shift_gives_the_same_distance_in_cents_and_in_euros(rng):
    before, now = rng.lognormal(8, 1, 5_000), rng.lognormal(8, 1, 5_000) * 1.5
    cents = judged(pd.DataFrame({"x": before}), pd.DataFrame({"x": now}))
    euros = judged(pd.DataFrame({"x": before / 100}), pd.DataFrame({"x": now / 100}))
    assert column(cents, "x").scale == "log"
    assert column(cents, "x").w1 == pytest.approx(column(euros, "x").w1)
    assert column(cents, "x").w1 > 0.3


def test_a_useless_shift_is_significant_but_no_drift(rng):
    n = 300_000
    report = judged(pd.DataFrame({"x": rng.normal(0, 1, n)}), pd.DataFrame({"x": rng.normal(0.02, 1, n)}))
    assert column(report, "x").p_value < 1e-4
    assert report.verdict == "ok"


def test_a_new_level_is_named(rng):
    report = judged(shop(rng, 5_000), _new_level(shop(rng, 2_000), rng))
    assert "never seen" in column(report, "kind_0").why


def test_psi_and_w1_agree_with_their_definitions(rng):
    before, now = rng.normal(0, 1, 4_000), rng.normal(0.5, 1.2, 3_000)
    found = distributions.measure(distributions.keep(pd.Series(before), 1.0), pd.Series(now), 1.0)
    edges = np.quantile(before, np.arange(0.1, 1, 0.1))
    p, q = (np.bincount(np.searchsorted(edges, side), minlength=10) / len(side) for side in (before, now))
    assert found.psi == pytest.approx(((q - p) * np.log(q / p)).sum(), rel=0.02)
    levels = (np.arange(2_000) + 0.5) / 2_000
    assert found.w1 == pytest.approx(np.abs(np.quantile(before, levels) - np.quantile(now, levels)).mean() / before.std(), rel=0.02)


def test_rows_of_one_customer_do_not_count_as_independent(rng):
    before = pd.DataFrame({"x": rng.normal(0, 1, 3_000), "customer_id": np.arange(3_000)})
    few = pd.DataFrame({"x": rng.normal(0, 1, 40), "customer_id": np.arange(40)})
    many_rows = few.loc[few.index.repeat(50)]
    assert judged(before, many_rows).verdict == "ok"
    assert judged(before, many_rows.assign(customer_id=np.arange(2_000))).verdict == "alarm"  # the control


def test_a_small_window_or_reference_is_not_judged(rng):
    frame = shop(rng, 1_000)
    for reference, current in ((frame, frame.iloc[:499]), (frame.iloc[:499], frame)):
        report = judged(reference, current)
        assert (report.verdict, report.columns) == ("not_enough_data", ())
        assert "499 rows, 500 are needed" in report.why
    assert judged(frame, frame.iloc[:500]).verdict == "ok"


def test_a_column_that_the_window_lacks_has_drifted(rng):
    frame = shop(rng, 1_000)
    report = judged(frame, frame.drop(columns="plain_0"))
    assert report.drifted == ("plain_0",)
    assert "lacks" in column(report, "plain_0").why


def test_a_column_without_values_says_so_and_does_not_alarm(rng):
    report = judged(shop(rng, 1_000), shop(rng, 1_000))
    assert column(report, "all_null").verdict == "not_enough_data"
    assert report.verdict == "ok"


def test_nullable_and_text_types_of_one_column_are_judged_alike(rng):
    values = rng.integers(0, 50, 1_000)
    before = pd.DataFrame({"x": values})
    for now in (pd.Series(values, dtype="Int64"), pd.Series(values.astype(float)), pd.Series(values.astype(str))):
        assert column(judged(before, pd.DataFrame({"x": now})), "x").w1 == 0


def test_huge_and_tiny_magnitudes_do_not_crash(rng):
    for factor in (1e-300, 1e200, 1e305):
        frame = pd.DataFrame({"x": rng.normal(0, 1, 1_000) * factor})
        assert judged(frame, frame).verdict == "ok"


def test_drift_is_an_alarm_only_in_two_of_the_last_three_windows(rng):
    reference, window = shop(rng, 5_000), _shift(shop(rng, 2_000), rng)
    quiet, shifted = frozenset(), frozenset({"plain_1"})
    expected = {
        (): ("alarm", "1 of 1"),
        (quiet,): ("drift", "1 of 2"),
        (shifted,): ("alarm", "2 of 2"),
        (shifted, quiet): ("alarm", "2 of 3"),
        (quiet, quiet): ("drift", "1 of 3"),
        (shifted, quiet, quiet): ("drift", "1 of 3"),
    }
    for history, (verdict, windows) in expected.items():
        report = judged(reference, window, history=history)
        assert (report.verdict, column(report, "plain_1").windows) == (verdict, windows)
        assert report.drifted == ("plain_1",)


def test_ageing_columns_are_listed_and_do_not_alarm(rng):
    reference, current = shop(rng, 3_000), _shift(shop(rng, 2_000), rng)
    report = judged(reference, current, ageing={"plain_1": "it grows"})
    assert (report.verdict, report.drifted, report.ageing) == ("ok", (), {"plain_1": "it grows"})
    assert column(report, "plain_1").verdict == "ageing"


NAMES = ["views_24h", "views_30d", "views_90d", "views_total", "last_event_age_days", "session_started_age_days", "region"]
RATIOS = ["cart_to_view", "events_share_7d", "events_share_30d", "purchase_span_days", "session_minutes"]


@pytest.mark.parametrize("broken", [lambda f: f.drop(columns="count_2"), lambda f: f.assign(count_2=np.nan)])
def test_an_ageing_column_that_empties_or_is_gone_alarms(rng, broken):
    report = judged(shop(rng, 3_000), broken(shop(rng, 2_000)), ageing={"count_2": "it grows"})
    assert (report.verdict, report.drifted) == ("alarm", ("count_2",))


def _history(depth_days, rows=1_000):
    """A reference of one instant, `depth_days` after the log began."""
    ages = {"first_event_age_days": np.linspace(1, depth_days, rows)}
    at = pd.Series([pd.Timestamp("2025-05-01", tz="UTC")] * rows)
    return pd.DataFrame({"event_timestamp": at, **ages, **{n: np.arange(rows) for n in NAMES + RATIOS}})


def test_windows_age_only_while_the_log_was_too_short_to_fill_them():
    def ageing(*depths):
        return set(drift.ageing_columns(pd.concat([_history(d) for d in depths]), settings=LIMITS))

    always = {"views_total", "first_event_age_days", "cart_to_view", "purchase_span_days"}
    long = {"views_90d", "last_event_age_days", "events_share_30d"}
    assert ageing(200) == ageing(85) == always
    assert ageing(40) == always | long
    assert ageing(10) == always | long | {"views_30d", "events_share_7d"}


def test_windowed_features_are_compared_with_rows_that_could_fill_them(tmp_path, rng, pages):
    """Half of the reference lies at the log's beginning, where no window of 30 days could be full."""
    early, late = (rows(rng, 1_500, at=AS_OF - timedelta(days=days)) for days in (391, 100))
    early = early.assign(views_30d=early["views_30d"] // 3, first_event_age_days=np.linspace(0.1, 9, len(early)))
    late["first_event_age_days"] = np.linspace(1, 300, len(late))
    both = pd.concat([early, late], ignore_index=True).assign(split="train", label=0)
    tables.write(tmp_path, tables.TRAINING_CHURN, both)
    tables.write(tmp_path, tables.SCORED_CHURN, rows(rng, 1_500))
    report = drift.run(tmp_path, settings=Settings(), as_of=AS_OF).subjects["churn"]
    assert (column(report, "views_30d").verdict, column(report, "views_30d").n_reference) == ("ok", 1_500)
    assert column(judged(both, rows(rng, 1_500)), "views_30d").verdict == "alarm"  # the control
    tables.write(tmp_path, tables.SCORED_CHURN, rows(rng, 1_500, shift=3))
    shifted = drift.run(tmp_path, settings=Settings(), as_of=AS_OF).subjects["churn"]
    assert shifted.drifted == ("views_30d",)


def test_a_quarter_million_rows_of_thirty_columns_are_judged_within_seconds(rng):
    n = 250_000
    frame = pd.DataFrame({f"x{i}": rng.normal(size=n) for i in range(24)} | {f"k{i}": rng.choice(list("abcd"), n) for i in range(6)})
    reference = drift.build_reference(frame.iloc[:20_000])
    start = time.process_time()
    drift.judge(reference, frame, settings=LIMITS)
    assert time.process_time() - start < 5


# -- a home ------------------------------------------------------------------------------------------------------------


def rows(rng, n, *, at=AS_OF, shift=0.0):
    first = np.concatenate([[400.0], rng.uniform(0, 400, n - 1)])
    return pd.DataFrame(
        {
            "customer_id": [f"c{i:05d}" for i in range(n)],
            "event_timestamp": pd.Series([at] * n, dtype="datetime64[us, UTC]"),
            "views_30d": rng.poisson(rng.gamma(1, 6, n)) + shift,
            "views_total": rng.poisson(40, n),
            "first_event_age_days": first,
            "region": rng.choice(["north", "south"], n),
            "probability": rng.beta(2, 5, n),
        }
    )


def training(rng, n):
    splits = [
        rows(rng, n, at=AS_OF - timedelta(days=days)).assign(split=s) for s, days in (("train", 90), ("validation", 60), ("test", 30))
    ]
    frame = pd.concat(splits, ignore_index=True)
    gender = rng.choice(["f", "m"], len(frame))
    return frame.assign(label=(rng.random(len(frame)) < 0.3).astype(int), gender=gender)


@pytest.fixture
def pages(monkeypatch):
    """The pages are tested in test_reports.py; they cost seconds."""
    drawn = []
    monkeypatch.setattr(reports, "write_drift", lambda path, run, frames, **_: drawn.append((path, run, frames)))
    return drawn


def fill(home, rng, *, shift=0.0):
    tables.write(home, tables.TRAINING_CHURN, training(rng, 1_500))
    tables.write(home, tables.SCORED_CHURN, rows(rng, 1_500, shift=shift))


def test_a_home_without_tables_is_said_not_crashed(tmp_path, pages):
    run = drift.run(tmp_path, settings=Settings(), as_of=AS_OF)
    assert (run.verdict, run.subjects) == ("not_enough_data", {})
    assert "training_churn and scored_churn hold no rows" in run.not_judged["churn"]
    assert run.verdict != "alarm"


def test_a_home_is_judged_and_its_untrained_model_named(tmp_path, rng, pages):
    fill(tmp_path, rng)
    tables.write(tmp_path, tables.TRAINING_INTENT, training(rng, 600))
    run = drift.run(tmp_path, settings=Settings(), as_of=AS_OF)
    assert (run.verdict, run.subjects["churn"].verdict) == ("ok", "ok")
    assert "scored_intent holds no rows" in run.not_judged["intent"]
    stored = json.loads((tmp_path / "reports" / "drift.json").read_text())
    assert stored == json.loads(json.dumps(pages[0][1]))
    judged_columns = {c["column"] for c in stored["subjects"]["churn"]["columns"]}
    assert judged_columns == {"views_30d", "views_total", "first_event_age_days", "region", "probability"}


def test_the_reason_of_an_untrainable_model_is_passed_on(tmp_path, pages):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "champions.json").write_text(json.dumps({"churn": {"version": None, "why": "the log holds no purchase"}}))
    assert "the log holds no purchase" in drift.run(tmp_path, settings=Settings(), as_of=AS_OF).not_judged["churn"]


def test_the_score_is_compared_with_rows_the_model_has_not_learned(tmp_path, rng, pages):
    """In-sample scores are surer; against them a sound model would look drifted."""
    frame = training(rng, 1_500)
    is_fitted = frame["split"] == "train"
    frame.loc[is_fitted, "probability"] = np.where(frame.loc[is_fitted, "label"] == 1, 0.9, 0.1) + rng.normal(0, 0.02, is_fitted.sum())
    tables.write(tmp_path, tables.TRAINING_CHURN, frame)
    tables.write(tmp_path, tables.SCORED_CHURN, rows(rng, 1_500))
    assert drift.run(tmp_path, settings=Settings(), as_of=AS_OF).verdict == "ok"
    tables.write(tmp_path, tables.TRAINING_CHURN, frame[is_fitted])  # the control: nothing else to compare with
    assert "probability" in drift.run(tmp_path, settings=Settings(), as_of=AS_OF).subjects["churn"].drifted


def test_a_feature_that_scoring_lost_alarms_and_a_protected_column_does_not(tmp_path, rng, pages):
    fill(tmp_path, rng)
    tables.write(tmp_path, tables.SCORED_CHURN, rows(rng, 1_500).drop(columns=["views_30d"]))
    assert drift.run(tmp_path, settings=Settings(), as_of=AS_OF).subjects["churn"].drifted == ("views_30d",)


def test_windows_are_remembered_between_runs_while_the_training_stays_the_same(tmp_path, rng, pages):
    def run(days):
        return drift.run(tmp_path, settings=Settings(), as_of=AS_OF + timedelta(days=days)).subjects["churn"]

    fill(tmp_path, rng)
    assert run(0).verdict == "ok"
    tables.write(tmp_path, tables.SCORED_CHURN, rows(rng, 1_500, shift=3))
    assert (run(7).verdict, run(7).verdict) == ("drift", "drift")  # the same window twice is one window
    assert run(14).verdict == "alarm"
    assert column(run(14), "views_30d").windows == "2 of 3"
    (tmp_path / "reports" / "drift.json").write_text('{"windows": 3, "references": []}')
    assert column(run(14), "views_30d").windows == "1 of 1"
    tables.write(tmp_path, tables.TRAINING_CHURN, training(rng, 1_500))
    assert column(run(21), "views_30d").windows == "1 of 1"


# -- tasks that share tables -------------------------------------------------------------------------------------------


def share(home, table, **frames):
    """The rows of several models in one table, as training and scoring keep them."""
    parts = [pa.Table.from_pandas(frame.assign(model=name), preserve_index=False) for name, frame in frames.items()]
    tables.write(home, table, pa.concat_tables(parts, promote_options="permissive"))


def lead(home, *names):
    (home / "models").mkdir(exist_ok=True)
    (home / "models" / "champions.json").write_text(json.dumps({name: {"version": 1} for name in names}))


def test_every_task_with_a_champion_is_watched_and_only_the_one_that_drifted_alarms(tmp_path, rng, pages):
    """Control: the one that stays as it was, beside it in the same tables, is green; so is the same task before it drifts."""
    lead(tmp_path, "return_risk", "intent_7d", "recommender")
    other = training(rng, 1_500).rename(columns={"views_30d": "session_views"})
    share(tmp_path, tables.TRAINING_TASKS, return_risk=training(rng, 1_500), intent_7d=other)
    steady = rows(rng, 1_500).rename(columns={"views_30d": "session_views"})
    for shift, expected in ((0, "ok"), (3, "alarm")):
        share(tmp_path, tables.SCORED_TASKS, return_risk=rows(rng, 1_500, shift=shift), intent_7d=steady)
        (tmp_path / "reports" / "drift.json").unlink(missing_ok=True)
        run = drift.run(tmp_path, settings=Settings(), as_of=AS_OF)
        assert {name: report.verdict for name, report in run.subjects.items()} == {"return_risk": expected, "intent_7d": "ok"}
    assert run.subjects["return_risk"].drifted == ("views_30d",)
    assert {c.column for c in run.subjects["intent_7d"].columns} & {"views_30d", "session_views"} == {"session_views"}
    assert set(run.not_judged) == {"churn", "intent"}


def test_a_feature_that_empties_in_a_shared_table_alarms(tmp_path, rng, pages):
    lead(tmp_path, "return_risk", "intent_7d")
    share(tmp_path, tables.TRAINING_TASKS, return_risk=training(rng, 1_500), intent_7d=training(rng, 1_500))
    share(tmp_path, tables.SCORED_TASKS, return_risk=rows(rng, 1_500).drop(columns="views_30d"), intent_7d=rows(rng, 1_500))
    run = drift.run(tmp_path, settings=Settings(), as_of=AS_OF)
    assert (run.subjects["return_risk"].drifted, run.subjects["intent_7d"].drifted) == (("views_30d",), ())


def test_a_task_that_is_trained_anew_forgets_its_windows_and_no_other_does(tmp_path, rng, pages):
    lead(tmp_path, "return_risk", "intent_7d")
    kept = training(rng, 1_500)
    share(tmp_path, tables.SCORED_TASKS, return_risk=rows(rng, 1_500, shift=3), intent_7d=rows(rng, 1_500, shift=3))
    for day, other in ((0, training(rng, 1_500)), (7, training(rng, 1_500))):
        share(tmp_path, tables.TRAINING_TASKS, return_risk=kept, intent_7d=other)
        run = drift.run(tmp_path, settings=Settings(), as_of=AS_OF + timedelta(days=day))
    assert column(run.subjects["return_risk"], "views_30d").windows == "2 of 2"
    assert column(run.subjects["intent_7d"], "views_30d").windows == "1 of 1"


def test_a_task_with_a_champion_and_no_rows_is_named(tmp_path, rng, pages):
    lead(tmp_path, "return_risk", "intent_7d")
    share(tmp_path, tables.TRAINING_TASKS, return_risk=training(rng, 1_500))
    run = drift.run(tmp_path, settings=Settings(), as_of=AS_OF)
    assert run.not_judged["return_risk"] == "scored_tasks holds no rows of return_risk"
    assert run.not_judged["intent_7d"] == "training_tasks and scored_tasks hold no rows of intent_7d"
