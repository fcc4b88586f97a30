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
# # Exact mode: the same text in fewer passes
#
# *On Colab:* File → Open notebook → GitHub, with the address of the repository, which then also goes into `REPOSITORY`
# below. In a clone nothing need be set.
#
# A draft proposes tokens, the dense model decides on several of them in one pass over its weights, and the text is that of
# plain decoding. What is drafted, what of it is right, and what that costs and saves.
#
# **Needs:** nothing. Where the Hugging Face hub can be reached it runs SmolLM2-135M-Instruct (270 MB to fetch, no account,
# no token), elsewhere the small Llama that ships with the repository: some minutes on a CPU, or one or two. Times mean
# little on so small a model as that; [docs/speed.md](../docs/speed.md) and the README have those of a real one.

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

sys.path.append(str(clone))
from notebooks.models import pick

MODEL = pick(REFERENCE / "llama")  # or any other model
WORK = Path(tempfile.mkdtemp())

model = qs_jax.load(MODEL)
print(f"{model.config.num_hidden_layers} layers in {model.dtype.name} on {jax.default_backend()}")

# %% [markdown]
# ## The same text
#
# Plainly, a pass over the weights makes one token. In exact mode it runs the last token and the drafts behind it, and keeps
# what the dense model would have chosen itself: the drafts that are right from the first on, and its own token behind them.
# With `draft="lookup"` a draft is what followed the last few tokens where they stood earlier in the text.
#
# Noise belongs to seed, row and position, so that sampled text is the same text, too. What could part the two is rounding, as
# a pass over several tokens sums in another order ([docs/method.md](../docs/method.md#exact-mode)).

# %%
PROMPT = " ".join(
    [
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine with her dog.",
        "One day, Lily and her dog went to the park. They saw a big tree with many red apples. Lily was very happy.",
        'She said, "Look, there are so many apples!" Her mom smiled and said, "Yes, Lily. You can take one." Lily',
    ]
)
GREEDY = {"max_new_tokens": 64, "do_sample": False}
SAMPLED = {"max_new_tokens": 64, "do_sample": True, "temperature": 0.7, "seed": 7}

plain = qs_jax.generate(model, PROMPT, **GREEDY)
exact = qs_jax.generate(model, PROMPT, exact=True, draft="lookup", **GREEDY)
plain_sampled = qs_jax.generate(model, PROMPT, **SAMPLED)
exact_sampled = qs_jax.generate(model, PROMPT, exact=True, draft="lookup", **SAMPLED)
for name, one, other in (("greedy", plain, exact), ("sampled", plain_sampled, exact_sampled)):
    print(
        f"{name:8} the same tokens: {other.tokens == one.tokens}; passes {one.timing['decode_steps']} plainly, "
        f"{other.timing['decode_steps']} in exact mode"
    )

# %% [markdown]
# ## What the rounds did
#
# The trace says of every token whether it was a draft (`from_draft`) and which round it is of (`in_round`, -1 for plain
# steps). In the figures **a bar begins a round**; drafts that were right are green and underlined; what the dense model chose
# itself in a round is bold; the prompt's end is grey. A wrong draft leaves nothing in the text: it costs its share of the pass, and shows as a short round.

# %%
COLUMNS = 92


def draw(prompt: str, output: qs_jax.GenerateOutput, title: str, row: int = 0, size: float = 8.5) -> None:
    """The end of a prompt and a row's continuation on a grid of characters, each token by what made it."""
    trace, asked = output.trace, "…" + prompt[-60:]
    tokens = [(asked, False, -1)]
    tokens += zip(output.pieces[row], trace["from_draft"][row], trace["in_round"][row], strict=True)
    letters = [
        (letter, drafted, number, number >= 0 and number != before and place == 0)
        for (_, _, before), (text, drafted, number) in zip([tokens[0], *tokens], tokens, strict=False)
        for place, letter in enumerate(text.replace("\n", "⏎"))
    ]
    lines = (len(letters) - 1) // COLUMNS + 1
    figure = plt.figure(figsize=(COLUMNS * 0.602 * size / 72, (lines + 1.4) * 1.7 * size / 72), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, COLUMNS), ylim=(lines, -1.4))
    axes.axis("off")
    axes.text(0, -0.9, title, fontsize=size, weight="bold", va="center")
    for place, (letter, drafted, number, begins) in enumerate(letters):
        y, x = divmod(place, COLUMNS)
        if drafted:
            axes.add_patch(Rectangle((x, y), 1, 0.92, facecolor="#cfe8dd", edgecolor="none"))
            axes.plot([x, x + 1], [y + 0.95] * 2, "-", color="#0b6e4f", linewidth=1.2)
        if begins:
            axes.plot([x, x], [y, y + 0.95], "-", color="#62636b", linewidth=1.2)
        weight = "bold" if number >= 0 and not drafted else "normal"
        style = {"family": "monospace", "fontsize": size, "weight": weight, "ha": "center", "va": "center"}
        axes.text(x + 0.5, y + 0.5, letter, color="grey" if place < len(asked) else "black", **style)
    plt.show()


draw(PROMPT, exact, "greedy, drafts looked up")
draw(PROMPT, exact_sampled, "sampled, drafts looked up")

