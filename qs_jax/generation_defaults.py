"""What a model's folder says of how to generate: `generation_config.json`, for what a call leaves out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qs_jax.errors import GenerationError
from qs_jax.files import read_json
from qs_jax.generation_config import GenerationConfig, is_integer

FILE = "generation_config.json"

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_IDS = ("eos_token_id", "pad_token_id")
_TAKEN = ("do_sample", *_SAMPLING, "repetition_penalty", *_IDS)
"""Fields that are taken. Lengths are not: how much to generate is the call's to say."""


def read_generation_defaults(folder: Path, vocab_size: int, notes: list[str]) -> dict[str, Any]:
    """The settings of `generation_config.json`, if there is one, by their names in `GenerationConfig`.

    Ids that no token has are passed over with a note.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    said = {name: value for name, value in read_json(folder / FILE).items() if name in _TAKEN and value is not None}
    for name in set(_IDS) & set(said):
        values = said[name] if isinstance(said[name], list) else [said[name]]
        known = [token for token in values if not is_integer(token) or 0 <= token < vocab_size]
        if len(known) < len(values):
            notes.append(f"{folder / FILE}: {name} is {said[name]!r}, which no token has; passed over")
            said[name] = known
        if said[name] == []:
            del said[name]
    if isinstance(pad := said.get("pad_token_id"), list):
        said["pad_token_id"] = pad[0]
    return said


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
        given = {name: value for name, value in given.items() if name not in (*_SAMPLING, "do_sample")}
    try:
        return GenerationConfig.of(**given, **asked), tuple(sorted(given))
    except GenerationError as error:
        GenerationConfig.of(**{**asked, "do_sample": samples})  # what was asked for goes first
        raise GenerationError(
            f"{FILE} of the model: {error}; repair it, or ignore it (--no-generation-config, use_model_defaults=False)"
        ) from None
