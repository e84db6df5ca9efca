"""The steps of the loop in order, declared once: name, inputs, outputs, code; and the runner that resumes them.

A step is skipped when its key (its code, its settings, the content of its inputs) is the one it finished with and its
outputs still stand. Outputs are published atomically by the steps themselves, so an interrupted step simply runs again.
Never decides what a step does: that is in the module the step names.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines import tables
from pipelines.code_version import code_version
from pipelines.errors import InputError, PipelineError, StoreError
from pipelines.settings import Settings, clock
from pipelines.tables import Table

Summary = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one run of the loop works on."""

    settings: Settings
    files: tuple[Path, ...] = ()  # none: the simulated shop
    mapping: str | None = None  # none: Segment-spec JSON lines
    items_file: Path | None = None

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


def run(
    steps: tuple[Step, ...],
    job: Job,
    *,
    on_start: Callable[[Step], None] = lambda step: None,
    on_end: Callable[[StepRun], None] = lambda done: None,
    force: tuple[str, ...] = (),
) -> Outcome:
    """Run the steps in order, skipping those that are finished. Raises PipelineError as the step raised it.

    One run at a time per home: a second one is refused, not queued. A run that ingests owns its home (see `_check_own`).
    """
    finished: dict[str, StepRun] = {}
    with _lock(job.home):
        if any(step.name == "ingest" for step in steps):
            _check_own(job)
        for step in steps:
            on_start(step)
            finished[step.name] = _run_step(step, job, is_forced=step.name in force)
            on_end(finished[step.name])
    return Outcome(finished)


def steps_for(job: Job) -> tuple[Step, ...]:
    """The steps of this job: the shop is simulated only where no files were given, traits are guessed only where a plan says how.

    A table that a later step writes again no longer has the version by which an earlier one would know that it is done: that one is
    then not asked for it.
    """
    is_off = {"simulate": bool(job.files), "impute": not job.settings.ingest.imputation}
    steps = [step for step in STEPS if not is_off.get(step.name, False)]
    again = [{item for later in steps[at + 1 :] for item in later.writes if isinstance(item, Table)} for at in range(len(steps))]
    return tuple(
        replace(step, writes=tuple(item for item in step.writes if item not in later)) for step, later in zip(steps, again, strict=True)
    )


def train_step(name: str) -> Step:
    """The step that trains a task which is no part of the loop: of its labels nothing is stored, so it reads the events themselves."""
    reads = (tables.EVENTS, tables.CONSENTS, tables.CUSTOMER_PROFILE, *_FEATURES, "clock.json")
    return Step(f"train {name}", _train(name), reads=reads, writes=("models/champions.json",), settings=_MODELS, code=_TRAINING)


def read_clock(settings: Settings) -> datetime:
    """What "now" means in this home, UTC. Raises StoreError where nothing was ingested and no `as_of` is set."""
    if settings.as_of is not None:
        return clock(settings, None, settings.as_of)
    path = settings.home / "clock.json"
    if not path.exists():
        raise StoreError(f"clock: expected {path}, found nothing; ingest events first, or set RAPPORT_AS_OF")
    return datetime.fromisoformat(json.loads(path.read_text())["as_of"])


def write_clock(settings: Settings, last_event: datetime | None, wall: datetime) -> datetime:
    """Decide what "now" means from the newest event and remember it for every later step and for serving."""
    now = clock(settings, last_event, wall)
    _replace(settings.home / "clock.json", {"as_of": now.isoformat(), "is_history": now != wall})
    return now


def history(home: Path) -> list[Summary]:
    """Every step run of this home, oldest first: step, started, took_s, outcome."""
    path = home / "flow" / "runs.db"
    if not path.exists():
        return []
    with closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute("SELECT * FROM runs ORDER BY started")]


def plain(report: Any) -> Summary:
    """A report as JSON would hold it, so that a skipped step reports exactly what the finished one did."""
    summary = asdict(report) if is_dataclass(report) and not isinstance(report, type) else dict(report)
    summary_as_read: Summary = json.loads(json.dumps(summary, default=str))
    return summary_as_read


# -- the steps ---------------------------------------------------------------------------------------------------------


def _simulate(job: Job) -> Summary:
    from pipelines import simulate

    s = job.settings.simulation
    return plain(simulate.simulate(job.home / "raw", customers=s.customers, days=s.days, seed=s.seed))


