"""Whose a home is: a run over files replaces what an earlier run derived, and never events that somebody added themselves."""

import json
import shutil

from pipelines import tables
from pipelines.errors import PipelineError
from pipelines.flow.content import content_of
from pipelines.flow.step import Job
from pipelines.private_file import replace_file


def check_own(job: Job) -> None:
    """Raises PipelineError where the home holds events that no loop put there: those are somebody's data, not to be replaced."""
    is_used = any(tables.exists(job.home, table) for table in (tables.EVENTS, tables.QUARANTINE))
    if is_used and not (job.home / "flow" / "claim.json").exists():
        raise PipelineError(f"flow: {job.home} already holds events of your own; set RAPPORT_HOME to another folder for this run")


def claim(job: Job) -> None:
    """Make the home this job's: what an earlier loop over other files derived is cleared; stored model versions stay."""
    path, mine = job.home / "flow" / "claim.json", {"files": [content_of(file, job.home) for file in job.files], "mapping": job.mapping}
    held = json.loads(path.read_text()) if path.exists() else mine
    if held != mine:
        for name in ("feature_store", "reports", *(["raw"] if job.files else [])):
            shutil.rmtree(job.home / name, ignore_errors=True)
        (job.home / "models" / "champions.json").unlink(missing_ok=True)
        for table in tables.TABLES:
            tables.drop(job.home, table)
    replace_file(path, json.dumps(mine, indent=1).encode())
