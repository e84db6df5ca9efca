"""How fast the path is, each figure beside that of a named rival in the same run. Re-exports; measures nothing by itself."""

from pipelines.bench.features import FULL, QUICK, TINY, USUAL, Sizes, feature_rows, redis_beside
from pipelines.bench.ingest import ingest_rows
from pipelines.bench.loading import AS_OF, fill_for_reads
from pipelines.bench.log import log_rows
from pipelines.bench.row import BenchRow

__all__ = [
    "AS_OF",
    "FULL",
    "QUICK",
    "TINY",
    "USUAL",
    "BenchRow",
    "Sizes",
    "feature_rows",
    "fill_for_reads",
    "ingest_rows",
    "log_rows",
    "redis_beside",
]
