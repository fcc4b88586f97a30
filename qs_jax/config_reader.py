"""Reads a `config.json` strictly, and says what it supplied, chose or passed over."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

from qs_jax.config import Activation, RopeConfig
from qs_jax.errors import ConfigError

_LARGEST_INTEGER = 2**31 - 1
_MOST_LAYERS = 1024

_ACTIVATION_ALIASES: dict[str, Activation] = {
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_new",
    "swish": "silu",
}
"""Other names that Hugging Face has for the same functions."""


class ConfigReader:
    """Typed reads from a raw `config.json`: a missing or absurd value is a one-line `ConfigError`.

    A value that is missing is taken from `supplied`, which an architecture's file fills with what Hugging Face's own
    configuration class supplies, and that is noted; or from a default that the caller names, which follows from other
    values or is what everybody means by leaving it out. `notes` collects, one line each, all that was supplied, chosen
    among contradictions as transformers chooses, or passed over.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        source: str,
        *,
        supplied: Mapping[str, Any] = MappingProxyType({}),
        notes: list[str] | None = None,
    ):
        self.raw = raw
        self.source = source
        self.supplied = supplied
        self.notes = [] if notes is None else notes

    def note(self, text: str) -> None:
        """Say once what was decided about the file."""
        line = f"{self.source}: {text}"
        if line not in self.notes:
            self.notes.append(line)

    def _fail(self, key: str, expected: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key} is {self.raw.get(key)!r}, expected {expected}")

    def _present(self, key: str, *, default: Any = None) -> Any:
        value = self.raw.get(key, None)
        if value is not None:
            return value
        if default is not None:
            return default
        if key not in self.supplied:
            raise ConfigError(f"{self.source}: {key} is missing; add it to config.json")
        self.note(f"{key} is missing; {self.supplied[key]!r} is taken, as in transformers")
        return self.supplied[key]

    def with_aliases(self, aliases: Mapping[str, str]) -> "ConfigReader":
        """A reader that also finds values under other names; `aliases` maps those to the names that are read.

        Raises:
            ConfigError: a value stands under both names and differs.
        """
        raw = dict(self.raw)
        for alias, key in aliases.items():
            if raw.get(alias) is None:
                continue
            if raw.setdefault(key, raw[alias]) != raw[alias]:
                raise ConfigError(f"{self.source}: {key} is {raw[key]!r} and {alias} is {raw[alias]!r}; remove one")
        return ConfigReader(raw, self.source, supplied=self.supplied, notes=self.notes)

    def integer(self, key: str, default: Any = None, *, minimum: int = 1, maximum: int = _LARGEST_INTEGER) -> int:
        value = self._present(key, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._fail(key, f"a whole number from {minimum} to {maximum}")
        return value

    def layers(self, key: str) -> int:
        """A number of layers; an absurd one is refused before a network of that depth is laid out."""
        return self.integer(key, maximum=_MOST_LAYERS)

    def key_value_heads(self, heads: int) -> int:
        """Heads of keys and values: as many as of queries where null, or absent and nothing else is supplied."""
        written = "num_key_value_heads" in self.raw or "num_key_value_heads" not in self.supplied
        return self.integer("num_key_value_heads", heads if written else None)

    def context(self, *, window: int | None = None) -> int:
        """The longest context: `max_position_embeddings`, or the sliding window if that is shorter.

        A window hides a token from those `window` positions later, so that no context up to its length is touched by
        it. Longer requests are refused like any beyond the context; a rolling cache is not implemented.
        """
        positions = self.integer("max_position_embeddings")
        return positions if window is None else min(positions, window)

    def sliding_window(self, default: int) -> int | None:
        """`sliding_window` in tokens: the default where it is absent, none where it is null."""
        written = "sliding_window" in self.raw
        return None if written and self.raw["sliding_window"] is None else self.integer("sliding_window", default)

    def number(self, key: str, default: Any = None) -> float:
        value = self._present(key, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self._fail(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._present(key, default=default)
        if not isinstance(value, bool):
            raise self._fail(key, "true or false")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> Any:
        value = self._present(key, default=default)
        if value not in choices:
            raise self._fail(key, "one of " + ", ".join(choices))
        return value

    def activation(self, key: str, default: str) -> Activation:
        """An activation, by any name that Hugging Face has for the same function."""
        name = self._present(key, default=default)
        same = isinstance(name, str) and name in _ACTIVATION_ALIASES
        return _ACTIVATION_ALIASES[name] if same else self.choice(key, get_args(Activation), default)

    def refuse(self, key: str, *accepted: Any) -> None:
        """Raise unless `key` is absent, null or one of `accepted`: an option that changes the mathematics."""
        if self.raw.get(key) is not None and self.raw[key] not in accepted:
            raise ConfigError(f"{self.source}: {key}={self.raw[key]!r} is not implemented; convert a model without it")

    def token_id(self, key: str, vocab_size: int) -> int | None:
        ids = self.token_ids(key, vocab_size)
        return ids[0] if ids else None

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """A token id or a list of them, as `eos_token_id` may be; none where it is null.

        Ids that no token has (-1 for unset, ids of tokens that were never trained) are passed over: no text can hold
        them, and nothing here needs them.
        """
        absent = key not in self.raw and self.supplied.get(key) is not None
        value = self._present(key) if absent else self.raw.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in values):
            raise self._fail(key, "token ids, whole numbers")
        known = tuple(i for i in values if 0 <= i < vocab_size)
        if len(known) < len(values):
            self.note(f"{key} is {value!r}, which no token of the vocabulary ({vocab_size}) has; passed over")
        return known

    def rope(self) -> RopeConfig:
        """Read `rope_scaling` or `rope_parameters`, which says the same and the base too, with `rope_theta` beside it.

        Where both stand there `rope_scaling` is taken, and inside either its own `rope_theta` before the one outside,
        as in transformers 5.

        Raises:
            ConfigError: another kind of rotary embedding than is implemented, or two that contradict each other.
        """
        chosen = self._rope_parameters()
        both = self.raw.get("rope_scaling") and self.raw.get("rope_parameters")
        name = "rope_scaling" if self.raw.get("rope_scaling") else "rope_parameters"
        source = f"{self.source}: {name}{', which counts before rope_parameters' * bool(both)}"
        reader = ConfigReader(chosen, source, supplied=self.supplied, notes=self.notes)
        reader.refuse("partial_rotary_factor", 1)
        rope_type = reader.choice("rope_type", ("default", "linear", "llama3", "dynamic"))
        theta = reader.number("rope_theta")
        if rope_type == "dynamic":
            self.note("dynamic rotary scaling acts beyond max_position_embeddings only, where the context ends here")
        if rope_type in ("default", "dynamic"):
            return RopeConfig(theta)
        if rope_type == "linear":
            return RopeConfig(theta, "linear", reader.number("factor"))
        low, high = reader.number("low_freq_factor"), reader.number("high_freq_factor")
        if low >= high:
            raise ConfigError(
                f"{reader.source}: low_freq_factor is {low:g}, expected less than high_freq_factor, {high:g}"
            )
        return RopeConfig(
            theta,
            "llama3",
            reader.number("factor"),
            low,
            high,
            reader.integer("original_max_position_embeddings"),
        )

    def _rope_parameters(self) -> dict[str, Any]:
        """One object of all that is said about rotary embedding."""
        scaling, parameters = (self.raw.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
        for key, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
            if not isinstance(value, dict):
                raise ConfigError(f"{self.source}: {key} is {value!r}, expected an object")
            if any(isinstance(inner, dict) for inner in value.values()):
                raise ConfigError(f"{self.source}: {key} differs between layers, which is not implemented")
        chosen = dict(scaling or parameters)
        if scaling and parameters and scaling != parameters:
            self.note(f"rope_scaling {scaling} is taken, not rope_parameters {parameters}, as in transformers")
        outside = self.raw.get("rope_theta")
        if outside is None and scaling.get("rope_theta") is None and parameters.get("rope_theta") is not None:
            # transformers would go on with its own default base here
            self._agree_on_base(chosen, parameters["rope_theta"])
        if outside is not None and chosen.get("rope_theta") not in (None, outside):
            self.note(f"rope_theta {chosen['rope_theta']} inside is taken, not {outside} beside it, as in transformers")
        if chosen.get("rope_theta") is None:
            chosen["rope_theta"] = outside
        if chosen.get("type") not in (None, chosen.setdefault("rope_type", chosen.get("type") or "default")):
            self.note(f"rope_type {chosen['rope_type']} is taken, not type {chosen['type']}, as in transformers")
        chosen.setdefault("partial_rotary_factor", self.raw.get("partial_rotary_factor"))
        if chosen["rope_type"] == "llama3":
            self._supply_original_context(chosen)
        return chosen

    def _agree_on_base(self, chosen: dict[str, Any], theta: Any) -> None:
        """`rope_scaling` won and names no base, `rope_parameters` beside it does: fine where that is the default."""
        if chosen.get("rope_theta") is None and theta != self.supplied.get("rope_theta"):
            raise ConfigError(
                f"{self.source}: rope_scaling names no rope_theta, and rope_parameters beside it says {theta!r}; put "
                "it into rope_scaling, or remove one of the two"
            )

    def _supply_original_context(self, chosen: dict[str, Any]) -> None:
        key = "original_max_position_embeddings"
        if self.raw.get(key) is not None:
            chosen[key] = self.raw[key]
        elif chosen.get(key) is None:
            chosen[key] = self.integer("max_position_embeddings")
            self.note(f"{key} is missing; max_position_embeddings, {chosen[key]}, is taken, as in transformers")
