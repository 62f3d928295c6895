"""A local server that speaks the Hugging Face Hub's protocol for one repository.

It answers the requests of `huggingface_hub` 1.17: model info, the tree with hashes, HEAD with ETag
and commit, GET with ranges. On demand it cuts transfers, rejects requests or sends wrong bytes.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LFS_FROM = 100_000
"""Files of this size and more are stored as LFS objects, with SHA-256 instead of git's hash."""


class Hub:
    """Serves `folder` as `repo` at `revision` on a free loopback port.

    Set `cut_after` to end each transfer of a large file after that many bytes, `status` to answer
    every request with that status, `corrupt` to flip a byte of large files. `ranges` lists the
    Range headers for large files, `sent` counts their bytes, `tokens` holds the tokens received.
    """

    def __init__(self, folder: Path, repo: str, revision: str) -> None:
        self.folder, self.repo, self.revision = folder, repo, revision
        self.cut_after: int | None = None
        self.status: int | None = None
        self.corrupt = False
        self.ranges: list[str | None] = []
        self.tokens: set[str | None] = set()
        self.requests: list[str] = []
        self.sent = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def hashes(self, path: Path) -> tuple[str, str | None]:
        """Return git's blob hash, and SHA-256 if the file is an LFS object."""
        data = path.read_bytes()
        blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        return blob, hashlib.sha256(data).hexdigest() if len(data) >= LFS_FROM else None

    def tree(self) -> list[dict]:
        entries = []
        for path in sorted(p for p in self.folder.iterdir() if p.is_file()):
            blob, sha256 = self.hashes(path)
            size = path.stat().st_size
            entry = {"type": "file", "path": path.name, "size": size, "oid": blob}
            if sha256:
                entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
            entries.append(entry)
        return entries


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub = self.hub
        hub.requests.append(f"{self.command} {self.path}")
        hub.tokens.add(self.headers.get("Authorization"))
        api = f"/api/models/{hub.repo}"
        path = self.path.split("?")[0]
        if hub.status:
            self._send_json({"error": "rejected"}, hub.status)
        elif path == f"{api}/revision/{hub.revision}":
            siblings = [{"rfilename": entry["path"]} for entry in hub.tree()]
            self._send_json({"id": hub.repo, "sha": hub.revision, "siblings": siblings})
        elif path == f"{api}/tree/{hub.revision}":
            self._send_json(hub.tree())
        elif match := re.fullmatch(rf"/{hub.repo}/resolve/{hub.revision}/([\w.-]+)", path):
            self._send_file(hub.folder / match.group(1), body)
        elif path.startswith((api, f"/{hub.repo}/")):
            self._send_json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self._send_json(
                {"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"}
            )

    def _send_json(
        self, value: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_file(self, path: Path, body: bool) -> None:
        hub = self.hub
        if not path.is_file():
            self._send_json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        blob, sha256 = hub.hashes(path)
        data = path.read_bytes()
        if sha256 and hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        wanted = self.headers.get("Range")
        if wanted and (match := re.fullmatch(r"bytes=(\d+)-", wanted)):
            start = int(match[1])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", hub.revision)
        self.send_header("ETag", f'"{sha256 or blob}"')
        if sha256:
            self.send_header("X-Linked-Etag", f'"{sha256}"')
            self.send_header("X-Linked-Size", str(len(data)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not body:
            return
        if sha256:
            hub.ranges.append(wanted)
            if hub.cut_after is not None and len(data) > hub.cut_after:
                self.wfile.write(data[start : start + hub.cut_after])
                hub.sent += len(data[start : start + hub.cut_after])
                self.wfile.flush()
                hub.status = 503  # for all later requests
                self.close_connection = True
                return
            hub.sent += len(data) - start
        self.wfile.write(data[start:])
