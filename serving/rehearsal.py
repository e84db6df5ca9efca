"""The process in which models are loaded before they are loaded here: damaged ones end the process that reads them.

In: names and folders of verified models. Out: what each predicted, as `serving.champions` tells it; the first that is missing ended the
process. One may be called in beforehand, so that it imports what it needs while its caller does the same; this module imports nothing.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 60.0
PROGRAM = "serving.champions"

_waiting: list["subprocess.Popen[bytes]"] = []


def call_in() -> None:
    """Start a process that waits for what it is to load; it ends with its caller, or when it is told that it is not needed."""
    _waiting.append(_started())


def dismiss() -> None:
    """Whoever was called in and not needed may go."""
    while _waiting:
        with _waiting.pop() as child:
            child.kill()  # it may still be importing


def hold(pending: Sequence[tuple[str, Path]]) -> dict[str, tuple[float, ...]]:
    """What the models predicted, up to the first that ended the process. Raises TimeoutExpired."""
    with _waiting.pop() if _waiting else _started() as child:
        try:
            said, _ = child.communicate("".join(f"{name}={folder}\n" for name, folder in pending).encode(), timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            raise
    lines = [json.loads(line) for line in said.splitlines() if line.startswith(b'{"name"')]
    return {line["name"]: tuple(line["golden"]) for line in lines}


def _started() -> "subprocess.Popen[bytes]":
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", PROGRAM],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
