"""From a loaded model to a server that answers, and its end."""

import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from qs_jax.console import aside
from qs_jax.engine.places import Places
from qs_jax.engine.session import Request
from qs_jax.generation_config import GenerationConfig
from qs_jax.model import Model
from qs_jax.request import prepare
from qs_jax.serving.app import Faces
from qs_jax.serving.options import ServeError, ServeOptions
from qs_jax.serving.service import Service
from qs_jax.settings import in_force

_HEADER_BYTES = 16 * 2**10
_IDLE_SECONDS = 30
_CONNECTIONS_A_ROW = 4
_BACKLOG = 2048


class Server(uvicorn.Server):
    """Ends on SIGINT or SIGTERM without dying of them: at the first it takes no more, and what runs may go on for
    `shutdown_seconds`; at the second it ends at once."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit, self.should_exit = self.should_exit, True


def serve(model: Model, options: ServeOptions, *, ready: Callable[[str, str], Any]) -> None:
    """Serve until a signal comes. `ready` is told address and name once the server listens.

    Raises:
        ServeError: the address cannot be listened at, or options that cannot be.
        PolicyError: a policy of the options that the model has no means for.
    """
    service = Service(model, options)
    listening = listen(options.host, options.port)
    try:
        if options.warm_up:
            warm_up(service)
        _run(service, listening, ready)
    finally:
        listening.close()


def _run(service: Service, listening: socket.socket, ready: Callable[[str, str], Any]) -> None:
    options = service.options
    config = uvicorn.Config(
        Faces(service).app(),
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=max(1, round(options.shutdown_seconds)),
        limit_concurrency=_CONNECTIONS_A_ROW * (options.places + options.queue) + 64,
        h11_max_incomplete_event_size=_HEADER_BYTES,
    )
    server = Server(config)
    service.scheduler.start()
    try:
        ready(_url(listening), service.name)
        server.run(sockets=[listening])
    finally:
        service.scheduler.stop()


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound and listens, so that a taken port is known before anything is compiled.

    Raises:
        ServeError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        reason = error.strerror or str(error)
        raise ServeError(f"cannot listen at {host} port {port} ({reason}); choose another: --host, --port") from None
    return found


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def warm_up(service: Service) -> None:
    """Compile what dense rows of a short prompt need, greedy and sampled, in batches of every size that grow and
    shrink; the rest when it is first asked for."""
    most, chunk = service.options.places, service.options.chunk
    aside(f"compiling for up to {most} rows (--no-warm-up leaves that to the first requests)")
    tokens = min(chunk * (most.bit_length() + 3), service.context - 1)
    for samples in (False, True):
        asked = GenerationConfig(max_new_tokens=tokens, eos_token_id=(), do_sample=samples, seed=0)
        settings = in_force(asked, service.model.defaults, service.model.config)
        _through_all_sizes(service, prepare(service.model, [[0]], settings, chunk_size=chunk))


def _through_all_sizes(service: Service, like: Request) -> None:
    most = service.options.places
    batch, tickets = Places(service.model.network, like, most=most), []
    while len(tickets) < most:
        grown = batch.size
        tickets.append(batch.join(like).ticket)
        if batch.size != grown:
            batch.step()
    while batch.size > 1:
        while batch.live > batch.size // 2:
            batch.leave(tickets.pop())
        batch.halve()
    for ticket in tickets:
        batch.leave(ticket)
