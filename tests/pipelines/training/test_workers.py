import os
import signal

import pytest

from pipelines.errors import PipelineError
from pipelines.training.workers import KILLS_A_WORKER, run_in


def test_each_worker_is_a_process_of_its_own_and_all_have_returned(tmp_path):
    looked = []
    run_in(3, lambda: (tmp_path / str(os.getpid())).touch(), watch=lambda: looked.append(1))
    found = {path.name for path in tmp_path.iterdir()}
    assert len(found) == 3
    assert str(os.getpid()) not in found
    assert looked


def test_killed_worker_is_replaced(tmp_path):
    def work():
        for n in range(3):
            try:
                (tmp_path / f"kill-{n}").touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / f"done-{os.getpid()}").touch()

    run_in(2, work, watch=lambda: None)
    assert len(list(tmp_path.glob("done-*"))) == 2
    assert len(list(tmp_path.glob("kill-*"))) == 3


def test_workers_that_are_killed_again_and_again_are_given_up(tmp_path):
    kills = tmp_path / "kills"

    def work():
        with kills.open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(PipelineError, match="signal 9; is memory short"):
        run_in(1, work, watch=lambda: None)
    assert len(kills.read_text()) == KILLS_A_WORKER + 1


def test_error_of_one_ends_all_and_is_told():
    def work():
        raise ValueError("no positive row")

    with pytest.raises(PipelineError, match="one of 2 failed: ValueError: no positive row"):
        run_in(2, work, watch=lambda: None)
