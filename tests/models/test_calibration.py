import numpy as np
import pytest

from models.calibration import MIN_SLOPE, cheapest_threshold, platt


def test_platt_takes_overconfidence_and_bias_back() -> None:
    rng = np.random.default_rng(6)
    logit = rng.normal(-0.5, 1.0, 20_000)
    label = (rng.random(len(logit)) < 1 / (1 + np.exp(-logit))).astype(float)
    assert platt(3.0 * logit + 1.0, label) == pytest.approx((1 / 3, -1 / 3), abs=0.03)
    assert platt(logit, label) == pytest.approx((1.0, 0.0), abs=0.05)


def test_platt_never_turns_the_order_around_and_says_nothing_without_rows() -> None:
    logit = np.linspace(-3, 3, 500)
    slope, _ = platt(logit, (logit < 0).astype(float))
    assert slope == MIN_SLOPE
    assert platt(np.empty(0), np.empty(0)) == (1.0, 0.0)
    assert np.isfinite(platt(logit, (logit > 0).astype(float))).all()  # separable: the likelihood alone has no maximum


def test_the_threshold_is_the_cheapest_cut_of_the_calibration_rows() -> None:
    rng = np.random.default_rng(3)
    probability = np.round(rng.random(200), 2)
    label = (rng.random(200) < probability).astype(float)
    cost = lambda cut: 1.0 * ((probability >= cut) & (label == 0)).sum() + 4.0 * ((probability < cut) & (label == 1)).sum()  # noqa: E731
    chosen = cheapest_threshold(probability, label, 1.0, 4.0)
    assert cost(chosen) == min(cost(cut) for cut in np.linspace(0, 1.01, 102))
    assert cheapest_threshold(np.empty(0), np.empty(0), 1.0, 4.0) == 0.2
