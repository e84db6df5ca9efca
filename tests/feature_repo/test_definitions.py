"""The declared feature store against the declared tables: same names, same types, and services that resolve."""

import ast
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

import feature_repo
from pipelines import feature_store, tables

VIEWS = {
    "identifier_customer": tables.IDENTITIES,
    "customer_profile": tables.CUSTOMER_PROFILE,
    "customer_consent": tables.CUSTOMER_CONSENT,
    "customer_activity": tables.CUSTOMER_ACTIVITY,
    "customer_session": tables.CUSTOMER_SESSION,
    "item_activity": tables.ITEM_ACTIVITY,
    "customer_item": tables.CUSTOMER_ITEM,
    "customer_category": tables.CUSTOMER_CATEGORY,
    "customer_scores": tables.CUSTOMER_SCORES,
    "task_scores": tables.TASK_SCORES,
    "customer_segments": tables.CUSTOMER_SEGMENTS,
}
SERVICES = {
    "churn_v1": {"customer_profile", "customer_activity"},
    "intent_v1": {"customer_profile", "customer_activity", "customer_session"},
    "recommender_v1": {"item_activity"},
    "ranker_v1": {"customer_activity", "item_activity", "customer_item", "customer_category"},
    "serving_v1": {"customer_consent", "customer_scores"},
}


@pytest.fixture(scope="module")
def feast(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    feature_store.apply(home)
    return feature_store.store(home)


def test_every_view_has_the_fields_of_its_table(feast):
    from feast.types import Bool, Float64, Int64, String

    kinds = {String: pa.string(), Int64: pa.int64(), Float64: pa.float64(), Bool: pa.bool_()}
    views = {view.name: view for view in feast.list_feature_views()}
    assert set(views) == set(VIEWS)
    for name, table in VIEWS.items():
        view = views[name]
        assert [column.name for column in view.entity_columns] == list(table.key)
        assert view.batch_source.path == f"tables/{table.name}"
        assert view.batch_source.timestamp_field == table.event_time
        assert (view.batch_source.created_timestamp_column or None) == table.created_time
        times = {table.event_time, table.created_time}
        declared = {f.name: f.type for f in table.schema if f.name not in times}
        assert {f.name: kinds[f.dtype] for f in view.schema} == declared


def test_every_service_resolves_and_none_feeds_a_protected_trait(feast):
    services = {service.name: service for service in feast.list_feature_services()}
    assert {name: {p.name for p in service.feature_view_projections} for name, service in services.items()} == SERVICES
    asked = {name: [f.name for p in s.feature_view_projections for f in p.features] for name, s in services.items()}
    for names in asked.values():
        assert len(names) == len(set(names))
        assert not {"age_band", "gender"} & set(names)
    assert "region" in asked["churn_v1"]


def test_applying_again_changes_nothing_and_forgets_what_is_no_longer_declared(tmp_path):
    from feast import FeatureService

    feature_store.apply(tmp_path)
    feast = feature_store.store(tmp_path)
    feast.apply([FeatureService(name="old_v0", features=[feast.get_feature_view("item_activity")])])
    assert "old_v0" in {s.name for s in feature_store.store(tmp_path).list_feature_services()}
    feature_store.apply(tmp_path)
    assert {s.name for s in feature_store.store(tmp_path).list_feature_services()} == set(SERVICES)
    assert (tmp_path / "feature_store" / "registry.db").exists()


def test_definitions_hold_feast_objects_only():
    """Entities, sources, views, services in that order; no code that would be stored, nothing of ours imported but plain declarations."""
    from feast import Entity, FeatureService, FeatureView, FileSource, OnDemandFeatureView

    from feature_repo import definitions

    kinds = (Entity, FileSource, FeatureView, FeatureService)
    order = [next(i for i, kind in enumerate(kinds) if isinstance(o, kind)) for o in vars(definitions).values() if isinstance(o, kinds)]
    assert order == sorted(order)
    assert not [o for o in vars(definitions).values() if isinstance(o, OnDemandFeatureView)]
    tree = ast.parse(Path(feature_repo.__file__).with_name("definitions.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in imported} - {"feature_repo"} == {"datetime", "feast"}
    assert {module for module in imported if module.startswith("feature_repo")} == {"feature_repo.aggregates"}


def test_declarations_import_nothing_and_nothing_that_answers_or_parses_a_command_pays_for_feast():
    tree = ast.parse(Path(feature_repo.__file__).with_name("aggregates.py").read_text())
    assert {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} == {"dataclasses", "datetime"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    loaded = "import sys, pipelines.windows, pipelines.tables, pipelines.tiles, rapport; print([m for m in sys.modules if m in %r])"
    heavy = ("feast", "ibis", "duckdb", "mlflow", "lightgbm")
    found = subprocess.run([sys.executable, "-c", loaded % (heavy,)], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
