"""The life of a deployment: deploy, roll back, undeploy, clean up. Each may be killed and repeated.

Nothing is remembered on this machine. Ids follow from the APP, everything carries labels, and every
step begins by looking at what is there and at what is still going on from an earlier run.

What a step costs: replicas bill from the deployment until `undeploy` or `cleanup`, idle or not. A
model in the registry and an endpoint without a deployed model cost nothing.
"""

from collections.abc import Iterator
from typing import NamedTuple

from deploy.common.paths import UserError
from deploy.vertex.client import Event, Span, Vertex, exceptions, kind_of, timeline
from deploy.vertex.resources import (
    BACK,
    brought_back,
    check_endpoint,
    create_endpoint,
    delete,
    deploy_model,
    deployed_at,
    find_or_upload,
    get_endpoint,
    matching,
    ours,
    previous_of,
    set_traffic,
    traffic_of,
    types,
    undeploy_all,
    undeploy_model,
    version_of,
    versions,
    wanted_deployment,
)

__all__ = [
    "Event",
    "Resource",
    "Span",
    "Vertex",
    "check_canary",
    "cleanup",
    "deploy",
    "rollback",
    "timeline",
    "undeploy",
    "what_is_there",
]


class Resource(NamedTuple):
    """Something of ours on Vertex AI."""

    kind: str
    """`endpoint`, `deployed model`, `model` or `operation`."""
    name: str
    app: str
    detail: str
    bills: bool


def deploy(vertex: Vertex, app: str, image_uri: str, canary: int | None = None) -> types.Endpoint:
    """Bring an image to an app's endpoint; what is there already is left as it is.

    Args:
        vertex: the project and region.
        app: the APP.
        image_uri: in Artifact Registry, in the settings' region. Another image than before becomes
            another version of the model.
        canary: per cent of the requests that this image gets; the image that had most keeps the
            rest. None gives it all, and undeploys the others.

    Returns:
        The endpoint as it is now.

    Raises:
        UserError: a wrong argument, or a canary with nothing beside it.
        GoogleAPICallError: Google refused, or the model server never became ready.
    """
    check_canary(canary)
    if not image_uri.startswith(f"{vertex.settings.region}-docker.pkg.dev/"):
        raise UserError(
            f"image_uri: {image_uri} given; should be in Artifact Registry in the same region, "
            f"{vertex.settings.image_folder()}/..."
        )
    vertex.begun.clear()
    try:
        return _deploy(vertex, app, image_uri, canary)
    except exceptions.AlreadyExists:
        # Begun by a run that was killed a moment ago, and not listed until now.
        return _deploy(vertex, app, image_uri, canary)


def check_canary(canary: int | None) -> None:
    """Refuse what is no share.

    Raises:
        UserError: it is neither None nor a whole number from 1 to 99.
    """
    if canary is not None and not (type(canary) is int and 1 <= canary <= 99):
        raise UserError(f"canary: {canary!r} given; should be a whole number from 1 to 99, or none")


def _deploy(vertex: Vertex, app: str, image_uri: str, canary: int | None) -> types.Endpoint:
    settle(vertex, app)
    endpoint = get_endpoint(vertex, app)
    if endpoint:
        check_endpoint(vertex, endpoint)
    if canary and not deployed_at(endpoint):
        raise UserError(f"canary: {canary} given, and nothing is deployed that could take the rest")
    version = find_or_upload(vertex, app, image_uri)
    return _serve(vertex, app, endpoint or create_endpoint(vertex, app), version, canary)


def rollback(vertex: Vertex, app: str) -> types.Endpoint:
    """Go back to what served before what was deployed last.

    A canary goes away, and what is beside it gets all requests. Where all requests go to one
    version already, the one before it is deployed again, which takes minutes: the one that had most
    of them when it was deployed; where that is not known, the next lower number. So rolling back
    twice goes back by two. The version that is left stays in the model registry.

    Raises:
        UserError: there is nothing to go back to.
    """
    settle(vertex, app)
    endpoint = get_endpoint(vertex, app)
    deployed = deployed_at(endpoint)
    if not deployed:
        raise UserError(f"rollback: nothing of {app} is deployed")
    *others, newest = deployed
    if others and brought_back(newest):
        vertex.report(f"back to version {version_of(newest)}, as begun in an earlier run")
        return _give(vertex, app, endpoint, {newest.id: 100})
    if others:
        before = max(others, key=lambda one: traffic_of(endpoint, one))
        vertex.report(f"back from version {version_of(newest)} to {version_of(before)}")
        return _give(vertex, app, endpoint, {before.id: 100})
    current, known = version_of(newest), versions(vertex, app)
    lower = [number for number in known if number < int(current)]
    number = int(previous_of(newest) or current)
    if number not in known or number == int(current):
        number = max(lower, default=None)
    if number is None:
        raise UserError(
            f"rollback: version {current} of {app} is the first, as far as is known here; deploy "
            "the image that you want instead"
        )
    vertex.report(f"back from version {current} to {number}, which is deployed again")
    return _serve(vertex, app, endpoint, str(number), None, back=True)


def undeploy(vertex: Vertex, app: str) -> None:
    """Stop all replicas of an app, and with them the bill. Endpoint and model stay."""
    settle(vertex, app, cancel=True)
    endpoint = get_endpoint(vertex, app)
    if endpoint:
        undeploy_all(vertex, endpoint)
    else:
        vertex.report(f"{app} has no endpoint in {vertex.settings.region}")


