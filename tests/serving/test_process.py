"""The service as a process of its own, as `rapport serve` starts it."""

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from datetime import UTC, datetime
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from pydantic import SecretStr

from pipelines.settings import Settings
from serving import process
from serving.access import Role, read_key
from serving.process import ServiceError, environment, start


def test_child_gets_these_settings_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setenv("RAPPORT_SERVING__DEADLINE_MS", "9999")
    monkeypatch.setenv("RAPPORT_ADMIN_KEY", "stale")
    mine = Settings(
        home=tmp_path,
        as_of=datetime(2026, 1, 2, tzinfo=UTC),
        admin_key=SecretStr("fresh"),
        serving={"deadline_ms": 77},
        labels={"min_rows": 11},
        sources={"shop": SecretStr("write-key")},
        edges={"redis_url": "redis://:broker-password@h/0"},
        online={"redis_url": "redis://:store-password@h/0"},
    )
    with monkeypatch.context() as child:
        for name in [name for name in os.environ if name.startswith("RAPPORT_")]:
            child.delenv(name)
        for name, value in environment(mine, tmp_path).items():
            child.setenv(name, value)
        assert Settings() == mine


def test_relative_home_means_the_same_folder_to_the_child(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert environment(Settings(home="here"), tmp_path)["RAPPORT_HOME"] == str(tmp_path / "here")


def test_port_that_is_taken_is_said_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServiceError, match=f"{port} cannot be listened on"):
            start(Settings(home=tmp_path), port)


def test_service_that_ends_early_is_told_with_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "SERVICE", "serving.nothing:There")
    child = start(Settings(home=tmp_path), 0)
    with pytest.raises(ServiceError, match=r"before it was ready(.|\n)*serving\.nothing"):
        child.wait_ready(60)
    child.stop()
    child.stop()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A certificate for shop.example signed by itself, and its key: PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shop.example")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(datetime(2020, 1, 1, tzinfo=UTC)).not_valid_after(datetime(2120, 1, 1, tzinfo=UTC))
    folder = tmp_path_factory.mktemp("tls")
    (folder / "cert.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return {"tls_cert": folder / "cert.pem", "tls_key": folder / "key.pem"}


class Ready(BaseHTTPRequestHandler):
    """Is ready."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        """Quiet."""


def test_service_with_a_certificate_is_asked_over_https_and_no_other_is_believed(tmp_path, pair):
    mine = Settings(home=tmp_path, serving=pair)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair["tls_cert"], pair["tls_key"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ready)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    child = SimpleNamespace(poll=lambda: None)
    with contextlib.closing(server.socket):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        service = process.Process(child, "127.0.0.1", server.server_port, mine, None)
        assert service.url == f"https://127.0.0.1:{server.server_port}"
        service.wait_ready(60)
        plain = process.Process(child, "127.0.0.1", server.server_port, Settings(home=tmp_path), None)
        with pytest.raises(ServiceError, match="not ready"):
            plain.wait_ready(0.5)
        server.shutdown()
    assert process._tls(mine) == ["--ssl-certfile", str(pair["tls_cert"]), "--ssl-keyfile", str(pair["tls_key"])]
    assert process._tls(Settings(home=tmp_path)) == []


def test_certificate_that_is_none_is_said_before_anything_starts(tmp_path, pair):
    for wrong in ({"tls_cert": pair["tls_key"]}, {"tls_key": tmp_path / "nothing.pem"}):
        with pytest.raises(ServiceError, match="no certificate and its key"):
            start(Settings(home=tmp_path, serving=pair | wrong), 0)
    with pytest.raises(ValueError, match="both tls_cert and tls_key"):
        Settings(home=tmp_path, serving={"tls_cert": pair["tls_cert"]})


@pytest.mark.slow
def test_started_service_answers_measures_and_leaves_nothing_behind(home, cast, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it must not matter where one is
    monkeypatch.setenv("TMPDIR", str(scratch := tmp_path / "scratch"))
    scratch.mkdir()
    with start(Settings(home=home, serving={"deadline_ms": 10_000}), 0) as service:
        answer = service.ask("/recommend", {"customer_id": cast.customers[1], "k": 3})
        assert (answer["source"], answer["degraded"]) == ("personal", False)
        bodies = {"/recommend": [{"customer_id": c} for c in cast.customers[:5]], "/churn": [{"customer_ids": cast.customers[:1]}]}
        latency = service.measure(bodies, n=50)
        assert set(latency) == set(bodies)
        for figures in latency.values():
            assert 0 < figures["p50"] <= figures["p99"]
        assert json.dumps(latency)
        with pytest.raises(ServiceError, match="answered 400"):
            service.ask("/recommend", {})
        metrics = scrape(service, read_key(service.settings, Role.ADMIN))
        workers = psutil.Process(service.child.pid).children(recursive=True)
    assert 'rapport_request_seconds_count{code="200",endpoint="/recommend"}' in metrics
    assert "rapport_request_seconds_bucket" in metrics
    assert workers
    assert service.child.poll() is not None
    assert not any(worker.is_running() for worker in workers)
    log = service.output.read_text()
    assert cast.customers[1] not in log
    assert "Traceback" not in log
    assert not list(tmp_path.glob("feature_store"))
    assert not list(scratch.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["supervisor", "starter"])
def test_service_does_not_outlive_who_is_responsible_for_it(tmp_path, killed):
    script = (
        "import sys, time; from pathlib import Path; from pipelines.settings import Settings; from serving.process import start;"
        "s = start(Settings(home=Path(sys.argv[1])), 0); s.wait_ready(); sys.stdout.write(f'{s.child.pid}\\n'); sys.stdout.flush();"
        "time.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    supervisor = psutil.Process(int(starter.stdout.readline()))
    family = [supervisor, *supervisor.children(recursive=True)]
    assert len(family) == 2
    try:
        if killed == "starter":
            starter.kill()
            starter.wait()  # else it stays as a zombie, which answers to its number
        else:
            supervisor.kill()
        _, alive = psutil.wait_procs(family[1:], timeout=60)
        assert not alive
    finally:
        starter.kill()
        starter.communicate()


def scrape(service, key):
    connection = HTTPConnection(service.host, service.port, timeout=60)
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {key}"})
    with contextlib.closing(connection):
        response = connection.getresponse()
        assert response.status == 200
        return response.read().decode()
