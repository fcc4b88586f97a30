"""The HTTP face: OpenAI's endpoints, whether the server is there, and the page."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qs_jax.console import aside
from qs_jax.engine.compilation import METER
from qs_jax.errors import QsJaxError
from qs_jax.generation import not_finite
from qs_jax.serving import page
from qs_jax.serving.errors import ApiError, failed, refused
from qs_jax.serving.fields import parse_object
from qs_jax.serving.guard import Guard
from qs_jax.serving.replies import DONE, Reply, event
from qs_jax.serving.scheduler import Event, Job
from qs_jax.serving.service import Service

_STARTED = int(time.time())


class Faces:
    """The endpoints over one service."""

    def __init__(self, service: Service):
        self._service = service

    def app(self) -> Any:
        """As an ASGI application."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        return Guard(Starlette(routes=routes, exception_handlers=_HANDLERS), self._service.options)

    async def page(self, request: Request) -> Response:
        return Response(page.HTML, media_type="text/html", headers={"Content-Security-Policy": page.POLICY})

    async def health(self, request: Request) -> Response:
        scheduler = self._service.scheduler
        own = {"programs_compiled": METER.programs, "memory_mb": _memory_mb()}
        return JSONResponse({"status": "ok", "running": scheduler.running, "waiting": scheduler.waiting, **own})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self._service.name:
            raise ApiError(404, f"there is no such model; this is {self._service.name}", code="model_not_found")
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        own = {"max_model_len": self._service.context, "qs_jax": self._service.described()}
        return {"id": self._service.name, "object": "model", "created": _STARTED, "owned_by": "qs_jax", **own}

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        service = self._service
        body = await read_whole(request, service.options.body_bytes, service.options.body_seconds)
        asked = service.read(parse_object(body), chat=chat)
        rows = await asyncio.to_thread(service.rows, asked)
        prompts = [len(row.request.prompts[0]) for row in rows[:: asked.sequences]]
        reply = Reply(asked, service.name, prompts, self._spelled)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = service.submit(rows, tell)
        if asked.stream:
            return Streamed(self._streamed(reply, events), job)
        return await until_gone(request, self._whole(reply, events), job)

    async def _whole(self, reply: Reply, events: asyncio.Queue[Event]) -> Response:
        while not reply.complete:
            reply.take(self._checked(await events.get()))
        return JSONResponse(reply.whole())

    async def _streamed(self, reply: Reply, events: asyncio.Queue[Event]) -> AsyncIterator[bytes]:
        for payload in reply.opening():
            yield event(payload)
        try:
            while not reply.complete:
                payload = reply.take(self._checked(await events.get()))
                if payload is not None:
                    yield event(payload)
        except ApiError as error:
            yield event(error.to_json())
            return
        for payload in reply.closing():
            yield event(payload)
        yield DONE

    def _checked(self, told: Event) -> Event:
        """Raises:
        ApiError: the row failed.
        """
        if told.error is not None:
            raise told.error
        if told.piece is not None and told.piece.finish == "not_finite":
            raise ApiError(500, not_finite(self._service.model), code="not_finite")
        return told

    def _spelled(self, token: int) -> str:
        tokenizer = self._service.model.tokenizer
        return tokenizer.decode([token], special=True) if tokenizer else f"token_id:{token}"


class Streamed(Response):
    """Server-sent events. When the client goes away the job is cancelled, at whatever the stream is waiting for."""

    def __init__(self, parts: AsyncIterator[bytes], job: Job):
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._parts, self._job = parts, job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        sending = asyncio.ensure_future(self._send(send))
        going = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((sending, going), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except OSError:
            pass
        finally:
            self._job.cancel()
            sending.cancel()
            going.cancel()

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self._parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def until_gone(request: Request, answering: Any, job: Job) -> Response:
    """The answer; if the client goes away first, the job is cancelled."""
    answer = asyncio.ensure_future(answering)
    going = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((answer, going), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=499)
    finally:
        job.cancel()
        answer.cancel()
        going.cancel()


async def read_whole(request: Request, most: int, seconds: float) -> bytes:
    """The body.

    Raises:
        ApiError: it is too large (413), or does not come within the time (408).
        ClientDisconnect: nobody is there any more.
    """
    larger = ApiError(413, f"the body is larger than {most} bytes; send less", code="body_too_large")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > most:
        raise larger
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise larger
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {seconds:g} s; send it faster", code="too_slow") from None
    return b"".join(parts)


def _memory_mb() -> float | None:
    """Of this process, where the system tells."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, AttributeError):
        return None


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _reply(error: ApiError) -> Response:
    return JSONResponse(error.to_json(), error.status, headers=error.headers)


async def _api_error(request: Request, error: Any) -> Response:
    return _reply(error)


async def _engine_error(request: Request, error: Any) -> Response:
    return _reply(refused(str(error)))


async def _no_such_path(request: Request, error: Any) -> Response:
    return _reply(ApiError(404, "there is no such path; see docs/serving.md", code="not_found"))


async def _no_such_method(request: Request, error: Any) -> Response:
    return _reply(ApiError(405, f"{request.method} is not what this path answers to", code="method_not_allowed"))


async def _client_gone(request: Request, error: Any) -> Response:
    return Response(status_code=499)


async def _fault(request: Request, error: Any) -> Response:
    aside(f"a request failed: {error!r}")
    return _reply(failed())


_HANDLERS: Any = {
    404: _no_such_path,
    405: _no_such_method,
    ApiError: _api_error,
    QsJaxError: _engine_error,
    ClientDisconnect: _client_gone,
    Exception: _fault,
}
