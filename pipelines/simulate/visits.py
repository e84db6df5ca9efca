"""People -> their sessions, and what happens in each, event by event. Only what was done: nothing here is a message yet."""

from dataclasses import dataclass

import numpy as np

from pipelines.simulate import catalogue, draws
from pipelines.simulate.catalogue import Catalogue
from pipelines.simulate.people import NEVER, People, mission_map
from pipelines.simulate.shop import Shop
from pipelines.simulate.walk import ADD, CART, LEAVE, MAX_STEPS, N_STATES, PURCHASE, REMOVE, START, VIEW, next_state

_VISITS_AT_A_TIME = 24
_FIRST_DEVICE = 0.65  # share of the sessions on the device a person prefers
_SIGNS_IN = np.array([0.7, 0.2, 0.1])  # on a new device: after the first, second or third event, if the session gets there
_QUANTITIES = np.array([0.80, 0.15, 0.05])
_SIGN_IN_DELAY_MS = 300
_LATER_MS = (35 * 60_000, 60 * 60_000)  # whoever left before signing in does so this long afterwards: at least, at most more


@dataclass(frozen=True)
class Sessions:
    """Arrays of (n_sessions,), sorted by person and time."""

    key: np.ndarray
    person: np.ndarray
    planned_ms: np.ndarray  # decides which laws hold: drift, treatment
    start_ms: np.ndarray  # as planned, or later if the visit before was still going on
    device: np.ndarray
    is_mission: np.ndarray
    sign_in_ms: np.ndarray  # when this session's device is identified; NEVER if it already was


@dataclass(frozen=True)
class Steps:
    """Arrays of (n_events,), sorted by session and step."""

    session: np.ndarray
    step: np.ndarray
    event: np.ndarray  # VIEW to PURCHASE
    cart: np.ndarray  # lines in the cart before the event
    time_ms: np.ndarray
    item: np.ndarray  # index into the catalogue; -1 for searches and purchases
    quantity: np.ndarray


def draw(shop: Shop, people: People, items: Catalogue) -> tuple[Sessions, Steps]:
    """Every session that starts within the log, and every event in it up to the log's end."""
    person, number, planned_ms = _starts(shop, people)
    key = draws.children(draws.keys(shop.seed, "session", person), number)
    a, b = mission_map(shop, people.is_treated[person], people.treatment_effect[person], planned_ms)
    is_mission = draws.uniform(key, 0) < a + b * people.mission_probability[person]
    session, step, event, cart = walk(shop, key, is_mission, planned_ms)
    offset = _offsets(shop, key, session, step)
    device = _devices(people, person, key)
    sign_in = _sign_in_offsets(person, device, key, session, step, offset)
    last = np.bincount(session, minlength=len(key)).cumsum() - 1
    start_ms = _push(shop, person, planned_ms, np.maximum(offset[last], np.where(sign_in == NEVER, 0, sign_in)))
    time_ms = start_ms[session] + offset
    item, quantity = _items(shop, people, items, (key, person), (session, step, event, cart, time_ms))
    keep = time_ms <= shop.end_ms
    steps = Steps(session[keep], step[keep], event[keep], cart[keep], time_ms[keep], item[keep], quantity[keep])
    sign_in_ms = np.where(sign_in == NEVER, NEVER, start_ms + np.where(sign_in == NEVER, 0, sign_in))
    return Sessions(key, person, planned_ms, start_ms, device, is_mission, sign_in_ms), steps


