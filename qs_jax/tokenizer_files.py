"""A folder's tokenizer files, read as data: no class is looked up by name and nothing in the folder is ever run.

Which file and which field wins where two say the same is written down in docs/loading.md; it is what transformers 5
does, with `tokenizer.json` taken as it stands.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qs_jax.errors import TokenizerError
from qs_jax.files import read_json

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


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder's tokenizer files say.

    `named` are the special tokens that have a name (`bos_token`, `eos_token`, …), as a chat template may use them.
    """

    backend: "Backend"
    named: Mapping[str, str]
    chat_template: str | None


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARIES)


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the tokenizer of a model folder.

    Raises:
        TokenizerError: there are no tokenizer files, they cannot be read, or they contradict each other.
    """
    if not has_tokenizer(folder):
        raise TokenizerError(f"{folder}: no tokenizer files; copy tokenizer.json beside the weights or give token ids")
    try:
        config = read_json(folder / "tokenizer_config.json")
        backend = _backend(folder, config)
        named, extra = _special_tokens(folder, config)
        _add_tokens(folder, backend, config, {*named.values(), *extra})
        return TokenizerFiles(backend, named, _chat_template(folder, config))
    except TokenizerError:
        raise
    except Exception as error:  # tokenizers and transformers raise almost anything on a damaged file
        reason = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{folder}: tokenizer cannot be read ({reason}); restore its files") from error


def _backend(folder: Path, config: Mapping[str, Any]) -> "Backend":
    from tokenizers import Tokenizer as Backend

    if (folder / "tokenizer.json").is_file():
        backend = Backend.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    else:
        backend = _from_vocabulary(folder, config)
    # these are settings of whoever saved the file, for batches of theirs
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = config.get("split_special_tokens") is True
    return backend


def _from_vocabulary(folder: Path, config: Mapping[str, Any]) -> "Backend":
    """A tokenizer from a bare vocabulary, by one of three classes of transformers.

    They are given a copy of the vocabulary and nothing else of the folder.

    Raises:
        TokenizerError: the vocabulary belongs to another class, or cannot be read.
    """
    # it advises torch, which is not missing here
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    files, options = ("vocab.json", "merges.txt"), {}
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if (folder / "tokenizer.model").is_file():
        files, options = ("tokenizer.model",), _sentencepiece_options(config)
        classes = {"": transformers.LlamaTokenizer, "LlamaTokenizer": transformers.LlamaTokenizer}
    else:
        classes = {"GPT2Tokenizer": transformers.GPT2Tokenizer, "Qwen2Tokenizer": transformers.Qwen2Tokenizer}
        qwen = read_json(folder / "config.json").get("model_type") == "qwen2"
        classes[""] = classes["Qwen2Tokenizer" if qwen else "GPT2Tokenizer"]
    if kind not in classes:
        known = ", ".join(sorted(filter(None, classes)))
        raise TokenizerError(
            f"{folder}: tokenizer_class is {kind}, and {files[0]} alone is read for {known} only; code of a folder is "
            "never run: save the tokenizer with a tokenizer.json"
        )
    with tempfile.TemporaryDirectory() as copy:
        for name in files:
            if not (folder / name).is_file():
                raise TokenizerError(f"{folder}: {files[0]} needs {name} beside it; restore the file")
            shutil.copyfile(folder / name, Path(copy) / name)
        try:
            loaded = classes[kind].from_pretrained(copy, local_files_only=True, **options)
        except Exception as error:  # transformers raises almost anything on a damaged file
            advice = "a tiktoken vocabulary is not read" if files[0] == "tokenizer.model" else "restore it"
            raise TokenizerError(f"{folder / files[0]}: cannot be read; {advice}; copy tokenizer.json") from error
    return loaded.backend_tokenizer


def _sentencepiece_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `tokenizer_config.json` says of how a SentencePiece vocabulary is used.

    Beginning of text is put before a text unless that is switched off: the default that `LlamaTokenizer` documents
    (releases of transformers 5 leave it out where the file says nothing), and what such models are trained with.
    """
    options = {name: config[name] for name in ("legacy", "add_prefix_space") if isinstance(config.get(name), bool)}
    options |= {name: _content(config[name]) for name in _NAMED if _content(config.get(name))}
    add = {name: config.get(name) for name in ("add_bos_token", "add_eos_token")}
    return {
        **options,
        "add_bos_token": add["add_bos_token"] is not False,
        "add_eos_token": add["add_eos_token"] is True,
    }


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Special tokens by name, and those without one. Older folders have them in `special_tokens_map.json`, which counts
    where `tokenizer_config.json` lists no tokens."""
    said = dict(config)
    if "added_tokens_decoder" not in config:
        said |= read_json(folder / "special_tokens_map.json")
    named = {name: _content(value) for name, value in said.items() if name in _NAMED and _content(value)}
    own = [value for name, value in said.items() if name.endswith("_token") and isinstance(value, str | dict)]
    for field in ("extra_special_tokens", "additional_special_tokens"):
        value = said.get(field) or ()
        own += value.values() if isinstance(value, Mapping) else value
    return named, [content for content in map(_content, own) if content]


def _content(token: Any) -> str:
    """The text of a token, however it is written; empty for none."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else ""


def _add_tokens(folder: Path, backend: "Backend", config: Mapping[str, Any], special: set[str]) -> None:
    """Give the backend the tokens that only other files name, and mark the special ones.

    Raises:
        TokenizerError: a token has one id in one file and another in another.
    """
    from tokenizers import AddedToken

    for index, token in _listed(folder, config, special):
        before = backend.get_added_tokens_decoder().get(index)
        if repr(before) != repr(token):
            backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != index:
            raise TokenizerError(
                f"{folder}: token {token.content!r} has id {index} in tokenizer_config.json or added_tokens.json and "
                f"{found} in the vocabulary; repair one"
            )
    have = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for content in sorted(special):
        token = have.get(content) or AddedToken(content, normalized=False)
        if not token.special:
            token.special = True
            backend.add_special_tokens([token])


def _listed(folder: Path, config: Mapping[str, Any], special: set[str]) -> Iterator[tuple[int, "AddedToken"]]:
    """Id and token, in the order of ids, from `added_tokens_decoder` or the older `added_tokens.json`."""
    from tokenizers import AddedToken

    if "added_tokens_decoder" in config:
        entries = config["added_tokens_decoder"].items()
        for index, entry in sorted((int(index), entry) for index, entry in entries):
            yield index, AddedToken(entry["content"], **{flag: entry[flag] for flag in _FLAGS if flag in entry})
        return
    for content, index in sorted(read_json(folder / "added_tokens.json").items(), key=lambda entry: entry[1]):
        yield index, AddedToken(content, special=content in special, normalized=content not in special)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja` before `tokenizer_config.json`; of several named ones, the default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {str(entry["name"]): entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None
