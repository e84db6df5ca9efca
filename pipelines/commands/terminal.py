"""What the verbs print, and how they show that they are at work. Tables and sentences for a person, one JSON object for a program."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import typer
from rich.console import Console

PIPED_WIDTH = 132  # of a table that no terminal limits
out, err = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH), Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]


def show(report: Any, as_json: bool) -> None:
    """A report, a line a field; fields of a field are a column under its name."""
    from pipelines import flow

    plain = flow.plain(report)
    if as_json:
        print(json.dumps(plain))  # noqa: T201
        return
    for line in _lines(plain):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def show_rows(rows: Sequence[dict[Any, Any]], as_json: bool) -> None:
    """Rows of the same fields, as a table."""
    if as_json:
        print(json.dumps({"rows": rows}, default=str))  # noqa: T201
        return
    from rich.table import Table as Grid

    grid = Grid(box=None)
    for column in rows[0] if rows else ():
        grid.add_column(column)
    for row in rows:
        grid.add_row(*(str(value) for value in row.values()))
    out.print(grid if rows else "none")


@contextmanager
def rows_done() -> Iterator[Callable[[int, int | None], None]]:
    """A bar of rows on a terminal, and the call that moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def step(label: str) -> Iterator[None]:
    """A spinner on a terminal while something long happens."""
    with err.status(label) if err.is_terminal else nullcontext():
        yield


# -- private -----------------------------------------------------------------------------------------------------------


def _lines(report: dict[str, Any]) -> Iterator[str]:
    for key, value in report.items():
        if isinstance(value, dict) and value:
            shown = {name: _told(part) for name, part in value.items()}
            names, values = max(map(len, shown)), max(map(len, shown.values()))
            is_number = all(isinstance(part, (int, float)) or part is None for part in value.values())
            yield f"{key}:"
            yield from (f"  {name:<{names}}  {part:>{values if is_number else 0}}" for name, part in shown.items())
        else:
            yield f"{key}: {_told(value)}"


def _told(value: Any) -> str:
    if value is None or value == {} or value == []:
        return "none"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value if isinstance(value, str) else json.dumps(value)
    return f"{value:,}"
