"""A learner class and two parts of data -> its best hyper-parameters. Optuna, by one process or several; never sees the test.

Trial n is drawn from the seed, n, and the trials up to n - lag, whatever process draws it and whenever: the same data, class, seed and
number of workers give the same answer, also when workers or the whole search were killed and taken up again. One worker knows all
earlier trials (lag 1). Of several each goes ahead while a slower one is at most lag - 1 trials behind, so that they seldom wait.

Of several origins the oldest, which has the fewest rows, is tried first. A trial that is behind the median of the whole trials it knows
of is pruned there, by the same law: what it is held against is settled by its number. Not at boosting rungs: slow learning rates are
behind at every rung and ahead at the end.
"""

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.errors import PipelineError
from pipelines.training.fingerprint import fingerprint
from pipelines.training.study import Storage, Study, open_study
from pipelines.training.workers import is_orphan, run_in

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

POLL_S = 0.02  # between two looks for a trial that may begin
# Whole trials whose median a pruned one is behind, at least. On public sessions of 2 origins the median saved 9 to 23 % of the rows that 12
# trials are fitted to, 11 % of those of 40; the best quarter 19 to 33 % and 24 %, but it loses winners that are not first at every origin.
UNPRUNED = 4

IN_MEMORY = Storage()
OnTrial = Callable[["FrozenTrial"], None]


def tune(
    learner_class: Callable[..., Any],
    train: Any,
    validation: Any,
    *,
    earlier: Sequence[tuple[Any, Any]] = (),
    n_trials: int,
    seed: int,
    storage: Storage = IN_MEMORY,
    workers: int = 1,
    study_name: str | None = None,
    timeout_s: float | None = None,
    fixed: Mapping[str, Any] | None = None,
    suggest: Callable[[Any], dict[str, Any]] | None = None,
    on_trial: OnTrial | None = None,
) -> dict[str, Any]:
    """Hyper-parameters (with `random_state` and `fixed`) of the smallest loss on `validation` among `n_trials`, the defaults first.

    learner_class: a learner of `models`; needs `suggest(trial)`, `fit(*train, validation=...)` and `loss(validation)`.
    train: what `fit` takes before `validation`, a tuple where that is several things. storage: to resume from, and to share with
    other processes that search under the same name. workers: processes, forked from this one where there are several. study_name:
    names data and code; by default the class and a hash of the data. timeout_s: no trial starts later than this; one at least is run.
    fixed: hyper-parameters that are not searched. suggest: the search space, by default the class's own. earlier: further (train,
    validation) pairs, of origins rolled back in time, newest first: a trial's loss is the mean over all of them, so that no single window
    decides. A class with `prepare` and `search_loss` is handed each pair's rows once, not in every trial.
    on_trial: called here with every finished trial, by number, those of an earlier process first. Raises PipelineError where no trial
    gave a finite loss, or a worker failed.
    """
    origins = [(part if isinstance(part, tuple) else (part,), later) for part, later in ((train, validation), *earlier)]
    fixed = {"random_state": seed, **(fixed or {})}
    name = study_name or f"{learner_class.__name__}/{fingerprint(*origins)[:16]}/{seed}"
    search = _Search(
        learner_class,
        [_Origin(learner_class(**fixed), *origin) for origin in reversed(origins)],
        suggest or learner_class.suggest,  # type: ignore[attr-defined]
        fixed=fixed,
        seed=seed,
        n_trials=n_trials,
        lag=2 * workers - 1,  # two workers wait 1 to 6 % of their time, four 4 to 13 %; with rounds of one trial each 14 to 42 %
        stop_at=None if timeout_s is None else time.monotonic() + timeout_s,
        parent=os.getpid(),
    )
    name = search_name(name, workers)
    with tempfile.TemporaryDirectory() as scratch:
        if workers > 1 and not storage.is_shared:
            storage = Storage(journal=Path(scratch) / "journal.log")
        with closing(open_study(name, storage)) as study:
            done = _run(search, study, name, storage, workers=workers, on_trial=on_trial)
    sound = [trial for trial in done.values() if trial.number < n_trials and trial.value is not None]
    if not sound:
        raise PipelineError(f"tuning: none of {n_trials} trials of {learner_class.__name__} gave a finite loss; look at the data of {name}")
    best = min(sound, key=lambda trial: (trial.value, trial.number))
    return dict(best.user_attrs["params"])


def search_name(study: str, workers: int) -> str:
    """What the search of a study is called when this many workers do it: the trials of fewer or more are others."""
    return study if workers == 1 else f"{study}/{workers}"


