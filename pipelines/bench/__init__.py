"""How fast the path is, each figure beside that of a named rival in the same run. Re-exports; measures nothing by itself."""

from pipelines.bench.features import FULL, QUICK, TINY, USUAL, Sizes, feature_rows, redis_beside
from pipelines.bench.ingest import ingest_rows
from pipelines.bench.loading import AS_OF, fill_for_reads
from pipelines.bench.log import log_rows
from pipelines.bench.row import BenchRow
from pipelines.bench.shop import SHOP_QUICK, SHOP_TINY, SHOP_USUAL, ShopSizes, fill_shop
from pipelines.bench.training import TRAINING_FULL, TRAINING_QUICK, TRAINING_TINY, TRAINING_USUAL, TrainingSizes, training_rows

__all__ = [
    "AS_OF",
    "FULL",
    "QUICK",
    "SHOP_QUICK",
    "SHOP_TINY",
    "SHOP_USUAL",
    "TINY",
    "TRAINING_FULL",
    "TRAINING_QUICK",
    "TRAINING_TINY",
    "TRAINING_USUAL",
    "USUAL",
    "BenchRow",
    "ShopSizes",
    "Sizes",
    "TrainingSizes",
    "feature_rows",
    "fill_for_reads",
    "fill_shop",
    "ingest_rows",
    "log_rows",
    "redis_beside",
    "training_rows",
]
