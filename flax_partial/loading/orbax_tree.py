"""A tree as Orbax stores it in a directory: its leaves, and the open array of each.

No file is trusted: invalid content is a `CorruptCheckpointError`. There are no digests to check.
Only JSON and arrays are read; nothing that a file names is imported or run.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from msgspec.structs import replace

from flax_partial.errors import CorruptCheckpointError, UnsupportedLeafError, first_few
from flax_partial.format import model as kinds
from flax_partial.format import orbax as orbax_format
from flax_partial.format.keypaths import INDEX, STR_KEY, KeyPath, KeyTree
from flax_partial.format.model import EMPTY_CONTAINERS, STORABLE_DTYPES, Leaf, Sharding
from flax_partial.loading.orbax_items import Table, read_table
from flax_partial.storage import files
from flax_partial.storage import tensorstore_io as arrays
from flax_partial.storage.tensorstore_io import Store

_KEY_KINDS = {orbax_format.SEQUENCE_KEY: INDEX, orbax_format.DICT_KEY: STR_KEY}
_KINDS: Mapping[str, kinds.Kind] = {
    **{written: kind for kind, written in reversed(orbax_format.VALUE_TYPES.items())},
    "NamedTuple": kinds.NAMED_TUPLE,
}
_HAVE_VALUES = frozenset((kinds.JAX_ARRAY, kinds.NUMPY_ARRAY, kinds.SCALAR, kinds.STRING))
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree, or whatever else is read as one.

    Attributes:
      leaves: Its leaves, in the order in which they were saved.
      stores: The open array of each leaf that is one, by the leaf's name.
      custom_metadata: What was saved with it.
    """

    leaves: Sequence[Leaf]
    stores: Mapping[str, Store]
    custom_metadata: Any = None


def read(directory: Path) -> Tree:
    """Reads what a tree consists of, but no array data.

    Args:
      directory: Of its `_METADATA`; absolute.

    Raises:
      CorruptCheckpointError: It is damaged; it names the file, or the leaves.
      UnsupportedLeafError: It holds a leaf that is not read here.
    """
    table = read_table(directory / orbax_format.TREE_METADATA)
    try:
        leaves = _without_placeholders(list(_leaves_of(directory, table)))
    except (CorruptCheckpointError, UnsupportedLeafError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{directory} is damaged: its files do not describe a tree "
            f"({type(error).__name__}: {error})"
        ) from error
    require_tree(directory, leaves)
    stores = _open(directory, table, [leaf.name for leaf in leaves if leaf.is_array])
    described = [_described(leaf, stores) for leaf in leaves]
    empty = Leaf((), "", kinds.DICT)
    return Tree(described or [empty], stores, table.get("custom_metadata"))


def require_tree(where: Path, key_paths: Iterable[KeyPath]) -> None:
    """Raises CorruptCheckpointError if leaves do not form a tree."""
    tree = KeyTree()
    for key_path in key_paths:
        is_there = key_path.name in tree
        problem = tree.add(key_path) or (is_there and f"Leaf {key_path.name!r} is there twice.")
        if problem:
            raise CorruptCheckpointError(f"{where}: {problem}")
    for problem in tree.gaps():
        raise CorruptCheckpointError(f"{where}: {problem}")


def _leaves_of(directory: Path, table: Table) -> Iterator[Leaf]:
    """Yields the leaves as far as JSON describes them: all but dtype and shape."""
    shardings = read_table(directory / orbax_format.SHARDING)
    decoded: dict[str, Sharding] = {}
    strings = read_table(directory / orbax_format.STRINGS)
    prng_keys = _random_keys(directory)
    for entry in table["tree_metadata"].values():
        path = _key_path(entry["key_metadata"])
        value_type = entry["value_metadata"]["value_type"]
        kind = _KINDS.get(value_type)
        name = path.name
        if kind is None:
            raise UnsupportedLeafError(
                f"Leaf {name!r} is of type {value_type!r}, which only the program that saved it "
                "can read."
            )
        if kind in _HAVE_VALUES and entry["value_metadata"].get("skip_deserialize"):
            raise UnsupportedLeafError(
                f"Leaf {name!r} is in a file of msgpack (`aggregate`), which older versions of "
                "Orbax wrote and this package does not read: restore it with Orbax, and save it."
            )
        text = _string(strings, name) if kind == kinds.STRING else ""
        if kind == kinds.JAX_ARRAY and name in prng_keys:
            kind, text = kinds.PRNG_KEY, prng_keys[name]
        sharding = _sharding(name, shardings, decoded)
        yield Leaf(path.texts, path.key_kinds, kind, text=text, sharding=sharding)


def _without_placeholders(leaves: Sequence[Leaf]) -> Sequence[Leaf]:
    """Drops containers that were empty in one of Orbax's partial saves, and not in another."""
    inner = {leaf.texts[:depth] for leaf in leaves for depth in range(len(leaf.texts))}
    return [leaf for leaf in leaves if leaf.kind not in EMPTY_CONTAINERS or leaf.texts not in inner]


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
    """Returns the implementation of each PRNG key; each process lists what it wrote."""
    found: dict[str, str] = {}
    folder = directory / orbax_format.ARRAY_METADATAS
    for file in files.listed(folder):
        for entry in read_table(folder / file).get("array_metadatas", ()):
            metadata = entry["array_metadata"]
            implementation = (metadata.get("ext_metadata") or {}).get(orbax_format.RANDOM_KEY_IMPL)
            if implementation is None:
                continue
            if not isinstance(implementation, str):
                raise TypeError(f"a PRNG key is of implementation {implementation!r}")
            found[metadata["param_name"]] = implementation
    return found


def _sharding(name: str, texts: Table, decoded: dict[str, Sharding]) -> Sharding | None:
    """Returns the sharding of a leaf, if it has one; those of one text share the object."""
    text = texts.get(orbax_format.sharding_key(name).decode())
    if text is not None and text not in decoded:
        sharding = json.loads(text)
        if not isinstance(sharding, dict):
            raise TypeError(f"the sharding of {name!r} is {sharding!r}")
        decoded[text] = Sharding(sharding)
    return None if text is None else decoded[text]


def _open(directory: Path, table: Table, names: Sequence[str]) -> dict[str, Store]:
    """Opens all arrays of a tree; one without arrays may have no database."""
    if not names:
        return {}
    in_database = (directory / orbax_format.DATABASE).is_file()
    if not in_database:
        _require_plain_names(directory, table, names)
    outcomes = arrays.open_stores(
        directory,
        names,
        driver="zarr3" if table.get("use_zarr3") else "zarr",
        in_database=in_database,
        # Where Orbax left out chunks of zeros, a missing one is no damage.
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
        raise CorruptCheckpointError(f"{directory / orbax_format.DATABASE} is missing.")
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
