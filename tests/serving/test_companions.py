"""What runs beside the service, played by small modules."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from pipelines.settings import Settings
from serving import companions
from serving.companions import Companion, wanted

ROOT = Path(__file__).parents[2]


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """`beside(source)`: a companion that runs this source, started; its pauses are short."""
    monkeypatch.setattr(companions, "PAUSES_S", (0.05, 0.1))
    made = []

    def start(source):
        (tmp_path / "played.py").write_text(textwrap.dedent(source))
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        made.append(Companion("played", environment=environment, folder=tmp_path, output=tmp_path / "played.log").start())
        return made[-1]

    yield start
    for companion in made:
        companion.stop()


def wait_for(holds, timeout_s=60.0):
    end = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def lives(tmp_path):
    return (tmp_path / "lives").read_text() if (tmp_path / "lives").exists() else ""


ENDLESS = "import time\nprint('here', flush=True)\nopen('lives', 'a').write('x')\ntime.sleep(600)"


def test_child_that_dies_is_started_again_and_one_that_is_stopped_is_not(beside, tmp_path):
    companion = beside(ENDLESS)
    assert wait_for(lambda: lives(tmp_path) == "x" and companion.pid is not None)
    first = companion.pid
    psutil.Process(first).kill()
    assert wait_for(lambda: lives(tmp_path) == "xx" and companion.pid not in (None, first))
    last = companion.pid
    companion.stop()
    companion.stop()
    assert companion.pid is None
    assert not psutil.pid_exists(last)
    time.sleep(0.3)
    assert lives(tmp_path) == "xx"
    assert (tmp_path / "played.log").read_text().count("here") == 2


def test_child_that_fails_at_once_is_tried_again_with_pauses(beside, tmp_path, caplog):
    beside("import sys\nopen('lives', 'a').write('x')\nsys.exit(3)")
    assert wait_for(lambda: len(lives(tmp_path)) >= 3)
    assert "ended with code 3" in caplog.text


def test_child_that_has_nothing_to_do_is_left_alone(beside, tmp_path):
    companion = beside("open('lives', 'a').write('x')")
    assert wait_for(lambda: lives(tmp_path) == "x" and companion.pid is None)
    time.sleep(0.3)
    assert lives(tmp_path) == "x"


def test_child_that_does_not_listen_is_ended_all_the_same(beside, tmp_path, monkeypatch):
    monkeypatch.setattr(companions, "PATIENCE_S", 0.3)
    companion = beside(f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{ENDLESS}")
    assert wait_for(lambda: lives(tmp_path) == "x" and companion.pid is not None)
    pid = companion.pid
    companion.stop()
    assert not psutil.pid_exists(pid)


def test_child_does_not_outlive_who_started_it(tmp_path):
    (tmp_path / "played.py").write_text(ENDLESS)
    script = (
        "import os, sys, time; from pathlib import Path; from serving.companions import Companion; here = Path(sys.argv[1])\n"
        "c = Companion('played', environment=os.environ | {'PYTHONPATH': str(here)}, folder=here, output=None).start()\n"
        "while not c.pid: time.sleep(0.01)\n"
        "print(c.pid, flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        child = psutil.Process(int(starter.stdout.readline()))
        assert wait_for(lambda: lives(tmp_path) == "x")
        starter.kill()
        starter.wait()
        assert not psutil.wait_procs([child], timeout=60)[1]
    finally:
        starter.kill()
        starter.communicate()


@pytest.mark.parametrize(
    ("edges", "modules"),
    [
        ({}, [companions.STREAM]),
        ({"redis_url": SecretStr("redis://x")}, [companions.STREAM, companions.EDGES]),
        ({"kafka_servers": "x:1"}, [companions.STREAM, companions.EDGES]),
        ({"rabbitmq_url": SecretStr("amqp://x")}, [companions.STREAM, companions.EDGES]),
    ],
)
def test_edges_run_where_a_broker_is_named(edges, modules):
    assert wanted(Settings(edges=edges)) == modules


def test_stream_has_one_companion_for_each_worker():
    assert wanted(Settings(stream={"workers": 3})) == [companions.STREAM, f"{companions.STREAM} 1", f"{companions.STREAM} 2"]
