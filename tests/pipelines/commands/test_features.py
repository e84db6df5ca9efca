"""`rapport features parity`: what it prints, and what its exit code says."""

import json

import pytest
from typer.testing import CliRunner

import rapport
from pipelines import audit, parity

CLEAN = {
    "checked": 10,
    "mismatches": 0,
    "by_feature": {},
    "examples": [],
    "stages": {"replay": {"checked": 10, "mismatches": 0}, "training": {"checked": 0, "mismatches": 0, "parts": {}}},
}
WRONG = {"behind_s": 60.0, "first": "a", "last": "b", "models": {"churn 3": 2}}
SKEWED = {
    **CLEAN, "mismatches": 2, "by_feature": {"customer_activity:events_7d": 2},
    "stages": {
        "served": {"checked": 10, "mismatches": 2, "wrong": {"customer_activity:events_7d": WRONG}},
        "training": {"checked": 9, "mismatches": 1, "parts": {"training_tasks/second_order": {"rows": 5, "differing_rows": 1}}},
    },
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("RAPPORT_HOME", str(tmp_path))

    def call(report, *words):
        monkeypatch.setattr(parity, "check", lambda home, **options: parity.Report(**report))
        return CliRunner().invoke(rapport.app, ["features", "parity", *words])

    return call


@pytest.mark.parametrize(("report", "code"), [(CLEAN, 0), (SKEWED, 1)], ids=["clean", "skewed"])
def test_last_line_is_the_contract_and_exit_code_says_whether_anything_differs(run, report, code):
    ran = run(report, "--json")
    told = json.loads(ran.stdout.splitlines()[-1])
    assert ran.exit_code == code
    assert {name: told[name] for name in ("checked", "mismatches", "by_feature")} == {
        name: report[name] for name in ("checked", "mismatches", "by_feature")
    }


def test_people_read_which_feature_was_wrong_and_which_model_saw_it(run):
    ran = run(SKEWED)
    assert ran.exit_code == 1
    assert "customer_activity:events_7d up to 60 s behind" in ran.stdout
    assert "churn 3 2 times" in ran.stdout
    assert "training_tasks/second_order: 1 of 5 rows" in ran.stdout


def test_repair_is_told_to_the_audit_trail(run, tmp_path):
    run({**CLEAN, "repaired": {"customer_activity:events_7d": 2}}, "--repair")
    (entry,) = audit.entries(tmp_path)
    assert (entry.action, entry.details) == ("repair features", {"customer_activity:events_7d": "2"})
