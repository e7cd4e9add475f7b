"""Changes tables of contents at random, with the right digest: read, or refused by name.

    python tests/long_runs fuzz --trials 20000 --seed 0

In a trial some values of a `part.json`, a `contents.json` or a `_METADATA` of Orbax are replaced by
others, by each other, by ones of another type, or are doubled or left out. Then every question is
asked in a process apart: each must be answered, or refused with an error of the package, in time
and without much memory.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forged
import numpy as np
import trials
from isolated import Isolated

import flax_partial as fp

QUICK = fp.SaveOptions(durable=False, chunk_bytes=2_000)
MOST_BYTES = 300 << 20  # what a table may claim before files are asked for their sizes, and some
FILES = ("part.json", "contents.json", "_METADATA")
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**62, 2**63, 10**15, 10**30, 1.5, 1e308, -0.0),
    *("", "a", "0", "1", "-1", "x" * 1000, "..", "/", "\0", "\ud800", "\u00e9", "np.ndarray"),
    *("scalar", "jax.Array", "string", "prng_key", "dict", "list", "None", "bfloat16", "int4"),
    *("float64", "zstd", "blosc", "bytes"),
    *([], [[]], [0], [1, 1], [10**9], [0] * 40, {}, {"a": 1}, [[[0], [3], [""]]], ["a", "b"]),
)


def state() -> dict[str, Any]:
    """One leaf of each kind."""
    return {
        "a": np.arange(3),
        "b": [np.arange(900.0), 2.5, None, {}, (), "text"],
        "c": {"x": np.float32(1), "y": np.zeros((4, 0)), "z": fp.Slice(np.arange(6), 0, 6)},
    }


def changed(table: Any, choose: random.Random) -> Any:
    """A copy of a JSON value in which one to three things are different."""
    table = copy.deepcopy(table)
    for _ in range(choose.choice((1, 1, 2, 3))):
        places = list(_places(table))
        node, key = choose.choice(places)
        other, other_key = choose.choice(places)
        match choose.randrange(5):
            case 0:
                node[key] = copy.deepcopy(choose.choice(_VALUES))
            case 1:
                node[key] = copy.deepcopy(other[other_key])
            case 2:
                del node[key]
            case 3 if isinstance(node, list):
                node.append(copy.deepcopy(node[key]))
            case _ if isinstance(node[key], int):
                node[key] += choose.choice((1, -1, 2**20, -(2**20)))
    return table


def _places(table: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value: a list or object, and an index or key."""
    places, stack = [], [table]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        stack += [node[key] for key in keys if isinstance(node[key], (dict, list))]
    return places


def ask(path: Path) -> list[str]:
    """Asks every question; returns the answers that are none."""
    faults = []
    calls: dict[str, Callable[[], Any]] = {
        "status": lambda: fp.status(path),
        "save": lambda: fp.save(path, {"q": {"q": 1}}, options=QUICK),
        "finalize": lambda: fp.finalize(path, expect=["a", "b.0"]),
        "finalize again": lambda: fp.finalize(path),
        "load": lambda: fp.load(path),
        "load a target": lambda: fp.load(path, {"a": np.arange(3)}, partial=True),
        "metadata": lambda: fp.metadata(path),
        "verify": lambda: fp.verify(path),
        "abort": lambda: fp.abort(path),
    }
    for name, call in calls.items():
        try:
            call()
        except fp.PartialCheckpointError:
            continue
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            faults.append(f"{name}: {type(error).__name__}: {error}")
    return faults


def start(directory: Path) -> Callable[[int], tuple[str, list[str]]]:
    """Returns what runs the trial of a seed."""
    apart = Isolated()
    for name in ("session", "done"):
        fp.save(directory / name, state(), options=QUICK)
    fp.finalize(directory / "done")
    shutil.copytree(directory / "done", directory / "orbax")
    for ours in ("contents.json", "part.*"):  # then it is read as one of Orbax's
        for file in (directory / "orbax" / "state").glob(ours):
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    def trial(seed: int) -> tuple[str, list[str]]:
        choose = random.Random(seed)  # noqa: S311 - of trials, not of secrets
        kind = FILES[seed % len(FILES)]
        path = directory / "copy" / "c"
        shutil.rmtree(path.parent, ignore_errors=True)
        origin, target = {
            "part.json": ("session.partial_save", path.with_name("c.partial_save")),
            "contents.json": ("done", path),
            "_METADATA": ("orbax", path),
        }[kind]
        shutil.copytree(directory / origin, target)
        (file,) = target.glob({"part.json": "state/part.*/part.json"}.get(kind, f"state/{kind}"))
        table = json.loads(file.read_bytes())
        if kind == "_METADATA":
            file.write_text(json.dumps(changed(table, choose)))
        else:
            file.write_bytes(forged.envelope(json.dumps(changed(table["table"], choose)).encode()))
        return kind, apart.faults(MOST_BYTES, ask, path)

    return trial


if __name__ == "__main__":
    sys.exit(trials.run(__doc__, start, trials=20_000))
