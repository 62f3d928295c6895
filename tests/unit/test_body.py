"""Which bodies are read as JSON, and what the error of the others says."""

import gzip
import json
import tracemalloc
import zlib

import pytest

from handler.body import read_json
from handler.errors import RequestError, google_error
from handler.headers import header_reader

LIMIT = 1000
VALUE = {"instances": ["1 + 1 = 2 % é 日本"]}
BODY = json.dumps(VALUE, ensure_ascii=False).encode()


def read(body: bytes = BODY, limit: int = LIMIT, **headers: str):
    names = {n if n == "http_method" else n.replace("_", "-"): v for n, v in headers.items()}
    return read_json({"body": body}, header_reader(names), limit)


def error(code: int, body: bytes = BODY, limit: int = LIMIT, **headers: str) -> str:
    with pytest.raises(RequestError) as raised:
        read(body, limit, **headers)
    assert raised.value.code == code and google_error(raised.value)["error"]["code"] == code
    return raised.value.message


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/json;charset=UTF-8",
        "application/json, application/json",
        "application/vnd.api+json",
        "application/json-patch+json",
        "text/json",
    ],
)
def test_reads_json_types(content_type):
    assert read(Content_Type=content_type) == VALUE


def test_reads_a_body_without_a_type():
    assert read() == VALUE


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "text/plain;charset=UTF-8",
        "text/html",
        "application/jsonp",
        "application/grpc",
        "multipart/form-data; boundary=x",
        "nonsense",
        "*/*",
    ],
)
def test_rejects_other_types_and_names_them(content_type):
    message = error(415, content_type=content_type)
    assert content_type.split(";")[0] in message and "Content-Type: application/json" in message


def test_reads_bytes_that_begin_as_json():
    """`gcloud ai endpoints raw-predict` sends this type unless it is told another one."""
    assert read(content_type="application/octet-stream") == VALUE
    header = header_reader({"content-type": "application/octet-stream"})
    with pytest.raises(RequestError, match="octet-stream"):
        read_json({"body": b"\x89PNG"}, header, 1000)


@pytest.mark.parametrize("parts", [{}, {'{"instances": ["1 1"]}': b""}, {"body": b"{}", "a": b""}])
def test_rejects_a_form_and_names_the_header_to_send(parts):
    """TorchServe passes on its fields, with each "+" and "%" decoded."""
    header = header_reader({"content-type": "application/x-www-form-urlencoded"})
    with pytest.raises(RequestError, match=r"a form.*Content-Type: application/json") as raised:
        read_json(parts, header, LIMIT)
    assert raised.value.code == 415


@pytest.mark.parametrize("name", ["content-encoding", "Content-Encoding", "CONTENT-ENCODING"])
@pytest.mark.parametrize(
    ("encoding", "encode"),
    [
        ("gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("x-gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("identity", bytes),
        ("", bytes),
    ],
)
def test_reads_compressed_bodies(name, encoding, encode):
    assert read(encode(BODY), **{name: encoding}) == VALUE


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "gzip, identity"])
def test_rejects_other_encodings_and_names_them(encoding):
    message = error(415, gzip.compress(BODY), content_encoding=encoding)
    assert f'"{encoding}"' in message and "gzip" in message


def test_body_in_gzip_twice_is_not_json():
    assert "not valid JSON" in error(
        400, gzip.compress(gzip.compress(BODY)), content_encoding="gzip"
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (BODY, "incorrect header check"),
        (b"", "its end is missing"),
        (gzip.compress(BODY)[:-9], "its end is missing"),
        (gzip.compress(BODY)[:-1], "its end is missing"),
        (gzip.compress(BODY)[:20] + b"\x00\xff" * 20, ""),
        (gzip.compress(BODY)[:-8] + bytes(8), "incorrect data check"),
        (gzip.compress(BODY) + gzip.compress(BODY), "it continues after its end"),
        (gzip.compress(BODY) + b"x", "it continues after its end"),
    ],
)
def test_rejects_wrong_gzip_and_says_what_is_wrong(body, reason):
    message = error(400, body, content_encoding="gzip")
    assert message.startswith("the body is not valid gzip") and reason in message


