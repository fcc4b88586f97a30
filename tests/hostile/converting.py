"""A process that converts on demand, each time in a fork of its own: starting one takes milliseconds, not seconds.

    python -m tests.hostile.converting

Reads lines of JSON {"source", "target", "overwrite", "file_limit", "log"} and answers each with the fork's process id.
No backend of JAX is started here, so that forking is safe.
"""

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

import orbax.checkpoint.experimental.v1  # noqa: F401  (imported once, before the forks)

import convert.pipeline  # noqa: F401
from convert.cli import convert as run


def child(order: dict, out: int) -> None:
    """Convert and never return. Output goes to a pipe, which no limit on files can cut off."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgid(0, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    if order.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"], order["file_limit"]))
    status = 0
    try:
        run(order["source"], Path(order["target"]), overwrite=order.get("overwrite", False))
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    for line in sys.stdin:
        order, (read, write) = json.loads(line), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            child(order, write)
        os.close(write)
        print(pid, flush=True)
        with os.fdopen(read) as output:
            Path(order["log"]).write_text(output.read())
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
