"""`qs-jax serve`. What it serves with is imported inside the command: `--help` is instant, and the extra optional."""

import importlib.util
import os
from typing import Annotated

import typer

from qs_jax.cli_options import Common, ModelArgument, common_options, load_model
from qs_jax.console import aside, print_json, reporting_errors
from qs_jax.serving.options import KEY_VARIABLE, ServeError, ServeOptions

DEFAULTS = ServeOptions()

SERVE_EXAMPLES = """Examples:

\b
  qs-jax serve ./model                       # then open http://127.0.0.1:8000
  qs-jax serve ./model --places 16 --policy thrifty=policy.json
  QS_JAX_API_KEY=... qs-jax serve ./model --host 0.0.0.0 --allow-host my.machine"""


@common_options()
def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets others in.")] = DEFAULTS.host,
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = DEFAULTS.port,
    api_key: Annotated[
        str | None, typer.Option(help=f"What clients must present; better in {KEY_VARIABLE}, where none can read it.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model, to clients; by default its folder's.")] = None,
    places: Annotated[int, typer.Option(help="Most rows decoded together.")] = DEFAULTS.places,
    queue: Annotated[int, typer.Option(help="Most rows that wait; beyond them 503.")] = DEFAULTS.queue,
    context: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer; by default 2,048 or the model's limit.")
    ] = None,
    chunk: Annotated[int, typer.Option(help="Steps between which rows join, and text is sent.")] = DEFAULTS.chunk,
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="A policy that clients may ask for, beside presets and the model's."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A name by which clients may call the server.")
    ] = None,
    shutdown: Annotated[
        float, typer.Option(help="Seconds for which running requests may go on after SIGINT or SIGTERM.")
    ] = DEFAULTS.shutdown_seconds,
    warm_up: Annotated[
        bool, typer.Option("--warm-up/--no-warm-up", help="Compile before listening.")
    ] = DEFAULTS.warm_up,
    *,
    common: Common,
) -> None:
    """Serve a model to OpenAI's clients, and a page to look at it in a browser."""
    with reporting_errors(common.debug):
        options = ServeOptions(
            host=host,
            port=port,
            api_key=api_key or os.environ.get(KEY_VARIABLE) or None,
            name=name,
            places=places,
            queue=queue,
            context=context,
            chunk=chunk,
            policies=tuple(policy or ()),
            allowed_hosts=tuple(allow_host or ()),
            shutdown_seconds=shutdown,
            warm_up=warm_up,
        )
        if missing := [part for part in ("starlette", "uvicorn") if importlib.util.find_spec(part) is None]:
            raise ServeError(f"{' and '.join(missing)} needed to serve: pip install 'qs_jax[serve]'")
        loaded = load_model(model, common)
        from qs_jax.serving.running import serve as run

        def ready(url: str, name: str) -> None:
            if common.json:
                print_json({"url": url, "model": name})
            aside(f"{name} at {url}, a page there, OpenAI's API under {url}/v1; Ctrl-C ends it")

        run(loaded, options, ready=ready)
        aside("the server has ended")
