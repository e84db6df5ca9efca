"""The decision core that both paths into the service share: what is loaded, kept up to date, and asked.

In: settings, then bodies. Out: bodies. `open` and `refresh` do the heavy work, off the request path; neither raises, for a
part that cannot be loaded is a rung that does not answer. Never holds a request's data once it is answered.
"""

import asyncio
import contextlib
import contextvars
import functools
import gc
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from models.shop.catalogue import EMPTY, Catalogue
from pipelines.settings import Settings
from pipelines.vault import Vault, open_vault
from serving import access, breaker, candidates, catalogue, fallbacks, metrics, store_guard
from serving.candidates import Recommendations
from serving.champions import RECOMMENDER, TASKS, Champions, Rehearse
from serving.clock import Clock
from serving.fallbacks import Deadline, trace
from serving.memory import give_back
from serving.online_store import StoreFailure
from serving.profile import Profiles, open_profiles
from serving.scores import INLINE_CUSTOMERS, Scoring
from serving.served import Sample
from serving.shadow import Shadow
from serving.store_guard import PLACES, Guard
from serving.wire import Recommendation, RecommendRequest, ScoreRequest, Scores, decode, encode

log = logging.getLogger("rapport.serving")

T = TypeVar("T")

PATIENCE = 0.9  # of what is left until the deadline, with work that could not look at it; the rest is for the answer without that work
SPARE = 2  # threads that find all places at the store taken, and answer without it
PASSED = Deadline(0.0)


