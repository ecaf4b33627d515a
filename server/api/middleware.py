"""What holds for every route: a request id on every answer, the API key where one is set, and an answer for our own faults.

Plain ASGI, so that streams stay streams.
"""

import hmac
import logging
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import fault_response, unauthorized_response
from server.api.sse import ClientGone

logger = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
_SANE = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # goes back into a header and into logs as it came


class RequestId:
    """Puts the caller's X-Request-Id on the answer where it is sane, else a fresh one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _SANE.fullmatch(given) else f"req-{uuid.uuid4().hex}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKey:
    """Asks for `Authorization: Bearer <one of keys>` on everything under /v1; health, readiness, version and metrics stay open."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._expected = [f"bearer {key}".encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1") and not self._authorized(scope):
            await unauthorized_response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _authorized(self, scope: Scope) -> bool:
        word, _, key = Headers(scope=scope).get("Authorization", "").partition(" ")
        given = f"{word.lower()} {key.strip()}".encode()
        # With each, and in constant time, so that the answer's timing tells nothing about the keys.
        matches = [hmac.compare_digest(given, expected) for expected in self._expected]
        return any(matches)


class Faults:
    """Answers 500 for an exception that nothing translated, and logs it; a client that has gone is no fault.

    Starlette's own handler stands outside of all middleware, so its answer would have no request id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noting_send(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except (ClientGone, ClientDisconnect):
            logger.info("the client of %s has gone", scope.get("path"))
        except Exception as error:
            logger.exception("%s %s failed", scope.get("method"), scope.get("path"))
            if begun or scope["type"] != "http":
                raise
            await fault_response(error)(scope, receive, send)
