"""A fitted and tested learner -> a signed version, its record in MLflow, and the decision who is champion.

Each step finds what an interrupted earlier run already did: nothing is registered, logged or counted twice.
"""

import hashlib
import importlib.metadata
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.evaluation import Interval
from pipelines import consent, registry, tables, tracking, verdicts
from pipelines.code_version import code_version
from pipelines.errors import RegistryError
from pipelines.registry import Champion
from pipelines.settings import Settings
from pipelines.training.gate import Check, Verdict


@dataclass(frozen=True)
class ModelReport:
    """What training one model came to. Without labels `trainable` is False and `why` says what they lack.

    value, rival_value, optimum: `metric` on the same test rows, higher is better. low, high: interval of value minus
    rival_value, resampled by customer. baselines: every simple way to do it, the rival first: name, value, the model's lead over
    it with low and high. champion: the version that this one was held against, if there was one: version, its value on the same
    rows, low and high of the lead. version: the one this training made; details["champion"] is the one that serves.
    """

    name: str
    trainable: bool
    why: str | None = None
    metric: str | None = None
    value: float | None = None
    rival: str | None = None
    rival_value: float | None = None
    low: float | None = None
    high: float | None = None
    optimum: float | None = None
    version: int | None = None
    baselines: list[dict[str, Any]] = field(default_factory=list)
    champion: dict[str, Any] | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """A simple way to do it: its metric, and how far the model is ahead of it, with an interval."""

    name: str
    value: float
    lead: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """The winner against its rival, and where the truth is known the best there is, on the test rows."""

    metric: str
    value: float
    rival: str
    rival_value: float
    low: float
    high: float
    optimum: float | None
    others: dict[str, float]
    baselines: tuple[Baseline, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """A tuned learner that has passed its test and waits to be registered.

    judge: the gate's verdict against a champion on the same test, given whether this one was made of newer data; None where the two
    cannot be compared.
    """

    name: str
    learner: Any
    params: dict[str, Any]
    quality: Quality
    data_sha256: str
    manifest: dict[str, Any]  # what describes it beyond the above
    features: pd.DataFrame  # a few rows of what it takes
    output: pd.DataFrame  # and what it gives for them
    judge: Callable[[Champion, bool], Verdict | None]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)  # further learners of the version, by the folder that each is saved in
    evidence: pd.DataFrame | None = None  # rows with label, split and probability, for those who watch


@dataclass(frozen=True)
class Decision:
    """Whether the version is champion now, who is, and why."""

    is_champion: bool
    champion: int | None
    why: str
    against: dict[str, Any] | None = None  # version and value of the champion that it was held against
    checks: tuple[Check, ...] = ()


def publish(home: Path, fitted: Fitted, run: tracking.Run, *, settings: Settings, as_of: datetime) -> ModelReport:
    """Register, record, and make champion if the gate lets it pass."""
    manifest = _manifest(fitted, as_of=as_of)
    version = registry.register(home, fitted.name, learner=fitted.learner, arrays=fitted.arrays, beside=fitted.beside, manifest=manifest)
    stored = registry.load_version(home, fitted.name, version)
    tracking.add_version(run, stored, features=fitted.features, output=fitted.output)
    tracking.close_run(run, params=fitted.params, metrics=_metrics(fitted.quality))
    decision = _of_the_same_model(home, fitted, stored) or decide(home, fitted, version, settings=settings, as_of=as_of)
    run.client.set_tag(run.run_id, "gate", decision.why)
    if decision.is_champion and registry.champions(home).get(fitted.name, {}).get("version") != version:
        registry.promote(home, fitted.name, version, why=decision.why)
    tracking.follow_champion(home, fitted.name, settings.training.tracking_url)
    if decision.checks or version not in verdicts.read(home, fitted.name):  # what it found once is not lost when it is not asked again
        verdicts.record(home, fitted.name, version, _told(decision))
    return _report(fitted, version, manifest, decision)


