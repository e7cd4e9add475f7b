"""How leaves are described: what Orbax is told of devices, and what is remembered of a tree."""

from __future__ import annotations

import collections
import enum
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from things import QUICK

import flax_partial as fp
from flax_partial.saving import describe_leaf, known_trees

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DEVICES = {
    "cpu:0": "cpu:0",
    "cpu:3": "cpu:0",
    "cpu:2049": "cpu:0",  # of the second process
    "cuda:5": "cuda:0",
    "rocm:1": "rocm:0",
    "METAL:0": "METAL:0",
    "TFRT_CPU_0": "TFRT_CPU_0",
    "TFRT_CPU_131072": "TFRT_CPU_0",
    "TPU_0(process=0,(0,0,0,0))": "TPU_0(process=0,(0,0,0,0))",
    "TPU_12(process=3,(0,0,0,0))": "TPU_0(process=0,(0,0,0,0))",
}


@pytest.mark.parametrize(("device", "first"), DEVICES.items())
def test_array_on_one_device_is_said_to_be_on_the_first_of_its_kind(
    device: str, first: str
) -> None:
    assert describe_leaf._as_first(device) == first  # noqa: SLF001 - such devices are not here


class Tpu:
    """Stands in for one of several hosts' TPUs, each of which says where it stands."""

    def __init__(self, number: int) -> None:
        self.id = number

    def __str__(self) -> str:
        x, y = self.id % 2, self.id // 2
        return f"TPU_{self.id}(process={y},({x},{y},0,0))"


def test_array_of_a_later_process_is_said_to_be_on_the_first_device_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chips = [Tpu(number) for number in range(8)]
    monkeypatch.setattr(jax, "devices", lambda _: chips)
    monkeypatch.setattr(jax, "local_devices", lambda **_: chips[2:4])
    assert describe_leaf._first_device("tpu") == "TPU_0(process=0,(0,0,0,0))"  # noqa: SLF001


CHANGES: dict[str, Callable[[jax.Array], object]] = {
    "the same": lambda x: x + 1,
    "another shape": lambda x: jnp.concatenate([x, x]),
    "another dtype": lambda x: x.astype(jnp.bfloat16),
    "another device": lambda x: jax.device_put(x, jax.devices()[1]),
    "sharded": lambda x: jax.device_put(x, jax.sharding.NamedSharding(trees.mesh("x"), jax.P("x"))),
    "NumPy's": np.asarray,
    "a number": lambda _: 3,
    "a text": lambda _: "text",
    "a key": lambda _: jax.random.key(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_tree_like_one_before_is_saved_as_it_is_now(
    tmp_path: Path, change: Callable[[jax.Array], object]
) -> None:
    first = jnp.arange(8.0)
    trees_saved = [{"a": leaf, "none": None, "empty": []} for leaf in (first, change(first), first)]
    for number, tree in enumerate(trees_saved):
        path = tmp_path / str(number)
        fp.save_async(path, tree, options=QUICK)
        fp.finalize(path)
        trees.assert_same(fp.load(path, target=tree), tree)


def test_deleted_array_of_a_tree_that_was_saved_before_is_refused(tmp_path: Path) -> None:
    tree = {"a": jnp.arange(8.0)}
    fp.save(tmp_path / "0", tree)
    tree["a"].delete()
    with pytest.raises(fp.UnsupportedLeafError, match="deleted or donated"):
        fp.save(tmp_path / "1", tree)
    assert not (tmp_path / "1.partial_save").exists()


def test_what_a_function_returns_again_and_again_is_compared_by_identity_and_still_looked_at(
    tmp_path: Path,
) -> None:
    """Its arrays have the same type and sharding, as objects, each time; it may be deleted, too."""
    step = jax.jit(lambda tree: {"a": tree["a"] + 1, "b": tree["b"] * 2})
    tree = {"a": jnp.arange(8.0), "b": jnp.ones(3, jnp.int32)}
    for number in range(4):
        before, tree = tree, step(tree)
        assert number == 0 or tree["a"].aval is before["a"].aval
        fp.save(tmp_path / str(number), tree, options=QUICK)
        fp.finalize(tmp_path / str(number))
        trees.assert_same(fp.load(tmp_path / str(number), target=tree), tree)
    tree["b"].delete()
    with pytest.raises(fp.UnsupportedLeafError, match="'b' was deleted or donated"):
        fp.save(tmp_path / "4", tree, options=QUICK)
    tree["b"] = jnp.ones((3, 1), jnp.int32)
    fp.save(tmp_path / "4", tree, options=QUICK)
    fp.finalize(tmp_path / "4")
    trees.assert_same(fp.load(tmp_path / "4", target=tree), tree)


def test_structure_that_cannot_be_hashed_is_described_each_time(tmp_path: Path) -> None:
    class Node:
        def __init__(self, value: object) -> None:
            self.value = value

    jax.tree_util.register_pytree_with_keys(
        Node,
        lambda node: (((jax.tree_util.GetAttrKey("value"), node.value),), ["unhashable"]),
        lambda _, children: Node(*children),
    )
    for number in range(2):
        fp.save(tmp_path / str(number), Node(jnp.arange(number + 1)), options=QUICK)
        fp.finalize(tmp_path / str(number))
        assert fp.load(tmp_path / str(number))["value"].shape == (number + 1,)


class Text(str, enum.Enum):  # noqa: UP042 - `StrEnum` prints its text
    A = "a"


class Number(int, enum.Enum):
    ONE = 1


def test_members_of_enums_are_what_they_equal(tmp_path: Path) -> None:
    fp.save(tmp_path / "c", {"texts": {Text.A: Text.A}, "numbers": {Number.ONE: Number.ONE}})
    fp.finalize(tmp_path / "c")
    assert fp.load(tmp_path / "c") == {"texts": {"a": "a"}, "numbers": {1: 1}}


def test_state_that_was_refused_is_not_remembered(tmp_path: Path) -> None:
    """To JAX an empty container of a type that it does not know is a leaf, as an array is."""
    with pytest.raises(fp.UnsupportedLeafError, match="Counter"):
        fp.save(tmp_path / "c", collections.Counter())
    fp.save(tmp_path / "c", np.arange(3), options=QUICK)
    fp.finalize(tmp_path / "c")
    assert (fp.load(tmp_path / "c") == np.arange(3)).all()


@pytest.mark.parametrize("key", [True, 1.0, np.int64(1)], ids=repr)
def test_key_that_equals_one_saved_before_is_looked_at(tmp_path: Path, key: object) -> None:
    """To Python, and to JAX, a dict with it is of the same structure."""
    fp.save(tmp_path / "1", {1: np.zeros(2)}, options=QUICK)
    with pytest.raises(fp.UnsupportedLeafError, match="keys must be strings or integers"):
        fp.save(tmp_path / "2", {key: np.zeros(2)}, options=QUICK)
    assert not list(tmp_path.glob("2*"))


def test_structures_that_differ_in_keys_alone_do_not_collide() -> None:
    """To JAX they have one hash, and a dict of thousands of them would be searched one by one."""
    layers = [{"layers": {f"{number}": {"w": 0, "b": 0}}, "step": 0} for number in range(100)]
    layers += [{"step": 0, "weights": ({f"{number}": 0},)} for number in range(100)]
    keys = [known_trees.keys_on_the_way(jax.tree.structure(tree)) for tree in layers]
    assert len(set(map(hash, keys))) == len(keys)
