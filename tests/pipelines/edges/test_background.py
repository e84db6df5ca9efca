"""Coroutines of a loop in another thread: their answers, errors and time limits reach the caller."""

import asyncio
import threading
import time

import pytest

from pipelines.edges.background import Background


@pytest.fixture
def background():
    background = Background("test")
    yield background
    background.close()


async def answer(value, after_s=0.0):
    await asyncio.sleep(after_s)
    if isinstance(value, BaseException):
        raise value
    return value


def test_answers_and_errors_reach_the_caller(background):
    assert background.run(answer(7), timeout_s=5) == 7
    with pytest.raises(KeyError):
        background.run(answer(KeyError("k")), timeout_s=5)


def test_work_that_takes_too_long_is_cancelled(background):
    began, ended = threading.Event(), threading.Event()

    async def slow():
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with pytest.raises(TimeoutError):
        background.run(slow(), timeout_s=0.5)
    assert not began.is_set() or ended.wait(60)  # one that had no time to begin never will
    assert background.run(answer(1), timeout_s=5) == 1, "the next call is answered"


def test_work_that_a_client_gives_up_is_an_error_of_the_connection(background):
    with pytest.raises(ConnectionAbortedError):
        background.run(answer(asyncio.CancelledError()), timeout_s=5)


def test_tasks_go_on_between_calls_and_end_with_the_loop():
    background, beats = Background("beats"), []

    async def beat():
        while True:
            beats.append(1)
            await asyncio.sleep(0.01)

    async def begin():
        begin.task = asyncio.create_task(beat())

    background.run(begin(), timeout_s=5)
    end = time.monotonic() + 60
    while len(beats) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    background.close()
    background.close()
    count = len(beats)
    time.sleep(0.05)
    assert count == len(beats) >= 3
    assert not [thread for thread in threading.enumerate() if thread.name == "beats"]
