"""What several rooms' tests share: quiet libraries, one thread, the shared datasets, and a guard against outside connections."""

import fcntl
import importlib.util
import os
import random
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

from pipelines import vault
from pipelines.settings import silence_telemetry

silence_telemetry()
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each child compiles the libraries anew: three seconds
sys.dont_write_bytecode = False
SCRATCH = Path(tempfile.mkdtemp(prefix="rapport-"))
SCRATCH.chmod(0o1777)  # as the system's own: a server may run as somebody else
os.environ["TMPDIR"] = str(SCRATCH)  # where children leave what they cannot remove: some are killed
os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(dir=SCRATCH)  # read when the metrics client is first imported, by whichever test

# Examples are the same in every run, on every machine, whatever else runs there. Hypothesis would draw some of them from the constants of
# the modules loaded so far, which depend on the tests that ran before in the same process.
settings.register_profile("same everywhere", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same everywhere")
providers._get_local_constants = Constants

# Keys of the pseudonyms of new vaults: people have the same names in every run, and so come in the same order.
KEYS = random.Random(0)
vault.secrets = SimpleNamespace(token_bytes=KEYS.randbytes, token_urlsafe=vault.secrets.token_urlsafe)

SHARED = Path(__file__).parents[2] / "shared" / "data"

# Loaded by every Python process of a guarded run, children included: writes down each attempt to leave this machine.
GUARD = textwrap.dedent(
    """
    import os, socket, sys

    def watch(event, args):
        if event == "socket.connect":
            where = args[1]
            host = where[0] if isinstance(where, tuple) else "unix"
        elif event == "socket.getaddrinfo":
            host = args[0]
        else:
            return
        host = host.decode() if isinstance(host, bytes) else host
        if host in (None, "", "unix", "localhost", "::1", "0.0.0.0", socket.gethostname()) or host.startswith("127."):
            return
        with open(os.environ["CONNECTIONS_LOG"], "a") as log:
            log.write(f"{event} {host} by {' '.join(sys.orig_argv)[:200]}\\n")
        raise ConnectionRefusedError(f"outside connection to {host}")

    sys.addaudithook(watch)
    """
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, whole loops before all: one that starts last keeps the other processes waiting for it."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, len(item.path.parts)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    KEYS.seed(item.nodeid)


def pytest_unconfigure() -> None:
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real datasets; tests that need them skip where they are not laid out beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"the real datasets are not at {SHARED}; the README says where the originals are")
    return SHARED


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make): a copy of the folder that `make(folder)` filled in whichever of pytest's processes asked first."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def copy_of(name: str, make: Callable[[Path], object]) -> Path:
        made, done = shared / f"made-{name}", shared / f"made-{name}.done"
        with (shared / f"made-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits
            if not done.exists():
                shutil.rmtree(made, ignore_errors=True)  # of one that failed
                made.mkdir()
                state = KEYS.getstate()
                KEYS.seed(name)
                make(made)
                KEYS.setstate(state)
                done.touch()
        return Path(shutil.copytree(made, tmp_path_factory.mktemp(name) / "home", symlinks=True))

    return copy_of


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which every Python process notes, and is refused, each connection to another machine."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "sitecustomize.py").write_text(GUARD)
    log = folder / "connections.log"
    log.touch()
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MLFLOW_TRACKING", "MLFLOW_REGISTRY", "PROMETHEUS_", "RAPPORT_"))
    }
    return clean | {"PYTHONPATH": str(folder), "CONNECTIONS_LOG": str(log)}


@pytest.fixture(scope="session")
def brokers():
    """tests/brokers.py: real servers on free ports."""
    spec = importlib.util.spec_from_file_location("brokers", Path(__file__).with_name("brokers.py"))
    module = sys.modules["brokers"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def redis_server(brokers, tmp_path_factory):
    with brokers.redis(tmp_path_factory.mktemp("redis")) as server:
        yield server
