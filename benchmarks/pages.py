"""Puts the figures of finished runs into README and docs.

Every figure of the pages stands in a block that begins with `<!-- figures: NAME -->`. It is made
here from the files that `python -m benchmarks` and `python -m benchmarks.gpu` write, so that none
is copied by hand, and says of which version and commit it is. Files of several runs may be given:
every ratio is of one run. Of a scenario that is in several files, the last counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import plots, report

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from benchmarks.report import Result

    Results = Mapping[str, Result]

ROOT = Path(__file__).resolve().parents[1]
PLOT = ROOT / "docs" / "performance.png"
_OURS, _PARTIAL, _WHOLE = "flax_partial", "Orbax v1.partial", "Orbax v1, one whole save"
_ASYNC, _NONE = "Orbax v1, async", "no checkpoints"
_PLAIN, _SAFETENSORS = "plain write + fsync", "safetensors + fsync"
_OF_OURS, _OF_ITS_OWN, _LARGE = "Orbax v1 of ours", "Orbax v1 of its own", ", large arrays"


class NotMeasuredError(Exception):
    """A block needs a scenario that no file has; the argument is its name."""


def main() -> None:
    """Prints the blocks that can be made of the files; with --write, puts them into the pages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--write", action="store_true", help="change README and docs")
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in arguments.files]
    if not arguments.write:
        for name, _, text in _blocks(runs):
            print(f"{name}:\n\n{text}\n")
    elif any(result["is_small"] for run in runs for result in run["scenarios"]):
        parser.error("small work shows that all runs; its figures belong on no page")
    else:
        for path in write(runs):
            print(f"written: {path.relative_to(ROOT)}")


def write(runs: Sequence[dict[str, Any]], root: Path = ROOT) -> list[Path]:
    """Puts the figures of runs into the pages, and draws the plots.

    Args:
      runs: What `report.write_json` wrote, one for each run.
      root: The checkout.

    Returns:
      The files that were written.
    """
    changed = []
    for name, page, text in _blocks(runs):
        path = root / page
        path.write_text(replaced(path.read_text(), name, text))
        changed.append(path)
    results = _merged(run for run in runs if not _is_of_accelerator(run))
    if results:
        changed += plots.draw(list(results.values()), root / PLOT.relative_to(ROOT))
    return list(dict.fromkeys(changed))


