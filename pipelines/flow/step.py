"""What a step of the loop is, what it works on, and what became of it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines.flow.instant import read_clock
from pipelines.settings import Settings
from pipelines.tables import Table

Summary = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one run of the loop works on."""

    settings: Settings
    files: tuple[Path, ...] = ()  # none: the simulated shop
    mapping: str | None = None  # none: Segment-spec JSON lines
    items_file: Path | None = None
    on_progress: Callable[[int, int], None] = lambda done, total: None  # of a step at work: trials so far, of all

    @property
    def home(self) -> Path:
        """The folder that everything is written under."""
        return self.settings.home

    def as_of(self) -> datetime:
        """The instant the run calls now; decided by the ingest step."""
        return read_clock(self.settings)

    def inputs(self) -> tuple[Path, ...]:
        """The event files, the simulated shop's where none were given."""
        return self.files or (self.home / "raw" / "events.jsonl",)


@dataclass(frozen=True)
class Step:
    """One arrow of the path. `reads` and `writes` are tables, or files and folders relative to the home."""

    name: str
    run: Callable[[Job], Summary]
    reads: tuple[Table | str, ...] = ()
    writes: tuple[Table | str, ...] = ()
    settings: tuple[str, ...] = ()  # the groups of Settings that change its result
    code: tuple[str, ...] = ()  # modules and whole packages that it runs, with all of ours that they import: changed, it runs again
    reads_files: bool = False  # also depends on the job's event files, mapping and items


@dataclass(frozen=True)
class StepRun:
    """What became of one step: its summary, whether it was skipped, and the seconds it took."""

    name: str
    summary: Summary
    is_skipped: bool
    took_s: float


@dataclass(frozen=True)
class Outcome:
    """The runs of all steps, by name, in order."""

    steps: Mapping[str, StepRun] = field(default_factory=dict)

    def summary(self, name: str) -> Summary:
        """What step `name` reported; empty if it is not part of this run."""
        return self.steps[name].summary if name in self.steps else {}


def plain(report: Any) -> Summary:
    """A report as JSON would hold it, so that a skipped step reports exactly what the finished one did."""
    summary = asdict(report) if is_dataclass(report) and not isinstance(report, type) else dict(report)
    summary_as_read: Summary = json.loads(json.dumps(summary, default=str))
    return summary_as_read
