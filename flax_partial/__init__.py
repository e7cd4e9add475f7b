"""Incremental checkpoints for JAX and Flax: each part saved when it is ready, one atomic commit.

`save` and `save_async` add parts to an unfinished checkpoint, `finalize` makes it appear, whole.
"""

import importlib
import pkgutil
import sys
from typing import TYPE_CHECKING

if sys.platform == "win32":
    raise ImportError(
        "flax_partial needs Linux or macOS: Windows has no flock, and cannot make the names in a "
        "directory durable. WSL 2 is Linux."
    )

from flax_partial.sessions import forks as _forks  # noqa: F401 - it has to see every fork

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from flax_partial._public import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """Imports public names when they are first used (PEP 562).

        Importing the package itself is light: the command line can answer Ctrl-C from the start.
        The first public name imports all of them, and with them JAX, so that no later one is slow.
        """
        if name in {module.name for module in pkgutil.iter_modules(globals()["__path__"])}:
            return importlib.import_module(f"{__name__}.{name}")
        if "__all__" not in globals():
            public = importlib.import_module("flax_partial._public")
            names = {each: vars(public)[each] for each in public.__all__}
            globals().update(names, __all__=["__version__", *names])
        try:
            return globals()[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__() -> list[str]:
        return __getattr__("__all__")