class Answers:
    """One per worker process. `open` once, `refresh` every few seconds, the rest at any time from the event loop."""

    def __init__(
        self, settings: Settings, *, rehearse: Rehearse | None = None, open_store: Callable[..., Profiles] = open_profiles
    ) -> None:
        self.settings = settings
        self.clock = Clock(settings)
        self.guard = Guard()
        self.champions = Champions(settings.home, rehearse=rehearse)
        self.catalogue: Catalogue = EMPTY
        self._open_store = open_store
        self._stamps: dict[str, object] = {}
        self._told: dict[str, str] = {}  # the version of each model, as the metrics have it
        self._batches = ThreadPoolExecutor(1, thread_name_prefix="scores")
        self._waiting = ThreadPoolExecutor(PLACES + SPARE, thread_name_prefix="slow-store")
        self.recommendations = Recommendations(
            guard=self.guard,
            bundle=lambda: self.champions.bundle,
            catalogue=lambda: self.catalogue,
            clock=self.clock,
            ranking_s=settings.serving.ranking_s,
        )
        self.sample = Sample(settings, vault=lambda: self.vault)
        self.shadow = Shadow(settings, sample=self.sample, rehearse=rehearse)
        self.scoring = Scoring(
            guard=self.guard, bundle=lambda: self.champions.bundle, clock=self.clock, sample=self.sample, shadow=self.shadow
        )

    @functools.cached_property
    def vault(self) -> Vault:
        """What turns names into pseudonyms; opened on first use. Raises StoreError for a key that is not this home's."""
        return open_vault(self.settings.home, master=self.settings.master_key)

    def open(self) -> None:
        """Load everything there is, answer a few requests into the void, and take what is now there out of the collector's rounds."""
        with ThreadPoolExecutor(2) as both:  # the models are rehearsed in a child while Feast is imported here
            for part in [both.submit(self.champions.refresh), both.submit(self.refresh_store)]:
                part.result()
        self.refresh_catalogue()
        self.warm_up()
        self._tell_versions()
        _settle()

    def refresh(self) -> None:
        """Follow what changed on disk: clock, champions, catalogue, feature store."""
        before = (self.champions.bundle, self.catalogue, self.guard.profiles)
        self.clock.refresh()
        self.champions.refresh()
        self.shadow.refresh()
        self._follow_erasures()
        self.refresh_catalogue()
        self.refresh_store()
        after = (self.champions.bundle, self.catalogue, self.guard.profiles)
        if any(old is not new for old, new in zip(before, after, strict=True)):  # they hold arrays, which have no one answer to "equal?"
            self._tell_versions()
            _settle()

    def _follow_erasures(self) -> None:
        """Nothing of whoever was erased stays in memory; who it was cannot be told from a receipt."""
        stamp = _stamp(self.settings.home / "erasures")
        if stamp != self._stamps.get("erasures"):
            self._stamps["erasures"] = stamp
            self.recommendations.forget_everybody()
            if self.guard.profiles is not None:
                self.guard.profiles.forget_names()

    def refresh_catalogue(self) -> None:
        """Load the items again if their tables changed."""
        with self._logged("catalogue"):
            stamp = catalogue.stamp(self.settings.home)
            if self._stamps.get("catalogue") != stamp:
                self.catalogue = catalogue.load(self.settings.home, at=self.clock.now())
                self._stamps["catalogue"] = stamp

    def refresh_store(self) -> None:
        """Resolve the feature services again if the registry changed, or the last time failed."""
        with self._logged("feature store"):
            stamp = _stamp(self.settings.home / "feature_store" / "registry.db")
            if stamp is None or self._stamps.get("store") == stamp:
                return
            try:
                self.guard.profiles = self._open_store(
                    self.settings.home,
                    max_age_hours=self.settings.serving.max_feature_age_hours,
                    pseudonym=self.vault.pseudonym,
                    redis_url=self.settings.online.redis_url,
                )
                self._stamps["store"] = None if self.guard.profiles.is_provisional else stamp
            except StoreFailure as error:
                log.warning("%s", error)

    def warm_up(self) -> None:
        """Answer for nobody, so that the first caller does not pay for imports and first connections."""
        nobody = ["nobody"] * (INLINE_CUSTOMERS + 1)
        deadline = Deadline.after_ms(5_000)
        self.recommendations.answer(RecommendRequest(customer_id="nobody"), deadline)
        for task in sorted({*access.SHORT, *self.champions.bundle.scorers}):
            self.scoring.answer(task, ScoreRequest(customer_ids=nobody), deadline)
        if self.champions.bundle.recommender:
            some = str(self.champions.bundle.recommender.item_ids[0])
            self.recommendations.answer(RecommendRequest(customer_id="nobody", item_id=some), deadline)

    def close(self) -> None:
        """Let the threads go; what waits to be noted is."""
        for pool in (self._batches, self._waiting):
            pool.shutdown(wait=False, cancel_futures=True)
        self.shadow.close()
        self.sample.close()

    async def recommend(self, request: RecommendRequest, deadline: Deadline) -> Recommendation:
        """See Recommendations.answer; where the store lets it wait too long, the answer is one without the store."""
        started = time.perf_counter()
        try:
            if self.guard.is_slow and self.guard.has_room:
                answer = await self._in(self._waiting, lambda: self.recommendations.answer(request, deadline), deadline)
            else:
                answer = self.recommendations.answer(request, deadline)
        except TimeoutError:
            answer = self.recommendations.answer(request, PASSED)
        metrics.answer(candidates.ENDPOINT, answer.source).observe(time.perf_counter() - started)
        return answer

    async def score(self, task: str, request: ScoreRequest, deadline: Deadline) -> Scores:
        """See Scoring.answer; what cannot be had in time is answered with what needs no time."""
        started = time.perf_counter()
        is_batch = len(request.customer_ids) > INLINE_CUSTOMERS
        try:
            if is_batch or (self.guard.is_slow and self.guard.has_room):
                pool = self._batches if is_batch else self._waiting
                answer = await self._in(pool, lambda: self.scoring.answer(task, request, deadline), deadline)
            else:
                answer = self.scoring.answer(task, request, deadline)
        except TimeoutError:
            answer = self.scoring.without_looking(task, request, fallbacks.DEADLINE)
        path = access.score_path(task)
        metrics.answer(path, answer.source).observe(time.perf_counter() - started)
        if answer.feature_age_s is not None:
            metrics.feature_age(path).observe(answer.feature_age_s)
        return answer

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[[], T], deadline: Deadline) -> T:
        """What the work gives, done beside the event loop. Raises TimeoutError while there is time left for another answer."""
        done = pool.submit(contextvars.copy_context().run, work)  # what is logged there is of this request as well
        return await asyncio.wait_for(asyncio.wrap_future(done), PATIENCE * max(deadline.left_s(), 0.0))

    async def recommend_body(self, body: bytes, deadline: Deadline) -> bytes:
        """JSON in, JSON out. Raises BadRequest."""
        return encode(await self.recommend(decode(RecommendRequest, body), deadline))

    def score_body(self, task: str) -> Callable[[bytes, Deadline], "asyncio.Future[bytes]"]:
        """The handler of one scoring endpoint: JSON in, JSON out; it raises BadRequest."""

        async def handle(body: bytes, deadline: Deadline) -> bytes:
            return encode(await self.score(task, decode(ScoreRequest, body), deadline))

        return handle  # type: ignore[return-value]

    def _tell_versions(self) -> None:
        """What answers now, to whoever reads the metrics."""
        metrics.breaker(store_guard.NAME).set(breaker.OPEN if self.guard.breaker.is_open else breaker.CLOSED)
        bundle = self.champions.bundle
        for name in (*TASKS, RECOMMENDER):
            before, now = self._told.get(name), bundle.version(name)
            if before is not None and before != now:
                metrics.model_workers(name, before).set(0)
            if now is not None:
                metrics.model_workers(name, now).set(1)
                self._told[name] = now

    @contextlib.contextmanager
    def _logged(self, part: str):  # type: ignore[no-untyped-def]
        try:
            yield
        except Exception as error:  # a part that fails to load is a rung less, never an outage
            log.error("%s could not be loaded, what was there stays: %s", part, trace(error))


def _stamp(path: Path) -> tuple[int, int] | None:
    """Another one once the file, or what lies in the folder, is another; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def _settle() -> None:
    """What is loaded stays: keep it out of full collections, which would stop every request for tens of milliseconds. What loading it
    took besides does not."""
    gc.collect()
    gc.freeze()
    give_back()
