"""What a smaller tree cannot say by itself is saved at its place in the whole one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
import pytest
from things import QUICK
from trees import Block, Pair, assert_same

import flax_partial as fp

if TYPE_CHECKING:
    from pathlib import Path

X, Y = np.arange(3), np.ones((2, 2))
KEY = jax.tree_util
PIECES: dict[str, tuple[Any, list[tuple[Any, Any]]]] = {
    "elements of a list": (
        {"l": [{"x": X}, {"z": Y}]}, [(("l", 1), {"z": Y}), (("l", 0), {"x": X})]
    ),
    "elements of the root": ([X, Y], [((1,), Y), ((0,), X)]),
    "fields of a named tuple": (
        {"p": Pair(X, {"in": Y})}, [(("p", "right"), {"in": Y}), ("p.left", X)]
    ),
    "fields of a dataclass": ({"b": Block(X, Y)}, [("b.bias", Y), (("b", "kernel"), X)]),
    "keys of JAX": (
        {"l": [X, {3: Y}]},
        [((KEY.DictKey("l"), KEY.SequenceKey(0)), X), ((KEY.DictKey("l"), 1, KEY.DictKey(3)), Y)],
    ),
    "all of it": ({"x": X}, [((), {"x": X})]),
    "a leaf at the root": ({"x": X}, [("x", X)]),
}  # fmt: skip


@pytest.mark.parametrize(("whole", "pieces"), PIECES.values(), ids=PIECES)
def test_pieces_make_the_whole_tree(tmp_path: Path, whole: Any, pieces: Any) -> None:
    for path, piece in pieces:
        fp.save(tmp_path / "c", fp.subtree(path, piece), options=QUICK)
    fp.finalize(tmp_path / "c")
    assert_same(fp.load(tmp_path / "c", jax.tree.map(np.zeros_like, whole)), whole)


def test_moments_of_a_layer_are_saved_by_themselves(tmp_path: Path) -> None:
    params = {"a": X.astype(float), "b": Y}
    state = optax.adam(0.1).init(params)
    for name in params:
        for moments in ("mu", "nu"):
            moment = getattr(state[0], moments)[name]
            fp.save(tmp_path / "c", fp.subtree((0, moments, name), moment), options=QUICK)
    fp.save(tmp_path / "c", fp.subtree((0, "count"), state[0].count), options=QUICK)
    fp.save(tmp_path / "c", fp.subtree((1,), state[1]), options=QUICK)
    fp.finalize(tmp_path / "c")
    loaded = fp.load(tmp_path / "c", state)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, loaded, state)


@pytest.mark.parametrize("path", [3, None, (1.5,), (True,), ("a", None)], ids=str)
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(TypeError, match=r"^a (path|key) is text"):
        fp.subtree(path, {"x": X})
