"""A mapping file (TOML) -> a frozen Mapping: which of a file's columns are our names, and on what legal basis it is used.

Reads the mapping, never the data. Which of the optional columns a file really has is decided file by file, in `resolve`.
"""

import tomllib
from collections.abc import Mapping as Dict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipelines.errors import InputError
from pipelines.events import TYPES

SHIPPED = Path(__file__).with_name("mappings")
TRAITS = ("age_band", "gender", "region")
DIRECT = ("first_name", "last_name", "name", "address", "street", "city", "postcode", "date_of_birth")  # traits that tell who it is
FIELDS = (
    "message_id", "type", "received_timestamp", "user_id", "anonymous_id", "email", "phone", "item_id", "order_id", "session_id",
    "decision_id", "quantity", "price", "category", "query", "consent", "policy_version",
)  # fmt: skip
_DIRECT = "direct."  # keeps the trait `name` apart from the event's

Column = str | tuple[str, ...]  # a name, or the spellings that it may have; a trailing "?": the file may lack it


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class Source(_Part):
    """Where rows come from and how the file is written."""

    name: str = Field(min_length=1, description="names the source in every table; event ids are unique within it")
    format: Literal["csv", "parquet", "json", "xml"] | None = Field(None, description="none: decided by the file's name")
    row: str | None = Field(None, description="the name of the XML element that is one row")
    columns: tuple[str, ...] | None = Field(None, description="the columns of a file that has no header")
    encoding: str = "utf-8"
    delimiter: str = Field(",", min_length=1, max_length=1)
    type: str | None = Field(None, description="the type of every row, where no column tells it")


class Time(_Part):
    """The column that says when it happened."""

    column: Column
    unit: Literal["unix", "iso"] = Field(description="unix: seconds, milliseconds or microseconds, decided by the magnitude")
    formats: tuple[str, ...] = Field((), description="strptime formats tried where a text is not ISO 8601; UTC")


class ReturnRule(_Part):
    """Rows whose `column` starts with `prefix` are returns; their quantity is given as a negative number."""

    column: str
    prefix: str = Field(min_length=1)


class Rules(_Part):
    """What else has to be known to read the rows."""

    returns: ReturnRule | None = None
    price_unit: Literal["major", "minor"] = Field("major", description="major: 2.55; minor: 255 for the same amount")
    whole_numbers: tuple[str, ...] = Field((), description="identifiers that some copies write as 17850.0")


class Basis(_Part):
    """The declared legal basis for using the file's people."""

    legal_basis: str = Field(min_length=1)
    purposes: tuple[str, ...] = Field(min_length=1)


class Mapping(_Part):
    """A whole mapping file. `columns`, `traits` and `direct`: our name -> the file's; `types`: the file's value -> our type."""

    source: Source
    time: Time
    columns: dict[str, Column]
    types: dict[str, str] = {}
    traits: dict[str, Column] = {}
    direct: dict[str, Column] = {}
    rules: Rules = Rules()
    consent: Basis | None = None

    @property
    def has_own_ids(self) -> bool:
        """Whether every file of it tells its rows' ids; else the id of a row is the hash of its content."""
        return not _is_optional(self.columns.get("message_id", "?"))

    @field_validator("columns")
    @classmethod
    def _columns_are_ours(cls, columns: dict[str, Column]) -> dict[str, Column]:
        return _known(columns, FIELDS)

    @field_validator("traits")
    @classmethod
    def _traits_are_ours(cls, traits: dict[str, Column]) -> dict[str, Column]:
        return _known(traits, TRAITS)

    @field_validator("direct")
    @classmethod
    def _direct_traits_are_ours(cls, direct: dict[str, Column]) -> dict[str, Column]:
        return _known(direct, DIRECT)

    @field_validator("types")
    @classmethod
    def _types_are_ours(cls, types: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(types.values()) - set(TYPES))
        if unknown:
            raise ValueError(f"expected one of {', '.join(TYPES)}; found {', '.join(unknown)}")
        return types

    @model_validator(mode="after")
    def _type_is_told(self) -> "Mapping":
        fixed = self.source.type
        if fixed is None and not ("type" in self.columns and self.types):
            raise ValueError("expected [columns] type with a [types] table, or a fixed [source] type; found neither")
        if self.source.format == "xml" and self.source.row is None:
            raise ValueError("expected [source] row to name the XML element that is one row; found nothing")
        if fixed is not None and fixed not in TYPES:
            raise ValueError(f"expected [source] type to be one of {', '.join(TYPES)}; found {fixed}")
        if not {"user_id", "anonymous_id", "email", "phone"} & set(self.columns):
            raise ValueError("expected [columns] user_id, anonymous_id, email or phone: whose events are these?; found none of them")
        return self