def decide(home: Path, fitted: Fitted, version: int, *, settings: Settings, as_of: datetime) -> Decision:
    """A new version leads if the gate finds nothing against it; not if a person has rolled it back.

    The first version leads as it is, there being nothing to fall back on; so does one whose champion cannot be asked any more.
    """
    entry = registry.champions(home).get(fitted.name, {})
    present = entry.get("version")
    if present == version:
        return Decision(True, version, str(entry.get("why", "it is the champion")))
    if version in entry.get("rolled_back", []):
        return Decision(False, present, f"version {version} was rolled back; promote it by name")
    if present is None:
        return Decision(True, version, "there was no champion")
    try:
        champion = registry.load_champion(home, fitted.name)
        type(fitted.learner).load(champion.folder)
    except RegistryError as error:
        return Decision(True, version, f"the champion could not be verified: {error}")
    except (KeyError, TypeError, ValueError) as error:  # of other code: nothing can be served from it, however good it was
        return Decision(True, version, f"version {present} can be loaded no more: {error}")
    made = champion.manifest.get("as_of")
    is_newer = made is None or pd.Timestamp(as_of) > pd.Timestamp(made)
    verdict = fitted.judge(champion, is_newer)
    if verdict is None:
        return Decision(True, version, f"version {present} cannot be compared: it needs other features or parameters")
    against = {"version": present, "value": finite(verdict.value), **_bounds(verdict.checks[0].gain)}
    compared = f"{fitted.quality.metric} {fitted.quality.value:.4f} against {verdict.value:.4f} of version {present} on the same test"
    failed = [f"not {check.name}: {check.found}" for check in verdict.checks if not check.holds]
    if failed:
        return Decision(False, present, f"{compared}; {'; '.join(failed)}", against, verdict.checks)
    return Decision(True, version, f"{compared}; {verdict.checks[0].found}", against, verdict.checks)


def code_hash(learner_class: Any) -> str:
    """SHA-256 of the file of a learner or a task, what it imports of ours, and the libraries: other code, other study and version."""
    source, imported = Path(inspect.getfile(learner_class)).read_bytes(), code_version((learner_class.__module__,))
    return hashlib.sha256(source + json.dumps([imported, requirements()]).encode()).hexdigest()


def requirements() -> list[str]:
    """What a stored model needs to be loaded, pinned."""
    return [f"{name}=={importlib.metadata.version(name)}" for name in ("lightgbm", "implicit", "scikit-learn", "numpy", "scipy", "pandas")]


def consent_record(home: Path, customers: pd.Series, *, settings: Settings) -> dict[str, Any]:
    """What the people a model is trained with have agreed to: the purpose, and how many customers under which policy version."""
    purpose = settings.consent.purpose
    return {"purpose": purpose, "customers_by_policy": consent.policies(tables.read(home, tables.CONSENTS), customers, purpose=purpose)}


def share(part: float, whole: float) -> float:
    """NaN where there is nothing to have a share of."""
    return part / whole if whole > 0 else math.nan


def finite(value: float | None) -> float | None:
    """None for what JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else float(value)


# -- private -----------------------------------------------------------------------------------------------------------

_TOLD = ("cutoffs", "rows", "suspect_features", "fit", "search", "segments", "ladder", "when", "value")  # of a manifest, in the report


def _of_the_same_model(home: Path, fitted: Fitted, stored: Champion) -> Decision | None:
    """For the version whose own files are the champion's to the byte, and not those beside it: it is what was asked for last."""
    entry = registry.champions(home).get(fitted.name, {})
    present = entry.get("version")
    if present in (None, stored.version) or stored.version in entry.get("rolled_back", []):
        return None
    try:
        champion = registry.load_champion(home, fitted.name)
    except RegistryError:
        return None
    if _own_files(champion) != _own_files(stored) or champion.manifest["files"] == stored.manifest["files"]:
        return None
    added = f"{', '.join(fitted.beside) or 'nothing'} {'stand' if len(fitted.beside) > 1 else 'stands'} beside it"
    return Decision(True, stored.version, f"its model is that of version {present} to the byte; {added}")


