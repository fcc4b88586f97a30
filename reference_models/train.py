"""Train a reference model: `python -m reference_models.train --help`."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from qs_jax.config import read_config_json
from qs_jax.console import print_json, reporting_errors
from qs_jax.models import parse_config
from reference_models.data import load_sources, text_folder
from reference_models.loop import Trainer
from reference_models.recipe import load_recipe
from reference_models.tokens import load_packed
from reference_models.tokens import prepare as prepare_tokens

CONFIGS = Path(__file__).parent / "configs"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Tokens = Annotated[Path, typer.Option(help="Folder of packed tokens that `prepare` wrote.")]
WorkDir = Annotated[Path, typer.Option(help="Folder of the run: checkpoints, best weights, loss log. Not in git.")]
ConfigFile = Annotated[Path, typer.Option(help="Hugging Face config.json of the model.")]
RecipeFile = Annotated[Path, typer.Option(help="How to train it.")]
Debug = Annotated[bool, typer.Option(help="Show tracebacks.")]


@app.command()
def prepare(tokens: Tokens, debug: Debug = False) -> None:
    """Train the tokenizer on the training text, and pack every source into tokens."""
    with reporting_errors(debug):
        prepare_tokens(load_sources(text_folder()), tokens)


@app.command()
def run(
    tokens: Tokens,
    work_dir: WorkDir,
    config: ConfigFile,
    recipe: RecipeFile,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the run; on resume it may change.")] = None,
    hours: Annotated[
        float | None, typer.Option(min=0.001, help="Or: as many steps as fit in this much compute.")
    ] = None,
    checkpoint_minutes: Annotated[float, typer.Option(min=0.01)] = 5.0,
    debug: Debug = False,
) -> None:
    """Train, or resume where the work folder's last checkpoint stands. Ctrl-C or SIGTERM saves and stops."""
    with reporting_errors(debug):
        trainer = open_trainer(tokens, work_dir, config, recipe)
        complete = trainer.run(steps=steps, hours=hours, checkpoint_minutes=checkpoint_minutes)
        print_json({"complete": complete, **trainer.progress})


def open_trainer(tokens: Path, work_dir: Path, config: Path, recipe: Path) -> Trainer:
    """The run in `work_dir`, new or resumed. Copies of its configuration and recipe are kept with it."""
    work_dir.mkdir(parents=True, exist_ok=True)
    settings = load_recipe(recipe)
    for name, source in (("config.json", config), ("recipe.json", recipe)):
        if source.resolve() != (work_dir / name).resolve():
            shutil.copyfile(source, work_dir / name)
    streams = load_packed(tokens, settings.mixture, "train")
    held_out = load_packed(tokens, settings.mixture, "held-out")
    model = parse_config(read_config_json(work_dir), str(config))
    return Trainer(model, settings, streams, held_out, work_dir)


if __name__ == "__main__":
    app()
