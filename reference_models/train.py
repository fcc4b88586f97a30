"""Train a reference model.

\b
    python -m reference_models.train prepare --tokens runs/tokens
    python -m reference_models.train run --tokens runs/tokens --work-dir runs/llama \\
        --config reference_models/configs/llama.json --recipe reference_models/configs/llama-cpu.json --hours 2

Training goes on from an exported model, on this machine or another, with its tokenizer:

\b
    python -m reference_models.train prepare --tokens runs/tokens --tokenizer reference_models/llama/tokenizer.json
    python -m reference_models.train run --start-from reference_models/llama --tokens runs/tokens ...
    python -m reference_models.train export ... --overwrite
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qs_jax.console import print_json, reporting_errors

if TYPE_CHECKING:  # everything heavy is imported inside the commands, so that --help is instant
    from reference_models.loop import Trainer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)

Tokens = Annotated[Path, typer.Option(help="Folder of packed tokens that `prepare` wrote.")]
WorkDir = Annotated[Path, typer.Option(help="Folder of the run: checkpoints, best weights, loss log. Not in git.")]
ConfigFile = Annotated[Path, typer.Option(help="Hugging Face config.json of the model.")]
RecipeFile = Annotated[Path, typer.Option(help="How to train it.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@app.command()
def prepare(
    tokens: Tokens,
    tokenizer: Annotated[Path | None, typer.Option(help="Use this tokenizer.json; by default one is trained.")] = None,
    debug: Debug = False,
) -> None:
    """Train the tokenizer on the training text, and pack every source into tokens."""
    with reporting_errors(debug):
        from reference_models import data
        from reference_models.export import read_tokenizer
        from reference_models.tokens import prepare as prepare_tokens

        given = read_tokenizer(tokenizer) if tokenizer else None
        prepare_tokens(data.load_sources(data.text_folder()), tokens, tokenizer=given)


@app.command()
def run(
    tokens: Tokens,
    work_dir: WorkDir,
    config: ConfigFile,
    recipe: RecipeFile,
    start_from: Annotated[
        Path | None, typer.Option(help="An exported model that a new run goes on from; its log and totals carry over.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the run; on resume it may change.")] = None,
    hours: Annotated[
        float | None, typer.Option(min=0.001, help="Or: as many steps as fit in this much compute.")
    ] = None,
    checkpoint_minutes: Annotated[float, typer.Option(min=0.01, help="How often the state is saved.")] = 5.0,
    debug: Debug = False,
) -> None:
    """Train, or resume where the work folder's last checkpoint stands. Ctrl-C or SIGTERM saves and stops."""
    with reporting_errors(debug):
        trainer = open_trainer(tokens, work_dir, config, recipe, start_from)
        complete = trainer.run(steps=steps, hours=hours, checkpoint_minutes=checkpoint_minutes)
        print_json({"complete": complete, **trainer.progress})


@app.command()
def validate(tokens: Tokens, work_dir: WorkDir, debug: Debug = False) -> None:
    """Validate a run that was stopped: its last weights become the best ones, for export, if they are."""
    with reporting_errors(debug):
        trainer = open_trainer(tokens, work_dir, work_dir / "config.json", work_dir / "recipe.json")
        trainer.validate()
        print_json(trainer.progress)


@app.command()
def export(
    tokens: Tokens,
    work_dir: WorkDir,
    out: Annotated[Path, typer.Option(help="Folder to make, in Hugging Face format.")],
    hardware: Annotated[str, typer.Option(help="What it was trained on, in words, for the model card.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an exported folder that is there.")] = False,
    debug: Debug = False,
) -> None:
    """Write the weights of the validation minimum as a Hugging Face folder in bfloat16."""
    with reporting_errors(debug):
        from reference_models.export import export as write

        print_json(write(work_dir, tokens, out, hardware=hardware, overwrite=overwrite))


def open_trainer(tokens: Path, work_dir: Path, config: Path, recipe: Path, start_from: Path | None = None) -> "Trainer":
    """The run in `work_dir`, new or resumed. Copies of its configuration and recipe are kept with it.

    Raises:
        ConfigError: the configuration or recipe is missing or wrong.
        DataError: packed tokens are missing, the folder holds a run of another model, or `start_from` is another
            model, or has another tokenizer than the packed tokens.
    """
    from qs_jax.errors import ConfigError
    from qs_jax.files import read_json
    from qs_jax.models import parse_config
    from reference_models.export import read_export
    from reference_models.loop import Trainer
    from reference_models.recipe import load_recipe
    from reference_models.tokens import load_packed

    settings = load_recipe(recipe)
    if not config.is_file():
        raise ConfigError(f"{config}: no such file; see reference_models/configs")
    model = parse_config(read_json(config), str(config))
    streams = load_packed(tokens, settings.mixture, "train")
    held_out = load_packed(tokens, settings.mixture, "held-out")
    work_dir.mkdir(parents=True, exist_ok=True)
    earlier = read_export(start_from, tokens, model) if start_from else None
    trainer = Trainer(model, settings, streams, held_out, work_dir, earlier)
    for name, source in (("config.json", config), ("recipe.json", recipe)):
        if source.resolve() != (work_dir / name).resolve():
            shutil.copyfile(source, work_dir / name)
    return trainer


if __name__ == "__main__":
    app()
