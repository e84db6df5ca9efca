import math
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipelines import release
from pipelines.errors import InputError
from pipelines.settings import PrivacySettings, Settings

AT = datetime(2026, 1, 1, tzinfo=UTC)
REGIONS = pd.Series({f"c{i}": ("north", "south", "west")[i % 3] for i in range(3_000)})


def settings(epsilon_total: float = 10.0) -> Settings:
    return Settings(privacy=PrivacySettings(epsilon_total=epsilon_total))


def counts(
    home: Path, name: str = "regions", epsilon: float = 0.5, limit: float = 10.0, *, as_of: datetime = AT, people: pd.Series = REGIONS
) -> release.Release:
    groups = ("north", "south", "east")
    return release.counts(home, name, people, groups=groups, epsilon=epsilon, settings=settings(limit), by="test", as_of=as_of)


def least_epsilon(one: np.ndarray, other: np.ndarray) -> float:
    """A lower bound (95 %) of the privacy loss between two samples of a mechanism's output, over threshold events.

    Clopper-Pearson by its normal approximation, at each of the central thresholds; the largest wins (Jagielski et al. 2020).
    """
    found = 0.0
    for threshold in np.unique(np.quantile(np.concatenate([one, other]), np.linspace(0.02, 0.98, 49))):
        for p, q in (((one >= threshold).mean(), (other >= threshold).mean()), ((other < threshold).mean(), (one < threshold).mean())):
            low = p - 3.5 * math.sqrt(p * (1 - p) / len(one))
            high = q + 3.5 * math.sqrt(q * (1 - q) / len(other))
            found = max(found, math.log(max(low, 1e-12) / high))
    return found


def test_counts_are_near_the_truth_and_only_of_the_groups_asked_for(tmp_path: Path) -> None:
    found = counts(tmp_path)
    assert set(found.values) == {"north", "south", "east"}  # west is not told, east is told although nobody is there
    assert abs(found.values["north"] - 1_000) <= 4 * found.margin
    assert found.epsilon_left == pytest.approx(9.5)


def test_the_margin_holds_about_as_often_as_it_says() -> None:
    noise = np.array(release.add_noise([0] * 20_000, scale=2.0))
    margin = math.ceil(2.0 * math.log(1 / (1 - release.CONFIDENCE)))
    assert 0.94 <= (np.abs(noise) <= margin).mean() <= 0.98


def test_the_measured_privacy_loss_stays_below_the_claim_and_a_mechanism_with_half_the_noise_does_not() -> None:
    epsilon, n = 0.5, 200_000

    def loss(scale: float) -> float:
        return least_epsilon(np.array(release.add_noise([101] * n, scale=scale)), np.array(release.add_noise([100] * n, scale=scale)))

    assert loss(1 / epsilon) <= epsilon
    assert loss(0.5 / epsilon) > epsilon  # the control


def test_the_same_question_as_of_the_same_instant_gets_the_same_answer_for_nothing_whatever_the_data_say_now(tmp_path: Path) -> None:
    first = counts(tmp_path)
    assert [counts(tmp_path, people=REGIONS.iloc[i:]).values for i in range(5)] == [first.values] * 5
    assert release.spent(tmp_path) == pytest.approx(0.5)
    counts(tmp_path, as_of=AT + timedelta(days=1))
    assert release.spent(tmp_path) == pytest.approx(1.0)


def test_a_spent_budget_refuses_and_publishes_nothing(tmp_path: Path) -> None:
    counts(tmp_path, "a", epsilon=0.6, limit=1.0)
    with pytest.raises(release.BudgetSpent, match=r"would cost 0\.6 and 0\.4 of the privacy budget of 1 is left"):
        counts(tmp_path, "b", epsilon=0.6, limit=1.0)
    assert counts(tmp_path, "b", epsilon=0.4, limit=1.0).epsilon_left == pytest.approx(0.0)


def test_many_at_once_never_overspend(tmp_path: Path) -> None:
    def ask(i: int) -> bool:
        try:
            counts(tmp_path, f"question {i}", epsilon=0.1, limit=1.0)
        except release.BudgetSpent:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        granted = sum(pool.map(ask, range(64)))
    assert granted == 10
    assert release.spent(tmp_path) == pytest.approx(1.0)


def test_one_customer_moves_a_total_by_no_more_than_the_bound(tmp_path: Path) -> None:
    spend = pd.Series({f"c{i}": 100 for i in range(1_000)} | {"whale": 10_000_000})
    found = release.total(tmp_path, "revenue", spend, bound=500, epsilon=1.0, settings=settings(), by="test", as_of=AT)
    assert abs(found.values["total"] - 100_500) <= 5 * found.margin


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf"), 11.0])
def test_an_epsilon_that_protects_nobody_is_refused(tmp_path: Path, epsilon: float) -> None:
    with pytest.raises(InputError, match="expected an epsilon"):
        counts(tmp_path, epsilon=epsilon)


def test_a_customer_who_would_count_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one row per customer"):
        counts(tmp_path, people=pd.concat([REGIONS, REGIONS.iloc[:1]]))
