"""The pipeline: the model's layers on stages, one device each, micro-batches in GPipe order.

Each stage has three jitted functions of its own: forward, backward and update. Backward computes
the stage's forward again from its input (rematerialisation, as in GPipe: Huang et al. 2019), so
between the two passes a stage keeps nothing but one input per micro-batch. Each pass is issued
once for all micro-batches. In one process JAX dispatches without waiting, so while this
thread issues work the stages' devices overlap as their inputs allow.

Dropout, gradients and optimizer state are each layer's own: how layers are spread over stages
decides where they are and nothing else, so any number of stages can go on from the same state.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from lm_link import DeviceLink, ProcessLink
from lm_model import draw_params, graph_of, layer_kinds

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

    from lm_link import Link
    from lm_model import Layer, ModelConfig
    from numpy.typing import NDArray

LEARNING_RATE = 2e-3
WARMUP_STEPS = 20

Tree = Any
ByLayer = dict[str, Tree]
"""Layer name to a tree: its parameters, or their gradients or optimizer state."""
Layers = dict[str, ByLayer]
"""The layers' `params` and `opt_state`."""


def make_optimizer() -> optax.GradientTransformation:
    """AdamW for one layer; its state, the step count included, belongs to that layer alone."""
    rate = optax.warmup_constant_schedule(0.0, LEARNING_RATE, WARMUP_STEPS)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init_layer(kind: type[Layer], config: ModelConfig, key: jax.Array) -> tuple[Tree, Tree]:
    params = draw_params(kind, config, key)
    return params, make_optimizer().init(params)


def init_layers(config: ModelConfig, key: jax.Array, only: Container[str]) -> Layers:
    """Draws the parameters of the layers named in `only`, and their optimizer state."""
    kinds = layer_kinds(config)
    keys = jax.random.split(key, len(kinds))
    layers: Layers = {"params": {}, "opt_state": {}}
    for (name, kind), layer_key in zip(kinds.items(), keys, strict=True):
        if name in only:
            drawn = _init_layer(kind, config, layer_key)
            layers["params"][name], layers["opt_state"][name] = drawn
    return layers


@dataclass(frozen=True)
class LayerGraph:
    """A layer without its parameters: its place in the whole model and its NNX graph."""

    name: str
    index: int
    graph: nnx.GraphDef[Layer]


def layer_graphs(config: ModelConfig) -> list[LayerGraph]:
    """The model's layers in order, without computing anything."""
    return [
        LayerGraph(name, index, graph_of(kind, config))
        for index, (name, kind) in enumerate(layer_kinds(config).items())
    ]


