"""Objects with a state of their own: iterators of data, random numbers, whatever is no array.

A checkpoint holds their states as text in what it records of training, so that the tree of arrays
is as the user made it, here and for Orbax:

    {"extras": {"data": {"0": "...", "1": "..."}}}

by name and process: each process has its own, and gets its own again. The text is JSON, in which a
dict stands as {"dict": [[key, value], ...]}, a tuple as {"tuple": [...]}, bytes as {"bytes":
base64} and a NumPy array as {"array": base64, "dtype": ..., "shape": [...]}. None of it is run.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Ways = tuple[Callable[[], Any], Callable[[Any], Any]]

_EXTRAS = "extras"
_PARTIAL = "partial=True lets the callback lack some"
_KEEP_MISSING = "keep_missing=True leaves those as they are: data begin anew, unless set otherwise"
# What gets an object's state, and what sets it: Grain and NumPy, PyTorch, Python, others.
_METHODS = (
    ("get_state", "set_state"),
    ("state_dict", "load_state_dict"),
    ("getstate", "setstate"),
    ("to_json", "from_json"),
)


class Extras:
    """The objects whose states one callback saves and restores."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        """Looks for a way to get and set each one's state.

        Raises:
          TypeError: There is none.
        """
        self._ways = {name: _ways_of(name, one) for name, one in objects.items()}

    def metadata(self) -> dict[str, Any]:
        """Returns what is stored of them: their states now, in this process.

        Raises:
          UnsupportedLeafError: A state holds what cannot be stored; it is named.
        """
        if not self._ways:
            return {}
        process = str(jax.process_index())
        states = {name: {process: _encoded(name, get())} for name, (get, _) in self._ways.items()}
        return {_EXTRAS: states}

    def find(
        self, recorded: Mapping[str, Any], *, partial: bool, keep_missing: bool
    ) -> dict[str, str]:
        """Returns what is stored of each of them that can be set.

        Args:
          recorded: What the checkpoint records of training.
          partial: Whether it may hold others.
          keep_missing: Whether it may lack some, which then stay as they are.

        Raises:
          TargetMismatchError: It differs in what is not allowed.
        """
        stored, session = (_dict(recorded.get(key)) for key in (_EXTRAS, "session"))
        then = session.get("processes", 1)
        now, process = jax.process_count(), str(jax.process_index())
        found = {}
        problems, ways_out = [], []
        for name in self._ways:
            text = _dict(stored.get(name)).get(process) if then == now else None
            if text is not None:
                found[name] = text
            elif not keep_missing:
                why = _why_missing(is_stored=name in stored, then=then, now=now)
                problems.append(f"extra {name!r} {why}")
                ways_out = [_KEEP_MISSING]
        is_own = [name for name in stored if then != now or process in _dict(stored[name])]
        left_over = [] if partial else [name for name in is_own if name not in self._ways]
        if left_over:
            problems += [f"extra {name!r} is not among the callback's extras" for name in left_over]
            ways_out.append(_PARTIAL)
        if problems:
            raise fp.TargetMismatchError(
                f"The checkpoint does not fit the callback's extras ({'; '.join(ways_out)}):\n  "
                + "\n  ".join(problems)
            )
        return found

    def set(self, found: Mapping[str, str]) -> None:
        """Sets the states that `find` has found."""
        for name, text in found.items():
            _, set_state = self._ways[name]
            set_state(_decoded(json.loads(text)))


def _dict(value: object) -> dict[str, Any]:
    """What custom metadata has where a dict is expected: others may have written it."""
    return value if isinstance(value, dict) else {}


def _why_missing(*, is_stored: bool, then: int, now: int) -> str:
    if is_stored and then != now:
        return (
            f"was saved by {then} processes, and there are {now} now: the data are shared out "
            "otherwise, and the states do not apply"
        )
    return "is not in the checkpoint" if not is_stored else "is not in it for this process"


def _ways_of(name: str, one: Any) -> Ways:
    """Returns what gets and what sets an object's state."""
    if isinstance(one, tuple) and len(one) == 2 and all(map(callable, one)):  # noqa: PLR2004
        return one
    if isinstance(one, np.random.Generator):
        return _ways_of_generator(one)
    for get, set_ in _METHODS:
        if callable(getattr(one, get, None)) and callable(getattr(one, set_, None)):
            return getattr(one, get), getattr(one, set_)
    pairs = ", ".join(" and ".join(pair) for pair in _METHODS)
    raise TypeError(
        f"extras[{name!r}] is {type(one).__name__}, which has no methods to get and set its state "
        f"({pairs}). Give a pair of functions: what returns its state, and what takes it."
    )


def _ways_of_generator(one: np.random.Generator) -> Ways:
    bits = one.bit_generator

    def set_state(state: Any) -> None:
        bits.state = state

    return lambda: bits.state, set_state


def _encoded(name: str, state: Any) -> str:
    return json.dumps(_plain(name, state), separators=(",", ":"))


def _plain(name: str, value: Any) -> Any:
    """Returns a value as JSON has it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        pairs = value.items()
        return {"dict": [[_plain(name, key), _plain(name, one)] for key, one in pairs]}
    if isinstance(value, (list, tuple)):
        items = [_plain(name, one) for one in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"array": data, "dtype": value.dtype.str, "shape": list(value.shape)}
    raise fp.UnsupportedLeafError(
        f"The state of extra {name!r} holds a {type(value).__name__}. It may hold dicts, lists, "
        "tuples, numbers, strings, bytes, None and NumPy arrays."
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    if not isinstance(value, dict):
        return value
    if "bytes" in value:
        return base64.b64decode(value["bytes"])
    if "dict" in value:
        return {_decoded(key): _decoded(one) for key, one in value["dict"]}
    if "tuple" in value:
        return tuple(_decoded(value["tuple"]))
    array = np.frombuffer(base64.b64decode(value["array"]), value["dtype"])
    shaped = array.reshape(value["shape"]).copy()
    return shaped if value["shape"] else shaped[()]
