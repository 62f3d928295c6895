"""A model server in one file, started as a model's command; it needs the standard library only.

HOST, PORT    where to listen (default: 0.0.0.0 and AIP_HTTP_PORT)
HEALTH        status of the health route (default 200)
SLOW          seconds before it listens
CRASH         exit at once with this code
NAME          part of each prediction, to tell models apart
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
    disable_nagle_algorithm = True  # head and body are two packets: 40 ms between them otherwise

    def do_GET(self) -> None:
        if self.path.startswith("/echo"):
            seen = {"verb": "GET", "path": self.path, "headers": dict(self.headers)}
            return self.respond(200, json.dumps(seen).encode())
        status = STATE["health"] if self.path == os.environ["AIP_HEALTH_ROUTE"] else 404
        return self.respond(status, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self.path.partition("?")[0].endswith("/chat/completions"):
            return self.chat(body)
        first = (body.get("instances") or [None])[0]
        if isinstance(first, dict) and first.get("@requestFormat") == "chatCompletions":
            return self.respond(200, json.dumps({"predictions": self.completion(first)}).encode())
        parameters = body.get("parameters") or {}
        if parameters.get("die"):
            os._exit(9)
        if "health" in parameters:
            STATE["health"] = int(parameters["health"])
        if parameters.get("sleep"):
            time.sleep(parameters["sleep"])
        if parameters.get("status"):
            return self.respond(int(parameters["status"]), b'{"error": {"message": "as asked"}}')
        if parameters.get("stream"):
            return self.stream(int(parameters["stream"]))
        if parameters.get("odd"):
            return self.respond(200, b'"odd"')
        prediction = {
            "name": os.environ.get("NAME", ""),
            "pid": os.getpid(),
            "path": self.path,
            "host": os.uname().nodename,
            "got": parameters,
            "env": {k: v for k, v in os.environ.items() if k.startswith(("AIP_", "X_"))},
            "argv": sys.argv[1:],
        }
        predictions = [
            prediction | {"instance": i if parameters.get("echo") else None}
            for i in body["instances"]
        ]
        return self.respond(200, json.dumps({"predictions": predictions}).encode())

    def completion(self, body: dict) -> dict:
        """OpenAI's object: the last message, the path and the headers."""
        message = {"role": "assistant", "content": body["messages"][-1]["content"]}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        seen = {"path": self.path, "headers": dict(self.headers)}
        head = {"id": "c", "object": "chat.completion", "created": 1, "model": "small"}
        return head | {"choices": [choice], "usage": usage} | seen

    def chat(self, body: dict) -> None:
        if not body.get("stream"):
            return self.respond(200, json.dumps(self.completion(body)).encode())
        return self.stream(int(body.get("events", 2)))

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

    def respond(self, code: int, body: bytes) -> None:
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
