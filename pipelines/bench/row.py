"""One figure of a bench. In: what was measured of us and of the rival. Out: a row for `rapport bench`. Measures nothing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchRow:
    """One figure. `ratio`: value / rival_value; the unit says which way is better."""

    name: str
    value: float
    unit: str
    rival: str
    rival_value: float
    ratio: float


def row(name: str, value: float, unit: str, rival: str, rival_value: float) -> BenchRow:
    """A figure beside its rival's."""
    return BenchRow(name, value, unit, rival, rival_value, value / rival_value)
