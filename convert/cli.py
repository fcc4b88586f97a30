"""The `qs-convert` command. Everything heavy is imported inside it, so that `--help` is instant."""

from pathlib import Path
from typing import Annotated

import typer

from convert.defaults import CALIBRATION_TOKENS, CODEBOOK, DTYPE, GROUP_SIZE
from qs_jax.cli_options import (
    Codebook,
    Command,
    Common,
    Dtype,
    Method,
    Overwrite,
    Revision,
    Scheme,
    common_options,
)
from qs_jax.console import aside, collecting_rarely, print_json, progress, reporting_errors

app = typer.Typer(
    name="qs-convert", add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


@app.command(
    "qs-convert",
    cls=Command,
    no_args_is_help=True,
    epilog="""Examples:

\b
  qs-convert ./my-hf-model ./model
  qs-convert openai-community/gpt2 ./gpt2 --verify
  qs-convert meta-llama/Llama-2-7b-hf ./llama --dtype bfloat16
  qs-convert ./my-model.gguf ./model
  qs-convert ./my-hf-model ./model --quantize matryoshka
  qs-convert ./my-hf-model ./model --quantize matryoshka --calibration-text train.txt
  qs-convert ./my-hf-model ./model --quantize matryoshka --keep-dense
  qs-convert ./my-hf-model ./model --dry-run --json""",
)
@common_options(loads=False, versioned=True)
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Hugging Face folder with safetensors, .gguf file, or hub id.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    dtype: Dtype = DTYPE,
    revision: Revision = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare logits on 500 tokens; refuse if they differ.")
    ] = False,
    golden: Annotated[
        Path | None, typer.Option(help="With --verify: safetensors with tokens, positions, logits.")
    ] = None,
    overwrite: Overwrite = False,
    quantize: Scheme = None,
    method: Method = None,
    calibration_text: Annotated[
        str | None, typer.Option(help="With --quantize: text to fit on, a file or a dataset; not what you evaluate on.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="How many of its tokens to take.")] = CALIBRATION_TOKENS,
    group_size: Annotated[
        int, typer.Option(help="With --quantize: inputs that share a scale; a multiple of 8.")
    ] = GROUP_SIZE,
    codebook: Codebook = CODEBOOK,
    exclude: Annotated[
        str | None, typer.Option(help="With --quantize: module paths that stay dense, as a regular expression.")
    ] = None,
    pin: Annotated[
        str | None, typer.Option(help="With --quantize: module paths that are always read at 8 bits.")
    ] = None,
    keep_dense: Annotated[
        bool,
        typer.Option("--keep-dense", help="With --quantize: dense weights beside codes, which draft for them."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check names and shapes, write nothing.")] = False,
    *,
    common: Common,
) -> None:
    """Convert Hugging Face weights (GPT-2, Llama, Mistral, Qwen2), part by part, into a folder that qs-jax loads."""
    with reporting_errors(common.debug):
        from convert.pipeline import IncompleteError
        from convert.pipeline import convert as run

        try:
            with progress("converting") as advance:
                report = run(
                    source,
                    target,
                    dtype=dtype,
                    revision=revision,
                    verify=verify,
                    golden=golden,
                    overwrite=overwrite,
                    quantize=quantize,
                    method=method,
                    calibration_text=calibration_text,
                    calibration_tokens=calibration_tokens,
                    group_size=group_size,
                    codebook=codebook,
                    exclude=exclude,
                    pin=pin,
                    keep_dense=keep_dense,
                    dry_run=dry_run,
                    advance=advance,
                )
        except IncompleteError as error:
            if common.json:
                print_json(error.report.to_json())
            raise
        if common.json:
            print_json(report.to_json())
            return
        done = "would convert" if dry_run else f"{target}: converted"
        print(f"{done} {report.parameters:,} parameters ({report.bytes_in / 1e6:.1f} MB) in {report.seconds:.1f} s")
        for name, value in report.verification.items():
            print(f"  {name}: {value}")
        for note in report.notes:
            aside(f"note: {note}")


def main() -> None:
    """Entry point of `qs-convert`."""
    with collecting_rarely():
        app()


if __name__ == "__main__":
    main()