def walk(
    shop: Shop, key: np.ndarray, is_mission: np.ndarray, planned_ms: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(session, step, event, lines in the cart before) of every event, sorted by session and step.

    The draws depend on the key alone: the same session of the other kind is its counterfactual.
    """
    ladder = np.cumsum(shop.walks, axis=-1)[..., :LEAVE].reshape(-1, LEAVE)
    law = ((planned_ms >= shop.onset_ms) * 2 + is_mission) * N_STATES
    follow, pace = next_state(), draws.children(key, 1)
    alive, now = np.arange(len(key)), np.full(len(key), START)
    found = [(alive[:0],) * 4]
    for step in range(MAX_STEPS):
        event = (draws.uniform(pace[alive], step)[:, None] >= ladder[law[alive] + now]).sum(axis=1)
        stays = event < LEAVE
        alive, event, before = alive[stays], event[stays], now[stays]
        if not len(alive):
            break
        now = follow[before, event]
        found.append((alive, np.full(len(alive), step), event, np.where(before == START, 0, (before - 1) % (CART + 1))))
    session, step_, event_, cart = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(session, kind="stable")
    return session[order], step_[order], event_[order], cart[order]


def cart_lines(event: np.ndarray, cart: np.ndarray, session: np.ndarray) -> np.ndarray:
    """(CART, n_events): the index of the addition that lies in each place of the cart before each event, else -1.

    A cart is a stack: a removal takes the newest line, a purchase takes all.
    """
    index = np.arange(len(event))
    first = np.searchsorted(session, session, side="left")
    places = np.full((CART, len(event)), -1)
    for place in range(CART):
        newest = np.maximum.accumulate(np.where((event == ADD) & (cart == place), index, -1))
        places[place] = np.where((cart > place) & (newest >= first), newest, -1)
    return places


def _starts(shop: Shop, people: People) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(person, number of the visit, start) of every visit; a newcomer's first visit is the arrival itself."""
    key = draws.keys(shop.seed, "person: visit times", people.number)
    ends = np.minimum(people.departure, shop.length)
    alive, clock = people.number, people.arrival
    found = [(alive[~people.is_old], np.zeros((~people.is_old).sum(), dtype=np.int64), clock[~people.is_old])]
    for block in range(0, 1 << 20, _VISITS_AT_A_TIME):
        number = 1 + block + np.arange(_VISITS_AT_A_TIME)
        gaps = draws.exponential(key[alive, None], number) / people.visit_rate[alive, None]
        times = clock[:, None] + np.cumsum(gaps, axis=1)
        inside = times < ends[alive, None]
        who, which = np.nonzero(inside)
        found.append((alive[who], number[which], times[inside]))
        go_on = inside[:, -1]
        alive, clock = alive[go_on], times[go_on, -1]
        if not len(alive):
            break
    person, number, times = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((number, person))
    return person[order], number[order], shop.instant_ms(times[order])


def _offsets(shop: Shop, key: np.ndarray, session: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Milliseconds since the start of the session; pauses are independent of what is done."""
    share = 1.0 - np.exp(-shop.pause_cap_ms / shop.pause_mean_ms)
    drawn = -np.log1p(-share * draws.uniform(draws.children(key, 2)[session], step)) * shop.pause_mean_ms
    pause = np.where(step == 0, 0, shop.pause_ms + np.rint(drawn).astype(np.int64))
    total = np.cumsum(pause)
    return np.asarray(total - total[np.searchsorted(session, session, side="left")])


def _devices(people: People, person: np.ndarray, key: np.ndarray) -> np.ndarray:
    others = 1 + np.floor(draws.uniform(key, 4) * (people.devices[person] - 1)).astype(np.int64)
    return np.where((draws.uniform(key, 3) < _FIRST_DEVICE) | (people.devices[person] == 1), 0, others)


def _sign_in_offsets(
    person: np.ndarray, device: np.ndarray, key: np.ndarray, session: np.ndarray, step: np.ndarray, offset: np.ndarray
) -> np.ndarray:
    """When the first session on a device identifies it, since the session's start; NEVER for its later sessions.

    The moment must not tell how the session goes on: who leaves before it comes signs in when the session is long over.
    """
    after = draws.choice(draws.children(key, 3), _SIGNS_IN)
    last = np.bincount(session, minlength=len(key)).cumsum() - 1
    length = step[last] + 1
    there = offset[last - length + 1 + np.minimum(after, length - 1)] + _SIGN_IN_DELAY_MS
    later = offset[last] + _LATER_MS[0] + np.rint(draws.uniform(key, 5) * _LATER_MS[1]).astype(np.int64)
    is_first = np.zeros(len(key), dtype=bool)
    is_first[np.unique(person * 8 + device, return_index=True)[1]] = True
    return np.where(is_first, np.where(after < length, there, later), NEVER)


def _push(shop: Shop, person: np.ndarray, start_ms: np.ndarray, lasts_ms: np.ndarray) -> np.ndarray:
    """Later starts for the visits that would run into the one before: they wait until the silence after it has passed."""
    busy = lasts_ms + shop.silence_ms
    before = np.cumsum(busy) - busy
    first = np.searchsorted(person, person, side="left")
    before -= before[first]
    slack = start_ms - before
    floor = person.astype(np.int64) << 40  # 35 years of milliseconds: keeps one person's latest start out of the next person's
    return np.asarray(np.maximum.accumulate(slack - shop.start_ms + floor) - floor + shop.start_ms + before)


def _items(
    shop: Shop, people: People, items: Catalogue, sessions: tuple[np.ndarray, np.ndarray], steps: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """(item, quantity) of each event: views choose, additions take what was just viewed, removals what was last added."""
    (key, person), (session, step, event, cart, time_ms) = sessions, steps
    item = np.full(len(event), -1)
    views = np.flatnonzero(event == VIEW)
    chance = draws.uniform(draws.children(key, 4)[session[views]], step[views])
    item[views] = catalogue.choose(shop, items, people, person[session[views]], time_ms[views], chance)
    added = np.flatnonzero(event == ADD)
    item[added] = item[added - 1]
    quantity = np.where(item >= 0, 1, 0)
    quantity[added] = 1 + draws.choice(draws.children(key, 5)[session[added]], _QUANTITIES, step[added])
    removed = np.flatnonzero(event == REMOVE)
    newest = cart_lines(event, cart, session)[cart[removed] - 1, removed]
    item[removed], quantity[removed] = item[newest], quantity[newest]
    return item, quantity


def purchases(steps: Steps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(event index of the order, item, quantity) of every order line; an item bought twice in one order is one line."""
    orders = np.flatnonzero(steps.event == PURCHASE)
    carts = cart_lines(steps.event, steps.cart, steps.session)[:, orders]
    place, which = np.nonzero(carts >= 0)
    source = carts[place, which]
    width = int(steps.item.max(initial=0)) + 1
    line, where = np.unique(orders[which] * width + steps.item[source], return_inverse=True)
    return line // width, line % width, np.bincount(where, weights=steps.quantity[source]).astype(np.int64)
