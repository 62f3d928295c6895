"""The container on machines that lack something: names, IPv6, shared memory, room for logs."""

import pytest

from deploy.image.run import HARDENED, container_name, run_container, wait_until_ready
from deploy.image.runtime import container_runtime
from deploy.torchserve.client import SAMPLE_REQUEST, predict, stream
from tests.container.conftest import APP, PORT, docker
from tests.container.test_container import URL, state

pytestmark = pytest.mark.slow

ENTRY = "/opt/venv/bin/python /opt/serving/serve.py"


def test_serves_without_dns_ipv6_and_shared_memory(lean):
    """A name server that never answers, no IPv6, and 1 MB of /dev/shm."""
    arguments = ["--dns", "192.0.2.1", "--shm-size", "1m"]
    arguments += ["--sysctl", "net.ipv6.conf.all.disable_ipv6=1"]
    name = run_container(APP, tag="lean-test", port=PORT, memory="2g", arguments=arguments)
    assert "192.0.2.1" in docker("exec", name, "cat", "/etc/resolv.conf")
    assert docker("exec", name, "cat", "/proc/sys/net/ipv6/conf/lo/disable_ipv6") == "1"
    assert "1024" in docker("exec", name, "df", "-k", "/dev/shm")
    assert "Tokyo" in predict(URL, SAMPLE_REQUEST)["predictions"][0]
    assert list(stream(URL, SAMPLE_REQUEST))[-1]["finish_reason"] == "stop"


def test_serves_and_stops_cleanly_while_the_disk_of_the_log_is_full(lean):
    """Every write to stdout and stderr fails."""
    name = container_name(APP)
    options = ["--detach", "--name", name, "--publish", f"127.0.0.1:{PORT}:7080"]
    options += [*HARDENED, "--memory", "2g", "--entrypoint", "/bin/sh"]
    docker("run", *options, lean, "-c", f"exec tini -- {ENTRY} >/dev/full 2>&1")
    wait_until_ready(container_runtime(), name)
    assert "Tokyo" in predict(URL, SAMPLE_REQUEST)["predictions"][0]
    assert list(stream(URL, SAMPLE_REQUEST))[-1]["finish_reason"] == "stop"
    docker("stop", "-t", "30", name)
    assert docker("logs", name) == "" and state(name, "ExitCode") == "0"
