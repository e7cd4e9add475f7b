"""The pipeline: the model's layers on stages, one device each, micro-batches in GPipe order.

Each stage has three jitted functions of its own: forward, backward and update. Backward computes
the stage's forward again from its input (rematerialisation, as in GPipe: Huang et al. 2019), so
between the two passes a stage keeps nothing but one input per micro-batch. JAX dispatches without
waiting, so while this thread issues work the stages' devices overlap as their inputs allow.

Dropout, gradients and optimizer state are each layer's own: how layers are spread over stages
decides where they are and nothing else, so any number of stages can go on from the same state.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from lm_model import layer_kinds

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

    from lm_model import Layer, ModelConfig
    from numpy.typing import NDArray

LEARNING_RATE = 2e-3
WARMUP_STEPS = 20

Tree = Any
ByLayer = dict[str, Tree]
"""Layer name to a tree: its parameters, or their gradients or optimizer state."""


def make_optimizer() -> optax.GradientTransformation:
    """AdamW for one layer; its state, the step count included, belongs to that layer alone."""
    rate = optax.warmup_constant_schedule(0.0, LEARNING_RATE, WARMUP_STEPS)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init_layer(kind: type[Layer], config: ModelConfig, key: jax.Array) -> tuple[Tree, Tree]:
    params = nnx.to_pure_dict(nnx.state(kind(config, nnx.Rngs(key)), nnx.Param))
    return params, make_optimizer().init(params)


def init_layers(
    config: ModelConfig, key: jax.Array, *, only: Container[str] | None = None
) -> tuple[ByLayer, ByLayer]:
    """Draws the parameters of the model, or `only` of some layers, and their optimizer state."""
    kinds = layer_kinds(config)
    keys = jax.random.split(key, len(kinds))
    params, opt_state = {}, {}
    for (name, kind), layer_key in zip(kinds.items(), keys, strict=True):
        if only is None or name in only:
            params[name], opt_state[name] = _init_layer(kind, config, layer_key)
    return params, opt_state


@dataclass(frozen=True)
class LayerGraph:
    """A layer without its parameters: its place in the whole model and its NNX graph."""

    name: str
    index: int
    graph: nnx.GraphDef[Layer]


def layer_graphs(config: ModelConfig) -> list[LayerGraph]:
    """The model's layers in order, without computing anything."""

    def abstract(kind: type[Layer]) -> Layer:
        return kind(config, nnx.Rngs(0))

    kinds = layer_kinds(config).items()
    layers = [nnx.eval_shape(functools.partial(abstract, kind)) for _, kind in kinds]
    graphs = [nnx.split(layer)[0] for layer in layers]
    return [
        LayerGraph(name, index, graph)
        for index, (name, graph) in enumerate(zip(layer_kinds(config), graphs, strict=True))
    ]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draw:
    """What a micro-batch's dropout is drawn from: nothing that resuming or the stages change.

    Attributes:
        key: the run's dropout key, on the stage's device.
        step: training steps before this one.
        micro_batch: its number within the step.
    """

    key: jax.Array
    step: np.uint32
    micro_batch: np.uint32

    def layer_key(self, index: int) -> jax.Array:
        """The key of the model's layer number `index`."""
        key = jax.random.fold_in(self.key, self.step)
        return jax.random.fold_in(jax.random.fold_in(key, self.micro_batch), index)


class Stage:
    """Consecutive layers on one device, with their parameters, gradients and optimizer state.

    Attributes:
        names: the layers' global names, in order.
        device: where all of it is.
        params: parameters by layer name.
        opt_state: Optax state by layer name.
        grads: gradients summed over the micro-batches so far; zero between steps.
        dropout_key: copy of the run's dropout key.
    """

    def __init__(self, layers: Sequence[LayerGraph], device: jax.Device, *, is_last: bool) -> None:
        """Makes the stage's functions; `place` gives it its state."""
        self.names = [layer.name for layer in layers]
        self.device = device
        self.is_first = layers[0].index == 0
        self.is_last = is_last
        self.params: ByLayer = {}
        self.opt_state: ByLayer = {}
        self.grads: ByLayer = {}
        self.dropout_key: jax.Array
        self._layers = layers
        self._optimizer = make_optimizer()
        self._jit_forward = jax.jit(self._run)
        # What is donated is what an output takes the place of: the gradients, and the stage's input
        # for the gradient with respect to it. The first stage's input is tokens, which have none.
        donated = ("grads",) if self.is_first else ("grads", "x")
        self._jit_backward = jax.jit(self._pull_back, donate_argnames=donated)
        self._jit_update = jax.jit(self._step, donate_argnums=(0, 1, 2))

    def place(self, params: ByLayer, opt_state: ByLayer, dropout_key: jax.Array) -> None:
        """Takes this stage's layers out of the whole model's state, onto its device."""
        mine = [{name: whole[name] for name in self.names} for whole in (params, opt_state)]
        self.params, self.opt_state = jax.device_put(mine, self.device)
        self.dropout_key = jax.device_put(dropout_key, self.device)
        self.grads = jax.device_put(jax.jit(_zeros)(self.params), self.device)

    def forward(self, x: jax.Array, targets: jax.Array | None, step: int, number: int) -> jax.Array:
        """Issues the forward pass: the stage's output or, in the last stage, the mean loss."""
        y: jax.Array = self._jit_forward(self.params, x, targets, self._draw(step, number))
        return y

    def backward(
        self, x: jax.Array, targets: jax.Array | None, dy: Tree, step: int, number: int
    ) -> jax.Array | None:
        """Issues the backward pass, which uses up `x`; returns the gradient with respect to it."""
        draw = self._draw(step, number)
        dx: jax.Array | None
        dx, self.grads = self._jit_backward(
            self.params, x=x, targets=targets, dy=dy, draw=draw, grads=self.grads
        )
        return dx

    def update(self) -> None:
        """Issues the update of all layers by the gradients summed so far."""
        self.params, self.opt_state, self.grads = self._jit_update(
            self.params, self.opt_state, self.grads
        )

    def _draw(self, step: int, number: int) -> Draw:
        return Draw(self.dropout_key, np.uint32(step), np.uint32(number))

    def _run(self, params: ByLayer, x: jax.Array, targets: Tree, draw: Draw) -> jax.Array:
        for layer in self._layers:
            module = nnx.merge(layer.graph, params[layer.name])
            x = module(x, draw.layer_key(layer.index))
        if not self.is_last:
            return x
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x, targets))

    def _pull_back(
        self, params: ByLayer, *, x: jax.Array, targets: Tree, dy: Tree, draw: Draw, grads: ByLayer
    ) -> tuple[jax.Array | None, ByLayer]:
        if self.is_first:
            _, pull = jax.vjp(lambda params: self._run(params, x, targets, draw), params)
            (dparams,), dx = pull(dy), None
        else:
            _, pull = jax.vjp(lambda params, x: self._run(params, x, targets, draw), params, x)
            dparams, dx = pull(dy)
        return dx, jax.tree.map(jnp.add, grads, dparams)

    def _step(
        self, params: ByLayer, opt_state: ByLayer, grads: ByLayer
    ) -> tuple[ByLayer, ByLayer, ByLayer]:
        """Each layer's AdamW step; gradients of zero take the memory of those used up."""
        new_params, new_opt_state = {}, {}
        for name in self.names:
            updates, new_opt_state[name] = self._optimizer.update(
                grads[name], opt_state[name], params[name]
            )
            new_params[name] = optax.apply_updates(params[name], updates)
        return new_params, new_opt_state, _zeros(grads)


