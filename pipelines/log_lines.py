"""What our programs say: one line for each record of `logging`, JSON or text, on stderr. In: records. Out: lines.

No line holds what a request, an event or a file held. Our own loggers (`rapport.*`) say names and counts. A library may say anything, so of
its records only such text is kept as stands in its source, values left out; of an exception, whoever reports it, its type and where it came
from, never its message, which may repeat its input.
"""

import json
import linecache
import logging
import sys
import threading
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, Protocol

from pipelines.errors import PipelineError

Format = Literal["json", "text"]

OURS = "rapport"
FIELDS = ("endpoint", "rung", "cause", "status", "duration_ms", "suppressed")  # that a record may carry as `extra`
WITHHELD = "said something that may hold values"
_STATEMENT = 8  # lines of a library's source in which the text of a record is looked for


class Context(Protocol):
    """What is being worked on while a record is made."""

    def log_fields(self) -> Mapping[str, object]:
        """What every record about it carries."""


CONTEXT: ContextVar[Context | None] = ContextVar("rapport_log_context", default=None)


class Lines(logging.Formatter):
    """One line a record. Text has the same as JSON, with the trace below it."""

    def __init__(self, shape: Format) -> None:
        super().__init__()
        self._shape = shape

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        found = fields(record)
        if self._shape == "json":
            return json.dumps(found, default=str)
        head = " ".join(str(found.pop(name)) for name in ("time", "level", "logger", "message"))
        trace = found.pop("trace", None)
        told = "".join(f" {name}={value}" for name, value in found.items() if name != "pid")
        return f"{head}{told}\n{trace}" if trace else head + told


def fields(record: logging.LogRecord) -> dict[str, object]:
    """What is told of a record: time (UTC), level, logger, pid, message; where there are any, a trace and some of FIELDS."""
    message, _, trace = (_own(record) if _is_ours(record) else _constant(record)).partition("\n")
    found: dict[str, object] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname,
        "logger": record.name,
        "pid": record.process,
        "message": message,
    }
    context = CONTEXT.get()
    if context is not None:
        found |= context.log_fields()
    found |= {name: value for name in FIELDS if (value := record.__dict__.get(name)) is not None}
    if record.exc_info and record.exc_info[1] is not None:
        trace = "\n".join(filter(None, [trace, where_from(record.exc_info[1])]))
    return found | {"trace": trace} if trace else found


def where_from(error: BaseException) -> str:
    """The error's type and the lines of code it came through, causes first; without messages: they may hold a value from a profile."""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    own = type(error).__name__ + "\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip()
    return f"{where_from(before)}\n{own}" if before is not None else own


def write_lines(shape: Format) -> None:
    """Let this process write its records so, and what nobody caught; for entry points. Whatever was set up before goes."""
    logging.raiseExceptions = False  # a record that cannot be written is printed whole, with its values
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(shape))
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    for logger in known:  # what a library gave itself would write another format, everything twice, or what nobody can act on
        logger.handlers.clear()
        logger.propagate, logger.disabled = True, False
        logger.setLevel(logging.NOTSET)
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger(OURS).setLevel(logging.INFO)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    sys.unraisablehook = lambda one: _tell("an exception could not be raised", one.exc_value)
    threading.excepthook = lambda one: _tell("a thread ended with an exception", one.exc_value)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    if isinstance(error, PipelineError):  # written for whoever reads it, without identifiers
        logging.getLogger(OURS).critical("%s", error)
        return
    _tell("ended by an exception", error)


def _tell(what: str, error: BaseException | None) -> None:
    logging.getLogger(OURS).critical("%s\n%s", what, where_from(error) if error is not None else "")


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name == OURS or record.name.startswith(OURS + ".")


def _own(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):  # values that do not fit the text
        return str(record.msg)


def _constant(record: logging.LogRecord) -> str:
    """The text of a library's record without values: as its source has it, else where it was said."""
    text = record.msg if isinstance(record.msg, str) else ""
    if text and _is_written(text, record):
        return text
    return f"{WITHHELD}, at {'/'.join(record.pathname.split('/')[-2:])}:{record.lineno}"


def _is_written(text: str, record: logging.LogRecord) -> bool:
    """Whether the statement that made the record has this very text in it: what was put together has not."""
    source = "".join(linecache.getline(record.pathname, record.lineno + i) for i in range(_STATEMENT))
    return any(quote + text + quote in source for quote in "\"'")
