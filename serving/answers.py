"""The decision core that both paths into the service share: what is loaded, kept up to date, and asked.

In: settings, then bodies. Out: bodies. `open` and `refresh` do the heavy work, off the request path; neither raises, for a
part that cannot be loaded is a rung that does not answer. Never holds a request's data once it is answered.
"""

import asyncio
import contextlib
import functools
import gc
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines.settings import Settings
from pipelines.vault import Vault, open_vault
from serving import access, catalogue, fallbacks
from serving.candidates import Recommendations
from serving.catalogue import Catalogue
from serving.champions import Champions, Rehearse
from serving.clock import Clock
from serving.fallbacks import Deadline, trace
from serving.online_store import StoreFailure
from serving.profile import Guard, Profiles, open_profiles
from serving.scores import Scoring
from serving.served import Sample
from serving.wire import Recommendation, RecommendRequest, ScoreRequest, Scores, decode, encode

log = logging.getLogger("rapport.serving")

INLINE_CUSTOMERS = 16  # more are scored beside the event loop, so that a single request never waits for a batch
GRACE_S = 0.02  # the batch looks at its own deadline; this is for the one that could not


class Answers:
    """One per worker process. `open` once, `refresh` every few seconds, the rest at any time from the event loop."""

    def __init__(
        self, settings: Settings, *, rehearse: Rehearse | None = None, open_store: Callable[..., Profiles] = open_profiles
    ) -> None:
        self.settings = settings
        self.clock = Clock(settings)
        self.guard = Guard()
        self.champions = Champions(settings.home, rehearse=rehearse)
        self.catalogue: Catalogue = catalogue.EMPTY
        self._open_store = open_store
        self._stamps: dict[str, object] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="scores")
        self.recommendations = Recommendations(
            guard=self.guard, bundle=lambda: self.champions.bundle, catalogue=lambda: self.catalogue, clock=self.clock
        )
        self.sample = Sample(settings, vault=lambda: self.vault)
        self.scoring = Scoring(guard=self.guard, bundle=lambda: self.champions.bundle, clock=self.clock, sample=self.sample)

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
        _settle()

    def refresh(self) -> None:
        """Follow what changed on disk: clock, champions, catalogue, feature store."""
        before = (self.champions.bundle, self.catalogue, self.guard.profiles)
        self.clock.refresh()
        self.champions.refresh()
        self.refresh_catalogue()
        self.refresh_store()
        after = (self.champions.bundle, self.catalogue, self.guard.profiles)
        if any(old is not new for old, new in zip(before, after, strict=True)):  # they hold arrays, which have no one answer to "equal?"
            _settle()

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
            stamp = _registry_stamp(self.settings.home)
            if stamp is None or self._stamps.get("store") == stamp:
                return
            try:
                self.guard.profiles = self._open_store(
                    self.settings.home,
                    max_age_hours=self.settings.serving.max_feature_age_hours,
                    pseudonym=self.vault.pseudonym,
                    redis_url=self.settings.online.redis_url,
                )
                self._stamps["store"] = stamp
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
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.sample.close()

    async def recommend(self, request: RecommendRequest, deadline: Deadline) -> Recommendation:
        """See Recommendations.answer."""
        return self.recommendations.answer(request, deadline)

    async def score(self, task: str, request: ScoreRequest, deadline: Deadline) -> Scores:
        """See Scoring.answer; a batch that cannot be had in time is answered with what needs no time."""
        if len(request.customer_ids) <= INLINE_CUSTOMERS:
            return self.scoring.answer(task, request, deadline)
        batch = self._pool.submit(self.scoring.answer, task, request, deadline)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(batch), max(deadline.left_s(), 0.0) + GRACE_S)
        except TimeoutError:
            return self.scoring.without_looking(task, request, fallbacks.DEADLINE)

    async def recommend_body(self, body: bytes, deadline: Deadline) -> bytes:
        """JSON in, JSON out. Raises BadRequest."""
        return encode(await self.recommend(decode(RecommendRequest, body), deadline))

    def score_body(self, task: str) -> Callable[[bytes, Deadline], "asyncio.Future[bytes]"]:
        """The handler of one scoring endpoint: JSON in, JSON out; it raises BadRequest."""

        async def handle(body: bytes, deadline: Deadline) -> bytes:
            return encode(await self.score(task, decode(ScoreRequest, body), deadline))

        return handle  # type: ignore[return-value]

    @contextlib.contextmanager
    def _logged(self, part: str):  # type: ignore[no-untyped-def]
        try:
            yield
        except Exception as error:  # a part that fails to load is a rung less, never an outage
            log.error("%s could not be loaded, what was there stays: %s", part, trace(error))


def _registry_stamp(home: Path) -> tuple[int, int] | None:
    try:
        status = (home / "feature_store" / "registry.db").stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def _settle() -> None:
    """What is loaded stays: keep it out of full collections, which would stop every request for tens of milliseconds."""
    gc.collect()
    gc.freeze()
