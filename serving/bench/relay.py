"""Between the service and its Redis: passes bytes on, or makes trouble. In: the address of a Redis. Out: an address to use in its place.

killed: nobody listens, connections end. frozen: connections are taken and nothing is answered. slow: every answer comes late. resetting:
connections are reset as soon as something is asked. Runs in a thread of its own; never looks at what it passes.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from types import TracebackType
from urllib.parse import urlsplit, urlunsplit

KILLED, FROZEN, SLOW, RESETTING = "killed", "frozen", "slow", "resetting"
TROUBLES = (KILLED, FROZEN, SLOW, RESETTING)
SLOW_S = 0.4
_LOOK_S = 0.02


class Relay:
    """As a context manager it runs inside. `trouble`: one of TROUBLES, or None; may be set at any time."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 6379
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._own_port = probe.getsockname()[1]
        user, at, _ = parts.netloc.rpartition("@")
        self.url = urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{self._own_port}"))
        self.trouble: str | None = None
        self._stop, self._is_up = threading.Event(), threading.Event()
        self._open: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="relay", daemon=True)

    def __enter__(self) -> "Relay":
        """Itself, once it listens."""
        self._thread.start()
        self._is_up.wait(10.0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End it, and what goes through it."""
        self._stop.set()
        self._thread.join(10.0)

    async def _run(self) -> None:
        server: asyncio.Server | None = None
        while not self._stop.is_set():
            if self.trouble == KILLED and server is not None:
                server.close()
                self._cut()
                server = None
            elif self.trouble != KILLED and server is None:
                server = await asyncio.start_server(self._serve, "127.0.0.1", self._own_port)
                self._is_up.set()
            if self.trouble == RESETTING:
                self._cut()
            await asyncio.sleep(_LOOK_S)
        if server is not None:
            server.close()
        self._cut()

    def _cut(self) -> None:
        for writer in tuple(self._open):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        both = [writer]
        self._open.add(writer)
        with contextlib.suppress(OSError):  # either side has gone, the other is told below
            onward_reader, onward = await asyncio.open_connection(self._host, self._port)
            both.append(onward)
            self._open.add(onward)
            await asyncio.gather(self._pump(reader, onward, is_answer=False), self._pump(onward_reader, writer, is_answer=True))
        for one in both:
            self._open.discard(one)
            one.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool) -> None:
        while data := await reader.read(65_536):
            while self.trouble == FROZEN and not self._stop.is_set():
                await asyncio.sleep(_LOOK_S)
            if self.trouble == RESETTING:
                _reset(writer)
                return
            if self.trouble == SLOW and is_answer:
                await asyncio.sleep(SLOW_S)
            writer.write(data)
            await writer.drain()
        writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with a reset instead of a farewell."""
    held = writer.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):
        held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
