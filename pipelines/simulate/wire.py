"""Lines -> the files: a Segment log in order of arrival, and the catalogue.

A line is a row of Arrow string pieces joined at once; a batch's bytes are written as they lie in memory.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.simulate import draws
from pipelines.simulate.catalogue import CATEGORIES, Catalogue
from pipelines.simulate.dirt import MALFORMED, Lines
from pipelines.simulate.knobs import GROUPS
from pipelines.simulate.messages import CONSENT, EXPOSURE, IDENTIFY, REFUND, SERVER, Messages, Orders
from pipelines.simulate.people import People
from pipelines.simulate.shop import Shop
from pipelines.simulate.walk import ADD, PURCHASE, REMOVE, SEARCH, VIEW

EXPERIMENT = "guided_checkout"
SEGMENT_NAMES = {
    VIEW: "Product Viewed",
    SEARCH: "Products Searched",
    ADD: "Product Added",
    REMOVE: "Product Removed",
    PURCHASE: "Order Completed",
    REFUND: "Order Refunded",
    CONSENT: "Consent Updated",
    EXPOSURE: "Experiment Viewed",
}

_HEADS = [
    '{"type":"identify",' if code == IDENTIFY else f'{{"type":"track","event":"{SEGMENT_NAMES[code]}",' for code in range(EXPOSURE + 1)
]
_CONTEXTS = [  # by personalization + 2 * marketing
    f'"context":{{"consent":{{"categoryPreferences":{{"analytics":true,"personalization":{p},"marketing":{m}}}}}}}}}\n'
    for m in ("false", "true")
    for p in ("false", "true")
]
_SPOILT = {  # what replaces a piece of a good line; broken_json is cut instead
    "no_message_id": {"message": ""},
    "bad_timestamp": {"timestamp": '"timestamp":"yesterday at noon",'},
    "negative_quantity": {
        "head": _HEADS[ADD],
        "body": '"properties":{"product_id":"i00000","category":"books","price":9.99,"quantity":-2},',
    },
    "unknown_type": {"head": '{"type":"telemetry",'},
    "no_identifier": {"anonymous": "", "user": ""},
}
_BROKEN_AT = 90  # characters: inside every line
_BATCH = 100_000

Pieces = dict[str, pa.Array]


def write_events(
    path: Path, shop: Shop, people: People, items: Catalogue, *, messages: Messages, orders: Orders, lines: Lines, withdrawn_ms: np.ndarray
) -> None:
    """Write the log. Raises OSError."""
    writer = _Writer(shop, people, items, orders=orders, withdrawn_ms=withdrawn_ms)
    with path.open("wb") as file:
        for first in range(0, len(lines.message), _BATCH):
            batch = slice(first, first + _BATCH)
            file.write(writer.block(messages, lines.message[batch], flavour=lines.flavour[batch], received_ms=lines.received_ms[batch]))


def write_items(path: Path, items: Catalogue) -> None:
    """Write the catalogue, one JSON object a line, in order of availability. Raises OSError."""
    text = _join(
        '{"item_id":"', items.item_id, '","category":"', np.array(CATEGORIES)[items.category], '","price":',
        _money(items.price_cents), ',"available_from":"', _instant(items.available_ms), '"}\n',
    )  # fmt: skip
    path.write_bytes(_content(text))


def user_ids(number: np.ndarray) -> np.ndarray:
    """The user ids of people by number."""
    return np.char.add("u", np.char.zfill(number.astype(str), 7))


class _Writer:
    """Holds the pieces that are the same on every line of a person, item or order."""

    def __init__(self, shop: Shop, people: People, items: Catalogue, *, orders: Orders, withdrawn_ms: np.ndarray) -> None:
        self._shop, self._people, self._withdrawn_ms = shop, people, withdrawn_ms
        self._n_items = len(items.item_id)
        self._products = _product_pieces(shop, items)
        self._orders = _order_pieces(shop, items, orders, self._products)
        user = user_ids(people.number)
        self._user = _join('"userId":"', user, '",')
        self._traits = _join(
            '"traits":{"email":"', user, '@example.com","age_band":"', _names("age_band", people.age_band), '","gender":"',
            _names("gender", people.gender), '","region":"', _names("region", people.region), '"},',
        )  # fmt: skip
        variant = np.where(people.is_treated, "treatment", "control")
        self._exposure = _join(f'"properties":{{"experiment":"{EXPERIMENT}","variant":"', variant, '","propensity":0.5},')

    def block(self, messages: Messages, index: np.ndarray, *, flavour: np.ndarray, received_ms: np.ndarray) -> memoryview:
        """The bytes of these lines, in order."""
        pieces = self._pieces(messages, index, received_ms)
        text = _join(*pieces.values())
        for kind, name in enumerate(MALFORMED, start=2):
            rows = np.flatnonzero(flavour == kind)
            if len(rows):
                spoilt = _spoil(name, {piece: column.take(pa.array(rows)) for piece, column in pieces.items()}, messages.key[index[rows]])
                text = pc.replace_with_mask(text, pa.array(flavour == kind), spoilt)
        return _content(text)

    def _pieces(self, messages: Messages, index: np.ndarray, received_ms: np.ndarray) -> Pieces:
        person, time_ms = messages.person[index], messages.time_ms[index]
        return {
            "head": pa.array(_HEADS).take(pa.array(messages.code[index])),
            "message": _message_ids(messages.key[index]),
            "anonymous": self._anonymous(person, messages.device[index]),
            "user": pc.if_else(pa.array(messages.is_linked[index]), self._user.take(pa.array(person)), ""),
            "timestamp": _join('"timestamp":"', _instant(time_ms), '",'),
            "received": _join('"receivedAt":"', _instant(received_ms), '",'),
            "body": self._bodies(messages, index),
            "context": self._contexts(person, time_ms),
        }

    def _anonymous(self, person: np.ndarray, device: np.ndarray) -> pa.Array:
        key = draws.children(draws.keys(self._shop.seed, "device", person), device + 1)
        return pc.if_else(pa.array(device == SERVER), "", _join('"anonymousId":"', draws.hexadecimal(key), '",'))

    def _contexts(self, person: np.ndarray, time_ms: np.ndarray) -> pa.Array:
        allows = self._people.grants[person] & (time_ms < self._withdrawn_ms[person])
        return pa.array(_CONTEXTS).take(pa.array(allows + 2 * self._people.grants_marketing[person]))

    def _bodies(self, messages: Messages, index: np.ndarray) -> pa.Array:
        """Properties or traits: written code by code, then put back in the lines' order."""
        code = messages.code[index]
        rows = [np.flatnonzero(code == c) for c in range(len(_HEADS))]
        parts = [self._body(c, messages, index[found]) for c, found in enumerate(rows) if len(found)]
        return pa.concat_arrays(parts).take(pa.array(np.argsort(np.concatenate(rows))))

    def _body(self, code: int, messages: Messages, index: np.ndarray) -> pa.Array:
        person = pa.array(messages.person[index])
        match code:
            case _ if code == IDENTIFY:
                return self._traits.take(person)
            case _ if code == EXPOSURE:
                return self._exposure.take(person)
            case _ if code == CONSENT:
                return pa.array(np.full(len(index), '"properties":{},'))
            case _ if code == SEARCH:
                word = draws.choice(messages.key[index], np.full(len(CATEGORIES), 1 / len(CATEGORIES)), 9)
                return _join('"properties":{"query":"', np.array(CATEGORIES)[word], '"},')
            case _ if code in (PURCHASE, REFUND):
                return self._orders.take(pa.array(messages.order[index]))
        product = self._products.take(pa.array(messages.item[index] + self._n_items * messages.is_repriced[index]))
        if code == VIEW:
            return _join('"properties":{', product, "},")
        return _join('"properties":{', product, ',"quantity":', messages.quantity[index], "},")


