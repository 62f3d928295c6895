"""`python -m tests`: everything is in one of its parts, and one that fails is noticed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.common.paths import ROOT
from deploy.common.waiting import wait_until
from tests import __main__ as checks
from tests.__main__ import main, parts

LONG = """
import time
from pathlib import Path

def test_it():
    Path(__file__).with_name("began").touch()
    try:
        time.sleep(60)
    finally:
        Path(__file__).with_name("cleaned").touch()
"""


def test_every_test_and_chapter_is_in_one_part():
    files = [str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")]
    files += [f"notebooks/{path.name}" for path in ROOT.glob("notebooks/0*.ipynb")]
    assert len(files) > 50
    for file in files:
        assert len([part for part in parts() if file.startswith((f"{part}/", f"{part}_"))]) == 1
    assert len(parts()) == len({*parts()})


def test_part_that_cannot_run_is_skipped_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(checks, "vllm_python", lambda: None)
    assert main(["vllm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    skipped = [line for line in lines if line.startswith("vllm")]
    assert len(skipped) == 2, "at the beginning, and in the table at the end"
    assert all("skipped: vLLM is not installed (make setup ENGINE=vllm)" in x for x in skipped)


def test_tests_of_vllm_run_in_its_environment(monkeypatch):
    monkeypatch.setattr(checks, "vllm_python", lambda: Path("/its/python"))
    assert "vllm" in parts() and checks.skipped("vllm") is None
    assert checks.command_of("vllm")[0] == "/its/python"
    assert all((ROOT / name).is_file() for name in checks.VLLM_TESTS)


@pytest.mark.slow
def test_failing_part_does_not_stop_the_others(tmp_path: Path, capsys):
    texts = {"bad": "def test_it(): assert 1 == 2", "good": "def test_it(): pass", "none": ""}
    for name, text in texts.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    names = [str(tmp_path / f"test_{name}.py") for name in texts]
    assert main([*names, "--jobs", "1"]) == 1
    shown = capsys.readouterr().out
    assert "assert 1 == 2" in shown and "3 of 3 parts done" in shown
    ends = {line.split()[0]: line.split()[-1] for line in shown.splitlines() if "  " in line}
    assert [ends[name] for name in names] == ["FAILED", "passed", "FAILED"]
    assert main([names[1]]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_run_lets_its_tests_clean_up(tmp_path: Path, stop, status):
    (tmp_path / "test_long.py").write_text(LONG)
    command = [sys.executable, "-m", "tests", str(tmp_path / "test_long.py")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: (tmp_path / "began").exists() or process.poll() is not None, 60)
    assert process.poll() is None
    process.send_signal(stop)
    assert process.wait(30) == status
    assert (tmp_path / "cleaned").exists()


@pytest.mark.slow
def test_process_left_behind_does_not_block_the_run(tmp_path: Path, capsys):
    text = "import subprocess\n\ndef test_it():\n    print(subprocess.Popen(['sleep', '60']).pid)\n"
    (tmp_path / "test_left.py").write_text(text + "    raise SystemError\n")
    began = time.monotonic()
    assert main([str(tmp_path / "test_left.py")]) == 1
    assert time.monotonic() - began < 30
    os.kill(int(re.search(r"^(\d+)$", capsys.readouterr().out, re.MULTILINE)[1]), signal.SIGKILL)


@pytest.mark.parametrize("jobs", ["0", "-1", "two", ""])
def test_rejects_wrong_number_of_jobs(jobs: str, capsys):
    with pytest.raises(SystemExit):
        main([f"--jobs={jobs}"])
    assert capsys.readouterr().err == f"error: JOBS={jobs}: use a whole number, 1 or more\n"
