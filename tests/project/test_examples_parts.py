"""The main job's trainer and pipeline, each by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from lm_model import ModelConfig, layer_kinds
from lm_pipeline import (
    Draw,
    Stage,
    init_layers,
    layer_graphs,
    make_stages,
    split_layers,
    train_step,
)
from trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lm_pipeline import ByLayer, Layers
    from numpy.typing import NDArray


class Counter:
    """The least a trainer can train: adds up its batches."""

    batches_per_epoch = 2

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.total = 0
        self._fails_at = fails_at

    def state(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.total = state["total"]

    def batches(self, epoch: int, start: int) -> Iterator[int]:
        return iter(range(10 * epoch + start, 10 * epoch + self.batches_per_epoch))

    def training_step(self, trainer: Trainer, batch: int, batch_idx: int) -> dict[str, jax.Array]:
        if trainer.global_step == self._fails_at:
            raise ArithmeticError(batch_idx)
        self.total += batch
        trainer.layer_ready("total", self.total)
        trainer.optimizer_state_ready("total", None)
        return {}


class Recorder:
    """Writes down the hooks that the trainer calls, and whatever it passes beside itself."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, hook: str) -> Any:
        if not hook.startswith(("on_", "setup", "teardown")):
            raise AttributeError(hook)
        return lambda _, *arguments: self.calls.append((hook, *arguments))


def test_trainer_calls_lightnings_hooks_in_lightnings_order() -> None:
    recorder, module = Recorder(), Counter()
    Trainer(max_epochs=1, callbacks=[object(), recorder]).fit(module)

    def batch(number: int, total: int) -> list[tuple[Any, ...]]:
        return [
            ("on_train_batch_start", module, number, number),
            ("on_layer_ready", "total", total),
            ("on_optimizer_state_ready", "total", None),
            ("on_train_batch_end", module, {}, number, number),
        ]

    assert recorder.calls == [
        ("setup", module, "fit"),
        ("on_fit_start", module),
        ("on_train_start", module),
        ("on_train_epoch_start", module),
        *batch(0, 0),
        *batch(1, 1),
        ("on_train_epoch_end", module),
        ("on_train_end", module),
        ("on_fit_end", module),
        ("teardown", module, "fit"),
    ]


def test_trainer_that_fails_tells_callbacks_and_cleans_up() -> None:
    recorder, module = Recorder(), Counter(fails_at=1)
    with pytest.raises(ArithmeticError) as raised:
        Trainer(max_epochs=1, callbacks=[recorder]).fit(module)
    assert recorder.calls[-2:] == [
        ("on_exception", module, raised.value),
        ("teardown", module, "fit"),
    ]


@pytest.mark.parametrize(
    ("batches_done", "expected"), [(1, {0: [1], 1: [10, 11]}), (2, {1: [10, 11]})]
)
def test_trainer_resumes_at_the_batch_after_the_checkpoint(
    batches_done: int, expected: dict[int, list[int]]
) -> None:
    class Checkpoint(Recorder):
        def restore(self, target: dict[str, Any], *, partial: bool) -> tuple[dict[str, Any], int]:
            progress = {"global_step": 7, "current_epoch": 0, "batches_done": batches_done}
            assert target.keys() == {"total", "progress"}
            assert not partial
            return {"total": 100, "progress": progress}, 7

    checkpoint, module = Checkpoint(), Counter()
    trainer = Trainer(max_epochs=2, callbacks=[checkpoint])
    trainer.fit(module)
    batches = [batch for numbers in expected.values() for batch in numbers]
    trained = [call[2] for call in checkpoint.calls if call[0] == "on_train_batch_start"]
    assert trained == batches
    assert module.total == 100 + sum(batches)
    assert (trainer.resumed_at, trainer.global_step) == (7, 7 + len(batches))


TINY = ModelConfig(vocabulary=64, length=8, width=32, layers=2)
MICRO_BATCHES = 2
STEP = 5


