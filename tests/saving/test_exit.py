"""How processes end with saves in flight, how they share a session, and what a fork inherits."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import trees
from engine_worker import Worker
from scripts import GATED, run, run_well
from things import stored, unchanged

import flax_partial as fp

# What is said at the end opens the gate: the process surely ends before its saves do.
LATE = """
    import logging
    logging.getLogger("flax_partial").addFilter(lambda _: gate.set() is None)
"""
ENDINGS = {
    "end of the script": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "exception": ("raise RuntimeError('a bug of the user')", 1),
    "finalize in the background": ("fp.finalize_async(path)", 0),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_process_that_ends_finishes_its_saves_and_says_so(tmp_path: Path, case: str) -> None:
    ending, code = ENDINGS[case]
    save = "for i in range(4): fp.save_async(path, {str(i): np.full(1000, i)})"
    done = run(tmp_path / "c", GATED, LATE, save, ending)
    assert done.returncode == code, done.stderr
    assert "flax_partial: finishing 4 saves" in done.stderr
    if "finalize" not in case:
        fp.finalize(tmp_path / "c")
    trees.assert_whole(tmp_path / "c", {f"{i}": np.full(1000, i) for i in range(4)})


def test_process_with_nothing_in_flight_ends_without_a_word(tmp_path: Path) -> None:
    script = 'fp.save_async(path, {"a": np.arange(3)}).result(); fp.finalize(path)'
    assert run_well(tmp_path / "c", script) == ""


def test_save_that_fails_at_exit_is_told(tmp_path: Path) -> None:
    """No call can raise it any more; it has to be logged."""
    script = """
        def commit(*arguments, **options):
            raise OSError(28, "No space left on device")

        fp.save_async(path, {"lost": 2})
    """
    done = run(tmp_path / "c", 'fp.save(path, {"kept": 1})', GATED, LATE, script)
    assert "No space left on device" in done.stderr
    assert str(tmp_path / "c") in done.stderr
    assert fp.status(tmp_path / "c").leaves == ("kept",)


def test_finalizes_at_once_in_processes_one_commits(tmp_path: Path) -> None:
    def finalize(worker: Worker) -> str:
        barrier.wait()
        try:
            worker.call("finalize", str(path))
        except fp.PartialCheckpointError as error:
            return type(error).__name__
        return "done"

    workers = [Worker() for _ in range(3)]
    barrier = threading.Barrier(3)
    for attempt in range(8):
        path = tmp_path / f"c{attempt}"
        state = {f"own{number}": np.arange(20_000) for number in range(3)}
        for worker, (name, value) in zip(workers, state.items(), strict=True):
            worker.call("save", str(path), {name: value})
        with ThreadPoolExecutor(3) as pool:
            outcomes = sorted(pool.map(finalize, workers))
        assert outcomes == ["CheckpointExistsError", "CheckpointExistsError", "done"]
        trees.assert_whole(path, state)
    for worker in workers:
        worker.end()
    assert len(list(tmp_path.iterdir())) == 8  # and no session is left


def test_process_that_dies_with_the_lock_holds_up_nobody(tmp_path: Path) -> None:
    worker = Worker()
    state = {"a": np.arange(1_000_000)}
    worker.call("save", str(tmp_path / "c"), state)
    worker.call("save_async", str(tmp_path / "c"), {"b": np.arange(1_000_000)})
    worker.kill()
    fp.finalize(tmp_path / "c")
    trees.assert_same(fp.load(tmp_path / "c", state, partial=True), state)


# --- forks ----------------------------------------------------------------------------------------

CHILDREN = {"ends": "sys.exit(0)", "lives on": "signal.pause()"}


@pytest.mark.parametrize("how", CHILDREN)
def test_forked_child_takes_nothing_from_its_parent(tmp_path: Path, how: str) -> None:
    """As data loaders fork: the child ends, and the parent's saves and locks are the parent's."""
    script = """
        warnings.simplefilter("ignore")
        gate.set()
        fp.save(path, {"before": np.arange(5)})
        gate.clear()
        handle = fp.save_async(path, {"in flight": np.arange(5)})
        has_looked, looked = os.pipe()
        child = os.fork()
        if child == 0:
            assert fp.status(path).leaves == ("before",)
            print("child", flush=True)
            os.write(looked, b".")
            CHILD
        os.read(has_looked, 1)
        if "exit" in "CHILD":
            assert os.waitpid(child, 0)[1] == 0
        gate.set()
        handle.result()
        fp.save(path, {"after": np.arange(5)})
        fp.finalize(path)
        print(sorted(fp.load(path)))
        if "exit" not in "CHILD":
            os.kill(child, 9)
            os.waitpid(child, 0)
    """
    done = run(tmp_path / "c", GATED, script.replace("CHILD", CHILDREN[how]))
    assert done.stdout == "child\n['after', 'before', 'in flight']\n", done.stderr
    assert done.returncode == 0
    assert "saves" not in done.stderr  # the child has none to finish


FORKED = """
    warnings.simplefilter("ignore")
    {parent}
    child = os.fork()
    if child == 0:
        {child}
        os._exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
