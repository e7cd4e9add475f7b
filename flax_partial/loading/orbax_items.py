"""Which items a checkpoint of Orbax's consists of, found by names and small files alone.

An *item* is a directory, and its kind follows from the files in it:

- a tree: a `_METADATA`. v1 calls it `state` or `pytree`, a v0 `CheckpointManager` `default`, a
  `Composite` as its user likes; `StandardCheckpointer` and `PyTreeCheckpointer` write it right at
  the checkpoint's path;
- a single array (`ArraySave`): the tree of one leaf that the handler of this name wrote;
- a random key (`JaxRandomKeySave`, `NumpyRandomKeySave`): a tree `<key>`, and JSON about it beside
  it, `<key>_metadata`;
- JSON (`JsonSave`, v1's `JsonHandler`): a file `metadata` or `data.json`, or of another name where
  the handler of this name wrote it.

Whatever else lies there (the state of a data iterator, a protocol buffer) only its own handler can
read. `metrics` of a manager are no item: they describe the checkpoint.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from flax_partial.errors import CorruptCheckpointError
from flax_partial.format import orbax as orbax_format
from flax_partial.storage import files

Table = Mapping[str, Any]

_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what an Orbax save has not committed
_MARKS = (orbax_format.CHECKPOINT_METADATA, orbax_format.V1_MARKER)
_NO_JSON = (*_MARKS, orbax_format.COMMIT_MARKER)
_MANAGER_ITEM = "default"
_DELETION = "_CHECKPOINT_DELETION"  # names the item that v1 is removing
_ABOUT_KEY = "_metadata"
_KEY_FILE = "metadata"
_JSON_FILES = ("data.json", "metadata", orbax_format.METRICS)
_JSON_HANDLERS = (".JsonCheckpointHandler", ".JsonHandler", ".MetricsHandler")
_ARRAY_HANDLER = ".ArrayCheckpointHandler"
_KEY_HANDLER = "RandomKeyCheckpointHandler"  # JAX's, or NumPy's
_MSGPACK_FILE = "checkpoint"
_MSGPACK_MAPS = {bytes([first]) for first in (*range(0x80, 0x90), 0xDE, 0xDF)}


class Kind(Enum):
    """What an item is."""

    TREE = auto()
    ARRAY = auto()
    KEY = auto()
    JSON = auto()


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a checkpoint.

    Attributes:
      name: Of its directory; empty where that is the checkpoint's.
      kind: What it is.
      path: The directory of its tree, or its file of JSON.
      about: The file of JSON about a random key.
    """

    name: str
    kind: Kind
    path: Path
    about: Path | None = None


@dataclass(frozen=True, slots=True)
class Items:
    """What a checkpoint consists of.

    Attributes:
      table: Its `_CHECKPOINT_METADATA`; empty where there is none.
      found: Its items by name, at least one.
      others: Name of each item that is not read, to the reason: only its own handler reads it.
      metrics: Those that a manager stored; None where there are none.
    """

    table: Table
    found: tuple[Item, ...]
    others: Mapping[str, str]
    metrics: Any = None


def read_json(path: Path) -> Any:
    """Returns what a file of JSON holds; an empty object where there is no file.

    Raises:
      CorruptCheckpointError: It is not JSON.
    """
    data = files.read(path)
    if data is None:
        return {}
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is damaged: {error}") from error


def read_table(path: Path) -> dict[str, Any]:
    """Returns the object that a file of JSON holds; an empty one where there is no file.

    Raises:
      CorruptCheckpointError: It holds something else.
    """
    table = read_json(path)
    if not isinstance(table, dict):
        raise CorruptCheckpointError(f"{path} is damaged: it holds no JSON object")
    return table


def find(path: Path, *, is_meant: bool) -> Items | None:
    """Finds the items of a checkpoint.

    Args:
      path: The checkpoint, or an item in it.
      is_meant: Whether it is named as one: then no mark is needed, such as handlers that
        are called by themselves do not leave, nor an item that is read here.

    Returns:
      None where no checkpoint is, or one that is not finished, or one without any such item.

    Raises:
      CorruptCheckpointError: A file that lists the items is damaged.
    """
    if _UNFINISHED in path.name:
        return None
    table = read_table(path / orbax_format.CHECKPOINT_METADATA)
    handlers = table.get("item_handlers")
    handler = handlers if isinstance(handlers, str) else _handler_in_parent(path)
    is_marked = any((path / mark).is_file() for mark in _MARKS)
    whole = _item(path, "", handler, is_inside=is_meant and not is_marked)
    if whole is not None:
        return Items(table, (whole,), {})
    deleted = read_table(path / _DELETION).get("checkpointable_name")
    names = [name for name in _directories(path) if name != deleted]
    if not (is_marked or _looks_like_step(path, names, is_meant=is_meant)):
        return None  # a directory of checkpoints, perhaps
    by_item = handlers if isinstance(handlers, dict) else {}
    items = _of_step(path, names, table, by_item)
    is_foreign = is_meant and by_item and items.others
    return items if items.found or is_foreign else None