def replaced(document: str, name: str, text: str) -> str:
    """Returns a document with another text in one of its blocks.

    Raises:
      ValueError: The document does not have this block, once.
    """
    block = rf"(<!-- figures: {re.escape(name)} -->\n).*?(\n<!-- end of figures -->)"
    changed, count = re.subn(
        block, lambda found: f"{found[1]}\n{text}\n{found[2]}", document, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{count} blocks are called {name!r}, not 1")
    return changed


def _blocks(runs: Sequence[dict[str, Any]]) -> Iterable[tuple[str, str, str]]:
    """Yields each block that can be made: its name, its page, its text."""
    on_accelerators = [run for run in runs if _is_of_accelerator(run)]
    others = [run for run in runs if not _is_of_accelerator(run)]
    for name, page, made_of, render in (
        ("targets", "docs/performance.md", others, _targets),
        ("reuse", "docs/performance.md", others, partial(_contenders, "reuse")),
        ("compression", "docs/performance.md", others, partial(_contenders, "compression")),
        ("accelerators", "docs/performance.md", on_accelerators, _targets),
        ("first page", "docs/index.md", others, _first_page),
        ("beside Orbax", "README.md", others, _beside_orbax),
    ):
        if not made_of:
            continue
        results = _merged(made_of)
        try:
            yield name, page, render(results)
        except NotMeasuredError as error:
            print(f"{page}: {name!r} needs {error}, which was not measured", file=sys.stderr)


def _is_of_accelerator(run: Mapping[str, Any]) -> bool:
    return "device" in run["machine"]


def _merged(runs: Iterable[Mapping[str, Any]]) -> dict[str, Result]:
    """Returns the results of several runs by scenario, each with the machine it ran on."""
    return {
        result["name"]: result | {"machine": run["machine"]}
        for run in runs
        for result in run["scenarios"]
    }


def _targets(results: Results) -> str:
    """A row for each ratio: what was measured, the target, the verdict."""
    rows = [
        [f"`{name}`", *report.judged(target)]
        for name, result in results.items()
        for target in result["targets"]
    ]
    header = ["scenario", "ratio of medians", "measured", "target", ""]
    return f"{_provenance(results)}\n\n{_table([header, *rows])}"


def _contenders(scenario: str, results: Results) -> str:
    """A row for each contender of a scenario, a column for each metric: the medians."""
    if scenario not in results:
        raise NotMeasuredError(scenario)
    return f"{_provenance(results, scenario)}\n\n{_table(report.medians(results[scenario]))}"


def _first_page(results: Results) -> str:
    """The three numbers, and of which version they are."""
    held, saved, loaded = (
        _ratio(results, "train_loop", "blocked", _ASYNC, _OURS),
        _ratio(results, "stream", "total", _PARTIAL, _OURS),
        _ratio(results, "load", "total", f"{_OF_ITS_OWN}{_LARGE}", f"{_OURS}{_LARGE}"),
    )
    numbers = (
        (
            held,
            "less time for which a checkpoint of 1.17 GB holds training than by Orbax's async save",
        ),
        (saved, "as fast as Orbax's `v1.partial` in saving 1 GiB in 32 pieces and finalizing it"),
        (loaded, "as fast as Orbax in loading 1 GiB, each its own checkpoint"),
    )
    cards = "\n\n".join(f"**{number:.2g} &times;** {text}" for number, text in numbers)
    cards = f'<div class="numbers" markdown>\n\n{cards}\n\n</div>'
    return f"{cards}\n\n{_provenance(results, 'train_loop', 'stream', 'load')}"


def _beside_orbax(results: Results) -> str:
    """A row for each kind of work: how long it takes by Orbax, and by this package."""

    def of(scenario: str, contender: str, metric: str = "total") -> str:
        return report.cell(metric, _median(results, scenario, metric, contender))

    def both(scenario: str, contender: str) -> str:
        return " + ".join(of(scenario, contender, metric) for metric in ("save", "finalize"))

    memory = partial(of, "memory", metric="memory")
    rows = [
        ("", "Orbax", "flax_partial"),
        (
            "128 saves of 16 small arrays, then finalize",
            both("many_small", _PARTIAL),
            both("many_small", _OURS),
        ),
        ("32 saves of 32 MiB, then finalize", both("stream", _PARTIAL), both("stream", _OURS)),
        ("the same bytes in one whole save", of("stream", _WHOLE), ""),
        ("the same bytes by safetensors and fsync", of("stream", _SAFETENSORS), ""),
        ("the same bytes by a plain write and fsync", of("stream", _PLAIN), ""),
        (
            "loading 1 GiB from the page cache, each its own checkpoint",
            of("load", f"{_OF_ITS_OWN}{_LARGE}"),
            of("load", f"{_OURS}{_LARGE}"),
        ),
        ("the same, our checkpoint", of("load", f"{_OF_OURS}{_LARGE}"), ""),
        ("the same, a plain read", of("load", f"plain read{_LARGE}"), ""),
        (
            "training of 97.6 M parameters held by a checkpoint of 1.17 GB",
            f"{of('train_loop', _ASYNC, 'blocked')} (`save_async`)",
            of("train_loop", _OURS, "blocked"),
        ),
        (
            f"steps per second, a checkpoint in 10 (without: {of('train_loop', _NONE, 'steps/s')})",
            of("train_loop", _ASYNC, "steps/s"),
            of("train_loop", _OURS, "steps/s"),
        ),
        (
            "host memory for streaming 2 GiB layer by layer",
            f"{memory(_PARTIAL)}; {memory(_WHOLE)} as one whole save",
            memory(_OURS),
        ),
    ]
    used = ("many_small", "stream", "load", "train_loop", "memory")
    return f"{_provenance(results, *used)}\n\n{_table(rows)}"


def _median(results: Results, scenario: str, metric: str, contender: str) -> float:
    if scenario not in results:
        raise NotMeasuredError(scenario)
    return float(results[scenario]["contenders"][contender]["median"][metric])


def _ratio(results: Results, scenario: str, metric: str, peer: str, ours: str) -> float:
    of_peer, of_ours = (_median(results, scenario, metric, name) for name in (peer, ours))
    return of_peer / of_ours


def _provenance(results: Results, *names: str) -> str:
    """A sentence for each run that the scenarios are of: version, commit, day, machine, rounds."""
    said: dict[str, list[str]] = {}
    for name in names or results:
        said.setdefault(_run_in_words(results[name]), []).append(f"`{name}`")
    if len(said) == 1:
        return "".join(said)
    return "\n".join(f"{', '.join(scenarios)}: {words}" for words, scenarios in said.items())


def _run_in_words(result: Result) -> str:
    machine, packages = result["machine"], result["machine"]["packages"]
    rounds = max(len(contender["rounds"]) for contender in result["contenders"].values())
    where = [
        *([machine["device"]] if "device" in machine else []),
        f"{machine['cores']} cores",
        f"{machine['memory_bytes'] / (1 << 30):.0f} GiB",
        machine["file_system"],
        f"Python {machine['python']}",
        *(f"{name} {packages[name]}" for name in ("jax", "tensorstore", "orbax-checkpoint")),
    ]
    of = f"Version {packages['flax-partial']} (commit {machine['commit']}), {machine['day']}"
    return f"{of}; medians of {rounds} {'round' if rounds == 1 else 'rounds'}. {', '.join(where)}."


def _table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, f"|{'---|' * len(rows[0])}", *body])


if __name__ == "__main__":
    main()
