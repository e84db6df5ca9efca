"""The online worker: `Stream` applies the log to the online store; `python -m pipelines.stream` runs it. Re-exports; does nothing."""

from pipelines.stream.worker import GROUP, Stepped, Stream

__all__ = ["GROUP", "Stepped", "Stream"]
