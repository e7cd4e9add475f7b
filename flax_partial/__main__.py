"""The program `flax-partial`, which is `python -m flax_partial` as well."""

import os
import signal
from typing import NoReturn

_INTERRUPTED = 128 + signal.SIGINT


def run() -> NoReturn:
    """Imports the command line and runs it; Ctrl-C ends the process with status 130, silently."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as behind nohup
        # Not by an exception, which an import may turn into another. There is nothing to undo yet.
        signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    from flax_partial.cli import main

    signal.signal(signal.SIGINT, before)
    main.run()


if __name__ == "__main__":
    run()
