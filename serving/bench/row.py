"""One figure of the bench, as `rapport bench` tells it."""

from typing import Any

Row = dict[str, Any]


def row(name: str, value: float, unit: str, rival: str | None = None, rival_value: float | None = None) -> Row:
    """A figure, with its rival's where there is one. `ratio`: value / rival_value; the unit says which way is better."""
    ratio = None if not rival_value else round(value / rival_value, 4)
    told = None if rival_value is None else round(rival_value, 3)
    return {"name": name, "value": round(value, 3), "unit": unit, "rival": rival, "rival_value": told, "ratio": ratio}
