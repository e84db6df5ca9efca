"""What a visitor does next: the Markov chain of a session, by kind of session. Draws nothing.

The state is the last event and the lines in the cart. No probability depends on an item, so that the chance of a
purchase, given the events so far, is exact.
"""

import numpy as np

VIEW, SEARCH, ADD, REMOVE, PURCHASE, LEAVE = range(6)
KINDS = ("browse", "mission")
CART = 4  # lines that a cart holds
MAX_STEPS = 200
START = 0
N_STATES = 1 + 5 * (CART + 1)  # the start, then (last event, lines in the cart); some of them are never reached

# Weights of the next event after the last one (view, search, add, remove, purchase, leave), by kind of session and by
# whether the cart holds something. Both kinds can do the same things: no event proves the kind.
_START = {"browse": (0.88, 0.12, 0, 0, 0, 0), "mission": (0.55, 0.45, 0, 0, 0, 0)}
_EMPTY = {
    "browse": {
        VIEW: (0.40, 0.09, 0.06, 0, 0, 0.45),
        SEARCH: (0.55, 0.08, 0, 0, 0, 0.37),
        REMOVE: (0.50, 0.10, 0, 0, 0, 0.40),
        PURCHASE: (0.20, 0.03, 0, 0, 0, 0.77),
    },
    "mission": {
        VIEW: (0.34, 0.14, 0.37, 0, 0, 0.15),
        SEARCH: (0.80, 0.10, 0, 0, 0, 0.10),
        REMOVE: (0.60, 0.20, 0, 0, 0, 0.20),
        PURCHASE: (0.22, 0.03, 0, 0, 0, 0.75),
    },
}
_CARTED = {
    "browse": {
        VIEW: (0.44, 0.08, 0.11, 0.07, 0.05, 0.25),
        SEARCH: (0.58, 0.08, 0, 0.02, 0.02, 0.30),
        ADD: (0.40, 0.08, 0, 0.12, 0.10, 0.30),
        REMOVE: (0.42, 0.10, 0, 0.08, 0.06, 0.34),
    },
    "mission": {
        VIEW: (0.25, 0.06, 0.28, 0.03, 0.27, 0.11),
        SEARCH: (0.70, 0.08, 0, 0.02, 0.10, 0.10),
        ADD: (0.26, 0.05, 0, 0.03, 0.54, 0.12),
        REMOVE: (0.32, 0.12, 0, 0.04, 0.34, 0.18),
    },
}


def state(event: np.ndarray, cart: np.ndarray) -> np.ndarray:
    """The state after an event that leaves `cart` lines in the cart."""
    return np.asarray(1 + event * (CART + 1) + cart)


def next_state() -> np.ndarray:
    """(states, 6): the state that each event leads to; LEAVE and the impossible lead to START."""
    table = np.zeros((N_STATES, 6), dtype=np.int64)
    carts = np.concatenate([[0], np.tile(np.arange(CART + 1), 5)])
    for event, change in ((VIEW, 0), (SEARCH, 0), (ADD, 1), (REMOVE, -1)):
        table[:, event] = state(np.array(event), np.clip(carts + change, 0, CART))
    table[:, PURCHASE] = state(np.array(PURCHASE), np.array(0))
    return table


def probabilities(*, swap: float = 0.0) -> np.ndarray:
    """(2 kinds, states, 6). `swap`: share by which leaving a cart and buying it change places."""
    table = np.stack([_weights(kind) for kind in KINDS])
    table /= table.sum(axis=-1, keepdims=True)
    moved = swap * (table[..., LEAVE] - table[..., PURCHASE]) * (table[..., PURCHASE] > 0)
    table[..., PURCHASE] += moved
    table[..., LEAVE] -= moved
    return table


def purchase_ahead(laws: np.ndarray) -> np.ndarray:
    """laws (..., states, 6) -> (..., states): probability of a purchase after this state, by the fundamental matrix."""
    inside = np.zeros((*laws.shape[:-1], N_STATES))
    follow = next_state()
    for event in (VIEW, SEARCH, ADD, REMOVE):
        inside[..., np.arange(N_STATES), follow[:, event]] += laws[..., event]
    return np.asarray(np.linalg.solve(np.eye(N_STATES) - inside, laws[..., PURCHASE, None])[..., 0])


def _weights(kind: str) -> np.ndarray:
    """(states, 6); a full cart takes nothing more, an impossible state leaves."""
    weights = np.zeros((N_STATES, 6))
    weights[START] = _START[kind]
    for event in range(LEAVE):
        for cart in range(CART + 1):
            rows = _EMPTY[kind] if cart == 0 else _CARTED[kind]
            row = np.array(rows.get(event, (0, 0, 0, 0, 0, 1)), dtype=float)
            row[ADD] *= cart < CART
            weights[state(np.array(event), np.array(cart))] = row
    return weights
