"""Names and JSON of the finalized layout, as Orbax reads it. Pure.

Everything here is derived from the merged table of contents, so that it can be derived again: to
finish an interrupted finalize, and to verify a checkpoint. All of it is linear in the leaves.

What the files must hold was found out by trying every reader of Orbax 0.12 (v0 and v1):

- The item is called `state`, and its handler must be the v0 one by name: v1 readers map it to
  theirs, whereas v0 managers fail on the names that v1 writes.
- Without `store_array_data_equal_to_fill_value` Orbax reads a lost chunk as zeros.
- `_sharding` lists arrays by the URL-safe base64 of their names.
- Orbax finds a string by the JSON pointer `/<name>`, so that a slash in a name opens an object.
- `array_metadatas` is only read for the implementation of a PRNG key.
- It has no type for bytes: they are an array of `uint8` to it.
- Managers look for a step's metrics in an item of JSON, `metrics/metrics`.
"""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from flax_partial.format import model as kinds
from flax_partial.format import ocdbt
from flax_partial.format.chunks import Shape
from flax_partial.format.keypaths import INDEX
from flax_partial.format.merge import Source
from flax_partial.format.model import Box, Contents, Leaf, data_path, numpy_dtype

CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
V1_MARKER = "orbax.checkpoint"
COMMIT_MARKER = "commit_success.txt"
ITEM = "state"
TREE_METADATA = "_METADATA"
SHARDING = "_sharding"
ARRAY_METADATAS = "array_metadatas"
STRINGS = "_strings.json"
DATABASE = "manifest.ocdbt"
METRICS = "metrics"
_HANDLERS = "orbax.checkpoint._src.handlers."
PYTREE_HANDLER = _HANDLERS + "pytree_checkpoint_handler.PyTreeCheckpointHandler"
JSON_HANDLER = _HANDLERS + "json_checkpoint_handler.JsonCheckpointHandler"

SEQUENCE_KEY, DICT_KEY = 1, 2

# Of kinds that are of one type to Orbax the first is what is read. An empty named tuple has none.
VALUE_TYPES: dict[kinds.Kind, str] = {
    kinds.JAX_ARRAY: "jax.Array",
    kinds.PRNG_KEY: "jax.Array",
    kinds.NUMPY_ARRAY: "np.ndarray",
    kinds.NUMPY_SCALAR: "np.ndarray",
    kinds.BYTES: "np.ndarray",
    kinds.SCALAR: "scalar",
    kinds.STRING: "string",
    kinds.NONE: "None",
    kinds.NAMED_TUPLE: "None",
    kinds.DICT: "Dict",
    kinds.LIST: "List",
    kinds.TUPLE: "Tuple",
}
RANDOM_KEY_IMPL = "random_key_impl"

_PIECE_LEAVES = 1024  # of `_METADATA` that are put together at once
_BYTES_CHUNK = 64 * 1024  # of the array that Orbax reads a bytes leaf as

Pieces = Iterable[bytes]
"""A file's content, piece by piece, to be iterated once; that of many leaves is never all there."""


def root_files(contents: Contents) -> Iterator[tuple[str, Pieces]]:
    """Yields what Orbax reads beside the database: path below the checkpoint, content."""
    yield CHECKPOINT_METADATA, (_dump(_checkpoint_metadata(contents)),)
    yield V1_MARKER, ()
    yield COMMIT_MARKER, ()
    metrics = _metrics(contents)
    if metrics:
        yield f"{METRICS}/{METRICS}", (_dump(metrics),)
    yield f"{ITEM}/{TREE_METADATA}", _tree_metadata(contents.leaves)
    yield f"{ITEM}/{SHARDING}", _shardings(contents.leaves)
    yield f"{ITEM}/{ARRAY_METADATAS}/process_0", (_dump(_array_metadatas(contents.leaves)),)
    yield f"{ITEM}/{STRINGS}", (_dump(_strings(contents.leaves)),)


def database_files(
    contents: Contents, sources: Sequence[Sequence[Source]], *, uuid: bytes
) -> Iterator[tuple[str, Pieces]]:
    """Yields the root database: path below the checkpoint, content; nothing without arrays.

    Args:
      contents: What the checkpoint holds.
      sources: For each leaf where its chunks are; nothing where they are in the leaf itself.
      uuid: Identifies the database, 16 bytes.
    """
    if all(not leaf.is_array and leaf.kind != kinds.BYTES for leaf in contents.leaves):
        return
    data_file = f"d/{uuid.hex()}"
    manifest, data = ocdbt.encode(
        _database_entries(contents.leaves, sources),
        data_file=data_file,
        uuid=uuid,
        commit_ns=contents.committed_ns,
    )
    yield f"{ITEM}/{data_file}", data
    yield f"{ITEM}/{DATABASE}", (manifest,)


