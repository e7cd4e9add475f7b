"""Shows MkDocs the sources as they are when installed: `callbacks/` is `flax_partial.callbacks`.

So the reference is made from the checkout, whether it is installed, how, or not at all.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.plugins import event_priority

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).resolve().parent.parent

_installed = tempfile.TemporaryDirectory(prefix="flax_partial_docs.")


@event_priority(100)  # before mkdocstrings takes its settings
def on_config(config: MkDocsConfig) -> None:
    """Points mkdocstrings to a folder in which the packages lie as they are imported."""
    package = Path(_installed.name) / "flax_partial"
    if not package.exists():
        package.mkdir()
        for source in (ROOT / "flax_partial").iterdir():
            (package / source.name).symlink_to(source)
        (package / "callbacks").symlink_to(ROOT / "callbacks")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_installed.name]
