"""What people did -> what was said of it: one row per message that reached the wire, sign-ins, consent and refunds included."""

from dataclasses import dataclass, fields

import numpy as np

from pipelines.simulate import draws, visits
from pipelines.simulate.knobs import GROUPS, OUTAGE_DAYS
from pipelines.simulate.people import NEVER, People
from pipelines.simulate.shop import DAY_MS, Shop
from pipelines.simulate.visits import Sessions, Steps
from pipelines.simulate.walk import PURCHASE, REMOVE

REFUND, IDENTIFY, CONSENT, EXPOSURE = range(PURCHASE + 1, PURCHASE + 5)  # after the five events of a walk
SERVER = -1  # the device of what no browser sends

_REFUNDED = 0.05  # share of the orders
_REFUND_DAYS = (2, 12)  # at least, at most more
_CONSENT_DELAY_MS = 600
_EXPOSURE_DELAY_MS = 900


@dataclass(frozen=True)
class Orders:
    """What orders, then refunds, list. Arrays of (n,) and, of the lines, (n_lines,) sorted by order."""

    key: np.ndarray  # of the order, also for its refund
    is_repriced: np.ndarray
    line_order: np.ndarray
    line_item: np.ndarray
    line_quantity: np.ndarray


@dataclass(frozen=True)
class Messages:
    """Arrays of (n_messages,), in no particular order."""

    key: np.ndarray
    code: np.ndarray
    person: np.ndarray
    device: np.ndarray
    time_ms: np.ndarray
    is_linked: np.ndarray  # the device knows its user by now
    item: np.ndarray
    quantity: np.ndarray
    order: np.ndarray  # index into Orders, else -1
    is_repriced: np.ndarray  # sent at the prices after a covariate drift


def draw(shop: Shop, people: People, sessions: Sessions, steps: Steps) -> tuple[Messages, Orders, np.ndarray]:
    """Everything that was recorded, the order lists, and (n_customers,) when personalisation was withdrawn, else NEVER."""
    orders = _orders(shop, sessions, steps)
    withdrawn_ms, said = _consents(shop, people, sessions)
    exposed = np.flatnonzero(sessions.start_ms >= shop.experiment_ms)
    parts = [
        _walked(shop, sessions, steps),
        _sign_ins(shop, sessions),
        _in_session(shop, sessions, said, code=CONSENT, delay_ms=_CONSENT_DELAY_MS),
        _in_session(shop, sessions, exposed, code=EXPOSURE, delay_ms=_EXPOSURE_DELAY_MS),
    ]
    refunds, orders = _refunds(shop, sessions, steps, orders)
    parts.append(refunds)
    whole = Messages(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Messages)))
    recorded = (whole.time_ms <= shop.end_ms) & ~_is_lost(shop, people, whole)
    return Messages(*(getattr(whole, field.name)[recorded] for field in fields(Messages))), orders, withdrawn_ms


def _message(shop: Shop, *, key: np.ndarray, code: int | np.ndarray, time_ms: np.ndarray, **columns: np.ndarray | int) -> Messages:
    n = len(key)
    defaults: dict[str, np.ndarray | int] = {"device": SERVER, "is_linked": 1, "item": -1, "quantity": 0, "order": -1}
    filled = {name: np.broadcast_to(np.asarray(value), (n,)) for name, value in {**defaults, **columns, "code": code}.items()}
    repriced = filled.pop("is_repriced", time_ms >= shop.onset_ms)
    return Messages(key=key, time_ms=time_ms, is_repriced=repriced, **{**filled, "is_linked": filled["is_linked"].astype(bool)})


def _walked(shop: Shop, sessions: Sessions, steps: Steps) -> Messages:
    at = steps.session
    order = np.where(steps.event == PURCHASE, np.cumsum(steps.event == PURCHASE) - 1, -1)
    sign_in = sessions.sign_in_ms[at]
    return _message(
        shop,
        key=draws.children(draws.children(sessions.key, 6)[at], steps.step),
        code=steps.event,
        time_ms=steps.time_ms,
        person=sessions.person[at],
        device=sessions.device[at],
        is_linked=(sign_in == NEVER) | (steps.time_ms > sign_in),
        item=steps.item,
        quantity=steps.quantity,
        order=order,
    )


