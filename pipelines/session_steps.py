"""Sessions of clean events by arithmetic on whole arrays: the batch twin of `sessions`, some five times as fast.

In: an Arrow table of clean events, all rows of their customers, and the silence that ends a session. Out: the same events with sessions on
those that came without, and the change points of customer_session. Opens no file. `sessions` is the definition, in Ibis; both must give
the same rows, and a law in the tests says so.

Running bests within a customer or a session: each has a stretch of numbers of its own, so that none needs to be told apart.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.aggregates import LARGEST, NOT_BEHAVIOUR, SESSION_COUNTS, SESSION_INSTANTS
from pipelines.step_functions import encoded, is_first, micros, numbered
from pipelines.visit import ASSIGNED

COLUMNS = ("customer_id", "type", "event_timestamp", "created_timestamp", "session_id", "item_id", "quantity", "price_cents")

_KEY = ("customer_id",)
_TIME = pa.timestamp("us", tz="UTC")
_MINUTE_US = 60_000_000
_CART = {"cart_add": 1, "cart_remove": -1, "purchase": -1}


def identified(events: pa.Table, *, gap_minutes: int) -> pa.Table:
    """See `sessions.identified`. Rows that are no behaviour, or nobody's, stay as they are."""
    given = events["session_id"].combine_chunks()
    is_bare = pc.and_(_counts(events), pc.fill_null(pc.match_substring_regex(given, f"^(?:{ASSIGNED})$"), True))
    place = np.flatnonzero(is_bare.to_numpy(zero_copy_only=False))
    rows = events.take(pa.array(place))
    customer, _ = numbered(rows, _KEY)
    ts, enter = _times(rows)
    order = np.lexsort((ts, enter, customer))
    customer, ts = customer[order], ts[order]
    is_start = is_first(customer)
    instants, rank = np.unique(ts, return_inverse=True)
    newest = instants[np.roll(_highest_so_far(customer, rank, len(instants)), 1)] if len(ts) else ts  # of those before
    gap = gap_minutes * _MINUTE_US
    begins = is_start | (ts - newest > gap)
    count = np.cumsum(begins)
    number = count - (count[is_start] - 1)[np.cumsum(is_start) - 1]
    is_straggler = ~is_start & (newest - ts > gap)
    named = np.zeros(len(given), np.int64)
    named[place[order]] = np.where(is_straggler, 0, number)
    names = pa.array([None, *(f"gap-{n}" for n in range(1, int(number.max(initial=0)) + 1))], pa.string())
    told = pc.if_else(is_bare, names.take(pa.array(named)), given)
    return events.set_column(events.schema.get_field_index("session_id"), "session_id", told)


