"""The image, run as `make run` runs it: requests, hardening, kills, stops, restarts."""

import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load import Target, closed_loop
from deploy.common.paths import UserError
from deploy.common.waiting import wait_until
from deploy.image.run import HARDENED, run_container, wait_until_ready
from deploy.image.runtime import container_runtime
from deploy.torchserve.client import SAMPLE_REQUEST, predict, stream
from tests.container.conftest import APP, PORT, docker

pytestmark = pytest.mark.slow

URL = f"http://127.0.0.1:{PORT}/predictions/{APP}"
LONG = {
    "instances": ["Once upon a time"],
    "parameters": {"max_new_tokens": 150, "ignore_eos": True},
}


def state(name: str, what: str) -> str:
    return docker("inspect", "--format", f"{{{{.State.{what}}}}}", name)


def processes(name: str, pattern: str) -> list[str]:
    """Return the ids, inside, of processes whose command matches. It must not match itself."""
    find = f"for p in /proc/[0-9]*; do if grep -qa '{pattern}' $p/cmdline; then echo $p; fi; done"
    return [p.removeprefix("/proc/") for p in docker("exec", name, "sh", "-c", find).split()]


def ready(name: str) -> bool:
    return docker("exec", name, "/opt/serving/ready", check=False).startswith("ready")


def restart(name: str) -> None:
    docker("start", name)
    wait_until_ready(container_runtime(), name)


def test_predict_and_stream(container):
    assert "Tokyo" in predict(URL, SAMPLE_REQUEST)["predictions"][0]
    long = {"instances": ["Once upon a time"]}
    long["parameters"] = {"max_new_tokens": 400, "ignore_eos": True}
    # An event holds a tenth of a second of text, so a short completion may be two events.
    events = list(stream(URL, long))
    assert len(events) > 3 and events[-1]["completion_tokens"] == 400
    with pytest.raises(UserError, match=r"parameters\.temperature"):
        predict(URL, SAMPLE_REQUEST | {"parameters": {"temperature": 9}})


def test_container_is_hardened(container):
    host = json.loads(docker("inspect", container))[0]["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges"] and host["PidsLimit"] == 512
    if Path(container_runtime()).name == "docker":
        assert host["LogConfig"]["Config"] == {"max-file": "2", "max-size": "10m"}
    published = json.loads(docker("inspect", container))[0]["NetworkSettings"]["Ports"]
    assert {key for key, value in published.items() if value} == {"7080/tcp"}

    def run(command: str) -> str:
        return docker("exec", container, "sh", "-c", command, check=False)

    assert run("id -u") == "1000"
    assert run("touch /models/x /opt/x /x 2>/dev/null; ls /x /opt/x /models/x 2>/dev/null") == ""
    assert run("grep CapEff /proc/1/status").split()[1] == "0" * 16
    assert run("grep NoNewPrivs /proc/1/status").split()[1] == "1"


def test_management_is_reachable_only_from_inside(container):
    form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    address = docker("inspect", "--format", form, container)
    assert httpx.get(f"http://{address}:7080/ping", timeout=5).status_code == 200
    for port in (7081, 7082):
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://{address}:{port}/models", timeout=5)


def test_metrics_are_on_the_port_of_predictions(container):
    """A platform can read no other port: Vertex AI looks for /metrics in the container."""
    base = URL.split("/predictions")[0]
    body = {"instances": ["Paris"], "parameters": {"max_new_tokens": 3, "ignore_eos": True}}
    assert httpx.post(URL, json=body, timeout=60).status_code == 200
    time.sleep(1.1)  # the text is kept for a second
    families = text_string_to_metric_families(httpx.get(f"{base}/metrics").text)
    found = {sample.name: sample.value for family in families for sample in family.samples}
    assert found["llm_sequence_completion_tokens_sum"] >= 3
    assert found["llm_running_sequences"] == 0 and "torchserve_responses_total" in found
    inside = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:7082/metrics').status)"
    assert docker("exec", container, "python", "-c", inside) == "200"


def test_container_listens_on_two_ports_and_two_sockets(container):
    """gRPC, which one call can use to kill the worker, listens where nobody can connect."""
    rows = [line.split() for line in docker("exec", container, "cat", "/proc/net/tcp").splitlines()]
    listening = {
        (row[1].split(":")[0], int(row[1].split(":")[1], 16)) for row in rows if "0A" in row
    }
    loopback, every, multicast = "0100007F", "00000000", "010000E0"
    reachable = {(host, port) for host, port in listening if host != multicast}
    assert reachable == {(every, 7080), (loopback, 7082)}
    for name in ("management", "metrics"):
        docker("exec", container, "test", "-S", f"/tmp/serving/{name}.sock")


