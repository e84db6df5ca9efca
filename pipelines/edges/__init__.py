"""Brokers that events may come from: each is a port of its own, and a pump moves what it holds into the log. Re-exports; does nothing."""

from pipelines.edges.forwarding import Edge, Forwarded, forward, open_edges

__all__ = ["Edge", "Forwarded", "forward", "open_edges"]
