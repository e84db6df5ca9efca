import numpy as np
import pandas as pd
import pytest

from models.lifetime import BetaGeometric
from models.spend import GammaGamma, lifetime_value

CDNOW = {"p": 6.25, "q": 3.74, "v": 15.44}  # as published


def knowing(params: dict[str, float]) -> GammaGamma:
    made = GammaGamma()
    made.params_ = params
    return made


def world(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Orders, their mean value, and the value of one more, of customers of the model itself."""
    rng = np.random.default_rng(seed)
    scale = 1 / rng.gamma(CDNOW["q"], 1 / CDNOW["v"], n)
    orders = rng.integers(1, 9, n)
    return orders, rng.gamma(CDNOW["p"] * orders, scale) / orders, rng.gamma(CDNOW["p"], scale)


def test_published_parameters_are_recovered() -> None:
    orders, mean_value, _ = world(60_000, 1)
    found = GammaGamma().fit(orders, mean_value)
    assert found.params_ == pytest.approx(CDNOW, rel=0.1)  # p and v trade against each other along a ridge
    assert found.expected_value([0], [0.0])[0] == pytest.approx(35.22, rel=0.01)
    assert found.loss((orders, mean_value)) <= knowing(CDNOW).loss((orders, mean_value))


def test_expected_value_lies_between_ones_own_and_everybodys_and_is_right_on_average() -> None:
    orders, mean_value, later = world(40_000, 2)
    knows = knowing(CDNOW)
    expected = knows.expected_value(orders, mean_value)
    everybody = knows.expected_value([0], [0.0])[0]
    assert everybody == pytest.approx(35.22, abs=0.01)  # p v / (q - 1), as published
    assert ((expected - mean_value) * (expected - everybody) <= 1e-9).all()
    for count in (1, 4, 8):
        assert expected[orders == count].mean() == pytest.approx(later[orders == count].mean(), rel=0.03)
    assert np.mean((expected - later) ** 2) < np.mean((mean_value - later) ** 2)  # control: one's own mean alone is worse


def test_the_currency_changes_nothing_but_the_unit() -> None:
    orders, mean_value, _ = world(3_000, 3)
    euro, cents = GammaGamma().fit(orders, mean_value), GammaGamma().fit(orders, mean_value * 100)
    assert cents.expected_value(orders, mean_value * 100) == pytest.approx(100 * euro.expected_value(orders, mean_value), rel=1e-5)


def test_orders_without_value_teach_nothing() -> None:
    with pytest.raises(ValueError, match="found 1 of 3"):
        GammaGamma().fit([1, 2, 0], [0.0, 5.0, 7.0])


def test_lifetime_value_is_orders_times_value_and_discounts_later_orders() -> None:
    lifetime = BetaGeometric()
    lifetime.params_ = {"r": 0.243, "alpha": 4.414, "a": 0.793, "b": 2.426}
    rows = pd.DataFrame({"repeat_orders": [0.0, 2.0, 9.0], "recency_days": [0.0, 30.4, 38.0], "age_days": [38.9, 38.9, 38.9]})
    spend, mean_value = knowing(CDNOW), np.array([20.0, 35.0, 90.0])
    told = lifetime_value(lifetime, spend, rows, mean_value, horizon=52.0, periods=12, discount=0.0)
    assert told == pytest.approx(lifetime.expected_purchases(rows, 52.0) * spend.expected_value([1, 3, 10], mean_value))
    later = lifetime_value(lifetime, spend, rows, mean_value, horizon=52.0, periods=12, discount=0.01)
    assert (later < told).all()
    assert (later > told * 0.99**12).all()
    with pytest.raises(ValueError, match="periods >= 1"):
        lifetime_value(lifetime, spend, rows, mean_value, horizon=52.0, periods=0, discount=0.0)


def test_saved_and_loaded_it_answers_to_the_bit(tmp_path) -> None:
    orders, mean_value, _ = world(500, 4)
    fitted = GammaGamma().fit(orders, mean_value)
    fitted.save(tmp_path)
    assert np.array_equal(GammaGamma.load(tmp_path).expected_value(orders, mean_value), fitted.expected_value(orders, mean_value))
