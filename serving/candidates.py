"""/recommend: a request -> ranked items, from the best rung of the ladder that can answer.

The rungs are those of `models.ladder`; with `item_id` the first is `folded_in`: items like it and items bought together with it, the same
for everybody.

A customer without consent, or whom nobody knows, gets no answer that behaviour went into: that is a cause, not a degradation. Never
reads behaviour before consent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from models.ladder import ANSWERED_S, FOLDED_IN, KEPT, PERSONAL, POPULAR, SEGMENT, STALE, STATIC
from models.shop.catalogue import Catalogue, Criteria, Offers
from models.shop.interest import Interest
from models.shop.selection import capped
from serving import arrivals, fallbacks, likeness, metrics, ranking, recent, tracing
from serving.champions import RECOMMENDER, Bundle, Recommending
from serving.clock import Clock
from serving.fallbacks import Deadline, Declined, Rung, Unanswered, Unavailable, descend
from serving.profile import STRANGER, Person, Profiles
from serving.ranking import Ranking
from serving.recent import Act
from serving.remembered import Remembered
from serving.store_guard import Guard
from serving.taste import Taste
from serving.wire import Item, Recommendation, RecommendRequest, ranked

ENDPOINT = "/recommend"
MOST_ANSWERED = 10_000  # customers whose last answer is remembered: some 10 MB
MOST_RANKED = 500  # customers whose order of items is remembered: some 10 MB

IN_SHOP, SUITS, SUITED = "popular in this shop", "suits what you did", "suited what you did when last looked at"
VIEWED, BOUGHT, EITHER = "viewed", "bought", "viewed or bought"

Flags = NDArray[np.bool_]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Picks:
    """Items, best first; `source`: the rung's own name where it is not the rung that says it; `version`: of the model that ranked them."""

    items: list[Item]
    source: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class _Answered:
    """Items, best first, with their scores, and the model version that ranked them."""

    item_ids: Sequence[str]
    scores: Sequence[float]
    version: str


@dataclass(frozen=True)
class _Ranked:
    """How a customer's items were ordered, and everything that it followed from but the moment."""

    model: Recommending
    known: Sequence[object]
    seen: Ranking | Taste


@dataclass
class _Case:
    """One request on its way down: what it asks, with what it is answered, and who it turned out to be about."""

    request: RecommendRequest
    bundle: Bundle
    catalogue: Catalogue
    at: datetime
    deadline: Deadline
    person: Person = field(default=STRANGER)
    bought: Sequence[str] = ()
    failure: Unanswered | None = None  # why the customer's own answer could not be given

    @property
    def name(self) -> tuple[str, str]:
        """Kind and text of what the customer is asked for by."""
        if self.request.customer_id is not None:
            return "customer_id", self.request.customer_id
        return "anonymous_id", self.request.anonymous_id or ""

    @cached_property
    def asked(self) -> Criteria:
        """What the request allows, whoever it is about."""
        filters, barred = self.request.filters, self.request.item_id
        price = filters.price
        band = None if price is None else (100 * (price.min or 0.0) - 0.5, np.inf if price.max is None else 100 * price.max + 0.5)
        exclude = self.request.exclude if barred is None else [*self.request.exclude, barred]
        return Criteria(exclude, filters.category, filters.in_stock, band)

    @property
    def criteria(self) -> Criteria:
        """And without what the customer bought, where that is asked for and known."""
        return replace(self.asked, exclude=[*self.asked.exclude, *self.bought]) if self.bought else self.asked


