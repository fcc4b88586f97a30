"""Compute the goldens with Hugging Face transformers on torch (CPU, float32, eager attention).

    python -m tests.parity.make_goldens          # all of them
    python -m tests.parity.make_goldens NAME...  # some variants, real models, "sampling" or "states" (of all variants)

Deterministic: weights and prompts come from numpy generators with fixed seeds. Real checkpoints are read from
QS_JAX_DATA or ../shared/data; their goldens are left as they are where it is absent.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from tests.parity.variants import (
    GOLDENS,
    NEW_TOKENS,
    PROMPT_TOKENS,
    REAL_MODELS,
    SAMPLING,
    STATE_POSITIONS,
    VARIANTS,
    Variant,
)

_GOLDEN_POSITIONS = 16
_SMALLEST_MARGIN = 2e-3
"""Greedy tokens are only comparable between implementations where no step is nearly a tie."""
_FEWEST_TOKENS = 8
"""A continuation that only repeats itself shows little."""


def _settle_vector_math() -> None:
    """Call torch's vector functions once on one thread, before anything is compared with what they give.

    MKL chooses a function's kernel at its first call; where several threads make that call at once, one may get the
    kernel of low accuracy (github.com/pytorch/pytorch/issues/188792). Measured on two cores: 3 of 40 processes had a
    first cosine of 512 x 16 angles off by 1.5e-4, none of 90 after this.
    """
    few = torch.ones(16)
    for function in (torch.cos, torch.sin, torch.exp, torch.tanh, torch.erf):
        function(few)


_settle_vector_math()


def write_variant(folder: Path, variant: Variant) -> None:
    """Write a random model as a Hugging Face folder. Its `config.json` is the table's, key for key."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(variant.config, indent=1) + "\n", encoding="utf-8")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    rng = np.random.default_rng(variant.seed)
    tensors = {
        name.removeprefix("transformer.") if variant.bare_names else name: _random_tensor(name, parameter.shape, rng)
        for name, parameter in sorted(model.named_parameters())
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _random_tensor(name: str, shape: torch.Size, rng: np.random.Generator) -> np.ndarray:
    """Large enough that every part of the model moves the logits: an error in any of them shows."""
    normal = rng.standard_normal(tuple(shape)).astype(np.float32)
    if len(shape) == 2:
        return 0.3 * normal
    return 0.3 * normal + (0.0 if name.endswith("bias") else 1.0)


def load_reference(folder: Path) -> Any:
    """The model as transformers reads it; fails if it finds the folder incomplete."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, report = loaded
    faults = {key: names for key, names in report.items() if names}
    if faults:
        raise SystemExit(f"{folder}: transformers reports {faults}")
    return model.eval()


@torch.no_grad()
def reference_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits (tokens, vocab) of one sequence of ids (tokens,)."""
    return model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0].numpy()


@torch.no_grad()
def reference_states(model: Any, tokens: np.ndarray) -> np.ndarray:
    """(layers + 1, tokens, hidden): the residual stream that enters the first layer, and what leaves each.

    `output_hidden_states` would give the last one behind the final norm.
    """
    found: list[np.ndarray] = []
    layers = model.transformer.h if model.config.model_type == "gpt2" else model.model.layers

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"])[0].numpy().copy())

    def after(module: Any, args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0].numpy().copy())

    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    reference_logits(model, tokens)
    for hook in hooks:
        hook.remove()
    return np.stack(found)


def golden(model: Any, prompt: np.ndarray, greedy_prompt: np.ndarray, *, use_eos: bool) -> dict[str, np.ndarray]:
    """Logits of `prompt` at positions spread over it, and the greedy continuation of `greedy_prompt`."""
    positions = np.linspace(0, len(prompt) - 1, _GOLDEN_POSITIONS).round().astype(np.int32)
    ids = torch.tensor(greedy_prompt, dtype=torch.long)[None]
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=model.config.eos_token_id if use_eos else None
    )
    model.generation_config.eos_token_id = settings.eos_token_id
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0].numpy()
    return {
        "prompt": prompt.astype(np.int32),
        "positions": positions,
        "logits": np.ascontiguousarray(reference_logits(model, prompt)[positions]),
        "greedy_prompt": greedy_prompt.astype(np.int32),
        "greedy_tokens": whole[len(greedy_prompt) :].astype(np.int32),
    }


