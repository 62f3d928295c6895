"""Images, without a container runtime: names, parts, the build in the cloud, the drain."""

import importlib.util
import re
import socket
import stat
import sys
import zipfile
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from deploy.archive.pack import HANDLER, sources
from deploy.common import environments
from deploy.common.paths import ROOT, UserError
from deploy.image import report as image_report
from deploy.image.__main__ import main
from deploy.image.build import DOCKERFILE, TARGETS
from deploy.image.lookup import TAGS, how_to_build, labels_of
from deploy.image.report import PARTS, REST, part_of, table
from deploy.image.run import HARDENED, STOP_SECONDS, hardened, log_options
from deploy.image.runtime import container_runtime
from deploy.torchserve import launch, management, watch
from deploy.torchserve.launch import (
    BUFFERS,
    FOREIGN_LIMIT,
    OVER_LIMIT,
    cors_settings,
    engine_name,
    java_command,
    max_request_size,
    read_properties,
)
from deploy.torchserve.server import Server
from handler.drain import BUSY, DRAINING, VARIABLE, Drain

DOCKERFILE_TEXT = DOCKERFILE.read_text()


def test_no_container_runtime(monkeypatch, tmp_path):
    monkeypatch.delenv("DOCKER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="neither docker nor podman is installed"):
        container_runtime()


def test_container_runtime_that_does_not_exist(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER", str(tmp_path / "docker"))
    with pytest.raises(UserError, match="docker cannot be started: No such file or directory"):
        container_runtime()


def test_container_runtime_that_does_not_work(monkeypatch, tmp_path):
    program = tmp_path / "docker"
    program.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("DOCKER", str(program))
    with pytest.raises(UserError, match="docker does not work here: Cannot connect"):
        container_runtime()


@pytest.fixture
def empty_runtime(monkeypatch, tmp_path):
    """A container runtime without images, which fails at every command but `version`."""
    program = tmp_path / "docker"
    program.write_text('#!/bin/sh\n[ $1 = version ] || { echo "raw words: $*" >&2; exit 1; }\n')
    program.chmod(0o755)
    monkeypatch.setenv("DOCKER", str(program))


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (main, ["run", "gpt2"]),
        (main, ["push", "gpt2", "--registry", "host/project"]),
        (image_report.main, ["gpt2"]),
    ],
    ids=["run", "push", "report"],
)
@pytest.mark.parametrize(
    ("tag", "ways"),
    [
        ("pro", "`make build-pro APP=gpt2`"),
        ("nope", "`make build-dev APP=gpt2` or `make build-pro APP=gpt2`"),
    ],
)
def test_missing_image_error_says_how_to_build_it(
    empty_runtime, capsys, main, arguments, tag, ways
):
    assert main([*arguments, "--tag", tag]) == 1
    expected = f"error: there is no image serving-llms/gpt2:{tag}; build one with {ways}\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "arguments", [["stop", "--tag=dev"], ["build", "--port=7080"], ["run", "--shape-only"]]
)
def test_rejects_option_of_another_command(arguments, capsys):
    command, option = arguments
    assert main([command, "gpt2", option]) == 2
    name = option.partition("=")[0]
    assert f"error: No such option '{name}'" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "80", "70000", "-1", "abc", ""])
def test_rejects_impossible_port(port, capsys):
    assert main(["run", "gpt2", f"--port={port}"]) == 2
    assert f"PORT={port}: use a number from 1024 to 65533" in capsys.readouterr().err


def test_how_to_build_an_image_without_weights():
    assert how_to_build("gpt2", "pro", "BAKED=no") == "`make build-pro APP=gpt2 BAKED=no`"


@pytest.mark.parametrize("config", [{}, {"Labels": None}, {"Labels": {}}])
def test_labels_of_an_image_without_labels(config):
    assert labels_of({"Config": config}) == {}


def test_makefile_builds_each_tag():
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\nbuild-{tag}: " in makefile for tag in TAGS)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("opt/venv/lib/python3.11/site-packages/torch/lib/libtorch.so", "torch"),
        (
            "opt/venv/lib/python3.11/site-packages/torchserve-0.12.0.dist-info/RECORD",
            "TorchServe",
        ),
        ("opt/venv/lib/python3.11/site-packages/ts/frontend/model-server.jar", "TorchServe"),
        ("opt/venv/lib/python3.11/site-packages/jinja2/lexer.py", "other packages"),
        ("opt/java/lib/modules", "Java"),
        ("models/gpt2/weights/openvino_model.bin", "weights"),
        ("usr/lib/x86_64-linux-gnu/libc.so.6", REST),
    ],
)
def test_part_of_a_path(path, part):
    assert part_of(path) == part


def test_report_table_has_every_part():
    parts = Counter({"torch": 2_000_000, REST: 1_000_000})
    shown = table({"x": {"parts": dict(parts), "total": 3_000_000, "without_weights": 3_000_000}})
    assert [line.split()[0] for line in shown.splitlines()] == [
        *("MB", "torch", "Debian", "total", "without")
    ]
    assert not set(parts) - {*PARTS, REST}


