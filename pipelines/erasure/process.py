"""An erasure from its first tombstone to its receipt, however often it is killed in between.

In: who, and in whose name. Out: a receipt. A journal under `erasures/` says which stages are done and, sealed with a key of its own,
who the person is; every stage may be repeated. The order matters: tombstones first, so that nothing comes back; then the log, the
tables and all that was made of them; the keys last, since until then the person's own words tell what to look for. With the keys
goes the journal's, so what is left of it names nobody.
"""

import fcntl
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from pipelines import audit, tables
from pipelines.erasure import models, people, receipts, stores
from pipelines.erasure.people import Person
from pipelines.erasure.receipts import Receipt
from pipelines.erasure.stores import Counts, Task
from pipelines.errors import InputError, PipelineError
from pipelines.identity import graph
from pipelines.settings import Settings
from pipelines.vault import Vault, open_vault

Stage = tuple[str, Callable[[Task], Counts]]

STAGES: tuple[Stage, ...] = (
    ("log", stores.from_log),
    ("messages", stores.from_messages),
    ("quarantine", stores.from_quarantine),
    ("tables", stores.from_tables),
    ("raw files", stores.from_raw_files),
    ("models", stores.from_models),
    ("online store", stores.from_online_store),
    ("requests", stores.from_requests),
    ("served values", stores.from_served),
    ("elsewhere", stores.from_elsewhere),
)
VAULT = "vault"

_WAIT_S = 30.0  # for a run of the loop that is working on the same stores
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Journal:
    """How far an erasure has come. `sealed`: the person; `found`: rows before it began; `done`: stage -> rows removed by store."""

    receipt_id: str
    about: str
    by: str
    as_of: str
    sealed: str
    shared: int
    tombstones: int
    models: Mapping[str, list[int]]
    found: Mapping[str, int]
    done: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """Whose key seals the person: nobody's but this erasure's."""
        return f"erasure:{self.receipt_id}"


def erase(home: Path, who: str, *, settings: Settings, by: str, as_of: datetime) -> Receipt:
    """Forget a person everywhere under the home; the receipt. One who was erased before: the receipt of then.

    who: a customer_id, a pseudonym, or an identifier as the person gives it. by: in whose name, for the audit trail. Finishes
    erasures that were killed first. Raises InputError where nothing is held under this name; PipelineError where a run of the loop
    is in the way, or StoreError where a store refuses: nothing more of the person is taken in by then, and the erasure goes on with
    the next call, of this or of `resume`.
    """
    with _alone(home), closing(open_vault(home, master=settings.master_key)) as vault:
        for journal in _journals(home):
            _finish(home, journal, settings=settings, vault=vault)
        try:
            person = people.find(home, who, vault=vault)
        except InputError:
            earlier = vault.receipt_of([who.strip(), *graph.spellings(who, vault)])
            if earlier is None:
                raise
            return receipts.read(home, earlier)
        journal = _begun(home, person, settings=settings, vault=vault, by=by, as_of=as_of)
        return _finish(home, journal, settings=settings, vault=vault)


def resume(home: Path, *, settings: Settings) -> list[Receipt]:
    """Finish the erasures that were killed; their receipts. Cheap where there are none."""
    if not _journals(home):
        return []
    with _alone(home), closing(open_vault(home, master=settings.master_key)) as vault:
        return [_finish(home, journal, settings=settings, vault=vault) for journal in _journals(home)]


# -- private -----------------------------------------------------------------------------------------------------------


def _begun(home: Path, person: Person, *, settings: Settings, vault: Vault, by: str, as_of: datetime) -> Journal:
    """The journal, on disk before the first tombstone."""
    one = secrets.token_hex(8)
    task = Task(home, settings, vault, person, tuple(people.raw_names(person, vault=vault)))
    journal = Journal(
        receipt_id=one,
        about=audit.digest(home, person.customer_id),
        by=_signing(by, task),
        as_of=as_of.astimezone(UTC).isoformat(),
        sealed=vault.seal([f"erasure:{one}"], [json.dumps(asdict(person)).encode()])[0].hex(),
        shared=len(person.shared),
        tombstones=len(person.names),
        models=models.trained_with(home, person),
        found={**stores.held(task), VAULT: len(vault.facts(person.identifiers))},
    )
    _save(home, journal)
    return journal


