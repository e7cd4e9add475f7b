"""Checkpoints that Orbax wrote, as the same table of contents and the same reads as ours.

An *item* is a directory with a `_METADATA`: a tree, which v1 calls `state` or `pytree`, a v0
`CheckpointManager` calls `default`, and `StandardCheckpointer` and `PyTreeCheckpointer` write right
at the checkpoint's path. A checkpoint with one item is that item's tree; one with several (v0
`Composite`, v1 `save_checkpointables`) is a dict of them. What is no tree (JSON, the state of an
iterator) is left out.

The files are trusted in nothing: what makes no sense is a `CorruptCheckpointError`. There are no
digests to check. Only JSON and arrays are read; nothing that a file names is imported or run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from msgspec.structs import replace

from flax_partial.errors import CorruptCheckpointError, UnsupportedLeafError, first_few
from flax_partial.format import model as kinds
from flax_partial.format import orbax as orbax_format
from flax_partial.format.keypaths import INDEX, STR_KEY, KeyPath, KeyTree
from flax_partial.format.metadata import merge_metadata
from flax_partial.format.model import STORABLE_DTYPES, Contents, Leaf, Region, Sharding
from flax_partial.storage import files
from flax_partial.storage import tensorstore_io as arrays
from flax_partial.storage.tensorstore_io import Store

Table = Mapping[str, Any]

_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what an Orbax save has not committed
_MARKS = (orbax_format.CHECKPOINT_METADATA, orbax_format.V1_MARKER)
_MANAGER_ITEM = "default"  # steps that older managers wrote have no mark
_DATABASE = "manifest.ocdbt"
_KEY_KINDS = {orbax_format.SEQUENCE_KEY: INDEX, orbax_format.DICT_KEY: STR_KEY}
_KINDS: Mapping[str, kinds.Kind] = {
    "jax.Array": kinds.JAX_ARRAY,
    "np.ndarray": kinds.NUMPY_ARRAY,
    "scalar": kinds.SCALAR,
    "string": kinds.STRING,
    "None": kinds.NONE,
    "Dict": kinds.DICT,
    "List": kinds.LIST,
    "Tuple": kinds.TUPLE,
    "NamedTuple": kinds.NAMED_TUPLE,
}
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class OrbaxCheckpoint:
    """A checkpoint that Orbax wrote.

    Attributes:
      contents: What it holds. `parts` is 0; the leaves have no boxes, and so no digests.
      stores: The open array of each array leaf, by the leaf's name.
    """

    contents: Contents
    stores: Mapping[str, Store]

    def read(self, regions: Sequence[Region]) -> list[np.ndarray | Exception]:
        """Returns, for each region, its data or a `CorruptCheckpointError` that names the leaf."""
        outcomes = arrays.read_stores(
            [(self.stores[leaf.name], start, shape) for leaf, start, shape in regions]
        )
        return [
            _damaged(leaf, outcome) if isinstance(outcome, Exception) else outcome
            for (leaf, _, _), outcome in zip(regions, outcomes, strict=True)
        ]


def _damaged(leaf: Leaf, error: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"Leaf {leaf.name!r} cannot be read: {error}")


def is_checkpoint(path: Path) -> bool:
    """Whether a directory looks like a finished checkpoint of Orbax, or an item of one."""
    return bool(_item_directories(path))


def find(path: Path) -> OrbaxCheckpoint | None:
    """Reads the table of contents of a checkpoint that Orbax wrote, but no array data.

    Args:
      path: The checkpoint, or an item in it; absolute.

    Returns:
      The checkpoint; None where there is none, or one whose save did not finish.

    Raises:
      CorruptCheckpointError: It is damaged; it names the file, or the leaves.
      UnsupportedLeafError: It holds a leaf that only its writer's own code can read.
    """
    items = [_read_item(directory, prefix) for directory, prefix in _item_directories(path)]
    if not items:
        return None
    _require_tree(path, [item.path_of(leaf) for item in items for leaf in item.leaves])
    leaves: list[Leaf] = []
    stores: dict[str, Store] = {}
    for item in items:
        opened = _open(item)
        for stored in item.leaves:
            path_of = item.path_of(stored)
            leaf = replace(
                _described(stored, opened), texts=path_of.texts, key_kinds=path_of.key_kinds
            )
            leaves.append(leaf)
            if leaf.is_array:
                stores[leaf.name] = opened[stored.name]
    return OrbaxCheckpoint(_contents(path, items, leaves), stores)


@dataclass(frozen=True, slots=True)
class _Item:
    """One tree of a checkpoint.

    Attributes:
      directory: Where it is.
      prefix: The keys under which it stands in the whole tree.
      table: Its `_METADATA`.
      leaves: Its leaves as far as JSON tells, which is all but dtype and shape; paths are its own.
    """

    directory: Path
    prefix: tuple[str, ...]
    table: Table
    leaves: Sequence[Leaf]

    def path_of(self, leaf: Leaf) -> KeyPath:
        """Returns the path of a leaf in the whole tree."""
        return KeyPath(self.prefix + leaf.texts, STR_KEY * len(self.prefix) + leaf.key_kinds)


def _item_directories(path: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """Returns the items, each with the keys under which its tree stands in the whole one."""
    if _UNFINISHED in path.name:
        return []
    if _is_item(path):
        return [(path, ())]
    names = [name for name in sorted(files.listed(path)) if _is_item(path / name)]
    if _MANAGER_ITEM not in names and not any((path / mark).is_file() for mark in _MARKS):
        return []  # a directory of checkpoints, perhaps
    return [(path / name, (name,) if len(names) > 1 else ()) for name in names]


def _is_item(path: Path) -> bool:
    return _UNFINISHED not in path.name and (path / orbax_format.TREE_METADATA).is_file()


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one where there is no file."""
    data = files.read(path)
    if data is None:
        return {}
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(table, dict):
        raise CorruptCheckpointError(f"{path} is damaged: it holds no JSON object")
    return table


