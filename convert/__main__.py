"""`python -m convert`, the same as `qs-convert`."""

from convert.cli import main

main()
