"""The home that a verb works on: one that is none, one of nobody, one that may not be written; and how an interrupted verb ends."""

import errno
import os

import pytest

import rapport
from pipelines.commands import home


@pytest.fixture
def run(monkeypatch, capsys):
    """`rapport WORDS...`: its exit code, and what it wrote to stderr."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["rapport", *words])
        with pytest.raises(SystemExit) as ended:
            rapport.main()
        return ended.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("words", [("export",), ("erase",), ("identity", "explain")], ids=" ".join)
def test_home_that_nothing_was_taken_into_is_no_answer_about_a_person(run, tmp_path, monkeypatch, words):
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setenv("RAPPORT_HOME", str(elsewhere))
    code, told = run(*words, "anna@example.org")
    assert code == 1
    assert f"found none at {elsewhere}; set RAPPORT_HOME" in told
    assert "anna" not in told
    assert not elsewhere.exists()


@pytest.mark.parametrize("words", [("status",), ("serve",), ("models", "list"), ("keys", "list")], ids=" ".join)
def test_home_that_is_a_file_is_told(run, tmp_path, monkeypatch, words):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAPPORT_HOME", str(tmp_path / "file"))
    code, told = run(*words)
    assert code == 1
    assert f"expected a folder, found something else at {tmp_path / 'file'}" in told


def test_home_of_an_empty_variable_is_not_the_current_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAPPORT_HOME", "")
    code, told = run("keys", "add", "decide")
    assert code == 1
    assert "RAPPORT_HOME is not usable" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC], ids=errno.errorcode.get)
def test_what_the_disk_refuses_is_one_sentence(run, monkeypatch, number):
    def refuse():
        raise OSError(number, os.strerror(number), "/home/keys/ring.lock")

    monkeypatch.setattr(home, "settings", refuse)
    code, told = run("keys", "list")
    assert code == 1
    assert f"/home/keys/ring.lock could not be used ({os.strerror(number)}); mend its rights or free space" in told
    assert len(told.splitlines()) == 1


def test_interrupted_query_ends_as_an_interrupted_program_does(run, monkeypatch):
    def work():
        raise RuntimeError("Query interrupted")  # what DuckDB makes of Ctrl-C while it is at work

    monkeypatch.setattr(home, "settings", work)
    assert run("keys", "list") == (130, "")


@pytest.mark.parametrize(
    "error", [ConnectionResetError(errno.ECONNRESET, "reset"), RuntimeError("a defect")], ids=lambda error: type(error).__name__
)
def test_what_no_person_can_mend_shows_its_trace(run, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(home, "settings", fail)
    with pytest.raises(type(error)):
        run("keys", "list")


def test_receipt_that_is_not_there_is_told_without_the_name_of_an_exception(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RAPPORT_HOME", str(tmp_path))
    code, told = run("receipt", "none.json")
    assert (code, told) == (
        1,
        "rapport: receipt: none.json could not be opened (No such file or directory); check the path and its rights\n",
    )
