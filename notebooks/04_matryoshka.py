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
# # Matryoshka weights: 8, 4 and 2 bits from one set of codes
#
# *On Colab:* File → Open notebook → GitHub, with the address of the repository, which then also goes into `REPOSITORY`
# below. In a clone nothing need be set.
#
# How nested codes are stored and read, the error they make in every layer, what that does to text and perplexity, and
# whether it pays to choose the precision per token.
#
# **Needs:** nothing. Where the Hugging Face hub can be reached it runs SmolLM2-135M-Instruct (270 MB to fetch, no account,
# no token), elsewhere the small GPT-2 that ships with the repository: some minutes on a CPU, or one or two. Fewer bits
# are fewer bytes to read, so they help where weights are read from memory (decoding, small batches), not in prefill.

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

# %%
import json
import math
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np

import qs_jax

sys.path.append(str(clone))
from notebooks.models import pick

MODEL = pick(REFERENCE / "gpt2")  # or any other model
WORK = Path(tempfile.mkdtemp())
BITS = (8, 4, 2)
COLOURS = {8: "#0b6e4f", 4: "#c05a12", 2: "#7a3fb0"}

# %% [markdown]
# ## Convert
#
# Every kernel becomes nested codes; the embedding and the head are always read at 8 bits, which costs nothing that can be measured.

# %%
# in a terminal: qs-convert MODEL ./planes --quantize matryoshka
command = [sys.executable, "-m", "convert.cli", str(MODEL), str(WORK / "planes"), "--quantize", "matryoshka"]
done = subprocess.run(command, capture_output=True, text=True)
print(done.stdout or done.stderr)

dense, planes = qs_jax.load(MODEL), qs_jax.load(WORK / "planes")

# %% [markdown]
# ## One code, three precisions
#
# Each weight has one 8-bit code. Its top 4 bits are a code in their own right, and so are its top 2: rounding is done
# so that the coarser codes are good ones, and each precision has its own scale per group. The codes lie in bit
# *planes*, so that a coarser reading touches fewer bytes.

# %%
path, layer = "mlp.down", 3
kernel, exact = (
    planes.network.blocks[layer].down.kernel.get_value(),
    dense.network.blocks[layer].down.kernel.get_value(),
)

row = np.asarray(exact)[0, :8]
print(f"eight weights of layer {layer}'s {path}, and how they read")
print("exact  ", *(f"{weight:+.4f}" for weight in row))
for bits in BITS:
    print(f"{bits} bits ", *(f"{weight:+.4f}" for weight in np.asarray(kernel.dequantise(bits))[0, :8]))

# %%
from qs_jax.kernels import plane_bytes

whole = sum(leaf.nbytes for leaf in jax.tree.leaves(dense.network))
print("bytes that a pass over the whole model reads, embedding and head included")
print(f"float32  {whole / 1e6:7.2f} MB")
for bits in BITS:
    read = plane_bytes(planes.network, bits)
    print(f"{bits} bits   {read / 1e6:7.2f} MB, {whole / read:.1f} times fewer")

# %% [markdown]
# ## Error per layer
#
# The manifest of a converted folder has the relative squared error of every kernel at every precision. Six decibels are one
# bit's worth.

# %%
manifest = json.loads((WORK / "planes" / "manifest.json").read_text())
entry = manifest["quantization"]
errors = {name: described["errors"]["weights"] for name, described in entry["kernels"].items()}
print(f"method {entry['method']}, {len(errors)} kernels, {entry['bits_per_weight']:.2f} bits per weight with scales")

figure, axes = plt.subplots(figsize=(8, 4), dpi=110)
kinds = sorted({name.split(".", 2)[2].removesuffix(".kernel") for name in errors if name.startswith("blocks.")})
depth = dense.config.num_hidden_layers
for bits in BITS:
    for number, kind in enumerate(kinds):
        decibels = [-10 * math.log10(errors[f"blocks.{n}.{kind}.kernel"][str(bits)]) for n in range(depth)]
        style = ("-", "--", ":", "-.", (0, (1, 4)), (0, (8, 2, 1, 2, 1, 2)), (0, (3, 5)))[number % 7]
        axes.plot(range(depth), decibels, linestyle=style, color=COLOURS[bits], alpha=0.8)
    axes.annotate(f"{bits} bits", (depth - 0.9, decibels[-1]), color=COLOURS[bits], weight="bold", va="center")
