# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart
#
# *On Colab:* File → Open notebook → GitHub, with the address of the repository, which then also goes into `REPOSITORY`
# below. In a clone nothing need be set.
#
# Convert a Hugging Face model, generate with it, stream from it, and see what its calibrated policy saves.
#
# **Needs:** nothing. Where the Hugging Face hub can be reached it runs SmolLM2-135M-Instruct (270 MB to fetch, no account,
# no token), elsewhere a small Llama that ships with the repository: a few minutes on a CPU, or one. On a GPU or TPU runtime
# the same cells use that device.

# %% [markdown]
# ## Install
#
# In a clone this installs the package where it is missing; elsewhere it fetches the repository first. The runtime's own
# `jax`, its drivers and `numpy` are pinned to the versions that are there: they were built for the machine's accelerator
# and are never changed.

# %%
import importlib.util
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

REPOSITORY = os.environ.get("QS_JAX_REPOSITORY", "")  # where to clone from; not needed in a clone

here = Path.cwd()
places = [here, *here.parents, here / "qs_jax_repository"]
clone = next((p for p in places if (p / "reference_models" / "llama" / "config.json").is_file()), None)
if clone is None:
    clone = places[-1]
    assert REPOSITORY, "set REPOSITORY to the address that this notebook was opened from, and run the cell again"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, str(clone)], check=True)
if importlib.util.find_spec("qs_jax") is None:
    kept = [d for d in distributions() if d.name.lower().startswith(("jax", "libtpu", "numpy"))]
    Path("kept.txt").write_text("\n".join(f"{d.name}=={d.version}" for d in kept))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-c", "kept.txt", str(clone)], check=True)

REFERENCE = clone / "reference_models"

# %% [markdown]
# ## Which device
#
# On Colab: *Runtime → Change runtime type*. Weights are loaded in float32 on a CPU and in bfloat16 elsewhere.

# %%
import jax

print("jax", jax.__version__, "on", *(f"{device.platform}: {device.device_kind}" for device in jax.devices()))

# %% [markdown]
# ## Convert
#
# `qs-convert` takes a Hugging Face folder or a hub id such as `openai-community/gpt2`, checks every tensor's name, shape
# and values, and writes a folder with checksums. It works part by part, so the model may be larger than memory.
# `--verify` compares logits on a 500-token prompt with transformers (where torch is installed) or with the original.

# %%
import tempfile

sys.path.append(str(clone))
from notebooks.models import pick

SOURCE = pick(REFERENCE / "llama")  # or "openai-community/gpt2"
WORK = Path(tempfile.mkdtemp())

# in a terminal: qs-convert SOURCE ./model --verify
command = [sys.executable, "-m", "convert.cli", str(SOURCE), str(WORK / "model"), "--verify"]
done = subprocess.run(command, capture_output=True, text=True)
print(done.stdout or done.stderr)

# %% [markdown]
# ## Generate

# %%
import qs_jax

model = qs_jax.load(WORK / "model")
print(f"{model.config.num_hidden_layers} layers, {model.config.hidden_size} wide, {model.dtype.name}")

output = qs_jax.generate(model, "Once upon a time", max_new_tokens=48, do_sample=True, temperature=0.7, seed=1)
print("Once upon a time" + output.texts[0])

# %% [markdown]
# The first call compiles; the second one does not, whatever the prompt, the temperature or the seed.

# %%
again = qs_jax.generate(model, "The old house", max_new_tokens=48, do_sample=True, temperature=0.9, seed=2)
for name, timing in {"first call": output.timing, "second call": again.timing}.items():
    print(f"{name:12} {timing['total_s']:6.2f} s, of which compiling {timing['compile_s']:5.2f} s")

# %% [markdown]
# ## A batch
#
# Prompts may be of any lengths. A row gets what it would get alone, to the token.

# %%
PROMPTS = ["Once upon a time", "The old house stood at the end of the road, and nobody", "She said"]
settings = {"max_new_tokens": 32, "do_sample": True, "temperature": 0.7, "seed": 3}
batch = qs_jax.generate(model, PROMPTS, **settings)
for prompt, text, reason in zip(PROMPTS, batch.texts, batch.finish_reasons, strict=True):
    print(f"[{reason}] {prompt}{text}\n")

alone = qs_jax.generate(model, PROMPTS[0], **settings)
print("the first row alone is the same:", alone.tokens[0] == batch.tokens[0])

# %% [markdown]
# ## Stream

# %%
for piece in qs_jax.stream(model, "One day, a boy", max_new_tokens=48, do_sample=True, temperature=0.7, seed=4):
    print(piece.text, end="", flush=True)

# %% [markdown]
# ## Spend less
#
# A policy says which tokens may be computed with less. One that was calibrated for a model lies beside it as `policy.json`,
# as with the small models that ship here; for another there is `balanced`, which is safe uncalibrated and saves next to
# nothing. Everything is counted as executed, beside the dense model, in the ledger. What a policy may do differs from model
# to model: the small ones allow far more than a well-trained model does. Notebook `03_adaptive_inference` shows the mechanisms
# one by one, and how a policy is calibrated to a budget of quality.

# %%
LONG = " ".join(
    [
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine with her dog.",
        "One day, Lily and her dog went to the park. They saw a big tree with many red apples. Lily was very happy.",
        'She said, "Look, there are so many apples!" Her mom smiled and said, "Yes, Lily. You can take one." Lily',
    ]
)
beside = WORK / "model" / "policy.json"
for policy in ("off", beside if beside.is_file() else "balanced"):
    output = qs_jax.generate(model, LONG, policy=policy, **settings)
    ledger = output.ledger
    print(
        f"{getattr(policy, 'name', policy):12} {ledger['flops'] / 1e9:6.3f} GFLOP, saved {ledger['flops_reduction']:6.1%}; "
        f"{ledger['layers_run_mean']:5.2f} layers per token\n          …{output.texts[0]!r}"
    )

# %% [markdown]
# ## From here
#
# * Your own model: `qs_jax.load("path/to/a/hugging-face/folder")` for GPT-2, Llama, Mistral or Qwen2 in safetensors; it
#   need not be converted first.
# * On the command line: `qs-jax generate MODEL --prompt "Once upon a time"`, `qs-jax --help`.
# * [02_llama_on_tpu](02_llama_on_tpu.ipynb): a gated model from the hub in bfloat16.
# * [03_adaptive_inference](03_adaptive_inference.ipynb): the four mechanisms.
# * [04_matryoshka](04_matryoshka.ipynb): one set of weights, read at 8, 4 or 2 bits.
# * [05_exact_mode](05_exact_mode.ipynb): the same text in fewer passes over the weights.