class Draw(NamedTuple):
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
        is_last: whether this stage computes the loss.
        params: parameters by layer name.
        opt_state: Optax state by layer name.
        grads: gradients summed over the micro-batches so far; zero between steps.
        dropout_key: copy of the run's dropout key.
    """

    def __init__(
        self, layers: Sequence[LayerGraph], device: jax.Device, links: Sequence[Link | None]
    ) -> None:
        """Makes the stage's functions; `place` gives it its state.

        Args:
            layers: what it computes.
            device: where.
            links: from the stage before, None for the first, which reads tokens; and to the next
                stage, None for the last, which computes the loss.
        """
        before, after = links
        self.names = [layer.name for layer in layers]
        self.device = device
        self.is_last = after is None
        self.params: ByLayer
        self.opt_state: ByLayer
        self.grads: ByLayer
        self.dropout_key: jax.Array
        self._layers = layers
        self._before, self._after = before, after
        self._inputs: list[tuple[jax.Array, jax.Array | None, Draw]] = []
        self._optimizer = make_optimizer()
        self._jit_forward = jax.jit(self._run)
        # What is donated is what an output takes the place of: the gradients, and the stage's input
        # for the gradient with respect to it. The first stage's input is tokens, which have none.
        donated = ("grads",) if before is None else ("grads", "x")
        self._jit_backward = jax.jit(self._pull_back, donate_argnames=donated)
        self._jit_update = jax.jit(self._step, donate_argnums=(0, 1, 2))

    def place(self, layers: Layers, dropout_key: jax.Array) -> None:
        """Takes this stage's layers out of the whole model's, onto its device."""
        mine = [
            {name: layers[root][name] for name in self.names} for root in ("params", "opt_state")
        ]
        self.params, self.opt_state = jax.device_put(mine, self.device)
        self.dropout_key = jax.device_put(dropout_key, self.device)
        self.grads = jax.device_put(jax.jit(_zeros)(self.params), self.device)

    def forward(self, micro_batches: Sequence[NDArray[np.int32]], step: int) -> list[jax.Array]:
        """Issues the forward pass of all micro-batches; returns the last stage's mean losses."""
        losses = []
        for number, tokens in enumerate(micro_batches):
            targets = jax.device_put(tokens[:, 1:], self.device) if self._after is None else None
            draw = Draw(self.dropout_key, np.uint32(step), np.uint32(number))
            if self._before is None:
                x = jax.device_put(tokens[:, :-1], self.device)
            else:
                x = self._before.receive_down()
            y = self._jit_forward(self.params, x, targets, draw)
            if self._after is None:
                losses.append(y)
            else:
                self._after.send_down(y)
            self._inputs.append((x, targets, draw))
        return losses

    def backward(self) -> None:
        """Issues the backward pass of all micro-batches, which uses up their inputs."""
        last_dy = np.float32(1 / len(self._inputs))
        while self._inputs:
            x, targets, draw = self._inputs.pop()
            dy = last_dy if self._after is None else self._after.receive_up()
            dx, self.grads = self._jit_backward(
                self.params, x=x, targets=targets, dy=dy, draw=draw, grads=self.grads
            )
            if self._before is not None:
                self._before.send_up(dx)

    def update(self) -> None:
        """Issues the update of all layers by the gradients summed so far."""
        self.params, self.opt_state, self.grads = self._jit_update(
            self.params, self.opt_state, self.grads
        )

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
        if self._before is None:
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


def split_layers(config: ModelConfig, count: int) -> list[list[LayerGraph]]:
    """Spreads the blocks evenly over `count` stages; embedding and head go to the ends."""
    layers = layer_graphs(config)
    blocks = len(layers) - 2
    cuts = [0, *(1 + blocks * number // count for number in range(1, count)), len(layers)]
    return [layers[start:end] for start, end in itertools.pairwise(cuts)]


def make_stages(config: ModelConfig, count: int) -> list[Stage]:
    """Returns all stages of the pipeline, spread over this process's devices."""
    devices = jax.local_devices()
    where = [devices[number % len(devices)] for number in range(count)]
    links = [None, *itertools.starmap(DeviceLink, itertools.pairwise(where)), None]
    return list(map(Stage, split_layers(config, count), where, itertools.pairwise(links)))


def make_own_stage(config: ModelConfig, *, windows: int) -> Stage:
    """Returns the stage of this process, one of several; a micro-batch has `windows` windows."""
    number, count = jax.process_index(), jax.process_count()
    shape = (windows, config.length, config.width)
    # Links are made in the order of the pipeline: making one involves both of its ends.
    before = ProcessLink(number - 1, shape=shape) if number else None
    after = ProcessLink(number, shape=shape) if number < count - 1 else None
    return Stage(split_layers(config, count)[number], jax.local_devices()[0], (before, after))


def train_step(
    stages: Sequence[Stage],
    micro_batches: Sequence[NDArray[np.int32]],
    step: int,
    on_updated: Callable[[Stage], None],
) -> list[jax.Array]:
    """Issues one training step of some stages, in GPipe order.

    Args:
        stages: all of the pipeline, or this process's own.
        micro_batches: each int32 [windows, length + 1].
        step: training steps before this one.
        on_updated: called with each stage the moment its update is issued, last stage first: the
            stages before it have their backward passes still ahead of them.

    Returns:
        Each micro-batch's loss, to be computed; nothing where the last stage is elsewhere.
    """
    losses: list[jax.Array] = []
    for stage in stages:
        losses = stage.forward(micro_batches, step)
    for stage in reversed(stages):
        stage.backward()
        stage.update()
        on_updated(stage)
    return losses
