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
# # Llama on a TPU
#
# *On Colab:* File → Open notebook → GitHub, with the address of the repository, which then also goes into `REPOSITORY`
# below. In a clone nothing need be set.
#
# A gated model from the hub, converted on a runtime with little memory, in bfloat16 on an accelerator.
#
# **Needs, for the real thing:** a TPU or GPU runtime (*Runtime → Change runtime type*; a free v5e-1 has 16 GB), and a
# Hugging Face token with access to the model: accept its licence on its hub page, then put the token into Colab's
# secrets (the key icon, name `HF_TOKEN`) or the environment variable `HF_TOKEN`.
#
# **Without a token** every cell runs with SmolLM2-135M-Instruct, which needs none, **without the hub** with the small Llama
# that ships with the repository, on whatever device there is, and says so.

# %% [markdown]
# ## Install
#
# The runtime's own `jax`, its drivers and `numpy` are pinned to the versions that are there, and never changed.

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
# ## Devices and memory
#
# A TPU runtime has one core (v5e-1) or several (v2-8, v5e-8), which share a model below. What counts is the accelerators' memory for weights and cache, the host's memory for conversion, and the disk for the
# download and the converted folder.

# %%
import shutil

import jax

devices = jax.devices()
device = devices[0]
stats = device.memory_stats() or {}
host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
room = len(devices) * stats["bytes_limit"] if "bytes_limit" in stats else host

print(f"jax {jax.__version__}, {device.platform}: {len(devices)} x {device.device_kind}")
for name, size in {"device memory": room, "host memory": host, "free disk": shutil.disk_usage(here).free}.items():
    print(f"{name:14} {size / 1e9:8.1f} GB")
if device.platform == "cpu":
    print("no accelerator: bfloat16 is slow on a CPU, so weights are loaded in float32 here")

# %% [markdown]
# ## Token and model

# %%
sys.path.append(str(clone))
from notebooks.models import pick

WANTED = "meta-llama/Llama-3.2-1B-Instruct"  # or meta-llama/Llama-2-7b-chat-hf, on a device with 24 GB or more


def hub_token() -> str | None:
    """The token from Colab's secrets, the environment, or an earlier login."""
    try:
        from google.colab import userdata

        return userdata.get("HF_TOKEN")
    except Exception:  # not on Colab, no such secret, or no permission to read it
        from huggingface_hub import get_token

        return get_token()


def hub_bytes(name: str, token: str) -> int:
    """Size of a model's safetensors on the hub, without downloading them."""
    from huggingface_hub import model_info

    files = model_info(name, token=token, files_metadata=True).siblings or []
    return sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))


source, token = None, hub_token()
if token is None:
    print(f"no token: {WANTED} stays on the hub, and another model takes its place")
else:
    os.environ["HF_TOKEN"] = token
    try:
        size = hub_bytes(WANTED, token)
        fits = size < 0.8 * room and 2.2 * size < shutil.disk_usage(here).free
        print(f"{WANTED}: {size / 1e9:.1f} GB of weights,", "fits" if fits else "too large for this runtime")
        source = WANTED if fits else None
    except Exception as error:  # gated without access, no network, no such model
        print(f"{WANTED} cannot be had ({type(error).__name__}); another model takes its place")
source = source or pick(REFERENCE / "llama")

# %% [markdown]
# ## Convert on a small runtime
#
# Conversion reads one tensor at a time and writes one part (the embedding, a layer, the head) at a time, so it needs
# memory for the largest part, not for the model. It runs in a process of its own here, and the most memory that process
# had is measured. Much of it is Python and JAX themselves; `benchmarks/results/large_conversion.json` has a model of
# 1.1 billion parameters.

# %%
import json
import tempfile

WORK = Path(tempfile.mkdtemp())
MEASURED = """
import json, resource, sys
from convert.cli import main
try:
    main()
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kibibytes on Linux
    print(json.dumps({"peak_bytes": 1024 * peak}))
"""

# in a terminal: qs-convert MODEL ./llama --dtype bfloat16
command = [sys.executable, "-c", MEASURED, source, str(WORK / "llama"), "--dtype", "bfloat16", "--json"]
done = subprocess.run(command, capture_output=True, text=True)
if done.returncode:
    raise SystemExit(done.stderr)
