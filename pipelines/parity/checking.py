"""`rapport features parity`: is what models were trained on what they see when they serve?

In: a home. Out: values compared and values that differ, five ways: its log played again through the stream (`replay`), the stream
started on its tables (`seeded`), what the online store holds at this moment (`store`), what models were fed before (`served`), and the
rows that models learned from and scored, held against the feature tables (`training`). Works in scratch homes; changes online rows only
where it is told to repair.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import feature_store, ingest, tables
from pipelines.errors import StoreError
from pipelines.parity import auditing, learned, mending, pairs, recorded, replaying, scratch, values
from pipelines.parity.auditing import Audit
from pipelines.parity.probing import LATER_US
from pipelines.parity.rehearsal import OpenStream
from pipelines.parity.replaying import Stage
from pipelines.parity.values import Comparison
from pipelines.served import Row, Served, file_of
from pipelines.settings import Settings
from pipelines.stream import Stream
from pipelines.stream.clock import Clock
from pipelines.training.tasks import discover
from pipelines.vault import Vault, open_vault

ONLINE = "online store"  # stands for a model's version where the store itself is looked at


@dataclass(frozen=True)
class Report:
    """checked, mismatches: values; by_feature: "view:feature" -> values that differ; examples: some of them, of nobody in particular.

    stages: what each way of looking came to; repaired: values written anew, by feature.
    """

    checked: int
    mismatches: int
    by_feature: dict[str, int]
    examples: list[dict[str, Any]]
    stages: dict[str, dict[str, Any]]
    repaired: dict[str, int] = field(default_factory=dict)


def check(
    home: Path, *, settings: Settings, customers: int, probes: int, seed: int, repairs: bool = False, open_stream: OpenStream = Stream
) -> Report:
    """Look in every way there is. customers: chosen at random, for each; probes: instants, for each.

    What waits in the log is ingested first, as by `rapport ingest`. Raises StoreError where there is nothing to look at.
    """
    rng, total = np.random.default_rng(seed), Comparison()
    stages: dict[str, dict[str, Any]] = {}
    repaired: dict[str, int] = {}
    with closing(open_vault(home, master=settings.master_key)) as vault:
        for name, stage in (
            ("replay", _replay(home, settings, vault, customers, probes, rng, open_stream)),
            ("seeded", _seeded(home, settings, customers, probes, rng, open_stream)),
        ):
            stages[name] = _told(stage.compared, **stage.what, **({"why": stage.why} if stage.why else {}))
            total += stage.compared
        known_us = Clock(settings)()  # the tables know all that had come by then, once what waits is ingested
        names = _some(home, customers, rng)
        rows = {"store": _stored(home, settings, names), "served": _served(home, vault)}
        beside = pairs.held(home, names, settings=settings) if _is_applied(home) else []
        if (home / "log" / "log.db").exists():
            ingest.drain(home, settings=settings, vault=vault)
    for name, some in rows.items():
        with scratch.folder() as base:
            audit = auditing.audit(home, some, base, settings=scratch.settings_of(settings, base))
            of_pairs = pairs.compare(beside, base, auditing.history(home, names), audit.compared) if name == "store" else {}
            stages[name] = _told(audit.compared, **_figures(audit))
            total += audit.compared
            if repairs and audit.affected:
                repaired |= mending.mend(home, audit.affected, base, settings=settings, known_us=known_us)
            if repairs and of_pairs:
                repaired |= pairs.mend(home, of_pairs, base, settings=settings, known_us=known_us)
    trained = learned.look(home, customers=customers, rng=rng, settings=settings)
    stages["training"] = _told(trained.compared, explained=dict(trained.explained), parts=trained.parts)
    total += trained.compared
    if not total.checked:
        raise StoreError(f"parity: events or features were expected under {home}, found nothing to compare; run `rapport ingest` first")
    examples = [asdict(each) for each in total.examples]
    return Report(total.checked, total.mismatches, dict(total.by_feature.most_common()), examples, stages, repaired)


# -- private -----------------------------------------------------------------------------------------------------------


def _replay(
    home: Path, settings: Settings, vault: Vault, people: int, probes: int, rng: np.random.Generator, open_stream: OpenStream
) -> Stage:
    recording = recorded.record(home, vault=vault, people=people, rng=rng)
    what = {"people": recording.people, "trimmed": recording.trimmed, "left_out": recording.left_out}
    if not recording.calls:
        return Stage(what=what, why="the log holds no calls")
    items = tables.read_arrow(home, tables.ITEMS) if tables.exists(home, tables.ITEMS) else None
    with scratch.folder() as base:
        own = scratch.settings_of(settings, base)
        stage = replaying.replay(recording.calls, base, settings=own, probes=probes, rng=rng, open_stream=open_stream, items=items)
    stage.what |= what
    return stage


def _seeded(home: Path, settings: Settings, customers: int, probes: int, rng: np.random.Generator, open_stream: OpenStream) -> Stage:
    with scratch.folder() as base:
        if not scratch.take_over(home, base, _some(home, customers, rng)):
            return Stage(why="the tables hold no events")
        # not before the last event: what the tables hold is all known to a stream that starts on them
        newest = max(values.micros(at) for at in _last(base))
        now_us = max(newest, min(Clock(settings)(), newest + LATER_US))
        return replaying.go_on(
            base, settings=scratch.settings_of(settings, base), now_us=now_us, probes=probes, rng=rng, open_stream=open_stream
        )


def _last(home: Path) -> list[Any]:
    columns = tables.read_arrow(home, tables.EVENTS, ["event_timestamp", "created_timestamp"])
    return [at for name in columns.column_names if (at := max(filter(None, columns[name].to_pylist()), default=None)) is not None]


def _some(home: Path, customers: int, rng: np.random.Generator) -> list[str]:
    known = np.unique(tables.read_arrow(home, tables.IDENTITIES, ["customer_id"])["customer_id"].to_numpy(zero_copy_only=False).astype(str))
    return [str(name) for name in rng.permutation(known)[:customers]]


def _is_applied(home: Path) -> bool:
    return (home / "feature_store" / "registry.db").exists()


def _stored(home: Path, settings: Settings, names: Sequence[str]) -> list[Row]:
    """What a request for these customers would read at this moment."""
    if not _is_applied(home):
        return []
    feast = feature_store.store(home, settings=settings)
    rows = []
    for service in sorted({task.feature_service for task in discover().values()} & {each.name for each in feast.list_feature_services()}):
        at_us = Clock(settings)()
        held: list[dict[str, Any]] = [{} for _ in names]
        for projection in feast.get_feature_service(service).feature_view_projections:
            view = values.view_of(feast, projection.name)
            if view.keys != ("customer_id",):
                continue
            for whole, part in zip(held, values.online(feast, view, [(name,) for name in names]), strict=True):
                whole |= part
        read_us = Clock(settings)()
        rows += [Row(name, service, ONLINE, at_us, read_us, whole) for name, whole in zip(names, held, strict=True)]
    return rows


def _served(home: Path, vault: Vault) -> list[Row]:
    if not file_of(home).exists():
        return []
    with closing(Served(home, vault=vault)) as sample:
        return list(sample.rows())


def _told(compared: Comparison, **what: Any) -> dict[str, Any]:
    return {"checked": compared.checked, "mismatches": compared.mismatches, **what}


def _figures(audit: Audit) -> dict[str, Any]:
    wrong = {feature: {**asdict(each), "models": dict(each.models)} for feature, each in sorted(audit.wrong.items())}
    return {"rows": audit.rows, "in_flight": audit.in_flight, "explained": {k: n for k, n in audit.explained.items() if n}, "wrong": wrong}
