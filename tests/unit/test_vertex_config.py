"""The settings, the plan and the command line: no network, no credentials, no SDK."""

import re
import subprocess
import sys

import pytest
import yaml

from deploy.common.paths import ROOT, UserError
from deploy.vertex import gauges
from deploy.vertex.__main__ import main
from deploy.vertex.config import CONFIG, ENVIRONMENT, VertexSettings, load_settings
from deploy.vertex.gauges import check_gauges
from deploy.vertex.push import push
from deploy.vertex.texts import (
    WIDTH,
    hourly,
    how_to_read_logs,
    plan,
    token_use,
    what_cleanup_keeps,
)
from handler.config import app_yaml

APP = "smollm2-135m"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)


def test_environment_and_keywords_override_the_file(monkeypatch, tmp_path):
    file = tmp_path / "vertex.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(CONFIG.read_text()) | {"project": "from-file"}))
    assert load_settings(file).project == "from-file"
    monkeypatch.setenv("GCP_PROJECT", "from-environment")
    assert load_settings(file).project == "from-environment"
    assert load_settings(file, project="from-keyword").project == "from-keyword"
    assert load_settings(file, region=None).region == load_settings(file).region
    monkeypatch.setenv("PUSH_IMAGES", "false")
    assert load_settings().push_images is False


def test_file_has_every_setting():
    assert set(yaml.safe_load(CONFIG.read_text())) == set(VertexSettings.model_fields)


def test_settings_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        load_settings().region = "us-central1"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"region": "Europe"}, r"region: 'Europe' given; .*pattern"),
        ({"max_replicas": 0}, r"max_replicas: 0 given; .*greater than or equal to 1"),
        ({"min_replicas": "many"}, r"min_replicas: 'many' given; .*integer"),
        ({"min_replicas": 3, "max_replicas": 2}, r"max_replicas: 2 is less than min_replicas, 3"),
        ({"target_cpu": 101}, r"target_cpu: 101 given; .*100"),
        ({"target_requests_waiting": 0}, r"target_requests_waiting: 0 given; .*equal to 1"),
        ({"target_kv_cache": 101}, r"target_kv_cache: 101 given; .*100"),
        ({"target_cpu": 0}, r"target_cpu: 0 given; .*greater than or equal to 1"),
        ({"target_gpu_dcgm": 60}, r"target_gpu_dcgm: 60 without accelerator_type"),
        ({"invoke_route_prefix": "/v1"}, r"invoke_route_prefix: '/v1' given; .*'/\*'"),
        (
            {"invoke_route_prefix": "/*", "predict_route": "/a"},
            r"predict_route: /a with invoke_route_prefix: /\*; .*leave one empty",
        ),
        (
            {"invoke_route_prefix": "/*", "dedicated": False},
            r"invoke_route_prefix: /\* with dedicated: false; only dedicated",
        ),
        (
            {"dedicated": False},
            r"inference_timeout: 600 with dedicated: false; .*60 s: leave it empty",
        ),
        ({"dedicated": "perhaps"}, r"dedicated: 'perhaps' given; .*boolean"),
        ({"deployment_timeout": 7201}, r"deployment_timeout: 7201 given; .*7200"),
        ({"inference_timeout": 3601}, r"inference_timeout: 3601 given; .*3600"),
        ({"machine": "n1"}, r"machine: there is no such field; there are project, region"),
        ({"accelerator_type": "TPU"}, r"accelerator_type: 'TPU' given; .*'NVIDIA_L4'"),
        ({"accelerator_type": "NVIDIA_L4"}, r"accelerator_count: 0 with .*give both or neither"),
        ({"machine_type": "g2-standard-12"}, r"accelerator_type: none; g2-standard-12 has NVIDIA"),
        ({"labels": {"Team": "x"}}, r"labels\.Team.*'Team' given"),
        ({"service_account": "me"}, r"service_account: 'me' given"),
        ({"predict_route": "predict"}, r"predict_route: 'predict' given; .*'\^/'"),
        ({"startup_probe_timeout": 11}, r"startup_probe_timeout: 11 is more than"),
        ({"environment": {"AIP_HTTP_PORT": "1"}}, r"environment\.AIP_HTTP_PORT: .*platform"),
        *(
            ({"artifact_uri": uri}, rf"artifact_uri: '{re.escape(uri)}' given; .*gs://")
            for uri in (
                *("bucket/folder", "gs://", "gs://bucket//folder", "gs://bucket/folder//"),
                *("gs://bucket/*", "gs://bucket/a?", "gs://bucket/[ab]", "gs://bucket/a#1"),
                *("gs://bucket/../other", "gs://bucket/./a", "gs://bucket/a/..", "gs://b u/a"),
            )
        ),
        ({"project": "X"}, r"project: 'X' given"),
        ({"push_registry": "http://host"}, r"push_registry: 'http://host' given"),
        ({"push_images": "perhaps"}, r"push_images: 'perhaps' given; .*boolean"),
        ({"architecture": "x86"}, r"architecture: 'x86' given; .*'amd64'"),
    ],
)
def test_rejects_wrong_values_with_field_value_and_what_is_allowed(wrong, message):
    with pytest.raises(UserError, match=message):
        load_settings(**wrong)


