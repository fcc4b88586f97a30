"""A server in this process, on a port of its own, and what it is asked."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

import qs_jax
from qs_jax.model import Model
from qs_jax.serving.app import Faces
from qs_jax.serving.options import ServeOptions
from qs_jax.serving.running import listen
from qs_jax.serving.service import Service


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    service: Service
    url: str
    port: int

    def post(self, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=120, **options)

    def settle(self, seconds: float = 30) -> None:
        """Wait until nobody runs or waits."""
        scheduler, end = self.service.scheduler, time.monotonic() + seconds
        while scheduler.running or scheduler.waiting:
            assert time.monotonic() < end, "rows are left"
            time.sleep(0.02)


@contextmanager
def running(model: Model, **options: Any) -> Iterator[Running]:
    """Serve from a thread, until the block ends."""
    service = Service(model, ServeOptions(port=0, **{"chunk": 4, **options}))
    listening = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        Faces(service).app(), http="h11", ws="none", lifespan="off", log_level="critical", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    service.scheduler.start()
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = listening.getsockname()[1]
        yield Running(service, f"http://127.0.0.1:{port}", port)
    finally:
        server.should_exit = True
        thread.join()
        service.scheduler.stop()
        listening.close()


def alone(model: Model, prompt: str, **settings: Any) -> str:
    """The text that `generate` gives."""
    return qs_jax.generate(model, prompt, **settings).texts[0]
