"""Events + rows -> what each row's customer was known to have done before the row's instant, session by session.

Every row is read anew from the events that had happened and were known before it: no state is carried from row to row,
so that nothing later can leak into an earlier one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipelines.simulate.knobs import GROUPS
from pipelines.simulate.people import mission_map
from pipelines.simulate.shop import Shop
from pipelines.simulate.truth import Truth
from pipelines.simulate.walk import ADD, CART, LEAVE, PURCHASE, REMOVE, SEARCH, START, VIEW, state

CODES = {"view": VIEW, "search": SEARCH, "cart_add": ADD, "cart_remove": REMOVE, "purchase": PURCHASE}
SESSION_GAP_MS = 30 * 60_000

_PAIRS_AT_A_TIME = 1_500_000


@dataclass(frozen=True)
class Histories:
    """What was known of each row. Arrays of (n_rows,), and of (n_sessions,) sorted by row and time."""

    at_ms: np.ndarray
    region: np.ndarray
    is_treated: np.ndarray
    effect: np.ndarray
    session_row: np.ndarray
    session_start_ms: np.ndarray
    session_last_ms: np.ndarray
    session_state: np.ndarray  # after its last event
    session_log_likelihood: np.ndarray  # (n_sessions, 2 kinds) of the events, not of what came or did not come after


@dataclass(frozen=True)
class _Visible:
    """Behaviour events, sorted by customer and time. An order of several lines is one event."""

    customer: np.ndarray
    time_ms: np.ndarray
    known_us: np.ndarray
    code: np.ndarray


def histories(truth: Truth, events: pd.DataFrame, rows: pd.DataFrame, identities: pd.DataFrame) -> Iterator[tuple[np.ndarray, Histories]]:
    """(positions of the rows, their histories) in parts of bounded memory."""
    names, customer = np.unique(rows["customer_id"].to_numpy(dtype=str), return_inverse=True)
    person = person_of(truth, names, identities)[customer]
    at_us = microseconds(rows["event_timestamp"])
    seen = _visible(events, names)
    first, stop = _ranges(seen, customer, at_us)
    for part in _parts(stop - first):
        yield part, _read(truth, seen, first=first[part], stop=stop[part], at_us=at_us[part], person=person[part])


def person_of(truth: Truth, customers: np.ndarray, identities: pd.DataFrame) -> np.ndarray:
    """(n,): the position in truth.people of each customer, -1 where no user id leads to one."""
    users = identities[identities["identifier"].str.startswith("user_id:")]
    user = users["identifier"].str.removeprefix("user_id:").to_numpy()
    position = pd.Series(truth.people.index.get_indexer(pd.Index(user)).astype(np.int64), index=pd.Index(users["customer_id"]))
    position = position[position >= 0]
    return position[~position.index.duplicated()].reindex(customers, fill_value=-1).to_numpy(dtype=np.int64)


def microseconds(times: pd.Series) -> np.ndarray:
    """Microseconds since 1970."""
    return np.asarray(times.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy(dtype="datetime64[us]").astype(np.int64))


def _visible(events: pd.DataFrame, names: np.ndarray) -> _Visible:
    acts = events[events["type"].isin(CODES) & events["customer_id"].notna()]
    customer = pd.Index(names).get_indexer(pd.Index(acts["customer_id"]))
    happened, learnt = microseconds(acts["event_timestamp"]), microseconds(acts["created_timestamp"])
    code, known = acts["type"].map(CODES).to_numpy(dtype=np.int64), np.maximum(happened, learnt)
    order = np.lexsort((known, code, happened, customer))
    order = order[customer[order] >= 0]
    customer, happened, code, known = customer[order], happened[order], code[order], known[order]
    same = (np.diff(customer, prepend=-1) == 0) & (np.diff(happened, prepend=-1) == 0) & (np.diff(code, prepend=-1) == 0)
    return _Visible(customer[~same], happened[~same] // 1_000, known[~same], code[~same])


def _ranges(seen: _Visible, customer: np.ndarray, at_us: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The events of each row's customer that may have been seen: all up to the row's millisecond. `_read` is exact."""
    base = int(seen.time_ms.min(initial=0)) - 1
    width = int(max(seen.time_ms.max(initial=0), at_us.max(initial=0) // 1_000)) - base + 2
    key = seen.customer * width + (seen.time_ms - base)
    first = np.searchsorted(seen.customer, customer)
    return first, np.maximum(first, np.searchsorted(key, customer * width + np.maximum(at_us // 1_000 - base, 0), side="right"))


def _parts(pairs: np.ndarray) -> Iterator[np.ndarray]:
    """Positions in parts of at most so many pairs of row and event, or of one row."""
    for _, part in pd.Series(np.arange(len(pairs))).groupby(np.cumsum(pairs) // _PAIRS_AT_A_TIME):
        yield part.to_numpy()


def _read(truth: Truth, seen: _Visible, *, first: np.ndarray, stop: np.ndarray, at_us: np.ndarray, person: np.ndarray) -> Histories:
    row = np.repeat(np.arange(len(first)), stop - first)
    event = np.arange(len(row)) - np.repeat(np.cumsum(stop - first) - (stop - first), stop - first) + first[row]
    known = seen.known_us[event] < at_us[row]
    row, event = row[known], event[known]
    time_ms, code = seen.time_ms[event], seen.code[event]
    opens = (np.diff(row, prepend=-1) != 0) | (np.diff(time_ms, prepend=0) > SESSION_GAP_MS)
    start = np.flatnonzero(opens)
    last = np.append(start[1:], len(row))[: len(start)] - 1
    before, after = _states(code, opens)
    late = (time_ms[start] >= truth.shop.onset_ms)[np.cumsum(opens) - 1]
    steps = _log_likelihood(truth.shop, late, before, code)
    region, is_treated, effect = _covariates(truth, person)
    return Histories(
        at_ms=at_us // 1_000,
        region=region,
        is_treated=is_treated,
        effect=effect,
        session_row=row[start],
        session_start_ms=time_ms[start],
        session_last_ms=time_ms[last],
        session_state=after[last],
        session_log_likelihood=np.add.reduceat(steps, start, axis=0) if len(start) else np.zeros((0, 2)),
    )


def _states(code: np.ndarray, opens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(state before, state after) each event. The cart is counted from the session's start or its last purchase.

    Where events are missing the count can leave its bounds; it is then held at them.
    """
    change = np.where(code == ADD, 1, np.where(code == REMOVE, -1, 0))
    empties = opens | (np.append(False, code[:-1] == PURCHASE) if len(code) else opens)
    total = np.cumsum(change)
    held = total - (total - change)[np.flatnonzero(empties)][np.cumsum(empties) - 1] if len(code) else total
    after = state(code, np.where(code == PURCHASE, 0, np.clip(held, np.where(code == ADD, 1, 0), CART)))
    return np.where(opens, START, np.append(START, after[:-1])[: len(code)]), after


def _log_likelihood(shop: Shop, late: np.ndarray, before: np.ndarray, code: np.ndarray) -> np.ndarray:
    """(n_events, 2 kinds). What cannot follow, because events between are missing, says nothing of the kind."""
    chance = shop.walks[late.astype(np.int64), :, before, code]
    return np.log(np.where(chance > 0, chance, 1.0))


def _covariates(truth: Truth, person: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(region, is treated, effect) of each row; a customer without a user id is taken for one of the largest region."""
    people, known = truth.people, person >= 0
    shares = GROUPS["region"]
    names = people["region"].to_numpy()[np.maximum(person, 0)]
    region = pd.Index(list(shares)).get_indexer(pd.Index(np.where(known, names, max(shares, key=lambda name: shares[name]))))
    is_treated = known & people["is_treated"].to_numpy(dtype=bool)[np.maximum(person, 0)]
    return region, is_treated, np.where(known, people["treatment_effect"].to_numpy()[np.maximum(person, 0)], 0.0)


def mission_share(shop: Shop, known: Histories) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of each session: P(mission) = a + b * the customer's own mission probability."""
    row = known.session_row
    return mission_map(shop, known.is_treated[row], known.effect[row], known.session_start_ms)


def last_sessions(known: Histories) -> np.ndarray:
    """(n_rows,): the position of the last session of each row, -1 where none was known."""
    last = np.full(len(known.at_ms), -1)
    last[known.session_row] = np.arange(len(known.session_row))
    return last


def leave_probability(shop: Shop, known: Histories) -> np.ndarray:
    """(n_sessions, 2 kinds): that nothing follows the last event seen."""
    late = (known.session_start_ms >= shop.onset_ms).astype(np.int64)
    return np.asarray(shop.walks[late, :, known.session_state, LEAVE])
