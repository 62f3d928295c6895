"""How requests enter: the proxy, tokens, permissions, regions, strict parsing, lists, names."""

import json
import os
import socket
import stat
from pathlib import Path

import httpx
import pytest
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.api_core import exceptions
from google.cloud import aiplatform_v1 as v1
from google.oauth2 import service_account

from tests.vertex.gapic import Client, finish, session

pytestmark = pytest.mark.slow


def url(client: Client, path: str) -> str:
    return f"https://{client.host}/v1/{client.parent}{path}"


@pytest.mark.parametrize("address", ["https://example.com", "https://1.1.1.1"])
def test_proxy_rejects_other_hosts(standin, address):
    with pytest.raises(requests.exceptions.ProxyError, match="403"):
        requests.get(address, timeout=5)
    with pytest.raises(httpx.ProxyError, match="403"):
        httpx.get(address, timeout=5)
    assert_rejected(standin, address.removeprefix("https://"))


def test_proxy_rejects_plain_http(standin):
    for library in (requests, httpx):
        assert library.get("http://example.com", timeout=5).status_code == 403
    assert_rejected(standin, "http://example.com")


def assert_rejected(standin, target: str) -> None:
    rejected = [e for e in standin.events() if e["event"] == "rejected: would leave the machine"]
    assert any(target in e["target"] for e in rejected)


@pytest.mark.parametrize("target", ["storage.googleapis.com.evil.org:443", "x.googleapis.com:22"])
def test_proxy_checks_the_whole_host_name_and_port(standin, target):
    proxy = standin.environment["HTTPS_PROXY"].removeprefix("http://").split(":")
    with socket.create_connection((proxy[0], int(proxy[1])), timeout=5) as connection:
        connection.sendall(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 403")


def test_local_addresses_bypass_the_proxy(standin):
    with pytest.raises(httpx.ConnectError):
        httpx.get("http://127.0.0.1:9", timeout=5)


def test_key_files_are_private(standin):
    for name in ("admin.json", "viewer.json", "token", "ca.pem"):
        assert stat.S_IMODE((standin.folder / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE(standin.folder.stat().st_mode) == 0o700
    assert not (standin.folder / "ca.key").exists()


@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer nonsense"}, {"Authorization": "x"}]
)
def test_rejects_requests_without_valid_token(grpc_client, header):
    response = requests.get(url(grpc_client, "/models"), headers=header, timeout=5)
    assert response.status_code == 401
    assert response.json()["error"]["status"] == "UNAUTHENTICATED"


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_rejects_tokens_with_another_signature(standin, transport):
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    info = json.loads((standin.folder / "admin.json").read_text()) | {"private_key": key.decode()}
    credentials = service_account.Credentials.from_service_account_info(info)
    client = Client(standin, transport, "", "", credentials)
    with pytest.raises((exceptions.Unauthenticated, exceptions.Unauthorized)):
        client.models.get_model(name=f"{client.parent}/models/1")


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_viewer_can_read_only(standin, grpc_client, transport):
    file = str(standin.folder / "viewer.json")
    credentials = service_account.Credentials.from_service_account_file(file)
    viewer = Client(standin, transport, grpc_client.image, grpc_client.code, credentials)
    assert list(viewer.models.list_models(parent=viewer.parent)) == []
    with pytest.raises(exceptions.Forbidden, match=r"aiplatform\.models\.upload"):
        viewer.upload()
    with pytest.raises(exceptions.Forbidden, match=r"aiplatform\.endpoints\.create"):
        viewer.endpoint()
    with pytest.raises(exceptions.Forbidden, match=r"aiplatform\.endpoints\.predict"):
        viewer.predict(f"{viewer.parent}/endpoints/1")


def test_rejects_another_project(client):
    with pytest.raises(exceptions.Forbidden, match="may not exist"):
        client.models.list_models(parent=client.parent.replace("standin-project", "other"))


def test_rejects_resource_of_another_region(client):
    name = client.parent.replace(client.standin.region, "us-central1")
    with pytest.raises(exceptions.BadRequest, match="us-central1"):
        client.models.list_models(parent=name)


def test_regions_have_separate_models(client, standin):
    client.upload()
    other = v1.ModelServiceClient(
        client_options={"api_endpoint": "us-central1-aiplatform.googleapis.com"},
        transport=client.transport,
    )
    parent = client.parent.replace(standin.region, "us-central1")
    assert list(other.list_models(parent=parent)) == []


def test_unknown_region_in_host_name_is_404(standin):
    path = f"/v1/projects/{standin.project}/locations/mars-east1/models"
    response = session().get(f"https://mars-east1-aiplatform.googleapis.com{path}", timeout=5)
    assert response.status_code == 404


def test_unknown_methods_are_501_and_logged(client, standin):
    with pytest.raises(exceptions.MethodNotImplemented):
        v1.JobServiceClient(
            client_options={"api_endpoint": client.host}, transport=client.transport
        ).get_custom_job(name=f"{client.parent}/customJobs/1")
    # google-auth sends requests to another host from another thread.
    last = [call for call in standin.calls() if call["host"] == client.host][-1]
    assert last["status"] == "UNIMPLEMENTED" and last["transport"] == client.transport
    assert "customJobs/1" in last["path"] or last["method"] == "GetCustomJob"
    response = session().post(url(client, "/models:import"), json={}, timeout=5)
    assert response.status_code == 501 and "does not have" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": {"displayName": "x", "containerSpec": {"imageURI": "x"}}}, "imageURI"),
        ({"model": {"displayName": 5}}, "displayName"),
        ({"modle": {}}, "modle"),
        ({"model": {"containerSpec": {"ports": [{"containerPort": "http"}]}}}, "containerPort"),
        ([], ""),
        (b"{", "JSON"),
    ],
    ids=[
        "misspelt field",
        "wrong type",
        "misspelt message",
        "text instead of number",
        "list",
        "invalid JSON",
    ],
)
def test_rejects_invalid_json(grpc_client, body, message):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = session().post(url(grpc_client, "/models:upload"), data=data, timeout=5)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["status"] == "INVALID_ARGUMENT"
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("query", ["pageSiez=1", "pageSize=x", "filter=color%3Dred", "pageToken=!"])
def test_rejects_invalid_query_parameters(grpc_client, query):
    response = session().get(url(grpc_client, f"/models?{query}"), timeout=5)
    assert response.status_code == 400, response.text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"display_name": ""}, "display_name"),
        ({"labels": {"Course": "yes"}}, "label"),
        ({"artifact_uri": "/tmp"}, "gs://"),
    ],
)
def test_rejects_invalid_models(grpc_client, model, message):
    with pytest.raises(exceptions.InvalidArgument, match=message):
        grpc_client.upload(model)


