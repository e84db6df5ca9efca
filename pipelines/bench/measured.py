"""One side of a comparison, in a process of its own: wall and CPU seconds of the work, and the peak of that process's memory.

In: a function, and one that prepares for it. Out: what was measured, and the number that the work returned. The peaks of two sides do
not mix, and what one leaves in memory costs the other nothing.
"""

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.errors import PipelineError


@dataclass(frozen=True)
class Measured:
    """`peak_mb`: of the process, its libraries included; `value`: what the work returned."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    value: Any


def measured(work: Callable[[Any], Any], prepare: Callable[[], Any] = lambda: None) -> Measured:
    """`work(prepare())` in a child; only the work is timed. What it returns goes through JSON. Raises PipelineError where it fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _exit_after(work, prepare, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    _, status, usage = os.wait4(child, 0)
    if status or not told:
        raise PipelineError(f"bench: a measured process ended with {_ending(status)}; what it wrote above says why")
    wall_s, cpu_s, value = json.loads(told)
    return Measured(wall_s, cpu_s, usage.ru_maxrss / 1024, value)


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _exit_after(work: Callable[[Any], Any], prepare: Callable[[], Any], writing: int) -> None:
    try:
        given = prepare()
        gc.collect()
        started, before = time.perf_counter(), time.process_time()
        value = work(given)
        told = json.dumps([time.perf_counter() - started, time.process_time() - before, value]).encode()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(told)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
