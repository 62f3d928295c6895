"""The image, run as `make run` runs it: hardened, asked, killed, stopped, restarted."""

import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from benchmarks.load import Target, closed_loop
from deploy.common.paths import UserError
from deploy.image.run import HARDENED, run_container, wait_until_ready
from deploy.image.runtime import container_runtime
from deploy.torchserve.client import predict, stream
from tests.container.conftest import APP, PORT, docker

URL = f"http://127.0.0.1:{PORT}/predictions/{APP}"
FRANCE = {
    "instances": [{"messages": [{"role": "user", "content": "What is the capital of France?"}]}]
}
LONG = {
    "instances": ["Once upon a time"],
    "parameters": {"max_new_tokens": 150, "ignore_eos": True},
}


def state(name: str, what: str) -> str:
    return docker("inspect", "--format", f"{{{{.State.{what}}}}}", name)


def processes(name: str, pattern: str) -> list[str]:
    """Ids, inside, of the processes whose command matches; the pattern must not match itself."""
    find = f"for p in /proc/[0-9]*; do if grep -qa '{pattern}' $p/cmdline; then echo $p; fi; done"
    return [p.removeprefix("/proc/") for p in docker("exec", name, "sh", "-c", find).split()]


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def restart(name: str) -> None:
    docker("start", name)
    wait_until_ready(container_runtime(), name)


def test_it_answers_and_streams(container):
    assert "Paris" in predict(URL, FRANCE)["predictions"][0]
    long = {"instances": ["Once upon a time"]}
    long["parameters"] = {"max_new_tokens": 400, "ignore_eos": True}
    # An event holds what came in a tenth of a second, so a short answer may be two of them.
    events = list(stream(URL, long))
    assert len(events) > 3 and events[-1]["completion_tokens"] == 400
    with pytest.raises(UserError, match=r"parameters\.temperature"):
        predict(URL, FRANCE | {"parameters": {"temperature": 9}})


def test_it_is_hardened(container):
    host = json.loads(docker("inspect", container))[0]["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges"] and host["PidsLimit"] == 512
    published = json.loads(docker("inspect", container))[0]["NetworkSettings"]["Ports"]
    assert {key for key, value in published.items() if value} == {"7080/tcp"}

    def run(command: str) -> str:
        return docker("exec", container, "sh", "-c", command, check=False)

    assert run("id -u") == "1000"
    assert run("touch /models/x /opt/x /x 2>/dev/null; ls /x /opt/x /models/x 2>/dev/null") == ""
    assert run("grep CapEff /proc/1/status").split()[1] == "0" * 16
    assert run("grep NoNewPrivs /proc/1/status").split()[1] == "1"


def test_management_is_reachable_from_inside_only(container):
    form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    address = docker("inspect", "--format", form, container)
    assert httpx.get(f"http://{address}:7080/ping", timeout=5).status_code == 200
    for port in (7081, 7082, 7083, 7084):
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://{address}:{port}/models", timeout=5)


def test_memory_under_two_hundred_requests(container):
    report = closed_loop(
        Target(URL), clients=16, requests_each=13, new_tokens=64, seed=0, warm_up=0
    )
    assert not report.errors
    assert state(container, "OOMKilled") == "false"
    used = docker("stats", "--no-stream", "--format", "{{.MemPerc}}", container)
    assert float(used.rstrip("%")) < 95, used


def test_docker_sees_it_healthy(container):
    wait_for(lambda: state(container, "Health.Status") == "healthy", 30)


def test_a_stop_answers_what_is_in_flight_and_refuses_what_is_new(container):
    with ThreadPoolExecutor() as pool:
        requests = [pool.submit(predict, URL, LONG) for _ in range(4)]
        streamed = pool.submit(lambda: list(stream(URL, LONG)))
        time.sleep(1)
        stop = pool.submit(docker, "stop", "-t", "30", container)
        time.sleep(0.7)
        late = httpx.post(URL, json=LONG, timeout=30)
        for request in requests:
            assert request.result()["predictions"][0].startswith("Once upon a time")
        assert streamed.result()[-1]["completion_tokens"] == 150
        stop.result()
    assert late.status_code == 503 and late.headers["retry-after"]
    assert late.json()["error"]["message"].startswith("the server is shutting down")
    assert state(container, "ExitCode") == "0"