class Recommendations:
    """Answers /recommend with whatever is loaded at the moment of the request."""

    def __init__(
        self,
        *,
        guard: Guard,
        bundle: Callable[[], Bundle],
        catalogue: Callable[[], Catalogue],
        clock: Clock,
        ranking_s: float = 0.0,
    ) -> None:
        self._guard, self._bundle, self._catalogue, self._clock = guard, bundle, catalogue, clock
        self._answered: Remembered[_Answered] = Remembered(most=MOST_ANSWERED, oldest_s=ANSWERED_S)
        self._ranked: Remembered[_Ranked] = Remembered(most=MOST_RANKED, oldest_s=ranking_s)
        self._aligned: tuple[Recommending, Catalogue, Offers] | None = None

    def answer(self, request: RecommendRequest, deadline: Deadline) -> Recommendation:
        """The best answer there is; never raises for a part that fails."""
        case = _Case(request, self._bundle(), self._catalogue(), self._clock.now(), deadline)
        rungs = [
            Rung(PERSONAL, lambda: self._personal(case)),
            Rung(STALE, lambda: self._stale(case)),
            Rung(SEGMENT, lambda: self._segment(case)),
            Rung(POPULAR, lambda: self._popular(case)),
            Rung(STATIC, lambda: self._static(case)),
        ]
        if request.item_id is not None:
            rungs.insert(0, Rung(FOLDED_IN, lambda: self._like(case)))
        outcome = descend(ENDPOINT, rungs)
        return Recommendation(
            decision_id=str(uuid4()),
            customer_id=case.person.customer_id or request.customer_id,
            items=outcome.value.items,
            model_version=outcome.value.version,
            source=outcome.value.source or outcome.source,
            degraded=outcome.is_degraded,
            causes=list(outcome.causes),
            as_of=case.at,
        )

    def forget_everybody(self) -> None:
        """Let go of all that is remembered of customers."""
        self._answered.clear()
        self._ranked.clear()

    # -- rungs

    def _personal(self, case: _Case) -> Picks:
        try:
            return self._own(case)
        except Unanswered as reason:
            case.failure = reason
            raise

    def _own(self, case: _Case) -> Picks:
        customer = self._identify(case)
        model = _model(case)
        with tracing.span("features"):
            rows, acts = self._guard.ask(lambda profiles: _history(profiles, case, model, customer))
        case.deadline.check()
        request, k = case.request, case.request.k
        with tracing.span("fold in"):
            seen = self._seen(case, customer, model, rows, acts)
        if seen is None:
            raise Declined(fallbacks.NOT_IN_MODEL)
        offers = self._offers(model, case.catalogue)
        is_plain = not request.new_only and request.filters == NO_FILTERS and not request.exclude and request.max_per_category is None
        with tracing.span("model"):
            criteria, length = case.criteria, max(k, KEPT) if is_plain else k
            allows = partial(offers.allowed, criteria, case.at)
            best, scores = seen.best(allows, length, category=offers.category, most=request.max_per_category)
        names, values = [model.item_ids[place] for place in best.tolist()], scores.tolist()
        if not names:
            raise Declined(fallbacks.NO_MATCH)
        if is_plain:
            self._answered.keep(customer, _Answered(names, values, model.version))
        strongest = seen.strongest(best[:k])
        done = {act.item_id: BOUGHT if act.is_bought else VIEWED for act in acts}
        reasons = [
            SUITS if place < 0 else _because(model.item_ids[place], done, of=name)
            for place, name in zip(strongest.tolist(), names[:k], strict=True)
        ]
        items = ranked(names[:k], values[:k], reasons)
        return Picks(self._joined(case, items), FOLDED_IN if seen.is_folded else PERSONAL, model.version)

    def _seen(self, case: _Case, customer: str, model: Recommending, rows: Sequence[int], acts: Sequence[Act]) -> Ranking | Taste | None:
        """The customer as the model sees them; as it did a moment ago where it knew the same of them, whatever else that request asked."""
        key, known = (customer, case.request.new_only), [*rows, *(act.done for act in acts)]
        before = self._ranked.of(key)
        is_same = before is not None and before.model is model and before.known == known
        metrics.ranking(is_remembered=is_same).inc()
        if before is not None and is_same:
            return before.seen
        seen = ranking.seen(model, rows, acts, case.at, new_only=case.request.new_only)
        if seen is not None:
            self._ranked.keep(key, _Ranked(model, known, seen))
        return seen

    def _like(self, case: _Case) -> Picks:
        model, catalogue, asked = case.bundle.recommender, case.catalogue, case.request.item_id or ""
        source = None if model is None else (model, self._offers(model, catalogue))
        if not likeness.is_known(asked, model, catalogue):
            if model is None:
                _model(case)
            raise Declined(fallbacks.UNKNOWN_ITEM)
        if case.request.new_only:
            self._learn_bought(case)
        case.deadline.check()
        items = likeness.like(asked, source, catalogue, case.criteria, at=case.at, k=case.request.k, most=case.request.max_per_category)
        if not items:
            raise Declined(fallbacks.NO_MATCH)
        return Picks(items, version=case.bundle.version(RECOMMENDER))

    def _stale(self, case: _Case) -> Picks:
        answered = self._remembered(case)
        offers = case.catalogue.offers
        places = case.catalogue.positions(answered.item_ids)
        allowed = np.flatnonzero((places >= 0) & offers.allowed(case.criteria, case.at, places)) if offers.index else np.empty(0, np.int64)
        kept = allowed[capped(offers.category[places[allowed]], case.request.max_per_category)][: case.request.k].tolist()
        if not kept:
            raise Declined(fallbacks.NO_MATCH)
        names = [answered.item_ids[i] for i in kept]
        return Picks(ranked(names, [answered.scores[i] for i in kept], [SUITED] * len(kept)), version=answered.version)

    def _segment(self, case: _Case) -> Picks:
        self._identify(case)
        customer = case.person.customer_id or ""
        name = self._guard.ask(lambda profiles: recent.segment(profiles, customer, at=case.at, deadline=case.deadline))
        interest = case.catalogue.segments.get(name or "")
        if interest is None:
            raise Declined(fallbacks.NO_SEGMENT)
        return self._listed(case, interest, f"popular in {name}")

    def _popular(self, case: _Case) -> Picks:
        catalogue = case.catalogue
        if not catalogue.offers.index:
            raise Unavailable(fallbacks.NO_CATALOGUE)
        return self._listed(case, catalogue.popular, IN_SHOP)

    def _static(self, case: _Case) -> Picks:
        names = case.catalogue.shelf.take(case.request.k, case.criteria, most=case.request.max_per_category)
        return Picks(ranked(names, [0.0] * len(names), [IN_SHOP] * len(names)))

    # -- parts of them

    def _listed(self, case: _Case, interest: Interest, reason: str) -> Picks:
        best = case.catalogue.leading(interest, case.criteria, case.request.k, at=case.at, most=case.request.max_per_category)
        if not best.size:
            raise Declined(fallbacks.NO_MATCH)
        names = [str(name) for name in case.catalogue.item_ids[best]]
        return Picks(self._joined(case, ranked(names, interest.share[best].tolist(), [reason] * len(names))))

    def _joined(self, case: _Case, items: list[Item]) -> list[Item]:
        return arrivals.joined(items, case.catalogue, case.criteria, at=case.at, most=case.request.max_per_category)

    def _identify(self, case: _Case) -> str:
        """The customer, who allows it. Raises Declined for anybody else, whose answers are then forgotten."""
        if case.failure is None:
            case.person = self._who(case)
        elif not case.person.is_allowed:
            raise case.failure  # it was asked already
        customer = case.person.customer_id
        if customer is None or not case.person.is_allowed:
            if customer is not None:
                self._answered.forget(customer)
                self._ranked.forget((customer, False), (customer, True))
            raise Declined(fallbacks.UNKNOWN_CUSTOMER if customer is None else fallbacks.CONSENT)
        if case.request.new_only and case.failure is None:
            bought = self._guard.ask(lambda profiles: recent.bought(profiles, customer, deadline=case.deadline))
            if bought is None:
                raise Unavailable(fallbacks.NO_HISTORY)
            case.bought = bought
        return customer

    def _learn_bought(self, case: _Case) -> None:
        """What the customer bought, where they are somebody who allows it to be looked at. Raises Unavailable where it cannot be had."""
        try:
            self._identify(case)
        except Declined:  # of nobody we know it is all new
            case.person = STRANGER

    def _who(self, case: _Case) -> Person:
        (kind, name), at, deadline = case.name, case.at, case.deadline
        with tracing.span("consent"):
            if kind == "customer_id":
                return self._guard.ask(lambda profiles: profiles.person(name, at=at, deadline=deadline))
            return self._guard.ask(lambda profiles: profiles.owners(kind, [name], at=at, deadline=deadline)[0])

    def _remembered(self, case: _Case) -> _Answered:
        """What was answered before. Raises what the customer's own answer failed with where that is nothing, or where nobody could be asked
        whether they still allow it.
        """
        found = self._answered.of(case.person.customer_id or "") if case.person.is_allowed else None
        if found is None:
            raise Declined((case.failure or Unavailable(fallbacks.MODEL_FAILED)).cause)
        return found

    def _offers(self, model: Recommending, catalogue: Catalogue) -> Offers:
        """The catalogue in the model's order of items; computed once for each pair."""
        aligned = self._aligned
        if aligned is None or aligned[0] is not model or aligned[1] is not catalogue:
            n = len(model.item_ids)
            if catalogue.offers.index:
                offers = catalogue.offers.take(catalogue.positions(model.item_ids), model.items)
            else:  # no catalogue to check against: only what needs none can be honoured
                unknown = (np.full(n, -np.inf), np.full(n, -1), np.full(n, np.nan), np.zeros(n, dtype=bool))
                offers = Offers(model.items, *unknown, {})
            aligned = self._aligned = (model, catalogue, offers)
        return aligned[2]


NO_FILTERS = RecommendRequest(customer_id="nobody").filters


def _history(profiles: Profiles, case: _Case, model: Recommending, customer: str) -> tuple[list[int], list[Act]]:
    """Where the model holds the customer and what was merged into them since, and what they did that it does not know."""
    formers = profiles.formers(customer, deadline=case.deadline)
    rows = [model.customers[name] for name in (customer, *formers) if name in model.customers]
    since_us = 0 if not rows else model.trained_us
    acts: list[Act] | None = []
    if since_us is not None:
        half_life = model.half_life_days
        acts = recent.acts(profiles, customer, since_us=since_us, half_life_days=half_life, at=case.at, deadline=case.deadline)
    return rows, acts or []


def _model(case: _Case) -> Recommending:
    if case.bundle.recommender is None:
        raise Unavailable(case.bundle.why.get(RECOMMENDER, fallbacks.MODEL_MISSING))
    return case.bundle.recommender


def _because(item: str, done: dict[str, str], *, of: str) -> str:
    how = done.get(item, EITHER)
    return f"because you {how} it before" if item == of else f"because you {how} {item}"