@dataclass(frozen=True)
class Resolved:
    """The columns that one file really has, by our name; `time` is the time column, `direct` those of direct traits."""

    time: str
    columns: Dict[str, str]
    direct: Dict[str, str]


def load_mapping(name_or_path: str | Path) -> Mapping:
    """The mapping of a TOML file, or of a shipped one by its bare name. Raises InputError naming the key that is wrong."""
    path = _find(name_or_path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"mapping: expected TOML in {path}, found something else ({error}); mend that line") from error
    except OSError as error:
        raise InputError(f"mapping: {path} could not be read ({error.strerror}); check the path and its rights") from error
    try:
        return Mapping.model_validate(content)
    except ValidationError as error:
        raise InputError(_sentence(path, error)) from error


def resolve(mapping: Mapping, found: list[str], *, file: str, is_open: bool = False) -> Resolved:
    """Which column is which in a file with the columns `found`. Raises InputError if one that is not optional is missing.

    is_open: rows further on may have columns that `found` lacks (JSON, XML), so that optional ones are looked for all the same.
    """
    direct = {f"{_DIRECT}{name}": column for name, column in mapping.direct.items()}
    wanted: dict[str, Column] = {"event_timestamp": mapping.time.column, **mapping.columns, **mapping.traits, **direct}
    chosen = {name: _choose(column, found) for name, column in wanted.items()}
    for name, column in wanted.items():
        if chosen[name] is None and not _is_optional(column):
            raise InputError(
                f"mapping: [{_section(mapping, name)}] {name.removeprefix(_DIRECT)} expects the column {_spelled(column)} in {file}, "
                f'which has {", ".join(found)}; correct the name, or end it with "?" if the file may lack it'
            )
        if chosen[name] is None and is_open:
            chosen[name] = _spellings(column)[0]
    present = {name: column for name, column in chosen.items() if column is not None}
    if "type" not in present and mapping.source.type is None:
        raise InputError(f"mapping: {file} has no type column; name it under [columns] type, or give a fixed [source] type")
    time = present.pop("event_timestamp", None)
    if time is None:
        raise InputError(f"mapping: [time] column is optional in this mapping, but {file} needs it; found {', '.join(found)}")
    columns = {name: column for name, column in present.items() if not name.startswith(_DIRECT)}
    return Resolved(time, columns, {name.removeprefix(_DIRECT): column for name, column in present.items() if name not in columns})


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = sorted(file.stem for file in SHIPPED.glob("*.toml"))
    if str(name_or_path) in shipped:
        return SHIPPED / f"{name_or_path}.toml"
    raise InputError(f"mapping: expected a TOML file or one of {', '.join(shipped)}; found neither at {path}; check the name or path")


def _sentence(path: Path, error: ValidationError) -> str:
    first = error.errors()[0]
    # A column may be one name or several: pydantic names the variant it tried last, a reader needs the key alone.
    *outer, key = [str(part) for part in first["loc"] if part != "str" and "tuple" not in str(part)] or ["file"]
    where = f"[{outer[0]}] {'.'.join([*outer[1:], key])}" if outer else key
    what = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = f"expected one of {', '.join(_siblings(outer))}; found the unknown key {key}"
    elif first["type"] == "missing":
        what = "expected a value; found nothing"
    elif first["type"] != "value_error":
        what = f"{what}; found {first['input']!r} ({type(first['input']).__name__})"
    return f"mapping: {path}: {where}: {what}; mend this key"


def _siblings(outer: list[str]) -> list[str]:
    """The keys that are known beside a wrong one."""
    part: Any = Mapping
    for name in outer:
        part = {"source": Source, "time": Time, "rules": Rules, "consent": Basis, "returns": ReturnRule}.get(name, part)
    return list(part.model_fields)


def _known(given: dict[str, Column], names: tuple[str, ...]) -> dict[str, Column]:
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"expected names among {', '.join(names)}; found {', '.join(unknown)}")
    return given


def _choose(column: Column, found: list[str]) -> str | None:
    return next((name for name in _spellings(column) if name in found), None)


def _spellings(column: Column) -> list[str]:
    return [name.removesuffix("?") for name in ((column,) if isinstance(column, str) else column)]


def _is_optional(column: Column) -> bool:
    return any(name.endswith("?") for name in ((column,) if isinstance(column, str) else column))


def _spelled(column: Column) -> str:
    return " or ".join(_spellings(column))


def _section(mapping: Mapping, name: str) -> str:
    if name.startswith(_DIRECT):
        return "direct"
    return "time" if name == "event_timestamp" else "traits" if name in mapping.traits else "columns"