def test_accepts_a_folder_with_a_slash_at_the_end():
    """As in the command that fills it; two spellings of one folder would be two versions."""
    for uri in ("gs://bucket", "gs://my.bucket_1/a/b.c-d/v1"):
        assert load_settings(artifact_uri=uri).artifact_uri == uri
        assert load_settings(artifact_uri=f"{uri}/").artifact_uri == uri


def test_names_a_file_that_is_missing_or_not_a_mapping(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml: .*No such file"):
        load_settings(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(UserError, match=r"list\.yaml: should be a mapping"):
        load_settings(tmp_path / "list.yaml")


def test_ids_and_labels_are_valid_for_google():
    settings = load_settings(project="a-project")
    for app in (APP, "dolly-v2-3b", "My.Model_2", "x" * 200):
        name, labels = settings.resource_id(app), settings.labels_for(app)
        assert len(name) <= 63 and name[0].isalpha() and name[-1].isalnum()
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert labels["managed-by"] == "serving-llms" and 1 <= len(labels["app"]) <= 63
    assert settings.image_uri("GPT2", "pro") == (
        "europe-west4-docker.pkg.dev/a-project/serving/gpt2:pro"
    )


def test_own_labels_cannot_be_replaced():
    settings = load_settings(labels={"managed-by": "me", "team": "nlp"})
    assert settings.labels_for(APP) == {
        "managed-by": "serving-llms",
        "app": APP,
        "team": "nlp",
    }


def test_plan_names_every_resource_and_the_source_of_the_price():
    settings = load_settings(project="a-project", min_replicas=2, max_replicas=4)
    text = plan(settings, APP)
    assert max(map(len, text.splitlines())) <= WIDTH
    for part in (
        "region     europe-west4",
        settings.endpoint_name(APP),
        settings.model_name(APP),
        "europe-west4-docker.pkg.dev/a-project/serving/smollm2-135m",
        "2 to 4 x n2-standard-4",
        "managed-by=serving-llms",
        "custom_model_serving_cpus",
        f"{settings.prices.date}, unverified",
    ):
        assert part in text
    price = settings.prices.per_hour["n2-standard-4"]
    assert f"${2 * price:.2f} to ${4 * price:.2f} per hour" in text


def file_with(tmp_path, **changes):
    """Settings from a file, because a keyword None keeps the file's value."""
    file = tmp_path / "vertex.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(CONFIG.read_text()) | changes))
    return file


SHARED = {"dedicated": False, "inference_timeout": None}


def test_one_request_may_take_what_the_type_of_endpoint_allows(tmp_path):
    assert load_settings().request_seconds == 600
    assert load_settings(file_with(tmp_path, inference_timeout=None)).request_seconds == 600
    assert load_settings(file_with(tmp_path, **SHARED)).request_seconds == 60


def test_needs_something_to_scale_by(tmp_path):
    with pytest.raises(UserError, match="target_cpu: none given, and no other target; give at le"):
        load_settings(file_with(tmp_path, target_cpu=None))  # target_gpu has no accelerator
    by_queue = file_with(tmp_path, target_cpu=None, target_requests_waiting=4)
    assert load_settings(by_queue).targets == {"target_requests_waiting": 4}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {},
            ["dedicated endpoint: 10 MB, 600 s, streaming", ":rawPredict, :streamRaw"],
        ),
        (SHARED, ["shared endpoint: 1.5 MB, 60 s, no streaming", ":predict, :rawPredict\n"]),
        (
            {"invoke_route_prefix": "/*"},
            [
                "methods    /invoke/PATH (preview); :predict, :rawPredict and :stream",
                'invoke_route_prefix "/*": every path of port 7080 but the root is\n  open to',
            ],
        ),
        (
            {"target_requests_waiting": 4, "target_kv_cache": 80, "target_requests_per_minute": 9},
            ["cpu 60 %, requests per minute 9, kv cache 80 %,", "waiting 4\n"],
        ),
    ],
    ids=["dedicated", "shared", "invoke", "targets"],
)
def test_plan_shows_requests_methods_and_what_decides_the_replicas(tmp_path, given, expected):
    text = plan(load_settings(file_with(tmp_path, **given)), APP)
    assert max(map(len, text.splitlines())) <= WIDTH
    for part in expected:
        assert part in text


