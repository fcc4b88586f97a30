"""How text is cut before byte pairs are merged, by the names that llama.cpp has for it (`tokenizer.ggml.pre`).

A cut is a list of expressions, each applied to the pieces that the ones before it left; what an expression does not
match stays a piece. The names and what they mean are llama.cpp's (`src/llama-vocab.cpp`); expressions are those of the
models' own tokenizers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = tuple(rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{first}{_LOWER}{second}" for first, second in (("*", "+"), ("+", "*")))
_REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Cut:
    """`whole` takes a piece that is a token without merging; `begins` puts the beginning of a text first where the
    file does not say."""

    expressions: tuple[str, ...]
    whole: bool = False
    begins: bool = False


_PLAIN = Cut((_GPT2,))
_DIGITS = Cut((r"\p{N}", _GPT2))
_THREE_DIGITS = Cut((rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",))
_LLAMA3 = Cut(_THREE_DIGITS.expressions, whole=True, begins=True)
_QWEN2 = Cut((rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}",))
_GPT4O = Cut(
    ("|".join((*(rf"{case}{_CONTRACTIONS}?" for case in _CASES), r"\p{N}{1,3}", _REST_WITH_SLASH)),),
)
_TEKKEN = Cut(("|".join((*_CASES, r"\p{N}", _REST_WITH_SLASH)),), whole=True, begins=True)
_DEFAULT = Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))

CUTS: Mapping[str, Cut] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "gigachat", "a.x-4.0", "mellum"), _PLAIN),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _THREE_DIGITS),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie"), _GPT4O),
    "tekken": _TEKKEN,
    "deepseek-coder": Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
}

ASSUMED: Mapping[str, str] = {"gpt2": "gpt-2", "qwen2": "qwen2"}
"""By architecture, where a file does not say; any other has llama.cpp's own default."""
