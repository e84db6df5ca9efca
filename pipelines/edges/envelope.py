"""How an event of the log looks as a broker's message, and a broker's message as an event of the port.

In and out: names and values of a message's headers. The body is one Segment call as JSON, nothing around it; the headers are ours and
optional, so that any program may publish a bare body. Never looks into a body.
"""

import re
from collections.abc import Mapping

from pipelines.log.port import Incoming, Logged, Position

SOURCE, MESSAGE_ID, SUBJECTS, RECEIVED = "source", "message_id", "subjects", "received_us"
REASON, TRIES = "reason", "tries"  # of a message that was set aside
DEAD = ".dead"  # is appended to the name of a stream, topic or queue: there lies what was set aside
_WHOLE = re.compile(r"\d{1,17}", re.ASCII)


def headers(event: Incoming | Logged) -> dict[str, str]:
    """What a message says beside its body."""
    return {
        SOURCE: event.source,
        MESSAGE_ID: event.message_id,
        SUBJECTS: " ".join(event.subjects),
        RECEIVED: str(event.received_us),
    }


def aside(event: Logged, reason: str) -> dict[str, str]:
    """What a message that was set aside says beside its body."""
    return {**headers(event), REASON: reason, TRIES: str(event.tries)}


def logged(position: Position, body: bytes, given: Mapping[str, str], *, edge: str, known_as: str, received_us: int, tries: int) -> Logged:
    """A message as it is read. `edge`, `known_as` and `received_us` stand where its headers say no source, id or time of receipt.

    `received_us`: when the broker had it at the latest; a header that claims a later receipt is not believed.
    """
    claimed = given.get(RECEIVED, "")
    return Logged(
        position,
        given.get(SOURCE) or edge,
        tuple(given.get(SUBJECTS, "").split()),
        body,
        min(int(claimed), received_us) if _WHOLE.fullmatch(claimed) else received_us,
        tries,
        given.get(MESSAGE_ID) or known_as,
    )
