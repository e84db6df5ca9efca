"""What is known about customers at this moment: who they are, what may be used, features, last scores.

In: names as callers have them, and an instant. Out: columns of values, None where missing or too old. The store knows names by
their pseudonyms alone. Feature services are resolved once, through Feast; rows then come from its online store, read directly if a
self-check finds that read equal to Feast's own, else through Feast. Never writes, and never decides what may be used: consent is
the caller's to ask first.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import SecretStr

from pipelines.errors import PipelineError
from pipelines.online import schema as online_schema
from pipelines.online.feast_format import Key, Value, key_decoder, key_encoder
from serving.fallbacks import Deadline
from serving.online_store import EncodingChanged, Fast, FeastSource, Row, Source, SqliteSource, StoreFailure, View, difference

log = logging.getLogger("rapport.serving")

Pseudonym = Callable[[str, str], str]  # kind, raw name -> what the store knows it by

VIEWS = ("identifier_customer", "customer_consent", "customer_scores", "task_scores", "customer_segments", "customer_item")
AGELESS = ("identifier_customer", "customer_consent")  # true until revoked, however long ago
SELF_CHECK_ROWS = 3
NAMES_REMEMBERED = 10_000
CUSTOMER = "customer_id"
IS_ALLOWED = "is_personalization_allowed"  # of customer_consent
FORMER = "customer_id"  # the kind of an identifier that was a customer's id before a merge

_CUSTOMER = re.compile(r"c[0-9a-f]{16}")


class Rows(NamedTuple):
    """The answer for n keys: the values of each in the order of `names`; `changed_at` is each key's newest row, None without any."""

    names: tuple[str, ...]  # the same object for the same views
    values: list[list[Value]]
    changed_at: list[float | None]  # seconds since 1970, UTC

    @property
    def columns(self) -> dict[str, list[Value]]:
        """Each column's values, in the order of the keys."""
        return {name: [row[place] for row in self.values] for place, name in enumerate(self.names)}

    def row(self, place: int) -> dict[str, Value]:
        """One key's values by column."""
        return dict(zip(self.names, self.values[place], strict=True))


@dataclass(frozen=True)
class Person:
    """Who a request is about. `customer_id` None: nobody we know. Without consent `is_allowed` is False, also where none is recorded."""

    customer_id: str | None
    is_allowed: bool


