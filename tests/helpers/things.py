"""What several test modules need."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import subprocess
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flax_partial as fp

QUICK = fp.SaveOptions(durable=False)
X = np.arange(3)
MOST_SECS = 250  # that anything may take, on any machine; most takes milliseconds


# What may be in the way of a file or a directory, made.
OBSTACLES: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("precious"),
    "directory": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("."),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "pipe": os.mkfifo,
}


def stored(path: Path, *states: Any, **how: Any) -> fp.SaveReport:
    """Makes a checkpoint of some saves, one after another; the report of the last."""
    reports = [fp.save(path, state, **{"options": QUICK, **how}) for state in states]
    fp.finalize(path)
    return reports[-1]


def until(holds: Callable[[], object]) -> None:
    """Waits for something to come true."""
    end = time.monotonic() + MOST_SECS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file may grow over so many bytes: writing more fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def locked(session: Path, kind: int) -> Iterator[None]:
    """Holds the `flock` of a session, as others do: shared by who saves, exclusive by who ends."""
    descriptor = os.open(session, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def listing(directory: Path) -> list[str]:
    """Every file and directory below, with sizes."""
    return sorted(
        f"{entry.relative_to(directory)} {entry.lstat().st_size if entry.is_file() else ''}"
        for entry in directory.rglob("*")
    )


@contextlib.contextmanager
def unchanged(directory: Path) -> Iterator[None]:
    """Nothing below a directory is another afterwards."""
    before = listing(directory)
    yield
    assert listing(directory) == before


def targets(values: Mapping[str, Any], shardings: Mapping[str, Any]) -> dict[str, Any]:
    """A target for arrays, each in a sharding, by their names."""
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
        for name, x in values.items()
    }


def assert_sharded(array: jax.Array, sharding: Any, value: np.ndarray) -> None:
    """An array is sharded as wanted, and this process's shards hold their share of a value."""
    assert array.sharding == sharding
    for shard in array.addressable_shards:
        assert np.array_equal(shard.data, value[shard.index])


def counted(load: Callable[[], Any]) -> tuple[Any, int]:
    """What `load` returns, and how many bytes it reads: the second time, when all is imported."""

    def so_far() -> int:  # by the kernel's own count
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["rchar"])

    load()
    before = so_far()
    return load(), so_far() - before


def run_or_skip(command: Sequence[object]) -> None:
    """Runs a command that only some machines have, or allow; elsewhere the test is skipped."""
    import pytest  # not in the processes that tests start

    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"no {error.filename} here")
    if done.returncode:
        pytest.skip(f"{command[0]}: {done.stderr.strip()}")


def trainer(**fields: Any) -> types.SimpleNamespace:
    """As much of a trainer as a callback reads, before its first step."""
    known = {"global_step": 0, "current_epoch": 0, "callback_metrics": {}, "is_last_batch": True}
    return types.SimpleNamespace(**{**known, "state": None, **fields})


def one_step(callback: Any, state: Any, after: Callable[[Any], Any], *, step: int = 1) -> Any:
    """Trains one step whose state a callback saves; `after` donates it then, and is returned."""
    loop = trainer(state=state)
    callback.on_fit_start(loop, None)
    loop.global_step = step
    callback.on_train_batch_end(loop, None, None, None, 0)
    loop.state = after(state)
    callback.on_train_epoch_end(loop, None)
    callback.on_train_end(loop, None)
    return loop.state


class Element:
    """One element of a list that other saves hold the rest of."""

    def __init__(self, index: int, value: Any) -> None:
        self.index, self.value = index, value


jax.tree_util.register_pytree_with_keys(
    Element,
    lambda one: (((jax.tree_util.SequenceKey(one.index), one.value),), one.index),
    lambda index, children: Element(index, children[0]),
)
