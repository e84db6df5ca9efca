"""Who is who was decided anew -> what follows from it: customers, consent, sessions, profiles.

In: the links between people as they are now. Out: the tables. Adds no rows, but what waits in the log for a word (see `waiting`): a
link may have brought it.
"""

from pathlib import Path

from pipelines import tables
from pipelines.ingest import waiting
from pipelines.ingest.report import IngestReport, report
from pipelines.ingest.runs import basis_by_settings, working
from pipelines.settings import Settings
from pipelines.vault import Vault


def reassign(home: Path, *, settings: Settings, vault: Vault | None = None) -> IngestReport:
    """Make anew what follows from who is who. For after a link between people was decided, found or cut. Raises StoreError."""
    with working(home, settings=settings, vault=vault) as (run, change):
        edges = tables.read_arrow(home, tables.IDENTITY_EDGES, ["left", "right"])
        waiting.stage_again_from_log(run, {*edges["left"].to_pylist(), *edges["right"].to_pylist()})
        judged, _ = run.judge(basis_by_settings(settings))
        run.publish(change, is_changed=True)
        has_consent = bool(run.count("consents"))
        return report(judged, span=run.span(), has_consent=has_consent)
