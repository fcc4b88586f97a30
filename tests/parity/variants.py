"""What the goldens cover: small random models, real checkpoints and sampling settings. Needs no torch.

`make_goldens.py` computes the goldens from these tables; the tests read both, so neither can drift from the other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOLDENS = Path(__file__).parent / "goldens"

REAL_MODELS = ("stories260K", "stories3M", "babyllama105")
"""Folders of the real data's `models/`."""

PROMPT_TOKENS = 500
"""Length of the long prompt: shorter ones cannot see an error in the rotary embedding."""

NEW_TOKENS = 64

STATE_POSITIONS = [0, 1, 63, 64, 300, PROMPT_TOKENS - 1]
"""Places of the long prompt whose states are kept layer by layer: its ends, and around the first context of llama3."""


@dataclass(frozen=True)
class Variant:
    """A small random model: its `config.json` as written, and the seed of its weights.

    `bare_names` stores the tensors without the leading `transformer.`, as the first GPT-2 checkpoints do.
    """

    seed: int
    config: dict[str, Any]
    bare_names: bool = False


_SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


def _gpt2(**options: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **_SPECIAL_TOKENS, **sizes, **options}


def _llama(**options: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    names = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {**names, **_SPECIAL_TOKENS, **sizes, **heads, **options}


def _mistral(**options: Any) -> dict[str, Any]:
    names = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return {**_llama(), **names, "rope_theta": 10000.0, **options}


def _qwen2(**options: Any) -> dict[str, Any]:
    names = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    return {**_llama(), **names, "rope_theta": 10000.0, **options}


# an original context of 64 puts channel pairs into all three bands of the llama3 rule, well within 500 positions
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS: dict[str, Variant] = {
    "gpt2_defaults": Variant(101, _gpt2(n_inner=None), bare_names=True),
    "gpt2_gelu_unscaled": Variant(302, _gpt2(activation_function="gelu", n_inner=48, scale_attn_weights=False)),
    "gpt2_quick_gelu_by_layer": Variant(
        3,
        _gpt2(
            n_layer=3,
            activation_function="quick_gelu",
            scale_attn_by_inverse_layer_idx=True,
            tie_word_embeddings=False,
        ),
    ),
    "gpt2_relu_unscaled_by_layer": Variant(
        4,
        _gpt2(
            activation_function="relu",
            scale_attn_weights=False,
            scale_attn_by_inverse_layer_idx=True,
            layer_norm_epsilon=1e-2,
        ),
    ),
    "gpt2_silu_untied": Variant(
        5, _gpt2(vocab_size=128, activation_function="silu", n_inner=40, tie_word_embeddings=False)
    ),
    "gpt2_gelu_pytorch_tanh": Variant(106, _gpt2(activation_function="gelu_pytorch_tanh", n_embd=36, n_head=3)),
    "llama_mha": Variant(7, _llama(rope_theta=10000.0, num_key_value_heads=None)),
    "llama_gqa_linear_type": Variant(
        8,
        _llama(
            rope_theta=500.0,
            rope_scaling={"type": "linear", "factor": 4.0},
            num_key_value_heads=2,
            attention_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "llama_mqa_llama3_parameters": Variant(
        9, _llama(rope_parameters={"rope_theta": 10000.0, **_LLAMA3}, num_key_value_heads=1, head_dim=16)
    ),
    "llama_gqa_llama3_scaling": Variant(
        10,
        _llama(
            rope_theta=50000.0,
            rope_scaling=_LLAMA3,
            num_key_value_heads=2,
            head_dim=16,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "llama_linear_parameters": Variant(
        11,
        _llama(
            vocab_size=128,
            rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 1000.0},
            num_key_value_heads=1,
            attention_bias=True,
            mlp_bias=True,
            hidden_act="gelu",
        ),
    ),
    "llama_default_parameters": Variant(
        112,
        _llama(
            rope_parameters={"rope_type": "default", "rope_theta": 200.0},
            hidden_size=36,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=10,
            hidden_act="gelu_pytorch_tanh",
            rms_norm_eps=1e-2,
        ),
    ),
    "mistral_no_window": Variant(13, _mistral(sliding_window=None, num_key_value_heads=2, head_dim=16)),
    # the window is the prompt's length: one token less, and the last position would not see the first
    "mistral_window_of_the_prompt": Variant(
        214, _mistral(sliding_window=PROMPT_TOKENS, max_position_embeddings=2048, num_key_value_heads=1)
    ),
    "qwen2_window_unused": Variant(
        15, _qwen2(use_sliding_window=False, sliding_window=64, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "qwen2_window_in_one_layer": Variant(
        16,
        _qwen2(
            use_sliding_window=True,
            sliding_window=PROMPT_TOKENS,
            max_window_layers=1,
            max_position_embeddings=1024,
            num_key_value_heads=1,
        ),
    ),
}

NEUTRAL: dict[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}

SAMPLING: dict[str, dict[str, float]] = {
    name: {**NEUTRAL, **settings}
    for name, settings in {
        "neutral": {},
        "cold": {"temperature": 0.1},
        "hot": {"temperature": 2.0},
        "top_k_1": {"top_k": 1},
        "top_k_7": {"top_k": 7},
        "top_k_beyond_vocab": {"top_k": 200},
        "top_p_tiny": {"top_p": 1e-4},
        "top_p_half": {"top_p": 0.5},
        "top_p_nearly_all": {"top_p": 0.999},
        "min_p": {"min_p": 0.05},
        "min_p_one": {"min_p": 1.0},
        "penalty_above_one": {"repetition_penalty": 1.7},
        "penalty_below_one": {"repetition_penalty": 0.6},
        "hot_top_k_top_p": {"temperature": 2.0, "top_k": 20, "top_p": 0.8},
        "cold_min_p": {"temperature": 0.5, "min_p": 0.02},
        "everything": {
            "temperature": 1.3,
            "top_k": 30,
            "top_p": 0.9,
            "min_p": 0.03,
            "repetition_penalty": 1.4,
        },
    }.items()
}
