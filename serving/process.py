"""The service and what runs beside it as child processes: start, wait until it is ready, measure, stop.

In: settings. Out: a running service with an address, or one sentence about why there is none, with the end of its log.
Works from any folder and for an installed package. Never leaves a process behind: not after `stop`, nor when its starter dies.
"""

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, SecretStr

import serving
from pipelines.errors import PipelineError
from pipelines.settings import QUIET_ENVIRONMENT, Settings
from serving import companions
from serving.access import Role, ensure_keys, read_key
from serving.companions import Companion

SERVICE = "serving.service:Personalization"
SUPERVISOR = "serving.supervisor"
RESOLUTION = "serving.resolution"
WARM_UP = 30
TAIL_LINES = 15
STARTER = "RAPPORT_SERVICE_STARTER"  # names the process that the service does not outlive
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# What one thread frees another uses, and Arrow has no pool of its own: otherwise each keeps what loading took.
MEMORY = {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}


class ServiceError(PipelineError):
    """The service did not come up, or did not answer as it should."""


@dataclass(frozen=True)
class Process:
    """A started service. As a context manager it is ready inside, and stopped at the end."""

    child: "subprocess.Popen[bytes]"
    host: str
    port: int
    settings: Settings
    output: Path | None  # its log; None where it writes to this process's own output
    companions: tuple[Companion, ...] = ()  # what runs beside it
    resolving: "subprocess.Popen[bytes] | None" = None  # who asks Feast of the store, where nobody did before

    @property
    def url(self) -> str:
        """Where it listens."""
        scheme = "https" if self.settings.serving.tls_cert else "http"
        return f"{scheme}://[{self.host}]:{self.port}" if ":" in self.host else f"{scheme}://{self.host}:{self.port}"

    def wait_ready(self, timeout_s: float = 180.0) -> None:
        """Return once it answers /readyz. Raises ServiceError, with the end of its log, when it ended or the time is up."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if self.child.poll() is not None:
                raise ServiceError(f"serve: the service ended with code {self.child.returncode} before it was ready{self._tail()}")
            with contextlib.suppress(OSError, HTTPException), _connection(self, timeout_s=2.0) as connection:
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.1)
        raise ServiceError(f"serve: {self.url} was not ready after {timeout_s:g} s{self._tail()}")

    def ask(self, endpoint: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One answer of a decision endpoint. Raises ServiceError for anything but 200."""
        with _connection(self, timeout_s=10.0) as connection:
            answer: dict[str, Any] = json.loads(_post(connection, endpoint, json.dumps(body).encode(), self._headers()))
        return answer

    def measure(self, bodies: Mapping[str, Sequence[Mapping[str, Any]]], *, n: int = 250) -> dict[str, dict[str, float]]:
        """By endpoint "p50" and "p99", milliseconds from request to answer: `n` requests one after the other on one connection.

        They take turns through the endpoint's bodies. Raises ServiceError for anything but 200.
        """
        with _connection(self, timeout_s=10.0) as connection:
            return {endpoint: _measure(connection, endpoint, some, n, self._headers()) for endpoint, some in bodies.items() if some}

    def wait(self) -> None:
        """Return when it ended by itself or the user pressed Ctrl-C. Raises ServiceError where it ended with a failure."""
        try:
            code = self.child.wait()
        except KeyboardInterrupt:
            return
        if code:
            raise ServiceError(f"serve: the service ended with code {code}{self._tail()}")

    def stop(self, timeout_s: float = 15.0) -> None:
        """End the service, what runs beside it, and everything they started: asked first, then made to. A second call does nothing."""
        for companion in self.companions:
            companion.stop()
        if self.resolving is not None:
            self.resolving.kill()
            self.resolving.wait()
        if self.child.poll() is None:
            self.child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(timeout_s)
        self.child.kill()
        self.child.wait()
        until = time.monotonic() + timeout_s
        while self._is_listening() and time.monotonic() < until:  # a worker whose supervisor was killed ends at its next look
            time.sleep(0.1)

    def __enter__(self) -> "Process":
        """Itself, once it is ready; stopped where it does not become so."""
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop it."""
        self.stop()

    def _is_listening(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((_reachable(self.host), self.port), timeout=1.0):
            return True
        return False

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {read_key(self.settings, Role.DECIDE)}", "Content-Type": "application/json"}

    def _tail(self) -> str:
        if self.output is None or not self.output.exists():
            return ""
        lines = self.output.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return f"; the end of {self.output}:\n" + "\n".join(lines) if lines else ""


def start(
    settings: Settings, port: int | None = None, *, to_console: bool = False, is_alone: bool = False, service: str | None = None
) -> Process:
    """Start the service. `port`: the setting's where None; 0 picks a free one. Returns at once: see `Process.wait_ready`.

    Its log goes to `serving/service.log` under the home, or with `to_console` to this process's own output. Beside it run the stream
    worker and, where a broker is configured, the edges, with logs of their own there; not with `is_alone`. It does not wait for them.
    """
    home = settings.home.resolve()
    ensure_keys(settings)
    host = "127.0.0.1" if settings.serving.host == "localhost" else settings.serving.host
    chosen = _usable_port(host, settings.serving.port if port is None else port)
    folder = home / "serving"
    folder.mkdir(parents=True, exist_ok=True)
    output = None if to_console else folder / "service.log"
    variables = environment(settings, folder)
    command = (sys.executable, "-m", SUPERVISOR, service or SERVICE)
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(output.open("wb")) if output else None
        child = subprocess.Popen(
            [*command, "--host", host, "--port", str(chosen), *_tls(settings)],
            cwd=_root(),
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT if sink else None,
            start_new_session=True,  # Ctrl-C is for this process, which then stops the service in order
        )
    beside = [] if is_alone else companions.wanted(settings)
    logs = {module: None if to_console else folder / f"{module.rpartition('.')[2]}.log" for module in beside}
    started = [Companion(module, environment=variables, folder=_root(), output=logs[module]).start() for module in beside]
    return Process(child, host, chosen, settings, output, tuple(started), _resolving(settings, variables))


def _resolving(settings: Settings, variables: Mapping[str, str]) -> "subprocess.Popen[bytes] | None":
    """The longest part of a home's first start, begun at once: what `serving.resolution` asks of Feast. None where it was asked before."""
    home, url = settings.home.resolve(), settings.online.redis_url
    if (home / "serving" / "resolved.json").exists() or not (home / "feature_store" / "registry.db").exists():
        return None
    command = [sys.executable, "-m", RESOLUTION, str(home), "0", "first"]
    nowhere = subprocess.DEVNULL
    child = subprocess.Popen(command, cwd=_root(), env=dict(variables), stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere)
    assert child.stdin is not None
    with contextlib.suppress(OSError), child.stdin as told:  # by its input: arguments are for all to see
        told.write(b"" if url is None else url.get_secret_value().encode())
    return child


