"""What the chapters' helpers store in a notebook."""

import nbformat
import pytest
from nbclient import NotebookClient

from deploy.common.paths import ROOT

CELL = """
from course.helpers import busy
from tqdm.notebook import tqdm

with busy("counting"):
    print("one")
    total = sum(tqdm(range(3)))
print(total)
"""


@pytest.mark.slow
def test_busy_stores_its_own_bar_alone():
    """A library's bar appears only where its work is not done yet, so outputs would differ."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(notebook, resources={"metadata": {"path": ROOT / "notebooks"}}).execute()
    bar, printed = notebook.cells[0].outputs
    assert bar.data["text/html"] == "✓ counting"
    assert printed.text == "3\n"
