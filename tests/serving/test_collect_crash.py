"""The promise behind a 200: whatever kills the service, and however full the disk is, what was acknowledged is there, once.

`RAPPORT_KILLS=50` runs the long form of the first test. Each promise has a control: a service that breaks it, and is found out.
"""

import asyncio
import base64
import json
import os
import random
import resource
import textwrap
import time
from collections import Counter
from contextlib import closing, suppress

import psutil
import pytest

from pipelines.log import open_log
from pipelines.settings import Settings
from serving import process
from serving.access import Role, ensure_keys, read_key
from serving.process import start

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("RAPPORT_KILLS", "3"))
CLIENTS = 128
LOAD = (1_000, 10_000)  # events that are acknowledged before a kill


class Shop:
    """The senders of a shop and what each of their events came to: 200, a refusal, or nobody knows."""

    def __init__(self, port, key, seed):
        self.port, self.rng = port, random.Random(seed)
        self.authorization = "Basic " + base64.b64encode(f"{key}:".encode()).decode()
        self.acked, self.unknown, self.refused = set(), set(), set()
        self.again = []  # requests without an answer: senders repeat them
        self.n, self.is_open = 0, True
        self.statuses = Counter()

    async def run(self):
        """All clients, until the shop closes."""
        await asyncio.gather(*(self.client() for _ in range(CLIENTS)))

    async def client(self):
        while self.is_open:
            # no port: nobody knocks while nobody listens, for the system may connect such a caller to itself and so take the port
            with suppress(OSError, asyncio.IncompleteReadError):
                if self.port is not None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    with closing(writer):
                        while self.is_open:
                            await self.send(reader, writer)
            await asyncio.sleep(0.05)

    async def send(self, reader, writer):
        names = self.again.pop() if self.again and self.rng.random() < 0.5 else self.fresh()
        events = [{"type": "page", "userId": f"u{self.rng.randrange(500)}", "messageId": name} for name in names]
        path, body = ("/v1/batch", {"batch": events}) if len(names) > 1 else ("/v1/page", events[0])
        content = json.dumps(body).encode()
        self.unknown.update(names)
        try:
            head = f"POST {path} HTTP/1.1\r\nhost: shop\r\nauthorization: {self.authorization}\r\ncontent-length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content)
            status = await answer_of(reader)
        except (OSError, asyncio.IncompleteReadError):
            self.again.append(names)
            raise
        self.statuses[status] += 1
        self.unknown.difference_update(names)
        (self.acked if status == 200 else self.refused).update(names)

    def fresh(self):
        names = [f"e{self.n + at}" for at in range(self.rng.choice((1, 1, 1, 50)))]
        self.n += len(names)
        return names


async def answer_of(reader):
    """The status of an answer, once it is here whole."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
    return int(head.split()[1])


def kill(service):
    """SIGKILL to everything of the service at once."""
    supervisor = psutil.Process(service.child.pid)
    family = [supervisor, *supervisor.children(recursive=True)]
    for member in family:
        member.kill()
    service.child.wait()
    while not all(is_dead(member) for member in family):
        time.sleep(0.01)


def is_dead(member):
    """A killed process may stay as a zombie until its new parent looks."""
    try:
        return member.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def survive(settings, *, kills, load=LOAD, seed=7):
    """Senders at work while the service is killed and started again; returns what they know."""
    ensure_keys(settings)
    rng = random.Random(seed)
    service = start(settings, 0, is_alone=True)
    shop = Shop(None, read_key(settings, Role.COLLECT), seed)

    async def scenario():
        nonlocal service
        senders = asyncio.create_task(shop.run())
        for n in range(kills):
            if n:
                service = start(settings, 0, is_alone=True)
            await asyncio.to_thread(service.wait_ready)
            shop.port = service.port
            enough = len(shop.acked) + rng.randrange(*load)
            await until(lambda enough=enough: len(shop.acked) >= enough)
            shop.port = None
            await asyncio.to_thread(kill, service)
        shop.is_open = False
        await senders

    try:
        asyncio.run(scenario())
    finally:
        service.stop()
    return shop


def held(settings):
    """How often each event is in the log, and the log's own count of what it appended."""
    with closing(open_log(settings.home, settings=settings)) as log:
        names = Counter()
        while found := log.read("check", max_events=50_000):
            names.update(json.loads(event.payload)["messageId"] for event in found)
            log.commit("check", [event.position for event in found])
        return names, log.counts()


def test_nothing_acknowledged_is_lost_or_there_twice_however_often_the_service_is_killed(tmp_path):
    settings = Settings(home=tmp_path)
    shop = survive(settings, kills=KILLS)
    names, counts = held(settings)
    assert shop.again  # the kills fell among requests
    assert set(shop.statuses) == {200}
    assert not shop.acked - set(names)
    assert max(names.values()) == 1
    assert set(names) <= shop.acked | shop.unknown
    assert counts.appended == sum(names.values())


def test_service_that_answers_before_the_commit_is_found_out(tmp_path, monkeypatch):
    """The control. No commit ends, so that the kill always falls before one."""
    (tmp_path / "hasty.py").write_text(
        textwrap.dedent(
            """
            import threading

            from pipelines.log import Log, Outcome
            from serving import commits

            async def kept(self, events):
                self.writer.submit(events)
                return [Outcome.APPENDED] * len(events)

            commits.Commits.kept = kept
            Log.append = lambda self, events: threading.Event().wait(300)
            from serving.service import Personalization
            """
        )
    )
    monkeypatch.setattr(process, "SERVICE", "hasty:Personalization")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = Settings(home=tmp_path / "home")
    shop = survive(settings, kills=1, load=(200, 400))
    assert len(shop.acked - set(held(settings)[0])) >= 200


def worker_of(service):
    (worker,) = psutil.Process(service.child.pid).children()
    return worker


def largest(home):
    return max(path.stat().st_size for path in home.rglob("*") if path.is_file())


def test_full_disk_refuses_events_decides_on_and_takes_them_again_by_itself(tmp_path):
    settings = Settings(home=tmp_path)
    with start(settings, 0, is_alone=True) as service:
        key, worker = read_key(settings, Role.COLLECT), worker_of(service)
        shop = Shop(service.port, key, 7)

        async def scenario():
            senders = asyncio.create_task(shop.run())
            await until(lambda: len(shop.acked) >= 500)
            worker.rlimit(resource.RLIMIT_FSIZE, (largest(settings.home) + 50_000, resource.RLIM_INFINITY))
            await until(lambda: shop.statuses[507] > 200)
            decided = await asyncio.to_thread(service.ask, "/recommend", {"customer_id": "nobody"})
            before = len(shop.acked)
            worker.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            await until(lambda: len(shop.acked) > before + 500)
            shop.is_open = False
            await senders
            return decided

        decided = asyncio.run(scenario())
        assert worker.is_running()
    names, counts = held(settings)
    assert "items" in decided
    assert set(shop.statuses) <= {200, 503, 507}
    assert not shop.acked - set(names)
    assert max(names.values()) == 1
    assert not shop.refused & set(names)
    assert counts.appended == sum(names.values()) == len(shop.acked)


async def until(is_so):
    end = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