def _database_entries(
    leaves: Sequence[Leaf], sources: Sequence[Sequence[Source]]
) -> Iterator[ocdbt.Entry]:
    for leaf, found in zip(leaves, sources, strict=True):
        stored = _as_array(leaf) if leaf.kind == kinds.BYTES else leaf
        if not stored.is_array:
            continue
        prefix = stored.prefix.encode()
        yield prefix + b"zarr.json", zarr_metadata(stored)
        if stored.is_one_chunk and not found:  # as small leaves are: a third of the time
            (place,) = stored.boxes[0].places
            assert isinstance(place, bytes)  # noqa: S101
            yield prefix + b"c" + b"/0" * len(stored.shape), place
            continue
        keys = stored.keys_of(stored.boxes[0])
        for part, places in found or (("", stored.boxes[0].places),):
            for place, key in zip(places, keys, strict=False):
                if isinstance(place, bytes):
                    yield key.encode(), place
                else:
                    yield key.encode(), ocdbt.Reference(data_path(part), *place)


def _as_array(leaf: Leaf) -> Leaf:
    """A bytes leaf as the array that Orbax reads it as; its last chunk is filled up."""
    shape = (len(leaf.data),)
    size = min(max(len(leaf.data), 1), _BYTES_CHUNK)
    starts = range(0, len(leaf.data), size)
    places = tuple([leaf.data[at : at + size].ljust(size, b"\0") for at in starts])
    return Leaf(
        leaf.texts,
        leaf.key_kinds,
        kinds.NUMPY_ARRAY,
        dtype="uint8",
        shape=shape,
        chunk=(size,),
        boxes=(Box((0,), shape, places=places),),
    )


_encode_string = json.encoder.encode_basestring_ascii


def _text(value: object) -> str:
    # ASCII: Orbax decodes these files with the encoding of its reader's locale.
    return json.dumps(value, separators=(",", ":"))


def _dump(value: object) -> bytes:
    return _text(value).encode("ascii")


def _metrics(contents: Contents) -> dict[str, Any]:
    """What callbacks store as a checkpoint's metrics; version 2 did not write them for Orbax."""
    metrics = contents.custom_metadata.get(METRICS)
    return metrics if isinstance(metrics, dict) and contents.has_inline else {}


def _checkpoint_metadata(contents: Contents) -> dict[str, Any]:
    metrics_handler = {METRICS: JSON_HANDLER} if _metrics(contents) else {}
    return {
        "item_handlers": {ITEM: PYTREE_HANDLER, **metrics_handler},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": contents.started_ns,
        "commit_timestamp_nsecs": contents.committed_ns,
        "custom_metadata": contents.custom_metadata,
    }


