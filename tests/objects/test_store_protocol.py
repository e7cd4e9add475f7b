"""Processes that die, or sleep, where the rules of a session in a store are at their narrowest.

Each test stops a process at one request, has others do all they can meanwhile, and lets it go on.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
import store_races
from shell import Shell
from stores import Death, Killed, Request, another_process, memory, requests_through
from things import MOST_SECS

import flax_partial as fp
from flax_partial.loading import verify
from flax_partial.storage import control_objects, object_removal
from flax_partial.storage.store import PIECE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


DATA = np.arange(2000, dtype=np.float32)


@pytest.fixture(autouse=True)
def _here() -> None:
    another_process()


@pytest.fixture
def impatient() -> Iterator[None]:
    with store_races.taken_over_at_once():
        yield


def keys(url: str) -> list[str]:
    return [entry.key for entry in fp.StorePath(url).store.list()]


@contextlib.contextmanager
def stopped_at(
    method: str, ending: str, meanwhile: Callable[[], Any], *, once: Sequence[Any] = (True,)
) -> Iterator[list[str]]:
    """Does something before the first such request is made, by whatever thread, once `once` is."""
    met: list[str] = []

    def hook(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
        key = str(arguments[1]) if arguments[1:] else ""
        if name == method and key.endswith(ending) and once and not met:
            met.append(key)
            in_another_process(meanwhile)
        return request()

    with requests_through(hook):
        yield met
    assert met, f"there was no {method} of {ending}"


def in_another_process(call: Callable[[], Any]) -> None:
    """Calls something in another thread: this one's is in a request."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - it is raised below
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(MOST_SECS)
    assert not thread.is_alive()
    if raised:
        raise raised[0]


def die_at(method: str, part_of_key: str, call: Callable[[], Any]) -> None:
    """Calls something in a process that is killed before its first such request."""

    def hook(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
        if name == method and part_of_key in str(arguments[1:2]):
            raise Killed
        return request()

    with requests_through(hook), pytest.raises(Killed):
        call()
    another_process()


def put_late(url: str, session: str, ending: str) -> None:
    """Puts a control object of a session that was removed: its process slept before it did so."""
    fp.StorePath(url).store.put(f"state/session/{session}.{ending}", [b'{"kind": "void"}'])


def session_at(url: str) -> str:
    """Name of the only session that there is."""
    (begun,) = (key for key in keys(url) if key.endswith(".begun"))
    return begun.removeprefix("state/session/").removesuffix(".begun")


# Who ends a session dies, or sleeps, before it is decided.


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("end", [fp.finalize, fp.abort])
def test_saves_go_on_after_one_that_died_as_it_ended_the_session(end: Callable[[str], Any]) -> None:
    url = memory()
    fp.save(url, {"a": 1})
    for name in ("b", "c"):
        die_at("put_new", ".verdict", lambda: end(url))
        fp.save(url, {name: 2})
    fp.finalize(url)
    assert set(fp.load(url)) == {"a", "b", "c"}
    assert fp.verify(url).ok
    assert not [key for key in keys(url) if "closing" in key]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("end", "held"), [(fp.finalize, {"a", "late", "later"}), (fp.abort, None)])
def test_one_that_slept_before_its_verdict_begins_anew(
    end: Callable[[str], Any], held: set[str] | None
) -> None:
    url = memory()
    fp.save(url, {"a": DATA})
    with (
        stopped_at("put_new", ".verdict", lambda: fp.save(f"{url}?p=1", {"late": DATA})),
        stopped_at("put_new", ".verdict.1", lambda: fp.save(f"{url}?p=1", {"later": DATA})),
    ):
        end(url)
    if held is None:
        with pytest.raises(fp.NoSessionError):
            fp.load(url)
    else:
        assert set(fp.load(url)) == held
        assert fp.verify(url).ok


