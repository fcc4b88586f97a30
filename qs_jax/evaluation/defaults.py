"""Defaults of the studies, of the functions and of the commands alike. Imports nothing heavy: `--help` shows them."""

from qs_jax.adaptive.policy import StateSignalName

WINDOW = 64
"""Scored tokens of a window."""

SCORED_TOKENS = 2560
"""Most tokens that an evaluation scores."""

CALIBRATION_TOKENS = 4096
"""Most tokens that a calibration scores."""

DIRECT_CALIBRATION_TOKENS = 12288
"""The same where the model has a direct lens, whose stops are scored together."""

LENS_TOKENS = 32768
"""Most tokens that a lens is fitted on."""

DIRECT_LENS_TOKENS = 147456
"""Most tokens that a direct lens is fitted on."""

TUNED_LAST = 128
"""Of each window, at whose last tokens a tuned lens is to agree with the dense model."""

RARE_SHARE = 0.15
"""Of prompt tokens that might stop under a direct lens those that run on, the rarest: under policies that
calibration tries, and while a lens is tuned."""

BATCH = 8
"""Windows run together."""

MAX_PPL_INCREASE = 0.2
"""By how much a calibrated policy may raise perplexity."""

CONFIDENCE = 0.9
"""That it raises it by no more."""

SIGNAL: StateSignalName = "relative_drift"
"""What halting looks at."""
