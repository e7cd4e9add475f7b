"""Damages checkpoints and sessions at random: the right data is read, or an error names the bad.

    python tests/long_runs damage --trials 20000 --seed 0

In a trial one file of a finalized checkpoint, or of a session, is damaged: a bit is flipped, a
range is zeroed, the file is cut, emptied, extended, removed, replaced by a directory, by a pipe, by
another file of the same checkpoint or by the same file of another one, or two files change places.
Then a process apart asks every question. It holds that:

- `load` returns just what was saved, or raises `CorruptCheckpointError` that names a leaf or file;
- where it does not return what was saved, `verify` says so, and what it calls good is good;
- a session is finalized into what was saved, or refused; where the table of a part is gone the part
  was never saved, and what was saved before it is what counts;
- no call hangs, ends its process, or takes more memory than a few times the checkpoint.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trees
import trials
from isolated import Isolated

import flax_partial as fp

QUICK = fp.SaveOptions(durable=False, chunk_bytes=100_000)
MOST_BYTES = 64 << 20
_ZSTD = fp.SaveOptions(durable=False, compression="zstd", chunk_bytes=50_000)
# Nothing reads them, or nothing can tell: a part's index is not read once the root refers to its
# data, a marker is empty, and a spare byte of a database has no meaning.
_IDLE = ("commit_success.txt", "orbax.checkpoint")


def parts_of(seed: int) -> list[tuple[Any, dict[str, Any]]]:
    """The saves of a checkpoint: each a state, and how to save it."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, 99, (4, 300))
    return [
        ({"tiny": np.arange(10) + seed, "text": f"first {seed}"}, {"custom_metadata": {"s": seed}}),
        ({"large": random.random(60_000), "list": [1, 2.5, None, {}]}, {}),
        ({"packed": np.zeros((200, 300)) + seed, "old": np.arange(900)}, {"options": _ZSTD}),
        ({"rows": fp.Slice(rows[2:], 2, 4)}, {}),
        ({"text": f"second {seed}", "old": np.arange(900) + seed}, {"replace": True}),
        ({"rows": fp.Slice(rows[:2], 0, 4), "middle": random.random(9_000)}, {}),
    ]


def save_all(path: Path, seed: int) -> list[str]:
    """Saves a checkpoint; returns the names of its parts."""
    return [fp.save(path, state, **{"options": QUICK, **how}).part for state, how in parts_of(seed)]


def expected(seed: int, *, without: int | None = None) -> Any:
    """What a checkpoint holds; None where it is not complete without one of its parts."""
    tree: dict[str, Any] = {}
    rows: dict[int, np.ndarray] = {}
    for number, (state, _) in enumerate(parts_of(seed)):
        if number == without:
            continue
        piece = state.get("rows")
        if piece is not None:
            rows[piece.start] = piece.value
        tree |= state
    if len(rows) == 1:
        return None
    return tree | {"rows": np.concatenate([rows[start] for start in sorted(rows)])}


# --- damage ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """What is done to a copy of the original: `how`, to the file `name`, `at` a position."""

    how: str
    name: str
    at: int
    other: str = ""


def rewrite(change: Callable[[bytes, int], bytes]) -> Callable[[Path, int], object]:
    """Damage that makes other bytes of a file's."""
    return lambda path, at: path.write_bytes(change(path.read_bytes(), at))


def replace_by(make: Callable[[Path], object]) -> Callable[[Path, int], object]:
    """Damage that leaves something else in a file's place."""
    return lambda path, _: (path.unlink(), make(path))


WAYS: dict[str, Callable[[Path, int], object]] = {
    "flip": rewrite(lambda data, at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]),
    "zero": rewrite(
        lambda data, at: data[:at] + bytes(min(512, len(data) - at)) + data[at + 512 :]
    ),
    "cut": rewrite(lambda data, at: data[:at]),
    "empty": rewrite(lambda _data, _at: b""),
    "extend": rewrite(lambda data, at: data + random.Random(at).randbytes(at % 5000 + 1)),  # noqa: S311
    "remove": lambda path, _: path.unlink(),
    "directory": replace_by(Path.mkdir),
    "pipe": replace_by(os.mkfifo),
}
TABLES = (".json", "_METADATA", "_sharding", "process_0")  # what is read here, not by tensorstore
PAIRS = ("swap", "copy", "foreign")


def draw(root: Path, seed: int) -> Damage:
    """Draws one damage of the files below a directory."""
    choose = random.Random(seed)  # noqa: S311 - of trials, not of secrets
    names = files_of(root)
    name, other = choose.choice(names), choose.choice(names)
    size = (root / name).stat().st_size
    ways = [*WAYS, "flip", "flip", "flip", "zero", "cut", *PAIRS]
    if not name.endswith(TABLES):
        ways.remove("pipe")
    how = choose.choice([way for way in ways if size or way not in ("flip", "zero", "cut")])
    return Damage(how, name, choose.randrange(size) if size else 0, other)


