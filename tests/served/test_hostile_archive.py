"""An archive from others that tries to write outside of the folder it is unpacked into."""

import json
import zipfile
from pathlib import Path

import pytest
import yaml

from deploy.torchserve.server import Server, ServerError
from handler.config import app_yaml

pytestmark = pytest.mark.served

MANIFEST = {"model": {"modelName": "slip", "handler": "slip.py", "modelVersion": "1.0"}}


def test_mar_file_that_leaves_its_folder_is_not_loaded(tmp_path: Path):
    """TorchServe unpacks it into a folder inside of Java's temporary folder."""
    archive = tmp_path / "slip.mar"
    with zipfile.ZipFile(archive, "w") as mar:
        mar.writestr("MAR-INF/MANIFEST.json", json.dumps(MANIFEST))
        mar.writestr("model-config.yaml", yaml.safe_dump(app_yaml("slip", local=True)))
        mar.writestr("slip.py", "class Slip:\n    pass\n")
        mar.writestr("a/../../../escaped", "")
    with pytest.raises(ServerError, match=r"Detected Zip Slip vulnerability: a/\.\./\.\./"):
        Server(archive, port=7200).start(timeout=60)
