"""The `qs-jax` command. Everything heavy is imported inside the commands, so that `--help` is instant."""

import sys
from typing import Annotated, Any

import typer

from qs_jax import cli_study
from qs_jax.cli_options import Bits, Common, ModelArgument, PolicyOption, common_options
from qs_jax.console import print_json, reporting_errors
from qs_jax.errors import GenerationError
from qs_jax.generation_config import GenerationConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Faster decoding of frozen GPT-2 and Llama models in pure JAX.",
)

DEFAULTS = GenerationConfig()


@app.callback()
def _commands() -> None:
    """Keeps subcommands even where there is only one."""


@app.command(
    epilog="""Examples:

\b
  qs-jax generate ./model --prompt "Once upon a time"
  qs-jax generate ./model --prompt "Once upon a time" --temperature 0.8 --seed 1
  echo "Once upon a time" | qs-jax generate ./model --prompt - --json"""
)
@common_options()
def generate(
    model: ModelArgument,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; repeat for a batch; - reads stdin.")],
    policy: PolicyOption = "off",
    bits: Bits = DEFAULTS.bits,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to produce.")] = DEFAULTS.max_new_tokens,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature; 0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among tokens that reach this probability.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out tokens less likely than this share of the best.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: repeated tokens become less likely.")
    ] = DEFAULTS.repetition_penalty,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")] = None,
    num_return_sequences: Annotated[int, typer.Option(help="Samples per prompt.")] = DEFAULTS.num_return_sequences,
    seed: Annotated[int | None, typer.Option(help="Repeats a sample; drawn and reported if not given.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap each prompt in the model's chat template.")] = False,
    *,
    common: Common,
) -> None:
    """Continue one or more prompts; text appears as it is made."""
    with reporting_errors(common.debug):
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        settings = {
            "policy": policy,
            "bits": bits,
            "max_new_tokens": max_new_tokens,
            "repetition_penalty": repetition_penalty,
            "stop_strings": stop or (),
            "num_return_sequences": num_return_sequences,
            "seed": seed,
            **_sampling(sampling, asked=num_return_sequences > 1 or seed is not None),
        }
        GenerationConfig.of(**settings)
        prompts: list[Any] = [_stdin() if text == "-" else text for text in prompt]
        if chat:
            prompts = [[{"role": "user", "content": text}] for text in prompts]
        from qs_jax.loading import load

        loaded = load(model, **common.loading)
        _print_generation(loaded, prompts, settings, json=common.json)


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
    batch: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the random prompts.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode per row.")] = 64,
    *,
    common: Common,
) -> None:
    """Measure prefill and decoding speed, and how much of the memory bandwidth decoding reaches."""
    with reporting_errors(common.debug):
        GenerationConfig.of(policy=policy, bits=bits)
        from qs_jax.evaluation.benchmark import benchmark
        from qs_jax.loading import load

        loaded = load(model, **common.loading)
        figures = benchmark(
            loaded, policy=policy, bits=bits, batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens
        )
        if common.json:
            print_json(figures)
            return
        print(
            f"{figures['tokens_per_second']:.1f} tokens/s at batch {batch}, "
            f"{figures['decode_ms_per_step']:.2f} ms a step\n"
            f"{figures['bandwidth_gb_s']:.1f} GB/s of weights, "
            f"{figures['bandwidth_fraction']:.0%} of measured bandwidth\n"
            f"prefill of {prompt_tokens} tokens {figures['prefill_s']:.3f} s, "
            f"compilation {figures['compile_s']:.1f} s, peak memory {figures['peak_rss_mb']:.0f} MB"
        )


app.command("eval", epilog=cli_study.EVAL_EXAMPLES)(cli_study.evaluate)
app.command("calibrate", epilog=cli_study.CALIBRATE_EXAMPLES)(cli_study.calibrate)
app.command("lens", epilog=cli_study.LENS_EXAMPLES)(cli_study.lens)
app.command("report", epilog=cli_study.REPORT_EXAMPLES)(cli_study.report)


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise GenerationError("the prompt on stdin is not UTF-8 text; convert it first") from None


def _sampling(settings: dict[str, Any], *, asked: bool) -> dict[str, Any]:
    """On the command line, giving a sampling setting asks for sampling; temperature 0 asks for greedy decoding."""
    given = {name: value for name, value in settings.items() if value is not None}
    if given.get("temperature") == 0:
        if len(given) > 1 or asked:
            raise GenerationError("--temperature 0 is greedy; leave out the other sampling options")
        return {}
    return {**given, "do_sample": True} if given or asked else {}


def _print_generation(loaded: Any, prompts: list[Any], settings: dict[str, Any], *, json: bool) -> None:
    from qs_jax.generation import generate, stream

    rows = len(prompts) * settings["num_return_sequences"]
    if json:
        output = generate(loaded, prompts, **settings)
        print_json(
            {
                "texts": output.texts,
                "tokens": output.tokens,
                "lengths": output.lengths,
                "finish_reasons": output.finish_reasons,
                "logprobs": output.logprobs,
                "seeds": output.seeds,
                **output.trace,
                "ledger": output.ledger,
                "timing": output.timing,
            }
        )
        return
    if rows == 1:
        output = _print_stream(prompts[0], stream(loaded, prompts, **settings))
    else:
        output = generate(loaded, prompts, **settings)
        for row, text in enumerate(output.texts):
            print(f"--- {row + 1} of {rows} ({output.finish_reasons[row]})\n{text}")
    timing = output.timing
    print(
        f"{sum(output.lengths)} tokens, {timing['tokens_per_second']:.1f} tokens/s "
        f"(prefill {timing['prefill_s']:.2f} s, decoding {timing['decode_s']:.2f} s, "
        f"of which compiling {timing['compile_s']:.2f} s), {', '.join(sorted(set(output.finish_reasons)))}",
        file=sys.stderr,
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
    app()


if __name__ == "__main__":
    main()
