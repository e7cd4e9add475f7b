"""Finalizes what thousands of processes would have saved: `python tests/long_runs many_processes`.

The parts are made here, by the rules that processes share replicas by, with data files that take no
room; digests are those of nothing. Finalize is the real one. What it costs is printed: seconds,
memory, changes to and looks at the file system as Python's audit events have them. The agreement
before it is the real one, too, with JAX's coordination service and one client in this process,
which speaks for all. `docs/scaling.md` has what came out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np
from cluster import free_port
from jax._src.lib import _jax
from memory import status_bytes

import flax_partial as fp
from flax_partial.distributed.jax_service import Service, serving
from flax_partial.format.chunks import choose_chunk_shape, chunk_counts
from flax_partial.format.model import Box, Leaf, Part, part_path
from flax_partial.format.tables import encode_part
from flax_partial.saving.shares import _count_pieces, _cut, _ranges, _text, _turn, _writers
from flax_partial.storage.parts import prefix_of_name

MODEL = 8  # processes over which each large array is sharded; the others hold replicas
LARGE, SMALL = (2048, 4096), (4096,)  # bfloat16 and float32: 16 MiB, and 16 KiB
CHUNK_BYTES = fp.SaveOptions().chunk_bytes
LAYER = 10  # leaves of one, of which three are large


@dataclass
class Written:
    """What one process's part holds."""

    leaves: list[Leaf] = field(default_factory=list)
    bytes: int = 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=1000)
    parser.add_argument("--leaves", type=int, default=100_000)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--finalize", type=Path, default=None, help="a session that was made so")
    asked = parser.parse_args()
    if asked.finalize is not None:
        say(json.dumps(finalized(asked.finalize)))
        return
    directory = Path(tempfile.mkdtemp(dir=asked.directory))
    try:
        path = directory / "checkpoint"
        table_bytes, chunks = make_session(path, asked.processes, asked.leaves)
        say(f"{asked.processes} processes, {chunks} chunks, {table_bytes / 1e6:.0f} MB of tables")
        # In a process of its own: what it takes of memory is finalize's.
        subprocess.run([sys.executable, __file__, "--finalize", path], check=True)
        say(f"most entries of a directory: {widest(path)}")
        say(json.dumps(agreement(asked.processes)))
    finally:
        shutil.rmtree(directory)


def finalized(path: Path) -> dict[str, Any]:
    """Finalizes; returns what that took."""
    with counted() as calls:
        began, cpu = time.perf_counter(), time.process_time()
        done = fp.finalize(path)
        secs, cpu_secs = time.perf_counter() - began, time.process_time() - cpu
    return {
        "leaves": len(done.leaves),
        "terabytes": round(done.bytes / 1e12, 3),
        "secs": round(secs, 1),
        "cpu_secs": round(cpu_secs, 1),
        "peak_gigabytes": round(status_bytes("VmHWM") / 1e9, 2),
        "contents_megabytes": round((path / "state" / "contents.json").stat().st_size / 1e6),
        "file_system": dict(calls.most_common()),
    }


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def make_session(path: Path, processes: int, leaves: int) -> tuple[int, int]:
    """Writes the parts; returns the size of their tables, in bytes, and the number of chunks."""
    written = [Written() for _ in range(processes)]
    chunks = 0
    for number in range(leaves):
        chunks += deal(number, written)
    fp.save(path, {"step": 0}, options=fp.SaveOptions(durable=False))  # which makes the session
    state = path.with_name(f"{path.name}.partial_save") / "state"
    tables = 0
    for process, one in enumerate(written):
        part = Part(process, time.time_ns(), {}, tuple(one.leaves), one.bytes)
        own_name = prefix_of_name(part) + uuid.uuid4().hex[:12]
        where = state / part_path(own_name, process=process, processes=processes)
        where.mkdir(parents=True)
        with (where / "data").open("wb") as file:
            file.truncate(one.bytes)
        table = encode_part(part)
        (where / "part.json").write_bytes(table)
        tables += len(table)
    return tables, chunks


