"""The test rows, all and by protected group -> how good a model is for each, with an interval: what its manifest tells. Judges nothing."""

from typing import Any

import numpy as np

from models import evaluation
from pipelines.settings import Settings
from pipelines.training.gate import GROUP_DRAWS, Sheet, each_group
from pipelines.training.publishing import finite

EVERYBODY = "all"


def of_test(sheet: Sheet, *, settings: Settings) -> dict[str, dict[str, Any]]:
    """By group: rows, base_rate, mean_probability, and the metric as value, low, high; null where no number could be formed."""
    customers = sheet.customers.to_numpy()

    def told(rows: np.ndarray, draws: int) -> dict[str, Any]:
        label, probability = sheet.label[rows], sheet.probability[rows]
        found = evaluation.paired_bootstrap(
            lambda weight: sheet.metric(label, probability, weight=weight), customers[rows], draws=draws, seed=settings.training.seed
        )
        numbers = {"base_rate": label.mean(), "mean_probability": probability.mean(), **vars(found)}
        return {"rows": len(rows), **{name: finite(float(value)) for name, value in numbers.items()}}

    everybody = told(np.arange(len(customers)), settings.training.bootstrap_draws)
    return {EVERYBODY: everybody, **{name: told(rows, GROUP_DRAWS) for name, rows in each_group(sheet.groups)}}
