"""`python -m pipelines.stream`: the online worker of one home, one process. Settings come from the environment, as the service's do.

Ends on SIGTERM or SIGINT. Never ends for a store or a log that refuses: it waits and tries again.
"""

import logging
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import PipelineError
from pipelines.settings import Settings, silence_telemetry

if TYPE_CHECKING:
    from pipelines.stream.worker import Stream

log = logging.getLogger("rapport.stream")

WAIT_S = 0.5
PAUSES_S = (0.2, 5.0)  # after a refusal: at first, and at most


def main() -> None:
    """Run until told to stop. Exit 1 with one sentence where another worker is there, or the vault is not this home's."""
    silence_telemetry()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        run(Settings(), stop)
    except PipelineError as error:
        log.error("%s", error)
        raise SystemExit(1) from None


def run(settings: Settings, stop: threading.Event) -> None:
    """Step until told to stop. Raises StoreError where another worker of this home lives."""
    from pipelines.identity.online import Online
    from pipelines.log import open_log
    from pipelines.requests import working
    from pipelines.stream.answering import Answering
    from pipelines.stream.worker import Stream
    from pipelines.vault import open_vault

    home = settings.home
    with working(home), closing(open_vault(home, master=settings.master_key)) as vault:
        answering = threading.Thread(target=Answering(settings, vault=vault).run, args=(stop,), name="answering")
        answering.start()
        try:
            apply_where_absent(home)
            with (
                closing(open_log(home, settings=settings, vault=vault, consumer="stream")) as events,
                closing(Online(home, vault=vault)) as linker,
                closing(Stream(home, settings=settings, vault=vault, log=events, linker=linker)) as stream,
            ):
                log.info("the stream is at work")
                _step_until(stop, stream)
        finally:
            stop.set()
            answering.join()


def apply_where_absent(home: Path) -> None:
    """Create the online store of a home that has none, in a process of its own: Feast would stay in this one's memory."""
    if not (home / "feature_store" / "online.db").exists():
        script = "import sys; from pathlib import Path; from pipelines import feature_store; feature_store.apply(Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", script, str(home.resolve())], check=False, stdout=subprocess.DEVNULL)


def _step_until(stop: threading.Event, stream: "Stream") -> None:
    pause = PAUSES_S[0]
    while not stop.is_set():
        try:
            stream.step(wait_s=WAIT_S)
            pause = PAUSES_S[0]
        except PipelineError as error:
            log.error("%s", error)
            stop.wait(pause)
            pause = min(2 * pause, PAUSES_S[1])


if __name__ == "__main__":
    main()
