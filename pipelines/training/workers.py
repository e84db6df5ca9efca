"""Work that several processes share -> done, though some of them are killed on the way. Never knows what the work is."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from pipelines.errors import PipelineError

WATCH_S = 0.1
KILLS_A_WORKER = 3  # that are made up for; after more of them the machine is too small for so many
MOST_WORDS = 4_000  # of an error: what a pipe takes without a reader

Worker = tuple[BaseProcess, Connection]


def run_in(count: int, work: Callable[[], None], *, watch: Callable[[], None]) -> None:
    """`work()` in `count` processes forked from this one, until each has returned; `watch()` is called here meanwhile.

    One that is killed is replaced. None of them outlives this call; a work that outlives this process is to ask `is_orphan`. Raises
    PipelineError with the words of a worker's error, or where too many were killed.
    """
    fork, kills = multiprocessing.get_context("fork"), 0

    def start() -> Worker:
        reading, writing = fork.Pipe(duplex=False)
        process = fork.Process(target=_work, args=(work, writing), daemon=True)
        process.start()
        writing.close()
        return process, reading

    running = [start() for _ in range(count)]
    try:
        while running:
            running[0][0].join(WATCH_S)
            watch()
            for worker in [one for one in running if one[0].exitcode is not None]:
                running.remove(worker)
                code, said = worker[0].exitcode or 0, _words(worker[1])
                if said:
                    raise PipelineError(f"workers: one of {count} failed: {said}")
                if code:
                    kills += 1
                    if kills > KILLS_A_WORKER * count:
                        raise PipelineError(f"workers: {kills} were killed, the last by signal {-code}; is memory short? try fewer")
                    running.append(start())
    finally:
        for process, _ in running:
            process.kill()
        for process, _ in running:
            process.join()


def is_orphan(parent: int) -> bool:
    """Whether the process that forked this one is gone."""
    return os.getpid() != parent and os.getppid() != parent


def _work(work: Callable[[], None], writing: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, who ends us
    try:
        work()
    except Exception as error:
        writing.send_bytes(f"{type(error).__name__}: {error}"[:MOST_WORDS].encode())


def _words(reading: Connection) -> str:
    try:
        return reading.recv_bytes().decode()
    except EOFError:
        return ""
    finally:
        reading.close()
