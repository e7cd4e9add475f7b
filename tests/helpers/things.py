"""What several test modules need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import flax_partial as fp

if TYPE_CHECKING:
    from pathlib import Path

QUICK = fp.SaveOptions(durable=False)
X = np.arange(3)


def listing(directory: Path) -> list[str]:
    """Every file and directory below, with sizes."""
    return sorted(
        f"{entry.relative_to(directory)} {entry.lstat().st_size if entry.is_file() else ''}"
        for entry in directory.rglob("*")
    )


class Element:
    """One element of a list that other saves hold the rest of."""

    def __init__(self, index: int, value: Any) -> None:
        self.index, self.value = index, value


jax.tree_util.register_pytree_with_keys(
    Element,
    lambda one: (((jax.tree_util.SequenceKey(one.index), one.value),), one.index),
    lambda index, children: Element(index, children[0]),
)
