"""What a customer is worth: two models that are tested by themselves, put together."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from models.customer_value import CustomerValue
from models.lifetime import HISTORY


def world(n: int = 400) -> tuple[pd.DataFrame, np.ndarray]:
    """Some come every ten days and are there, some came twice long ago; the former spend more on an order."""
    rng = np.random.default_rng(0)
    is_loyal, age = np.arange(n) % 2 == 0, rng.uniform(100, 300, n)
    repeats = np.where(is_loyal, np.maximum(rng.poisson(age / 10), 1), rng.integers(0, 3, n)).astype(float)
    recency = np.where(repeats > 0, np.where(is_loyal, age * rng.uniform(0.9, 1.0, n), rng.uniform(5, 30, n)), 0.0)
    value = rng.gamma(20, np.where(is_loyal, 4.0, 2.0))
    return pd.DataFrame(dict(zip(HISTORY, (repeats, recency, age), strict=True))), value


def test_value_is_orders_times_their_worth_less_what_waiting_costs() -> None:
    history, value = world()
    told = CustomerValue(horizon_days=180.0, discount=0.0).fit(history, value).predict(history, value)
    assert told["value"].to_numpy() == pytest.approx((told["expected_orders"] * told["order_value"]).to_numpy(), rel=1e-9)
    later = CustomerValue(horizon_days=180.0, discount=0.2).fit(history, value).predict(history, value)["value"]
    assert ((later < told["value"]) & (later > told["value"] * 0.8 ** (180 / 365))).all()
    is_loyal = np.arange(len(history)) % 2 == 0
    assert told["value"][is_loyal].median() > 20 * told["value"][~is_loyal].median()


def test_saved_and_loaded_it_answers_to_the_bit_and_untrained_not_at_all(tmp_path: Path) -> None:
    history, value = world()
    fitted = CustomerValue().fit(history, value)
    fitted.save(tmp_path / "value")
    assert CustomerValue.load(tmp_path / "value").predict(history, value).equals(fitted.predict(history, value))
    assert {path.suffix for path in (tmp_path / "value").rglob("*") if path.is_file()} == {".json"}
    with pytest.raises(ValueError, match="learned nothing yet"):
        CustomerValue().predict(history, value)
    with pytest.raises(ValueError, match="repeat order"):
        CustomerValue().fit(history.assign(repeat_orders=0.0, recency_days=0.0), value)
