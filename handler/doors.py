"""Which API a request uses, by its path.

TorchServe passes everything after `/predictions/APP/VERSION/` on in the header `url_path`. Without
such a path, a request has Vertex AI's shape.
"""

from typing import Any

from handler import openai
from handler.config import App
from handler.errors import RequestError, google_error, openai_error
from handler.request import Request, parse_body

ROUTES = (openai.CHAT, openai.COMPLETIONS, openai.MODELS)


def clean(path: str | None) -> str:
    """Return a path without slashes at its ends or in a row, and without a query."""
    parts = (path or "").partition("?")[0].split("/")
    return "/".join(part for part in parts if part)


def write_error(path: str, error: RequestError) -> dict[str, Any]:
    """Write the error of a request whose body was not read."""
    return openai_error(error) if path else google_error(error)


def find_route(path: str) -> str:
    """Return the route of a path: one of `ROUTES`, or "" for Vertex AI's shape.

    Raises:
        RequestError: there is no such route.
    """
    if path in ("", openai.CHAT, openai.COMPLETIONS):
        return path
    if path == openai.MODELS or path.startswith(f"{openai.MODELS}/"):
        return openai.MODELS
    known = ", ".join(f"/{route}" for route in ROUTES)
    raise RequestError(404, f"/{path[:60]}: there is no such route; use one of {known}")


def parse(route: str, raw: Any, app: App, defaults: dict[str, Any], model: str) -> Request:
    """Check the body of a request.

    Args:
        route: from `find_route`, but not `MODELS`, which has no body.
        raw: the body's JSON.
        app: has the limits of one request.
        defaults: the app's, from `default_parameters`.
        model: the served model's name.

    Raises:
        RequestError: a field is wrong; the message names it.
    """
    if route == openai.CHAT:
        return openai.parse_chat(raw, app, defaults, model)
    if route == openai.COMPLETIONS:
        return openai.parse_completions(raw, app, defaults, model)
    chat, where = openai.chat_instance(raw), "instances[0]"
    if isinstance(raw, dict) and "messages" in raw and "instances" not in raw:
        # Google's ENDPOINT/chat/completions may pass this on. llama.cpp's server accepts it too.
        chat, where = raw, ""
    if chat is not None:
        return openai.parse_chat(chat, app, defaults, model, where=where, predict=True)
    return parse_body(raw, app, defaults)
