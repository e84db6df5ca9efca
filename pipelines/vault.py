"""Raw identifiers -> keyed pseudonyms; personal bytes -> sealed cells that only their person's key opens.

In: what people are called, and what was said of them. Out: pseudonyms that mean nothing without this home's key, and cells that
mean nothing once the person's key is destroyed, wherever copies of them lie. Keys, the stated facts and the tombstones of erased
people are in `vault/vault.db`, wrapped by the master key (`RAPPORT_MASTER_KEY`, else `keys/master.key`).
Never writes a raw identifier or an unwrapped key to disk, and of an erased person keeps a keyed hash of the pseudonym alone.
"""

import functools
import hashlib
import hmac
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from pipelines.errors import StoreError
from pipelines.keyfile import kept
from pipelines.private_file import open_private, sweep, transaction
from pipelines.pseudonyms import HEX_DIGITS, as_bytes, keyed_hash, keyed_hash_sql, normalised, normalised_sql, pads

if TYPE_CHECKING:
    import duckdb

__all__ = [
    "HEX_DIGITS", "IDENTIFIERS", "MASTER", "NOBODY", "Fact", "Vault", "normalised", "normalised_sql", "open_vault", "pseudonym_sql",
    "tombstone_sql",
]  # fmt: skip

IDENTIFIERS = ("user_id", "email", "phone", "anonymous_id")  # the first that an event names is the subject whose key seals it
MASTER = "master.key"  # the file of the home's own master key
NOBODY = "nobody"  # the subject of bytes that name no person
_NONCE = 12
_CACHED_KEYS = 200_000
_AT_A_TIME = 20_000
_TOMB = "tombstone"  # the kind under which pseudonyms are hashed once more

_Place = tuple[str, str, str, bytes]  # of a fact: subject, kind, source, keyed hash of the value

