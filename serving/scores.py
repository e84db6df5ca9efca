"""A task and customers -> probabilities with bands and reasons, each from the best rung that can answer.

Live features through the champion ("personal"), the last batch score ("stale"), the base rate ("static"). Customers of one
request may stand on different rungs; the answer names the lowest. Without consent, or a state of it, it is the base rate and
no behaviour is read. Within the deadline probabilities come first, and reasons are left out when time runs short; one customer's
probability follows from their reasons, where these are wanted.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from operator import itemgetter
from typing import Any, Self

import numpy as np

from models.classifier import Classifier, Floats
from pipelines.online.feast_format import Key
from pipelines.windows import NUMBERS, Derived, Plan, derived_names, serving_plan
from serving import fallbacks, metrics, tracing
from serving.access import score_path
from serving.champions import PRIOR, Bundle, Scorer
from serving.clock import Clock
from serving.fallbacks import Deadline, Unavailable, count
from serving.profile import Person, Profiles, Rows
from serving.served import Sample
from serving.shadow import Asked, Shadow
from serving.store_guard import Guard
from serving.wire import Prediction, Reason, ScoreRequest, Scores

PERSONAL, STALE, STATIC = "personal", "stale", "static"
INLINE_CUSTOMERS = 16  # more are scored beside the event loop, so that a single request never waits for a batch
ENCODINGS_REMEMBERED = 100
EXPLAINED_AT_ONCE = 32  # rows; between two lots the deadline is looked at
CUTS_UNKNOWN = (1 / 3, 2 / 3)  # bands where no model says from when acting pays
WITH_COLUMNS = ("churn", "intent")  # tasks that have columns of their own in customer_scores


@dataclass
class _Case:
    """One request on its way down: what each place of the answer holds so far, and why."""

    task: str
    names: Sequence[str]
    bundle: Bundle
    at: datetime
    deadline: Deadline
    context: Mapping[str, float]  # what only the request tells
    n_reasons: int
    predictions: list[Prediction | None] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    is_degraded: bool = False
    version: str | None = None
    rows: Rows | None = None  # the features of the one customer asked for, where they came with the consent
    oldest: float | None = None  # when the features of the longest unchanged customer changed, seconds since 1970

    def step_down(self, source: str, cause: str, *, is_failure: bool) -> None:
        """Some places could not be filled by `source`."""
        if cause not in self.causes:
            self.causes.append(cause)
        self.is_degraded |= is_failure
        count(score_path(self.task), source, cause, is_failure=is_failure)

    @cached_property
    def at_us(self) -> int:
        return _micros(self.at)

    @property
    def is_batch(self) -> bool:
        return len(self.names) > INLINE_CUSTOMERS

    @property
    def cuts(self) -> tuple[float, float]:
        scorer = self.bundle.scorers.get(self.task)
        return scorer.cuts if scorer else CUTS_UNKNOWN

    @property
    def prior(self) -> float:
        scorer = self.bundle.scorers.get(self.task)
        return scorer.prior if scorer else self.bundle.priors.get(self.task, PRIOR)


@dataclass(frozen=True)
class _Encoding:
    """What can be known beforehand of how rows with columns of these `names` become rows of the learner's matrix."""

    learner: Classifier
    names: tuple[str, ...]
    plan: Plan
    pick: Callable[[Any], Any] | None  # the learner's columns among the plan's; None: to be encoded in the general way
    texts: list[tuple[int, str]]  # where they stand in the matrix
    nulls: list[int]  # columns without a value in training, whatever they hold by now

    @classmethod
    def of(cls, learner: Classifier, names: tuple[str, ...]) -> Self:
        """Passed on as they are: what is text to the learner, and what it does not read and may be text. All else is a number."""
        wanted, known = learner.feature_names_, learner.categories_
        own = dict(zip(names, derived_names(names), strict=False))
        plan = serving_plan(names, [n for n in names if n not in NUMBERS and (n in known or own[n] not in wanted)])
        places, is_text = plan.rows, [bool(known.get(name)) for name in wanted]
        is_null = [name in known and not text for name, text in zip(wanted, is_text, strict=True)]
        is_plain = len(wanted) > 1 and all(
            name in places and ((places[name] is None) == text or null) for name, text, null in zip(wanted, is_text, is_null, strict=True)
        )
        return cls(
            learner,
            names,
            plan,
            itemgetter(*[places[name] or 0 for name in wanted]) if is_plain else None,
            [(j, name) for j, name in enumerate(wanted) if is_text[j]],
            [j for j, null in enumerate(is_null) if null],
        )


