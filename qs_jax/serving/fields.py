"""A request's JSON object, read field by field; a wrong one is refused with its name and what it should be."""

import json
from collections.abc import Callable
from typing import Any

from qs_jax.choices import is_number, is_whole
from qs_jax.serving.errors import refused

_SHOWN = 60
_MISSING = object()


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        ApiError: it is none, or one nested deeper or with longer numbers than Python reads.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise refused(f"the body is not JSON ({type(error).__name__}); send one object") from None
    if not isinstance(found, dict):
        raise refused(f"the body is {shown(found)}, expected a JSON object")
    return found


def shown(value: Any) -> str:
    """As an error quotes it: as JSON has it, and not at length."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class Fields:
    """What is not taken by the end is refused, as OpenAI does. A field that is null is one that was left out."""

    def __init__(self, raw: dict[str, Any]):
        self._left = {name: value for name, value in raw.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, holds: Callable[[Any], bool], expected: str, default: Any = None) -> Any:
        """A field's value, or the default where it was left out.

        Raises:
            ApiError: it is there and does not hold.
        """
        value = self._left.pop(name, _MISSING)
        if value is _MISSING:
            return default
        if not holds(value):
            raise refused(f"{name} is {shown(value)}, expected {expected}", name)
        return value

    def whole(self, name: str, least: int, most: int, default: int | None = None) -> Any:
        return self.take(
            name, lambda v: is_whole(v, least) and v <= most, f"a whole number from {least} to {most}", default
        )

    def number(self, name: str, least: float, most: float) -> Any:
        return self.take(name, lambda v: is_number(v, least, most), f"a number from {least:g} to {most:g}")

    def flag(self, name: str, default: bool = False) -> bool:
        return self.take(name, lambda v: isinstance(v, bool), "true or false", default)

    def only(self, name: str, neutral: tuple[Any, ...], why: str) -> None:
        """A field that is known and not implemented: it may say what happens anyway.

        Raises:
            ApiError: it says anything else.
        """
        value = self._left.pop(name, _MISSING)
        if value is not _MISSING and not any(value == same and type(value) is type(same) for same in neutral):
            raise refused(f"{name} is not supported: {why}", name)

    def ignore(self, *names: str) -> None:
        for name in names:
            self._left.pop(name, None)

    def end(self) -> None:
        """Raises:
        ApiError: something is left that nobody knows.
        """
        if self._left:
            name = min(self._left)
            raise refused(f"unknown field {shown(name)}; docs/serving.md lists those there are", name)
