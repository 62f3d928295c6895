"""The gRPC door: the SDK's default transport, with the same handlers as REST."""

import time
from collections.abc import Callable

import grpc
from google.protobuf.message import DecodeError, Message

from standin.doors.dispatch import Api, Caller
from standin.errors import ApiError
from standin.methods import BY_NAME, PACKAGE, Method

_PREDICT = f"{PACKAGE}PredictionService/Predict"


class Door(grpc.GenericRpcHandler):
    """Finds the handler of each call.

    Args:
        api: what answers.
        host_of: the host name a connection asked the proxy for, by its port there.
    """

    def __init__(self, api: Api, host_of: Callable[[int], str]) -> None:
        self.api, self.host_of = api, host_of

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        name = details.method.removeprefix("/")

        async def answer(body: bytes, context: grpc.aio.ServicerContext) -> Message:
            began = time.time()
            port = int(context.peer().rsplit(":", 1)[1])
            headers = dict(context.invocation_metadata())
            caller = Caller("grpc", self.host_of(port), headers.get("authorization", ""))
            path, failed, status = "", None, "CUT OFF"
            try:
                request, path = _read(name, body)
                reply = await self._call(BY_NAME[name], request, caller, len(body))
                status = "OK"
            except ApiError as error:
                failed, status = error, error.status
            finally:  # before the client knows, so that it finds the line when it looks
                self.api.log(began, caller, name.rsplit("/", 1)[1], path, status)
            if failed:
                await context.abort(failed.grpc, failed.message)
            return reply

        return grpc.unary_unary_rpc_method_handler(
            answer, response_serializer=lambda message: message.SerializeToString()
        )

    async def _call(self, method: Method, request: Message, caller: Caller, size: int) -> Message:
        if method.name == _PREDICT:
            predictions = self.api.predictions
            request.endpoint = self.api.admit(caller, request.endpoint, method.permission)
            return await predictions.predict_message(request, caller.host, size)
        return await self.api.call(method, request, caller)


def _read(name: str, body: bytes) -> tuple[Message, str]:
    """The request and the resource it is about."""
    method = BY_NAME.get(name)
    if method is None:
        raise ApiError("UNIMPLEMENTED", f"The stand-in does not have {name}.")
    try:
        request = method.request.FromString(body)
    except DecodeError as error:
        raise ApiError("INVALID_ARGUMENT", f"{name}: {error}") from error
    resource = request
    for field in method.resource:
        resource = getattr(resource, field)
    return request, str(resource)


async def start(api: Api, key: bytes, chain: bytes, host_of: Callable[[int], str]) -> tuple:
    """Serve on a free port of loopback; return the server and the port."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((Door(api, host_of),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
    await server.start()
    return server, port
