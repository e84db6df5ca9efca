"""Event files, the durable log and the quarantine -> the clean tables: `ingest`, `drain` and `replay`; `ledger` says where all rows are.

Rows read = accepted + duplicate + quarantined; accepted = stored + consent_dropped + erased. Nothing is published before everything
was read to its end, and then all tables as one. Never drops a row without counting it. Re-exports; does nothing.

A file without a time of receipt is history: received when it happened, unless the caller says otherwise.
"""

from pipelines.ingest.accounts import count_erased, keep_refusal, ledger
from pipelines.ingest.draining import drain
from pipelines.ingest.files import Progress, ingest
from pipelines.ingest.reassigning import reassign
from pipelines.ingest.replaying import ReplayReport, replay
from pipelines.ingest.report import IngestReport

__all__ = ["IngestReport", "Progress", "ReplayReport", "count_erased", "drain", "ingest", "keep_refusal", "ledger", "reassign", "replay"]
