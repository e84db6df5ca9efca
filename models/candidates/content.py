"""What items are, not who chose them: the source that can rank an item nobody has touched yet."""

from typing import Any, Self

import numpy as np
from scipy import sparse

from models.candidates.source import Source, checked
from models.lists import Singles


class Content(Source):
    """How much likelier than by chance the customer turns to items with these attributes, averaged over an item's attributes.

    An attribute is a column of 0 and 1, such as one category or one price band. With n weights of the customer, of them n_a on
    items with attribute a, and p_a the share of all customers' weights there: (n_a + prior * p_a) / (n + prior) over a's share
    of the catalogue. prior: how much weight of one's own counts as much as everybody's taste, in purchases.

    Learned: `attributes_` csr (n_items, n_attributes), `taste_` (n_attributes,) p_a.
    """

    _arrays = ("taste_",)
    _matrices = ("attributes_",)

    taste_: Singles
    attributes_: Any

    def __init__(self, *, prior: float = 1.0, random_state: int = 0) -> None:
        self.prior = prior
        self.random_state = random_state

    def fit(self, interactions: Any, validation: Any = None, *, attributes: Any = None) -> Self:
        """As every source, with what items are: csr (n_items, n_attributes) of 0 and 1. Without it every score is 0."""
        if not self.prior > 0:
            raise ValueError(f"Content: prior must be above 0, found {self.prior}")
        n_items = interactions.shape[1]
        self.attributes_ = sparse.csr_matrix((n_items, 0)) if attributes is None else checked(attributes)
        if self.attributes_.shape[0] != n_items or (self.attributes_.data != 1).any():
            raise ValueError(f"Content: expected attributes of 0 and 1 for {n_items} items, found shape {self.attributes_.shape}")
        return super().fit(interactions)

    def _learn(self, weights: Any) -> None:
        total = np.asarray(weights.sum(axis=0)).ravel() @ self.attributes_
        self.taste_ = np.asarray(total / weights.sum(), dtype=np.float32).ravel()

    def _score(self, histories: Any) -> Singles:
        own = (histories @ self.attributes_).toarray()
        mass = np.asarray(histories.sum(axis=1)).reshape(-1, 1)
        offered = np.asarray(self.attributes_.mean(axis=0)).ravel()
        lift = (own + self.prior * self.taste_) / (mass + self.prior) / np.where(offered > 0, offered, 1.0)
        n = np.maximum(np.diff(self.attributes_.indptr), 1)
        return np.asarray((self.attributes_ @ lift.T).T / n, dtype=np.float32)

    def _restored(self, saved: dict[str, Any]) -> None:
        if self.attributes_.shape != (self.n_items_, len(self.taste_)):
            raise ValueError(f"Content: expected {len(self.taste_)} attributes of {self.n_items_} items, found {self.attributes_.shape}")
