"""Read the bytes of a request's body as JSON."""

import json
import re
import zlib
from typing import Any

from pydantic_core import from_json

from handler.config import show
from handler.errors import RequestError
from handler.headers import Header
from handler.origin import check_origin

_JSON_TYPE = re.compile(r"(application|text)/json|[a-z]+/[^ ,;]+\+json")
_FORM = "application/x-www-form-urlencoded"
_BYTES = "application/octet-stream"
_GZIP = 47
"""zlib's code for: detect gzip or deflate from the first bytes."""


def read_json(parts: dict[str, Any], header: Header, limit: int) -> Any:
    """Return the JSON value that a client sent.

    Args:
        parts: what TorchServe passes on, name -> bytes. Any request but a form has one part,
            "body", even if it is empty.
        header: the request's headers.
        limit: the most bytes, also after decompression.

    Raises:
        RequestError: it is not a POST, a web page sent it, it is not JSON, or it is too large.
    """
    check_method(header, "POST")
    check_origin(header)
    payload = parts.get("body")
    _check_type(header("content-type") or "", payload)
    if payload is None:
        raise RequestError(415, _not_json("a form"))
    payload = payload.encode() if isinstance(payload, str) else bytes(payload)
    if len(payload) > limit:
        raise RequestError(413, f"the body has {len(payload)} bytes; at most {limit} are allowed")
    payload = _decompress(payload, header("content-encoding") or "", limit)
    if not payload.strip():
        raise RequestError(400, "the body is empty; send a JSON object")
    try:
        return from_json(payload, allow_inf_nan=False)
    except ValueError as error:
        reason = _wrong_encoding(payload) or str(error)
        raise RequestError(400, f"the body is not valid JSON: {reason}") from error


def check_method(header: Header, *allowed: str) -> None:
    """Reject a request with another HTTP method.

    TorchServe passes every method on. Our frontend adds the header with the method.

    Raises:
        RequestError: 405; the message names the method and those allowed.
    """
    method = header("http_method")
    if method is not None and method not in allowed:
        raise RequestError(405, f"{method} is not supported here; use {' or '.join(allowed)}")


def _check_type(given: str, payload: Any) -> None:
    """Reject other types than JSON. A request without a type is read as JSON.

    So are bytes that begin like it: `gcloud ai endpoints raw-predict` calls all bodies bytes.
    """
    kind = re.split("[;,]", given)[0].strip().lower()
    if not kind or _JSON_TYPE.fullmatch(kind):
        return
    if kind == _BYTES and isinstance(payload, bytes | bytearray) and payload.lstrip()[:1] == b"{":
        return
    if kind == _FORM:
        raise RequestError(415, _not_json("a form, whose encoding changes text"))
    raise RequestError(415, _not_json(show(kind)))


def _not_json(given: str) -> str:
    return (
        f"the body arrived as {given}; send JSON with the header Content-Type: application/json "
        '(curl: -H "Content-Type: application/json")'
    )


def _decompress(payload: bytes, encoding: str, limit: int) -> bytes:
    """Undo a Content-Encoding, without using more memory than the limit.

    Raises:
        RequestError: an encoding that is not supported, or data that are not in it or are too
            long.
    """
    name = encoding.lower()
    if name in ("", "identity"):
        return payload
    if name not in ("gzip", "x-gzip", "deflate"):
        raise RequestError(
            415,
            f"Content-Encoding: {show(encoding)} is not supported; send gzip, deflate or no "
            "Content-Encoding",
        )
    decoder = zlib.decompressobj(_GZIP)
    try:
        content = decoder.decompress(payload, limit + 1)
    except zlib.error as error:
        raise RequestError(400, f"the body is not valid {name}: {error}") from error
    if len(content) > limit:
        raise RequestError(
            413, f"the body has more than {limit} bytes after decompression, the most allowed"
        )
    if not decoder.eof:
        raise RequestError(400, f"the body is not valid {name}: its end is missing")
    if decoder.unused_data:
        raise RequestError(400, f"the body is not valid {name}: it continues after its end")
    return content


def _wrong_encoding(payload: bytes) -> str:
    """Why the bytes are not UTF-8 as JSON needs it; empty if they are."""
    encoding = json.detect_encoding(payload)
    if encoding == "utf-8-sig":
        return "it begins with a byte order mark (BOM); send UTF-8 without one"
    if encoding != "utf-8":
        # Zeros alone look like UTF-32.
        begin = payload[:64].decode(encoding, errors="ignore").lstrip("\ufeff \t\r\n")
        if begin[:1] in ("{", "[", '"'):
            marked = " with a byte order mark (BOM)" if encoding in ("utf-16", "utf-32") else ""
            return f"it is {encoding[:6].upper()}{marked}; send UTF-8"
    try:
        payload.decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{payload[error.start]:02x} at position {error.start}"
        return f"it is not UTF-8: {byte}; send UTF-8, not Latin-1 or another encoding"
    return ""
