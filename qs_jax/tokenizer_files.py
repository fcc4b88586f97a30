"""A folder's tokenizer files, read as data: no class is looked up by name and nothing in the folder is ever run.

Which file and which field wins where two say the same is written down in docs/loading.md; it is what transformers 5
does, with `tokenizer.json` taken as it stands.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qs_jax.errors import TokenizerError
from qs_jax.files import ModelFiles, read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Any of these makes a tokenizer; the first that is there is read."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

_END = "<|endoftext|>"
_CLASS_NAMES: dict[str, dict[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
}
"""Special tokens that transformers' classes name where a folder does not."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder's tokenizer files say.

    `named` are the special tokens that have a name (`bos_token`, `eos_token`, …), as a chat template may use them.
    """

    backend: "Backend"
    named: Mapping[str, str]
    chat_template: str | None


def has_tokenizer(folder: ModelFiles) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)


def read_tokenizer_files(folder: ModelFiles, notes: list[str] | None = None) -> TokenizerFiles:
    """Read the tokenizer of a model folder; `notes` takes a line for what was decided that the files leave open.

    Raises:
        TokenizerError: there are no tokenizer files, they cannot be read, or they contradict each other.
    """
    if not has_tokenizer(folder):
        raise TokenizerError(f"{folder}: no tokenizer files; copy tokenizer.json beside the weights or give token ids")
    try:
        config = read_json(folder / "tokenizer_config.json")
        kind = _class_name(folder, config)
        backend = _backend(folder, config, kind, [] if notes is None else notes)
        named, extra = _special_tokens(folder, config)
        known = {
            name: token for name, token in _CLASS_NAMES.get(kind, {}).items() if backend.token_to_id(token) is not None
        }
        named = {**{name: {"content": token} for name, token in known.items()}, **named}
        _add_tokens(folder, backend, config, named, extra)
        names = {name: token["content"] for name, token in named.items()}
        return TokenizerFiles(backend, names, _chat_template(folder, config))
    except TokenizerError:
        raise
    except Exception as error:  # tokenizers and transformers raise almost anything on a damaged file
        reason = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{folder}: tokenizer cannot be read ({reason}); restore its files") from error


def _class_name(folder: ModelFiles, config: Mapping[str, Any]) -> str:
    """The name of the tokenizer's class, which is never looked up; where there is none, that of the model's own."""
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if read_json(folder / "config.json").get("model_type") == "qwen2" and kind in ("", "GPT2Tokenizer"):
        return "Qwen2Tokenizer"  # as transformers has it
    if kind or (folder / "tokenizer.json").is_file():
        return kind
    return "LlamaTokenizer" if (folder / "tokenizer.model").is_file() else "GPT2Tokenizer"


def _backend(folder: ModelFiles, config: Mapping[str, Any], kind: str, notes: list[str]) -> "Backend":
    from tokenizers import Tokenizer as Backend

    if (folder / "tokenizer.json").is_file():
        backend = Backend.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    else:
        backend = _from_vocabulary(folder, config, kind, notes)
    # these are settings of whoever saved the file, for batches of theirs
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = config.get("split_special_tokens") is True
    return backend


def _from_vocabulary(folder: ModelFiles, config: Mapping[str, Any], kind: str, notes: list[str]) -> "Backend":
    """A tokenizer from a bare vocabulary, by one of three classes of transformers.

    They are given a copy of the vocabulary and nothing else of the folder.

    Raises:
        TokenizerError: the vocabulary belongs to another class, or cannot be read.
    """
    # it advises torch, which is not missing here
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    if (folder / "tokenizer.model").is_file():
        files, classes = ("tokenizer.model",), {"LlamaTokenizer": transformers.LlamaTokenizer}
    else:
        files = ("vocab.json", "merges.txt")
        classes = {"GPT2Tokenizer": transformers.GPT2Tokenizer, "Qwen2Tokenizer": transformers.Qwen2Tokenizer}
    if kind not in classes:
        raise TokenizerError(
            f"{folder}: tokenizer_class is {kind}, and {files[0]} alone is read for {', '.join(classes)} only; code of "
            "a folder is never run: save the tokenizer with a tokenizer.json"
        )
    options = _options(folder, config, notes)
    with tempfile.TemporaryDirectory() as copy:
        for name in files:
            if not (folder / name).is_file():
                raise TokenizerError(f"{folder}: {files[0]} needs {name} beside it; restore the file")
            (Path(copy) / name).write_bytes((folder / name).read_bytes())
        try:
            loaded = classes[kind].from_pretrained(copy, local_files_only=True, **options)
        except Exception as error:  # transformers raises almost anything on a damaged file
            advice = "a tiktoken vocabulary is not read" if files[0] == "tokenizer.model" else "restore it"
            raise TokenizerError(f"{folder / files[0]}: cannot be read; {advice}; copy tokenizer.json") from error
    return loaded.backend_tokenizer


def _options(folder: ModelFiles, config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """What `tokenizer_config.json` says of how a bare vocabulary is used.

    A SentencePiece one puts the beginning of text before a text unless that is switched off: the default that
    `LlamaTokenizer` documents (transformers 5.24 leaves it out where the file says nothing), and what such models
    are trained with.
    """
    said = {name: config[name] for name in ("legacy", "add_prefix_space") if isinstance(config.get(name), bool)}
    said |= {name: _content(config[name]) for name in _NAMED if _content(config.get(name))}
    add = {name: config.get(name) for name in ("add_bos_token", "add_eos_token")}
    if add["add_bos_token"] is None and (folder / "tokenizer.model").is_file():
        add["add_bos_token"] = True
        notes.append(f"{folder}: nothing says add_bos_token; the beginning of text is put first, as Llama was trained")
    return {**said, **{name: value is True for name, value in add.items()}}


Token = dict[str, Any]
"""A token's `content`, and flags of it."""


