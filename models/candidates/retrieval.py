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
from models.candidates.factors import Factors, Liked
from models.candidates.history import NOTHING, Aged, Floats, Histories
from models.candidates.neighbours import Neighbours
from models.candidates.occasion import Occasion
from models.candidates.opinion import Opinion, Places
from models.candidates.own_history import OwnHistory
from models.candidates.popularity import Popularity
from models.candidates.shelf import Shelf
from models.candidates.source import Linear, Source
from models.candidates.stack import Stack, Sums
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
    """One customer's items (c,), ascending. told: (2 n_kinds, c) the score of each source, in the order of `KINDS`, and then the rank, from
    1, among them; NaN where a source is not there. liked: what the factors say, None where they are not there.
    """

    items: NDArray[np.int64]
    told: NDArray[np.float32]
    liked: Liked | None

    @property
    def scores(self) -> NDArray[np.float32]:
        """(c, n_kinds)."""
        return self.told[: len(KINDS)].T

    @property
    def ranks(self) -> NDArray[np.float32]:
        """(c, n_kinds)."""
        return self.told[len(KINDS) :].T


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
        self._prepare()
        return self

    def candidates(self, known: Aged, *, new_only: bool) -> Candidates:
        """The candidates of one customer at a moment. new_only: nothing that the customer bought before."""
        self._check_fitted("sources_")
        barred = known.history.item[known.history.purchases > 0] if new_only else NOTHING.item
        every_weight = known.weights(self._half_lives)
        is_faded = not every_weight.all()
        items = known.history.item
        weights = [_counting(items, some) if is_faded else (items, some) for some in every_weight]
        sums = self._stack.asked(items, every_weight.take(self._linear_reads, axis=0))
        said = {name: source.asked(*weights[self._reads[name]]) for name, source in self._alone.items()}
        every: list[Sums | Opinion] = [sums, *said.values()]
        found = _distinct(np.concatenate([one.best(self.n_candidates, barred) for one in every]))
        told = np.empty((2 * len(KINDS), len(found)), dtype=np.float32)
        scores, ranks = told[: len(KINDS)], told[len(KINDS) :]
        for row, mine in zip(self._linear_rows, sums.of(found), strict=True):
            scores[row] = mine
        for name, one in said.items():
            scores[_ROW[name]] = one.of(found)
        for row in self._absent:
            scores[row] = np.nan
        ranks[_ROWS, (-scores).argsort(axis=1, kind="stable")] = np.arange(1, len(found) + 1, dtype=np.float32)
        for row in self._absent:
            ranks[row] = np.nan
        liked = said.get("factors")
        return Candidates(found, told, liked if isinstance(liked, Liked) else None)

    def save(self, folder: Path) -> None:
        """Write each source into a folder of its name, what is known of the items into `shelf`, and `retrieval.json`."""
        self._check_fitted("sources_")
        for name, source in self.sources_.items():
            source.save(folder / name)
        self.shelf_.save(folder / "shelf")
        write_json(folder / "retrieval.json", {"kind": "retrieval", "params": self.get_params(), "sources": list(self.sources_)})

    @classmethod
    def load(cls, folder: Path, *, is_mapped: bool = False) -> Self:
        """The sources as they were saved; mapped, processes share one copy in memory."""
        saved = read_json(folder / "retrieval.json", "retrieval")
        retrieval = cls(**saved["params"])
        retrieval.sources_ = {name: KINDS[name].load(folder / name, is_mapped=is_mapped) for name in saved["sources"]}
        retrieval.shelf_ = Shelf.load(folder / "shelf")
        retrieval._prepare()
        return retrieval

    def _prepare(self) -> None:
        """What every customer is asked with."""
        linear = {name: source for name, source in self.sources_.items() if isinstance(source, Linear)}
        self._stack, self._linear_rows = Stack.of(list(linear.values())), [_ROW[name] for name in linear]
        self._alone = {name: source for name, source in self.sources_.items() if name not in linear}
        self._half_lives = sorted({READS[name]["half_life_days"] for name in self.sources_})
        self._reads = {name: self._half_lives.index(READS[name]["half_life_days"]) for name in self.sources_}
        self._linear_reads = np.array([self._reads[name] for name in linear], dtype=np.intp)
        self._absent = [row for name, row in _ROW.items() if name not in self.sources_]


_ROW = {name: row for row, name in enumerate(KINDS)}
_ROWS = np.arange(len(KINDS))[:, None]


def _counting(items: Places, weights: Floats) -> tuple[Places, Floats]:
    """Without what is so long ago that it faded to nothing."""
    counts = weights > 0
    return items[counts], weights[counts]


def _distinct(items: Places) -> Places:
    """The different ones, ascending: a few are sorted several times faster than by `np.unique`."""
    ordered = np.sort(items)
    is_first = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
    return np.asarray(ordered[is_first])
