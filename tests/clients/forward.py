"""A model's command for the stand-in: pass AIP_HTTP_PORT on to a server that already runs.

So several deployed models need one loaded model: `python forward.py PORT`.
"""

import asyncio
import os
import sys


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until one side closes."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection."""
    onward, back = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    await asyncio.gather(copy(reader, back), copy(onward, writer))


async def main() -> None:
    """Listen as a container does: on all addresses."""
    port = int(os.environ["AIP_HTTP_PORT"])
    server = await asyncio.start_server(connected, "0.0.0.0", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
