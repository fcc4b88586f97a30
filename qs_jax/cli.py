"""The `qs-jax` command. Everything heavy is imported inside the commands, so that `--help` is instant."""

import re
import sys
from typing import Annotated, Any

import typer

from qs_jax import cli_serve, cli_study
from qs_jax.cli_options import (
    Bits,
    Commands,
    Common,
    DraftOption,
    Exact,
    ModelArgument,
    PolicyOption,
    Version,
    common_options,
    load_model,
)
from qs_jax.console import aside, collecting_rarely, print_json, reporting_errors
from qs_jax.errors import GenerationError
from qs_jax.generation_config import GenerationConfig
from qs_jax.generation_defaults import NEUTRAL

app = typer.Typer(
    name="qs-jax",
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Faster decoding of frozen GPT-2 and Llama models in pure JAX.",
)

DEFAULTS = GenerationConfig()


@app.callback()
def _commands(version: Version = False) -> None:
    """What stands before a command."""


@app.command(
    epilog="""Examples:

\b
  qs-jax generate ./model --prompt "Once upon a time"
  qs-jax generate ./model --prompt "Once upon a time" --temperature 0.8 --seed 1
  qs-jax generate ./model --prompt "Hi" --chat --stop "\\n\\n" --stop "<|im_end|>"
  qs-jax generate ./model --prompt "Once upon a time" --exact --draft lookup
  echo "Once upon a time" | qs-jax generate ./model --prompt - --json"""
)
@common_options()
def generate(
    model: ModelArgument,
    prompt: Annotated[
        list[str],
        typer.Option(help="Text to continue; repeat for a batch; - reads stdin (less one line break at its end)."),
    ],
    policy: PolicyOption = "off",
    bits: Bits = DEFAULTS.bits,
    exact: Exact = DEFAULTS.exact,
    draft: DraftOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to produce.")] = DEFAULTS.max_new_tokens,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature; 0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among tokens that reach this probability.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out tokens less likely than this share of the best.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: repeated tokens become less likely.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="Text or special token that ends the output; may be repeated; knows \\n, \\t, \\r, \\\\, \\uXXXX."
        ),
    ] = None,
    num_return_sequences: Annotated[int, typer.Option(help="Samples per prompt.")] = DEFAULTS.num_return_sequences,
    seed: Annotated[int | None, typer.Option(help="Repeats a sample; drawn and reported if not given.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap each prompt in the model's chat template.")] = False,
    generation_config: Annotated[
        bool,
        typer.Option(
            "--generation-config/--no-generation-config",
            help="Take what is not asked for (sampling, penalty, end of text) from the model's generation_config.json.",
        ),
    ] = True,
    *,
    common: Common,
) -> None:
    """Continue one or more prompts; text appears as it is made."""
    with reporting_errors(common.debug):
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        settings = {
            "policy": policy,
            "bits": bits,
            "exact": exact,
            "draft": draft or None,
            "max_new_tokens": max_new_tokens,
            "repetition_penalty": repetition_penalty,
            "stop_strings": [unescape(text) for text in stop or ()],
            "use_model_defaults": generation_config,
            "num_return_sequences": num_return_sequences,
            "seed": seed,
            **_sampling(sampling, asked=num_return_sequences > 1 or seed is not None),
        }
        config = GenerationConfig.of(**settings)
        prompts: list[Any] = [_stdin() if text == "-" else text for text in prompt]
        if chat:
            prompts = [[{"role": "user", "content": text}] for text in prompts]
        _print_generation(load_model(model, common), prompts, config, json=common.json)


@app.command(
    epilog="""Examples:

\b
  qs-jax bench ./model
  qs-jax bench ./model --batch 8 --prompt-tokens 512 --json"""
)
@common_options()
def bench(
    model: ModelArgument,
    policy: PolicyOption = "off",
    bits: Bits = DEFAULTS.bits,
    exact: Exact = DEFAULTS.exact,
    draft: DraftOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the random prompts.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode per row.")] = 64,
    *,
    common: Common,
) -> None:
    """Measure prefill and decoding speed, and how much of the memory bandwidth decoding reaches."""
    with reporting_errors(common.debug):
        asked = GenerationConfig.of(policy=policy, bits=bits, exact=exact, draft=draft or None)
        from qs_jax.evaluation.benchmark import benchmark

        loaded = load_model(model, common)
        figures = benchmark(
            loaded,
            policy=asked.policy,
            bits=bits,
            exact=exact,
            draft=asked.draft,
            batch=batch,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
        )
        if common.json:
            print_json(figures)
            return
        print(
            f"{figures['tokens_per_second']:.1f} tokens/s at batch {batch}, "
            f"{figures['decode_ms_per_step']:.2f} ms a {'round' if exact else 'step'}{_drafts(figures)}\n"
            f"{figures['bandwidth_gb_s']:.1f} GB/s of weights, "
            f"{figures['bandwidth_fraction']:.0%} of measured bandwidth\n"
            f"prefill of {prompt_tokens} tokens {figures['prefill_s']:.3f} s, "
            f"compilation {figures['compile_s']:.1f} s, peak memory {figures['peak_rss_mb'] or float('nan'):.0f} MB"
        )


