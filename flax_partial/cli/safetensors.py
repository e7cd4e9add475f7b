"""The safetensors format: what stands in a file, and where. Pure.

A file is the length of its header (8 bytes, little-endian), the header, a JSON object, and then the
tensors' bytes, little-endian and in C order, without gaps. We write it ourselves: the package
`safetensors` has no writer that takes a tensor in pieces. Facts of the format are from its README
(https://github.com/huggingface/safetensors) and from its reader's source.

Not every dtype that a checkpoint holds has a name there. Some are stored as a wider one that holds
all of their values. The header's `__metadata__` records that, what is no tensor, and kinds of keys
that names do not show: from a file of ours the same checkpoint can be made again.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import msgspec
import numpy as np
from msgspec import Raw, Struct

from flax_partial.errors import UnsupportedLeafError
from flax_partial.format.chunks import Shape, choose_chunk_shape
from flax_partial.format.keypaths import KEY_KINDS, STR_KEY
from flax_partial.format.model import (
    ARRAY_KINDS,
    BYTES,
    MOST_AXES,
    NUMPY_ARRAY,
    PRNG_KEY,
    STRING,
    Count,
    Kind,
    Leaf,
    numpy_dtype,
)
from flax_partial.options import SaveOptions

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
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_EMPTY_KINDS = frozenset(get_args(Kind)) - ARRAY_KINDS - {STRING, BYTES}
_METADATA, _OURS = "__metadata__", "flax_partial"
_MOST_HEADER_BYTES = 100_000_000  # a reader refuses more
_ALIGNMENT = 8
_LENGTH_BYTES = 8


class _Tensor(Struct):
    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


class _Rest(Struct, omit_defaults=True):
    """What stands under `flax_partial` in a header's metadata, by names of leaves.

    Attributes:
      custom_metadata: The checkpoint's.
      training: What it records of training.
      strings: Values of strings.
      binary: Values of bytes; base64 in JSON.
      empty: Kinds of other leaves without data.
      prng_keys: How PRNG keys are made.
      dtypes: Of tensors that are stored as wider ones.
      kinds: Of tensors that are none of NumPy's arrays.
      keys: The keys of a path and their kinds, where a name does not say them.
    """

    custom_metadata: dict[str, Any] = {}
    training: dict[str, Any] = {}
    strings: dict[str, str] = {}
    binary: dict[str, bytes] = {}
    empty: dict[str, Kind] = {}
    prng_keys: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    kinds: dict[str, Kind] = {}
    keys: dict[str, tuple[tuple[str, ...], str]] = {}


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file holds, as a checkpoint would.

    Attributes:
      leaves: The leaves, without boxes; tensors are in chunks as a save would choose them.
      offsets: Name of each tensor to where in the file its bytes begin.
      custom_metadata: The checkpoint's that a file of ours was made of; of another file, what its
        header says.
      training: What such a checkpoint records of training.
    """

    leaves: tuple[Leaf, ...]
    offsets: dict[str, int]
    custom_metadata: dict[str, Any]
    training: dict[str, Any]


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
    """Returns, for each leaf that the format cannot hold, why."""
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


def metadata_of(
    leaves: Sequence[Leaf], custom_metadata: dict[str, Any], training: dict[str, Any]
) -> dict[str, str]:
    """Returns what is no tensor, as the texts that a header may hold.

    `format` is what libraries that load models look for. `flax_partial` is JSON, a `_Rest`.
    """
    rest = _Rest(custom_metadata, training)
    rest.strings = {leaf.name: leaf.text for leaf in leaves if leaf.kind == STRING}
    rest.binary = {leaf.name: leaf.data for leaf in leaves if leaf.kind == BYTES}
    rest.empty = {leaf.name: leaf.kind for leaf in leaves if leaf.kind in _EMPTY_KINDS}
    rest.prng_keys = {leaf.name: leaf.text for leaf in leaves if leaf.kind == PRNG_KEY}
    rest.dtypes = {leaf.name: leaf.dtype for leaf in leaves if leaf.dtype in WIDER}
    rest.kinds = {
        leaf.name: leaf.kind
        for leaf in leaves
        if leaf.is_array and leaf.kind not in (NUMPY_ARRAY, PRNG_KEY)
    }
    rest.keys = {
        leaf.name: (leaf.texts, leaf.key_kinds)
        for leaf in leaves
        if (leaf.texts, leaf.key_kinds) != _keys_of(leaf.name)
    }
    text = json.dumps(msgspec.to_builtins(rest), ensure_ascii=False)
    return {"format": "flax", _OURS: text}


