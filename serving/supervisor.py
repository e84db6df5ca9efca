"""The process that starts the service's workers and starts them again: BentoML's own, without what only a worker needs.

As a program (`python -m serving.supervisor NAME:ATTRIBUTE --host H --port P`) it is `bentoml serve`, which imports the whole service to
learn how many workers it wants; that is a third of a start. The settings know it. Ends with a failure where the service cannot be loaded.
Never answers a request.
"""

import argparse
import importlib.util
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence, Set
from typing import Any

from pipelines.log_lines import write_lines
from pipelines.settings import Settings, silence_telemetry

log = logging.getLogger("rapport.serving")

NAME = "Personalization"
TIMEOUT_S = 2  # timers of the whole timeout stay in memory: keep it short
YOUNG_S = 60.0  # of this process: in this time
DEATHS = 3  # so many workers must not end, or none will ever be ready
_LOOK_S = 0.5


def main(arguments: Sequence[str]) -> None:
    """Returns when it was told to end. Raises SystemExit where the service cannot be loaded."""
    silence_telemetry()
    parser = argparse.ArgumentParser()
    parser.add_argument("service")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ssl-certfile")
    parser.add_argument("--ssl-keyfile")
    given = parser.parse_args(arguments)
    if importlib.util.find_spec(given.service.partition(":")[0]) is None:
        raise SystemExit(f"serve: there is no module of the service {given.service}")

    import bentoml
    import psutil
    from _bentoml_impl.server.serving import serve_http
    from bentoml._internal.log import configure_server_logging

    configure_server_logging()
    settings = Settings()
    write_lines(settings.serving.log_format)
    declared: Any = bentoml.service(type(NAME, (), {}), name=NAME, workers=settings.serving.workers, traffic={"timeout": TIMEOUT_S})
    declared._import_str = given.service  # what the workers are told to load
    declared.inject_config()
    tls = {} if given.ssl_certfile is None else {"ssl_certfile": given.ssl_certfile, "ssl_keyfile": given.ssl_keyfile}
    is_failed = threading.Event()

    def watch() -> None:
        me = psutil.Process()
        if die_young(lambda: {child.pid for child in me.children()}, settings.serving.workers):
            log.critical("%d workers ended as soon as they were started; what they said is above", DEATHS)
            is_failed.set()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="young workers", daemon=True).start()
    serve_http(declared, host=given.host, port=given.port, **tls)
    if is_failed.is_set():
        raise SystemExit(1)


def die_young(
    children: Callable[[], Set[int]],
    workers: int,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Whether workers are started again and again: True once that is seen, False once they are older. children: those there are."""
    until, seen = clock() + YOUNG_S, set(children())
    while clock() < until:
        seen |= children()
        if len(seen) >= workers + DEATHS:
            return True
        sleep(_LOOK_S)
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