def whole_model_loss(params: ByLayer, batch: NDArray[np.int32], key: jax.Array) -> jax.Array:
    """The loss that the pipeline computes, without stages."""
    losses: list[jax.Array] = []
    for number, part in enumerate(np.split(batch, MICRO_BATCHES)):
        x: Any = part[:, :-1]
        draw = Draw(key, np.uint32(STEP), np.uint32(number))
        for layer in layer_graphs(TINY):
            x = nnx.merge(layer.graph, params[layer.name])(x, draw.layer_key(layer.index))
        losses.append(optax.softmax_cross_entropy_with_integer_labels(x, part[:, 1:]).mean())
    return jnp.mean(jnp.stack(losses))


def random_layers() -> Layers:
    """Parameters and optimizer state, without compiling the layers' own initializers."""
    draw = np.random.default_rng(0)
    names = layer_kinds(TINY)
    layers = jax.eval_shape(lambda: init_layers(TINY, jax.random.key(0), names))

    def random(leaf: Any) -> Any:
        return draw.normal(0, 0.1, leaf.shape).astype(leaf.dtype)

    return {
        "params": jax.tree.map(random, layers["params"]),
        "opt_state": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), layers["opt_state"]),
    }


@pytest.fixture
def _as_outside_of_tests() -> Iterator[None]:
    """JAX's own promotion rules: Optax relies on them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("_as_outside_of_tests")
def test_pipeline_updates_each_stage_while_earlier_ones_have_work_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = (2 * MICRO_BATCHES, TINY.length + 1)
    batch = np.random.default_rng(0).integers(0, TINY.vocabulary, shape, np.int32)
    key = jax.random.key(1)
    layers = random_layers()
    expected = jax.jit(jax.grad(whole_model_loss))(layers["params"], batch, key)
    stages = make_stages(TINY, 2)
    for stage in stages:
        stage.place(layers, key)
    events: list[str] = []
    grads: ByLayer = {}

    def record(name: str) -> None:
        original = getattr(Stage, name)

        def recorded(self: Stage, *arguments: Any) -> Any:
            events.append(f"{name} {stages.index(self)}")
            if name == "update":
                grads.update(jax.tree.map(np.array, self.grads))
            return original(self, *arguments)

        monkeypatch.setattr(Stage, name, recorded)

    for name in ("forward", "backward", "update"):
        record(name)
    before = [stage.params for stage in stages]
    losses = train_step(
        stages,
        np.split(batch, MICRO_BATCHES),
        STEP,
        lambda stage: events.append(f"told {stages.index(stage)}"),
    )
    assert events == [
        *("forward 0", "forward 1"),
        *("backward 1", "update 1", "told 1"),
        *("backward 0", "update 0", "told 0"),
    ]
    assert len(losses) == MICRO_BATCHES
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before)), "donated to the update"
    assert grads.keys() == expected.keys()
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5), grads, expected
    )
    devices = [{leaf.device for leaf in jax.tree.leaves(stage.params)} for stage in stages]
    assert devices == [{device} for device in jax.local_devices()[:2]]


@pytest.mark.parametrize(
    ("layers", "stages", "names"),
    [
        (1, 1, ["embed blocks.0 head"]),
        (2, 2, ["embed blocks.0", "blocks.1 head"]),
        (3, 2, ["embed blocks.0", "blocks.1 blocks.2 head"]),
        (5, 3, ["embed blocks.0", "blocks.1 blocks.2", "blocks.3 blocks.4 head"]),
    ],
)
def test_every_stage_has_blocks_and_the_ends_have_embedding_and_head(
    layers: int, stages: int, names: list[str]
) -> None:
    config = ModelConfig(vocabulary=8, length=4, width=32, layers=layers)
    split = split_layers(config, stages)
    assert [" ".join(layer.name for layer in stage) for stage in split] == names
