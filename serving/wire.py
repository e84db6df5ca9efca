"""What goes over the wire: the requests, checked, and the answers. The one contract behind both paths into the service.

Requests are strict: an unknown field, a wrong type or a number out of bounds is an error that names the field and never
repeats the value. Answers are plain dataclasses, encoded by msgspec. Never decides anything.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, TypeVar

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from feature_repo.aggregates import REQUEST

MAX_K = 200
MAX_CUSTOMERS = 1_000
MAX_LIST = 1_000
MAX_REASONS = 20


class BadRequest(Exception):
    """The body is not a valid request: what was expected, and the field, where it is one field's fault."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.field = code, message, field


def _finite(context: dict[str, Any]) -> dict[str, Any]:
    """NaN and Infinity are not JSON, though many writers emit them."""
    try:
        json.dumps(context, allow_nan=False)
    except ValueError:
        raise PydanticCustomError("finite_number", "Input should hold finite numbers only") from None
    return context


def _declared(context: dict[str, float]) -> dict[str, float]:
    if not set(context) <= set(REQUEST):
        raise PydanticCustomError("unknown_context", "Input should hold names among {names} only", {"names": ", ".join(REQUEST)})
    return context


Name = Annotated[str, Field(min_length=1, max_length=256)]
Money = Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)]
Told = Annotated[float, Field(allow_inf_nan=False)]


class _Request(BaseModel):
    # hide_input: a validation error must not carry a payload into a log
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


class Price(_Request):
    """A band of prices, both ends included, in the money of the shop. An item whose price nobody told lies in none."""

    min: Money | None = Field(None, description="at least")
    max: Money | None = Field(None, description="at most")

    @model_validator(mode="after")
    def _band(self) -> "Price":
        if self.min is None and self.max is None:
            raise PydanticCustomError("missing", "min or max is expected", {"field": "min"})
        if self.min is not None and self.max is not None and self.min > self.max:
            raise PydanticCustomError("empty_band", "min is expected to be at most max", {"field": "min"})
        return self


class Filters(_Request):
    """What the recommended items must satisfy."""

    category: list[Name] | None = Field(None, min_length=1, max_length=MAX_LIST, description="only items of these categories")
    in_stock: bool = Field(False, description="no item of which the catalogue says that it is sold out")
    price: Price | None = Field(None, description="only items of which the catalogue names a price within this band")


class RecommendRequest(_Request):
    """Who the items are for. With `item_id`: items similar to that one or bought together with it, the same for everybody."""

    customer_id: Name | None = Field(None, description="the resolved customer, or the shop's own user id; wins over anonymous_id")
    anonymous_id: Name | None = Field(None, description="the device's identifier, as events carry it")
    k: int = Field(10, ge=1, le=MAX_K, description="items wanted")
    item_id: Name | None = Field(None, description="ask for items like this one, and what goes with it")
    exclude: list[Name] = Field(
        default_factory=list, json_schema_extra={"default": []}, max_length=MAX_LIST, description="items that must not come back"
    )
    filters: Filters = Field(Filters(category=None), description="what the items must satisfy")
    new_only: bool = Field(False, description="nothing that the customer bought before, where they let that be known")
    max_per_category: int | None = Field(None, ge=1, le=MAX_K, description="at most so many items of one category")
    context: Annotated[dict[str, Any], AfterValidator(_finite)] = Field(
        default_factory=dict, json_schema_extra={"default": {}}, description="free form; not used yet"
    )

    @model_validator(mode="after")
    def _someone(self) -> "RecommendRequest":
        if self.customer_id is None and self.anonymous_id is None:
            raise PydanticCustomError("missing", "customer_id or anonymous_id is expected", {"field": "customer_id"})
        return self


class ScoreRequest(_Request):
    """Whose probabilities are wanted; the answer keeps the order."""

    customer_ids: list[Name] = Field(min_length=1, max_length=MAX_CUSTOMERS, description="resolved customers, or the shop's own user ids")
    reasons: int = Field(3, ge=0, le=MAX_REASONS, description="features to name for each customer; 0 makes an answer much cheaper")
    context: Annotated[dict[str, Told], AfterValidator(_declared)] = Field(
        default_factory=dict,
        json_schema_extra={"default": {}},
        description=f"what only the request tells, the same for all of them: any of {', '.join(REQUEST)}",
    )


@dataclass(frozen=True, slots=True)
class Item:
    """One recommended item; `rank` starts at 1."""

    item_id: str
    score: float
    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer of /recommend. `source`: which rung of the ladder gave it; `causes`: why no better one did."""

    decision_id: str
    customer_id: str | None
    items: list[Item]
    model_version: str | None
    source: str
    degraded: bool
    causes: list[str]
    as_of: datetime


@dataclass(frozen=True, slots=True)
class Reason:
    """What one feature added to the customer's log-odds. `value` is null where the feature is missing."""

    feature: str
    value: float | str | None
    contribution: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """One customer's probability, its band (low, medium, high), the strongest reasons first, and who gave it."""

    customer_id: str
    probability: float
    band: str
    source: str
    reasons: list[Reason] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scores:
    """The answer about the customers of one task. `source` is the weakest of its predictions' sources."""

    predictions: list[Prediction]
    model_version: str | None
    source: str
    degraded: bool
    causes: list[str]
    as_of: datetime
    feature_age_s: float | None  # since the newest change of the live features; of the customer for whom it is longest


R = TypeVar("R", bound=_Request)
_encoder = msgspec.json.Encoder()


def ranked(names: Sequence[str], scores: Sequence[float], reasons: Sequence[str]) -> list[Item]:
    """The items in this order, numbered from 1."""
    return [Item(name, score, rank, reason) for rank, (name, score, reason) in enumerate(zip(names, scores, reasons, strict=True), start=1)]


def decode(kind: type[R], body: bytes) -> R:
    """The request in the body. Raises BadRequest, naming the first field at fault or where it is no JSON, never a value."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _bad(error, kind) from None


def encode(answer: Recommendation | Scores) -> bytes:
    """The answer as JSON."""
    return _encoder.encode(answer)


def encode_problem(code: str, message: str, field: str | None = None) -> bytes:
    """The body of every refusal: {"error": {"code", "message", "field"?}}."""
    problem = {"code": code, "message": message}
    return _encoder.encode({"error": problem | ({"field": field} if field else {})})


def _bad(error: ValidationError, kind: type[_Request]) -> BadRequest:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return BadRequest("invalid_json", f"the body is expected to be one JSON object, UTF-8: {first['ctx']['error']}")
    path = [str(part) for part in first["loc"]] or [first.get("ctx", {}).get("field", "")]
    name = ".".join(path)[:64] or None
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        there_are = f"; there are: {', '.join(kind.model_fields)}" if len(path) == 1 else ""
        message = f"no field of this name is expected{there_are}"
    return BadRequest("invalid_request", f"{name or 'body'}: {message}", name)
