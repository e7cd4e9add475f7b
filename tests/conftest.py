"""One strict JAX with eight CPU devices for all tests, none of which may leave a thread behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

# A shell's background job, and all that it starts, ignores SIGINT: no Ctrl-C could be tried in it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# JAX reads these once, when it is first imported. Processes that tests start inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# No test asks a cloud for anything: without keys a client asks the machine's own metadata server.
os.environ.update(
    AWS_ACCESS_KEY_ID="testkey",
    AWS_SECRET_ACCESS_KEY="testsecret",  # noqa: S106 - it opens nothing
    AWS_METADATA_ENDPOINT="http://127.0.0.1:9",
    AWS_EC2_METADATA_DISABLED="true",
    GCE_METADATA_HOST="127.0.0.1:9",
    NO_GCE_CHECK="true",
)

import jax
import pytest
from hypothesis import HealthCheck, settings
from isolated import Isolated

if TYPE_CHECKING:
    from collections.abc import Iterator

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline, nor a limit on slow data: how long a disk takes is no property of the code.
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# What other packages do differently from version to version: JAX's arrays, shardings, devices and
# coordination service, Flax's states, msgspec's structs, the dtypes and codecs of tensorstore,
# Orbax's files, rich's terminal. `pytest -m bounds` runs these.
_BOUNDS = frozenset(
    f"test_{name}"
    for name in (
        *("callback_flax", "plain_loop", "progress", "commands", "cli_terminal", "distributed"),
        *("chunks", "keypaths", "ocdbt", "orbax_format", "second_reader", "tables"),
        *(
            "load_target",
            "many_small",
            "orbax_is_read",
            "background",
            "sharded",
            "direct_io",
            "roundtrip",
        ),
    )
)
_GONE = _BOUNDS - {path.stem for path in Path(__file__).parent.rglob("test_*.py")}
assert not _GONE, f"no such modules, or under another name: {sorted(_GONE)}"

_PACKAGE = importlib.util.find_spec("flax_partial")
assert _PACKAGE is not None
assert _PACKAGE.origin is not None
_OUR_FOLDER = str(Path(_PACKAGE.origin).parent)
_GRACE_SECS = 10.0


def _ours(known: set[threading.Thread]) -> list[threading.Thread]:
    """The living threads not in `known` that carry our name or stand in our code."""
    frames = sys._current_frames()  # noqa: SLF001 - there is no public way to another thread's stack

    def in_our_code(thread: threading.Thread) -> bool:
        top = frames.get(thread.ident or 0)
        stack = traceback.walk_stack(top) if top else ()
        return any(frame.f_code.co_filename.startswith(_OUR_FOLDER) for frame, _ in stack)

    return [
        thread
        for thread in threading.enumerate()
        if thread not in known
        and thread is not threading.current_thread()
        and (thread.name.startswith("flax_partial") or in_our_code(thread))
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that are run with the oldest versions of other packages, too."""
    for item in items:
        if item.path.stem in _BOUNDS:
            item.add_marker(pytest.mark.bounds)


@pytest.fixture(scope="module")
def apart() -> Iterator[Isolated]:
    """A process of its own for calls that might hang, die or take memory."""
    process = Isolated()
    yield process
    process.end()


@pytest.fixture(scope="module")
def wide_types() -> Iterator[None]:
    """Lets JAX have 64 bits, so that every dtype takes part."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)  # noqa: FBT003 - JAX's own signature
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    """Fails a test after which a thread of the package lives on."""
    known = set(threading.enumerate())
    yield
    if workers := sys.modules.get("flax_partial.sessions.workers"):
        workers.release_idle()  # which would end by themselves after a second
    end = time.monotonic() + _GRACE_SECS
    while (left := _ours(known)) and time.monotonic() < end:
        time.sleep(0.002)
    assert not left, f"threads left behind: {[thread.name for thread in left]}"