class Profiles:
    """Reads by feature service or view. Safe to use from several threads."""

    def __init__(self, views: Mapping[str, tuple[View, ...]], source: Source, *, pseudonym: Pseudonym) -> None:
        self.views, self.source = views, source
        self.is_provisional = False  # what is read is to be resolved again
        self._names = {name: tuple(column for view in some for column in view.columns) for name, some in views.items()}
        self._pseudonym = lru_cache(NAMES_REMEMBERED)(pseudonym)

    def read(self, name: str, keys: Sequence[Key], *, at: datetime, deadline: Deadline) -> Rows:
        """The columns of a feature service or of one view, for the keys. Raises StoreFailure."""
        views = self.views[name]
        return _rows(self._names[name], views, self.source.fetch_views(views, keys, deadline), n=len(keys), at=at)

    def permitted(self, name: str, service: str, *, at: datetime, deadline: Deadline) -> tuple[Person, Rows | None] | None:
        """Who a customer_id is and, where that person lets it be used, their columns of a feature service, in one look at the store.

        None where one look does not tell: no such consent is recorded, so the id may be somebody else's, or the store, or what it holds,
        is not to be read in this way. Raises StoreFailure.
        """
        (consent,), views = self.views["customer_consent"], self.views.get(service)
        if views is None:
            return None
        try:
            found = self.source.fetch_permitted(consent, IS_ALLOWED, views, name, deadline)
        except EncodingChanged:  # of which part is not said
            return None
        flag = consent.value(found[0], IS_ALLOWED) if found else None
        if found is None or flag is None:
            return None
        is_allowed = flag is True
        rows = _rows(self._names[service], views, [[row] for row in found[1:]], n=1, at=at) if is_allowed else None
        return Person(name, is_allowed), rows

    def forget_names(self) -> None:
        """Let go of the names that were asked for, as callers gave them."""
        self._pseudonym.cache_clear()

    def check(self, deadline: Deadline) -> None:
        """Look for nobody's consent: whether the store answers at all. Raises StoreFailure."""
        self.source.present(self.views["customer_consent"][0], ["nobody"], deadline)

    def person(self, name: str, *, at: datetime, deadline: Deadline) -> Person:
        """Who a name is, as `people` says; whose consent is recorded under it is told by one look at the store. Raises StoreFailure."""
        (consent,) = views = self.views["customer_consent"]
        ((row,),) = self.source.fetch_views(views, [name], deadline)
        flag = consent.value(row, IS_ALLOWED)  # true until revoked, however long ago
        return self.people([name], at=at, deadline=deadline)[0] if flag is None else Person(name, flag is True)

    def people(self, names: Sequence[str], *, at: datetime, deadline: Deadline) -> list[Person]:
        """Who each name is: a customer_id, one of before a merge, or else the shop's own user id. Raises StoreFailure."""
        people = self._customers(names, at=at, deadline=deadline)
        strangers = [i for i, person in enumerate(people) if person.customer_id is None]
        for spelled in (_as_former, lambda name: self.identifier("user_id", name)):
            asked = [(i, key) for i in strangers if people[i].customer_id is None and (key := spelled(names[i]))]
            for (i, _), person in zip(asked, self._owners([key for _, key in asked], at=at, deadline=deadline), strict=True):
                people[i] = person
        return people

    def owners(self, kind: str, names: Sequence[str], *, at: datetime, deadline: Deadline) -> list[Person]:
        """Whose each identifier is. `kind`: user_id or anonymous_id; an address is one whatever it was given as. Raises StoreFailure."""
        return self._owners([self.identifier(kind, name) for name in names], at=at, deadline=deadline)

    def formers(self, customer_id: str, *, deadline: Deadline) -> list[str]:
        """The ids that this customer's parts had before they were merged since the last ingest. Raises StoreFailure."""
        (view,) = self.views["identifier_customer"]
        names = self.source.keys_with(view, customer_id, deadline)
        return [name.removeprefix(f"{FORMER}:") for name in names if name.startswith(f"{FORMER}:")]

    def _owners(self, identifiers: Sequence[str], *, at: datetime, deadline: Deadline) -> list[Person]:
        if not identifiers:
            return []
        owners = self.read("identifier_customer", identifiers, at=at, deadline=deadline).columns["customer_id"]
        known = iter(self._customers([str(owner) for owner in owners if owner is not None], at=at, deadline=deadline))
        return [STRANGER if owner is None else next(known) for owner in owners]

    def identifier(self, kind: str, name: str) -> str:
        """The pseudonym under which events with this name are kept."""
        return self._pseudonym("email" if "@" in name else kind, name)

    def _customers(self, ids: Sequence[str], *, at: datetime, deadline: Deadline) -> list[Person]:
        if not ids:
            return []
        allowed = self.read("customer_consent", ids, at=at, deadline=deadline).columns[IS_ALLOWED]
        people = [STRANGER if flag is None else Person(key, flag is True) for key, flag in zip(ids, allowed, strict=True)]
        silent = [i for i, flag in enumerate(allowed) if flag is None]  # no consent state: known by what they did, or nobody
        for i, is_known in zip(silent, self._is_present([ids[i] for i in silent], deadline), strict=True):
            if is_known:
                people[i] = Person(ids[i], is_allowed=False)
        return people

    def _is_present(self, ids: Sequence[str], deadline: Deadline) -> list[bool]:
        found = [self.source.present(view, ids, deadline) for view in self.views["churn_v1"]] if ids else []
        return [any(flags) for flags in zip(*found, strict=True)]


def _rows(names: tuple[str, ...], views: Sequence[View], fetched: Sequence[Sequence[Row]], *, n: int, at: datetime) -> Rows:
    """The values of the views' columns; what is too old in its view counts as absent."""
    values: list[list[Value]] = [[] for _ in range(n)]
    changed: list[float | None] = [None] * n
    now_s = at.timestamp()
    for view, found in zip(views, fetched, strict=True):
        oldest = now_s - view.max_age_s
        for i, (then, row) in enumerate(found):
            if then is None or then < oldest:
                values[i] += [None] * len(view.columns)
                continue
            values[i] += row
            if then > (changed[i] or 0.0):
                changed[i] = then
    return Rows(names, values, changed)


def _as_former(name: str) -> str | None:
    return f"{FORMER}:{name}" if _CUSTOMER.fullmatch(name) else None


STRANGER = Person(None, is_allowed=False)


def open_profiles(home: Path, *, max_age_hours: float, pseudonym: Pseudonym, redis_url: SecretStr | None = None) -> Profiles:
    """Resolve the services through Feast and choose how to read. `redis_url`: of the online store; none: the home's file.

    Raises StoreFailure where nothing was applied yet, or what was applied is not what is declared by now.
    """
    try:
        store = feature_store(home, redis_url=redis_url)
        _check_declared(store, home)
        views = _resolve(store, max_age_hours * 3600)
    except PipelineError as error:
        raise StoreFailure(str(error)) from error
    except Exception as error:  # Feast raises whatever its parts raise
        raise StoreFailure(f"feature store under {home} could not be opened ({type(error).__name__}: {error}); apply it first") from error
    return Profiles(views, _choose(store, views, redis_url), pseudonym=pseudonym)


