"""Scratch homes: for nobody else's eyes, gone at the end and after a kill."""

import os
import signal
import subprocess
import sys
import time

import pytest
from pydantic import SecretStr

from pipelines.parity import scratch
from pipelines.settings import OnlineSettings, Settings


def test_folder_is_for_its_owner_alone_and_gone_at_the_end():
    with scratch.folder() as folder:
        assert folder.stat().st_mode & 0o77 == 0
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
    assert not folder.exists()


def test_folder_is_gone_after_an_error():
    with pytest.raises(KeyError), scratch.folder() as folder:
        raise KeyError
    assert not folder.exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_folder_is_gone_when_its_owner_is_killed(how, tmp_path):
    script = """
import sys, time
from pipelines.parity import scratch
with scratch.folder() as folder:
    (folder / "file").write_text("x")
    print(folder, flush=True)
    time.sleep(60)
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    folder = child.stdout.readline().strip()
    assert os.path.isdir(folder)  # noqa: PTH112
    child.send_signal(how)
    child.communicate()
    until = time.monotonic() + 60
    while list(tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def test_settings_of_a_scratch_home_lead_nowhere_else(tmp_path):
    given = Settings(home="x", master_key=SecretStr("k" * 44), online=OnlineSettings(redis_url=SecretStr("redis://elsewhere")))
    own = scratch.settings_of(given, tmp_path)
    assert (own.home, own.master_key, own.online.redis_url, own.as_of) == (tmp_path, None, None, None)
