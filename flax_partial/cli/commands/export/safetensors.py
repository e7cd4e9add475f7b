"""The safetensors format: what stands in a file, and where. Pure.

A file is the length of its header (8 bytes, little-endian), the header, a JSON object, and then the
tensors' bytes, little-endian and in C order, without gaps. We write it ourselves: the package
`safetensors` has no writer that takes a tensor in pieces. Facts of the format are from its README
(https://github.com/huggingface/safetensors) and from its reader's source.

Not every dtype that a checkpoint holds has a name there. Some are stored as a wider one that holds
all of their values; that is told in the header's `__metadata__`, beside what is no tensor.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_partial.format.chunks import Shape
from flax_partial.format.model import PRNG_KEY, STRING, Leaf, numpy_dtype

_DTYPES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
# The narrowest dtype with a name that holds every value.
WIDER = {
    "int2": "int8",
    "int4": "int8",
    "float4_e2m1fn": "float8_e4m3fn",
    "float8_e3m4": "bfloat16",
    "float8_e4m3b11fnuz": "bfloat16",
}
_METADATA = "__metadata__"
_MOST_HEADER_BYTES = 100_000_000  # a reader refuses more
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole file but for its tensors' bytes.

    Attributes:
      header: What the file begins with.
      offsets: Name of each tensor to where in the file its bytes begin.
      bytes: Size of the file.
    """

    header: bytes
    offsets: dict[str, int]
    bytes: int


def stored_dtype(leaf: Leaf) -> np.dtype[Any]:
    """The dtype that an array leaf is stored as."""
    return numpy_dtype(WIDER.get(leaf.dtype, leaf.dtype))


def problems(leaves: Iterable[Leaf]) -> list[str]:
    """Says of each leaf that the format cannot hold why."""
    found = []
    for leaf in leaves:
        if leaf.is_array and WIDER.get(leaf.dtype, leaf.dtype) not in _DTYPES:
            found.append(f"{leaf.name!r} is {leaf.dtype}, which safetensors has no name for")
        if leaf.name == _METADATA:
            found.append(f"{leaf.name!r} is a name that safetensors keeps for itself")
    return found


def ordered(leaves: Iterable[Leaf]) -> list[Leaf]:
    """Returns the array leaves in the order of their bytes, by which all are aligned."""
    arrays = [leaf for leaf in leaves if leaf.is_array]
    return sorted(arrays, key=lambda leaf: -stored_dtype(leaf).itemsize)


def lay_out(arrays: Sequence[Leaf], metadata: dict[str, str]) -> Layout:
    """Lays out a file.

    Args:
      arrays: The array leaves, `ordered`.
      metadata: For the header, by name.

    Raises:
      ValueError: The header would be larger than readers take.
    """
    table: dict[str, Any] = {_METADATA: metadata}
    offsets, end = {}, 0
    for leaf in arrays:
        begin, end = end, end + math.prod(leaf.shape) * stored_dtype(leaf).itemsize
        offsets[leaf.name] = begin
        table[leaf.name] = {
            "dtype": _DTYPES[WIDER.get(leaf.dtype, leaf.dtype)],
            "shape": leaf.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _MOST_HEADER_BYTES:
        raise ValueError(
            f"its header would take {len(text):,} bytes, and readers take {_MOST_HEADER_BYTES:,}"
        )
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: begin + len(header) for name, begin in offsets.items()}
    return Layout(header, offsets, len(header) + end)


def metadata_of(leaves: Iterable[Leaf], custom_metadata: dict[str, Any]) -> dict[str, str]:
    """Returns what is no tensor, as the texts that a header may hold.

    `format` is what libraries that load models look for. `flax_partial` is JSON: the custom
    metadata, strings, which other leaves are no tensors, how PRNG keys are made, and the dtypes
    of tensors that are stored as wider ones.
    """
    rest = {
        "custom_metadata": custom_metadata,
        "strings": {leaf.name: leaf.text for leaf in leaves if leaf.kind == STRING},
        "empty": {
            leaf.name: leaf.kind for leaf in leaves if not leaf.is_array and leaf.kind != STRING
        },
        "prng_keys": {leaf.name: leaf.text for leaf in leaves if leaf.kind == PRNG_KEY},
        "dtypes": {leaf.name: leaf.dtype for leaf in leaves if leaf.dtype in WIDER},
    }
    kept = {key: value for key, value in rest.items() if value}
    return {"format": "flax", "flax_partial": json.dumps(kept, ensure_ascii=False)}


def runs(whole: Shape, start: Shape, shape: Shape) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields the pieces of a box that lie without a gap in an array's C order.

    Args:
      whole: Shape of the array.
      start: Of the box.
      shape: Of the box.

    Yields:
      Where the piece begins in the array, in elements, and its index in the box.
    """
    split = len(whole)  # axes from here on are whole, but for the first of them
    while split and (split == len(whole) or shape[split] == whole[split]):
        split -= 1
    strides = [math.prod(whole[axis + 1 :]) for axis in range(len(whole))]
    first = sum(a * b for a, b in zip(start, strides, strict=True))
    for index in np.ndindex(shape[:split]):
        yield first + sum(a * b for a, b in zip(index, strides, strict=False)), index
