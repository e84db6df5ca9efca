"""Champion models -> one frozen bundle to answer with. In: the registry's folder. Out: the newest bundle that proved sound.

A new champion is verified (signature, every hash), loaded first in a child process that predicts golden rows, then here,
where its golden predictions must be the same; only then the bundle is swapped, as one object. Whatever fails leaves the last
good model in place and its version is not tried again; where none is in place, because the process has just started, the version that was
used last is loaded. Never loads bytes that were not verified: a damaged model file crashes the process that reads it.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import tasks
from models.bands import band_cuts
from models.classifier import Classifier
from models.recommender import Recommender
from models.stages import Stages
from pipelines import registry
from pipelines.errors import RegistryError
from pipelines.registry import Champion
from serving import last_good, metrics, rehearsal
from serving.fallbacks import MODEL_MISSING, MODEL_REFUSED, NOT_TRAINABLE, trace

log = logging.getLogger("rapport.serving")

TASKS = tasks.declared()  # what can be scored: a file of models/ is enough
RECOMMENDER = "recommender"
HALF_LIFE_DAYS = 90.0  # of interactions, where a recommender's manifest does not tell
PRIOR = 0.5  # what is said where nothing at all is known

Golden = tuple[float, ...]
Rehearse = Callable[[Sequence[tuple[str, Path]]], Mapping[str, Golden]]


@dataclass(frozen=True)
class Scorer:
    """A loaded classifier. `service`: whose features it reads; `cuts`: probabilities from which a band is medium, and high."""

    version: str
    learner: Classifier
    service: str
    prior: float
    cuts: tuple[float, float]


@dataclass(frozen=True)
class Recommending:
    """A loaded recommender with the meaning of its rows: customers and items by position.

    trained_us: up to when it knows what people did, microseconds since 1970; None where its manifest does not tell.
    """

    version: str
    stages: Stages
    customers: Mapping[str, int]
    item_ids: Sequence[str]
    items: Mapping[str, int]
    lengths: NDArray[np.float32]  # (n_items,) of the item factors; 0 where an item has none
    half_life_days: float
    trained_us: int | None

    @property
    def learner(self) -> Recommender:
        """The first stage."""
        return self.stages.first

    def likeness(self, place: int) -> NDArray[np.float32]:
        """The cosine of each item's factors (n_items,) with those of this item; 0 with an item that has none."""
        factors, lengths = self.learner.item_factors_, self.lengths * self.lengths[place]
        found = np.zeros(len(factors), dtype=np.float32)
        np.divide(factors @ factors[place], lengths, out=found, where=lengths > 0)
        return found


@dataclass(frozen=True)
class Bundle:
    """All that answers are made with at one moment. Where a model is missing, `why` may have the cause and `priors` the base rate."""

    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    recommender: Recommending | None = None
    why: Mapping[str, str] = field(default_factory=dict)
    priors: Mapping[str, float] = field(default_factory=dict)

    def version(self, name: str) -> str | None:
        """The version that answers for `name`, None if none does."""
        loaded = self.recommender if name == RECOMMENDER else self.scorers.get(name)
        return loaded.version if loaded else None


