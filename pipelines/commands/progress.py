"""Steps of the flow, run with a bar on a terminal and a line a step elsewhere."""

from typing import TYPE_CHECKING

from pipelines.commands import home, terminal

if TYPE_CHECKING:
    from pipelines import flow


def run(steps: "tuple[flow.Step, ...]", job: "flow.Job") -> "flow.Outcome":
    """Run the steps in their order, and say which one it is."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from pipelines import flow

    console = terminal.err
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(steps))

        def ended(done: flow.StepRun) -> None:
            if not console.is_terminal:
                console.print(f"{done.name}: {'unchanged' if done.is_skipped else f'{done.took_s:.1f} s'}", highlight=False)
            bar.advance(task)

        return flow.run(steps, job, on_start=lambda step: bar.update(task, description=step.name), on_end=ended)


def run_one(name: str, as_json: bool, *, then: str | None = None) -> None:
    """Run this step, and after it `then` where it belongs to the job; show what the first one did."""
    from pipelines import flow

    job = flow.Job(home.settings())
    steps = tuple(step for step in flow.steps_for(job) if step.name in (name, then))
    terminal.show(run(steps, job).summary(name), as_json)
