"""`qs-lm-eval`: the command line of lm-evaluation-harness, which knows the model `qs_jax`. Imports nothing heavy."""

import importlib.util
import sys

from qs_jax.console import EXIT_USAGE, reporting_errors


def main() -> None:
    """As `lm_eval`, whose options it takes; errors of ours are one line."""
    if importlib.util.find_spec("lm_eval") is None:
        print("error: lm-evaluation-harness is not installed; pip install 'qs_jax[lm-eval]'", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)
    with reporting_errors(debug=False):
        from lm_eval.__main__ import cli_evaluate

        import qs_jax.lm_eval as registered

        assert registered
        cli_evaluate()


if __name__ == "__main__":
    main()