def test_gzip_bomb_is_rejected_without_using_its_memory():
    bomb = gzip.compress(b" " * 50_000_000)
    tracemalloc.start()
    message = error(413, bomb, limit=300_000, content_encoding="gzip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "more than 300000 bytes after decompression" in message
    assert peak < 2_000_000


def test_the_limit_holds_before_and_after_decompression():
    body = json.dumps("x" * 998).encode()
    assert len(body) == LIMIT and read(body) and read(gzip.compress(body), content_encoding="gzip")
    assert "has 1001 bytes; at most 1000" in error(413, body + b" ")
    assert "more than 1000" in error(413, gzip.compress(body + b" "), content_encoding="gzip")


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-16", "UTF-16 with a byte order mark (BOM)"),
        ("utf-16-le", "UTF-16;"),
        ("utf-16-be", "UTF-16;"),
        ("utf-32", "UTF-32 with a byte order mark (BOM)"),
        ("utf-32-le", "UTF-32;"),
        ("utf-32-be", "UTF-32;"),
        ("utf-8-sig", "begins with a byte order mark (BOM); send UTF-8 without one"),
        ("cp932", "not UTF-8: byte 0x"),
    ],
)
def test_names_an_encoding_other_than_utf_8(encoding, named):
    body = '{"instances": ["日本"]}'.encode(encoding)
    for sent, headers in ((body, {}), (gzip.compress(body), {"content_encoding": "gzip"})):
        message = error(400, sent, **headers)
        assert message.startswith("the body is not valid JSON: ") and named in message


def test_names_the_byte_of_latin_1():
    body = '{"instances": ["café"]}'.encode("latin-1")
    assert "not UTF-8: byte 0xe9 at position 19" in error(400, body)


@pytest.mark.parametrize("body", [b"\x00" * 10, b"\x00", b"\xff\xfe", b"\xff\xfe\x00\x00"])
def test_does_not_guess_an_encoding_of_bytes_that_are_not_json(body):
    assert "UTF-16;" not in error(400, body) and "UTF-32;" not in error(400, body)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "TRACE"])
def test_rejects_other_methods_and_names_them(method):
    assert f"{method} is not supported here; use POST" in error(405, http_method=method)
    assert read(http_method="POST") == VALUE


@pytest.mark.parametrize("body", [b"", b" \r\n\t"])
def test_empty_body_is_named(body):
    assert "the body is empty" in error(400, body)


SITE = "http://localhost:3000"


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", ""])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": SITE},
        {"Origin": "null"},
        {"origin": "http://localhost:7080", "host": "localhost:7080"},
        {"origin": "chrome-extension://abc", "sec-fetch-site": "none"},
        {"sec-fetch-site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_rejects_what_a_web_page_sends(monkeypatch, headers, content_type):
    monkeypatch.delenv("CORS_ORIGIN", raising=False)
    names = {name.replace("-", "_"): value for name, value in headers.items()}
    message = error(403, content_type=content_type, **names)
    assert "web page" in message and "CORS_ORIGIN" in message


@pytest.mark.parametrize(
    "headers", [{}, {"sec_fetch_site": "none"}, {"sec_fetch_mode": "cors"}, {"referer": SITE}]
)
def test_reads_what_other_clients_send(monkeypatch, headers):
    monkeypatch.delenv("CORS_ORIGIN", raising=False)
    assert read(**headers) == VALUE


def test_only_the_allowed_page_may_send(monkeypatch):
    monkeypatch.setenv("CORS_ORIGIN", SITE)
    assert read(origin=SITE, sec_fetch_site="same-site") == VALUE
    for other in ("http://localhost:30000", "https://localhost:3000", "null", "http://LOCALHOST"):
        assert f"only the pages of {SITE}" in error(403, origin=other)
    assert "only" in error(403, sec_fetch_site="cross-site")


def test_every_page_may_send_if_all_are_allowed(monkeypatch):
    monkeypatch.setenv("CORS_ORIGIN", "*")
    for headers in ({"origin": SITE}, {"origin": "null"}, {"sec_fetch_site": "cross-site"}):
        assert read(**headers) == VALUE
    assert "text/plain" in error(415, origin=SITE, content_type="text/plain")


def test_headers_are_found_in_any_case_among_torchserves_entries():
    """TorchServe lists each part of the body beside the headers, as `ts/service.py` does."""
    header = header_reader({"body": {"content-type": None}, "Content-Type": " text/plain "})
    assert header("content-type") == "text/plain"
    assert header("body") is None
