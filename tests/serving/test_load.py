"""The load that measures the collector: it tells what was kept, and does not take a refusal for an answer."""

import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from pydantic import SecretStr

from pipelines.settings import Settings
from serving import load
from serving.process import ServiceError


def test_whatever_a_process_started_counts_whichever_thread_it_was():
    sleep = "import subprocess, sys, threading; start = lambda: subprocess.Popen([sys.executable, '-c', 'input()']).wait(); "
    code = sleep + "threading.Thread(target=start).start(); print('started', flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline()
        until = time.monotonic() + 60
        while len(found := load.family(parent.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert found[0] == parent.pid
        assert len(found) == 2
        assert load.cpu_s(found) > 0
        parent.stdin.close()
    assert load.family(parent.pid) == [parent.pid]
    assert load.cpu_s([parent.pid]) is None


@pytest.mark.slow
def test_load_tells_what_the_log_kept_and_refuses_to_measure_refusals(tmp_path):
    settings = Settings(home=tmp_path / "home")
    rows = load.measure_collect(settings, seconds=1.5)
    assert [set(row) for row in rows] == [{"name", "value", "unit", "rival", "rival_value", "ratio"}] * len(rows)
    assert [row["name"] for row in rows if row["rival"]] == ["collect single, 128 x 1", "collect batched, 64 x 100"]
    assert rows[0]["value"] > 0
    assert not list(settings.home.iterdir())  # nothing of it stays


def test_answers_other_than_success_are_no_load(tmp_path):
    class Busy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    settings = Settings(home=tmp_path, collect_key=SecretStr("key"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        child = SimpleNamespace(pid=os.getpid())
        service = SimpleNamespace(host="127.0.0.1", port=server.server_address[1], settings=settings, child=child)
        with pytest.raises(ServiceError, match="200 alone is expected"):
            load.offer(service, connections=2, batch=1, seconds=0.1)
        server.shutdown()
