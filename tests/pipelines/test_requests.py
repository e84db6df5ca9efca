import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from pipelines.errors import StoreError
from pipelines.requests import KEPT_US, Kind, Requests, State, is_worked, working
from pipelines.vault import open_vault

NOW = 1_800_000_000_000_000
WHO = "Ann.Secret@example.com"


@pytest.fixture
def vault(tmp_path):
    with closing(open_vault(tmp_path)) as opened:
        yield opened


@pytest.fixture
def requests(tmp_path, vault):
    with closing(Requests(tmp_path, vault=vault)) as opened:
        yield opened


def bytes_of(home):
    return b"".join(path.read_bytes() for path in (home / "requests").glob("*"))


def test_question_is_answered_once_and_then_forgotten(requests):
    one = requests.ask(Kind.EXPORT, WHO, by="admin", now_us=NOW)
    (waiting,) = requests.pending()
    assert (waiting.id, waiting.kind, waiting.who, waiting.by) == (one, Kind.EXPORT, WHO, "admin")
    assert requests.result(one).state is State.ASKED
    requests.answer(one, b'{"held": 1}', now_us=NOW + 1)
    assert requests.pending() == []
    found = requests.result(one)
    assert (found.kind, found.state, found.answer) == (Kind.EXPORT, State.DONE, b'{"held": 1}')
    assert requests.result(one) is None
    assert requests.result("never asked") is None


def test_failure_is_an_answer_too(requests):
    one = requests.ask(Kind.ERASE, WHO, by="admin", now_us=NOW)
    requests.answer(one, b'{"error": "x"}', now_us=NOW, is_failure=True)
    assert requests.result(one).state is State.FAILED


def test_same_question_that_waits_is_not_put_twice(requests):
    first = requests.ask(Kind.ERASE, WHO, by="admin", now_us=NOW)
    assert requests.ask(Kind.ERASE, WHO, by="admin", now_us=NOW + 1) == first
    assert requests.ask(Kind.EXPORT, WHO, by="admin", now_us=NOW + 1) != first


def test_first_answer_stands(requests):
    one = requests.ask(Kind.EXPORT, WHO, by="admin", now_us=NOW)
    requests.answer(one, b"1", now_us=NOW)
    requests.answer(one, b"2", now_us=NOW)
    assert requests.result(one).answer == b"1"


def test_neither_name_nor_answer_is_readable_on_disk_and_none_of_it_stays(requests, tmp_path):
    one = requests.ask(Kind.EXPORT, WHO, by="admin", now_us=NOW)
    requests.answer(one, b"lives in Ulm", now_us=NOW)
    held = bytes_of(tmp_path)
    assert one.encode() in held  # the control: the search does find what is written plainly
    assert WHO.encode() not in held
    assert b"lives in Ulm" not in held
    requests.result(one)
    assert one.encode() not in bytes_of(tmp_path)


def test_answer_that_nobody_fetches_is_gone_after_an_hour(requests):
    one = requests.ask(Kind.EXPORT, WHO, by="admin", now_us=NOW)
    waits = requests.ask(Kind.ERASE, WHO, by="admin", now_us=NOW)
    requests.answer(one, b"1", now_us=NOW)
    assert requests.expire(now_us=NOW + KEPT_US) == 0
    assert requests.expire(now_us=NOW + KEPT_US + 1) == 1
    assert requests.result(one) is None
    assert [request.id for request in requests.pending()] == [waits]  # a question is never dropped


def test_another_process_sees_the_question_and_its_answer_comes_back(requests, tmp_path):
    one = requests.ask(Kind.PROFILE, WHO, by="admin", now_us=NOW)
    script = (
        "import sys; from pathlib import Path; from pipelines.requests import Requests; from pipelines.vault import open_vault;"
        "home = Path(sys.argv[1]); r = Requests(home, vault=open_vault(home));"
        "[r.answer(q.id, q.who.encode(), now_us=1) for q in r.pending()]"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=30, cwd=Path(__file__).parents[2])
    assert requests.result(one).answer == WHO.encode()


def test_answer_is_given_to_one_of_those_who_fetch_at_once(requests, tmp_path, vault):
    one = requests.ask(Kind.EXPORT, WHO, by="admin", now_us=NOW)
    requests.answer(one, b"1", now_us=NOW)
    found = []

    def fetch():
        with closing(Requests(tmp_path, vault=vault)) as mine:
            found.append(mine.result(one))

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.answer for result in found if result] == [b"1"]


def test_worker_is_seen_while_it_lives_and_there_is_only_one(tmp_path):
    assert not is_worked(tmp_path)
    with working(tmp_path):
        assert is_worked(tmp_path)
        with pytest.raises(StoreError, match="another worker"), working(tmp_path):
            pass
    assert not is_worked(tmp_path)


def test_worker_that_was_killed_is_not_there_any_more(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from pipelines.requests import working\n"
        "with working(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        child.stdout.readline()
        assert is_worked(tmp_path)
    finally:
        child.kill()
        child.communicate()
    assert not is_worked(tmp_path)