def files_of(root: Path) -> list[str]:
    return sorted(
        str(file.relative_to(root))
        for file in root.rglob("*")
        if file.is_file() and file.name not in _IDLE
    )


def apply(damage: Damage, root: Path, foreign: Path) -> None:
    """Damages the files below `root`; `foreign` is another checkpoint of the same structure."""
    path, other = root / damage.name, root / damage.other
    if damage.how in WAYS:
        WAYS[damage.how](path, damage.at)
        return
    if damage.how == "foreign":
        counterpart = sorted(map(_kind, files_of(root))).index(_kind(damage.name))
        other = foreign / sorted(files_of(foreign), key=_kind)[counterpart]
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    if damage.how == "swap":
        other.write_bytes(data)


def _kind(name: str) -> tuple[Any, ...]:
    """Orders the files of two checkpoints alike: names hold times and random digits."""
    parts = Path(name).parts
    return tuple("d" if part == "d" or len(part) == 32 else part.split(".")[0] for part in parts)


# --- in the process apart -------------------------------------------------------------------------


def examine(path: Path, wanted: Any, metadata: Any) -> list[str]:
    """Asks every question of a finalized checkpoint; returns what is wrong with the answers."""
    faults = []
    report = fp.verify(path)
    loaded = _loaded(path, wanted, faults)
    if not loaded and report.ok:
        faults.append("verify found nothing")
    if not all(report.bad.values()):
        faults.append("verify does not say what is wrong")
    for name in wanted:
        _loaded(path, {name: wanted[name]}, faults, partial=True)
    try:
        if fp.metadata(path).custom_metadata != metadata:
            faults.append("other metadata")
    except fp.CorruptCheckpointError:
        pass
    return faults


def _loaded(path: Path, wanted: Any, faults: list[str], *, partial: bool = False) -> bool:
    try:
        found = fp.load(path, wanted, partial=True) if partial else fp.load(path)
    except fp.CorruptCheckpointError as error:
        if not any(name in str(error) for name in (*wanted, "state", path.name)):
            faults.append(f"the error names nothing: {error}")
        return False
    try:
        trees.assert_same(found, wanted)
    except AssertionError as error:
        faults.append(f"other data ({[*wanted]}): {error}")
    return True


def finalize_and_examine(path: Path, wanted: Any, metadata: Any) -> list[str]:
    """Finalizes a session, and examines what comes of it."""
    try:
        fp.status(path)
        fp.finalize(path)
    except fp.CorruptCheckpointError:
        return ["finalized all the same"] if path.exists() else []
    except fp.IncompleteCheckpointError as error:
        return [] if wanted is None else [f"incomplete: {error}"]
    if wanted is None:
        return ["it was not complete"]
    return examine(path, wanted, metadata)


# --- trials ---------------------------------------------------------------------------------------


class Trials:
    """Two originals of each kind, and a process that looks at damaged copies."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._apart = Isolated()
        for name, seed in (("own", 1), ("foreign", 2)):
            parts = save_all(directory / f"{name}", seed)
            shutil.copytree(directory / f"{name}.partial_save", directory / f"{name}.session")
            fp.finalize(directory / name)
            if name == "own":
                self._parts = parts

    def run(self, seed: int) -> tuple[Damage, list[str]]:
        """Does one trial; returns what was damaged, and what is wrong with the answers."""
        is_session = seed % 2 == 1
        suffix = ".session" if is_session else ""
        own = self._directory / f"own{suffix}"
        damage = draw(own, seed)
        return damage, self.examine(damage, is_session=is_session)

    def examine(self, damage: Damage, *, is_session: bool) -> list[str]:
        """Damages a copy, and returns what is wrong with the answers about it."""
        suffix = ".session" if is_session else ""
        path = self._directory / "copy" / "c"
        target = path.with_name("c.partial_save") if is_session else path
        shutil.rmtree(path.parent, ignore_errors=True)
        shutil.copytree(self._directory / f"own{suffix}", target)
        apply(damage, target, self._directory / f"foreign{suffix}")
        question = finalize_and_examine if is_session else examine
        without = self._never_saved(target) if is_session else None
        metadata = {} if without == 0 else {"s": 1}
        arguments = (path, expected(1, without=without), metadata)
        return self._apart.faults(MOST_BYTES, question, *arguments)

    def _never_saved(self, target: Path) -> int | None:
        """Which part has no table any more."""
        tables = [target / "state" / name / "part.json" for name in self._parts]
        return next((i for i, table in enumerate(tables) if not table.exists()), None)

    def close(self) -> None:
        self._apart.end()


def start(directory: Path) -> Callable[[int], tuple[str, list[str]]]:
    """Returns what runs the trial of a seed."""
    own = Trials(directory)

    def trial(seed: int) -> tuple[str, list[str]]:
        damage, faults = own.run(seed)
        return f"{damage.how} {damage}", faults

    return trial


if __name__ == "__main__":
    sys.exit(trials.run(__doc__, start, trials=20_000))