def changelog(events: pa.Table, *, gap_minutes: int) -> pa.Table:
    """See `sessions.changelog`; by customer and time."""
    rows = events.filter(pc.and_(_counts(events), pc.is_valid(events["session_id"])))
    customer, keys = numbered(rows, _KEY)
    session, _ = encoded(rows["session_id"])
    ts, enter = _times(rows)
    n_sessions = int(session.max(initial=0)) + 1
    pair = customer * n_sessions + session
    order = np.lexsort((enter, pair))
    pair, ts, enter = pair[order], ts[order], enter[order]
    is_step = is_first(pair) | is_first(enter)  # what becomes known of a session at one instant
    start = np.flatnonzero(is_step)
    added = {name: _reduced(np.add, value[order], start) for name, value in _values(rows).items()}
    added["session_distinct_items"] = _reduced(np.add, _is_new(pair, rows["item_id"], order), start)
    first, last, pair, enter = _reduced(np.minimum, ts, start), _reduced(np.maximum, ts, start), pair[start], enter[start]
    of = np.cumsum(is_first(pair)) - 1
    held = {name: _running(value, pair) for name, value in added.items()}
    held["session_cart_cents"] = np.maximum(held["session_cart_cents"], 0)  # bought without being put in the cart
    instants, rank = np.unique(np.concatenate([first, last]), return_inverse=True)
    n, n_instants = len(start), len(instants)
    if n:
        held["session_started_at"] = instants[n_instants - 1 - _highest_so_far(of, n_instants - 1 - rank[:n], n_instants)]
        held["session_last_event_at"] = instants[_highest_so_far(of, rank[n:], n_instants)]
    kept = _current(pair // n_sessions, pair % n_sessions, enter, rank[n:])
    values = [held.get(name, ts)[kept] for name in (*SESSION_COUNTS, *SESSION_INSTANTS)]
    return _shown(keys, (pair // n_sessions)[kept], enter[kept], values, gap_us=gap_minutes * _MINUTE_US)


def _current(customer: np.ndarray, session: np.ndarray, enter: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The steps, by customer and enter, that are of the session in which the newest of all events known by then is.

    rank: of the newest event of each step. Of two sessions with one instant the later name is the newer; peers at one instant are known.
    """
    order = np.lexsort((enter, customer))
    customer, session, enter = customer[order], session[order], enter[order]
    together = rank[order] * (int(session.max(initial=0)) + 1) + session
    ages, age = np.unique(together, return_inverse=True)
    newest = _highest_so_far(customer, age, len(ages))
    ends = np.append(np.flatnonzero(is_first(customer) | is_first(enter))[1:], len(order)) - 1
    newest = newest[ends][np.cumsum(is_first(customer) | is_first(enter)) - 1] if len(order) else newest
    named = ages[newest] % (int(session.max(initial=0)) + 1) if len(order) else session
    kept: np.ndarray = order[named == session]
    return kept


def _shown(keys: pa.Table, customer: np.ndarray, enter: np.ndarray, values: list[np.ndarray], *, gap_us: int) -> pa.Table:
    """States of current sessions -> change points: what is held from `enter` on, and nothing from where it falls silent."""
    ends = values[-1] + gap_us
    has_next = np.append(~is_first(customer)[1:], False) if len(customer) else np.zeros(0, bool)
    next_enter, next_ends = np.roll(enter, -1), np.roll(ends, -1)
    alive = enter < ends  # else the session was over before its event was known
    # what becomes known at the very end without prolonging the session leaves it silent too
    silent = alive & (~has_next | (ends < next_enter) | ((ends == next_enter) & (next_ends == ends)))
    who, at = np.concatenate([customer[alive], customer[silent]]), np.concatenate([enter[alive], ends[silent]])
    order = np.lexsort((at, who))
    is_silent = np.arange(len(order))[order] >= int(alive.sum())
    columns = {name: keys[name].take(pa.array(who[order])) for name in _KEY} | {"event_timestamp": pa.array(at[order]).cast(_TIME)}
    for name, value in zip((*SESSION_COUNTS, *SESSION_INSTANTS), values, strict=True):
        both = np.concatenate([value[alive], np.zeros(int(silent.sum()), np.int64)])[order]
        columns[name] = pa.array(both, mask=is_silent if name in SESSION_INSTANTS else None)
    return pa.table(columns)


def _counts(events: pa.Table) -> pa.ChunkedArray:
    """Whether a row is behaviour of a customer."""
    is_behaviour = pc.invert(pc.is_in(events["type"], pa.array(NOT_BEHAVIOUR)))
    return pc.and_(pc.and_(pc.is_valid(events["type"]), is_behaviour), pc.is_valid(events["customer_id"])).combine_chunks()


def _times(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    ts = micros(rows["event_timestamp"])
    return ts, np.maximum(ts, micros(pc.coalesce(rows["created_timestamp"], rows["event_timestamp"])))


def _values(rows: pa.Table) -> dict[str, np.ndarray]:
    """What each event adds, by column."""
    codes, names = encoded(rows["type"])
    of = {name: codes == code for code, name in enumerate(names.to_pylist())}
    never = np.zeros(rows.num_rows, bool)
    price, quantity = (pc.fill_null(rows[name], absent).to_numpy() for name, absent in (("price_cents", 0), ("quantity", 1)))
    amount = np.clip(price * quantity, 0, LARGEST)
    counts = {"session_events": ~never} | {
        f"session_{name}": of.get(kind, never)
        for name, kind in (("views", "view"), ("cart_adds", "cart_add"), ("searches", "search"), ("purchases", "purchase"))
    }
    signs = sum((sign * of.get(kind, never) for kind, sign in _CART.items()), np.zeros(rows.num_rows, np.int64))
    return {name: value.astype(np.int64) for name, value in counts.items()} | {"session_cart_cents": signs * amount}


def _is_new(pair: np.ndarray, items: pa.ChunkedArray, order: np.ndarray) -> np.ndarray:
    """1 where an item is first known in its session. pair: sorted, and by enter."""
    item = encoded(items)[0][order]
    of = np.cumsum(is_first(pair)) - 1
    known = np.flatnonzero(item >= 0)
    _, at = np.unique(of[known] * (int(item.max(initial=0)) + 1) + item[known], return_index=True)
    new = np.zeros(len(pair), np.int64)
    new[known[at]] = 1
    return new


def _reduced(function: np.ufunc, values: np.ndarray, start: np.ndarray) -> np.ndarray:
    found: np.ndarray = function.reduceat(values, start) if len(start) else values
    return found


def _running(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Sums so far within each group; groups lie together."""
    total, begins = np.cumsum(values), is_first(group)
    before = (total - values)[begins]
    found: np.ndarray = total - before[np.cumsum(begins) - 1] if len(total) else total
    return found


def _highest_so_far(group: np.ndarray, rank: np.ndarray, n_ranks: int) -> np.ndarray:
    """The highest rank so far within each group; groups lie together, in the order of their numbers."""
    stretch = group * n_ranks
    found: np.ndarray = np.maximum.accumulate(stretch + rank) - stretch
    return found
