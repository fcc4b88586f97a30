"""The training loop: resumable at any step, and deterministic, so that a resumed run is the run itself."""

import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qs_jax.config import ModelConfig
from qs_jax.console import progress as progress_bar
from qs_jax.models import random_network
from reference_models.checkpoints import Checkpoints
from reference_models.data import DataError
from reference_models.export import Earlier
from reference_models.recipe import Phase, Recipe
from reference_models.step import make_train_step, optimizer, total_loss
from reference_models.tokens import Mixture

Streams = Mapping[str, np.ndarray]
_LOG_EVERY = 10
_TIMED_STEPS = 10


def _clock() -> float:
    """Seconds of compute. On CPU that of this process: sharing the cores or being paused costs no budget."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


class Trainer:
    """One run: weights, optimiser state and how far it is. The work folder holds everything a resume needs."""

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        streams: Streams,
        held_out: Streams,
        folder: Path,
        earlier: Earlier | None = None,
    ):
        self.config, self.recipe, self.held_out, self.folder = config, recipe, held_out, folder
        self.mixture = Mixture(streams, recipe.mixture, recipe.seed)
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=2)
        self.best = Checkpoints(folder / "best", keep=1)
        self.transform = optimizer(recipe)
        self.network = earlier.network if earlier else random_network(config, seed=recipe.seed)
        self.graph, self.weights = nnx.split(self.network)
        self.state = self.transform.init(self.weights)
        self.train_step = make_train_step(self.network, self.transform)
        self.progress: dict[str, Any] = {
            "step": 0, "draws": 0, "tokens": 0, "seconds": 0.0, "first": 0, "steps": None, "best": None, "since_best": 0
        }  # fmt: skip
        self.log = folder / "loss.jsonl"
        if self.checkpoints.latest is not None:
            (self.weights, self.state), self.progress = self.checkpoints.restore((self.weights, self.state))
        elif earlier:
            self._go_on(earlier)
        self._trim_log()

    def run(self, *, steps: int | None = None, hours: float | None = None, checkpoint_minutes: float = 5.0) -> bool:
        """Train up to `steps` optimiser steps; True when the run is complete, False when it was interrupted.

        Without `steps`, `hours` of compute at the measured speed decide, once; a resumed run keeps its number. A run
        that goes on from an export counts from there, with a schedule of its own.
        """
        if steps is not None:
            self.progress["steps"] = self.progress["first"] + steps
        elif self.progress["steps"] is None:
            self.progress["steps"] = self.progress["first"] + self._steps_in(hours or 1.0)
        total = self.progress["steps"]
        saved = time.monotonic()
        with _stop_requested() as stop, progress_bar("training", total - self.progress["step"]) as advance:
            while self.progress["step"] < total and not stop and not self._out_of_patience():
                self._step(total)
                advance()
                if self.progress["step"] % self.recipe.validate_every == 0 or self.progress["step"] == total:
                    self._validate(total)
                if time.monotonic() - saved > 60 * checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()
        self.save()
        return self.progress["step"] >= total or self._out_of_patience()

    def _go_on(self, earlier: Earlier) -> None:
        """Totals and log carry over; the optimiser, its schedule and the best so far start anew."""
        kept = {name: earlier.progress[name] for name in ("step", "draws", "tokens", "seconds")}
        self.progress.update(kept, first=kept["step"])
        self.log.write_text("".join(json.dumps(row) + "\n" for row in earlier.rows), "utf-8")

    def _place(self, step: int, total: int) -> tuple[int, int]:
        """A step and the total, counted from where this schedule began."""
        first = self.progress["first"]
        return step - first, total - first

    def validate(self) -> None:
        """Validate where the run stands: the weights it was stopped at become the best ones if they are."""
        if self.progress["step"] == 0:
            raise DataError(f"{self.folder}: nothing is trained yet; run it first")
        self._validate(self.progress["steps"])
        self.checkpoints.delete(self.progress["step"])
        self.save()

    def save(self) -> None:
        if self.checkpoints.latest != self.progress["step"]:
            self.checkpoints.save(self.progress["step"], (self.weights, self.state), self.progress)

    def _step(self, total: int) -> None:
        """One optimiser step. Time counts as compute of this process, so that being paused costs no budget."""
        started = _clock()
        step = self.progress["step"]
        place = self._place(step, total)
        phase, learning_rate = self.recipe.phase(*place), self.recipe.learning_rate(*place)
        windows = self.mixture.batch(self.progress["draws"], phase.batch, phase.length)
        self.weights, self.state, loss = self.train_step(
            self.weights, self.state, jnp.asarray(windows), jnp.float32(learning_rate)
        )
        value = float(loss)
        if not np.isfinite(value):
            raise FloatingPointError(f"loss is {value} at step {step}; lower peak_learning_rate")
        self.progress["step"] += 1
        self.progress["draws"] += phase.batch
        self.progress["tokens"] += phase.batch * phase.length
        self.progress["seconds"] += _clock() - started
        if step % _LOG_EVERY == 0:
            self._append({"loss": value, "learning_rate": learning_rate, "length": phase.length})

    def _validate(self, total: int) -> None:
        phase = self.recipe.phase(*self._place(self.progress["step"] - 1, total))
        network = nnx.merge(self.graph, self.weights)
        losses = {name: self._held_out_loss(network, stream, phase) for name, stream in self.held_out.items()}
        mean = sum(self.recipe.mixture[name] * loss for name, loss in losses.items())
        self.progress["since_best"] += 1
        if self.progress["best"] is None or mean < self.progress["best"]:
            self.progress.update(best=mean, since_best=0)
            self.best.save(self.progress["step"], self.weights, self.progress)
        self._append({"validation": losses, "validation_mean": mean, "length": phase.length})

    def _held_out_loss(self, network: Any, stream: np.ndarray, phase: Phase) -> float:
        """Mean nats per token over evenly spread windows, the same ones every time."""
        count = max(1, min(self.recipe.validation_tokens, len(stream) - 1) // phase.length)
        starts = np.linspace(0, len(stream) - phase.length - 1, count).astype(int)
        windows = [jnp.asarray(stream[None, s : s + phase.length + 1].astype(np.int32)) for s in starts]
        return sum(float(total_loss(network, window)) for window in windows) / (count * phase.length)

    def _out_of_patience(self) -> bool:
        return self.recipe.patience is not None and self.progress["since_best"] >= self.recipe.patience

    def _steps_in(self, hours: float) -> int:
        """How many steps fit, timed on copies so that the run itself starts untouched."""
        phase = self.recipe.phases[0]
        weights, state = jax.tree.map(jnp.copy, (self.weights, self.state))
        windows = jnp.asarray(self.mixture.batch(0, phase.batch, phase.length))
        started = 0.0
        for timed in range(_TIMED_STEPS + 1):
            weights, state, loss = self.train_step(weights, state, windows, jnp.float32(0))
            loss.block_until_ready()
            started = _clock() if timed == 0 else started
        return max(1, round(3600 * hours / ((_clock() - started) / _TIMED_STEPS)))

    def _append(self, row: Mapping[str, Any]) -> None:
        position = {key: self.progress[key] for key in ("step", "tokens", "seconds")}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**position, **row}) + "\n")

    def _trim_log(self) -> None:
        """Drop rows past the checkpoint that training resumes from: they are about to be written again."""
        if self.log.exists():
            rows = [line for line in self.log.read_text("utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in rows if json.loads(line)["step"] <= self.progress["step"]]
            self.log.write_text("".join(line + "\n" for line in kept), "utf-8")


@contextmanager
def _stop_requested() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or SIGTERM asks to stop; a second request interrupts at once."""
    requests: list[int] = []

    def request(number: int, frame: FrameType | None) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(number)

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
