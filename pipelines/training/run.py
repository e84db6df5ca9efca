"""One model trained from its labels to its place in the registry, or the reason why it cannot be."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from pipelines import registry, tables
from pipelines.errors import InputError, NotTrainable
from pipelines.settings import Settings
from pipelines.training import classifiers, recommenders
from pipelines.training.publishing import ModelReport, publish

MODELS = ("churn", "intent", "recommender")


def train(name: str, home: Path, *, settings: Settings, as_of: datetime, progress: Callable[[int, int], None] | None = None) -> ModelReport:
    """Train `name` on what `home` knew at `as_of`; killed and run again, it takes up where it was and counts nothing twice.

    progress: called with (trials finished, trials in all). Data that cannot carry the labels are no failure: the report says
    why, and so does the list of champions. Raises InputError on a name that is no model.
    """
    if name not in MODELS:
        raise InputError(f"training: expected one of {', '.join(MODELS)}, found {name!r}")
    tell = progress or (lambda done, total: None)
    try:
        if name == "recommender":
            fitted, run = recommenders.fit(home, settings=settings, as_of=as_of, progress=tell)
        else:
            fitted, run = classifiers.fit(name, home, settings=settings, as_of=as_of, progress=tell)
    except NotTrainable as reason:
        registry.mark_untrainable(home, name, str(reason), reason.prior)
        return ModelReport(name=name, trainable=False, why=str(reason))
    report = publish(home, fitted, run, as_of=as_of)
    if fitted.evidence is not None and report.details["is_champion"]:
        tables.write(home, classifiers.EVIDENCE[name], fitted.evidence)
    return report
