"""What a worker gives back once it has loaded what it answers with."""

import ctypes
import threading

import psutil
import pytest

from serving.memory import give_back


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library, which gives back by itself or not at all")
def test_what_a_thread_freed_is_given_back_to_the_system():
    kept = []

    def load() -> None:  # small pieces, of which a few stay: the rest is free, and still the process's
        pieces = [b"x" * 20_000 for _ in range(3_000)]
        kept.extend(pieces[::100])

    loading = threading.Thread(target=load)
    loading.start()
    loading.join()
    before = psutil.Process().memory_info().rss
    give_back()
    assert before - psutil.Process().memory_info().rss > 30 * 2**20
