"""A learner class and two parts of data -> its best hyper-parameters. Optuna on a journal file; never sees the test.

The same data, class and seed give the same answer, also when the search was killed half-way and taken up again: trial n is
drawn from (seed, the n finished trials before it), whatever process draws it. One process works on a study at a time.
"""

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from pipelines.errors import PipelineError

if TYPE_CHECKING:
    import optuna


def tune(
    learner_class: Callable[..., Any],
    train: Any,
    validation: Any,
    *,
    earlier: Sequence[tuple[Any, Any]] = (),
    n_trials: int,
    seed: int,
    journal: Path | None = None,
    study_name: str | None = None,
    timeout_s: float | None = None,
    fixed: Mapping[str, Any] | None = None,
    suggest: Callable[[Any], dict[str, Any]] | None = None,
    on_trial: Callable[["optuna.trial.FrozenTrial"], None] | None = None,
) -> dict[str, Any]:
    """Hyper-parameters (with `random_state` and `fixed`) of the smallest loss on `validation` among `n_trials`, the defaults first.

    learner_class: a learner of `models`; needs `suggest(trial)`, `fit(*train, validation=...)` and `loss(validation)`.
    train: what `fit` takes before `validation`, a tuple where that is several things. journal: file to resume from; none
    keeps the search in memory. study_name: names data and code; by default the class and a hash of the data. timeout_s: no
    trial starts later than this; one at least is run. fixed: hyper-parameters that are not searched. suggest: the search space, by
    default the class's own. earlier: further (train, validation) pairs, of origins rolled back in time: a trial's loss is the mean over
    all of them, so that no single window decides. on_trial: called with
    every finished trial, those of an earlier process first. Raises PipelineError where no trial gave a finite loss.
    """
    origins = [(part if isinstance(part, tuple) else (part,), later) for part, later in ((train, validation), *earlier)]
    name = study_name or f"{learner_class.__name__}/{fingerprint(*origins)[:16]}/{seed}"
    space = suggest or learner_class.suggest  # type: ignore[attr-defined]
    study = _open_study(name, journal)
    stop_at = None if timeout_s is None else time.monotonic() + timeout_s
    done = _finished(study)
    for trial in done:
        _tell(on_trial, trial)
    for _ in range(n_trials - len(done)):
        if done and stop_at is not None and time.monotonic() > stop_at:
            break
        _run_trial(study, learner_class, origins, space, fixed={"random_state": seed, **(fixed or {})}, n_finished=len(done))
        finished = _finished(study)
        for trial in finished[len(done) :]:
            _tell(on_trial, trial)
        done = finished
    sound = [trial for trial in done[:n_trials] if trial.value is not None]
    if not sound:
        raise PipelineError(f"tuning: none of {n_trials} trials of {learner_class.__name__} gave a finite loss; look at the data of {name}")
    best = min(sound, key=lambda trial: (trial.value, trial.number))
    return dict(best.user_attrs["params"])


def fingerprint(*parts: Any) -> str:
    """SHA-256 over the content of frames, arrays, sparse matrices, and tuples of them: values, names, types and order."""
    digest = hashlib.sha256()
    for part in parts:
        _feed(digest, part)
    return digest.hexdigest()


# -- private -----------------------------------------------------------------------------------------------------------


def _open_study(name: str, journal: Path | None) -> "optuna.Study":
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = None
    if journal is not None:
        journal.parent.mkdir(parents=True, exist_ok=True)
        _mend(journal)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True, direction="minimize")
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # its process is gone: a journal has no heartbeat
    return study


def _mend(journal: Path) -> None:
    """Cut off a half-written last line: Optuna would glue the next record to it and then refuse the file.

    Under Optuna's own lock: a line that another search is just writing is none of a dead one.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    if _is_whole(journal):
        return
    lock = JournalFileSymlinkLock(str(journal))
    lock.acquire()
    try:
        if not _is_whole(journal):
            with journal.open("r+b") as file:
                file.truncate(journal.read_bytes().rfind(b"\n") + 1)
    finally:
        lock.release()


def _is_whole(journal: Path) -> bool:
    content = journal.read_bytes() if journal.exists() else b""
    return not content or content.endswith(b"\n")


def _run_trial(
    study: "optuna.Study",
    learner_class: Callable[..., Any],
    origins: Sequence[tuple[tuple[Any, ...], Any]],
    space: Callable[[Any], dict[str, Any]],
    *,
    fixed: dict[str, Any],
    n_finished: int,
) -> None:
    import optuna

    def objective(trial: "optuna.Trial") -> float:
        params = {**fixed, **space(trial)}
        trial.set_user_attr("params", {key: _plain(value) for key, value in params.items()})
        losses = [learner_class(**params).fit(*data, validation=later).loss(later) for data, later in origins]
        loss = float(np.mean(losses))
        if not np.isfinite(loss):
            raise optuna.TrialPruned
        return loss

    if n_finished == 0 and not study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
        study.enqueue_trial(_defaults(learner_class))
    draw = int(np.random.SeedSequence([fixed["random_state"], n_finished]).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=draw)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Fixed parameter")  # a default outside the search space is drawn instead
        study.optimize(objective, n_trials=1)


def _defaults(learner_class: Callable[..., Any]) -> dict[str, Any]:
    """The constructor's defaults; Optuna takes those that the search space names."""
    found = signature(learner_class).parameters.values()
    return {p.name: p.default for p in found if p.default is not Parameter.empty and isinstance(p.default, (int, float, str, bool))}


def _finished(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    """Trials that came to an end, in order; without a value where the loss was not finite."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _tell(on_trial: Callable[["optuna.trial.FrozenTrial"], None] | None, trial: "optuna.trial.FrozenTrial") -> None:
    if on_trial is not None:
        on_trial(trial)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _feed(digest: Any, part: Any) -> None:
    if isinstance(part, (tuple, list)):
        for piece in part:
            _feed(digest, piece)
    elif isinstance(part, pd.DataFrame):
        digest.update(repr([(name, str(kind)) for name, kind in part.dtypes.items()]).encode())
        digest.update(pd.util.hash_pandas_object(part, index=False).to_numpy().tobytes())
    elif isinstance(part, pd.Series):
        _feed(digest, part.to_frame("series"))
    elif sparse.issparse(part):
        matrix = part.tocsr()
        _feed(digest, (np.asarray(matrix.shape), matrix.indptr, matrix.indices, matrix.data))
    elif isinstance(part, np.ndarray):
        digest.update(f"{part.dtype}{part.shape}".encode())
        digest.update(repr(part.tolist()).encode() if part.dtype == object else np.ascontiguousarray(part).tobytes())
    else:
        digest.update(repr(part).encode())