def test_memory_under_two_hundred_requests(container):
    report = closed_loop(
        Target(URL), clients=16, requests_each=13, new_tokens=64, seed=0, warm_up=0
    )
    assert not report.errors
    assert state(container, "OOMKilled") == "false"
    used = docker("stats", "--no-stream", "--format", "{{.MemPerc}}", container)
    assert float(used.rstrip("%")) < 95, used


def test_full_kv_cache_fits_into_the_documented_memory(container):
    """`make run MEMORY=3g`. The prefix cache keeps ended sequences, so the cache fills in time."""
    workers = processes(container, "[m]odel_service_worker")
    tokens = 46592  # what cache_gb: 1 holds of SmolLM2, as the start-up line says
    assert f"KV cache 1 GB for {tokens} tokens" in docker("logs", container)
    prompts = [f"{i} " + "word " * 1900 for i in range(1 + tokens // 1900)]
    bodies = [prompts[i : i + 3] for i in range(0, len(prompts), 3)]
    with ThreadPoolExecutor(2) as pool:  # all at once would be over max_queue_tokens
        sent = [{"instances": b, "parameters": {"max_new_tokens": 1}} for b in bodies]
        answers = list(pool.map(lambda body: httpx.post(URL, json=body, timeout=300), sent))
    assert {answer.status_code for answer in answers} == {200}
    assert state(container, "OOMKilled") == "false"
    assert processes(container, "[m]odel_service_worker") == workers, "the worker was not replaced"
    used = docker("stats", "--no-stream", "--format", "{{.MemPerc}}", container)
    assert 45 < float(used.rstrip("%")) < 70, f"{used}; an attack on Java needs the rest"


def test_health_check(container):
    wait_until(lambda: state(container, "Health.Status") == "healthy", timeout=30)


def test_stop_completes_requests_in_flight_and_rejects_new_ones(container):
    with ThreadPoolExecutor() as pool:
        requests = [pool.submit(predict, URL, LONG) for _ in range(4)]
        streamed = pool.submit(lambda: list(stream(URL, LONG)))
        time.sleep(1)
        stop = pool.submit(docker, "stop", "-t", "30", container)
        time.sleep(0.7)
        docker("kill", "--signal", "HUP", container)  # a second signal does not end the drain
        late = httpx.post(URL, json=LONG, timeout=30)
        for request in requests:
            assert request.result()["predictions"][0].startswith("Once upon a time")
        assert streamed.result()[-1]["completion_tokens"] == 150
        stop.result()
    assert late.status_code == 503 and late.headers["retry-after"]
    assert late.json()["error"]["message"].startswith("the server is shutting down")
    assert state(container, "ExitCode") == "0"


def test_drain_has_a_time_limit(lean):
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


def test_dead_frontend_ends_the_container(container):
    (java,) = processes(container, "serving.Fronten[d]")
    docker("exec", container, "sh", "-c", f"kill -9 {java}")
    wait_until(lambda: state(container, "Running") == "false", timeout=60)
    assert state(container, "ExitCode") == "1"
    restart(container)
    assert "Tokyo" in predict(URL, SAMPLE_REQUEST)["predictions"][0]


def test_processes_of_torchserve_get_no_secret_of_the_container(container):
    for pattern in ("serving.Fronten[d]", "model_service_worke[r]"):
        (process,) = processes(container, pattern)
        environment = docker("exec", container, "cat", f"/proc/{process}/environ")
        assert "AIP_HTTP_PORT=7080" in environment and "a-secret" not in environment


def test_dead_worker_is_replaced_inside(container):
    (worker,) = processes(container, "model_service_worke[r]")
    docker("exec", container, "sh", "-c", f"kill -9 {worker}")
    wait_until(lambda: not ready(container), timeout=60)
    wait_until_ready(container_runtime(), container)
    assert "Tokyo" in predict(URL, SAMPLE_REQUEST)["predictions"][0]
    assert state(container, "Running") == "true"


def test_frozen_frontend_ends_the_container(container):
    """With the default patience; every client has an answer or a closed connection by then."""
    (java,) = processes(container, "serving.Fronten[d]")
    docker("exec", container, "sh", "-c", f"kill -STOP {java}")
    with ThreadPoolExecutor() as pool:
        request = pool.submit(httpx.post, URL, json=LONG, timeout=60)
        wait_until(lambda: not ready(container), timeout=20)
        wait_until(lambda: state(container, "Running") == "false", timeout=35)
        with pytest.raises(httpx.TransportError):
            request.result()
    assert state(container, "ExitCode") == "1"
    run = subprocess.run([container_runtime(), "logs", container], capture_output=True, text=True)
    assert run.stderr.strip().endswith("s") and "the frontend does not answer; waited" in run.stderr


def test_stopped_worker_is_not_ready_and_is_replaced_inside(container):
    (worker,) = processes(container, "model_service_worke[r]")
    docker("exec", container, "sh", "-c", f"kill -STOP {worker}")
    with ThreadPoolExecutor() as pool:
        request = pool.submit(httpx.post, URL, json=LONG, timeout=60)
        wait_until(lambda: not ready(container), timeout=20)
        assert request.result().status_code in (200, 500)
    wait_until_ready(container_runtime(), container)
    assert processes(container, "model_service_worke[r]") != [worker]


def request_until(done: threading.Event, statuses: list[int]) -> None:
    """Send requests until `done`; 0 stands for a connection that broke or was refused."""
    while not done.is_set():
        try:
            statuses.append(httpx.post(URL, json=LONG, timeout=60).status_code)
        except httpx.TransportError:
            statuses.append(0)
            time.sleep(0.05)


@pytest.mark.timeout(1200)
def test_rounds_of_stop_kill_and_restart_under_load(container):
    """Stops and kills in turn, with requests in flight. ROUNDS=20 takes five minutes."""
    for turn in range(int(os.environ.get("ROUNDS", "2"))):
        graceful = turn % 2 == 0
        statuses: list[int] = []
        done = threading.Event()
        with ThreadPoolExecutor() as pool:
            clients = [pool.submit(request_until, done, statuses) for _ in range(3)]
            try:
                time.sleep(1.5)
                docker(*(("stop", "-t", "30") if graceful else ("kill",)), container)
            finally:
                done.set()
        assert all(client.exception() is None for client in clients)
        assert state(container, "ExitCode") == ("0" if graceful else "137"), turn
        assert set(statuses) <= {200, 503, 0}, statuses
        if graceful:  # requests in flight were answered
            assert statuses.count(200) >= 3, statuses
        restart(container)
        assert predict(URL, {"instances": ["Hello"]})["predictions"]
    processes = docker("top", container, "-eo", "pid,comm").splitlines()[1:]
    names = sorted(line.split()[1] for line in processes)
    assert names == ["java", "python", "python", "tini"], "the entry, Java and one worker"


@pytest.mark.parametrize("port", ["8080", "9000"])
def test_port_of_vertex_ai(lean, port):
    """With the variables that Vertex AI sets; 9000 is TorchServe's first port for workers."""
    name = run_container(
        APP,
        tag="lean-test",
        port=PORT,
        environment={"AIP_HTTP_PORT": port, "AIP_MODE": "PREDICTION"},
    )
    assert httpx.get(f"http://127.0.0.1:{PORT}/ping", timeout=5).json()["status"] == "Healthy"
    assert "Tokyo" in predict(URL, SAMPLE_REQUEST)["predictions"][0]
    docker("rm", "--force", name)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("AIP_HTTP_PORT=7082", "AIP_HTTP_PORT: port 7082 is for the metrics"),
        ("AIP_HTTP_PORT=http", "AIP_HTTP_PORT: 'http' is not a whole number from 1 to 65535"),
        ("MODEL_STORE=/srv", "/srv is empty, but should hold one archive"),
        ("CORS_ORIGIN=localhost:3000", "CORS_ORIGIN: 'localhost:3000' is no origin"),
        ("DRAIN_SECONDS=long", "DRAIN_SECONDS: 'long' is not a whole number from 0 to 86400"),
    ],
)
def test_rejects_wrong_environment_variable(lean, variable, message):
    command = [container_runtime(), "run", "--rm", *HARDENED, "--env", variable, lean]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and message in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_error_for_too_little_memory(lean):
    with pytest.raises(UserError, match=r"not ready \(exited, out of memory: true\)"):
        run_container(APP, tag="lean-test", port=PORT, memory="100m")


def test_memory_without_room_for_the_kv_cache_ends_the_start(lean):
    """Otherwise it is ready, and loses most requests when the cache fills."""
    message = r"openvino\.cache_gb: 1 does not fit into memory: .*cgroup\) is 0\.68 GiB"
    with pytest.raises(UserError, match=message) as error:
        run_container(APP, tag="lean-test", port=PORT, memory="700m")
    assert "not ready (exited, out of memory: false)" in str(error.value)


def test_full_image_serves_with_torch(full):
    run_container(APP, tag="full-test", port=PORT, memory="3g")
    assert "Tokyo" in predict(URL, SAMPLE_REQUEST)["predictions"][0]
