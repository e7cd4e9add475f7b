"""Optional packages: an error names the one that is missing, and how to install it."""

from __future__ import annotations

import importlib

from flax_partial.errors import how_to_install

_OTHER_BACKENDS = ("tensorflow", "torch", "openvino")  # of Keras, which JAX is one of


def need(package: str, *, extra: str) -> None:
    """Imports an optional package, for the module that adapts to it.

    Args:
      package: The package or module that is imported.
      extra: The extra of flax-partial that installs it.

    Raises:
      ModuleNotFoundError: It, or what it imports itself, is not installed; the error says how to.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if package == "keras" and error.name in _OTHER_BACKENDS:
            raise ModuleNotFoundError(
                f"Keras looks for its backend {error.name!r}, which is not installed. Set the "
                "environment variable KERAS_BACKEND=jax before keras is imported.",
                name=error.name,
            ) from error
        raise ModuleNotFoundError(
            f"flax_partial.callbacks.{extra} needs the package {error.name!r}, which is not "
            f"installed. Install it with: {how_to_install(extra)}",
            name=error.name,
        ) from error
