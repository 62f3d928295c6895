"""The HTTPS proxy: the only way into the stand-in, and no way out of the machine.

Clients that use it (HTTPS_PROXY) connect to Google's host names with their code unchanged. The
proxy accepts CONNECT for Google's host names only and connects these to the REST or gRPC server on
loopback. It rejects everything else with 403, so no request leaves the machine through it.
"""

import asyncio
import re
from contextlib import suppress

from standin.journal import Journal

_ALLOWED = re.compile(r"(?:[\w-]+\.)+(?:googleapis\.com|prediction\.vertexai\.goog):443")
_REJECTED = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"The stand-in for Vertex AI lets nothing leave this machine.\n"
)


class Proxy:
    """The proxy server. Set the ports `rest` and `grpc` before `start`."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.rest = self.grpc = 0
        self._hosts: dict[int, str] = {}

    async def start(self, port: int = 0) -> int:
        """Listen on loopback; return the port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        listening: int = self._server.sockets[0].getsockname()[1]
        return listening

    async def stop(self) -> None:
        self._server.close()

    def host_of(self, port: int) -> str:
        """Return the host name that a gRPC connection is for; gRPC does not pass it on.

        Args:
            port: the connection's port on the proxy's side.
        """
        return self._hosts.get(port, "")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            head = await reader.readuntil(b"\r\n\r\n")
            verb, target, *_ = [*head.split(b"\r\n")[0].decode("latin-1").split(" "), ""]
            if verb == "CONNECT" and _ALLOWED.fullmatch(target):
                await self._connect(target, reader, writer)
            else:
                self.journal.event("rejected: would leave the machine", verb=verb, target=target)
                writer.write(_REJECTED)
                await writer.drain()
        writer.close()

    async def _connect(
        self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await writer.drain()
        record = await reader.readexactly(5)  # a TLS record's header ends with its length
        hello = record + await reader.readexactly(int.from_bytes(record[3:]))
        # ALPN in the ClientHello: gRPC offers h2 alone, browsers and curl offer HTTP/1.1 too.
        grpc = b"\x02h2" in hello and b"\x08http/1.1" not in hello
        inner_reader, inner_writer = await asyncio.open_connection(
            "127.0.0.1", self.grpc if grpc else self.rest
        )
        port = inner_writer.get_extra_info("sockname")[1]
        if grpc:  # only these: a connection to the REST server may have the same port at that time
            self._hosts[port] = target.removesuffix(":443")
        try:
            inner_writer.write(hello)
            await asyncio.gather(_pipe(reader, inner_writer), _pipe(inner_reader, writer))
        finally:
            if grpc:
                del self._hosts[port]


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        writer.close()
