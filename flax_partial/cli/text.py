"""Sizes, ages, shapes, shardings and leaves as short text. Pure."""

from __future__ import annotations

import difflib
import json
import math
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from flax_partial.errors import first_few
from flax_partial.format import model as kinds

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from flax_partial.format.model import Leaf

_LONGEST_TEXT, _LONGEST_METADATA = 40, 200  # characters
_MOST_NAMES = 8
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_TENTHS_BELOW = 100
_AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
_EMPTY = {
    kinds.NONE: "None",
    kinds.DICT: "{}",
    kinds.LIST: "[]",
    **dict.fromkeys((kinds.TUPLE, kinds.NAMED_TUPLE), "()"),
}


def size(count: float) -> str:
    """Bytes, in the unit that leaves one to four digits before the point: `1.5 MiB`."""
    unit = 0
    while round(count) >= 1 << 10 and unit < len(_UNITS) - 1:
        count /= 1 << 10
        unit += 1
    return f"{count:.{1 if unit and count < _TENTHS_BELOW else 0}f} {_UNITS[unit]}"


def age(secs: float) -> str:
    """How long ago something was: `3 min ago`."""
    for unit_secs, unit in _AGES:
        if secs >= unit_secs:
            return f"{int(secs / unit_secs)} {unit} ago"
    return "now"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and what it counts: `1 part`, `2,000 parts`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def leaves(number: int, size_bytes: int | None = None) -> str:
    """A number of leaves, and their size in bytes if it is given: `2 leaves, 8 B`."""
    counted_leaves = counted(number, "leaf", "leaves")
    return counted_leaves if size_bytes is None else f"{counted_leaves}, {size(size_bytes)}"


def number(value: float) -> str:
    """A metric, or a difference, to four digits."""
    return f"{value:.4g}"


def shape(sizes: Sequence[int]) -> str:
    """A shape as Python writes it, without spaces."""
    return f"({','.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"


def name(leaf_name: str) -> str:
    """The name of a leaf; that of the only leaf of a tree is empty."""
    return leaf_name or "''"


def leaf(described: Leaf) -> str:
    """What a leaf is: `float32(3,4)`, or the value of what is no array."""
    if not described.is_array:
        return plain_value(described)
    kind = f"key<{described.text}>" if described.kind == kinds.PRNG_KEY else described.dtype
    return kind + shape(described.shape)


def plain_value(described: Leaf) -> str:
    """The value of a leaf that is no array."""
    value = described.data if described.kind == kinds.BYTES else described.text
    return _EMPTY.get(described.kind) or _shortened(repr(value), _LONGEST_TEXT)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def metadata(custom: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line of what each table holds, if it holds anything, as JSON and shortened."""
    for name, table in (("training", training), ("custom metadata", custom)):
        if table:
            yield f"{name}: {_shortened(json.dumps(table, ensure_ascii=False), _LONGEST_METADATA)}"


def common_prefix(names: Sequence[str]) -> str:
    """What the names of a part's leaves have in common: `params.0.*`; the only name as it is."""
    if len(names) == 1:
        return names[0]
    levels = zip(*(each.split(".") for each in names), strict=False)
    shared = takewhile(lambda keys: len({*keys}) == 1, levels)
    return ".".join([*(keys[0] for keys in shared), "*"])


def close(name: str, names: Iterable[str]) -> list[str]:
    """Returns those of the known names that are most like an unknown one."""
    return difflib.get_close_matches(name, [*names])


def choices(name: str, names: Sequence[str]) -> str:
    """Returns what an unknown name could mean: the known ones like it, or the first few."""
    found = close(name, names)
    if found:
        return ", ".join(found)
    return ", ".join(first_few(names, most=_MOST_NAMES, count=len(names)))


def sharding(table: Mapping[str, Any] | None) -> str:
    """A sharding in Orbax's terms: the mesh axes along which each dimension is cut, and how often.

    `(data=4,-)` is an array whose first dimension is cut in four along the mesh axis `data`.
    """
    if table is None:
        return ""
    if "device_str" in table:
        return str(table["device_str"])
    try:
        return _named_sharding(table)
    except (KeyError, TypeError, ValueError):  # Orbax's files may hold anything
        return str(table.get("sharding_type", "?"))


def _named_sharding(table: Mapping[str, Any]) -> str:
    sizes = dict(zip(table["axis_names"], table["shape"], strict=True))
    axes = ([entry] if isinstance(entry, str) else entry or () for entry in table["partition_spec"])
    cuts = ["+".join(f"{axis}={sizes[axis]}" for axis in some) or "-" for some in axes]
    if all(cut == "-" for cut in cuts):
        return f"replicated x{math.prod(sizes.values())}"
    return f"({','.join(cuts)})"
