"""What the search for the best inner products costs beside the product with all items. In: a home with a champion. Out: rows for
`rapport bench serve`. Both say the same before anything is told; CPU of this process, in turns."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from models.inner_product import InnerProducts
from models.recommender import Recommender
from pipelines import registry
from serving.bench.row import Row, row
from serving.process import ServiceError

WANTED = 100
QUERIES = 200
_SAME = 1e-5  # of the largest score: single-precision sums of other order


def search_rows(home: Path) -> list[Row]:
    """The champion's own factors, asked for the candidates of its own customers. Raises ServiceError where the two disagree."""
    learner = Recommender.load(registry.load_champion(home, "recommender").folder)
    items, customers = learner.item_factors_, learner.customer_factors_
    k, some = min(WANTED, len(items)), customers[np.linspace(0, len(customers) - 1, QUERIES).astype(int)]
    index = InnerProducts.of(items)

    def plainly(query: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
        scores = items @ query
        best = np.argpartition(scores, -k)[-k:]
        return np.asarray(np.sort(scores[best])[::-1])

    sides: dict[str, Callable[..., object]] = {"ours": lambda query: index.best(query, k), "plain": plainly}
    took = dict.fromkeys(sides, 0)
    for query in some:
        found, wanted = index.best(query, k)[1], plainly(query)
        if np.abs(found - wanted).max(initial=0.0) > _SAME * max(float(np.abs(wanted).max(initial=0.0)), 1e-30):
            raise ServiceError("bench: the search for the best inner products does not find what the product with all items finds")
        for side, call in sides.items():
            began = time.process_time_ns()
            call(query)
            took[side] += time.process_time_ns() - began
    ours, plain = (took[side] / 1e3 / len(some) for side in sides)
    name = f"{k} best of {items.shape[0]:,} items x {items.shape[1]} factors: CPU"
    return [row(name, ours, "us", "product with all, argpartition", plain)]
