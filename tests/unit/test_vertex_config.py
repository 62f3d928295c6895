"""The settings and the plan: no network, no credentials, no SDK."""

import re
import subprocess
import sys

import pytest
import yaml

from deploy.common.paths import ROOT, UserError
from deploy.vertex import commands
from deploy.vertex.config import CONFIG, load_settings
from deploy.vertex.plan import WIDTH

APP = "smollm2-135m"


@pytest.fixture(autouse=True)
def no_project(monkeypatch):
    monkeypatch.delenv("GCP_PROJECT", raising=False)
    monkeypatch.delenv("GCP_REGION", raising=False)


def test_the_environment_and_keywords_win_over_the_file(monkeypatch, tmp_path):
    file = tmp_path / "vertex.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(CONFIG.read_text()) | {"project": "from-file"}))
    assert load_settings(file).project == "from-file"
    monkeypatch.setenv("GCP_PROJECT", "from-environment")
    assert load_settings(file).project == "from-environment"
    assert load_settings(file, project="from-keyword").project == "from-keyword"
    assert load_settings(file, region=None).region == load_settings(file).region


def test_settings_cannot_be_changed():
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
    ],
)
def test_wrong_values_name_field_value_and_what_is_allowed(wrong, message):
    with pytest.raises(UserError, match=message):
        load_settings(**wrong)


def test_a_folder_may_end_with_a_slash():
    """As in the command that fills it; two spellings of one folder would be two versions."""
    for uri in ("gs://bucket", "gs://my.bucket_1/a/b.c-d/v1"):
        assert load_settings(artifact_uri=uri).artifact_uri == uri
        assert load_settings(artifact_uri=f"{uri}/").artifact_uri == uri


def test_a_file_that_is_not_there_or_no_mapping_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml: .*No such file"):
        load_settings(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(UserError, match=r"list\.yaml: should be a mapping"):
        load_settings(tmp_path / "list.yaml")


def test_ids_and_labels_are_what_google_allows():
    settings = load_settings(project="a-project")
    for app in (APP, "dolly-v2-3b", "My.Model_2", "x" * 200):
        name, labels = settings.resource_id(app), settings.labels_for(app)
        assert len(name) <= 63 and name[0].isalpha() and name[-1].isalnum()
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert labels["managed-by"] == "serving-llms" and 1 <= len(labels["app"]) <= 63
    assert settings.image_uri("GPT2", "pro") == (
        "europe-west4-docker.pkg.dev/a-project/serving/gpt2:pro"
    )


def test_a_label_of_ours_cannot_be_replaced():
    settings = load_settings(labels={"managed-by": "me", "team": "nlp"})
    assert settings.labels_for(APP) == {
        "managed-by": "serving-llms",
        "app": APP,
        "team": "nlp",
    }


def test_the_plan_names_everything_and_says_how_well_the_price_is_known():
    settings = load_settings(project="a-project", min_replicas=2, max_replicas=4)
    text = commands.plan(settings, APP)
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


def test_a_price_says_whose_it_is():
    """The list has one region's prices; a deployment may be in another."""
    away = commands.hourly(load_settings(region="europe-west4"))
    assert "(us-central1 on " in away and away.endswith("; europe-west4 may differ)")
    at_home = commands.hourly(load_settings(region="us-central1", spot=True))
    assert "differ" not in at_home and at_home.endswith("discount for spot)")


def test_each_resource_has_its_cost_below():
    text = commands.plan(load_settings(), APP)
    for name in ("image", "model", "endpoint", "replicas", "logs"):
        assert re.search(rf"^{name} .*\n +cost: ", text, re.MULTILINE), name


def test_the_plan_names_what_is_in_cloud_storage():
    assert "artifacts" not in commands.plan(load_settings(), APP)
    assert "gs://bucket/b\n" in commands.plan(load_settings(artifact_uri="gs://bucket/b"), APP)


def test_cleanup_says_what_it_leaves_and_how_to_remove_it():
    settings = load_settings(project="a-project")
    images = "gcloud artifacts docker images delete europe-west4-docker.pkg.dev/a-project/serving/"
    assert images in commands.what_is_kept(settings, APP)
    assert "storage" not in commands.what_is_kept(settings, APP)
    settings = load_settings(project="a-project", artifact_uri="gs://bucket/b/")
    said = commands.what_is_kept(settings, APP)
    assert images in said and said.endswith(": gcloud storage rm --recursive gs://bucket/b")
    assert "bucket bills until" in said


def test_a_price_that_is_not_known_is_not_made_up():
    settings = load_settings(machine_type="c3-standard-22")
    assert commands.hourly(settings) == "price of c3-standard-22 not known here; see the price list"
    gpu = load_settings(
        machine_type="n1-standard-4", accelerator_type="NVIDIA_TESLA_T4", accelerator_count=1
    )
    assert "not known" in commands.hourly(gpu)  # the table has the machine without the card


@pytest.mark.parametrize("arguments", [["plan", APP], ["deploy", APP, "--dry-run"]])
def test_the_plan_needs_no_credentials_no_project_and_no_sdk(arguments, tmp_path):
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


@pytest.mark.slow
def test_no_project_is_an_error_of_one_line(capsys):
    assert commands.main(["status", APP]) == 1
    assert capsys.readouterr().err.startswith("error: project: not given; export GCP_PROJECT")


@pytest.mark.slow
def test_without_credentials_it_says_how_to_get_some(monkeypatch, tmp_path, capsys):
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    assert commands.main(["status", APP, "--project", "a-project"]) == 1
    error = capsys.readouterr().err
    assert "no application-default credentials; run `gcloud auth application-default" in error
    assert error.count("\n") == 1


def test_how_to_read_the_logs_names_the_endpoint():
    text = commands.how_to_read_logs(load_settings(project="a-project"), APP)
    assert 'endpoint_id="serving-llms-smollm2-135m"' in text and "--project=a-project" in text


def test_the_startup_probe_may_fail_as_long_as_the_deployment_may_take():
    """Google's default of 3 failures would restart the container after half a minute."""
    settings = load_settings()
    window = settings.startup_probe_failures * settings.startup_probe_period
    assert window >= settings.deployment_timeout


def test_the_plan_names_googles_quota_of_an_accelerator():
    gpu = {"accelerator_type": "NVIDIA_H100_80GB", "accelerator_count": 8}
    text = commands.plan(load_settings(machine_type="a3-highgpu-8g", **gpu), "gpt2")
    assert "custom_model_serving_nvidia_h100_gpus in" in text
