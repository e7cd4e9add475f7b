"""JAX's coordination service in a process of its own, which no training process takes with it.

    python -m flax_partial.coordinator 10.0.0.1:1234 --processes 4

`jax.distributed.initialize` puts the service into process 0, and JAX ends every process that loses
its connection to it: where process 0 dies, the others die before they can report it. They
outlive it if the service runs elsewhere:

    jax.distributed.initialize("10.0.0.1:1234", 4, index, coordinator_bind_address="127.0.0.1:0")

Process 0 then starts a second service on a free port, which is not used. This one serves until it
gets SIGTERM or SIGINT.
"""

import argparse
import signal
import socket
import sys
from collections.abc import Sequence

from jax.errors import JaxRuntimeError

from flax_partial.distributed import jax_service as coordination

_ENDING = {signal.SIGTERM, signal.SIGINT}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves; returns the exit status: 0 once a signal ended it, 1 if it cannot listen."""
    parser = argparse.ArgumentParser(
        prog="python -m flax_partial.coordinator",
        description="Run JAX's coordination service in a process of its own, until SIGTERM.",
    )
    parser.add_argument("address", metavar="HOST:PORT", help="where it listens")
    parser.add_argument("--processes", type=int, required=True, help="how many connect to it")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"argument --processes: {options.processes} is below 1")
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # before its threads, which inherit that
    try:
        _require_free(options.address)
        with coordination.serving(options.address, options.processes):
            sys.stdout.write(f"serving {options.processes} processes at {options.address}\n")
            sys.stdout.flush()
            signal.sigwait(_ENDING)
    except (JaxRuntimeError, OSError, OverflowError, ValueError) as error:
        sys.stderr.write(f"Cannot serve at {options.address}: {error}\n")
        return 1
    return 0


def _require_free(address: str) -> None:
    """Raises an error if no process can listen there, or one does: JAX would share the port.

    Raises:
      OSError, OverflowError, ValueError: Why not.
    """
    host, _, port = address.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    for family, kind, protocol, _, place in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((place[0], int(port), *place[2:]))
            probe.listen()


if __name__ == "__main__":
    sys.exit(main())
