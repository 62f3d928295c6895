"""`make plan`, `make deploy`, ...: see `deploy.vertex.commands`."""

import sys

from deploy.vertex.commands import main

if __name__ == "__main__":
    sys.exit(main())
