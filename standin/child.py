"""What `Standin` runs: the settings as JSON, the folder, "keep" or "remove", the proxy's port."""

import asyncio
import json
import sys
from pathlib import Path

from standin.program import serve
from standin.settings import Settings

if __name__ == "__main__":
    options, folder, fate, port = sys.argv[1:]
    settings = Settings(folder=Path(folder), **json.loads(options))
    asyncio.run(serve(settings, temporary=fate == "remove", port=int(port)))