def deal(number: int, written: list[Written]) -> int:
    """Deals a leaf out to the processes that write it; returns how many chunks it has."""
    texts = ("params", "layers", str(number // LAYER), f"w{number % LAYER}")
    name = ".".join(texts)
    is_large = number % LAYER < 3
    shape, dtype, itemsize = (LARGE, "bfloat16", 2) if is_large else (SMALL, "float32", 4)
    model = MODEL if is_large else 1
    box = (shape[0] // model, *shape[1:])
    replicas = len(written) // model
    row_bytes = itemsize * int(np.prod(box))
    cut = _cut(box, shape, frozenset(), _count_pieces(replicas, row_bytes, CHUNK_BYTES))
    unit = tuple(cut.length if axis == cut.axis else size for axis, size in enumerate(box))
    chunk = choose_chunk_shape(
        shape, unit=unit, pinned=frozenset(), itemsize=itemsize, target_bytes=CHUNK_BYTES
    )
    size = itemsize * int(np.prod(chunk))
    writers: set[int] = set()
    total = 0
    boxes: dict[int, list[Box]] = {}
    for shard in range(model):
        holders = tuple(range(shard, len(written), model))
        start = (shard * box[0], *(0 for _ in box[1:]))
        text = _text(name, start, (0,) * len(start))
        for process in _writers(holders, cut.pieces, text):
            writers.add(process)
            turn = _turn(holders, process, cut.pieces, text)
            first, end = 0, box[0]
            if cut.axis == 0:
                first, end = turn.start * cut.length, min(turn.stop * cut.length, box[0])
            held = (end - first, *box[1:])
            count = int(np.prod(chunk_counts(held, chunk)))
            at = written[process].bytes
            places = tuple((at + size * i, size) for i in range(count))
            written[process].bytes += size * count
            digests = (f"{number:032x}",) * count
            boxes.setdefault(process, []).append(
                Box((start[0] + first, *start[1:]), held, digests, places)
            )
            total += count
    for process in {0, *boxes}:
        leaf = Leaf(
            texts,
            "d" * len(texts),
            "jax.Array",
            dtype=dtype,
            shape=shape,
            chunk=chunk,
            boxes=tuple(boxes.get(process, ())),
            writers=() if process else _ranges(sorted(writers)),
        )
        written[process].leaves.append(leaf)
    return total


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts what this process asks of the file system, by kind."""
    calls: Counter[str] = Counter()
    is_on = [True]

    def hook(event: str, _: Any) -> None:
        if is_on[0] and event.startswith(("open", "os.")):
            calls[event] += 1

    sys.addaudithook(hook)
    yield calls
    is_on[0] = False


def widest(path: Path) -> int:
    """How many entries the directory has that has the most."""
    return max(len(names) + len(files) for _, names, files in os.walk(path))


def agreement(processes: int) -> dict[str, Any]:
    """What the first process asks of the coordination service until all have posted."""
    address = f"127.0.0.1:{free_port()}"
    with serving(address, 1):
        client = _jax.get_distributed_runtime_client(address, 0, init_timeout=30)
        client.connect()
        service = Service(client)
        said = json.dumps({"returned": []})
        began = time.perf_counter()
        for process in range(processes):
            service.set(f"root/ready/{process}", said, secs=10)
        posted = time.perf_counter() - began
        began = time.perf_counter()
        posts = service.below("root/ready", secs=60)
        looked = time.perf_counter() - began
        client.shutdown()
    assert len(posts) == processes
    return {
        "posts": processes,
        "secs_to_post_one_after_another": round(posted, 3),
        "secs_of_one_look_at_all": round(looked, 4),
        "calls_of_each_process": "1 post, 1 wait for the verdict each 2 s",
    }


if __name__ == "__main__":
    main()
