"""pytest --nbval: chapters that need Docker are skipped where there is none, with the reason."""

import json
import os
from pathlib import Path

import pytest

from deploy.common.paths import UserError
from deploy.image.runtime import container_runtime

NEED_DOCKER = ["05_build_the_container.ipynb", "05_solutions.ipynb"]
collected: set[Path] = set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Remember which chapters run (it may be one of them), and skip what cannot."""
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    needy = [item for item in ours if item.path.name in NEED_DOCKER]
    try:
        if needy:
            container_runtime()
    except UserError as error:
        if os.environ.get("REQUIRE_DOCKER"):
            raise
        for item in needy:
            item.add_marker(pytest.mark.skip(reason=f"no container runtime: {error}"))
        ours = [item for item in ours if item not in needy]
    collected.update(item.path for item in ours if item.path.suffix == ".ipynb")


def pytest_terminal_summary(terminalreporter) -> None:
    """Say what was only run, and what fails on purpose."""
    tagged: dict[str, list[str]] = {"nbval-ignore-output": [], "raises-exception": []}
    total = 0
    for path in sorted(collected):
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            total += cell["cell_type"] == "code"
            for tag in cell["metadata"].get("tags", []):
                tagged[tag].append(f"{path.stem} {number}")
    if not total:
        return
    ignored, raising = tagged.values()
    terminalreporter.write_line(
        f"{total - len(ignored)} of {total} code cells have their outputs compared"
    )
    terminalreporter.write_line(f"run and checked by asserts only: {', '.join(ignored) or 'none'}")
    terminalreporter.write_line(f"fail on purpose: {', '.join(raising) or 'none'}")