def feature_store(home: Path, *, redis_url: SecretStr | None = None) -> Any:
    """Feast on this home, from the declared profile; its online store is the Redis that is named."""
    import yaml
    from feast import FeatureStore
    from feast.repo_config import RepoConfig

    import feature_repo

    declared = yaml.safe_load(Path(feature_repo.__file__).with_name("feature_store.yaml").read_text())
    # by its name alone it is imported on first use, and serving never uses it: no DuckDB in this process
    declared["offline_store"] = declared["offline_store"]["type"]
    if redis_url is not None:
        from pipelines.online.redis_server import feast_connection

        declared["online_store"] = {"type": "redis", "connection_string": feast_connection(redis_url.get_secret_value())}
    config = RepoConfig(**declared, repo_path=home.resolve())
    return FeatureStore(repo_path=str(home.resolve()), config=config)


def _check_declared(store: Any, home: Path) -> None:
    from feast import FeatureView

    from feature_repo import definitions

    declared = online_schema.of(o for o in vars(definitions).values() if isinstance(o, FeatureView))
    online_schema.check_same(online_schema.of(store.list_feature_views()), declared, f"the registry under {home}")


def _resolve(store: Any, max_age_s: float) -> dict[str, tuple[View, ...]]:
    """The views of each service that is about customers alone, and those read by their own name."""
    views: dict[str, tuple[View, ...]] = {}
    for service in store.list_feature_services():
        wanted = service.feature_view_projections
        found = tuple(resolved_view(store, p.name, [f.name for f in p.features], max_age_s) for p in wanted)
        if all(view.join_key == CUSTOMER for view in found):
            views[service.name] = found
    for name in VIEWS:
        views[name] = (resolved_view(store, name, None, float("inf") if name in AGELESS else max_age_s),)
    return views


def resolved_view(store: Any, name: str, columns: Sequence[str] | None, max_age_s: float) -> View:
    """A view as it is read; `columns` None: all of them."""
    from feast.infra.online_stores.sqlite import _table_id

    declared = store.get_feature_view(name)
    table = _table_id(store.project, declared, store.config.registry.enable_online_feature_view_versioning)
    ttl_s = declared.ttl.total_seconds() if declared.ttl else 0.0
    join_key = online_schema.of([declared])[name].join_key
    wanted = tuple(columns or [field.name for field in declared.features])
    return View(name, table, join_key, wanted, min(max_age_s, ttl_s or float("inf")))


def _choose(store: Any, views: Mapping[str, tuple[View, ...]], redis_url: SecretStr | None) -> Source:
    slow, fast = FeastSource(store), _direct(store, redis_url)
    found = self_check(fast, slow, views)
    if found is None:
        return fast
    log.warning("online store: %s; reading through Feast instead", found)
    return slow


def _direct(store: Any, redis_url: SecretStr | None) -> Fast:
    if redis_url is None:
        return SqliteSource((Path(store.config.repo_path) / store.config.online_store.path).resolve())
    from serving.redis_source import RedisSource

    return RedisSource(redis_url.get_secret_value())


def self_check(fast: Fast, slow: Source, views: Mapping[str, tuple[View, ...]]) -> str | None:
    """Why the direct read cannot be trusted; None if it agrees with Feast on stored rows and on absent ones.

    Raises StoreFailure where nothing can be compared: the store is missing or locked.
    """
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value as Proto

    try:
        for view in {view.name: view for group in views.values() for view in group}.values():
            names = [view.join_key] if isinstance(view.join_key, str) else list(view.join_key)
            for text in ("c1", "", "z\u00fcrich \U0001f6d2"):
                key = EntityKey(join_keys=names, entity_values=[Proto(string_val=text + name) for name in names])
                texts: Key = text + names[0] if isinstance(view.join_key, str) else tuple(text + name for name in names)
                if key_encoder(view.join_key)(texts) != serialize_entity_key(key, entity_key_serialization_version=3):
                    return f"{view.name}: the encoding of keys is not the one expected"
            stored = [key_decoder(view.join_key)(key) for key in fast.some_keys(view, SELF_CHECK_ROWS)]
            nobody: Key = "nobody at all" if isinstance(view.join_key, str) else tuple("nobody at all" for _ in names)
            if found := difference(fast, slow, view, [*stored, nobody]):
                return found
    except EncodingChanged as error:
        return str(error)
    except ValueError as error:  # a key that is none of ours
        return f"online store: {error}"
    return None
