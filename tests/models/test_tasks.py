"""Which tasks there are: what the files of models declare."""

import pytest

import models
from models import churn, tasks


def test_every_declared_task_is_found_under_its_name():
    found = tasks.declared()
    assert {"churn", "intent", "return_risk"} <= set(found)
    assert all(task.name == name for name, task in found.items())
    assert found["churn"] is churn.TASK


@pytest.mark.parametrize("name", ["churn", "return risk", "../return_risk"])
def test_a_name_that_is_taken_or_no_identifier_is_refused(tmp_path, monkeypatch, name):
    module = f"climate_{len(name)}"
    (tmp_path / f"{module}.py").write_text(
        f"from dataclasses import replace\nfrom models import churn\nTASK = replace(churn.TASK, name={name!r}, metric='x')\n"
    )
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match=module):
        tasks.declared()
