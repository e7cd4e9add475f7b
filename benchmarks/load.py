"""`load`: reading checkpoints back, whole, in part and sharded, all of it in the page cache.

Orbax reads our checkpoint and one that it wrote itself, and every target applies to both.
Both readers are given the same target.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_partial as fp
from benchmarks import child
from benchmarks import contenders as by
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target
from benchmarks.memory_use import measured

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MIB = 1 << 20
_DEVICES = 8
_OURS, _ORBAX, _ORBAX_OURS = by.OURS, "Orbax v1 of its own", "Orbax v1 of ours"
_PLAIN = "plain read"
_PEERS = (_ORBAX, _ORBAX_OURS)
# The reader, and the writer of what it reads.
_WAYS = {_OURS: ("ours", "ours"), _ORBAX: ("orbax", "orbax"), _ORBAX_OURS: ("orbax", "ours")}


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 1 GiB in 64 arrays; 2,048 small leaves (small: a fraction of each)."""
    count, size = (4, _MIB) if small else (32, 16 * _MIB)
    large = _Stored("large arrays", by.make_groups(count, leaves=2, shape=by.shape_of(size)))
    tiny = _Stored("small leaves", by.make_groups(8 if small else 128, leaves=16, shape=(64,)))
    sharded = _Sharded("sharded", 2 * count, size)

    def prepare(directory: Path) -> None:
        for stored in (large, tiny, sharded):
            stored.write(directory)

    plain = Contender(large.label(_PLAIN), lambda _: _timed(large.read_plainly))
    verify = Contender(large.label(f"{_OURS}, verify"), lambda _: _timed(large.verify))
    group, group_by_orbax = (f"{way}, 1 of {count} groups" for way in (_OURS, _ORBAX))
    return Scenario(
        name="load",
        work=(
            f"{2 * count} arrays of {size // _MIB} MiB; {16 * len(tiny.groups):,} leaves of 64 "
            f"float32; 1 of {count} groups of the former; the former onto {_DEVICES} devices"
        ),
        contenders=(
            *(large.contender(way) for way in _WAYS),
            plain,
            verify,
            *(tiny.contender(way) for way in _WAYS),
            Contender(group, partial(large.run_one_group, _OURS)),
            Contender(group_by_orbax, partial(large.run_one_group, _ORBAX)),
            *(Contender(sharded.label(way), partial(sharded.run, way)) for way in _WAYS),
        ),
        targets=(
            *(large.faster(peer, at_least=2) for peer in _PEERS),
            Target.within(Figure(large.label(_OURS)), of=Figure(plain.name), at_most=1.3),
            Target.within(Figure(verify.name), of=Figure(plain.name), at_most=1),
            *(tiny.faster(peer, at_least=5) for peer in _PEERS),
            *(Target.faster(group, than=large.label(peer), at_least=20) for peer in _PEERS),
            Target.faster(group, than=group_by_orbax),
            *(sharded.faster(peer, at_least=2) for peer in _PEERS),
        ),
        touched_bytes=3 * by.count_bytes(large.groups),
        prepare=prepare,
    )


def _timed(work: Callable[[], object]) -> Metrics:
    return {"total": by.seconds(work)}


class _Case:
    """One tree in two checkpoints: `ours`, and `orbax`, which Orbax wrote."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stored: dict[str, Path] = {}

    def label(self, way: str) -> str:
        return f"{way}, {self._name}"

    def faster(self, peer: str, *, at_least: float) -> Target:
        return Target.faster(self.label(_OURS), than=self.label(peer), at_least=at_least)

    def _paths(self, directory: Path) -> dict[str, Path]:
        self._stored = {name: directory / f"{self._name}, {name}" for name in ("ours", "orbax")}
        return self._stored


class _Stored(_Case):
    """A tree that is read onto the default device."""

    def __init__(self, name: str, groups: Sequence[by.Group]) -> None:
        super().__init__(name)
        self.groups = groups

    def write(self, directory: Path) -> None:
        paths = self._paths(directory)
        by.save_ours(self.groups, paths["ours"])
        by.save_orbax_whole(self.groups, paths["orbax"])

    def contender(self, way: str) -> Contender:
        whole = by.merged(self.groups)

        def check(_: Path) -> None:
            jax.tree.map(np.testing.assert_array_equal, whole, self._load(way, whole))

        return Contender(self.label(way), lambda _: _timed(lambda: self._load(way, whole)), check)

    def run_one_group(self, way: str, _: Path) -> Metrics:
        wanted = self.groups[len(self.groups) // 2]
        return _timed(lambda: self._load(way, wanted, partial=True))

    def _load(self, way: str, wanted: by.Group, *, partial: bool = False) -> Any:
        reader, writer = _WAYS[way]
        return _load(reader, self._stored[writer], _abstract(wanted), partial=partial)

    def read_plainly(self) -> list[bytes]:
        """Reads every file of our checkpoint, one after the other, into memory."""
        files = sorted(path for path in self._stored["ours"].rglob("*") if path.is_file())
        return [path.read_bytes() for path in files]

    def verify(self) -> None:
        """Checks all digests of our checkpoint."""
        assert fp.verify(self._stored["ours"]).ok


class _Sharded(_Case):
    """A tree of arrays that are spread over several devices, saved and read like that."""

    def __init__(self, name: str, count: int, size: int) -> None:
        super().__init__(name)
        self._work = (count, size)

    def write(self, directory: Path) -> None:
        paths = self._paths(directory)
        child.run(write_sharded, paths["ours"], paths["orbax"], *self._work, devices=_DEVICES)

    def run(self, way: str, _: Path) -> Metrics:
        reader, writer = _WAYS[way]
        path = self._stored[writer]
        return child.run(load_sharded, reader, path, *self._work, devices=_DEVICES)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _load(reader: str, path: Path, target: Any, *, partial: bool = False) -> Any:
    """Reads what `target` names, by `fp.load` or by Orbax, each leaf onto its devices."""
    if reader == "ours":
        return jax.block_until_ready(fp.load(path, target, partial=partial))
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    with context:
        return jax.block_until_ready(ocp.load(path, target))


# What follows runs in processes of several devices.


def write_sharded(ours: str, orbax: str, count: int, size: int) -> Metrics:
    """Writes `count` arrays of `size` bytes, spread over all devices, to two paths."""
    state = _state(count, size)
    by.save_ours([state], Path(ours))
    by.save_orbax_whole([state], Path(orbax))
    return {}


def load_sharded(reader: str, path: str, count: int, size: int) -> Metrics:
    """Reads what `write_sharded` wrote to one path, after a small checkpoint to warm up.

    Returns:
      `total`: seconds. `memory`: growth of the resident memory at its peak, in bytes.
    """
    few = _state(2, _DEVICES * 4096)
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as directory:
        warm = Path(directory) / "warm"
        (by.save_ours if reader == "ours" else by.save_orbax_whole)([few], warm)
        _load(reader, warm, _abstract(few))
    target = _target(count, size)
    return measured(lambda: _timed(lambda: _load(reader, Path(path), target)))


def _target(count: int, size: int) -> Any:
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    leaf = jax.ShapeDtypeStruct(by.shape_of(size), np.float32, sharding=sharding)
    return {"arrays": {f"array_{number}": leaf for number in range(count)}}


def _state(count: int, size: int) -> by.Group:
    random = np.random.default_rng(0)
    state: by.Group = jax.tree.map(
        lambda leaf: jax.device_put(random.random(leaf.shape, np.float32), leaf.sharding),
        _target(count, size),
    )
    return state