# -- private -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Origin:
    """Rows to learn from, and later ones to judge by."""

    plain: Any  # a learner of the parameters that are not searched
    train: tuple[Any, ...]
    later: Any

    def loss(self, learner: Any) -> float:
        """Of a learner that has learned nothing yet."""
        if self._prepared is not None:
            return float(learner.search_loss(self._prepared))
        return float(learner.fit(*self.train, validation=self.later).loss(self.later))

    @cached_property
    def _prepared(self) -> Any:
        """Once in each process that needs it: threads do not outlive a fork."""
        return self.plain.prepare(*self.train, validation=self.later) if hasattr(self.plain, "prepare") else None


@dataclass(frozen=True)
class _Search:
    """What is searched, and how far. origins: in the order in which they are tried."""

    learner_class: Callable[..., Any]
    origins: Sequence[_Origin]
    space: Callable[[Any], dict[str, Any]]
    fixed: dict[str, Any]
    seed: int
    n_trials: int
    lag: int
    stop_at: float | None
    parent: int

    def ready(self, done: Mapping[int, Any]) -> list[int] | None:
        """Numbers of the trials that may begin, the first of them first; None where none will any more."""
        is_late = self.stop_at is not None and time.monotonic() > self.stop_at and bool(done)
        absent = [number for number in range(self.n_trials) if number not in done]
        if is_late or is_orphan(self.parent) or not absent:
            return None
        return [number for number in absent if number < absent[0] + self.lag]

    def trial(self, number: int, done: Mapping[int, "FrozenTrial"]) -> "FrozenTrial":
        """Draw this trial, fit it at one origin after the other and tell what came of it."""
        import optuna
        from optuna.trial import TrialState

        draw = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED)
        drawn = optuna.create_study(direction="minimize", sampler=optuna.samplers.TPESampler(seed=draw), pruner=pruner)
        drawn.add_trials([done[known] for known in range(number - self.lag + 1)])
        if number == 0:
            drawn.enqueue_trial(_defaults(self.learner_class))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Fixed parameter")  # a default outside the search space is drawn instead
            trial = drawn.ask()
            params = {**self.fixed, **self.space(trial)}
        losses: list[float] = []
        for step, origin in enumerate(self.origins):
            losses.append(origin.loss(self.learner_class(**params)))
            if not np.isfinite(losses[-1]):
                break
            trial.report(float(np.mean(losses)), step)
            if number and step + 1 < len(self.origins) and trial.should_prune():
                break
        is_whole = len(losses) == len(self.origins) and bool(np.isfinite(losses).all())
        return optuna.trial.create_trial(
            state=TrialState.COMPLETE if is_whole else TrialState.PRUNED,
            value=float(np.mean(losses)) if is_whole else None,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={"params": {key: _plain(value) for key, value in params.items()}},
            intermediate_values=drawn.get_trials(deepcopy=False)[-1].intermediate_values if len(self.origins) > 1 else {},
        )


def _run(search: _Search, study: Study, name: str, storage: Storage, *, workers: int, on_trial: OnTrial | None) -> dict[int, "FrozenTrial"]:
    """The trials when the search has ended."""
    told: set[int] = set()

    def tell(*, is_over: bool = False) -> None:
        done = study.finished()
        for number in sorted(set(done) & set(range(search.n_trials))):
            if number not in told and (is_over or all(before in told for before in range(number))):
                told.add(number)
                if on_trial is not None:
                    on_trial(done[number])

    def work() -> None:
        with closing(open_study(name, storage)) as mine:
            _work(search, mine)

    tell()
    if workers == 1:
        _work(search, study, tell)
    elif search.ready(study.finished()):
        run_in(workers, work, watch=tell)
    tell(is_over=True)
    return study.finished()


def _work(search: _Search, study: Study, tell: Callable[[], None] = lambda: None) -> None:
    """Trial after trial until the search is over; waits while all that may begin are others' work."""
    while (ready := search.ready(done := study.finished())) is not None:
        for number in ready:
            with study.hold(number) as is_mine:
                if not is_mine:
                    continue
                done = study.finished()
                if number not in done:
                    study.add(number, search.trial(number, done))
            tell()
            break
        else:
            time.sleep(POLL_S)


def _defaults(learner_class: Callable[..., Any]) -> dict[str, Any]:
    """The constructor's defaults; Optuna takes those that the search space names."""
    found = signature(learner_class).parameters.values()
    return {p.name: p.default for p in found if p.default is not Parameter.empty and isinstance(p.default, (int, float, str, bool))}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
