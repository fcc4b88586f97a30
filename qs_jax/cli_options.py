"""Options that several commands share, so that their names, texts and defaults cannot drift."""

from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(help="Converted folder, Hugging Face folder, or hub id.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default what suits the device.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, for a hub id.")]
PolicyOption = Annotated[str, typer.Option("--policy", help="Mechanisms: off, paper, balanced, or a policy file.")]
Bits = Annotated[int | None, typer.Option(help="8, 4 or 2: precision of Matryoshka weights for every token.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Check a converted folder against its checksums.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
