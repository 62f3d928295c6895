"""The compiled frontend in the repository belongs to the source beside it."""

import zipfile
from pathlib import Path

import pytest

from tools import frontend


def test_jar_is_what_the_compiler_makes_of_the_source(tmp_path: Path):
    javac = frontend.compiler()
    if javac is None:
        pytest.skip(f"no javac {frontend.RELEASE} on this machine")
    frontend.build(javac, tmp_path / "frontend.jar")
    same = (tmp_path / "frontend.jar").read_bytes() == frontend.JAR.read_bytes()
    assert same, "deploy/torchserve/*.java have changed: run `python -m tools.frontend`"


def test_classes_run_on_the_oldest_java_and_replace_none_of_torchserve():
    with zipfile.ZipFile(frontend.JAR) as jar:
        services, names = jar.namelist()[-1], jar.namelist()[:-1]
        versions = {jar.read(name)[7] for name in names}
    assert versions == {44 + int(frontend.RELEASE)}
    assert all(name.startswith("serving/") and name.endswith(".class") for name in names)
    assert services.startswith("META-INF/services/")
