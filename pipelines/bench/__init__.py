"""How fast the path is, each figure beside that of a named rival in the same run. Re-exports; measures nothing by itself."""

from pipelines.bench.features import FULL, QUICK, TINY, USUAL, Sizes, feature_rows, redis_beside
from pipelines.bench.ingest import ingest_rows
from pipelines.bench.loading import AS_OF, fill_for_reads
from pipelines.bench.log import log_rows
from pipelines.bench.row import BenchRow
from pipelines.bench.training import TRAINING_FULL, TRAINING_QUICK, TRAINING_TINY, TRAINING_USUAL, TrainingSizes, training_rows

__all__ = [
    "AS_OF",
    "FULL",
    "QUICK",
    "TINY",
    "TRAINING_FULL",
    "TRAINING_QUICK",
    "TRAINING_TINY",
    "TRAINING_USUAL",
    "USUAL",
    "BenchRow",
    "Sizes",
    "TrainingSizes",
    "feature_rows",
    "fill_for_reads",
    "ingest_rows",
    "log_rows",
    "redis_beside",
    "training_rows",
]
