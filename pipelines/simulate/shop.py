"""The laws of the simulated shop: its numbers, its clock, and what its knobs change. Draws nothing.

Time runs in *shop days*: the integral of a weekly profile of mean 1. Visits and drop-out are both constant-rate in shop
days, so Pareto/NBD holds exactly although the evenings are busy; any whole number of weeks is as long in both clocks.
"""

from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np

from pipelines.errors import InputError
from pipelines.simulate import walk
from pipelines.simulate.knobs import Drift, Knobs

END = datetime(2026, 6, 28, 23, 59, tzinfo=UTC)  # fixed, so that the same seed gives the same bytes on any day

DAY_MS = 86_400_000
WEEK_MS = 7 * DAY_MS
_MONDAY_MS = 4 * DAY_MS  # 1970-01-05
_BY_DAY = (0.92, 0.90, 0.95, 0.98, 1.05, 1.12, 1.08)
_BY_HOUR = (3, 2, 1, 1, 1, 2, 4, 6, 8, 9, 10, 11, 12, 11, 10, 10, 11, 12, 14, 17, 19, 18, 13, 7)


@dataclass(frozen=True)
class Shop:
    """One shop: its size, its knobs and its laws. All numbers are kept in the truth."""

    customers: int
    days: int
    seed: int
    items: int = 400
    knobs: Knobs = field(default_factory=Knobs)
    end_ms: int = round(END.timestamp() * 1000)
    # visits and drop-out, in shop days; see Schmittlein, Morrison and Colombo 1987 (Pareto/NBD)
    share_old: float = 0.5  # customers before the log starts; the clock of their visits and lifetime starts with the log
    visit_shape: float = 1.3
    visits_per_day: float = 0.19  # mean in the region "north"
    dropout_shape: float = 1.1
    dropouts_per_day: float = 0.005
    mission_alpha: float = 0.55  # P(mission) of a customer ~ Beta(alpha, beta)
    mission_beta: float = 1.45
    # taste
    dimensions: int = 8
    taste_spread: float = 0.55
    group_spread: float = 0.25  # of the mean tastes of age bands and genders
    category_spread: float = 1.0
    item_spread: float = 0.45
    quality_exponent: float = 0.75  # popularity of the j-th item falls about as j ** -exponent
    price_mean: float = 0.7  # price sensitivity ~ Normal(mean, spread), of log price around its category's mean
    price_spread: float = 0.5
    # pace inside a session
    pause_ms: int = 2_000  # shortest
    pause_mean_ms: int = 33_000  # of the exponential on top of it
    pause_cap_ms: int = 600_000  # of the exponential; far below the silence that ends a session
    silence_ms: int = 31 * 60_000  # shortest time between two sessions of a customer

    @cached_property
    def start_ms(self) -> int:
        """Start of the log, milliseconds since 1970."""
        return self.end_ms - self.days * DAY_MS

    @cached_property
    def length(self) -> float:
        """Length of the log in shop days."""
        return float(self.shop_days(np.array([self.end_ms]))[0])

    @cached_property
    def onset_ms(self) -> int:
        """When the drift sets in; the far future if none does."""
        return self._day_ms(self.knobs.onset_day)

    @cached_property
    def experiment_ms(self) -> int:
        """When the experiment starts; the far future if there is none."""
        day = self.knobs.experiment_day
        if day is None and self.knobs.treatment_effect:
            day = self.days // 2
        return self._day_ms(day)

    def strength(self, drift: Drift) -> float:
        """Strength of this kind of drift after its onset; 0 if the knob is set to another."""
        return self.knobs.strength if self.knobs.drift == drift else 0.0

    def shop_days(self, instant_ms: np.ndarray) -> np.ndarray:
        """Shop days from the start of the log until the instants, milliseconds since 1970. Piecewise linear, exact."""
        return np.asarray(_clock(instant_ms) - _clock(np.array([self.start_ms]))[0])

    def instant_ms(self, shop_days: np.ndarray) -> np.ndarray:
        """The inverse of `shop_days`, rounded to milliseconds."""
        total = shop_days + _clock(np.array([self.start_ms]))[0]
        week = np.floor(total / 7)
        within = np.interp(total - 7 * week, _week_edges(), np.arange(169) / 24) * DAY_MS
        return np.asarray(np.rint(week * WEEK_MS + within + _MONDAY_MS).astype(np.int64))

    @cached_property
    def walks(self) -> np.ndarray:
        """(2 regimes, 2 kinds, states, 6): probability of the next event. Regime 1 holds after the onset of a concept drift."""
        return np.stack([walk.probabilities(), walk.probabilities(swap=self.strength("concept"))])

    @cached_property
    def hits(self) -> np.ndarray:
        """(2 regimes, 2 kinds, states): probability that a purchase still comes in the session."""
        return walk.purchase_ahead(self.walks)

    def constants(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_constants(cls, constants: dict[str, Any]) -> "Shop":
        """The inverse of `constants`. Raises InputError if they are those of another version."""
        names = {one.name for one in fields(cls)}
        if set(constants) != names:
            raise InputError(f"truth: expected the shop's constants {sorted(names)}, found {sorted(constants)}; simulate again")
        return cls(**{**constants, "knobs": Knobs(**constants["knobs"])})

    def _day_ms(self, day: int | None) -> int:
        return np.iinfo(np.int64).max if day is None else self.start_ms + day * DAY_MS


def _week_edges() -> np.ndarray:
    """(169,) shop days from Monday 0:00 UTC to each hour of the week."""
    profile = np.outer(_BY_DAY, _BY_HOUR).ravel()
    return np.concatenate([[0.0], np.cumsum(profile) / profile.sum() * 7])


def _clock(instant_ms: np.ndarray) -> np.ndarray:
    since = np.asarray(instant_ms).astype(np.float64) - _MONDAY_MS
    week = np.floor(since / WEEK_MS)
    return np.asarray(7 * week + np.interp((since - week * WEEK_MS) / DAY_MS, np.arange(169) / 24, _week_edges()))
