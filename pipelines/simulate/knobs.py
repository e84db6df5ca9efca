"""What may be wrong with the simulated shop, or tried in it; and the groups of people it has. Draws nothing."""

from dataclasses import dataclass
from typing import Literal, get_args

from pipelines.errors import InputError

Drift = Literal["none", "covariate", "concept", "prior", "outage"]

GROUPS: dict[str, dict[str, float]] = {
    "region": {"north": 0.35, "south": 0.30, "east": 0.20, "west": 0.15},
    "age_band": {"18-29": 0.28, "30-44": 0.34, "45-59": 0.23, "60+": 0.15},
    "gender": {"female": 0.49, "male": 0.48, "other": 0.03},
}
VISIT_FACTOR = {"north": 1.0, "south": 0.75, "east": 1.35, "west": 0.55}  # region -> visits
DROPOUT_FACTOR = {"north": 1.0, "south": 1.3, "east": 0.7, "west": 1.8}  # region -> hazard of leaving for good
EFFECT_FACTOR = {"north": 1.0, "south": 0.5, "east": 1.75, "west": 0.25}  # region -> strength of the treatment

OUTAGE_DAYS = 7


@dataclass(frozen=True)
class Knobs:
    """What is wrong with the shop, or tried in it. The default is nothing at all. Raises InputError.

    drift      from `onset_day` on, with `strength` in 0..1:
               covariate  prices rise by that share and newcomers come from the west: who buys does not change
               concept    carts are left where they used to be bought, and tastes turn away: the same behaviour means less
               prior      missions become rarer by that share: fewer purchases
               outage     that share of the behaviour events is lost, for `OUTAGE_DAYS`
    bias       share of the browser events of `bias_group` ("column:value") that go unrecorded; orders, which the server
               records, stay. People's behaviour does not depend on it.
    experiment_day    from this day on customers are assigned at random, half and half, and every visit sends an exposure
    treatment_effect  share of browsing visits of a treated customer that turn into missions, times EFFECT_FACTOR of
                      the region; starts halfway if no `experiment_day` is given. Zero with a day: an A/A test.
    """

    drift: Drift = "none"
    strength: float = 0.0
    onset_day: int | None = None
    bias: float = 0.0
    bias_group: str = "gender:female"
    treatment_effect: float = 0.0
    experiment_day: int | None = None

    def __post_init__(self) -> None:
        if self.drift not in get_args(Drift):
            raise InputError(f"simulate: drift is one of {', '.join(get_args(Drift))}; found {self.drift!r}")
        for name in ("strength", "bias", "treatment_effect"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"simulate: {name} lies between 0 and 1; found {getattr(self, name)}")
        for name in ("onset_day", "experiment_day"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise InputError(f"simulate: {name} counts days from the start of the log, 0 or more; found {getattr(self, name)}")
        if (self.drift != "none") != (self.onset_day is not None):
            raise InputError(f"simulate: a drift and its onset_day come together; found drift={self.drift!r}, onset_day={self.onset_day}")
        if self.drift == "none" and self.strength:
            raise InputError(f"simulate: strength {self.strength} needs a drift ({', '.join(get_args(Drift)[1:])}), found none")
        column, _, value = self.bias_group.partition(":")
        if value not in GROUPS.get(column, {}):
            known = ", ".join(f"{name}:{group}" for name, groups in GROUPS.items() for group in groups)
            raise InputError(f"simulate: bias_group is one of {known}; found {self.bias_group!r}")