def _sign_ins(shop: Shop, sessions: Sessions) -> Messages:
    new = np.flatnonzero(sessions.sign_in_ms <= shop.end_ms)
    return _message(
        shop,
        key=draws.children(sessions.key[new], 7),
        code=IDENTIFY,
        time_ms=sessions.sign_in_ms[new],
        person=sessions.person[new],
        device=sessions.device[new],
    )


def _in_session(shop: Shop, sessions: Sessions, chosen: np.ndarray, *, code: int, delay_ms: int) -> Messages:
    """One message of this code soon after the first event of each chosen session; its moment tells nothing of the rest."""
    time_ms = sessions.start_ms[chosen] + delay_ms
    sign_in = sessions.sign_in_ms[chosen]
    return _message(
        shop,
        key=draws.children(sessions.key[chosen], code + 8),
        code=code,
        time_ms=time_ms,
        person=sessions.person[chosen],
        device=sessions.device[chosen],
        is_linked=(sign_in == NEVER) | (time_ms > sign_in),
    )


def _consents(shop: Shop, people: People, sessions: Sessions) -> tuple[np.ndarray, np.ndarray]:
    """(when each person's withdrawal is sent, the sessions that send an event about consent)."""
    first = np.flatnonzero(np.diff(sessions.person, prepend=-1))
    first = first[people.says_so[sessions.person[first]]]
    late = np.flatnonzero(shop.shop_days(sessions.start_ms) >= people.withdrawal[sessions.person])
    who, where = np.unique(sessions.person[late], return_index=True)
    withdrawn_ms = np.full(len(people.number), NEVER)
    withdrawn_ms[who] = sessions.start_ms[late[where]] + _CONSENT_DELAY_MS
    return withdrawn_ms, np.union1d(first, late[where])


def _orders(shop: Shop, sessions: Sessions, steps: Steps) -> Orders:
    events = np.flatnonzero(steps.event == PURCHASE)
    event, item, quantity = visits.purchases(steps)
    key = draws.children(draws.children(sessions.key, 8)[steps.session[events]], steps.step[events])
    return Orders(key, steps.time_ms[events] >= shop.onset_ms, np.searchsorted(events, event), item, quantity)


def _refunds(shop: Shop, sessions: Sessions, steps: Steps, orders: Orders) -> tuple[Messages, Orders]:
    """Some orders lose their first line days later, by the server. The lists of refunds follow those of orders."""
    events = np.flatnonzero(steps.event == PURCHASE)
    chosen = np.flatnonzero(draws.uniform(orders.key, 0) < _REFUNDED)
    line = np.searchsorted(orders.line_order, chosen)
    least, more = _REFUND_DAYS
    wait = np.rint((least + more * draws.uniform(orders.key[chosen], 1)) * DAY_MS).astype(np.int64)
    lists = Orders(
        np.concatenate([orders.key, orders.key[chosen]]),
        np.concatenate([orders.is_repriced, orders.is_repriced[chosen]]),
        np.concatenate([orders.line_order, len(orders.key) + np.arange(len(chosen))]),
        np.concatenate([orders.line_item, orders.line_item[line]]),
        np.concatenate([orders.line_quantity, orders.line_quantity[line]]),
    )
    messages = _message(
        shop,
        key=draws.children(orders.key[chosen], 2),
        code=REFUND,
        time_ms=steps.time_ms[events[chosen]] + wait,
        person=sessions.person[steps.session[events[chosen]]],
        order=len(orders.key) + np.arange(len(chosen)),
        is_repriced=orders.is_repriced[chosen],
    )
    return messages, lists


def _is_lost(shop: Shop, people: People, messages: Messages) -> np.ndarray:
    """What the knobs bias and outage keep from being recorded."""
    column, _, group = shop.knobs.bias_group.partition(":")
    in_group = getattr(people, column)[messages.person] == list(GROUPS[column]).index(group)
    unseen = in_group & (messages.code <= REMOVE) & (draws.uniform(messages.key, 0) < shop.knobs.bias)
    out = (messages.time_ms >= shop.onset_ms) & (messages.time_ms - OUTAGE_DAYS * DAY_MS < shop.onset_ms)
    out &= (messages.code <= PURCHASE) & (draws.uniform(messages.key, 1) < shop.strength("outage"))
    return np.asarray(unseen | out)
