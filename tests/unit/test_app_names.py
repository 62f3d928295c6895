"""The rule for an APP's name, which becomes a file, a URL, an image and an endpoint."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deploy.archive.__main__
import deploy.image.__main__
import deploy.torchserve.__main__
import deploy.vertex.__main__
import deploy.weights.__main__
from deploy.archive.build import build_archive, prepare
from deploy.archive.pack import archive_path
from deploy.common.paths import ROOT
from deploy.image.lookup import image_name
from deploy.image.run import container_name
from deploy.vertex.config import load_settings
from handler.config import ConfigError, app_names, check_name, load_app

ALLOWED = [
    "a",
    "1",
    "007",
    "1.0",
    "null",
    "true",
    "con",
    "all",
    "Mine",
    "a_b",
    "my-model.v2",
    "x.py",
]
ALLOWED += ["x.jar", "x.tar.gz", "weights", "handler", "build", "a" * 50, "smollm2-135m"]

RESERVED = {
    "models": "TorchServe cannot start a model with this name; choose another name",
    "Models": "TorchServe cannot start",
    "defaults": "handler/apps/defaults.yaml has the settings that all apps share; choose",
    "x.mar": "ends in .mar, the extension of archives; leave it out",
    "x.MAR": "ends in .mar",
}
RULE = "use letters, digits and . _ - only: at most 50 characters, each . _ - between letters"
MALFORMED = [
    "",
    " ",
    "a b",
    "a..b",
    "..",
    ".",
    ".x",
    "a.",
    "a-",
    "a--b",
    "a__b",
    "_a",
    "a/b",
    "a\\b",
]
MALFORMED += ["/a", "a:b", "a@b", "a+b", "a%20b", "a?b", "a#b", "a*", "$HOME", "a;b", "a'b", 'a"b']
MALFORMED += [
    "ä",
    "模型",
    "a\u200bb",
    "ａ",
    "١",
    "é",
    "a\n",
    "\ta",
    "a" * 51,
    "a" * 260,
    "a" * 5000,
]
REJECTED = {**RESERVED, **dict.fromkeys(MALFORMED, RULE)}

PROGRAMS = {
    "deploy.weights": (deploy.weights.__main__.main, []),
    "deploy.archive": (deploy.archive.__main__.main, []),
    "deploy.torchserve": (deploy.torchserve.__main__.main, ["serve"]),
    "deploy.image": (deploy.image.__main__.main, ["run"]),
    "deploy.vertex": (deploy.vertex.__main__.main, ["plan"]),
}


@pytest.mark.parametrize("name", [*ALLOWED, *app_names()])
def test_accepts_name(name: str):
    assert check_name(name) == name


@pytest.mark.parametrize(("name", "words"), REJECTED.items())
def test_rejects_name_and_says_the_rule(name: str, words: str):
    with pytest.raises(ConfigError) as error:
        check_name(name)
    text = str(error.value)
    assert text.startswith("APP=") and words in text and "\n" not in text and len(text) < 300


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "name", ["models", "a..b", "x.mar", "defaults", "a" * 260, "-x", "a b", "ä"]
)
def test_command_lines_say_the_rule(program: str, name: str, capsys):
    main, words = PROGRAMS[program]
    assert main([*words, name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "APP" in error
    assert REJECTED.get(name, "begins with a letter or a digit") in error


def test_hint_about_names_appears_only_for_the_app(capsys):
    assert deploy.archive.__main__.main(["a", "--port", "1"]) == 2
    assert "APP" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["models", "a..b", "-x", "a b"])
def test_make_passes_a_name_on(name: str):
    """The variable is quoted, so the program says the rule and not the shell."""
    line = re.search(r"^WEIGHTS := .*", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line and line[0].startswith('WEIGHTS := "$(APP)"')
    command = [sys.executable, "-m", "deploy.weights", name]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and "APP" in run.stderr


@pytest.mark.parametrize("name", ["a/../b", "..", "defaults", "models"])
def test_functions_say_the_rule_too(name: str, model_folder: Path, tmp_path: Path):
    """Chapters and scripts call them without a command line."""
    with pytest.raises(ConfigError, match="APP="):
        load_app(name)
    with pytest.raises(ConfigError, match="APP="):
        prepare(name, model_folder, tmp_path / "target")
    with pytest.raises(ConfigError, match="APP="):
        build_archive(name, model_folder, store=tmp_path / "store")


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_name_makes_an_archive(name: str, model_folder: Path, tmp_path: Path):
    store = tmp_path / "store"
    archive = build_archive(name, model_folder, engine={"name": "transformers"}, store=store)
    assert archive == archive_path(name, "no-archive", store) and archive.is_dir()
    shutil.rmtree(archive)
    assert not [*store.iterdir()], "nothing beside the archive"


@pytest.mark.parametrize("name", [*ALLOWED, "A.b_C-d"])
def test_allowed_name_makes_an_image_a_container_and_an_endpoint(name: str):
    """Docker: distribution/reference; Vertex AI: resource IDs and labels."""
    part = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
    assert re.fullmatch(rf"{part}/{part}:[\w][\w.-]{{0,127}}", image_name(name, "dev"))
    assert re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", container_name(name))
    settings = load_settings(project="a-project")
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,61}[a-z0-9]", settings.resource_id(name))
    assert re.fullmatch(r"[a-z0-9_-]{1,63}", settings.labels_for(name)["app"])


def test_different_names_do_not_share_an_endpoint():
    """Nor the label by which `cleanup` finds what it removes."""
    settings = load_settings(project="a-project")
    names = ["a.b", "a-b", "a_b", "A-b", "A.B", *("a" * 49 + end for end in "bc")]
    assert len({settings.resource_id(check_name(name)) for name in names}) == len(names)
    assert len({settings.labels_for(name)["app"] for name in names}) == len(names)
    assert settings.resource_id("smollm2-135m") == "serving-llms-smollm2-135m"
