"""What a user would run instead, on the same weights, each where it is installed: transformers on torch, CTranslate2,
and those of `gguf_peers`, llama.cpp and OpenVINO.

    pip install "qs_jax[peers]"    # CTranslate2 converts from transformers' format and needs torch for that
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from convert.mapping import to_hugging_face
from qs_jax.model import Model
from qs_jax.models import arrays_by_path

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], Prompts]
"""Prompts of one length and a number of new tokens -> the new tokens, chosen greedily, end of text ignored."""

TRANSFORMERS = ("float32", "bfloat16")
CTRANSLATE2 = ("float32", "int8")


def write_hugging_face(model: Model, raw: dict[str, Any], folder: Path) -> Path:
    """The model as a Hugging Face folder, unless it is there, with a tokenizer in which token i is spelt `t<i>`."""
    if (folder / "tokenizer_config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw), "utf-8")
    tensors = to_hugging_face(arrays_by_path(model.network), model.config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary = {_spelling(token): token for token in range(model.config.vocab_size)}
    end = _spelling(raw["eos_token_id"])
    Tokenizer(WordLevel(vocabulary, unk_token=end)).save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def torch_makers(source: Path, work: Path, threads: int) -> dict[str, Callable[[], Generate]]:
    """How to start each peer that is installed, by name such as "ctranslate2 int8".

    Args:
        source: a Hugging Face folder with a tokenizer.
        work: a folder for CTranslate2's own form of it.
        threads: how many cores each may use.
    """
    makers: dict[str, Callable[[], Generate]] = {}
    if importlib.util.find_spec("torch"):
        makers |= {f"transformers {d}": lambda d=d: transformers_peer(source, d, threads) for d in TRANSFORMERS}
        if importlib.util.find_spec("ctranslate2"):
            makers |= {f"ctranslate2 {t}": lambda t=t: ctranslate2_peer(source, work, t, threads) for t in CTRANSLATE2}
    return makers


def transformers_peer(folder: Path, dtype: str, threads: int, *, lookup: int = 0) -> Generate:
    """transformers' own `generate` in eager torch; with `lookup` so many tokens a round are looked up in the prompt."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate(prompts: Prompts, new_tokens: int) -> Prompts:
        tokens = torch.tensor(prompts)
        settings = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
        settings |= {"prompt_lookup_num_tokens": lookup} if lookup else {}
        with torch.inference_mode():
            output = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        return output[:, tokens.shape[1] :].tolist()

    return generate


def ctranslate2_peer(source: Path, work: Path, compute_type: str, threads: int) -> Generate:
    """CTranslate2's generator; the model is converted on first use."""
    import ctranslate2

    converted = work / f"ctranslate2-{compute_type}"
    if not converted.is_dir():
        converter = ctranslate2.converters.TransformersConverter(str(source))
        converter.convert(str(converted), quantization=compute_type)
    generator = ctranslate2.Generator(str(converted), "cpu", compute_type=compute_type, intra_threads=threads)
    spelt = Tokenizer.from_file(str(source / "tokenizer.json")).id_to_token

    def generate(prompts: Prompts, new_tokens: int) -> Prompts:
        results = generator.generate_batch(
            [[spelt(token) for token in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return generate


def _spelling(token: int) -> str:
    return f"t{token}"
