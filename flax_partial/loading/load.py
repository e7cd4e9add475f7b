"""Reading a finalized checkpoint into arrays.

What is read is planned first: every leaf of the target is compared with the checkpoint, and all
that does not fit is reported in one error, before any array data is read. Then only the boxes that
this process's devices hold are read.
"""

import difflib
import logging
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Literal

import jax
import numpy as np
from jax import tree_util

from flax_partial import collector, leaf_types
from flax_partial.errors import CorruptCheckpointError, TargetMismatchError, first_few
from flax_partial.format import keypaths
from flax_partial.format.keypaths import ATTRIBUTE, KeyPath
from flax_partial.format.model import Leaf, Region
from flax_partial.loading import orbax_terms, shared_reads
from flax_partial.loading import target as placing
from flax_partial.loading.arrangement import Arrangement, Stack
from flax_partial.loading.batches import batched, region_bytes
from flax_partial.loading.checkpoint import Checkpoint, chosen, open_checkpoint, require_items
from flax_partial.loading.restacked import Source
from flax_partial.loading.saved_sharding import sharding_of
from flax_partial.loading.target import Reading
from flax_partial.storage import places
from flax_partial.storage.paths import PathLike
from flax_partial.storage.place import Place

_LOG = logging.getLogger("flax_partial")
_NNX_VALUE = "value"
_PARTIAL = "partial=True lets the target lack leaves"
_KEEP_MISSING = "keep_missing=True lets the checkpoint lack leaves, which stay as they are"
_CAST = "cast=True converts dtypes"
_MOST_COMPARED = 2500  # pairs of names, in a fraction of a second
_MOST_MEANT = 3  # pairs that a message shows
_PIECE_BYTES = 64 << 20  # of a load that reports progress, or fills an accelerator
_READ_AHEAD = 2  # pieces that are read at once: while the last of one is read, the next has begun
_MOST_ON_THE_WAY = 2  # pieces that are on their way to an accelerator: bounds the host's memory

Outcomes = Sequence[np.ndarray | Exception]
_Read = tuple[Sequence[Region], Outcomes]
"""Regions, and what was read of each."""


