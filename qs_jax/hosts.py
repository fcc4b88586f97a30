"""Several processes that run one program together, each on the devices of its host. Only the first prints and writes.

What a host decides by chance or by the clock is agreed on: where programs differ, they wait for each other forever.
"""

import sys
from dataclasses import dataclass
from typing import TypeVar

from qs_jax.errors import ConfigError

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Hosts:
    """How the processes find each other. What is left out JAX finds in the environment: `JAX_COORDINATOR_ADDRESS`, a
    cluster's own variables, a TPU's metadata."""

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def join(hosts: Hosts) -> None:
    """Wait until all processes are there. Call it before anything runs on a device.

    Raises:
        ConfigError: they cannot find each other, or something ran already.
    """
    import jax

    try:
        jax.distributed.initialize(hosts.coordinator, hosts.processes, hosts.process)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--distributed: processes cannot join ({reason}); give --coordinator HOST:PORT, --processes and --process"
        ) from None


def is_first() -> bool:
    """Whether this process prints and writes: alone, or the first of several."""
    jax = sys.modules.get("jax")  # who has not imported it is alone
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def refuse_several(what: str) -> None:
    """For what only one process can do.

    Raises:
        ConfigError: there are several.
    """
    import jax

    if jax.process_count() > 1:
        raise ConfigError(f"{what} in one process only; leave out --distributed")


def agreed(value: Number) -> Number:
    """The first process's number, in every process; a whole one below 2**31."""
    import jax

    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental.multihost_utils import broadcast_one_to_all

    told = broadcast_one_to_all(np.asarray(value, np.int32 if isinstance(value, int) else np.float32))
    return type(value)(told)