def _own_files(version: Champion) -> dict[str, str]:
    """Hashes of the files of its own learner, without those of others beside it."""
    beside = version.manifest.get("beside", [])
    return {path: digest for path, digest in version.manifest["files"].items() if path.split("/")[0] not in beside}


def _told(decision: Decision) -> dict[str, Any]:
    checks = [{"name": check.name, "holds": check.holds, "found": check.found} for check in decision.checks]
    return {"is_champion": decision.is_champion, "why": decision.why, "checks": checks}


def _bounds(gain: Interval | None) -> dict[str, float | None]:
    return {} if gain is None else {"low": finite(gain.low), "high": finite(gain.high)}


def _manifest(fitted: Fitted, *, as_of: datetime) -> dict[str, Any]:
    """Everything a reader of the version needs; `training_key` names the model by what decides it: data, parameters, code."""
    kind = type(fitted.learner)
    parts = [fitted.name, fitted.data_sha256, fitted.params, code_hash(kind)]
    parts += [[name, other.get_params(), code_hash(type(other))] for name, other in fitted.beside.items()]
    return {
        **fitted.manifest,
        "learner": f"{kind.__module__}.{kind.__qualname__}",
        "params": fitted.params,
        "metrics": {key: finite(value) for key, value in _metrics(fitted.quality).items()},
        "metric": fitted.quality.metric,
        "data.sha256": fitted.data_sha256,
        "as_of": pd.Timestamp(as_of).isoformat(),
        "requirements": requirements(),
        "beside": sorted(fitted.beside),
        "training_key": hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
        **tracking.commit(),
    }


def _metrics(quality: Quality) -> dict[str, float]:
    found = {
        quality.metric: quality.value,
        f"rival_{quality.metric}": quality.rival_value,
        **{f"baseline_{_slug(baseline.name)}_{quality.metric}": baseline.value for baseline in quality.baselines},
        "gain_low": quality.low,
        "gain_high": quality.high,
        **({} if quality.optimum is None else {f"optimum_{quality.metric}": quality.optimum}),
        **quality.others,
    }
    return {key.replace("@", "_at_"): value for key, value in found.items() if math.isfinite(value)}


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())


def _report(fitted: Fitted, version: int, manifest: Mapping[str, Any], decision: Decision) -> ModelReport:
    quality, told = fitted.quality, _told(decision)
    return ModelReport(
        name=fitted.name,
        trainable=True,
        metric=quality.metric,
        value=finite(quality.value),
        rival=quality.rival,
        rival_value=finite(quality.rival_value),
        low=finite(quality.low),
        high=finite(quality.high),
        optimum=finite(quality.optimum),
        version=version,
        baselines=[{key: finite(value) if key != "name" else value for key, value in asdict(one).items()} for one in quality.baselines],
        champion=decision.against,
        details={
            "champion": decision.champion,
            "is_champion": told["is_champion"],
            "why": told["why"],
            "gate": told["checks"],
            "params": fitted.params,
            **{key: finite(value) for key, value in quality.others.items()},
            **{key: manifest[key] for key in _TOLD if key in manifest},
        },
    )


def signature_rows(frame: pd.DataFrame, *, n: int = 5) -> pd.DataFrame:
    """A few rows, spread over the frame, as an example of its columns."""
    return frame.iloc[np.unique(np.linspace(0, len(frame) - 1, n).astype(int))].reset_index(drop=True)


def settings_fit(settings: Settings) -> dict[str, float]:
    """The costs that a classifier's threshold weighs."""
    return {"cost_false_positive": settings.training.cost_false_positive, "cost_false_negative": settings.training.cost_false_negative}