@pytest.mark.parametrize("target", ["target_requests_waiting", "target_kv_cache"])
def test_deploy_needs_the_gauges_that_it_scales_by(target, monkeypatch, tmp_path):
    config = app_yaml(APP)
    assert config["app"]["metrics"]["vllm_names"] is False  # the switch has this name
    monkeypatch.setattr(gauges, "app_yaml", lambda app, local: config)
    config["app"]["metrics"] = {"vllm_names": False}
    settings = load_settings(**{target: 4})
    with pytest.raises(UserError, match=f"{target}: 4 given, and app.metrics.vllm_names is off"):
        check_gauges(settings, APP)
    check_gauges(load_settings(), APP)
    check_gauges(load_settings(**{target: 4}, command=["another", "server"]), APP)
    config["app"]["metrics"] = {"vllm_names": True}
    check_gauges(settings, APP)


def test_deploy_refuses_missing_gauges_before_it_pushes(capsys, tmp_path):
    file = file_with(tmp_path, project="a-project", target_requests_waiting=4)
    assert main(["deploy", APP, "--config", str(file)]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: target_requests_waiting: 4 given") and not shown.out


def test_token_use_names_the_base_url_only_where_there_is_one(tmp_path):
    host = "serving.prediction.vertexai.goog"
    text = token_use(load_settings(project="a-project", invoke_route_prefix="/*"), APP, host)
    assert (
        f"base_url: https://{host}/v1/projects/a-project/locations/europe-west4/endpoints/"
        f"serving-llms-{APP}/invoke/v1\n" in text
    )
    for given in ({}, SHARED):
        settings = load_settings(file_with(tmp_path, project="a-project", **given))
        text = token_use(settings, APP, host)
        assert "no base_url" in text and "@requestFormat" in text
        assert (":streamRawPredict" in text) == settings.dedicated


def test_price_names_its_region():
    """The list has one region's prices; a deployment may be in another."""
    away = hourly(load_settings(region="europe-west4"))
    assert "(us-central1 on " in away and away.endswith("; europe-west4 may differ)")
    at_home = hourly(load_settings(region="us-central1", spot=True))
    assert "differ" not in at_home and at_home.endswith("discount for spot)")


def test_plan_shows_the_cost_of_each_resource():
    text = plan(load_settings(), APP)
    for name in ("image", "model", "endpoint", "replicas", "logs"):
        assert re.search(rf"^{name} .*\n +cost: ", text, re.MULTILINE), name


def test_plan_names_the_folder_in_cloud_storage():
    assert "artifacts" not in plan(load_settings(), APP)
    assert "gs://bucket/b\n" in plan(load_settings(artifact_uri="gs://bucket/b"), APP)


def test_cleanup_names_what_it_keeps_and_how_to_remove_it():
    settings = load_settings(project="a-project")
    images = "gcloud artifacts docker images delete europe-west4-docker.pkg.dev/a-project/serving/"
    assert images in what_cleanup_keeps(settings, APP)
    assert "storage" not in what_cleanup_keeps(settings, APP)
    settings = load_settings(project="a-project", artifact_uri="gs://bucket/b/")
    text = what_cleanup_keeps(settings, APP)
    assert images in text and text.endswith(": gcloud storage rm --recursive gs://bucket/b")
    assert "You pay for its storage until" in text


def test_unknown_price_is_not_invented():
    settings = load_settings(machine_type="c3-standard-22")
    assert hourly(settings) == "price of c3-standard-22 unknown; see the price list"
    gpu = load_settings(
        machine_type="n1-standard-4", accelerator_type="NVIDIA_TESLA_T4", accelerator_count=1
    )
    assert "unknown" in hourly(gpu)  # the table has the machine without the accelerator


@pytest.mark.parametrize("arguments", [["plan", APP], ["deploy", APP, "--dry-run"]])
def test_plan_needs_no_credentials_no_project_and_no_sdk(arguments, tmp_path):
    """The SDK cannot be imported, no network is there, and no home with credentials."""
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "__init__.py").write_text("raise ImportError('not in this test')")
    nowhere = "http://127.0.0.1:9"
    environment = {"HOME": str(tmp_path), "https_proxy": nowhere, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-m", "deploy.vertex", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "project: not given yet" in run.stdout and "replicas" in run.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["rollback", APP, "--shape-only"],
        ["rollback", APP, "--canary", "20"],
        ["status", APP, "--tag", "pro"],
        ["cleanup", APP, "--dry-run"],
        ["token"],
        ["deploy", APP, "--canary", "many"],
        ["deploy"],
        ["deploy", "../other"],
    ],
)
def test_rejects_options_of_other_commands_and_wrong_values(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("canary", ["0", "100", "-1"])
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_rejects_a_canary_before_it_pushes(canary, dry_run, capsys):
    assert main(["deploy", APP, "--canary", canary, *dry_run]) == 1
    assert f"canary: {canary} given; should be a whole number from 1 to 99" in (
        capsys.readouterr().err
    )


def test_takes_an_image_that_another_program_pushed(capsys):
    settings = load_settings(project="a-project", push_images=False)
    assert push(settings, APP, "v1") == settings.image_uri(APP, "v1")
    assert "not pushed, because push_images is false" in capsys.readouterr().out


@pytest.mark.slow
def test_missing_project_is_an_error_in_one_line(capsys):
    assert main(["status", APP]) == 1
    assert capsys.readouterr().err.startswith("error: project: not given; export GCP_PROJECT")


@pytest.mark.slow
def test_missing_credentials_are_an_error_that_says_how_to_get_them(monkeypatch, tmp_path, capsys):
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    assert main(["status", APP, "--project", "a-project"]) == 1
    error = capsys.readouterr().err
    assert "no application-default credentials; run `gcloud auth application-default" in error
    assert error.count("\n") == 1


def test_log_commands_name_the_endpoint():
    text = how_to_read_logs(load_settings(project="a-project"), APP)
    assert 'endpoint_id="serving-llms-smollm2-135m"' in text and "--project=a-project" in text


def test_startup_probe_may_fail_until_the_deployment_timeout():
    """Google's default of 3 failures would restart the container after half a minute."""
    settings = load_settings()
    window = settings.startup_probe_failures * settings.startup_probe_period
    assert window >= settings.deployment_timeout


def test_plan_names_the_quota_of_an_accelerator():
    gpu = {"accelerator_type": "NVIDIA_H100_80GB", "accelerator_count": 8}
    text = plan(load_settings(machine_type="a3-highgpu-8g", **gpu), "gpt2")
    assert "custom_model_serving_nvidia_h100_gpus in" in text


def test_example_for_an_l4_is_accepted(tmp_path):
    """The comment in vertex.yaml, put in place of the lines above it as it says."""
    lines = CONFIG.read_text().splitlines()
    at = lines.index("# machine_type: g2-standard-8")
    end = lines.index("", at)
    example = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines[at:end]))
    settings = load_settings(file_with(tmp_path, **example))
    assert settings.targets == {"target_requests_waiting": 8}
    window = settings.startup_probe_failures * settings.startup_probe_period
    assert window >= settings.deployment_timeout > load_settings().deployment_timeout
    text = plan(settings, APP)
    assert "1 to 2 x g2-standard-8 with 1 x NVIDIA_L4" in text
    quota = "aiplatform.googleapis.com/custom_model_serving_nvidia_l4_gpus"
    assert quota in text and any(quota in line for line in lines[:at])
