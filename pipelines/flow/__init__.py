"""The loop as steps: `steps` declares them, `runner` runs and resumes them, `instant` says what "now" means, `claim` whose the home is."""

from pipelines.flow.instant import read_clock, write_clock
from pipelines.flow.runner import history, run
from pipelines.flow.step import Job, Outcome, Step, StepRun, Summary, plain
from pipelines.flow.steps import STEPS, steps_for, train_step

__all__ = [
    "STEPS",
    "Job",
    "Outcome",
    "Step",
    "StepRun",
    "Summary",
    "history",
    "plain",
    "read_clock",
    "run",
    "steps_for",
    "train_step",
    "write_clock",
]
