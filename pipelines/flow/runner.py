"""Steps, one after the other, those left out that are finished.

A step is skipped when its key (its code, its settings, the content of its inputs) is the one it finished with and its
outputs still stand. Outputs are published atomically by the steps themselves, so an interrupted step simply runs again.
Never decides what a step does.
"""

import errno
import fcntl
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines import tables
from pipelines.code_version import code_version
from pipelines.errors import PipelineError, StoreError
from pipelines.flow.claim import check_own
from pipelines.flow.content import content_of
from pipelines.flow.step import Job, Outcome, Step, StepRun, Summary
from pipelines.private_file import replace_file
from pipelines.tables import Table


def run(
    steps: tuple[Step, ...],
    job: Job,
    *,
    on_start: Callable[[Step], None] = lambda step: None,
    on_end: Callable[[StepRun], None] = lambda done: None,
    force: tuple[str, ...] = (),
) -> Outcome:
    """Run the steps in order, skipping those that are finished. Raises PipelineError as the step raised it.

    One run at a time per home: a second one is refused, not queued. A run that ingests owns its home (see `claim`).
    """
    finished: dict[str, StepRun] = {}
    with _lock(job.home):
        if any(step.name == "ingest" for step in steps):
            check_own(job)
        for step in steps:
            on_start(step)
            finished[step.name] = _run_step(step, job, is_forced=step.name in force)
            on_end(finished[step.name])
    return Outcome(finished)


def history(home: Path) -> list[Summary]:
    """Every step run of this home, oldest first: step, started, took_s, outcome."""
    path = home / "flow" / "runs.db"
    if not path.exists():
        return []
    with closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute("SELECT * FROM runs ORDER BY started")]


def _run_step(step: Step, job: Job, *, is_forced: bool) -> StepRun:
    key = _key(step, job)
    record = _record(step, job)
    if not is_forced and record.get("key") == key and record.get("outputs") == _outputs(step, job):
        return StepRun(step.name, record["summary"], is_skipped=True, took_s=0.0)
    started = time.time()
    try:
        summary = step.run(job)
    except BaseException as error:
        with suppress(sqlite3.OperationalError):  # a disk too full for this line, too: the error itself is what is to be told
            _log_run(job, step, key, started, f"failed: {type(error).__name__}")
        if _is_disk_full(error) and not isinstance(error, StoreError):
            raise StoreError(
                f"flow: {step.name} found no space left under {job.home}; free some and run again, finished steps stay"
            ) from error
        raise
    # Inputs a step itself moves (the champion pointer) are part of the key it finished with.
    record = {"key": _key(step, job), "outputs": _outputs(step, job), "summary": summary}
    replace_file(_record_path(step, job), json.dumps(record, indent=1, default=str).encode())
    _log_run(job, step, key, started, "done")
    return StepRun(step.name, summary, is_skipped=False, took_s=time.time() - started)


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether this error, or what it came from, is a full disk: of the files, of SQLite, or as a library words it."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "disk is full" in str(error) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _key(step: Step, job: Job) -> str:
    parts: dict[str, Any] = {"step": step.name, "code": code_version(step.code)}
    dumped = job.settings.model_dump(mode="json", include=set(step.settings))
    parts["settings"] = {name: dumped[name] for name in step.settings}
    parts["reads"] = [content_of(item, job.home) for item in step.reads]
    if step.reads_files:
        parts["files"] = [content_of(path, job.home) for path in job.files]
        parts["raw"] = "" if job.files else content_of("raw", job.home)
        parts["mapping"] = content_of(Path(job.mapping), job.home) if job.mapping and Path(job.mapping).is_file() else job.mapping
        parts["items"] = content_of(job.items_file, job.home) if job.items_file else ""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _outputs(step: Step, job: Job) -> list[str] | None:
    """What stands where the step writes; None if something is missing. A table's version never changes once published."""
    found = []
    for item in step.writes:
        path = tables.folder(job.home, item) if isinstance(item, Table) else job.home / item
        if not path.exists():
            return None
        found.append(path.resolve().name)
    return found


def _record_path(step: Step, job: Job) -> Path:
    return job.home / "flow" / f"{step.name.replace(' ', '-')}.json"


def _record(step: Step, job: Job) -> dict[str, Any]:
    path = _record_path(step, job)
    return json.loads(path.read_text()) if path.exists() else {}


def _log_run(job: Job, step: Step, key: str, started: float, outcome: str) -> None:
    with closing(sqlite3.connect(job.home / "flow" / "runs.db")) as db, db:
        db.execute("CREATE TABLE IF NOT EXISTS runs (step TEXT, key TEXT, started REAL, took_s REAL, outcome TEXT)")
        db.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?)", (step.name, key, started, time.time() - started, outcome))


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    try:
        (home / "flow").mkdir(parents=True, exist_ok=True)
        file = (home / "flow" / "lock").open("w")
    except OSError as error:
        raise StoreError(
            f"flow: the home folder {home} could not be written ({error.strerror}); set RAPPORT_HOME to one that can"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PipelineError(f"flow: another run is working in {home}; wait for it, or set RAPPORT_HOME to another folder") from error
        yield