def test_lists_have_pages_and_filters(client):
    for number in range(3):
        client.upload({"display_name": f"m{number}", "labels": {"n": str(number), "all": "1"}})

    def names(filter: str = "", **more: int) -> list[str]:
        request = {"parent": client.parent, "filter": filter} | more
        return sorted(m.display_name for m in client.models.list_models(request=request))

    assert names() == names("labels.all=1") == names(page_size=2) == ["m0", "m1", "m2"]
    assert names('display_name="m1"') == names("labels.n=1") == ["m1"]
    assert names('labels.all=1 AND display_name!="m1"') == ["m0", "m2"]
    assert names("labels.none:*") == [] and names("labels.n:*") == ["m0", "m1", "m2"]
    first = next(client.models.list_models(request={"parent": client.parent, "page_size": 2}).pages)
    assert len(first.models) == 2 and first.next_page_token


def test_versions_and_aliases(client):
    name = client.upload({"description": "first"})
    again = client.models.upload_model(
        request={
            "parent": client.parent,
            "parent_model": name,
            "model": {
                "display_name": "small",
                "description": "second",
                "container_spec": client.spec(),
                "version_aliases": ["canary"],
            },
        }
    )
    assert finish(again).model_version_id == "2"

    def get(version: str) -> str:
        return client.models.get_model(name=f"{name}{version}").description

    assert get("") == get("@1") == get("@default") == "first"
    assert get("@2") == get("@canary") == "second"
    versions = [m.version_id for m in client.models.list_model_versions(name=name)]
    assert versions == ["1", "2"]
    client.models.merge_version_aliases(name=f"{name}@2", version_aliases=["default", "-canary"])
    assert get("") == "second"
    with pytest.raises(exceptions.NotFound):
        get("@canary")
    with pytest.raises(exceptions.BadRequest, match="default"):
        client.models.delete_model_version(name=f"{name}@2")
    finish(client.models.delete_model_version(name=f"{name}@1"))
    with pytest.raises(exceptions.NotFound):
        get("@1")
    with pytest.raises(exceptions.BadRequest, match="only version"):
        client.models.delete_model_version(name=f"{name}@2")


