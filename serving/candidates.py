"""/recommend: a request -> ranked items, from the best rung of the ladder that can answer.

With `item_id`: items like it ("folded_in", nothing about the customer is used). Else: the customer's own ("personal"), what
is popular ("popular"), and a list that was prepared beforehand and needs nothing ("static"). A customer without consent, or
whom nobody knows, gets no personal answer: that is a cause, not a degradation. Never reads behaviour before consent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from serving import fallbacks
from serving.catalogue import Catalogue
from serving.champions import RECOMMENDER, Bundle, Recommending
from serving.clock import Clock
from serving.fallbacks import Deadline, Declined, Rung, Unavailable, descend
from serving.profile import STRANGER, Guard, Person
from serving.wire import Item, Recommendation, RecommendRequest

ENDPOINT = "/recommend"
PERSONAL, FOLDED_IN, POPULAR, STATIC = "personal", "folded_in", "popular", "static"

Flags = NDArray[np.bool_]
Picks = list[Item]


@dataclass
class _Case:
    """One request on its way down: what it asks, with what it is answered, and who it turned out to be about."""

    request: RecommendRequest
    bundle: Bundle
    catalogue: Catalogue
    at: datetime
    deadline: Deadline
    person: Person = field(default=STRANGER)

    @property
    def categories(self) -> list[str] | None:
        return self.request.filters.category


class Recommendations:
    """Answers /recommend with whatever is loaded at the moment of the request."""

    def __init__(self, *, guard: Guard, bundle: Callable[[], Bundle], catalogue: Callable[[], Catalogue], clock: Clock) -> None:
        self._guard, self._bundle, self._catalogue, self._clock = guard, bundle, catalogue, clock
        self._aligned: tuple[Recommending, Catalogue, NDArray[np.int64]] | None = None

    def answer(self, request: RecommendRequest, deadline: Deadline) -> Recommendation:
        """The best answer there is; never raises for a part that fails."""
        case = _Case(request, self._bundle(), self._catalogue(), self._clock.now(), deadline)
        rungs = [
            Rung(PERSONAL, lambda: self._personal(case)),
            Rung(POPULAR, lambda: self._popular(case)),
            Rung(STATIC, lambda: self._static(case)),
        ]
        if request.item_id is not None:
            rungs.insert(0, Rung(FOLDED_IN, lambda: self._similar(case)))
        outcome = descend(ENDPOINT, rungs)
        is_modelled = outcome.source in (PERSONAL, FOLDED_IN)
        return Recommendation(
            decision_id=str(uuid4()),
            customer_id=case.person.customer_id or request.customer_id,
            items=outcome.value,
            model_version=case.bundle.version(RECOMMENDER) if is_modelled else None,
            source=outcome.source,
            degraded=outcome.is_degraded,
            causes=list(outcome.causes),
            as_of=case.at,
        )

    def _personal(self, case: _Case) -> Picks:
        case.person = self._who(case)
        if case.person.customer_id is None:
            raise Declined(fallbacks.UNKNOWN_CUSTOMER)
        if not case.person.is_allowed:
            raise Declined(fallbacks.CONSENT)
        model = _model(case)
        rows = self._rows(case, model, case.person.customer_id)
        case.deadline.check()
        barred = np.flatnonzero(~self._eligible(case, model))
        exclude = sparse.csr_matrix((np.ones(barred.size, np.int8), barred, [0, barred.size]), (1, model.item_ids.size))
        if len(rows) == 1:
            items, scores = model.learner.recommend(rows, case.request.k, exclude)
        else:  # parts of one person that the model met as several: what they did counts together, their tastes alike
            factors = model.learner.customer_factors_[rows].mean(axis=0, keepdims=True)
            history = sparse.csr_matrix(model.learner.history_[rows].sum(axis=0))
            items, scores = model.learner.recommend_factors(factors, history, case.request.k, exclude)
        return _picks(model.item_ids, items[0], scores[0], "suits what this customer did")

    def _rows(self, case: _Case, model: Recommending, customer: str) -> NDArray[np.int64]:
        """Where the model holds the customer, and what was merged into them since it was trained. Raises Declined where it does not."""
        formers = self._guard.ask(lambda profiles: profiles.formers(customer, deadline=case.deadline))
        rows = [model.customers[name] for name in (customer, *formers) if name in model.customers]
        if not rows:
            raise Declined(fallbacks.NOT_IN_MODEL)
        return np.array(rows)

    def _similar(self, case: _Case) -> Picks:
        model = _model(case)
        asked = model.items.get(case.request.item_id or "")
        if asked is None or not model.directions[asked].any():
            raise Declined(fallbacks.UNKNOWN_ITEM)
        case.deadline.check()
        scores = model.directions @ model.directions[asked]
        scores[~self._eligible(case, model)] = -np.inf
        scores[asked] = -np.inf
        best = _best(scores, case.request.k)
        return _picks(model.item_ids, best, scores[best], f"goes with {case.request.item_id}")

    def _popular(self, case: _Case) -> Picks:
        catalogue, request = case.catalogue, case.request
        if not catalogue.index:
            raise Unavailable(fallbacks.NO_CATALOGUE)
        allowed = catalogue.allowed(exclude=_barred(request), categories=case.categories, at=case.at)
        best = catalogue.order[allowed[catalogue.order]][: request.k]
        share = catalogue.popularity[best] / max(float(catalogue.popularity.max()), 1.0)
        return _picks(catalogue.item_ids, best, share, "popular in this shop")

    def _static(self, case: _Case) -> Picks:
        names = case.catalogue.shelf.take(case.request.k, exclude=_barred(case.request), categories=case.categories)
        return [Item(name, 0.0, rank, "popular in this shop") for rank, name in enumerate(names, start=1)]

    def _who(self, case: _Case) -> Person:
        request, at, deadline = case.request, case.at, case.deadline
        if request.customer_id is not None:
            names = [request.customer_id]
            return self._guard.ask(lambda profiles: profiles.people(names, at=at, deadline=deadline)[0])
        device = request.anonymous_id or ""
        return self._guard.ask(lambda profiles: profiles.owners("anonymous_id", [device], at=at, deadline=deadline)[0])

    def _eligible(self, case: _Case, model: Recommending) -> Flags:
        """Which of the model's items the request may get (n_items,)."""
        if not case.catalogue.index:  # no catalogue to check against: only what needs none can be honoured
            return np.array([case.categories is None and item not in case.request.exclude for item in model.item_ids])
        allowed = case.catalogue.allowed(exclude=case.request.exclude, categories=case.categories, at=case.at)
        places = self._places(model, case.catalogue)
        eligible: Flags = allowed[places] & (places >= 0)
        return eligible

    def _places(self, model: Recommending, catalogue: Catalogue) -> NDArray[np.int64]:
        """Where the model's items are in the catalogue, -1 for those it no longer lists; computed once for each pair."""
        aligned = self._aligned
        if aligned is None or aligned[0] is not model or aligned[1] is not catalogue:
            aligned = self._aligned = (model, catalogue, catalogue.positions(model.item_ids))
        return aligned[2]


def _model(case: _Case) -> Recommending:
    if case.bundle.recommender is None:
        raise Unavailable(case.bundle.why.get(RECOMMENDER, fallbacks.MODEL_MISSING))
    return case.bundle.recommender


def _barred(request: RecommendRequest) -> Sequence[str]:
    """What must not come back: what the caller excludes, and the item that similar ones are wanted for."""
    return request.exclude if request.item_id is None else [*request.exclude, request.item_id]


def _best(scores: NDArray[np.floating], k: int) -> NDArray[np.intp]:
    """Positions of the k highest scores, best first."""
    some = np.argpartition(scores, -k)[-k:] if k < scores.size else np.arange(scores.size)
    return some[np.lexsort((some, -scores[some]))]


def _picks(names: NDArray[Any], positions: NDArray[np.integer], scores: NDArray[np.floating], reason: str) -> Picks:
    """The items in order, without the places that could not be filled. Raises Declined where that is all of them."""
    found = [(str(names[p]), float(s)) for p, s in zip(positions, scores, strict=True) if p >= 0 and s > -np.inf]
    if not found:
        raise Declined(fallbacks.NO_MATCH)
    return [Item(name, score, rank, reason) for rank, (name, score) in enumerate(found, start=1)]
