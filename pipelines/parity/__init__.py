"""Whether models see when serving what they were trained on: `check`, behind `rapport features parity`. Re-exports; does nothing."""

from pipelines.parity.checking import Report, check

__all__ = ["Report", "check"]
