"""What loading took and answering does not need -> back to the system, which would else count it as this process's until it ends.

Arrow and the C library keep what was freed for whoever asks next; after a catalogue or a model was loaded nobody asks for as much again.
"""

import ctypes

import pyarrow as pa


def give_back() -> None:
    """Give back what is free. Takes some milliseconds; does nothing where the C library knows no such call."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU library's
    if trim is not None:
        trim(0)
