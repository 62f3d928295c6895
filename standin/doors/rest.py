"""The REST server: HTTP/1.1 over TLS on loopback, reached through the proxy."""

import json
import re
import time
from collections.abc import Awaitable
from typing import Any

from aiohttp import web

from standin.doors import methods
from standin.doors.dispatch import Api, Caller
from standin.errors import ApiError
from standin.services.messages import dump
from standin.services.predictions import RAW, too_large

_PREDICT = re.compile(
    r"(?P<endpoint>projects/[^/]+/locations/[^/]+/endpoints/[^/:]+)"
    r"(?::(?P<verb>predict|rawPredict|streamRawPredict)"
    r"|(?:/deployedModels/(?P<deployed>[^/]+))?/(?P<invoke>invoke)(?P<path>(?:/.*)?)"
    r"|(?P<chat>/chat/completions))"
)
_INVOKE_VERBS = ("POST", "GET")
"""The reference has POST only; others' programs send GET, such as `GET .../invoke/health`."""
_DISCARD = 64 * 1024 * 1024
"""Bytes of a body that are read even if it is too large, so that the client gets the error."""


def application(api: Api) -> web.Application:
    """Make the application: one handler for all paths, because `methods` has the URLs."""

    async def handle(request: web.Request) -> web.StreamResponse:
        began = time.time()
        host = request.headers.get("Host", "")
        caller = Caller("rest", host, request.headers.get("Authorization", ""))
        name = status = ""
        try:
            name, work = _find(api, request, caller)
            response = await work
            status = "OK" if response.status < 400 else str(response.status)
        except ApiError as error:
            status = error.status
            response = web.json_response(error.body(), status=error.http)
        finally:
            api.log(began, caller, name or f"{request.method} ?", request.path, status or "CUT OFF")
        return response

    app = web.Application(client_max_size=_DISCARD)
    app.router.add_route("*", "/{path:.*}", handle)
    return app


def _find(
    api: Api, request: web.Request, caller: Caller
) -> tuple[str, Awaitable[web.StreamResponse]]:
    """Return the method's name and the coroutine that answers."""
    version, _, path = request.path.removeprefix("/").partition("/")
    if request.host == "oauth2.googleapis.com" and request.path == "/token":
        return "token", _token(api, request)
    if request.host == "iamcredentials.googleapis.com" and path.endswith("/allowedLocations"):
        return "allowedLocations", _allowed_locations()
    if version in methods.VERSIONS:
        # First not decoded: the model server gets the path of `invoke` as the client wrote it.
        written = request.rel_url.raw_path.lstrip("/").partition("/")[2]
        match = _PREDICT.fullmatch(written) or _PREDICT.fullmatch(path)
        if match and match["chat"]:
            return "chatCompletions", _chat_completions()
        if match and request.method in (_INVOKE_VERBS if match["invoke"] else ("POST",)):
            return match["verb"] or "invoke", _predict(api, request, caller, match)
        if found := methods.find(request.method, path):
            return found[0].short_name, _call(api, request, caller, *found)
    return "", _unknown(request)


async def _unknown(request: web.Request) -> web.Response:
    raise ApiError(
        "UNIMPLEMENTED",
        f"The stand-in does not have {request.method} https://{request.host}{request.path}.",
    )


async def _chat_completions() -> web.Response:
    """Refuse what the container cannot be tested against.

    The reference has the URL, and Model Garden's notebooks use it at both types of endpoint. None
    says what reaches the container.
    """
    raise ApiError(
        "UNIMPLEMENTED",
        "The stand-in does not imitate ENDPOINT/chat/completions: what Vertex AI sends to a custom "
        'container then is not documented. Use .../invoke/..., or {"instances": [{"@requestFormat":'
        ' "chatCompletions", ...}]} through :predict or :rawPredict.',
    )


async def _token(api: Api, request: web.Request) -> web.Response:
    form = await request.post()
    return web.json_response(api.access.grant(str(form.get("assertion", ""))))


async def _allowed_locations() -> web.Response:
    """Answer google-auth's question before it uses a service account: no restriction."""
    return web.json_response({"locations": [], "encodedLocations": "0x0"})


async def _call(
    api: Api, request: web.Request, caller: Caller, method: methods.Method, resource: str
) -> web.Response:
    api.access.authenticate(caller.authorization)  # Google's front end checks this first
    body: Any = {}
    if text := await request.text():
        try:
            body = json.loads(text)
        except ValueError as error:
            raise ApiError("INVALID_ARGUMENT", f"Invalid JSON payload received. {error}") from error
    if text and not method.body:
        raise ApiError("INVALID_ARGUMENT", "Invalid JSON payload received. A body is not allowed.")
    message = methods.read_rest(method, resource, dict(request.query), body)
    response = await api.call(method, message, caller)
    enum_numbers = "enum-encoding=int" in request.query.get("$alt", "")
    return web.json_response(dump(response, enum_numbers=enum_numbers))


async def _predict(
    api: Api, request: web.Request, caller: Caller, match: re.Match[str]
) -> web.StreamResponse:
    verb = match["verb"] or match["invoke"]
    name = api.authorize(caller, match["endpoint"], "aiplatform.endpoints.predict")
    limits = api.predictions.limits(name, request.host, verb)
    path = match["path"] or ""
    if verb == "invoke":
        if not path.strip("/"):
            raise ApiError("NOT_FOUND", f"{name}/invoke: the root of a Model is not accessible.")
        path += f"?{request.rel_url.raw_query_string}" if request.rel_url.raw_query_string else ""
    body = await _read_body(request, limits.bytes)
    if verb not in RAW:
        return web.json_response(await api.predictions.predict_json(name, limits, body))
    upstream = await api.predictions.send(
        name,
        limits,
        body,
        request.headers,
        method=request.method,
        path=path,
        deployed_model=match["deployed"] or "",
    )
    headers, status = upstream.headers(), upstream.response.status
    if verb == "rawPredict":
        data = await api.predictions.read(upstream, limits)
        return web.Response(body=data, status=status, headers=headers)
    response = web.StreamResponse(status=status, headers=headers)
    try:
        await response.prepare(request)
        async for chunk in upstream.response.content.iter_any():  # without buffering
            await response.write(chunk)
        await response.write_eof()
    finally:
        upstream.response.close()  # if the client has left, the model server learns it this way
    return response


async def _read_body(request: web.Request, limit: int) -> bytes:
    kept, size = [], 0
    async for chunk in request.content.iter_any():
        size += len(chunk)
        if size <= limit:
            kept.append(chunk)
        elif size > _DISCARD:
            break
    if size > limit:
        raise too_large(limit)
    return b"".join(kept)