# %% [markdown]
# `qs-jax generate MODEL --prompt "…" --exact --json > text.json` and `qs-jax report text.json --out report.html` draw the same
# as a page, with each token's figures.

# %% [markdown]
# ## What it costs and saves
#
# FLOPs go up: every draft is run, right or wrong. Bytes of weights go down: a pass reads the weights once, however many of its
# tokens are kept. The ledger counts both beside plain decoding of the same text, prompt included. Where reading weights takes
# the time, fewer bytes are less time; where computing does, exact mode loses.


# %%
def told(name: str, output: qs_jax.GenerateOutput, beside: qs_jax.GenerateOutput) -> None:
    """A line of what drafts came to, beside plain decoding."""
    timing, ledger = output.timing, output.ledger
    print(
        f"{name:16} same tokens: {output.tokens == beside.tokens}; {timing['decode_steps']:3} passes, "
        f"{timing['accepted']:3} of {timing['drafted']:3} drafts right; FLOPs {ledger['flops'] / ledger['flops_off']:.2f} ×, "
        f"bytes {ledger['weight_bytes'] / ledger['weight_bytes_off']:.2f} × of plain"
    )


told("lookup, greedy", exact, plain)
told("lookup, sampled", exact_sampled, plain_sampled)

# %% [markdown]
# ## `auto`: only where it pays
#
# Without `draft` the text is decoded plainly, replayed on the host as rounds would have gone, and drafted where that promises
# a gain that measured times then keep. A program for rounds that is not compiled yet must first have missed saving enough.
# So what `auto` does is a matter of the machine and of what ran before: the same call is made three times here, on text that
# repeats itself and on text that does not. `plain steps` is where it fell back.

# %%
REPEATING = "The dog said hello. The cat said hello. " * 6 + "The dog"
WILD = {"max_new_tokens": 96, "do_sample": True, "temperature": 1.5, "seed": 3}
requests = (("repeats itself", REPEATING, {"max_new_tokens": 96, "do_sample": False}), ("does not", PROMPT, WILD))
for name, prompt, settings in requests:
    for call in range(3):
        adaptive = qs_jax.generate(model, prompt, exact=True, eos_token_id=[], **settings)
        timing = adaptive.timing
        print(
            f"{name:14} call {call + 1}: {timing['rounds']:2} rounds with {timing['accepted']:2} of {timing['drafted']:3} drafts "
            f"right, {timing['fallback']:2} plain steps; {timing['decode_s']:.2f} s, of which compiling {timing['compile_s']:.2f} s"
        )
    draw(prompt, adaptive, f"auto, text that {name}")

# %% [markdown]
# ## Codes that draft for dense weights
#
# A folder can hold dense weights and Matryoshka codes of them (`--keep-dense`). Drafts are then steps of the codes at fewer
# bits, and the text is still the dense weights'. Such drafts know the language, where a lookup knows only the text so far; but
# each is a step of its own. In a cascade the codes check what was looked up, and the dense weights what the codes made of it.

# %%
# in a terminal: qs-convert MODEL ./both --quantize matryoshka --keep-dense
command = [
    sys.executable,
    "-m",
    "convert.cli",
    str(MODEL),
    str(WORK / "both"),
    "--quantize",
    "matryoshka",
    "--keep-dense",
]
done = subprocess.run(command, capture_output=True, text=True)
print(done.stdout or done.stderr)

both = qs_jax.load(WORK / "both")
drafted = {}
for draft in ("bits:4", "bits:2", ("lookup", "bits:4")):
    drafted[draft] = qs_jax.generate(both, PROMPT, exact=True, draft=draft, **GREEDY)
    told(draft if isinstance(draft, str) else " → ".join(draft), drafted[draft], plain)

# %%
draw(PROMPT, drafted["bits:4"], "greedy, drafts of the codes at 4 bits")
draw(PROMPT, drafted["lookup", "bits:4"], "greedy, drafts of the cascade")

# %% [markdown]
# ## A batch
#
# Rows keep each their own number of drafts, and none waits for another; a pass is made while any row still needs one. What a row
# gets is what it gets alone.

# %%
PROMPTS = ["Once upon a time", "The old house stood at the end of the road, and nobody", PROMPT]
plain_rows = qs_jax.generate(model, PROMPTS, **GREEDY)
rows = qs_jax.generate(model, PROMPTS, exact=True, draft="lookup", **GREEDY)
told("three rows", rows, plain_rows)
for prompt, length, rounds, accepted in zip(
    PROMPTS, rows.lengths, rows.trace["rounds"], rows.trace["accepted"], strict=True
):
    print(f"{length} tokens in {rounds:2} rounds, {accepted:2} of them drafts: …{prompt[-40:]!r}")

# %% [markdown]
# ## Read further
#
# [docs/method.md](../docs/method.md#exact-mode) says what is exact about it, what rounding can do, and how `auto` decides.
# `draft="policy"` lets the model under a policy draft, `draft="lens"` the model's first layers and its lens
# ([docs/command_line.md](../docs/command_line.md)). `python -m benchmarks.exact` measures it on a real model.