_SCHEMA = """
CREATE TABLE IF NOT EXISTS secrets (name TEXT PRIMARY KEY, wrapped BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS keys (subject TEXT PRIMARY KEY, wrapped BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (
    subject TEXT NOT NULL, kind TEXT NOT NULL, source TEXT NOT NULL, digest BLOB NOT NULL,
    event_us INTEGER NOT NULL, sealed BLOB NOT NULL, PRIMARY KEY (subject, kind, source, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tombstones (mark TEXT PRIMARY KEY, erased_us INTEGER NOT NULL, receipt TEXT NOT NULL) WITHOUT ROWID;
"""
_KEEP_FACT = "INSERT INTO facts VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET event_us = max(event_us, excluded.event_us)"


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that a source said of a person. `kind`: of IDENTIFIERS, or a trait such as `first_name`; `event_us`: the newest time."""

    subject: str
    kind: str
    value: str
    source: str
    event_us: int


class Vault:
    """The vault of one home. Safe to use from several threads and processes; `close` it at the end."""

    def __init__(self, path: Path, master: bytes) -> None:
        self.path = path
        self._master = _wrapper(master)
        self._lock = threading.RLock()
        self._keys: dict[str, bytes] = {}
        self._seen = 0  # destructions that the keys in memory take account of
        self._db = open_private(path, _SCHEMA, room="vault")
        try:
            self._pseudonym_key = self._secret("pseudonym")
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # -- pseudonyms

    def pseudonym(self, kind: str, value: str) -> str:
        """ "kind:" and the keyed hash of the normalised value; equal values of one kind, equal pseudonyms.

        A value whose normalised form is empty names nobody: ask `normalised` first, its SQL twin gives null.
        """
        return f"{kind}:{keyed_hash(self._pseudonym_key, kind, normalised(kind, value))}"

    def bind(self, db: "duckdb.DuckDBPyConnection") -> None:
        """Make `pseudonym_sql` work on this connection. The key is a variable of it, never part of a statement's text."""
        for name, pad in pads(self._pseudonym_key).items():
            db.execute(f"SET VARIABLE {name} = ?::BLOB", [pad])

    # -- sealed cells

    def seal(self, subjects: Sequence[str], cells: Sequence[bytes]) -> list[bytes]:
        """Each cell, readable only with its subject's key. Missing keys are made, and are on disk before this returns.

        A cell of an erased person is sealed with a key that is nowhere kept. Raises StoreError where the vault cannot be written.
        """
        cipher = _ciphers(self._keys_of(subjects, make=True))
        noise = os.urandom(_NONCE * len(cells))
        nonces = (noise[at : at + _NONCE] for at in range(0, len(noise), _NONCE))
        every = zip(subjects, cells, nonces, strict=True)
        return [nonce + cipher(subject).encrypt(nonce, cell, subject.encode()) for subject, cell, nonce in every]

    def unseal(self, subjects: Sequence[str], sealed: Sequence[bytes]) -> list[bytes | None]:
        """What the cells hold; None where the subject's key was destroyed, or the bytes are not what was sealed."""
        keys = self._keys_of(subjects, make=False)
        cipher = _ciphers(keys)
        return [
            _opened(cipher(subject), cell, subject) if subject in keys else None for subject, cell in zip(subjects, sealed, strict=True)
        ]

    # -- facts

    def remember(self, facts: Iterable[Fact]) -> int:
        """Keep each fact once, sealed; a fact told again only gets its newer time. Returns the facts that are new.

        Facts of erased people are passed over.
        """
        newest: dict[_Place, Fact] = {}
        for fact in facts:
            place = (fact.subject, fact.kind, fact.source, self._digest(fact))
            if place not in newest or newest[place].event_us < fact.event_us:
                newest[place] = fact
        known = self._known({place[0] for place in newest})
        fresh = {place: fact for place, fact in newest.items() if place not in known}
        later = [
            (fact.event_us, *place, fact.event_us) for place, fact in newest.items() if known.get(place, fact.event_us) < fact.event_us
        ]
        if not fresh and not later:
            return 0
        sealed = self.seal([fact.subject for fact in fresh.values()], [as_bytes(fact.value) for fact in fresh.values()])
        with self._write() as db:
            erased = self.entombed(fact.subject for fact in fresh.values())
            rows = [(*at, fact.event_us, cell) for (at, fact), cell in zip(fresh.items(), sealed, strict=True) if at[0] not in erased]
            db.executemany(_KEEP_FACT, rows)
            db.executemany("UPDATE facts SET event_us = ? WHERE (subject, kind, source, digest) = (?, ?, ?, ?) AND event_us < ?", later)
        return len(rows)

    def facts(self, subjects: Sequence[str] | None = None) -> list[Fact]:
        """What is known of the subjects (all people where None), by subject, kind and time; sealed cells of lost keys are left out."""
        columns = "subject, kind, source, event_us, sealed"
        with self._lock:
            rows = self._select(f"SELECT {columns} FROM facts", "subject", subjects)
        opened = self.unseal([row[0] for row in rows], [row[4] for row in rows])
        found = [Fact(row[0], row[1], _text(cell), row[2], row[3]) for row, cell in zip(rows, opened, strict=True) if cell is not None]
        return sorted(found, key=lambda fact: (fact.subject, fact.kind, fact.event_us, fact.source))

    def forget(self, facts: Sequence[Fact]) -> int:
        """Remove these facts, and not their subjects' keys; `destroy` after it sweeps the bytes. Returns the facts removed."""
        places = [(fact.subject, fact.kind, fact.source, self._digest(fact)) for fact in facts]
        with self._write() as db:
            return sum(
                db.execute("DELETE FROM facts WHERE (subject, kind, source, digest) = (?, ?, ?, ?)", place).rowcount for place in places
            )

    # -- erasure

    def entomb(self, subjects: Sequence[str], *, erased_us: int, receipt: str) -> int:
        """From now on nothing of these subjects is taken in; returns the new tombstones. Comes first in an erasure: see `destroy`."""
        rows = [(mark, erased_us, receipt) for mark in self._marks(subjects)]
        with self._write() as db:
            return sum(db.execute("INSERT OR IGNORE INTO tombstones VALUES (?, ?, ?)", row).rowcount for row in rows)

    def entombed(self, subjects: Iterable[str]) -> frozenset[str]:
        """Which of the subjects are erased people. For many rows in SQL: `tombstones` and `tombstone_sql`."""
        with self._lock:
            if not self._db.execute("SELECT 1 FROM tombstones LIMIT 1").fetchone():
                return frozenset()
            marks = self._marks(set(subjects))
            found = self._select("SELECT mark FROM tombstones", "mark", list(marks))
        return frozenset(marks[mark] for (mark,) in found)

    def tombstones(self) -> list[str]:
        """The mark of every erased subject, as `tombstone_sql` makes it of a pseudonym. The pseudonym cannot be had back."""
        with self._lock:
            return [mark for (mark,) in self._db.execute("SELECT mark FROM tombstones")]

    def receipt_of(self, subjects: Iterable[str]) -> str | None:
        """The receipt of the erasure that entombed any of the subjects."""
        with self._lock:
            found = self._select("SELECT receipt FROM tombstones", "mark", list(self._marks(subjects)))
        return found[0][0] if found else None

    def destroy(self, subjects: Sequence[str]) -> int:
        """Remove the subjects' keys and facts, for good; returns the rows removed. Their bytes leave the files too.

        Raises StoreError where another process uses the vault for so long that old bytes stay: do it again then.
        """
        removed = 0
        with self._write() as db:
            for table in ("facts", "keys"):
                for some in _pieces(subjects):
                    removed += db.execute(f"DELETE FROM {table} WHERE subject IN ({_places(some)})", some).rowcount
            db.execute(f"PRAGMA user_version = {self._destructions() + 1}")  # tells other processes to forget the keys they hold
        self._sweep()
        return removed

    def rotate(self, master: bytes) -> int:
        """Wrap every key anew under another master key; pseudonyms and sealed cells stay as they are. Returns the keys wrapped.

        Other open vaults keep reading, but cannot make keys until they are opened with the new one.
        """
        fresh, count = _wrapper(master), 0
        with self._write() as db:
            for table, column in (("secrets", "name"), ("keys", "subject")):
                rows = db.execute(f"SELECT {column}, wrapped FROM {table}").fetchall()
                wrapped = [(_wrap(fresh, name, self._unwrap(name, cell)), name) for name, cell in rows]
                db.executemany(f"UPDATE {table} SET wrapped = ? WHERE {column} = ?", wrapped)
                count += len(rows)
        self._master = fresh
        return count

    # -- private

    def _marks(self, subjects: Iterable[str]) -> dict[str, str]:
        """Tombstone -> subject."""
        return {keyed_hash(self._pseudonym_key, _TOMB, subject): subject for subject in subjects}

    def _sweep(self) -> None:
        """Leave no byte of destroyed keys."""
        with self._lock:
            sweep(self._db, self.path, room="vault")

    def _secret(self, name: str) -> bytes:
        query = "SELECT wrapped FROM secrets WHERE name = ?"
        found = self._db.execute(query, (name,)).fetchone()
        if found is None:
            with self._write() as db:  # another process may be first
                db.execute("INSERT OR IGNORE INTO secrets VALUES (?, ?)", (name, _wrap(self._master, name, secrets.token_bytes(32))))
            found = self._db.execute(query, (name,)).fetchone()
        return self._unwrap(name, found[0])

    def _unwrap(self, name: str, wrapped: bytes) -> bytes:
        try:
            return self._master.decrypt(wrapped[:_NONCE], wrapped[_NONCE:], name.encode())
        except InvalidTag:
            raise StoreError(
                f"vault: {self.path} was written under another master key than the one given; "
                "set RAPPORT_MASTER_KEY to that one, or put its keys/master.key back"
            ) from None

    def _digest(self, fact: Fact) -> bytes:
        return hmac.digest(self._pseudonym_key, as_bytes(f"fact {fact.subject} {fact.kind} {fact.value}"), "sha256")[:16]

    def _keys_of(self, subjects: Sequence[str], *, make: bool) -> dict[str, bytes]:
        wanted = set(subjects)
        with self._lock:
            self._forget_destroyed()
            missing = [subject for subject in wanted if subject not in self._keys]
            if len(self._keys) + len(missing) > _CACHED_KEYS:
                self._keys.clear()
                missing = list(wanted)
            found = {subject: self._keys[subject] for subject in wanted if subject in self._keys} | self._load(missing)
            self._keys |= found
            if make and len(found) < len(wanted):
                found |= self._made([subject for subject in missing if subject not in found])
        return found

    def _made(self, subjects: Sequence[str]) -> dict[str, bytes]:
        noise = os.urandom(32 * len(subjects))
        made = {subject: noise[at * 32 : at * 32 + 32] for at, subject in enumerate(subjects)}
        with self._write() as db:
            self._secret("pseudonym")  # the master key may have been rotated by another process: a key wrapped by ours would be lost
            made |= self._load(subjects)  # another process may have been first
            erased = self.entombed(subjects)
            kept = {subject: key for subject, key in made.items() if subject not in erased}
            rows = [(subject, _wrap(self._master, subject, key)) for subject, key in kept.items()]
            db.executemany("INSERT OR IGNORE INTO keys VALUES (?, ?)", rows)
        self._keys |= kept
        return made

    def _load(self, subjects: Sequence[str]) -> dict[str, bytes]:
        rows = self._select("SELECT subject, wrapped FROM keys", "subject", subjects)
        return {subject: self._unwrap(subject, wrapped) for subject, wrapped in rows}

    def _forget_destroyed(self) -> None:
        if self._seen != (now := self._destructions()):
            self._keys.clear()
            self._seen = now

    def _destructions(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _known(self, subjects: Iterable[str]) -> dict[_Place, int]:
        with self._lock:
            rows = self._select("SELECT subject, kind, source, digest, event_us FROM facts", "subject", sorted(subjects))
        return {(subject, kind, source, digest): event_us for subject, kind, source, digest, event_us in rows}

    def _select(self, query: str, column: str, values: Sequence[str] | None) -> list[tuple]:
        if values is None:
            return self._db.execute(query).fetchall()
        pieces = (self._db.execute(f"{query} WHERE {column} IN ({_places(some)})", some).fetchall() for some in _pieces(values))
        return [row for rows in pieces for row in rows]

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._lock, transaction(self._db, self.path, room="vault") as db:
            yield db


def open_vault(home: Path, *, master: SecretStr | None = None) -> Vault:
    """The vault of the home; made on first use. `master`: settings.master_key. Raises StoreError for a key that is not its own."""
    try:
        key = master.get_secret_value() if master else kept(home / "keys" / MASTER, lambda: secrets.token_urlsafe(32))
    except OSError as error:
        raise StoreError(f"vault: {home / 'keys'} could not be used ({error}); mend its rights, or set RAPPORT_MASTER_KEY") from error
    return Vault(home / "vault" / "vault.db", key.encode())


def pseudonym_sql(kind: str, text: str) -> str:
    """SQL: the hash of a pseudonym, without its kind, of an expression; null for null. Needs `Vault.bind` on the connection."""
    return keyed_hash_sql(kind, normalised_sql(kind, text))


def tombstone_sql(subject: str) -> str:
    """SQL: the mark that the pseudonym `subject` has among `Vault.tombstones` if it is erased. Needs `Vault.bind`."""
    return keyed_hash_sql(_TOMB, subject)


def _wrapper(master: bytes) -> AESGCM:
    return AESGCM(hashlib.sha256(b"rapport wrap " + master).digest())


def _wrap(master: AESGCM, name: str, key: bytes) -> bytes:
    nonce = os.urandom(_NONCE)
    return nonce + master.encrypt(nonce, key, name.encode())


def _ciphers(keys: Mapping[str, bytes]) -> Callable[[str], AESGCM]:
    """Subject -> its cipher. Some are kept, since cells of one person come together; one takes 2.4 kB and 3 us."""
    return functools.lru_cache(maxsize=4096)(lambda subject: AESGCM(keys[subject]))


def _opened(cipher: AESGCM, cell: bytes, subject: str) -> bytes | None:
    try:
        return cipher.decrypt(cell[:_NONCE], cell[_NONCE:], subject.encode())
    except (InvalidTag, ValueError):  # the latter for bytes too few to be a cell
        return None


def _text(cell: bytes) -> str:
    return cell.decode(errors="surrogatepass")


def _places(values: Sequence[str]) -> str:
    return ",".join("?" * len(values))


def _pieces(values: Sequence[str]) -> Iterator[list[str]]:
    every = list(values)
    for start in range(0, len(every), _AT_A_TIME):
        yield every[start : start + _AT_A_TIME]