def _tree_metadata(leaves: Sequence[Leaf]) -> Pieces:
    head = _dump(
        {
            "use_ocdbt": True,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
    )
    yield head[:-1] + b',"tree_metadata":{'
    # Keys are the same few, over and over. What outlived the table would hold on to its memory.
    key_metadata = lru_cache(maxsize=4096)(_key_metadata)
    separator = ""
    for first in range(0, len(leaves), _PIECE_LEAVES):
        piece = leaves[first : first + _PIECE_LEAVES]
        entries = ",".join([_tree_entry(leaf, key_metadata) for leaf in piece])
        yield f"{separator}{entries}".encode("ascii")
        separator = ","
    yield b"}}"


def _tree_entry(leaf: Leaf, key_metadata: Callable[[str, str], str]) -> str:
    """Returns a leaf's entry as JSON, put together: a third of what dumping it costs."""
    # One complex scalar would keep v0's StandardCheckpointer from reading any of the checkpoint.
    is_complex = leaf.kind == kinds.SCALAR and leaf.dtype.startswith("complex")
    value = _value_metadata(kinds.NUMPY_ARRAY if is_complex else leaf.kind, leaf.chunk)
    keys = ",".join(map(key_metadata, leaf.texts, leaf.key_kinds))
    name = _encode_string(repr(leaf.texts))
    return f'{name}:{{"key_metadata":[{keys}],"value_metadata":{value}}}'


def _key_metadata(text: str, kind: str) -> str:
    return _text({"key": text, "key_type": SEQUENCE_KEY if kind == INDEX else DICT_KEY})


@lru_cache(maxsize=4096)  # most leaves have one of a few shapes
def _value_metadata(kind: kinds.Kind, chunk: Shape) -> str:
    has_data = kind in kinds.ARRAY_KINDS or kind in (kinds.STRING, kinds.BYTES)
    value: dict[str, Any] = {"value_type": VALUE_TYPES[kind], "skip_deserialize": not has_data}
    if value["value_type"] == VALUE_TYPES[kinds.JAX_ARRAY]:
        value["write_shape"] = chunk
    return _text(value)


def _array_metadatas(leaves: tuple[Leaf, ...]) -> dict[str, Any]:
    metadatas = [
        {
            "param_name": leaf.name,
            "write_shape": leaf.chunk,
            "chunk_shape": leaf.chunk,
            "ext_metadata": {RANDOM_KEY_IMPL: leaf.text},
        }
        for leaf in leaves
        if leaf.kind == kinds.PRNG_KEY
    ]
    return {"array_metadatas": [{"array_metadata": metadata} for metadata in metadatas]}


def _shardings(leaves: Sequence[Leaf]) -> Pieces:
    texts: dict[int, bytes] = {}  # leaves share the objects
    yield b"{"
    separator = b""
    for leaf in leaves:
        if leaf.sharding is not None and VALUE_TYPES[leaf.kind] == VALUE_TYPES[kinds.JAX_ARRAY]:
            text = texts.get(id(leaf.sharding)) or _dump(json.dumps(leaf.sharding.json))
            texts[id(leaf.sharding)] = text
            yield b'%b"%b":%b' % (separator, sharding_key(leaf.name), text)
            separator = b","
    yield b"}"


def sharding_key(name: str) -> bytes:
    """Under which key `_sharding` holds the sharding of the leaf called `name`, as ASCII."""
    return base64.urlsafe_b64encode(name.encode())


def _strings(leaves: tuple[Leaf, ...]) -> dict[str, Any]:
    """Puts each string where its pointer leads.

    `a` and `a/b` cannot both be found. The shorter one is kept: then Orbax fails to find the other,
    where it would take what is inside of an object for the text of the shorter one.
    """
    found = [(pointer_tokens(leaf.name), leaf.text) for leaf in leaves if leaf.kind == kinds.STRING]
    table: dict[str, Any] = {}
    for tokens, text in sorted(found, key=lambda one: len(one[0])):
        inner: Any = table
        for token in tokens[:-1]:
            inner = inner.setdefault(token, {}) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[tokens[-1]] = text
    return table


def pointer_tokens(name: str) -> list[str]:
    """The steps of the JSON pointer `/<name>` (RFC 6901, section 4)."""
    return [token.replace("~1", "/").replace("~0", "~") for token in name.split("/")]


def zarr_metadata(leaf: Leaf) -> bytes:
    """Returns the `zarr.json` of an array leaf (zarr v3, chunks stored as plain bytes)."""
    return _zarr_metadata(leaf.dtype, leaf.shape, leaf.chunk, leaf.compression)


# Layers repeat: most arrays of a model have one of a few shapes.
@lru_cache(maxsize=4096)
def _zarr_metadata(dtype: str, shape: Shape, chunk: Shape, compression: str | None) -> bytes:
    codecs: list[dict[str, Any]] = [
        {"name": "bytes"}
        if dtype in _ONE_BYTE or dtype.startswith("float8")
        else {"name": "bytes", "configuration": {"endian": "little"}}
    ]
    if compression == "zstd":
        codecs.append({"name": "zstd", "configuration": {"level": 3, "checksum": False}})
    elif compression == "blosc":
        codecs.append({"name": "blosc", "configuration": _blosc(numpy_dtype(dtype).itemsize)})
    return _dump(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "chunk_key_encoding": {"name": "default"},
            "fill_value": _fill_value(dtype),
            "codecs": codecs,
        }
    )


def _blosc(itemsize: int) -> dict[str, Any]:
    return {
        "cname": "lz4",
        "clevel": 5,
        "shuffle": "bitshuffle",
        "typesize": itemsize,
        "blocksize": 0,
    }


_ONE_BYTE = frozenset(("bool", "int2", "int4", "int8", "uint8", "float4_e2m1fn"))


def _fill_value(dtype: str) -> object:
    if dtype == "bool":
        return False
    if dtype.startswith("complex"):
        return [0.0, 0.0]
    return 0.0 if "float" in dtype else 0
