"""A model server in one file, to be started as a model's command: standard library alone.

HOST, PORT    where to listen (default: 0.0.0.0 and AIP_HTTP_PORT)
HEALTH        what the health route answers (default 200)
SLOW          seconds before it listens
CRASH         exit with this code at once
NAME          what predictions carry, to tell models apart
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATE = {"health": int(os.environ.get("HEALTH", "200"))}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(STATE["health"] if self.path == os.environ["AIP_HEALTH_ROUTE"] else 404, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        asked = body.get("parameters") or {}
        if asked.get("die"):
            os._exit(9)
        if "health" in asked:
            STATE["health"] = int(asked["health"])
        if asked.get("sleep"):
            time.sleep(asked["sleep"])
        if asked.get("status"):
            return self.answer(int(asked["status"]), b'{"error": {"message": "as asked"}}')
        if asked.get("stream"):
            return self.stream(int(asked["stream"]))
        if asked.get("odd"):
            return self.answer(200, b'"odd"')
        who = {
            "name": os.environ.get("NAME", ""),
            "pid": os.getpid(),
            "path": self.path,
            "host": os.uname().nodename,
            "got": asked,
            "env": {k: v for k, v in os.environ.items() if k.startswith(("AIP_", "X_"))},
            "argv": sys.argv[1:],
        }
        answer = [who | {"instance": i if asked.get("echo") else None} for i in body["instances"]]
        return self.answer(200, json.dumps({"predictions": answer}).encode())

    def stream(self, count: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(count):
            line = b"data: %s\n\n" % json.dumps({"number": number}).encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
            time.sleep(0.3)
        self.wfile.write(b"0\r\n\r\n")

    def answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, form: str, *values: object) -> None:
        print(form % values, flush=True)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


if __name__ == "__main__":
    print("starting", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # the first process of a container
    if "CRASH" in os.environ:
        sys.exit(int(os.environ["CRASH"]))
    time.sleep(float(os.environ.get("SLOW", "0")))
    address = os.environ.get("HOST", "0.0.0.0")
    port = int(os.environ.get("PORT") or os.environ["AIP_HTTP_PORT"])
    server = Server((address, port), Handler)
    threading.Thread(target=server.serve_forever).start()
