"""From Hugging Face weights to a folder that `qs_jax.load` reads."""
