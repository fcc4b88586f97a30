"""A call's settings, completed by what the model's folder says of how to generate."""

from collections.abc import Mapping
from typing import Any

from qs_jax.errors import GenerationError
from qs_jax.generation_config import GenerationConfig
from qs_jax.generation_defaults import FILE, SAMPLING


def with_defaults(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[GenerationConfig, tuple[str, ...]]:
    """The settings of a call, completed by a model's defaults as Hugging Face's `generate` does: field by field.

    Defaults that only shape sampling do not count where the call or the file decodes greedily.

    Returns:
        The configuration, and the names of the fields that the defaults gave.

    Raises:
        GenerationError: a setting is unknown or out of range; it says so if the file is to blame.
    """
    asked = {name: value for name, value in settings.items() if value is not None}
    given = {name: value for name, value in defaults.items() if name not in asked}
    if not asked.get("use_model_defaults", True):
        given = {}
    samples = asked.get("do_sample", given.get("do_sample", False))
    if not samples:
        given = {name: value for name, value in given.items() if name not in (*SAMPLING, "do_sample")}
    try:
        return GenerationConfig.of(**given, **asked), tuple(sorted(given))
    except GenerationError as error:
        GenerationConfig.of(**{**asked, "do_sample": bool(samples)})  # what was asked for goes first
        raise GenerationError(
            f"{FILE} of the model: {error}; repair it, or ignore it (--no-generation-config, use_model_defaults=False)"
        ) from None
