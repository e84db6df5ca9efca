"""What is told of a fitted model, as tables -> figures. Draws what it is given; opens no window, keeps no state, decides nothing."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 15  # columns of the contributions
OF_A_ROW = 8  # columns of one row's, the others together
WIDE = 3  # dependences beside each other
NAMES = 2.3  # inches that names of columns need
RISES, LOWERS, NEUTRAL = "tab:red", "tab:blue", "0.6"


def contributions(overall: pd.DataFrame, parts: pd.DataFrame, features: pd.DataFrame | None = None) -> "Figure":
    """How much each column moves the logit, and which way for which of its values.

    overall: by column, `mean_absolute`, the largest first. parts: (n, d) contributions; features: the values of the same rows.
    """
    names = [str(name) for name in overall.index[:SHOWN]][::-1]
    wide, high = 11.0 if features is not None else 7.0, 0.8 + 0.32 * max(len(names), 5)
    figure = _figure((wide, high), left=NAMES / wide, right=0.98, bottom=0.5 / high, top=1 - 0.15 / high, wspace=0.03)
    bars, swarm = figure.subplots(1, 2, sharey=True, width_ratios=[2, 3]) if features is not None else (figure.subplots(), None)
    bars.barh(range(len(names)), overall["mean_absolute"].reindex(names), color=NEUTRAL)
    bars.set(yticks=range(len(names)), yticklabels=names, xlabel="mean absolute contribution")
    if swarm is None or features is None:
        return figure
    swarm.tick_params(axis="y", left=False)
    drawn: Any = None
    for place, name in enumerate(names):
        x, value = parts[name].to_numpy(dtype=float), features[name]
        height = place + _swarm(x)
        is_known = (value.notna() & pd.api.types.is_numeric_dtype(value)).to_numpy()
        swarm.scatter(x[~is_known], height[~is_known], s=4, color=NEUTRAL, linewidths=0)
        if is_known.any():
            color = value[is_known].astype(float).rank(pct=True, method="average")
            drawn = swarm.scatter(x[is_known], height[is_known], s=4, c=color, cmap="coolwarm", vmin=0, vmax=1, linewidths=0)
    swarm.axvline(0, color="0.8", zorder=0)
    swarm.set(xlabel=f"contribution in each of {len(parts):,} rows (colour: value; grey: text, null)")
    if drawn is not None:
        figure.colorbar(drawn, ax=swarm, ticks=[0, 1], pad=0.01).ax.set_yticklabels(["low", "high"])
    return figure


def rows(shown: pd.DataFrame) -> "Figure":
    """The contributions of the row with the lowest, the middle and the highest probability; from `base` they lead to it.

    shown: columns of contributions, `base` and `probability`; a row each.
    """
    order = shown["probability"].argsort(kind="stable")
    chosen = list(dict.fromkeys(int(order.iloc[place]) for place in (0, len(order) // 2, len(order) - 1)))
    wide = 5.0 * len(chosen)
    figure = _figure((wide, 3.4), left=NAMES / wide, right=0.99, bottom=0.15, top=0.92, wspace=NAMES / (5.0 - NAMES))
    for axes, row in zip(figure.subplots(1, len(chosen), squeeze=False, sharex=True)[0], chosen, strict=True):
        parts = shown.iloc[row].drop(["base", "probability"]).astype(float)
        parts = parts.reindex(parts.abs().sort_values(ascending=False).index)
        told = pd.concat([parts.head(OF_A_ROW), pd.Series({f"{max(len(parts) - OF_A_ROW, 0)} others": parts[OF_A_ROW:].sum()})])[::-1]
        axes.barh(range(len(told)), told, color=[RISES if value > 0 else LOWERS for value in told])
        axes.axvline(0, color="0.8", zorder=0)
        axes.set(yticks=range(len(told)), yticklabels=[str(name) for name in told.index], xlabel="contribution to the logit")
        axes.set_title(f"row {row}: {_chance(shown['base'].iloc[row])} at the base, {shown['probability'].iloc[row]:.1%} here", fontsize=9)
    return figure


def dependence(table: pd.DataFrame) -> "Figure":
    """The mean probability as one column moves, on one scale for all of them. table: of `explanations.partial_dependence`."""
    names = list(dict.fromkeys(table["feature"]))
    deep = max(-(-len(names) // WIDE), 1)
    figure = _figure((11, 3.0 * deep), left=0.06, right=0.99, bottom=0.2 / deep, top=1 - 0.2 / deep, wspace=0.06, hspace=0.45)
    panels = figure.subplots(deep, WIDE, sharey=True, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        part = table[table["feature"] == name]
        is_text = part["value"].map(lambda value: isinstance(value, str)).any()
        axes.plot(part["value"].astype(str) if is_text else part["value"].astype(float), part["probability"], "." if is_text else ".-")
        axes.tick_params(axis="x", labelrotation=45 if is_text else 0, labelsize=8)
        axes.set_title(name, fontsize=9)
    for axes in panels[::WIDE]:
        axes.set_ylabel("mean probability")
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.suptitle("partial dependence (dots: quantiles of the rows)", fontsize=9)
    return figure


def calibration(table: pd.DataFrame, probability: np.ndarray, *, error: float, brier: float) -> "Figure":
    """Predicted and observed rate with its interval, over how the probabilities lie. table: of `calibration_table`."""
    figure = _figure((5, 6), left=0.14, right=0.96, bottom=0.08, top=0.95, hspace=0.06)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    on_diagonal(above, table)
    above.set_title(f"calibration error {error:.4f}, Brier score {brier:.4f}, {len(probability):,} rows", fontsize=9)
    above.set_xlabel("")
    below.hist(probability, bins=40, range=(0, 1), color=NEUTRAL)
    below.set(xlabel="predicted probability", ylabel="rows", xlim=(0, 1))
    return figure


def gain(table: pd.DataFrame, base_rate: float) -> "Figure":
    """Lift, and how many more positives than by chance the best-scored share of rows holds, with intervals. table: of `gain_table`."""
    figure = _figure((10, 4), left=0.06, right=0.99, bottom=0.13, top=0.93, wspace=0.2)
    lift, more = figure.subplots(1, 2)
    share = np.append(0.0, table["share"])
    lift.plot(table["share"], table["lift"], marker=".")
    lift.fill_between(table["share"], table["low"] / table["share"] + 1, table["high"] / table["share"] + 1, alpha=0.2, linewidth=0)
    lift.axhline(1, color="grey", linestyle=":")
    lift.set(xlabel="share reached, best first", ylabel="lift", title="lift (by chance: 1)")
    more.plot(share, np.append(0.0, table["gain"]), marker=".", label="the model")
    more.fill_between(share, np.append(0.0, table["low"]), np.append(0.0, table["high"]), alpha=0.2, linewidth=0, label="95 % of draws")
    more.plot([0, base_rate, 1], [0, 1 - base_rate, 0], color="grey", linestyle="--", label="a model that knows all")
    more.axhline(0, color="grey", linestyle=":", label="by chance")
    more.set(xlabel="share reached, best first", ylabel="share of positives found, beyond chance", title="gain (Qini curve)")
    more.legend(fontsize=8)
    for axes in (lift, more):
        axes.title.set_fontsize(9)
    return figure


def search(table: pd.DataFrame, importance: Mapping[str, float]) -> "Figure":
    """The losses of trials as they came, and what explains them. table: of `search_table`; importance: of `search_importance`."""
    figure = _figure((10, 4), left=0.11, right=0.98, bottom=0.13, top=0.93, wspace=0.45)
    history, bars = figure.subplots(1, 2)
    is_whole = table["loss"].notna()
    history.plot(table["trial"][is_whole], table["loss"][is_whole].astype(float), "o", markersize=4, label="trial")
    history.step(table["trial"], table["best_loss"].astype(float), where="post", label="best so far")
    if not is_whole.all():
        foot = np.full(int((~is_whole).sum()), 0.02)
        history.plot(table["trial"][~is_whole], foot, "x", color="grey", transform=history.get_xaxis_transform(), label="not finished")
    history.set(xlabel="trial (0: the defaults)", ylabel="loss on the validation rows")
    history.xaxis.get_major_locator().set_params(integer=True)
    history.ticklabel_format(axis="y", useOffset=False)
    history.legend(fontsize=8)
    bars.barh(list(importance)[::-1], list(importance.values())[::-1], color=NEUTRAL)
    bars.set(xlabel="share of the loss's variation", title=f"of {int(is_whole.sum())} trials")
    if not importance:
        bars.set(title="too few trials to say what the loss hangs on")
        bars.set_axis_off()
    bars.title.set_fontsize(9)
    return figure


def when(judged: pd.DataFrame, days: Sequence[float], expected: Sequence[float], table: pd.DataFrame) -> "Figure":
    """Orders expected and observed by day, and the calibration at the last day that was judged. table: of `calibration_table`."""
    figure = _figure((10, 4.5), left=0.06, right=0.99, bottom=0.12, top=0.94)
    curve, diagonal = figure.subplots(1, 2)
    curve.plot(days, expected, marker=".", label="expected")
    curve.plot(judged["days"], judged["observed"], marker="o", linestyle="none", label="observed")
    curve.set(xlabel="days", ylabel="share who have ordered", ylim=(0, 1))
    curve.legend()
    on_diagonal(diagonal, table)
    diagonal.set_title(f"by day {judged['days'].iloc[-1]:g}", fontsize=9)
    return figure


def on_diagonal(axes: "Axes", table: pd.DataFrame) -> None:
    """Observed over predicted rates, beside the line where both are the same."""
    beside = [table["observed"] - table["low"], table["high"] - table["observed"]]
    axes.errorbar(table["predicted"], table["observed"], yerr=beside, marker="o", markersize=4, capsize=2)
    axes.axline((0, 0), slope=1, linestyle=":", color="grey")
    axes.set(xlabel="predicted probability", ylabel="observed rate", ylim=(-0.02, 1.02))


# -- private -----------------------------------------------------------------------------------------------------------


def _figure(size: tuple[float, float], **margins: float) -> "Figure":
    # without pyplot, which keeps global state and picks a backend; margins by hand, for a layout engine draws everything twice
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    figure.subplots_adjust(**margins)
    return figure


def _swarm(x: np.ndarray) -> np.ndarray:
    """Heights in (-0.4, 0.4) that set apart the points that lie close together: the more of them, the wider."""
    edges = np.linspace(x.min(), x.max() + 1e-12, 60)
    bins = np.searchsorted(edges, x, "right")
    order = np.argsort(bins, kind="stable")
    sizes = np.bincount(bins)
    rank = np.empty(len(x))
    rank[order] = np.arange(len(x)) - (np.cumsum(sizes) - sizes)[bins[order]]
    side = np.where(rank % 2 == 0, 1.0, -1.0)
    return np.asarray(side * np.ceil(rank / 2) / max(float(sizes.max()), 8.0) * 0.8)


def _chance(logit: float) -> str:
    return f"{1 / (1 + np.exp(-logit)):.1%}"