REFUSED = """
        for call, arguments in (
            (fp.save, (path, {"child": "text"})),
            (fp.save_async, (path, {"child": "text"})),
            (fp.finalize, (path,)),
            (fp.finalize_async, (path,)),
            (fp.abort, (path,)),
            (fp.remove, (path + "/done",)),
        ):
            try:
                call(*arguments)
            except fp.ForkedProcessError as error:
                assert call.__name__.removesuffix("_async") in str(error)
                assert "spawn" in str(error)
            else:
                os._exit(1)
        assert (fp.load(path + "/done")["a"] == np.arange(20_000)).all()
"""
PARENTS = {
    "saved": "fp.save(path + '/s', {'parent': 'text'})",
    "used JAX": "import jax; jax.numpy.zeros(3)",
    "in the middle of saving": (
        "handles = [fp.save_async(path + '/s', {str(i): np.arange(20_000)}) for i in range(20)]"
    ),
}


def run_forked(path: Path, parent: str, child: str) -> None:
    done = run(path, FORKED.replace("{parent}", parent).replace("{child}", child))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("parent", PARENTS.values(), ids=PARENTS)
def test_child_forked_from_a_user_gets_one_clear_error_for_what_writes(
    tmp_path: Path, parent: str
) -> None:
    stored(tmp_path / "c" / "done", {"a": np.arange(20_000)})
    with unchanged(tmp_path / "c" / "done"):
        run_forked(tmp_path / "c", parent, REFUSED)


def test_child_forked_from_a_process_that_only_imported_the_package_saves(tmp_path: Path) -> None:
    run_forked(tmp_path / "c", "", "fp.save(path, {'a': np.arange(5)}); fp.finalize(path)")
    trees.assert_whole(tmp_path / "c", {"a": np.arange(5)})


# --- the end of the interpreter -------------------------------------------------------------------

ENDS = {
    "atexit": """
        import atexit
        atexit.register(lambda: fp.save_async(path, {"late": np.arange(5)}))
        atexit.register(lambda: fp.save(path, {"later": np.arange(5)}))
    """,
    "a thread that outlives main": """
        def outlive():
            threading.main_thread().join()
            handle = fp.save_async(path, {"late": np.arange(5)})
            fp.save(path, {"later": np.arange(5)})
            handle.result()

        threading.Thread(target=outlive).start()
    """,
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_saves_while_the_interpreter_ends_still_finish(tmp_path: Path, end: str) -> None:
    run_well(tmp_path / "c", 'fp.save(path, {"first": np.arange(5)})', end)
    fp.finalize(tmp_path / "c")
    assert set(fp.load(tmp_path / "c")) == {"first", "late", "later"}


def test_large_checkpoint_is_loaded_while_the_interpreter_ends(tmp_path: Path) -> None:
    """Which starts no thread any more, such as those that read."""
    stored(tmp_path / "c", {"a": np.ones(3 << 20)})
    script = """
        import atexit
        load = fp.load
        atexit.register(lambda: print(load(path)["a"].sum()))
    """
    assert run_well(tmp_path / "c", script) == f"{3 << 20:.1f}\n"


def test_spawned_child_reads_and_saves_beside_its_parent(tmp_path: Path) -> None:
    """As data loaders should be started: nothing of the parent's use is in the way."""
    script = """
        import multiprocessing, sys
        import numpy as np
        import flax_partial as fp

        def child(path):
            assert (fp.load(path + "/one")["a"] == np.arange(5)).all()
            fp.save(path + "/two", {"child": np.arange(5)})

        if __name__ == "__main__":
            path = sys.argv[1]
            fp.save(path + "/one", {"a": np.arange(5)})
            fp.finalize(path + "/one")
            fp.load(path + "/one")
            handle = fp.save_async(path + "/two", {"parent": np.arange(5)})
            process = multiprocessing.get_context("spawn").Process(target=child, args=(path,))
            process.start()
            process.join()
            assert process.exitcode == 0
            handle.result()
            fp.finalize(path + "/two", expect=["parent", "child"])
    """
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(script))
    subprocess.run([sys.executable, "-W", "error", file, tmp_path], check=True, timeout=500)
    assert set(fp.load(tmp_path / "two")) == {"parent", "child"}