def _ingest(job: Job) -> Summary:
    """The loop's events are those of its files alone (`rapport ingest` is the one that adds): read aside, then put in place."""
    from pipelines import ingest, retention
    from pipelines.vault import open_vault

    aside = job.home / "flow" / "incoming"
    shutil.rmtree(aside, ignore_errors=True)
    items = job.items_file or (None if job.files else job.home / "raw" / "items.jsonl")
    try:
        # the home's own vault: its pseudonyms are to be those of its other tables, and who was erased from it stays away
        with closing(open_vault(job.home, master=job.settings.master_key)) as vault:
            report = ingest.ingest(aside, list(job.inputs()), mapping=job.mapping, items_file=items, settings=job.settings, vault=vault)
    except InputError:
        ingest.keep_refusal(job.home, aside)  # the rows that explain it
        raise
    except StoreError:
        shutil.rmtree(aside, ignore_errors=True)  # what was read so far only takes the space that was lacking
        raise
    now = datetime.now(UTC)
    if job.settings.privacy.retention_days:  # the files still hold what `rapport retain` removed, which goes by the wall as well
        retention.apply(aside, settings=job.settings, as_of=now)
    with tables.locked(job.home):
        _claim(job)
        for table in _CLEAN:
            tables.adopt(job.home, table, aside)
        tables.drop(job.home, tables.WAITING)  # of messages that these are not
    write_clock(job.settings, report.last_event, now)
    return plain(report)


def _features(job: Job) -> Summary:
    from pipelines import features

    return plain(features.build(job.home, session_gap_minutes=job.settings.ingest.session_gap_minutes))


def _impute(job: Job) -> Summary:
    from pipelines import imputation

    return plain(imputation.run(job.home, settings=job.settings, as_of=job.as_of()))


def _apply(job: Job) -> Summary:
    from pipelines import feature_store

    feature_store.apply(job.home, settings=job.settings)
    return {}


def _labels(job: Job) -> Summary:
    from pipelines import labels

    return plain(labels.build(job.home, settings=job.settings, as_of=job.as_of()))


def _train(name: str) -> Callable[[Job], Summary]:
    def step(job: Job) -> Summary:
        from pipelines import training

        return plain(training.train(name, job.home, settings=job.settings, as_of=job.as_of()))

    return step


def _materialize(job: Job) -> Summary:
    from pipelines import feature_store

    return {"rows": feature_store.materialize(job.home, as_of=job.as_of(), settings=job.settings)}


def _score(job: Job) -> Summary:
    from pipelines import feature_store, scoring

    report = plain(scoring.score(job.home, settings=job.settings, as_of=job.as_of()))
    feature_store.materialize(job.home, as_of=job.as_of(), views=["customer_scores", "task_scores"], settings=job.settings)
    return report


_CLEAN = (
    tables.EVENTS, tables.MESSAGES, tables.QUARANTINE, tables.INGESTS, tables.IDENTITIES, tables.IDENTITY_LINKS, tables.CONSENTS,
    tables.SPEAKING_SOURCES, tables.TRAITS, tables.ITEMS, tables.ALERTS, tables.CUSTOMER_PROFILE, tables.CUSTOMER_CONSENT,
)  # fmt: skip
_FEATURES = tables.FEATURE_TABLES
_SCORES = (tables.CUSTOMER_SCORES, tables.SCORED_CHURN, tables.SCORED_INTENT, tables.RECOMMENDATIONS)
_MODELS = ("labels", "training", "gate")
_TRAINING = ("pipelines.training", "models", "feature_repo")  # tasks and features are found by looking
_STORE = ("pipelines.feature_store", "feature_repo")

