"""How a state is cut into groups: the leaves that a callback saves at once, as one part."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flax_partial import leaf_types
from flax_partial.callbacks import _stacked
from flax_partial.callbacks._leaves import (
    KeyPath,
    Leaves,
    flatten,
    innermost,
    leaf_name,
    texts,
)
from flax_partial.subtrees import keys_of, subtree

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from flax_partial.callbacks._claims import Claims
    from flax_partial.subtrees import Name

logger = logging.getLogger(__name__)

GroupBy = Callable[[KeyPath], str]
"""Returns, by its key path, the group that a leaf of the state is saved with."""

_PARAMS = "params"


class Grouping:
    """How one callback groups what it saves."""

    def __init__(
        self, group_by: GroupBy | None, stacked: _stacked.Stacked, *, share_replicas: bool = False
    ) -> None:
        """Checks what a user gives; rows of replicas may be shared among processes.

        Raises:
          TypeError: `stacked` maps something else than names to numbers, or tuples of them.
        """
        self._group_by = group_by
        self._stacked = _stacked.check(stacked)
        self._share_replicas = share_replicas
        self._streamed: set[str] = set()  # names of the leaves, in any step
        self._told: set[str] = set()

    @property
    def has_streamed(self) -> bool:
        """Whether a trainer has streamed anything so far."""
        return bool(self._streamed)

    def streamed(self, root: str, name: Name, tree: Any) -> dict[str, Leaves]:
        """Returns the groups of a streamed layer: it is one, or one for each row of a stack."""
        leaves = flatten(subtree((root, *keys_of(name)), leaf_types.unwrapped(tree)))
        self._streamed.update(leaf_name(path) for path, _ in leaves)
        return _stacked.by_row({joined_name(root, name): self._spread(leaves)})

    def check(self, tree: Any, streamed: AbstractSet[str]) -> None:
        """Finds what `rest` would raise, where layers of these names are streamed, and not seen.

        Raises:
          ValueError: `stacked` names no leaf of what is saved.
          TypeError: `group_by` returned something else than a name.
        """
        leaves = flatten(leaf_types.unwrapped(tree))
        seen = [
            stack
            for stack in self._stacked
            if not any(stack.startswith(f"{layer}.") for layer in streamed)
        ]
        _stacked.check_known(seen, {leaf_name(path) for path, _ in leaves} | streamed)
        if self._group_by is not None:
            cut(leaves, self._group_by)

    def rest(self, tree: Any, claims: Claims) -> dict[str, Leaves]:
        """Returns the groups of what is in a state, and was not saved yet.

        Raises:
          ValueError: `stacked` names no leaf of what is saved.
          TypeError: `group_by` returned something else than a name.
        """
        leaves = flatten(leaf_types.unwrapped(tree))
        _stacked.check_known(self._stacked, {leaf_name(path) for path, _ in leaves} | claims.names)
        for what in _stacked.not_cut(leaves, self._stacked):
            self._tell(what, f"{what}: it is saved whole.")
        self._tell_of_strangers({leaf_name(path) for path, _ in leaves})
        group_by = self._group_by or layerwise(leaves, self._stacked)
        spread = self._spread(leaves)
        return _stacked.by_row(cut([leaf for leaf in spread if not claims.covers(*leaf)], group_by))

    def check_holds_streamed(self, tree: Any) -> None:
        """Checks that a state holds something, and all that a trainer has streamed.

        Raises:
          ValueError: It does not.
        """
        names = {leaf_name(path) for path, _ in flatten(leaf_types.unwrapped(tree))}
        if lacking := sorted(self._streamed - names):
            raise ValueError(f"What the trainer has as its state lacks {lacking[0]!r}.")
        if not names:
            raise ValueError("The trainer has no state any more.")

    def _spread(self, leaves: Leaves) -> Leaves:
        return _stacked.spread(leaves, self._stacked, share_replicas=self._share_replicas)

    def _tell_of_strangers(self, names: AbstractSet[str]) -> None:
        """Warns of what was streamed into a subtree that the state has, and is not in the state."""
        roots = {name.partition(".")[0] for name in names}
        for name in sorted(self._streamed - names - self._told):
            if name.partition(".")[0] in roots:
                close = difflib.get_close_matches(name, sorted(names), n=1)
                meant = f" Did you mean {close[0]!r}?" if close else ""
                self._tell(
                    name,
                    f"{name!r} was streamed, and is not in the state that the step ended with: "
                    f"both are saved.{meant}",
                )

    def _tell(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            logger.warning("%s", message)


def joined_name(root: str, name: Name) -> str:
    """Returns the name that a streamed layer has in the checkpoint."""
    return ".".join((root, *map(str, keys_of(name))))


def cut(leaves: Leaves, group_by: GroupBy) -> dict[str, Leaves]:
    """Sorts leaves into groups, both in the order in which they come.

    Raises:
      TypeError: `group_by` returned something else than a name.
    """
    groups: dict[str, Leaves] = {}
    for path, leaf in leaves:
        group = group_by(path)
        if not isinstance(group, str):
            raise TypeError(
                f"group_by returned {group!r} for leaf {leaf_name(path)!r}; it must return the "
                "name of a group, a string."
            )
        groups.setdefault(group, []).append((path, leaf))
    return groups


def layerwise(leaves: Leaves, stacks: Iterable[str] = ()) -> GroupBy:
    """Returns the default grouping of a state: a group for each layer of each root ("params", ...).

    A layer reaches down to the first number of the path (`params.blocks.3`), or else to the first
    key below the root (`params.embed`); each subtree of `stacks` is a layer, too. A leaf that has
    a parameter's path at the end of its own, as Optax's moments have, belongs to that parameter's
    layer: `opt_state.0.mu.blocks.3.kernel` is grouped as `opt_state.blocks.3`, with its second
    moment.
    """
    known = list(stacks)
    paths = (texts(path) for path, _ in leaves if path)
    params = {
        names[1:]: _layer(names, known)
        for names in paths
        if names[0] == _PARAMS or innermost(names, known) is not None
    }

    def group_by(path: KeyPath) -> str:
        names = texts(path)
        if names and names[0] != _PARAMS and innermost(names, known) is None:
            for start in range(1, len(names)):
                layer = params.get(names[start:])
                if layer is not None:
                    return ".".join((names[0], *layer[1:]))
        return ".".join(_layer(names, known))

    return group_by


def _layer(names: tuple[str, ...], stacks: Iterable[str]) -> tuple[str, ...]:
    stack = innermost(names, stacks)
    if stack is not None:
        return tuple(stack.split("."))
    number = next((at for at, name in enumerate(names) if at and name.isdecimal()), 1)
    return names[: number + 1]