class Champions:
    """The bundle in use. Handlers read `bundle` once per request; one watcher calls `refresh`."""

    def __init__(
        self,
        home: Path,
        *,
        rehearse: Rehearse | None = None,
        entries: Callable[[Path], dict[str, dict[str, Any]]] = registry.champions,
        role: str = "champions",
    ) -> None:
        """`entries`: which version of each model it is, as `registry.champions` tells it; `role`: what the log calls them."""
        self.home, self._entries, self._role = home, entries, role
        self._is_answering = entries is registry.champions
        self._noted: dict[str, int] = {}
        self.bundle = Bundle()
        self.refused: set[tuple[str, int]] = set()
        self._amended: dict[str, int] = {}  # how often each version in use had been amended when it was loaded
        self._rehearse = rehearse or rehearse_in_child

    def refresh(self) -> None:
        """Look at the registry and load what changed. Raises nothing: what fails is logged and the last good stays."""
        try:
            entries = self._entries(self.home)
        except RegistryError as error:
            log.error("%s: %s; keeping what is loaded", self._role, error)
            entries = {}
        self._look(entries)
        if self._is_answering:
            self._fill_gaps(entries)
            self._note(entries)

    def _look(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Load what these name and is not in use."""
        bundle = replace(self.bundle, why={**self.bundle.why}, priors={**self.bundle.priors})
        pending: list[Champion] = []
        for name in (*TASKS, RECOMMENDER):
            bundle = self._follow(bundle, name, entries.get(name), pending)
        told = self._rehearsed(pending)
        for champion in pending if told is not None else ():
            bundle = self._take(bundle, champion, (told or {}).get(champion.name))
        self.bundle = bundle

    def _fill_gaps(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Where no version is in use though one should be: look at the one that was used last, unless it was refused or taken back."""
        found = {}
        for name, version in last_good.read(self.home).items():
            entry = entries.get(name, {})
            is_gap = self.bundle.version(name) is None and self.bundle.why.get(name) in (None, MODEL_REFUSED)
            if is_gap and version not in (entry.get("version"), *entry.get("rolled_back", ())) and (name, version) not in self.refused:
                found[name] = {**entry, "version": version}
        if found:
            log.error("%s: of %s the version that was used last is looked at", self._role, ", ".join(found))
            before = self.bundle.why
            self._look(found)
            still = {name: before.get(name) for name in found if self.bundle.version(name) is None}
            why = {name: cause for name, cause in {**self.bundle.why, **still}.items() if cause is not None}
            self.bundle = replace(self.bundle, why=why)

    def _note(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        used = {name: int(version) for name in entries if (version := self.bundle.version(name)) is not None}
        if used != self._noted:
            last_good.note(self.home, used)
            self._noted = used

    def _follow(self, bundle: Bundle, name: str, entry: Mapping[str, Any] | None, pending: list[Champion]) -> Bundle:
        """The bundle with what `entry` says about `name`; a version that has to be loaded is added to `pending`."""
        prior = (entry or {}).get("prior")
        if prior is not None:
            bundle = replace(bundle, priors={**bundle.priors, name: float(prior)})
        if entry is None:  # nothing said: a model in use stays in use
            return bundle
        version = entry.get("version")
        if version is None:
            return _without(bundle, name, NOT_TRAINABLE if entry.get("why") else MODEL_MISSING)
        if str(version) == bundle.version(name) and entry.get("amended", 0) <= self._amended.get(name, 0):
            return bundle
        if (name, version) not in self.refused:
            try:
                pending.append(registry.load_version(self.home, name, version))
            except RegistryError as error:
                self._refuse(name, version, str(error))
            except OSError as error:
                log.error("%s: %s version %s could not be read, the next look tries again: %s", self._role, name, version, error)
        return bundle if bundle.version(name) else _without(bundle, name, MODEL_REFUSED)

    def _rehearsed(self, pending: list[Champion]) -> Mapping[str, Golden] | None:
        """What each model predicted in a process of its own; None where that could not be tried, and is tried again later."""
        if not pending:
            return None
        try:
            return self._rehearse([(champion.name, champion.folder) for champion in pending])
        except Exception as error:
            log.error("%s: the rehearsal could not be held, the next look tries again: %s", self._role, trace(error))
            return None

    def _take(self, bundle: Bundle, champion: Champion, told: Golden | None) -> Bundle:
        """The bundle with this model, if it predicts here what it predicted in the child."""
        name, version = champion.name, champion.version
        if told is None:
            self._refuse(name, version, "it did not survive being loaded in a process of its own")
            return bundle if bundle.version(name) else _without(bundle, name, MODEL_REFUSED)
        try:
            loaded = _load(champion)
            learner = loaded.stages if isinstance(loaded, Recommending) else loaded.learner
            if not np.allclose(golden(learner, champion.manifest), told, rtol=1e-9, atol=1e-12):
                raise ValueError("golden predictions differ from those of the rehearsal")
        except Exception as error:
            self._refuse(name, version, trace(error))
            return bundle if bundle.version(name) else _without(bundle, name, MODEL_REFUSED)
        self._amended[name] = len(champion.manifest.get("amendments", []))
        log.warning("%s: %s version %s is in use now", self._role, name, version)
        why = {other: cause for other, cause in bundle.why.items() if other != name}
        if isinstance(loaded, Recommending):
            return replace(bundle, recommender=loaded, why=why)
        return replace(bundle, scorers={**bundle.scorers, name: loaded}, why=why)

    def _refuse(self, name: str, version: int, reason: str) -> None:
        self.refused.add((name, version))
        metrics.model_refused(name).inc()
        log.error("%s: %s version %s was refused, and is not tried again: %s", self._role, name, version, reason)


def rehearse_in_child(pending: Sequence[tuple[str, Path]]) -> dict[str, Golden]:
    """Load each model in a child process and predict golden rows; the models that came through, with their predictions.

    A child that dies names its culprit: the first model it did not report. The rest get a new child. Raises TimeoutExpired.
    """
    told: dict[str, Golden] = {}
    waiting = list(pending)
    while waiting:
        told |= rehearsal.hold(waiting)
        silent = [i for i, (name, _) in enumerate(waiting) if name not in told]
        waiting = waiting[silent[0] + 1 :] if silent else []
    return told


def golden(learner: Classifier | Stages, manifest: Mapping[str, Any]) -> Golden:
    """The model's predictions on rows that any data could hold, and on those its manifest tells the outcome of.

    Raises ValueError if one is not a usable number, or not what the manifest tells.
    """
    if isinstance(learner, Stages):
        told = manifest.get("golden", {})
        asked, k, at_us = told.get("customers", [0]), int(told.get("k", 1)), int(told.get("at_us", 0))
        values = np.asarray(learner.recommend(np.array(asked, dtype=np.int64), k, at_us=at_us)[1], dtype=np.float64)
        is_sound = bool(np.isfinite(values[:, 0]).all())
        is_sound &= "scores" not in told or bool(np.allclose(values, np.array(told["scores"]).reshape(values.shape), rtol=1e-4, atol=1e-6))
        values = values.ravel()
    else:
        told = manifest.get("golden", {"features": {name: [] for name in learner.feature_names_}, "probability": []})
        known = learner.encode(told["features"])
        edges = np.repeat([[np.nan], [0.0], [1.0], [1e6]], known.shape[1], axis=1)
        asked = np.vstack([known, edges])
        values, explained = learner.predict_values(asked), learner.explain_values(asked)
        alone = np.array([learner.explain_row(row) for row in asked])  # the way of a single customer, which is another one
        is_sound = bool(((values >= 0) & (values <= 1)).all() and np.isfinite(explained).all())
        is_sound &= bool(np.allclose(alone, explained, rtol=1e-4, atol=1e-4))
        is_sound &= bool(np.allclose(values[: len(known)], told["probability"], rtol=1e-6, atol=1e-9))
    if not is_sound:
        raise ValueError("golden predictions are not what they were at training, or not finite probabilities")
    return tuple(float(value) for value in values)


def _learner(name: str, folder: Path) -> Classifier | Stages:
    return Stages.load(folder, is_mapped=True) if name == RECOMMENDER else Classifier.load(folder)


def _without(bundle: Bundle, name: str, cause: str) -> Bundle:
    scorers = {known: scorer for known, scorer in bundle.scorers.items() if known != name}
    recommender = None if name == RECOMMENDER else bundle.recommender
    return replace(bundle, scorers=scorers, recommender=recommender, why={**bundle.why, name: cause})


def _load(champion: Champion) -> Scorer | Recommending:
    learner = _learner(champion.name, champion.folder)
    if isinstance(learner, Stages):
        return _recommending(champion, learner)
    prior = champion.manifest.get("base_rate")
    return Scorer(
        version=str(champion.version),
        learner=learner,
        service=str(champion.manifest.get("feature_service", TASKS[champion.name].feature_service)),
        prior=PRIOR if prior is None else float(prior),
        cuts=band_cuts(learner.threshold_),
    )


def _recommending(champion: Champion, stages: Stages) -> Recommending:
    factors = stages.first.item_factors_
    customer_ids, item_ids = (np.load(champion.folder / f"{name}.npy", allow_pickle=False) for name in ("customer_ids", "item_ids"))
    names, trained = [str(item) for item in item_ids], champion.manifest.get("as_of")
    return Recommending(
        str(champion.version),
        stages,
        {str(customer): i for i, customer in enumerate(customer_ids)},
        names,
        {item: i for i, item in enumerate(names)},
        np.linalg.norm(factors, axis=1),
        float(champion.manifest.get("half_life_days", HALF_LIFE_DAYS)),
        None if trained is None else int(datetime.fromisoformat(trained).timestamp() * 1e6),
    )


def main(pending: Iterable[str]) -> None:
    """The child process: one line of JSON for each model, "name=folder", that came through."""
    for line in pending:
        name, _, folder = line.rstrip("\n").partition("=")
        manifest = json.loads((Path(folder) / registry.MANIFEST).read_bytes())
        sys.stdout.write(json.dumps({"name": name, "golden": golden(_learner(name, Path(folder)), manifest)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.modules["sklearn"] = None  # type: ignore[assignment] # LightGBM imports it where there is one; nothing here needs it
    main(sys.stdin)
