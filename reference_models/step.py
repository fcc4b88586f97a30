"""The jitted training and validation steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from qs_jax.models import CausalLM, forward
from reference_models.recipe import Recipe

TrainStep = Callable[[Any, Any, Int[Array, "batch tokens"], Float[Array, ""]], tuple[Any, Any, Float[Array, ""]]]


@jax.custom_vjp
def cross_entropy(logits: Float[Array, "*rows vocab"], targets: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Negative log-likelihood of the targets, in nats.

    The gradient is written out (softmax minus one-hot, one pass): XLA's CPU backend spends several slow
    reductions on the derived one.
    """
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return normaliser - chosen, (logits, targets, normaliser)


def _cross_entropy_backward(residuals: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, None]:
    logits, targets, normaliser = residuals
    one_hot = jnp.arange(logits.shape[-1]) == targets[..., None]
    return (jnp.exp(logits - normaliser[..., None]) - one_hot.astype(logits.dtype)) * gradient[..., None], None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW without its learning rate, which the host gives each step; decay on matrices only."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.scale_by_adam(b1=0.9, b2=recipe.beta2),
        optax.add_decayed_weights(
            recipe.weight_decay, mask=lambda weights: jax.tree.map(lambda w: w.ndim > 1, weights)
        ),
    )


def make_train_step(network: CausalLM, transform: optax.GradientTransformation) -> TrainStep:
    """(weights, optimiser state, windows, learning rate) -> the first two updated, both donated, and the mean loss."""
    graph = nnx.graphdef(network)

    def mean_loss(weights: Any, windows: Int[Array, "batch tokens"]) -> Float[Array, ""]:
        return cross_entropy(forward(nnx.merge(graph, weights), windows[:, :-1]), windows[:, 1:]).mean()

    def step(weights: Any, state: Any, windows: Array, learning_rate: Array) -> tuple[Any, Any, Array]:
        loss, gradients = jax.value_and_grad(mean_loss)(weights, windows)
        updates, state = transform.update(gradients, state, weights)
        weights = jax.tree.map(lambda w, u: w - learning_rate * u, weights, updates)
        return weights, state, loss

    return jax.jit(step, donate_argnums=(0, 1))


@jax.jit
def total_loss(network: CausalLM, windows: Int[Array, "batch tokens"]) -> Float[Array, ""]:
    """Summed loss in nats of every token of every window but its first."""
    return cross_entropy(forward(network, windows[:, :-1]), windows[:, 1:]).sum()
