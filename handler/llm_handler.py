"""TorchServe's entry point: one class, called once a tick with all active requests.

With `continuousBatching: true` the frontend calls `handle` again and again. Each call passes every
active request. Each response may be whole, one piece of a stream, or absent for now. So a tick
admits new requests, lets the engine decode for a moment, and sends what is ready.

Rules of TorchServe 0.12.0 that this file follows (none is documented; tests/served checks them):
  * the file must define exactly one class;
  * deleting a position from `context.request_ids` means "no response for this one in this tick";
  * what `context.stopping_criteria[position]()` returns says how a response is sent, as a whole or
    as a piece of a stream (`response.Delivery`);
  * an exception in `handle` fails every active request, so none may escape;
  * lines on stdout that look like metrics or a process id are obeyed, so no client text is logged.
"""

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from handler import doors
from handler.body import check_method, read_json
from handler.config import parse_app
from handler.context import Context
from handler.drain import Drain, end_with_frontend, record_failure
from handler.engine import ParameterError, PromptError, SequenceKey, create_engine
from handler.errors import RequestError
from handler.headers import Header, header_reader
from handler.metrics import Metrics
from handler.openai import MODELS, models
from handler.origin import exposed_headers
from handler.prompt import ChatTemplate, render
from handler.request import Request, default_parameters
from handler.response import (
    PROBE,
    PROBE_RESPONSE,
    ActiveRequest,
    Response,
    error_response,
    json_response,
)
from handler.tool_calls import RequestedTools, ToolError, ToolUse

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
"""How long a tick admits new requests at most, and how long it then decodes with few requests
active. The frontend spends about 2.5 ms around each tick with one request and 4.5 ms with 32, so a
tick is twice as long with 32: 2 to 3 % go to the frontend. Much longer ticks would delay the first
token of requests that arrive in between."""

TICK_DOUBLES_AT = 32
"""Active requests with which a tick decodes for twice `TICK_SECONDS`."""

PASSED_SECONDS = 1
"""How long shorter requests may be admitted before an older one. After that each tick admits the
oldest one too, even if it is long."""

RETRY_AFTER_SECONDS = 2

ALWAYS_ACCEPTED = 64
"""`max_queue_tokens` does not limit requests of up to 1/64 of it: 512 tokens by default."""


