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
# # Adaptive inference, one mechanism at a time
#
# *On Colab:* File → Open notebook → GitHub, with the address of the repository, which then also goes into `REPOSITORY`
# below. In a clone nothing need be set.
#
# What each of the four mechanisms does to a text, in colour; what it costs in perplexity; and how a policy is calibrated
# to a budget of quality, tested on text it was not chosen on.
#
# **Needs:** nothing. Where the Hugging Face hub can be reached it runs SmolLM2-135M-Instruct (270 MB to fetch, no account,
# no token), elsewhere the small Llama that ships with the repository: a few minutes on a CPU, with SmolLM2 far more. Any model that
# `qs_jax.load` takes goes in its place; on an accelerator a larger one is more telling.

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
import tempfile

import jax
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

import qs_jax
from qs_jax.adaptive.policy import Fusion, Halting, Policy, Precision

sys.path.append(str(clone))
from notebooks.models import pick

MODEL = pick(REFERENCE / "llama")  # or any other model
TEXT = None  # or a text file of yours, for calibration and for judging; see below

model = qs_jax.load(MODEL)
depth = model.config.num_hidden_layers
print(f"{depth} layers on {jax.default_backend()}")

# %% [markdown]
# ## What is spent on a token
#
# `generate` returns a trace: for every token of the prompt and of the output, how many layers it ran, whether it was fused
# into another, and at how many bits weights were read. The figures below draw it over the text: **the greener, the
# fewer layers**; a dotted line marks a prompt token that was fused into a later one, a purple line a token that read
# fewer bits. New text is bold.

# %%
COLUMNS = 92


def tokens_of(prompt: str, output: qs_jax.GenerateOutput, loaded: qs_jax.Model) -> list[dict]:
    """Every token of a prompt and its continuation, and what was spent on it."""
    trace, tokenizer = output.trace, loaded.tokenizer
    _, pieces = tokenizer.encode_with_pieces(prompt)
    run, fused = trace["prompt_layers_run"][0], trace["prompt_fused_with"][0]
    before = [
        {"text": text, "layers": layers, "fused": into >= 0, "bits": 8.0, "new": False}
        for text, layers, into in zip(pieces, run, fused, strict=True)
    ]
    spent = zip(output.tokens[0], trace["layers_run"][0], trace["bits"][0], strict=True)
    return before + [
        {"text": tokenizer.decode([token]), "layers": layers, "fused": False, "bits": bits, "new": True}
        for token, layers, bits in spent
    ]


def draw(tokens: list[dict], title: str, size: float = 8.5) -> None:
    """The text on a grid of characters, each token on what was spent on it."""
    places, column, line = [], 0, 0
    for token in tokens:
        for word in token["text"].replace("\n", "⏎"):
            if column == COLUMNS:
                column, line = 0, line + 1
            places.append((column, line, word, token))
            column += 1
    wide, high = COLUMNS * 0.602 * size / 72, (line + 2.4) * 1.7 * size / 72
    figure = plt.figure(figsize=(wide, high), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, COLUMNS), ylim=(line + 1, -1.4))
    axes.axis("off")
    axes.text(0, -0.9, title, fontsize=size, weight="bold", va="center")
    for x, y, letter, token in places:
        saved = 1 - token["layers"] / depth
        face = (1 - 0.75 * saved, 1 - 0.25 * saved, 1 - 0.6 * saved)
        axes.add_patch(Rectangle((x, y), 1, 0.92, facecolor=face, edgecolor="none"))
        if token["fused"]:
            axes.plot([x, x + 1], [y + 0.95] * 2, ":", color="#c05a12", linewidth=1.4)
        if token["new"] and token["bits"] < 8:
            axes.plot([x, x + 1], [y + 0.95] * 2, "-", color="#7a3fb0", linewidth=1.2)
        weight = "bold" if token["new"] else "normal"
        axes.text(x + 0.5, y + 0.5, letter, family="monospace", fontsize=size, weight=weight, ha="center", va="center")
    plt.show()


PROMPT = " ".join(
    [
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine with her dog.",
        "One day, Lily and her dog went to the park. They saw a big tree with many red apples. Lily was very happy.",
        'She said, "Look, there are so many apples!" Her mom smiled and said, "Yes, Lily. You can take one." Lily',
    ]
)
SETTINGS = {"max_new_tokens": 32, "do_sample": True, "temperature": 0.7, "seed": 7}


