"""A mail server that delivers into a directory: so that notices can be read on a machine that sends no mail.

It speaks as much of SMTP (RFC 5321) as a client needs that hands over one message after the other.
"""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Final

#: Longest command line and line of text: RFC 5321, 4.5.3.1, asks for 1,000.
LINE_BYTES_MAX: Final = 65_536
#: Largest message; a notice with a picture has some 100 KB.
MESSAGE_BYTES_MAX: Final = 10_000_000
#: Mails that are kept, the newest: weeks of a sample fleet's, and no disk is filled.
MAILS_MAX: Final = 1_000
#: A client that says nothing for so long is left: RFC 5321, 4.5.3.2.7.
SILENCE_S: Final = 300.0


class MailDirectory:
    """The server, for one event loop. Each mail becomes a file `<instant>-<number>.eml`, which any mail program opens.

    Attributes:
        port: TCP port on 127.0.0.1, after `start`.
        taken: mails since the start.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = 0
        self.taken = 0
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen on a free port."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=LINE_BYTES_MAX)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Listen no more, and leave whoever is connected."""
        if self._server is not None:
            self._server.close()
        for client in self._clients:
            client.cancel()
        if self._clients:
            await asyncio.wait(self._clients)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
                await self._talk(reader, writer)
        finally:
            self._clients.discard(task)
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def say(text: str) -> None:
            writer.write(text.encode() + b"\r\n")
            await writer.drain()

        async def line() -> bytes:
            async with asyncio.timeout(SILENCE_S):
                return await reader.readuntil(b"\r\n")

        await say("220 localhost ESMTP preservarium")
        while True:
            word = (await line())[:4].upper().strip()
            if word == b"DATA":
                await say("354 end with a line of one dot")
                body: list[bytes] = []
                size = 0
                while (text := await line()) != b".\r\n":
                    size += len(text)
                    if size <= MESSAGE_BYTES_MAX:
                        # A dot in front was doubled on the way (RFC 5321, 4.5.2).
                        body.append(text.removeprefix(b"."))
                if size > MESSAGE_BYTES_MAX:
                    await say(f"552 at most {MESSAGE_BYTES_MAX} bytes")
                else:
                    name = await asyncio.to_thread(self._keep, b"".join(body))
                    await say(f"250 kept as {name}")
            elif word == b"QUIT":
                await say("221 bye")
                return
            elif word == b"EHLO":
                await say(f"250-localhost\r\n250-8BITMIME\r\n250 SIZE {MESSAGE_BYTES_MAX}")
            elif word in (b"HELO", b"MAIL", b"RCPT", b"RSET", b"NOOP"):
                await say("250 ok")
            else:
                await say("502 not here")

    def _keep(self, message: bytes) -> str:
        self.taken += 1
        at = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
        file = self.directory / f"{at}-{self.taken:04d}.eml"
        file.write_bytes(message)
        for old in sorted(self.directory.glob("*.eml"))[:-MAILS_MAX]:
            old.unlink(missing_ok=True)
        return file.name