def test_dockerfile_has_the_targets_and_arguments():
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE_TEXT, re.MULTILINE))
    assert stages >= set(TARGETS)
    for target in TARGETS:
        assert f"serving-llms.target={target} " in DOCKERFILE_TEXT
    assert "ARG APP=" in DOCKERFILE_TEXT and "ARG WEIGHTS=baked" in DOCKERFILE_TEXT


def test_context_holds_what_the_dockerfile_copies():
    kept = (ROOT / "docker" / "Dockerfile.dockerignore").read_text()
    kept = [line[1:] for line in kept.splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE_TEXT, re.MULTILINE):
        for path in line.split():
            assert (ROOT / path).exists(), path
            for file in sources(HANDLER) if path == "handler" else [ROOT / path]:
                name = str(file.relative_to(ROOT))
                assert any(fnmatch(name, k) and name.count("/") == k.count("/") for k in kept), name


def test_cloud_build_uses_the_same_targets_and_arguments():
    cloud = yaml.safe_load((ROOT / "deploy" / "vertex" / "cloudbuild.yaml").read_text())
    _, build = cloud["steps"]
    named = set(re.findall(r"--build-arg=(\w+)", " ".join(build["args"])))
    assert named == {"APP", "WEIGHTS"}
    assert cloud["substitutions"]["_TARGET"] in TARGETS
    assert all(step["name"].count(":latest") == 0 for step in cloud["steps"])


def test_java_command_and_configuration():
    settings = read_properties(ROOT / "docker" / "config.properties")
    assert settings["inference_address"] == "http://0.0.0.0:$$AIP_HTTP_PORT$$"
    assert settings["management_address"] == "unix:$$SERVING_STATE$$/management.sock"
    assert settings["metrics_address"] == "$$SERVING_FRONTEND_METRICS$$"  # a socket, too
    assert settings["cors_allowed_origin"] == "$$CORS_ORIGIN$$"
    x = Path("/somewhere")
    command = java_command("java", config=x, log4j=x, store=x, archive="a.mar", temporary=x)
    assert command[0] == "java" and command[-2:] == ["-m", "a=a.mar"]
    classes, main = command[command.index("-cp") + 1 :][:2]
    assert main == "serving.Frontend" and classes.split(":")[0].endswith("/frontend.jar")
    # A full heap ends Java, full network buffers fail at once; neither leaves it half alive.
    assert {"-XX:+ExitOnOutOfMemoryError", f"-Dio.netty.maxDirectMemory={BUFFERS}"} <= {*command}


@pytest.mark.parametrize(
    "origin",
    ["*", "http://localhost:3000", "https://example.com", "http://[::1]:8080", "tauri://localhost"],
)
def test_cors_setting_allows_one_origin_and_its_headers(origin):
    assert cors_settings(origin)["CORS_ORIGIN"] == origin
    assert "authorization" in cors_settings(origin)["CORS_HEADERS"]


def test_cors_is_off_by_default():
    assert set(cors_settings("").values()) == {""}


@pytest.mark.parametrize(
    "origin",
    [
        "localhost:3000",
        "http://localhost:3000/",
        "http://a http://b",
        "http://a,http://b",
        "http://Example.com",
        "http://*.example.com",
        "http://a:0",
        "http://a\n",
        "http://a$b",
        "null",
        " ",
    ],
)
def test_rejects_a_cors_setting_that_is_no_origin(origin):
    with pytest.raises(ValueError, match=r"CORS_ORIGIN: .* is no origin; write one"):
        cors_settings(origin)


def test_largest_body_is_a_little_over_the_limit_of_the_app(tmp_path):
    folder, mar = tmp_path / "a", tmp_path / "a.mar"
    folder.mkdir()
    for config, limit in (
        ("app: {limits: {max_body_bytes: 5000}}", 5000),
        ("minWorkers: 1", FOREIGN_LIMIT),
    ):
        (folder / "model-config.yaml").write_text(config)
        with zipfile.ZipFile(mar, "w") as content:
            content.writestr("model-config.yaml", config)
        assert max_request_size(folder) == max_request_size(mar) == limit + OVER_LIMIT


@pytest.mark.parametrize(
    ("config", "engine"),
    [
        ("app: {engine: {name: vllm}}", "vllm"),
        ("app: {engine: {name: openvino}}", "openvino"),
        ("app: {title: another handler}", ""),
        ("minWorkers: 1", ""),
    ],
)
def test_engine_of_an_archive(tmp_path, config, engine):
    (tmp_path / "model-config.yaml").write_text(config)
    assert engine_name(tmp_path) == engine


def test_workers_of_vllm_run_in_its_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "vllm_python", lambda: Path("/its/python"))
    for engine, python in (("vllm", "/its/python"), ("openvino", sys.executable)):
        (tmp_path / "model-config.yaml").write_text(f"app: {{engine: {{name: {engine}}}}}")
        assert Server(tmp_path).worker_python() == Path(python)
    x = Path("/somewhere")
    paths = {"config": x, "log4j": x, "store": x, "archive": "a", "temporary": x}
    command = java_command("java", **paths, python="/its/python")
    assert command[command.index("--python") + 1] == "/its/python"


