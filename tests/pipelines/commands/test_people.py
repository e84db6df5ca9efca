"""`rapport export`: the file that it writes is for its owner's eyes alone, and what cannot be written is told."""

import json
import os

import pytest
from typer.testing import CliRunner

import rapport
from pipelines import erasure
from pipelines.errors import InputError

HELD = {"customer_id": "c1", "facts": [{"kind": "name", "value": "Änne"}]}


@pytest.fixture
def export(tmp_path, monkeypatch):
    monkeypatch.setenv("RAPPORT_HOME", str(tmp_path))
    (tmp_path / "vault").mkdir()
    monkeypatch.setattr(erasure, "export", lambda *_, **__: HELD)
    return lambda to: CliRunner().invoke(rapport.app, ["export", "c1", "--out", str(to)])


@pytest.mark.parametrize("was_there", [False, True], ids=["new", "was_there"])
def test_export_is_readable_by_its_owner_alone(export, tmp_path, was_there):
    to = tmp_path / "held.json"
    if was_there:
        to.touch()
        to.chmod(0o644)
    assert export(to).exit_code == 0
    assert json.loads(to.read_text(encoding="utf-8")) == HELD
    assert to.stat().st_mode & 0o777 == 0o600


def test_export_into_a_folder_that_is_not_there_is_told(export, tmp_path):
    error = export(tmp_path / "none" / "held.json").exception
    assert isinstance(error, InputError)
    assert f"{tmp_path}/none/held.json could not be written ({os.strerror(2)}); give another --out" in str(error)
