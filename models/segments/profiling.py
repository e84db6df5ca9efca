"""Customers and their segments -> what sets each segment apart, as numbers and in a sentence.

In: features and a segment code for each customer. Out: medians, effect sizes against all others, and words. Holds nobody's row and names
nobody: a median of many is all that is told.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from models.segments.behaviour import PHRASES, Phrase
from models.segments.clustering import Floats, Labels
from models.segments.scaling import numbers

SAID = 0.33  # Cliff's delta from which a difference is said: medium and above (Romano et al. 2006)
MOST = 3  # differences in one sentence


def profile(
    features: pd.DataFrame, codes: Labels, names: Sequence[str], columns: Sequence[str], phrases: Mapping[str, Phrase] = PHRASES
) -> pd.DataFrame:
    """One row for each name: segment, customers, share (0..1), description; then median_X and delta_X of each column X.

    codes: (n,) places in `names`, negative for no segment. delta: Cliff's, in [-1, 1]: the chance that a member has more than another
    customer, minus that of less.
    """
    k, n = len(names), len(codes)
    counts = np.bincount(codes[codes >= 0], minlength=k)
    frame = pd.DataFrame({"segment": list(names), "customers": counts, "share": counts / max(n, 1)})
    medians, deltas = {}, {}
    for name in columns:
        values = numbers(features, name)
        by_code = pd.Series(values).groupby(codes).median()
        medians[name] = by_code.reindex(range(k)).to_numpy(dtype=np.float64)
        deltas[name] = cliffs_delta(values, codes, k)
    sentences = [
        _sentence({name: (medians[name][i], deltas[name][i]) for name in columns}, float(frame["share"].iloc[i]), phrases) for i in range(k)
    ]
    numbers_told = {f"{what}_{name}": found[name] for name in columns for what, found in (("median", medians), ("delta", deltas))}
    return frame.assign(description=sentences, **numbers_told)


def cliffs_delta(values: Floats, codes: Labels, k: int) -> Floats:
    """Cliff's delta (k,) of each group against all others with a value, from one ranking; NaN where either side is empty."""
    from scipy.stats import rankdata

    known = ~np.isnan(values)
    ranks, groups = rankdata(values[known]), codes[known]
    inside = groups >= 0
    size = np.bincount(groups[inside], minlength=k).astype(np.float64)
    total = np.bincount(groups[inside], weights=ranks[inside], minlength=k)
    others = len(ranks) - size
    pairs = np.where(size * others > 0, size * others, np.nan)
    return np.asarray(2.0 * (total - size * (size + 1) / 2) / pairs - 1.0)


def _sentence(found: Mapping[str, tuple[float, float]], share: float, phrases: Mapping[str, Phrase]) -> str:
    telling = sorted((name for name, (_, delta) in found.items() if abs(delta) >= SAID), key=lambda name: (-abs(found[name][1]), name))
    said = [text for name in telling if (text := _said(name, *found[name], phrases.get(name)))]
    return f"{'; '.join(said[:MOST] or ['much like the others'])}; {100 * share:.0f} % of customers"


def _said(name: str, median: float, delta: float, phrase: Phrase | None) -> str:
    if phrase is None:
        return f"{'high' if delta > 0 else 'low'} {name}, median {median:.3g}"
    if median == 0:
        return phrase.none
    return f"{phrase.high if delta > 0 else phrase.low}, {phrase.value.format(median * phrase.scale)}"
