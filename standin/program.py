"""The stand-in's own process: start the servers, write their ports, wait, stop everything.

    python -m standin.program SETTINGS FOLDER keep|remove PORT

`Standin` runs it. SETTINGS is JSON; "remove" deletes the folder at the end; PORT is the proxy's.
"""

import asyncio
import json
import os
import shutil
import signal
import ssl
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import trustme
from aiohttp import web

from standin.doors import grpc as grpc_server
from standin.doors import rest
from standin.doors.dispatch import Api
from standin.doors.proxy import Proxy
from standin.limits import REGIONS
from standin.replicas import leftovers
from standin.replicas.images import Apps, Registry
from standin.settings import READY, StandinSettings


async def serve(settings: StandinSettings, *, temporary: bool, port: int = 0) -> None:
    """Run until SIGTERM, SIGINT, or the end of standard input: the starting program has ended.

    Args:
        settings: of this stand-in.
        temporary: whether to remove the folder at the end.
        port: the proxy's port; 0 for any free one.
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
        await api.deployments.start()
        stack.push_async_callback(api.deployments.stop)
        stack.push_async_callback(api.operations.stop)
        proxy = Proxy(api.journal)
        await _start_servers(api, proxy, stack)
        ports: dict[str, int | str] = {"proxy": await proxy.start(port)}
        stack.push_async_callback(proxy.stop)
        if isinstance(images, Registry):
            ports["registry"] = images.address
        for end in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(end, stop.set)
        watcher = asyncio.create_task(_stop_at_end_of_input(stop))
        stack.callback(watcher.cancel)
        temporary_file = settings.folder / "ready.tmp"
        temporary_file.write_text(json.dumps(ports))
        temporary_file.rename(settings.folder / READY)
        await stop.wait()
    if temporary:
        shutil.rmtree(settings.folder, ignore_errors=True)


async def _start_servers(api: Api, proxy: Proxy, stack: AsyncExitStack) -> None:
    folder = api.settings.folder
    key_file = folder / "ca.key"
    authority = trustme.CA.from_pem((folder / "ca.pem").read_bytes(), key_file.read_bytes())
    key_file.unlink()
    number = api.settings.project_number
    certificate = authority.issue_cert(
        "*.googleapis.com",
        *(f"*.{region}-{number}.prediction.vertexai.goog" for region in sorted(REGIONS)),
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
    server, proxy.grpc = await grpc_server.start(api, key, chain, proxy.host_of)
    stack.push_async_callback(server.stop, 0.5)


async def _stop_at_end_of_input(stop: asyncio.Event) -> None:
    """Set `stop` when the starting program has closed its pipe, or was killed."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    with suppress(OSError):
        await reader.read()
    stop.set()


if __name__ == "__main__":
    options, folder, at_end, port = sys.argv[1:]
    settings = StandinSettings(folder=Path(folder), **json.loads(options))
    asyncio.run(serve(settings, temporary=at_end == "remove", port=int(port)))
    sys.stdout.flush()
    os._exit(0)  # everything is stopped; to free the SDK's classes takes Python a second