def test_missing_vllm_is_one_sentence_that_names_the_command(monkeypatch):
    monkeypatch.setattr(environments, "vllm_python", lambda: None)
    with pytest.raises(UserError, match=r"^ENGINE=vllm: .*; run `make setup ENGINE=vllm` \(with"):
        environments.worker_python("vllm")


def test_image_for_gpus_may_load_compiled_kernels_from_tmp():
    assert hardened(gpu=False) == HARDENED and HARDENED[HARDENED.index("--tmpfs") + 1] == "/tmp"
    only = set(hardened(gpu=True)) ^ set(HARDENED)
    assert only == {"/tmp", "/tmp:exec"}


@pytest.mark.parametrize(
    "config", [None, "a: [", "[]", "app: null", "app: {limits: {max_body_bytes: many}}"]
)
def test_rejects_archive_with_an_unreadable_configuration(tmp_path, config):
    if config is not None:
        (tmp_path / "model-config.yaml").write_text(config)
    with pytest.raises(ValueError, match=r"model-config\.yaml cannot be read: "):
        max_request_size(tmp_path)
    (tmp_path / "a.mar").write_text("not a zip file")
    with pytest.raises(ValueError, match=r"model-config\.yaml cannot be read: "):
        max_request_size(tmp_path / "a.mar")


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """The container's entry, which finds modules of `deploy.torchserve` beside itself."""
    for module in (launch, management, watch):
        monkeypatch.setitem(sys.modules, module.__name__.rpartition(".")[2], module)
    spec = importlib.util.spec_from_file_location("serve", ROOT / "docker" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TEMPORARY", tmp_path / "temporary")
    module.TEMPORARY.mkdir()
    return module


def archive_in(folder: Path, manifest: str = '{"model": {"modelName": "gpt2"}}') -> None:
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / "MAR-INF" / "MANIFEST.json").write_text(manifest)
    (folder / "llm_handler.py").touch()


def test_layouts_of_a_model_store(serve, tmp_path):
    archive_in(tmp_path / "parent" / "gpt2")
    assert serve.by_name(tmp_path / "parent") == tmp_path / "parent"
    assert serve.only_archive(tmp_path / "parent") == "gpt2"
    archive_in(tmp_path / "itself")
    for _ in range(2):  # also after a restart
        store = serve.by_name(tmp_path / "itself")
        assert serve.only_archive(store) == "gpt2"
        assert (store / "gpt2" / "llm_handler.py").is_file()
    archive_in(tmp_path / "two" / "gpt2")
    archive_in(tmp_path / "two" / "other")
    with pytest.raises(LookupError, match="two holds gpt2, other, but should hold one archive"):
        serve.only_archive(serve.by_name(tmp_path / "two"))
    with pytest.raises(LookupError, match="absent is empty, but should hold one"):
        serve.only_archive(serve.by_name(tmp_path / "absent"))


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"model": {"modelName": 1}}'])
def test_rejects_archive_without_a_name(serve, tmp_path, manifest):
    archive_in(tmp_path / "itself", manifest)
    with pytest.raises(ValueError, match=r"MANIFEST\.json: model\.modelName cannot be read"):
        serve.by_name(tmp_path / "itself")


def test_rejects_port_that_it_cannot_listen_on(serve):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        message = f"AIP_HTTP_PORT: cannot listen on port {port}: Address already in use"
        with pytest.raises(ValueError, match=message):
            serve.check_port("AIP_HTTP_PORT", port)
    serve.check_port("AIP_HTTP_PORT", port)


@pytest.mark.parametrize(("program", "files"), [("/usr/bin/docker", True), ("podman", False)])
def test_log_of_a_container_is_bounded(program, files):
    options = log_options(program)
    assert "max-size=10m" in options and ("max-file=2" in options) == files


def test_containers_are_killed_after_their_drain(serve):
    assert STOP_SECONDS > serve.DRAIN_SECONDS + serve.JAVA_SECONDS


def test_scripts_are_executable():
    for name in ("docker/ready", ".ci/run", ".ci/base-image"):
        assert (ROOT / name).stat().st_mode & stat.S_IXUSR, name


def test_drain_reports_whether_it_is_busy(monkeypatch, tmp_path):
    (tmp_path / BUSY).touch()  # a worker died
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    drain = Drain()
    assert not (tmp_path / BUSY).exists() and not drain.requested()
    for active, busy in ((2, True), (1, True), (0, False), (0, False), (3, True)):
        drain.report(active)
        assert (tmp_path / BUSY).exists() == busy
    (tmp_path / DRAINING).touch()
    assert drain.requested()


def test_drain_writes_nothing_without_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    drain = Drain()
    drain.report(1)
    assert not drain.requested() and not list(tmp_path.iterdir())
