"""Trials of one search, kept in a journal or on a server: the same promises of all. The server is a real PostgreSQL."""

import subprocess
import sys
import threading
import time
from contextlib import closing

import optuna
import pytest

from pipelines.errors import StoreError
from pipelines.training.study import GRACE_BEATS, MendingLock, Storage, open_study

KINDS = ["journal", pytest.param("postgresql", marks=pytest.mark.server)]


@pytest.fixture(params=KINDS)
def storage(request, tmp_path):
    if request.param == "journal":
        return Storage(journal=tmp_path / "journal.log")
    return Storage(server=request.getfixturevalue("postgresql_server").url, heartbeat_s=1)


@pytest.fixture
def name(request):
    return f"{request.node.name}/{time.time_ns()}"


def trial(value):
    return optuna.trial.create_trial(value=value, params={}, distributions={}, user_attrs={"params": {}})


HOLD_THREE = """
import pathlib, sys, time
from contextlib import closing
from pipelines.training.study import Storage, open_study

name, kind, place = sys.argv[1:]
storage = Storage(journal=pathlib.Path(place)) if kind == "journal" else Storage(server=place, heartbeat_s=1)
with closing(open_study(name, storage)) as mine, mine.hold(3) as is_mine:
    print(is_mine, flush=True)
    time.sleep(120)
"""


def test_finished_trials_are_seen_by_all_and_the_first_of_a_number_counts(storage, name):
    with closing(open_study(name, storage)) as ours, closing(open_study(name, storage)) as theirs:
        ours.add(2, trial(0.5))
        theirs.add(0, trial(0.25))
        theirs.add(2, trial(9.0))
        for study in (ours, theirs):
            assert {number: (one.number, one.value) for number, one in study.finished().items()} == {0: (0, 0.25), 2: (2, 0.5)}
    with closing(open_study(f"{name}/other", storage)) as other:
        assert other.finished() == {}


def test_number_that_a_living_process_holds_is_nobody_elses_and_free_when_it_is_let_go(storage, name):
    place = ("journal", str(storage.journal)) if storage.journal else ("server", storage.server)
    words = [sys.executable, "-W", "ignore", "-c", HOLD_THREE, name, *place]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)  # not forked: this process has threads
    try:
        assert child.stdout.readline().strip() == "True"
        with closing(open_study(name, storage)) as study:
            time.sleep(1.2 * GRACE_BEATS if storage.server else 0.0)  # longer than a dead one is waited for
            with study.hold(3) as is_mine:
                assert not is_mine
            with study.hold(4) as is_mine:
                assert is_mine
            child.kill()
            child.wait()
            until = time.monotonic() + 30
            is_mine = False
            while not is_mine and time.monotonic() < until:
                with study.hold(3) as is_mine:
                    pass
                time.sleep(0.1)
            assert is_mine
    finally:
        child.kill()
        child.communicate()


def test_number_that_was_let_go_can_be_held_again(storage, name):
    with closing(open_study(name, storage)) as study:
        for _ in range(2):
            with study.hold(1) as is_mine:
                assert is_mine


def test_half_written_line_of_a_killed_process_is_cut_off_by_the_next_that_writes(tmp_path):
    journal = tmp_path / "journal.log"
    with closing(open_study("s", Storage(journal))) as study, closing(open_study("s", Storage(journal))) as other:
        study.add(0, trial(0.5))
        torn = b'{"op_code": 5, "worker'
        with journal.open("ab") as file:
            file.write(torn)
        other.add(1, trial(0.25))
        assert sorted(study.finished()) == [0, 1]
        assert torn not in journal.read_bytes()
    with journal.open("ab") as file:
        file.write(torn)
    control = tmp_path / "control.log"
    control.write_bytes(journal.read_bytes() + b"\n")
    with closing(open_study("s", Storage(journal))) as study:
        assert sorted(study.finished()) == [0, 1]
    with pytest.raises(ValueError, match=r"Expecting|delimiter|Unterminated|Invalid"):  # control: a broken line stops Optuna
        optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(control))).create_new_study([])


def test_line_that_another_process_is_writing_is_not_cut_off(tmp_path):
    journal = tmp_path / "journal.log"
    with closing(open_study("s", Storage(journal))) as study:
        study.add(0, trial(0.5))
    half, rest = b'{"op_code": 99, "wor', b'ker_id": "w"}\n'
    writer, cutter = MendingLock(journal), MendingLock(journal)
    writer.acquire()
    with journal.open("ab") as file:
        file.write(half)
    waiting = threading.Thread(target=cutter.acquire)
    waiting.start()
    waiting.join(timeout=0.3)
    assert waiting.is_alive()  # it waits for who is writing
    with journal.open("ab") as file:
        file.write(rest)
    writer.release()
    waiting.join(timeout=30)
    cutter.release()
    assert journal.read_bytes().endswith(half + rest)


@pytest.mark.parametrize(
    "url", ["postgresql+nodriver://rapport:hunter2@127.0.0.1:1/x", "sqlite:////nowhere/at/all/hunter2.db"], ids=["driver", "place"]
)
def test_server_that_cannot_be_used_is_one_sentence_without_its_password(url):
    with pytest.raises(StoreError, match=r"training\.study_url") as refused:
        open_study("s", Storage(server=url))
    assert "hunter2" not in str(refused.value)
