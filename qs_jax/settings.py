"""A call's settings, completed by what the model's folder says of how to generate."""

from collections.abc import Iterable, Mapping
from typing import Any

from qs_jax.adaptive.policy import Policy
from qs_jax.config import ModelConfig
from qs_jax.errors import GenerationError
from qs_jax.generation_config import GenerationConfig, GenerationSettings
from qs_jax.generation_defaults import FILE, NEUTRAL, OPEN, SAMPLING


def in_force(config: GenerationConfig, defaults: Mapping[str, Any], model: ModelConfig) -> GenerationSettings:
    """What a call leaves open is filled in as Hugging Face's `generate` does, field by field: from a model's defaults,
    then with neutral values and the ids of the model's configuration.

    Defaults that only shape sampling do not count where the call or the file decodes greedily.

    Raises:
        GenerationError: settings of sampling where neither call nor file asks for it, or a default out of range.
    """
    said = {name: getattr(config, name) for name in OPEN if getattr(config, name) is not None}
    given = _given(said, defaults) if config.use_model_defaults else {}
    open_to = {**NEUTRAL, "pad_token_id": model.pad_token_id, "eos_token_id": model.eos_token_ids, **given, **said}
    if not open_to["do_sample"]:
        config.refuse_sampling()
    eos, pad = open_to.pop("eos_token_id"), open_to.pop("pad_token_id")
    ends = tuple(map(int, eos if isinstance(eos, Iterable) else (eos,)))
    return GenerationSettings(
        policy=Policy.of(config.policy),
        bits=config.bits,
        max_new_tokens=config.max_new_tokens,
        **open_to,
        eos_token_ids=ends,
        # the end of text where no padding is named, as in Hugging Face
        pad_token_id=next(token for token in (pad, *ends, *model.eos_token_ids, 0) if token is not None),
        stop_strings=tuple(config.stop_strings),
        num_return_sequences=config.num_return_sequences,
        seed=config.seed,
        exact=config.exact,
        draft=(config.draft,) if isinstance(config.draft, str) else tuple(config.draft),
        from_generation_config=tuple(sorted(given)),
    )


def _given(said: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that a call leaves room for.

    Raises:
        GenerationError: one of them is out of range; the file is to blame.
    """
    given = {name: value for name, value in defaults.items() if name not in said}
    if not said.get("do_sample", given.get("do_sample", False)):
        given = {name: value for name, value in given.items() if name not in (*SAMPLING, "do_sample")}
    try:
        GenerationConfig.of(**{"do_sample": said.get("do_sample"), **given})
    except GenerationError as error:
        raise GenerationError(
            f"{FILE} of the model: {error}; repair it, or ignore it (--no-generation-config, use_model_defaults=False)"
        ) from None
    return given
