"""The sharding that a leaf was saved with, made again of the devices that are here."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jax.sharding import SingleDeviceSharding as OnOneDevice

from flax_partial.errors import TargetMismatchError
from flax_partial.format.model import Leaf
from flax_partial.loading import target as placing


def sharding_of(leaf: Leaf) -> Sharding | None:
    """Returns the sharding that a leaf was saved with; None for the default device.

    A mesh is made of the devices that have the numbers of those it was saved from; what lay on one
    device goes to that of its name, and where there is none to the default device.

    Raises:
      TargetMismatchError: There are no such devices, or it is a sharding of another kind.
    """
    if leaf.sharding is None:
        return None
    saved = leaf.sharding.json
    try:
        kind = saved["sharding_type"]
        if kind == "SingleDeviceSharding":
            return _on_one_device(saved)
        if kind == "NamedSharding":
            return _named(saved, axes=placing.abstract(leaf).ndim)
        problem = f"it is a {kind}"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise TargetMismatchError(
        f"{leaf.name!r} cannot be loaded as it was sharded ({problem}): give a target that says "
        "where it goes"
    )


def _on_one_device(saved: Mapping[str, Any]) -> Sharding | None:
    name = _present_name(saved["device_str"])
    for device in jax.local_devices():
        if _present_name(str(device)) == name:
            return OnOneDevice(device)
    return None


def _present_name(device: str) -> str:
    return device.replace("TFRT_CPU_", "cpu:")  # what JAX called it before 0.10


def _named(saved: Mapping[str, Any], *, axes: int) -> NamedSharding:
    """Makes a sharding over a mesh; that of a PRNG key was saved with the axes of its key data."""
    sizes = tuple(saved["shape"])
    types = saved.get("axis_types")
    mesh = Mesh(
        _devices(saved.get("device_mesh"), math.prod(sizes)).reshape(sizes),
        tuple(saved["axis_names"]),
        axis_types=types and tuple(_AXIS_TYPES[one] for one in types),
    )
    spec = (tuple(one) if isinstance(one, list) else one for one in saved["partition_spec"][:axes])
    return NamedSharding(mesh, PartitionSpec(*spec))


_AXIS_TYPES = {str(one): one for one in AxisType}


def _devices(saved: Mapping[str, Any] | None, count: int) -> np.ndarray:
    """Returns the devices of a mesh: those with the saved numbers, or the first ones."""
    here = {device.id: device for device in jax.devices()}
    numbers = [*here][:count]
    if saved is not None:
        numbers = [one["id"] for one in np.ravel(np.array(saved["mesh"], dtype=object))]
    if len(numbers) < count or not here.keys() >= set(numbers):
        raise ValueError(
            f"it was saved from {count} devices, numbers {numbers}, and here are {len(here)}"
        )
    return np.array([here[number] for number in numbers])
