"""Lines of the log: of one form whoever writes them, and without anything that a request or an event held."""

import contextvars
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from pipelines import log_lines
from pipelines.log_lines import CONTEXT, Lines

SECRET = "eve@example.com"


def record(logger, message, *args, error=None, path=__file__, line=1, **extra):
    info = (type(error), error, error.__traceback__) if error else None
    made = logging.LogRecord(logger, logging.ERROR, path, line, message, args, info)
    made.__dict__.update(extra)
    return made


def told(made):
    line = Lines("json").format(made)
    assert "\n" not in line
    return json.loads(line)


def raised(make):
    try:
        make()
    except Exception as error:
        return error


def test_line_tells_when_who_and_what():
    made = record(
        "rapport.serving", "%s version %s\n  a trace", "churn", 3, endpoint="/churn", status=500, rung="personal", cause="deadline"
    )
    made.created, made.process = 0.25, 7
    assert told(made) == {
        "time": "1970-01-01T00:00:00.250Z", "level": "ERROR", "logger": "rapport.serving", "pid": 7, "message": "churn version 3",
        "endpoint": "/churn", "rung": "personal", "cause": "deadline", "status": 500, "trace": "  a trace",
    }  # fmt: skip
    text = Lines("text").format(made)
    assert text.splitlines()[0].endswith("ERROR rapport.serving churn version 3 endpoint=/churn rung=personal cause=deadline status=500")
    assert text.splitlines()[1:] == ["  a trace"]


def test_line_carries_what_is_being_worked_on():
    def within():
        CONTEXT.set(SimpleNamespace(log_fields=lambda: {"request_id": "r1"}))
        return told(record("rapport", "x"))

    assert contextvars.copy_context().run(within)["request_id"] == "r1"
    assert "request_id" not in told(record("rapport", "x"))


@given(value=st.text(min_size=1))
def test_whatever_a_library_says_its_values_are_left_out(value):
    marked = f"<{SECRET}{value}>"
    for made in (record("uvicorn.error", marked), record("uvicorn.error", "%s", marked), record("root", marked + "%s", 1)):
        line = Lines("json").format(made) + Lines("text").format(made)
        assert SECRET not in line


def test_text_that_stands_in_the_source_is_kept_and_what_was_put_together_is_not(tmp_path):
    source = tmp_path / "library.py"
    source.write_text("import logging\nlogging.getLogger('lib').error(\n    'bad request of %s', who)\nlog.error(f'bad {who}')\n")
    assert told(record("lib", "bad request of %s", SECRET, path=str(source), line=2))["message"] == "bad request of %s"
    withheld = told(record("lib", f"bad {SECRET}", path=str(source), line=4))["message"]
    assert withheld.startswith(log_lines.WITHHELD)
    assert withheld.endswith("library.py:4")


def test_exception_is_told_by_type_and_place_and_not_by_its_message():
    class Body(BaseModel):
        k: int

    error = raised(lambda: Body(k=SECRET))
    assert SECRET in str(error)
    for logger in ("rapport.serving", "uvicorn.error"):
        trace = told(record(logger, "failed", error=error))["trace"]
        assert "ValidationError" in trace
        assert "test_log_lines.py" in trace
        assert SECRET not in trace


def test_causes_of_an_exception_are_told_before_it():
    def chained():
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(SECRET) from error

    trace = log_lines.where_from(raised(chained))
    assert trace.index("KeyError") < trace.index("ValueError")
    assert SECRET not in trace


PROGRAM = """
import asyncio, gc, logging, sys, threading, warnings
from pipelines import log_lines
from pipelines.errors import StoreError

logging.basicConfig(level=logging.INFO, format="before %(message)s")
library = logging.getLogger("library")
library.addHandler(logging.StreamHandler())
log_lines.write_lines("json")
mark = sys.argv[1]

class Falls:
    def __del__(self):
        raise KeyError(mark)

async def forgotten():
    async def fails():
        raise KeyError(mark)
    task = asyncio.ensure_future(fails())
    await asyncio.sleep(0)
    del task
    gc.collect()

def fails():
    raise KeyError(mark)

logging.getLogger("rapport.x").info("at work")
library.error("odd: %s", mark)
library.error(f"odd: {mark}")
library.error("odd: %d", mark)  # cannot be formatted
logging.getLogger("rapport.x").error("odd: %d", mark)  # nor this
try:
    fails()
except KeyError:
    library.exception("a failure")
warnings.warn(mark)
thread = threading.Thread(target=fails); thread.start(); thread.join()
Falls(); gc.collect()
asyncio.run(forgotten())
if sys.argv[2] == "leak":
    logging.getLogger("rapport.x").error("%s", mark)
if sys.argv[2] == "pipeline":
    raise StoreError("the disk is full; free space")
fails()
"""


@pytest.mark.parametrize("end", ["defect", "pipeline", "leak"])
def test_program_writes_lines_alone_whatever_happens_to_it(tmp_path, end):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    here = os.environ | {"PYTHONPATH": str(Path(log_lines.__file__).parents[1])}
    done = subprocess.run([sys.executable, str(program), SECRET, end], capture_output=True, text=True, check=False, env=here)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1
    assert done.stdout == ""
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert (SECRET in done.stderr) == (end == "leak")  # control: what is said on purpose is found
    messages = [line["message"] for line in lines]
    assert messages[0] == "at work"
    assert {"odd: %s", "odd: %d", "a failure", "a thread ended with an exception", "an exception could not be raised"} <= set(messages)
    assert any(line["logger"] == "asyncio" and "KeyError" in line["trace"] for line in lines)
    assert messages[-1] == ("the disk is full; free space" if end == "pipeline" else "ended by an exception")