class LLMHandler:
    """Serves one model. All state is in `active`: request id -> what is known of the request."""

    def initialize(self, context: Context) -> None:
        """Load the model; TorchServe reports the worker READY when this returns.

        If the model cannot be loaded, the worker responds to every request with 503 until the
        server is ended (`deploy/torchserve/watch.py`). An exception would make TorchServe start new
        workers for five minutes, while clients wait.
        """
        end_with_frontend()
        self.active: dict[str, ActiveRequest] = {}
        self.failure = ""
        self.initialized = True
        try:
            self._load(context)
        except Exception as error:
            logger.critical("the model cannot be loaded", exc_info=True)
            record_failure(str(error) or repr(error))
            self.failure = "the model cannot be loaded; the server's log says why"

    def _load(self, context: Context) -> None:
        folder = Path(context.system_properties["model_dir"])
        self.app = parse_app(context.model_yaml_config, "model-config.yaml")
        self.defaults = default_parameters(self.app)
        self.engine = create_engine(folder / "weights", self.app.engine)
        self.model_name = context.model_name
        self.started_at = int(time.time())
        self.metrics = Metrics(self.app, context.model_name)
        self.metrics.serve()
        self._seen: dict[str, float] = {}
        """Request id -> when it was in a tick for the first time."""
        self.drain = Drain()
        random = " (random weights: the text means nothing)" if self.app.random_weights else ""
        chosen = f" (chosen because {self.app.engine.chosen})" if self.app.engine.chosen else ""
        memory_gb = psutil.Process().memory_info().rss / 1e9
        logger.info(
            "%s%s: %s%s; %.1f GB of memory in use",
            *(self.app.title, random, self.engine.description, chosen, memory_gb),
        )

    def handle(self, data: list[dict[str, Any]], context: Context) -> list[bytes]:
        """Run one tick.

        Args:
            data: for each active request its parts; the body is there only if the request is new.
            context: TorchServe's; request ids, headers and statuses go through it by position.

        Returns:
            One body for each position; those deleted from `context.request_ids` are not sent.
        """
        if not self.failure and not self.engine.alive():
            logger.critical("the engine has failed; leaving, so that the frontend replaces us")
            os._exit(1)
        try:
            request_ids = dict(context.request_ids)
            if self.failure:
                error = RequestError(503, self.failure)
                failed = {
                    request_id: _rejection(_path(_headers(context, position)), error)
                    for position, request_id in request_ids.items()
                }
                return self._send(request_ids, failed, context)
            responses = self._tick(request_ids, data, context)
            self.metrics.set_load(self.engine.load)
            self.drain.report(len(self.active))
            return self._send(request_ids, responses, context)
        except Exception:  # the state of the engine is unknown now
            logger.critical("a tick failed; leaving", exc_info=True)
            os._exit(1)

    def _tick(
        self, request_ids: dict[int, str], data: list[dict[str, Any]], context: Context
    ) -> dict[str, Response]:
        """Drop requests whose client left, admit new ones, decode, collect the responses.

        The frontend reports that the client of a stream left, but not that of a plain request. So
        every request has a deadline, at which it ends with the text so far.
        """
        now = time.monotonic()
        self._seen = {i: self._seen.get(i, now) for i in request_ids.values()}
        for request_id in set(self.active) - set(request_ids.values()):
            self.metrics.record_cancelled(self.active[request_id])
            self._drop(request_id)
        for active in self.active.values():
            if now >= active.deadline:
                for unfinished in active.unfinished:
                    self.engine.expire(unfinished)
        # Probes first: they ask whether ticks happen, and must not wait behind requests.
        responses = {
            request_id: PROBE_RESPONSE
            for position, request_id in request_ids.items()
            if data[position].get("body") == PROBE
        }
        active_before = len(self.active)
        new = [
            (len(data[position].get("body") or b""), position, request_id)
            for position, request_id in request_ids.items()
            if request_id not in self.active and request_id not in responses
        ]
        for position, request_id in self._in_turn(new, now):
            response = self._admit(request_id, data[position], _headers(context, position))
            if response:
                responses[request_id] = response
        decode_seconds = TICK_SECONDS * (1 + len(self.active) / TICK_DOUBLES_AT)
        if responses or len(self.active) > active_before:
            # Requests that were sent together arrive one by one. After the first one the engine
            # decodes a single step, so that the others do not wait for a whole tick.
            decode_seconds = 0.0
        for progress in self.engine.advance(decode_seconds):
            key: SequenceKey = progress.key
            active = self.active[key.request_id]
            self.metrics.count_tokens(active.completions[key], progress)
            active.update(progress)
        for request_id, active in list(self.active.items()):
            response = active.take_response()
            if response:
                responses[request_id] = response
                if response.last:
                    self.metrics.record(active)
                    self._drop(request_id)
        return responses

    def _in_turn(self, new: list[tuple[int, int, str]], now: float) -> Iterator[tuple[int, str]]:
        """Yield position and id of the requests that this tick admits; the others stay new.

        Short bodies first, because a long one may take 0.4 s to tokenize, even if it is refused
        then. But a flood of short ones must not keep an older one waiting.

        Args:
            new: size of the body, position and id.
            now: the time of the tick.
        """
        admit_until = time.monotonic() + TICK_SECONDS
        left = sorted(new, reverse=True)
        while left and time.monotonic() <= admit_until:
            yield left.pop()[1:]
        if left:
            _, position, request_id = min(left, key=lambda request: self._seen[request[2]])
            if now - self._seen[request_id] >= PASSED_SECONDS:
                yield position, request_id

    def _admit(self, request_id: str, parts: dict[str, Any], header: Header) -> Response | None:
        """Submit the instances of a new request to the engine, or respond at once."""
        path = _path(header)
        try:
            route = doors.find_route(path)
            if route == MODELS:
                check_method(header, "GET", "HEAD")
                return json_response(models(path, self.model_name, self.started_at))
            raw = read_json(parts, header, self.app.limits.max_body_bytes)
            request = doors.parse(route, raw, self.app, self.defaults, self.model_name)
            self._check_capacity(len(request.instances))
            active = ActiveRequest(request, random_weights=self.app.random_weights)
            active.arrived_at = self._seen[request_id]
            self.active[request_id] = active
            self._submit(request_id, request, active)
        except RequestError as error:
            rejected = error
        except Exception:
            logger.exception("a new request failed")
            rejected = RequestError(500, "the server failed on this request; its log says why")
        else:
            return None
        known = self.active.get(request_id)
        self._drop(request_id)
        self.metrics.count_refused(rejected)
        return _rejection(path, rejected, known)

    def _submit(self, request_id: str, request: Request, active: ActiveRequest) -> None:
        """Submit the instances of a request to the engine.

        Raises:
            RequestError: the engine cannot run one of them, or too much waits.
        """
        waiting_tokens = self.engine.waiting_tokens
        tools = self._use_tools(request.tools) if request.tools else None
        chat_prompt: ChatTemplate = self.engine.chat_prompt
        if tools and tools.shown:
            chat_prompt = partial(self.engine.chat_prompt, tools=tools.shown)
        for i, instance in enumerate(request.instances):
            prompt = render(instance, self.app.prompt, chat_prompt)
            sampling = instance.sampling
            if tools and tools.json_schema is not None:
                sampling = replace(sampling, json_schema=tools.json_schema)
            key = SequenceKey(request_id, i)
            try:
                prompt_tokens = self.engine.submit(
                    key, prompt.text, sampling, stream=request.stream
                )
            except PromptError as error:
                field = instance.field
                raise RequestError(400, f"{field}: the prompt {error}", field) from error
            except ParameterError as error:
                field = request.fields.get(error.parameter, error.parameter)
                raise RequestError(400, f"{field}: {error}", field) from error
            active.add(key, prompt_tokens, prompt.echo, tools.reader() if tools else None)
            self._check_queue(waiting_tokens, self.engine.waiting_tokens - waiting_tokens)

    def _use_tools(self, requested: RequestedTools) -> ToolUse:
        """Prepare the use of tools.

        Raises:
            RequestError: this model, or this app's prompt style, cannot use them.
        """
        if self.app.prompt.style == "instruct" and requested.mode != "none":
            field = f"{requested.prefix}tools"
            text = f"{field}: this app does not support tools: its prompt style is instruct"
            raise RequestError(400, text, field)
        try:
            return ToolUse(self.engine.folder, requested)
        except ToolError as error:
            raise RequestError(400, f"{error.field}: {error}", error.field) from error

    def _check_capacity(self, wanted: int) -> None:
        if self.drain.requested():
            raise RequestError(503, "the server is shutting down; retry, another server answers")
        config = self.app.engine
        in_use = sum(len(active.unfinished) for active in self.active.values())
        if in_use and in_use + wanted > config.max_batch + config.max_queue:
            raise RequestError(
                429,
                f"the server is full: {in_use} sequences are running or waiting, and "
                f"{config.max_batch + config.max_queue} is the most; retry later",
            )

    def _check_queue(self, waiting: int, added: int) -> None:
        """Reject a request whose prompts add too many tokens to those that wait.

        If no prompt waits, any request is accepted. A short one always is: it is prefilled before
        the long ones, and `max_queue` bounds the number of short ones.
        """
        most = self.app.engine.max_queue_tokens
        if waiting and waiting + added > most and added * ALWAYS_ACCEPTED > most:
            raise RequestError(
                429,
                f"the server is full: {waiting} prompt tokens are waiting, this request adds "
                f"{added} or more, and {most} is the most; retry later",
                counted_as="queue_tokens",
            )

    def _drop(self, request_id: str) -> None:
        """Remove a request, and cancel those of its sequences that still run."""
        if request_id in self.active:
            for key in self.active.pop(request_id).completions:
                self.engine.cancel(key)

    def _send(
        self, request_ids: dict[int, str], responses: dict[str, Response], context: Context
    ) -> list[bytes]:
        """Pass the responses to TorchServe in the order of its batch."""
        bodies = [b""] * len(request_ids)
        context.stopping_criteria = [None] * len(request_ids)
        for position, request_id in request_ids.items():
            response = responses.get(request_id)
            if response is None:
                context.request_ids.pop(position)
                continue
            bodies[position] = response.body
            context.stopping_criteria[position] = response.stopping_criterion
            context.set_response_status(response.status, "", position)
            for name, value in (response.headers | exposed_headers()).items():
                context.set_response_header(position, name, value)
        return bodies


def _headers(context: Context, position: int) -> Header:
    return header_reader(context.get_all_request_header(position))


def _path(header: Header) -> str:
    return doors.clean(header("url_path"))


def _rejection(path: str, error: RequestError, known: ActiveRequest | None = None) -> Response:
    """Respond with an error in the shape of the request's API.

    Args:
        path: the request's.
        error: why it is rejected.
        known: the request, if its body was read.
    """
    body = known.shape.error(error) if known else doors.write_error(path, error)
    response = error_response(error.code, body, RETRY_AFTER_SECONDS)
    if error.code == 405:
        response.headers["allow"] = "GET" if path.startswith(MODELS) else "POST"
    return response
