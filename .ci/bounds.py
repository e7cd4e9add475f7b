"""Prints a constraint for each lower bound that `pyproject.toml` states: exactly that version.

Of what the package needs, and of what the extra `test` adds; the extras of others' loops were tried
with what was new when they were written, and are not held to it.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def constraints(requirements: list[str]) -> list[str]:
    """Each `name>=version` as `name==version`; extras of the package itself as what they hold."""
    exact: list[str] = []
    for requirement in requirements:
        if own := re.fullmatch(r"flax-partial\[([\w,]+)\]", requirement):
            for extra in own[1].split(","):
                exact += constraints(PROJECT["optional-dependencies"][extra])
            continue
        bound = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement)
        if bound is None:
            message = f"{requirement!r} states no lower bound"
            raise ValueError(message)
        exact.append(f"{bound[1]}=={bound[2]}")
    return exact


if __name__ == "__main__":
    lines = constraints([*PROJECT["dependencies"], "flax-partial[test]"])
    print(*sorted(lines), sep="\n")  # noqa: T201 - this is what it is for
