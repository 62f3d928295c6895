"""The files for Prometheus and Grafana in deploy/monitoring."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from deploy.common.paths import ROOT
from handler.config import load_app
from handler.engine import EngineLoad
from handler.metrics import Metrics

FOLDER = ROOT / "deploy" / "monitoring"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
NAME = re.compile(r"\b((?:llm|torchserve|process)_\w+)")

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"),
    reason="promtool is not installed (Debian: apt-get install prometheus)",
)


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml")],
    ids=["config", "rules"],
)
def test_promtool_accepts_configuration_and_rules(command):
    run = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_promtool
def test_each_alert_fires_when_it_should_and_only_then():
    """The cases are in alerts_test.yml, two for each alert."""
    command = ["promtool", "test", "rules", "alerts_test.yml"]
    run = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not():
    cases: dict[str, set[bool]] = {rule["alert"]: set() for rule in RULES}
    for test in yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]:
        for case in test["alert_rule_test"]:
            cases[case["alertname"]].add(bool(case["exp_alerts"]))
    assert len(cases) == 5 and all(fired == {True, False} for fired in cases.values()), cases


def test_files_read_only_metrics_that_the_server_has():
    metrics = Metrics(load_app("my-own-model", local=True), "m")
    metrics.set_load(EngineLoad(0, 0, 0, cached_prompt_tokens=0))
    known = {
        name
        for family in metrics.registry.collect()
        for name in (family.name, *(sample.name for sample in family.samples))
    } | {"torchserve_responses_total"}
    expressions = [rule["expr"] for rule in RULES]
    expressions += [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]
    used = set(NAME.findall(" ".join(expressions)))
    assert used <= known, used - known
    shown = {name.removesuffix("_bucket").removesuffix("_total") for name in used}
    ours = {f.name for f in metrics.registry.collect() if f.name.startswith("llm_")}
    hidden = {"llm_waiting_prompt_tokens", "llm_waiting_prompt_tokens_limit"}
    assert ours - shown == hidden, "the dashboard shows every other metric of ours"


def test_dashboard_has_no_overlaps_and_no_fixed_data_source():
    """Grafana asks for the data source when the file is imported."""
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r'"uid": "([^"]*)"', text)) == {"serving-llms", "${datasource}"}
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["type"] in ("stat", "timeseries") and panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["refId"] and target["datasource"] for target in panel["targets"])