STEPS: tuple[Step, ...] = (
    Step(
        "simulate", _simulate, settings=("simulation",), code=("pipelines.simulate",),
        writes=("raw/events.jsonl", "raw/items.jsonl", "raw/truth.parquet"),
    ),
    Step(
        "ingest", _ingest, writes=(*_CLEAN, "clock.json"), settings=("ingest", "consent", "privacy", "as_of"), reads_files=True,
        code=("pipelines.ingest", "pipelines.sources", "pipelines.retention"),
    ),
    Step(
        "features", _features, reads=(tables.EVENTS, tables.ITEMS), writes=_FEATURES, settings=("ingest",),
        code=("pipelines.features", "feature_repo"),
    ),
    Step(
        "impute", _impute, reads=(tables.CUSTOMER_PROFILE, tables.CUSTOMER_ACTIVITY), writes=(tables.CUSTOMER_PROFILE,),
        settings=("ingest",), code=("pipelines.imputation",),
    ),
    Step("apply", _apply, reads=_FEATURES, writes=("feature_store/registry.db",), code=_STORE),
    Step(
        "labels", _labels, reads=(tables.EVENTS, tables.CONSENTS, "clock.json"),
        writes=(tables.LABELS_CHURN, tables.LABELS_INTENT, tables.INTERACTIONS), settings=("labels",),
        code=("pipelines.labels", "models"),
    ),
    Step(
        "train churn", _train("churn"), reads=(tables.LABELS_CHURN, tables.CUSTOMER_PROFILE, *_FEATURES),
        writes=("models/champions.json",), settings=_MODELS, code=_TRAINING,
    ),
    Step(
        "train intent", _train("intent"), reads=(tables.LABELS_INTENT, tables.CUSTOMER_PROFILE, *_FEATURES),
        writes=("models/champions.json",), settings=_MODELS, code=_TRAINING,
    ),
    Step(
        "train recommender", _train("recommender"), reads=(tables.INTERACTIONS, tables.ITEMS, "clock.json"),
        writes=("models/champions.json",), settings=_MODELS, code=_TRAINING,
    ),
    Step(
        "train segments", _train("segments"),
        reads=(tables.CUSTOMER_ACTIVITY, tables.CUSTOMER_PROFILE, tables.EVENTS, tables.CONSENTS, "clock.json"),
        writes=("models/champions.json", tables.CUSTOMER_SEGMENTS), settings=("training", "gate", "consent"),
        code=_TRAINING,
    ),
    Step(
        "materialize", _materialize,
        reads=(
            *_FEATURES, tables.IDENTITIES, tables.CUSTOMER_PROFILE, tables.CUSTOMER_CONSENT, tables.CUSTOMER_SEGMENTS, "clock.json",
        ),
        writes=("feature_store/online.db",), code=_STORE,
    ),
    Step(
        "score", _score, reads=(*_FEATURES, tables.CONSENTS, "models/champions.json"), writes=_SCORES, settings=("labels",),
        code=("pipelines.scoring", "models", *_STORE),
    ),
)  # fmt: skip


# -- the runner --------------------------------------------------------------------------------------------------------


def _check_own(job: Job) -> None:
    """Raises PipelineError where the home holds events that no loop put there: those are somebody's data, not to be replaced."""
    is_used = any(tables.exists(job.home, table) for table in (tables.EVENTS, tables.QUARANTINE))
    if is_used and not (job.home / "flow" / "claim.json").exists():
        raise PipelineError(f"flow: {job.home} already holds events of your own; set RAPPORT_HOME to another folder for this run")


def _claim(job: Job) -> None:
    """Make the home this job's: what an earlier loop over other files derived is cleared; stored model versions stay."""
    path, mine = job.home / "flow" / "claim.json", {"files": [_content(file, job.home) for file in job.files], "mapping": job.mapping}
    held = json.loads(path.read_text()) if path.exists() else mine
    if held != mine:
        for name in ("feature_store", "reports", *(["raw"] if job.files else [])):
            shutil.rmtree(job.home / name, ignore_errors=True)
        (job.home / "models" / "champions.json").unlink(missing_ok=True)
        for table in tables.TABLES:
            tables.drop(job.home, table)
    _replace(path, mine)


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
    _replace(_record_path(step, job), {"key": _key(step, job), "outputs": _outputs(step, job), "summary": summary})
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
    parts["reads"] = [_content(item, job.home) for item in step.reads]
    if step.reads_files:
        parts["files"] = [_content(path, job.home) for path in job.files]
        parts["raw"] = "" if job.files else _content("raw", job.home)
        parts["mapping"] = _content(Path(job.mapping), job.home) if job.mapping and Path(job.mapping).is_file() else job.mapping
        parts["items"] = _content(job.items_file, job.home) if job.items_file else ""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _content(item: Table | str | Path, home: Path) -> str:
    """SHA-256 of what a step reads; a fixed word where it does not exist."""
    if isinstance(item, Table):
        return tables.content_hash(home, item) if tables.exists(home, item) else "absent"
    path = home / item
    if path.is_dir():
        inside = (_content(child, home) for child in sorted(path.rglob("*")) if child.is_file())
        return hashlib.sha256("".join(inside).encode()).hexdigest()
    if not path.is_file():
        return "absent"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text(json.dumps(content, indent=1, default=str))
    fresh.replace(path)
