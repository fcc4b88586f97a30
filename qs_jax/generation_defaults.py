"""What a model's folder says of how to generate: `generation_config.json`, for what a call leaves out."""

from typing import Any

from qs_jax.choices import is_whole
from qs_jax.files import ModelFiles, read_json

FILE = "generation_config.json"

SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Settings that only shape sampling, with the values at which they change nothing."""

NEUTRAL: dict[str, Any] = {"do_sample": False, **SAMPLING, "repetition_penalty": 1.0}
"""What counts where neither the call nor the model's file says anything: greedy decoding, nothing penalised."""

IDS = ("eos_token_id", "pad_token_id")

OPEN = (*NEUTRAL, *IDS)
"""Settings that a model's `generation_config.json` may give; None says that the call leaves them open."""

_NOT_IMPLEMENTED = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "encoder_repetition_penalty", "typical_p", "guidance_scale"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("penalty_alpha", "top_h", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"), None),
    **dict.fromkeys(("sequence_bias", "forced_bos_token_id", "forced_eos_token_id", "watermarking_config"), None),
    **dict.fromkeys(("exponential_decay_length_penalty", "stop_strings", "token_healing"), None),
}
"""Fields that change what transformers generates and are not taken, with the values at which they change nothing."""


def read_generation_defaults(folder: ModelFiles, vocab_size: int, notes: list[str]) -> dict[str, Any]:
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