def cleanup(vertex: Vertex, app: str, attempts: int = 3) -> None:
    """Remove everything of an app in the region, then list again to prove that nothing is left.

    Args:
        vertex: the project and region.
        app: the APP.
        attempts: how often to look and remove; more than one for what appears meanwhile, such as
            the model of an upload that could not be cancelled.

    Raises:
        UserError: something is left; it says what.
    """
    for _ in range(attempts):
        settle(vertex, app, cancel=True)
        for endpoint in ours(vertex, app, "endpoints"):
            undeploy_all(vertex, endpoint)
            delete(vertex, "endpoint", endpoint.name)
        for model in ours(vertex, app, "models"):
            delete(vertex, "model", model.name)
        left = list(what_is_there(vertex, app))
        if not left:
            vertex.report(f"listed {vertex.parent} again: nothing of {app} is left")
            return
    listed = "; ".join(f"{one.kind} {one.name}" for one in left)
    raise UserError(f"cleanup: still there, and perhaps billing: {listed}")


def what_is_there(vertex: Vertex, app: str | None = None) -> Iterator[Resource]:
    """Everything of ours in the region, by its labels, and what is being made or removed.

    Args:
        vertex: the project and region.
        app: the APP. None lists all of them.
    """
    endpoints, models = ours(vertex, app, "endpoints"), ours(vertex, app, "models")
    for endpoint in endpoints:
        owner = endpoint.labels["app"]
        yield Resource("endpoint", endpoint.name, owner, endpoint.dedicated_endpoint_dns, False)
        for one in deployed_at(endpoint):
            size = one.dedicated_resources
            detail = (
                f"version {version_of(one)}, {traffic_of(endpoint, one)} % of requests, "
                f"{size.min_replica_count} to {size.max_replica_count} x "
                f"{size.machine_spec.machine_type}"
            )
            yield Resource("deployed model", f"{endpoint.name} {one.id}", owner, detail, True)
    for model in models:
        default = f"default version {model.version_id}"
        yield Resource("model", model.name, model.labels["app"], default, False)
    for one in _going_on(vertex, app, [*endpoints, *models]):
        bills = kind_of(one) == "DeployModel"
        yield Resource("operation", one.name, app or "", kind_of(one), bills)


def settle(vertex: Vertex, app: str, cancel: bool = False) -> None:
    """Wait until nothing that an earlier run began is going on any more.

    Args:
        vertex: the project and region.
        app: the APP.
        cancel: whether to ask for deployments and uploads to stop, and to look by labels too.
    """
    labelled = ours(vertex, app, "endpoints") + ours(vertex, app, "models") if cancel else []
    for one in list(_going_on(vertex, app, labelled)):
        step = f"{kind_of(one)} from an earlier run"
        stop = cancel and kind_of(one) in ("DeployModel", "UploadModel")
        vertex.report(f"{step}: {'cancelled, ' if stop else ''}waiting for its end")
        if stop:
            vertex.cancel(one)
        vertex.wait(step, one)


def _going_on(vertex: Vertex, app: str | None, found: list) -> Iterator:
    """The operations of some resources, and of those that may not be listed yet."""
    names = [one.name for one in found]
    if app:
        names += [vertex.settings.endpoint_name(app), vertex.settings.model_name(app)]
    # Google answers with the project's number where we say its id: the same name, twice
    for name in {name.split("/", 2)[2]: name for name in names}.values():
        yield from vertex.running(name)


def _serve(
    vertex: Vertex,
    app: str,
    endpoint: types.Endpoint,
    version: str,
    canary: int | None,
    back: bool = False,
) -> types.Endpoint:
    """Have a version deployed as the settings say, with its share of the requests.

    Its name says for `rollback` what had most of them, or that it is itself brought `back`.
    """
    wanted = wanted_deployment(vertex, app, version)
    there = matching(endpoint, wanted)
    others = [one for one in deployed_at(endpoint) if not there or one.id != there.id]
    most = max(others, key=lambda one: traffic_of(endpoint, one), default=None)
    if back:
        wanted.display_name += BACK
    elif most:  # the same version on other machines stands where the one on the old ones stood
        inherited = previous_of(most) if version_of(most) == version else None
        wanted.display_name += f" after {inherited or version_of(most)}"
    split = {there.id if there else "0": canary or 100}
    if canary and most:
        split[most.id] = 100 - canary
    elif canary:
        raise UserError(
            f"canary: {canary} given, and version {version} is alone already, with this image; "
            "build another, or name one (TAG=)"
        )
    if not there:
        rest = {one.id: 0 for one in others}
        deploy_model(vertex, endpoint, wanted, rest | split)
        endpoint = get_endpoint(vertex, app)
        new = matching(endpoint, wanted)
        split = {new.id if key == "0" else key: share for key, share in split.items()}
    return _give(vertex, app, endpoint, split)


def _give(
    vertex: Vertex, app: str, endpoint: types.Endpoint, split: dict[str, int]
) -> types.Endpoint:
    """Share the requests out as said, and stop what gets none: it would bill for nothing."""
    if {key: share for key, share in endpoint.traffic_split.items() if share} != split:
        set_traffic(vertex, endpoint, split)
    for one in endpoint.deployed_models:
        if one.id not in split:
            undeploy_model(vertex, endpoint, one)
    if not vertex.begun:
        vertex.report(f"{app} is deployed like this already: nothing to do")
    return get_endpoint(vertex, app)
