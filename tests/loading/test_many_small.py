"""Many small arrays of one form are put on the device by a compiled function."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from things import stored

import flax_partial as fp
from flax_partial.loading import target as placing

if TYPE_CHECKING:
    from pathlib import Path

COUNT = placing._WORTH_COMPILING + 3  # noqa: SLF001 - so that not all are in a whole batch


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    leaves = [jnp.full((2, 3), i, jnp.bfloat16) for i in range(COUNT)]
    return stored(tmp_path_factory.mktemp("many") / "c", {"leaves": leaves}).path


SETTINGS: dict[str, Any] = {
    "none": nullcontext,
    "no implicit transfers": lambda: jax.transfer_guard("disallow"),
    "nothing is compiled": jax.disable_jit,
    "another default device": lambda: jax.default_device(jax.devices()[3]),
    "a mesh": lambda: jax.set_mesh(jax.make_mesh((2,), ("x",))),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_many_small_leaves_are_what_device_put_makes(
    path: Path, setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    within: AbstractContextManager[Any] = setting()
    with within:
        found = fp.load(path)["leaves"]
        monkeypatch.setattr(placing, "_WORTH_COMPILING", COUNT + 1)
        wanted = fp.load(path)["leaves"]
    for one, other in zip(found, wanted, strict=True):
        assert (one.sharding, one.committed) == (other.sharding, other.committed)
        assert (one.aval, one.weak_type) == (other.aval, other.weak_type)
        np.testing.assert_array_equal(one, other)


def test_compiled_function_is_used_once_there_are_enough(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = placing._identity  # noqa: SLF001
    monkeypatch.setattr(placing, "_identity", lambda *some: sizes.append(len(some)) or real(*some))
    fp.load(path)
    assert sum(sizes) > COUNT // 2
    sizes.clear()
    fp.load(path, {"leaves": [jnp.zeros((2, 3), jnp.bfloat16)] * 9}, partial=True)
    assert sizes == []
