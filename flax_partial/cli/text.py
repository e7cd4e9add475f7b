"""Sizes, ages, shapes and shardings as short text. Pure."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flax_partial.format import model as kinds
from flax_partial.format.model import Leaf

_EMPTY = {kinds.NONE: "None", kinds.DICT: "{}", kinds.LIST: "[]"}
_LONGEST_TEXT = 40
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_TENTHS_BELOW = 100
_AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


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


def share(part: int, whole: int) -> str:
    """A percentage; nothing of nothing is none."""
    return f"{100 * part / whole if whole else 0:.1f} %"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and what it counts: `1 leaf`, `2,000 leaves`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def leaves(number: int) -> str:
    """A number of leaves."""
    return counted(number, "leaf", "leaves")


def number(value: float) -> str:
    """A metric, or a difference, to four digits."""
    return f"{value:.4g}"


def shape(sizes: Sequence[int]) -> str:
    """A shape as Python writes it, without spaces."""
    return f"({','.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"


def name(text: str) -> str:
    """The name of a leaf; that of the only leaf of a tree is empty."""
    return text or "''"


def leaf(described: Leaf) -> str:
    """What a leaf is: `float32(3,4)`, or the value of what is no array."""
    if not described.is_array:
        return plain_value(described)
    kind = f"key<{described.text}>" if described.kind == kinds.PRNG_KEY else described.dtype
    return kind + shape(described.shape)


def plain_value(described: Leaf) -> str:
    """The value of a leaf that is no array."""
    if described.kind != kinds.STRING:
        return _EMPTY.get(described.kind, "()")
    return _shortened(repr(described.text), _LONGEST_TEXT)


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def as_json(value: object, limit: int = 200) -> str:
    """Compact JSON of at most `limit` characters."""
    return _shortened(json.dumps(value, ensure_ascii=False), limit)


def custom_metadata(table: Mapping[str, Any]) -> str:
    """What people want to know of custom metadata; empty if there is none.

    Under `session` the callback keeps by what it recovers from a crash: long, and of no use here.
    """
    shown = {key: value for key, value in table.items() if key != "session"}
    return as_json(shown) if shown else ""


def common_prefix(names: Sequence[str]) -> str:
    """What a part's leaves have in common: its subtree, or its only leaf; `*` where it is none."""
    if len(names) == 1:
        return names[0]
    keys = [
        found[0]
        for found in zip(*(n.split(".") for n in names), strict=False)
        if len({*found}) == 1
    ]
    return ".".join([*keys, "*"])


def finite(value: float | None) -> float | None:
    """What JSON can hold of a number."""
    return value if value is not None and math.isfinite(value) else None


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
    cuts = [
        "+".join(f"{axis}={sizes[axis]}" for axis in _axes(entry)) or "-"
        for entry in table["partition_spec"]
    ]
    if all(cut == "-" for cut in cuts):
        return f"replicated x{math.prod(sizes.values())}"
    return f"({','.join(cuts)})"


def _axes(entry: str | Sequence[str] | None) -> Sequence[str]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else entry