def _finish(home: Path, journal: Journal, *, settings: Settings, vault: Vault) -> Receipt:
    """Run the stages that are not done, then sign."""
    person = _person(journal, vault)
    if person is not None:  # else the keys are destroyed already, and the journal's with them
        vault.entomb(person.names, erased_us=_micros(journal.as_of), receipt=journal.receipt_id)
        task = Task(home, settings, vault, person, tuple(people.raw_names(person, vault=vault)), journal.receipt_id)
        with _undisturbed(home):
            journal = _through(home, journal, task)
        vault.forget(people.told_on_shared(person, vault=vault))
    destroyed = vault.destroy([*(person.identifiers if person else ()), journal.subject])
    journal = _noted(home, journal, VAULT, {VAULT: destroyed})
    return _signed(home, journal)


def _through(home: Path, journal: Journal, task: Task) -> Journal:
    for name, remove in STAGES:
        if name not in journal.done:
            journal = _noted(home, journal, name, remove(task))
    return journal


def _noted(home: Path, journal: Journal, stage: str, counts: Mapping[str, int]) -> Journal:
    """The journal with one more stage done, on disk."""
    noted = replace(journal, done={**journal.done, stage: dict(counts)})
    _save(home, noted)
    return noted


def _signed(home: Path, journal: Journal) -> Receipt:
    removed: Counts = dict(journal.found)
    for counts in journal.done.values():
        for store, count in counts.items():
            removed[store] = max(removed.get(store, 0), count)  # a killed stage counts only what it left itself
    receipt = receipts.sign(
        home,
        Receipt(
            receipt_id=journal.receipt_id,
            about=journal.about,
            by=journal.by,
            as_of=journal.as_of,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            stores={store: count for store, count in removed.items() if count},
            models=dict(journal.models),
            tombstones=journal.tombstones,
            shared=journal.shared,
        ),
    )
    receipts.queue_training(home, receipt)
    if not any(entry.details.get("receipt") == receipt.receipt_id for entry in audit.entries(home, receipt.about)):
        audit.record(home, "erase", by=receipt.by, about=receipt.about, details={"receipt": receipt.receipt_id})
    _path(home, journal.receipt_id).unlink()
    return receipt


def _person(journal: Journal, vault: Vault) -> Person | None:
    (told,) = vault.unseal([journal.subject], [bytes.fromhex(journal.sealed)])
    if told is None:
        return None
    found = json.loads(told)
    spells = tuple((str(name), int(since), int(until)) for name, since, until in found["spells"])
    return Person(found["customer_id"], tuple(found["customers"]), tuple(found["identifiers"]), spells)


def _path(home: Path, receipt_id: str) -> Path:
    return receipts.folder(home) / f"{receipt_id}.journal"


def _journals(home: Path) -> list[Journal]:
    return [Journal(**json.loads(path.read_text())) for path in sorted(receipts.folder(home).glob("*.journal"))]


def _save(home: Path, journal: Journal) -> None:
    receipts.replace(_path(home, journal.receipt_id), asdict(journal))


def _signing(by: str, task: Task) -> str:
    """In whose name; people who erase themselves are not named on their own receipt."""
    return "the customer" if stores.naming([*task.raws, *task.person.names]).search(by.encode()) else by


def _micros(as_of: str) -> int:
    return int((datetime.fromisoformat(as_of) - _EPOCH).total_seconds() * 1_000_000)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One erasure at a time; others wait."""
    base = receipts.folder(home)
    base.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (base / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _undisturbed(home: Path) -> Iterator[None]:
    """Nobody writes tables or models meanwhile: neither a run of the loop nor an ingest. Raises PipelineError where a run goes on."""
    (home / "flow").mkdir(parents=True, exist_ok=True)
    with (home / "flow" / "lock").open("a") as file:
        _wait_for(file.fileno(), home)
        with tables.locked(home):
            yield


def _wait_for(handle: int, home: Path) -> None:
    until = time.monotonic() + _WAIT_S
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() > until:
            raise PipelineError(
                f"erasure: a run is working in {home}; nothing new of the person is taken in any more, and the rest is removed "
                "when you erase again after it"
            )
        time.sleep(0.1)
