"""Steps at work: on a terminal a bar of the steps and one of the trials with the time that is left; elsewhere a line a step."""

import io

import pytest
from rich.console import Console

from pipelines import flow
from pipelines.commands import progress, terminal
from pipelines.settings import Settings

TRIALS = 4


def step(name, trials):
    def run(job):
        for done in range(1, trials + 1):
            job.on_progress(done, trials)
        return {"done": trials}

    return flow.Step(name, run)


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """What is written of two steps, the second of which tries something, on a terminal or not."""

    def write(*, is_terminal):
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120, color_system=None)
        monkeypatch.setattr(terminal, "err", console)
        outcome = progress.run((step("labels", 0), step("train churn", TRIALS)), flow.Job(Settings(home=tmp_path / str(is_terminal))))
        assert outcome.summary("train churn") == {"done": TRIALS}
        return console.file.getvalue()

    return write


def test_on_a_terminal_trials_have_a_bar_and_the_time_that_is_left_and_steps_none(shown):
    lines = shown(is_terminal=True).splitlines()
    of_trials, of_steps = ([line for line in lines if words in line] for words in ("trials", "train churn"))
    assert f"{TRIALS}/{TRIALS}" in of_trials[-1]
    assert of_trials[-1].count("0:00:0") == 2  # what it took, and what is left
    assert of_steps[-1].count("0:00:0") == 1


def test_elsewhere_a_step_is_a_line(shown):
    assert [line.split(":")[0] for line in shown(is_terminal=False).splitlines()] == ["labels", "train churn"]
