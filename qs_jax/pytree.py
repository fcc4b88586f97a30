"""What marks a field of a registered dataclass as static: part of the compiled program, compared and hashed."""

STATIC = {"static": True}
"""For `dataclasses.field(metadata=STATIC)`."""