def _of_step(path: Path, names: Sequence[str], table: Table, handlers: Table) -> Items:
    found: list[Item] = []
    others: dict[str, str] = {}
    metrics = None
    for name in names:
        handler = str(handlers.get(name, "")).encode(errors="backslashreplace").decode()
        item = _item(path / name, name, handler, is_inside=True)
        if item is None:
            others[name] = f"only its own handler reads it: {handler or 'not named'}"
        elif name != orbax_format.METRICS or item.kind != Kind.JSON:
            found.append(item)
        else:
            try:
                metrics = read_json(item.path)
            except CorruptCheckpointError as error:
                others[name] = str(error)
    return Items(table, tuple(found), others, metrics)


def is_of_msgpack(path: Path) -> bool:
    """Whether a checkpoint, or an item in it, is in the msgpack of Orbax before its `_METADATA`."""
    heads = [
        (files.read(directory / _MSGPACK_FILE) or b"")[:1]
        for directory in (path, *(path / name for name in _directories(path)))
        if (directory / _MSGPACK_FILE).is_file()
    ]
    return any(head in _MSGPACK_MAPS for head in heads)


def _handler_in_parent(path: Path) -> str:
    """The handler of an item as the checkpoint around it records it; empty where it does not."""
    try:
        table = read_table(path.parent / orbax_format.CHECKPOINT_METADATA)
    except CorruptCheckpointError:
        return ""
    handlers = table.get("item_handlers")
    return str(handlers.get(path.name, "")) if isinstance(handlers, dict) else ""


def _directories(path: Path) -> list[str]:
    return [
        name
        for name in sorted(files.listed(path))
        if _UNFINISHED not in name and (path / name).is_dir()
    ]


def _looks_like_step(path: Path, names: Sequence[str], *, is_meant: bool) -> bool:
    """Whether it is a step of a manager that left no mark in it, as older ones did.

    Its trees have no mark of their own, and are not steps themselves.
    """
    trees = [name for name in names if _is_tree(path / name)]
    if _MANAGER_ITEM in trees:
        return True
    return (
        bool(trees)
        and (is_meant or path.name.rpartition("_")[2].isdecimal())
        and not any(name.isdecimal() for name in trees)
        and not any((path / name / mark).exists() for name in trees for mark in _MARKS)
    )


def _is_tree(directory: Path) -> bool:
    return (directory / orbax_format.TREE_METADATA).is_file()


def _item(directory: Path, name: str, handler: str, *, is_inside: bool) -> Item | None:
    """What a directory is as an item; None if nothing that is read here.

    Args:
      directory: The directory.
      name: What the item is called.
      handler: What wrote it; empty if that is not known.
      is_inside: Whether it is known to be an item.
    """
    if _is_tree(directory):
        kind = Kind.ARRAY if handler.endswith(_ARRAY_HANDLER) else Kind.TREE
        return Item(name, kind, directory)
    is_unknown = is_inside and not handler
    if is_unknown or handler.endswith(_KEY_HANDLER):
        for key, about in _keys(directory):
            return Item(name, Kind.KEY, key, about)
    is_json = handler.endswith(_JSON_HANDLERS)
    names = [each for each in files.listed(directory) if each not in _NO_JSON]
    known = [each for each in _JSON_FILES if each in names]
    chosen = known[:1] or ([] if is_unknown else names)
    if (is_unknown or is_json) and len(chosen) == 1 and (directory / chosen[0]).is_file():
        return Item(name, Kind.JSON, directory / chosen[0])
    return None


def _keys(directory: Path) -> Iterator[tuple[Path, Path]]:
    """The tree of a random key in a directory, and the file about it."""
    for name in sorted(files.listed(directory)):
        about = directory / (name + _ABOUT_KEY) / _KEY_FILE
        if _is_tree(directory / name) and about.is_file():
            yield directory / name, about
