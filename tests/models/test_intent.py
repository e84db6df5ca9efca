import numpy as np
import pandas as pd

from models import evaluation, intent


def test_a_cart_addition_outweighs_any_number_of_views_and_views_break_ties() -> None:
    features = pd.DataFrame({"session_cart_adds": [0, 1, 1, 0, None], "session_views": [500, 0, 4, None, 2]})
    score = intent.TASK.rival(features)
    assert score.argsort().tolist() == [3, 4, 0, 1, 2]
    assert np.isfinite(score).all()


def test_the_task_is_judged_by_a_metric_that_exists_and_hides_protected_columns() -> None:
    assert callable(getattr(evaluation, intent.TASK.metric))
    assert {"age_band", "gender"} <= set(intent.TASK.excluded)
    assert (intent.TASK.name, intent.TASK.feature_service) == ("intent", "intent_v1")
