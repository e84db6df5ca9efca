"""A version is named after what made it."""

from pathlib import Path

import pytest

from pipelines.training import recommenders


@pytest.mark.parametrize("name", ["ranker.py", "retrieval.py", "ranking.py", "visits.py"])
def test_other_code_of_the_stages_or_of_what_they_learn_from_has_another_name(monkeypatch, name):
    before, right = recommenders.code_of_stages(), Path.read_bytes
    assert recommenders.code_of_stages() == before
    monkeypatch.setattr(Path, "read_bytes", lambda path: right(path) + (b"#" if path.name == name else b""))
    assert recommenders.code_of_stages() != before
