"""The `qs-convert` command. Everything heavy is imported inside it, so that `--help` is instant."""

from pathlib import Path
from typing import Annotated

import typer

from qs_jax.choices import DTYPES
from qs_jax.console import aside, print_json, progress, reporting_errors
from qs_jax.errors import ConfigError

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(
    epilog="""Examples:

\b
  qs-convert ./my-hf-model ./model
  qs-convert openai-community/gpt2 ./gpt2 --verify
  qs-convert meta-llama/Llama-2-7b-hf ./llama --dtype bfloat16
  qs-convert ./my-hf-model ./model --quantize matryoshka
  qs-convert ./my-hf-model ./model --quantize matryoshka --calibration-text train.txt
  qs-convert ./my-hf-model ./model --dry-run --json"""
)
def convert(
    src: Annotated[str, typer.Argument(help="Hugging Face folder with safetensors, or hub id.")],
    dst: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 for the stored weights; by default float32.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, for a hub id.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare logits on 500 tokens; refuse if they differ.")
    ] = False,
    golden: Annotated[
        Path | None, typer.Option(help="With --verify: safetensors with tokens, positions, logits.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a converted folder.")] = False,
    quantize: Annotated[
        str | None, typer.Option(help="matryoshka: codes that can be read at 8, 4 or 2 bits (see --method).")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="With --quantize: rtn, or with text refit, gptq or gptq+tune (default where there is text)."),
    ] = None,
    calibration_text: Annotated[
        str | None, typer.Option(help="With --quantize: text to fit on, a file or a dataset; not what you evaluate on.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="How many of its tokens to take.")] = 16384,
    group_size: Annotated[int, typer.Option(help="With --quantize: inputs that share a scale; a multiple of 8.")] = 64,
    codebook: Annotated[
        str, typer.Option(help="With --quantize: even levels, or companded: nearer at 4 and 2 bits, more to compute.")
    ] = "even",
    exclude: Annotated[
        str, typer.Option(help="With --quantize: module paths that stay dense, as a regular expression.")
    ] = "^embedding|^lm_head",
    pin: Annotated[
        str | None, typer.Option(help="With --quantize: module paths that are always read at 8 bits.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check names and shapes, write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Convert Hugging Face weights (GPT-2, Llama, Mistral, Qwen2), part by part, into a folder that qs-jax loads."""
    with reporting_errors(debug):
        from convert.parts import Parts
        from convert.pipeline import convert as run
        from convert.pipeline import inspect
        from convert.source import Source, locate

        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"--dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        stored = dtype or "float32"
        options = None
        if quantize is not None:
            from convert.quantize import SCHEMES, QuantizeOptions

            if quantize not in SCHEMES:
                raise ConfigError(f"--quantize is {quantize!r}, expected one of {', '.join(SCHEMES)}")
            options = QuantizeOptions.of(
                method=method,
                group_size=group_size,
                exclude=exclude,
                pin=pin,
                text=calibration_text is not None,
                codebook=codebook,
            )
        folder = locate(src, revision)
        parts = Parts(Source(folder))
        report = inspect(parts)
        if json and (report.missing or report.unexpected or report.mismatched):
            print_json(report.to_json())
        parts.plan.raise_if_incomplete(src)
        if not dry_run:
            quantizer = None
            if options is not None and calibration_text is not None:
                from convert.calibrated import calibrated_quantizer
                from qs_jax.evaluation.text import read_documents

                documents, name = read_documents(calibration_text), calibration_text
                quantizer = calibrated_quantizer(options, parts, dst, documents, name=name, tokens=calibration_tokens)
            elif options is not None:
                from convert.quantize import Quantizer

                quantizer = Quantizer(options)

            def check(work: Path) -> dict:
                from convert.verify import verify as compare

                return compare(work, folder, golden, stored, quantised=quantizer is not None, name=str(dst))

            with progress("converting", total=len(parts.names)) as advance:
                report = run(
                    parts,
                    dst,
                    dtype=stored,
                    name=src,
                    overwrite=overwrite,
                    advance=advance,
                    quantizer=quantizer,
                    verify=check if verify else None,
                )
            if quantizer is not None:
                quantizer.done()
        if json:
            print_json(report.to_json())
            return
        done = "would convert" if dry_run else f"{dst}: converted"
        print(f"{done} {report.parameters:,} parameters ({report.bytes_in / 1e6:.1f} MB) in {report.seconds:.1f} s")
        for name, value in report.verification.items():
            print(f"  {name}: {value}")
        for note in report.notes:
            aside(f"note: {note}")


def main() -> None:
    """Entry point of `qs-convert`."""
    app()


if __name__ == "__main__":
    main()
