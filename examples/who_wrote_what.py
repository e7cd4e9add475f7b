"""Draws when each process of a run committed its parts of a checkpoint: one row a process.

python examples/who_wrote_what.py runs/multiprocess_pipeline/192
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

WIDTH = 60


def main() -> None:
    """Prints the picture of one finalized checkpoint of several processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path)
    state = parser.parse_args().checkpoint / "state"
    parts = [
        (table.stat().st_mtime_ns, json.loads(table.read_text())["table"])
        for table in state.rglob("part.json")
    ]
    contents = json.loads((state / "contents.json").read_text())["table"]
    begun, ended = contents["started_ns"], (state / "contents.json").stat().st_mtime_ns
    print(f"{'':12}0 ms{(ended - begun) / 1e6:>{WIDTH - 7}.0f} ms")
    letters = iter("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" * 100)
    legend = []
    for process in sorted({table["process"] for _, table in parts}):
        row = ["."] * WIDTH
        for committed, table in sorted(
            ((time, table) for time, table in parts if table["process"] == process),
            key=lambda part: part[0],
        ):
            letter = next(letters)
            row[min(int((committed - begun) * WIDTH / (ended - begun)), WIDTH - 1)] = letter
            legend.append(f"  {letter}  process {process}: {_named(table['leaves'])}")
        print(f"process {process:<4}{''.join(row)}|")
    print(f"{'':12}{'':{WIDTH}}^ finalized")
    print("\n".join(legend))


def _named(leaves: list[dict[str, Any]]) -> str:
    """The keys that all paths of a part's leaves have in common, else the first path."""
    paths = [leaf["path"] for leaf in leaves]
    common = [keys[0] for keys in zip(*paths, strict=False) if len(set(keys)) == 1]
    return ".".join(common or paths[0]) if paths else "metadata only"


if __name__ == "__main__":
    main()
