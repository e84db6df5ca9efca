"""A shop -> its people: who they are, how often they come, when they leave for good, what they like. All of it hidden truth."""

from dataclasses import dataclass

import numpy as np

from pipelines.simulate import draws
from pipelines.simulate.knobs import DROPOUT_FACTOR, EFFECT_FACTOR, GROUPS, VISIT_FACTOR
from pipelines.simulate.shop import Shop

NEVER = np.iinfo(np.int64).max

_DEVICE_SHARES = np.array([0.55, 0.33, 0.12])  # one, two or three
_NEVER_GRANTS = 0.04
_WITHDRAWS = 0.02
_MARKETING = 0.6
_SAYS_SO = 0.2  # share of people who send their choice as an event of its own
_NEWCOMERS = "west"  # where people come from after a covariate drift


@dataclass(frozen=True)
class People:
    """Arrays of (n_customers,), in order of the customer's number; times in shop days unless they end in `_ms`."""

    number: np.ndarray
    region: np.ndarray  # index into the names of GROUPS["region"], and likewise for the next two
    age_band: np.ndarray
    gender: np.ndarray
    is_old: np.ndarray
    arrival: np.ndarray
    departure: np.ndarray
    visit_rate: np.ndarray  # per shop day
    dropout_rate: np.ndarray
    mission_probability: np.ndarray  # without treatment or drift
    treatment_effect: np.ndarray  # share of browsing visits that treatment turns into missions
    is_treated: np.ndarray  # False throughout where there is no experiment
    taste: np.ndarray  # (n, dimensions)
    price_sensitivity: np.ndarray
    devices: np.ndarray  # 1 to 3
    grants: np.ndarray  # personalisation, when first asked
    grants_marketing: np.ndarray
    says_so: np.ndarray
    withdrawal: np.ndarray  # shop days; infinite for nearly all


def group_means(shop: Shop, column: str) -> np.ndarray:
    """(groups, dimensions): mean taste of each age band or gender; the mean taste of a person is the sum over both."""
    groups = len(GROUPS[column])
    key = draws.keys(shop.seed, f"taste of {column}", np.arange(groups))
    return shop.group_spread * draws.normal(key[:, None], np.arange(shop.dimensions))


def draw(shop: Shop) -> People:
    """Everybody. A larger shop begins with the same people."""
    number = np.arange(shop.customers)
    is_old = _uniform(shop, "is old", number) < shop.share_old
    arrival = np.where(is_old, 0.0, _uniform(shop, "arrival", number) * shop.length)
    region = _regions(shop, number, arrival)
    groups = {name: _draw_groups(shop, name, number) for name in ("age_band", "gender")}
    dropout = draws.gamma(_keys(shop, "dropout", number), shop.dropout_shape) / shop.dropout_shape * shop.dropouts_per_day
    dropout *= _factor(DROPOUT_FACTOR, region)
    visits = draws.gamma(_keys(shop, "visits", number), shop.visit_shape) / shop.visit_shape * shop.visits_per_day
    consenting = _uniform(shop, "grants", number) >= _NEVER_GRANTS
    withdraws = consenting & (_uniform(shop, "withdraws", number) < _WITHDRAWS)
    spread = shop.taste_spread * draws.normal(_keys(shop, "taste", number)[:, None], np.arange(shop.dimensions))
    return People(
        number=number,
        region=region,
        **groups,
        is_old=is_old,
        arrival=arrival,
        departure=arrival + draws.exponential(_keys(shop, "lifetime", number)) / dropout,
        visit_rate=visits * _factor(VISIT_FACTOR, region),
        dropout_rate=dropout,
        mission_probability=_mission(shop, number),
        treatment_effect=np.minimum(1.0, shop.knobs.treatment_effect * _factor(EFFECT_FACTOR, region)),
        is_treated=(_uniform(shop, "variant", number) < 0.5) & (shop.experiment_ms < shop.end_ms),
        taste=spread + sum(group_means(shop, name)[index] for name, index in groups.items()),
        price_sensitivity=shop.price_mean + shop.price_spread * draws.normal(_keys(shop, "price sensitivity", number)),
        devices=1 + draws.choice(_keys(shop, "devices", number), _DEVICE_SHARES),
        grants=consenting,
        grants_marketing=_uniform(shop, "marketing", number) < _MARKETING,
        says_so=_uniform(shop, "says so", number) < _SAYS_SO,
        withdrawal=np.where(withdraws, arrival + _uniform(shop, "withdrawal", number) * (shop.length - arrival), np.inf),
    )


def mission_map(shop: Shop, is_treated: np.ndarray, effect: np.ndarray, start_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) with P(mission) = a + b * mission_probability for visits at `start_ms`: treatment, then a drift of the prior."""
    gain = np.where(is_treated & (start_ms >= shop.experiment_ms), effect, 0.0)
    keep = np.where(start_ms >= shop.onset_ms, 1.0 - shop.strength("prior"), 1.0)
    return keep * gain, keep * (1.0 - gain)


def _keys(shop: Shop, stream: str, number: np.ndarray) -> np.ndarray:
    return draws.keys(shop.seed, f"person: {stream}", number)


def _uniform(shop: Shop, stream: str, number: np.ndarray) -> np.ndarray:
    return draws.uniform(_keys(shop, stream, number))


def _draw_groups(shop: Shop, column: str, number: np.ndarray) -> np.ndarray:
    return draws.choice(_keys(shop, column, number), np.array(list(GROUPS[column].values())))


def _regions(shop: Shop, number: np.ndarray, arrival: np.ndarray) -> np.ndarray:
    region = _draw_groups(shop, "region", number)
    moved = _uniform(shop, "newcomer", number) < shop.strength("covariate")
    late = arrival >= shop.shop_days(np.array([min(shop.onset_ms, shop.end_ms)]))[0]
    return np.where(moved & late, list(GROUPS["region"]).index(_NEWCOMERS), region)


def _factor(factors: dict[str, float], region: np.ndarray) -> np.ndarray:
    return np.asarray(np.array([factors[name] for name in GROUPS["region"]])[region])


def _mission(shop: Shop, number: np.ndarray) -> np.ndarray:
    """Beta draws, as a ratio of two gammas."""
    yes = draws.gamma(_keys(shop, "mission", number), shop.mission_alpha)
    no = draws.gamma(_keys(shop, "no mission", number), shop.mission_beta)
    return np.asarray(yes / (yes + no))
