"""Orders so far and what they were worth -> what a customer is worth until a horizon.

How many orders come is told by Pareto/NBD (`models.lifetime`), what one of them is worth by gamma-gamma (`models.spend`); the two are
taken as independent, as both models do. Frames and arrays in and out; no clock.
"""

from pathlib import Path
from typing import Self

import pandas as pd
from numpy.typing import ArrayLike

from models.learner import Learner, read_json, write_json
from models.lifetime import ParetoNBD
from models.spend import GammaGamma, lifetime_value

LIFETIME, SPEND = "lifetime", "spend"  # the folders of their files
MONTH_DAYS = 30.0


class CustomerValue(Learner):
    """Orders expected in the next `horizon_days`, what one is worth, and their value, later money less by `discount` a year.

    Learned: `lifetime_`, `spend_`.
    """

    lifetime_: ParetoNBD
    spend_: GammaGamma

    def __init__(
        self, *, horizon_days: float = 365.0, discount: float = 0.1, n_starts: int = 2, max_customers: int = 5_000, random_state: int = 0
    ) -> None:
        self.horizon_days = horizon_days
        self.discount = discount
        self.n_starts = n_starts
        self.max_customers = max_customers
        self.random_state = random_state

    def fit(self, history: pd.DataFrame, mean_value: ArrayLike) -> Self:
        """Learn from everybody who ever ordered. history: in days, the columns of `models.lifetime.HISTORY`; mean_value: (n,) of an order.

        Raises ValueError where nobody came back, or orders have no value.
        """
        shared = {"n_starts": self.n_starts, "random_state": self.random_state}
        self.lifetime_ = ParetoNBD(max_customers=self.max_customers, **shared).fit(history)
        self.spend_ = GammaGamma(**shared).fit(history["repeat_orders"].to_numpy() + 1, mean_value)
        return self

    def predict(self, history: pd.DataFrame, mean_value: ArrayLike) -> pd.DataFrame:
        """By row: expected_orders, order_value, and value, the discounted product, in the currency of `mean_value`."""
        self._check_fitted("spend_")
        months = max(round(self.horizon_days / MONTH_DAYS), 1)
        monthly = 1.0 - (1.0 - self.discount) ** (self.horizon_days / 365.0 / months)
        value = lifetime_value(
            self.lifetime_, self.spend_, history, mean_value, horizon=self.horizon_days, periods=months, discount=monthly
        )
        return pd.DataFrame(
            {
                "expected_orders": self.lifetime_.expected_purchases(history, self.horizon_days),
                "order_value": self.spend_.expected_value(history["repeat_orders"].to_numpy() + 1, mean_value),
                "value": value,
            },
            index=history.index,
        )

    def save(self, folder: Path) -> None:
        """Write `customer_value.json`, and the files of the two models in folders beside it."""
        self._check_fitted("spend_")
        self.lifetime_.save(folder / LIFETIME)
        self.spend_.save(folder / SPEND)
        write_json(folder / "customer_value.json", {"kind": "customer_value", "params": self.get_params()})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The learner as it was saved."""
        learner = cls(**read_json(folder / "customer_value.json", "customer_value")["params"])
        learner.lifetime_, learner.spend_ = ParetoNBD.load(folder / LIFETIME), GammaGamma.load(folder / SPEND)
        return learner