class Scoring:
    """Answers for any declared task with whatever is loaded at the moment of the request."""

    def __init__(
        self, *, guard: Guard, bundle: Callable[[], Bundle], clock: Clock, sample: Sample | None = None, shadow: Shadow | None = None
    ) -> None:
        self._guard, self._bundle, self._clock, self._sample, self._shadow = guard, bundle, clock, sample, shadow
        self._encodings: dict[tuple[int, int], _Encoding] = {}

    def answer(self, task: str, request: ScoreRequest, deadline: Deadline) -> Scores:
        """The best answer there is, one prediction for each id in order; never raises for a part that fails."""
        case = self._case(task, request, deadline)
        customers = self._allowed(case)
        for source, rung, silent in ((PERSONAL, self._live, fallbacks.NO_FEATURES), (STALE, self._stale, fallbacks.NO_SCORE)):
            _fill(case, customers, source, rung, silent)
        return _finish(case)

    def without_looking(self, task: str, request: ScoreRequest, cause: str) -> Scores:
        """The base rate for everybody: the answer when there is no time for another."""
        case = self._case(task, request, Deadline(0.0))
        case.step_down(PERSONAL, cause, is_failure=True)
        return _finish(case)

    def _case(self, task: str, request: ScoreRequest, deadline: Deadline) -> _Case:
        bundle = self._bundle()
        names = request.customer_ids
        version = bundle.version(task)
        return _Case(
            task, names, bundle, self._clock.now(), deadline, request.context, request.reasons, [None] * len(names), version=version
        )

    def _allowed(self, case: _Case) -> dict[int, str]:
        """The customers by place whose data may be used."""
        try:
            with tracing.span("consent"):
                people = self._guard.ask(lambda profiles: _people(profiles, case), is_batch=case.is_batch)
        except Unavailable as reason:
            case.step_down(PERSONAL, reason.cause, is_failure=True)
            return {}
        customers: dict[int, str] = {}
        is_unknown = is_denied = False
        for i, person in enumerate(people):
            if person.customer_id is None:
                is_unknown = True
            elif person.is_allowed:
                customers[i] = person.customer_id
            else:
                is_denied = True
        if is_unknown:
            case.step_down(PERSONAL, fallbacks.UNKNOWN_CUSTOMER, is_failure=False)
        if is_denied:
            case.step_down(PERSONAL, fallbacks.CONSENT, is_failure=False)
        return customers

    def _live(self, case: _Case, customers: Mapping[int, str]) -> dict[int, Prediction]:
        scorer = case.bundle.scorers.get(case.task)
        if scorer is None:
            raise Unavailable(case.bundle.why.get(case.task, fallbacks.MODEL_MISSING))
        service, ids = scorer.service, list(customers.values())
        with tracing.span("features"):
            rows = case.rows or self._guard.ask(
                lambda profiles: profiles.read(service, ids, at=case.at, deadline=case.deadline) if service in profiles.views else None,
                is_batch=case.is_batch,
            )
        if rows is None:
            fallbacks.log.error("%s: the store has no service %s about customers alone", score_path(case.task), service)
            raise Unavailable(fallbacks.NO_FEATURES)
        present = [j for j, then in enumerate(rows.changed_at) if then is not None]
        if not present:
            return {}
        if self._sample is not None:
            self._sample.offer(
                service, f"{case.task} {scorer.version}", {j: ids[j] for j in present}, rows.row,
                served_us=case.at_us, read_us=_micros(self._clock.now()),
            )  # fmt: skip
        derived, matrix = self._derived(scorer.learner, rows, present, case)
        case.deadline.check()
        with tracing.span("model"):
            foretold, parts = _foretold(case, scorer.learner, matrix)
        probabilities = foretold.tolist()
        if not all(0 <= probability <= 1 for probability in probabilities):  # NaN is neither
            raise Unavailable(fallbacks.MODEL_FAILED)
        if self._shadow is not None and self._shadow.wants(case.task):
            self._shadow.offer(Asked(case.task, service, [ids[j] for j in present], derived, foretold, scorer.version, case.at_us))
        observed = metrics.score(case.task)
        for probability in probabilities:
            observed.observe(probability)
        with tracing.span("reasons"):
            reasons = _reasons(case, scorer, matrix, derived, parts)
        case.oldest = min(then for then in rows.changed_at if then is not None)
        places = list(customers)
        return {
            places[j]: _prediction(case, places[j], probability, PERSONAL, why)
            for j, probability, why in zip(present, probabilities, reasons, strict=True)
        }

    def _derived(self, learner: Classifier, rows: Rows, present: Sequence[int], case: _Case) -> tuple[Derived, Floats]:
        """The features of the rows that exist as seen at the moment of the request, and as the matrix that the learner reads."""
        key = (id(learner), id(rows.names))
        known = self._encodings.get(key)
        if known is None or known.learner is not learner or known.names is not rows.names:
            if len(self._encodings) > ENCODINGS_REMEMBERED:
                self._encodings.clear()
            known = self._encodings[key] = _Encoding.of(learner, rows.names)
        values = rows.values if len(present) == len(rows.values) else [rows.values[j] for j in present]
        derived = Derived(known.plan, values, case.at_us, request=case.context)
        if known.pick is None:
            return derived, learner.encode(derived)  # which says what is missing
        matrix = derived.numbers(known.pick)
        for j, name in known.texts:
            matrix[:, j] = learner.codes(name, derived.texts(name))
        if known.nulls:
            matrix[:, known.nulls] = np.nan
        return derived, matrix

    def _stale(self, case: _Case, customers: Mapping[int, str]) -> dict[int, Prediction]:
        ids = list(customers.values())
        if case.task in WITH_COLUMNS:
            view, prefix = "customer_scores", f"{case.task}_"
        else:
            view, prefix = "task_scores", ""
        keys: list[Key] = list(ids) if prefix else [(customer, case.task) for customer in ids]
        rows = self._guard.ask(lambda profiles: profiles.read(view, keys, at=case.at, deadline=case.deadline), is_batch=case.is_batch)
        columns = rows.columns
        values, versions = (columns[f"{prefix}{what}"] for what in ("probability", "version"))
        found = {i: float(value) for i, value in zip(customers, values, strict=True) if isinstance(value, float) and 0 <= value <= 1}
        if found and case.version is None:
            case.version = next((str(version) for version in versions if version is not None), None)
        return {i: _prediction(case, i, value, STALE, []) for i, value in found.items()}