def header_bytes(length: bytes, file_bytes: int) -> int:
    """Returns how many bytes of a header follow the first 8 of a file, which are given.

    Raises:
      ValueError: It is no safetensors file, or is cut off.
    """
    size = int.from_bytes(length, "little")
    if len(length) < _LENGTH_BYTES or not 2 <= size <= min(  # noqa: PLR2004 - `{}`
        file_bytes - _LENGTH_BYTES, _MOST_HEADER_BYTES
    ):
        raise ValueError("it is no safetensors file, or is cut off")
    return size


def parse(header: bytes, file_bytes: int) -> Stored:
    """Reads a header, and checks all of it.

    Args:
      header: Without the 8 bytes of its length.
      file_bytes: Size of the file.

    Raises:
      ValueError: It is damaged, or the file is cut off.
      UnsupportedLeafError: There are tensors that no checkpoint can hold; it names them.
    """
    table = msgspec.json.decode(header, type=dict[str, Raw])  # its errors are ValueErrors
    metadata = msgspec.json.decode(table.pop(_METADATA, b"{}"), type=dict[str, str])
    tensors = {name: msgspec.json.decode(raw, type=_Tensor) for name, raw in table.items()}
    unknown = [
        f"{name!r} is {tensor.dtype}{list(tensor.shape)}"
        for name, tensor in tensors.items()
        if tensor.dtype not in _BY_NAME or len(tensor.shape) > MOST_AXES
    ]
    if unknown:
        raise UnsupportedLeafError("no checkpoint can hold these:\n  " + "\n  ".join(unknown))
    begin = _LENGTH_BYTES + len(header)
    _require_whole(tensors, file_bytes - begin)
    rest = _Rest(dict(metadata))
    if _OURS in metadata:
        rest = msgspec.convert(json.loads(metadata[_OURS]), type=_Rest)
    if not _EMPTY_KINDS.issuperset(rest.empty.values()):
        raise ValueError("its metadata name leaves of no kind")
    leaves = [_leaf(name, tensor, rest) for name, tensor in tensors.items()]
    leaves += [_named(name, STRING, rest, text=text) for name, text in rest.strings.items()]
    leaves += [_named(name, BYTES, rest, data=data) for name, data in rest.binary.items()]
    leaves += [_named(name, kind, rest) for name, kind in rest.empty.items()]
    offsets = {name: begin + tensor.data_offsets[0] for name, tensor in tensors.items()}
    return Stored(tuple(leaves), offsets, rest.custom_metadata, rest.training)


def _require_whole(tensors: Mapping[str, _Tensor], data_bytes: int) -> None:
    """Raises ValueError unless the tensors follow each other without gaps and fill the data."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, stop = tensor.data_offsets
        size = math.prod(tensor.shape) * numpy_dtype(_BY_NAME[tensor.dtype]).itemsize
        if begin != end or stop - begin != size:
            raise ValueError(f"tensor {name!r} is not where it should be")
        end = stop
    if end != data_bytes:
        raise ValueError(f"its tensors are of {end:,} bytes, and it holds {data_bytes:,}")


def _leaf(name: str, tensor: _Tensor, rest: _Rest) -> Leaf:
    stored = _BY_NAME[tensor.dtype]
    dtype = rest.dtypes.get(name, stored)
    kind = PRNG_KEY if name in rest.prng_keys else rest.kinds.get(name, NUMPY_ARRAY)
    if WIDER.get(dtype, dtype) != stored or kind not in ARRAY_KINDS:
        raise ValueError(f"tensor {name!r} of {stored} is no {kind} of {dtype}")
    chunk = choose_chunk_shape(
        tensor.shape,
        unit=tensor.shape,
        pinned=frozenset(),
        itemsize=numpy_dtype(dtype).itemsize,
        target_bytes=SaveOptions().chunk_bytes,
    )
    made = {"dtype": dtype, "shape": tensor.shape, "chunk": chunk}
    return _named(name, kind, rest, text=rest.prng_keys.get(name, ""), **made)


def _named(name: str, kind: Kind, rest: _Rest, **more: Any) -> Leaf:
    texts, key_kinds = rest.keys.get(name) or _keys_of(name)
    is_path = len(texts) == len(key_kinds) and KEY_KINDS.issuperset(key_kinds)
    if ".".join(texts) != name or not is_path:
        raise ValueError(f"leaf {name!r} has other keys")
    return Leaf(texts, key_kinds, kind, **more)


def _keys_of(name: str) -> tuple[tuple[str, ...], str]:
    """The keys that a name stands for without further metadata: the texts between the dots."""
    texts = tuple(name.split("."))
    return texts, STR_KEY * len(texts)


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
