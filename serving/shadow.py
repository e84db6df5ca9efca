"""Challengers: versions that score the same requests as the champion, and answer none. In: what champions were fed. Out: a sample.

Loaded like champions: verified, rehearsed in a child, refused for good where they fail. They score in a thread of their own, from a
bounded queue: what finds it full is dropped and counted, and no answer ever waits. What they foretold of customers in the audit's sample is
kept beside what the champion did.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.challengers import challengers
from pipelines.served import SHADOW, Value
from pipelines.settings import Settings
from pipelines.windows import Derived
from serving import metrics
from serving.champions import Champions, Rehearse, Scorer
from serving.fallbacks import trace
from serving.served import Sample

log = logging.getLogger("rapport.serving")

QUEUE_REQUESTS = 256
CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as a champion answered it. features: those of `customers`, in their order; `served_us`: when, microseconds since 1970."""

    task: str
    service: str
    customers: Sequence[str]
    features: Derived
    probabilities: NDArray[np.float64]
    version: str
    served_us: int


class Shadow:
    """One per worker process. `refresh` off the event loop, `offer` from anywhere."""

    def __init__(
        self, settings: Settings, *, sample: Sample, rehearse: Rehearse | None = None, queue_requests: int = QUEUE_REQUESTS
    ) -> None:
        self._models = Champions(settings.home, rehearse=rehearse, entries=challengers, role="challengers")
        self._sample = sample
        self._queue: queue.Queue[Asked | None] = queue.Queue(queue_requests)
        self._thread: threading.Thread | None = None

    def refresh(self) -> None:
        """Follow who is the challenger. Raises nothing."""
        self._models.refresh()
        if self._models.bundle.scorers and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
            self._thread.start()

    def wants(self, task: str) -> bool:
        """Whether the task has a challenger."""
        return task in self._models.bundle.scorers

    def offer(self, asked: Asked) -> None:
        """Let the task's challenger score it too, if there is one and it has time."""
        if not self.wants(asked.task):
            return
        try:
            self._queue.put_nowait(asked)
        except queue.Full:
            metrics.shadow(asked.task, "dropped").inc()

    def close(self) -> None:
        """Score what waits, and end; one that hangs is left behind."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=CLOSE_S)
                thread.join(CLOSE_S)

    def _run(self) -> None:
        while (asked := self._queue.get()) is not None:
            scorer = self._models.bundle.scorers.get(asked.task)
            if scorer is not None:  # else taken back meanwhile
                metrics.shadow(asked.task, self._outcome(asked, scorer)).inc()

    def _outcome(self, asked: Asked, scorer: Scorer) -> str:
        try:
            return self._score(asked, scorer)
        except Exception as error:  # a challenger may be unfit; that is what it is tried for
            log.error("%s: challenger %s failed with %s", asked.task, scorer.version, trace(error))
            return "failed"

    def _score(self, asked: Asked, scorer: Scorer) -> str:
        if scorer.service != asked.service:  # it would have to be fed from the store a second time
            return "other_service"
        foretold = scorer.learner.predict_values(scorer.learner.encode(asked.features))

        def row(place: int) -> dict[str, Value]:
            champions = float(asked.probabilities[place])
            return {"probability": float(foretold[place]), "champion_probability": champions, "champion": asked.version}

        places = dict(enumerate(asked.customers))
        self._sample.offer(SHADOW, f"{asked.task} {scorer.version}", places, row, served_us=asked.served_us, read_us=asked.served_us)
        return "scored"
