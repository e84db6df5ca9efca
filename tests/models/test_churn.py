import numpy as np
import pandas as pd

from models import churn, evaluation


def test_longer_silence_scores_higher_and_never_bought_highest() -> None:
    features = pd.DataFrame({"last_purchase_age_days": [3.0, np.nan, 80.0], "events_30d": [1, 2, 3]})
    score = churn.TASK.rival(features)
    assert score.argsort().tolist() == [0, 2, 1]
    assert np.isfinite(score).all()


def test_the_task_is_judged_by_a_metric_that_exists_and_hides_protected_columns() -> None:
    assert callable(getattr(evaluation, churn.TASK.metric))
    assert {"age_band", "gender"} <= set(churn.TASK.excluded)
    assert (churn.TASK.name, churn.TASK.feature_service) == ("churn", "churn_v1")
