"""What a search for segments found -> figures for its run: silhouette, dispersion and gap by number, and the clouds it was held against.

Draws what it is given; opens no window, keeps no state, decides nothing.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figures(curves: Sequence[Mapping[str, Any]], evidence: Mapping[str, Any]) -> dict[str, "Figure"]:
    """By file name: the curves of the methods that are asked for a number, and the silhouette among those of clouds without groups."""
    found = {"number_of_segments.png": _numbers(curves, evidence)}
    if evidence.get("reference_nulls"):
        found["structure.png"] = _structure(evidence)
    return found


def _numbers(curves: Sequence[Mapping[str, Any]], evidence: Mapping[str, Any]) -> "Figure":
    figure, (silhouette, dispersion, gap) = _panels(3)
    chosen, elbows = evidence.get("chosen") or {}, evidence.get("elbows") or {}
    for method in dict.fromkeys(str(row["method"]) for row in curves if row["method"] in elbows and elbows[row["method"]] is not None):
        rows = [row for row in curves if row["method"] == method]
        k = [row["n_clusters"] for row in rows]
        silhouette.errorbar(k, [row["silhouette"] for row in rows], yerr=[row["standard_error"] for row in rows], marker="o", label=method)
        line = dispersion.plot(k, [row["dispersion"] for row in rows], marker="o", label=method)
        dispersion.axvline(elbows[method], color=line[0].get_color(), linestyle=":")
    if evidence.get("gap"):
        rows = evidence["gap"]
        gap.errorbar([r["k"] for r in rows], [r["gap"] for r in rows], yerr=[r["standard_error"] for r in rows], marker="o")
    if chosen:
        silhouette.axvline(chosen["n_clusters"], color="black", linestyle="--")
    for axes, title in ((silhouette, "silhouette (chosen: dashed)"), (dispersion, "dispersion (elbows: dotted)"), (gap, "gap statistic")):
        axes.set(title=title, xlabel="segments")
    if silhouette.get_legend_handles_labels()[1]:
        silhouette.legend()
    return figure


def _structure(evidence: Mapping[str, Any]) -> "Figure":
    figure, (axes,) = _panels(1)
    for name, values in evidence["reference_nulls"].items():
        axes.hist(values, bins=12, alpha=0.6, label=f"{name} clouds without groups")
    axes.axvline(evidence["reference_silhouette"], color="black", linestyle="--", label="customers")
    axes.set(title="best silhouette", xlabel="silhouette", ylabel="clouds")
    axes.legend()
    return figure


def _panels(n: int) -> tuple["Figure", Sequence["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * n, 4.0), layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False)[0]
