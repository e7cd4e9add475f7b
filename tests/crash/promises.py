"""What must hold of the disk after a process has died in the middle of `workload`, or has failed.

What the process said of itself (the marks in its log) tells what it was promised. Everything is
looked at through public calls, and through Orbax, which knows nothing of this package.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as v0
import workload
from fileops import Event, Kind
from orbax.checkpoint.experimental import v1
from workload import DOOMED, FIRST, SAVES, SECOND, THIRD, TRAINED

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback


class BrokenPromiseError(AssertionError):
    """Something that was promised does not hold."""


@dataclass(frozen=True)
class Said:
    """What a process said of itself.

    Attributes:
      done: Steps that returned, in order.
      began: The step that began and did not return; None between two steps.
      failed: Steps that raised, and what.
      is_disk_well: Whether no change was made to fail.
    """

    done: tuple[str, ...] = ()
    began: str | None = None
    failed: tuple[tuple[str, str], ...] = ()
    is_disk_well: bool = True

    @classmethod
    def of(cls, events: Iterable[Event]) -> Said:
        """Reads the marks among events."""
        done: list[str] = []
        failed = []
        began = None
        events = list(events)
        for event in (event for event in events if event.kind is Kind.MARK):
            word, _, rest = event.path.partition(" ")
            if word == "begin":
                began = rest
            elif word == "failed":
                name, _, error = rest.partition(": ")
                failed.append((name, error))
            else:
                done.append(rest)
                began = None
        is_disk_well = not any(event.was_forced for event in events)
        return cls(tuple(done), began, tuple(failed), is_disk_well)

    def reached(self, name: str) -> bool:
        """Whether a step began, or is done."""
        return name == self.began or name in self.done


def require(holds: object, what: str) -> None:
    """Raises BrokenPromiseError unless something holds."""
    if not holds:
        raise BrokenPromiseError(what)


def refused(kind: type[BaseException], call: Any, *arguments: Any) -> None:
    """Requires that a call raises an error of a kind."""
    try:
        found = call(*arguments)
    except kind:
        return
    except Exception as error:
        text = f"{call.__name__} raised {type(error).__name__}, not {kind.__name__}: {error}"
        raise BrokenPromiseError(text) from error
    raise BrokenPromiseError(f"{call.__name__} raised no {kind.__name__} but returned {found!r}")


def merged(names: Iterable[str]) -> dict[str, Any]:
    """What a checkpoint of some of `SAVES` holds."""
    return functools.reduce(_overlaid, (SAVES[name] for name in names), {})


def _overlaid(tree: dict[str, Any], newer: dict[str, Any]) -> dict[str, Any]:
    both = {key for key in newer if isinstance(newer[key], dict) and key in tree}
    return {**tree, **newer, **{key: _overlaid(tree[key], newer[key]) for key in both}}


class Then(Enum):
    """What is done with an unfinished checkpoint after the crash."""

    FINALIZE = "finalize"
    GO_ON = "go on"
    ABORT = "abort"


def check(base: Path, said: Said, then: Then, *, with_orbax: bool = True) -> None:
    """Checks everything, and mends by public calls what a job would mend that starts again.

    Args:
      base: The directory that the workload changed.
      said: What the process said.
      then: What is done with an unfinished checkpoint.
      with_orbax: Whether Orbax has to read what is finalized.

    Raises:
      BrokenPromiseError: Something does not hold.
    """
    directory = workload.run_directory(base)
    checker = _Checker(base, said, then, with_orbax)
    is_first_gone = said.reached("train") and not os.path.lexists(directory / FIRST)
    if not is_first_gone:
        checker.first()
    if said.reached("train"):
        checker.second(is_first_gone=is_first_gone)
    if said.reached("doomed"):
        checker.third()
    checker.nothing_else()


@dataclass(frozen=True)
class _Checker:
    _base: Path
    _said: Said
    _then: Then
    _with_orbax: bool

    @property
    def _directory(self) -> Path:
        return workload.run_directory(self._base)

    def first(self) -> None:
        """The checkpoint made by calls: its saves survive, it is absent or complete."""
        path = self._directory / FIRST
        said = self._said
        names = [name for name in SAVES if name in said.done]
        if os.path.lexists(path):
            require(said.reached("finalize"), f"{path} is there before finalize was called")
            self.finalized(path, merged(SAVES), parts=len(SAVES))
            return
        require("finalize" not in said.done, f"finalize returned, and {path} is not there")
        unsure = said.began if said.began in SAVES else None
        found = self._found_saves(path, names, unsure)
        if self._then is Then.ABORT and path.with_name(f"{FIRST}.partial_save").exists():
            fp.abort(path)
            refused(fp.NoSessionError, fp.status, path)
        elif self._then is Then.GO_ON:
            self._go_on(path, found)
        else:
            self._finalize(path, merged(found), parts=len(found))

    def _go_on(self, path: Path, found: list[str]) -> None:
        """The next job saves what is missing, and more."""
        for name in SAVES:
            if name not in found:
                workload.save(self._base, name, durable=False)
        fp.save(path, {"more": np.arange(7)})
        wanted = {**merged(SAVES), "more": np.arange(7)}
        self._finalize(path, wanted, parts=len(SAVES) + 1)

    def _found_saves(self, path: Path, names: list[str], unsure: str | None) -> list[str]:
        """Returns which saves the session holds: those that returned, perhaps the one under way."""
        refused(fp.NoSessionError, fp.load, path)
        try:
            status = fp.status(path)
        except fp.NoSessionError:
            require(not names, f"the session with {names} is gone")
            return []
        found = [name for name in SAVES if status.custom_metadata.get(name)]
        allowed = [names, [*names, unsure]] if unsure else [names]
        require(found in allowed, f"the session holds {found}, not {allowed[0]}")
        require(len(status.parts) == len(found), f"{len(status.parts)} parts for {found}")
        return found

    def _finalize(self, path: Path, wanted: dict[str, Any], *, parts: int) -> None:
        if parts:
            fp.finalize(path)
            self.finalized(path, wanted, parts=parts)
        elif path.with_name(path.name + ".partial_save").exists():
            refused(fp.IncompleteCheckpointError, fp.finalize, path)
        else:
            refused(fp.NoSessionError, fp.finalize, path)

    def finalized(self, path: Path, wanted: dict[str, Any], *, parts: int | None) -> None:
        """A finalized checkpoint: every call gives the right answer."""
        same(fp.load(path), wanted, str(path))
        report = fp.verify(path)
        require(report.ok, f"verify: {report.bad}")
        if parts is not None:
            require(fp.metadata(path).parts == parts, f"{fp.metadata(path).parts} parts")
        refused(fp.NoSessionError, fp.status, path)
        refused(fp.CheckpointExistsError, fp.finalize, path)
        refused(fp.CheckpointExistsError, fp.save, path, {"a": 1})
        refused(fp.NoSessionError, fp.abort, path)
        require(int(path.name) in fp.steps(path.parent), f"{path} does not count as a step")
        if self._with_orbax:
            same(v1.load(path), wanted, f"Orbax v1 of {path}")
            with v0.PyTreeCheckpointer() as reader:
                same(reader.restore(path / "state"), wanted, f"Orbax v0 of {path}")

    def second(self, *, is_first_gone: bool) -> None:
        """The callback's checkpoint, and retention: the newest complete one can be restored."""
        said, directory = self._said, self._directory
        is_there = os.path.lexists(directory / SECOND)
        if is_first_gone or "train" in said.done:
            require(is_there, "the older checkpoint was removed before the newer one was complete")
        if "train" in said.done and said.is_disk_well:  # else a later run removes it
            require(is_first_gone, "the checkpoint that was to be removed is still there")
        if is_there:
            self.finalized(directory / SECOND, TRAINED, parts=None)

    def third(self) -> None:
        """The checkpoint that is aborted: whole, or gone; never finalized."""
        path = self._directory / THIRD
        require(not os.path.lexists(path), "what was never finalized is there")
        try:
            status = fp.status(path)
        except fp.NoSessionError:
            is_kept = "doomed" in self._said.done and not self._said.reached("abort")
            require(not is_kept, "a session that nobody aborted is gone")
            refused(fp.NoSessionError, fp.finalize, path)
            return
        require("abort" not in self._said.done, "the session is there after abort")
        if self._then is Then.ABORT:
            fp.abort(path)
            refused(fp.NoSessionError, fp.status, path)
            return
        if "doomed" in self._said.done or status.parts:
            same(list(status.leaves), sorted(DOOMED), "the leaves of the third checkpoint")
            fp.finalize(path)
            self.finalized(path, DOOMED, parts=1)
            return
        self._finalize(path, {}, parts=0)
        fp.abort(path)

    def nothing_else(self) -> None:
        """The next job finds the newest checkpoint, tidies up, and goes on to the end."""
        directory = self._directory
        before = fp.steps(directory)
        callback = PartialCheckpointCallback(directory, keep_last=1)
        restored = callback.restore()
        callback.finalizer.wait()  # it sweeps up in the background
        recovered = fp.steps(directory)
        require(set(recovered) >= set(before), f"recovering lost {set(before) - set(recovered)}")
        newest = recovered[-1] if recovered else None
        require((restored[1] if restored else None) == newest, f"{restored} is not {recovered}")
        left = names_in(directory)
        require(left == set(map(str, recovered)), f"recovering left {sorted(left)}")
        if self._then is not Then.GO_ON or (newest or 0) > int(SECOND):
            return
        workload.train(self._base, durable=False)
        # A job that finds its last step has nothing to train, and removes nothing.
        may_stay = {FIRST} if newest == int(SECOND) else set()
        left = names_in(directory)
        require(left - may_stay == {SECOND}, f"training left {left}")
        self.finalized(directory / SECOND, TRAINED, parts=None)


def names_in(directory: Path) -> set[str]:
    """The names in a directory; none if it is not there."""
    found = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    return found - {"timeline"}


def same(got: Any, want: Any, where: str) -> None:
    """Requires two trees to be the same to the bit.

    Raises:
      BrokenPromiseError: They are not; it names the place.
    """
    if isinstance(want, dict):
        require(isinstance(got, dict) and got.keys() == want.keys(), f"{where}: keys differ")
        for key, value in want.items():
            same(got[key], value, f"{where}.{key}")
    elif isinstance(want, list):
        require(isinstance(got, list) and len(got) == len(want), f"{where}: lengths differ")
        for index, value in enumerate(want):
            same(got[index], value, f"{where}.{index}")
    elif isinstance(want, np.ndarray | np.generic):
        one, other = np.asarray(got), np.asarray(want)
        is_alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        require(is_alike, f"{where}: {one.dtype}{one.shape} is not {other.dtype}{other.shape}")
        require(one.tobytes() == other.tobytes(), f"{where}: other data")
    else:
        require(type(got) is type(want) and got == want, f"{where}: {got!r} is not {want!r}")


logging.getLogger("absl").setLevel(logging.ERROR)