report, peak = map(json.loads, done.stdout.splitlines())
print(f"{report['parameters'] / 1e6:.1f} million parameters, {report['bytes_out'] / 1e6:.1f} MB in bfloat16")
print(f"{report['seconds']:.1f} s; the process had at most {peak['peak_bytes'] / 1e6:.0f} MB, Python and JAX included")

# %% [markdown]
# ## Load
#
# Straight onto the devices, part by part, in bfloat16 on accelerators. The cache of keys and values comes on top.
#
# With several devices a *mesh* divides the model over all of them: heads, feed-forward channels and the vocabulary, so
# that each reads its share of the weights, and holds no more; what does not divide lies whole on each, and is noted. With
# one device `model=1` is no mesh, and everything below is what it would be without. The text is the same either way.

# %%
import qs_jax

model = qs_jax.load(WORK / "llama", mesh=f"model={len(devices)}")
config = model.config
print("a mesh of" if len(devices) > 1 else "no mesh:", len(devices), "device" + "s" * (len(devices) > 1))
for note in model.notes:
    print(note)
shards = [shard for leaf in jax.tree.leaves(model.network) for shard in leaf.addressable_shards]
held = sum(shard.data.nbytes for shard in shards if shard.device == device)
print(f"{held / 1e9:.3f} GB of weights on each")
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.network))
per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
tokens = int((0.9 * room - weights) // per_token)

print(f"{config.num_hidden_layers} layers, {config.hidden_size} wide, context {config.max_position_embeddings}")
print(f"{weights / 1e9:.3f} GB of weights in {model.dtype.name}, {per_token / 1e3:.1f} kB of cache per token")
print(f"room for {tokens:,} cached tokens: {tokens // config.max_position_embeddings:,} rows of full context")

# %% [markdown]
# ## Generate
#
# With a chat template where the model has one, as plain text otherwise.

# %%
question = "Tell me a very short story about a dog and a red ball."
chat = model.tokenizer is not None and model.tokenizer.has_chat_template
prompt = (
    [{"role": "user", "content": question}] if chat else "Once upon a time, there was a dog who had a red ball. One"
)

settings = {"max_new_tokens": 64, "do_sample": True, "temperature": 0.7, "top_p": 0.95, "seed": 5}
print(question if chat else prompt, end="\n\n" if chat else "")
for piece in qs_jax.stream(model, prompt, **settings):
    print(piece.text, end="", flush=True)

# %% [markdown]
# ## How fast
#
# Decoding one row reads every weight once per token, so the measure is the share of the device's memory bandwidth that
# is reached. A batch shares each read. The bandwidth is measured in the same call; on a machine that others use as
# well, neither figure is steady.

# %%
from qs_jax.evaluation.benchmark import benchmark

print("batch   tokens/s   ms a step   of bandwidth")
for batch in (1, 8):
    figures = benchmark(model, batch=batch, prompt_tokens=128, new_tokens=64)
    share, step = figures["bandwidth_fraction"], figures["decode_ms_per_step"]
    print(f"{batch:5} {figures['tokens_per_second']:10.1f} {step:11.2f} {share:14.0%}")

# %% [markdown]
# ## Spend less on the prompt
#
# The same prompt, long enough to matter, dense and under a policy: the one that was calibrated for the model, if it lies
# beside it as `policy.json`, else `balanced`, which is safe uncalibrated and saves little; `qs-jax calibrate MODEL --text train.txt` makes one.

# %%
beside = Path(source) / "policy.json"
chosen = beside if beside.is_file() else "balanced"
story = " ".join(["Once upon a time there was a dog who had a red ball. He took the ball to the park every day."] * 8)
for policy in ("off", chosen):
    qs_jax.generate(model, story, policy=policy, max_new_tokens=16)  # compiles
    output = qs_jax.generate(model, story, policy=policy, max_new_tokens=16)
    ledger, timing = output.ledger, output.timing
    print(
        f"{getattr(policy, 'name', policy):12} prefill {1e3 * timing['prefill_s']:7.1f} ms, {ledger['flops'] / 1e9:7.2f} GFLOP, "
        f"saved {ledger['flops_reduction']:5.1%}"
    )

# %% [markdown]
# From here: [03_adaptive_inference](03_adaptive_inference.ipynb) shows what each mechanism does to the text, and
# calibrates a policy to a budget of quality.
