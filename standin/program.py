"""The stand-in's own process: opens the doors, says where they are, waits, closes everything."""

import asyncio
import json
import shutil
import signal
import ssl
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import trustme
from aiohttp import web
from google.cloud.aiplatform.constants.base import SUPPORTED_REGIONS

from standin import leftovers
from standin.doors import grpc as grpc_door
from standin.doors import rest
from standin.doors.dispatch import Api
from standin.doors.proxy import Proxy
from standin.replicas.images import Apps, Registry
from standin.settings import READY, Settings


async def serve(settings: Settings, *, temporary: bool, port: int = 0) -> None:
    """Run until SIGTERM, SIGINT, or the end of standard input: whoever started us is gone.

    Args:
        settings: what `Standin` was given.
        temporary: whether the folder is ours to remove.
        port: of the proxy door; 0 for any.
    """
    leftovers.clean()
    ledger = leftovers.Ledger(settings.folder if temporary else None)
    images = Registry(settings) if settings.runner == "docker" else Apps(settings)
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        stack.callback(ledger.close)
        if isinstance(images, Registry):
            await images.start()
            stack.push_async_callback(images.stop)
            ledger.add(images.pid)
        api = Api(settings, images, ledger)
        await api.serving.start()
        stack.push_async_callback(api.serving.stop)
        stack.push_async_callback(api.operations.stop)
        proxy = Proxy(api.journal)
        await _open_doors(api, proxy, stack)
        ports = {"proxy": await proxy.start(port)}
        stack.push_async_callback(proxy.stop)
        if isinstance(images, Registry):
            ports["registry"] = images.address
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        watcher = asyncio.create_task(_end_of_input(stop))
        stack.callback(watcher.cancel)
        temporary_file = settings.folder / "ready.tmp"
        temporary_file.write_text(json.dumps(ports))
        temporary_file.rename(settings.folder / READY)
        await stop.wait()
    if temporary:
        shutil.rmtree(settings.folder, ignore_errors=True)


async def _open_doors(api: Api, proxy: Proxy, stack: AsyncExitStack) -> None:
    folder: Path = api.settings.folder
    key_file = folder / "ca.key"
    authority = trustme.CA.from_pem((folder / "ca.pem").read_bytes(), key_file.read_bytes())
    key_file.unlink()
    number = api.settings.number
    certificate = authority.issue_cert(
        "*.googleapis.com",
        *(f"*.{region}-{number}.prediction.vertexai.goog" for region in sorted(SUPPORTED_REGIONS)),
    )
    key = certificate.private_key_pem.bytes()
    chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    context.set_alpn_protocols(["http/1.1"])

    runner = web.AppRunner(rest.application(api), access_log=None, handler_cancellation=True)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context, shutdown_timeout=1)
    await site.start()
    proxy.rest = runner.addresses[0][1]
    server, proxy.grpc = await grpc_door.start(api, key, chain, proxy.host_of)
    stack.push_async_callback(server.stop, 0.5)


async def _end_of_input(stop: asyncio.Event) -> None:
    """Stop when the pipe from whoever started us is closed."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    with suppress(OSError):
        await reader.read()
    stop.set()
