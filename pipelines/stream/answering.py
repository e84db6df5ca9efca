"""Questions about one person -> answers, beside the stream: `pipelines.requests` asked by the service, answered here.

In: the requests of a home. Out: receipts of erasures, exports, profiles, as JSON. Profiles in a thread of the worker; erasures and
exports in a process of their own (`python -m pipelines.stream.answering`), so that events keep flowing, and because an erasure reads
the bytes of database files: SQLite's locks are the process's, and closing such a file would give up those of its connections.
What was left half-erased is finished first. Never logs who is asked about, nor puts it on a command line.
"""

import json
import logging
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.errors import InputError, PipelineError
from pipelines.log_lines import write_lines
from pipelines.requests import Kind, Request, Requests
from pipelines.settings import Settings, silence_telemetry
from pipelines.vault import Vault, open_vault

log = logging.getLogger("rapport.stream")

POLL_S = 0.2
TIDY_S = 60.0  # between two looks for erasures that were left half done, and for answers that nobody fetched
TRIES = 3  # processes that a question may end
COMMAND = (sys.executable, "-m", "pipelines.stream.answering")

Answerer = Callable[[Request], Any]


class Answering:
    """One worker's answers. `answerers`: of the kinds that are answered here; the others go to the process that `command` starts."""

    def __init__(
        self, settings: Settings, *, vault: Vault, answerers: Mapping[Kind, Answerer] | None = None, command: Sequence[str] = COMMAND
    ) -> None:
        self.settings, self.vault, self._command = settings, vault, list(command)
        self._here = answerers or {Kind.PROFILE: lambda request: _profile(settings, request, vault)}
        self._child: subprocess.Popen[bytes] | None = None
        self._tries: Counter[str] = Counter()
        self._tidied_s = -TIDY_S

    def run(self, stop: threading.Event) -> None:
        """Answer what is asked until told to stop. Nothing that fails ends it: a failure is an answer."""
        with closing(Requests(self.settings.home, vault=self.vault)) as requests:
            while not stop.is_set():
                try:
                    self._look(requests)
                except Exception as error:
                    log.error("the requests failed with %s; the next look tries again", type(error).__name__)
                stop.wait(POLL_S)
        if self._child is not None and self._child.poll() is None:  # what it leaves undone goes on at the next start
            self._child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(10.0)
            self._child.kill()
            self._child.wait()

    def _look(self, requests: Requests) -> None:
        waiting = requests.pending()
        answer([request for request in waiting if request.kind in self._here], self._here, requests)
        aside = [request for request in waiting if request.kind not in self._here]
        is_due = time.monotonic() - self._tidied_s >= TIDY_S
        if self._child is not None and self._child.poll() is not None:
            self._child = None
            self._give_up(requests, aside)
        elif self._child is None and (aside or (is_due and any((self.settings.home / "erasures").glob("*.journal")))):
            self._tries.update(request.id for request in aside)
            self._child = subprocess.Popen(self._command)
        if is_due:
            self._tidied_s = time.monotonic()
            requests.expire(now_us=_now_us())

    def _give_up(self, requests: Requests, aside: Sequence[Request]) -> None:
        """Answer the questions that ended their process time and again."""
        for request in aside:
            if self._tries[request.id] >= TRIES:
                log.error("a request of kind %s was given up after %d processes", request.kind, TRIES)
                body = {"error": f"the worker's process ended {TRIES} times before it was done; its log says why"}
                requests.answer(request.id, json.dumps(body).encode(), now_us=_now_us(), is_failure=True)


def answer(waiting: Sequence[Request], answerers: Mapping[Kind, Answerer], requests: Requests) -> None:
    """Answer these questions; what fails is told."""
    for request in waiting:
        body, is_failure = _answered(request, answerers[request.kind])
        requests.answer(request.id, body, now_us=_now_us(), is_failure=is_failure)


def main() -> None:
    """Finish what was left half-erased, then answer the erasures and exports that are asked for, and end."""
    silence_telemetry()
    settings = Settings()
    write_lines(settings.serving.log_format)
    with closing(open_vault(settings.home, master=settings.master_key)) as vault:
        _resume(settings)
        answerers = {
            Kind.ERASE: lambda request: _erase(settings, request, vault),
            Kind.EXPORT: lambda request: _export(settings, request, vault),
        }
        for request in _asked(settings, vault):
            if request.kind in answerers:
                body, is_failure = _answered(request, answerers[request.kind])  # its file is closed meanwhile: see above
                with closing(Requests(settings.home, vault=vault)) as requests:
                    requests.answer(request.id, body, now_us=_now_us(), is_failure=is_failure)


def _asked(settings: Settings, vault: Vault) -> list[Request]:
    with closing(Requests(settings.home, vault=vault)) as requests:
        return requests.pending()


def _answered(request: Request, answerer: Answerer) -> tuple[bytes, bool]:
    """The answer as JSON, and whether it is a failure."""
    try:
        found = answerer(request)
        plain = asdict(found) if is_dataclass(found) and not isinstance(found, type) else found
        return json.dumps(plain, default=str).encode(), False
    except InputError as error:
        told = {"error": str(error), "code": "not_found"}
    except PipelineError as error:
        told = {"error": str(error)}
    except Exception as error:
        log.error("a request of kind %s failed with %s", request.kind, _trace(error))
        told = {"error": f"the worker failed with {type(error).__name__}; its log has the trace"}
    return json.dumps(told).encode(), True


def _erase(settings: Settings, request: Request, vault: Vault) -> Any:
    from pipelines import erasure

    _drain(settings, vault)
    return erasure.erase(settings.home, request.who, settings=settings, by=request.by, as_of=datetime.now(UTC))


def _export(settings: Settings, request: Request, vault: Vault) -> Any:
    from pipelines import erasure

    _drain(settings, vault)
    return erasure.export(settings.home, request.who, settings=settings, by=request.by)


def _profile(settings: Settings, request: Request, vault: Vault) -> Any:
    from pipelines import profiles

    return profiles.describe(settings.home, request.who, settings=settings, vault=vault)


def _drain(settings: Settings, vault: Vault) -> None:
    """Who is who by the tables must be who it is by now: somebody may have identified a moment ago."""
    from pipelines import ingest

    ingest.drain(settings.home, settings=settings, vault=vault)


def _resume(settings: Settings) -> None:
    from pipelines import erasure

    try:
        erasure.resume(settings.home, settings=settings)
    except PipelineError as error:
        log.error("%s", error)
    except Exception as error:
        log.error("an unfinished erasure failed with %s", _trace(error))


def _trace(error: Exception) -> str:
    """The error's type and where it came from, without its message: that may hold what was asked about."""
    return type(error).__name__ + "\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip()


def _now_us() -> int:
    return int(datetime.now(UTC).timestamp() * 1e6)


if __name__ == "__main__":
    main()
