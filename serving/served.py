"""What models are fed -> a sample of it on disk, beside the answers: whole customers, always the same ones.

In: rows as they were read for a score. Out: rows of `pipelines.served`, by one thread of each worker. Whether a customer is in the
sample follows from the keyed hash of their id, so that all workers choose alike and nobody else can tell. Never makes an answer wait:
where the queue is full, or the disk refuses, rows are dropped and counted.
"""

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress

from pipelines.errors import StoreError
from pipelines.served import Row, Served, Value
from pipelines.settings import Settings
from pipelines.vault import Vault
from serving.fallbacks import trace

log = logging.getLogger("rapport.serving")

QUEUE_ROWS = 2_000  # about 4 MB
WRITE_S = 0.5  # rows that come within it are written together
PRUNE_ROWS = 1_000  # between two looks for what is too old or too much
REMEMBERED = 100_000  # customers of whom it is remembered whether they are in the sample
CLOSE_S = 5.0

_DAY_US = 86_400_000_000
_WHOLE = 1 << 32


class Sample:
    """One per worker process. `vault`: the home's, opened on first use."""

    def __init__(self, settings: Settings, *, vault: Callable[[], Vault], queue_rows: int = QUEUE_ROWS) -> None:
        self.settings, self._vault = settings, vault
        self._below = round(settings.serving.audit_share * _WHOLE)
        self._rows: queue.Queue[Row | None] = queue.Queue(queue_rows)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.has = functools.lru_cache(REMEMBERED)(self._has)

    def offer(
        self,
        service: str,
        version: str,
        customers: Mapping[int, str],
        row: Callable[[int], Mapping[str, Value]],
        *,
        served_us: int,
        read_us: int,
    ) -> None:
        """Keep the rows of those customers who are in the sample. customers: by their place; row: the values of a place, by name."""
        if not self._below:
            return
        try:
            chosen = [(place, customer) for place, customer in customers.items() if self.has(customer)]
        except StoreError:  # no vault, nobody is chosen
            dropped().inc(len(customers))
            return
        for place, customer in chosen:
            self._put(Row(customer, service, version, served_us, read_us, row(place)))

    def close(self) -> None:
        """Write what waits, and end."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            with suppress(queue.Full):  # it hangs, and is left behind
                self._rows.put(None, timeout=CLOSE_S)
                thread.join(CLOSE_S)

    def _has(self, customer: str) -> bool:
        digits = self._vault().pseudonym("audit", customer).partition(":")[2]
        return int(digits[:8], 16) < self._below

    def _put(self, row: Row) -> None:
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            dropped().inc()
        if self._thread is None:
            self._begin()

    def _begin(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="served", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        is_open, unpruned = True, PRUNE_ROWS
        while is_open:
            rows, is_open = self._next()
            is_due = unpruned >= PRUNE_ROWS
            try:
                self._write(rows, is_due=is_due)
                unpruned = len(rows) if is_due else unpruned + len(rows)
            except Exception as error:  # whatever the disk has: answers go on
                dropped().inc(len(rows))
                log.error("%d rows of served values could not be kept: %s", len(rows), trace(error))

    def _next(self) -> tuple[list[Row], bool]:
        """What came within a moment, and whether more may come."""
        rows: list[Row] = []
        end = 0.0
        while True:
            try:
                row = self._rows.get(timeout=max(0.0, end - time.monotonic()) if rows else None)
            except queue.Empty:
                return rows, True
            if row is None:
                return rows, False
            end = end if rows else time.monotonic() + WRITE_S
            rows.append(row)

    def _write(self, rows: Sequence[Row], *, is_due: bool) -> None:
        serving, now_us = self.settings.serving, time.time_ns() // 1_000
        with closing(Served(self.settings.home, vault=self._vault())) as served:  # not kept open: an erasure writes the file anew
            served.add(rows, now_us=now_us)
            if is_due:
                served.prune(before_us=now_us - serving.audit_days * _DAY_US, most=serving.audit_rows)


@functools.cache
def dropped():  # type: ignore[no-untyped-def]
    """The counter of rows that were not kept."""
    # imported here: the client chooses its multi-process mode on import, from an environment that the server sets
    from prometheus_client import Counter

    return Counter("rapport_served_dropped", "Rows of served values that were not kept for the audit: queue full, or disk refused")
