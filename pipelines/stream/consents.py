"""What people say about the use of their data, online: statements -> the row of customer_consent, at once.

In: calls with statements, and who is who. Out: a row for each customer whose permission changed: effective for the next request.
Each identifier's word is kept beside Feast's tables, in the same transaction as the row that follows from it; what was said before
the stream, or in files, comes from the table `consents`. As in pipelines/consent.py: the newest word of a customer holds, of two at
one instant the refusal, a declared basis stands until their own first word, and no word is a refusal. A statement that arrives
late never overrides a newer one.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol

from pipelines import consent, engine, tables
from pipelines.errors import StoreError
from pipelines.online.writer import CONSENT_VIEW, OnlineWriter, Row, is_former
from pipelines.settings import ConsentSettings
from pipelines.stream.calls import Call

SCHEMA = """
CREATE TABLE IF NOT EXISTS stream_words (
    identifier TEXT NOT NULL, purpose TEXT NOT NULL, is_stated INTEGER NOT NULL, is_allowed INTEGER NOT NULL,
    since_us INTEGER NOT NULL, said_us INTEGER NOT NULL, PRIMARY KEY (identifier, purpose, is_stated)) WITHOUT ROWID;
"""
Key = tuple[str, str, bool]  # identifier, purpose, whether the person said it themselves

_FEATURE = "is_personalization_allowed"
_AT_A_TIME = 500


class Word(NamedTuple):
    """What an identifier last said. `since_us`: when it first said so; `said_us`: when it last did. Microseconds, UTC."""

    is_allowed: bool
    since_us: int
    said_us: int

    def told(self, made_us: int, *, is_allowed: bool) -> "Word":
        """The word after a statement made then, arriving in any order."""
        if is_allowed == self.is_allowed:
            return Word(is_allowed, self.since_us, max(self.said_us, made_us))
        if made_us > self.said_us or (made_us == self.said_us and not is_allowed):
            return Word(is_allowed, made_us, made_us)
        # interrupted, and said again later; or older than all of it
        return Word(self.is_allowed, self.said_us, self.said_us) if made_us >= self.since_us else self


class Stored(Protocol):
    """The table `consents`."""

    @property
    def version(self) -> str:
        """Of what `words` tells."""

    def words(self, identifiers: Sequence[str]) -> Sequence[tuple[str, str, bool, bool, int]]:
        """The newest of these: identifier, purpose, whether they said it themselves, whether it is allowed, when (microseconds)."""


class Table:
    """It as it is published; asked for each question, which takes as long as the table is."""

    version = ""

    def __init__(self, home: Path) -> None:
        self.home = home

    def words(self, identifiers: Sequence[str]) -> Sequence[tuple[str, str, bool, bool, int]]:
        """See Stored. Raises StoreError where another version was published meanwhile."""
        import duckdb
        import pyarrow as pa

        with closing(engine.connect(self.home, threads=1, memory_limit="512MB")) as db:
            db.register("asked", pa.table({"identifier": pa.array(identifiers, pa.string())}))
            theirs = f"SELECT * FROM ({tables.rows_sql(self.home, tables.CONSENTS)}) SEMI JOIN asked USING (identifier)"
            try:
                return db.execute(consent.newest_sql(theirs)).fetchall()
            except duckdb.Error as error:
                raise StoreError("stream: the table consents could not be read; ask again") from error


class Consents:
    """The words of one home. Everything is called inside a transaction of the writer."""

    def __init__(self, stored: Stored, *, settings: ConsentSettings) -> None:
        self.stored, self.purpose, self.purposes = stored, settings.purpose, settings.purposes
        self._version = ""  # of the table that was looked at
        self._looked_at: set[str] = set()

    def hear(self, online: OnlineWriter, calls: Sequence[Call]) -> set[str]:
        """Keep what the calls say; returns the identifiers whose word is another than before."""
        told = [
            ((call.subjects[0], purpose, True), call.event_us, is_allowed)
            for call in calls
            for purpose, is_allowed in call.said.items()
            if call.subjects and purpose in self.purposes
        ]
        names = list(dict.fromkeys(name for (name, _, _), _, _ in told))
        changed = self.recall(online, names)
        words = _read(online, names)
        for key, made_us, is_allowed in told:
            before = words.get(key)
            after = before.told(made_us, is_allowed=is_allowed) if before else Word(is_allowed, made_us, made_us)
            if before is None or (before.is_allowed, before.since_us) != (after.is_allowed, after.since_us):
                changed.add(key[0])
            words[key] = after
        _write(online, {key: words[key] for key, _, _ in told})
        return changed

    def recall(self, online: OnlineWriter, identifiers: Sequence[str]) -> set[str]:
        """Take over what the table `consents` has of these identifiers, unless it was since its last version; returns those changed."""
        if self.stored.version != self._version:
            self._version, self._looked_at = self.stored.version, set()
        unknown = [name for name in identifiers if name not in self._looked_at]
        if not unknown:
            return set()
        stored = {
            (name, purpose, is_stated): Word(is_allowed, made_us, made_us)
            for name, purpose, is_stated, is_allowed, made_us in self.stored.words(unknown)
            if purpose in self.purposes
        }
        held = _read(online, unknown) if stored else {}
        newer = {key: word for key, word in stored.items() if key not in held or held[key].said_us < word.since_us}
        _write(online, newer)
        self._looked_at.update(unknown)
        return {name for name, _, _ in newer}

    def decide(self, online: OnlineWriter, customers: Sequence[str], *, known_us: int) -> int:
        """Write what follows for these customers, where it is not what is there; returns the rows written.

        All that the tables say was looked at just now, so the row is made newer than whatever is there.
        """
        if not customers:
            return 0
        shown = online.read(CONSENT_VIEW, _FEATURE, list(customers))
        rows = []
        for customer, allowed in self.state(online, customers).items():
            text, since_us = shown.get(customer, (None, 0))
            if self.purpose in allowed and text != str(allowed[self.purpose]):
                rows.append(Row(customer, {_FEATURE: allowed[self.purpose]}, event_us=max(known_us, since_us)))
        return online.write(CONSENT_VIEW, rows)

    def state(self, online: OnlineWriter, customers: Iterable[str]) -> dict[str, dict[str, bool]]:
        """Customer -> purpose -> what holds; a purpose on which nothing was ever said is left out."""
        names = {customer: [n for n in some if not is_former(n)] for customer, some in online.identifiers_of(list(customers)).items()}
        every = [name for some in names.values() for name in some]
        self.recall(online, every)
        words = _read(online, every)
        by_name: dict[str, list[tuple[str, bool, Word]]] = {}
        for (name, purpose, is_stated), word in words.items():
            by_name.setdefault(name, []).append((purpose, is_stated, word))
        return {customer: _permissions([told for name in some for told in by_name.get(name, [])]) for customer, some in names.items()}

    def look_again(self) -> None:
        """A transaction was rolled back: what it took over from the table is to be taken over again."""
        self._looked_at.clear()

    def forget(self, online: OnlineWriter, identifiers: Sequence[str]) -> None:
        """Delete their words."""
        online.db.executemany("DELETE FROM stream_words WHERE identifier = ?", [(name,) for name in identifiers])
        self._looked_at.difference_update(identifiers)


def permission(words: Sequence[tuple[bool, Word]]) -> bool:
    """What holds of the words of one customer's identifiers on one purpose (is_stated, word), of which there is one at least."""
    told = [word for is_stated, word in words if is_stated] or [word for _, word in words]
    return max(told, key=lambda word: (word.since_us, not word.is_allowed)).is_allowed


def _permissions(told: Sequence[tuple[str, bool, Word]]) -> dict[str, bool]:
    purposes = sorted({purpose for purpose, _, _ in told})
    return {name: permission([(is_stated, word) for purpose, is_stated, word in told if purpose == name]) for name in purposes}


def _read(online: OnlineWriter, identifiers: Sequence[str]) -> dict[Key, Word]:
    found: dict[Key, Word] = {}
    for start in range(0, len(identifiers), _AT_A_TIME):
        some = identifiers[start : start + _AT_A_TIME]
        columns = "identifier, purpose, is_stated, is_allowed, since_us, said_us"
        rows = online.db.execute(f"SELECT {columns} FROM stream_words WHERE identifier IN ({','.join('?' * len(some))})", some)
        found |= {(name, purpose, bool(stated)): Word(bool(allowed), since, said) for name, purpose, stated, allowed, since, said in rows}
    return found


def _write(online: OnlineWriter, words: Mapping[Key, Word]) -> None:
    rows = [(*key, word.is_allowed, word.since_us, word.said_us) for key, word in words.items()]
    online.db.executemany("INSERT OR REPLACE INTO stream_words VALUES (?, ?, ?, ?, ?, ?)", rows)
