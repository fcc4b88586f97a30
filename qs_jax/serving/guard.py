"""Who may ask: by which name the server was called, from which page, with which key; and headers on every answer."""

import hmac
import ipaddress
import json
import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from qs_jax.serving.errors import ApiError
from qs_jax.serving.options import ServeOptions

_OPEN_TO_ALL = frozenset({"/", "/health"})
"""What needs no key: the page, which asks for it, and whether the server is there."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """ASGI middleware. A web page elsewhere, whose name somebody pointed at this machine, is not let in: `Host` must be
    an address or a name that the server was given, and `Origin`, where a browser sends one, the same host."""

    def __init__(self, app: Any, options: ServeOptions):
        self._app = app
        self._key = options.api_key
        names = {*_LOOPBACK, options.host, *options.allowed_hosts}
        self._any_address = _is_wildcard(options.host)
        if self._any_address:
            names |= {socket.gethostname(), socket.getfqdn()}
        self._names = {name.lower() for name in names}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        unread = _has_body(scope["headers"])

        async def reading() -> Any:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                # who is answered before all of a body was read may go on sending it for ever
                closing = [(b"connection", b"close")] if unread else []
                message = {**message, "headers": [*message["headers"], *_HEADERS, *closing]}
            await send(message)

        try:
            self.check(scope["path"], scope["headers"])
        except ApiError as error:
            await answer(error, with_headers)
            return
        await self._app(scope, reading, with_headers)

    def check(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises:
        ApiError: 403 or 401.
        """
        said = {name.lower(): value.decode("latin-1") for name, value in headers}
        host = said.get(b"host", "")
        if not self._knows(_name_of(f"//{host}")):
            raise ApiError(403, "the server is not known by that Host; start it with --allow-host NAME", code="host")
        origin = said.get(b"origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, "pages of another origin may not ask this server", code="origin")
        if self._key is not None and path not in _OPEN_TO_ALL:
            scheme, _, key = said.get(b"authorization", "").partition(" ")
            same = hmac.compare_digest(key.strip().encode("latin-1", "replace"), self._key.encode())
            if scheme.lower() != "bearer" or not same:
                message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key")

    def _knows(self, name: str | None) -> bool:
        return name is not None and (name in self._names or (self._any_address and _is_address(name)))


async def answer(error: ApiError, send: Any) -> None:
    """Send an error's body, in whatever place one is found."""
    body = json.dumps(error.to_json()).encode()
    own = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *own]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _name_of(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname


def _has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    said = {name.lower(): value for name, value in headers}
    return b"transfer-encoding" in said or said.get(b"content-length", b"0") != b"0"


def _is_wildcard(host: str) -> bool:
    return host in ("0.0.0.0", "::", "")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
