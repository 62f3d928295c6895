"""Start and stop the processes of a server, and what can go wrong."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.faults import Victim
from deploy.archive.build import build_archive
from deploy.archive.pack import FORMATS
from deploy.common.paths import MODEL_STORE, ROOT
from deploy.common.waiting import wait_until
from deploy.torchserve.launch import cors_settings, server_environment
from deploy.torchserve.server import Server, ServerError, port_holder
from handler.metrics import FRONTEND_VARIABLE, PORT_VARIABLE
from tests.bad_input import OK

TORCH = {"engine": {"name": "transformers"}}
pytestmark = pytest.mark.served


def closed(server: Server) -> bool:
    return not any(port_holder(port) for port in server.ports)


def test_two_servers_run_side_by_side_and_stop_alone(tiny_server, tiny_llama: Path, tmp_path: Path):
    archive = build_archive("tiny", tiny_llama, **TORCH, store=tmp_path)
    other = Server(archive, port=7200)
    with other:
        expected = httpx.post(tiny_server.url, json=OK).json()
        assert httpx.post(other.url, json=OK).json() == expected
        assert other.workers()[0]["pid"] != tiny_server.workers()[0]["pid"]
    assert closed(other)
    assert httpx.post(tiny_server.url, json=OK).json() == expected
    other.stop()  # a second time does nothing


@pytest.mark.parametrize("archive_format", FORMATS[1:])
def test_mar_file_and_directory_give_the_same_response(
    tiny_server, tiny_llama: Path, tmp_path: Path, archive_format: str
):
    archive = build_archive(
        "tiny", tiny_llama, archive_format=archive_format, **TORCH, store=tmp_path
    )
    assert archive.suffix == ".mar"
    with Server(archive, port=7200) as server:
        expected = httpx.post(tiny_server.url, json=OK).json()
        assert httpx.post(server.url, json=OK).json() == expected


def test_busy_port_is_an_error_with_its_holder(tiny_llama: Path, tmp_path: Path):
    archive = build_archive("tiny", tiny_llama, **TORCH, store=tmp_path)
    with socket.create_server(("127.0.0.1", 7202)):
        with pytest.raises(ServerError, match=rf"port 7202 is taken by .*\(pid {os.getpid()}\)"):
            Server(archive, port=7200).start()


def test_missing_archive_is_an_error(tmp_path: Path):
    with pytest.raises(ServerError, match="there is no such archive; run `make archive`"):
        Server(tmp_path / "nothing", port=7200).start()


def test_model_that_cannot_be_loaded_is_an_error(tiny_llama: Path, tmp_path: Path):
    archive = build_archive("tiny", tiny_llama, **TORCH, store=tmp_path)
    (archive / "weights" / "config.json").unlink()
    server = Server(archive, port=7200)
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"(?s)could not load the model.*config\.json"):
        server.start()
    assert time.monotonic() - began < 40
    assert closed(server)


def test_start_ends_at_its_timeout(smollm2: Path, tmp_path: Path):
    server = Server(build_archive("smollm2-135m", smollm2, **TORCH, store=tmp_path), port=7200)
    with pytest.raises(ServerError, match="no worker was ready within 1 s"):
        server.start(timeout=1.0)
    assert closed(server)


def test_killed_java_leaves_no_worker_behind(smollm2: Path, tmp_path: Path):
    """The worker is ended too, though its parent is gone."""
    server = Server(build_archive("smollm2-135m", smollm2, **TORCH, store=tmp_path), port=7200)
    workers = []

    def kill_java(timeout: float) -> None:
        java = psutil.Process(server.process.pid)
        wait_until(java.children, timeout=60, interval=0.05)
        workers.extend(java.children(recursive=True))
        java.kill()
        Server._wait_until_ready(server, timeout)

    server._wait_until_ready = kill_java
    with pytest.raises(ServerError, match="TorchServe ended while starting"):
        server.start()
    assert workers and not any(process.is_running() for process in workers)
    assert closed(server) and server._temporary is None


def test_interrupted_stop_can_be_repeated(tiny_llama: Path, tmp_path: Path, monkeypatch):
    server = Server(build_archive("tiny", tiny_llama, **TORCH, store=tmp_path), port=7200).start()
    pids = [worker["pid"] for worker in server.workers()]

    def interrupted(timeout=None):
        if timeout is not None:
            raise KeyboardInterrupt
        return wait()

    wait = server.process.wait
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(server.process, "wait", interrupted)
        server.stop()
    server.stop()
    assert closed(server) and not any(psutil.pid_exists(pid) for pid in pids)


def test_java_that_ends_while_starting_is_an_error(tiny_llama: Path, tmp_path: Path):
    server = Server(build_archive("tiny", tiny_llama, **TORCH, store=tmp_path), port=7200)
    server.settings["inference_address"] = "http://192.0.2.1:7200"  # not an address of this machine
    with pytest.raises(ServerError, match="TorchServe ended while starting"):
        server.start()
    assert closed(server)


@pytest.mark.parametrize("port", ["0", "80", "65535", "70000", "-1", "abc", ""])
def test_rejects_impossible_port(port: str):
    command = [sys.executable, "-m", "deploy.torchserve", "serve", "smollm2-135m", f"--port={port}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert f"PORT={port}: use a number from 1024 to 65533" in run.stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_command_stops_java_and_workers_within_10_s(stop: signal.Signals, tiny_llama: Path):
    """What Ctrl-C in `make serve` does, with a request in flight."""
    arguments = ["--port", "7200", "--model-dir", tiny_llama, "--engine", "transformers"]
    command = subprocess.Popen(
        [sys.executable, "-m", "deploy.torchserve", "serve", "tiny-test", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as `command &` does
    )
    assert "archived" in command.stdout.readline()
    assert command.stdout.readline().startswith("starting")
    assert "make test APP=tiny-test PORT=7200" in command.stdout.readline()
    assert "http://127.0.0.1:7200/v1" in command.stdout.readline()
    tree = psutil.Process(command.pid).children(recursive=True)
    assert {p.name() for p in tree} >= {"java"} and len(tree) >= 2
    began = time.monotonic()
    command.send_signal(stop)
    command.wait(timeout=20)
    took = time.monotonic() - began
    shutil.rmtree(MODEL_STORE / "tiny-test")
    assert command.returncode == 130 and command.stdout.read().strip() == "stopped"
    assert took < 10, f"{took:.1f} s"
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in tree)
    assert not any(port_holder(port) for port in range(7200, 7205))


def test_host_opens_only_the_inference_port(tiny_llama: Path, tmp_path: Path):
    """`host` moves the inference port alone; metrics stay on loopback."""
    archive = build_archive("tiny", tiny_llama, **TORCH, store=tmp_path)
    with Server(archive, port=7200, host="0.0.0.0") as server:
        java = psutil.Process(server.process.pid)
        listening = {
            connection.laddr.port: connection.laddr.ip.removeprefix("::ffff:")
            for connection in java.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
    assert set(listening) <= set(server.ports), listening
    assert {port for port, ip in listening.items() if ip != "127.0.0.1"} == {server.port}


@pytest.mark.parametrize("guard_too", [False, True])
def test_killed_starter_leaves_no_server(guard_too: bool, tiny_llama: Path, tmp_path: Path):
    """As nbval and JupyterLab do with a kernel: SIGKILL, so no atexit. The worker is stuck."""
    archive = build_archive("tiny", tiny_llama, **TORCH, store=tmp_path)
    code = (
        "import sys, time; from deploy.torchserve.server import Server; from pathlib import Path;"
    )
    code += "s = Server(Path(sys.argv[1]), port=7200).start();"
    code += "print(s._temporary, s._guard.pid, s.process.pid, flush=True); time.sleep(600)"
    starter = subprocess.Popen(
        [sys.executable, "-c", code, archive], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    temporary, guard, java = starter.stdout.readline().split()
    tree = [psutil.Process(int(java)), *psutil.Process(int(java)).children(recursive=True)]
    assert port_holder(7200) and Path(temporary).is_dir() and len(tree) >= 2
    tree[-1].suspend()
    if guard_too:
        if sys.platform != "linux":
            starter.kill()
            pytest.skip("only Linux ends a process with the one that started it")
        os.kill(int(guard), signal.SIGKILL)
    starter.kill()
    starter.wait()
    wait_until(lambda: not any(process.is_running() for process in tree), timeout=30)
    assert not any(map(port_holder, Server(archive, port=7200).ports))
    if guard_too:
        shutil.rmtree(temporary)
    else:
        wait_until(lambda: not Path(temporary).exists(), timeout=30)


def test_worker_of_openvino_loads_no_torch(smollm2_server):
    """So it is ready a second earlier."""
    worker = Victim(smollm2_server.url, lambda: smollm2_server.process.pid).worker()
    mapped = {Path(file.path).name for file in worker.memory_maps()}
    assert any(name.startswith("libopenvino") for name in mapped)
    assert not any(name.startswith("libtorch") for name in mapped)


def test_processes_have_no_variable_outside_of_the_list(smollm2_server):
    """Nothing that could hold a credential of the user reaches Java or the worker."""
    ours = {"HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "SERVING_STATE", *cors_settings("")}
    ours |= {PORT_VARIABLE, FRONTEND_VARIABLE}
    java = psutil.Process(smollm2_server.process.pid)
    processes = [java, *java.children(recursive=True)]
    assert len(processes) >= 2
    for process in processes:
        names = {n for n in process.environ() if not n.startswith("TS_")} - ours
        assert not names - set(server_environment(dict.fromkeys(names, ""))), process
        remote = [c.raddr.ip for c in process.net_connections() if c.raddr]
        assert set(remote) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, "nothing else is contacted"


def test_archive_can_be_made_again_while_it_is_served(tiny_server, tiny_llama: Path):
    """Requests go on, and a new worker loads the new archive."""
    inode = tiny_server.archive.stat().st_ino
    for _ in range(2):
        made = build_archive(
            "tiny", tiny_llama, engine={"name": "transformers"}, store=tiny_server.archive.parent
        )
        assert made == tiny_server.archive
        assert httpx.post(tiny_server.url, json=OK, timeout=60).status_code == 200
    assert made.stat().st_ino != inode
    (worker,) = tiny_server.workers()
    psutil.Process(worker["pid"]).kill()

    def replaced() -> bool:
        status = httpx.post(tiny_server.url, json=OK, timeout=60).status_code
        return status == 200 and tiny_server.workers()[0]["pid"] != worker["pid"]

    assert wait_until(replaced, timeout=60, interval=0.5)