def load(
    path: PathLike,
    target: Any = None,
    *,
    partial: bool = False,
    keep_missing: bool = False,
    cast: bool = False,
    sharding: Literal["default", "saved"] = "default",
    restack: Mapping[Stack | str, Stack | str] | None = None,
    renames: Mapping[str, str] | None = None,
    share_reads: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Reads a finalized checkpoint, ours or Orbax's, and checks the digests of what it reads.

    Args:
      path: The checkpoint.
      target: A pytree of what is wanted: arrays, `jax.ShapeDtypeStruct` (with or without sharding),
        `Slice` for some rows of a leaf, numbers, strings, None. Its leaves are found by their
        names, so that a dict, a dataclass and a Flax state with the same keys are interchangeable.
        None reads everything. Orbax's own terms are understood: what its `metadata` returns, `int`,
        `float`, `str` and `np.ndarray` for values of these types, and `...` for a leaf or subtree
        that is not to be read, which then stands in the result.
      partial: Whether `target` may lack leaves of the checkpoint, or have None there; those are not
        read.
      keep_missing: Whether the checkpoint may lack leaves of `target`; those stay as they are.
      cast: Whether a dtype that differs is converted; an error otherwise.
      sharding: Where JAX arrays are put if `target` does not state it, or if there is no target:
        "default", uncommitted on the default device; "saved", on the devices that they were saved
        from, with the same sharding, which requires that these devices are here.
      restack: From how the checkpoint stacks layers to how the target does:
        `{Stack("decoder.layers", (0, 1)): Stack("decoder.layers_{}")}`; a name with `{}` may stand
        for its `Stack`. Of parameters and moments alike each device reads its own layers only.
      renames: From keys that follow one another in the checkpoint's paths, joined with dots, to
        what the target has there: `{"encoder.trunk": "encoder.body"}`; "" is the root. Of several
        the longest that fits counts; the names in `restack` are what they are after that.
      share_reads: Whether processes with replicas of an array read a share of it each, and
        hand it on by a collective: where the storage is slower than the network. Every process
        that holds some of the target's arrays has to call this, with the same target.
      progress: Called in this thread, before the first and after each piece of some 64 MiB, with
        how many bytes of how many are read.

    Returns:
      Without a target nested dicts and lists, with leaves of the kinds that were saved. With a
      target its structure, leaf types, dtypes and shardings.

    Raises:
      NoSessionError: There is no finalized checkpoint at `path`.
      TargetMismatchError: Target and checkpoint differ, or a name in `restack` or `renames` is
        not in the target; it lists everything. Or devices that it was saved from are not here.
      ValueError: There is no target, and `restack` or `renames`.
      CorruptCheckpointError: Data on disk is damaged; it names the leaves.
      OSError: The system refused to read it; the data may be intact.
    """
    if sharding not in ("default", "saved"):
        raise ValueError(f"sharding is 'default' or 'saved', not {sharding!r}")
    where = places.resolve(path)
    if target is None and (restack or renames):
        raise ValueError("restack and renames say where the target has something: pass a target.")
    as_saved = sharding == "saved"
    with collector.paused(), where.reading():
        checkpoint = open_checkpoint(where)
        if target is None:
            require_items(checkpoint, None)
            for name, why in checkpoint.composition.others.items():
                _LOG.warning("%s was not loaded: %s.", where.final / name, why)
            leaves = checkpoint.contents.leaves
            # The plan is gone before the collector can go through it.
            values = _read(
                where,
                checkpoint,
                [_as_saved(leaf, as_sharded=as_saved) for leaf in leaves],
                progress,
            )
            return _nested(leaves, values)
        target = orbax_terms.tree_of(target)
        if leaf_types.are_registered():
            keypaths.values_of(target)  # whose message names what JAX cannot flatten
        key_paths, values, structure = keypaths.flatten(leaf_types.unwrapped(target))
        checkpoint = chosen(checkpoint, where, key_paths)
        require_items(checkpoint, key_paths if partial else None)
        by_name = {leaf.name: leaf for leaf in checkpoint.contents.leaves}
        spread = map(shared_reads.spread, values) if share_reads else values
        loaded = _read(
            where,
            checkpoint,
            _plan(
                where,
                checkpoint.contents.leaves,
                zip(key_paths, spread, strict=True),
                Arrangement(restack, renames, key_paths, lambda path: _find(path, by_name)),
                partial=partial,
                keep_missing=keep_missing,
                cast=cast,
                as_sharded=as_saved,
            ),
            progress,
        )
        if share_reads:
            loaded = shared_reads.gathered(loaded, values)
        return leaf_types.rewrapped(target, tree_util.tree_unflatten(structure, loaded))


def _as_saved(leaf: Leaf, *, as_sharded: bool) -> Reading:
    sharding = sharding_of(leaf) if as_sharded else None
    if sharding is None:
        return placing.as_saved(leaf)
    reading = placing.as_target(leaf, placing.abstract(leaf, sharding), cast=False)
    if isinstance(reading, str):
        raise TargetMismatchError(reading)
    return reading


def _plan(
    where: Place,
    leaves: Sequence[Leaf],
    wanted: Iterable[tuple[KeyPath, Any]],
    arrangement: Arrangement,
    *,
    partial: bool,
    keep_missing: bool,
    cast: bool,
    as_sharded: bool,
) -> list[Reading]:
    readings: list[Reading] = []
    problems: list[str] = []
    ways_out: set[str] = set()
    found: set[str] = set()
    skipped: set[str] = set()
    lacking: list[str] = []
    for path, value in wanted:
        source = arrangement.find(path, value)
        stored = [leaf.name for leaf in source.stored] if isinstance(source, Source) else []
        planned: Reading | str
        if value is orbax_terms.PLACEHOLDER or (partial and value is None and not _is_none(source)):
            skipped.update(stored or [path.name])
            planned = placing.as_it_is(path, value)
        elif isinstance(source, str):
            planned = source
        elif source is not None:
            found.update(stored)
            own = _own_terms(source.leaf, value, as_sharded=as_sharded)
            planned = placing.as_target(source.leaf, own, cast=cast)
            if not isinstance(planned, str):
                planned = source.reading(planned)
            elif _fits_by_cast(source.leaf, own):
                ways_out.add(_CAST)
        elif keep_missing:
            planned = placing.as_it_is(path, value)
        else:
            planned = f"{path.name!r} is not in the checkpoint{arrangement.said_of(path)}"
            lacking.append(_bare(path.name))
            ways_out.add(_KEEP_MISSING)
        problems.append(planned) if isinstance(planned, str) else readings.append(planned)
    problems += arrangement.unused()
    left_over = [
        leaf.name
        for leaf in leaves
        if not partial and leaf.name not in found and not _is_within(leaf, skipped)
    ]
    problems += [f"{name!r} is not in the target" for name in left_over]
    if problems:
        ways_out |= {_PARTIAL} if left_over else set()
        hint = f"; {'; '.join(sorted(ways_out))}" if ways_out else ""
        count = f"{len(problems)} {'leaf' if len(problems) == 1 else 'leaves'}"
        raise TargetMismatchError(
            f"{where.final} does not fit the target ({count}{hint}):\n  "
            + "\n  ".join([*problems, *_meant(lacking, leaves, found)])
        )
    return readings


def _meant(lacking: Sequence[str], leaves: Sequence[Leaf], found: Container[str]) -> list[str]:
    """Returns a hint for what the target calls otherwise than the checkpoint, if that is likely.

    Only where few leaves differ: comparing many names takes long.
    """
    others = [leaf.name for leaf in leaves if leaf.name not in found]
    if not 0 < len(lacking) * len(others) <= _MOST_COMPARED:
        return []
    ends = [name for name in others if name.endswith(f".{lacking[0]}")]
    for root in sorted((name.removesuffix(f".{lacking[0]}") for name in ends), key=len):
        if all(f"{root}.{name}" in others for name in lacking):
            return [f"The checkpoint has such leaves below {root!r}: pass {{{root!r}: target}}."]
    close = {name: difflib.get_close_matches(name, others, n=1) for name in lacking}
    likely = [f"{names[0]!r} for {name!r}" for name, names in close.items() if names]
    shown = first_few(likely, most=_MOST_MEANT, count=len(likely))
    return [f"The checkpoint has {', '.join(shown)}."] if likely else []


def _bare(name: str) -> str:
    """A leaf's name without the attribute in which NNX's variables hold their value."""
    return name.removesuffix(f".{_NNX_VALUE}")


def _is_none(source: Source | str | None) -> bool:
    return isinstance(source, Source) and _fits_by_cast(source.leaf, None)


def _fits_by_cast(leaf: Leaf, value: Any) -> bool:
    return not isinstance(placing.as_target(leaf, value, cast=True), str)


def _own_terms(leaf: Leaf, target: Any, *, as_sharded: bool) -> Any:
    value = orbax_terms.as_value(leaf, target)
    if as_sharded and isinstance(value, jax.ShapeDtypeStruct) and value.sharding is None:
        return value.update(sharding=sharding_of(leaf))
    return value


def _is_within(path: KeyPath, skipped: Container[str]) -> bool:
    texts = path.texts
    return bool(skipped) and any(
        ".".join(texts[:depth]) in skipped for depth in range(len(texts) + 1)
    )


def _find(path: KeyPath, by_name: Mapping[str, Leaf]) -> Leaf | None:
    """The leaf at a path: with or without the attribute in which NNX's variables hold their value.

    What NNX flattens has it (`params.kernel.value`), its pure dicts and the callback's do not.
    """
    leaf = by_name.get(path.name)
    if leaf is None and path.texts[-1:] == (_NNX_VALUE,) and path.key_kinds[-1] == ATTRIBUTE:
        return by_name.get(path.name.removesuffix(f".{_NNX_VALUE}"))
    if leaf is None:
        leaf = by_name.get(f"{path.name}.{_NNX_VALUE}")
        is_variable = leaf is not None and leaf.key_kinds[-1] == ATTRIBUTE
        return leaf if is_variable else None
    return leaf


def _read(
    where: Place,
    checkpoint: Checkpoint,
    readings: Sequence[Reading],
    progress: Callable[[int, int], None] | None,
) -> list[Any]:
    """Reads the boxes of all that is wanted, and builds the leaves: some at a time.

    Some are put on an accelerator while the next are read.
    """
    data = _read_boxes(checkpoint, [box for one in readings for box in one.regions], progress)
    is_ahead = placing.has_accelerator()
    most_bytes = _PIECE_BYTES if is_ahead else None
    on_the_way: deque[list[Any]] = deque()
    values: list[Any] = []
    errors: list[Exception] = []
    for group in batched(readings, _bytes_of, most_bytes=most_bytes):
        outcomes = list(islice(data, sum([len(one.regions) for one in group])))
        boxes = iter([one for one in outcomes if not isinstance(one, Exception)])
        errors += [one for one in outcomes if isinstance(one, Exception)]
        if not errors:
            built = [one.build([next(boxes) for _ in one.regions]) for one in group]
            put = placing.put_on_devices(built)
            values += put
            if is_ahead:
                on_the_way.append(put)
                if len(on_the_way) > _MOST_ON_THE_WAY:
                    jax.block_until_ready(on_the_way.popleft())
    for error in errors:
        if isinstance(error, OSError):
            raise error
    if errors:
        raise CorruptCheckpointError(
            f"{where.final} is damaged: load an earlier one, or without these leaves.\n  "
            + "\n  ".join(dict.fromkeys(map(str, errors)))
        )
    return values


def _bytes_of(reading: Reading) -> int:
    return sum(map(region_bytes, reading.regions))


def _read_boxes(
    checkpoint: Checkpoint,
    regions: Sequence[Region],
    progress: Callable[[int, int], None] | None,
) -> Iterator[np.ndarray | Exception]:
    """Yields what is read of each box; a batch is read when the first of it is wanted."""
    is_ahead = placing.has_accelerator()
    most_bytes = None if progress is None and not is_ahead else _PIECE_BYTES
    batches = batched(regions, region_bytes, most_bytes=most_bytes)
    done, total = 0, sum(map(region_bytes, regions)) if progress else 0
    if progress:
        progress(0, total)
    reads = _read_ahead if is_ahead else _read_now
    for batch, outcomes in reads(checkpoint, batches):
        if progress:
            done += sum(map(region_bytes, batch))
            progress(done, total)
        yield from outcomes


def _read_now(checkpoint: Checkpoint, batches: Iterable[Sequence[Region]]) -> Iterator[_Read]:
    """Yields batches and what was read of each."""
    for batch in batches:
        yield batch, checkpoint.read(batch)


def _read_ahead(checkpoint: Checkpoint, batches: Iterable[Sequence[Region]]) -> Iterator[_Read]:
    """Yields batches and what was read of each; the next are read meanwhile, by other threads."""
    with ThreadPoolExecutor(_READ_AHEAD, "flax_partial-read-ahead") as threads:
        reading: deque[tuple[Sequence[Region], Future[Outcomes]]] = deque()
        for batch in batches:
            reading.append((batch, threads.submit(checkpoint.read, batch)))
            if len(reading) > _READ_AHEAD:
                before, outcomes = reading.popleft()
                yield before, outcomes.result()
        for before, outcomes in reading:
            yield before, outcomes.result()


def _nested(leaves: Sequence[Leaf], values: Sequence[Any]) -> Any:
    """Builds nested dicts and lists; a list's elements may have been saved in any order."""
    tree = _Tree()
    stem: list[str] | None = None
    node: _Node | None = None
    for leaf, value in zip(leaves, values, strict=True):
        *above, last = "", *leaf.texts
        key_kinds = keypaths.STR_KEY + leaf.key_kinds
        if above != stem:  # most leaves stand beside the one before
            stem, node = above, tree.node_at(above, key_kinds)
        if node is None or last in node:
            raise CorruptCheckpointError(
                f"Leaf {leaf.name!r}: in the table of contents it is there twice, or a leaf and a "
                "subtree"
            )
        tree.put(node, last, key_kinds[-1], value)
    return tree.finished()


class _Tree:
    """Nested dicts, first by the texts of all keys; what the keys are to be is made of them last.

    Attributes:
      top: What holds the root, under the empty text.
    """

    def __init__(self) -> None:
        self.top: _Node = {}
        self._numbers: dict[int, dict[str, str]] = {id(self.top): {}}  # a node -> kinds of keys
        self._below: list[tuple[_Node, str]] = []  # all other nodes, by where they are

    def node_at(self, texts: Sequence[str], key_kinds: str) -> "_Node | None":
        """Returns the node at a path from the top; None where a leaf is in the way."""
        node = self.top
        for text, kind in zip(texts, key_kinds, strict=False):
            if text not in node:
                child: _Node = {}
                self.put(node, text, kind, child)
                self._numbers[id(child)] = {}
                self._below.append((node, text))
            node = node[text]
            if id(node) not in self._numbers:  # a leaf may be a dict, too
                return None
        return node

    def put(self, node: "_Node", text: str, kind: str, child: Any) -> None:
        """Adds a child to a node."""
        node[text] = child
        if kind not in keypaths.TEXT_KEYS:
            self._numbers[id(node)][text] = kind

    def finished(self) -> Any:
        """Returns the root, with integers as keys, and lists."""
        for node, text in reversed(self._below):  # the inner ones first
            if numbers := self._numbers[id(node[text])]:
                node[text] = _with_numbers(text, node[text], numbers)
        return self.top[""]


_Node = dict[str, Any]


def _with_numbers(name: str, node: Mapping[str, Any], numbers: Mapping[str, str]) -> Any:
    """Makes a node of which some keys are numbers: a list, or a dict."""
    children = {int(text) if text in numbers else text: child for text, child in node.items()}
    if keypaths.INDEX not in numbers.values():
        return children
    try:
        return [children[i] for i in range(len(children))]
    except KeyError as error:
        raise CorruptCheckpointError(
            f"In the table of contents list {name!r} lacks element {error}"
        ) from None
