"""Probabilities -> bands: low, medium, high. Arithmetic alone."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

NAMES = ("low", "medium", "high")


def band_cuts(threshold: float) -> tuple[float, float]:
    """Medium: acting pays, given the two costs. High: at least halfway from there to certainty."""
    return threshold, (1.0 + threshold) / 2


def bands(probability: ArrayLike, threshold: float) -> NDArray[np.intp]:
    """The place in NAMES of each probability (n,), for a model that acts from `threshold` on."""
    return np.searchsorted(np.array(band_cuts(threshold)), np.asarray(probability, dtype=np.float64), side="right")