def _people(profiles: Profiles, case: _Case) -> list[Person]:
    """Who the names are. What the model needs of a single customer who allows it is read on the way."""
    scorer = case.bundle.scorers.get(case.task)
    if scorer is not None and len(case.names) == 1:
        found = profiles.permitted(case.names[0], scorer.service, at=case.at, deadline=case.deadline)
        if found is not None:
            person, case.rows = found
            return [person]
    return profiles.people(case.names, at=case.at, deadline=case.deadline)


def _fill(
    case: _Case, customers: dict[int, str], source: str, rung: Callable[[_Case, Mapping[int, str]], dict[int, Prediction]], silent: str
) -> None:
    """Let the rung fill the open places of `customers`, and note why where it does not. Filled ones are taken out."""
    if not customers:
        return
    cause, found = silent, {}
    try:
        with tracing.span("rung", source):
            found = rung(case, customers)
    except Unavailable as reason:
        cause = reason.cause
    except Exception as error:  # a defect of one rung must not cost the answer
        cause, path = fallbacks.MODEL_FAILED, score_path(case.task)
        told = {"endpoint": path, "rung": source, "cause": cause}
        fallbacks.log.error("%s: rung %s failed with %s", path, source, fallbacks.trace(error), extra=told)
    for place, prediction in found.items():
        case.predictions[place] = prediction
        del customers[place]
    if customers:
        case.step_down(source, cause, is_failure=True)


