"""Order values and purchase histories -> what a future order, and a customer until a horizon, is worth.

The gamma-gamma model of spend by maximum likelihood. Never says how many orders come: that is `models.lifetime`. Arrays and frames
in and out; no clock. Source: Fader & Hardie's note of 2013.
"""

from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import special

from models.learner import Learner, read_json, write_json
from models.lifetime import Lifetime, floats
from models.likelihood import Floats, Parameters, Slopes, maximise


class GammaGamma(Learner):
    """What an order is worth: order values are gamma around a customer's mean, and means differ between customers.

    Learned: `params_` p, q, v. q stays above 1, so that a mean exists for a customer of whom nothing is known.
    """

    def __init__(self, *, n_starts: int = 4, random_state: int = 0) -> None:
        self.n_starts = n_starts
        self.random_state = random_state

    def fit(self, orders: ArrayLike, mean_value: ArrayLike) -> Self:
        """Learn from the number of orders (n,) >= 1 and their mean value (n,) > 0; customers without are left out.

        Raises ValueError where fewer than two are left.
        """
        n, m = floats("orders", orders), floats("mean_value", mean_value)
        kept = (n > 0) & (m > 0)
        if kept.sum() < 2:
            raise ValueError(f"GammaGamma: expected customers with orders of some value, found {int(kept.sum())} of {len(n)}")
        unit = float(m[kept].mean())
        rows, rng = np.column_stack([n[kept], m[kept] / unit]), np.random.default_rng(self.random_state)
        slopes = lambda theta, part: _spend_slopes((theta[0], 1 + theta[1], theta[2]), *part.T)  # noqa: E731
        best = maximise(slopes, rows, 3, n_starts=self.n_starts, rng=rng)
        p, q, v = (float(value) for value in np.exp(best.x))
        self.params_ = {"p": p, "q": 1 + q, "v": v * unit}
        return self

    def expected_value(self, orders: ArrayLike, mean_value: ArrayLike) -> Floats:
        """Expected value of a future order (n,): between a customer's own mean and everybody's; 0 orders give everybody's."""
        self._check_fitted("params_")
        n, m = floats("orders", orders), floats("mean_value", mean_value)
        p, q, v = (self.params_[name] for name in ("p", "q", "v"))
        return np.asarray(p * (v + n * np.where(n > 0, m, 0.0)) / (p * n + q - 1))

    def loss(self, validation: tuple[ArrayLike, ArrayLike]) -> float:
        """Mean negative log-likelihood of (orders, mean value)."""
        self._check_fitted("params_")
        n, m = (floats("validation", part) for part in validation)
        kept = (n > 0) & (m > 0)
        return float(-_spend_slopes(tuple(self.params_.values()), n[kept], m[kept])[0].mean())

    def save(self, folder: Path) -> None:
        """Write `spend.json` into the folder, made if absent."""
        self._check_fitted("params_")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "spend.json", {"kind": "gamma_gamma", "params": self.get_params(), "learned": self.params_})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The learner as it was saved."""
        saved = read_json(folder / "spend.json", "gamma_gamma")
        learner = cls(**saved["params"])
        learner.params_ = saved["learned"]
        return learner


def lifetime_value(
    lifetime: Lifetime, spend: GammaGamma, history: pd.DataFrame, mean_value: ArrayLike, *, horizon: float, periods: int, discount: float
) -> Floats:
    """Value of the orders expected until `horizon` (n,), in the currency of `mean_value`, discounted once per period.

    history: as `Lifetime`; mean_value: (n,) mean value of the orders so far. discount: share that a value loses per period, the
    horizon being split into `periods` of equal length. Raises ValueError on numbers that are no horizon, periods or discount.
    """
    if not (horizon > 0 and periods >= 1 and 0 <= discount < 1):
        raise ValueError(
            f"lifetime_value: expected a horizon > 0, periods >= 1 and a discount in [0, 1), found {horizon}, {periods}, {discount}"
        )
    ends = horizon * np.arange(1, periods + 1) / periods
    by_end = np.column_stack([lifetime.expected_purchases(history, float(end)) for end in ends])
    orders = np.diff(by_end, axis=1, prepend=0.0) @ (1 - discount) ** np.arange(1, periods + 1)
    return np.asarray(orders * spend.expected_value(history["repeat_orders"].to_numpy() + 1, mean_value))


# -- private -------------------------------------------------------------------------------------------------------------


def _spend_slopes(theta: Parameters, n: Floats, m: Floats) -> Slopes:
    p, q, v = theta
    shape, digamma = p * n, special.digamma
    value = (
        special.gammaln(shape + q) - special.gammaln(shape) - special.gammaln(q) + q * np.log(v)
        + (shape - 1) * np.log(m) + shape * np.log(n) - (shape + q) * np.log(v + n * m)
    )  # fmt: skip
    return value, (
        n * (digamma(shape + q) - digamma(shape) + np.log(n * m) - np.log(v + n * m)),
        digamma(shape + q) - digamma(q) + np.log(v) - np.log(v + n * m),
        q / v - (shape + q) / (v + n * m),
    )
