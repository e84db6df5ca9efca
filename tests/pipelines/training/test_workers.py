"""Searches in processes of their own: one killed with -9 loses no finished trial, and several share one journal file."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import optuna
import pytest

ROOT = Path(__file__).parents[3]

WORKER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from pipelines.training import tune

    class Slow:
        def __init__(self, *, x=0.9, random_state=0):
            self.x, self.random_state = x, random_state

        @staticmethod
        def suggest(trial):
            return {"x": trial.suggest_float("x", 0.0, 1.0)}

        def fit(self, goal, validation=None):
            time.sleep(float(sys.argv[4]))
            self.goal_ = goal
            return self

        def loss(self, validation):
            return abs(self.x - self.goal_)

    told = tune(Slow, (0.3,), None, n_trials=int(sys.argv[3]), seed=3, journal=Path(sys.argv[1]), study_name=sys.argv[2])
    print(told["x"])
    """
)


def worker(journal, study, trials, pause):
    words = [sys.executable, "-c", WORKER, str(journal), study, str(trials), str(pause)]
    return subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def finished(journal, study):
    if not journal.exists() or not journal.read_bytes().endswith(b"\n"):
        return []
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    try:
        found = optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)
    except KeyError:
        return []
    return [(trial.params["x"], trial.value) for trial in found if trial.state.name == "COMPLETE"]


def answer(process):
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-2_000:]
    return float(said.splitlines()[-1])


@pytest.mark.slow
def test_search_killed_with_nine_keeps_its_trials_and_ends_as_an_unbroken_one(tmp_path):
    journal = tmp_path / "journal.log"
    doomed = worker(journal, "s", 8, 0.4)
    try:
        until = time.monotonic() + 240
        while len(finished(journal, "s")) < 3 and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        doomed.send_signal(signal.SIGKILL)
        doomed.communicate()
    kept = finished(journal, "s")
    assert 3 <= len(kept) < 8
    resumed = answer(worker(journal, "s", 8, 0.0))
    assert finished(journal, "s")[: len(kept)] == kept
    assert len(finished(journal, "s")) == 8
    assert resumed == answer(worker(tmp_path / "other.log", "s", 8, 0.0))


@pytest.mark.slow
def test_searches_of_several_processes_share_one_journal_and_lose_nothing(tmp_path):
    journal = tmp_path / "journal.log"
    together = [worker(journal, f"study-{n}", 6, 0.05) for n in range(3)]
    found = [answer(process) for process in together]
    alone = answer(worker(tmp_path / "alone.log", "study-0", 6, 0.0))
    assert found == [alone] * 3  # same seed, same search, whoever writes beside it
    assert [len(finished(journal, f"study-{n}")) for n in range(3)] == [6, 6, 6]
