"""Checkpoints that Orbax wrote, as the same table of contents and the same reads as ours.

A checkpoint with one item is that item; one with several (v0 `Composite`, v1
`save_checkpointables`) is a dict of them. An item that cannot be read does not keep the others from
being read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from msgspec.structs import replace

from flax_partial.errors import (
    CorruptCheckpointError,
    PartialCheckpointError,
    UnsupportedLeafError,
)
from flax_partial.format import model as kinds
from flax_partial.format import orbax as orbax_format
from flax_partial.format.assembly import read_inline
from flax_partial.format.keypaths import INDEX, STR_KEY, form_tree
from flax_partial.format.metadata import merge_metadata
from flax_partial.format.model import Box, Contents, Dtype, Leaf, Region
from flax_partial.loading import orbax_items, orbax_tree
from flax_partial.loading.orbax_items import Item, Items, Kind
from flax_partial.loading.orbax_tree import Tree
from flax_partial.storage import tensorstore_io as arrays
from flax_partial.storage.tensorstore_io import Store


@dataclass(frozen=True, slots=True)
class Composition:
    """What a table of contents does not hold of a checkpoint that has several items.

    Attributes:
      broken: Name of each item that cannot be read, to the reason, where another can be.
      others: Name of each item that is not read, to the reason.
      only_tree: Name of the item that is the only tree among several; None where there is none.
    """

    broken: Mapping[str, PartialCheckpointError]
    others: Mapping[str, str]
    only_tree: str | None


ONE_TREE = Composition({}, {}, None)


@dataclass(frozen=True, slots=True)
class OrbaxCheckpoint:
    """A checkpoint that Orbax wrote.

    Attributes:
      contents: What it holds. `parts` is 0; the leaves have no digests, and boxes only where their
        data stands in them, as that of JSON does.
      stores: The open array of each array leaf that has none, by the leaf's name.
      composition: What it is made of.
    """

    contents: Contents
    stores: Mapping[str, Store]
    composition: Composition

    def read(self, regions: Sequence[Region]) -> list[np.ndarray | Exception]:
        """Returns, for each region, its data or a `CorruptCheckpointError` that names the leaf."""
        from_stores = iter(
            arrays.read_stores(
                [
                    (self.stores[leaf.name], start, shape)
                    for leaf, start, shape in regions
                    if not leaf.boxes
                ]
            )
        )
        outcomes = [
            read_inline(*region) if region[0].boxes else next(from_stores) for region in regions
        ]
        return [
            _damaged(leaf, outcome) if isinstance(outcome, Exception) else outcome
            for (leaf, _, _), outcome in zip(regions, outcomes, strict=True)
        ]


def _damaged(leaf: Leaf, error: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"Leaf {leaf.name!r} cannot be read: {error}")


def is_checkpoint(path: Path) -> bool:
    """Whether a directory looks like a finished checkpoint of Orbax, or an item of one."""
    try:
        return orbax_items.find(path, is_meant=False) is not None
    except CorruptCheckpointError:
        return True


def find(path: Path) -> OrbaxCheckpoint | None:
    """Reads the table of contents of a checkpoint that Orbax wrote, but no array data.

    Args:
      path: The checkpoint, or an item in it; absolute.

    Returns:
      The checkpoint; None where there is none, or one whose save did not finish.

    Raises:
      CorruptCheckpointError: It is damaged; it names the file, or the leaves.
      UnsupportedLeafError: It holds a leaf that is not read here.
    """
    items = orbax_items.find(path, is_meant=True)
    if items is None:
        if orbax_items.is_of_msgpack(path):
            raise UnsupportedLeafError(
                f"{path} is in the msgpack of Orbax's first versions, which is not read here: "
                "restore it with Orbax, and save it anew."
            )
        return None
    if not items.found:
        named = "; ".join(f"{name!r}, {why}" for name, why in items.others.items())
        raise UnsupportedLeafError(f"{path} has no item that is read here: {named}.")
    trees, broken, others = _read_items(items)
    is_alone = len(trees) + len(broken) == 1
    leaves: list[Leaf] = []
    stores: dict[str, Store] = {}
    for name, tree in trees.items():
        for stored in tree.leaves:
            leaf = stored if is_alone else _below(name, stored)
            leaves.append(leaf)
            if stored.name in tree.stores:
                stores[leaf.name] = tree.stores[stored.name]
    orbax_tree.require_tree(path, leaves)
    # A tree may have metadata of its own; with several items, whose it was would be lost.
    custom = [tree.custom_metadata for tree in trees.values() if is_alone]
    if items.metrics:
        custom.insert(0, {orbax_format.METRICS: items.metrics})
    of_trees = [item.name for item in items.found if item.kind == Kind.TREE]
    only_tree = of_trees[0] if len(of_trees) == 1 and not is_alone else None
    return OrbaxCheckpoint(
        _contents(items, leaves, custom), stores, Composition(broken, others, only_tree)
    )


def _read_items(
    items: Items,
) -> tuple[dict[str, Tree], dict[str, PartialCheckpointError], dict[str, str]]:
    """Reads each item by its name; returns, for those that it cannot, why."""
    trees: dict[str, Tree] = {}
    broken: dict[str, PartialCheckpointError] = {}
    others = dict(items.others)
    for item in items.found:
        try:
            trees[item.name] = _READERS[item.kind](item)
        except PartialCheckpointError as error:
            broken[item.name] = error
    if not trees:
        raise next(iter(broken.values()))
    for item in items.found:
        if item.kind == Kind.JSON and isinstance(broken.get(item.name), UnsupportedLeafError):
            others[item.name] = str(broken.pop(item.name))  # nothing is wrong with it
    return trees, broken, others


def _below(name: str, leaf: Leaf) -> Leaf:
    return replace(leaf, texts=(name, *leaf.texts), key_kinds=STR_KEY + leaf.key_kinds)


def _contents(items: Items, leaves: Sequence[Leaf], custom: Sequence[Any]) -> Contents:
    table = items.table
    written_ns = items.found[0].path.stat().st_mtime_ns
    times = (table.get("init_timestamp_nsecs"), table.get("commit_timestamp_nsecs"))
    started_ns, committed_ns = (time if type(time) is int else written_ns for time in times)
    custom = [*custom, table.get("custom_metadata")]
    return Contents(
        started_ns=started_ns,
        committed_ns=committed_ns,
        parts=0,
        custom_metadata=merge_metadata(one for one in custom if isinstance(one, dict)),
        leaves=tuple(leaves),
    )


def _read_tree(item: Item) -> Tree:
    return orbax_tree.read(item.path)


def _read_array(item: Item) -> Tree:
    """A tree of one leaf, whose name its handler chose: the array alone."""
    tree = orbax_tree.read(item.path)
    if len(tree.leaves) != 1 or len(tree.stores) != 1:
        raise CorruptCheckpointError(
            f"{item.path}: leaves: {len(tree.leaves)}, arrays: {len(tree.stores)}; it is no single "
            "array."
        )
    leaf = replace(tree.leaves[0], texts=(), key_kinds="")
    return Tree([leaf], dict(zip([leaf.name], tree.stores.values(), strict=True)))


def _read_key(item: Item) -> Tree:
    """A random key: JAX's as one, or as the array that it was; the state of NumPy's as a tree."""
    about = orbax_items.read_table(item.about) if item.about else {}
    if "typed" not in about:
        return _read_tree(item)
    tree = _read_array(item)
    if not about["typed"]:
        return tree
    # Which implementation made it is not stored: Orbax takes the one that is JAX's default.
    implementation = str(jax.config.jax_default_prng_impl)  # type: ignore[attr-defined]
    return Tree([replace(tree.leaves[0], kind=kinds.PRNG_KEY, text=implementation)], tree.stores)


def _read_json(item: Item) -> Tree:
    value = orbax_items.read_json(item.path)
    try:
        leaves = [*_json_leaves(value, (), "")]
    except (ValueError, OverflowError, RecursionError) as error:
        raise UnsupportedLeafError(f"{item.path} does not fit into a tree: {error}") from error
    if not form_tree(leaves):
        raise UnsupportedLeafError(f"{item.path} does not fit into a tree: two names are the same")
    return Tree(leaves, {})


def _json_leaves(value: Any, texts: tuple[str, ...], key_kinds: str) -> Iterator[Leaf]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            key.encode()  # no lone surrogates
            yield from _json_leaves(inner, (*texts, key), key_kinds + STR_KEY)
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _json_leaves(inner, (*texts, str(index)), key_kinds + INDEX)
    elif isinstance(value, str):
        yield Leaf(texts, key_kinds, kinds.STRING, text=value)
    elif isinstance(value, (bool, int, float)):
        dtype = _dtype_of(value)
        box = Box((), (), places=(np.asarray(value, dtype).tobytes(),))
        yield Leaf(texts, key_kinds, kinds.SCALAR, dtype=dtype, boxes=(box,))
    else:
        yield Leaf(texts, key_kinds, _EMPTY[type(value)])


def _dtype_of(number: float) -> Dtype:
    """The dtype in which a number of Python's is saved; `asarray` refuses what is larger."""
    if isinstance(number, bool):
        return "bool"
    if isinstance(number, int):
        return "int64" if number < 2**63 else "uint64"
    return "float64"


_EMPTY: Mapping[type, kinds.Kind] = {dict: kinds.DICT, list: kinds.LIST, type(None): kinds.NONE}
_READERS = {
    Kind.TREE: _read_tree,
    Kind.ARRAY: _read_array,
    Kind.KEY: _read_key,
    Kind.JSON: _read_json,
}