app.command("eval", epilog=cli_study.EVAL_EXAMPLES)(cli_study.evaluate)
app.command("calibrate", epilog=cli_study.CALIBRATE_EXAMPLES)(cli_study.calibrate)
app.command("lens", epilog=cli_study.LENS_EXAMPLES)(cli_study.lens)
app.command("report", epilog=cli_study.REPORT_EXAMPLES)(cli_study.report)
app.command("serve", epilog=cli_serve.SERVE_EXAMPLES)(cli_serve.serve)


def _stdin() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise GenerationError("the prompt on stdin is not UTF-8 text; convert it first") from None
    # the line break that echo and editors put at the end is not meant to be continued
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def unescape(text: str) -> str:
    r"""What a shell cannot easily say: \n, \t, \r, \\ and \uXXXX. Anything else after a backslash stays as it is."""

    def written(match: re.Match[str]) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if code[0] == "u" else {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}[code]

    plain = re.sub(r"\\(n|t|r|\\|u[0-9a-fA-F]{4})", written, text)
    try:
        return plain.encode("utf-16", "surrogatepass").decode("utf-16")  # two halves make one character
    except UnicodeDecodeError:
        raise GenerationError(f"--stop {text} holds half a character; write both halves, or the character") from None


def _sampling(settings: dict[str, Any], *, asked: bool) -> dict[str, Any]:
    """On the command line, giving a sampling setting asks for sampling; temperature 0 asks for greedy decoding."""
    given = {name: value for name, value in settings.items() if value is not None}
    if given.get("temperature") == 0:
        if len(given) > 1 or asked:
            raise GenerationError("--temperature 0 is greedy; leave out the other sampling options")
        return {"do_sample": False}
    return {**given, "do_sample": True} if given or asked else {}


def _print_generation(loaded: Any, prompts: list[Any], config: GenerationConfig, *, json: bool) -> None:
    from qs_jax.generation import generate, not_finite, stream

    rows = len(prompts) * config.num_return_sequences
    if json:
        output = generate(loaded, prompts, config)
        print_json({**_whole(output, loaded, prompts), "notes": list(loaded.notes)})
    else:
        if rows == 1:
            output = _print_stream(prompts[0], stream(loaded, prompts, config))
        else:
            output = generate(loaded, prompts, config)
            for row, text in enumerate(output.texts):
                print(f"--- {row + 1} of {rows} ({output.finish_reasons[row]})\n{text}")
        aside(_in_force(output))
        aside(_took(output))
    if "not_finite" in output.finish_reasons:
        raise GenerationError(not_finite(loaded))


def _whole(output: Any, loaded: Any, prompts: list[Any]) -> dict[str, Any]:
    """What `--json` prints of an output; of a chat, the one message in place of the prompt."""
    names = (
        "texts",
        "pieces",
        "tokens",
        "lengths",
        "finish_reasons",
        "logprobs",
        "seeds",
        "settings",
        "ledger",
        "timing",
    )
    asked = [prompt if isinstance(prompt, str) else prompt[0]["content"] for prompt in prompts]
    model = {"model": loaded.name, "depth": loaded.config.num_hidden_layers, "prompts": asked}
    return {**model, **{name: getattr(output, name) for name in names}, **output.trace}


def _in_force(output: Any) -> str:
    """The settings that shaped the output, and which of them the model's own file gave."""
    settings = output.settings
    shown = ["sampled" if settings["do_sample"] else "greedy"]
    changed = (name for name in NEUTRAL if name != "do_sample" and settings[name] != NEUTRAL[name])
    shown += [f"{name} {settings[name]:g}" for name in changed]
    shown += [f"seed {output.seeds[0]}"] if settings["do_sample"] else []
    given = settings["from_generation_config"]
    return ", ".join(shown) + (f" (generation_config.json: {', '.join(given)})" if given else "")


def _took(output: Any) -> str:
    timing = output.timing
    return (
        f"{sum(output.lengths)} tokens, {timing['tokens_per_second']:.1f} tokens/s "
        f"(prefill {timing['prefill_s']:.2f} s, decoding {timing['decode_s']:.2f} s, "
        f"of which compiling {timing['compile_s']:.2f} s), {', '.join(sorted(set(output.finish_reasons)))}"
        f"{_drafts(timing)}"
    )


def _drafts(figures: Any) -> str:
    """What became of drafts, where there was exact mode."""
    if "rounds" not in figures:
        return ""
    return (
        f", {figures['rounds']} rounds with {figures['accepted']} of {figures['drafted']} drafts right, "
        f"{figures['fallback']} plain steps"
    )


def _print_stream(prompt: Any, pieces: Any) -> Any:
    """Write a single row as it is made, after its prompt; what was written stays if the user interrupts."""
    if isinstance(prompt, str):
        print(prompt, end="", flush=True)
    try:
        while True:
            print(next(pieces).text, end="", flush=True)
    except StopIteration as finished:
        return finished.value
    finally:
        print(flush=True)


def main() -> None:
    """Entry point of `qs-jax`."""
    with collecting_rarely():
        app()


if __name__ == "__main__":
    main()
