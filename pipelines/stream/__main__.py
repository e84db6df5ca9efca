"""`python -m pipelines.stream [k]`: an online worker of one home, one process. Settings come from the environment, as the service's do.

k: which of `settings.stream.workers`; the first, 0, is there always: it also answers questions about people. Ends on SIGTERM or SIGINT.
Never ends for a store or a log that refuses: it waits and tries again.
"""

import fcntl
import logging
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import PipelineError, StoreError
from pipelines.log_lines import write_lines
from pipelines.settings import Settings, silence_telemetry

if TYPE_CHECKING:
    from pipelines.stream.upkeep import Garbage
    from pipelines.stream.worker import Stream
    from pipelines.vault import Vault

log = logging.getLogger("rapport.stream")

WAIT_S = 0.5
PAUSES_S = (0.2, 5.0)  # after a refusal: at first, and at most


def main() -> None:
    """Run until told to stop. Exit 1 with one sentence where this worker is there already, or the vault is not this home's."""
    silence_telemetry()
    settings = Settings()
    write_lines(settings.serving.log_format)
    stop = threading.Event()
    for told in (signal.SIGTERM, signal.SIGINT):
        signal.signal(told, lambda *_: stop.set())
    try:
        number = int(sys.argv[1]) if len(sys.argv) > 1 else 0
        run(settings, stop) if number == 0 else run_beside(settings, stop, number)
    except PipelineError as error:
        log.error("%s", error)
        raise SystemExit(1) from None


def run(settings: Settings, stop: threading.Event) -> None:
    """Step until told to stop, and answer questions. Raises StoreError where another worker of this home lives."""
    from pipelines.requests import working
    from pipelines.stream.answering import Answering
    from pipelines.vault import open_vault

    with working(settings.home), closing(open_vault(settings.home, master=settings.master_key)) as vault:
        answering = threading.Thread(target=Answering(settings, vault=vault).run, args=(stop,), name="answering")
        answering.start()
        try:
            apply_where_absent(settings.home)
            _work(settings, stop, vault, 0)
        finally:
            stop.set()
            answering.join()


def run_beside(settings: Settings, stop: threading.Event, number: int) -> None:
    """Step until told to stop, as one of the others. Raises StoreError where that one lives already, or is none of the settings'."""
    from pipelines.vault import open_vault

    if not 0 < number < settings.stream.workers:
        raise StoreError(f"stream: expected a worker below {settings.stream.workers}, found {number}; set RAPPORT_STREAM__WORKERS")
    folder = settings.home / "stream"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / f"worker-{number}.lock").open("w") as lock, closing(open_vault(settings.home, master=settings.master_key)) as vault:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(f"stream: worker {number} of {settings.home} is at work already; end it first") from error
        _work(settings, stop, vault, number)


def _work(settings: Settings, stop: threading.Event, vault: "Vault", number: int) -> None:
    from pipelines.identity.filling import Beside
    from pipelines.identity.online import Online
    from pipelines.log import open_log
    from pipelines.stream.state import path_of
    from pipelines.stream.upkeep import Garbage, checkpoints, connect
    from pipelines.stream.worker import Stream

    home, consumer = settings.home, f"stream-{number}" if number else "stream"
    with (
        closing(open_log(home, settings=settings, vault=vault, consumer=consumer, connect=connect)) as events,
        closing(Online(home, vault=vault, worker=number, fill=Beside)) as linker,
        closing(Stream(home, settings=settings, vault=vault, log=events, linker=linker, share=(number, settings.stream.workers))) as stream,
        checkpoints(lambda: [stream.online.path, path_of(home, stream.share), linker.path, home / "log" / "log.db"], stream.writing),
        closing(Garbage()) as garbage,
    ):
        log.info("the stream is at work")
        _step_until(stop, stream, garbage)


def apply_where_absent(home: Path) -> None:
    """Create the online store of a home that has none, in a process of its own: Feast would stay in this one's memory."""
    if not (home / "feature_store" / "online.db").exists():
        script = "import sys; from pathlib import Path; from pipelines import feature_store; feature_store.apply(Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", script, str(home.resolve())], check=False, stdout=subprocess.DEVNULL)


def _step_until(stop: threading.Event, stream: "Stream", garbage: "Garbage") -> None:
    pause = PAUSES_S[0]
    while not stop.is_set():
        try:
            done = stream.step(wait_s=WAIT_S)
            garbage.tidy(is_quiet=not (done.read or done.expired))
            pause = PAUSES_S[0]
        except PipelineError as error:
            log.error("%s", error)
            stop.wait(pause)
            pause = min(2 * pause, PAUSES_S[1])


if __name__ == "__main__":
    main()