def _contents(path: Path, items: Sequence[_Item], leaves: Sequence[Leaf]) -> Contents:
    table = _read_json(path / orbax_format.CHECKPOINT_METADATA)
    written_ns = (items[0].directory / orbax_format.TREE_METADATA).stat().st_mtime_ns
    times = (table.get("init_timestamp_nsecs"), table.get("commit_timestamp_nsecs"))
    started_ns, committed_ns = (time if type(time) is int else written_ns for time in times)
    # A tree may have metadata of its own; with several trees, whose it was would be lost.
    tables = (items[0].table, table) if len(items) == 1 else (table,)
    custom = [one.get("custom_metadata") for one in tables]
    return Contents(
        started_ns=started_ns,
        committed_ns=committed_ns,
        parts=0,
        custom_metadata=merge_metadata(one for one in custom if isinstance(one, dict)),
        leaves=tuple(leaves) or (Leaf((), "", kinds.DICT),),
    )


def _require_tree(path: Path, key_paths: Sequence[KeyPath]) -> None:
    tree = KeyTree()
    for key_path in key_paths:
        is_there = key_path.name in tree
        problem = tree.add(key_path) or (is_there and f"Leaf {key_path.name!r} is there twice.")
        if problem:
            raise CorruptCheckpointError(f"{path}: {problem}")
    for problem in tree.gaps():
        raise CorruptCheckpointError(f"{path}: {problem}")


def _read_item(directory: Path, prefix: tuple[str, ...]) -> _Item:
    table = _read_json(directory / orbax_format.TREE_METADATA)
    try:
        leaves = list(_leaves_of(directory, table))
    except (CorruptCheckpointError, UnsupportedLeafError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{directory} is damaged: its files do not describe a tree "
            f"({type(error).__name__}: {error})"
        ) from error
    return _Item(directory, prefix, table, leaves)


def _open(item: _Item) -> dict[str, Store]:
    """Opens all arrays of an item."""
    directory, table = item.directory, item.table
    names = [leaf.name for leaf in item.leaves if leaf.is_array]
    in_database = (directory / _DATABASE).is_file()
    if not in_database:
        _require_plain_names(directory, table, names)
    outcomes = arrays.open_stores(
        directory,
        names,
        driver="zarr3" if table.get("use_zarr3") else "zarr",
        in_database=in_database,
        # Where Orbax left out chunks of zeros, one that is missing says nothing.
        fill_missing=not table.get("store_array_data_equal_to_fill_value"),
    )
    stores: dict[str, Store] = {}
    broken: list[str] = []
    for name, outcome in zip(names, outcomes, strict=True):
        if isinstance(outcome, Exception):
            broken.append(f"{name!r} ({outcome})")
        else:
            stores[name] = outcome
    if broken:
        raise CorruptCheckpointError(
            f"{directory}: {len(broken)} of {len(names)} arrays cannot be opened: "
            + "; ".join(first_few(broken, most=_SHOWN, count=len(broken)))
        )
    return stores


