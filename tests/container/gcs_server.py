"""A stand-in for Cloud Storage that lists and serves the objects of a folder of buckets.

    python gcs_server.py FOLDER PORT

The protocol is https://cloud.google.com/storage/docs/json_api/v1/objects. A page lists one object,
so that clients must use pages.
"""

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

FOLDER = Path(sys.argv[1])


def md5(path: Path) -> str:
    return base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = url.path.removeprefix("/download"), parse_qs(url.query)
        _, _, _, _, bucket, *rest = path.split("/", 7)
        name = rest[1:]  # after the `o`; the library also requests the bucket itself
        if not rest or not (FOLDER / bucket).is_dir():
            self.send_error(404)
        elif name and query.get("alt") == ["media"]:
            self.media(FOLDER / bucket / unquote(name[0]))
        elif not name:
            self.listing(bucket, query.get("prefix", [""])[0], query.get("pageToken", ["0"])[0])
        else:
            self.send_error(404)

    def listing(self, bucket: str, prefix: str, page: str) -> None:
        root = FOLDER / bucket
        files = sorted(p for p in root.rglob("*") if p.is_file())
        files = [p for p in files if str(p.relative_to(root)).startswith(prefix)]
        shown, more = files[int(page) : int(page) + 1], int(page) + 1 < len(files)
        names = [str(p.relative_to(root)) for p in shown]
        items = [{"name": n, "bucket": bucket, "md5Hash": md5(root / n)} for n in names]
        body = {"kind": "storage#objects", "items": items}
        body |= {"nextPageToken": str(int(page) + 1)} if more else {}
        self.respond(json.dumps(body).encode(), {"content-type": "application/json"})

    def media(self, path: Path) -> None:
        self.respond(path.read_bytes(), {"x-goog-hash": f"md5={md5(path)}"})

    def respond(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in (headers | {"content-length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


ThreadingHTTPServer(("0.0.0.0", int(sys.argv[2])), Handler).serve_forever()
