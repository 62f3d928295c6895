"""Programs that run at once, and programs that are stopped: nobody's files are lost or left."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.archive.build import build_archive
from deploy.archive.pack import _replace
from deploy.common import paths
from deploy.common.paths import ROOT, temporary_folder
from deploy.common.waiting import wait_until

PROGRAMS = 6


def test_programs_replace_an_archive_at_once(tmp_path: Path):
    target = tmp_path / "store" / "x"
    target.parent.mkdir()

    def replace(program: int) -> None:
        for number in range(40):
            out = tmp_path / f"{program}-{number}"
            made = out / "x"
            (made / "weights").mkdir(parents=True)
            for name in ("a", "weights/b", "weights/c"):
                (made / name).write_text(f"{program}-{number}")
            _replace(made, target)

    with ThreadPoolExecutor(PROGRAMS) as pool:
        list(pool.map(replace, range(PROGRAMS)))  # raises what a program raised
    files = [path for path in target.rglob("*") if path.is_file()]
    assert len(files) == 3 and len({path.read_text() for path in files}) == 1


def test_replaces_a_file_and_a_link(tmp_path: Path):
    for number, place in enumerate((Path.touch, lambda target: target.symlink_to(tmp_path))):
        made, target = tmp_path / f"made-{number}" / "x", tmp_path / f"x-{number}"
        made.mkdir(parents=True)
        (made / "a").touch()
        place(target)
        _replace(made, target)
        assert not target.is_symlink() and (target / "a").is_file()


@pytest.mark.slow
def test_six_archives_of_one_app_at_once(model_folder: Path, tmp_path: Path):
    def make(_: int) -> Path:
        return build_archive("x", model_folder, engine={"name": "transformers"}, store=tmp_path)

    with ThreadPoolExecutor(PROGRAMS) as pool:
        made = set(pool.map(make, range(PROGRAMS)))
    assert made == {tmp_path / "x"} and (tmp_path / "x" / "weights" / "config.json").is_file()


def test_removes_folders_of_killed_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    killed, beginning, other = tmp_path / "tmpkilled", tmp_path / "tmpnew", tmp_path / "export"
    for folder in (killed, beginning, other):
        folder.mkdir()
        (folder / "file").touch()
    with temporary_folder() as running:
        long_ago = time.time() - 3600
        for folder in (killed, running, other):
            os.utime(folder, (long_ago, long_ago))
        with temporary_folder() as second:
            assert set(tmp_path.iterdir()) == {beginning, other, running, second}
    assert set(tmp_path.iterdir()) == {beginning, other}


WAITING = """
import sys, time
from pathlib import Path
from deploy.common import cli, paths
paths.BUILD = Path(sys.argv[1])
app = cli.app("A program.")
@app.command()
def wait() -> None:
    with paths.temporary_folder():
        print("ready", flush=True)
        time.sleep(60)
sys.exit(cli.run(app, "x", []))
"""


def program(folder: Path, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-c", WAITING, folder]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)
    assert started.stdout and started.stdout.readline() == "ready\n"
    assert len(list(folder.iterdir())) == 1
    return started


@pytest.mark.parametrize("stop", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_signal_leaves_no_temporary_folder(stop: signal.Signals, tmp_path: Path):
    started = program(tmp_path)
    started.send_signal(stop)
    assert started.wait(10) == 130 and started.stdout.read().strip() == "stopped"
    assert not list(tmp_path.iterdir())


def test_program_under_nohup_survives_a_closed_terminal(tmp_path: Path):
    ignored = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    started = program(tmp_path, preexec_fn=ignored)
    started.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(1)
    started.terminate()
    assert started.wait(10) == 130


def test_killed_program_leaves_a_folder_that_the_next_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started = program(tmp_path)
    started.kill()
    started.wait()
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr(paths, "_NEW_SECONDS", 0)

    def removed() -> bool:
        with temporary_folder():
            return not left.exists()

    assert wait_until(removed, timeout=5)
