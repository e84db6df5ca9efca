"""Identifiers as received -> people: `deterministic` exact links, `linkage` probable ones, `online` as they arrive, `graph` why."""

from pipelines.identity.deterministic import LINK_COLUMNS, MAX_USERS, assigned_sql, link_id, renamed_sql, resolve, surrogate

__all__ = ["LINK_COLUMNS", "MAX_USERS", "assigned_sql", "link_id", "renamed_sql", "resolve", "surrogate"]
