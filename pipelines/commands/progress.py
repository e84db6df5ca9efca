"""Steps of the flow, run with bars on a terminal, of the steps and of the trials of one, and a line a step elsewhere."""

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from pipelines.commands import home, terminal

if TYPE_CHECKING:
    from pipelines import flow


def run(steps: "tuple[flow.Step, ...]", job: "flow.Job") -> "flow.Outcome":
    """Run the steps in their order, and say which one it is; of trials, how long the others will take."""
    from pipelines import flow

    console = terminal.err
    columns = (SpinnerColumn(), TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), _Left())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(steps), is_even=False)
        trials = bar.add_task("  trials", total=None, visible=False, is_even=True)

        def began(step: flow.Step) -> None:
            bar.update(task, description=step.name)
            bar.reset(trials, total=None, visible=False)

        def tried(done: int, total: int) -> None:
            bar.update(trials, completed=done, total=total, visible=True)

        def ended(done: flow.StepRun) -> None:
            if not console.is_terminal:
                console.print(f"{done.name}: {'unchanged' if done.is_skipped else f'{done.took_s:.1f} s'}", highlight=False)
            bar.advance(task)

        return flow.run(steps, replace(job, on_progress=tried), on_start=began, on_end=ended)


class _Left(TimeRemainingColumn):
    """The time that is left of work in even parts: steps are not."""

    def render(self, task: Task) -> Text:
        """Nothing where the parts are no measure of each other."""
        return super().render(task) if task.fields.get("is_even") else Text()


def run_one(name: str, as_json: bool, *, then: str | None = None) -> None:
    """Run this step, and after it `then` where it belongs to the job; show what the first one did."""
    from pipelines import flow

    job = flow.Job(home.settings())
    steps = tuple(step for step in flow.steps_for(job) if step.name in (name, then))
    terminal.show(run(steps, job).summary(name), as_json)
