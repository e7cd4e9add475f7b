"""The ways of saving that scenarios compare: ours, Orbax's two, safetensors, a plain write.

Each takes the same groups, trees of arrays that are saved one after the other, and a path. It
measures seconds: `save` for all groups, `finalize` where there is one, `total` for both.
Peers are used by their public calls only.
"""

from __future__ import annotations

import itertools
import os
import time
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

import flax_partial as fp
from benchmarks.harness import Contender, Medium, Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

OURS = "flax_partial"
PARTIAL = "Orbax v1.partial"
WHOLE = "Orbax v1, one whole save"
SAFETENSORS = "safetensors + fsync"
PLAIN = "plain write + fsync"

Group = dict[str, dict[str, jax.Array]]


def make_groups(count: int, *, leaves: int, shape: tuple[int, ...]) -> list[Group]:
    """Returns `count` groups of `leaves` float32 arrays of random numbers, ready and touched."""
    return list(each_group(count, leaves=leaves, shape=shape))


def each_group(count: int, *, leaves: int, shape: tuple[int, ...]) -> Iterator[Group]:
    """Yields what `make_groups` returns, made one after the other."""
    random = np.random.default_rng(0)
    for i in range(count):
        arrays = {f"leaf_{j}": _random_array(random, shape) for j in range(leaves)}
        yield {f"group_{i}": jax.block_until_ready(arrays)}


def _random_array(random: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    return jax.numpy.asarray(random.random(shape, np.float32))


def count_bytes(groups: Sequence[Group]) -> int:
    """Returns the size of all arrays, in bytes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(groups))


def contender(
    name: str,
    groups: Sequence[Group],
    *,
    label: str | None = None,
    max_rounds: int | None = None,
    medium: Medium = "disk",
    is_checked: bool = True,
) -> Contender:
    """Returns the contender `name`, one of those above, with these groups as its work.

    Args:
      name: One of this module's names of contenders.
      groups: What it saves.
      label: What the table calls it, where that is not `name`.
      max_rounds: As in `Contender`.
      medium: As in `Contender`.
      is_checked: Whether what it leaves is read back, by Orbax too, and compared.
    """
    save, check = WAYS[name]
    return Contender(
        name=label or name,
        run=partial(save, groups),
        check=partial(check, groups) if check and is_checked else None,
        max_rounds=max_rounds,
        medium=medium,
    )


def shape_of(size: int) -> tuple[int, int]:
    """Returns the shape of a float32 array of `size` bytes, a multiple of 4096."""
    return size // 4096, 1024


def seconds(work: Callable[[], object]) -> float:
    """Returns how long `work` takes; what it returns is dropped after that."""
    start = time.perf_counter()
    kept = work()
    secs = time.perf_counter() - start
    del kept
    return secs


def timed(save: Callable[[], object], finalize: Callable[[], object] | None = None) -> Metrics:
    """Returns how long `save` and then `finalize` take, in seconds."""
    metrics = {"save": seconds(save)}
    if finalize is not None:
        metrics["finalize"] = seconds(finalize)
    return metrics | {"total": sum(metrics.values())}


def timed_async(save: Callable[[], Any], finalize: Callable[[], object] | None = None) -> Metrics:
    """Measures saves in the background, whose handles `save` returns, and `finalize` after them.

    Returns:
      `blocked`: for how long `save` holds its caller, `finalize` where there is one, and
      `total`, in seconds.
    """
    start = time.perf_counter()
    handles = save()
    metrics = {"blocked": time.perf_counter() - start}
    for handle in handles:
        handle.result()
    if finalize is not None:
        metrics["finalize"] = seconds(finalize)
    return metrics | {"total": time.perf_counter() - start}


def save_ours(groups: Iterable[Group], path: Path) -> Metrics:
    """Saves durably group by group, then finalizes: `flax_partial`, its defaults."""
    return timed(lambda: [fp.save(path, group) for group in groups], lambda: fp.finalize(path))


def save_orbax_partial(groups: Iterable[Group], path: Path) -> Metrics:
    """Saves group by group, then finalizes: Orbax `v1.partial`, its defaults."""
    return timed(
        lambda: [ocp.partial.save(path, group) for group in groups],
        lambda: ocp.partial.finalize(path),
    )


def save_orbax_whole(groups: Sequence[Group], path: Path) -> Metrics:
    """Saves everything at once: Orbax `v1.save`, its defaults."""
    return timed(lambda: ocp.save(path, merged(groups)))


def save_ours_async(groups: Iterable[Any], path: Path | str) -> Metrics:
    """Saves group by group in the background, then finalizes: `flax_partial`, its defaults."""
    return timed_async(
        lambda: [fp.save_async(path, group) for group in groups], lambda: fp.finalize(path)
    )


def save_orbax_whole_async(groups: Sequence[Any], path: Path | str) -> Metrics:
    """Saves everything at once in the background: Orbax `v1.save_async`, its defaults."""
    return timed_async(lambda: [ocp.save_async(path, merged(groups))])


def _save_safetensors(groups: Sequence[Group], path: Path) -> Metrics:
    """Saves group by group, one file each, every file and the directory fsynced."""
    from safetensors.numpy import save_file

    def save() -> None:
        path.mkdir()
        for number, group in enumerate(groups):
            file = path / f"{number}.safetensors"
            save_file(_named_arrays(group), file)
            _fsync(file)
        _fsync(path)

    return timed(save)


def save_plainly(groups: Iterable[Any], path: Path) -> Metrics:
    """Writes the arrays' bytes one after the other into one file, fsynced once."""

    def save() -> None:
        with path.open("wb", buffering=0) as file:
            for leaf in itertools.chain.from_iterable(map(jax.tree.leaves, groups)):
                _write_all(file.fileno(), np.asarray(leaf).data.cast("B"))
            os.fsync(file.fileno())
        _fsync(path.parent)

    return timed(save)


def check_ours(groups: Sequence[Group], path: Path) -> None:
    """Verifies one of ours, and reads it by `load` and by Orbax."""
    assert fp.verify(path).ok
    _assert_equal(fp.load(path), merged(groups))
    _check_orbax(groups, path)


def _check_orbax(groups: Sequence[Group], path: Path) -> None:
    """Reads a checkpoint by Orbax, without a target."""
    _assert_equal(read_by_orbax(path), merged(groups))


def read_by_orbax(path: Path) -> Any:
    """Reads a checkpoint by Orbax, without a target, of which it warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info not provided", UserWarning)
        return ocp.load(path)


def _assert_equal(found: Any, expected: Group) -> None:
    # Trees of other structures are refused by the map itself.
    jax.tree.map(np.testing.assert_array_equal, expected, found)


def merged(groups: Sequence[Group]) -> Group:
    """Returns all groups as one tree."""
    return {name: group[name] for group in groups for name in group}


def _named_arrays(group: Group) -> dict[str, np.ndarray[Any, Any]]:
    return {
        f"{name}.{leaf}": np.asarray(array)
        for name, leaves in group.items()
        for leaf, array in leaves.items()
    }


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


WAYS: dict[str, tuple[Callable[..., Metrics], Callable[..., None] | None]] = {
    OURS: (save_ours, check_ours),
    PARTIAL: (save_orbax_partial, _check_orbax),
    WHOLE: (save_orbax_whole, _check_orbax),
    SAFETENSORS: (_save_safetensors, None),
    PLAIN: (save_plainly, None),
}
"""Each contender's save and, where it can be read back, its check; in the order of tables."""
