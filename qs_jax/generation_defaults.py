"""What a model's folder says of how to generate: `generation_config.json`, for what a call leaves out."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qs_jax.adaptive.policy import Policy
from qs_jax.choices import is_whole
from qs_jax.config import ModelConfig
from qs_jax.errors import GenerationError
from qs_jax.files import read_json
from qs_jax.generation_config import IDS, NEUTRAL, OPEN, SAMPLING, GenerationConfig, GenerationSettings

FILE = "generation_config.json"

_NOT_IMPLEMENTED = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "encoder_repetition_penalty", "typical_p", "guidance_scale"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("penalty_alpha", "top_h", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"), None),
    **dict.fromkeys(("sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "watermarking_config"), None),
    **dict.fromkeys(("exponential_decay_length_penalty", "stop_strings", "token_healing"), None),
}
"""Fields that change what transformers generates and are not taken, with the values at which they change nothing."""


def read_generation_defaults(folder: Path, vocab_size: int, notes: list[str]) -> dict[str, Any]:
    """The settings of `generation_config.json`, by their names in `GenerationConfig`; without that file those that
    older folders have in `config.json`, as in transformers.

    Lengths are not taken: how much to generate is the call's to say.
    Ids that no token has are passed over, and settings that are not implemented are not used, each with a note.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    written = read_json(folder / FILE)
    own = (folder / FILE).is_file()
    if not own:
        written = {name: value for name, value in read_json(folder / "config.json").items() if name not in IDS}
    for name in sorted(_NOT_IMPLEMENTED.keys() & written.keys()):
        if written[name] not in (None, False, _NOT_IMPLEMENTED[name], [], {}):
            notes.append(f"{folder}: {name}={written[name]!r} is not implemented, and generation goes on without it")
    said = {name: value for name, value in written.items() if name in OPEN and value is not None}
    if own and not said.get("eos_token_id") and said.get("eos_token_id") != 0:
        ends = read_json(folder / "config.json").get("eos_token_id")
        if ends is not None:
            notes.append(f"{folder / FILE}: names no eos_token_id; that of config.json, {ends}, ends a text")
    for name in (name for name in IDS if name in said):
        values = said[name] if isinstance(said[name], list) else [said[name]]
        known = [token for token in values if not is_whole(token) or 0 <= token < vocab_size]
        if len(known) < len(values):
            notes.append(f"{folder / FILE}: {name} is {said[name]!r}, which no token has; passed over")
            said[name] = known
        if said[name] == []:
            del said[name]
    if isinstance(pad := said.get("pad_token_id"), list):
        said["pad_token_id"] = pad[0]
    return said


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
