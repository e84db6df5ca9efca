"""When to look at the log again: the kernel says when one of its files is written, so an idle worker costs nothing.

In: the folder of the log's segments. Out: whether something was written within some time. Where there is no inotify it looks at the
files some fifty times a second. Never reads what is in them.
"""

import ctypes
import os
import select
import sys
import time
from pathlib import Path

POLL_S = 0.02

_WRITTEN = 0x2 | 0x100  # IN_MODIFY, IN_CREATE of inotify(7); the shared memory beside a database is mapped, so it is not told of
_MOST_BYTES = 65_536


class Wake:
    """Watches one folder; `close` it at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle = _watched(folder)
        self._seen = self._state()

    def wait(self, timeout_s: float) -> bool:
        """Whether something was written since the last call; returns as soon as something is."""
        if self._handle is None:
            return self._looked(timeout_s)
        asked = select.poll()  # not `select`, which knows no handle above 1,023
        asked.register(self._handle, select.POLLIN)
        if not asked.poll(timeout_s * 1_000):
            return False
        os.read(self._handle, _MOST_BYTES)
        return True

    def close(self) -> None:
        """Watch no longer."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _looked(self, timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        while (state := self._state()) == self._seen:
            if time.monotonic() >= end:
                return False
            time.sleep(min(POLL_S, timeout_s))
        self._seen = state
        return True

    def _state(self) -> frozenset[tuple[str, int, int]]:
        try:
            with os.scandir(self.folder) as files:
                status = [(file.name, file.stat()) for file in files if not file.name.endswith("-shm")]
        except OSError:  # not there yet, or a segment was just unlinked
            return frozenset()
        return frozenset((name, found.st_mtime_ns, found.st_size) for name, found in status)


def _watched(folder: Path) -> int | None:
    """An inotify handle on the folder; None where the system has none to give."""
    if not sys.platform.startswith("linux") or not folder.is_dir():
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    handle = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if handle < 0:
        return None
    if libc.inotify_add_watch(handle, os.fsencode(folder), _WRITTEN) < 0:
        os.close(handle)
        return None
    return handle
