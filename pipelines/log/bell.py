"""Who waits for events is told when some were appended: a file beside the log is opened, which the kernel tells to whoever watches.

In: the log's folder. Out: nothing on any disk. The files of the log do not do: they are written before a commit can be seen, and what
makes it seen is shared memory, of whose changes nobody is told. It may be lost; who waits looks at the log now and then all the same.
"""

import os
from contextlib import suppress
from pathlib import Path

NAME = "bell"


def ring(folder: Path) -> None:
    """Something was appended, and can be read. Never fails: the events are kept already."""
    with suppress(OSError):
        os.close(os.open(folder / NAME, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
