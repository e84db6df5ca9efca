"""The current session of a customer as a step function: what it holds after each event, and nothing once it has fallen silent.

In: an Ibis table of clean events and the silence that ends a session. Out: unexecuted Ibis expressions. Runs nothing. This is the
definition: the batch build computes the same with `session_steps`, the stream with `visit`, and tests hold both against it.

Like every feature, a session at T is made of the events with enter < T, enter = max(event_timestamp, created_timestamp). The
current session is that of the newest of them; it ends when T is more than the gap after it.
"""

from typing import Any

import ibis
from ibis import Table

from feature_repo.aggregates import LARGEST, SESSION_COUNTS, SESSION_INSTANTS
from pipelines.changepoints import make_timestamptz, timed
from pipelines.visit import ASSIGNED

_KEY = "customer_id"
_SESSION = (_KEY, "session_id")


def identified(events: Table, *, gap_minutes: int) -> Table:
    """`events` of customers with a `session_id` on every row that came without one; ids that a source gave are kept.

    Ingest names such rows too, but in hindsight: an event that arrives late can join two of its sessions. Here they are told in
    the order in which events became known, so that none changes what was told before: a row starts a session when it lies more
    than the gap after all known before it. What arrives later than the gap belongs to a session long over and gets none.
    """
    events = events.filter(events[_KEY].notnull())
    is_given = events["session_id"].notnull() & ~events["session_id"].re_search(f"^({ASSIGNED})$")
    named = events.filter(is_given)
    rows = timed(events.filter(~is_given), _KEY)
    before = ibis.window(group_by=_KEY, order_by=["enter", "ts"], preceding=(None, 1))
    gap = gap_minutes * 60_000_000
    rows = rows.mutate(newest=rows["ts"].max().over(before))
    rows = rows.mutate(starts=(rows["newest"].isnull() | (rows["ts"] - rows["newest"] > gap)).cast("int64"))
    # A range, not rows: of two at one instant one starts the session, and both are in it.
    so_far = ibis.range_window(group_by=_KEY, order_by=["enter", "ts"], preceding=None, following=0)
    rows = rows.mutate(number=rows["starts"].sum().over(so_far))
    is_straggler = rows["newest"].notnull() & (rows["newest"] - rows["ts"] > gap)
    name = ibis.ifelse(is_straggler, ibis.null("string"), ibis.literal("gap-") + rows["number"].cast("string"))
    return ibis.union(named, rows.mutate(session_id=name).select(*events.columns))


def changelog(events: Table, *, gap_minutes: int) -> Table:
    """Change points of the current session: `customer_id`, `event_timestamp` and the columns of customer_session, any order.

    A row of zeros and nulls stands where the session falls silent, unless an event comes at that very instant.
    """
    states = _states(timed(events.filter(events["session_id"].notnull()), _KEY))
    states = states.mutate(ends=states["session_last_event_at"] + gap_minutes * 60_000_000)
    following = ibis.window(group_by=_KEY, order_by="enter")
    states = states.mutate(next_enter=states["enter"].lead().over(following), next_ends=states["ends"].lead().over(following))
    alive = states.filter(states["enter"] < states["ends"])  # else the session was over before its event was known
    falls_silent = alive["next_enter"].isnull() | (alive["ends"] < alive["next_enter"])
    # What becomes known at the very end without prolonging the session leaves it silent too.
    falls_silent |= (alive["ends"] == alive["next_enter"]) & (alive["next_ends"] == alive["ends"])
    silent = alive.filter(falls_silent)
    empty = {name: ibis.literal(0, "int64") for name in SESSION_COUNTS} | {name: ibis.null("int64") for name in SESSION_INSTANTS}
    held = alive.select(_KEY, *SESSION_COUNTS, *SESSION_INSTANTS, at="enter")
    both = ibis.union(held, silent.select(_KEY, **empty, at="ends"))
    return both.select(_KEY, *SESSION_COUNTS, *SESSION_INSTANTS, event_timestamp=make_timestamptz(both["at"]))


def _states(rows: Table) -> Table:
    """One row per customer and `enter` at which the current session changed: what it holds from then on."""
    steps = _steps(rows)
    held = ibis.cumulative_window(group_by=_SESSION, order_by="enter")
    values: dict[str, Any] = {name: steps[name].sum().over(held).cast("int64") for name in SESSION_COUNTS}
    values["session_cart_cents"] = ibis.greatest(values["session_cart_cents"], 0)  # bought without being put in the cart
    values["session_started_at"] = steps["session_started_at"].min().over(held)
    values["session_last_event_at"] = steps["session_last_event_at"].max().over(held)
    # The newest of all events known by then names the current session; a range, since peers at one instant are known too.
    known = ibis.range_window(group_by=_KEY, order_by="enter", preceding=None, following=0)
    newest = ibis.struct({"ts": steps["session_last_event_at"], "session": steps["session_id"]}).max().over(known)
    states = steps.mutate(**values, newest=newest)
    return states.filter(states["newest"]["session"] == states["session_id"])


def _steps(rows: Table) -> Table:
    """What the events of one session that become known at one instant add to it."""
    amount = (rows["price_cents"].fill_null(0) * rows["quantity"].fill_null(1)).clip(0, LARGEST)
    kind = rows["type"]
    values = {
        "session_events": rows["one"],
        "session_views": (kind == "view").cast("int64"),
        "session_cart_adds": (kind == "cart_add").cast("int64"),
        "session_searches": (kind == "search").cast("int64"),
        "session_purchases": (kind == "purchase").cast("int64"),
        "session_cart_cents": ibis.cases((kind == "cart_add", amount), (kind.isin(("cart_remove", "purchase")), -amount), else_=0),
    }
    sums = {name: value.sum().cast("int64") for name, value in values.items()}
    steps = rows.group_by([*_SESSION, "enter"]).agg(**sums, session_started_at=rows["ts"].min(), session_last_event_at=rows["ts"].max())
    first = rows.filter(rows["item_id"].notnull()).group_by([*_SESSION, "item_id"]).agg(enter=lambda t: t["enter"].min())
    items = first.group_by([*_SESSION, "enter"]).agg(items=first.count())
    joined = steps.left_join(items, [*_SESSION, "enter"])
    return joined.select(*_SESSION, "enter", *sums, *SESSION_INSTANTS, session_distinct_items=joined["items"].fill_null(0))