def _save(path: Path, tensors: dict[str, np.ndarray], model: Any) -> None:
    whole = np.concatenate([tensors["greedy_prompt"], tensors["greedy_tokens"]])
    steps = np.sort(reference_logits(model, whole), axis=-1)[len(tensors["greedy_prompt"]) - 1 : -1]
    margin, different = (steps[:, -1] - steps[:, -2]).min(), len(set(tensors["greedy_tokens"].tolist()))
    save_file(tensors, path)
    print(
        f"{path.relative_to(GOLDENS)}: {path.stat().st_size} bytes, logits' standard deviation "
        f"{tensors['logits'].std():.2f}, {different} different tokens in {len(tensors['greedy_tokens'])}, "
        f"smallest margin {margin:.4f}"
    )
    if margin < _SMALLEST_MARGIN or different < _FEWEST_TOKENS:
        raise SystemExit(f"{path}: a greedy step is nearly a tie, or all are the same; choose another seed")


def make_variant(name: str) -> None:
    variant, folder = VARIANTS[name], GOLDENS / name
    write_variant(folder, variant)
    model = load_reference(folder)
    rng = np.random.default_rng([variant.seed, 0])
    vocab = model.config.vocab_size
    prompt, short = rng.integers(0, vocab, PROMPT_TOKENS), rng.integers(0, vocab, 7)
    _save(folder / "golden.safetensors", golden(model, prompt, short, use_eos=False), model)


def make_real(name: str, data: Path) -> None:
    folder = data / "models" / name
    model, tokenizer = load_reference(folder), AutoTokenizer.from_pretrained(folder)
    stories = json.loads((data / "text" / "tinystories_train_first1000.json").read_text(encoding="utf-8"))
    length = min(PROMPT_TOKENS, model.config.max_position_embeddings - 6)
    prompt = np.asarray(tokenizer("\n".join(stories[:20]))["input_ids"][:length])
    short = np.asarray(tokenizer("Once upon a time")["input_ids"])
    _save(GOLDENS / f"{name}.safetensors", golden(model, prompt, short, use_eos=True), model)


def make_sampling() -> None:
    """Scores after the processors that `generate` itself builds, in its order, for rows of different shapes.

    The `tied` logits are whole and half numbers. Top-p is not tried on them: transformers then cuts within a tie
    in the sort's order, which means nothing.
    """
    rng = np.random.default_rng(2)
    scale, shift = np.array([[0.5], [2.0], [5.0], [12.0]]), np.array([[0.0], [3.0], [-4.0], [0.0]])
    spread = rng.standard_normal((4, 97)) * scale + shift
    tensors = {
        "spread": spread.astype(np.float32),
        "tied": (np.round(2 * rng.standard_normal((4, 97)) * 2) / 2).astype(np.float32),
        "input_ids": rng.integers(0, 97, (4, 24)).astype(np.int32),
    }
    ids = torch.tensor(tensors["input_ids"], dtype=torch.long)
    host: Any = GPT2LMHeadModel(
        GPT2Config(n_embd=4, n_layer=1, n_head=1, vocab_size=97, bos_token_id=1, eos_token_id=2)
    )
    for name, settings in SAMPLING.items():
        processors = host._get_logits_processor(
            GenerationConfig(do_sample=True, **settings), input_ids_seq_length=ids.shape[1]
        )
        for source in ("spread", "tied"):
            if source == "spread" or settings["top_p"] == 1.0:
                scores = processors(ids, torch.tensor(tensors[source]))
                tensors[f"{source}.{name}"] = scores.numpy()
    save_file(tensors, GOLDENS / "sampling.safetensors")
    (GOLDENS / "sampling.json").write_text(json.dumps(SAMPLING, indent=1) + "\n", encoding="utf-8")


def make_states() -> None:
    """The residual stream of every variant at a few places of its golden's prompt."""
    tensors = {}
    for name in VARIANTS:
        prompt = load_file(GOLDENS / name / "golden.safetensors")["prompt"]
        states = reference_states(load_reference(GOLDENS / name), prompt)
        tensors[name] = np.ascontiguousarray(states[:, STATE_POSITIONS])
    save_file(tensors, GOLDENS / "states.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute the goldens of tests/parity with transformers on torch.")
    parser.add_argument("names", nargs="*", help="variants, real models, 'sampling' or 'states' (default: all)")
    known = {*VARIANTS, *REAL_MODELS, "sampling", "states"}
    names = set(parser.parse_args().names) or known
    unknown = names - known
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    disable_progress_bar()
    data = Path(os.environ.get("QS_JAX_DATA") or Path(__file__).parents[3] / "shared" / "data")
    for name in sorted(names & set(VARIANTS)):
        make_variant(name)
    for name in sorted(names & set(REAL_MODELS)):
        if data.is_dir():
            make_real(name, data)
        else:
            print(f"{name}: skipped, no real data at {data}")
    if "sampling" in names:
        make_sampling()
    if "states" in names:
        make_states()


if __name__ == "__main__":
    main()
