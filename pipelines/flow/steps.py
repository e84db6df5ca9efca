"""The steps of the loop in order, declared once: name, inputs, outputs, code. Each calls the module that does it."""

import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime

from pipelines import tables
from pipelines.errors import InputError, StoreError
from pipelines.flow.claim import claim
from pipelines.flow.instant import write_clock
from pipelines.flow.step import Job, Step, Summary, plain
from pipelines.tables import Table


def steps_for(job: Job) -> tuple[Step, ...]:
    """The steps of this job: the shop is simulated only where no files were given, traits are guessed only where a plan says how.

    A table that a later step writes again no longer has the version by which an earlier one would know that it is done: that one is
    then not asked for it.
    """
    is_off = {"simulate": bool(job.files), "impute": not job.settings.ingest.imputation}
    steps = [step for step in STEPS if not is_off.get(step.name, False)]
    again = [{item for later in steps[at + 1 :] for item in later.writes if isinstance(item, Table)} for at in range(len(steps))]
    return tuple(
        replace(step, writes=tuple(item for item in step.writes if item not in later)) for step, later in zip(steps, again, strict=True)
    )


def train_step(name: str) -> Step:
    """The step that trains a task which is no part of the loop: of its labels nothing is stored, so it reads the events themselves."""
    reads = (tables.EVENTS, tables.CONSENTS, tables.CUSTOMER_PROFILE, *_FEATURES, "clock.json")
    return Step(f"train {name}", _train(name), reads=reads, writes=("models/champions.json",), settings=_MODELS, code=_TRAINING)


def _simulate(job: Job) -> Summary:
    from pipelines import simulate

    s = job.settings.simulation
    return plain(simulate.simulate(job.home / "raw", customers=s.customers, days=s.days, seed=s.seed))


def _ingest(job: Job) -> Summary:
    """The loop's events are those of its files alone (`rapport ingest` is the one that adds): read aside, then put in place."""
    from pipelines import ingest, retention
    from pipelines.vault import open_vault

    aside = job.home / "flow" / "incoming"
    shutil.rmtree(aside, ignore_errors=True)
    items = job.items_file or (None if job.files else job.home / "raw" / "items.jsonl")
    try:
        # the home's own vault: its pseudonyms are to be those of its other tables, and who was erased from it stays away
        with closing(open_vault(job.home, master=job.settings.master_key)) as vault:
            report = ingest.ingest(aside, list(job.inputs()), mapping=job.mapping, items_file=items, settings=job.settings, vault=vault)
    except InputError:
        ingest.keep_refusal(job.home, aside)  # the rows that explain it
        raise
    except StoreError:
        shutil.rmtree(aside, ignore_errors=True)  # what was read so far only takes the space that was lacking
        raise
    now = datetime.now(UTC)
    if job.settings.privacy.retention_days:  # the files still hold what `rapport retain` removed, which goes by the wall as well
        retention.apply(aside, settings=job.settings, as_of=now)
    with tables.locked(job.home):
        claim(job)
        for table in _CLEAN:
            tables.adopt(job.home, table, aside)
        tables.drop(job.home, tables.WAITING)  # of messages that these are not
    write_clock(job.settings, report.last_event, now)
    return plain(report)


def _features(job: Job) -> Summary:
    from pipelines import features

    return plain(features.build(job.home, session_gap_minutes=job.settings.ingest.session_gap_minutes))


def _impute(job: Job) -> Summary:
    from pipelines import imputation

    return plain(imputation.run(job.home, settings=job.settings, as_of=job.as_of()))


def _apply(job: Job) -> Summary:
    from pipelines import feature_store

    feature_store.apply(job.home, settings=job.settings)
    return {}


def _labels(job: Job) -> Summary:
    from pipelines import labels

    return plain(labels.build(job.home, settings=job.settings, as_of=job.as_of()))


def _train(name: str) -> Callable[[Job], Summary]:
    def step(job: Job) -> Summary:
        from pipelines import training

        return plain(training.train(name, job.home, settings=job.settings, as_of=job.as_of(), progress=job.on_progress))

    return step


def _materialize(job: Job) -> Summary:
    from pipelines import feature_store, provenance

    return {
        "rows": feature_store.materialize(job.home, as_of=job.as_of(), settings=job.settings),
        "outdated": [table.name for table in _FEATURES if provenance.is_outdated(job.home, table.name)],  # build first: see `materialize`
    }


