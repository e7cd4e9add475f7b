"""A session against a plain dict, over any sequence of calls and sudden deaths.

The model is a dict of what was saved; it takes nothing from the code under test but, after a death,
the answer to which of the saves then in flight were committed, which cannot be known beforehand.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trees
from engine_worker import Worker
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from things import QUICK, Element

import flax_partial as fp

pytestmark = pytest.mark.timeout(900)  # to shorten an example that fails takes many runs

# Names of leaves, as paths. Some cannot stand beside others.
PATHS: tuple[tuple[Any, ...], ...] = (
    *(("a",), ("b",), ("tree",), ("tree", "x"), ("tree", "y"), ("tree", "x", "deep")),
    *(("list", 0), ("list", 1), ("list", 2), ("list", "z")),
)
ROWS = 4  # of the one leaf that is saved in slices
STACKED = ("stacked",)
Paths = dict[tuple[Any, ...], Any]


def value_of(number: int) -> Any:
    kinds = (
        np.full(3, number),
        number,
        f"text {number}",
        np.arange(20_000) + number % 2,  # what one checkpoint may share with the other
        None,
        {},
        np.float32(number),
    )
    return kinds[number % len(kinds)]


def stacked(number: int) -> np.ndarray:
    return np.arange(ROWS * 2).reshape(ROWS, 2) + 10 * number


def nested(leaves: Paths) -> Any:
    """The tree that leaves form; `Element` stands for a list of which only one is saved."""
    tree: dict[str, Any] = {}
    lists: dict[int, Any] = {}
    for path, value in leaves.items():
        if path[0] == "list" and path[1] != "z":
            lists[path[1]] = value
            continue
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    if lists:
        tree["list"] = [lists[index] for index in sorted(lists)]
    return tree


def is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def is_inside(path: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(path) > len(other) and path[: len(other)] == other


def is_mixed(path: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether one makes a list of what is a dict to the other."""
    return path[0] == other[0] == "list" and ("z" in path) != ("z" in other)


@dataclass
class Model:
    """What a session holds; an empty dict that replaces nothing holds a place for others."""

    leaves: Paths = field(default_factory=dict)
    places: set[tuple[Any, ...]] = field(default_factory=set)
    rows: dict[int, np.ndarray] = field(default_factory=dict)
    saves: dict[str, int] = field(default_factory=dict)  # the merged custom metadata
    last: int = 0

    def held(self) -> set[tuple[Any, ...]]:
        return {*self.everything(), *([STACKED] if self.rows else [])}

    def conflicts(self, state: Paths, rows: range | None, *, replace: bool) -> bool:
        for path, other in itertools.product(state, self.leaves):
            is_place = is_empty(state[path]) and not replace
            if is_mixed(path, other) or is_inside(path, other):
                return True
            if (is_inside(other, path) and not is_place) or (path == other and not replace):
                return True
        for path, other in itertools.product(state, self.places):
            is_place = is_empty(state[path]) and not replace
            if is_mixed(path, other) or (is_inside(other, path) and not is_place):
                return True
        return rows is not None and not replace and any(row in self.rows for row in rows)

    def add(self, save: Save, *, replace: bool) -> None:
        places = {path for path, value in save.state.items() if is_empty(value) and not replace}
        self.leaves |= {path: save.state[path] for path in save.state.keys() - places}
        self.places = (self.places | places) - self.leaves.keys()
        if save.rows is not None:
            if any(row in self.rows for row in save.rows):
                self.rows = {}  # a replacement: all of them have to be saved again
            self.rows |= {row: stacked(save.number)[row] for row in save.rows}
        self.saves[f"{save.number}"] = save.number
        self.last = save.number

    @property
    def is_whole(self) -> bool:
        indices = {path[1] for path in self.everything() if path[0] == "list"} - {"z"}
        has_gap = indices != set(range(len(indices)))
        return bool(self.saves) and not has_gap and len(self.rows) in (0, ROWS)

    def everything(self) -> Paths:
        """The leaves, with the places that are left."""
        taken = [*self.leaves, *self.places]
        left = {path for path in self.places if not any(is_inside(one, path) for one in taken)}
        return self.leaves | {path: {} for path in left}

    def tree(self) -> Any:
        leaves = self.everything()
        if self.rows:
            leaves[STACKED] = np.stack([self.rows[row] for row in range(ROWS)])
        return nested(leaves)