def _spoil(name: str, pieces: Pieces, key: np.ndarray) -> pa.Array:
    """Malformed lines of this kind. Each has a message id of its own: it repeats nothing."""
    pieces = {**pieces, "message": _message_ids(draws.children(key, 3))}
    if name == "broken_json":
        return _join(pc.utf8_slice_codeunits(_join(*pieces.values()), 0, _BROKEN_AT), "\n")
    return _join(*({**pieces, **_SPOILT[name]}).values())


def _product_pieces(shop: Shop, items: Catalogue) -> pa.Array:
    """(2 * n_items,): the inside of a product's object, at the usual prices and then at those of a covariate drift."""
    cents = np.concatenate([items.price_cents, _repriced(shop, items.price_cents)])
    name, category = np.tile(items.item_id, 2), np.tile(np.array(CATEGORIES)[items.category], 2)
    return _join('"product_id":"', name, '","category":"', category, '","price":', _money(cents))


def _order_pieces(shop: Shop, items: Catalogue, orders: Orders, products: pa.Array) -> pa.Array:
    """(n_orders,): the properties of orders and refunds."""
    late = orders.is_repriced[orders.line_order]
    cents = np.where(late, _repriced(shop, items.price_cents)[orders.line_item], items.price_cents[orders.line_item])
    total = np.bincount(orders.line_order, weights=cents * orders.line_quantity, minlength=len(orders.key)).astype(np.int64)
    line = _join("{", products.take(pa.array(orders.line_item + len(items.item_id) * late)), ',"quantity":', orders.line_quantity, "}")
    ends = np.searchsorted(orders.line_order, np.arange(len(orders.key) + 1))
    listed = pc.binary_join(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), line), ",")
    return _join(
        '"properties":{"order_id":"', draws.hexadecimal(orders.key), '","total":', _money(total),
        ',"currency":"EUR","products":[', listed, "]},",
    )  # fmt: skip


def _repriced(shop: Shop, cents: np.ndarray) -> np.ndarray:
    return np.rint(cents * (1 + shop.strength("covariate"))).astype(np.int64)


def _message_ids(key: np.ndarray) -> pa.Array:
    return _join('"messageId":"', draws.hexadecimal(key), '",')


def _names(column: str, index: np.ndarray) -> np.ndarray:
    return np.asarray(np.array(list(GROUPS[column]))[index])


def _money(cents: np.ndarray) -> pa.Array:
    """Cents as a JSON number with two decimals, exactly."""
    return _join(cents // 100, ".", np.char.zfill(np.arange(100).astype(str), 2)[cents % 100])


def _instant(instant_ms: np.ndarray) -> pa.Array:
    """ISO 8601 with milliseconds. A cast and one replaced character: fifteen times as fast as formatting."""
    text = pa.array(instant_ms, pa.timestamp("ms")).cast(pa.string())
    return _join(pc.binary_replace_slice(text, 10, 11, "T"), "Z")


def _join(*pieces: Any) -> pa.Array:
    """Row by row, the text of the pieces: constants, Arrow or numpy columns."""
    return pc.binary_join_element_wise(*(_text(piece) for piece in pieces), "")


def _text(piece: Any) -> Any:
    if isinstance(piece, np.ndarray):
        piece = pa.array(piece)
    return piece if isinstance(piece, str) else piece.cast(pa.string())


def _content(text: pa.Array) -> memoryview:
    """All rows one after the other, as they lie in the array's buffer."""
    _, offsets, content = text.buffers()
    ends = np.frombuffer(offsets, dtype=np.int32)[text.offset : text.offset + len(text) + 1]
    return memoryview(content)[ends[0] : ends[-1]]
