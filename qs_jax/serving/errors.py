"""What a client is told of a request that is refused or fails, in OpenAI's shape."""

from typing import Any

from qs_jax.console import one_line
from qs_jax.errors import QsJaxError


class ApiError(QsJaxError):
    """A request that is not answered: the HTTP status, and what stands in the `error` object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers: dict[str, str] = {}

    @property
    def type(self) -> str:
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "overloaded_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def to_json(self) -> dict[str, Any]:
        """The whole body: one line of message, whatever it quotes."""
        return {
            "error": {"message": one_line(self), "type": self.type, "param": self.param, "code": self.code},
        }


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's fault."""
    return ApiError(400, message, param=param, code=code)


def too_long(message: str, param: str) -> ApiError:
    """More tokens than there is room for."""
    return refused(message, param, "context_length_exceeded")


def busy(seconds: int) -> ApiError:
    """Too many are waiting; when to come again."""
    error = ApiError(503, f"the server is full; try again in {seconds} s", code="server_full")
    error.headers["Retry-After"] = str(seconds)
    return error


def failed() -> ApiError:
    """Our fault; what it was stands in the server's log."""
    return ApiError(500, "the server failed at this request; its log says why", code="internal_error")
