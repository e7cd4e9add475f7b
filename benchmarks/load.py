"""`load`: reading checkpoints back, whole, in part and sharded, all of it in the page cache.

Orbax reads our checkpoint and one that it wrote itself, and every target stands for both: for the
faster of them. It and we are given the same target.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from benchmarks import child
from benchmarks import contenders as by
from benchmarks import load_process as process
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MIB = 1 << 20
_OURS, _ORBAX, _ORBAX_OURS = by.OURS, "Orbax v1 of its own", "Orbax v1 of ours"
_PLAIN = "plain read"
_PEERS = (_ORBAX, _ORBAX_OURS)
# Who reads, and whose checkpoint.
_WAYS = {_OURS: ("ours", "ours"), _ORBAX: ("orbax", "orbax"), _ORBAX_OURS: ("orbax", "ours")}


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 1 GiB in 64 arrays; 2,048 small leaves (small: a fraction of each)."""
    count, size = (4, _MIB) if small else (32, 16 * _MIB)
    large = _Stored("large arrays", by.make_groups(count, leaves=2, shape=process.shape_of(size)))
    tiny = _Stored("small leaves", by.make_groups(8 if small else 128, leaves=16, shape=(64,)))
    sharded = _Sharded("sharded", 2 * count, size)

    def prepare(directory: Path) -> None:
        for stored in (large, tiny, sharded):
            stored.write(directory)

    plain = Contender(large.label(_PLAIN), lambda _: process.timed(large.read_plainly))
    group, group_by_orbax = (f"{way}, 1 of {count} groups" for way in (_OURS, _ORBAX))
    return Scenario(
        name="load",
        work=(
            f"{2 * count} arrays of {size // _MIB} MiB; {16 * len(tiny.groups):,} leaves of 64 "
            f"float32; 1 of {count} groups of the former; the former onto {process.DEVICES} devices"
        ),
        contenders=(
            *(large.contender(way) for way in _WAYS),
            plain,
            *(tiny.contender(way) for way in _WAYS),
            Contender(group, partial(large.run_one_group, _OURS)),
            Contender(group_by_orbax, partial(large.run_one_group, _ORBAX)),
            *(Contender(sharded.label(way), partial(sharded.run, way)) for way in _WAYS),
        ),
        targets=(
            *(large.faster(peer, at_least=2) for peer in _PEERS),
            Target.within(Figure(large.label(_OURS)), of=Figure(plain.name), at_most=1.3),
            *(tiny.faster(peer, at_least=5) for peer in _PEERS),
            *(Target.faster(group, than=large.label(peer), at_least=20) for peer in _PEERS),
            Target.faster(group, than=group_by_orbax),
            *(sharded.faster(peer, at_least=2) for peer in _PEERS),
        ),
        touched_bytes=3 * by.count_bytes(large.groups),
        prepare=prepare,
    )


class _Case:
    """One tree in two checkpoints: `ours`, and `orbax`, which Orbax wrote."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stored: dict[str, Path] = {}

    def label(self, way: str) -> str:
        return f"{way}, {self._name}"

    def faster(self, peer: str, *, at_least: float) -> Target:
        return Target.faster(self.label(_OURS), than=self.label(peer), at_least=at_least)

    def _places(self, directory: Path) -> tuple[Path, Path]:
        ours, orbax = (directory / f"{self._name}, {writer}" for writer in ("ours", "orbax"))
        self._stored = {"ours": ours, "orbax": orbax}
        return ours, orbax


class _Stored(_Case):
    """A tree that is read onto the default device."""

    def __init__(self, name: str, groups: Sequence[by.Group]) -> None:
        super().__init__(name)
        self.groups = groups

    def write(self, directory: Path) -> None:
        ours, orbax = self._places(directory)
        by.save_ours(self.groups, ours)
        by.save_orbax_whole(self.groups, orbax)

    def contender(self, way: str) -> Contender:
        whole = by.merged(self.groups)

        def check(_: Path) -> None:
            jax.tree.map(np.testing.assert_array_equal, whole, self._load(way, whole))

        return Contender(
            self.label(way), lambda _: process.timed(lambda: self._load(way, whole)), check
        )

    def run_one_group(self, way: str, _: Path) -> Metrics:
        wanted = self.groups[len(self.groups) // 2]
        return process.timed(lambda: self._load(way, wanted, partial=True))

    def _load(self, way: str, wanted: by.Group, *, partial: bool = False) -> Any:
        reader, writer = _WAYS[way]
        return process.load(reader, self._stored[writer], _abstract(wanted), partial=partial)

    def read_plainly(self) -> list[bytes]:
        """Reads every file of our checkpoint, one after the other, into memory."""
        files = sorted(path for path in self._stored["ours"].rglob("*") if path.is_file())
        return [path.read_bytes() for path in files]


class _Sharded(_Case):
    """A tree of arrays that are spread over several devices, saved and read like that."""

    def __init__(self, name: str, count: int, size: int) -> None:
        super().__init__(name)
        self._work = (count, size)

    def write(self, directory: Path) -> None:
        self._start("write", *self._places(directory))

    def run(self, way: str, _: Path) -> Metrics:
        reader, writer = _WAYS[way]
        return self._start("load", reader, self._stored[writer])

    def _start(self, *arguments: object) -> Metrics:
        return child.run("load_process", *arguments, *self._work, devices=process.DEVICES)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