def _require_plain_names(directory: Path, table: Table, names: Sequence[str]) -> None:
    """Refuses names that lead out of the directory: on plain files they are paths."""
    if table.get("use_ocdbt"):
        raise CorruptCheckpointError(f"{directory / _DATABASE} is missing.")
    for name in names:
        if ".." in PurePosixPath(name).parts or name.startswith("/") or "\0" in name:
            raise CorruptCheckpointError(f"{directory}: leaf {name!r} would lie outside of it.")


def _described(leaf: Leaf, stores: Mapping[str, Store]) -> Leaf:
    if not leaf.is_array:
        return leaf
    dtype, shape, chunk = arrays.describe_store(stores[leaf.name])
    if dtype not in STORABLE_DTYPES:
        raise UnsupportedLeafError(f"Leaf {leaf.name!r} is an array of {dtype}.")
    if leaf.kind == kinds.SCALAR and shape:
        raise CorruptCheckpointError(f"Scalar {leaf.name!r} is an array of shape {list(shape)}.")
    return replace(leaf, dtype=dtype, shape=shape, chunk=chunk)


def _leaves_of(directory: Path, table: Table) -> Iterator[Leaf]:
    """Yields the leaves of one tree, as far as JSON says."""
    shardings = _Shardings(directory)
    strings = _read_json(directory / orbax_format.STRINGS)
    prng_keys = _random_keys(directory)
    for entry in table["tree_metadata"].values():
        path = _key_path(entry["key_metadata"])
        keys = path.texts, path.key_kinds
        value_type = entry["value_metadata"]["value_type"]
        kind = _KINDS.get(value_type)
        name = path.name
        if kind is None:
            raise UnsupportedLeafError(
                f"Leaf {name!r} is of type {value_type!r}, which only the program that saved it "
                "can read."
            )
        if kind == kinds.JAX_ARRAY and name in prng_keys:
            yield Leaf(*keys, kinds.PRNG_KEY, text=prng_keys[name], sharding=shardings.of(name))
        elif kind == kinds.STRING:
            yield Leaf(*keys, kind, text=_string(strings, name))
        else:
            yield Leaf(*keys, kind, sharding=shardings.of(name))


def _key_path(keys: Sequence[Table]) -> KeyPath:
    texts = tuple(key["key"] for key in keys)
    key_kinds = "".join(_KEY_KINDS[key["key_type"]] for key in keys)
    for text, kind in zip(texts, key_kinds, strict=True):
        text.encode()  # text, and without lone surrogates
        if kind == INDEX and str(abs(int(text))) != text:
            raise ValueError(f"{text!r} is not an index")
    return KeyPath(texts, key_kinds)


def _string(strings: Table, name: str) -> str:
    value: Any = strings
    for token in orbax_format.pointer_tokens(name):
        value = value[token]
    if not isinstance(value, str):
        raise TypeError(f"string {name!r} is {value!r}")
    return value


def _random_keys(directory: Path) -> dict[str, str]:
    """Returns the implementation of each PRNG key; each process tells of what it wrote."""
    found: dict[str, str] = {}
    folder = directory / orbax_format.ARRAY_METADATAS
    for file in files.listed(folder):
        for entry in _read_json(folder / file).get("array_metadatas", ()):
            metadata = entry["array_metadata"]
            implementation = (metadata.get("ext_metadata") or {}).get(orbax_format.RANDOM_KEY_IMPL)
            if implementation is None:
                continue
            if not isinstance(implementation, str):
                raise TypeError(f"a PRNG key is of implementation {implementation!r}")
            found[metadata["param_name"]] = implementation
    return found


class _Shardings:
    """The `_sharding` file of an item; arrays with the same sharding share the object."""

    def __init__(self, directory: Path) -> None:
        self._texts = _read_json(directory / orbax_format.SHARDING)
        self._decoded: dict[str, Sharding] = {}

    def of(self, name: str) -> Sharding | None:
        """Returns the sharding of a leaf; None where it has none."""
        text = self._texts.get(orbax_format.sharding_key(name).decode())
        if text is None:
            return None
        if text not in self._decoded:
            sharding = json.loads(text)
            if not isinstance(sharding, dict):
                raise TypeError(f"the sharding of {name!r} is {sharding!r}")
            self._decoded[text] = Sharding(sharding)
        return self._decoded[text]