def _zeros(tree: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, tree)


def split_stages(layers: Sequence[LayerGraph], count: int) -> list[Stage]:
    """Spreads the blocks evenly over `count` stages; embedding and head go to the ends."""
    devices = jax.local_devices()
    blocks = len(layers) - 2
    cuts = [0, *(1 + blocks * number // count for number in range(1, count)), len(layers)]
    return [
        Stage(layers[start:end], devices[number % len(devices)], is_last=end == len(layers))
        for number, (start, end) in enumerate(itertools.pairwise(cuts))
    ]


class Pipeline:
    """All stages, and the order in which micro-batches pass through them."""

    def __init__(self, config: ModelConfig, *, stages: int, micro_batches: int) -> None:
        """Builds the stages; `place` gives them their state."""
        self.stages = split_stages(layer_graphs(config), stages)
        self.micro_batches = micro_batches

    def place(self, params: ByLayer, opt_state: ByLayer, dropout_key: jax.Array) -> None:
        """Puts every layer, and a copy of the dropout key, on its stage's device."""
        for stage in self.stages:
            stage.place(params, opt_state, dropout_key)

    @property
    def params(self) -> ByLayer:
        """Every layer's parameters, where they are."""
        return {name: tree for stage in self.stages for name, tree in stage.params.items()}

    @property
    def opt_state(self) -> ByLayer:
        """Every layer's optimizer state, where it is."""
        return {name: tree for stage in self.stages for name, tree in stage.opt_state.items()}

    def train_step(
        self, batch: NDArray[np.int32], step: int, on_updated: Callable[[Stage], None]
    ) -> list[jax.Array]:
        """Issues one training step, in GPipe order, without waiting for any of it.

        Args:
            batch: int32 [windows, length + 1].
            step: training steps before this one.
            on_updated: called with each stage the moment its update is issued, last stage first:
                the stages before it have their last backward pass still ahead of them.

        Returns:
            Each micro-batch's loss, to be computed.
        """
        parts = np.split(batch, self.micro_batches)
        targets = [jax.device_put(part[:, 1:], self.stages[-1].device) for part in parts]
        inputs: list[list[jax.Array]] = []
        losses = []
        for number, part in enumerate(parts):
            xs, loss = self._forward(part[:, :-1], targets[number], step, number)
            inputs.append(xs)
            losses.append(loss)
        for number in reversed(range(self.micro_batches)):
            updated = on_updated if number == 0 else None
            self._backward(inputs[number], targets[number], step, number, updated)
        return losses

    def _forward(
        self, tokens: NDArray[np.int32], targets: jax.Array, step: int, number: int
    ) -> tuple[list[jax.Array], jax.Array]:
        """One micro-batch through all stages: each stage's input, and the loss."""
        xs: list[jax.Array] = []
        x = jax.device_put(tokens, self.stages[0].device)
        for stage in self.stages:
            xs.append(jax.device_put(x, stage.device))
            x = stage.forward(xs[-1], targets if stage.is_last else None, step, number)
        return xs, x

    def _backward(
        self,
        xs: list[jax.Array],
        targets: jax.Array,
        step: int,
        number: int,
        on_updated: Callable[[Stage], None] | None,
    ) -> None:
        """One micro-batch back through all stages, using up `xs`; the step's last one updates."""
        dy: Tree = np.float32(1 / self.micro_batches)
        for stage in reversed(self.stages):
            dy = jax.device_put(dy, stage.device)
            dy = stage.backward(xs.pop(), targets if stage.is_last else None, dy, step, number)
            if on_updated is not None:
                stage.update()
                on_updated(stage)
