"""A device that finds out late, when a copy is waited for, that it has no memory for it."""

from __future__ import annotations

import threading
from typing import Any

import jax
import numpy as np
import pytest
from things import MOST_SECS

from flax_partial.saving import device_copies, device_room, job


class NotMade:
    """Stands in for what a device returns that finds out late that it has no memory for it."""

    def __init__(self, like: jax.ShapeDtypeStruct, place: jax.Array, told: threading.Event) -> None:
        self.told = told
        self.shape, self.dtype, self.sharding = like.shape, like.dtype, place.sharding
        self.nbytes = like.size * like.dtype.itemsize

    def is_ready(self) -> bool:
        return True

    def block_until_ready(self) -> None:
        assert self.told.wait(MOST_SECS)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        self.block_until_ready()
        raise AssertionError


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Copies are dispatched, and fail as they are waited for, once this is set."""
    told = threading.Event()

    def get(batch: Any) -> Any:
        ways = [
            device_copies._pack if one.packs else device_copies._copy  # noqa: SLF001
            for one in batch.bundles.values()
        ]

        def make(bundles: list[list[jax.Array]]) -> list[list[NotMade]]:
            return [
                [NotMade(like, arrays[0], told) for like in jax.eval_shape(way, arrays)]
                for way, arrays in zip(ways, bundles, strict=True)
            ]

        return make

    monkeypatch.setattr(device_copies._programs, "get", get)  # noqa: SLF001
    monkeypatch.setattr(job, "_room", device_room.DeviceRoom())
    return told
