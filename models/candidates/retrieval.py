"""A moment -> for each customer the union of what the sources find, with each source's score and rank. Keeps no customer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from models.candidates.content import Content
from models.candidates.ease import Ease
from models.candidates.factors import Factors
from models.candidates.neighbours import Neighbours
from models.candidates.occasion import Occasion
from models.candidates.own_history import OwnHistory
from models.candidates.popularity import Popularity
from models.candidates.source import Source, chunks
from models.learner import Learner, read_json, write_json
from models.lists import chosen

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
    """Pairs (n,) of customer and item, by customer then item; by source the score and the rank, from 1, among the customer's pairs."""

    customer: NDArray[np.int64]
    item: NDArray[np.int64]
    scores: dict[str, NDArray[np.float32]]
    ranks: dict[str, NDArray[np.float32]]


class Retrieval(Learner):
    """The sources, fitted on one moment. n_candidates: the best so many of each source; ease_items: above, EASE is left out.

    factors: parameters of the matrix factorisation. Learned: `sources_` by name.
    """

    def __init__(
        self, *, n_candidates: int = 60, ease_items: int = 5_000, factors: dict[str, Any] | None = None, random_state: int = 0
    ) -> None:
        self.n_candidates = n_candidates
        self.ease_items = ease_items
        self.factors = factors
        self.random_state = random_state

    def fit(self, now: Occasion) -> Self:
        """Fit every source on what was known at this moment. Raises ValueError where nothing was."""
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
        return self

    def candidates(self, now: Occasion, customers: NDArray[np.int64], *, new_only: bool) -> Iterator[Candidates]:
        """Candidates of these rows of `now`, some rows at a time. new_only: nothing that the customer bought before."""
        self._check_fitted("sources_")
        histories = {name: now.matrix(**READS[name])[customers] for name in self.sources_}
        bought = now.bought()[customers]
        for part in chunks(len(customers), now.n_items * len(self.sources_)):
            dense = {name: source.score(histories[name][part]) for name, source in self.sources_.items()}
            seen = bought[part].toarray() > 0
            yield _union(dense, seen, customers[part], k=self.n_candidates, new_only=new_only)

    def save(self, folder: Path) -> None:
        """Write each source into a folder of its name, and `retrieval.json`."""
        for name, source in self.sources_.items():
            source.save(folder / name)
        write_json(folder / "retrieval.json", {"kind": "retrieval", "params": self.get_params(), "sources": list(self.sources_)})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The sources as they were saved."""
        saved = read_json(folder / "retrieval.json", "retrieval")
        retrieval = cls(**saved["params"])
        retrieval.sources_ = {name: KINDS[name].load(folder / name) for name in saved["sources"]}
        return retrieval


def _union(
    dense: dict[str, NDArray[np.float32]], seen: NDArray[np.bool_], customers: NDArray[np.int64], *, k: int, new_only: bool
) -> Candidates:
    """The k best of each source that it says anything for (a score above 0), each pair once."""
    found = np.zeros_like(seen)
    for scores in dense.values():
        found |= chosen(np.where((scores > 0) & ~seen if new_only else scores > 0, scores, np.float32(-np.inf)), k)
    row, item = np.nonzero(found)
    values = {name: scores[row, item] for name, scores in dense.items()}
    return Candidates(customers[row], item, values, {name: _ranks(row, scores) for name, scores in values.items()})


def _ranks(row: NDArray[np.intp], values: NDArray[np.float32]) -> NDArray[np.float32]:
    order = np.lexsort((-values, row))
    rank = np.empty(len(row), dtype=np.float32)
    rank[order] = np.arange(len(row)) - np.searchsorted(row, row) + 1
    return rank
