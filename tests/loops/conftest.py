"""Which loops are tested: those whose packages are there, or those that LOOPS says.

With `LOOPS=keras:clu` in the environment the tests of other loops are not collected, and one of
these that is skipped is an error: that is how `.ci/run` knows that it has tested them all.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import pytest

os.environ["KERAS_BACKEND"] = "jax"  # before TensorFlow, which CLU imports, imports Keras

with warnings.catch_warnings(action="ignore"):
    import flax.nnx  # noqa: F401 - 0.12.0, which blaxbird needs, warns of what it does itself

if TYPE_CHECKING:
    from collections.abc import Iterator

CHOSEN = [name for name in os.environ.get("LOOPS", "").split(":") if name]
if CHOSEN:
    collect_ignore_glob = [
        path.name
        for path in Path(__file__).parent.glob("test_*_loop.py")
        if path.name.removeprefix("test_").removesuffix("_loop.py") not in CHOSEN
    ]


@pytest.fixture(autouse=True)
def _as_others_need_it() -> Iterator[None]:
    """Optax and Keras mix dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the pages of loops that were not chosen."""
    if not CHOSEN:
        return
    left_out = [
        item
        for item in items
        if (document := getattr(item, "callspec", None))
        and "document" in document.params
        and document.params["document"].stem.removeprefix("from_") not in CHOSEN
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what is skipped though it was asked for."""
    for report in terminalreporter.stats.get("skipped", []) if CHOSEN else []:
        terminalreporter.write_line(f"asked for, but skipped: {report.nodeid}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fails a run in which something is skipped though it was asked for."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if CHOSEN and exitstatus == 0 and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
