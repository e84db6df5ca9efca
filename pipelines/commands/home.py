"""The home that a verb works on: its settings, its vault, and who is at the terminal."""

from contextlib import closing
from typing import TYPE_CHECKING, Any

from pipelines.errors import InputError

if TYPE_CHECKING:
    from pipelines.settings import Settings
    from pipelines.vault import Vault


def settings(**groups: dict[str, Any]) -> "Settings":
    """The settings of the environment, with what was given on the command line over them. Telemetry is off from here on."""
    from pydantic import ValidationError

    from pipelines.settings import Settings, silence_telemetry

    silence_telemetry()
    try:
        found = Settings()
        given = {name: {key: value for key, value in group.items() if value is not None} for name, group in groups.items()}
        merged = {name: getattr(found, name).model_dump() | group for name, group in given.items() if group}
        built = Settings(**(found.model_dump() | merged)) if merged else found
    except ValidationError as error:
        first = error.errors()[0]
        place = "__".join(str(part) for part in first["loc"]).upper()
        raise InputError(f"settings: RAPPORT_{place} is not usable: {first['msg']}; found {first['input']!r}; mend or unset it") from None
    if built.home.exists() and not built.home.is_dir():
        raise InputError(
            f"home: expected a folder, found something else at {built.home.absolute()}; set RAPPORT_HOME to the one that is meant"
        )
    return built


def of_people() -> "Settings":
    """The settings of a home that events were taken into. Of any other "nothing is held" would be a false answer. Raises InputError."""
    found = settings()
    if not (found.home / "vault").is_dir():
        where = found.home.absolute()
        raise InputError(
            f"home: expected one that events were taken into, found none at {where}; set RAPPORT_HOME to the one that is meant"
        )
    return found


def vault(settings: "Settings") -> "closing[Vault]":
    """The home's vault, closed at the end of the block."""
    from pipelines.vault import open_vault

    return closing(open_vault(settings.home, master=settings.master_key))


def who() -> str:
    """Who sits at this terminal, for the audit trail."""
    import getpass

    return f"{getpass.getuser()} at the command line"


def record(settings: "Settings", action: str, **details: Any) -> None:
    """Add a line to the audit trail: who is at this terminal did this."""
    from pipelines import audit

    audit.record(settings.home, action, by=who(), details=details)


def drain(settings: "Settings") -> None:
    """Put what the log still holds into the tables: somebody may be known from there alone."""
    from pipelines import ingest as arrow

    if (settings.home / "log").is_dir():
        arrow.drain(settings.home, settings=settings)
