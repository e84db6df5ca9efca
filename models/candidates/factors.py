"""Matrix factorisation as a source: any history is folded in to the factors that it would have been trained to."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import als
from models.als import Objective, Solved
from models.candidates.history import is_in
from models.candidates.opinion import Opinion, Places
from models.candidates.source import Source
from models.inner_product import InnerProducts
from models.lists import Singles


class Factors(Source):
    """The item side of `als`; parameters as those of `models.recommender.Recommender`. Learned: `item_factors_`, `objective_`."""

    _arrays = ("item_factors_",)

    item_factors_: Singles
    objective_: Objective

    def __init__(
        self,
        *,
        n_factors: int = 64,
        regularization: float = 0.01,
        alpha0: float = 0.3,
        nu: float = 0.5,
        n_epochs: int = 15,
        random_state: int = 0,
        num_threads: int = 1,
    ) -> None:
        self.n_factors = n_factors
        self.regularization = regularization
        self.alpha0 = alpha0
        self.nu = nu
        self.n_epochs = n_epochs
        self.random_state = random_state
        self.num_threads = num_threads

    def _learn(self, weights: Any) -> None:
        wrong = [name for name in ("n_factors", "regularization", "alpha0", "n_epochs") if not getattr(self, name) > 0]
        if wrong or not 0 <= self.nu <= 1:
            raise ValueError(f"Factors: {', '.join(wrong) or 'nu'} outside the range; above 0, and nu from 0 to 1")
        self.objective_ = Objective.balanced(weights, alpha0=self.alpha0, regularization=self.regularization, nu=self.nu)
        _, self.item_factors_ = als.factorize(
            weights, self.objective_, n_factors=self.n_factors, n_epochs=self.n_epochs, seed=self.random_state, num_threads=self.num_threads
        )
        self._prepare()

    def asked(self, items: Places, weights: NDArray[np.float64]) -> Opinion:
        """See `Source`."""
        solved = als.solve_one(items, weights, self.objective_, self.item_factors_, gram=self._wide_gram)
        return Liked(self._products, solved.factors, items, weights, solved)

    def _score(self, histories: Any) -> Singles:
        factors = als.fold_in(histories, self.objective_, self.item_factors_, gram=self._gram, num_threads=self.num_threads)
        return np.asarray(factors @ self.item_factors_.T)

    def _described(self) -> dict[str, Any]:
        return {"objective": vars(self.objective_)}

    def _restored(self, saved: dict[str, Any]) -> None:
        if len(self.item_factors_) != self.n_items_:
            raise ValueError(f"Factors: expected the factors of {self.n_items_} items, found {len(self.item_factors_)}")
        self.objective_ = Objective(**saved["objective"])
        self._prepare()

    def _prepare(self) -> None:
        self._gram, self._products = self.item_factors_.T @ self.item_factors_, InnerProducts.of(self.item_factors_)
        self._wide_gram = self._gram.astype(np.float64)


@dataclass(frozen=True)
class Liked:
    """Inner products with one customer's factors (n_factors,). solved: what each of the items (r,) with these weights (r,) adds to them."""

    products: InnerProducts
    factors: Singles
    items: Places
    weights: NDArray[np.float64]
    solved: Solved

    def best(self, k: int, barred: Places) -> Places:
        """See `Opinion`."""
        found, scores = self.products.best(self.factors, k + len(barred))
        is_open = scores > 0
        if len(barred):
            is_open &= ~is_in(found, barred)
        return found[is_open][:k]

    def of(self, items: Places) -> Singles:
        """See `Opinion`."""
        return self.products.scores(self.factors, items)
