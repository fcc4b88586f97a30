"""`python -m qs_jax`, the same as `qs-jax`."""

from qs_jax.cli import main

if __name__ == "__main__":
    main()
