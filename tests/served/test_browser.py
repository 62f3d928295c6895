"""Pages in a real browser: what they can do to a server on the same machine.

Needs Chromium; without it the tests are skipped.
"""

import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import pytest

from deploy.archive.build import build_archive
from deploy.torchserve.server import Server
from tests.bad_input import OK

pytestmark = pytest.mark.served

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ATTACKS = """
const ok = JSON.stringify({"instances": ["a page"], "parameters": {"max_new_tokens": 3}});
const attempts = [];
for (const host of ["127.0.0.1", "localhost"]) {
  const url = `http://${host}:PORT/predictions/tiny`;
  const send = (path, options) =>
    attempts.push(fetch(url + path, {method: "POST", body: ok, ...options})
      .then(r => r.text()).catch(e => `${e}`));
  for (const type of ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
    send("", {mode: "no-cors", headers: {"content-type": type}});
  send("", {mode: "no-cors", body: new Blob([ok])});
  send("/1.0/v1/completions", {mode: "no-cors", body: new Blob(['{"prompt": "a"}'])});
  send("", {mode: "cors", headers: {"content-type": "application/json"}});
  send("", {mode: "cors", headers: {"content-type": "text/plain"}});
  send("", {mode: "no-cors", referrerPolicy: "no-referrer"});
  navigator.sendBeacon(url, new Blob([ok]));
  for (const query of [`/invocations?body=${encodeURIComponent(ok)}`, "/v1/models"])
    attempts.push(new Promise(done => {
      const image = new Image();
      image.onload = image.onerror = () => done("image");
      image.src = `http://${host}:PORT${query}`;
    }));
  const frame = document.createElement("iframe");
  frame.name = `frame-${host}`;
  document.body.append(frame);
  const form = document.createElement("form");
  Object.assign(form, {method: "post", action: url, enctype: "text/plain", target: frame.name});
  const input = document.createElement("input");
  input.name = ok.slice(0, -1) + ', "x": "';
  input.value = '"}';
  form.append(input);
  document.body.append(form);
  attempts.push(new Promise(done => { frame.onload = () => done("form"); form.submit(); }));
}
return Promise.all(attempts);
"""
CLIENT = """
const url = "http://127.0.0.1:PORT/predictions/tiny/1.0/v1/completions";
const headers = {"content-type": "application/json", "authorization": "Bearer none",
                 "x-stainless-lang": "js"};
const post = content => fetch(url, {method: "POST", headers, body: JSON.stringify(content)});
const whole = await post({"prompt": "abc", "max_tokens": 3});
const stream = await post({"prompt": "abc", "max_tokens": 5, "stream": true});
const wrong = await post({"prompt": 7});
return [
  {status: whole.status, text: await whole.text(), id: whole.headers.get("x-request-id")},
  {status: stream.status, text: await stream.text()},
  {status: wrong.status, text: await wrong.text()},
];
"""


@contextmanager
def page(script: str) -> Iterator[tuple[str, "Queue[Any]"]]:
    """Serve a page that runs a script; yield its URL, and what the script returns."""
    reports: Queue[Any] = Queue()

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(
                f"<!doctype html><body><script>(async () => {{{script}}})()"
                '.catch(e => `${e}`).then(r => fetch("/report", '
                '{method: "POST", body: JSON.stringify(r)}))</script>'
            )

        def do_POST(self) -> None:
            reports.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.answer("")

        def answer(self, text: str) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", reports
        server.shutdown()


def open_in_chromium(url: str, reports: "Queue[Any]") -> Any:
    """Open a page and return its report."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        browser = subprocess.Popen(
            [CHROMIUM, *options, "--remote-debugging-port=0", url],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            return reports.get(timeout=60)
        finally:
            browser.terminate()
            browser.wait(10)


def counted(server: Server, words: str) -> dict[str, float]:
    lines = httpx.get(server.metrics, timeout=10).text.splitlines()
    values = [line.rsplit(" ", 1) for line in lines if words in line and line[0] != "#"]
    assert values
    return {name: float(value) for name, value in values}


def test_no_page_can_make_a_server_generate(tiny_server: Server):
    """Forms, beacons, images and requests without a preflight, from another port of loopback."""
    tokens, rejected = counted(tiny_server, "token"), counted(tiny_server, "forbidden")
    with page(ATTACKS.replace("PORT", str(tiny_server.port))) as (url, reports):
        results = open_in_chromium(url, reports)
    assert len(results) == 22, results
    assert counted(tiny_server, "token") == tokens, "the server generated"
    new = sum(counted(tiny_server, "forbidden").values()) - sum(rejected.values())
    assert new >= 14, "the requests did not arrive, so this test shows nothing"
    assert not any("predictions" in result for result in results)
    assert httpx.post(tiny_server.url, json=OK, timeout=30).status_code == 200


def test_allowed_page_can_use_the_server_and_no_other(tiny_llama: Path, tmp_path: Path):
    archive = build_archive("tiny", tiny_llama, engine={"name": "transformers"}, store=tmp_path)
    script = CLIENT.replace("PORT", "7230")
    with page(script) as (url, reports), page(script) as (other, other_reports):
        with Server(archive, port=7230, environment={"CORS_ORIGIN": url}) as server:
            whole, stream, wrong = open_in_chromium(url, reports)
            before = counted(server, "token")
            refused = open_in_chromium(other, other_reports)
            assert counted(server, "token") == before
            assert httpx.post(server.url, json=OK, timeout=30).status_code == 200
    assert whole["status"] == 200 and "choices" in whole["text"] and whole["id"]
    assert stream["status"] == 200 and stream["text"].endswith("data: [DONE]\n\n")
    assert wrong["status"] == 400 and "prompt" in wrong["text"], "errors can be read, too"
    assert refused == "TypeError: Failed to fetch"
