"""One model trained from its labels to its place in the registry, or the reason why it cannot be."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from pipelines import registry
from pipelines.errors import InputError, NotTrainable
from pipelines.settings import Settings
from pipelines.training import classifiers, evidence, recommenders, segments
from pipelines.training.publishing import ModelReport, publish
from pipelines.training.tasks import discover

# Those of the loop; every other task that `models` declares is trained by its name.
MODELS = ("churn", "intent", "recommender", "segments")


def train(name: str, home: Path, *, settings: Settings, as_of: datetime, progress: Callable[[int, int], None] | None = None) -> ModelReport:
    """Train `name` on what `home` knew at `as_of`; killed and run again, it takes up where it was and counts nothing twice.

    progress: called with (trials finished, trials in all). Data that cannot carry the labels are no failure: the report says
    why, and so does the list of champions. Raises InputError on a name that is no model.
    """
    if name not in MODELS and name not in discover():
        raise InputError(f"training: expected one of {', '.join(sorted({*MODELS, *discover()}))}, found {name!r}")
    tell = progress or (lambda done, total: None)
    try:
        if name == segments.NAME:
            fitted, run = segments.fit(home, settings=settings, as_of=as_of, progress=tell)
        elif name == "recommender":
            fitted, run = recommenders.fit(home, settings=settings, as_of=as_of, progress=tell)
        else:
            fitted, run = classifiers.fit(name, home, settings=settings, as_of=as_of, progress=tell)
    except NotTrainable as reason:
        registry.mark_untrainable(home, name, str(reason), reason.prior)
        report = ModelReport(name=name, trainable=False, why=str(reason))
        return _with_members(report, home, settings=settings, as_of=as_of) if name == segments.NAME else report
    report = publish(home, fitted, run, settings=settings, as_of=as_of)
    if fitted.evidence is not None and report.details["is_champion"]:
        evidence.keep(home, name, fitted.evidence)
    return _with_members(report, home, settings=settings, as_of=as_of) if name == segments.NAME else report


def _with_members(report: ModelReport, home: Path, *, settings: Settings, as_of: datetime) -> ModelReport:
    """Everybody's segment is written anew, by the champion that there is now; the report tells how many there are and have moved."""
    told = segments.write(home, settings=settings, as_of=as_of)
    return replace(report, details={**report.details, **told})