axes.set(xlabel="layer", ylabel="signal to noise of the weights, dB", xlim=(-0.2, depth + 0.4), ylim=(0, None))
axes.grid(alpha=0.3)
axes.legend(kinds, fontsize=8, ncol=len(kinds), loc="upper center", bbox_to_anchor=(0.5, 1.12))
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The same prompt at every precision

# %%
PROMPT = "Once upon a time, there was a little girl named Lily. One day she"
for name, loaded, bits in (("dense", dense, None), *((f"{bits} bits", planes, bits) for bits in BITS)):
    output = qs_jax.generate(
        loaded, PROMPT, bits=bits, max_new_tokens=40, do_sample=True, temperature=0.5, top_p=0.9, seed=3
    )
    print(f"[{name}] {PROMPT}{output.texts[0]}\n")

# %% [markdown]
# ## Perplexity
#
# A notebook that fetches nothing has no corpus: the dense model's own samples stand in for one, so what is measured is the
# departure from the dense model on the kind of text it writes. Set `TEXT` to a file of real text for a figure to rely on,
# or run `qs-jax eval MODEL --text test.txt --bits 4`.

# %%
from qs_jax.adaptive.policy import Policy, Precision
from qs_jax.corpus import read_documents
from qs_jax.evaluation.perplexity import evaluate
from qs_jax.evaluation.windows import Plan, cut

TEXT = None

if TEXT is None:
    samples = qs_jax.generate(
        dense,
        "Once upon a time",
        max_new_tokens=190,
        num_return_sequences=16,
        do_sample=True,
        temperature=0.8,
        seed=12,
        eos_token_id=[],
    )
    documents = ["Once upon a time" + text for text in samples.texts]
else:
    documents = read_documents(TEXT)

plan = Plan(prefix=32, window=64, max_tokens=1024, batch=8)
windows = cut(planes, documents, plan)
uniform = {bits: evaluate(planes, windows, Policy.off(), plan, bits=bits) for bits in BITS}
for bits, result in uniform.items():
    print(f"{bits} bits: perplexity {result['perplexity']:8.2f}, same most likely token {result['top1_agreement']:.1%}")

# %% [markdown]
# ## Bits per token
#
# Adaptive Matryoshka quantization reads 4 bits where the previous step's output had low entropy, else 8. Choosing at
# random, at the same mean, is the baseline that any such signal must beat: if its points lie no lower than the line
# of random choices, the signal does not work on this model.


# %%
def per_token(signal: str, threshold: float) -> tuple[float, float]:
    """Mean bits per weight, and perplexity. Thresholds are traced: one program serves them all."""
    precision = Precision(signal, four_below=threshold, layer=0)
    result = evaluate(planes, windows, Policy(name=signal, precision=precision), plan)
    return result["ledger"]["bits_mean"], result["perplexity"]


dense_end, coarse_end = (8.0, uniform[8]["perplexity"]), per_token("random", 1.0)
curves = {
    signal: [dense_end, *(per_token(signal, threshold) for threshold in thresholds), coarse_end]
    for signal, thresholds in {"previous_entropy": (2.0, 4.0, 6.0), "random": (0.25, 0.5, 0.75)}.items()
}
figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
for (name, points), style in zip(curves.items(), ("o-", "s--"), strict=True):
    axes.plot([bits for bits, _ in points], [perplexity for _, perplexity in points], style, label=name)
axes.set(xlabel="mean bits per weight of the scored tokens", ylabel="perplexity")
axes.grid(alpha=0.3)
axes.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# [docs/method.md](../docs/method.md) says how this joins halting in one ladder of precision: with `kv_rule="shallow"` a
# halted token is not stopped but demoted to fewer bits.