def test_labels_can_be_updated(client):
    model = v1.Model(name=client.upload(), labels={"a": "1"}, display_name="other")
    changed = client.models.update_model(model=model, update_mask={"paths": ["labels"]})
    assert dict(changed.labels) == {"a": "1"} and changed.display_name == "small"
    endpoint = client.endpoint()
    endpoint.labels["a"] = "2"
    client.endpoints.update_endpoint(endpoint=endpoint, update_mask={"paths": ["labels"]})
    assert client.endpoints.get_endpoint(name=endpoint.name).labels["a"] == "2"
    with pytest.raises(exceptions.BadRequest, match="update_mask"):
        client.endpoints.update_endpoint(endpoint=endpoint, update_mask={"paths": ["name"]})


def test_resource_names_have_the_project_number(client):
    assert client.upload().startswith(f"projects/{client.standin.project_number}/")


def test_client_can_choose_the_model_id(client):
    request = {"parent": client.parent, "model_id": "mine"}
    request["model"] = {"display_name": "x", "container_spec": client.spec()}
    assert finish(client.models.upload_model(request=request)).model.endswith("/models/mine")
    with pytest.raises(exceptions.Conflict):
        client.models.upload_model(request=request)


def test_operations_are_listed_and_cancelled(grpc_client):
    endpoint, model = grpc_client.endpoint(), grpc_client.upload(env={"HEALTH": 500})
    operation = grpc_client.start_deploy(endpoint.name, model, split={})
    base = f"https://{grpc_client.host}/v1/"
    name = operation.operation.name
    listed = session().get(base + name.rsplit("/", 1)[0], timeout=5).json()["operations"]
    assert [o["name"] for o in listed if not o.get("done")] == [name]
    times = listed[-1]["metadata"]["genericMetadata"]
    assert times["createTime"] <= times["updateTime"]
    with pytest.raises(exceptions.FailedPrecondition, match="being-deployed"):
        grpc_client.endpoints.delete_endpoint(name=endpoint.name)
    assert session().post(f"{base}{name}:cancel", json={}, timeout=5).json() == {}
    with pytest.raises(exceptions.Cancelled):
        finish(operation)
    for prefix in ("v1", "v1beta1", "ui"):
        response = session().get(f"https://{grpc_client.host}/{prefix}/{name}", timeout=5)
        assert response.json()["error"]["code"] == 1
    assert session().get(f"{base}{name}0", timeout=5).status_code == 404
    finish(grpc_client.endpoints.delete_endpoint(name=endpoint.name))


def test_metadata_store_is_not_found(client):
    service = v1.MetadataServiceClient(
        client_options={"api_endpoint": client.host}, transport=client.transport
    )
    with pytest.raises(exceptions.NotFound, match="Requested Metadata Store default not found"):
        service.get_metadata_store(name=f"{client.parent}/metadataStores/default")


def test_enums_are_names_or_numbers(grpc_client):
    path = grpc_client.upload().split("/", 4)[4]
    key = "supportedDeploymentResourcesTypes"
    assert session().get(url(grpc_client, f"/{path}")).json()[key] == ["DEDICATED_RESOURCES"]
    numbers = session().get(url(grpc_client, f"/{path}?$alt=json;enum-encoding=int")).json()[key]
    assert numbers == [v1.Model.DeploymentResourcesType.DEDICATED_RESOURCES.value]


def test_environment_variables_name_existing_files(standin):
    assert {k: os.environ[k] for k in standin.environment} == standin.environment
    for name in ("REQUESTS_CA_BUNDLE", "GOOGLE_APPLICATION_CREDENTIALS"):
        assert Path(os.environ[name]).is_file()
