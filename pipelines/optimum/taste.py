"""Views -> what each customer will view next: the mode of the posterior of taste and price sensitivity, with known items.

A view is a softmax choice among the items on offer at that instant; the log posterior is concave, and a few Newton steps
find its mode for all customers at once.
"""

from datetime import datetime

import numpy as np
import pandas as pd

from pipelines.optimum.histories import microseconds
from pipelines.simulate.catalogue import attributes
from pipelines.simulate.knobs import GROUPS
from pipelines.simulate.people import group_means
from pipelines.simulate.truth import Truth

_NEWTON_STEPS = 8
_LONGEST_STEP = 0.8  # far from the mode the curvature is too small and a whole step leaves the valley
_CUSTOMERS_AT_A_TIME = 128


def shares(truth: Truth, events: pd.DataFrame, customers: np.ndarray, items: np.ndarray, *, at: datetime) -> np.ndarray:
    """(n_customers, n_items): share of each item among the views at `at`, by the mode; 0 for what is not on offer.

    Averaging over the whole posterior ranks no better, measured, and costs its draws.
    """
    at_ms = round(at.timestamp() * 1000)
    offered = int((_available_ms(truth) <= at_ms).sum())
    table = _attributes(truth, is_late=at_ms >= truth.shop.onset_ms)[:offered]
    scores = np.zeros((len(customers), len(truth.items)))
    scores[:, :offered] = _softmax(modes(truth, events, customers, at=at) @ table.T + truth.items["quality"].to_numpy()[:offered])
    position = truth.items.index.get_indexer(pd.Index(items))
    return np.where(position >= 0, scores[:, position], 0.0)


def modes(truth: Truth, events: pd.DataFrame, customers: np.ndarray, *, at: datetime) -> np.ndarray:
    """(n_customers, dimensions + 1): the most probable (taste, price sensitivity), given the views known before `at`."""
    mean, precision = _prior(truth)
    found = np.tile(mean, (len(customers), 1))
    views = _views(truth, events, customers, at)
    for _, part in views.groupby(views["customer"] // _CUSTOMERS_AT_A_TIME):
        rows, local = np.unique(part["customer"].to_numpy(), return_inverse=True)
        found[rows] = _fit(truth, part.assign(customer=local), len(rows), mean=mean, precision=precision)
    return found


def _prior(truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """(mean (d,), precision (d, d)) over all people: age band and gender, which shift tastes, are not to be used."""
    shop = truth.shop
    mean, covariance = np.zeros(shop.dimensions), shop.taste_spread**2 * np.eye(shop.dimensions)
    for column in ("age_band", "gender"):
        weights, means = np.array(list(GROUPS[column].values())), group_means(shop, column)
        mean += weights @ means
        covariance += (weights[:, None] * (means - weights @ means)).T @ (means - weights @ means)
    whole = np.zeros((shop.dimensions + 1, shop.dimensions + 1))
    whole[:-1, :-1], whole[-1, -1] = np.linalg.inv(covariance), shop.price_spread**-2
    return np.append(mean, shop.price_mean), whole


def _views(truth: Truth, events: pd.DataFrame, customers: np.ndarray, at: datetime) -> pd.DataFrame:
    """Views known before `at`: position of customer and item, how many items were on offer, and whether after a drift."""
    views = events[(events["type"] == "view") & (events["event_timestamp"] < at) & (events["created_timestamp"] < at)]
    time_ms = microseconds(views["event_timestamp"]) // 1_000
    frame = pd.DataFrame(
        {
            "customer": pd.Index(customers).get_indexer(pd.Index(views["customer_id"])),
            "item": truth.items.index.get_indexer(pd.Index(views["item_id"])),
            "offered": np.searchsorted(_available_ms(truth), time_ms, side="right"),
            "is_late": time_ms >= truth.shop.onset_ms,
        }
    )
    return frame[(frame["customer"] >= 0) & (frame["item"] >= 0) & (frame["item"] < frame["offered"])]


def _fit(truth: Truth, views: pd.DataFrame, n: int, *, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    tables = [_attributes(truth, is_late=late) for late in (False, True)]
    seen = np.zeros((n, len(mean)))
    np.add.at(seen, views["customer"].to_numpy(), np.stack(tables)[views["is_late"].to_numpy(dtype=np.int64), views["item"].to_numpy()])
    groups = views.groupby(["customer", "offered", "is_late"]).size().reset_index(name="n")
    mode = np.tile(mean, (n, 1))
    for _ in range(_NEWTON_STEPS):
        gradient, curvature = seen - (mode - mean) @ precision, np.tile(precision, (n, 1, 1))
        for late, part in groups.groupby("is_late"):
            who, expected, spread = _moments(truth, tables[int(bool(late))], mode, part)
            np.subtract.at(gradient, who, expected)
            np.add.at(curvature, who, spread)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        mode = mode + step / np.maximum(1.0, np.linalg.norm(step, axis=1, keepdims=True) / _LONGEST_STEP)
    return mode


def _moments(truth: Truth, table: np.ndarray, mode: np.ndarray, groups: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(customer, n x mean, n x covariance) of the attributes of a view, for each customer and catalogue on offer."""
    who, n, offered = (groups[column].to_numpy() for column in ("customer", "n", "offered"))
    utility = mode[who] @ table.T + truth.items["quality"].to_numpy()
    chance = _softmax(np.where(np.arange(len(table)) < offered[:, None], utility, -np.inf))
    mean, d = chance @ table, table.shape[1]
    upper = np.triu_indices(d)
    square = np.empty((len(groups), d, d))
    square[:, upper[0], upper[1]] = square[:, upper[1], upper[0]] = chance @ (table[:, upper[0]] * table[:, upper[1]])
    return who, n[:, None] * mean, n[:, None, None] * (square - mean[:, :, None] * mean[:, None, :])


def _attributes(truth: Truth, *, is_late: bool) -> np.ndarray:
    return attributes(truth.shop, np.stack(truth.items["embedding"].to_list()), truth.items["relative_price"].to_numpy(), is_late=is_late)


def _available_ms(truth: Truth) -> np.ndarray:
    return microseconds(truth.items["available_from"].reset_index(drop=True)) // 1_000


def _softmax(utility: np.ndarray) -> np.ndarray:
    weight = np.exp(utility - utility.max(axis=1, keepdims=True))
    return np.asarray(weight / weight.sum(axis=1, keepdims=True))
