"""From what a training loop holds to the tree that is saved, and back.

Flax is never imported here: a value can only be one of its objects if it was imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import jax

import flax_partial as fp

if TYPE_CHECKING:
    import os

    from flax_partial.runs.directory import AnyPath

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
    """Returns the tree to save: from `state_fn`, or else from what the loop is known to have.

    Without `state_fn`, the first of these that there is: `module`, then `trainer.state`, if it is
    an NNX module, saved as `{"params": ..., "opt_state": ...}` with the NNX optimizer that
    `trainer.optimizer` is, or a Flax `TrainState`, saved with its own fields; then `trainer.state`
    as any other tree. None if there is none of these.
    """
    if state_fn is not None:
        return pure(state_fn(trainer, module))
    for candidate in (module, getattr(trainer, "state", None)):
        if _is_nnx(candidate):
            return pure(_with_optimizer(candidate, trainer))
        if _is_train_state(candidate):
            return candidate
    state = getattr(trainer, "state", None)
    return pure(state) if _is_tree(state) else None


def pure(tree: Any) -> Any:
    """Returns a tree with the state of every NNX object in its place, as nested dicts of arrays."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    return jax.tree.map(lambda node: _pure(nnx, node), tree, is_leaf=_is_nnx)


def load(
    path: AnyPath, target: Any, options: LoadOptions, *, progress: Progress | None = None
) -> Any:
    """Loads what `target` names; NNX objects in it are updated in place, and returned themselves.

    Raises:
      TargetMismatchError: Target and checkpoint differ in what `options` do not allow; nothing was
        updated.
    """
    if target is None:
        return fp.load(path, progress=progress)
    if _is_nnx(target):
        return load(path, {"params": target}, options, progress=progress)["params"]
    loaded = fp.load(path, target=pure(target), progress=progress, **options)
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return loaded
    return jax.tree.map(lambda node, new: _update(nnx, node, new), target, loaded, is_leaf=_is_nnx)


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
    """Whether JAX knows its structure: an opaque object is a leaf."""
    return state is not None and not jax.tree_util.all_leaves([state])
