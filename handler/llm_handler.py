"""TorchServe's entry point: one class, called once a tick with all requests that are in flight.

With `continuousBatching: true` the frontend calls `handle` again and again. Each call brings every
live request; each answer may be final, one piece of a stream, or "nothing yet". So a tick takes in
what is new, lets the engine decode for a moment, and hands out what is ready.

Rules of TorchServe 0.12.0 this file lives by (none is documented; tests/served checks them):
  * the file must define exactly one class;
  * deleting an index from `context.request_ids` means "no reply for this one in this tick";
  * `context.stopping_criteria[i]()` returning None sends a whole reply, False a piece of a stream,
    True its last piece;
  * an exception out of `handle` fails every request in flight, so nothing may escape;
  * lines on stdout that look like metrics or a process id are obeyed, so no client text is logged.
"""

import logging
import os
import time
from pathlib import Path

import psutil

from handler.config import parse_app
from handler.drain import Drain
from handler.engine import create_engine
from handler.metrics import Metrics
from handler.prompt import render, shows_prompt
from handler.reply import LiveRequest, Reply, error_reply
from handler.request import RequestError, default_parameters, parse_request

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
"""How long a tick takes in new requests at most, and then how long it decodes, with one request
live. The frontend spends about 2.5 ms around each tick with one and 4.5 ms with 32, so a tick is
twice as long with 32: 2 to 3 % go to the frontend. Much longer ones would delay the first token of
whoever arrives in between."""

RETRY_AFTER_SECONDS = 2


class LLMHandler:
    """Serves one model. All state is in `live`: request id -> what is known of that request."""

    def initialize(self, context) -> None:
        """Load the model; TorchServe reports the worker READY when this returns."""
        folder = Path(context.system_properties["model_dir"])
        self.app = parse_app(context.model_yaml_config, "model-config.yaml")
        self.defaults = default_parameters(self.app)
        self.engine = create_engine(folder / "weights", self.app.engine)
        self.metrics = Metrics(context.metrics, context.model_name)
        self.live: dict[str, LiveRequest] = {}
        self.drain = Drain()
        self.initialized = True
        random = " (random weights: the text means nothing)" if self.app.random_weights else ""
        chosen = f" (chosen because {self.app.engine.chosen})" if self.app.engine.chosen else ""
        held = psutil.Process().memory_info().rss / 1e9
        logger.info(
            "%s%s: %s%s; %.1f GB of memory in use",
            *(self.app.title, random, self.engine.description, chosen, held),
        )

    def handle(self, data: list[dict], context) -> list[bytes]:
        """One tick.

        Args:
            data: one row a live request; the body is in it only when the request is new.
            context: TorchServe's; request ids, headers and statuses go through it by index.

        Returns:
            One body a row; rows whose index was deleted from `context.request_ids` are not sent.
        """
        if not self.engine.alive():
            logger.critical("the engine has failed; leaving, so that the frontend replaces us")
            os._exit(1)
        ids = dict(context.request_ids)
        try:
            replies = self._tick(ids, data)
        except Exception:  # whatever this was, the engine's state is not known any more
            logger.critical("a tick failed; leaving", exc_info=True)
            os._exit(1)
        self.drain.report(len(self.live))
        return self._send(ids, replies, context)

    def _tick(self, ids: dict[int, str], data: list[dict]) -> dict[str, Reply]:
        """Forget who has gone, take in who is new, decode, and collect what can be sent."""
        for request_id in set(self.live) - set(ids.values()):
            self._forget(request_id)
        replies: dict[str, Reply] = {}
        enough = time.monotonic() + TICK_SECONDS
        before = len(self.live)
        for index, request_id in ids.items():
            if request_id not in self.live:
                if time.monotonic() > enough:
                    break  # the rest is still new in the next tick
                reply = self._accept(request_id, data[index])
                if reply:
                    replies[request_id] = reply
        # Requests that were sent together arrive one by one: whoever comes first decodes one step,
        # not a whole tick, before the others are let in.
        hurry = replies or len(self.live) > before
        seconds = TICK_SECONDS * (1 + len(self.live) / 32)
        for progress in self.engine.advance(0 if hurry else seconds):
            request_id, index = progress.key
            self.live[request_id].update(index, progress)
        for request_id, live in list(self.live.items()):
            reply = live.take_reply()
            if reply:
                replies[request_id] = reply
                if reply.last:
                    self.metrics.record(live)
                    self._forget(request_id)
        return replies

    def _accept(self, request_id: str, row: dict) -> Reply | None:
        """Take in a new request, or say what is wrong with it."""
        submitted = 0
        try:
            request = parse_request(row, self.app.limits, self.defaults)
            self._check_capacity(len(request.items))
            live = LiveRequest(request, random_weights=self.app.random_weights)
            for i, item in enumerate(request.items):
                field = f"instances[{i}]"
                prompt = render(item, self.app.prompt, self.engine.chat_prompt, field)
                try:
                    tokens = self.engine.submit(
                        (request_id, i), prompt, item.sampling, stream=request.stream
                    )
                except ValueError as error:
                    raise RequestError(400, f"{field}: the prompt {error}", field) from error
                submitted += 1
                live.add(tokens, prompt if shows_prompt(item, self.app.prompt) else "")
        except RequestError as error:
            refused = error
        except Exception:
            logger.exception("a new request failed")
            refused = RequestError(500, "the server failed on this request; its log says why")
        else:
            self.live[request_id] = live
            return None
        for i in range(submitted):
            self.engine.cancel((request_id, i))
        self.metrics.refused()
        return error_reply(refused, retry_after=RETRY_AFTER_SECONDS)

    def _check_capacity(self, wanted: int) -> None:
        if self.drain.requested():
            raise RequestError(503, "the server is shutting down; ask again, another one answers")
        config = self.app.engine
        in_use = sum(live.unfinished for live in self.live.values())
        if in_use and in_use + wanted > config.max_batch + config.max_queue:
            raise RequestError(
                429,
                f"the server is full: {in_use} sequences are running or waiting, and "
                f"{config.max_batch + config.max_queue} is the most; retry later",
            )

    def _forget(self, request_id: str) -> None:
        """Drop a request, and cancel those of its sequences that still run."""
        for i in range(len(self.live.pop(request_id).completions)):
            self.engine.cancel((request_id, i))

    def _send(self, ids: dict[int, str], replies: dict[str, Reply], context) -> list[bytes]:
        bodies = [b""] * len(ids)
        criteria = [None] * len(ids)
        for index, request_id in ids.items():
            reply = replies.get(request_id)
            if reply is None:
                context.request_ids.pop(index)
                continue
            bodies[index] = reply.body
            criteria[index] = lambda _, last=reply.stream_end: last
            context.set_response_status(reply.status, "", index)
            for name, value in reply.headers.items():
                context.set_response_header(index, name, value)
        context.stopping_criteria = criteria
        return bodies
