from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import imputation, tables
from pipelines.errors import InputError
from pipelines.settings import IngestSettings, Settings

START = datetime(2026, 1, 1, tzinfo=UTC)
NOW = START + timedelta(days=30)
BANDS = ("18-24", "25-34", "35-44", "45-54", "55+")


def people(n: int, *, signal: float, stated: float = 0.6, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Traits with gaps, features, and the truth: regions follow the features as strongly as `signal` says, ages do not at all."""
    rng = np.random.default_rng(seed)
    numbers = rng.poisson(5, size=(n, 3)).astype(float)
    score = signal * (np.log1p(numbers[:, 0]) - np.log1p(numbers[:, 1])) + rng.gumbel(size=n) - 0.2
    ages = rng.choice(BANDS, size=n, p=(0.3, 0.1, 0.15, 0.25, 0.2))
    truth = pd.DataFrame({"region": np.where(score > 0, "north", "south"), "age_band": ages}, dtype=object)
    features = pd.DataFrame(numbers, columns=["views", "purchases", "noise"]).mask(rng.random((n, 3)) < 0.05)
    return truth.where(rng.random((n, 2)) < stated), features, truth


def fitted(frame: pd.DataFrame, features: pd.DataFrame, **plan: str) -> imputation.Imputer:
    return imputation.fit(frame, plan=plan, features=features, rng=np.random.default_rng(1))  # type: ignore[arg-type]


def test_a_model_is_used_where_it_beats_the_mode_on_values_that_it_had_not_seen_and_is_as_good_as_it_says() -> None:
    frame, features, truth = people(2_000, signal=3.0)
    imputer = fitted(frame, features, region="model")
    report = imputer.report["region"]
    assert report.is_used
    assert report.error < report.baseline - 0.1
    assert report.n == frame["region"].notna().sum()
    filled = imputer.apply(frame, features=features)
    is_gap = frame["region"].isna()
    hit_rate = (filled["region"] == truth["region"])[is_gap].mean()
    assert hit_rate == pytest.approx(report.accuracy, abs=0.04)
    assert hit_rate > report.baseline_accuracy + 0.1


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_finds_nothing_is_refused_and_leaves_the_gaps(seed: int) -> None:
    frame, features, _ = people(600, signal=0.0, seed=seed)
    imputer = fitted(frame, features, region="model")
    assert imputer.report["region"].why == "it is not better than the most common value"
    filled = imputer.apply(frame, features=features)
    assert filled["region"].isna().sum() == frame["region"].isna().sum()
    assert not filled["is_region_imputed"].any()


def test_the_median_is_that_of_the_order_and_the_mode_the_most_common() -> None:
    frame, features, _ = people(1_500, signal=0.0)
    by_median, by_mode = fitted(frame, features, age_band="median"), fitted(frame, features, age_band="mode")
    report = by_median.report["age_band"]
    assert (report.metric, report.is_used) == ("rank_distance", True)
    assert report.error < report.baseline
    is_gap = frame["age_band"].isna()
    assert set(by_median.apply(frame, features=features)["age_band"][is_gap]) == {"35-44"}
    assert set(by_mode.apply(frame, features=features)["age_band"][is_gap]) == {"18-24"}
    assert by_mode.report["age_band"].error == pytest.approx(by_mode.report["age_band"].baseline)


def test_values_without_order_have_no_median_and_too_few_values_no_method() -> None:
    frame, features, _ = people(500, signal=3.0)
    assert "no order" in fitted(frame, features, region="median").report["region"].why
    few = frame.assign(region=frame["region"].where(frame["region"].notna().cumsum() <= 49))
    for method in ("mode", "model"):
        report = fitted(few, features, region=method).report["region"]
        assert (report.is_used, report.n, report.why) == (False, 49, "49 values were stated; 50 are needed")


def test_one_value_alone_or_no_features_are_no_failure() -> None:
    frame, features, _ = people(300, signal=3.0)
    alone = frame.assign(region=frame["region"].where(frame["region"] == "north"))
    assert not fitted(alone, features, region="model").report["region"].is_used
    assert not fitted(frame, features[[]], region="model").report["region"].is_used
    assert fitted(frame, features.assign(empty=np.nan, flat=1.0), region="model").report["region"].is_used


def test_guesses_are_not_learned_from_and_are_guessed_anew() -> None:
    frame, features, _ = people(600, signal=3.0)
    guessed = frame.assign(region=frame["region"].fillna("mars"), is_region_imputed=frame["region"].isna())
    filled = fitted(guessed, features, region="mode").apply(guessed, features=features)
    assert "mars" not in set(filled["region"])
    assert filled["is_region_imputed"].tolist() == frame["region"].isna().tolist()
    pd.testing.assert_series_equal(filled["region"], fitted(frame, features, region="mode").apply(frame, features=features)["region"])


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from(["mode", "median", "model"]), st.floats(0.0, 1.0))
def test_a_stated_value_is_never_replaced_and_the_frame_given_never_changed(seed: int, method: str, stated: float) -> None:
    frame, features, _ = people(200, signal=2.0, stated=stated, seed=seed)
    before = frame.copy()
    filled = fitted(frame, features, age_band=method).apply(frame, features=features)
    pd.testing.assert_frame_equal(frame, before)
    is_stated = frame["age_band"].notna()
    assert (filled["age_band"] == frame["age_band"])[is_stated].all()
    assert not filled["is_age_band_imputed"][is_stated].any()
    assert (filled["is_age_band_imputed"] == (filled["age_band"].notna() & ~is_stated)).all()


# -- customer_profile --------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    frame, features, _ = people(400, signal=3.0)
    names = [f"c{n:03d}" for n in range(400)]
    profile = frame.assign(customer_id=names, event_timestamp=pd.Timestamp(START), gender=None)
    profile = profile.assign(is_age_band_imputed=False, is_gender_imputed=False, is_region_imputed=False)
    is_told = frame.notna().any(axis=1)  # whoever said nothing has no row
    moved = profile[is_told].head(1).assign(event_timestamp=pd.Timestamp(START + timedelta(days=9)), region="west")
    tables.write(tmp_path, tables.CUSTOMER_PROFILE, pd.concat([profile[is_told], moved]))
    schema = tables.CUSTOMER_ACTIVITY.schema
    assert schema is not None
    activity = pd.DataFrame({"customer_id": names, "event_timestamp": pd.Timestamp(START), "last_event_at": 5})
    activity = activity.assign(views_total=features["views"], purchases_total=features["purchases"]).reindex(columns=schema.names)
    numbers = dict.fromkeys(schema.names[2:], "Int64")
    tables.write(tmp_path, tables.CUSTOMER_ACTIVITY, activity.astype(numbers))
    return tmp_path


def settings_of(home: Path, **plan: str) -> Settings:
    return Settings(home=home, ingest=IngestSettings(imputation=plan))  # type: ignore[arg-type]


def read(home: Path) -> pd.DataFrame:
    return tables.read(home, tables.CUSTOMER_PROFILE).sort_values(["customer_id", "event_timestamp"], ignore_index=True)


def test_a_run_adds_what_it_guesses_from_its_own_time_on_and_a_second_one_nothing(home: Path) -> None:
    before = read(home)
    planned = settings_of(home, region="model", age_band="mode")
    report = imputation.run(home, settings=planned, as_of=NOW)
    after = read(home)
    assert [trait.is_used for trait in report.traits] == [True, True]
    assert report.rows == (after["event_timestamp"] == pd.Timestamp(NOW)).sum() == len(after) - len(before)
    old = after[after["event_timestamp"] < pd.Timestamp(NOW)].reset_index(drop=True)
    pd.testing.assert_frame_equal(old, before)
    state = after.drop_duplicates("customer_id", keep="last")
    assert len(state) == 400
    assert state[["region", "age_band"]].notna().all(axis=None)
    assert report.imputed == {trait: state[f"is_{trait}_imputed"].sum() for trait in ("region", "age_band")}
    assert state["gender"].isna().all()

    for later in (NOW, NOW + timedelta(days=1)):
        assert imputation.run(home, settings=planned, as_of=later).rows == 0
    pd.testing.assert_frame_equal(read(home), after)


def test_a_trait_that_is_stated_after_it_was_guessed_is_no_guess_any_more(home: Path) -> None:
    planned = settings_of(home, region="mode")
    imputation.run(home, settings=planned, as_of=NOW)
    state = read(home).drop_duplicates("customer_id", keep="last")
    guessed = state[state["is_region_imputed"]].head(1)
    stated = guessed.assign(region="east", is_region_imputed=False, event_timestamp=pd.Timestamp(NOW + timedelta(hours=1)))
    tables.append(home, tables.CUSTOMER_PROFILE, stated)
    assert imputation.run(home, settings=planned, as_of=NOW + timedelta(days=1)).rows == 0
    last = read(home).drop_duplicates("customer_id", keep="last").set_index("customer_id").loc[guessed["customer_id"].iloc[0]]
    assert (last["region"], last["is_region_imputed"]) == ("east", False)


def test_guesses_whose_method_is_withdrawn_are_taken_back_from_then_on(home: Path) -> None:
    before = read(home)
    imputation.run(home, settings=settings_of(home, region="mode"), as_of=NOW)
    later = NOW + timedelta(days=1)
    report = imputation.run(home, settings=settings_of(home), as_of=later)
    after = read(home)
    assert report.rows == (after["is_region_imputed"] & (after["event_timestamp"] == pd.Timestamp(NOW))).sum() > 0
    state = after.drop_duplicates("customer_id", keep="last").set_index("customer_id")
    assert not state["is_region_imputed"].any()
    stated = before.drop_duplicates("customer_id", keep="last").set_index("customer_id")["region"]
    assert state["region"].dropna().to_dict() == stated.dropna().to_dict()
    assert after[(after["event_timestamp"] == pd.Timestamp(NOW))]["is_region_imputed"].all()  # what was held then stays told


def test_nothing_is_imputed_unless_declared_and_an_unknown_trait_is_refused(home: Path) -> None:
    assert Settings().ingest.imputation == {}
    before = read(home)
    assert imputation.run(home, settings=settings_of(home), as_of=NOW) == imputation.ImputationReport((), {}, 0)
    pd.testing.assert_frame_equal(read(home), before)
    with pytest.raises(InputError, match="expected traits among age_band, gender, region, found shoe_size"):
        imputation.run(home, settings=settings_of(home, shoe_size="mode"), as_of=NOW)


def test_an_empty_home_is_no_failure(tmp_path: Path) -> None:
    report = imputation.run(tmp_path, settings=settings_of(tmp_path, region="model"), as_of=NOW)
    assert (report.rows, report.traits[0].why) == (0, "0 values were stated; 50 are needed")