def _special_tokens(folder: ModelFiles, config: Mapping[str, Any]) -> tuple[dict[str, Token], list[Token]]:
    """Special tokens by name, and those without one, each in the order in which transformers adds them. Older folders
    have them in `special_tokens_map.json`, which counts where `tokenizer_config.json` lists no tokens."""
    said = dict(config)
    if "added_tokens_decoder" not in config:
        said |= read_json(folder / "special_tokens_map.json")
    named = {name: _token(said.get(name)) for name in _NAMED if _content(said.get(name))}
    own = [value for name, value in said.items() if name.endswith("_token") and name not in _NAMED]
    extra = said.get("extra_special_tokens") or said.get("additional_special_tokens") or ()
    own += extra.values() if isinstance(extra, Mapping) else extra
    return named, [_token(value) for value in own if _content(value)]


def _content(token: Any) -> str:
    """The text of a token, however it is written; empty for none."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else ""


def _token(token: Any) -> Token:
    flags = {flag: token[flag] for flag in _FLAGS if flag in token} if isinstance(token, Mapping) else {}
    return {"content": _content(token), "normalized": False, **flags, "special": True}


def _add_tokens(
    folder: ModelFiles, backend: "Backend", config: Mapping[str, Any], named: Mapping[str, Token], extra: list[Token]
) -> None:
    """Give the backend the tokens that only other files name, and mark the special ones.

    Raises:
        TokenizerError: a token has one id in one file and another in another.
    """
    from tokenizers import AddedToken

    for index, token in _listed(folder, config, {token["content"] for token in (*named.values(), *extra)}):
        if repr(backend.get_added_tokens_decoder().get(index)) != repr(token):
            backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != index:
            raise TokenizerError(
                f"{folder}: token {token.content!r} has id {index!r} in tokenizer_config.json or added_tokens.json and "
                f"{found} in the vocabulary; repair one"
            )
    have = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token in (*named.values(), *(token for token in extra if token["content"] not in have)):
        known = have.get(token["content"]) or AddedToken(**{"special": True, **token})
        if token["content"] not in have or not known.special:
            known.special = True
            backend.add_special_tokens([known])
            have[token["content"]] = known


def _listed(folder: ModelFiles, config: Mapping[str, Any], special: set[str]) -> Iterator[tuple[int, "AddedToken"]]:
    """Id and token, in the order of ids, from `added_tokens_decoder` or the older `added_tokens.json`."""
    from tokenizers import AddedToken

    if "added_tokens_decoder" in config:
        entries = (config["added_tokens_decoder"] or {}).items()
        for index, entry in sorted((int(index), entry) for index, entry in entries):
            yield index, AddedToken(entry["content"], **{flag: entry[flag] for flag in _FLAGS if flag in entry})
        return
    for content, index in sorted(read_json(folder / "added_tokens.json").items(), key=lambda entry: entry[1]):
        yield index, AddedToken(content, special=content in special, normalized=content not in special)


def _chat_template(folder: ModelFiles, config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja` before `tokenizer_config.json`; of several named ones, the default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {str(entry["name"]): entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