def show(policy: Policy | str, title: str, loaded: qs_jax.Model = model) -> None:
    """Generate under a policy, draw the text, and say what was saved."""
    output = qs_jax.generate(loaded, PROMPT, policy=policy, **SETTINGS)
    draw(tokens_of(PROMPT, output, loaded), title)
    ledger = output.ledger
    print(
        f"saved {ledger['flops_reduction']:.1%} of FLOPs, {ledger['bytes_reduction']:.1%} of weight bytes, "
        f"{1 - ledger['kv_slots'] / ledger['kv_slots_off']:.1%} of cache slots; "
        f"{ledger['layers_run_mean']:.2f} of {depth} layers per token"
    )


show("off", "dense")

# %% [markdown]
# ### Dynamic token halting
#
# A token whose state has settled takes no further layers. Here a prompt token halts after the layer at which its
# relative drift ‖h_l − h_{l−1}‖ / ‖h_{l−1}‖ is below a threshold. The first tokens and the last ones never halt. The
# threshold is a guess for this figure; calibration, below, places it.

# %%
layers = tuple(range(depth // 2, depth, 2))
halting = Halting("relative_drift", 0.12, layers=layers)
show(
    Policy(name="halting", prompt_halting=halting), f"halting: prompt tokens, after layers {layers[0]} to {layers[-1]}"
)

# %% [markdown]
# ### KV skipping
#
# What do deeper layers see of a halted token? `frozen`, above, projects keys and values from its last state: a few per cent
# of a layer's work. `drop` leaves nothing: deeper caches are shorter, and attention there costs less. `zero` is the
# paper to the letter, a key and a value of zeros, which still take their share of the softmax.

# %%
dropped = Policy(name="halting + KV skipping", prompt_halting=halting, kv_rule="drop")
show(dropped, "the same, and halted tokens leave nothing in deeper caches")

# %% [markdown]
# ### Contextual token fusion
#
# Near-equal neighbours of the prompt go on as one token, their mean. Only tokens strictly before everything that is scored
# may fuse: fusing t with t + 1 would show position t its own target.

# %%
fusion = Fusion("cosine", 0.5, layers=(depth // 2,))
show(
    Policy(name="fusion", fusion=fusion), f"fusion: neighbours within a cosine distance of 0.5 after layer {depth // 2}"
)

# %% [markdown]
# ### Adaptive Matryoshka quantization
#
# Weights stored as nested codes can be read at 8, 4 or 2 bits, per token. The entropy of the previous step's output is
# free; where the model was sure, the next token reads 4 bits. This needs weights converted with
# `qs-convert --quantize matryoshka`; notebook `04_matryoshka` looks inside.

# %%
WORK = Path(tempfile.mkdtemp())
command = [sys.executable, "-m", "convert.cli", str(MODEL), str(WORK / "planes"), "--quantize", "matryoshka"]
done = subprocess.run(command, capture_output=True, text=True)
print(done.stdout or done.stderr)

# %%
planes = qs_jax.load(WORK / "planes")
precision = Policy(name="precision", precision=Precision("previous_entropy", four_below=4.0, layer=0))
show(precision, "4 bits where the last step's entropy was below 4 bits, else 8", planes)

# %% [markdown]
# ### All at once
#
# Of the presets `balanced` does what is safe uncalibrated on every model measured, which is next to nothing, and `paper`
# has the paper's own thresholds, taken literally; on another model they may do very little or far too much.

# %% tags=["docs=adaptive_text"]
together = Policy(
    name="together", prompt_halting=halting, kv_rule="frozen", fusion=fusion, precision=precision.precision
)
show(together, f"{Path(MODEL).name}, halting + fusion + precision: green ran fewer layers, purple read 4 bits", planes)

# %% [markdown]
# ## What it costs: text to calibrate and to judge on
#
# Perplexity is measured by forcing text through the very steps that generate, after a prefix that went through the same
# prefill. A policy is chosen on one text and judged on another.
#
# A notebook that fetches nothing has no corpus. **Here the dense model's own samples stand in for one**: what they measure
# is how far a policy departs from the dense model on the kind of text that the model itself writes. For a figure to rely on,
# set `TEXT` to real text that neither the model nor the policy has seen.

# %%
from qs_jax.corpus import read_documents
from qs_jax.evaluation.windows import Plan, cut

if TEXT is None:
    samples = qs_jax.generate(
        model,
        "Once upon a time",
        max_new_tokens=230,
        num_return_sequences=32,
        do_sample=True,
        temperature=0.8,
        seed=11,
        eos_token_id=[],
    )
    documents = ["Once upon a time" + text for text in samples.texts]
else:
    documents = read_documents(TEXT)
    if len(documents) < 8:  # one long text: in pieces
        documents = [documents[0][n : n + 2000] for n in range(0, len(documents[0]), 2000)]

share = 3 * len(documents) // 4
plan = Plan(prefix=128, window=32, max_tokens=1024, batch=8)
to_calibrate, to_judge = cut(model, documents[:share], plan), cut(model, documents[share:], plan)
print(f"{len(to_calibrate)} windows to calibrate on, {len(to_judge)} others to judge on")
print(documents[share][:300])

# %% [markdown]
# ## Calibrate
#
# The search tries uniform stops of the prompt, per-token choices around them, fusion, and halting of generated tokens,
# on a quarter of the calibration windows. The rest tests its best policies, from safe to bold, and stops at the first that
# cannot be trusted with 90 % confidence to stay within the budget (learn then test, arXiv 2110.01052). With as little
# text as here the test is strict, and may trust nothing: the policy is then off, which is an answer.
#
# In a terminal: `qs-jax calibrate MODEL --text train.txt --max-ppl-increase 0.2`, which writes `policy.json` beside the
# model.

# %%
from qs_jax.evaluation.goal import Goal
from qs_jax.evaluation.study import calibrate_model

found = calibrate_model(model, to_calibrate, plan, [Goal(budget=0.2)])[0]
for row in found.to_json()["tested"]:
    verdict = "trusted" if row["accepted"] else "not trusted"
    print(
        f"{row['flops_reduction']:6.1%} of FLOPs saved: perplexity {row['perplexity_increase']:+.3f}, "
        f"at most {row['upper']:+.3f} with 90 % confidence: {verdict}"
    )
print("chosen:", ", ".join(found.policy.mechanisms) or "off")
found.policy.save(WORK / "policy.json")

# %%
beside = Path(MODEL) / "policy.json"
chosen = Policy.load(beside) if beside.is_file() else found.policy if found.policy.mechanisms else Policy.balanced()
show(chosen, f"policy: {chosen.name}")

# %% [markdown]
# ## Judge: FLOPs saved against perplexity
#
# On windows that took no part in the calibration. The line stops *every* prompt token after the same layer: the
# baseline that choosing per token must beat. Bars are 95 % intervals, from a paired bootstrap over windows.

# %%
from qs_jax.evaluation.baselines import uniform_stops
from qs_jax.evaluation.candidates import Space
from qs_jax.evaluation.perplexity import evaluate

stops = uniform_stops(Space.of(depth, planes=False), plan.prefix)
judged = {policy.name: evaluate(model, to_judge, policy, plan) for policy in stops}
# as the search ran it, idle mechanisms included: that program is compiled already
subject = found.searched if chosen is found.policy else chosen
result = evaluate(model, to_judge, subject, plan)

print(f"dense perplexity {result['perplexity_off']:.2f}")
for name, one in {**judged, chosen.name: result}.items():
    low, high = one["perplexity_increase_interval"]
    print(
        f"{name:24} saved {one['ledger']['flops_reduction']:6.1%} of FLOPs, "
        f"perplexity {one['perplexity_increase']:+.3f} ({low:+.3f} to {high:+.3f})"
    )


# %%
def point(result: dict) -> tuple[float, float, tuple[list[float], list[float]]]:
    """FLOPs saved in per cent, perplexity increase, and the interval around it."""
    saved, increase = 100 * result["ledger"]["flops_reduction"], result["perplexity_increase"]
    low, high = result["perplexity_increase_interval"]
    return saved, increase, ([max(0.0, increase - low)], [max(0.0, high - increase)])


figure, axes = plt.subplots(figsize=(7, 4), dpi=110)
line = [point(one) for one in judged.values()]
axes.plot([x for x, *_ in line], [y for _, y, _ in line], "s-", color="#c05a12", label="every prompt token, one layer")
x, y, bars = point(result)
axes.errorbar([x], [y], yerr=bars, fmt="o", color="#0b6e4f", capsize=3, label=chosen.name)
axes.plot([0], [0], "ok", label="dense")
axes.axhline(0.2, color="grey", linestyle=":", label="budget 0.2")
axes.set(xlabel="FLOPs saved, % (prompt and scored tokens)", ylabel="perplexity increase")
axes.set_ylim(max(-1.0, axes.get_ylim()[0]), min(2.0, axes.get_ylim()[1]))
axes.grid(alpha=0.3)
axes.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Read further
#
# [docs/method.md](../docs/method.md) says what each mechanism does and where it departs from the paper;
# [docs/results.md](../docs/results.md) how the study is made. `qs-jax eval MODEL --text test.txt --ablate --json >
# table.json` and `qs-jax report table.json --out report.html` make the whole table, with every combination, on any
# model and text.
