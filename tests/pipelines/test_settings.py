"""Settings come from the environment, are bounded, and cannot be changed afterwards."""

import pytest
from pydantic import ValidationError

from pipelines.settings import QUIET_ENVIRONMENT, Settings, silence_telemetry


def test_environment_reaches_nested_groups(monkeypatch):
    monkeypatch.setenv("RAPPORT_TRAINING__TRIALS", "3")
    monkeypatch.setenv("RAPPORT_HOME", "/tmp/elsewhere")
    settings = Settings()
    assert settings.training.trials == 3
    assert str(settings.home) == "/tmp/elsewhere"


@pytest.mark.parametrize(("name", "value"), [("TRAINING__TRIALS", "0"), ("SERVING__PORT", "70000"), ("MONITORING__TOLERATED_GAP", "2")])
def test_number_out_of_bounds_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(f"RAPPORT_{name}", value)
    with pytest.raises(ValidationError):
        Settings()


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        Settings().home = "/tmp/other"


def test_keys_do_not_show_when_printed(monkeypatch):
    monkeypatch.setenv("RAPPORT_ADMIN_KEY", "open-sesame")
    assert "open-sesame" not in repr(Settings())


def test_every_number_has_a_sentence():
    for name, field in Settings.model_fields.items():
        group = getattr(field.annotation, "model_fields", {})
        assert group or field.description, name
        assert all(inner.description for inner in group.values()), name


def test_telemetry_switches_are_set_over_whatever_was_there(monkeypatch):
    for name in QUIET_ENVIRONMENT:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    silence_telemetry()
    import os

    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
