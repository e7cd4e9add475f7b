"""Values of a registered type are saved as their arrays, and built again on load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from things import QUICK, stored, trainer

import flax_partial as fp
from flax_partial import leaf_types
from flax_partial.callbacks import PartialCheckpointCallback

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Quantized:
    """What JAX takes for a leaf: numbers, and what they are multiplied with."""

    numbers: Any
    scale: Any
    unit: str = "m"


@jax.tree_util.register_pytree_with_keys_class
@dataclass
class Boxed:
    """What JAX takes for a subtree."""

    value: Any
    note: str = ""

    def tree_flatten_with_keys(self) -> Any:
        return ((jax.tree_util.GetAttrKey("value"), self.value),), self.note

    @classmethod
    def tree_unflatten(cls, note: str, children: Any) -> Boxed:
        return cls(children[0], note)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two are registered, for one test only."""
    monkeypatch.setattr(leaf_types, "_known", {})
    fp.register_leaf_type(
        Quantized,
        to_arrays=lambda q: {"numbers": q.numbers, "scale": q.scale},
        from_arrays=lambda like, arrays: Quantized(**arrays, unit=like.unit),
    )
    fp.register_leaf_type(
        Boxed,
        to_arrays=lambda box: box.value,
        from_arrays=lambda like, value: Boxed(value, like.note),
    )


def state(step: float) -> dict[str, Any]:
    return {
        "plain": jnp.full(3, step),
        "quantized": Quantized(np.full((4, 2), step, np.int8), jnp.float32(step)),
        "boxed": [Boxed(jnp.full((2, 2), step), "kept"), {}],
        "both": Boxed(Quantized(jnp.full(2, step), 2.0 * step)),
    }


def assert_is_state(found: Any, step: float) -> None:
    wanted = state(step)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert found["quantized"].unit == "m"
    assert found["boxed"][0].note == "kept"
    for one, other in (
        (found["quantized"].numbers, wanted["quantized"].numbers),
        (found["quantized"].scale, wanted["quantized"].scale),
        (found["boxed"][0].value, wanted["boxed"][0].value),
        (found["both"].value.numbers, wanted["both"].value.numbers),
    ):
        assert type(one) is type(other)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert found["both"].value.scale == 2.0 * step


@pytest.mark.parametrize("is_async", [False, True], ids=["save", "save_async"])
def test_values_come_back_as_their_type_with_a_target_and_as_arrays_without(
    tmp_path: Path, *, is_async: bool
) -> None:
    path = tmp_path / "c"
    if is_async:
        fp.save_async(path, state(1), options=QUICK).result()
        fp.finalize(path)
    else:
        stored(path, state(1))
    names = ["plain", "quantized.numbers", "quantized.scale", "boxed.0", "boxed.1"]
    assert list(fp.metadata(path).leaves) == [
        *("both.numbers", "both.scale"), "boxed.0", "boxed.1", *names[:3]
    ]  # fmt: skip
    assert_is_state(fp.load(path, state(0)), 1)
    nested = fp.load(path)
    np.testing.assert_array_equal(nested["quantized"]["numbers"], np.ones((4, 2)))
    np.testing.assert_array_equal(nested["boxed"][0], np.ones((2, 2)))


def test_target_may_say_what_is_wanted_by_shapes(tmp_path: Path) -> None:
    path = tmp_path / "c"
    stored(path, {"w": Quantized(jnp.arange(4), jnp.ones(()))})
    shapes = (jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32))
    found = fp.load(path, {"w": Quantized(*shapes, unit="s")})["w"]
    assert found.unit == "s"
    np.testing.assert_array_equal(found.numbers, np.arange(4))
    with pytest.raises(fp.TargetMismatchError, match=r"w\.numbers"):
        fp.load(path, {"w": Quantized(shapes[1], shapes[1])})


def test_callback_saves_restores_and_cuts_rows_of_them(tmp_path: Path) -> None:
    layers = Quantized(jnp.arange(12.0).reshape(3, 4), jnp.arange(3.0))
    callback = PartialCheckpointCallback(tmp_path, stacked={"params.layers": 0}, options=QUICK)
    loop = trainer(state={"params": {"layers": layers}, "more": state(2)})
    callback.on_fit_start(loop, None)
    loop.global_step = 1
    callback.on_train_batch_end(loop, None, None, None, 0)
    callback.on_train_end(loop, None)
    (report,) = callback.reports
    assert {f"params.layers.{row}" for row in range(3)} <= set(report.groups)
    empty = Quantized(jnp.zeros((3, 4)), jnp.zeros(3))
    restored = callback.restore({"params": {"layers": empty}, "more": state(0)})
    assert restored is not None
    found = restored[0]["params"]["layers"]
    np.testing.assert_array_equal(found.numbers, layers.numbers)
    np.testing.assert_array_equal(found.scale, layers.scale)
    assert_is_state(restored[0]["more"], 2)


def test_subclass_is_saved_as_what_it_derives_from(tmp_path: Path) -> None:
    class Special(Quantized):
        pass

    stored(tmp_path / "c", {"w": Special(jnp.ones(2), 1.0)})
    found = fp.load(tmp_path / "c", {"w": Special(jnp.zeros(2), 0.0)})["w"]
    np.testing.assert_array_equal(found.numbers, np.ones(2))


class Unknown:
    """A type that is not registered."""


def test_unknown_type_is_refused_with_the_call_that_registers_it(tmp_path: Path) -> None:
    advice = rf"fp\.register_leaf_type\({__name__}\.Unknown, to_arrays=\.\.\., from_arrays=\.\.\.\)"
    with pytest.raises(fp.UnsupportedLeafError, match=f"'a.w'.*{advice}"):
        fp.save(tmp_path / "c", {"a": {"w": Unknown()}})
    stored(tmp_path / "c", {"w": np.ones(2)})
    with pytest.raises(fp.TargetMismatchError, match=f"'w'.*{advice}"):
        fp.load(tmp_path / "c", {"w": Unknown()})


@pytest.mark.parametrize("leaf_type", [Quantized, jax.Array, np.ndarray, dict, float, object])
def test_type_that_is_known_cannot_be_registered(leaf_type: type) -> None:
    with pytest.raises(ValueError, match=r"is (registered already|saved as it is)"):
        fp.register_leaf_type(
            leaf_type, to_arrays=lambda x: x, from_arrays=lambda _, arrays: arrays
        )


def test_value_cannot_be_registered() -> None:
    with pytest.raises(TypeError, match="a type is registered, not 3"):
        fp.register_leaf_type(
            3,  # type: ignore[arg-type]
            to_arrays=lambda x: x,
            from_arrays=lambda _, arrays: arrays,
        )


@pytest.mark.parametrize("made", [None, Unknown()], ids=["None", "itself"])
def test_value_that_is_made_no_arrays_is_refused(tmp_path: Path, made: Any) -> None:
    fp.register_leaf_type(Unknown, to_arrays=lambda _: made, from_arrays=lambda like, _: like)
    with pytest.raises(fp.UnsupportedLeafError, match=r"\['a'\].*without shards"):
        fp.save(tmp_path / "c", {"a": Unknown()})
    assert not list(tmp_path.iterdir())


def test_error_of_a_conversion_says_which_leaf_it_is_about(tmp_path: Path) -> None:
    def fail(_: Unknown) -> Any:
        raise ZeroDivisionError

    fp.register_leaf_type(Unknown, to_arrays=fail, from_arrays=lambda like, _: like)
    with pytest.raises(ZeroDivisionError) as raised:
        fp.save(tmp_path / "c", {"a": Unknown()})
    assert "['a']" in raised.value.__notes__[0]
