"""A warm process that does work on demand, each time in a fork of its own: starting one takes milliseconds.

Orders are lines of JSON with at least {"log", "file_limit"}; each is answered with the fork's process id, then with
its exit status. No backend of JAX is started in the warm process, so that forking is safe.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[[dict[str, Any]], None]


class Worker:
    """Runs the work of a module that calls `serve`, such as `tests.hostile.converting`."""

    def __init__(self, module: str) -> None:
        command = [sys.executable, "-W", "ignore", "-m", module]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)

    def _line(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def start(self, target: Path, **order: object) -> int:
        """The process id of work that has begun; its output goes to target.log."""
        assert self.process.stdin is not None
        log = target.with_name(f"{target.name}.log")
        self.process.stdin.write(json.dumps({"target": str(target), "log": str(log), **order}, default=str))
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        pid = self._line()
        assert pid > 1
        return pid

    def end(self) -> int:
        """Exit status of the work, negative where a signal ended it."""
        return self._line()

    def close(self) -> None:
        self.process.communicate("", timeout=60)


def kill(pid: int) -> bool:
    """Whether there was still something to kill."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _child(work: Work, order: dict[str, Any], out: int) -> None:
    """Work and never return. Output goes to a pipe, which no limit on files can cut off."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgid(0, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    if order.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"], order["file_limit"]))
    status = 0
    try:
        work(order)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve(work: Work) -> None:
    """Do what standard input orders, until it ends."""
    for line in sys.stdin:
        order, (read, write) = json.loads(line), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _child(work, order, write)
        os.close(write)
        print(pid, flush=True)
        with os.fdopen(read) as output:
            Path(order["log"]).write_text(output.read())
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
