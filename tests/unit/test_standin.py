"""The stand-in's own rules that need neither the SDK nor a process: names, lists, limits."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from standin import limits
from standin.errors import HTTP, ApiError
from standin.journal import Journal, read
from standin.replicas.runners import expand
from standin.services.lists import PAGE_LIMIT, page, select
from standin.services.names import Identifiers, canonical, last_part, region_of, region_of_host
from standin.settings import PROJECT_NUMBER, StandinSettings

HOST = "europe-west4-aiplatform.googleapis.com"
SETTINGS = StandinSettings(Path("unused"))
L4 = "NVIDIA_L4"


@dataclass
class Resource:
    display_name: str
    labels: dict[str, str] = field(default_factory=dict)


RESOURCES = [Resource("a", {"n": "1", "all": "yes"}), Resource("b", {"n": "2", "all": "yes"})]


@pytest.mark.parametrize(
    ("filter_text", "names"),
    [
        ("", "ab"),
        ('display_name="a"', "a"),
        ("displayName=b", "b"),
        ("display_name!=a", "b"),
        ("labels.n=2", "b"),
        ("labels.n:*", "ab"),
        ("labels.other:*", ""),
        ('labels.all=yes AND display_name!="b"', "a"),
    ],
)
def test_select_matches_names_and_labels(filter_text, names):
    assert "".join(one.display_name for one in select(RESOURCES, filter_text)) == names


@pytest.mark.parametrize("filter_text", ["color=red", "labels.n", "display_name~a", "a OR b"])
def test_select_rejects_other_filters(filter_text):
    with pytest.raises(ApiError, match="Invalid filter"):
        select(RESOURCES, filter_text)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pages_hold_every_item_once(size):
    items, token, found = list(range(7)), "", []
    while True:
        part, token = page(items, size, token)
        found += part
        if not token:
            break
    assert found == items


def test_page_has_at_most_100_items():
    items, token = page(range(PAGE_LIMIT + 1), 1000, "")
    assert len(items) == PAGE_LIMIT and token


@pytest.mark.parametrize(("size", "token"), [(-1, ""), (1, "!"), (1, "bm8=")])
def test_page_rejects_invalid_size_and_token(size, token):
    with pytest.raises(ApiError) as failed:
        page([1], size, token)
    assert failed.value.http == 400


def test_same_seed_gives_the_same_identifiers():
    first, again, other = Identifiers(1), Identifiers(1), Identifiers(2)
    assert [first() for _ in range(3)] == [again() for _ in range(3)] != [other() for _ in range(3)]
    assert len(first()) == 19


@pytest.mark.parametrize(
    ("host", "region"),
    [
        (HOST, "europe-west4"),
        (f"{HOST}:443", "europe-west4"),
        ("europe-west4-prediction-aiplatform.googleapis.com", "europe-west4"),
        (f"123.europe-west4-{PROJECT_NUMBER}.prediction.vertexai.goog", "europe-west4"),
        ("mars-east1-aiplatform.googleapis.com", None),
        ("aiplatform.googleapis.com", None),
        (f"{HOST}.evil.org", None),
    ],
)
def test_region_of_host(host, region):
    assert region_of_host(host) == region


@pytest.mark.parametrize("project", [SETTINGS.project, PROJECT_NUMBER])
def test_canonical_name_has_the_project_number(project):
    name = canonical(f"projects/{project}/locations/europe-west4/models/1", SETTINGS, HOST, "p")
    assert name == f"projects/{PROJECT_NUMBER}/locations/europe-west4/models/1"
    assert region_of(name) == "europe-west4" and last_part(name) == "1"


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("models/1", "INVALID_ARGUMENT"),
        ("projects/other/locations/europe-west4/models/1", "PERMISSION_DENIED"),
        (f"projects/{PROJECT_NUMBER}/locations/us-central1/models/1", "INVALID_ARGUMENT"),
    ],
)
def test_canonical_rejects_other_names(name, status):
    with pytest.raises(ApiError) as failed:
        canonical(name, SETTINGS, HOST, "aiplatform.models.get")
    assert failed.value.status == status


@pytest.mark.parametrize(
    ("machine", "accelerator", "count", "problem"),
    [
        ("n1-standard-4", "", 0, None),
        ("n1-standard-4", "NVIDIA_TESLA_T4", 1, None),
        ("g2-standard-12", L4, 1, None),
        ("", "", 0, "required"),
        ("x9-huge", "", 0, "not supported"),
        ("n2-standard-4", L4, 1, "not supported"),
        ("n1-standard-4", "NVIDIA_TESLA_T4", 0, "go together"),
        ("g2-standard-12", "", 0, "needs accelerator_type NVIDIA_L4"),
        ("g2-standard-12", L4, 2, "accelerator_count"),
    ],
)
def test_machine_problem(machine, accelerator, count, problem):
    found = limits.machine_problem(machine, accelerator, count)
    assert found is None if problem is None else problem in found


def test_usage_counts_accelerators_or_processors():
    assert limits.usage("n1-standard-8", "", 0, 3) == {"custom_model_serving_cpus": 24}
    l4 = "custom_model_serving_nvidia_l4_gpus"
    assert limits.usage("g2-standard-24", L4, 2, 2) == {l4: 4}
    assert limits.over_quota({l4: limits.QUOTAS[l4]}) == []
    assert limits.over_quota({l4: limits.QUOTAS[l4] + 1, "unknown": 1}) == [l4, "unknown"]


@pytest.mark.parametrize("status", HTTP)
def test_errors_have_the_same_code_for_both_transports(status):
    error = ApiError(status, "why")
    assert error.body()["error"] == {"code": HTTP[status], "message": "why", "status": status}
    assert error.operation().code == error.grpc.value[0]


def test_journal_reads_complete_lines_in_order(tmp_path):
    journal = Journal(tmp_path)
    journal.call(2.0, "rest", "GetModel", "/v1/x", "OK")
    journal.call(1.0, "grpc", "GetModel", "x", "OK")
    with (tmp_path / "calls.jsonl").open("a") as file:
        file.write('{"time": 0')  # not complete yet
    assert [call["time"] for call in read(tmp_path, "calls")] == [1.0, 2.0]
    assert read(tmp_path, "events") == []


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$(A)-$(B)", "1-$(B)"),
        ("$$(A)", "$(A)"),
        ("$A ${A} $", "$A ${A} $"),
    ],
)
def test_expand_replaces_known_variables_only(text, expanded):
    assert expand(text, {"A": "1"}) == expanded