def _score(job: Job) -> Summary:
    from pipelines import feature_store, scoring

    report = plain(scoring.score(job.home, settings=job.settings, as_of=job.as_of()))
    feature_store.materialize(job.home, as_of=job.as_of(), views=["customer_scores", "task_scores"], settings=job.settings)
    return report


_CLEAN = (
    tables.EVENTS, tables.MESSAGES, tables.QUARANTINE, tables.INGESTS, tables.IDENTITIES, tables.IDENTITY_LINKS, tables.CONSENTS,
    tables.SPEAKING_SOURCES, tables.TRAITS, tables.ITEMS, tables.ALERTS, tables.CUSTOMER_PROFILE, tables.CUSTOMER_CONSENT,
)  # fmt: skip
_FEATURES = tables.FEATURE_TABLES
_SCORES = (tables.CUSTOMER_SCORES, tables.SCORED_CHURN, tables.SCORED_INTENT, tables.RECOMMENDATIONS)
_MODELS = ("labels", "training", "gate")
_TRAINING = ("pipelines.training", "models", "feature_repo")  # tasks and features are found by looking
_STORE = ("pipelines.feature_store", "feature_repo")

STEPS: tuple[Step, ...] = (
    Step(
        "simulate", _simulate, settings=("simulation",), code=("pipelines.simulate",),
        writes=("raw/events.jsonl", "raw/items.jsonl", "raw/truth.parquet"),
    ),
    Step(
        "ingest", _ingest, writes=(*_CLEAN, "clock.json"), settings=("ingest", "consent", "privacy", "as_of"), reads_files=True,
        code=("pipelines.ingest", "pipelines.sources", "pipelines.retention"),
    ),
    Step(
        "features", _features, reads=(tables.EVENTS, tables.ITEMS), writes=_FEATURES, settings=("ingest",),
        code=("pipelines.features", "feature_repo"),
    ),
    Step(
        "impute", _impute, reads=(tables.CUSTOMER_PROFILE, tables.CUSTOMER_ACTIVITY), writes=(tables.CUSTOMER_PROFILE,),
        settings=("ingest",), code=("pipelines.imputation",),
    ),
    Step("apply", _apply, reads=_FEATURES, writes=("feature_store/registry.db",), code=_STORE),
    Step(
        "labels", _labels, reads=(tables.EVENTS, tables.CONSENTS, "clock.json"),
        writes=(tables.LABELS_CHURN, tables.LABELS_INTENT, tables.INTERACTIONS), settings=("labels",),
        code=("pipelines.labels", "models"),
    ),
    Step(
        "train churn", _train("churn"), reads=(tables.LABELS_CHURN, tables.CUSTOMER_PROFILE, *_FEATURES),
        writes=("models/champions.json",), settings=_MODELS, code=_TRAINING,
    ),
    Step(
        "train intent", _train("intent"), reads=(tables.LABELS_INTENT, tables.CUSTOMER_PROFILE, *_FEATURES),
        writes=("models/champions.json",), settings=_MODELS, code=_TRAINING,
    ),
    Step(
        "train recommender", _train("recommender"),
        reads=(
            tables.INTERACTIONS, tables.ITEMS, tables.CUSTOMER_ACTIVITY, tables.CUSTOMER_PROFILE, tables.EVENTS, tables.CONSENTS,
            "clock.json",
        ),
        writes=("models/champions.json",), settings=_MODELS, code=_TRAINING,
    ),
    Step(
        "train segments", _train("segments"),
        reads=(tables.CUSTOMER_ACTIVITY, tables.CUSTOMER_PROFILE, tables.EVENTS, tables.CONSENTS, "clock.json"),
        writes=("models/champions.json", tables.CUSTOMER_SEGMENTS), settings=("training", "gate", "consent"),
        code=_TRAINING,
    ),
    Step(
        "materialize", _materialize,
        reads=(
            *_FEATURES, tables.IDENTITIES, tables.CUSTOMER_PROFILE, tables.CUSTOMER_CONSENT, tables.CUSTOMER_SEGMENTS, "clock.json",
        ),
        writes=("feature_store/online.db",), code=_STORE,
    ),
    Step(
        "score", _score, reads=(*_FEATURES, tables.CONSENTS, "models/champions.json"), writes=_SCORES, settings=("labels",),
        code=("pipelines.scoring", "models", *_STORE),
    ),
)  # fmt: skip
