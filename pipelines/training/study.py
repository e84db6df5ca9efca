"""The finished trials of one search, and who works on which trial now: in memory, in a journal file, or on a database server.

A trial is written once, whole, when it is finished: a worker that is killed leaves nothing half done. That it is working on a trial is
known by something that ends with it: a lock of the kernel beside the journal, a heartbeat on a server. Never decides what is tried.
"""

import copy
import fcntl
import hashlib
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.errors import StoreError
from pipelines.settings import TrainingSettings

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

NUMBER = "number"  # the attribute of a stored trial that says which one of the search it is
GRACE_BEATS = 3  # heartbeats that may fail to come before a worker is taken for dead


@dataclass(frozen=True)
class Storage:
    """Where trials are kept: a server (SQLAlchemy's address), else a journal file, else the memory of this process."""

    journal: Path | None = None
    server: str | None = None
    heartbeat_s: int = 10  # between two signs of life of a worker, on a server

    @property
    def is_shared(self) -> bool:
        """Whether other processes can see the trials."""
        return self.journal is not None or self.server is not None


def storage_of(home: Path, settings: TrainingSettings) -> Storage:
    """The server of the settings where they name one, else the home's journal."""
    url = settings.study_url
    return Storage(home / "optuna" / "journal.log", None if url is None else url.get_secret_value(), settings.heartbeat_s)


class Study(Protocol):
    """One search. To be opened by each process for itself, and closed."""

    def finished(self) -> dict[int, "FrozenTrial"]:
        """Finished trials by their number in the search; without a value where the loss was not finite."""

    def add(self, number: int, trial: "FrozenTrial") -> None:
        """Keep a finished trial."""

    def hold(self, number: int) -> Any:
        """A context: True inside it while this process alone works on the trial, False where another does."""

    def close(self) -> None:
        """Let go of everything."""


def open_study(name: str, storage: Storage) -> Study:
    """The search of this name, new where there is none. Raises StoreError where a server cannot be used."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if storage.server is not None:
        return _OnServer(name, storage.server, heartbeat_s=storage.heartbeat_s)
    return _InMemory(name) if storage.journal is None else _InJournal(name, storage.journal)


# -- private -----------------------------------------------------------------------------------------------------------


class _InMemory:
    """Trials of this process, and the part that the other kinds share."""

    def __init__(self, name: str, storage: "optuna.storages.BaseStorage | None" = None) -> None:
        import optuna

        self._study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True, direction="minimize")

    def finished(self) -> dict[int, "FrozenTrial"]:
        from optuna.trial import TrialState

        found: dict[int, FrozenTrial] = {}
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
            number = trial.user_attrs.get(NUMBER)
            if number is not None and number not in found:  # the first one counts: a worker taken for dead may have been slow
                numbered = copy.copy(trial)
                numbered.number = number
                found[number] = numbered
        return found

    def add(self, number: int, trial: "FrozenTrial") -> None:
        trial.set_user_attr(NUMBER, number)
        self._study.add_trial(trial)

    @contextmanager
    def hold(self, number: int) -> Iterator[bool]:
        yield True

    def close(self) -> None:
        pass


class _InJournal(_InMemory):
    """A journal file on this machine. Held is a byte of a file beside it, at the trial's number: the kernel lets go of it with us."""

    def __init__(self, name: str, journal: Path) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend

        journal.parent.mkdir(parents=True, exist_ok=True)
        lock = MendingLock(journal)
        lock.acquire()  # a line that was cut off would stop us from reading
        lock.release()
        backend = JournalFileBackend(str(journal), lock_obj=lock)  # type: ignore[arg-type]
        super().__init__(name, optuna.storages.JournalStorage(backend))
        self._held = os.open(journal.with_name(f"{journal.name}.held"), os.O_RDWR | os.O_CREAT, 0o600)
        self._first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:5], "big") << 20  # of this study's bytes

    @contextmanager
    def hold(self, number: int) -> Iterator[bool]:
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._first + number)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._held, fcntl.LOCK_UN, 1, self._first + number)

    def close(self) -> None:
        os.close(self._held)


class MendingLock:
    """The lock under which a journal is written to. It ends with its process, and cuts off a line that a killed one left unfinished.

    Optuna's own lock file outlives a killed process by half a minute, and its journal refuses a file with a broken line inside.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._file: Any = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._file = self._journal.open("a+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.truncate(self._journal.read_bytes().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let the next one write."""
        self._file.close()


class _OnServer(_InMemory):
    """A database server. Held is a running trial of a second study, as long as its heartbeat is heard."""

    def __init__(self, name: str, url: str, *, heartbeat_s: int) -> None:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with _unwarned():
                self._storage = optuna.storages.RDBStorage(
                    url, engine_kwargs={"pool_pre_ping": True}, heartbeat_interval=heartbeat_s, grace_period=GRACE_BEATS * heartbeat_s
                )
            super().__init__(name, self._storage)
            self._claims = optuna.create_study(study_name=f"{name}/held", storage=self._storage, load_if_exists=True)
        except ImportError as error:
            raise StoreError(f"tuning: training.study_url needs a driver that is not installed ({error}); install it") from error
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:  # their words may hold the password
            raise StoreError(f"tuning: the server of training.study_url could not be used ({type(error).__name__}); see its log") from None
        self._claims_id = self._storage.get_study_id_from_name(f"{name}/held")
        self._heartbeat_s = heartbeat_s

    @contextmanager
    def hold(self, number: int) -> Iterator[bool]:
        import optuna
        from optuna.trial import TrialState

        with _unwarned():
            optuna.storages.fail_stale_trials(self._claims)
        if self._holders(number):
            yield False
            return
        claim = self._storage.create_new_trial(self._claims_id)
        self._storage.record_heartbeat(claim)  # first, so that no claim is without one
        self._storage.set_trial_user_attr(claim, NUMBER, number)
        try:
            # whoever sees another one's claim retreats; of two at once each sees the other's, or one of them does
            with self._beating(claim):
                yield self._holders(number) == 1
        finally:
            with suppress(optuna.exceptions.UpdateFinishedTrialError):
                self._storage.set_trial_state_values(claim, TrialState.FAIL)

    def close(self) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()

    def _holders(self, number: int) -> int:
        from optuna.trial import TrialState

        running = self._claims.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return sum(trial.user_attrs.get(NUMBER) == number for trial in running)

    @contextmanager
    def _beating(self, claim: int) -> Iterator[None]:
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self._heartbeat_s):
                self._storage.record_heartbeat(claim)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextmanager
def _unwarned() -> Iterator[None]:
    """Heartbeats are marked as experimental by Optuna."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
        yield