def _finish(case: _Case) -> Scores:
    predictions = [p or _prediction(case, i, case.prior, STATIC, []) for i, p in enumerate(case.predictions)]
    sources = {prediction.source for prediction in predictions}
    return Scores(
        predictions=predictions,
        model_version=case.version,
        source=STATIC if STATIC in sources else STALE if STALE in sources else PERSONAL,
        degraded=case.is_degraded,
        causes=case.causes,
        as_of=case.at,
        feature_age_s=None if case.oldest is None else round(max(0.0, case.at.timestamp() - case.oldest), 3),
    )


def _prediction(case: _Case, place: int, probability: float, source: str, reasons: list[Reason]) -> Prediction:
    medium, high = case.cuts
    band = "high" if probability >= high else "medium" if probability >= medium else "low"
    return Prediction(case.names[place], probability, band, source, reasons)


def _micros(at: datetime) -> int:
    return round(at.timestamp() * 1_000_000)


def _foretold(case: _Case, learner: Classifier, matrix: Floats) -> tuple[Floats, Floats | None]:
    """Probabilities (n,). Those of a single row that is to be explained follow from its contributions (1, d), which come with it."""
    if len(matrix) > 1 or not case.n_reasons or case.deadline.is_crowded:
        return learner.predict_values(matrix), None
    parts = learner.explain_values(matrix)
    return learner.probability_of(parts), parts


def _reasons(case: _Case, scorer: Scorer, matrix: Floats, derived: Derived, parts: Floats | None) -> list[list[Reason]]:
    """For each row the features that moved the logit most, strongest first; empty for rows that there was no time for, or too many wait.
    parts: the contributions, where they are known.
    """
    if not case.n_reasons:
        return [[] for _ in range(len(matrix))]
    names = scorer.learner.feature_names_
    if parts is not None:
        return _strongest(parts, case.n_reasons, names, derived, first=0)
    reasons: list[list[Reason]] = []
    took_s = 0.0
    for start in range(0, len(matrix), EXPLAINED_AT_ONCE):
        if case.deadline.is_crowded or case.deadline.left_s() < 2 * took_s:  # as much again is kept for the answer
            case.step_down(PERSONAL, fallbacks.REASONS, is_failure=True)
            return reasons + [[] for _ in range(len(matrix) - len(reasons))]
        began = time.perf_counter()
        parts = scorer.learner.explain_values(matrix[start : start + EXPLAINED_AT_ONCE])
        reasons += _strongest(parts, case.n_reasons, names, derived, first=start)
        took_s = time.perf_counter() - began
    return reasons


def _strongest(parts: Floats, n: int, names: Sequence[str], derived: Derived, *, first: int) -> list[list[Reason]]:
    """Of each row of contributions the n largest in either direction; first: the place of the first of these rows in `derived`."""
    strongest = (-np.abs(parts)).argsort(axis=1, kind="stable")[:, :n]
    return [
        [Reason(names[c], _shown(derived.value(names[c], i)), float(row[c])) for c in chosen if row[c] != 0]
        for i, (row, chosen) in enumerate(zip(parts, strongest.tolist(), strict=True), start=first)
    ]


def _shown(value: object) -> float | str | None:
    if value is None or value != value:
        return None
    return float(value) if isinstance(value, (int, float)) else str(value)
