"""Who rehearses models may be called in beforehand; the models themselves: test_champions.py."""

import pytest

from serving import rehearsal


@pytest.fixture(autouse=True)
def program(monkeypatch):
    """Instead of models: a program whose every line is what it was told."""
    command = "import sys, json\nfor line in sys.stdin:\n print(json.dumps({'name': line.split('=')[0], 'golden': [0.5]}))"
    usual = rehearsal.subprocess.Popen
    started = []

    def popen(_, **options):
        started.append(usual([rehearsal.sys.executable, "-c", command], **options))
        return started[-1]

    monkeypatch.setattr(rehearsal.subprocess, "Popen", popen)
    return started


def test_who_was_called_in_holds_the_first_rehearsal_and_somebody_new_the_next(program, tmp_path):
    rehearsal.call_in()
    (first,) = program
    told = rehearsal.hold([("churn", tmp_path), ("intent", tmp_path)])
    assert told == {"churn": (0.5,), "intent": (0.5,)}
    assert program == [first]
    assert rehearsal.hold([("churn", tmp_path)]) == {"churn": (0.5,)}
    assert len(program) == 2
    assert all(child.poll() == 0 for child in program)


def test_who_was_called_in_for_nothing_is_let_go(program):
    rehearsal.call_in()
    rehearsal.dismiss()
    assert program[0].poll() is not None
    rehearsal.dismiss()


def test_rehearsal_that_never_ends_is_ended(program, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "TIMEOUT_S", 0.0)
    with pytest.raises(rehearsal.subprocess.TimeoutExpired):
        rehearsal.hold([("churn", tmp_path)])
    assert program[0].poll() is not None
