"""How eight layers of a model are kept: MaxText's layouts, with its shapes and partition specs.

`wi_0` is the kernel of a layer's first dense block, `[embed, mlp]`. `stage`, `fsdp` and `tensor`
are axes of a mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_partial as fp

LAYERS, EMBED, MLP = 8, 32, 64
P = PartitionSpec


@dataclass(frozen=True)
class Layout:
    """One way to keep the layers.

    Attributes:
      stack: What it is called, and along which axes it stacks.
      spec: Partition spec of each kernel.
      kernels: From the layers' kernels, `[8, 32, 64]`, to the arrays, by names in the decoder.
    """

    stack: fp.Stack
    spec: PartitionSpec
    kernels: Callable[[np.ndarray], dict[str, np.ndarray]]

    def tree(self, values: np.ndarray) -> dict[str, Any]:
        """The decoder, as nested dicts of NumPy's arrays."""
        tree: dict[str, Any] = {}
        for name, array in self.kernels(values).items():
            node = tree
            for key in ("decoder", *name.split(".")):
                node = node.setdefault(key, {})
            node["mlp"] = {"wi_0": {"kernel": np.ascontiguousarray(array)}}
        return tree

    @property
    def stacked(self) -> dict[str, tuple[int, ...]]:
        """What the callback is told, for leaves below "params"."""
        if not self.stack.all_axes:
            return {}
        return {f"params.decoder.{name}": self.stack.all_axes for name in self.kernels(VALUES)}


VALUES = np.arange(LAYERS * EMBED * MLP, dtype=np.float32).reshape(LAYERS, EMBED, MLP)
_PIPELINE = "decoder.pipeline_module.layers"

LAYOUTS = {
    "pipeline of 4 stages, 2 repeats": Layout(
        fp.Stack(_PIPELINE, (0, 1)),
        P(None, "stage", "fsdp", "tensor"),
        lambda values: {"pipeline_module.layers": values.reshape(2, 4, EMBED, MLP)},
    ),
    "pipeline without repeats": Layout(
        fp.Stack(_PIPELINE, 0),
        P("stage", "fsdp", "tensor"),
        lambda values: {"pipeline_module.layers": values},
    ),
    "2 layers a stage, scanned": Layout(
        fp.Stack(f"{_PIPELINE}.scanned_layers", (0, 1, 3)),
        P(None, "stage", "fsdp", None, "tensor"),
        lambda values: {
            "pipeline_module.layers.scanned_layers": np.moveaxis(
                values.reshape(2, 2, 2, EMBED, MLP), 2, 3
            )
        },
    ),
    "2 layers a stage, unscanned": Layout(
        fp.Stack(f"{_PIPELINE}.layers_{{}}", (0, 1)),
        P(None, "stage", "fsdp", "tensor"),
        lambda values: {
            f"pipeline_module.layers.layers_{layer}": values.reshape(2, 2, 2, EMBED, MLP)[
                :, :, layer
            ]
            for layer in range(2)
        },
    ),
    "scan without pipeline": Layout(
        fp.Stack("decoder.layers", 1),
        P("fsdp", None, "tensor"),
        lambda values: {"layers": np.moveaxis(values, 0, 1)},
    ),
    "unscanned": Layout(
        fp.Stack("decoder.layers_{}"),
        P("fsdp", "tensor"),
        lambda values: {f"layers_{layer}": values[layer] for layer in range(LAYERS)},
    ),
    "a list of layers": Layout(
        fp.Stack("decoder.layers.{}"),
        P("fsdp", "tensor"),
        lambda values: {f"layers.{layer}": values[layer] for layer in range(LAYERS)},
    ),
}


def mesh() -> Mesh:
    """Of eight devices; without four stages some layouts are on two of them."""
    return Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("stage", "fsdp", "tensor"))


def sharded(tree: Any, layout: Layout) -> Any:
    """The same tree on devices, as the layout shards it."""
    sharding = NamedSharding(mesh(), layout.spec)
    return jax.tree.map(lambda array: jax.device_put(array, sharding), tree)


def shapes(tree: Any) -> Any:
    """A target that describes a tree, without its data."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )


def train_state(layout: Layout) -> Any:
    """Parameters and Adam's moments, each with values of its own."""
    params, mu, nu = (layout.tree(VALUES + 1000 * step) for step in range(3))
    state = {"params": params, "opt_state": [{"mu": mu, "nu": nu}]}
    return sharded(state, layout)
