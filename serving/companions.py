"""What runs beside the service: other programs of ours as child processes, started again when they die.

In: a module, an environment, a file for its output. Out: a running child until `stop`. It does not outlive the process that started
it, however that ends. A child that ends by itself without a failure has nothing to do, and is left alone.
"""

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from pipelines.settings import Settings

log = logging.getLogger("rapport.serving")

STREAM, EDGES = "pipelines.stream", "pipelines.edges"
PAUSES_S = (0.5, 30.0)  # before a start after a death: at first, and at most
PATIENCE_S = 10.0  # with one who was asked to end
STEADY_S = 60.0  # who lived this long begins with the first pause again

# Runs a module, and ends it when the process that started it is gone.
RUN = """
import os, runpy, signal, sys, threading, time

def watch(parent):
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=watch, args=(int(sys.argv[2]),), daemon=True).start()
sys.argv = sys.argv[1].split()
module = sys.argv[0]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


class Companion:
    """One child, watched by a thread. `module`: with its arguments, if any; `output`: where it writes to; None: where this process does."""

    def __init__(self, module: str, *, environment: Mapping[str, str], folder: Path, output: Path | None) -> None:
        self.module, self.output = module, output
        self._environment, self._folder = dict(environment), folder
        self._stop = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._watch, name=module, daemon=True)

    @property
    def pid(self) -> int | None:
        """The child's number; None while there is none."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def start(self) -> "Companion":
        """Start it and the thread that watches it; itself."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End it: asked first, then made to. A second call does nothing."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = PAUSES_S[0]
        while not self._stop.is_set():
            started = time.monotonic()
            code = self._lived()
            if code is None or code == 0:
                return
            pause = PAUSES_S[0] if time.monotonic() - started > STEADY_S else pause
            log.error("%s ended with code %d and is started again in %g s", self.module, code, pause)
            self._stop.wait(pause)
            pause = min(2 * pause, PAUSES_S[1])

    def _lived(self) -> int | None:
        """One life: the code that it ended with by itself; None where it was told to."""
        with contextlib.ExitStack() as stack:
            sink = stack.enter_context(self.output.open("ab")) if self.output else None
            child = self._child = subprocess.Popen(
                [sys.executable, "-c", RUN, self.module, str(os.getpid())],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT if sink else None,
                start_new_session=True,  # Ctrl-C is for the starter, which then stops everything in order
            )
        while child.poll() is None:
            if self._stop.wait(0.1):
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(PATIENCE_S)
                child.kill()
                child.wait()
                return None
        return child.returncode


def wanted(settings: Settings) -> list[str]:
    """The modules that these settings ask for, one for each worker of the stream."""
    edges = settings.edges
    others = [f"{STREAM} {number}" for number in range(1, settings.stream.workers)]
    return [STREAM, *others, *([EDGES] if edges.redis_url or edges.kafka_servers or edges.rabbitmq_url else [])]
