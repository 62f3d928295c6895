"""pytest --nbval: chapters that need Docker are left out where there is none, with the reason."""

import os

from deploy.image import engine
from deploy.paths import UserError

NEED_DOCKER = ["05_build_the_container.ipynb", "05_solutions.ipynb"]
collect_ignore = []
reason = ""

try:
    engine()
except UserError as error:
    if os.environ.get("REQUIRE_DOCKER"):
        raise
    collect_ignore = NEED_DOCKER
    reason = str(error)


def pytest_terminal_summary(terminalreporter) -> None:
    """Say what was left out."""
    if reason:
        terminalreporter.write_line(f"SKIPPED {', '.join(NEED_DOCKER)}: {reason}")
