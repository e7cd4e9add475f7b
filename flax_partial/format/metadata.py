"""Custom metadata, and those of training: which values JSON can hold, how several saves merge."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flax_partial.errors import UnsupportedLeafError


def to_json(value: Mapping[str, Any]) -> bytes:
    """The bytes of JSON that tables hold: UTF-8, without spaces.

    Raises:
      ValueError: It holds a lone surrogate, or an integer that is too long for Python to write.
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def check_metadata(
    value: Mapping[str, Any] | None, name: str = "custom_metadata"
) -> dict[str, Any]:
    """Returns metadata as JSON would give it back.

    Args:
      value: The metadata.
      name: What an error calls it.

    Raises:
      UnsupportedLeafError: Some value would not come back as it is; the error says where it stands.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UnsupportedLeafError(f"{name} is a dict, not a {type(value).__name__}.")
    try:
        checked = {k: _json_value(v, f"{name}[{k!r}]") for k, v in _with_text_keys(value, name)}
        to_json(checked)
    except (ValueError, RecursionError) as error:  # lone surrogates, integers too long for Python
        raise UnsupportedLeafError(
            f"{name} cannot be written as JSON: {type(error).__name__}: {error}. "
            "Save what is not text, a number of common size, or of common depth as a leaf."
        ) from error
    return checked


def _json_value(value: object, where: str) -> Any:
    if isinstance(value, Mapping):
        return {k: _json_value(v, f"{where}[{k!r}]") for k, v in _with_text_keys(value, where)}
    if isinstance(value, list):
        return [_json_value(item, f"{where}[{i}]") for i, item in enumerate(value)]
    is_plain = value is None or isinstance(value, (bool, int, str))
    if is_plain or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise UnsupportedLeafError(
        f"{where} is {value!r}, a {type(value).__name__} that JSON cannot hold. "
        "Convert it to dicts, lists, strings, finite numbers, bools and None."
    )


def _with_text_keys(value: Mapping[Any, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if not isinstance(key, str):
            raise UnsupportedLeafError(f"{where} has key {key!r}: keys are strings.")
        yield key, item


def merge_metadata(dictionaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges dictionaries deeply; the later value wins, and lists are values."""
    merged: dict[str, Any] = {}
    stack = [(merged, dictionary) for dictionary in dictionaries][::-1]
    while stack:  # and no recursion, which would end before the depth that JSON is read to
        into, dictionary = stack.pop()
        for key, value in dictionary.items():
            if not isinstance(value, Mapping):
                into[key] = value
                continue
            if not isinstance(into.get(key), dict):
                into[key] = {}  # a dict of our own: what was passed stays as it is
            stack.append((into[key], value))
    return merged
