"""The event vocabulary: types, the Segment spec's names for them, and the reasons for which a row is refused. Declares; does nothing."""

from datetime import UTC, datetime

TYPES = (
    "view", "cart_add", "cart_remove", "cart_view", "wishlist", "checkout", "search", "purchase", "return",
    "click", "exposure", "identify", "consent", "page", "custom",
)  # fmt: skip
ITEM_TYPES = ("view", "cart_add", "cart_remove", "wishlist", "purchase")  # mean nothing without an item
ORDER_TYPES = ("purchase", "return")  # carry revenue; without an item they are those of a whole order
WEIGHTS = {"purchase": 1.0, "cart_add": 0.5, "view": 0.15}  # how much an event says about taste; a purchase is the unit

# https://segment.com/docs/connections/spec/ecommerce/v2/ ; compared without regard to case. Unknown names are `custom`.
SEGMENT_NAMES = {
    "Product Viewed": "view",
    "Product Added": "cart_add",
    "Product Removed": "cart_remove",
    "Product Added to Wishlist": "wishlist",
    "Wishlist Product Added to Cart": "cart_add",
    "Cart Viewed": "cart_view",
    "Checkout Started": "checkout",
    "Checkout Step Viewed": "checkout",
    "Checkout Step Completed": "checkout",
    "Payment Info Entered": "checkout",
    "Products Searched": "search",
    "Order Completed": "purchase",
    "Order Refunded": "return",
    "Order Cancelled": "return",
    "Product Clicked": "click",
    "Promotion Clicked": "click",
    "Recommendation Clicked": "click",
    "Product List Viewed": "exposure",
    "Promotion Viewed": "exposure",
    "Recommendation Shown": "exposure",
    "Recommendation Viewed": "exposure",
    "Experiment Viewed": "exposure",
    "Consent Updated": "consent",
    "Segment Consent Preference": "consent",
    "Segment Consent Preference Updated": "consent",
}
SEGMENT_CALLS = {"identify": "identify", "alias": "identify", "page": "page", "screen": "page", "group": "custom"}

# In the order in which they are tried: a row is set aside for the first that applies.
REASONS = {
    "not_text": "the line holds bytes that are not text in the file's encoding",
    "too_long": "the line is longer than any event can be",
    "not_json": "the line is not one JSON object",
    "too_deep": "the event is nested more deeply than any event can be",
    "column_count": "the row has another number of columns than the file",
    "unbalanced_quotes": "the row opens a quote that it does not close",
    "type_unknown": "the row's type is not one that the mapping or the Segment spec names",
    "field_missing": "the call lacks a field that the Segment spec demands of its type",
    "field_invalid": "a field of the call is of another kind than the Segment spec says",
    "event_id_missing": "the row has no message id",
    "time_unreadable": "the event's time is missing or cannot be read",
    "time_in_future": "the event lies further after its arrival than a clock may be wrong",
    "time_too_old": "the event lies further before its arrival than events are accepted for",
    "identifier_missing": "the row names no user, anonymous visitor, e-mail address or phone number",
    "item_missing": "the row's type needs an item and names none",
    "order_empty": "the order names neither its products nor what was paid",
    "return_empty": "the return names neither an item nor an order",
    "consent_missing": "the consent event states no purpose",
    "quantity_missing": "the source says how many were bought or returned, and this row does not",
    "quantity_invalid": "the quantity is not a whole number from 1 to 1,000,000",
    "price_invalid": "the price is not a number from 0 to 10,000,000,000",
    "return_unmatched": "nobody bought before what the row returns",
    "tries_used_up": "applying the event failed as often as it may be tried",
    "damaged": "the bytes in the log are not those that were written",
}

UNREADABLE = -(2**62)  # stands for a quantity or price that was given but is not a number
MAX_QUANTITY = 1_000_000
MAX_PRICE_CENTS = 1_000_000_000_000  # times the largest quantity it still fits 64 bits
EARLIEST = datetime(1990, 1, 1, tzinfo=UTC)  # no shop kept events before; a clock that was never set says 1970

# Values that programs send where they know nobody: joining on them would make one person out of thousands.
NOBODY = ("", "null", "none", "nil", "nan", "undefined", "unknown", "anonymous", "guest", "[object object]", "n/a")