@dataclass(frozen=True)
class Save:
    number: int
    state: Paths
    rows: range | None

    def tree(self) -> Any:
        tree = nested({path: value for path, value in self.state.items() if path[0] != "list"})
        for path, value in self.state.items():
            if path[0] == "list":
                index = path[1]
                tree["list"] = {"z": value} if index == "z" else Element(index, value)
        if self.rows is not None:
            start, stop = self.rows.start, self.rows.stop
            tree["stacked"] = fp.Slice(stacked(self.number)[start:stop], start, ROWS)
        return tree


def fit_together(paths: set[tuple[Any, ...]]) -> bool:
    """Whether leaves can be passed to one save: no prefixes, and one element of the list."""
    return sum(path[0] == "list" for path in paths) <= 1 and not any(
        one != other and one == other[: len(one)] for one in paths for other in paths
    )


path_sets = st.sets(st.sampled_from(PATHS), min_size=1, max_size=3).filter(fit_together)
row_ranges = st.none() | st.sampled_from(
    [range(a, b) for a in range(ROWS) for b in range(a + 1, ROWS + 1)]
)


class Checkpoints(RuleBasedStateMachine):
    """Two checkpoints, and a process that is killed now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.sessions: dict[str, Model] = {}
        self.done: dict[str, Model] = {}
        self.in_flight: dict[str, list[tuple[int, Save]]] = {"one": [], "two": []}
        self.number = 0
        self.worker = Worker()

    def teardown(self) -> None:
        self.worker.end()
        self.directory.cleanup()

    def path(self, name: str) -> str:
        return str(Path(self.directory.name, name))

    def settle(self, name: str) -> None:
        """Waits for the saves in flight."""
        for handle, save in self.in_flight[name]:
            assert self.worker.call("result", handle).leaves == len(save.state) + bool(save.rows)
        self.in_flight[name] = []

    names = st.sampled_from(("one", "one", "one", "two"))

    @rule(name=names, paths=path_sets, rows=row_ranges, replace=st.booleans(), wait=st.booleans())
    def save(self, *, wait: bool, **what: Any) -> None:
        self.save_one(**what, wait=wait)

    def save_one(
        self, name: str, paths: set[Any], rows: range | None, *, replace: bool, wait: bool
    ) -> None:
        self.number += 1
        state = {path: value_of(self.number + i) for i, path in enumerate(sorted(paths, key=repr))}
        save = Save(self.number, state, rows)
        call = "save" if wait else "save_async"
        metadata = {"saves": {f"{save.number}": save.number}, "last": save.number}
        arguments = (call, self.path(name), save.tree())
        options = {"replace": replace, "custom_metadata": metadata, "options": QUICK}
        options["reuse"] = self.path({"one": "two", "two": "one"}[name])
        model = self.sessions.get(name, Model())
        is_conflict = model.conflicts(state, rows, replace=replace)
        if name in self.done or is_conflict:
            kind = fp.CheckpointExistsError if name in self.done else fp.KeyConflictError
            self.refused(kind, *arguments, **options)
            return
        answer = self.worker.call(*arguments, **options)
        self.sessions[name] = model
        model.add(save, replace=replace)
        if not wait:
            self.in_flight[name].append((answer, save))

    def refused(self, kind: type[Exception], *arguments: Any, **options: Any) -> None:
        with pytest.raises(kind):
            self.worker.call(*arguments, **options)

    @precondition(lambda self: any(model.leaves for model in self.sessions.values()))
    @rule(data=st.data(), replace=st.booleans(), wait=st.booleans())
    def save_again(self, data: st.DataObject, *, replace: bool, wait: bool) -> None:
        held = [(n, path) for n, model in self.sessions.items() for path in model.leaves]
        name, path = data.draw(st.sampled_from(held))
        self.save_one(name, {path}, None, replace=replace, wait=wait)

    @precondition(lambda self: any(self.in_flight.values()))
    @rule(name=names)
    def wait(self, name: str) -> None:
        self.settle(name)

    @rule(is_killed=st.booleans())
    def restart(self, *, is_killed: bool) -> None:
        """A process that ends by itself finishes its saves first; one that is killed has none."""
        if is_killed:
            self.settle("one")
            self.settle("two")
            self.worker.kill()
        else:
            self.worker.end()
        self.in_flight = {"one": [], "two": []}
        self.worker = Worker()

    @precondition(lambda self: any(self.in_flight.values()))
    @rule()
    def kill_with_saves_in_flight(self) -> None:
        self.worker.kill()
        self.worker = Worker()
        for name, saves in self.in_flight.items():
            if not saves:
                continue
            model = self.sessions.pop(name)
            maybe = {f"{save.number}" for _, save in saves}
            held: dict[str, int] = {}
            with contextlib.suppress(fp.NoSessionError):  # not even its directory was made
                held = self.worker.call("status", self.path(name)).custom_metadata.get("saves", {})
                # Which of them are there is chance, and what follows must not be: start over.
                self.worker.call("abort", self.path(name))
            assert model.saves.keys() - maybe <= held.keys() <= model.saves.keys()
        self.in_flight = {"one": [], "two": []}

    @rule(name=names, expect=st.none() | st.sets(st.sampled_from(PATHS), max_size=2))
    def finalize(self, name: str, expect: set[tuple[Any, ...]] | None) -> None:
        model = self.sessions.get(name)
        names = None if expect is None else [".".join(map(str, path)) for path in expect]
        if name in self.done:
            error: type[Exception] | None = fp.CheckpointExistsError
        elif model is None:
            error = fp.NoSessionError
        else:
            is_whole = model.is_whole and all(
                any(leaf[: len(path)] == path for leaf in model.everything())
                for path in expect or ()
            )
            error = None if is_whole else fp.PartialCheckpointError
        self.in_flight[name] = []  # it waits for them, in every case
        if error:
            self.refused(error, "finalize", self.path(name), expect=names)
        elif model is not None:
            found = self.worker.call("finalize", self.path(name), expect=names)
            assert found.custom_metadata == {"saves": model.saves, "last": model.last}
            self.done[name] = self.sessions.pop(name)

    @precondition(lambda self: self.sessions)
    @rule()
    def complete_finalize_and_load(self) -> None:
        name = min(self.sessions)
        model = self.sessions[name]
        indices = {path[1] for path in model.everything() if path[0] == "list"} - {"z"}
        for index in set(range(max(indices, default=-1))) - indices:
            self.save_one(name, {("list", index)}, None, replace=False, wait=False)
        for row in set(range(ROWS)) - set(model.rows) if model.rows else ():
            self.save_one(name, set(), range(row, row + 1), replace=False, wait=False)
        self.finalize(name, {*list(model.leaves)[:2]})
        assert name in self.done
        self.load(name)

    @precondition(lambda self: self.sessions)
    @rule(name=names)
    def abort(self, name: str) -> None:
        self.settle(name)
        if name in self.sessions:
            self.worker.call("abort", self.path(name))
            del self.sessions[name]
        else:
            self.refused(fp.NoSessionError, "abort", self.path(name))

    @precondition(lambda self: self.done)
    @rule(name=names)
    def load(self, name: str) -> None:
        if name in self.done:
            trees.assert_same(self.worker.call("load", self.path(name)), self.done[name].tree())
        else:
            self.refused(fp.NoSessionError, "load", self.path(name))

    @precondition(lambda self: self.done)
    @rule()
    def remove_what_is_done(self) -> None:
        """Then the path is free again."""
        for name in self.done:
            trees.assert_whole(self.path(name), self.done[name].tree())
            shutil.rmtree(self.path(name))
        self.done = {}

    @precondition(lambda self: self.sessions)
    @rule(name=names)
    def status(self, name: str) -> None:
        self.settle(name)
        if name not in self.sessions:
            self.refused(fp.NoSessionError, "status", self.path(name))
            return
        model = self.sessions[name]
        found = self.worker.call("status", self.path(name))
        assert set(found.leaves) == {".".join(map(str, path)) for path in model.held()}
        assert found.custom_metadata == {"saves": model.saves, "last": model.last}
        assert len(found.parts) == len(model.saves)
        assert not found.torn

    @invariant()
    def nothing_else_lies_about(self) -> None:
        found = {entry.name for entry in Path(self.directory.name).iterdir()}
        allowed = {*self.done, *(f"{name}.partial_save" for name in self.sessions)}
        # The first save in flight makes the directory when its turn comes.
        not_sure = {f"{name}.partial_save" for name, saves in self.in_flight.items() if saves}
        assert allowed - not_sure <= found <= allowed


Checkpoints.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestCheckpoints = Checkpoints.TestCase
