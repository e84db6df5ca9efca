"""The durable log of events: what a log is, the SQLite log, and its group-committing writer. Re-exports; does nothing."""

from pipelines.log.connection import LogFull
from pipelines.log.port import Aside, Incoming, Logged, Outcome, Port, Position
from pipelines.log.store import GroupCounts, Log, LogCounts, Parked, open_log
from pipelines.log.writer import QueueFull, Writer

__all__ = [
    "Aside", "GroupCounts", "Incoming", "Log", "LogCounts", "LogFull", "Logged", "Outcome", "Parked", "Port", "Position", "QueueFull",
    "Writer", "open_log",
]  # fmt: skip
