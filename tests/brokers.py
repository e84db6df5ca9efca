"""Real servers on free loopback ports, each with its data in a folder of its own: started, killed and started again by the tests.

A server that is not installed skips the test that asks for it; `.ci/servers` installs them.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.edges import open_edges
from pipelines.log import open_log
from pipelines.settings import EdgeSettings, Settings

ADDRESSES = {"redis": "redis_url", "kafka": "kafka_servers", "rabbitmq": "rabbitmq_url"}
KAFKA = "4.1.2"  # of .ci/servers
KAFKA_USER, KAFKA_PASSWORD = "rapport", "kafka-test-password"
_RABBITMQ_FOLDER = Path("/usr/lib/rabbitmq/bin")  # Debian's /usr/sbin/rabbitmq-server would change to the package's user
_JAVA = ("java", "-Xms256m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
_START_S = 180
_PORTS = range(20_000, 32_768)


class Server:
    """A server's process group. `url`: where clients find it; the same after `kill` and `start`."""

    def __init__(
        self, url: str, command: list[str], *, folder: Path, environment: dict[str, str], is_up: Callable[[], bool], user: str | None = None
    ) -> None:
        self.url = url
        self._command, self._folder, self._environment, self._is_up, self._user = command, folder, environment, is_up, user
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Server":
        """Run it, and return once it answers."""
        log = self._folder / "server.log"
        with log.open("ab") as out:
            self._process = _spawn(self._command, self._folder, self._environment, out, user=self._user)
        deadline = time.monotonic() + _START_S
        while not self._is_up():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self._command[0]} did not start:\n" + log.read_text(errors="replace")[-2_000:])
            time.sleep(0.05)
        return self

    def kill(self) -> None:
        """SIGKILL to all of its processes: nothing is flushed, nobody is told."""
        if self._process:
            _kill(self._process)
        self._process = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside it is there and does nothing: connections are taken by the system, and nobody is answered."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[Server]:
    """Redis whose answers are on disk: append-only file, synced before each answer."""
    program = _needed("redis-server")
    port = free_port()
    (folder / "redis.conf").write_text(
        f"bind 127.0.0.1\nport {port}\ndir {folder}\nappendonly yes\nappendfsync always\nsave ''\ndaemonize no\n"
    )
    with _running(
        Server(
            f"redis://127.0.0.1:{port}/0",
            [program, str(folder / "redis.conf")],
            folder=folder,
            environment={},
            is_up=lambda: _says(port, b"PING\r\n", b"+PONG"),
        )
    ) as server:
        yield server


@contextlib.contextmanager
def rabbitmq(folder: Path) -> Iterator[Server]:
    """RabbitMQ as a cluster of one, with an Erlang port mapper of its own."""
    if not (_RABBITMQ_FOLDER / "rabbitmq-server").exists():
        pytest.skip("rabbitmq-server is not installed; .ci/servers installs it")
    mapper_port, port, between = free_port(), free_port(), free_port()
    (folder / "plugins").write_text("[].\n")
    (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{port}\nlog.file.level = warning\n")
    environment = {
        "HOME": str(folder),
        "ERL_EPMD_PORT": str(mapper_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"rapport-{port}@localhost",
        "RABBITMQ_DIST_PORT": str(between),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "absent"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
    }
    with (folder / "epmd.log").open("wb") as out:
        mapper = _spawn([_needed("epmd"), "-port", str(mapper_port), "-address", "127.0.0.1"], folder, environment, out)
    try:
        with _running(
            Server(
                f"amqp://guest:guest@127.0.0.1:{port}/",
                [str(_RABBITMQ_FOLDER / "rabbitmq-server")],
                folder=folder,
                environment=environment,
                is_up=lambda: _says(port, b"AMQP\x00\x00\x09\x01", b"\x01"),
            )
        ) as server:
            yield server
    finally:
        _kill(mapper)


@contextlib.contextmanager
def kafka(folder: Path) -> Iterator[Server]:
    """Kafka in KRaft mode, broker and controller in one process."""
    _needed("java")
    jars = Path(os.environ.get("RAPPORT_KAFKA_JARS") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", f"rapport/kafka-{KAFKA}"))
    jars = jars.expanduser()
    if not list(jars.glob("kafka_*.jar")):
        pytest.skip(f"Apache Kafka's jars are not at {jars}; .ci/servers fetches them")
    port, controller, guarded = free_port(), free_port(), free_port()
    properties = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller},GUARDED://127.0.0.1:{guarded}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port},GUARDED://127.0.0.1:{guarded}",
        "inter.broker.listener.name": "PLAINTEXT",
        "listener.name.guarded.sasl.enabled.mechanisms": "PLAIN",
        "listener.name.guarded.plain.sasl.jaas.config": (
            f'org.apache.kafka.common.security.plain.PlainLoginModule required user_{KAFKA_USER}="{KAFKA_PASSWORD}";'
        ),
        "controller.listener.names": "CONTROLLER",
        "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,GUARDED:SASL_PLAINTEXT",
        "log.dirs": folder / "data",
        "num.partitions": 2,
        "default.replication.factor": 1,
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 1,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 1,
        "group.initial.rebalance.delay.ms": 0,
        "broker.heartbeat.interval.ms": 200,
        "broker.session.timeout.ms": 1_000,  # a killed broker may come back only after it
    }
    path = folder / "server.properties"
    path.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
    java = [*_JAVA, "-cp", f"{jars}/*"]
    formatted = [*java, "kafka.tools.StorageTool", "format", "--cluster-id", "cmFwcG9ydC10ZXN0cy0wMQ", "--config", str(path)]
    subprocess.run(formatted, check=True, capture_output=True, timeout=_START_S, cwd=folder)
    command = [*java, "kafka.Kafka", str(path)]
    with _running(Server(f"127.0.0.1:{port}", command, folder=folder, environment={}, is_up=lambda: _listens(port))) as server:
        server.guarded = f"127.0.0.1:{guarded}"  # asks for KAFKA_USER and KAFKA_PASSWORD
        yield server


@contextlib.contextmanager
def postgresql() -> Iterator[Server]:
    """PostgreSQL that syncs nothing. It refuses to be root, and who it runs as then may not enter pytest's folders: it has its own.

    `url`: of a database; `server.database()` makes another and returns that one's.
    """
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name), default=None)
    initdb, program = (_needed(name, programs) for name in ("initdb", "postgres"))
    user = "nobody" if os.geteuid() == 0 else None
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="rapport-postgresql-", ignore_cleanup_errors=True) as folder:
        if user:
            shutil.chown(folder, user)
        made = [initdb, "-D", "data", "-U", "rapport", "-E", "UTF8", "--locale=C", "--auth=trust", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, timeout=_START_S, cwd=folder, **_as(user))
        command = [program, "-D", "data", "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        server = Server(
            f"postgresql+pg8000://rapport@127.0.0.1:{port}/postgres",
            [*command, "-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off", "-c", "shared_buffers=16MB"],
            folder=Path(folder),
            environment={},
            is_up=lambda: _takes_queries(port),
            user=user,
        )

        def database() -> str:
            name = f"d{uuid.uuid4().hex[:12]}"
            with contextlib.closing(_postgresql_connection(port)) as connection:
                connection.autocommit = True
                connection.cursor().execute(f"create database {name}")
            return server.url.replace("/postgres", f"/{name}")

        server.database = database
        with _running(server):
            yield server


