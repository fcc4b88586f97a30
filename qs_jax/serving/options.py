"""How to serve: limits and names, checked once. Imports nothing heavy, so the command line can show defaults."""

from dataclasses import dataclass, field

from qs_jax.choices import is_whole
from qs_jax.errors import QsJaxError

KEY_VARIABLE = "QS_JAX_API_KEY"


class ServeError(QsJaxError):
    """A server that cannot be started as asked."""


@dataclass(frozen=True)
class ServeOptions:
    """Of a server.

    Attributes:
        host: address to listen at; loopback unless somebody says otherwise.
        port: 0 takes any that is free.
        api_key: what clients must present; None for no key.
        name: of the model, as clients name it; None for the last part of where it was loaded from.
        places: most rows that are decoded together.
        queue: most rows that wait for a place; beyond them 503.
        context: most tokens of a prompt and its answer together; None for 2,048 or the model's own limit, if that
            is less. All places of a batch grow with its longest row.
        body_bytes: most bytes of a request.
        body_seconds: within which a request must have arrived whole.
        shutdown_seconds: for which running requests may go on after SIGINT or SIGTERM.
        chunk: steps between which rows may join, leave and be told what they gained.
        policies: names that clients may ask for, and files of theirs, beside `off`, `balanced` and the model's own.
        allowed_hosts: names by which clients may know the server, beside its address.
        warm_up: compile what first requests need before listening.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    name: str | None = None
    places: int = 8
    queue: int = 64
    context: int | None = None
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    shutdown_seconds: float = 30.0
    chunk: int = 8
    policies: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    warm_up: bool = True

    def __post_init__(self) -> None:
        for name, least in (("places", 1), ("queue", 0), ("port", 0), ("chunk", 1), ("body_bytes", 1)):
            value = getattr(self, name)
            if not is_whole(value, least):
                raise ServeError(f"{name} is {value!r}, expected a whole number from {least}")
        if self.context is not None and not is_whole(self.context, 2):
            raise ServeError(f"context is {self.context!r}, expected a whole number from 2")
        if self.port > 65535:
            raise ServeError(f"port is {self.port}, expected 0 to 65535")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ServeError("the API key is empty or holds characters that no header can; choose printable ASCII")