def starter_lives() -> bool:
    """Whether the process that started this service still runs; True where it was started by hand."""
    starter = int(os.environ.get(STARTER, "0"))
    if not starter:
        return True
    try:
        os.kill(starter, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, but alive
        return True
    return True


def environment(settings: Settings, folder: Path) -> dict[str, str]:
    """The child's environment: these settings and no others of the same name, quiet libraries, one thread each."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAPPORT_")}
    return {
        **kept,
        **QUIET_ENVIRONMENT,
        **dict.fromkeys(THREADS, "1"),
        **MEMORY,
        **_as_variables(settings),
        "BENTOML_HOME": str(folder / "bentoml"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_root()), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        STARTER: str(os.getpid()),
        "PYTHONSAFEPATH": "1",  # what lies in the working folder must not shadow a library
    }


def _as_variables(settings: Settings) -> dict[str, str]:
    variables = {"RAPPORT_HOME": str(settings.home.resolve())}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if value is None or name == "home":
            continue
        plain = _plain(value)
        text = plain if isinstance(plain, str) else json.dumps(plain)
        variables[f"RAPPORT_{name.upper()}"] = text
    return variables


def _plain(value: Any) -> Any:
    """As JSON has it, secrets as they are: pydantic would write stars, and the child would knock with these."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return (
        value
        if value is None or isinstance(value, bool | int | float | str)
        else value.isoformat()
        if isinstance(value, datetime)
        else str(value)
    )


def _root() -> Path:
    """The folder that our packages are imported from: the repository, or where they are installed."""
    return Path(serving.__file__).resolve().parents[1]


def _usable_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises ServiceError where somebody listens already: the answers would be theirs."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServiceError(
                f"serve: {host}:{port} cannot be listened on ({error.strerror}); stop what is there, or choose another port (0: a free one)"
            ) from error
        chosen: int = probe.getsockname()[1]
        return chosen


def _tls(settings: Settings) -> list[str]:
    """What BentoML is told where the service speaks https. Raises ServiceError where the files are no certificate and its key."""
    certificate, key = settings.serving.tls_cert, settings.serving.tls_key
    if certificate is None or key is None:
        return []
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:
        raise ServiceError(
            f"serve: {certificate} and {key} are no certificate and its key ({error}); give PEM files that belong together"
        ) from error
    return ["--ssl-certfile", str(certificate.resolve()), "--ssl-keyfile", str(key.resolve())]


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


@contextlib.contextmanager
def _connection(process: Process, *, timeout_s: float):  # type: ignore[no-untyped-def]
    where, certificate = (_reachable(process.host), process.port), process.settings.serving.tls_cert
    if certificate is None:
        connection = HTTPConnection(*where, timeout=timeout_s)
    else:  # it is ours whatever name it is for: that very certificate is expected
        context = ssl.create_default_context(cafile=str(certificate))
        context.check_hostname = False
        connection = HTTPSConnection(*where, timeout=timeout_s, context=context)
    try:
        yield connection
    finally:
        connection.close()


def _post(connection: HTTPConnection, endpoint: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    try:
        connection.request("POST", endpoint, body=body, headers=dict(headers))
        response = connection.getresponse()
        answer = response.read()
    except (OSError, HTTPException) as error:
        raise ServiceError(f"serve: {endpoint} did not answer ({type(error).__name__}); look at the service's log") from error
    if response.status != 200:
        raise ServiceError(f"serve: {endpoint} answered {response.status}, expected 200: {answer[:300].decode(errors='replace')}")
    return answer


def _measure(
    connection: HTTPConnection, endpoint: str, bodies: Sequence[Mapping[str, Any]], n: int, headers: Mapping[str, str]
) -> dict[str, float]:
    encoded = [json.dumps(body).encode() for body in bodies]
    took_ms = []
    for i in range(WARM_UP + n):
        started = time.perf_counter()
        _post(connection, endpoint, encoded[i % len(encoded)], headers)
        took_ms.append((time.perf_counter() - started) * 1000)
    ordered = sorted(took_ms[WARM_UP:])
    return {"p50": round(ordered[len(ordered) // 2], 3), "p99": round(ordered[int(len(ordered) * 0.99)], 3)}
