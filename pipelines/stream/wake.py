"""When to look at the log again: the kernel says when its bell is rung, so an idle worker costs nothing.

In: the folder of the log. Out: whether something was appended within some time. Where there is no inotify it looks at the files some
fifty times a second. Never reads what is in them.
"""

import ctypes
import os
import select
import sys
import time
from pathlib import Path

from pipelines.log import bell

POLL_S = 0.02
SETTLE_S = 0.5  # for so long after a file was written the commit may still be on its way to the disk

_OPENED = 0x20  # IN_OPEN of inotify(7); of the folder, so that the bell may be put away and made again
_BELL = b"%s\0" % bell.NAME.encode()  # as the kernel names it; other files of the folder are opened too
_MOST_BYTES = 65_536


class Wake:
    """Watches one log; `close` it at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle = _watched(folder)
        self._seen = self._state() if self._handle is None else frozenset()
        self._written_s = -SETTLE_S

    def wait(self, timeout_s: float) -> bool:
        """Whether something was appended since the last call; returns as soon as something is."""
        if self._handle is None:
            return self._looked(timeout_s)
        asked = select.poll()  # not `select`, which knows no handle above 1,023
        asked.register(self._handle, select.POLLIN)
        end = time.monotonic() + timeout_s
        while asked.poll(max(0.0, end - time.monotonic()) * 1_000):
            if _BELL in os.read(self._handle, _MOST_BYTES):
                return True
        return False

    def close(self) -> None:
        """Watch no longer."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _looked(self, timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        while not self._is_settling():
            if time.monotonic() >= end:
                return False
            time.sleep(min(POLL_S, timeout_s))
        time.sleep(min(POLL_S, timeout_s))
        return True

    def _is_settling(self) -> bool:
        if (state := self._state()) != self._seen:
            self._seen, self._written_s = state, time.monotonic()
        return time.monotonic() - self._written_s < SETTLE_S

    def _state(self) -> frozenset[tuple[str, int, int]]:
        try:
            with os.scandir(self.folder / "segments") as files:
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
    if libc.inotify_add_watch(handle, os.fsencode(folder), _OPENED) < 0:
        os.close(handle)
        return None
    return handle
