"""The rows of one model take the place of its own, never of another's."""

import pandas as pd
import pytest

from pipelines import tables
from pipelines.training import evidence

AT = pd.Timestamp("2026-03-01", tz="UTC")


def rows(n, **columns):
    return pd.DataFrame({"customer_id": [f"c{i}" for i in range(n)], "event_timestamp": AT, "probability": 0.5, **columns})


def test_a_model_that_is_trained_again_replaces_its_rows_and_keeps_those_of_others(tmp_path):
    evidence.keep(tmp_path, "return_risk", rows(3, views_30d=1))
    evidence.keep(tmp_path, "intent_7d", rows(2, session_views=2))
    evidence.keep(tmp_path, "return_risk", rows(5, views_30d=3))
    kept = tables.read(tmp_path, tables.TRAINING_TASKS)
    assert kept["model"].value_counts().to_dict() == {"return_risk": 5, "intent_7d": 2}
    assert kept.groupby("model")["views_30d"].apply(list)["return_risk"] == [3] * 5
    assert kept.loc[kept["model"] == "intent_7d", "session_views"].tolist() == [2, 2]
    assert kept.loc[kept["model"] == "intent_7d", "views_30d"].isna().all()


@pytest.mark.parametrize("name", ["churn", "intent"])
def test_the_models_of_the_loop_have_tables_of_their_own(tmp_path, name):
    evidence.keep(tmp_path, name, rows(3))
    assert tables.count(tmp_path, tables.OWN_ROWS[name][0]) == 3
    assert not tables.exists(tmp_path, tables.TRAINING_TASKS)
