"""The gRPC server: the SDK's default transport, with the same handlers as REST."""

import time
from collections.abc import Callable

import grpc
from google.cloud.aiplatform_v1 import types as t
from google.protobuf.message import DecodeError, Message

from standin.doors.dispatch import Api, Caller
from standin.doors.methods import BY_NAME, Method, get_field
from standin.errors import ApiError
from standin.services.messages import raw


class Handler(grpc.GenericRpcHandler):
    """Finds the handler of each call.

    Args:
        api: answers the requests.
        host_of: returns the host name of a connection, by its port (`Proxy.host_of`).
    """

    def __init__(self, api: Api, host_of: Callable[[int], str]) -> None:
        self.api, self.host_of = api, host_of

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        name = details.method.removeprefix("/")

        async def answer(body: bytes, context: grpc.aio.ServicerContext) -> Message:
            began = time.time()
            port = int(context.peer().rsplit(":", 1)[1])
            headers = dict(context.invocation_metadata() or ())
            caller = Caller("grpc", self.host_of(port), str(headers.get("authorization", "")))
            failed: ApiError | None = None
            path, status = "", "CUT OFF"
            try:
                method, request = _read(name, body)
                path = get_field(request, method.resource)
                response = await self._call(method, request, caller, len(body))
                status = "OK"
            except ApiError as error:
                failed, status = error, error.status
            finally:  # before the client gets the response, so that it finds the line in `calls()`
                self.api.log(began, caller, name.rsplit("/", 1)[1], path, status)
            if failed:
                await context.abort(failed.grpc, failed.message)
            return response

        return grpc.unary_unary_rpc_method_handler(
            answer, response_serializer=lambda message: message.SerializeToString()
        )

    async def _call(self, method: Method, request: Message, caller: Caller, size: int) -> Message:
        if isinstance(request, raw(t.PredictRequest)):
            request.endpoint = self.api.authorize(caller, request.endpoint, method.permission)
            return await self.api.predictions.predict_message(request, caller.host, size)
        return await self.api.call(method, request, caller)


def _read(name: str, body: bytes) -> tuple[Method, Message]:
    method = BY_NAME.get(name)
    if method is None:
        raise ApiError("UNIMPLEMENTED", f"The stand-in does not have {name}.")
    try:
        return method, method.request.FromString(body)
    except DecodeError as error:
        raise ApiError("INVALID_ARGUMENT", f"{name}: {error}") from error


async def start(
    api: Api, key: bytes, chain: bytes, host_of: Callable[[int], str]
) -> tuple[grpc.aio.Server, int]:
    """Serve on a free port of loopback; return the server and the port."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((Handler(api, host_of),))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
    await server.start()
    return server, port