@pytest.mark.usefixtures("impatient")
def test_save_ends_one_round_of_a_finalize_and_then_no_other() -> None:
    """A process that decides later lists its part."""
    url = memory()
    fp.save(url, {"a": 1})
    fenced, ended, fenced_anew, saved = (threading.Event() for _ in range(4))
    ending = threading.Thread(target=lambda: fp.finalize(f"{url}?p=1"))

    def hook(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
        if name == "put_new" and arguments[1].endswith(".verdict") and b"void" in arguments[2]:
            try:
                return request()
            finally:
                ended.set()
                assert fenced_anew.wait(MOST_SECS)
        if name == "put_new" and arguments[1].endswith(".verdict"):
            fenced.set()
            assert ended.wait(MOST_SECS)
        if name == "put_new" and arguments[1].endswith(".verdict.1"):
            fenced_anew.set()
            assert saved.wait(MOST_SECS)
        return request()

    with requests_through(hook):
        ending.start()
        assert fenced.wait(MOST_SECS)
        fp.save(url, {"late": 1})
        saved.set()
        ending.join(MOST_SECS)
    assert set(fp.load(url)) == {"a", "late"}
    assert sorted(key.partition(".")[2] for key in keys(url) if ".verdict" in key) == [
        "verdict",
        "verdict.1",
    ]


def test_save_whose_patience_ends_as_it_is_decided_is_told_what_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control_objects, "_PATIENCE_SECS", 0.0)
    url = memory()
    fp.save(url, {"a": 1})
    fenced, go_on = threading.Event(), threading.Event()

    def hook(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
        if name == "put_new" and ".verdict" in arguments[1]:
            fenced.set()
            if b"void" in arguments[2]:
                go_on.set()
                ending.join(MOST_SECS)
            else:
                assert go_on.wait(MOST_SECS)
        return request()

    ending = threading.Thread(target=lambda: fp.finalize(f"{url}?p=1"))
    with requests_through(hook):
        ending.start()
        assert fenced.wait(MOST_SECS)
        with pytest.raises(fp.CheckpointExistsError, match="before this part was written"):
            fp.save(url, {"late": 1})
    assert set(fp.load(url)) == {"a"}


# Removals.


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_removal_that_was_killed_is_a_removal_or_none(*, after: bool, shell: Shell) -> None:
    for at in itertools.count(1):
        url = memory()
        fp.save(url, {"old": DATA})
        fp.finalize(url)
        death = Death(at, after=after)
        with requests_through(death), contextlib.suppress(Killed):
            fp.remove(url)
        another_process()
        if not fp.StorePath(f"{url}/commit_success.txt").is_file():
            for gone in (fp.load, fp.status, fp.abort, fp.finalize, fp.metadata, fp.verify):
                with pytest.raises(fp.NoSessionError):
                    gone(url)
            run = fp.StorePath(url).parent
            assert fp.steps(run) == []
            assert fp.latest(run) is None
            if run.is_dir():
                assert shell.json("ls", run)["checkpoints"] == []
            if at % 2:
                with pytest.raises(fp.NoSessionError):
                    fp.remove(url)
                assert keys(url) == []
        else:
            assert (fp.load(url)["old"] == DATA).all()
            assert fp.verify(url).ok
            fp.remove(url)
            assert keys(url) == []
        fp.save(url, {"new": DATA})
        fp.finalize(url)
        assert set(fp.load(url)) == {"new"}
        assert fp.verify(url).ok
        assert sum(key.endswith(".open") for key in keys(url)) == 1
        if not death.is_dead:
            break
    assert at > 6


def test_new_session_waits_for_a_removal_that_goes_on() -> None:
    url = memory()
    fp.save(url, {"old": 1})
    fp.finalize(url)
    waits, saved = threading.Event(), threading.Event()

    def save() -> None:
        fp.save(f"{url}?p=1", {"new": 1})
        saved.set()

    saving = threading.Thread(target=save)

    def hook(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
        if name == "get" and arguments[1].endswith(".removed"):
            waits.set()
        if name == "delete" and any(key.endswith(".removed") for key in arguments[1]):
            saving.start()
            assert waits.wait(MOST_SECS)
            assert not saved.is_set()
        return request()

    with requests_through(hook):
        fp.remove(url)
        saving.join(MOST_SECS)
    assert saved.is_set()
    fp.finalize(url)
    assert set(fp.load(url)) == {"new"}


def test_one_of_those_who_wait_for_a_removal_that_died_takes_it_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two that delete, one would delete what is begun in the place when the other has ended."""
    url = memory()
    fp.save(url, {"old": 1})
    fp.finalize(url)
    die_at("delete", "commit_success.txt", lambda: fp.remove(url))
    fp.StorePath(url).store.delete(["commit_success.txt"])
    waits = threading.Event()
    other = threading.Thread(target=lambda: fp.save(f"{url}?p=2", {"other": DATA}))

    def secs_left(_: object, name: str) -> float:
        if name.endswith(".removed"):  # its process has died
            return 0.0
        waits.set()
        return 30.0

    def hook(name: str, _arguments: tuple[Any, ...], request: Request) -> Any:
        if name == "delete" and not other.ident:
            other.start()
            assert waits.wait(MOST_SECS)
        return request()

    monkeypatch.setattr(object_removal, "_secs_left", secs_left)
    with requests_through(hook):
        fp.save(f"{url}?p=1", {"new": DATA})
        other.join(MOST_SECS)
    fp.finalize(url)
    assert set(fp.load(url)) == {"new", "other"}


@pytest.mark.usefixtures("impatient")
def test_one_that_slept_before_it_took_a_removal_over_deletes_nothing_new() -> None:
    url = memory()
    fp.save(url, {"old": 1})
    fp.finalize(url)
    with requests_through(Death(4, after=True)), pytest.raises(Killed):
        fp.remove(url)
    another_process()
    with stopped_at("put_new", ".removed.1", lambda: fp.save(f"{url}?p=2", {"other": DATA})):
        fp.save(f"{url}?p=1", {"new": DATA})
    fp.finalize(url)
    assert set(fp.load(url)) == {"new", "other"}
    assert not [key for key in keys(url) if ".removed" in key]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("killed_at", ["contents", "nothing"])
def test_one_that_slept_before_it_published_what_is_removed_does_not(killed_at: str) -> None:
    url = memory()
    fp.save(url, {"a": DATA})

    def finalize_and_remove() -> None:
        fp.finalize(f"{url}?p=1")
        if killed_at == "nothing":
            fp.remove(f"{url}?p=1")
            return

        def hook(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
            if name == "delete" and len(arguments[1]) > 1:
                raise Killed
            return request()

        with requests_through(hook), pytest.raises(Killed):
            fp.remove(f"{url}?p=1")

    with (
        stopped_at("put_new", "commit_success.txt", finalize_and_remove),
        pytest.raises(fp.NoSessionError),
    ):
        fp.finalize(url)
    with pytest.raises(fp.NoSessionError):
        fp.load(url)
    another_process()
    fp.save(url, {"b": DATA})
    fp.finalize(url)
    assert set(fp.load(url)) == {"b"}


def use_again(url: str) -> None:
    """Another process finalizes the checkpoint, removes it, and begins the next one."""
    other = f"{url}?p=1"
    fp.finalize(other)
    fp.remove(other)
    fp.save(other, {"b": DATA})


def die_as_the_mark_is_put(url: str, meanwhile: Callable[[], Any]) -> None:
    """Finalizes in a process that sleeps before it puts the mark, and is killed after."""

    def hook(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
        if (name, arguments[1:2]) != ("put_new", ("commit_success.txt",)) or not is_first.pop():
            return request()
        is_first.append(False)
        in_another_process(meanwhile)
        request()
        raise Killed

    is_first = [True]
    with requests_through(hook), pytest.raises(Killed):
        fp.finalize(url)
    another_process()


def test_mark_that_a_dying_process_puts_when_its_checkpoint_is_gone_makes_none() -> None:
    url = memory()
    fp.save(url, {"a": DATA})

    def finalize_and_remove() -> None:
        fp.finalize(f"{url}?p=1")
        fp.remove(f"{url}?p=1")

    die_as_the_mark_is_put(url, finalize_and_remove)
    assert keys(url) == ["commit_success.txt"]
    for call in (fp.load, fp.metadata, fp.verify, fp.status, fp.finalize, fp.abort):
        with pytest.raises(fp.NoSessionError):
            call(url)
    fp.save(url, {"b": DATA})
    fp.finalize(url)
    assert set(fp.load(url)) == {"b"}
    assert fp.verify(url).ok
    fp.remove(url)
    assert keys(url) == []


@pytest.mark.parametrize("is_removed", [False, True])
def test_mark_that_a_dying_process_puts_beside_a_newer_session_hinders_it_not(
    *, is_removed: bool
) -> None:
    url = memory()
    fp.save(url, {"a": DATA})
    die_as_the_mark_is_put(url, partial(use_again, url))
    if is_removed:
        with pytest.raises(fp.NoSessionError, match="There is no checkpoint"):
            fp.remove(url)  # what is saved here is in the session
        assert "commit_success.txt" not in keys(url)
    fp.save(url, {"c": DATA})
    fp.finalize(url)
    assert set(fp.load(url)) == {"b", "c"}
    assert fp.verify(url).ok


@pytest.mark.parametrize("size", [1, PIECE_BYTES])  # of what is in the table beside the leaves
@pytest.mark.parametrize("is_finalized", [False, True])
def test_root_files_that_are_put_late_are_of_no_later_checkpoint(
    *, is_finalized: bool, size: int
) -> None:
    url = memory()
    fp.save(url, {"a": DATA}, custom_metadata={"": size * "a"})

    def use_the_place_again() -> None:
        use_again(url)
        if is_finalized:
            fp.finalize(f"{url}?p=1")

    with (
        stopped_at("put_new", "contents.json", use_the_place_again),
        pytest.raises(fp.CheckpointExistsError if is_finalized else fp.NoSessionError),
    ):
        fp.finalize(url)
    if not is_finalized:
        another_process()
        fp.finalize(url)
    assert set(fp.load(url)) == {"b"}
    assert fp.verify(url).ok


@pytest.mark.parametrize("late", [None, "verdict"])
def test_remover_that_slept_leaves_the_next_session_alone(late: str | None) -> None:
    url = memory()
    fp.save(url, {"a": 1})
    session = session_at(url)
    fp.finalize(url)

    def remove_and_save() -> None:
        fp.remove(f"{url}?p=1")
        fp.save(f"{url}?p=2", {"b": DATA})
        if late:
            put_late(url, session, late)

    with (
        stopped_at("put_new", ".removed", remove_and_save),
        pytest.raises(fp.NoSessionError, match="There is no checkpoint"),
    ):
        fp.remove(url)
    another_process()
    fp.finalize(url)
    assert set(fp.load(url)) == {"b"}
    fp.remove(url)
    assert keys(url) == []


@pytest.mark.usefixtures("impatient")
def test_remover_that_was_stopped_until_another_one_had_finished_deletes_nothing_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = memory()
    fp.save(url, {"a": 1})
    fp.finalize(url)
    now = time.monotonic

    def finish_and_save() -> None:
        fp.remove(f"{url}?p=1")
        fp.save(f"{url}?p=1", {"new": DATA})
        monkeypatch.setattr(time, "monotonic", lambda: now() + 60.0)

    with (
        stopped_at("delete", "commit_success.txt']", finish_and_save),
        pytest.raises(fp.NoSessionError),
    ):
        fp.remove(url)
    fp.finalize(url)
    assert set(fp.load(url)) == {"new"}


def test_one_that_slept_before_its_verdict_changes_nothing_of_a_later_checkpoint() -> None:
    url = memory()
    fp.save(url, {"a": DATA})

    def use_the_place_again() -> None:
        other = f"{url}?p=1"
        fp.finalize(other)
        fp.remove(other)
        fp.save(other, {"b": DATA})
        fp.finalize(other)

    with (
        stopped_at("put_new", ".verdict", use_the_place_again),
        pytest.raises(fp.CheckpointExistsError),
    ):
        fp.finalize(url)
    assert set(fp.load(url)) == {"b"}
    assert fp.verify(url).ok
    assert sum(".verdict" in key for key in keys(url)) == 1


# A place that is used again.


def begin_late(url: str, meanwhile: Callable[[], Any]) -> Exception | None:
    """Saves into a place without a session; sleeps just before it begins one."""
    with stopped_at("put_new", ".open", meanwhile):
        try:
            fp.save(url, {"late": DATA})
        except fp.NoSessionError as error:
            return error
    return None


@pytest.mark.parametrize("late", [None, "verdict"])
def test_session_that_is_begun_late_does_not_hide_a_newer_one(late: str | None) -> None:
    url = memory()
    fp.save(url, {"dropped": 1})
    session = session_at(url)
    fp.abort(url)

    def use_the_place_again() -> None:
        other = f"{url}?p=1"
        fp.save(other, {"removed": 1})
        fp.finalize(other)
        fp.remove(other)
        fp.save(other, {"new": DATA})
        if late:
            put_late(url, session, late)

    assert begin_late(url, use_the_place_again) is not None
    fp.save(f"{url}?p=2", {"more": 1})
    fp.finalize(url)
    assert set(fp.load(url)) == {"new", "more"}
    assert not [key for key in keys(url) if key.endswith(".open") and key.count(".") > 1]


def test_session_that_is_begun_late_in_an_empty_place_counts_for_nothing() -> None:
    url = memory()
    fp.save(url, {"dropped": 1})
    fp.abort(url)

    def empty_the_place() -> None:
        other = f"{url}?p=1"
        fp.save(other, {"removed": 1})
        fp.finalize(other)
        fp.remove(other)

    assert begin_late(url, empty_the_place) is not None
    assert keys(url) == []
    fp.save(url, {"new": 1})
    fp.finalize(url)
    assert set(fp.load(url)) == {"new"}


@pytest.mark.usefixtures("impatient")
def test_session_that_is_begun_in_what_a_removal_has_left_counts_for_nothing() -> None:
    """The next one who finishes the removal deletes it."""
    url = memory()

    def use_the_place_and_die() -> None:
        other = f"{url}?p=1"
        fp.save(other, {"removed": 1})
        fp.finalize(other)

        def hook(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
            if name == "delete" and any(key.endswith(".removed") for key in arguments[1]):
                raise Killed
            return request()

        with requests_through(hook), pytest.raises(Killed):
            fp.remove(other)

    assert begin_late(url, use_the_place_and_die) is not None
    fp.save(f"{url}?p=2", {"new": DATA})
    fp.finalize(url)
    assert set(fp.load(url)) == {"new"}


def test_one_that_sleeps_as_it_begins_a_session_saves_into_the_one_that_is_there() -> None:
    url = memory()

    def use_the_place() -> None:
        other = f"{url}?p=1"
        fp.save(other, {"removed": 1})
        fp.finalize(other)
        fp.remove(other)
        fp.save(other, {"new": 1})

    with stopped_at("put", ".begun", use_the_place):
        fp.save(url, {"late": 1})
    fp.finalize(f"{url}?p=2")
    assert set(fp.load(url)) == {"new", "late"}
    assert sum(key.endswith(".begun") for key in keys(url)) == 1


@pytest.mark.parametrize("left", [None, "begun"])
def test_save_that_slept_while_its_session_was_removed_and_another_begun_fails(
    left: str | None,
) -> None:
    """Both sessions are opened by an object of the same name; a removal may end half way."""
    url = memory()
    fp.save(url, {"a": 1})
    session = session_at(url)

    def use_the_place_again() -> None:
        other = f"{url}?p=1"
        fp.finalize(other)
        fp.remove(other)
        if left:
            put_late(url, session, left)
        fp.save(other, {"new": 1})

    with (
        stopped_at("put", "part.json", use_the_place_again),
        pytest.raises(fp.NoSessionError, match="before this part was written"),
    ):
        fp.save(url, {"late": DATA})
    another_process()
    fp.finalize(url)
    assert set(fp.load(url)) == {"new"}


def test_save_whose_verdict_is_removed_as_it_reads_it_fails() -> None:
    url = memory()
    fp.save(url, {"a": 1})
    finalized: list[Any] = []
    with (
        stopped_at("put", "part.json", lambda: finalized.append(fp.finalize(f"{url}?p=1"))),
        stopped_at("get", ".verdict", lambda: fp.remove(f"{url}?p=1"), once=finalized),
        pytest.raises(fp.NoSessionError),
    ):
        fp.save(url, {"late": DATA})


# Readers.


def read_by_load(url: str, _: Shell) -> bool:
    return bool((fp.load(url)["big"] == DATA).all())


def read_by_metadata(url: str, _: Shell) -> bool:
    return fp.metadata(url).leaves.keys() >= {"big", "packed", "small"}


def read_by_verify(url: str, _: Shell) -> bool:
    return fp.verify(url).ok


def read_by_verify_without_data(url: str, _: Shell) -> bool:
    with mock.patch.object(verify, "batches", return_value=()):
        return fp.verify(url).ok


def read_by_show(url: str, shell: Shell) -> bool:
    return shell.json("show", url)["state"] == "finalized"


def read_by_diff(url: str, shell: Shell) -> bool:
    changes = shell.json("diff", url, memory_with({"big": DATA + 1}), status=1)["changes"]
    return {"big": "values"}.items() <= {one["name"]: one["change"] for one in changes}.items()


def read_by_copy(url: str, _: Shell) -> bool:
    return bool(fp.copy(url, memory()).leaves)


def memory_with(state: dict[str, Any]) -> str:
    url = memory()
    fp.save(url, state)
    fp.finalize(url)
    return url


READERS = (
    *(read_by_load, read_by_metadata, read_by_verify, read_by_verify_without_data),
    *(read_by_show, read_by_diff, read_by_copy),
)
CASES = [
    *((read, "gone") for read in READERS),
    *((read, "another one") for read in READERS[:3]),
]


@pytest.mark.parametrize(("read", "then"), CASES)
def test_reader_is_told_of_a_removal_at_any_of_its_requests(
    read: Callable[[str, Shell], bool], then: str, shell: Shell
) -> None:
    """It reads all of it, or is told that it was removed: never that it is damaged."""
    outcomes = []
    for at in itertools.count(1):
        url = memory_with({"big": DATA, "small": 3})
        fp.remove(url)
        fp.save(url, {"big": DATA})
        fp.save(url, {"packed": DATA, "small": 3}, options=fp.SaveOptions(compression="zstd"))
        fp.finalize(url)
        made = itertools.count(1)
        lock, is_done = threading.Lock(), []

        def hook(_name: str, arguments: tuple[Any, ...], request: Request) -> Any:
            with lock:  # noqa: B023
                is_it = arguments[0].url.startswith(url) and next(made) == at and not is_done  # noqa: B023
                if is_it:
                    is_done.append(at)  # noqa: B023
            if is_it:
                in_another_process(lambda: fp.remove(f"{url}?p=1"))  # noqa: B023
                if then != "gone":
                    in_another_process(lambda: replace(f"{url}?p=2"))  # noqa: B023
            return request()

        with requests_through(hook):
            outcomes.append(outcome_of(read, url, shell))
        if not is_done:
            break
    assert outcomes[-1] == "read"
    assert len(outcomes) > 2
    assert set(outcomes) <= {"read", "removed"}, outcomes


def replace(url: str) -> None:
    fp.save(url, {"big": DATA, "packed": DATA, "small": 3, "other": DATA})
    fp.finalize(url)


def outcome_of(read: Callable[[str, Shell], bool], url: str, shell: Shell) -> str:
    try:
        return "read" if read(url, shell) else "wrong"
    except fp.NoSessionError:
        return "removed"
    except AssertionError:
        told = "was removed while|no checkpoint at|No unfinished checkpoint|does not exist"
        is_told = re.search(told, shell.error)
        return "removed" if is_told else shell.error
