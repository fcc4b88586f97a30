"""Which model a notebook runs: a real one from the hub where that can be reached, else a small one that ships here.

`QS_JAX_NOTEBOOK_MODEL` names another: a hub id, a folder or a GGUF file. `HF_HUB_OFFLINE=1` keeps to the small one.
"""

import os
import threading
from pathlib import Path

REAL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""135 million parameters, 30 layers, Apache-2.0, 270 MB to fetch; no account and no token."""

CHOICE = "QS_JAX_NOTEBOOK_MODEL"
SECONDS = 5.0
"""How long the hub may take to say that it has the model."""


def pick(shipped: Path) -> str:
    """What `qs_jax.load` and `qs-convert` take; says which model that is, and why."""
    if chosen := os.environ.get(CHOICE):
        print(f"{chosen}, as {CHOICE} says")
        return chosen
    if is_reachable(REAL):
        print(f"{REAL}, from the hub")
        return REAL
    print(f"the hub is out of reach: the small {shipped.name} that ships with the repository takes the place of {REAL}")
    return str(shipped)


def is_reachable(name: str, seconds: float = SECONDS) -> bool:
    """Whether the hub answers for a model in that time. Asked in a thread of its own: without a network the look-up of
    a host's name alone may take longer, and knows no time limit."""
    answers: list[bool] = []

    def ask() -> None:
        from huggingface_hub import model_info

        try:
            answers.append(bool(model_info(name, timeout=seconds, token=False).siblings))
        except Exception:  # what a network raises is its client's own
            answers.append(False)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answers == [True]
