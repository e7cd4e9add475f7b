"""Where the time of ours goes: `python -m benchmarks.profile SCENARIO`.

Runs each contender of ours once, warm, under cProfile, and prints the functions in which most time
was spent, callees excluded. It sees the thread that calls, not those that write in the background.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import pstats
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import contenders as by
from benchmarks.__main__ import SCENARIOS
from benchmarks.harness import run_scenario

if TYPE_CHECKING:
    from benchmarks.harness import Contender, Metrics, Scenario


def main() -> None:
    """Profiles the contenders that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    add = parser.add_argument
    add("scenario", choices=SCENARIOS)
    add("--contender", default=by.OURS, help="those whose names begin so; default %(default)s")
    add("--lines", type=int, default=20, help="functions to print; default %(default)s")
    add("--directory", type=Path, default=Path(tempfile.gettempdir()), help="default %(default)s")
    arguments = parser.parse_args()
    scenario = importlib.import_module(f"benchmarks.{arguments.scenario}")
    profiles: dict[str, cProfile.Profile] = {}

    def build(*, small: bool) -> Scenario:
        whole: Scenario = scenario.build(small=small)
        chosen = [one for one in whole.contenders if one.name.startswith(arguments.contender)]
        if not small:  # the small work is there to warm up
            chosen = [_profiled(one, profiles) for one in chosen]
        return replace(whole, contenders=tuple(chosen), targets=())

    run_scenario(
        build,
        small=False,
        rounds=1,
        directory=arguments.directory,
        say=lambda text: print(text, file=sys.stderr),
    )
    for name, profile in profiles.items():
        print(f"\n{arguments.scenario}: {name}")
        pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(arguments.lines)


def _profiled(contender: Contender, profiles: dict[str, cProfile.Profile]) -> Contender:
    def run(path: Path) -> Metrics:
        profile = profiles.setdefault(contender.name, cProfile.Profile())
        return profile.runcall(contender.run, path)

    return replace(contender, run=run)


if __name__ == "__main__":
    main()
