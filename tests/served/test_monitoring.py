"""The example of Prometheus' configuration, the alerts and the dashboard, with a real Prometheus.

Grafana is not run: its panels' queries are, and tests/unit/test_monitoring.py checks the JSON.
"""

import json
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import yaml

from deploy.common.paths import ROOT
from deploy.common.waiting import wait_until
from deploy.torchserve.client import stream

pytestmark = [
    pytest.mark.served,
    pytest.mark.skipif(
        not shutil.which("prometheus"),
        reason="Prometheus is not installed (Debian: apt-get install prometheus)",
    ),
]

FOLDER = ROOT / "deploy" / "monitoring"
ADDRESS = "http://127.0.0.1:7248"
RULES = [
    r for g in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for r in g["rules"]
]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
PANELS = [
    (f"{panel['title']} {target['refId']}", target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
]


def query(expression: str) -> list[dict]:
    """The series that a query gives now.

    Raises:
        AssertionError: Prometheus rejects it.
    """
    response = httpx.get(f"{ADDRESS}/api/v1/query", params={"query": expression}, timeout=10)
    assert response.status_code == 200, response.text
    return response.json()["data"]["result"]


@pytest.fixture(scope="module")
def prometheus(tiny_server, tmp_path_factory):
    """A Prometheus with our files that scrapes a real server, which has answered some requests."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"]
    assert target["targets"] == ["localhost:7082"]
    target["targets"] = [tiny_server.metrics.split("/")[2]]
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(FOLDER / "alerts.yml", folder)
    command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={ADDRESS[7:]}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: is_ready(process), timeout=30)
        wait_until(lambda: query('up{job="llm"} == 1'), timeout=10)
        send_requests(tiny_server)
        scraped = time.time()
        newest = "timestamp(llm_running_sequences)"
        wait_until(lambda: float(query(newest)[0]["value"][1]) > scraped + 0.5, timeout=10)
        yield process
    finally:
        process.terminate()
        process.wait(10)


def is_ready(process: subprocess.Popen) -> bool:
    assert process.poll() is None, "Prometheus ended"
    try:
        return httpx.get(f"{ADDRESS}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def send_requests(server) -> None:
    body = {"instances": ["Paris"], "parameters": {"max_new_tokens": 8, "ignore_eos": True}}
    with ThreadPoolExecutor() as pool:
        streams = [pool.submit(lambda: list(stream(server.url, body))) for _ in range(4)]
        plain = [pool.submit(httpx.post, server.url, json=body, timeout=60) for _ in range(4)]
        assert all(future.result() for future in streams)
        assert {future.result().status_code for future in plain} == {200}
    assert httpx.post(server.url, json={"instances": 5}).status_code == 400


@pytest.mark.parametrize(("title", "expression"), PANELS, ids=[title for title, _ in PANELS])
def test_every_query_of_the_dashboard_returns_data(prometheus, title, expression):
    expression = expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
    assert "$" not in expression
    series = query(expression)
    assert series, "no data"
    values = [float(one["value"][1]) for one in series]
    if "cached_prompt" not in expression and "_limit" not in expression:
        assert all(value >= 0 for value in values), values  # NaN is not


def test_variables_of_the_dashboard_have_values(prometheus):
    datasource, instance = DASHBOARD["templating"]["list"]
    assert datasource["type"] == "datasource"
    found = re.fullmatch(r"label_values\((\w+), (\w+)\)", instance["query"]["query"])
    metric, label = found.groups()
    assert query(f"group by ({label}) ({metric})")[0]["metric"][label].startswith("127.0.0.1:")


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_every_alert_is_evaluated_and_reads_existing_series(prometheus, rule):
    (compared,) = re.fullmatch(r"(.*) (?:>|==) [\d.]+", rule["expr"]).groups()
    assert query(compared), "no data"

    def state() -> dict | None:
        groups = httpx.get(f"{ADDRESS}/api/v1/rules").json()["data"]["groups"]
        loaded = {r["name"]: r for group in groups for r in group["rules"]}
        return loaded[rule["alert"]] if loaded[rule["alert"]]["health"] != "unknown" else None

    loaded = wait_until(state, timeout=10)
    assert (loaded["health"], loaded["state"]) == ("ok", "inactive"), loaded


def test_prometheus_accepts_every_line_that_it_scrapes(prometheus):
    (target,) = httpx.get(f"{ADDRESS}/api/v1/targets").json()["data"]["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    metadata = httpx.get(f"{ADDRESS}/api/v1/metadata").json()["data"]
    assert metadata["llm_time_to_first_token_seconds"][0]["type"] == "histogram"
    assert metadata["llm_kv_cache_usage_ratio"][0]["type"] == "gauge"