def test_a_drain_has_a_limit(lean):
    name = run_container(APP, tag="lean-test", port=PORT, environment={"DRAIN_SECONDS": "1"})
    endless = {
        "instances": ["Once"] * 8,
        "parameters": {"max_new_tokens": 1000, "ignore_eos": True},
    }
    with ThreadPoolExecutor() as pool:
        request = pool.submit(httpx.post, URL, json=endless, timeout=60)
        time.sleep(2)
        began = time.monotonic()
        docker("stop", "-t", "30", name)
        assert time.monotonic() - began < 10
        with pytest.raises(httpx.TransportError):
            request.result()
    assert state(name, "ExitCode") == "0"
    assert "time is up" in docker("logs", name)


def test_a_dead_frontend_ends_the_container(container):
    (java,) = processes(container, "ModelServe[r]")
    docker("exec", container, "sh", "-c", f"kill -9 {java}")
    wait_for(lambda: state(container, "Running") == "false")
    assert state(container, "ExitCode") == "1"
    restart(container)
    assert "Paris" in predict(URL, FRANCE)["predictions"][0]


def test_a_dead_worker_is_replaced_inside(container):
    (worker,) = processes(container, "model_service_worke[r]")
    docker("exec", container, "sh", "-c", f"kill -9 {worker}")
    wait_for(lambda: docker("exec", container, "/opt/serving/ready", check=False).startswith("not"))
    wait_until_ready(container_runtime(), container)
    assert "Paris" in predict(URL, FRANCE)["predictions"][0]
    assert state(container, "Running") == "true"


def ask_until(done: threading.Event, statuses: list[int]) -> None:
    """Ask again and again; 0 stands for a connection that broke or was refused."""
    while not done.is_set():
        try:
            statuses.append(httpx.post(URL, json=LONG, timeout=60).status_code)
        except httpx.TransportError:
            statuses.append(0)
            time.sleep(0.05)


@pytest.mark.timeout(1200)
def test_rounds_of_stop_kill_and_restart_under_load(container):
    """Stops and kills in turn, each in the middle of requests. ROUNDS=20 takes five minutes."""
    for number in range(int(os.environ.get("ROUNDS", "2"))):
        polite = number % 2 == 0
        statuses: list[int] = []
        done = threading.Event()
        with ThreadPoolExecutor() as pool:
            clients = [pool.submit(ask_until, done, statuses) for _ in range(3)]
            try:
                time.sleep(1.5)
                docker(*(("stop", "-t", "30") if polite else ("kill",)), container)
            finally:
                done.set()
        assert all(client.exception() is None for client in clients)
        assert state(container, "ExitCode") == ("0" if polite else "137"), number
        assert set(statuses) <= {200, 503, 0}, statuses
        if polite:  # what was in flight has been answered
            assert statuses.count(200) >= 3, statuses
        restart(container)
        assert predict(URL, {"instances": ["Hello"]})["predictions"]
    processes = docker("top", container, "-eo", "pid,comm").splitlines()[1:]
    names = sorted(line.split()[1] for line in processes)
    assert names == ["java", "python", "python", "tini"], "the entry, Java, one worker, no orphan"


def test_the_platforms_port(lean):
    """As Vertex AI starts it: its own port, and its other variables."""
    name = run_container(
        APP,
        tag="lean-test",
        port=PORT,
        environment={"AIP_HTTP_PORT": "8080", "AIP_MODE": "PREDICTION"},
    )
    assert httpx.get(f"http://127.0.0.1:{PORT}/ping", timeout=5).json()["status"] == "Healthy"
    assert "Paris" in predict(URL, FRANCE)["predictions"][0]
    docker("rm", "--force", name)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("AIP_HTTP_PORT=7081", "AIP_HTTP_PORT: management and metrics use the ports 7081 to 7084"),
        ("AIP_HTTP_PORT=http", "AIP_HTTP_PORT: 'http' is not a whole number from 1 to 65535"),
        ("MODEL_STORE=/srv", "/srv is empty, but should hold one archive"),
        ("DRAIN_SECONDS=long", "DRAIN_SECONDS: 'long' is not a whole number from 0 to 86400"),
    ],
)
def test_a_mistake_in_the_environment_is_named(lean, variable, message):
    command = [container_runtime(), "run", "--rm", *HARDENED, "--env", variable, lean]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and message in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_too_little_memory_is_named(lean):
    with pytest.raises(UserError, match=r"not ready \(exited, out of memory: true\)"):
        run_container(APP, tag="lean-test", port=PORT, memory="100m")


def test_the_full_image_serves_with_torch(full):
    run_container(APP, tag="full-test", port=PORT, memory="2g")
    assert "Paris" in predict(URL, FRANCE)["predictions"][0]
