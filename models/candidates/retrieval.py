"""A moment -> sources that find candidates for any customer: the union of their best, each with every source's score and rank.

Keeps no customer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from models.candidates.content import Content
from models.candidates.ease import Ease
from models.candidates.factors import Factors
from models.candidates.history import Histories, History
from models.candidates.neighbours import Neighbours
from models.candidates.occasion import Occasion
from models.candidates.opinion import Opinion
from models.candidates.own_history import OwnHistory
from models.candidates.popularity import Popularity
from models.candidates.shelf import Shelf
from models.candidates.source import Source
from models.learner import Learner, read_json, write_json

KINDS: dict[str, type[Source]] = {
    "factors": Factors,
    "ease": Ease,
    "neighbours": Neighbours,
    "recent_neighbours": Neighbours,
    "own_history": OwnHistory,
    "popularity": Popularity,
    "content": Content,
}
# Which weights each source reads. Half-lives chosen on earlier cut-offs of two public shops and a simulated one.
READS: dict[str, dict[str, Any]] = {
    "factors": {"half_life_days": 90.0},
    "ease": {"half_life_days": 60.0},
    "neighbours": {"half_life_days": 60.0},
    "recent_neighbours": {"half_life_days": 7.0},
    "own_history": {"half_life_days": 60.0},
    "popularity": {"half_life_days": 14.0, "within_days": 28.0},
    "content": {"half_life_days": 60.0},
}


@dataclass(frozen=True)
class Candidates:
    """One customer's items (c,), ascending; by source, in the order of `KINDS`, the score and the rank, from 1, among them: (c, n_kinds).

    NaN where a source is not there. said: what each source that is there says.
    """

    items: NDArray[np.int64]
    scores: NDArray[np.float32]
    ranks: NDArray[np.float32]
    said: dict[str, Opinion]


class Retrieval(Learner):
    """The sources, fitted on one moment. n_candidates: the best so many of each source; ease_items: above, EASE is left out.

    factors: parameters of the matrix factorisation. Learned: `sources_` by name, `shelf_`.
    """

    def __init__(
        self, *, n_candidates: int = 25, ease_items: int = 5_000, factors: dict[str, Any] | None = None, random_state: int = 0
    ) -> None:
        self.n_candidates = n_candidates
        self.ease_items = ease_items
        self.factors = factors
        self.random_state = random_state

    def fit(self, now: Occasion, histories: Histories | None = None) -> Self:
        """Fit every source on what was known at this moment. histories: those of the moment, where they are counted already.

        Raises ValueError where nothing was known.
        """
        self.sources_: dict[str, Source] = {}
        attributes = now.attributes()
        for name, kind in KINDS.items():
            source = kind(**(self.factors or {})) if kind is Factors else kind()
            source.set_params(random_state=self.random_state)
            weights = now.matrix(**READS[name])
            if not weights.nnz or (kind is Ease and now.n_items > self.ease_items) or (kind is Content and not attributes.nnz):
                continue
            self.sources_[name] = source.fit(weights, attributes=attributes) if isinstance(source, Content) else source.fit(weights)
        if not self.sources_:
            raise ValueError("Retrieval: expected a moment with interactions before it, found none")
        self.shelf_ = Shelf.of(now, now.histories() if histories is None else histories)
        return self

    def candidates(self, history: History, at_us: int, *, new_only: bool) -> Candidates:
        """The candidates of one customer at a moment. new_only: nothing that the customer bought before."""
        self._check_fitted("sources_")
        barred = history.item[history.purchases > 0] if new_only else history.item[:0]
        weighed = {}
        for days in {READS[name]["half_life_days"] for name in self.sources_}:
            weights = history.weights(at_us, days)
            counts = weights > 0  # what is long ago may have faded to nothing
            weighed[days] = history.item[counts], weights[counts]
        said = {name: source.asked(*weighed[READS[name]["half_life_days"]]) for name, source in self.sources_.items()}
        found = np.unique(np.concatenate([one.best(self.n_candidates, barred) for one in said.values()]))
        nothing = np.full(len(found), np.nan, dtype=np.float32)
        scores = np.stack([said[name].of(found) if name in said else nothing for name in KINDS])
        order = np.argsort(-scores, axis=1, kind="stable")
        ranks = np.empty_like(scores)
        np.put_along_axis(ranks, order, np.arange(1, len(found) + 1, dtype=np.float32)[None], axis=1)
        ranks[np.isnan(scores)] = np.nan
        return Candidates(found, scores.T, ranks.T, said)

    def save(self, folder: Path) -> None:
        """Write each source into a folder of its name, what is known of the items into `shelf`, and `retrieval.json`."""
        self._check_fitted("sources_")
        for name, source in self.sources_.items():
            source.save(folder / name)
        self.shelf_.save(folder / "shelf")
        write_json(folder / "retrieval.json", {"kind": "retrieval", "params": self.get_params(), "sources": list(self.sources_)})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The sources as they were saved."""
        saved = read_json(folder / "retrieval.json", "retrieval")
        retrieval = cls(**saved["params"])
        retrieval.sources_ = {name: KINDS[name].load(folder / name) for name in saved["sources"]}
        retrieval.shelf_ = Shelf.load(folder / "shelf")
        return retrieval
