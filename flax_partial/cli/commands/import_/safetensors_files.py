"""Safetensors files, opened: their leaves, and reads of them piece by piece."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flax_partial.cli import safetensors
from flax_partial.cli.safetensors import Stored
from flax_partial.errors import CorruptCheckpointError, KeyConflictError, UnsupportedLeafError
from flax_partial.format.digests import bytes_of
from flax_partial.format.model import Leaf, Region
from flax_partial.storage import system


class SafetensorsFiles:
    """Files that together hold one tree, as large models come.

    Attributes:
      leaves: Of all files.
      custom_metadata: Of all files; the first one counts where they differ.
      training: Likewise, what they record of training.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Opens files and reads their headers.

        Raises:
          CorruptCheckpointError: One is damaged, or is no safetensors file.
          UnsupportedLeafError: One holds tensors that no checkpoint can hold.
          KeyConflictError: Two hold tensors of one name.
        """
        self.leaves: list[Leaf] = []
        self.custom_metadata: dict[str, Any] = {}
        self.training: dict[str, Any] = {}
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        with contextlib.ExitStack() as opened:
            for path in paths:
                file = opened.enter_context(path.open("rb", buffering=0))
                self._add(path, file, _parsed(path, file))
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Closes the files."""
        self._opened.close()

    def read(self, regions: Sequence[Region]) -> list[np.ndarray | Exception]:
        """Returns the data of each region.

        Raises:
          CorruptCheckpointError: A file became shorter meanwhile.
        """
        return [self._read(*region) for region in regions]

    def _add(self, path: Path, file: BinaryIO, stored: Stored) -> None:
        known = {leaf.name for leaf in self.leaves}
        twice = [leaf.name for leaf in stored.leaves if leaf.name in known]
        if twice:
            raise KeyConflictError(f"{path}: {twice[0]!r} is in another file, too.")
        self.leaves += stored.leaves
        self.custom_metadata = stored.custom_metadata | self.custom_metadata
        self.training = stored.training | self.training
        self._places |= {name: (file, at) for name, at in stored.offsets.items()}

    def _read(self, leaf: Leaf, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        file, begin = self._places[leaf.name]
        stored = np.empty(shape, safetensors.stored_dtype(leaf))
        for at, index in safetensors.runs(leaf.shape, start, shape):
            here: tuple[Any, ...] = (*index, ...)  # a view, of a number too
            run = bytes_of(stored[here])
            _read_into(file, run, begin + at * stored.itemsize, leaf.name)
        return stored.astype(leaf.numpy_dtype, copy=False)


def _parsed(path: Path, file: BinaryIO) -> Stored:
    size = os.fstat(file.fileno()).st_size
    try:
        header = file.read(safetensors.header_bytes(file.read(8), size))
        return safetensors.parse(header, size)
    except UnsupportedLeafError as error:
        raise UnsupportedLeafError(f"{path}: {error}") from error
    except ValueError as error:
        raise CorruptCheckpointError(f"{path}: {error}") from error


def _read_into(file: BinaryIO, data: np.ndarray, at: int, name: str) -> None:
    left = data.data
    while left:
        count = os.preadv(file.fileno(), [left[: system.MOST_BYTES]], at)
        if not count:
            raise CorruptCheckpointError(f"Leaf {name!r}: its file became shorter meanwhile.")
        left, at = left[count:], at + count
