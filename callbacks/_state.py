"""From what a training loop holds to the tree that is saved, and back.

Flax is never imported here: a value can only be one of its objects if it was imported already.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import jax

import flax_partial as fp

if TYPE_CHECKING:
    import os
    from pathlib import Path

_OF_TRAINERS = ("global_step", "current_epoch", "callback_metrics")
# Where most nodes of a tree come from: dicts and lists, and arrays.
_NEVER_NNX = frozenset(("builtins", "numpy", "jaxlib._jax"))

Progress = Callable[[int, int], None]
"""Called with how many bytes of how many are read."""

StateFn = Callable[[Any, Any], Any]
"""From trainer and module to the tree that is saved; NNX objects may stand in it."""


class LoadOptions(TypedDict, total=False):
    """What target and checkpoint need not have in common, as of `fp.load`."""

    partial: bool
    keep_missing: bool
    cast: bool
    restack: Mapping[fp.Stack | str, fp.Stack | str] | None
    renames: Mapping[str, str] | None


class RestoreOptions(LoadOptions, total=False):
    """What `PartialCheckpointCallback.restore` takes beside the target."""

    which: str | int | os.PathLike[str]
    discard_later: bool


def take(trainer: Any, module: Any, state_fn: StateFn | None) -> Any:
    """Returns the tree to save: what `find` finds, with the state of NNX objects in their place."""
    return pure(find(trainer, module, state_fn))


def find(trainer: Any, module: Any, state_fn: StateFn | None) -> Any:
    """Returns what a loop has to save: from `state_fn`, or else from what it is known to have.

    Without `state_fn`, the first of these that there is: `module`, then `trainer.state`, if it is
    an NNX module, saved as `{"params": ..., "opt_state": ...}` with the NNX optimizer that
    `trainer.optimizer` is, or a Flax `TrainState`, saved with its own fields; then `trainer.state`
    as any other tree. None if there is none of these.
    """
    if state_fn is not None:
        return state_fn(trainer, module)
    for candidate in (module, getattr(trainer, "state", None)):
        if _is_nnx(candidate):
            return _with_optimizer(candidate, trainer)
        if _is_train_state(candidate):
            return candidate
    state = getattr(trainer, "state", None)
    return state if _is_tree(state) else None


def is_trainer(target: Any) -> bool:
    """Whether a target of `restore` is a trainer, whose state is meant."""
    return all(hasattr(target, name) for name in _OF_TRAINERS)


def put_back(trainer: Any, found: Any, restored: Any, *, step: int, epochs_done: int) -> None:
    """Has a trainer go on from what was restored into `found`, in which NNX objects are updated.

    A tree of arrays that `find` found in `trainer.state` is replaced there. Counters that it sets
    by itself are left to it.
    """
    if found is getattr(trainer, "state", None):
        trainer.state = restored
    for name, value in (("global_step", step), ("current_epoch", epochs_done)):
        with contextlib.suppress(AttributeError):  # a property
            setattr(trainer, name, value)


def lacks_optimizer(tree: Any) -> bool:
    """Whether a state is NNX modules only: none of it is an optimizer's, or may be."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    nodes = jax.tree.leaves(tree, is_leaf=_is_nnx)
    return (
        bool(nodes)
        and all(isinstance(node, nnx.Module) for node in nodes)
        and not any(isinstance(inner, nnx.Optimizer) for _, inner in nnx.iter_graph(nodes))
    )


def pure(tree: Any) -> Any:
    """Returns a tree with the state of every NNX object in its place, as nested dicts of arrays."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    return jax.tree.map(lambda node: _pure(nnx, node), tree, is_leaf=_is_nnx)


def load(path: Path, target: Any, options: LoadOptions, *, progress: Progress | None = None) -> Any:
    """Loads what `target` names; NNX objects in it are updated in place, and returned themselves.

    Raises:
      TargetMismatchError: Target and checkpoint differ in what `options` do not allow; nothing was
        updated.
    """
    if target is None:
        return fp.load(path, progress=progress)
    if _is_nnx(target):
        return load(path, rooted(target), options, progress=progress)["params"]
    loaded = fp.load(path, target=pure(target), progress=progress, **options)
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return loaded
    return jax.tree.map(lambda node, new: _update(nnx, node, new), target, loaded, is_leaf=_is_nnx)


def rooted(target: Any) -> Any:
    """Returns a target as the checkpoint has it: an NNX object alone is its "params"."""
    return {"params": target} if _is_nnx(target) else target


def _with_optimizer(module: Any, trainer: Any) -> dict[str, Any]:
    optimizer = getattr(trainer, "optimizer", None)
    return {"params": module} | ({"opt_state": optimizer} if _is_nnx(optimizer) else {})


def _pure(nnx: Any, node: Any) -> Any:
    if not _is_nnx(node):
        return node
    if isinstance(node, nnx.Variable):
        return node.get_value() if hasattr(node, "get_value") else node.value  # Flax 0.12.0
    return nnx.to_pure_dict(node if isinstance(node, nnx.State) else nnx.state(node))


def _update(nnx: Any, node: Any, new: Any) -> Any:
    if not _is_nnx(node):
        return new
    if isinstance(node, nnx.Variable):
        if hasattr(node, "set_value"):
            node.set_value(new)
        else:
            node.value = new  # Flax 0.12.0
    elif isinstance(node, nnx.State):
        nnx.replace_by_pure_dict(node, new)
    else:
        nnx.update(node, new)
    return node


def _is_nnx(node: Any) -> bool:
    if type(node).__module__ in _NEVER_NNX:  # asking NNX takes 20 times as long
        return False
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Pytree | nnx.State | nnx.Variable)


def _is_train_state(node: Any) -> bool:
    struct = sys.modules.get("flax.struct")
    is_flax = struct is not None and isinstance(node, struct.PyTreeNode)
    return is_flax and hasattr(node, "params") and hasattr(node, "opt_state")


def _is_tree(state: Any) -> bool:
    """Whether it is a pytree to JAX: an opaque object is a leaf."""
    return state is not None and not jax.tree_util.all_leaves([state])