def free_port() -> int:
    """A port that nothing listens on, and that stays this process's though it may be long until something listens there.

    It lies below those that the system gives to callers. As a sign to the other processes of the tests its UDP port is held to the end.
    """
    for port in _PORTS:
        with socket.socket() as probe, socket.socket(type=socket.SOCK_DGRAM) as sign:
            try:
                sign.bind(("127.0.0.1", port))
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            sign.detach()
            return port
    raise RuntimeError(f"no port of {_PORTS} is free")


@contextlib.contextmanager
def _running(server: Server) -> Iterator[Server]:
    try:
        yield server.start()
    finally:
        server.kill()


def _spawn(command: list[str], folder: Path, environment: dict[str, str], out, *, user: str | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **_as(user),
    )


def _as(user: str | None) -> dict[str, object]:
    """To run a process as that user, in that user's group alone."""
    return {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": ()}


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)


def _needed(program: str, folder: Path | None = None) -> str:
    found = shutil.which(program, path=os.pathsep.join([*([str(folder)] if folder else []), os.environ.get("PATH", ""), "/usr/sbin"]))
    if found is None:
        pytest.skip(f"{program} is not installed; .ci/servers installs it")
    return found


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _says(port: int, question: bytes, answer: bytes) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(question)
            return connection.recv(64).startswith(answer)
    except OSError:
        return False


def _postgresql_connection(port: int):
    import pg8000.dbapi

    return pg8000.dbapi.connect(user="rapport", host="127.0.0.1", port=port, database="postgres", timeout=_START_S)


def _takes_queries(port: int) -> bool:
    import pg8000.exceptions

    try:
        _postgresql_connection(port).close()
    except (pg8000.exceptions.InterfaceError, pg8000.exceptions.DatabaseError, OSError):
        return False
    return True


@dataclass(frozen=True)
class Place:
    """A stream, topic or queue that nobody used before, or a log in a home of its own."""

    kind: str
    settings: Settings

    def open(self, **edges):
        """A port on it, of one more consumer. `edges`: settings of it that differ."""
        settings = self.settings.model_copy(update={"edges": self.settings.edges.model_copy(update=edges)})
        return open_log(settings.home, settings=settings) if self.kind == "sqlite" else open_edges(settings)[0]

    def environment(self) -> dict[str, str]:
        """For another process that opens the same."""
        edges = self.settings.edges.model_dump(exclude_none=True, exclude_defaults=True)
        shown = {name: getattr(value, "get_secret_value", lambda value=value: value)() for name, value in edges.items()}
        mine = {f"RAPPORT_EDGES__{name.upper()}": str(value) for name, value in shown.items()}
        return os.environ | mine | {"RAPPORT_HOME": str(self.settings.home), "PYTHONPATH": str(Path(__file__).parents[1])}


def place(kind: str, home: Path, url: str = "", **edges) -> Place:
    """A place of this kind (sqlite, redis, kafka, rabbitmq), which takes work over after two seconds where it may choose."""
    address = {ADDRESSES[kind]: url} if kind in ADDRESSES else {}
    return Place(
        kind, Settings(home=home, edges=EdgeSettings(**address, **({"name": f"t-{uuid.uuid4().hex[:12]}", "takeover_s": 2.0} | edges)))
    )


@contextlib.contextmanager
def process(code: str, environment: dict[str, str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs the code; killed at the end with all of its own."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield child
    finally:
        _kill(child)
        child.stdout.close()
