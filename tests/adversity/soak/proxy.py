"""A TCP proxy between a client and a server, that can do to a connection what networks do.

A client is told to connect here. Kafka's clients are told so by the broker itself: each worker has a listener of its own,
whose advertised address is its proxy (world.py), so nothing of the protocol need be understood.
"""

import asyncio
import contextlib
import socket
import struct
from typing import Final

CHUNK_BYTES: Final = 65_536


class _Pipe:
    """One connection: two sockets, and a task for each direction."""

    def __init__(self, proxy: "Proxy", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxy = proxy
        self.writers = [writer]
        self.swallowing = False
        self.task = asyncio.create_task(self._run(reader, writer))

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # Where the link is cut, a connection is not even made before it heals.
            await self.proxy.flowing.wait()
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self.proxy.server_port)
            self.writers.append(back_writer)
            up = asyncio.create_task(self._copy(reader, back_writer, up=True))
            down = asyncio.create_task(self._copy(back_reader, writer, up=False))
            try:
                # An end of one direction is the end: neither of the protocols here uses half-closed connections.
                await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (up, down):
                    task.cancel()
                await asyncio.wait((up, down))
        except OSError:
            pass
        finally:
            for one in self.writers:
                one.close()
            self.proxy.pipes.discard(self)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        proxy = self.proxy
        with contextlib.suppress(OSError):
            while True:
                data = await reader.read(CHUNK_BYTES)
                if not proxy.flowing.is_set():
                    # What was on its way when the link was cut arrives when it heals, also after its sender gave up.
                    await proxy.flowing.wait()
                if not data:
                    await writer.drain()
                    return
                if proxy.delay_s:
                    await asyncio.sleep(proxy.delay_s)
                if self.swallowing and not up:
                    proxy.swallowed += 1
                    continue
                writer.write(data)
                await writer.drain()

    def reset(self) -> None:
        for writer in self.writers:
            sock = writer.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    # A reset, and not a polite end.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """Listens on a port of its own, and connects to the server's for each connection.

    Attributes:
        port: where it listens, on 127.0.0.1.
        server_port: where the server listens.
        delay_s: each piece of data is late by so much.
        swallowed: pieces of replies that were thrown away.
    """

    def __init__(self, port: int, server_port: int) -> None:
        self.port = port
        self.server_port = server_port
        self.delay_s = 0.0
        self.swallowed = 0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.pipes: set[_Pipe] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=CHUNK_BYTES)

    async def stop(self) -> None:
        """Listen no more, and leave whoever is connected."""
        if self._server is not None:
            self._server.close()
        pipes = list(self.pipes)
        self.heal()
        self.reset()
        for pipe in pipes:
            pipe.task.cancel()
        if pipes:
            await asyncio.wait([pipe.task for pipe in pipes])

    def cut(self) -> None:
        """Nothing arrives any more in either direction, and nobody is told."""
        self.flowing.clear()

    def heal(self) -> None:
        """What was held arrives."""
        self.delay_s = 0.0
        self.flowing.set()

    def reset(self) -> None:
        """End every connection with a reset; new ones are welcome."""
        for pipe in list(self.pipes):
            pipe.reset()

    async def swallow(self, wait_s: float) -> int:
        """Let requests through and throw their replies away; after `wait_s`, reset the connections.

        Returns:
            Pieces of replies that were thrown away.
        """
        before = self.swallowed
        chosen = list(self.pipes)
        for pipe in chosen:
            pipe.swallowing = True
        await asyncio.sleep(wait_s)
        for pipe in chosen:
            pipe.reset()
        return self.swallowed - before

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pipes.add(_Pipe(self, reader, writer))
